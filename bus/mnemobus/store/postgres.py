"""PostgreSQL: the store of many machines.

What keeps concurrent batches apart, in the order in which every batch takes it, so that none can deadlock:

1. Advisory locks on slots of rooms: shared to write into a room, exclusive to delete one. A put reads its
   room's tombstone and a deletion marks the room's rows; without the lock each could miss the other's, as
   both commit (G3).
2. Rows of `tables` and of `memories`, in the order of their keys.

READ COMMITTED suffices: each statement begins after the locks are held and sees all that was committed
before, and what it merges into a row is merged into the row's latest version. A batch goes to the server
as columns, one array each in the binary format: JSON and vectors pass from the log into the table as the
same bytes.

The pools never keep a caller waiting for a server that is away: it gets the server's own words at once. A
connection that turns out to be dead is replaced, and the call repeated, once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from threading import Lock
from typing import Any, ClassVar, LiteralString, Self, TypeVar
from zlib import crc32

import psycopg
from psycopg import AsyncConnection, Connection, errors
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Format
from psycopg.types.string import ByteaBinaryLoader
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolClosed, PoolTimeout

from ..errors import Rejected, SchemaError, SettingsError, StoreError, StoreUnavailable
from ..events import Event
from ..keys import Dimensions
from ..settings import Settings
from . import Applied, merge, migrations
from .merge import Delta, Room
from .reader import SqlReader

T = TypeVar("T")

_LOCKS = int.from_bytes(b"mnem", "big")
"""The class of our advisory locks; others in the same database have other numbers."""
_SLOTS = 16
_MIGRATING = _SLOTS
"""The lock of that class under which the schema is upgraded."""

_TRIES = 5
"""How often a call is tried that other transactions got in the way of."""
_PATIENCE = 0.25
"""Seconds that a call waits for a connection before it asks the server what is the matter."""

# The pool warns of every attempt to connect that fails. Whoever needs the connection is told anyway.
_pool_log = logging.getLogger("psycopg.pool")
if _pool_log.level == logging.NOTSET:
    _pool_log.setLevel(logging.ERROR)


class _Array(bytes):
    """An array of PostgreSQL in its binary format; each subclass is one type of elements."""

    oid: ClassVar[int]
    element: ClassVar[int]

    @classmethod
    def of(cls, items: Sequence[bytes | None]) -> Self:
        head = _ARRAY_HEAD.pack(1, 1, cls.element, len(items), 1)
        sizes = {_NULL if item is None else len(item) for item in items}
        if len(sizes) == 1:  # ids, versions, vectors: put together without a step for each
            (size,) = sizes
            before = _SIZE.pack(size)
            return cls(head + (before * len(items) if size == _NULL else before + before.join(items)))  # type: ignore[arg-type]
        parts = [head]
        for item in items:
            parts += (_SIZE.pack(_NULL),) if item is None else (_SIZE.pack(len(item)), item)
        return cls(b"".join(parts))


_ARRAY_HEAD = struct.Struct(">iiIii")  # dimensions, may hold NULL, type of elements, length, first index
_SIZE = struct.Struct(">i")
_NULL = -1
"""The size of a NULL."""
_INT8 = struct.Struct(">q")


class _Uuids(_Array):
    oid, element = 2951, 2950


class _Texts(_Array):
    oid, element = 1009, 25


class _Jsons(_Array):
    oid, element = 199, 114


class _Byteas(_Array):
    oid, element = 1001, 17


class _Int8s(_Array):
    oid, element = 1016, 20


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def __init__(self, cls: type[_Array], context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self.oid = cls.oid

    def dump(self, obj: _Array) -> bytes:
        return obj


_adapters = AdaptersMap(psycopg.adapters)
for _type in (_Uuids, _Texts, _Jsons, _Byteas, _Int8s):
    _adapters.register_dumper(_type, _ArrayDumper)
_adapters.register_loader("json", ByteaBinaryLoader)  # content goes to the caller as it is

_UPSERT = f"""
    INSERT INTO memories AS m (
        id, tbl, room, agent, entity, world, created_us, content, metadata, embedding,
        put_version, content_version, metadata_version, embedding_version, deleted_version
    )
    SELECT
        id, tbl, room, agent, entity, world, created_us,
        CASE WHEN greatest(put, content_version) > deleted THEN content END,
        CASE WHEN greatest(put, metadata_version) > deleted THEN metadata END,
        CASE WHEN greatest(put, embedding_version) > deleted THEN embedding END,
        put, content_version, metadata_version, embedding_version, deleted
    FROM (
        SELECT n.*, greatest(n.own_deleted, t.version) AS deleted
        FROM unnest(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) AS n (
            id, tbl, room, agent, entity, world, created_us, content, metadata, embedding,
            put, content_version, metadata_version, embedding_version, own_deleted
        )
        LEFT JOIN room_tombstones AS t ON t.tbl = n.tbl AND t.room = n.room
    ) AS batch
    ORDER BY id
    {merge.merging("greatest", "IS NOT DISTINCT FROM")}
    RETURNING id::text
""".encode()

_CLEAR = [statement.replace("?", "%s").encode() for statement in merge.clearing("greatest")]


class _Server:
    """How to reach a server, and what its errors mean."""

    def __init__(self, settings: Settings) -> None:
        try:
            given = conninfo_to_dict(settings.database_url)
            ports = str(given.get("port") or "").split(",")
            if "@" in str(given.get("dbname")) or not all(port.isdigit() for port in ports if port):
                raise psycopg.ProgrammingError
        except psycopg.ProgrammingError:
            # Its message may quote what it took for something else than a password.
            raise SettingsError(
                "MNEMOBUS_DATABASE_URL is not of the form postgresql://user:password@host:port/database;"
                " in a password, characters such as @ / : % and spaces must be percent-encoded"
            ) from None
        self.timeout = settings.database_timeout
        self.pool_max = settings.database_pool_max
        host = given.get("host") or given.get("hostaddr") or "local socket"
        port = given.get("port")
        self.where = f"PostgreSQL {host}{f':{port}' if port else ''}/{given.get('dbname') or ''}"
        ours: dict[str, Any] = {
            "application_name": "mnemobus",
            "client_encoding": "utf8",
            "connect_timeout": max(1, round(self.timeout)),
            # A link that died without a word is found out while the call waits for it.
            "tcp_user_timeout": round(self.timeout * 1000),
            "keepalives_idle": max(1, round(self.timeout)),
        }
        self.conninfo = make_conninfo(
            settings.database_url, **{k: v for k, v in ours.items() if k not in given}
        )
        self.options: dict[str, Any] = {"autocommit": True, "context": _adapters}
        milliseconds = str(round(self.timeout * 1000))
        # A worker that is paused within a transaction would hold up all others; the server ends it.
        self.session = (
            b"SELECT set_config('statement_timeout', %s, false),"
            b" set_config('idle_in_transaction_session_timeout', %s, false)",
            (milliseconds, milliseconds),
        )
        self.pool_options: dict[str, Any] = {
            "kwargs": self.options,
            "min_size": 0,
            "max_size": self.pool_max,
            "timeout": self.timeout,
            # The pool gives up at once, and begins again when it is asked again.
            "reconnect_timeout": 1.0,
            "open": False,
        }

    def connect(self) -> Connection[Any]:
        return Connection.connect(self.conninfo, **self.options)

    def error(self, error: BaseException) -> StoreError:
        """What an error of the driver means: is the data to blame?"""
        if isinstance(error, PoolTimeout):
            return StoreUnavailable(
                f"{self.where}: all {self.pool_max} connections (MNEMOBUS_DATABASE_POOL_MAX) were busy"
                f" for {self.timeout:g} s"
            )
        if isinstance(error, PoolClosed):
            return StoreUnavailable(f"{self.where}: the store is closed")
        words = " ".join(str(error).split())
        if isinstance(error, psycopg.Error):
            state = error.sqlstate
            # 22: the value; 23: a constraint; 54: beyond a limit, as JSON that nests too deep for the server.
            # Without a state, the driver itself could not encode it.
            blame = isinstance(error, psycopg.DataError) if state is None else state[:2] in ("22", "23", "54")
            if not blame:
                return StoreUnavailable(f"{self.where}: {words}")
        return Rejected(f"{self.where} refuses this data: {words}")

    def check_encoding(self, connection: Connection[Any]) -> None:
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise SchemaError(
                f"{self.where} has the encoding {encoding}, in which not every memory can be stored:"
                " create the database with ENCODING 'UTF8' TEMPLATE template0"
            )

    def upgrade(self) -> None:
        """Apply the migrations that are missing; others may be at the same."""
        with self.connect() as connection:
            self.check_encoding(connection)
            for migration in migrations.load("postgres"):
                if _number(connection) >= migration.number:
                    continue
                with connection.transaction():
                    connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (_LOCKS, _MIGRATING))
                    if _number(connection) < migration.number:
                        connection.execute(migration.sql.encode())
                        connection.execute("INSERT INTO migrations (number) VALUES (%s)", (migration.number,))


def _number(connection: Connection[Any]) -> int:
    """The last migration that was applied; 0 in a database without schema."""
    for query in _NUMBER:
        row = connection.execute(query).fetchone()
        if not row or not row[0]:
            return 0
    return int(row[0]) if row else 0


# Not to_regclass(): it answers from a cache, which waiting for an advisory lock does not refresh.
_NUMBER = (
    b"SELECT count(*) FROM pg_class WHERE relname = 'migrations' AND pg_table_is_visible(oid)",
    b"SELECT max(number) FROM migrations",
)


class PostgresReader(SqlReader):
    _columns = (
        "id::text AS key, tbl, room, agent, entity, world, content, metadata, embedding, created_us,"
        " greatest(put_version, content_version, metadata_version, embedding_version)"
    )

    def __init__(self, settings: Settings, create: bool = True) -> None:
        self._server = _Server(settings)
        self._may_create = create
        self._pool: AsyncConnectionPool[AsyncConnection[Any]] | None = None
        self._prepared = False
        self._preparing = asyncio.Lock()

    async def open(self) -> None:
        if self._pool is None or self._pool.closed:
            self._pool = AsyncConnectionPool(
                self._server.conninfo, configure=self._configure, **self._server.pool_options
            )
            await self._pool.open()
        await self._prepare()

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()

    async def schema(self) -> int:
        for query in _NUMBER:
            rows = await self._query(query)
            if not rows[0][0]:
                return 0
        return int(rows[0][0])

    async def _prepare(self) -> None:
        """See to the schema, once: when opened, or later if the server was away then."""
        async with self._preparing:
            if not self._prepared:
                number = await self.schema()
                if number == 0 and not self._may_create:
                    raise migrations.missing(self._server.where)
                if number == 0:
                    try:
                        await asyncio.to_thread(self._server.upgrade)
                    except psycopg.Error as error:
                        raise StoreUnavailable(f"{self._server.where}: {error}") from error
                    number = await self.schema()
                migrations.check(number, self._server.where)
                self._prepared = True

    async def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if not self._prepared:
            await self._prepare()
        return await self._query(sql.replace("?", "%s").encode(), parameters)

    async def _query(
        self, query: bytes, parameters: Sequence[Any] = (), again: bool = True
    ) -> list[tuple[Any, ...]]:
        broken = False
        try:
            async with self._connection() as connection:
                try:
                    async with connection.cursor(binary=True) as cursor:
                        await cursor.execute(query, parameters)
                        return await cursor.fetchall()
                finally:
                    broken = connection.closed
        except psycopg.Error as error:
            if not (broken and again and self._pool):
                raise self._server.error(error) from error
            await self._pool.drain()  # the others are as old
        return await self._query(query, parameters, again=False)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection[Any]]:
        if self._pool is None:
            raise StoreUnavailable(f"{self._server.where}: the store is not open")
        try:
            connection = await self._pool.getconn(timeout=_PATIENCE)
        except PoolTimeout:
            # The pool does not say why. Either this does, or the connections are busy.
            await (await AsyncConnection.connect(self._server.conninfo)).close()
            connection = await self._pool.getconn(timeout=self._server.timeout)
        try:
            yield connection
        finally:
            # To be cancelled here would cost the pool a connection.
            await asyncio.shield(self._pool.putconn(connection))

    async def _configure(self, connection: AsyncConnection[Any]) -> None:
        await connection.execute(*self._server.session)

    def _key(self, id: str) -> uuid.UUID:
        return uuid.UUID(id)

    def _id(self, key: str) -> str:
        return key


class PostgresWriter:
    def __init__(self, settings: Settings) -> None:
        self._server = _Server(settings)
        self._pool: ConnectionPool[Connection[Any]] | None = None
        self._prepared = False
        self._preparing = Lock()

    def open(self) -> None:
        if self._pool is None or self._pool.closed:
            self._pool = ConnectionPool(
                self._server.conninfo, configure=self._configure, **self._server.pool_options
            )
            self._pool.open()
        self._prepare()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def apply(self, events: Sequence[Event]) -> Applied:
        if not self._prepared:
            self._prepare()
        return self._run(lambda connection: _apply(connection, events))

    def _prepare(self) -> None:
        """See to the schema, once: when opened, or later if the server was away then."""
        with self._preparing:
            if not self._prepared:
                try:
                    self._server.upgrade()
                except psycopg.Error as error:
                    raise StoreUnavailable(f"{self._server.where}: {error}") from error
                self._prepared = True

    def _run(self, work: Callable[[Connection[Any]], T]) -> T:
        """Do this work, which must bear to be repeated, on a connection."""
        tries, replaced = 1, False
        while True:
            broken = False
            try:
                with self._connection() as connection:
                    try:
                        return work(connection)
                    finally:
                        broken = connection.closed
            except (errors.DeadlockDetected, errors.SerializationFailure) as error:
                if tries == _TRIES:
                    raise self._server.error(error) from error
                time.sleep(random.uniform(0, 0.01 * 2**tries))
                tries += 1
            except psycopg.Error as error:
                if not broken or replaced or self._pool is None:
                    raise self._server.error(error) from error
                self._pool.drain()  # the others are as old
                replaced = True
            except (OverflowError, UnicodeError, struct.error) as error:  # while building the columns
                raise self._server.error(error) from error

    @contextmanager
    def _connection(self) -> Iterator[Connection[Any]]:
        if self._pool is None:
            raise StoreUnavailable(f"{self._server.where}: the store is not open")
        try:
            connection = self._pool.getconn(timeout=_PATIENCE)
        except PoolTimeout:
            # The pool does not say why. Either this does, or the connections are busy.
            self._server.connect().close()
            connection = self._pool.getconn(timeout=self._server.timeout)
        try:
            yield connection
        finally:
            self._pool.putconn(connection)

    def _configure(self, connection: Connection[Any]) -> None:
        connection.execute(*self._server.session)


def _apply(connection: Connection[Any], events: Sequence[Event]) -> Applied:
    # What returns nothing goes along with what follows it: a batch takes two round trips, for its upsert and for
    # COMMIT. psycopg's own transaction() would take two more.
    pipeline = connection.pipeline() if psycopg.Pipeline.is_supported() else nullcontext()
    try:
        with pipeline as sending:
            connection.execute(b"BEGIN")
            applied = merge.apply(_Transaction(connection, sending), events)
            connection.execute(b"COMMIT")
        return applied
    except BaseException:
        if not connection.closed:
            connection.rollback()
        raise


class _Transaction:
    """The steps of :func:`merge.apply`."""

    def __init__(self, connection: Connection[Any], pipeline: psycopg.Pipeline | None) -> None:
        self._execute = connection.execute
        self._pipeline = pipeline

    def _fetch(self, query: LiteralString | bytes, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        cursor = self._execute(query, parameters)
        if self._pipeline is not None:
            # Without that, the server would take the transaction for busy, not idle, until all of the pipeline is sent,
            # and would not end it if this process is paused.
            self._pipeline.sync()
        return cursor.fetchall()

    def lock(self, shared: Collection[Room], exclusive: Collection[Room]) -> None:
        slots = dict.fromkeys(map(_slot, shared), False)
        slots.update(dict.fromkeys(map(_slot, exclusive), True))
        ordered = sorted(slots)
        self._execute(
            "SELECT CASE WHEN exclusive THEN pg_advisory_xact_lock(%s, slot)"
            " ELSE pg_advisory_xact_lock_shared(%s, slot) END"
            " FROM unnest(%s::int[], %s::bool[]) AS slots (slot, exclusive)",
            (_LOCKS, _LOCKS, ordered, [slots[slot] for slot in ordered]),
        )
        if exclusive:
            # However large the room is. A deletion that is never let finish would hold up its partition.
            self._execute("SELECT set_config('statement_timeout', '0', true)")

    def bury(self, rooms: Mapping[Room, bytes]) -> None:
        for room, version in sorted(rooms.items()):
            self._execute(
                "INSERT INTO room_tombstones AS t (tbl, room, version) VALUES (%s, %s, %s)"
                " ON CONFLICT (tbl, room) DO UPDATE SET version = excluded.version"
                " WHERE t.version < excluded.version",
                (*room, version),
            )

    def lengths(self, tables: Collection[str]) -> dict[str, int]:
        rows = self._fetch(
            "SELECT tbl, embedding_length FROM tables WHERE tbl = ANY(%s)", (_texts(sorted(tables)),)
        )
        return dict(rows)

    def claim(self, lengths: Mapping[str, int]) -> None:
        for table, length in sorted(lengths.items()):
            self._execute(
                "INSERT INTO tables (tbl, embedding_length) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                (table, length),
            )

    def dimensions(self, ids: Collection[str]) -> dict[str, Dimensions]:
        rows = self._fetch(
            "SELECT id::text, tbl, room, agent, entity, world FROM memories WHERE id = ANY(%s)",
            (_uuids(ids),),
        )
        return {id: Dimensions(*dimensions) for id, *dimensions in rows}

    def stored(self, id: str) -> merge.Stored | None:
        rows = self._fetch(
            "SELECT tbl, room, agent, entity, world, put_version, deleted_version FROM memories"
            " WHERE id = %s::uuid FOR UPDATE",
            (id,),
        )
        for *dimensions, put, deleted in rows:
            return merge.Stored(Dimensions(*dimensions), bytes(put), bytes(deleted))
        return None

    def remove(self, id: str) -> None:
        self._execute("DELETE FROM memories WHERE id = %s::uuid", (id,))

    def upsert(self, deltas: Sequence[Delta]) -> list[str]:
        if not deltas:
            return []
        tables, rooms, agents, entities, worlds = zip(*(d.dimensions for d in deltas), strict=True)
        rows = self._fetch(
            _UPSERT,
            (
                _uuids(d.id for d in deltas),
                _texts(tables),
                _texts(rooms),
                _texts(agents),
                _texts(entities),
                _texts(worlds),
                _Int8s.of([_INT8.pack(d.created_us) for d in deltas]),
                _Jsons.of([d.content for d in deltas]),
                _Jsons.of([d.metadata for d in deltas]),
                _Byteas.of([d.embedding for d in deltas]),
                _Byteas.of([d.put for d in deltas]),
                _Byteas.of([d.content_version for d in deltas]),
                _Byteas.of([d.metadata_version for d in deltas]),
                _Byteas.of([d.embedding_version for d in deltas]),
                _Byteas.of([d.deleted for d in deltas]),
            ),
        )
        return [id for (id,) in rows]

    def clear(self, room: Room, last: bytes, versions: Collection[bytes]) -> list[tuple[str, Dimensions]]:
        for statement in _CLEAR:
            self._execute(statement, merge.clearing_parameters(room, last))
        rows = self._fetch(
            "SELECT id::text, tbl, room, agent, entity, world FROM memories"
            " WHERE tbl = %s AND room = %s AND NOT live AND deleted_version = ANY(%s)",
            (*room, _Byteas.of(list(versions))),
        )
        return [(id, Dimensions(*dimensions)) for id, *dimensions in rows]


def _slot(room: Room) -> int:
    return crc32(":".join(room).encode()) % _SLOTS


def _uuids(ids: Iterable[str]) -> _Uuids:
    return _Uuids.of(
        list(map(bytes.fromhex, "|".join(ids).replace("-", "").split("|")))
    )  # much faster than UUID


def _texts(items: Sequence[str | None]) -> _Texts:
    return _Texts.of([None if item is None else item.encode() for item in items])
