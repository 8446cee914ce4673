"""Versions, scopes, partitions and the names of everything in Redis: only this module computes them.

A *version* is the stream ID that the log gave an event. A query depends on a *scope*.
Partitions are CRC-32 of a name modulo their count, so every process on every machine agrees. All keys
of one partition share a hash tag, so that a script on them touches one slot of a Redis Cluster.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

_PAIR = struct.Struct(">QQ")
_LIMIT = 1 << 64
SHARED_SCOPES = 4_096
"""The scopes of this many combinations of names are remembered: writes repeat them, and marks share the strings."""


class Version(NamedTuple):
    """The stream ID of an event: milliseconds and a sequence number, both unsigned 64-bit.

    Versions of one log partition are in the order of their writes; they compare numerically.
    """

    ms: int
    seq: int

    @classmethod
    def parse(cls, text: str | bytes) -> Version:
        """The version written as ``"<ms>-<seq>"``; ValueError for anything else."""
        written = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
        ms, _, seq = written.partition(b"-")
        if not (ms.isdigit() and seq.isdigit()):
            shown = text.decode("ascii", "replace") if isinstance(text, bytes) else text
            raise ValueError(f"{shown!r} is not a version of the form <milliseconds>-<sequence>")
        numbers = int(ms), int(seq)
        if numbers[0] >= _LIMIT or numbers[1] >= _LIMIT:
            raise ValueError(f"{written.decode()!r} is out of range for a version")
        return tuple.__new__(cls, numbers)  # what cls(...) does, by a function of Python

    def before(self) -> Version:
        """The last version that is lower; there is none before 0-0."""
        if self.seq:
            return Version(self.ms, self.seq - 1)
        return Version(self.ms - 1, _LIMIT - 1) if self.ms else self

    def pack(self) -> bytes:
        """16 bytes that sort, byte by byte, as versions do: what the stores keep and compare."""
        return _PAIR.pack(self.ms, self.seq)

    @classmethod
    def unpack(cls, packed: bytes) -> Version:
        """The version that :meth:`pack` made these 16 bytes from."""
        return cls(*_PAIR.unpack(packed))

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"


ZERO = Version(0, 0)
"""Before every event."""
LAST = Version(_LIMIT - 1, _LIMIT - 1)
"""After every event."""


def id_scope(id: str) -> str:
    return f"id:{id}"


def room_scope(table: str, room: str) -> str:
    return f"room:{table}:{room}"


def entity_scope(table: str, entity: str) -> str:
    return f"entity:{table}:{entity}"


def agent_scope(table: str, agent: str) -> str:
    return f"agent:{table}:{agent}"


def world_scope(table: str, world: str) -> str:
    return f"world:{table}:{world}"


class Dimensions(NamedTuple):
    """The fields of a memory that never change. So they decide which scopes a write to it touches."""

    table: str
    room: str
    agent: str | None = None
    entity: str | None = None
    world: str | None = None

    def scopes(self, id: str) -> list[str]:
        """The scopes, at most five, that a write to memory ``id`` with these dimensions touches."""
        return [f"id:{id}", *self.shared_scopes()]

    def shared_scopes(self) -> tuple[str, ...]:
        """The scopes that a memory shares with others of the same dimensions; the same strings each time."""
        return _shared_scopes(self)


@lru_cache(SHARED_SCOPES)
def _shared_scopes(dimensions: Dimensions) -> tuple[str, ...]:
    table = dimensions.table
    scopes = [f"room:{table}:{dimensions.room}"]
    if dimensions.entity is not None:
        scopes.append(f"entity:{table}:{dimensions.entity}")
    if dimensions.agent is not None:
        scopes.append(f"agent:{table}:{dimensions.agent}")
    if dimensions.world is not None:
        scopes.append(f"world:{table}:{dimensions.world}")
    return tuple(scopes)


SLOTS = 256
"""The number of slots of each log partition, for live channels."""


def slot_of(kind: str, name: str) -> int:
    """The slot, in ``range(SLOTS)``, of a room, entity, agent or world."""
    return crc32(f"{kind}:{name}".encode("utf-8", "surrogatepass")) % SLOTS


@lru_cache(10_000)
def slots_of(dimensions: Dimensions) -> tuple[int, ...]:
    """The slots, each once, that a write to a memory of these dimensions touches."""
    named = (
        ("room", dimensions.room),
        ("agent", dimensions.agent),
        ("entity", dimensions.entity),
        ("world", dimensions.world),
    )
    return tuple(dict.fromkeys(slot_of(kind, name) for kind, name in named if name is not None))


def partition_of(name: str, partitions: int) -> int:
    """The partition, in ``range(partitions)``, that ``name`` (a room or a scope) belongs to."""
    return crc32(name.encode("utf-8", "surrogatepass")) % partitions


LAYOUT = ("log_partitions", "feed_partitions", "first", "count", "oldest", "life")
"""Fields of the layout's hash in Redis; see layout.lua."""


class Shape(NamedTuple):
    """The layout of the log. Each partition keeps its number for ever: after a repartition, the new partitions have
    numbers above all old ones.

    first   the lowest number of those that are written to
    size    how many these are
    oldest  the lowest number of all that are kept: those below ``first`` take no more writes, but are still read
    life    it changes when Redis loses the layout, and numbers begin again; empty as long as it is only assumed
    """

    first: int
    size: int
    oldest: int = 0
    life: str = ""

    @classmethod
    def read(cls, reply: Sequence[bytes | None]) -> Shape | None:
        """Decode the values of `LAYOUT` in the layout's hash; None if any is missing. ValueError for invalid values."""
        log, feed, first, count, oldest, life = reply
        if log is None or feed is None:
            return None
        shape = cls(int(first or 0), int(count or log), int(oldest or 0), (life or b"").decode())
        if not (0 <= shape.oldest <= shape.first and shape.size > 0):
            raise ValueError(f"{shape} is not a layout of a log")
        return shape

    @property
    def name(self) -> str:
        """What an open partition has in its meter: the layout by which it is written to. Empty while the layout is only
        assumed: no partition has that."""
        return f"{self.first} {self.size} {self.life}" if self.life else ""

    @property
    def current(self) -> range:
        """The partitions that take writes."""
        return range(self.first, self.first + self.size)

    @property
    def all(self) -> range:
        """The partitions that take writes, and the ended ones that still exist."""
        return range(self.oldest, self.first + self.size)

    def partition(self, room: str) -> int:
        """The partition of a room."""
        return self.first + partition_of(room, self.size)


class Keyspace:
    """The names of all keys and channels of one bus in Redis."""

    def __init__(self, prefix: str, log_partitions: int, feed_partitions: int) -> None:
        self.prefix = prefix
        self.shape = Shape(0, log_partitions)
        """The log's layout, as far as this process knows: it may change while a bus is in use."""
        self.feed_partitions = feed_partitions
        self.layout = f"{{{prefix}}}:layout"
        """A hash: log_partitions and feed_partitions, as the first process wrote them; see layout.lua."""
        self.epoch = f"{{{prefix}}}:epoch"
        """A hash: run_id of the server that the epoch began with, and the epoch."""
        self.identity = f"{{{prefix}}}:identity"
        """A hash: this bus, its store, and what workers note of them (see identity.py)."""
        self.resync = f"{{{prefix}}}:resync"
        """Names the worker that applies the log again to a store which went back in time; expires."""
        self.workers = f"{{{prefix}}}:workers"
        """A hash: consumer name of a worker process -> its last report (health/vitals.py)."""
        self.probe = f"{{{prefix}}}:probe"
        """It never exists. A write that would only change an existing key shows whether Redis takes writes."""
        self._feed = [f"{{{prefix}:f{f}}}:" for f in range(feed_partitions)]

    @property
    def log_partitions(self) -> int:
        """How many log partitions take writes."""
        return self.shape.size

    def log_partition(self, room: str) -> int:
        """The log partition of a room. All writes to one room are in one total order."""
        first, size, *_ = self.shape
        return first + crc32(room.encode("utf-8", "surrogatepass")) % size

    def feed_partition(self, scope: str) -> int:
        """The feed partition that invalidations of a scope go through."""
        return crc32(scope.encode("utf-8", "surrogatepass")) % self.feed_partitions

    def log(self, partition: int) -> str:
        """The stream of events."""
        return f"{{{self.prefix}:l{partition}}}:log"

    def producers(self, partition: int) -> str:
        """A hash: producer id -> its last sequence number and the IDs that it got."""
        return f"{{{self.prefix}:l{partition}}}:producers"

    def meter(self, partition: int) -> str:
        """A hash of counters, events added and events applied among them; their difference is the backlog. Also whether
        the partition takes writes: open, with the `Shape.name` by which it does, and closed for a moment."""
        return f"{{{self.prefix}:l{partition}}}:meter"

    def heads(self, partition: int) -> str:
        """A hash: slot -> version of its last event, and n: how many events were announced."""
        return f"{{{self.prefix}:l{partition}}}:heads"

    def live_channel(self, partition: int, slot: int) -> str:
        """The channel on which events of a slot are announced as they are logged."""
        return f"{{{self.prefix}:l{partition}}}:heads:{slot}"

    def dead(self, partition: int) -> str:
        """The stream of dead letters."""
        return f"{{{self.prefix}:l{partition}}}:dead"

    def reasons(self, partition: int) -> str:
        """A hash: version -> the reason why an event could not be applied, or its later fate; see dead.lua."""
        return f"{{{self.prefix}:l{partition}}}:reasons"

    def feed(self, partition: int) -> str:
        """The stream of invalidations, and the channel that carries the same messages."""
        return self._feed[partition] + "feed"

    def bucket(self, epoch: str, scope: str) -> str:
        """The L2 hash of a scope, in an epoch."""
        return f"{self._feed[self.feed_partition(scope)]}b:{epoch}:{scope}"

    @property
    def buckets(self) -> str:
        """A pattern for SCAN that matches the names of all L2 hashes, of any epoch."""
        return f"{{{self.prefix}:f*}}:b:*"

    def agent_channel(self, bus_id: str) -> str:
        """The channel on which a bus probes its own link, and gets questions about the copies that it holds."""
        return f"{{{self.prefix}}}:agent:{bus_id}"

    def layout_channel(self, bus_id: str) -> str:
        """The channel on which a bus learns that the log was repartitioned. A bus that listens there goes on by
        itself."""
        return f"{{{self.prefix}}}:layout:{bus_id}"

    def verify_channel(self, name: str) -> str:
        """The channel on which agents answer questions."""
        return f"{{{self.prefix}}}:verify:{name}"


ENDED = 1 << 52
"""The backlog of a partition that has ended looks larger by this many events: to agents of an older version, which know
no other sign, it looks full."""


def applied_of(counted: int) -> int:
    """How many events of a partition were applied, by its meter."""
    return counted if counted >= 0 else counted + ENDED


APPLY_GROUP = "apply"
"""The consumer group of the worker pool, on every log partition."""

REPLAY_GROUP = "replay:"
"""The beginning of the names of the groups with which `mnemobus replay` holds back trimming."""
COPY_GROUP = "replay-into:"
"""The same, for a replay into another store."""
