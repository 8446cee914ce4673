"""No cache in the process at all: every read asks Redis.

As in https://redis.readthedocs.io/en/stable/examples/asyncio_examples.html and, for `write_many`,
https://redis.readthedocs.io/en/stable/advanced_features.html#pipelines. A memory is a string of JSON; a room is a
sorted set of ids, the newest first, in which a changed memory keeps its place. `get` returns the bytes.

The caches are in front of this one.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import Any, ClassVar, Literal

import orjson
from redis.asyncio import Redis

from . import Cannot, Item, Place, Value


class PlainRedis:
    name: ClassVar[str] = "plain Redis"
    package: ClassVar[str] = "redis"
    sync: ClassVar[Literal[False]] = False
    cannot: ClassVar[Cannot] = {
        "durable": "Redis is all there is: no database has the write",
        "bounded": "it keeps nothing in the process",
        "embeddings": "a string of JSON has no vector",
    }

    def __init__(self, place: Place) -> None:
        self._place = place
        self.loads = 0

    async def open(self) -> None:
        self._client: Redis = Redis.from_url(self._place.redis_url)
        await self._client.ping()

    async def close(self) -> None:
        await self._client.aclose()

    def address(self, room: str, id: str) -> str:
        return f"{self._place.prefix}:m:{id}"

    def room(self, room: str) -> str:
        return f"{self._place.prefix}:r:{room}"

    def get(self, address: str, /) -> Awaitable[bytes | None]:
        self.loads += 1
        return self._client.get(address)

    async def recent(self, room: str, limit: int) -> list[bytes]:
        self.loads += 1
        ids = await self._client.zrange(self.room(room), 0, limit - 1)
        if not ids:
            return []
        found = await self._client.mget([self.address(room, id.decode()) for id in ids])
        return [value for value in found if value is not None]

    async def put(self, item: Item) -> None:
        await self.write_many([item])

    async def write_many(self, items: Sequence[Item]) -> None:
        async with self._client.pipeline(transaction=True) as pipe:
            queue(pipe, self, items)
            await pipe.execute()

    async def forget(self, address: str) -> None:
        """There is nothing to forget."""

    def value(self, answer: bytes | None) -> Value | None:
        return None if answer is None else orjson.loads(answer)


def queue(pipe: Any, names: Any, items: Sequence[Item]) -> None:
    """Add the commands that write memories to a pipeline of either client; ``names`` has `address` and `room`."""
    now = time.time()
    for n, item in enumerate(items):
        pipe.set(names.address(item.room, item.id), orjson.dumps(item.value))
        pipe.zadd(names.room(item.room), {item.id: -now - n * 1e-6}, nx=True)
