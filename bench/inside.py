"""How the benchmarks of one process use the inside of a bus: fill a store in advance, empty tiers between rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any, Generic, TypeVar

from mnemobus import Bus, Memory, Settings
from mnemobus.cache.l1 import clock
from mnemobus.keys import Version, id_scope, room_scope
from mnemobus.log.events import Event
from mnemobus.records import encode
from mnemobus.store import open_writer

from .alternatives import Item, Place, Task, Unfit, load
from .alternatives.survey import call
from .measure import Result, per_call, per_sync_call
from .world import World

T = TypeVar("T")

TABLE = "messages"


def fill(settings: Settings, memories: Sequence[Memory]) -> None:
    """Put memories into the store as a worker does, without a worker."""
    writer = open_writer(settings)
    writer.open()
    try:
        for at in range(0, len(memories), 1_000):
            batch = enumerate(memories[at : at + 1_000], at + 1)
            writer.apply([Event.put(encode(m, 1 << 20))._replace(version=Version(1, n)) for n, m in batch])
    finally:
        writer.close()


async def fresh(bus: Bus, seconds: float = 0.7) -> None:
    """Wait until L1 may be served for this long: a contestant that blocked the loop has delayed the heartbeat."""
    while bus._local.fresh_until - clock() < seconds:
        await asyncio.sleep(0.01)


async def all_of(calls: Iterable[Any], at_once: int = 32) -> None:
    """Await all of these, some at a time: for work that is not timed."""
    calls = iter(calls)
    while some := list(islice(calls, at_once)):
        await asyncio.gather(*some)


def forget_locally(bus: Bus, scopes: Iterable[str]) -> None:
    """Empty L1 of these scopes, as if this process had never read them: else a second read would make them live."""
    for scope in scopes:
        bus._local.drop_live(scope)
        bus._local.drop(scope)
        bus._live._missed.pop(scope, None)


async def forget(bus: Bus, scopes: Sequence[str]) -> None:
    """Empty L1 and L2 of these scopes."""
    forget_locally(bus, scopes)
    epoch, keys = bus._link.epoch, bus._link.keys
    await bus._link.pipeline([("UNLINK", keys.bucket(epoch, scope)) for scope in scopes])


def scopes_of(ids: Iterable[str]) -> list[str]:
    return [id_scope(id) for id in ids]


def rooms_of(rooms: Iterable[str]) -> list[str]:
    return [room_scope(TABLE, room) for room in rooms]


class Rolling(Generic[T]):
    """Some of many, each time the next ones: a slow contestant takes fewer at a time, and comes to the end, too."""

    def __init__(self, values: Sequence[T]) -> None:
        self._values = values
        self._turning: Iterator[T] = cycle(values)

    def __call__(self, count: int) -> list[T]:
        return list(islice(self._turning, count))


def item(memory: Memory) -> Item:
    """A memory in the form for an alternative."""
    embedding = None if memory.embedding is None else list(memory.embedding)
    return Item(memory.room, memory.id, dict(memory.content), embedding)


async def alternative(world: World, name: str, task: Task, results: Sequence[Result], **place: Any) -> Any:
    """An alternative, opened. None if it can't do the task or does not work with this server: then the results have
    its own explanation."""
    cls = load(name)
    if task in cls.cannot:
        why = cls.cannot[task]
    else:
        if name.startswith("postgres"):
            place["database_url"] = world.database()
        # Its own prefix: redis-py would hear of the others' writes, and search its cache each time.
        made = cls(Place(redis_url=world.redis_url, prefix=f"bench-{name}", **place))
        try:
            await call(made.open)
            return made
        except Unfit as error:
            why = str(error)
    for result in results:
        result.absent[cls.name] = why
    return None


async def timed(alternative: Any, function: Callable[[Any], Any], arguments: Sequence[Any]) -> float:
    """Microseconds that a call of an alternative takes, with or without asyncio, whichever it uses."""
    if alternative.sync:
        return per_sync_call(function, arguments)
    return await per_call(function, arguments)
