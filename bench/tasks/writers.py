"""64 tasks of one process write at the same time, each as fast as its writes are logged."""

from __future__ import annotations

import asyncio
import gc
import secrets
import time
from collections.abc import Iterable

from redis.asyncio import Redis

from mnemobus import Memory, connect

from ..floors import writes
from ..measure import OURS, Result, interleave
from ..world import World, message

WRITERS = 64
ROOMS = 100
PIPELINE = "one loop of pipelined XADDs"


async def run(world: World) -> list[Result]:
    result = Result("writers", f"{WRITERS} concurrent writers, until logged", "writes/s")
    each, rounds = world.some(30, 20), world.rounds(15, 4)
    async with connect(**world.settings().model_dump()) as bus, Redis.from_url(world.redis_url) as client:
        stream = f"bench:{secrets.token_hex(4)}:log"
        memories = [message(f"room-{n % ROOMS}", n) for n in range(WRITERS * each)]
        entries = [writes.fields(memory) for memory in memories]

        async def write(own: Iterable[Memory]) -> None:
            for memory in own:
                await bus.write(memory)

        async def ours() -> float:
            gc.collect()
            began = time.perf_counter()
            await asyncio.gather(*(write(memories[n::WRITERS]) for n in range(WRITERS)))
            return len(memories) / (time.perf_counter() - began)

        async def by_hand() -> float:
            gc.collect()
            return len(entries) / await writes.pipelined(client, stream, entries)

        result.samples = await interleave({OURS: ours, PIPELINE: by_hand}, rounds)
    result.at_least(0.5, PIPELINE)
    result.notes.append(
        "the same memories again and again: the log takes them as it takes new ones; no workers run meanwhile"
    )
    return [result]
