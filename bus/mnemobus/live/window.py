"""A window: the newest memories of a scope, kept current by the events that touch it.

Events of one log partition come in the order of the log. Each comes once, or all come again from some point on (when
a window is opened). All events of a memory are in the partition of its room. So its last events give the state of a
memory in a room: the window compares nothing, and keeps no version but the one that a memory shows anyway.

A window may be *complete*: then it has all of the scope. One that is not knows nothing of memories that are older
than its oldest one, and takes none of them in. It can't answer a query that reaches beyond its oldest memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from operator import attrgetter

from ..log.events import DELETE, DELETE_ROOM, PUT, Event
from ..memory import Memory
from ..records import Row, changed, place_of, size_of
from ..store import Query


class Window:
    """The newest memories of a scope, oldest first.

    complete  whether there are no others
    lost      memories that were removed since it was opened: then there may be older ones that it does not know
    bytes     of their records
    """

    __slots__ = ("_capacity", "_max_bytes", "bytes", "complete", "lost", "rows")

    def __init__(self, newest_first: Iterable[Memory], complete: bool, capacity: int, max_bytes: int) -> None:
        self.rows = list(newest_first)
        self.rows.reverse()
        self.complete = complete
        self.lost = 0
        self.bytes = sum(map(size_of, self.rows))
        self._capacity = capacity
        self._max_bytes = max_bytes

    def merge(self, events: Iterable[Event]) -> None:
        """Take several events, in order, as one step: a later event may need a memory that an earlier one would push
        out."""
        for event in events:
            self._take(event)
        self._fit()

    def take(self, event: Event) -> None:
        """Take an event that touches the scope."""
        self._take(event)
        self._fit()

    def newest(self, query: Query, limit: int) -> tuple[Memory, ...] | None:
        """The answer to a query on the scope, newest first; None if the window can't tell it."""
        wanted = tuple(islice((row for row in reversed(self.rows) if _matches(row, query)), limit))
        return wanted if self.complete or len(wanted) == limit else None

    def last(self, limit: int) -> list[Memory] | None:
        """The ``limit`` newest memories, newest first; None if the window can't tell."""
        wanted = self.rows[: -limit - 1 : -1]
        return wanted if self.complete or len(wanted) == limit else None

    def count(self, query: Query) -> int | None:
        """How many there are; None if the window can't tell."""
        return sum(_matches(row, query) for row in self.rows) if self.complete else None

    def _take(self, event: Event) -> None:
        if event.op == DELETE_ROOM:
            room = event.dimensions[:2]
            for row in [row for row in self.rows if row.dimensions[:2] == room]:
                self._remove(row)
            return
        # Compare its room as well: a deleted one may have been made again in another, whose events may come first.
        known = None
        if event.id in map(_id, self.rows):  # as few puts are
            room = event.dimensions[:2]
            known = next(
                (r for r in reversed(self.rows) if r.id == event.id and r.dimensions[:2] == room), None
            )
        if event.op == PUT:
            if known is not None:
                self._remove(known)
            self._insert(_memory(event))
        elif known is None:
            return
        elif event.op == DELETE:
            self._remove(known)
        else:
            at = self.rows.index(known)
            self.rows[at] = changed(known, event.content, event.metadata, event.embedding, event.version)
            self.bytes += size_of(self.rows[at]) - size_of(known)

    def _remove(self, row: Memory) -> None:
        self.rows.remove(row)
        self.bytes -= size_of(row)
        self.lost += 1

    def _insert(self, memory: Memory) -> None:
        place = place_of(memory)
        at = len(self.rows)
        while at and place_of(self.rows[at - 1]) > place:
            at -= 1
        if at == 0 and not self.complete:
            return  # it is older than all others here: some between them may be missing
        self.rows.insert(at, memory)
        self.bytes += size_of(memory)

    def _fit(self) -> None:
        while len(self.rows) > self._capacity or (self.bytes > self._max_bytes and self.rows):
            self.bytes -= size_of(self.rows.pop(0))
            self.complete = False


_id = attrgetter("id")


def _matches(row: Memory, query: Query) -> bool:
    return all(
        wanted is None or wanted == has
        for wanted, has in zip(
            (query.room, query.agent, query.entity, query.world), row.dimensions[1:], strict=True
        )
    )


def _memory(event: Event) -> Memory:
    """The memory that a put makes."""
    assert event.content is not None and event.metadata is not None, "checked where it was decoded"
    return Row(
        event.id,
        *event.dimensions,
        event.content,
        event.metadata,
        event.embedding,
        event.created_us,
        event.version,
    ).memory()
