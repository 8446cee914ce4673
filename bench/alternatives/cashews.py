"""cashews with its client-side cache: copies in the process, dropped as Redis broadcasts which keys were written.

As in https://github.com/Krukov/cashews#redis (``client_side=True``), with `get` and `set` as in
https://github.com/Krukov/cashews#low-level-api (its decorator makes a key out of the call's arguments first, and
costs more).

``protocol=2`` is needed: redis-py speaks RESP3 by default since version 8. Then invalidations arrive as pushes, which
cashews does not read, and it misses all of them without an error. tests/test_bench.py shows it.

cashews keeps the memories, in Redis. A room's listing is cached in front of a query: it is loaded from the data of
plain_redis.py, and a process that writes into the room deletes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from cashews import Cache
from cashews.backends.memory import Memory

from . import Cannot, Item, Place, Value
from .plain_redis import PlainRedis


class _Counting(Memory):
    """Its local cache, with a count of the entries that were put there. A hit costs the same as in the original."""

    fills = 0

    async def set(self, *args: Any, **kwargs: Any) -> bool:
        self.fills += 1
        return await super().set(*args, **kwargs)


class Cashews:
    name: ClassVar[str] = "cashews, client side"
    package: ClassVar[str] = "cashews"
    sync: ClassVar[Literal[False]] = False
    cannot: ClassVar[Cannot] = {
        "durable": "it is a cache: no database has the write",
        "embeddings": "it is a cache: what it holds has no vector of its own",
    }
    protocol: ClassVar[int | None] = 2

    def __init__(self, place: Place) -> None:
        self._place = place
        self._source = PlainRedis(place)
        self._own_fills = 0

    async def open(self) -> None:
        await self._source.open()
        self._local = _Counting(size=self._place.size)
        self._cache = Cache()
        options = {} if self.protocol is None else {"protocol": self.protocol}
        self._cache.setup(
            self._place.redis_url,
            client_side=True,
            client_side_prefix=f"{self._place.prefix}:c:",
            local_cache=self._local,
            suppress=False,
            **options,
        )
        await self._cache.init()
        self.get = self._cache.get
        """The content that was put, or None."""

    async def close(self) -> None:
        await self._cache.close()
        await self._source.close()

    @property
    def loads(self) -> int:
        return self._local.fills - self._own_fills

    def address(self, room: str, id: str) -> str:
        return f"m:{id}"

    async def recent(self, room: str, limit: int) -> list[Value]:
        key = f"r:{room}"
        listing: tuple[int, list[Value]] | None = await self._cache.get(key)
        if listing is None or listing[0] < limit:
            loaded = await self._source.recent(room, limit)
            values = [value for answer in loaded if (value := self._source.value(answer)) is not None]
            listing = limit, values
            await self._set(key, listing)
        return listing[1][:limit]

    async def put(self, item: Item) -> None:
        await self._source.put(item)
        await self._set(self.address(item.room, item.id), item.value)
        self._own_fills += 1
        await self._cache.delete(f"r:{item.room}")

    async def _set(self, key: str, value: Any) -> None:
        self._own_fills += 2  # before it tells Redis, and after
        await self._cache.set(key, value, expire=self._place.ttl)

    async def write_many(self, items: Sequence[Item]) -> None:
        await self._source.write_many(items)
        await self._cache.set_many(
            {self.address(item.room, item.id): item.value for item in items}, expire=self._place.ttl
        )
        rooms = {item.room for item in items}
        self._own_fills += len(rooms)
        await self._cache.delete_many(*(f"r:{room}" for room in rooms))

    async def forget(self, address: str) -> None:
        await self._local.delete(address)

    def cached(self, address: str) -> bool:
        """Whether this process has a copy."""
        return address in self._local.store

    def value(self, answer: Value | None) -> Value | None:
        return answer
