"""L1: what this process keeps of what it has read.

A dict of buckets by scope; a bucket is a dict of results by query. To invalidate a scope is to take its
bucket out of the dict, in constant time whatever else is cached.

No stale fill (G4). A read takes its bucket *before* it looks anywhere else, and puts what it found into that very
object. An invalidation meanwhile has taken the object out of the dict, so the late fill lands in an orphan that no
later read can see. Nothing is compared and no lock is held. Reads of one query that share a load share it
through the bucket, for the same reason: who begins after the invalidation finds another bucket, and loads anew.

Freshness (G5). Nothing is served once ``fresh_until`` has passed. The feed moves it forward whenever it has
verified that every invalidation up to a moment is applied here. The clock goes on while the machine is suspended.

Eviction. SIEVE (Zhang et al., NSDI 2024) over whole buckets: a hit sets one bit, and the hand, moving from old to
new, evicts the first bucket without it. Bounds are in results and in bytes; bytes are those of the encoded
results and a constant for what Python puts around them.

Last known copies (G7). What is no longer fresh stays where it is: with Redis and the store both away, it is all
that there is, and is served marked stale.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

if hasattr(time, "CLOCK_BOOTTIME"):

    def clock() -> float:
        """Seconds, counting those that the machine was suspended."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:  # pragma: no cover - not on Linux
    clock = time.monotonic


class _Miss:
    def __repr__(self) -> str:
        return "MISS"


MISS: Final = _Miss()
"""What `LocalCache.hit` answers if it has nothing; None is a result."""

OVERHEAD = 400
"""Bytes that a cached result takes besides its encoded form, roughly."""


Found = tuple[Any, str, bool]
"""What a load found, where, and whether it is only the last known copy."""


class Load:
    """A read under way of one query, for others to share.

    began: when, by `clock`
    """

    __slots__ = ("_waiting", "began")

    def __init__(self, began: float) -> None:
        self.began = began
        self._waiting: list[asyncio.Future[Found | None]] = []

    async def wait(self) -> Found | None:
        """What it finds; None if whoever loads was cancelled. Raises what the load raises."""
        answer: asyncio.Future[Found | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        return await answer

    def succeed(self, found: Found | None) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_result(found)

    def fail(self, error: BaseException) -> None:
        if not isinstance(error, Exception):  # whoever loads was cancelled; nobody else was
            self.succeed(None)
            return
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(error)


class Bucket:
    """All that is cached under one scope."""

    __slots__ = (
        "entries",
        "expires",
        "live",
        "loads",
        "newer",
        "older",
        "partition",
        "scope",
        "size",
        "visited",
    )

    def __init__(self, scope: str, partition: int, expires: float) -> None:
        self.scope = scope
        self.partition = partition
        self.expires = expires
        self.entries: dict[Any, Any] = {}
        self.loads: dict[Any, Load] = {}
        """Reads under way of queries on this scope."""
        self.size = 0
        self.live = False
        """Whether it is in the dict; a bucket that was taken out never comes back."""
        self.visited = False
        self.older: Bucket | None = None
        self.newer: Bucket | None = None


class LocalCache:
    """The L1 of one bus. Used from one event loop; nothing here awaits."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._buckets: dict[str, Bucket] = {}
        self._partitions: dict[int, dict[str, Bucket]] = {}
        self._oldest: Bucket | None = None
        self._newest: Bucket | None = None
        self._hand: Bucket | None = None
        self.fresh_until = 0.0
        """By `clock`; moved on by the feed. Nothing is served after it."""
        self.on_drop: Callable[[str], None] | None = None
        """Called with a scope whose bucket an invalidation dropped."""
        self.sample_at = 0
        """The number of the hit that `on_sample` is told of; 0 for none."""
        self.on_sample: Callable[[Bucket, Any, Any], None] | None = None
        """Called with bucket, query and result of that hit. Must not raise."""
        self.entries = 0
        self.bytes = 0
        self.hits = 0
        self.drops = 0
        self.evictions = 0

    def hit(self, scope: str, query: Any) -> Any:
        """The cached result, or MISS if there is none or it may not be served."""
        bucket = self._buckets.get(scope)
        if bucket is None:
            return MISS
        value = bucket.entries.get(query, MISS)
        if value is MISS:
            return MISS
        now = clock()
        if now >= self.fresh_until or now >= bucket.expires:
            return MISS
        bucket.visited = True
        self.hits = hits = self.hits + 1
        if hits == self.sample_at and self.on_sample is not None:
            self.on_sample(bucket, query, value)
        return value

    def served(self, scope: str) -> Mapping[Any, Any]:
        """What hits on a scope would give now, by query; counts as no hit."""
        bucket = self._buckets.get(scope)
        now = clock()
        if bucket is None or now >= self.fresh_until or now >= bucket.expires:
            return {}
        return bucket.entries

    def last_known(self, scope: str, query: Any) -> Any:
        """The cached result however old, or MISS."""
        bucket = self._buckets.get(scope)
        return MISS if bucket is None else bucket.entries.get(query, MISS)

    def open(self, scope: str, partition: int, ttl: float) -> Bucket:
        """The live bucket of a scope, a new one if need be.

        Only for a scope whose feed partition is listened to and has a position.
        """
        bucket = self._buckets.get(scope)
        now = clock()
        if bucket is not None:
            # One that has expired is kept while nothing may be served: as the last known copy.
            if now < bucket.expires or now >= self.fresh_until:
                return bucket
            self._remove(bucket)
        if self._max_entries == 0:
            return self.orphan(scope, partition)
        while len(self._buckets) >= self._max_entries:
            self._evict()
        bucket = Bucket(scope, partition, now + ttl)
        bucket.live = True
        self._buckets[scope] = bucket
        self._partitions.setdefault(partition, {})[scope] = bucket
        bucket.older = self._newest
        if self._newest is not None:
            self._newest.newer = bucket
        else:
            self._oldest = bucket
        self._newest = bucket
        return bucket

    def orphan(self, scope: str, partition: int) -> Bucket:
        """A bucket that nobody else will ever see, for a read that must not be cached."""
        return Bucket(scope, partition, 0.0)

    def put(self, bucket: Bucket, query: Any, value: Any, size: int) -> None:
        """Cache a result in the bucket that its read began with, and evict others if it is too much."""
        if not bucket.live:
            return
        size += OVERHEAD
        if size > self._max_bytes:
            if not bucket.entries:
                self._remove(bucket)
            return
        if query in bucket.entries:
            # The old size is not kept per entry; the mean is near enough for a bound on memory.
            replaced = bucket.size // len(bucket.entries)
            bucket.size -= replaced
            self.bytes -= replaced
        else:
            self.entries += 1
        bucket.entries[query] = value
        bucket.size += size
        self.bytes += size
        while self.entries > self._max_entries or self.bytes > self._max_bytes:
            self._evict()

    def stop(self) -> None:
        """Serve nothing any more."""
        self.fresh_until = 0.0

    def drop(self, scope: str) -> bool:
        """Invalidate a scope; whether anything was cached under it."""
        bucket = self._buckets.get(scope)
        if bucket is None:
            return False
        self._remove(bucket)
        self.drops += 1
        if self.on_drop is not None and bucket.entries:
            self.on_drop(scope)
        return True

    def drop_partition(self, partition: int) -> None:
        """Invalidate every scope of a feed partition."""
        for scope in list(self._partitions.get(partition, ())):
            self.drop(scope)

    def clear(self) -> None:
        """Invalidate everything."""
        for scope in list(self._buckets):
            self.drop(scope)

    def holds(self, partition: int) -> bool:
        """Whether there is a bucket of this feed partition."""
        return bool(self._partitions.get(partition))

    def __iter__(self) -> Iterator[str]:
        return iter(self._buckets)

    def _remove(self, bucket: Bucket) -> None:
        bucket.live = False
        del self._buckets[bucket.scope]
        scopes = self._partitions[bucket.partition]
        del scopes[bucket.scope]
        if not scopes:
            del self._partitions[bucket.partition]
        if self._hand is bucket:
            self._hand = bucket.newer
        if bucket.older is not None:
            bucket.older.newer = bucket.newer
        else:
            self._oldest = bucket.newer
        if bucket.newer is not None:
            bucket.newer.older = bucket.older
        else:
            self._newest = bucket.older
        bucket.older = bucket.newer = None
        self.entries -= len(bucket.entries)
        self.bytes -= bucket.size

    def _evict(self) -> None:
        hand = self._hand or self._oldest
        while hand is not None and hand.visited:
            hand.visited = False
            hand = hand.newer or self._oldest
        assert hand is not None, "over its bounds without a bucket"
        self._hand = hand.newer
        self._remove(hand)
        self.evictions += 1
