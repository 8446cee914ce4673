"""The SQL of SQLite for what a worker does: one batch, the identity of the store."""

from __future__ import annotations

from typing import Any

from .. import merge
from ..layout import Names
from ..merge import Delta

ROWS = 250
"""Rows of a statement that merges many at once."""


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


class SqliteStatements:
    """What a batch asks of the database, with the names of its tables."""

    def __init__(self, names: Names) -> None:
        self.upsert = _upsert(names, 1)
        self.upsert_many = _upsert(names, ROWS)
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


def row_of(d: Delta) -> tuple[Any, ...]:
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
