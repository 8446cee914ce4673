"""How writes to one memory are merged, in whatever order they arrive.

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

Deleting a room sets a tombstone for it and the deleted register of those of its memories that are older and there, or
hold a value. What is already dead and erased is left alone, or a room that is emptied every day would cost
more each day: a row's own register may lag behind its room's tombstone, and every write that meets such a
row takes the higher of the two.

A room may hold any number of memories, and others must not wait for them all. So a deletion goes in steps, each a
transaction of its own:

1. *The tombstone*, with the room locked, so that no put is under way that has not seen it. From then on nothing older
   comes to life in the room, so what is left to clear can only become less. Queries that name the room or a memory
   see nothing of it any more.
2. *The memories*, so many at a time, in the order of the room's index; without a lock, as nothing can be missed.
3. *Their names*, for the fan-out. They are read once all steps are committed, not gathered on the way: a worker that
   died, or one that works on the same deletion, may have committed some of them without telling anybody.

Each may be done again, by anybody, and the event is acknowledged after the last.

Two things are no matter of merging: a memory's dimensions don't change as long as it lives, and a table's embeddings
are of one length. The first to be committed counts; an event that contradicts it is refused, and nothing else with it.
`apply` does that, in the one transaction of a batch.

A memory that was deleted may be made again with other dimensions: what is above the delete replaces the row, and keeps
its deleted register. What comes late then, from before that delete, is what the row has seen the end of: it changes
nothing and is no contradiction. So a replay, or a slow worker's batch, finds the same state whether or not the memory
was made again meanwhile. What is applied *before* the delete that it follows in time (their rooms may be in two log
partitions) contradicts a memory that lives, and is refused. A writer that waits until the delete is committed avoids
that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..keys import Dimensions
from ..log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event
from . import Applied, Cursor, Deletion, Refused

Room = tuple[str, str]
"""A table and a room in it."""

STEP = 500
"""Rows that a step of a deletion clears, unless told otherwise."""
TOLD = 5_000
"""Memories that are named at once when a deletion is done."""
_ROOMS = 20
"""Rooms that are locked at once to be deleted."""

BEGINNING = Cursor(-(1 << 63), "00000000-0000-0000-0000-000000000000")
"""Before every memory."""

NEVER = b""
"""Before every packed version: a register that was not set."""

_FIELDS = ("content", "metadata", "embedding")


@dataclass(slots=True)
class Delta:
    """What a batch does to one memory: its registers.

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


@dataclass(slots=True)
class Collapsed:
    """The events of a batch that name a memory, collapsed: one delta per memory, in the order of ids."""

    deltas: list[Delta]
    refused: list[Refused]


def collapse(events: Iterable[Event], known: Mapping[str, Dimensions] | None = None) -> Collapsed:
    """One delta per memory. Events that disagree about their memory's dimensions with ``known``, or else
    with the first of its events in the batch, are refused: dimensions never change."""
    dimensions = dict(known or {})
    deltas: dict[str, Delta] = {}
    refused: list[Refused] = []
    for event in events:
        if event.op == DELETE_ROOM:
            continue
        expected = dimensions.setdefault(event.id, event.dimensions)
        if expected != event.dimensions:
            refused.append(Refused(event, dimensions_changed(event, expected)))
            continue
        delta = deltas.get(event.id)
        if delta is None:
            delta = deltas[event.id] = Delta(event.id, expected)
        version = event.version.pack()
        if event.op == DELETE:
            delta.deleted = max(delta.deleted, version)
            continue
        if event.op == PUT:
            if version > delta.put:
                _put(delta, event, version)
        else:
            _update(delta, event, version)
    return Collapsed([deltas[id] for id in sorted(deltas)], refused)


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


class Stored(NamedTuple):
    """What a row says of the events that may change it: its dimensions and, packed, its put and its delete.

    deleted  the tombstone of its room included
    buried   the tombstone of the room that was asked about, which may be another than the row's
    """

    dimensions: Dimensions
    put: bytes
    deleted: bytes
    buried: bytes


class Transaction(Protocol):
    """The steps of a batch's transaction that differ between stores. What they read is current, and stays so
    until the commit."""

    def share(self, rooms: Collection[Room]) -> None:
        """Keep others from excluding us from these rooms: a put and the tombstone of its room must not pass each other
        unseen."""

    def exclude(self, rooms: Collection[Room]) -> None:
        """Keep others from sharing these rooms, once those who do are done."""

    def bury(self, rooms: Mapping[Room, bytes]) -> None:
        """Raise the tombstones of rooms to these versions."""

    def lengths(self, tables: Collection[str]) -> dict[str, int]:
        """The lengths of the embeddings of those of the tables that have any."""

    def claim(self, lengths: Mapping[str, int]) -> None:
        """Fix these lengths for the tables that have none yet."""

    def dimensions(self, ids: Collection[str]) -> dict[str, Dimensions]:
        """The dimensions of those of the memories that the table knows, alive or not."""

    def stored(self, id: str, room: Room) -> Stored | None:
        """What the table has of a memory, alive or not, and of a room."""

    def remove(self, id: str) -> None:
        """Take a memory's row out; the same transaction puts another in its place."""

    def upsert(self, deltas: Sequence[Delta]) -> Collection[str]:
        """Merge into the table; the ids of the rows that changed. Rows of other dimensions are left alone."""

    def clear(self, deletion: Deletion, after: Cursor, rows: int) -> Cursor | None:
        """Delete what is in the room, comes after this place and is older than the deletion, up to so many rows. The
        place to go on from, or None if nothing is left."""

    def ended(self, deletion: Deletion, most: int) -> list[tuple[str, Dimensions]]:
        """All that any of these deletions ever put an end to, up to so many."""


def part(events: Sequence[Event]) -> tuple[Sequence[Event], list[list[Deletion]]]:
    """The events of a batch that name a memory, and its deletions of rooms, those together that go into one
    transaction."""
    found: dict[Room, set[bytes]] = {}
    for event in events:
        if event.op == DELETE_ROOM:
            found.setdefault(event.dimensions[:2], set()).add(event.version.pack())
    if not found:
        return events, []
    deletions = [Deletion(room, tuple(sorted(versions))) for room, versions in sorted(found.items())]
    return (
        [event for event in events if event.op != DELETE_ROOM],
        [deletions[first : first + _ROOMS] for first in range(0, len(deletions), _ROOMS)],
    )


def bury(transaction: Transaction, deletions: Sequence[Deletion]) -> None:
    """Set the tombstones of these rooms, within a transaction, which the caller begins and commits."""
    transaction.exclude([deletion.room for deletion in deletions])
    transaction.bury({deletion.room: deletion.versions[-1] for deletion in deletions})


def begin_clearing(transaction: Transaction, deletions: Sequence[Deletion]) -> Applied:
    """Delete what is in these rooms, whose tombstones are set, as far as that fits into one step. The same or another
    transaction."""
    applied = Applied()
    left = STEP
    for deletion in deletions:
        if left > 0 and transaction.clear(deletion, BEGINNING, left) is None:
            ended = transaction.ended(deletion, left + 1)
            if len(ended) <= left:
                applied.cleared += ended
                left -= max(len(ended), 1)
                continue
        applied.unfinished.append(deletion)
        left = 0
    return applied


def delete_rooms(transaction: Transaction, deletions: Sequence[Deletion]) -> Applied:
    """Both in one."""
    bury(transaction, deletions)
    return begin_clearing(transaction, deletions)


def apply(transaction: Transaction, events: Sequence[Event]) -> Applied:
    """Apply events that name a memory, within a transaction, which the caller begins and commits."""
    applied = Applied()
    transaction.share({event.dimensions[:2] for event in events})

    # What is stored decides which of several contradicting events is refused, but it is not looked up before
    # something looks like a contradiction. Then the batch is collapsed again, knowing better; most batches
    # need no second round.
    known: dict[str, Dimensions] = {}
    while True:
        batch, wrong = _collapse(transaction, events, known)
        applied.won.update(transaction.upsert(batch.deltas))
        lost = [delta for delta in batch.deltas if delta.id not in applied.won]
        stored = transaction.dimensions([delta.id for delta in lost]) if lost else {}
        clashes = {d.id: stored[d.id] for d in lost if stored.get(d.id, d.dimensions) != d.dimensions}
        if not clashes:
            break
        known.update(clashes)
    applied.refused = [*wrong, *_made_again(transaction, batch.refused, applied)]
    return applied


def _made_again(
    transaction: Transaction, contradicting: Sequence[Refused], applied: Applied
) -> list[Refused]:
    """Of the events that contradict their memory's dimensions, those that do so while it lives. The others are applied:
    they make a deleted memory again, or are of one that it replaced."""
    refused = []
    for item in sorted(contradicting, key=lambda item: item.event.version):
        event, version = item.event, item.event.version.pack()
        row = transaction.stored(event.id, event.dimensions[:2])
        delta = collapse([event]).deltas[0]
        if row is not None and row.dimensions != event.dimensions:
            if version <= row.buried or (version <= row.put and version <= row.deleted):
                continue  # of a life that has ended since
            if event.op == DELETE and version < row.put:
                # The end of an earlier life, which nobody knew of here: what else is late from it must find it.
                delta.dimensions = row.dimensions
            elif event.op == UPDATE and row.put == row.deleted:
                # Earlier updates wait there for their life's put. Only a put or a delete ends that, and not an update.
                refused.append(Refused(event, dimensions_changed(event, row.dimensions)))
                continue
            elif row.put <= row.deleted < version:
                delta.deleted = max(delta.deleted, row.deleted)
                # Where its put is late: what the life before had is done with all the same.
                delta.put = delta.put or row.deleted
            else:
                refused.append(Refused(event, dimensions_changed(event, row.dimensions)))
                continue
        if event.embedding:
            length = _floats(event)
            transaction.claim({event.dimensions.table: length})
            stored = transaction.lengths([event.dimensions.table])[event.dimensions.table]
            if stored != length:
                refused.append(Refused(event, embedding_length_changed(event, stored)))
                continue
        if row is not None and row.dimensions != delta.dimensions:
            transaction.remove(event.id)
            applied.cleared.append((event.id, row.dimensions))
        won = transaction.upsert([delta])
        applied.won.update(won)
        row = None if won else transaction.stored(event.id, event.dimensions[:2])
        if row is not None and row.dimensions != delta.dimensions:
            # Another batch was faster.
            refused.append(Refused(event, dimensions_changed(event, row.dimensions)))
    return refused


def _collapse(
    transaction: Transaction, events: Sequence[Event], known: dict[str, Dimensions]
) -> tuple[Collapsed, list[Refused]]:
    """The batch without the events whose embedding is of another length than its table's, which are refused; and these.
    Fixes the length of tables that have none yet."""
    wrong: list[Refused] = []
    vectors = [event for event in events if event.embedding]
    if vectors:
        tables = {event.dimensions.table for event in vectors}
        lengths = transaction.lengths(tables)
        first = [event for event in vectors if event.dimensions.table not in lengths]
        if first:
            # An event that is going to be refused must not decide for a whole table.
            known.update(transaction.dimensions({event.id for event in first}))
            refused = {id(item.event) for item in collapse(events, known).refused}
            claims: dict[str, int] = {}
            for event in first:
                if id(event) not in refused:
                    claims.setdefault(event.dimensions.table, _floats(event))
            transaction.claim(claims)
            lengths = transaction.lengths(tables)
        wrong = [
            Refused(event, embedding_length_changed(event, length))
            for event in vectors
            if (length := lengths.get(event.dimensions.table)) not in (None, _floats(event))
        ]
        unfit = {id(item.event) for item in wrong}
        events = [event for event in events if id(event) not in unfit]
    return collapse(events, known), wrong


def _floats(event: Event) -> int:
    return len(event.embedding or b"") // 4


def merging(greatest: str, same: str, tombstones: str, never: str) -> str:
    """The end of the upsert of deltas into the table of memories AS m: the rules above, in SQL.

    greatest    the name of the function
    same        the operator that compares values which may be NULL
    tombstones  the table of the rooms' tombstones
    never       the empty value of a register
    """
    keep = [
        f"{register} = {greatest}(m.{register}, excluded.{register})"
        for register in (*(f"{field}_version" for field in _FIELDS), "put_version", "deleted_version")
    ]
    values = [
        f"""{field} = CASE
            WHEN {greatest}(m.put_version, m.{field}_version, excluded.put_version, excluded.{field}_version)
                <= {greatest}(m.deleted_version, excluded.deleted_version) THEN NULL
            WHEN {greatest}(excluded.put_version, excluded.{field}_version)
                > {greatest}(m.put_version, m.{field}_version) THEN excluded.{field}
            ELSE m.{field} END"""
        for field in _FIELDS
    ]
    newer = [
        f"excluded.{register} > m.{register}"
        for register in ("put_version", *(f"{field}_version" for field in _FIELDS))
    ]
    # To raise a deleted register to the room's tombstone changes nothing for anybody where the row is dead and erased,
    # or its put is above that: the register may lag behind.
    newer.append(
        "(excluded.deleted_version > m.deleted_version AND"
        " (m.pending OR (m.live AND excluded.deleted_version > m.put_version) OR excluded.deleted_version > coalesce("
        f"(SELECT t.version FROM {tombstones} AS t WHERE t.tbl = m.tbl AND t.room = m.room), {never})))"
    )
    dimensions = [f"m.{name} {same} excluded.{name}" for name in ("tbl", "room", "agent", "entity", "world")]
    return f"""
        ON CONFLICT (id) DO UPDATE SET
            created_us = CASE
                WHEN excluded.put_version > m.put_version THEN excluded.created_us ELSE m.created_us END,
            {", ".join(values + keep)}
        WHERE ({" OR ".join(newer)}) AND {" AND ".join(dimensions)}
    """


def erasing(greatest: str, version: str) -> str:
    """What a deletion of this version sets in a row that is older, in SQL."""
    values = [
        f"{field} = CASE WHEN {greatest}(put_version, {field}_version) > {version} THEN {field} END"
        for field in _FIELDS
    ]
    return f"deleted_version = {version}, {', '.join(values)}"
