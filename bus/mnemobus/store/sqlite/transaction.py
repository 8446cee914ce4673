"""One transaction of a worker: the steps of `merge.apply` in SQLite's words."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

from ...keys import Dimensions
from .. import Cursor, Deletion, merge
from ..merge import Delta, Room
from .statements import ROWS, SqliteStatements, row_of


class SqliteTransaction:
    """The steps of :func:`merge.apply`, between BEGIN IMMEDIATE and COMMIT: nobody else writes meanwhile."""

    def __init__(self, connection: sqlite3.Connection, statements: SqliteStatements) -> None:
        self._execute = connection.execute
        self._executemany = connection.executemany
        self._sql = statements

    def share(self, rooms: Collection[Room]) -> None:
        pass

    def exclude(self, rooms: Collection[Room]) -> None:
        pass

    def bury(self, rooms: Mapping[Room, bytes]) -> None:
        self._executemany(self._sql.bury, [(*room, version) for room, version in rooms.items()])

    def lengths(self, tables: Collection[str]) -> dict[str, int]:
        found = {}
        for table in tables:
            for (length,) in self._execute(self._sql.length, (table,)):
                found[table] = length
        return found

    def claim(self, lengths: Mapping[str, int]) -> None:
        self._executemany(self._sql.claim, lengths.items())

    def dimensions(self, ids: Collection[str]) -> dict[str, Dimensions]:
        found = {}
        for id in ids:
            for row in self._execute(self._sql.dimensions, (uuid.UUID(id).bytes,)):
                found[id] = Dimensions(*row)
        return found

    def stored(self, id: str, room: Room) -> merge.Stored | None:
        for *dimensions, put, deleted, buried in self._execute(
            self._sql.stored, (*room, uuid.UUID(id).bytes)
        ):
            return merge.Stored(Dimensions(*dimensions), put, deleted, buried)
        return None

    def remove(self, id: str) -> None:
        self._execute(self._sql.remove, (uuid.UUID(id).bytes,))

    def upsert(self, deltas: Sequence[Delta]) -> list[str]:
        won: list[str] = []
        many = len(deltas) // ROWS * ROWS
        for first in range(0, many, ROWS):
            won += self._upsert_many(deltas[first : first + ROWS])
        return won + self._upsert_each(deltas[many:])

    def _upsert_many(self, deltas: Sequence[Delta]) -> list[str]:
        """All of them in one statement: while it runs, the process's other threads do. It tells how many rows it
        changed, not which. If it did not change all of them, it is rolled back, and done again row by row."""
        self._execute("SAVEPOINT many")
        rows = chain.from_iterable(map(row_of, deltas))
        if self._execute(self._sql.upsert_many, tuple(rows)).rowcount == len(deltas):
            won = [delta.id for delta in deltas]
        else:
            self._execute("ROLLBACK TO many")
            won = self._upsert_each(deltas)
        self._execute("RELEASE many")
        return won

    def _upsert_each(self, deltas: Sequence[Delta]) -> list[str]:
        return [delta.id for delta in deltas if self._execute(self._sql.upsert, row_of(delta)).rowcount]

    def clear(self, deletion: Deletion, after: Cursor, rows: int) -> Cursor | None:
        table, room = deletion.room
        parameters = {
            "table": table,
            "room": room,
            "version": deletion.versions[-1],
            "created_us": after.created_us,
            "id": uuid.UUID(after.id).bytes,
            "rows": rows,
        }
        chunk = self._execute(self._sql.chunk, parameters).fetchall()
        if chunk:
            created_us, id = chunk[-1]
            self._execute(self._sql.clear, {**parameters, "last_us": created_us, "last": id})
        if len(chunk) == rows:
            return Cursor(created_us, str(uuid.UUID(bytes=id)))
        return after if self._execute(self._sql.erase, parameters).rowcount == rows else None

    def ended(self, deletion: Deletion, most: int) -> list[tuple[str, Dimensions]]:
        found: list[tuple[str, Dimensions]] = []
        for version in deletion.versions:
            rows = self._execute(self._sql.ended, (*deletion.room, version, 0)).fetchmany(most - len(found))
            found += [(str(uuid.UUID(bytes=id)), Dimensions(*dimensions)) for _, id, *dimensions in rows]
        return found
