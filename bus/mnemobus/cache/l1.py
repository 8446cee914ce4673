"""L1: what this process keeps of what it has read.

A dict of buckets by scope; a bucket has results by query. To invalidate a scope is to take its bucket out of the dict,
in constant time whatever else is cached.

No stale fill (G4). A read takes its bucket *before* it looks anywhere else, and puts what it found into that very
object. An invalidation meanwhile has taken the object out of the dict, so the late fill lands in an orphan that no
later read can see. Nothing is compared and no lock is held. Reads of one query that share a load share it
through the bucket, for the same reason: a read that begins after the invalidation finds another bucket, and loads.

That holds as well for reads whose results may not be cached, because the bus does not listen to the scope's feed
partition, or waits for a write of its own. They share an orphan that nobody finds once the scope was invalidated, or
once the last of their loads has ended.

Freshness (G5). Nothing is served once ``fresh_until`` has passed. The feed moves it forward whenever it has
verified that every invalidation up to a moment is applied here. The clock goes on while the machine is suspended.

Eviction. SIEVE (Zhang et al., NSDI 2024) over whole buckets: a hit sets one bit, and the hand, moving from old to
new, evicts the first bucket without it. Bounds are in results and in bytes; bytes are those of the encoded
results and a constant for what Python puts around them.

Last known copies (G7). What is no longer fresh stays where it is: with Redis and the store both away, it is all
that there is, and is served marked stale.

Size. A memory that is cached by itself costs less than 400 bytes besides its record (docs/benchmarks.md). So the first
result of a bucket has its place in the bucket; a dict comes with the second. The bucket of a memory is named by its
bare id, the string that the memory has anyway. Buckets that expire in the same second share that number; sizes are
small numbers, which Python shares by itself.
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
"""Seconds, counting those that the machine was suspended. No function of ours: it is part of every hit."""


class _Miss:
    def __repr__(self) -> str:
        return "MISS"


MISS: Final = _Miss()
"""What `LocalCache.hit` answers if it has nothing; None is a result."""

OVERHEAD = 384
"""Bytes that a cached result takes besides its encoded form, roughly."""
EACH = 192
"""Bytes that each memory of a list takes besides its encoded form, roughly."""
_UNIT = 64
"""Bytes by which sizes are counted."""
_LONG = 60.0
"""From this time to live on (in seconds), a copy may expire up to a second early."""


def _name(scope: str) -> str:
    """The name of a scope's bucket here."""
    return scope[3:] if scope.startswith("id:") else scope


Key = int | str | tuple[Any, ...]
"""What an answer is called in its bucket. "get": the memory by its id. A limit: the newest of a room, as most ask for.
(limit, entity, agent, world), with two cursors where it is a page: the newest of what matches. ("count", query)."""


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
        """Of the first result; MISS while there is none."""
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
    """A scope that is kept current from the log (live/): a window, and answers made from it since it last changed.

    partition of the feed: it tells what was refused, or is not from the log
    channels  those that its events come on
    floors    by channel, the version up to which the window has all events of the scope, whatever the position is
    classic   answers to queries that a window does not tell, dropped when the feed names the scope, or the window
              changes
    tell      gives the answer of the window to a query, by its key; MISS if the window can't tell it at once
    gone      called once it is out of the cache
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
        """A result that the window does not tell, or MISS."""
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
        """By name, and whether the reads are stale. Each lasts as long as a load that holds it."""
        self._held: Counter[int] = Counter()
        """How many buckets there are of each feed partition."""
        self._units = 0
        self._oldest: Bucket | None = None
        self._newest: Bucket | None = None
        self._hand: Bucket | None = None
        self._expiries: dict[float, float] = {}
        """By time to live: when what was made last expires."""
        self.fresh_until = 0.0
        """By `clock`; moved on by the feed. Nothing is served after it."""
        self.on_drop: Callable[[str], None] | None = None
        """Called with a scope whose bucket an invalidation dropped."""
        self.on_dropped: Callable[[Bucket], None] | None = None
        """Called with each bucket of results, not live, that is out of the cache, for whatever reason."""
        self.sample_at = 0
        """The number of the hit that `on_sample` is told of; 0 for none."""
        self.on_sample: Callable[[Bucket, Any, Any], None] | None = None
        """Called with bucket, query and result of that hit. Must not raise."""
        self.entries = 0
        self.hits = 0
        self.drops = 0
        self.evictions = 0

    @property
    def bytes(self) -> int:
        """What the cache takes, approximately."""
        return self._units * _UNIT

    def hit(self, name: str, query: Key) -> Any:
        """The cached result, or MISS if there is none or it may not be served.

        name: the scope; of a memory, its bare id
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
        """What a live bucket answers to a query that it was not asked since it last changed; MISS if it can't now."""
        if bucket.classic is not None:
            return bucket.beside(query)
        if self._orphans:
            return MISS  # one of them may hold a load of this very query; see ReadPath
        value = bucket.tell(bucket, query)
        if value is not MISS:
            self.entries += 1
            bucket.set(query, value)
        return value

    def has(self, bucket: Bucket) -> bool:
        """Whether a bucket is in use; one that was taken out never comes back."""
        found = self._buckets.get(bucket.name)
        return found is bucket or (isinstance(found, LiveBucket) and found.classic is bucket)

    def served(self, scope: str) -> Mapping[Any, Any]:
        """What hits on a scope would give now, by query; counts as no hit."""
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
        """The live bucket of a scope (of a memory, also by its bare id), a new one if need be.

        Only for a scope whose feed partition is listened to and has a position.
        """
        name = _name(scope)
        bucket = self._buckets.get(name)
        now = clock()
        if isinstance(bucket, LiveBucket):
            if bucket.classic is None:
                bucket.classic = Bucket(name, partition, self._expiry(now, ttl))
            return bucket.classic
        if bucket is not None:
            # While nothing may be served, an expired one is kept, as the last known copy.
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
        """A bucket for a read that must not be cached: nothing that is put there is kept. Reads of a scope have the
        same one, for as long as one of them loads and the scope is not invalidated.

        stale: whether the read's wait for a write of this bus timed out; it may see less than other reads must
        """
        name = _name(scope)
        found = self._orphans.get((name, stale))
        if found is None:
            found = self._orphans[name, stale] = Orphan(name, partition, 0.0)
        return found

    def drop_orphans(self) -> None:
        """No later read may share a load that began before, if its result must not be cached."""
        self._orphans.clear()

    def put(self, bucket: Bucket, query: Key, value: Any, size: int) -> None:
        """Cache a result in the bucket that its read began with, and evict others if the cache is full.

        size: bytes of the result's encoded form
        """
        if not self.has(bucket):
            return
        whole = self._buckets[bucket.name]  # another one where it is beside a window
        units = -(-(size + OVERHEAD) // _UNIT)
        if units > self._max_units:
            if not whole.count and whole is bucket:
                self._remove(bucket)
            return
        if bucket.get(query) is not MISS:
            # The old size is not kept per result; the mean is near enough for a bound on memory.
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
        """Whether anything is kept at all."""
        return self._max_entries > 0

    def live(self, name: str) -> LiveBucket | None:
        """The live bucket of a scope; of a memory, by its bare id."""
        bucket = self._buckets.get(name)
        return bucket if isinstance(bucket, LiveBucket) else None

    def has_read(self, name: str) -> bool:
        """Whether there are results of a scope; of a memory, by its bare id."""
        bucket = self._buckets.get(name)
        return bucket is not None and bucket.query is not MISS

    def live_of(self, scope: str) -> LiveBucket | None:
        """The live bucket of a scope, by the scope's whole name."""
        return self.live(_name(scope))

    def beside(self, name: str) -> Iterator[Bucket]:
        """The buckets in which reads of a scope that is held live may share a load."""
        bucket = self.live(name)
        if bucket is not None and bucket.classic is not None:
            yield bucket.classic
        if self._orphans:
            for stale in (False, True):
                orphan = self._orphans.get((name, stale))
                if orphan is not None:
                    yield orphan

    def hold(self, bucket: LiveBucket, ttl: float) -> None:
        """Keep a live bucket, in place of what was cached under its scope: that may be older than the window, which has
        what the log has."""
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
        """A window has taken an event: answers from before it are no longer given. Nor are those beside it, which may
        lack what it shows."""
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
        """Invalidate what a window does not tell."""
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
        """Invalidate a scope; whether anything was cached under it. A live bucket stays: the log keeps it current."""
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
        """Invalidate every scope of a feed partition. It looks at every bucket: only for a feed that was lost."""
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
