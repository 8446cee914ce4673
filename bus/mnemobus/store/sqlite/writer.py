"""How workers commit to SQLite: one connection, one thread at a time, into the file that is at the path now."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from ...errors import Rejected, StoreTooSlow, StoreUnavailable
from ...keys import Dimensions, Version
from ...log.events import Event
from ...settings import Settings
from .. import Applied, Cursor, Deletion, Identity, merge
from ..layout import Names
from .file import File, connection_to, error_of, file_at, identity_of, log_of, path_of, set_aside
from .schema import look, upgrade
from .statements import SqliteStatements
from .transaction import SqliteTransaction

T = TypeVar("T")

logger = logging.getLogger("mnemobus.store")


_PUT_BACK = (
    "Put it back, or a backup of it. To give up its memories, restart the workers and run: mnemobus adopt"
)


_PAUSE = 0.1
"""Seconds at most between two steps of a deletion, for others."""
_GLANCE = 8
"""Milliseconds in which SQLite looks three times whether it is locked, before it is asked again."""


class SqliteWriter:
    def __init__(self, settings: Settings) -> None:
        self._path = path_of(settings)
        self._namespace = settings.database_namespace
        self._sql = SqliteStatements(Names(f"{self._namespace}_"))
        self._timeout = settings.database_timeout
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: File | None = None
        """The one that the connection has open."""
        self._log: File | None = None
        """Its write-ahead log."""
        self._expected: str | None = None
        self._closed = False

    def open(self) -> None:
        with self._lock:
            self._closed = False
        with self._using():
            pass

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    def expect(self, store: str | None) -> None:
        self._expected = store

    def apply(self, events: Sequence[Event], *, patience: float = 1.0) -> Applied:
        applied = Applied()
        rest, deletions = merge.part(events)
        if rest or not deletions:
            applied = self._transact(lambda t: merge.apply(t, rest))
        for some in deletions:
            applied.add(self._transact(partial(merge.delete_rooms, deletions=some)))
        return applied

    def clear(
        self,
        deletion: Deletion,
        after: Cursor = merge.BEGINNING,
        rows: int = merge.STEP,
        *,
        patience: float = 1.0,
    ) -> Cursor | None:
        began = time.monotonic()
        place = self._transact(lambda t: t.clear(deletion, after, rows), urgent=False)
        # SQLite has no queue: others look again every few milliseconds, and would find it locked each time.
        time.sleep(min(time.monotonic() - began, _PAUSE))
        return place

    def ended(self, deletion: Deletion) -> Iterator[list[tuple[str, Dimensions]]]:
        for version in deletion.versions:
            last = 0
            while True:
                with self._using() as connection:
                    rows = connection.execute(self._sql.ended, (*deletion.room, version, last)).fetchall()
                if not rows:
                    break
                last = rows[-1][0]
                yield [(str(uuid.UUID(bytes=id)), Dimensions(*dimensions)) for _, id, *dimensions in rows]

    def _transact(self, work: Callable[[SqliteTransaction], T], *, urgent: bool = True) -> T:
        """Do this work in a transaction, in the store that is expected; what is not urgent lets others come first."""
        with self._using() as connection:
            if urgent:
                self._begin(connection)
            else:
                connection.execute("BEGIN IMMEDIATE")
            try:
                self._check(connection)
                result = self._do(work, SqliteTransaction(connection, self._sql))
                connection.execute("COMMIT")
            except BaseException:
                # SQLite may have rolled back already, as it does when the disk is full.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            if file_at(self._path) != self._file:
                # The file has another name by now, or none. Nobody knows whether the file at our path has this batch.
                raise StoreUnavailable(
                    f"SQLite {self._path} was replaced or removed while a batch was committed"
                )
            return result

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begin a transaction as soon as nobody else writes. SQLite itself looks ever less often, in the end every 100
        ms, and may miss each pause of several deletions that go on in other processes."""
        deadline = time.monotonic() + self._timeout
        connection.execute(f"PRAGMA busy_timeout = {_GLANCE}")
        try:
            while True:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    busy = str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_BUSY")
                    if not busy or time.monotonic() > deadline:
                        raise
        finally:
            connection.execute(f"PRAGMA busy_timeout = {round(self._timeout * 1000)}")

    def identity(self) -> Identity:
        with self._using() as connection:
            return identity_of(connection.execute(self._sql.identity).fetchone(), self._path, self._file)

    def serve(self, bus: str, prefix: str, life: str, *, instead: bool = False) -> None:
        with self._using() as connection:
            connection.execute(self._sql.serve, (bus, prefix, life, life, bus, instead))

    def reach(self, moment: int, epoch: str = "") -> bool:
        with self._using() as connection:
            connection.execute(self._sql.reach, (moment, moment))
        return True

    def relax(self, relaxed: bool) -> None: ...

    def epoch(self, *, begin: bool = False) -> str:
        return ""

    def lacks(self, memories: Mapping[str, Version]) -> list[str]:
        with self._using() as connection:
            return [
                id
                for id, version in memories.items()
                if (found := connection.execute(self._sql.lacks, (uuid.UUID(id).bytes,)).fetchone()) is None
                or found[0] < version.pack()
            ]

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time."""
        with self._lock:
            try:
                yield self._connected()
            except (sqlite3.Error, OSError) as error:
                self._disconnect()  # the next call opens another connection, whatever the error was
                raise error_of(self._path, error) from error
            except MemoryError as error:
                self._disconnect()
                raise StoreTooSlow(f"SQLite {self._path}: not enough memory for so much at once") from error

    def _check(self, connection: sqlite3.Connection) -> None:
        """StoreUnavailable if the store is not the one that was agreed on: it was replaced by another."""
        if self._expected is not None:
            row = connection.execute(self._sql.store).fetchone()
            if row is None or row[0] != self._expected:
                raise StoreUnavailable(f"SQLite {self._path} is another store than it was")

    def _do(self, work: Callable[[SqliteTransaction], T], transaction: SqliteTransaction) -> T:
        try:
            return work(transaction)
        except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
            raise Rejected(f"SQLite {self._path} refuses this data: {error}") from error

    def _connected(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"SQLite {self._path}: the writer is closed")
        file = file_at(self._path)
        if file is None and (self._connection is not None or self._expected is not None):
            # To make a new one would be to begin with nothing, where people believe that all is there. What is open is
            # kept: it may be put back, and until then no other file can have its inode.
            raise StoreUnavailable(f"SQLite {self._path} was removed. {_PUT_BACK}")
        if self._connection is not None and file != self._file:
            logger.warning("SQLite %s was replaced; opening it again", self._path)
            self._disconnect()
        if self._connection is None:
            if self._file not in (None, file):
                set_aside(self._path, self._log)
            connection, file = self._open()
            try:
                # NORMAL would not sync the log at a commit, and a loss of power could take the last ones
                # back: but a committed event is acknowledged, and no worker looks at it again.
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(
                    "PRAGMA fullfsync = ON"
                )  # on macOS a plain fsync stops at the drive's cache
                if self._expected is not None and not look(connection, self._path, self._namespace).number:
                    raise StoreUnavailable(f"SQLite {self._path} was replaced by an empty one. {_PUT_BACK}")
                upgrade(connection, self._path, self._namespace)
            except BaseException:
                connection.close()
                raise
            self._connection, self._file = connection, file
            self._log = file_at(log_of(self._path))
        return self._connection

    def _open(self) -> tuple[sqlite3.Connection, File]:
        """A connection, and the file that it has open."""
        while True:
            before = file_at(self._path)
            connection = connection_to(self._path, self._timeout)
            file = file_at(self._path)
            if file is not None and before in (file, None):
                return connection, file
            connection.close()  # replaced meanwhile

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()
