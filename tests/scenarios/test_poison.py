"""One bad event among hundreds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from commands import Command
from mnemobus import Settings, WriteRejected
from mnemobus.keys import Dimensions
from mnemobus.log.events import PUT, Event
from mnemobus.memory import new_id
from mnemobus.records import encode
from mnemobus.store import open_writer
from outside import Log, refuse_poison, stored
from scenarios.telling import opened, said
from servers import Workers, eventually


@pytest.fixture
def settings(settings: Settings, protocol: int, request: pytest.FixtureRequest) -> Settings:
    """One partition, so that all goes in one batch; either store, which has its schema already."""
    store = request.getfixturevalue("sqlite_url" if protocol == 2 else "postgres_url")
    settings = settings.model_copy(update={"log_partitions": 1, "database_url": store})
    writer = open_writer(settings)
    writer.open()
    writer.close()
    return settings


@pytest.mark.parametrize("kind", ["undecodable", "refused"])
async def test_g1_one_poison_event_in_a_batch_of_500_is_one_dead_letter_and_499_are_committed(
    settings: Settings, workers: Callable[..., Workers], command: Callable[..., Command], kind: str
) -> None:
    log = Log(settings)
    async with opened(settings) as bus:
        # Given 500 events in the log, of which one can't be decoded, or is refused by the database
        expected = sorted(f"text {n}" for n in range(499))
        events = [Event.put(encode(said(text), 1 << 20)) for text in expected]
        if kind == "undecodable":
            reason, bad = "content: JSON, but no object", b'["text"]'
        else:
            reason, bad = refuse_poison(settings), b'{"text":"poison"}'
        id = new_id()
        events.insert(200, Event(PUT, Dimensions("messages", "r1", entity="é"), id, bad, b"{}", created_us=7))
        receipts = await bus._writes.publish(events, None)
        dead = receipts.pop(200)

        # When a pool takes them
        pool = workers(settings, processes=1)

        # Then the 499 others are committed, the writer of that one is told why not, and the partition goes on
        await asyncio.gather(*(receipt.committed(20) for receipt in receipts))
        with pytest.raises(WriteRejected) as caught:
            await dead.committed()
        assert f"the write of version {dead.version} could not be applied and is in the dead letters" in str(
            caught.value
        )
        assert reason in str(caught.value)
        await bus.write(said("last"), durability="committed")
        await eventually(log.done)
        assert await stored(settings) == ["last", *expected]

        # And there is one letter, which says all there is to know
        [letter] = log.letters()
        assert reason in letter.pop("reason")
        assert letter == {
            "version": str(dead.version),
            "op": "put",
            "table": "messages",
            "room": "r1",
            "id": id,
            "entity": "é",
            "at": "7",
            "content": bad.decode(),
            "metadata": "{}",
        }
        # for everybody who reads the workers' log, the figures, or the letter itself
        assert f"event {dead.version} of log partition 0 can't be applied: " in pool.log.read_text()
        health = await bus.health()
        assert health.dead_letters == 1
        assert "1 dead letters: writes that no worker could apply" in health.problems
        shown = command("dead", "show", str(dead.version), settings=settings)
        assert reason in shown.json["reason"]
