"""The schema of an SQLite store: what is there, and its upgrades."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from .. import migrations
from ..layout import OURS, TABLES, Columns, Found, Names, check_old, check_own, prefixed


def look(connection: sqlite3.Connection, path: Path, namespace: str) -> Found:
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


def upgrade(connection: sqlite3.Connection, path: Path, namespace: str) -> None:
    """Apply the migrations that are missing. Other processes may do so at the same time."""
    before = f"{namespace}_"
    while migrations.following("sqlite", look(connection, path, namespace).number):
        connection.execute("BEGIN IMMEDIATE")
        try:
            found = look(connection, path, namespace)
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
