"""One publish gives one event: when its answer is lost, and when two processes use the same producer id."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from mnemobus import Settings
from mnemobus.memory import new_id
from outside import Log, stored
from scenarios.conftest import Way
from scenarios.telling import Player, opened, said
from servers import AgentProcess, RedisServer, eventually, worker_threads

ANY_PUBLISH = b"}:log\r\n"
"""In a request that names a log, which a bus that only writes sends to publish, and for nothing else."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"log_partitions": 1})


def logged(settings: Settings) -> list[str]:
    """The texts of all events in the log."""
    log = Log(settings)
    with log.client:
        found = log.client.xrange(log.keys.log(0))
    return [fields[b"content"].decode().removeprefix('{"text":"').removesuffix('"}') for _, fields in found]


@pytest.mark.parametrize("repeats", ["publisher", "outbox"])
async def test_g1_a_publish_whose_answer_is_lost_and_that_is_repeated_is_one_event(
    settings: Settings, pool: Settings, way: Way, repeats: str
) -> None:
    # Given a writer without an outbox, which repeats a call itself, or one whose outbox does
    proxy, mine = await way(settings)
    outbox = {"outbox": "off", "redis_timeout": 0.3} if repeats == "publisher" else {"redis_timeout": 1.0}
    async with opened(mine, **outbox) as writer:
        await writer.write(said("0"), durability="committed")
        for n in range(1, 4):
            # When a publish gets through, and its answer is lost
            lost = proxy.trap(ANY_PUBLISH)
            writing = asyncio.create_task(writer.write_many([said(f"{n} {m}") for m in range(3)]))
            await asyncio.wait_for(lost, 5)
            receipts = await asyncio.wait_for(writing, 10)
            assert receipts[0].outboxed is (repeats == "outbox")
            await asyncio.gather(*(receipt.committed() for receipt in receipts))
            proxy.lift()

        # Then each of them is in the log once, under the versions that its writer was told, and in the store once
        expected = ["0", *(f"{n} {m}" for n in range(1, 4) for m in range(3))]
        assert logged(settings) == expected
        assert await stored(settings) == sorted(expected)
        with redis.Redis.from_url(settings.redis_url) as client:
            last = client.xrevrange(Log(settings).keys.log(0), count=1)[0][0].decode()
        assert last == str(receipts[-1].version)
        if repeats == "publisher":
            assert writer.stats().publish_retries >= 3


async def test_g1_two_processes_with_one_producer_id_get_an_error_and_are_not_merged(
    settings: Settings, pool: Settings, tmp_path: Path
) -> None:
    # Given two processes that go by the same name, as after a fork
    settings = settings.model_copy(update={"outbox": "off"})
    alice, bob = (Player(settings, tmp_path, "produce") for _ in range(2))
    try:
        # When they make the same number of calls by turns, with events of their own
        acknowledged: dict[str, str] = {}
        refused: list[str] = []
        for n in range(6):
            turns = [("alice", alice), ("bob", bob)]
            for name, player in turns if n % 2 else reversed(turns):
                await player.tell(producer="same", text=f"{name} {n}")
                answer = await player.hear()
                if "version" in answer:
                    acknowledged[answer["version"]] = f"{name} {n}"
                else:
                    assert answer["error"] == "Overtaken"
                    assert "producer same is in use by another process" in answer["message"]
                    assert "nothing was written" in answer["message"]
                    refused.append(f"{name} {n}")

        # Then who comes second is told so, nobody is told of the other's events, and what was acknowledged is there
        assert len(acknowledged) == len(refused) == 6
        assert logged(settings) == list(acknowledged.values())
        await eventually(Log(settings).done)
        assert await stored(settings) == sorted(acknowledged.values())
    finally:
        alice.close()
        bob.close()


async def test_g1_g7_two_processes_with_a_copied_outbox_lose_neither_ones_writes(
    own_redis: Callable[..., RedisServer],
    settings: Settings,
    agent: Callable[..., AgentProcess],
    tmp_path: Path,
) -> None:
    # Given an outbox that was published up to some call, and a copy of it
    server = own_redis()
    path, copy = tmp_path / "outbox.db", tmp_path / "copy.db"
    settings = settings.model_copy(
        update={"redis_url": server.url, "redis_timeout": 0.5, "outbox": str(path)}
    )
    with worker_threads(settings):
        alice = await asyncio.to_thread(agent, settings)
        await write(alice, "0")
        server.kill()
        await write(alice, "1", "2")
        server.start()
        await empty(alice)
        alice.close()
        for suffix in ("", "-wal"):
            if Path(f"{path}{suffix}").exists():
                shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")

        # When two processes use one each, Redis goes away, and both write
        alice = await asyncio.to_thread(agent, settings)
        bob = await asyncio.to_thread(agent, settings.model_copy(update={"outbox": str(copy)}))
        server.kill()
        await asyncio.gather(write(alice, "alice 1", "alice 2"), write(bob, "bob 1", "bob 2"))
        server.start()
        await asyncio.gather(empty(alice), empty(bob))

        # Then all of both is in the log, once, though both numbered their calls alike
        texts = ["0", "1", "2", "alice 1", "alice 2", "bob 1", "bob 2"]
        assert sorted(logged(settings)) == texts
        await eventually(Log(settings).done)
        assert await stored(settings) == texts


async def write(agent: AgentProcess, *texts: str) -> None:
    for text in texts:
        memory: dict[str, Any] = {"table": "messages", "room": "r1", "content": {"text": text}}
        await agent.do("write", memory={"id": new_id(), **memory})


async def empty(agent: AgentProcess) -> None:
    """Wait until nothing waits in an agent's outbox."""

    async def nothing() -> bool:
        return bool((await agent.do("stats"))["outbox"] == 0)

    await eventually(nothing, 20)
