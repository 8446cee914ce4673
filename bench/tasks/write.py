"""One write, until it is logged."""

from __future__ import annotations

import secrets
from typing import Any

from redis.asyncio import Redis

from mnemobus import Memory, connect

from ..floors import writes
from ..measure import OURS, Result, interleave, per_call, per_sync_call
from ..world import World, message

ROOMS = 100
RAW = "a raw-socket XADD of the same fields"
BLOCKING = "the same without asyncio"
REDIS_PY = "the same through redis-py's asyncio client"


async def run(world: World) -> list[Result]:
    result = Result("write", "one write, until it is logged", "us")
    count, rounds = world.some(200, 100), world.rounds(20, 5)
    numbers = iter(range(1_000_000))
    stream = f"bench:{secrets.token_hex(4)}:log"

    def some() -> list[Memory]:
        return [message(f"room-{n % ROOMS}", n) for n, _ in zip(numbers, range(count), strict=False)]

    def entries() -> list[list[Any]]:
        return [writes.flat(memory) for memory in some()]

    async with connect(**world.settings().model_dump()) as bus, Redis.from_url(world.redis_url) as client:
        wire, blocking = await writes.Wire.open(world.redis_url), writes.Blocking(world.redis_url)

        async def ours() -> float:
            return await per_call(bus.write, some())

        async def raw() -> float:
            return await per_call(lambda entry: wire.call("XADD", stream, "*", *entry), entries())

        async def blocked() -> float:
            return per_sync_call(lambda entry: blocking.call("XADD", stream, "*", *entry), entries())

        async def through_redis_py() -> float:
            return await per_call(
                lambda entry: writes.one(client, stream, entry), [writes.fields(memory) for memory in some()]
            )

        turns = {OURS: ours, RAW: raw, BLOCKING: blocked, REDIS_PY: through_redis_py}
        result.samples = await interleave(turns, rounds)
        wire.close()
        blocking.close()
    result.at_most(1.3, RAW)
    result.notes.append(
        "no workers run meanwhile, for either; memories, and their fields, are made beforehand. The raw socket is an"
        " asyncio protocol: an agent's event loop is to go on while it waits"
    )
    return [result]
