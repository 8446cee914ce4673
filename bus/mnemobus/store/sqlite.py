"""SQLite: the store of one machine.

One file in WAL mode: readers see the last commit and wait for nobody; writers, of this process or
another, take turns (BEGIN IMMEDIATE), which is also what orders a put and the deletion of its room.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import aiosqlite

from .. import private
from ..errors import Rejected, SettingsError, StoreUnavailable
from ..events import Event
from ..keys import Dimensions
from ..settings import Settings
from ..tasks import in_background
from . import Applied, merge, migrations
from .merge import Delta, Room
from .reader import SqlReader

_READERS = 4
"""Reading connections, each a thread, that a process has at most: a slow query then holds up few others."""

_ROWS = 250
"""Rows of a statement that merges many at once."""


def _upsert(rows: int) -> str:
    """The statement that merges so many deltas."""
    row = f"({', '.join('?' * 15)})"
    return f"""
        INSERT INTO memories AS m (
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
                (SELECT version FROM room_tombstones AS t WHERE t.tbl = n.tbl AND t.room = n.room), x''
            )) AS deleted
            FROM n
        )
        WHERE true
        {merge.merging("max", "IS")}
    """


_UPSERT = _upsert(1)
_UPSERT_MANY = _upsert(_ROWS)


class SqliteReader(SqlReader):
    _columns = (
        "id, tbl, room, agent, entity, world, CAST(content AS BLOB), CAST(metadata AS BLOB), embedding,"
        " created_us, max(put_version, content_version, metadata_version, embedding_version)"
    )

    def __init__(self, settings: Settings, create: bool = True) -> None:
        self._path = _path(settings)
        self._timeout = settings.database_timeout
        self._may_create = create
        self._prepared = False
        self._closed = False
        self._preparing = asyncio.Lock()
        self._places = asyncio.Semaphore(_READERS)
        self._idle: list[aiosqlite.Connection] = []

    async def open(self) -> None:
        self._closed = False
        await self._prepare()
        try:
            async with self._connection():
                pass  # the first query finds it open
        except (sqlite3.Error, OSError) as error:
            raise _unavailable(self._path, error) from error

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    async def schema(self) -> int:
        try:
            return await asyncio.to_thread(self._schema)
        except (sqlite3.Error, OSError) as error:
            raise _unavailable(self._path, error) from error

    def _schema(self) -> int:
        connection = _connect(self._path, self._timeout)
        try:
            return _number(connection)
        finally:
            connection.close()

    async def _prepare(self) -> None:
        """See to the schema, once: when opened, or later if the database could not be opened then."""
        async with self._preparing:
            if not self._prepared:
                try:
                    await asyncio.to_thread(self._create)
                except (sqlite3.Error, OSError) as error:
                    raise _unavailable(self._path, error) from error
                self._prepared = True

    def _create(self) -> None:
        if not self._may_create and not self._path.exists():
            raise migrations.missing(f"SQLite {self._path}")
        connection = _connect(self._path, self._timeout)
        try:
            if _number(connection) == 0:
                if not self._may_create:
                    raise migrations.missing(f"SQLite {self._path}")
                _upgrade(connection)
            migrations.check(_number(connection), f"SQLite {self._path}")
        finally:
            connection.close()

    async def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if not self._prepared:
            await self._prepare()
        try:
            async with self._connection() as connection:
                return [tuple(row) for row in await connection.execute_fetchall(sql, parameters)]
        except (sqlite3.Error, OSError) as error:
            raise _unavailable(self._path, error) from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._places:
            if self._closed:
                raise StoreUnavailable(f"SQLite {self._path}: the reader is closed")
            if self._idle:
                connection = self._idle.pop()
            else:
                # A cancelled call must not leave half a connection behind: the next one gets it.
                opening = asyncio.ensure_future(self._open_connection())
                try:
                    connection = await asyncio.shield(opening)
                except asyncio.CancelledError:
                    opening.add_done_callback(self._keep_opened)
                    raise
            try:
                yield connection
            except asyncio.CancelledError:
                # Its thread may still be at it. What it does next waits for that, so cut it short.
                await connection.interrupt()
                self._keep(connection)
                raise
            except BaseException:
                connection.stop()
                raise
            self._keep(connection)

    async def _open_connection(self) -> aiosqlite.Connection:
        connection = await in_background(
            aiosqlite.connect(self._path, timeout=self._timeout, isolation_level=None)
        )
        await connection.execute_fetchall("PRAGMA query_only = ON")
        return connection

    def _keep_opened(self, opening: asyncio.Future[aiosqlite.Connection]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._keep(opening.result())

    def _keep(self, connection: aiosqlite.Connection) -> None:
        if self._closed:
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
        self._timeout = settings.database_timeout
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    def open(self) -> None:
        with self._lock:
            self._closed = False
            try:
                self._connected()
            except (sqlite3.Error, OSError) as error:
                raise _unavailable(self._path, error) from error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    def apply(self, events: Sequence[Event]) -> Applied:
        with self._lock:
            try:
                connection = self._connected()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    applied = self._apply(connection, events)
                    connection.execute("COMMIT")
                except BaseException:
                    # SQLite may have rolled back already, as it does when the disk is full.
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
                return applied
            except (sqlite3.Error, OSError) as error:
                self._disconnect()  # the next call begins afresh, whatever this was
                raise _unavailable(self._path, error) from error

    def _apply(self, connection: sqlite3.Connection, events: Sequence[Event]) -> Applied:
        try:
            return merge.apply(_Transaction(connection), events)
        except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
            raise Rejected(f"SQLite {self._path} refuses this data: {error}") from error

    def _connected(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"SQLite {self._path}: the writer is closed")
        if self._connection is None:
            connection = _connect(self._path, self._timeout)
            try:
                # NORMAL would not sync the log at a commit, and a loss of power could take the last ones
                # back: but a committed event is acknowledged, and no worker looks at it again.
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(
                    "PRAGMA fullfsync = ON"
                )  # on macOS a plain fsync stops at the drive's cache
                _upgrade(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()


class _Transaction:
    """The steps of :func:`merge.apply`, between BEGIN IMMEDIATE and COMMIT: nobody else writes meanwhile."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        self._executemany = connection.executemany

    def lock(self, shared: Collection[Room], exclusive: Collection[Room]) -> None:
        pass

    def bury(self, rooms: Mapping[Room, bytes]) -> None:
        self._executemany(
            "INSERT INTO room_tombstones AS t (tbl, room, version) VALUES (?, ?, ?)"
            " ON CONFLICT (tbl, room) DO UPDATE SET version = max(t.version, excluded.version)",
            [(*room, version) for room, version in rooms.items()],
        )

    def lengths(self, tables: Collection[str]) -> dict[str, int]:
        found = {}
        for table in tables:
            for (length,) in self._execute("SELECT embedding_length FROM tables WHERE tbl = ?", (table,)):
                found[table] = length
        return found

    def claim(self, lengths: Mapping[str, int]) -> None:
        self._executemany(
            "INSERT INTO tables (tbl, embedding_length) VALUES (?, ?) ON CONFLICT DO NOTHING", lengths.items()
        )

    def dimensions(self, ids: Collection[str]) -> dict[str, Dimensions]:
        found = {}
        for id in ids:
            for row in self._execute(
                "SELECT tbl, room, agent, entity, world FROM memories WHERE id = ?", (uuid.UUID(id).bytes,)
            ):
                found[id] = Dimensions(*row)
        return found

    def stored(self, id: str) -> merge.Stored | None:
        for *dimensions, put, deleted in self._execute(
            "SELECT tbl, room, agent, entity, world, put_version, deleted_version FROM memories WHERE id = ?",
            (uuid.UUID(id).bytes,),
        ):
            return merge.Stored(Dimensions(*dimensions), put, deleted)
        return None

    def remove(self, id: str) -> None:
        self._execute("DELETE FROM memories WHERE id = ?", (uuid.UUID(id).bytes,))

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
        if self._execute(_UPSERT_MANY, tuple(rows)).rowcount == len(deltas):
            won = [delta.id for delta in deltas]
        else:
            self._execute("ROLLBACK TO many")
            won = self._upsert_each(deltas)
        self._execute("RELEASE many")
        return won

    def _upsert_each(self, deltas: Sequence[Delta]) -> list[str]:
        return [delta.id for delta in deltas if self._execute(_UPSERT, _row(delta)).rowcount]

    def clear(self, room: Room, last: bytes, versions: Collection[bytes]) -> list[tuple[str, Dimensions]]:
        for statement in merge.clearing("max"):
            self._execute(statement, merge.clearing_parameters(room, last))
        return [
            (str(uuid.UUID(bytes=id)), Dimensions(*dimensions))
            for version in versions
            for id, *dimensions in self._execute(
                "SELECT id, tbl, room, agent, entity, world FROM memories"
                " WHERE tbl = ? AND room = ? AND NOT live AND deleted_version = ?",
                (*room, version),
            )
        ]


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


def _number(connection: sqlite3.Connection) -> int:
    """The last migration that was applied; 0 in a database without schema."""
    (exists,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'migrations'").fetchone()
    if not exists:
        return 0
    (number,) = connection.execute("SELECT coalesce(max(number), 0) FROM migrations").fetchone()
    return int(number)


def _upgrade(connection: sqlite3.Connection) -> None:
    """Apply the migrations that are missing; others may be at the same."""
    for migration in migrations.load("sqlite"):
        if _number(connection) >= migration.number:
            continue
        connection.execute("BEGIN IMMEDIATE")
        try:
            if _number(connection) < migration.number:
                for statement in _statements(migration.sql):
                    connection.execute(statement)
                connection.execute("INSERT INTO migrations (number) VALUES (?)", (migration.number,))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _statements(script: str) -> Iterator[str]:
    """The statements of a script: executescript() would commit what is open before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _unavailable(path: Path, error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"SQLite {path}: {error}")
