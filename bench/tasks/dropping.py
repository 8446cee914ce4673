"""Dropping a scope, in a cache of 10 thousand and in one of 1 million."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence

from redis.cache import CacheConfig, CacheEntry, CacheEntryStatus, CacheKey, DefaultCache

from mnemobus.cache.l1 import LocalCache
from mnemobus.cache.query import GET

from ..measure import OURS, Result, Turn, interleave
from ..world import World

SMALL = 10_000
TTL = 86_400.0
PARTITIONS = 64


class Local:
    """Our L1, filled through its own methods, with a result for each scope."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.cache = LocalCache(2 * size, 1 << 40)
        self.drop = self.cache.drop
        for n in range(size):
            self.put(n)

    def put(self, n: int) -> None:
        bucket = self.cache.open(scope(n), n % PARTITIONS, TTL)
        self.cache.put(bucket, GET, None, 2)


class RedisPy:
    """The cache of redis-py, filled through its own methods, with an answer to a GET of each key."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.cache = DefaultCache(CacheConfig(max_size=2 * size))
        for n in range(size):
            self.put(n)

    def drop(self, key: str) -> None:
        """Handle an invalidation."""
        self.cache.delete_by_redis_keys([key])

    def put(self, n: int) -> None:
        key = scope(n)
        name = CacheKey("GET", (key,), ("GET", key))
        self.cache.set(CacheEntry(name, b"", CacheEntryStatus.VALID, None))


def scope(n: int) -> str:
    return f"id:00000000-0000-7000-8000-{n:012x}"


async def run(world: World) -> list[Result]:
    size = world.some(1_000_000, 200_000)
    result = Result("dropping", f"dropping one scope, with {SMALL:,} and with {size:,} cached", "us")
    gc.collect()
    gc.disable()  # it would walk through a million buckets, time and again
    try:
        large, many = Local(size), [Local(SMALL) for _ in range(size // SMALL)]
        redis_py = RedisPy(SMALL)
        draw = random.Random(1)

        def turn(caches: Sequence[Local | RedisPy], count: int) -> Turn:
            async def run() -> float:
                return _turn(draw, caches, count)

            return run

        result.samples = await interleave(
            {
                f"{OURS}, {size:,}": turn([large], 2_000),
                f"{OURS}, {SMALL:,}": turn(many, 2_000),
                f"{OURS}, {SMALL:,}, nothing else in the processor's cache": turn(many[:1], 2_000),
                f"redis-py client-side caching, {SMALL:,}": turn([redis_py], 10),
            },
            world.rounds(21, 5),
        )
    finally:
        gc.enable()
    result.at_most(1.5, f"{OURS}, {SMALL:,}", f"{OURS}, {size:,}")
    result.notes.append(
        f"the caches of {SMALL:,} are {size // SMALL}, in turn, as large together as the one of {size:,}: what the"
        " processor's own cache makes of a small one is in a row by itself"
    )
    return [result]


def _turn(draw: random.Random, caches: Sequence[Local | RedisPy], count: int) -> float:
    """Microseconds to drop a scope, for some random ones; they are put back afterwards."""
    size = caches[0].size
    places = {(draw.randrange(len(caches)), draw.randrange(size)) for _ in range(count)}
    work = [(caches[at].drop, scope(n)) for at, n in places]
    began = time.perf_counter()
    for drop, name in work:
        drop(name)
    took = time.perf_counter() - began
    for at, n in places:
        caches[at].put(n)
    return took / len(work) * 1e6
