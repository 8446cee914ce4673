"""Clocks of agents and workers that disagree by minutes, with each other and with Redis; changes of Redis's clock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

import mnemobus
from chaos.clocks import WallClock, in_the_future
from mnemobus import Memory, Settings, Version
from mnemobus.keys import APPLY_GROUP, Keyspace
from mnemobus.memory import new_id
from mnemobus.store import open_reader
from outside import Log
from servers import AgentProcess, RedisServer, Workers, eventually

TESTS = Path(__file__).parents[1]
MINUTES = 60.0


class Ahead:
    """Processes that are started within it have wall clocks that are ahead of the others, or behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch = monkeypatch
        (folder / "sitecustomize.py").write_text(
            "import os\nfrom chaos.clocks import set_ahead\nset_ahead(float(os.environ['TEST_AHEAD']))\n"
        )
        paths = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
        self._path = os.pathsep.join(filter(None, paths))

    def by(self, seconds: float, start: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with self._patch.context() as patch:
            patch.setenv("PYTHONPATH", self._path)
            patch.setenv("TEST_AHEAD", str(seconds))
            return start(*arguments, **options)


async def test_g1_g2_g3_g5_g6_clocks_that_disagree_by_minutes_have_no_effect(
    settings: Settings,
    workers: Callable[..., Workers],
    agent: Callable[..., AgentProcess],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # Given workers of which one pool is 7 minutes ahead and one 7 minutes behind, in batches of few
    settings = settings.model_copy(
        update={"log_partitions": 1, "batch_size": 2, "own_write_timeout": 10.0, "claim_idle": 1.0}
    )
    ahead = Ahead(monkeypatch, tmp_path)
    pools = [ahead.by(sign * 7 * MINUTES, workers, settings, 1, 1) for sign in (1, -1)]
    # and agents, one of them 10 minutes ahead (as are the clocks it measures with, where a process can have its own),
    # one 10 minutes behind
    alice: AgentProcess = ahead.by(10 * MINUTES, agent, settings, before=in_the_future(600))
    bob: AgentProcess = ahead.by(-10 * MINUTES, agent, settings)
    now = datetime.now(UTC)

    def said(by: float, text: str) -> dict[str, Any]:
        at = (now + timedelta(minutes=by)).isoformat()
        return {
            "id": new_id(),
            "table": "messages",
            "room": "r1",
            "created_at": at,
            "content": {"text": text},
        }

    async def text(reader: AgentProcess, id: str) -> Any:
        found = await reader.do("get", id=id)
        return found and found["content"]["text"]

    memory = said(10, "0")
    await alice.do("write", memory=memory, durability="committed")
    for reader in (alice, bob):
        await copied(reader, memory["id"])

    # When both change the same memory by turns
    last: list[Any] = []
    for n in range(1, 21):
        writer, other = (alice, bob) if n % 2 else (bob, alice)
        last = await writer.do("update", id=memory["id"], content={"text": str(n)})
        # Then each reads its own write at once, and the other sees it once it has the token
        assert await text(writer, memory["id"]) == str(n)
        if n % 5 == 0:
            await other.do("observe", token=await writer.do("token"))
            assert await text(other, memory["id"]) == str(n)
        else:
            await writer.do("committed")
            begun = time.monotonic()

            async def seen(other: AgentProcess = other, n: int = n) -> bool:
                return bool(await text(other, memory["id"]) == str(n))

            await eventually(seen, settings.max_staleness)
            assert time.monotonic() - begun < settings.max_staleness
    # and the store has the last one, under the version that the log gave it
    await eventually(Log(settings).done)
    version, content = await stored(settings, memory["id"])
    assert (str(version), content) == (last[1], b'{"text":"20"}')
    assert abs(version.ms / 1000 - time.time()) < 2 * MINUTES

    # And copies live neither shorter nor longer for it: both serve their own, for some heartbeats
    for reader in (alice, bob):
        await copied(reader, memory["id"])
        before = await reader.do("stats")
        await asyncio.sleep(3 * settings.heartbeat)
        assert await text(reader, memory["id"]) == "20"
        after = await reader.do("stats")
        assert after["hits_local"] == before["hits_local"] + 1
        assert (after["resets"], after["failed_heartbeats"]) == (0, 0)

    # And what who is behind deletes stays deleted, though who is ahead wrote it, in his future
    doomed = said(10, "doomed")
    await alice.do("write", memory=doomed)
    await alice.do("update", id=doomed["id"], content={"text": "doomed, changed"}, durability="committed")
    await bob.do("delete", id=doomed["id"], durability="committed")
    await eventually(Log(settings).done)

    async def gone() -> bool:
        return await text(alice, doomed["id"]) is None

    await eventually(gone, settings.max_staleness)
    assert await stored(settings, doomed["id"]) is None

    # And workers take over from each other as ever: when the pool that is ahead is killed amid writes, nothing is lost
    ids = []
    for n in range(40):
        note = said(n % 3, f"note {n}")
        ids.append(note["id"])
        await (alice, bob)[n % 2].do("write", memory=note)
        if n == 20:
            pools[0].kill()
    began = time.monotonic()
    await asyncio.gather(*(writer.do("committed", timeout=10) for writer in (alice, bob)))
    assert time.monotonic() - began < settings.claim_idle + 5
    assert await alice.do("count", table="messages", room="r1") == 41


@pytest.mark.parametrize("step", [-3600, 3600])
async def test_g1_g2_g5_g6_redis_clock_is_set_while_a_dead_worker_holds_a_batch(
    step: int,
    settings: Settings,
    own_redis: Callable[..., RedisServer],
    wall_clock: WallClock,
    workers: Callable[..., Workers],
) -> None:
    # Given a worker that waits for the database with a batch in its hands
    server = own_redis(environment=wall_clock.environment)
    settings = settings.model_copy(update={"redis_url": server.url, "log_partitions": 1})
    first = workers(settings, 1, 1)
    async with (
        mnemobus.connect(**settings.model_dump()) as writer,
        mnemobus.connect(**settings.model_dump()) as reader,
    ):
        old = Memory(table="messages", room="r1", content={"text": "old"})
        await (await writer.write(old)).committed()
        assert len(await reader.recent("messages", room="r1")) == 1
        with contextlib.closing(
            sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), isolation_level=None)
        ) as lock:
            lock.execute("BEGIN IMMEDIATE")
            held = await writer.write(Memory(table="messages", room="r1", content={"text": "held"}))
            await eventually(lambda: delivered(server, settings, str(held.version)))
            # When it is killed, and Redis's clock set by an hour
            first.kill()
            wall_clock.set_ahead(step)
        workers(settings, 1, 1)
        # Then another commits the batch as ever
        await held.committed(60)
        # and all goes on: writes have higher versions, the last one wins, others see it in time
        receipt = await writer.update(old.id, content={"text": "new"})
        assert receipt.version is not None and held.version is not None
        assert receipt.version > held.version
        await receipt.committed(30)

        async def seen() -> bool:
            found = await reader.get(old.id)
            return found is not None and found.content["text"] == "new"

        await eventually(seen, settings.max_staleness)
        assert len(await reader.recent("messages", room="r1")) == 2
        assert (await reader.health()).ok and (await writer.health()).ok


async def delivered(server: RedisServer, settings: Settings, version: str) -> bool:
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    async with redis.asyncio.Redis.from_url(server.url) as client:
        pending = await client.xpending_range(keys.log(0), APPLY_GROUP, version, version, 1)
    return bool(pending)


async def test_g4_a_lease_is_no_longer_for_redis_clock_being_set_back(
    settings: Settings, own_redis: Callable[..., RedisServer], wall_clock: WallClock
) -> None:
    # Given a reader that has the lease of a result, and dies
    server = own_redis(environment=wall_clock.environment)
    async with mnemobus.connect(**settings.model_copy(update={"redis_url": server.url}).model_dump()) as bus:
        shared = bus._shared
        lost = await shared.lookup("room:t:r", b"q", 60)
        assert lost is not None and await shared.lookup("room:t:r", b"q", 60) is None
        # When Redis's clock is set back by an hour
        wall_clock.set_ahead(-3600)
        # Then the next reader has it at once, and the other one's result is refused
        lease = await shared.lookup("room:t:r", b"q", 60)
        assert lease is not None
        assert await shared.lookup("room:t:r", b"q", 60) is None
        assert not await shared.fill(lost, b"late")  # type: ignore[arg-type]
        assert await shared.fill(lease, b"found")  # type: ignore[arg-type]


async def copied(reader: AgentProcess, id: str) -> None:
    """Wait until an agent serves a memory from its own copy."""

    async def local() -> bool:
        before = (await reader.do("stats"))["hits_local"]
        await reader.do("get", id=id)
        return bool((await reader.do("stats"))["hits_local"] > before)

    await eventually(local)


async def stored(settings: Settings, id: str) -> Any:
    """Version and content of a memory in the store; None if it is not there."""
    reader = open_reader(settings)
    await reader.open()
    try:
        row = await reader.get(id)
    finally:
        await reader.close()
    return row and (Version(*row.version), row.content)
