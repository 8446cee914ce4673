"""World "store": batches in any order, again and again, against what the log's order says (G2, G3).

One memory in one room. The log is any sequence of a few events: a put, an update of the content or of the metadata, a
delete, a delete of the room. Any set of them may be applied as a batch, at any time, as often as one likes: that
covers slow workers, claims, redelivery, late batches and replay. After every batch the memory has to be what somebody
would see who had executed, in the log's order, exactly the events that were applied so far.

Modelled after store/merge.py: `collapse`, the upsert that `merging` says, the tombstone of a room and `clearing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

KINDS = ("put", "update content", "update metadata", "delete", "delete room")


class Row(NamedTuple):
    """A memory's registers: versions, and for each value the version of the write that gave it; 0 for none."""

    put: int = 0
    content_version: int = 0
    content: int = 0
    metadata_version: int = 0
    metadata: int = 0
    deleted: int = 0


class State(NamedTuple):
    log: tuple[str, ...] = ()
    """The event of version n is number n - 1."""
    applied: tuple[int, ...] = ()
    row: Row | None = None
    room: int = 0
    """The tombstone of the room."""


class Store(World):
    name = "store"
    about = "the order of a memory's writes, tombstones, rooms, redelivery and late batches"
    sizes: ClassVar = {"events": 3}
    larger = ({"events": 4}, {"events": 5})
    rules = (
        Rule("version", "the batch that is applied last wins, whatever its versions", "G2"),
        Rule("field-versions", "a memory has one version for all of its fields", "G2"),
        Rule("pending-values", "a delete erases also what an update after it has set", "G2"),
        Rule("tombstone", "a delete removes the row", "G3"),
        Rule("room-tombstone", "a deleted room is emptied, and not remembered", "G3"),
    )

    def start(self) -> State:
        return State()

    def broken(self, s: State) -> Iterator[str]:
        expected, found = self.expected(s), self.visible(s)
        if found == expected:
            return
        if expected is None:
            yield f"G3: the memory is deleted, but {found} is there"
        else:
            yield f"G2: the log's order says {expected}, the store has {found}"

    def expected(self, s: State) -> tuple[int, int] | None:
        """What is there once the applied events are executed one by one: who wrote content and metadata."""
        content = metadata = 0
        alive = False
        for version in s.applied:
            kind = s.log[version - 1]
            if kind == "put":
                alive, content, metadata = True, version, version
            elif kind == "update content":
                content = version
            elif kind == "update metadata":
                metadata = version
            else:
                alive = False
        return (content, metadata) if alive else None

    def visible(self, s: State) -> tuple[int, int] | None:
        row = s.row
        return None if row is None or row.put <= row.deleted else (row.content, row.metadata)

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        if len(s.log) < self.size["events"]:
            for kind in KINDS:
                yield f"{kind} is logged as {len(s.log) + 1}", s._replace(log=(*s.log, kind))
            return
        versions = range(1, len(s.log) + 1)
        for size in versions:
            for batch in combinations(versions, size):
                yield f"{', '.join(map(str, batch))} applied", self.apply(s, batch)

    def apply(self, s: State, batch: tuple[int, ...]) -> State:
        """One transaction (merge.apply)."""
        rooms = [v for v in batch if s.log[v - 1] == "delete room"]
        room = max([s.room, *rooms]) if self.keeps("room-tombstone") else 0
        row = s.row
        delta = self.collapse(s.log, batch)
        if delta is not None:
            row = self.upsert(row, delta._replace(deleted=max(delta.deleted, room)))
        if rooms and row is not None:
            row = self.clear(row, max(rooms))
        applied = tuple(sorted({*s.applied, *batch}))
        return State(s.log, applied, row, room)

    def collapse(self, log: tuple[str, ...], batch: tuple[int, ...]) -> Row | None:
        delta: Row | None = None
        for version in batch:
            kind = log[version - 1]
            if kind == "delete room":
                continue
            delta = delta or Row()
            if kind == "put":
                delta = delta._replace(put=version, content=version, metadata=version)
            elif kind == "update content":
                delta = delta._replace(content_version=version, content=version)
            elif kind == "update metadata":
                delta = delta._replace(metadata_version=version, metadata=version)
            else:
                delta = delta._replace(deleted=version)
        return delta

    def upsert(self, row: Row | None, new: Row) -> Row | None:
        old = row or Row()
        deleted = max(old.deleted, new.deleted)

        def merged(old_version: int, old_value: int, new_version: int, new_value: int) -> int:
            before, now = max(old.put, old_version), max(new.put, new_version)
            if max(before, now) <= deleted:
                return 0
            if not self.keeps("version"):
                return new_value or old_value
            return new_value if now > before else old_value

        one_version = max(new.put, new.content_version, new.metadata_version)
        if not self.keeps("field-versions") and one_version < max(
            old.put, old.content_version, old.metadata_version
        ):
            return old._replace(deleted=deleted)
        result = Row(
            max(old.put, new.put),
            max(old.content_version, new.content_version),
            merged(old.content_version, old.content, new.content_version, new.content),
            max(old.metadata_version, new.metadata_version),
            merged(old.metadata_version, old.metadata, new.metadata_version, new.metadata),
            deleted,
        )
        if not self.keeps("pending-values") and new.deleted:
            result = result._replace(
                content=result.content if result.put > deleted else 0,
                metadata=result.metadata if result.put > deleted else 0,
            )
        if not self.keeps("tombstone") and result.put <= deleted:
            return None
        return result

    def clear(self, row: Row, version: int) -> Row | None:
        """What a deleted room does to a row of it (merge.clearing): one that is dead and empty is left alone."""
        if row.deleted >= version or (row.put <= row.deleted and not row.content and not row.metadata):
            return row
        cleared = row._replace(
            deleted=version,
            content=row.content if max(row.put, row.content_version) > version else 0,
            metadata=row.metadata if max(row.put, row.metadata_version) > version else 0,
        )
        if not self.keeps("tombstone") and cleared.put <= version:
            return None
        return cleared
