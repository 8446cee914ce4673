"""redis-py's own client-side caching: a connection caches answers until Redis says that a key has changed.

As in https://redis.readthedocs.io/en/stable/resp3_features.html#client-side-caching and
https://redis.io/docs/latest/develop/clients/redis-py/connect#connect-using-client-side-caching: ``protocol=3`` and a
``CacheConfig``. It needs Redis 7.4 or later (not Valkey). redis-py 8.1 has it only in its synchronous client: the
asyncio client takes no ``cache_config``. Every hit checks the socket for invalidations, and each of those searches
the whole cache.

Data and commands are those of plain_redis.py. A listing is two answers, each cached by itself. (ZREVRANGE does not
work: in 8.1 its answers are stored under the single letters of the key's name, where no invalidation finds them.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import orjson
from redis import Redis
from redis.cache import CacheConfig, CacheEntry, CacheEntryStatus, CacheKey, DefaultCache
from redis.exceptions import RedisError

from . import Cannot, Item, Place, Unfit, Value
from .plain_redis import queue


class _Counting(DefaultCache):
    """The default cache, with a count of the misses. A hit costs the same as in the original."""

    asked = 0

    def set(self, entry: CacheEntry) -> bool:
        if entry.status is CacheEntryStatus.IN_PROGRESS:  # a placeholder, made when the question is sent
            self.asked += 1
        return super().set(entry)


class RedisPy:
    name: ClassVar[str] = "redis-py client-side caching"
    package: ClassVar[str] = "redis"
    sync: ClassVar[Literal[True]] = True
    cannot: ClassVar[Cannot] = {
        "durable": "Redis is all there is: no database has the write",
        "embeddings": "a string of JSON has no vector",
    }

    def __init__(self, place: Place) -> None:
        self._place = place

    def open(self) -> None:
        self._cache = _Counting(CacheConfig(max_size=self._place.size))
        self._client = Redis.from_url(
            self._place.redis_url,
            protocol=3,
            cache_config=CacheConfig(max_size=self._place.size, cache_class=lambda cache_config: self._cache),
        )
        try:
            self._client.ping()
        except RedisError as error:
            if "caching" in str(error):
                raise Unfit(str(error)) from None
            raise
        self.get = self._client.get
        """What redis-py answers: bytes or None."""

    def close(self) -> None:
        self._client.close()

    @property
    def loads(self) -> int:
        """Commands rather than calls: a listing is two."""
        return self._cache.asked

    def address(self, room: str, id: str) -> str:
        return f"{self._place.prefix}:m:{id}"

    def room(self, room: str) -> str:
        return f"{self._place.prefix}:r:{room}"

    def recent(self, room: str, limit: int) -> list[bytes]:
        ids: Any = self._client.zrange(self.room(room), 0, limit - 1)
        if not ids:
            return []
        found: Any = self._client.mget([self.address(room, id.decode()) for id in ids])
        return [value for value in found if value is not None]

    def put(self, item: Item) -> None:
        self.write_many([item])

    def write_many(self, items: Sequence[Item]) -> None:
        with self._client.pipeline(transaction=True) as pipe:
            queue(pipe, self, items)
            pipe.execute()

    def forget(self, address: str) -> None:
        self._cache.delete_by_redis_keys([address])

    def cached(self, address: str) -> bool:
        """Whether this process has a copy."""
        return self._cache.collection.get(CacheKey("GET", (address,), ("GET", address))) is not None

    def value(self, answer: bytes | None) -> Value | None:
        return None if answer is None else orjson.loads(answer)
