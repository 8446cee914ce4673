"""Hot reads: of copies in the agent's own process, with 10,000 memories and 1,000 rooms cached."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from mnemobus import Memories, connect

from ..alternatives import load
from ..alternatives.survey import call
from ..floors.reads import held
from ..inside import TABLE, Rolling, all_of, alternative, fill, fresh, item, timed
from ..measure import OURS, Result, Turn, interleave, per_call
from ..world import World, message

PER_ROOM = 10
DICT = "an awaited dict lookup"

OTHERS = {"cashews": 2_000, "redis-py": 500, "aiocache": 2_000, "plain-redis": 200, "ccs-store": 100}
"""With how many calls each has its turn: some milliseconds' worth."""


async def run(world: World) -> list[Result]:
    scopes = world.some(10_000, 2_000)
    rooms = [f"room-{n}" for n in range(scopes // PER_ROOM)]
    get = Result("hot", f"hot read of one memory, {scopes:,} cached", "us")
    recent = Result("hot", f"hot read of a room's newest {PER_ROOM}, {len(rooms):,} rooms cached", "us")
    memories = [message(rooms[n % len(rooms)], n) for n in range(scopes)]
    random.Random(1).shuffle(memories)
    settings = world.settings()
    fill(settings, memories)
    ids = [memory.id for memory in memories]
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connect(**settings.model_dump()))

        async def newest(room: str) -> Memories:
            return await bus.recent(TABLE, room=room, limit=PER_ROOM)

        async def one() -> float:
            await fresh(bus)
            return await per_call(bus.get, ids)

        async def many() -> float:
            await fresh(bus)
            return await per_call(newest, rooms * 5)

        # A bus caches nothing of a feed partition before it listens to it.
        while bus.stats().entries < scopes + len(rooms):
            await all_of(bus.get(id) for id in ids)
            await all_of(newest(room) for room in rooms)

        look_up = held(dict(zip(ids, memories, strict=True)))
        gets: dict[str, Turn] = {OURS: one, DICT: lambda: per_call(look_up, ids)}
        listings = held({room: [m for m in memories if m.room == room] for room in rooms})
        recents: dict[str, Turn] = {OURS: many, DICT: lambda: per_call(listings, rooms * 5)}
        items = [item(memory) for memory in memories]
        for name, count in OTHERS.items():
            other = await alternative(world, name, "get", [get, recent], size=2 * scopes)
            if other is None:
                continue
            stack.push_async_callback(call, other.close)
            await call(other.write_many, items)
            addresses = [other.address(memory.room, memory.id) for memory in memories]
            if name not in ("plain-redis", "ccs-store"):  # one keeps nothing, the other what its agent wrote
                for address in addresses:
                    await call(other.get, address)
            gets[other.name] = partial(_turn, other, other.get, Rolling(addresses), count)
            if "recent" in other.cannot:
                recent.absent[other.name] = other.cannot["recent"]
                continue
            listed = partial(_recent, other)
            for room in rooms:
                await call(listed, room)
            recents[other.name] = partial(_turn, other, listed, Rolling(rooms), count)

        before = bus.stats()
        rounds = world.rounds(11)
        get.samples = await interleave(gets, rounds)
        recent.samples = await interleave(recents, rounds)
        after = bus.stats()
        if (after.misses, after.hits_shared) != (before.misses, before.hits_shared):
            raise RuntimeError("some of the reads that were to be hits in the process were none")
    # What they took when these bounds were set: a hit must not become slower.
    get.at_most(2.5, DICT)
    recent.at_most(3, DICT)
    for result in (get, recent):
        result.faster(4, load("cashews").name)
        result.faster(25, load("redis-py").name)
    get.notes.append(
        f"{load('ccs-store').name} looks through all that it holds for crashed agents, and takes one that was silent"
        " for a while for crashed: both are its defaults"
    )
    get.notes.append(f"{load('plain-redis').name} keeps nothing in the process: it is what a cache saves")
    return [get, recent]


async def _turn(other: Any, function: Any, arguments: Rolling[Any], count: int) -> float:
    return await timed(other, function, arguments(count))


def _recent(other: Any, room: str) -> Any:
    return other.recent(room, PER_ROOM)
