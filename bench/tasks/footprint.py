"""The bytes that a memory takes in a process that has it cached, beyond the record's own content."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson

from mnemobus import Memory, Settings, connect
from mnemobus.keys import room_scope
from mnemobus.values import _dimensions

from ..alternatives import Item, Place, Unfit, load
from ..alternatives.survey import call
from ..inside import TABLE, fill, forget_locally
from ..measure import OURS, Result
from ..world import World, message, vector

PER_ROOM = 20
WINDOW: int = Settings.model_fields["live_window"].default
LIVE, CLASSIC = "held live", "cached"
BOUND = 400
_TIMERS = tracemalloc.Filter(False, asyncio.events.__file__)
OTHERS = ("cashews", "redis-py", "aiocache", "ccs-store")


async def run(world: World) -> list[Result]:
    one = Result("footprint", "bytes beyond its content that a memory takes, cached by itself", "bytes")
    many = Result(
        "footprint", f"bytes beyond its content that a memory takes, in a room's newest {PER_ROOM}", "bytes"
    )
    vectors = Result("footprint", "bytes beyond its content that a memory with 384 floats takes", "bytes")
    rooms = world.some(100, 50)
    others = PER_ROOM * world.some(50, 20)
    plain = [message(f"room-{n // PER_ROOM}", n) for n in range(PER_ROOM * rooms)]
    embedded = [message(f"room-{n // PER_ROOM}", n, embedding=vector(n)) for n in range(PER_ROOM * rooms)]

    one.samples[OURS] = [await _ours(world, plain, listed=False)]
    many.samples[OURS] = [await _ours(world, plain, listed=True)]
    vectors.samples[OURS] = [await _ours(world, embedded, listed=False)]
    window = Result(
        "footprint", f"bytes that a room's newest {WINDOW} take, small memories, content and all", "bytes"
    )
    small = [small_message(f"room-{n // WINDOW}", n) for n in range(WINDOW * rooms)]
    for name, live in ((LIVE, "all"), (CLASSIC, "off")):
        window.samples[name] = [await _window(world, small, live)]
    window.at_most(1.3, CLASSIC, LIVE)
    window.notes.append(
        f"held live: {WINDOW} is the default size of a window; cached: the same listing with MNEMOBUS_LIVE=off. Both"
        " have been read twice"
    )
    for name in OTHERS:
        cls = load(name)
        for result, listed in ((one, False), (many, True)):
            if listed and "recent" in cls.cannot:
                result.absent[cls.name] = cls.cannot["recent"]
                continue
            try:
                result.samples[cls.name] = [await _other(world, cls, plain[:others], listed=listed)]
            except Unfit as error:
                result.absent[cls.name] = str(error)
        vectors.absent[cls.name] = cls.cannot["embeddings"]
    for result in (one, many, vectors):
        result.within(BOUND)
        result.notes.append(
            "exact (tracemalloc), so one round; content: the UTF-8 of names, id, content and metadata as JSON, and"
            " the floats"
        )
    return [one, many, vectors, window]


def small_message(room: str, number: int) -> Memory:
    """A message of a few words."""
    return Memory(table=TABLE, room=room, agent="bench", content={"text": "it was served", "n": number})


async def _window(world: World, memories: Sequence[Memory], live: str) -> float:
    """Bytes by which this process grows per room, when the room's newest are read until they are cached."""
    settings = world.settings(live=live)
    warm = [small_message(f"warm-{n}", n) for n in range(300)]
    fill(settings, [*memories, *warm])
    _dimensions.clear()
    async with connect(**settings.model_dump()) as bus:

        async def newest(room: str) -> None:
            for _ in range(2):
                await bus.recent(TABLE, room=room, limit=WINDOW)
                if live != "off" and bus._local.live(room_scope(TABLE, room)) is None:
                    bus._local.drop(room_scope(TABLE, room))

        # Connections, and listening to all channels and partitions, are there before what is counted.
        rooms = list(dict.fromkeys(memory.room for memory in memories))
        for room in [*(memory.room for memory in warm), *rooms]:
            await newest(room)
        for room in rooms:
            forget_locally(bus, [room_scope(TABLE, room)])
        took = await grown((), newest, rooms)
        if live != "off" and bus.stats().live_windows < len(rooms):
            raise RuntimeError("not everything that was read is held live")
    return took / len(rooms)


def content(memory: Memory) -> int:
    """Bytes of the record's content."""
    names = (memory.table, memory.room, memory.agent, memory.entity, memory.world)
    return (
        len(memory.id)
        + sum(len(name.encode()) for name in names if name)
        + len(orjson.dumps(dict(memory.content)))
        + len(orjson.dumps(dict(memory.metadata)))
        + 4 * len(memory.embedding or ())
    )


def value(memory: Memory) -> dict[str, Any]:
    """The record without its vector, for an alternative: it includes the names that mnemobus stores separately."""
    return {name: part for name, part in memory.to_dict().items() if name not in ("embedding", "id")}


def copy(text: str) -> str:
    """A copy of the string, as when it comes from another process."""
    return text.encode().decode()


async def grown(
    memories: Sequence[Memory], read: Callable[[str], Awaitable[Any]], keys: Sequence[str]
) -> float:
    """Bytes beyond its content by which this process grows per memory, when all of them are read; for no memories, the
    total."""
    gc.collect()
    tracemalloc.start()
    try:
        for key in keys:
            await read(copy(key))
        gc.collect()
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    # Timeouts of finished calls stay in the event loop's heap until they expire: they belong to no cache.
    left = snapshot.filter_traces([tracemalloc.Filter(False, asyncio.base_events.__file__), _TIMERS])
    size = sum(trace.size for trace in left.traces)
    return (size - sum(content(memory) for memory in memories)) / (len(memories) or 1)


async def _ours(world: World, memories: Sequence[Memory], *, listed: bool) -> float:
    settings = world.settings()
    warm = [message(f"warm-{n}", n) for n in range(300)]
    fill(settings, [*memories, *warm])
    _dimensions.clear()  # of earlier tasks; how large it had grown would decide what this one finds
    async with connect(**settings.model_dump()) as bus:

        async def newest(room: str) -> None:
            await bus.recent(TABLE, room=room, limit=PER_ROOM)

        read: Callable[[str], Awaitable[Any]] = newest if listed else bus.get
        # Connections, and listening to every feed partition, are there before what is counted.
        for one in warm:
            await read(one.room if listed else one.id)
        keys = list(dict.fromkeys(m.room for m in memories)) if listed else [m.id for m in memories]
        took = await grown(memories, read, keys)
        if bus.stats().entries < len(keys):
            raise RuntimeError("not everything that was read is cached")
    return took


async def _other(world: World, cls: Any, memories: Sequence[Memory], *, listed: bool) -> float:
    place = Place(redis_url=world.redis_url, size=2 * len(memories), prefix=f"footprint{listed}")
    items = [Item(memory.room, memory.id, value(memory)) for memory in memories]
    warm = Item("warm", "00000000-0000-7000-8000-000000000000", items[0].value)
    reader = cls(place)
    await call(reader.open)
    try:
        if (
            cls.name == load("ccs-store").name
        ):  # all of it is in this process, so it is filled in what is counted
            memories = memories[: world.some(500, 200)]  # and a read of it looks at all that there are
            fresh = {item.id: item for item in items}

            async def put(id: str) -> None:
                one = fresh[id]
                reader.put(Item(copy(one.room), id, orjson.loads(orjson.dumps(one.value))))
                reader.get(reader.address(copy(one.room), id))

            reader.put(warm)
            return await grown(memories, put, [memory.id for memory in memories])
        writer = cls(place)
        await call(writer.open)
        await call(writer.write_many, [*items, warm])
        await call(writer.close)
        rooms = {memory.id: memory.room for memory in memories}

        async def read(key: str) -> None:
            if listed:
                await call(reader.recent, key, PER_ROOM)
            else:
                await call(reader.get, reader.address(rooms.get(key, "warm"), key))

        await read("warm" if listed else warm.id)
        keys = list(dict.fromkeys(m.room for m in memories)) if listed else [m.id for m in memories]
        return await grown(memories, read, keys)
    finally:
        await call(reader.close)
