"""How writes to one memory come together, in whatever order they arrive.

A memory's state is a set of registers, each with the version of the write that set it:

    put       the last whole write. It sets created_at, content, metadata and embedding.
    content, metadata, embedding
              the last update of that field alone
    deleted   the last delete, of the memory or of its room

Merging takes, register by register, the higher version. That is commutative, associative and idempotent (the
state is a join semilattice), so batches may be applied in any order, again, or late, and every store that
has seen the same events holds the same thing (G2, G3, G8). From the registers follows what is seen:

- the memory is there if ``put > deleted``;
- a field's value is that of the higher of ``put`` and the field's own update;
- a value that is older than ``deleted`` is erased; one that an update set after it is kept, for a put between
  the two may still arrive.

`collapse` does this for the events of one batch; the upserts of sqlite.py and postgres.py say the same in
SQL for what meets in the table. Versions are compared packed (`Version.pack`), the empty value being before all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..events import DELETE, DELETE_ROOM, PUT, Event
from ..keys import Dimensions, Version
from . import Refused

NEVER = b""
"""Before every packed version: a register that was not set."""


@dataclass(slots=True)
class Delta:
    """What a batch does to one memory: its registers, and the events they come from.

    Versions are packed; NEVER where nothing in the batch set the register. A register's value is that of
    the higher of ``put`` and its own version.
    """

    id: str
    dimensions: Dimensions
    put: bytes = NEVER
    content_version: bytes = NEVER
    metadata_version: bytes = NEVER
    embedding_version: bytes = NEVER
    deleted: bytes = NEVER
    created_us: int = 0
    content: bytes | None = None
    metadata: bytes | None = None
    embedding: bytes | None = None
    events: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """A batch, collapsed: one delta per memory in the order of ids, and the last deletion of each room."""

    deltas: list[Delta]
    rooms: dict[tuple[str, str], bytes]
    refused: list[Refused]


def collapse(events: Iterable[Event]) -> Batch:
    """One delta per memory. Events that disagree with the first of their memory's in the batch about its
    dimensions are refused: dimensions never change."""
    deltas: dict[str, Delta] = {}
    rooms: dict[tuple[str, str], bytes] = {}
    refused: list[Refused] = []
    for event in events:
        version = event.version.pack()
        if event.op == DELETE_ROOM:
            key = (event.dimensions.table, event.dimensions.room)
            rooms[key] = max(rooms.get(key, NEVER), version)
            continue
        delta = deltas.get(event.id)
        if delta is None:
            delta = deltas[event.id] = Delta(event.id, event.dimensions)
        elif delta.dimensions != event.dimensions:
            refused.append(Refused(event, dimensions_changed(event, delta.dimensions)))
            continue
        delta.events.append(event)
        if event.op == DELETE:
            delta.deleted = max(delta.deleted, version)
            continue
        if event.op == PUT:
            if version > delta.put:
                _put(delta, event, version)
        else:
            _update(delta, event, version)
    return Batch([deltas[id] for id in sorted(deltas)], rooms, refused)


def _put(delta: Delta, event: Event, version: bytes) -> None:
    if version > delta.content_version:
        delta.content = event.content
    if version > delta.metadata_version:
        delta.metadata = event.metadata
    if version > delta.embedding_version:
        delta.embedding = event.embedding
    delta.created_us = event.created_us
    delta.put = version


def _update(delta: Delta, event: Event, version: bytes) -> None:
    if event.content is not None and version > delta.content_version:
        if version > delta.put:
            delta.content = event.content
        delta.content_version = version
    if event.metadata is not None and version > delta.metadata_version:
        if version > delta.put:
            delta.metadata = event.metadata
        delta.metadata_version = version
    if event.embedding is not None and version > delta.embedding_version:
        if version > delta.put:
            delta.embedding = event.embedding or None
        delta.embedding_version = version


def dimensions_changed(event: Event, stored: Dimensions) -> str:
    """Why an event is refused whose dimensions are not those that its memory has."""
    changes = ", ".join(
        f"{name} from {old!r} to {new!r}"
        for name, old, new in zip(Dimensions._fields, stored, event.dimensions, strict=True)
        if old != new
    )
    return f"memory {event.id} would change its {changes}; dimensions never change"


def embedding_length_changed(event: Event, length: int) -> str:
    """Why an event is refused whose embedding is of another length than its table's."""
    given = len(event.embedding or b"") // 4
    return f"an embedding of {given} floats; those of table {event.dimensions.table!r} have {length}"


def version_of(*packed: bytes | None) -> Version:
    """The highest of some packed versions: what a reader sees as the memory's version."""
    return Version.unpack(max(p for p in packed if p))
