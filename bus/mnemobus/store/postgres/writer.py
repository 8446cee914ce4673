"""PostgreSQL: the store of many machines.

What keeps concurrent batches apart, in the order in which every transaction takes it, so that none can deadlock:

1. Advisory locks on slots of rooms: shared to write into a room, exclusive to set its tombstone. A put reads its
   room's tombstone; without the lock a deletion and a put could miss each other, as both commit (G3). A batch that
   touches many rooms has every slot; so the exclusive lock is held for the tombstones only, for a moment, and memories
   are deleted without it (store/merge.py).
2. Rows of `tables` and of `memories`, in the order of their keys.

READ COMMITTED suffices, and is what every transaction asks for: each statement begins after the locks are held and sees
all that was committed before, and what it merges into a row is merged into the row's latest version. A batch goes to
the server as columns, one array each in the binary format: JSON and vectors pass from the log into the table as the
same bytes.

Nobody is kept waiting for a server that is away: a call gets the server's own words at once. A connection that turns
out to be dead is replaced, and the call repeated, once. How connections are kept is in connections.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import struct
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any, ClassVar, LiteralString, NamedTuple, Self, TypeVar
from zlib import crc32

import psycopg
from psycopg import Connection, IsolationLevel, errors, sql
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Format, TransactionStatus
from psycopg.types.string import ByteaBinaryLoader

from ..errors import (
    MnemobusError,
    Rejected,
    SchemaError,
    SettingsError,
    StoreError,
    StoreTooSlow,
    StoreUnavailable,
)
from ..keys import Dimensions, Version
from ..log.events import Event
from ..settings import Settings
from . import Applied, Cursor, Deletion, Identity, Totals, merge, migrations
from .connections import AsyncConnections, Connections, Database, Prepared, Session, Target, at_once
from .layout import IDENTITY, OURS, TABLES, Found, Names, check_old, check_own
from .merge import Delta, Room
from .migrations import Migration
from .reader import SqlReader

T = TypeVar("T")

logger = logging.getLogger("mnemobus.store")

_LOCKS = int.from_bytes(b"mnem", "big")
"""The class of our advisory locks; others in the same database have other numbers."""
_SLOTS = 16
"""The locks of that class for rooms: few, as a batch may touch a thousand rooms and the server's table of locks is
small. A worker of the version before has the same."""
_MIGRATING = _SLOTS
"""The lock of that class under which the schema is upgraded."""

_TRIES = 5
"""How often a call is tried that other transactions got in the way of."""
_AT_ONCE = 64 << 10
"""Bytes of a batch up to which it is sent and committed in one go. A process that is paused amid a larger one would
keep its locks: the server waits for the rest."""
_LOCK_TRIES, _LOCK_PATIENCE = 20, 0.1
"""How often a deletion waits for its rooms' locks, and for how many seconds at first. A transaction
that waits for a lock holds up all that come later; so it gives up in between."""


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
_INT = struct.Struct(">i")
_INT4, _INT4S, _UUID = 23, 1007, 2950
"""Types of PostgreSQL."""


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


class _Int4s(_Array):
    oid, element = _INT4S, _INT4


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

_UPSERT = """
    INSERT INTO {memories} AS m (
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
        LEFT JOIN {room_tombstones} AS t ON t.tbl = n.tbl AND t.room = n.room
    ) AS batch
    ORDER BY id
    {merging}
    RETURNING id::text
"""

# Rows are locked in the order in which upserts lock them.
_CLEAR = """
    WITH chunk AS MATERIALIZED (
        SELECT id, created_us FROM {memories}
        WHERE tbl = %(table)s AND room = %(room)s AND live AND put_version < %(version)s
            AND (created_us, id) > (%(created_us)s, %(id)s)
        ORDER BY created_us, id LIMIT %(rows)s
    ), locked AS MATERIALIZED (
        SELECT m.id FROM {memories} AS m JOIN chunk USING (id) ORDER BY m.id FOR UPDATE OF m
    ), cleared AS (
        UPDATE {memories} AS m SET {erasing}
        FROM locked
        WHERE m.id = locked.id AND m.put_version < %(version)s AND m.deleted_version < %(version)s
    )
    SELECT count(*) OVER (), created_us, id::text FROM chunk ORDER BY created_us DESC, chunk.id DESC LIMIT 1
"""

_ERASE = """
    WITH locked AS MATERIALIZED (
        SELECT id FROM {memories}
        WHERE tbl = %(table)s AND room = %(room)s AND pending AND deleted_version < %(version)s
        ORDER BY id LIMIT %(rows)s FOR UPDATE
    ), erased AS (
        UPDATE {memories} AS m SET {erasing}
        FROM locked WHERE m.id = locked.id AND m.deleted_version < %(version)s
    )
    SELECT count(*) FROM locked
"""


def _numbered(query: bytes) -> bytes:
    """A query as the server takes it: its parameters are $1, $2 and so on."""
    first, *rest = query.split(b"%s")
    return first + b"".join(b"$%d%s" % (n, part) for n, part in enumerate(rest, 1))


class _Statements:
    """What a batch asks of the server, with the names of its tables."""

    def __init__(self, names: Names) -> None:
        merging = merge.merging("greatest", "IS NOT DISTINCT FROM", names.room_tombstones, "''::bytea")
        self.upsert = _UPSERT.format(
            memories=names.memories, room_tombstones=names.room_tombstones, merging=merging
        ).encode()
        erasing = merge.erasing("greatest", "%(version)s")
        arrays: tuple[type[_Array], ...] = (_Uuids, *[_Texts] * 5, _Int8s, *[_Jsons] * 2, *[_Byteas] * 6)
        self.at_once = Prepared(
            b"mnemobus_upsert",
            _numbered(
                self.upsert.replace(
                    b") AS batch\n",
                    f") AS batch WHERE coalesce((SELECT store FROM {names.identity}) = %s, true)\n".encode(),
                )
            ),
            (*(array.oid for array in arrays), _UUID),
        )
        self.clear = _CLEAR.format(memories=names.memories, erasing=erasing).encode()
        self.erase = _ERASE.format(memories=names.memories, erasing=erasing).encode()
        # What comes back says which store this is: nothing more has to be asked for it.
        self.store = f"SELECT store::text FROM {names.identity}".encode()
        self.share, self.exclude = (
            f"SELECT (SELECT store::text FROM {names.identity}), {lock}(%s, slot)"
            " FROM unnest(%s::int[]) AS slots (slot)".encode()
            for lock in ("pg_advisory_xact_lock_shared", "pg_advisory_xact_lock")
        )
        self.share_at_once = Prepared(b"mnemobus_share", _numbered(self.share), (_INT4, _INT4S))
        self.bury = (
            f"INSERT INTO {names.room_tombstones} AS t (tbl, room, version) VALUES (%s, %s, %s)"
            " ON CONFLICT (tbl, room) DO UPDATE SET version = excluded.version"
            " WHERE t.version < excluded.version"
        ).encode()
        self.lengths = f"SELECT tbl, embedding_length FROM {names.tables} WHERE tbl = ANY(%s)".encode()
        self.claim = (
            f"INSERT INTO {names.tables} (tbl, embedding_length) VALUES (%s, %s) ON CONFLICT DO NOTHING"
        ).encode()
        self.dimensions = (
            f"SELECT id::text, tbl, room, agent, entity, world FROM {names.memories} WHERE id = ANY(%s)"
        ).encode()
        self.ended = (
            f"SELECT id::text, tbl, room, agent, entity, world FROM {names.memories}"
            " WHERE tbl = %s AND room = %s AND NOT live AND deleted_version = ANY(%s)"
        ).encode()
        self.stored = (
            "SELECT m.tbl, m.room, agent, entity, world, put_version, greatest(deleted_version, t.version),"
            f" coalesce((SELECT version FROM {names.room_tombstones} WHERE tbl = %s AND room = %s), '')"
            f" FROM {names.memories} AS m LEFT JOIN {names.room_tombstones} AS t"
            " ON t.tbl = m.tbl AND t.room = m.room WHERE id = %s::uuid FOR UPDATE OF m"
        ).encode()
        self.remove = f"DELETE FROM {names.memories} WHERE id = %s::uuid".encode()
        self.number = f"SELECT coalesce(max(number), 0) FROM {names.migrations}".encode()
        self.identity = (
            f"SELECT store::text, bus::text, prefix, life, reached_ms FROM {names.identity}".encode()
        )
        self.serve = (
            f"UPDATE {names.identity} SET bus = %s, prefix = %s, life = %s,"
            " reached_ms = CASE WHEN life IS NOT DISTINCT FROM %s THEN reached_ms END"
            " WHERE bus IS NULL OR bus = %s OR %s"
        ).encode()
        self.reach = (
            f"UPDATE {names.identity} SET reached_ms = %s WHERE coalesce(reached_ms, 0) < %s".encode()
        )
        # A server that ends without having written all that was committed empties tables that are not logged.
        self.forgetful = f"{names.identity.rpartition('.')[0]}.server_epoch"
        self.make_epoch = (
            f"CREATE UNLOGGED TABLE IF NOT EXISTS {self.forgetful} (one boolean PRIMARY KEY, epoch uuid NOT NULL)"
        ).encode()
        self.begin_epoch = (
            f"INSERT INTO {self.forgetful} VALUES (true, %s) ON CONFLICT (one) DO NOTHING".encode()
        )
        self.epoch = f"SELECT epoch::text FROM {self.forgetful}".encode()
        self.reach_in = (
            f"UPDATE {names.identity} SET reached_ms = greatest(%s, reached_ms)"
            f" WHERE (SELECT epoch FROM {self.forgetful}) = %s RETURNING true"
        ).encode()
        self.has = (
            f"SELECT id::text FROM unnest(%s::uuid[], %s::bytea[]) AS w (id, version)"
            f" JOIN {names.memories} AS m USING (id) WHERE greatest(put_version, content_version,"
            " metadata_version, embedding_version, deleted_version) >= version"
        ).encode()


_TOO_MUCH = {
    "25P03",  # idle in a transaction for too long: this process was paused, or the pipeline was
    "25P04",  # transaction_timeout
    "53200",  # out of memory, or of places for locks
    "53400",  # beyond a configured limit, as of temporary files
    "55P03",  # a lock was not free in time
    "57014",  # statement_timeout, or somebody cancelled it
}
"""Less at once may do where so much did not."""

_ADVICE = {
    "25006": "it takes no writes. Is it a standby? MNEMOBUS_DATABASE_URL must lead to the primary",
    "53100": "its disk is full",
}

_POOLER_SAYS = {
    "statement pooling mode": "a pooler in statement mode has no transactions. Set pool_mode to transaction or session",
    "unsupported startup parameter": "the pooler does not take this option of MNEMOBUS_DATABASE_URL: remove it, or"
    " add it to ignore_startup_parameters of the pooler",
}


class _Database(Database):
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
        self.namespace = settings.database_namespace
        self.names = Names(f'"{self.namespace}".')
        self.sql = _Statements(self.names)
        timeout = settings.database_timeout
        host = given.get("host") or given.get("hostaddr") or "local socket"
        port = given.get("port")
        self.where = f"PostgreSQL {host}{f':{port}' if port else ''}/{given.get('dbname') or ''}"
        ours: dict[str, Any] = {
            "application_name": "mnemobus",
            "client_encoding": "utf8",
            "connect_timeout": max(1, round(timeout)),
            # A link that died without a word is found out while the call waits for it.
            "tcp_user_timeout": round(timeout * 1000),
            "keepalives_idle": max(1, round(timeout)),
        }
        conninfo = make_conninfo(settings.database_url, **{k: v for k, v in ours.items() if k not in given})
        super().__init__(Target(self.where, conninfo, timeout, settings.database_pool_max, _adapters))

    def error(self, error: BaseException) -> MnemobusError:
        """What an error of the driver means: is the data to blame, its amount, the schema, or the server?"""
        if isinstance(error, MnemobusError):
            return error
        words = " ".join(str(error).split())
        if not isinstance(error, psycopg.Error):
            return Rejected(f"{self.where} refuses this data: {words}")
        for sign, advice in _POOLER_SAYS.items():
            if sign in words:
                return SettingsError(f"{self.where}: {words}: {advice}")
        state = error.sqlstate
        # 22: the value; 23: a constraint; 54: beyond a limit, as JSON that nests too deep for the server.
        # Without a state, the driver itself could not encode it.
        if isinstance(error, psycopg.DataError) if state is None else state[:2] in ("22", "23", "54"):
            return Rejected(f"{self.where} refuses this data: {words}")
        if state in _TOO_MUCH:
            return StoreTooSlow(f"{self.where}: {words}")
        # 42: a table, a column or the right to use one is missing, or not as it should be; 3F: a schema is.
        if state is not None and state[:2] in ("42", "3F"):
            return SchemaError(f"{self.where}: {words}{self._advice(state)}")
        advice = _ADVICE.get(state or "", "")
        return StoreUnavailable(f"{self.where}: {words}{advice and ': '}{advice}")

    def check_encoding(self, connection: Connection[Any]) -> None:
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise SchemaError(
                f"{self.where} has the encoding {encoding}, in which not every memory can be stored:"
                " create the database with ENCODING 'UTF8' TEMPLATE template0"
            )

    def _advice(self, state: str | None) -> str:
        if state != _NOT_ALLOWED:
            return ". Were mnemobus's tables removed? Restore the database from a backup"
        return (
            f". Agents need: GRANT USAGE ON SCHEMA {self.namespace} TO (role); GRANT SELECT ON ALL TABLES IN SCHEMA"
            f" {self.namespace} TO (role). Workers are best the owner of the schema and of what is in it"
        )

    @contextmanager
    def _unhurried(self, connection: Session) -> Iterator[None]:
        """A transaction that may take as long as it takes: tables may be large, and others be at the same."""
        with connection.transaction():
            self.limit(connection, math.inf)
            yield

    def upgrade(self) -> None:
        """Apply the migrations that are missing; others may be at the same."""
        with self.connect() as connection:
            connection.isolation_level, connection.read_only = IsolationLevel.READ_COMMITTED, False
            self.check_encoding(connection)
            while True:
                with self._unhurried(connection):
                    number = self.look(connection).number
                if not migrations.following("postgres", number):
                    return
                try:
                    with self._unhurried(connection):
                        connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (_LOCKS, _MIGRATING))
                        found = self.look(connection)
                        for migration in migrations.following("postgres", found.number):
                            self._migrate(connection, migration, found)
                except errors.InsufficientPrivilege as error:
                    role = connection.info.user
                    raise SchemaError(
                        f"{self.where}: the role {role} may not make mnemobus's tables: {' '.join(str(error).split())}."
                        f" As a superuser run, in this database: CREATE SCHEMA IF NOT EXISTS {self.namespace}; ALTER"
                        f' SCHEMA {self.namespace} OWNER TO "{role}"; and if it has tables of an earlier version: GRANT'
                        f' CREATE ON SCHEMA public TO "{role}". Then start again'
                    ) from error

    def _migrate(self, connection: Connection[Any], migration: Migration, found: Found) -> None:
        # Where there is one that somebody made for us, no right to make schemas is needed.
        if not connection.execute(
            "SELECT 1 FROM pg_namespace WHERE nspname = %s", (self.namespace,)
        ).fetchone():
            connection.execute(f'CREATE SCHEMA "{self.namespace}"'.encode())
        if found.old is not None and found.old != self.namespace:
            self._move(connection, found.old)
        # For this transaction, and for the bare names of the migrations. Nothing else goes by the role's own path.
        connection.execute(f'SET LOCAL search_path TO "{self.namespace}"'.encode())
        connection.execute(migration.sql.encode())
        connection.execute("INSERT INTO migrations (number) VALUES (%s)", (migration.number,))

    def _move(self, connection: Connection[Any], old: str) -> None:
        """Put the tables of schema 1 into our schema. Agents and workers of the version before go on with views of the
        old names; a role that had a right to a table has it to the view as well."""
        here, there = sql.Identifier(old), sql.Identifier(self.namespace)
        for table in OURS:
            name = sql.Identifier(table)
            move = sql.SQL("ALTER TABLE {}.{} SET SCHEMA {}").format(here, name, there)
            connection.execute(move)
            view = sql.SQL("CREATE VIEW {}.{} AS SELECT * FROM {}.{}").format(here, name, there, name)
            connection.execute(view)
            for grantee, right in connection.execute(
                "SELECT DISTINCT CASE a.grantee WHEN 0 THEN NULL ELSE pg_get_userbyid(a.grantee) END, a.privilege_type"
                " FROM pg_class AS c, aclexplode(c.relacl) AS a"
                " WHERE c.oid = format('%%I.%%I', %s::text, %s::text)::regclass AND a.grantee <> c.relowner",
                (self.namespace, table),
            ).fetchall():
                role = sql.SQL("PUBLIC") if grantee is None else sql.Identifier(grantee)
                # A right that views have not, of a later version of PostgreSQL, is none that we need.
                if right in ("SELECT", "INSERT", "UPDATE", "DELETE"):
                    grant = sql.SQL("GRANT {} ON {}.{} TO {}").format(sql.SQL(right), here, name, role)
                    connection.execute(grant)
                    connection.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(there, role))
                    if right == "SELECT":
                        default = "ALTER DEFAULT PRIVILEGES IN SCHEMA {} GRANT SELECT ON TABLES TO {}"
                        connection.execute(sql.SQL(default).format(there, role))

    def look(self, connection: Connection[Any]) -> Found:
        """What the database has; SchemaError if it is in the way of what is ours."""
        place = self.judge(connection.execute(_LOOK, (list(TABLES),)).fetchall())
        if place is None:
            return Found(0)
        return self.found(place, connection.execute(self.number_in(place)).fetchall())

    def judge(self, rows: Sequence[tuple[Any, ...]]) -> str | None:
        """In which schema our tables are, by the columns of all tables that are called like them."""
        schemas: dict[str, dict[str, set[str]]] = {}
        visible = set()
        for schema, table, column, seen in rows:
            schemas.setdefault(schema, {}).setdefault(table, set()).add(column)
            if seen and table == "migrations":
                visible.add(schema)
        tables = {
            schema: {table: frozenset(columns) for table, columns in found.items()}
            for schema, found in schemas.items()
        }
        if check_own(tables.pop(self.namespace, {}), f"{self.where}, in the schema {self.namespace},"):
            return self.namespace
        # One with an identity is another store of this version, under another name.
        others = {schema: found for schema, found in tables.items() if IDENTITY not in found}
        old = [
            schema for schema, found in others.items() if check_old(found, f"{self.where}, schema {schema},")
        ]
        # Where the role's search path leads is where the version before had them.
        old = [schema for schema in old if schema in visible] or old
        if len(old) > 1:
            raise SchemaError(
                f"{self.where} has tables of an earlier version of mnemobus in several schemas, {', '.join(old)}, and"
                " the role's search_path leads to none of them: set it to those that are to be used"
            )
        return old[0] if old else None

    def number_in(self, schema: str) -> bytes:
        return f"SELECT coalesce(max(number), 0) FROM {_quoted(schema)}.migrations".encode()

    def found(self, place: str, rows: Sequence[tuple[Any, ...]]) -> Found:
        number = int(rows[0][0])
        return Found(number, place if number == 1 else None)


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


_NOT_ALLOWED = "42501"

_LOOK = rb"""
    SELECT n.nspname, c.relname, a.attname, pg_table_is_visible(c.oid)
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS a ON a.attrelid = c.oid
    WHERE c.relname = ANY(%s) AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
        AND n.nspname NOT LIKE 'pg\_temp\_%%'
"""
"""The columns of all tables that are called like ours. Not to_regclass(): it answers from a cache, which waiting for an
advisory lock does not refresh."""

_PLACE = (
    b"SELECT system_identifier || '/' || (SELECT oid FROM pg_database WHERE datname = current_database()),"
    b" CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END"
    b" FROM pg_control_system()"
)
"""What a copy of the database does not share, and the timeline of the server. Not every service lets one ask."""


_COUNTED_PAGES, _SAMPLED_PAGES = 20_000, 5_000
"""Pages of the table up to which totals are counted, and which are read of a larger one."""
_COUNTED_ROWS = 10_000

# From one table's name to the next, through the index.
_TABLES = """
    WITH RECURSIVE named AS (
        (SELECT tbl FROM {memories} WHERE live ORDER BY tbl LIMIT 1)
        UNION ALL
        SELECT (SELECT m.tbl FROM {memories} AS m WHERE live AND m.tbl > named.tbl ORDER BY m.tbl LIMIT 1)
        FROM named WHERE named.tbl IS NOT NULL
    )
    SELECT tbl FROM named WHERE tbl IS NOT NULL
"""


class PostgresReader(SqlReader):
    _never = "''"
    _columns = (
        "id::text AS key, tbl, room, agent, entity, world, content, metadata, embedding, created_us,"
        " greatest(put_version, content_version, metadata_version, embedding_version)"
    )

    def __init__(self, settings: Settings, create: bool = True) -> None:
        self._server = _Database(settings)
        self._names = self._server.names
        self._may_create = create
        self.openings = 0
        self._connections: AsyncConnections | None = None
        self._prepared = False
        self._preparing = asyncio.Lock()

    async def open(self) -> None:
        if self._connections is None or self._connections.is_closed:
            self._connections = AsyncConnections(self._server)
        await self._prepare()

    async def close(self) -> None:
        if self._connections is not None:
            self._connections.close()

    async def schema(self) -> int:
        place = self._server.judge(await self._query(_LOOK, (list(TABLES),)))
        if place is None:
            return 0
        return self._server.found(place, await self._query(self._server.number_in(place))).number

    async def identity(self) -> Identity:
        try:
            [(place, history)] = await self._query(_PLACE)
        except (StoreUnavailable, SchemaError) as error:
            logger.debug("can't tell where the store is: %s", error)
            place = history = ""
        [row] = await self._fetch(self._server.sql.identity.decode())
        return _identity(row, place, history, self._server.where)

    async def totals(self) -> Totals:
        """Counted where the table is small. Else a sample of its pages is counted, and tables too small for the sample
        are counted by themselves, as far as that goes."""
        memories = self._names.memories
        [(pages,)] = await self._fetch(
            "SELECT pg_relation_size(?::regclass) / current_setting('block_size')::int", (memories,)
        )
        if pages <= _COUNTED_PAGES:
            return await super().totals()
        share = _SAMPLED_PAGES / pages
        found = dict(
            await self._fetch(
                f"SELECT tbl, count(*) FROM {memories} TABLESAMPLE SYSTEM (?) WHERE live GROUP BY tbl",
                (100 * share,),
            )
        )
        totals = {table: round(count / share) for table, count in found.items()}
        for (table,) in await self._fetch(_TABLES.format(memories=memories)):
            if totals.get(table, 0) < _COUNTED_ROWS:
                [(few,)] = await self._fetch(
                    f"SELECT count(*) FROM (SELECT 1 FROM {memories} WHERE live AND tbl = ? LIMIT ?) AS few",
                    (table, _COUNTED_ROWS),
                )
                totals[table] = few if few < _COUNTED_ROWS else max(few, totals.get(table, 0))
        return Totals({table: totals[table] for table in sorted(totals) if totals[table]}, exact=False)

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
                        raise self._server.error(error) from error
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
        if self._connections is None:
            raise StoreUnavailable(f"{self._server.where}: the store is not open")
        worn = False
        try:
            async with self._connections.one() as link:
                try:
                    return await self._server.read(link, query, parameters)
                except psycopg.Error as error:
                    worn = self._server.worn(link, error)
                    if not worn and link.info.transaction_status != TransactionStatus.IDLE:
                        await link.rollback()
                    raise
        except psycopg.Error as error:
            if not (worn and again):
                raise self._server.error(error) from error
            self.openings += 1
            self._connections.drain()  # the others are as old
        return await self._query(query, parameters, again=False)

    def _key(self, id: str) -> uuid.UUID:
        return uuid.UUID(id)

    def _id(self, key: str) -> str:
        return key


class _Won(NamedTuple):
    """Which memories a batch changed, and whether that is all that it names."""

    ids: set[str]
    all: bool


class PostgresWriter:
    def __init__(self, settings: Settings) -> None:
        self._server = _Database(settings)
        self._connections: Connections | None = None
        self._prepared = False
        self._preparing = Lock()
        self._expected: str | None = None

    def open(self) -> None:
        if self._connections is None or self._connections.is_closed:
            self._connections = Connections(self._server)
        self._prepare()

    def close(self) -> None:
        if self._connections is not None:
            self._connections.close()

    def apply(self, events: Sequence[Event], *, patience: float = 1.0) -> Applied:
        applied = Applied()
        rest, deletions = merge.part(events)
        if rest or not deletions:
            won = self._apply_at_once(rest) if patience == 1.0 else None
            if won is None or not won.all:
                applied = self._transact(lambda t: merge.apply(t, rest), patience)
            if won is not None:
                applied.won |= won.ids
        for some in deletions:
            tries = 0

            def bury(transaction: _Transaction, some: Sequence[Deletion] = some) -> None:
                nonlocal tries
                tries += 1
                transaction.be_patient(_LOCK_PATIENCE * patience * 2 ** ((tries - 1) // 5))
                merge.bury(transaction, some)

            self._transact(bury, patience)
            applied.add(self._transact(partial(merge.begin_clearing, deletions=some), patience))
        return applied

    def _apply_at_once(self, events: Sequence[Event]) -> _Won | None:
        """Commit in one round trip what nothing has to be looked up for: most batches. None if it is no such batch.

        What changed nothing may contradict what is stored. Then merge.apply sees to it, in another transaction: there
        the others have no further effect.
        """
        if not events or any(event.embedding for event in events):
            return None
        batch = merge.collapse(events)
        if batch.refused or sum(map(_bytes, batch.deltas)) > _AT_ONCE:
            return None
        self._prepare()
        sql = self._server.sql

        def work(link: Session) -> _Won | None:
            if link.pooled:
                return None
            slots = sorted({_slot(delta.dimensions[:2]) for delta in batch.deltas})
            locks = (_INT.pack(_LOCKS), _Int4s.of([_INT.pack(slot) for slot in slots]))
            # Another store than that is left as it is.
            expected = None if self._expected is None else bytes.fromhex(self._expected)
            upsert = (*_columns(batch.deltas), expected)
            try:
                _, found = at_once(link, ((sql.share_at_once, locks), (sql.at_once, upsert)))
            except errors.ReadOnlySqlTransaction:  # by default, perhaps: merge.apply asks for another
                return None
            ids = {(found.get_value(row, 0) or b"").decode() for row in range(found.ntuples)}
            return _Won(ids, len(ids) == len(batch.deltas))

        return self._run(work)

    def clear(
        self,
        deletion: Deletion,
        after: Cursor = merge.BEGINNING,
        rows: int = merge.STEP,
        *,
        patience: float = 1.0,
    ) -> Cursor | None:
        return self._transact(lambda t: t.clear(deletion, after, rows), patience)

    def ended(self, deletion: Deletion) -> Iterator[list[tuple[str, Dimensions]]]:
        self._prepare()
        try:
            with self._opened().one() as link:
                self._server.begin(link, math.inf)
                try:
                    with link.cursor("ended") as cursor:
                        cursor.execute(
                            self._server.sql.ended, (*deletion.room, _Byteas.of(deletion.versions))
                        )
                        while rows := cursor.fetchmany(merge.TOLD):
                            yield [(id, Dimensions(*dimensions)) for id, *dimensions in rows]
                finally:
                    if not link.closed:
                        link.rollback()
        except psycopg.Error as error:
            raise self._server.error(error) from error

    def expect(self, store: str | None) -> None:
        self._expected = store

    def identity(self) -> Identity:
        return self._run(self._identity)

    def _identity(self, connection: Connection[Any]) -> Identity:
        try:
            row = connection.execute(_PLACE).fetchone()
        except psycopg.Error as error:
            if connection.closed:
                raise
            logger.debug("can't tell where the store is: %s", error)
            row = None
        place, history = row or ("", "")
        found = connection.execute(self._server.sql.identity).fetchone()
        if found is None:
            raise SchemaError(f"{self._server.where}: the table {self._server.names.identity} is empty")
        return _identity(found, place, history, self._server.where)

    def serve(self, bus: str, prefix: str, life: str, *, instead: bool = False) -> None:
        self._do(self._server.sql.serve, (bus, prefix, life, life, bus, instead))

    def reach(self, moment: int, epoch: str = "") -> bool:
        if not epoch:
            self._do(self._server.sql.reach, (moment, moment))
            return True

        def work(link: Session) -> bool:
            with _transaction(self._server, link) as transaction:
                # What comes before it in the server's log is on disk once this is.
                transaction.run("SET LOCAL synchronous_commit = on", ())
                return bool(transaction.run(self._server.sql.reach_in, (moment, uuid.UUID(epoch))))

        return self._run(work)

    def relax(self, relaxed: bool) -> None:
        before, self._server.relaxed = self._server.relaxed, relaxed
        if before != relaxed and self._connections is not None:
            self._connections.drain()

    def epoch(self, *, begin: bool = False) -> str:
        sql = self._server.sql
        if begin:
            [(there,)] = self._do(b"SELECT to_regclass(%s) IS NOT NULL", (sql.forgetful,))
            if not there:
                try:
                    self._do(sql.make_epoch, ())
                except (
                    StoreError
                ) as error:  # others make it at the same time; if not, the next statement says so
                    logger.debug("%s", error)
            self._do(sql.begin_epoch, (uuid.uuid4(),))
        try:
            found = self._do(sql.epoch, ())
        except SchemaError:  # there is no such table
            return ""
        return str(found[0][0]) if found else ""

    def lacks(self, memories: Mapping[str, Version]) -> list[str]:
        ids = list(memories)
        if not ids:
            return []
        versions = _Byteas.of([version.pack() for version in memories.values()])
        has = {id for (id,) in self._do(self._server.sql.has, (_uuids(ids), versions))}
        return [id for id in ids if id not in has]

    def _prepare(self) -> None:
        """See to the schema, once: when opened, or later if the server was away then."""
        if self._prepared:
            return
        with self._preparing:
            if not self._prepared:
                try:
                    self._server.upgrade()
                except psycopg.Error as error:
                    raise self._server.error(error) from error
                self._prepared = True

    def _opened(self) -> Connections:
        if self._connections is None:
            raise StoreUnavailable(f"{self._server.where}: the store is not open")
        return self._connections

    def _do(self, query: bytes, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """One statement that changes nothing else than who the store is, or nothing."""

        def work(link: Session) -> list[tuple[Any, ...]]:
            with _transaction(self._server, link) as transaction:
                return transaction.run(query, parameters)

        return self._run(work)

    def _transact(self, work: Callable[[_Transaction], T], patience: float) -> T:
        """Do this work in a transaction, in the store that is expected."""
        self._prepare()

        def attempt(link: Session) -> T:
            with _transaction(self._server, link, patience) as transaction:
                result = work(transaction)
                if self._expected not in (None, transaction.store()):
                    raise StoreUnavailable(f"{self._server.where} is another store than it was")
            return result

        return self._run(attempt)

    def _run(self, work: Callable[[Session], T]) -> T:
        """Do this work, which must bear to be repeated, on a connection; again where others got in its way."""
        connections = self._opened()
        tries, worn = 1, False
        while True:
            try:
                with connections.one() as link:
                    try:
                        return work(link)
                    except psycopg.Error as error:
                        lost = link.closed
                        if not self._server.worn(link, error) or (worn and not lost):
                            raise
                        if worn:  # it may be this batch that the server dies of
                            raise StoreTooSlow(str(self._server.error(error))) from error
                        connections.drain()  # the others are as old
                        worn = True
            except (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable) as error:
                if tries == (_LOCK_TRIES if isinstance(error, errors.LockNotAvailable) else _TRIES):
                    raise self._server.error(error) from error
                time.sleep(random.uniform(0, 0.01 * 2 ** min(tries, 5)))
                tries += 1
            except psycopg.Error as error:
                meant = self._server.error(error)
                if worn and type(meant) is StoreUnavailable:
                    # It went away in the midst of the batch, and is not back at once.
                    meant = StoreTooSlow(str(meant))
                raise meant from error
            except (OverflowError, UnicodeError, struct.error) as error:  # while building the columns
                raise self._server.error(error) from error


@contextmanager
def _transaction(server: _Database, link: Session, patience: float = 1.0) -> Iterator[_Transaction]:
    """A transaction, committed at the end."""
    # What returns nothing goes along with what follows it: a batch takes two round trips, for its upsert and for
    # COMMIT. psycopg's own transaction() would take two more.
    pipeline = link.pipeline() if psycopg.Pipeline.is_supported() else nullcontext()
    try:
        with pipeline as sending:
            server.begin(link, patience)
            yield _Transaction(link, sending, server.sql)
            link.execute(b"COMMIT")
    except BaseException:
        if not link.closed:
            link.rollback()
        raise


def _identity(row: Sequence[Any], place: str, history: str, where: str) -> Identity:
    found, bus, prefix, life, reached = row
    return Identity(
        found.replace("-", ""), bus and bus.replace("-", ""), prefix, life, reached, place, history, where
    )


class _Transaction:
    """The steps of :func:`merge.apply`."""

    def __init__(
        self, connection: Connection[Any], pipeline: psycopg.Pipeline | None, statements: _Statements
    ) -> None:
        self._execute = connection.execute
        self._pipeline = pipeline
        self._sql = statements
        self._locked: psycopg.Cursor[Any] | None = None

    def store(self) -> str:
        """Which store this is, as it came with the locks."""
        row = self._locked.fetchone() if self._locked is not None else None
        [(store, *_)] = [row] if row is not None else self.run(self._sql.store, ())
        return str(store).replace("-", "")

    def run(
        self, query: LiteralString | bytes, parameters: Sequence[Any] | Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """The rows of a statement, if it has any."""
        cursor = self._execute(query, parameters)
        if self._pipeline is not None:
            # Without that, the server would take the transaction for busy, not idle, until all of the pipeline is sent,
            # and would not end it if this process is paused.
            self._pipeline.sync()
        return cursor.fetchall() if cursor.description else []

    def share(self, rooms: Collection[Room]) -> None:
        self._locked = self._execute(self._sql.share, (_LOCKS, sorted(set(map(_slot, rooms)))))

    def be_patient(self, seconds: float) -> None:
        """For how long to wait for a lock."""
        self._execute("SELECT set_config('lock_timeout', %s, true)", (str(round(seconds * 1000)),))

    def exclude(self, rooms: Collection[Room]) -> None:
        self._locked = self._execute(self._sql.exclude, (_LOCKS, sorted(set(map(_slot, rooms)))))

    def bury(self, rooms: Mapping[Room, bytes]) -> None:
        for room, version in sorted(rooms.items()):
            self._execute(self._sql.bury, (*room, version))

    def lengths(self, tables: Collection[str]) -> dict[str, int]:
        rows = self.run(self._sql.lengths, (_texts(sorted(tables)),))
        return dict(rows)

    def claim(self, lengths: Mapping[str, int]) -> None:
        for table, length in sorted(lengths.items()):
            self._execute(self._sql.claim, (table, length))

    def dimensions(self, ids: Collection[str]) -> dict[str, Dimensions]:
        rows = self.run(self._sql.dimensions, (_uuids(ids),))
        return {id: Dimensions(*dimensions) for id, *dimensions in rows}

    def stored(self, id: str, room: Room) -> merge.Stored | None:
        for *dimensions, put, deleted, buried in self.run(self._sql.stored, (*room, id)):
            return merge.Stored(Dimensions(*dimensions), bytes(put), bytes(deleted), bytes(buried))
        return None

    def remove(self, id: str) -> None:
        self._execute(self._sql.remove, (id,))

    def upsert(self, deltas: Sequence[Delta]) -> list[str]:
        if not deltas:
            return []
        return [id for (id,) in self.run(self._sql.upsert, _columns(deltas))]

    def clear(self, deletion: Deletion, after: Cursor, rows: int) -> Cursor | None:
        table, room = deletion.room
        parameters = {
            "table": table,
            "room": room,
            "version": deletion.versions[-1],
            "created_us": after.created_us,
            "id": uuid.UUID(after.id),
            "rows": rows,
        }
        chunk = self._execute(self._sql.clear, parameters)
        [(erased,)] = self.run(self._sql.erase, parameters)
        last = chunk.fetchone()
        if last is not None and last[0] == rows:
            return Cursor(*last[1:])
        return after if erased == rows else None

    def ended(self, deletion: Deletion, most: int) -> list[tuple[str, Dimensions]]:
        rows = self.run(self._sql.ended + b" LIMIT %s", (*deletion.room, _Byteas.of(deletion.versions), most))
        return [(id, Dimensions(*dimensions)) for id, *dimensions in rows]


def _columns(deltas: Sequence[Delta]) -> tuple[_Array, ...]:
    """The parameters of an upsert."""
    tables, rooms, agents, entities, worlds = zip(*(d.dimensions for d in deltas), strict=True)
    return (
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
    )


def _bytes(delta: Delta) -> int:
    return 300 + len(delta.content or b"") + len(delta.metadata or b"")


def _slot(room: Room) -> int:
    return crc32(":".join(room).encode()) % _SLOTS


def _uuids(ids: Iterable[str]) -> _Uuids:
    return _Uuids.of(
        list(map(bytes.fromhex, "|".join(ids).replace("-", "").split("|")))
    )  # much faster than UUID


def _texts(items: Sequence[str | None]) -> _Texts:
    return _Texts.of([None if item is None else item.encode() for item in items])
