"""The whole content of a database, in a form that is the same for both stores, so that tests can compare two stores."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import psycopg

from mnemobus.store.layout import prefixed

_MEMORIES = """
    SELECT {id}, m.tbl, m.room, agent, entity, world, created_us, content, metadata, embedding,
        put_version, content_version, metadata_version, embedding_version,
        -- A row's tombstone is its own or its room's, whichever is later: it may lag behind.
        CASE WHEN t.version > deleted_version THEN t.version ELSE deleted_version END
    FROM memories AS m LEFT JOIN room_tombstones AS t ON t.tbl = m.tbl AND t.room = m.room
"""
_REST = ("SELECT tbl, room, version FROM room_tombstones", "SELECT tbl, embedding_length FROM tables")


def named(url: str, statement: str) -> str:
    """A statement, given with bare table names, in the form for the store."""
    return prefixed(statement, "mnemobus_" if url.startswith("sqlite") else "mnemobus.")


def rows(url: str) -> list[tuple[Any, ...]]:
    """Every row with every column, of present and of deleted memories, in a fixed order."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            return _all(url, connection, "lower(hex(id))", "content, metadata")
    with psycopg.connect(url) as connection:
        return _all(url, connection, "replace(id::text, '-', '')", "content::text, metadata::text")


def _all(url: str, connection: Any, id: str, values: str) -> list[tuple[Any, ...]]:
    statements = [_MEMORIES.format(id=id).replace("content, metadata", values), *_REST]
    found = [row for sql in statements for row in connection.execute(named(url, sql)).fetchall()]
    return sorted(found, key=repr)


def texts(url: str) -> dict[str, str]:
    """The content of each present memory, by its id in hex."""
    return {row[0]: row[7] for row in rows(url) if len(row) > 3 and row[10] > row[14]}
