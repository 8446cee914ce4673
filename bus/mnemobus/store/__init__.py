"""The durable stores: SQLite on one machine, PostgreSQL for many.

Agents only read and workers only write, so a store has two faces: a `Reader`, asynchronous, for the bus,
and a `Writer`, synchronous, for the threads of the worker pool. One suite of tests holds for every store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..errors import SettingsError
from ..keys import Dimensions, Version
from ..log.events import Event
from ..records import Row
from ..settings import Settings

SCHEMA = 2
"""The number of the last migration that this version of mnemobus needs."""


class Cursor(NamedTuple):
    """A place in a listing: memories with the same date are told apart by their id."""

    created_us: int
    id: str


@dataclass(frozen=True, slots=True)
class Query:
    """Which memories; every dimension that is not None must match.

    before  only those older than this place
    after   only those newer than this place; the answer then begins right after it
    """

    table: str
    room: str | None = None
    agent: str | None = None
    entity: str | None = None
    world: str | None = None
    before: Cursor | None = None
    after: Cursor | None = None


class Refused(NamedTuple):
    """An event that must not be applied, and why, for the dead letters."""

    event: Event
    reason: str


class Deletion(NamedTuple):
    """The deletion of a room, or several of the same one: their versions, packed, the last one last."""

    room: tuple[str, str]
    versions: tuple[bytes, ...]


@dataclass(slots=True)
class Applied:
    """What a batch did to the store.

    won         ids of memories that the batch changed
    refused     events that contradict what is stored (a changed dimension, another embedding length); the
                rest of the batch is committed
    cleared     for each room that the batch deleted: the id and dimensions of every memory in it that this
                deletion, or an earlier delivery of the same one, put an end to
    unfinished  deletions of rooms that are too large for that: their tombstones are set, but memories are left, which
                :meth:`Writer.clear` removes and :meth:`Writer.ended` names
    """

    won: set[str] = field(default_factory=set)
    refused: list[Refused] = field(default_factory=list)
    cleared: list[tuple[str, Dimensions]] = field(default_factory=list)
    unfinished: list[Deletion] = field(default_factory=list)

    def add(self, other: Applied) -> None:
        """Take in what another part of the batch did."""
        self.won |= other.won
        self.refused += other.refused
        self.cleared += other.cleared
        self.unfinished += other.unfinished


@dataclass(frozen=True, slots=True)
class Totals:
    """How many memories each table has. ``exact`` is False if that was only estimated, as counting takes too long."""

    tables: dict[str, int]
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a store is: what identity.py compares.

    store    a UUID in hex, made with the schema; a copy of the database has the same
    bus      of the bus whose workers commit here, or None where none did yet; its key ``prefix``; and its ``life``
             in Redis, which is another once Redis was flushed, or is another server
    reached  all that the log had before this moment (ms, by the clock of Redis) is in the store; None: not known
    place    what a copy of the store does not share with it, or "" where that can't be told
    history  changes when the server goes on from an earlier state, as after a failover; or ""
    where    the store, for people
    """

    store: str
    bus: str | None
    prefix: str | None
    life: str | None
    reached: int | None
    place: str
    history: str
    where: str


class Reader(Protocol):
    """What the bus reads through. Safe for concurrent tasks of one event loop; cancelling a call leaves
    it usable.

    Every method raises StoreUnavailable if the database can't be reached or is in no state to answer.
    Memories that are deleted are nowhere to be seen.
    """

    openings: int
    """Rises when the reader had to connect anew, and may have come to another store."""

    async def open(self) -> None:
        """Connect, and create the schema in a database that has none.

        SchemaError if the schema is older than this version needs (a worker upgrades it), or if there is none and
        the reader may not create it.
        """

    async def close(self) -> None: ...

    async def get(self, id: str) -> Row | None: ...

    async def recent(self, query: Query, limit: int) -> list[Row]:
        """At most ``limit`` memories, newest first by (created_us, id).

        With ``after`` and no ``before``, those nearest to it: paging forward misses nothing.
        """

    async def count(self, query: Query) -> int:
        """How many memories there are; ``before`` and ``after`` count as in :meth:`recent`."""

    async def embedding_length(self, table: str) -> int | None:
        """How many floats an embedding of this table has; None if none was stored yet."""

    async def schema(self) -> int:
        """The number of the last migration that was applied; 0 in a database without schema."""

    async def identity(self) -> Identity:
        """Who the store is."""

    async def totals(self) -> Totals:
        """How many memories each table has, for people."""


class Writer(Protocol):
    """What the workers commit through. Safe for concurrent threads.

    StoreUnavailable means that trying again can help and that the data is not to blame; its StoreTooSlow, that less at
    once or more patience can help; Rejected, that this data is to blame. To repeat any call is safe.
    """

    def open(self) -> None:
        """Connect and bring the schema to :data:`SCHEMA`, however many do so at once."""

    def close(self) -> None: ...

    def apply(self, events: Sequence[Event], *, patience: float = 1.0) -> Applied:
        """Commit a batch; idempotent, and independent of the order of batches.

        Events of one memory merge field by field, the highest version winning, with what is stored (see
        store/merge.py). Deletions of rooms are committed after the rest. StoreUnavailable, and nothing is committed, if
        the store is another than was expected.

        patience  how many times as long as usual a statement may take
        """

    def clear(
        self, deletion: Deletion, after: Cursor = ..., rows: int = ..., *, patience: float = 1.0
    ) -> Cursor | None:
        """Commit one step of a deletion, of so many rows at most, from a place on: the place where the next one
        begins, or None if that was the last."""

    def ended(self, deletion: Deletion) -> Iterator[list[tuple[str, Dimensions]]]:
        """The ids and dimensions of all memories that these deletions put an end to, in parts. A part is read when it
        is asked for."""

    def expect(self, store: str | None) -> None:
        """Commit into the store with this identity only, and make no other: it has been agreed on."""

    def identity(self) -> Identity:
        """Who the store is."""

    def serve(self, bus: str, prefix: str, life: str, *, instead: bool = False) -> None:
        """Note that this bus commits here; in the place of another one only if ``instead``. What was known of how
        far the store reaches was about the log of the life before."""

    def reach(self, moment: int, epoch: str = "") -> bool:
        """Note, on disk, that all that the log had before this moment (ms) is in the store; False, and it is not noted,
        if this epoch of the server (see `epoch`; "" for any) is over."""

    def relax(self, relaxed: bool) -> None:
        """Whether batches need not wait until they are on the server's disk. The caller then has to apply again what a
        crash loses, and knows a crash by `epoch`. Without effect on a store that has no epoch."""

    def epoch(self, *, begin: bool = False) -> str:
        """What the server forgets if it ends before all that was committed is on disk. Empty if it has forgotten it,
        where ``begin`` makes another; and for a store that writes before it answers."""

    def lacks(self, memories: Mapping[str, Version]) -> list[str]:
        """Which of these memories, by id, the store does not have with this version or a later one."""


def open_reader(settings: Settings, *, create: bool = True) -> Reader:
    """The reader for ``settings.database_url``, not yet open; it makes the schema where there is none, if it may."""
    if settings.database_url.startswith("sqlite:"):
        from .sqlite import SqliteReader

        return SqliteReader(settings, create)
    _need_psycopg()
    from .postgres import PostgresReader

    return PostgresReader(settings, create)


def open_writer(settings: Settings) -> Writer:
    """The writer for ``settings.database_url``, not yet open."""
    if settings.database_url.startswith("sqlite:"):
        from .sqlite import SqliteWriter

        return SqliteWriter(settings)
    _need_psycopg()
    from .postgres import PostgresWriter

    return PostgresWriter(settings)


def _need_psycopg() -> None:
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"MNEMOBUS_DATABASE_URL names PostgreSQL, but {error.name} is not installed:"
            " pip install 'mnemobus[postgres]'"
        ) from None


__all__ = [
    "SCHEMA",
    "Applied",
    "Cursor",
    "Deletion",
    "Identity",
    "Query",
    "Reader",
    "Refused",
    "Totals",
    "Writer",
    "open_reader",
    "open_writer",
]
