"""How agents read from SQLite: a few connections, each with a thread. The queries are in store/queries.py."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aiosqlite

from ...errors import StoreUnavailable
from ...settings import Settings
from ...tasks import in_background
from .. import SCHEMA, Identity, migrations
from ..layout import Names
from ..queries import SqlReader
from .file import File, connection_to, error_of, file_at, identity_of, path_of
from .schema import look, upgrade
from .statements import SqliteStatements

_READERS = 4
"""Reading connections, each a thread, that a process has at most: a slow query then holds up few others."""


class SqliteReader(SqlReader):
    _never = "x''"
    _columns = (
        "id, tbl, room, agent, entity, world, CAST(content AS BLOB), CAST(metadata AS BLOB), embedding,"
        " created_us, max(put_version, content_version, metadata_version, embedding_version)"
    )

    def __init__(self, settings: Settings, create: bool = True) -> None:
        self._path = path_of(settings)
        self._namespace = settings.database_namespace
        self._names = Names(f"{self._namespace}_")
        self._sql = SqliteStatements(self._names)
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
            raise error_of(self._path, error) from error

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    async def schema(self) -> int:
        try:
            return await asyncio.to_thread(self._schema)
        except (sqlite3.Error, OSError) as error:
            raise error_of(self._path, error) from error

    def _schema(self) -> int:
        if not self._path.exists():
            if self._prepared:
                raise FileNotFoundError("the file was removed")
            return 0
        connection = connection_to(self._path, self._timeout)
        try:
            return look(connection, self._path, self._namespace).number
        finally:
            connection.close()

    async def identity(self) -> Identity:
        [row] = await self._fetch(self._sql.identity)
        return identity_of(row, self._path, self._file)

    async def _prepare(self) -> None:
        """See to the schema, once: when opened, or later if the database could not be opened then."""
        async with self._preparing:
            if not self._prepared:
                try:
                    await asyncio.to_thread(self._create)
                except (sqlite3.Error, OSError) as error:
                    raise error_of(self._path, error) from error
                self._prepared = True

    def _create(self) -> None:
        if not self._may_create and not self._path.exists():
            raise migrations.missing(f"SQLite {self._path}")
        connection = connection_to(self._path, self._timeout)
        try:
            number = look(connection, self._path, self._namespace).number
            if number == 0:
                if not self._may_create:
                    raise migrations.missing(f"SQLite {self._path}")
                upgrade(connection, self._path, self._namespace)
                number = SCHEMA
            migrations.check_number(number, f"SQLite {self._path}")
        finally:
            connection.close()

    async def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if not self._prepared:
            await self._prepare()
        try:
            async with self._connection() as connection:
                return [tuple(row) for row in await connection.execute_fetchall(sql, parameters)]
        except (sqlite3.Error, OSError) as error:
            raise error_of(self._path, error) from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._places:
            if self._closed:
                raise StoreUnavailable(f"SQLite {self._path}: the reader is closed")
            file = file_at(self._path)
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
