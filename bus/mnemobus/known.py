"""What a bus knows about memories without asking Redis or the store: enough to refuse a write before it leaves the
process.

All of it is bounded. If the bus has forgotten something, it asks again, or leaves the check to the worker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from .cache.l1 import LocalCache
from .cache.query import GET
from .keys import Dimensions, id_scope
from .log.events import DELETE, DELETE_ROOM, PUT, Event
from .memory import Memory

_DIMENSIONS = 10_000
"""Memories whose dimensions a bus remembers."""
_TABLES = 1_000
"""Tables whose embeddings' length a bus remembers."""


class Known:
    """Knowledge from the bus's own writes, and from L1."""

    def __init__(self, local: LocalCache) -> None:
        self._local = local
        self._dimensions: OrderedDict[str, Dimensions] = OrderedDict()
        self._deleted: set[str] = set()
        self._lengths: dict[str, int] = {}
        """By table, as the store told them: they never change any more."""
        self._own_lengths: dict[str, int] = {}
        """By table, those that this bus wrote before the store had any."""

    def dimensions(self, id: str) -> Dimensions | None:
        """The dimensions of a memory, by what this bus wrote or has in L1."""
        known = self._dimensions.get(id)
        if known is None:
            cached = self._local.last_known(id_scope(id), GET)
            if isinstance(cached, Memory):
                known = cached.dimensions
            else:
                held = self._local.live(id)
                if held is not None and held.window.rows:
                    known = held.window.rows[-1].dimensions
        return known

    def wrote(self, id: str) -> bool:
        """Whether this bus wrote the memory, as far as it remembers."""
        return id in self._dimensions

    def deleted(self, id: str) -> bool:
        """Whether this bus deleted the memory, as far as it remembers."""
        return id in self._deleted

    def remember(self, event: Event) -> None:
        """A write of this bus is in the log or in the outbox."""
        if event.op == DELETE_ROOM:
            room = (event.dimensions.table, event.dimensions.room)
            self._deleted.update(id for id, known in self._dimensions.items() if known[:2] == room)
            return
        self._dimensions[event.id] = event.dimensions
        self._dimensions.move_to_end(event.id)
        if event.op == DELETE:
            self._deleted.add(event.id)
        elif event.op == PUT:
            self._deleted.discard(event.id)
        if len(self._dimensions) > _DIMENSIONS:
            forgotten, _ = self._dimensions.popitem(last=False)
            self._deleted.discard(forgotten)

    def embedding_length(self, table: str) -> int | None:
        """Floats of a table's embeddings, if the store told it."""
        return self._lengths.get(table)

    def own_embedding_length(self, table: str) -> int | None:
        """Floats of the embeddings that this bus wrote before the store had any."""
        return self._own_lengths.get(table)

    def store_has(self, table: str, length: int) -> None:
        """The store told the length of a table's embeddings."""
        _keep(self._lengths, table, length)
        self._own_lengths.pop(table, None)

    def wrote_embeddings(self, lengths: Mapping[str, int]) -> None:
        """Embeddings of these lengths are in the log, by table."""
        for table, length in lengths.items():
            if table not in self._lengths:
                _keep(self._own_lengths, table, length)


def _keep(lengths: dict[str, int], table: str, length: int) -> None:
    if len(lengths) >= _TABLES and table not in lengths:
        del lengths[next(iter(lengths))]
    lengths[table] = length
