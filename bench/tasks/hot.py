"""Hot reads: what an agent has in its own process, with 10,000 scopes cached."""

from __future__ import annotations

import random

from mnemobus import Memories, connect

from ..measure import OURS, Result, interleave, per_call
from ..world import World, message, stored

SCOPES = 10_000
ROOMS = 1_000
PER_ROOM = 10


async def run(world: World) -> list[Result]:
    settings = world.settings()
    get = Result("hot", f"hot read of one memory, {SCOPES:,} cached", "us")
    recent = Result("hot", f"hot read of a room's newest, {ROOMS:,} rooms cached", "us")
    with world.workers(settings):
        async with connect(**settings.model_dump()) as bus:
            memories = [message(f"room-{n % ROOMS}", n) for n in range(SCOPES)]
            await stored(bus, memories)
            ids = [memory.id for memory in memories]
            rooms = [f"room-{n}" for n in range(ROOMS)]
            random.Random(1).shuffle(ids)
            table = dict(zip(ids, memories, strict=True))

            async def look_up(id: str) -> object:
                return table[id]

            async def newest(room: str) -> Memories:
                return await bus.recent("messages", room=room, limit=PER_ROOM)

            for id in ids:
                await bus.get(id)
            for room in rooms:
                await newest(room)
            assert bus.stats().entries == SCOPES + ROOMS
            rounds = world.rounds(15)
            get.samples = await interleave(
                {
                    OURS: lambda: per_call(bus.get, ids),
                    "an awaited dict lookup": lambda: per_call(look_up, ids),
                },
                rounds,
            )
            get.at_most(8, "an awaited dict lookup")
            recent.samples = await interleave({OURS: lambda: per_call(newest, rooms * 10)}, rounds)
    return [get, recent]
