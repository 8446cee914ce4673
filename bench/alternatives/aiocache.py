"""aiocache: its memory cache in each process, in front of its Redis cache, both with a time to live.

As in https://aiocache.aio-libs.org/en/latest/ (``Cache(Cache.MEMORY)``, `get` and `set` with ``ttl``) and
https://aiocache.aio-libs.org/en/latest/caches.html. A process does not learn that another one has written: it serves a
copy until the copy expires, and a listing, too, though a process that writes into the room deletes its own listing.
This staleness is counted.

A room's listing is loaded from the data of plain_redis.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from aiocache import Cache
from aiocache.serializers import JsonSerializer

from . import Cannot, Item, Place, Value
from .plain_redis import PlainRedis


class Aiocache:
    name: ClassVar[str] = "aiocache, memory over Redis"
    package: ClassVar[str] = "aiocache"
    sync: ClassVar[Literal[False]] = False
    cannot: ClassVar[Cannot] = {
        "durable": "it is a cache: no database has the write",
        "embeddings": "it is a cache: what it holds has no vector of its own",
        "processes": "nothing tells another process of a write: it serves its copy until that expires",
        "hosts": "nothing tells another process of a write: it serves its copy until that expires",
        "bounded": "its memory cache has no bound but the time to live",
    }

    def __init__(self, place: Place) -> None:
        self._place = place
        self._source = PlainRedis(place)
        self.loads = 0

    async def open(self) -> None:
        await self._source.open()
        ttl = self._place.ttl
        self._local = Cache(Cache.MEMORY, ttl=ttl)
        self._shared = Cache.from_url(self._place.redis_url)
        self._shared.namespace = f"{self._place.prefix}:a:"
        self._shared.ttl = ttl
        self._shared.serializer = JsonSerializer()
        # It opens its connection with the first command.
        await self._shared.exists("")

    async def close(self) -> None:
        await self._shared.close()
        await self._source.close()

    def address(self, room: str, id: str) -> str:
        return f"m:{id}"

    async def get(self, address: str, /) -> Value | None:
        found: Value | None = await self._local.get(address)
        if found is None:
            self.loads += 1
            found = await self._shared.get(address)
            if found is not None:
                await self._local.set(address, found)
        return found

    async def recent(self, room: str, limit: int) -> list[Value]:
        key = f"r:{room}"
        listing: Any = await self._local.get(key)
        if listing is None or listing[0] < limit:
            self.loads += 1
            listing = await self._shared.get(key)
            if listing is None or listing[0] < limit:
                loaded = await self._source.recent(room, limit)
                values = [value for answer in loaded if (value := self._source.value(answer)) is not None]
                listing = [limit, values]
                await self._shared.set(key, listing)
            await self._local.set(key, listing)
        values = listing[1]
        return values[:limit]

    async def put(self, item: Item) -> None:
        await self.write_many([item])

    async def write_many(self, items: Sequence[Item]) -> None:
        await self._source.write_many(items)
        pairs = [(self.address(item.room, item.id), item.value) for item in items]
        await self._shared.multi_set(pairs)
        await self._local.multi_set(pairs)
        for room in {item.room for item in items}:
            await self._shared.delete(f"r:{room}")
            await self._local.delete(f"r:{room}")

    async def forget(self, address: str) -> None:
        await self._local.delete(address)

    def cached(self, address: str) -> bool:
        """Whether this process has a copy."""
        return address in self._local._cache

    def value(self, answer: Value | None) -> Value | None:
        return answer
