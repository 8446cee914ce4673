"""One transaction of a worker: the steps of `merge.apply` in PostgreSQL's words."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, LiteralString

import psycopg
from psycopg import Connection

from ...keys import Dimensions
from .. import Cursor, Deletion, merge
from ..merge import Delta, Room
from .arrays import Byteas, texts, uuids
from .connections import Session
from .locks import LOCKS, lock_slot
from .server import PostgresServer
from .statements import PostgresStatements, columns


@contextmanager
def transaction_on(
    server: PostgresServer, link: Session, patience: float = 1.0
) -> Iterator[PostgresTransaction]:
    """A transaction, committed at the end."""
    # What returns nothing goes along with what follows it: a batch takes two round trips, for its upsert and for
    # COMMIT. psycopg's own transaction() would take two more.
    pipeline = link.pipeline() if psycopg.Pipeline.is_supported() else nullcontext()
    try:
        with pipeline as sending:
            server.begin(link, patience)
            yield PostgresTransaction(link, sending, server.sql)
            link.execute(b"COMMIT")
    except BaseException:
        if not link.closed:
            link.rollback()
        raise


class PostgresTransaction:
    """The steps of :func:`merge.apply`."""

    def __init__(
        self, connection: Connection[Any], pipeline: psycopg.Pipeline | None, statements: PostgresStatements
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
        self._locked = self._execute(self._sql.share, (LOCKS, sorted(set(map(lock_slot, rooms)))))

    def be_patient(self, seconds: float) -> None:
        """For how long to wait for a lock."""
        self._execute("SELECT set_config('lock_timeout', %s, true)", (str(round(seconds * 1000)),))

    def exclude(self, rooms: Collection[Room]) -> None:
        self._locked = self._execute(self._sql.exclude, (LOCKS, sorted(set(map(lock_slot, rooms)))))

    def bury(self, rooms: Mapping[Room, bytes]) -> None:
        for room, version in sorted(rooms.items()):
            self._execute(self._sql.bury, (*room, version))

    def lengths(self, tables: Collection[str]) -> dict[str, int]:
        rows = self.run(self._sql.lengths, (texts(sorted(tables)),))
        return dict(rows)

    def claim(self, lengths: Mapping[str, int]) -> None:
        for table, length in sorted(lengths.items()):
            self._execute(self._sql.claim, (table, length))

    def dimensions(self, ids: Collection[str]) -> dict[str, Dimensions]:
        rows = self.run(self._sql.dimensions, (uuids(ids),))
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
        return [id for (id,) in self.run(self._sql.upsert, columns(deltas))]

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
        rows = self.run(self._sql.ended + b" LIMIT %s", (*deletion.room, Byteas.of(deletion.versions), most))
        return [(id, Dimensions(*dimensions)) for id, *dimensions in rows]
