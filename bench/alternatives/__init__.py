"""The alternatives to mnemobus: each in its own file, used as its own documentation says.

All have the same interface. An alternative has its own addresses of memories (`address`), which are made before the
timing, and its own form of answers: `get` is the library's own method if it has one of that shape, so that a hot read
is charged nothing of ours. `value` turns an answer into the content that was put; it is not timed.

`cannot` names what an alternative can't do, with a sentence for the table. A library without an asyncio client is
called synchronously (`sync`): else it would be charged a hop to a thread.

The libraries that are stores hold the memories themselves. Those that are caches are in front of the same memories and
listings, which plain_redis.py keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

Value = dict[str, Any]
"""The content of a memory: a JSON object with a ``text``."""

Task = Literal["get", "recent", "put", "write_many", "embeddings", "processes", "hosts", "durable", "bounded"]
"""The abilities that a task may need from an alternative. Beyond the methods of the same names:

embeddings  keep a vector with each memory
processes   be used by several processes that see each other's writes, without waiting for an expiry
hosts       the same, on several machines
durable     have a write in a database when it returns
bounded     hold no more than a given number of memories in a process
"""

Cannot = Mapping[Task, str]


class Unfit(Exception):
    """The library does not work with this server, and says why; raised by `open`."""


class Item(NamedTuple):
    """A memory to be written."""

    room: str
    id: str
    value: Value
    embedding: Sequence[float] | None = None


@dataclass(frozen=True)
class Place:
    """The place and the bounds of an alternative.

    prefix   the beginning of every key and namespace
    size     most memories that a process may hold
    ttl      seconds that a cached copy lives, if nothing removes it earlier
    vectors  length of the embeddings; 0 for none
    """

    redis_url: str = ""
    database_url: str = ""
    prefix: str = "bench"
    size: int = 10_000
    ttl: float = 300.0
    vectors: int = 0


class _Common(Protocol):
    name: ClassVar[str]
    """Its name in the table."""
    package: ClassVar[str]
    """The distribution that is measured."""
    cannot: ClassVar[Cannot]
    loads: int
    """How many results of `get` and `recent` were not found in this process."""

    def __init__(self, place: Place) -> None: ...
    def address(self, room: str, id: str) -> Any:
        """How the library addresses a memory: what `get` takes."""

    def value(self, answer: Any) -> Value | None:
        """The content in an answer of `get`, or in an element of one of `recent`."""


class Alternative(_Common, Protocol):
    """An alternative with an asyncio client. What is in `cannot` raises NotImplementedError."""

    sync: ClassVar[Literal[False]]

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def get(self, address: Any, /) -> Any:
        """A memory, or None."""

    async def recent(self, room: str, limit: int) -> Sequence[Any]:
        """The memories of a room, newest first."""

    async def put(self, item: Item) -> None:
        """Write a memory, new or not; every process may see it once this returns."""

    async def write_many(self, items: Sequence[Item]) -> None:
        """Write many at once, in the library's own way."""

    async def forget(self, address: Any) -> None:
        """Do what the library does in this process when it hears that a memory has changed."""


class SyncAlternative(_Common, Protocol):
    """The same without asyncio."""

    sync: ClassVar[Literal[True]]

    def open(self) -> None: ...
    def close(self) -> None: ...
    def get(self, address: Any, /) -> Any: ...
    def recent(self, room: str, limit: int) -> Sequence[Any]: ...
    def put(self, item: Item) -> None: ...
    def write_many(self, items: Sequence[Item]) -> None: ...
    def forget(self, address: Any) -> None: ...


_WHERE = {
    "cashews": "cashews:Cashews",
    "redis-py": "redis_py:RedisPy",
    "aiocache": "aiocache:Aiocache",
    "plain-redis": "plain_redis:PlainRedis",
    "postgres-store": "postgres_store:AsyncStore",
    "postgres-store-sync": "postgres_store:SyncStore",
    "ccs-store": "ccs_store:CcsStore",
}

NAMES = tuple(_WHERE)


def load(name: str) -> type[Any]:
    """The class of an `Alternative` or `SyncAlternative`; ImportError where the extra `bench` is not installed."""
    module, _, cls = _WHERE[name].partition(":")
    found: type[Any] = getattr(import_module(f"{__name__}.{module}"), cls)
    return found
