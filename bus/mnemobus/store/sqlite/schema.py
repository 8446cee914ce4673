"""SQLite: the store of one machine.

One file in WAL mode: readers see the last commit and wait for nobody; writers, of this process or
another, take turns (BEGIN IMMEDIATE), which is also what orders a put and the deletion of its room.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from .. import private
from ..errors import Rejected, SchemaError, SettingsError, StoreError, StoreTooSlow, StoreUnavailable
from ..keys import Dimensions, Version
from ..log.events import Event
from ..settings import Settings
from ..tasks import in_background
from . import SCHEMA, Applied, Cursor, Deletion, Identity, merge, migrations
from .layout import OURS, TABLES, Columns, Found, Names, check_old, check_own, prefixed
from .merge import Delta, Room
from .reader import SqlReader

logger = logging.getLogger("mnemobus.store")

File = tuple[int, int]
"""A file's device and inode."""

_PUT_BACK = (
    "Put it back, or a backup of it. To give up its memories, restart the workers and run: mnemobus adopt"
)

_READERS = 4
"""Reading connections, each a thread, that a process has at most: a slow query then holds up few others."""

_ROWS = 250
"""Rows of a statement that merges many at once."""

_PAUSE = 0.1
"""Seconds at most between two steps of a deletion, for others."""
_GLANCE = 8
"""Milliseconds in which SQLite looks three times whether it is locked, before it is asked anew."""

T = TypeVar("T")


def _upsert(names: Names, rows: int) -> str:
    """The statement that merges so many deltas."""
    row = f"({', '.join('?' * 15)})"
    return f"""
        INSERT INTO {names.memories} AS m (
            id, tbl, room, agent, entity, world, created_us, content, metadata, embedding,
            put_version, content_version, metadata_version, embedding_version, deleted_version
        )
        WITH n (
            id, tbl, room, agent, entity, world, created_us, content, metadata, embedding,
            put, content_version, metadata_version, embedding_version, own_deleted
        ) AS (VALUES {", ".join([row] * rows)})
        SELECT
            id, tbl, room, agent, entity, world, created_us,
            CASE WHEN max(put, content_version) > deleted THEN content END,
            CASE WHEN max(put, metadata_version) > deleted THEN metadata END,
            CASE WHEN max(put, embedding_version) > deleted THEN embedding END,
            put, content_version, metadata_version, embedding_version, deleted
        FROM (
            SELECT n.*, max(own_deleted, coalesce(
                (SELECT version FROM {names.room_tombstones} AS t WHERE t.tbl = n.tbl AND t.room = n.room),
                x''
            )) AS deleted
            FROM n
        )
        WHERE true
        {merge.merging("max", "IS", names.room_tombstones, "x''")}
    """


class _Statements:
    """What a batch asks of the database, with the names of its tables."""

    def __init__(self, names: Names) -> None:
        self.upsert = _upsert(names, 1)
        self.upsert_many = _upsert(names, _ROWS)
        erasing = merge.erasing("max", ":version")
        in_room = f"FROM {names.memories} WHERE tbl = :table AND room = :room"
        older = "live AND put_version < :version AND (created_us, id) > (:created_us, :id)"
        self.chunk = f"SELECT created_us, id {in_room} AND {older} ORDER BY created_us, id LIMIT :rows"
        self.clear = (
            f"UPDATE {names.memories} SET {erasing} WHERE tbl = :table AND room = :room AND {older}"
            " AND (created_us, id) <= (:last_us, :last)"
        )
        self.erase = (
            f"UPDATE {names.memories} SET {erasing} WHERE id IN"
            f" (SELECT id {in_room} AND pending AND deleted_version < :version LIMIT :rows)"
        )
        self.ended = (
            f"SELECT rowid, id, tbl, room, agent, entity, world FROM {names.memories} WHERE tbl = ? AND room = ?"
            f" AND NOT live AND deleted_version = ? AND rowid > ? ORDER BY rowid LIMIT {merge.TOLD}"
        )
        self.bury = (
            f"INSERT INTO {names.room_tombstones} AS t (tbl, room, version) VALUES (?, ?, ?)"
            " ON CONFLICT (tbl, room) DO UPDATE SET version = max(t.version, excluded.version)"
        )
        self.length = f"SELECT embedding_length FROM {names.tables} WHERE tbl = ?"
        self.claim = (
            f"INSERT INTO {names.tables} (tbl, embedding_length) VALUES (?, ?) ON CONFLICT DO NOTHING"
        )
        self.stored = (
            "SELECT m.tbl, m.room, agent, entity, world, put_version,"
            f" max(deleted_version, coalesce(t.version, x'')),"
            f" coalesce((SELECT version FROM {names.room_tombstones} WHERE tbl = ? AND room = ?), x'')"
            f" FROM {names.memories} AS m LEFT JOIN {names.room_tombstones} AS t"
            " ON t.tbl = m.tbl AND t.room = m.room WHERE id = ?"
        )
        self.remove = f"DELETE FROM {names.memories} WHERE id = ?"
        self.dimensions = f"SELECT tbl, room, agent, entity, world FROM {names.memories} WHERE id = ?"
        self.store = f"SELECT store FROM {names.identity}"
        self.identity = f"SELECT store, bus, prefix, life, reached_ms FROM {names.identity}"
        self.serve = (
            f"UPDATE {names.identity} SET bus = ?, prefix = ?, life = ?,"
            " reached_ms = CASE WHEN life IS ? THEN reached_ms END WHERE bus IS NULL OR bus = ? OR ?"
        )
        self.reach = f"UPDATE {names.identity} SET reached_ms = ? WHERE coalesce(reached_ms, 0) < ?"
        self.lacks = (
            f"SELECT max(put_version, content_version, metadata_version, embedding_version, deleted_version)"
            f" FROM {names.memories} WHERE id = ?"
        )


class SqliteReader(SqlReader):
    _never = "x''"
    _columns = (
        "id, tbl, room, agent, entity, world, CAST(content AS BLOB), CAST(metadata AS BLOB), embedding,"
        " created_us, max(put_version, content_version, metadata_version, embedding_version)"
    )

    def __init__(self, settings: Settings, create: bool = True) -> None:
        self._path = _path(settings)
        self._namespace = settings.database_namespace
        self._names = Names(f"{self._namespace}_")
        self._sql = _Statements(self._names)
        self._timeout = settings.database_timeout
        self._may_create = create
        self._prepared = False
        self._closed = False
        self._preparing = asyncio.Lock()
        self._places = asyncio.Semaphore(_READERS)
        self._idle: list[aiosqlite.Connection] = []
        self._file: File | None = None
        """The one that the idle connections have open."""
        self.openings = 0

    async def open(self) -> None:
        self._closed = False
        await self._prepare()
        try:
            async with self._connection():
                pass  # the first query finds it open
        except (sqlite3.Error, OSError) as error:
            raise _error(self._path, error) from error

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    async def schema(self) -> int:
        try:
            return await asyncio.to_thread(self._schema)
        except (sqlite3.Error, OSError) as error:
            raise _error(self._path, error) from error

    def _schema(self) -> int:
        if not self._path.exists():
            if self._prepared:
                raise FileNotFoundError("the file was removed")
            return 0
        connection = _connect(self._path, self._timeout)
        try:
            return _look(connection, self._path, self._namespace).number
        finally:
            connection.close()

    async def identity(self) -> Identity:
        [row] = await self._fetch(self._sql.identity)
        return _identity(row, self._path, self._file)

    async def _prepare(self) -> None:
        """See to the schema, once: when opened, or later if the database could not be opened then."""
        async with self._preparing:
            if not self._prepared:
                try:
                    await asyncio.to_thread(self._create)
                except (sqlite3.Error, OSError) as error:
                    raise _error(self._path, error) from error
                self._prepared = True

    def _create(self) -> None:
        if not self._may_create and not self._path.exists():
            raise migrations.missing(f"SQLite {self._path}")
        connection = _connect(self._path, self._timeout)
        try:
            number = _look(connection, self._path, self._namespace).number
            if number == 0:
                if not self._may_create:
                    raise migrations.missing(f"SQLite {self._path}")
                _upgrade(connection, self._path, self._namespace)
                number = SCHEMA
            migrations.check(number, f"SQLite {self._path}")
        finally:
            connection.close()

    async def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if not self._prepared:
            await self._prepare()
        try:
            async with self._connection() as connection:
                return [tuple(row) for row in await connection.execute_fetchall(sql, parameters)]
        except (sqlite3.Error, OSError) as error:
            raise _error(self._path, error) from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._places:
            if self._closed:
                raise StoreUnavailable(f"SQLite {self._path}: the reader is closed")
            file = _file(self._path)
            if file != self._file:  # replaced: what is open is the one that was there before
                self._file = file
                self.openings += 1
                while self._idle:
                    self._idle.pop().stop()
            if self._idle:
                connection = self._idle.pop()
            else:
                # A cancelled call must not leave half a connection behind: the next one gets it.
                opening = asyncio.ensure_future(self._open_connection())
                try:
                    connection = await asyncio.shield(opening)
                except asyncio.CancelledError:
                    opening.add_done_callback(partial(self._keep_opened, file))
                    raise
            try:
                yield connection
            except asyncio.CancelledError:
                # Its thread may still be at it. What it does next waits for that, so cut it short.
                await connection.interrupt()
                self._keep(file, connection)
                raise
            except BaseException:
                connection.stop()
                raise
            self._keep(file, connection)

    async def _open_connection(self) -> aiosqlite.Connection:
        # A file that was removed is not made again: it would be empty.
        uri = f"{self._path.as_uri()}?mode=rw"
        connection = await in_background(
            aiosqlite.connect(uri, uri=True, timeout=self._timeout, isolation_level=None)
        )
        await connection.execute_fetchall("PRAGMA query_only = ON")
        return connection

    def _keep_opened(self, file: File | None, opening: asyncio.Future[aiosqlite.Connection]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._keep(file, opening.result())

    def _keep(self, file: File | None, connection: aiosqlite.Connection) -> None:
        if self._closed or file is None or file != self._file:
            connection.stop()
        else:
            self._idle.append(connection)

    def _key(self, id: str) -> bytes:
        return uuid.UUID(id).bytes

    def _id(self, key: bytes) -> str:
        return str(uuid.UUID(bytes=key))


class SqliteWriter:
    def __init__(self, settings: Settings) -> None:
        self._path = _path(settings)
        self._namespace = settings.database_namespace
        self._sql = _Statements(Names(f"{self._namespace}_"))
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

    def _transact(self, work: Callable[[_Transaction], T], *, urgent: bool = True) -> T:
        """Do this work in a transaction, in the store that is expected; what is not urgent lets others come first."""
        with self._using() as connection:
            if urgent:
                self._begin(connection)
            else:
                connection.execute("BEGIN IMMEDIATE")
            try:
                self._check(connection)
                result = self._do(work, _Transaction(connection, self._sql))
                connection.execute("COMMIT")
            except BaseException:
                # SQLite may have rolled back already, as it does when the disk is full.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            if _file(self._path) != self._file:
                # The file has another name by now, or none. Whether this is in the one at our path, nobody knows.
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
            return _identity(connection.execute(self._sql.identity).fetchone(), self._path, self._file)

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
                self._disconnect()  # the next call begins afresh, whatever this was
                raise _error(self._path, error) from error
            except MemoryError as error:
                self._disconnect()
                raise StoreTooSlow(f"SQLite {self._path}: not enough memory for so much at once") from error

    def _check(self, connection: sqlite3.Connection) -> None:
        """StoreUnavailable if the store is not the one that was agreed on: it was replaced by another."""
        if self._expected is not None:
            row = connection.execute(self._sql.store).fetchone()
            if row is None or row[0] != self._expected:
                raise StoreUnavailable(f"SQLite {self._path} is another store than it was")

    def _do(self, work: Callable[[_Transaction], T], transaction: _Transaction) -> T:
        try:
            return work(transaction)
        except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
            raise Rejected(f"SQLite {self._path} refuses this data: {error}") from error

    def _connected(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"SQLite {self._path}: the writer is closed")
        file = _file(self._path)
        if file is None and (self._connection is not None or self._expected is not None):
            # To make a new one would be to begin with nothing, where people believe that all is there. What is open is
            # kept: it may be put back, and until then no other file can have its inode.
            raise StoreUnavailable(f"SQLite {self._path} was removed. {_PUT_BACK}")
        if self._connection is not None and file != self._file:
            logger.warning("SQLite %s was replaced; opening it again", self._path)
            self._disconnect()
        if self._connection is None:
            if self._file not in (None, file):
                _set_aside(self._path, self._log)
            connection, file = self._open()
            try:
                # NORMAL would not sync the log at a commit, and a loss of power could take the last ones
                # back: but a committed event is acknowledged, and no worker looks at it again.
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(
                    "PRAGMA fullfsync = ON"
                )  # on macOS a plain fsync stops at the drive's cache
                if self._expected is not None and not _look(connection, self._path, self._namespace).number:
                    raise StoreUnavailable(f"SQLite {self._path} was replaced by an empty one. {_PUT_BACK}")
                _upgrade(connection, self._path, self._namespace)
            except BaseException:
                connection.close()
                raise
            self._connection, self._file = connection, file
            self._log = _file(_log_of(self._path))
        return self._connection

    def _open(self) -> tuple[sqlite3.Connection, File]:
        """A connection, and the file that it has open."""
        while True:
            before = _file(self._path)
            connection = _connect(self._path, self._timeout)
            file = _file(self._path)
            if file is not None and before in (file, None):
                return connection, file
            connection.close()  # replaced meanwhile

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()


class _Transaction:
    """The steps of :func:`merge.apply`, between BEGIN IMMEDIATE and COMMIT: nobody else writes meanwhile."""

    def __init__(self, connection: sqlite3.Connection, statements: _Statements) -> None:
        self._execute = connection.execute
        self._executemany = connection.executemany
        self._sql = statements

    def share(self, rooms: Collection[Room]) -> None:
        pass

    def exclude(self, rooms: Collection[Room]) -> None:
        pass

    def bury(self, rooms: Mapping[Room, bytes]) -> None:
        self._executemany(self._sql.bury, [(*room, version) for room, version in rooms.items()])

    def lengths(self, tables: Collection[str]) -> dict[str, int]:
        found = {}
        for table in tables:
            for (length,) in self._execute(self._sql.length, (table,)):
                found[table] = length
        return found

    def claim(self, lengths: Mapping[str, int]) -> None:
        self._executemany(self._sql.claim, lengths.items())

    def dimensions(self, ids: Collection[str]) -> dict[str, Dimensions]:
        found = {}
        for id in ids:
            for row in self._execute(self._sql.dimensions, (uuid.UUID(id).bytes,)):
                found[id] = Dimensions(*row)
        return found

    def stored(self, id: str, room: Room) -> merge.Stored | None:
        for *dimensions, put, deleted, buried in self._execute(
            self._sql.stored, (*room, uuid.UUID(id).bytes)
        ):
            return merge.Stored(Dimensions(*dimensions), put, deleted, buried)
        return None

    def remove(self, id: str) -> None:
        self._execute(self._sql.remove, (uuid.UUID(id).bytes,))

    def upsert(self, deltas: Sequence[Delta]) -> list[str]:
        won: list[str] = []
        many = len(deltas) // _ROWS * _ROWS
        for first in range(0, many, _ROWS):
            won += self._upsert_many(deltas[first : first + _ROWS])
        return won + self._upsert_each(deltas[many:])

    def _upsert_many(self, deltas: Sequence[Delta]) -> list[str]:
        """All of them in one statement: while it runs, the process's other threads do. It tells how many rows it
        changed, not which; where that was not every one, it is taken back, and done again row by row."""
        self._execute("SAVEPOINT many")
        rows = chain.from_iterable(map(_row, deltas))
        if self._execute(self._sql.upsert_many, tuple(rows)).rowcount == len(deltas):
            won = [delta.id for delta in deltas]
        else:
            self._execute("ROLLBACK TO many")
            won = self._upsert_each(deltas)
        self._execute("RELEASE many")
        return won

    def _upsert_each(self, deltas: Sequence[Delta]) -> list[str]:
        return [delta.id for delta in deltas if self._execute(self._sql.upsert, _row(delta)).rowcount]

    def clear(self, deletion: Deletion, after: Cursor, rows: int) -> Cursor | None:
        table, room = deletion.room
        parameters = {
            "table": table,
            "room": room,
            "version": deletion.versions[-1],
            "created_us": after.created_us,
            "id": uuid.UUID(after.id).bytes,
            "rows": rows,
        }
        chunk = self._execute(self._sql.chunk, parameters).fetchall()
        if chunk:
            created_us, id = chunk[-1]
            self._execute(self._sql.clear, {**parameters, "last_us": created_us, "last": id})
        if len(chunk) == rows:
            return Cursor(created_us, str(uuid.UUID(bytes=id)))
        return after if self._execute(self._sql.erase, parameters).rowcount == rows else None

    def ended(self, deletion: Deletion, most: int) -> list[tuple[str, Dimensions]]:
        found: list[tuple[str, Dimensions]] = []
        for version in deletion.versions:
            rows = self._execute(self._sql.ended, (*deletion.room, version, 0)).fetchmany(most - len(found))
            found += [(str(uuid.UUID(bytes=id)), Dimensions(*dimensions)) for _, id, *dimensions in rows]
        return found


def _row(d: Delta) -> tuple[Any, ...]:
    return (
        bytes.fromhex(d.id.replace("-", "")),  # several times faster than a UUID
        *d.dimensions,
        d.created_us,
        None if d.content is None else d.content.decode(),
        None if d.metadata is None else d.metadata.decode(),
        d.embedding,
        d.put,
        d.content_version,
        d.metadata_version,
        d.embedding_version,
        d.deleted,
    )


def _path(settings: Settings) -> Path:
    path = settings.database_url.removeprefix("sqlite:///")
    if path.startswith(":memory:"):
        raise SettingsError(
            "MNEMOBUS_DATABASE_URL: a database in memory can't be shared by agents and workers; name a file,"
            " as in sqlite:///.mnemobus/memories.db"
        )
    return Path(path).absolute()


def _file(path: Path) -> File | None:
    """Which file is at a path."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _set_aside(path: Path, log: File | None) -> None:
    """Rename the write-ahead log that a replaced database left behind: SQLite would take it for the new one's, and mix
    both. One that was put there along with the new database is left where it is."""
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(
            directory, fcntl.LOCK_EX
        )  # or two processes would be at it, and the second rename a new one
        if log is not None and path.exists() and _file(_log_of(path)) == log:
            for ending in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    path.with_name(path.name + ending).replace(f"{path}{ending}.replaced")
    finally:
        os.close(directory)


def _identity(row: tuple[Any, ...], path: Path, file: File | None) -> Identity:
    # Of a copy the inode differs. The device does, too, where one file is mounted in several ways.
    found, bus, prefix, life, reached = row
    place = str(file[1]) if file else ""
    return Identity(found, bus, prefix, life, reached, place, "", f"SQLite {path}")


def _connect(path: Path, timeout: float) -> sqlite3.Connection:
    private.make_folder(path.parent)
    private.make_database(path)
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + timeout
    while True:
        try:
            # Changes nothing but once in the life of a file. That once does not wait for other processes
            # which are at the same, as everything else does.
            connection.execute("PRAGMA journal_mode = WAL")
            return connection
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.01)
        except BaseException:
            connection.close()
            raise


def _look(connection: sqlite3.Connection, path: Path, namespace: str) -> Found:
    """What the file has; SchemaError if it is in the way of what is ours."""
    before = f"{namespace}_"
    own: dict[str, set[str]] = {}
    bare: dict[str, set[str]] = {}
    for table, column in connection.execute(
        "SELECT lower(m.name), lower(c.name) FROM sqlite_master AS m, pragma_table_xinfo(m.name) AS c"
        " WHERE m.type = 'table'"
    ):
        if table in OURS:
            bare.setdefault(table, set()).add(column)
        elif table.startswith(before) and table.removeprefix(before) in TABLES:
            own.setdefault(table.removeprefix(before), set()).add(column)
    where = f"SQLite {path}"
    if check_own(_frozen(own), f"{where}, under the prefix {before},"):
        sql = f"SELECT coalesce(max(number), 0) FROM {Names(before).migrations}"
        return Found(connection.execute(sql).fetchone()[0])
    if check_old(_frozen(bare), where):
        return Found(connection.execute("SELECT coalesce(max(number), 0) FROM migrations").fetchone()[0], "")
    return Found(0)


def _frozen(found: dict[str, set[str]]) -> Columns:
    return {table: frozenset(columns) for table, columns in found.items()}


def _upgrade(connection: sqlite3.Connection, path: Path, namespace: str) -> None:
    """Apply the migrations that are missing; others may be at the same."""
    before = f"{namespace}_"
    while migrations.following("sqlite", _look(connection, path, namespace).number):
        connection.execute("BEGIN IMMEDIATE")
        try:
            found = _look(connection, path, namespace)
            for migration in migrations.following("sqlite", found.number):
                if found.old is not None:
                    _move(connection, before)
                for statement in _statements(prefixed(migration.sql, before)):
                    connection.execute(statement)
                connection.execute(
                    f"INSERT INTO {Names(before).migrations} (number) VALUES (?)", (migration.number,)
                )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _move(connection: sqlite3.Connection, before: str) -> None:
    """Give the tables of schema 1 their prefix. Agents of the version before read on through views of the old names;
    its workers can't write through them, and wait."""
    for table in OURS:
        connection.execute(f"ALTER TABLE {table} RENAME TO {before}{table}")
        connection.execute(f"CREATE VIEW {table} AS SELECT * FROM {before}{table}")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script: executescript() would commit what is open before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _error(path: Path, error: Exception) -> StoreError:
    """What an error of SQLite means, with what to do about it."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith("SQLITE_ERROR") and str(error).startswith(("no such table", "no such column")):
        return SchemaError(
            f"SQLite {path}: {error}: these are not the tables of mnemobus. Set MNEMOBUS_DATABASE_URL to the"
            " file that is meant"
        )
    for begins, advice in _ADVICE.items():
        if name.startswith(begins):
            return StoreUnavailable(f"SQLite {path}: {error}: {advice}")
    if isinstance(error, PermissionError):
        return StoreUnavailable(f"SQLite {path}: {error}: {_ADVICE['SQLITE_READONLY']}")
    return StoreUnavailable(f"SQLite {path}: {error}")


_ADVICE = {
    "SQLITE_CORRUPT": "the file is damaged. Stop all that use it, put a backup in its place (or what .recover"
    " of sqlite3 saves), then mnemobus replay",
    "SQLITE_FULL": "make room on its disk",
    "SQLITE_IOERR": "look into the machine's log: its disk may fail, be full, or be away",
    "SQLITE_NOTADB": "set MNEMOBUS_DATABASE_URL to another file, or put a backup in its place",
    "SQLITE_READONLY": "this user must be allowed to write to the file and to its folder; or the file was replaced"
    " while it was in use",
    "SQLITE_CANTOPEN": "this user must be allowed to make files in its folder",
    "SQLITE_PERM": "this user must be allowed to use the file and its folder",
}
