"""Answers of a slow store: a result that comes too late enters no cache."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import redis

import mnemobus
from mnemobus import LogFull, Memory, Settings
from scenarios.telling import Connect, opened, said, texts
from servers import RedisServer, eventually, worker_threads

SLOW = 0.2
"""Least seconds that the store takes to answer."""


class SlowStore:
    """The bus's own reader. Its first answer takes long: it has been read, and does not come before the gate opens."""

    def __init__(self, bus: mnemobus.Bus) -> None:
        self.reader, self.reads, self.gate = bus._reader, 0, asyncio.Event()
        bus._parts.reader = bus._reads.reader = self  # type: ignore[assignment]

    async def _late(self, answer: Any) -> Any:
        rows = await answer
        self.reads += 1
        if self.reads == 1:
            await asyncio.sleep(SLOW)
            await self.gate.wait()
        return rows

    async def recent(self, *arguments: Any) -> Any:
        return await self._late(self.reader.recent(*arguments))

    async def get(self, *arguments: Any) -> Any:
        return await self._late(self.reader.get(*arguments))

    async def count(self, *arguments: Any) -> Any:
        return await self._late(self.reader.count(*arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)


async def list_room(bus: mnemobus.Bus, memory: Memory) -> str:
    return texts(await bus.recent("messages", room=memory.room))[0]


async def get(bus: mnemobus.Bus, memory: Memory) -> str:
    found = await bus.get(memory.id)
    assert found is not None
    return str(found.content["text"])


@pytest.mark.parametrize("ask", [list_room, get])
async def test_g4_a_load_that_an_invalidation_overtakes_enters_no_cache(
    pool: Settings, connect: Connect, ask: Any
) -> None:
    async with connect() as slow, connect() as quick:
        memory = said("old")
        await quick.write(memory, durability="committed")
        store = SlowStore(slow)
        # Given a read that has the old row in hand, and two that share it
        early = [asyncio.create_task(ask(slow, memory)) for _ in range(3)]
        await eventually(lambda: store.reads == 1)
        assert slow.stats().shared_loads == 2

        # When the memory changes before it comes back, and the reader hears of it
        heard = slow.stats().invalidations
        await quick.update(memory.id, content={"text": "new"})
        await eventually(lambda: slow.stats().invalidations > heard)
        # and other reads begin after that, while the slow one is still on its way
        late = [asyncio.create_task(ask(slow, memory)) for _ in range(3)]
        assert await asyncio.gather(*late) == ["new"] * 3
        assert store.reads == 2 and not any(task.done() for task in early)
        store.gate.set()

        # Then the early ones may have the old answer
        assert [await task for task in early] == ["old"] * 3
        # and it is in no cache: not in Redis, which refused it, nor in this process, nor in one that comes later
        assert slow.stats().refused_fills == 1
        assert await ask(slow, memory) == "new"
        async with connect() as third:
            assert await ask(third, memory) == "new"


async def test_g4_no_stale_fill_while_redis_evicts_what_is_being_filled(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    # Given a Redis that has room for the log and a few buckets, and evicts others at random while they are filled
    server = own_redis("--maxmemory-policy", "volatile-lru", "--maxmemory-samples", "1", "--appendonly", "no")
    settings = settings.model_copy(
        update={"redis_url": server.url, "local_max_entries": 0, "feed_partitions": 4}
    )
    settings = settings.model_copy(update={"retention": 0.0, "feed_length": 50, "redis_pool_max": 6})
    rng = random.Random(12)
    rooms = [f"r{n}" for n in range(60)]
    memories = [said("x" * 10_000, room, metadata={"n": 0}) for room in rooms]
    with worker_threads(settings), redis.Redis.from_url(server.url) as client:
        async with opened(settings) as writer, opened(settings) as first, opened(settings) as second:
            for receipt in await writer.write_many(memories):
                await receipt.committed()
            for reader in (first, second):
                dawdle(reader, rng)
            committed, older, reads, writing = [0] * len(rooms), [], 0, True

            async def update(memory: Memory, number: int) -> None:
                try:
                    await writer.update(memory.id, metadata={"n": number}, durability="committed")
                except LogFull:  # nothing was written, and there is room again in a moment
                    await asyncio.sleep(0.01)
                    await update(memory, number)

            async def write() -> None:
                number = 0
                while number < 200 or client.info("stats")["evicted_keys"] <= 100:
                    number += 1
                    n = rng.randrange(10)
                    await update(memories[n], number)
                    committed[n] = number  # and fanned out: who listens to nothing learns of it by the XACK

            async def read(reader: mnemobus.Bus) -> None:
                nonlocal reads
                while writing:
                    n = rng.randrange(10) if rng.random() < 0.7 else rng.randrange(len(rooms))
                    due = committed[n]
                    [found] = await reader.recent("messages", room=rooms[n])
                    reads += 1
                    if found.metadata["n"] < due:
                        older.append((n, due, found.metadata["n"]))
                    await asyncio.sleep(0.003)

            # When agents that keep nothing themselves read rooms that are being written
            reading = [asyncio.create_task(read(reader)) for reader in (first, second) for _ in range(6)]
            await eventually(lambda: len(list(client.scan_iter("*:b:*", count=1000))) == len(rooms))
            # and Redis has room for about half of what they share
            client.config_set("maxmemory", client.info("memory")["used_memory"] - len(rooms) * 10_000 // 2)
            try:
                await asyncio.wait_for(write(), 60)
            finally:
                writing = False
                await asyncio.gather(*reading)

            # Then no answer was older than what had been committed when it was asked for
            assert older == [], older[:5]
            # though buckets were evicted, with leases among them, and answers did come from there
            stats = [first.stats(), second.stats()]
            assert client.info("stats")["evicted_keys"] > 100 and reads > 500
            assert sum(s.hits_shared for s in stats) > 100
            assert sum(s.refused_fills for s in stats) > 10


def dawdle(bus: mnemobus.Bus, rng: random.Random) -> None:
    """Have the answers of the store take up to 20 ms after they have been read."""
    recent = bus._reader.recent

    async def late(*arguments: Any) -> Any:
        rows = await recent(*arguments)
        await asyncio.sleep(rng.uniform(0, 0.020))
        return rows

    bus._reader.recent = late  # type: ignore[method-assign]
