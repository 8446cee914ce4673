"""The marks of a bus's own writes, until they are in the store. Nothing here does any I/O: pending.py asks and waits.

A logged write leaves a mark on every scope that it touches. A query on a marked scope has to wait (G6).

`delete_room` touches scopes that its writer can't name, so it marks every other scope too. That mark is lifted only
once the low-water mark has passed it. For an earlier write may have deleted memories of the room already: only that
write's fan-out names them, and its worker may have died before the fan-out.

The number of marks is bounded (`MARKS`). Beyond that, the oldest of a log partition are merged into one cover:
everything that the partition's writes may touch waits until the low-water mark has passed the last of them. Their
receipts need no mark: they ask by version.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from ..connection.link import Link
from ..keys import ZERO, Version
from .progress import Progress

_EVERYWHERE = "*"
"""In place of a scope: the mark of a delete_room on all scopes but rooms."""

MARKS = 10_000
"""Most writes of a bus that have their own marks."""


class Write:
    """One write of this bus that is in the log, or in the outbox on its way there.

    version   None while it is in the outbox
    entry     its ID in the log: its version, or another ID if it was a dead letter and is requeued
    deadline  by the loop's clock, when queries stop waiting for it
    applied   whether its outcome is known: the store has it, or one of the following
    rejected  why it is a dead letter, or None
    lost      whether Redis lost it before it was known to be applied
    unknown   whether nobody can tell any more if it became a dead letter
    """

    __slots__ = (
        "__weakref__",
        "applied",
        "deadline",
        "doubts",
        "entry",
        "lost",
        "partition",
        "rejected",
        "scopes",
        "unknown",
        "version",
        "waiters",
    )

    def __init__(self, partition: int, scopes: tuple[str, ...], deadline: float) -> None:
        self.partition = partition
        self.version: Version | None = None
        self.entry: Version | None = None
        self.scopes = scopes
        """The scopes that it still marks by itself."""
        self.deadline = deadline
        self.doubts = 0
        """The bus's count of possible losses (`doubts`) when the write was last known to be in the log."""
        self.applied = False
        self.rejected: str | None = None
        self.lost = False
        self.unknown = False
        self.waiters: list[asyncio.Future[None]] | None = None

    def settle(self, rejected: str | None, *, lost: bool = False, unknown: bool = False) -> None:
        if self.applied:
            return
        self.applied, self.rejected, self.lost, self.unknown = True, rejected, lost, unknown
        waiters, self.waiters = self.waiters, None
        for done in waiters or ():
            if not done.done():
                done.set_result(None)


class _Cover:
    """The cover of a log partition's older writes: one mark for all up to a version."""

    __slots__ = ("deadline", "doubts", "partition", "version", "writes")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.version = ZERO
        self.deadline = 0.0
        self.doubts = 0
        self.writes = 0


class Marks(ABC):
    """The marks of one bus, and the calls that wait until they are lifted."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._scopes: dict[str, Write | dict[Write, None]] = {}
        """Most scopes are marked by one write: only the second makes a dict."""
        self._writes: dict[int, dict[Version, Write]] = {}
        """The writes that mark anything, by log partition; in each partition in the order of their versions."""
        self._covers: dict[int, _Cover] = {}
        """By log partition, the cover of the writes that have no own marks any more."""
        self._kept = 0
        """Writes in the outbox that have their own marks."""
        self._adrift = 0.0
        """Until when queries wait for the other writes in the outbox. 0 if there are none."""
        self._logged = 0
        """Writes in the log that have their own marks."""
        self._waiting: Counter[Write] = Counter()
        """Writes whose receipts a caller waits for."""
        self._settling: Counter[str] = Counter()
        """Scopes that queries wait for."""
        self._changed = asyncio.Event()
        self.doubts = 0
        """How many times Redis may have lost writes of this bus."""

    @abstractmethod
    def _start_polling(self) -> None:
        """A call waits for what is marked now: ask Redis about it."""

    def mark(
        self,
        partition: int,
        version: Version | None,
        scopes: Iterable[str],
        deadline: float,
        *,
        everywhere: bool = False,
    ) -> Write:
        """Mark scopes; ``deadline``, by the loop's clock, is when queries stop waiting for this write.

        version: None for a write in the outbox; `logged` follows
        """
        write = Write(partition, (*scopes, _EVERYWHERE) if everywhere else tuple(scopes), deadline)
        if version is None and self._kept >= MARKS:
            write.scopes = ()
            self._adrift = max(self._adrift, deadline)
            return write
        for scope in write.scopes:
            marks = self._scopes.setdefault(scope, write)
            if marks is not write:
                if isinstance(marks, Write):
                    marks = self._scopes[scope] = {marks: None}
                marks[write] = None
        if version is None:
            self._kept += 1
        else:
            self._enter(write, version)
        return write

    def logged(self, write: Write, version: Version) -> None:
        """A write that was in the outbox is in the log."""
        if write.scopes:
            self._kept -= 1
            self._enter(write, version)
        else:
            write.version = write.entry = version
            write.doubts = self.doubts
            self.cover(write.partition, version, write.deadline)

    def _enter(self, write: Write, version: Version) -> None:
        write.version = write.entry = version
        write.doubts = self.doubts
        self._writes.setdefault(write.partition, {})[version] = write
        self._logged += 1
        if self._logged > MARKS:
            self._make_room()
        if self._waiting or self._settling:
            self._start_polling()

    def _make_room(self) -> None:
        """Put the older half of the partition with the most marks under its cover."""
        partition = max(self._writes, key=lambda p: len(self._writes[p]))
        writes = self._writes[partition]
        older = list(islice(writes.values(), (len(writes) + 1) // 2))
        for write in older:
            assert write.version is not None
            self.cover(partition, write.version, write.deadline, write.doubts)
            self._unmark(write, write.scopes)

    def cover(self, partition: int, version: Version, deadline: float, doubts: int | None = None) -> None:
        """Mark all that writes of a log partition may touch, until everything up to a version is applied.

        doubts: the count of possible losses when this write was last known to be in the log; None for the count now
        """
        cover = self._covers.get(partition)
        if cover is None:
            cover = self._covers[partition] = _Cover(partition)
        if version > cover.version:
            cover.version, cover.doubts = version, self.doubts if doubts is None else doubts
        cover.deadline = max(cover.deadline, deadline)
        cover.writes += 1
        if self._waiting or self._settling:
            self._start_polling()

    def landed(self) -> None:
        """The outbox is empty: its writes without own marks are under a cover now."""
        if self._adrift:
            self._adrift = 0.0
            self._tell()

    def __contains__(self, scope: str) -> bool:
        return (
            scope in self._scopes
            or (_EVERYWHERE in self._scopes and not scope.startswith("room:"))
            or bool(self._covers and self._over(scope))
            or self._adrift > 0
        )

    def __len__(self) -> int:
        return sum(map(len, self._writes.values())) + sum(c.writes for c in self._covers.values())

    @property
    def partitions(self) -> list[int]:
        """The log partitions that have writes of this bus which are not known to be applied."""
        return sorted({*self._writes, *self._covers})

    @property
    def partitions_there(self) -> list[int]:
        """All log partitions."""
        return list(self._link.keys.shape.all)

    def _over(self, scope: str) -> list[int]:
        """The log partitions whose covers a scope is under."""
        if not scope.startswith("room:"):
            return list(self._covers)
        shape = self._link.keys.shape
        own = shape.partition(scope.split(":", 2)[2])
        # The room may have been in any partition that has ended.
        return [p for p in self._covers if p == own or p not in shape.current]

    def on(self, scope: str) -> list[Write]:
        """The writes with own marks that a query on this scope has to wait for."""
        found: list[Write] = []
        for name in (scope,) if scope.startswith("room:") else (scope, _EVERYWHERE):
            marks = self._scopes.get(name)
            if marks is not None:
                found += [marks] if isinstance(marks, Write) else marks
        return found

    def outboxed(self, scope: str) -> bool:
        """Whether a write that touches this scope waits in the outbox."""
        return self._adrift > 0 or (self._kept > 0 and any(write.version is None for write in self.on(scope)))

    def _deadline(self, scope: str) -> float:
        """Until when a query waits for the writes that mark this scope."""
        deadlines = [write.deadline for write in self.on(scope)]
        deadlines += [self._covers[partition].deadline for partition in self._over(scope)]
        return max(deadlines, default=0.0) if not self._adrift else max([*deadlines, self._adrift])

    def named(
        self,
        feed_partition: int,
        log_partition: int,
        versions: Iterable[Version],
        dead: dict[Version, str],
        *,
        dropped: bool = True,
    ) -> None:
        """The feed has named these events in this feed partition.

        dropped: whether the older results in L2 are dropped, too; if not, the events are committed, but marks stay
        """
        writes = self._writes.get(log_partition)
        if not writes:
            return
        feed_of = self._link.keys.feed_partition
        for version in versions:
            write = writes.get(version)
            if write is not None:
                write.settle(dead.get(version))
                if not dropped:
                    continue
                self._unmark(
                    write, [s for s in write.scopes if s != _EVERYWHERE and feed_of(s) == feed_partition]
                )
        self._tell()

    def _applied(self, write: Write, rejected: str | None, *, passed: bool, unknown: bool = False) -> None:
        """The consumer group has applied this event; ``passed``: and everything before it."""
        write.settle(rejected, unknown=unknown)
        self._unmark(write, [scope for scope in write.scopes if passed or scope != _EVERYWHERE])

    def _unmark(self, write: Write, scopes: Sequence[str]) -> None:
        for scope in scopes:
            marks = self._scopes.get(scope)
            if marks is write:
                del self._scopes[scope]
            elif isinstance(marks, dict):
                marks.pop(write, None)
                if not marks:
                    del self._scopes[scope]
        had = bool(write.scopes)
        write.scopes = (
            () if len(scopes) == len(write.scopes) else tuple(s for s in write.scopes if s not in scopes)
        )
        if had and not write.scopes and write.version is not None:
            writes = self._writes.get(write.partition, {})
            if writes.pop(write.version, None) is not None:
                self._logged -= 1
            if not writes:
                self._writes.pop(write.partition, None)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _wanted(self) -> dict[int, list[Write]]:
        """What calls wait for, by log partition: the writes, or the cover if there are none."""
        writes = dict.fromkeys(self._waiting)
        wanted: dict[int, list[Write]] = {}
        for scope in self._settling:
            writes.update(dict.fromkeys(self.on(scope)))
            wanted.update((partition, []) for partition in self._over(scope))
        for write in writes:
            if write.version is not None:
                wanted.setdefault(write.partition, []).append(write)
        return wanted

    def _passed(self, partition: int, state: Progress) -> dict[Write, Version]:
        """The writes below the low-water mark whose outcome is unknown or that mark anything, and their entries."""
        passed: dict[Write, Version] = {}
        for version, write in self._writes.get(partition, {}).items():
            if not state.passed(version):
                break
            if write.entry is not None and state.passed(write.entry):
                passed[write] = write.entry
        for write in self._waiting:
            if (
                write.partition == partition
                and not write.scopes
                and write.entry
                and state.passed(write.entry)
            ):
                passed[write] = write.entry
        return passed
