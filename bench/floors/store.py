"""The simplest upsert into mnemobus's own table: it compares no version, and reads no tombstone.

Only for puts: an entry with another op is an error here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import psycopg

from mnemobus import Settings
from mnemobus.keys import Version
from mnemobus.store import open_writer

Entry = tuple[bytes, Mapping[bytes, bytes]]
"""An entry of the log, as redis-py returns it: its ID, its fields."""


class Sink(Protocol):
    def commit(self, entries: Iterable[Entry]) -> None:
        """One transaction with the rows of all these entries; if an id occurs twice, the last one counts."""

    def close(self) -> None: ...


def prepare(database_url: str) -> None:
    """The tables and indexes that mnemobus has."""
    writer = open_writer(Settings.load(database_url=database_url))
    writer.open()
    writer.close()


def sink(database_url: str) -> Sink:
    return Sqlite(database_url) if database_url.startswith("sqlite") else Postgres(database_url)


Row = tuple[Any, ...]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def rows(entries: Iterable[Entry]) -> list[Row]:
    """id, tbl, room, agent, entity, world, created_us, content, metadata, embedding, version."""
    found: dict[bytes, Row] = {}
    for version, entry in entries:
        if entry[b"op"] != b"put":
            raise ValueError(f"a floor puts, and nothing else: {entry[b'op']!r}")
        found[entry[b"id"]] = (
            entry[b"id"].decode(),
            entry[b"table"].decode(),
            entry[b"room"].decode(),
            _text(entry.get(b"agent")),
            _text(entry.get(b"entity")),
            _text(entry.get(b"world")),
            int(entry[b"at"]),
            entry[b"content"].decode(),
            entry[b"metadata"].decode(),
            entry.get(b"embedding"),
            Version.parse(version).pack(),
        )
    return list(found.values())


_COLUMNS = (
    "id, tbl, room, agent, entity, world, created_us, content, metadata, embedding, put_version,"
    " content_version, metadata_version, embedding_version, deleted_version"
)
_CONFLICT = """
    ON CONFLICT (id) DO UPDATE SET created_us = excluded.created_us, content = excluded.content,
    metadata = excluded.metadata, embedding = excluded.embedding, put_version = excluded.put_version
"""


class Postgres:
    """One statement with an array for each column, binary."""

    _UPSERT = f"""
        INSERT INTO mnemobus.memories ({_COLUMNS})
        SELECT id::uuid, tbl, room, agent, entity, world, created_us, content::json, metadata::json, embedding, version,
            '', '', '', ''
        FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bigint[], %b::text[],
            %b::text[], %b::bytea[], %b::bytea[])
        AS n (id, tbl, room, agent, entity, world, created_us, content, metadata, embedding, version)
        {_CONFLICT}
    """.encode()

    def __init__(self, database_url: str) -> None:
        self._connection = psycopg.connect(database_url, autocommit=True)

    def commit(self, entries: Iterable[Entry]) -> None:
        columns = [list(column) for column in zip(*rows(entries), strict=True)]
        self._connection.execute(self._UPSERT, columns)

    def close(self) -> None:
        self._connection.close()


class Sqlite:
    """One `executemany` in one transaction, as durable as mnemobus commits."""

    _UPSERT = (
        f"INSERT INTO mnemobus_memories ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, x'', x'', x'', x'')"
        + _CONFLICT
    )

    def __init__(self, database_url: str) -> None:
        path = Path(database_url.removeprefix("sqlite:///"))
        self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")

    def commit(self, entries: Iterable[Entry]) -> None:
        batch = [(bytes.fromhex(row[0].replace("-", "")), *row[1:]) for row in rows(entries)]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(self._UPSERT, batch)
        self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()
