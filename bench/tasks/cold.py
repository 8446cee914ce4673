"""Cold reads: of memories that only the store has, in PostgreSQL and in SQLite."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from mnemobus import Memories, connect

from ..alternatives.survey import call
from ..floors.reads import cold
from ..inside import TABLE, Rolling, alternative, fill, forget, fresh, item, rooms_of, scopes_of, timed
from ..measure import OURS, Result, interleave
from ..measure import per_call as per
from ..world import World, message

ROOMS = 100
PER_ROOM = 20
BY_HAND = "the query by hand, and two round trips"


async def run(world: World) -> list[Result]:
    return [*await _of(world, "postgres", "PostgreSQL"), *await _of(world, "sqlite", "SQLite")]


async def _of(world: World, store: str, title: str) -> list[Result]:
    get = Result("cold", f"read of one memory that only {title} has", "us")
    recent = Result("cold", f"read of a room's newest {PER_ROOM} that only {title} has", "us")
    memories = [message(f"room-{n % ROOMS}", n) for n in range(ROOMS * PER_ROOM)]
    settings = world.settings(store)
    fill(settings, memories)
    ids, rooms = Rolling([m.id for m in memories]), Rolling([f"room-{n}" for n in range(ROOMS)])
    one, many = world.some(100, 40), world.some(50, 20)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connect(**settings.model_dump()))
        by_hand = cold(settings.database_url)
        await by_hand.open(world.redis_url, settings.database_url)
        stack.push_async_callback(by_hand.close)

        async def newest(room: str) -> Memories:
            return await bus.recent(TABLE, room=room, limit=PER_ROOM)

        async def ours(read: Any, what: list[str], scopes: list[str]) -> float:
            await fresh(bus)
            await forget(bus, scopes)
            before = bus.stats().misses
            took = await per(read, what)
            if bus.stats().misses - before != len(what):
                raise RuntimeError("some of the reads that the store was to answer were answered elsewhere")
            return took

        async def ours_one() -> float:
            some = ids(one)
            return await ours(bus.get, some, scopes_of(some))

        async def ours_many() -> float:
            some = rooms(many)
            return await ours(newest, some, rooms_of(some))

        gets: dict[str, Any] = {OURS: ours_one, BY_HAND: lambda: per(by_hand.get, ids(one))}
        recents: dict[str, Any] = {
            OURS: ours_many,
            BY_HAND: lambda: per(lambda room: by_hand.recent(TABLE, room, PER_ROOM), rooms(many)),
        }
        for name in ("postgres-store", "postgres-store-sync") if store == "postgres" else ():
            other = await alternative(world, name, "get", [get, recent])
            if other is None:
                continue
            stack.push_async_callback(call, other.close)
            for at in range(0, len(memories), 500):
                await call(other.write_many, [item(memory) for memory in memories[at : at + 500]])
            addresses = Rolling([other.address(memory.room, memory.id) for memory in memories])
            gets[other.name] = partial(_timed, other, other.get, addresses, one)
            recents[other.name] = partial(_timed, other, partial(_recent, other), rooms, many)
        rounds = world.rounds(11)
        get.samples = await interleave(gets, rounds)
        recent.samples = await interleave(recents, rounds)
    for result in (get, recent):
        result.at_most(1.5, BY_HAND)
        result.notes.append(
            "by hand: HGET, the query on one connection, HSET; the stores beside it ask no Redis"
        )
    return [get, recent]


async def _timed(other: Any, function: Any, arguments: Rolling[Any], count: int) -> float:
    return await timed(other, function, arguments(count))


def _recent(other: Any, room: str) -> Any:
    return other.recent(room, PER_ROOM)
