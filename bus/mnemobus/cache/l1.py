"""L1: the results that this process keeps.

It is a dict of buckets by scope; a bucket has results by query. To invalidate a scope, its bucket is taken out of the
dict: that takes constant time, however much is cached.

No stale fill (G4). A read takes its bucket *before* it looks anywhere else, and puts its result into that same object.
An invalidation meanwhile has taken the object out of the dict, so the late result goes into an orphan that no later
read can see. Nothing is compared and no lock is held. Reads of the same query share a load through the bucket, for the
same reason: a read that begins after the invalidation finds another bucket, and loads again.

The same holds for reads whose results may not be cached, because the bus does not listen to the scope's feed
partition, or waits for a write of its own. They share an orphan. No read finds it once the scope was invalidated, or
once the last of their loads has ended.

Freshness (G5). Nothing is served once ``fresh_until`` has passed. The feed moves it forward each time that it has
verified that every invalidation up to a moment is applied here. The clock goes on while the machine is suspended.

Eviction. SIEVE (Zhang et al., NSDI 2024) over whole buckets: a hit sets one bit, and the hand, moving from old to
new, evicts the first bucket without it. There are bounds on results and on bytes. Bytes are those of the encoded
results, and a constant for the Python objects around them.

Last known copies (G7). A result that is no longer fresh stays in the cache: while both Redis and the store are away, it
is the only copy, and is served marked stale.

Size. A memory that is cached by itself costs less than 400 bytes besides its record (docs/benchmarks.md). So a bucket
has a field for its first result; only the second makes a dict. The name of a memory's bucket is its bare id, a string
that the memory has anyway. Buckets that expire in the same second share that number; sizes are small numbers, which
Python shares by itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakValueDictionary

from ..keys import Version

if TYPE_CHECKING:
    from ..live.channel import Channel
    from ..live.window import Window

clock: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic  # not on Linux
)
"""Seconds, including those while the machine was suspended. Not a Python function: each hit calls it."""


class _Miss:
    def __repr__(self) -> str:
        return "MISS"


MISS: Final = _Miss()
"""`LocalCache.hit` returns this if it has no result; None is a result."""

OVERHEAD = 384
"""Bytes that a cached result takes in addition to its encoded form, roughly."""
EACH = 192
"""Bytes that each memory of a list takes in addition to its encoded form, roughly."""
_UNIT = 64
"""Sizes are counted in units of this many bytes."""
_LONG = 60.0
"""A copy with at least this time to live (in seconds) may expire up to a second early."""


def _name(scope: str) -> str:
    """The name of a scope's bucket in L1."""
    return scope[3:] if scope.startswith("id:") else scope


Key = int | str | tuple[Any, ...]
"""The key of an answer in its bucket. "get": the memory by its id. A limit: the newest of a room, the usual query.
(limit, entity, agent, world), with two cursors if it is a page: the newest memories that match. ("count", query)."""


class Bucket:
    """All that is cached under one scope."""

    __slots__ = (
        "expires",
        "more",
        "name",
        "newer",
        "older",
        "partition",
        "query",
        "size",
        "value",
        "visited",
    )

    def __init__(self, name: str, partition: int, expires: float) -> None:
        self.name = name
        self.partition = partition
        self.expires = expires
        self.query: Any = MISS
        """The key of the first result; MISS while there is none."""
        self.value: Any = None
        self.more: dict[Key, Any] | None = None
        """Results of other queries."""
        self.size = 0
        self.visited = False
        self.older: Bucket | None = None
        self.newer: Bucket | None = None

    @property
    def scope(self) -> str:
        return self.name if ":" in self.name else f"id:{self.name}"

    @property
    def count(self) -> int:
        """How many results there are."""
        return 0 if self.query is MISS else 1 + len(self.more or ())

    @property
    def results(self) -> dict[Any, Any]:
        """A copy of all results, by query."""
        return {} if self.query is MISS else {self.query: self.value, **(self.more or {})}

    def get(self, query: Key) -> Any:
        """A result, or MISS."""
        if query == self.query:
            return self.value
        return MISS if self.more is None else self.more.get(query, MISS)

    live: ClassVar[bool] = False

    def set(self, query: Key, value: Any) -> None:
        if self.query is MISS or query == self.query:
            self.query, self.value = query, value
        elif self.more is None:
            self.more = {query: value}
        else:
            self.more[query] = value


class LiveBucket(Bucket):
    """A scope that is kept current from the log (live/): a window, and answers made from it since its last change.

    partition of the feed: there come the events that were refused, or that are not from the log
    channels  the channels of its events
    floors    by channel, the version up to which the window has all events of the scope, whatever the position is
    classic   answers to queries that a window can't answer; dropped when the feed names the scope, or the window
              changes
    tell      returns the window's answer to a query, by its key; MISS if the window can't answer it at once
    gone      called once the bucket is out of the cache
    """

    __slots__ = ("channels", "classic", "floors", "gone", "tell", "window")

    live = True

    def __init__(
        self,
        name: str,
        partition: int,
        window: Window,
        channels: Sequence[Channel],
        floors: dict[Channel, Version],
        tell: Callable[[LiveBucket, Any], Any],
        gone: Callable[[LiveBucket], None],
    ) -> None:
        super().__init__(name, partition, 0.0)
        self.window = window
        self.channels = channels
        self.floors = floors
        self.tell = tell
        self.gone = gone
        self.classic: Bucket | None = None

    @property
    def count(self) -> int:
        return super().count + (0 if self.classic is None else self.classic.count)

    @property
    def results(self) -> dict[Any, Any]:
        beside = {} if self.classic is None else self.classic.results
        return {**beside, **super().results}

    def get(self, query: Key) -> Any:
        found = super().get(query)
        return self.beside(query) if found is MISS else found

    def beside(self, query: Key) -> Any:
        """A result that is not made from the window, or MISS."""
        if self.classic is None or clock() >= self.classic.expires:
            return MISS
        return self.classic.get(query)


class Orphan(Bucket):
    """A bucket of reads that must not be cached: they share their loads, and nothing else."""

    __slots__ = ("__weakref__",)


class LocalCache:
    """The L1 of one bus. Used from one event loop; nothing here awaits."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_units = max_bytes // _UNIT
        self._buckets: dict[str, Bucket] = {}
        self._orphans: WeakValueDictionary[tuple[str, bool], Orphan] = WeakValueDictionary()
        """By name, and by whether the reads are stale. Each exists as long as a load holds it."""
        self._held: Counter[int] = Counter()
        """The number of buckets of each feed partition."""
        self._units = 0
        self._oldest: Bucket | None = None
        self._newest: Bucket | None = None
        self._hand: Bucket | None = None
        self._expiries: dict[float, float] = {}
        """By time to live: when the newest bucket expires."""
        self.fresh_until = 0.0
        """By `clock`; moved on by the feed. Nothing is served after it."""
        self.on_drop: Callable[[str], None] | None = None
        """Called with a scope whose bucket an invalidation dropped."""
        self.on_dropped: Callable[[Bucket], None] | None = None
        """Called with each bucket that leaves the cache for any reason; not with live ones."""
        self.sample_at = 0
        """The number of the hit for which `on_sample` is called; 0 for none."""
        self.on_sample: Callable[[Bucket, Any, Any], None] | None = None
        """Called with bucket, query and result of that hit. Must not raise."""
        self.entries = 0
        self.hits = 0
        self.drops = 0
        self.evictions = 0

    @property
    def bytes(self) -> int:
        """The size of the cache, approximately."""
        return self._units * _UNIT

    def hit(self, name: str, query: Key) -> Any:
        """The cached result, or MISS if there is none or it may not be served.

        name: the scope; for a memory, its bare id
        """
        bucket = self._buckets.get(name)
        if bucket is None:
            return MISS
        if query == bucket.query:
            value = bucket.value
        elif (bucket.more is None or (value := bucket.more.get(query, MISS)) is MISS) and (
            not isinstance(bucket, LiveBucket) or (value := self._tell(bucket, query)) is MISS
        ):
            return MISS
        now = clock()
        if now >= self.fresh_until or now >= bucket.expires:
            return MISS
        bucket.visited = True
        self.hits = hits = self.hits + 1
        if hits == self.sample_at and self.on_sample is not None:
            self.on_sample(bucket, query, value)
        return value

    def _tell(self, bucket: LiveBucket, query: Any) -> Any:
        """A live bucket's answer to a query that was not asked since its last change; MISS if it can't answer now."""
        if bucket.classic is not None:
            return bucket.beside(query)
        if self._orphans:
            return MISS  # one of them may hold a load of the same query; see ReadPath
        value = bucket.tell(bucket, query)
        if value is not MISS:
            self.entries += 1
            bucket.set(query, value)
        return value

    def has(self, bucket: Bucket) -> bool:
        """Whether a bucket is in use; one that was taken out is never used again."""
        found = self._buckets.get(bucket.name)
        return found is bucket or (isinstance(found, LiveBucket) and found.classic is bucket)

    def served(self, scope: str) -> Mapping[Any, Any]:
        """What hits on a scope would return now, by query; this is not counted as a hit."""
        bucket = self._buckets.get(_name(scope))
        now = clock()
        if bucket is None or now >= self.fresh_until or now >= bucket.expires:
            return {}
        return bucket.results

    def last_known(self, scope: str, query: Key) -> Any:
        """The cached result, however old, or MISS."""
        bucket = self._buckets.get(_name(scope))
        return MISS if bucket is None else bucket.get(query)

    def open(self, scope: str, partition: int, ttl: float) -> Bucket:
        """The bucket of a scope (a memory's also by its bare id) for a result; a new one if there is none.

        Only for a scope whose feed partition the bus listens to, with a known position.
        """
        name = _name(scope)
        bucket = self._buckets.get(name)
        now = clock()
        if isinstance(bucket, LiveBucket):
            if bucket.classic is None:
                bucket.classic = Bucket(name, partition, self._expiry(now, ttl))
            return bucket.classic
        if bucket is not None:
            # While nothing may be served, an expired bucket is kept, as the last known copy.
            if now < bucket.expires or now >= self.fresh_until:
                return bucket
            self._remove(bucket)
        if self._max_entries == 0:
            return self.orphan(scope, partition)
        while len(self._buckets) >= self._max_entries:
            self._evict()
        bucket = Bucket(name, partition, self._expiry(now, ttl))
        self._add(bucket)
        return bucket

    def _add(self, bucket: Bucket) -> None:
        self._buckets[bucket.name] = bucket
        self._held[bucket.partition] += 1
        bucket.older = self._newest
        if self._newest is not None:
            self._newest.newer = bucket
        else:
            self._oldest = bucket
        self._newest = bucket

    def _expiry(self, now: float, ttl: float) -> float:
        expires = now + ttl
        if ttl < _LONG:
            return expires
        last = self._expiries.get(ttl, 0.0)
        if expires - last >= 1:
            last = self._expiries[ttl] = float(int(expires))
        return last

    def orphan(self, scope: str, partition: int, *, stale: bool = False) -> Bucket:
        """A bucket for a read that must not be cached: nothing in it is kept. Reads of a scope share one, as long as
        one of them loads and the scope is not invalidated.

        stale: whether the read's wait for a write of this bus timed out; then it may miss what other reads must see
        """
        name = _name(scope)
        found = self._orphans.get((name, stale))
        if found is None:
            found = self._orphans[name, stale] = Orphan(name, partition, 0.0)
        return found

    def drop_orphans(self) -> None:
        """From now on, no read shares an earlier load whose result must not be cached."""
        self._orphans.clear()

    def put(self, bucket: Bucket, query: Key, value: Any, size: int) -> None:
        """Cache a result in the bucket that its read began with, and evict others if the cache is full.

        size: bytes of the result's encoded form
        """
        if not self.has(bucket):
            return
        whole = self._buckets[bucket.name]  # another bucket, if it is beside a window
        units = -(-(size + OVERHEAD) // _UNIT)
        if units > self._max_units:
            if not whole.count and whole is bucket:
                self._remove(bucket)
            return
        if bucket.get(query) is not MISS:
            # The old size of each result is not known; the mean is good enough for a bound on memory.
            units -= bucket.size // bucket.count
        else:
            self.entries += 1
        bucket.set(query, value)
        bucket.size += units
        if whole is not bucket:
            whole.size += units
        self._units += units
        while self.entries > self._max_entries or self._units > self._max_units:
            self._evict()

    # Live buckets

    @property
    def keeps(self) -> bool:
        """Whether the cache keeps anything at all."""
        return self._max_entries > 0

    def live(self, name: str) -> LiveBucket | None:
        """The live bucket of a scope; for a memory, by its bare id."""
        bucket = self._buckets.get(name)
        return bucket if isinstance(bucket, LiveBucket) else None

    def has_read(self, name: str) -> bool:
        """Whether there are results of a scope; for a memory, by its bare id."""
        bucket = self._buckets.get(name)
        return bucket is not None and bucket.query is not MISS

    def live_of(self, scope: str) -> LiveBucket | None:
        """The live bucket of a scope, by the scope's whole name."""
        return self.live(_name(scope))

    def beside(self, name: str) -> Iterator[Bucket]:
        """The buckets in which reads of a live scope may share a load."""
        bucket = self.live(name)
        if bucket is not None and bucket.classic is not None:
            yield bucket.classic
        if self._orphans:
            for stale in (False, True):
                orphan = self._orphans.get((name, stale))
                if orphan is not None:
                    yield orphan

    def hold(self, bucket: LiveBucket, ttl: float) -> None:
        """Keep a live bucket. It replaces what was cached under its scope, which may be older than the window: the
        window has all that the log has."""
        before = self._buckets.get(bucket.name)
        if before is not None:
            self._remove(before)
        bucket.expires = self._expiry(clock(), ttl)
        while len(self._buckets) >= self._max_entries:
            self._evict()
        self._add(bucket)
        self._resize(bucket)

    def answer(self, bucket: LiveBucket, query: Key, value: Any, ttl: float) -> None:
        """Keep an answer that was made from a window, until the next event."""
        if self._buckets.get(bucket.name) is bucket:
            bucket.expires = self._expiry(clock(), ttl)
            if Bucket.get(bucket, query) is MISS:
                self.entries += 1
            bucket.set(query, value)

    def changed(self, bucket: LiveBucket) -> None:
        """A window has taken an event: older answers are no longer served. Answers beside the window are dropped, too:
        they may lack what the window shows."""
        answered = bucket.count
        self.entries -= answered
        bucket.query, bucket.value, bucket.more, bucket.classic = MISS, None, None, None
        if answered and self.on_drop is not None:
            self.on_drop(bucket.scope)
        self._resize(bucket)

    def _resize(self, bucket: LiveBucket) -> None:
        window = bucket.window
        units = -(-(window.bytes + 2 * OVERHEAD + EACH * len(window.rows)) // _UNIT)
        if bucket.classic is not None:
            units += bucket.classic.size
        self._units += units - bucket.size
        bucket.size = units
        while self._units > self._max_units:
            self._evict()

    def _drop_beside(self, bucket: LiveBucket) -> None:
        """Invalidate the answers beside a window."""
        if bucket.classic is not None:
            self.entries -= bucket.classic.count
            bucket.classic = None
            self._resize(bucket)

    def drop_live(self, scope: str) -> None:
        """Give up a live bucket."""
        bucket = self._buckets.get(_name(scope))
        if isinstance(bucket, LiveBucket):
            self._drop(bucket)

    def stop(self) -> None:
        """Serve nothing from now on."""
        self.fresh_until = 0.0

    def drop(self, scope: str) -> bool:
        """Invalidate a scope; return whether it was cached. A live bucket stays: the log keeps it current."""
        name = _name(scope)
        if self._orphans:
            self._orphans.pop((name, False), None)
            self._orphans.pop((name, True), None)
        bucket = self._buckets.get(name)
        if bucket is None:
            return False
        if isinstance(bucket, LiveBucket):
            self._drop_beside(bucket)
            return False
        self._drop(bucket)
        return True

    def _drop(self, bucket: Bucket) -> None:
        self._remove(bucket)
        self.drops += 1
        if self.on_drop is not None and bucket.count:
            self.on_drop(bucket.scope)

    def drop_partition(self, partition: int) -> None:
        """Invalidate every scope of a feed partition. This looks at every bucket: use it only if a feed was lost."""
        self.drop_orphans()
        if self._held[partition]:
            for bucket in [bucket for bucket in self._buckets.values() if bucket.partition == partition]:
                self._drop(bucket)

    def clear(self) -> None:
        """Invalidate everything."""
        self.drop_orphans()
        for bucket in list(self._buckets.values()):
            self._drop(bucket)

    def holds(self, partition: int) -> bool:
        """Whether there is a bucket of this feed partition."""
        return self._held[partition] > 0

    def __iter__(self) -> Iterator[str]:
        return (bucket.scope for bucket in self._buckets.values())

    def _remove(self, bucket: Bucket) -> None:
        del self._buckets[bucket.name]
        self._held[bucket.partition] -= 1
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
        self.entries -= bucket.count
        self._units -= bucket.size
        if isinstance(bucket, LiveBucket):
            bucket.gone(bucket)
        elif self.on_dropped is not None and bucket.query is not MISS:
            self.on_dropped(bucket)

    def _evict(self) -> None:
        hand = self._hand or self._oldest
        while hand is not None and hand.visited:
            hand.visited = False
            hand = hand.newer or self._oldest
        assert hand is not None, "over its bounds without a bucket"
        self._hand = hand.newer
        self._remove(hand)
        self.evictions += 1
