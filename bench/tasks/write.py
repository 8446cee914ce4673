"""One write, awaited until it is logged."""

from __future__ import annotations

import secrets

from redis.asyncio import Redis

from mnemobus import Memory, connect

from ..floors import writes
from ..measure import OURS, Result, interleave, per_call
from ..world import World, message

ROOMS = 100
XADD = "a bare XADD of the same fields"


async def run(world: World) -> list[Result]:
    result = Result("write", "one write, until it is logged", "us")
    count, rounds = world.some(200, 100), world.rounds(30, 5)
    numbers = iter(range(1_000_000))

    def some() -> list[Memory]:
        return [message(f"room-{n % ROOMS}", n) for n, _ in zip(numbers, range(count), strict=False)]

    async with connect(**world.settings().model_dump()) as bus, Redis.from_url(world.redis_url) as client:
        stream = f"bench:{secrets.token_hex(4)}:log"

        async def ours() -> float:
            return await per_call(bus.write, some())

        async def bare() -> float:
            entries = [writes.fields(memory) for memory in some()]
            return await per_call(lambda entry: writes.one(client, stream, entry), entries)

        result.samples = await interleave({OURS: ours, XADD: bare}, rounds)
    result.at_most(1.6, XADD)
    result.notes.append(
        "no workers run meanwhile, for either; memories, and their fields, are made beforehand"
    )
    return [result]
