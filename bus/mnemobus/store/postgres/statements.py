"""The SQL of PostgreSQL for what a worker does: one batch, the identity of the store, the epoch of the server."""

from __future__ import annotations

from collections.abc import Sequence

from .. import merge
from ..layout import Names
from ..merge import Delta
from .arrays import INT4, INT4S, INT8, UUID, Array, Byteas, Int8s, Jsons, Texts, Uuids, texts, uuids
from .connections import Prepared

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


class PostgresStatements:
    """What a batch asks of the server, with the names of its tables."""

    def __init__(self, names: Names) -> None:
        merging = merge.merging("greatest", "IS NOT DISTINCT FROM", names.room_tombstones, "''::bytea")
        self.upsert = _UPSERT.format(
            memories=names.memories, room_tombstones=names.room_tombstones, merging=merging
        ).encode()
        erasing = merge.erasing("greatest", "%(version)s")
        arrays: tuple[type[Array], ...] = (Uuids, *[Texts] * 5, Int8s, *[Jsons] * 2, *[Byteas] * 6)
        self.at_once = Prepared(
            b"mnemobus_upsert",
            _numbered(
                self.upsert.replace(
                    b") AS batch\n",
                    f") AS batch WHERE coalesce((SELECT store FROM {names.identity}) = %s, true)\n".encode(),
                )
            ),
            (*(array.oid for array in arrays), UUID),
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
        self.share_at_once = Prepared(b"mnemobus_share", _numbered(self.share), (INT4, INT4S))
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


PLACE = (
    b"SELECT system_identifier || '/' || (SELECT oid FROM pg_database WHERE datname = current_database()),"
    b" CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END"
    b" FROM pg_control_system()"
)
"""What a copy of the database does not share, and the timeline of the server. Not every service lets one ask."""


def columns(deltas: Sequence[Delta]) -> tuple[Array, ...]:
    """The parameters of an upsert."""
    tables, rooms, agents, entities, worlds = zip(*(d.dimensions for d in deltas), strict=True)
    return (
        uuids(d.id for d in deltas),
        texts(tables),
        texts(rooms),
        texts(agents),
        texts(entities),
        texts(worlds),
        Int8s.of([INT8.pack(d.created_us) for d in deltas]),
        Jsons.of([d.content for d in deltas]),
        Jsons.of([d.metadata for d in deltas]),
        Byteas.of([d.embedding for d in deltas]),
        Byteas.of([d.put for d in deltas]),
        Byteas.of([d.content_version for d in deltas]),
        Byteas.of([d.metadata_version for d in deltas]),
        Byteas.of([d.embedding_version for d in deltas]),
        Byteas.of([d.deleted for d in deltas]),
    )
