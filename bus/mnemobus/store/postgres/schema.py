"""The schema of a PostgreSQL database: what is there, and its upgrades."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from psycopg import Connection, IsolationLevel, errors, sql

from ...errors import SchemaError
from .. import migrations
from ..layout import IDENTITY, OURS, TABLES, Found, check_old, check_own
from ..migrations import Migration
from .connections import Session
from .locks import LOCKS, MIGRATING
from .server import PostgresServer

LOOK = rb"""
    SELECT n.nspname, c.relname, a.attname, pg_table_is_visible(c.oid)
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS a ON a.attrelid = c.oid
    WHERE c.relname = ANY(%s) AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
        AND n.nspname NOT LIKE 'pg\_temp\_%%'
"""
"""The columns of all tables that are called like ours. Not to_regclass(): it answers from a cache, which waiting for an
advisory lock does not refresh."""


def upgrade(server: PostgresServer) -> None:
    """Apply the migrations that are missing. Other processes may do so at the same time."""
    with server.connect() as connection:
        connection.isolation_level, connection.read_only = IsolationLevel.READ_COMMITTED, False
        _check_encoding(server, connection)
        while True:
            with _unhurried(server, connection):
                number = look(server, connection).number
            if not migrations.following("postgres", number):
                return
            try:
                with _unhurried(server, connection):
                    connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCKS, MIGRATING))
                    found = look(server, connection)
                    for migration in migrations.following("postgres", found.number):
                        _migrate(server, connection, migration, found)
            except errors.InsufficientPrivilege as error:
                role = connection.info.user
                raise SchemaError(
                    f"{server.where}: the role {role} may not make mnemobus's tables: {' '.join(str(error).split())}."
                    f" As a superuser run, in this database: CREATE SCHEMA IF NOT EXISTS {server.namespace}; ALTER"
                    f' SCHEMA {server.namespace} OWNER TO "{role}"; and if it has tables of an earlier version: GRANT'
                    f' CREATE ON SCHEMA public TO "{role}". Then start again'
                ) from error


def _migrate(server: PostgresServer, connection: Connection[Any], migration: Migration, found: Found) -> None:
    # If somebody made the schema for us, the right to make schemas is not needed.
    if not connection.execute(
        "SELECT 1 FROM pg_namespace WHERE nspname = %s", (server.namespace,)
    ).fetchone():
        connection.execute(f'CREATE SCHEMA "{server.namespace}"'.encode())
    if found.old is not None and found.old != server.namespace:
        _move(server, connection, found.old)
    # For this transaction, and for the bare names of the migrations. Nothing else goes by the role's own path.
    connection.execute(f'SET LOCAL search_path TO "{server.namespace}"'.encode())
    connection.execute(migration.sql.encode())
    connection.execute("INSERT INTO migrations (number) VALUES (%s)", (migration.number,))


def _move(server: PostgresServer, connection: Connection[Any], old: str) -> None:
    """Put the tables of schema 1 into our schema. Agents and workers of the version before go on with views of the
    old names; a role that had a right to a table has it to the view as well."""
    here, there = sql.Identifier(old), sql.Identifier(server.namespace)
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
            (server.namespace, table),
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


@contextmanager
def _unhurried(server: PostgresServer, connection: Session) -> Iterator[None]:
    """A transaction without a time limit: tables may be large, and another process may be upgrading them already."""
    with connection.transaction():
        server.limit(connection, math.inf)
        yield


def _check_encoding(server: PostgresServer, connection: Connection[Any]) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise SchemaError(
            f"{server.where} has the encoding {encoding}, in which not every memory can be stored:"
            " create the database with ENCODING 'UTF8' TEMPLATE template0"
        )


def look(server: PostgresServer, connection: Connection[Any]) -> Found:
    """What the database has; SchemaError if it is in the way of what is ours."""
    place = place_in(server, connection.execute(LOOK, (list(TABLES),)).fetchall())
    if place is None:
        return Found(0)
    return found_in(place, connection.execute(number_in(place)).fetchall())


def place_in(server: PostgresServer, rows: Sequence[tuple[Any, ...]]) -> str | None:
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
    if check_own(tables.pop(server.namespace, {}), f"{server.where}, in the schema {server.namespace},"):
        return server.namespace
    # One with an identity is another store of this version, under another name.
    others = {schema: found for schema, found in tables.items() if IDENTITY not in found}
    old = [
        schema for schema, found in others.items() if check_old(found, f"{server.where}, schema {schema},")
    ]
    # Where the role's search path leads is where the version before had them.
    old = [schema for schema in old if schema in visible] or old
    if len(old) > 1:
        raise SchemaError(
            f"{server.where} has tables of an earlier version of mnemobus in several schemas, {', '.join(old)}, and"
            " the role's search_path leads to none of them: set it to those that are to be used"
        )
    return old[0] if old else None


def number_in(schema: str) -> bytes:
    """Asks for the number of the last migration in a schema of PostgreSQL."""
    return f"SELECT coalesce(max(number), 0) FROM {_quoted(schema)}.migrations".encode()


def found_in(place: str, rows: Sequence[tuple[Any, ...]]) -> Found:
    """What the database has, by the answer to that."""
    number = int(rows[0][0])
    return Found(number, place if number == 1 else None)


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
