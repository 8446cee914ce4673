"""Two writers, each a process, on the same memories at about the same time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnemobus import Settings, Version
from scenarios.telling import Player, opened, said
from servers import Workers, eventually

KEYS = 300
ROOMS = 8
EVERY = 0.012
"""Seconds from one memory's turn to the next one's."""


@pytest.fixture
def protocol() -> int:
    """Of one of the writers; the other has RESP2."""
    return 3


async def test_g2_g5_no_copy_differs_from_the_store_after_two_processes_wrote_at_once(
    settings: Settings, workers: Callable[..., Workers], tmp_path: Path
) -> None:
    # Given 300 memories, of which two writers and a reader, each a process, have copies
    settings = settings.model_copy(update={"own_write_timeout": 20.0, "batch_size": 5})
    workers(settings)
    other = settings.model_copy(update={"redis_protocol": 2})
    alice, bob, _carol = players = [Player(s, tmp_path, "race") for s in (settings, other, other)]
    try:
        async with opened(settings, local_max_entries=0) as bus:
            memories = [said("nobody", f"r{n % ROOMS}") for n in range(KEYS)]
            for receipt in await bus.write_many(memories):
                await receipt.committed()
            ids = [memory.id for memory in memories]
            for player in players:
                await player.tell(part="look", ids=ids)
            assert all([(await player.hear())["held"] > 0 for player in players])

            # When both write each of them, 0 to 20 ms apart, now one first and now the other, and read it at once
            rng, begin = random.Random(5), time.monotonic() + 0.3
            moments: dict[str, dict[str, float]] = {"alice": {}, "bob": {}}
            for n, id in enumerate(ids):
                names = rng.sample(["alice", "bob"], 2)
                moments[names[0]][id] = begin + n * EVERY
                moments[names[1]][id] = begin + n * EVERY + rng.uniform(0, 0.020)
            await alice.tell(moments=moments["alice"], name="alice")
            await bob.tell(moments=moments["bob"], name="bob")
            reports = {"alice": await alice.hear(), "bob": await bob.hear()}

            async def applied() -> bool:
                return (await bus.health()).backlog == 0

            await eventually(applied, 20)
            await asyncio.sleep(settings.max_staleness)

            # Then the store has of each the one that came last in the log
            versions = {name: report["versions"] for name, report in reports.items()}
            stored = {}
            for id in ids:
                [row] = [await bus._reader.get(id)]
                assert row is not None
                last = max(versions, key=lambda name: Version.parse(versions[name][id]))
                stored[id] = [versions[last][id], {"text": last}]
                assert [str(row.version), row.content] == [
                    versions[last][id],
                    b'{"text":"%s"}' % last.encode(),
                ]
            assert {content["text"] for _, content in stored.values()} == {"alice", "bob"}

            # And so has every copy, in the writers, in the reader, and in Redis
            for player in players:
                await player.tell(part="look", ids=ids)
                report = await player.hear()
                assert report["seen"] == stored
                assert report["held"] >= KEYS and report["waits"] == 0
            for id in ids:
                memory = await bus.get(id)
                assert memory is not None
                assert [str(memory.version), memory.content] == stored[id]
            assert bus.stats().hits_shared > KEYS / 2
    finally:
        for player in players:
            player.close()
