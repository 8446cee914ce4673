"""The queries of a reader, which are the same for every store of SQL.

Paging is by keyset: a page begins at a place in the index, not at a count of rows, so it costs the same
however deep it is, and what is written meanwhile neither repeats nor hides a row.

The deletion of a large room goes in steps (store/merge.py). A query that names the room, or a memory, sees it done from
the first of them on: it also asks for the room's tombstone, which is one row. Listings by agent, entity or world alone,
and totals, see the room's memories go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from ..keys import Version
from ..records import Row
from . import Query, Totals
from .layout import Names


class SqlReader(ABC):
    """All of a :class:`~mnemobus.store.Reader` but the connection. SQL has ``?`` for its parameters."""

    _columns: ClassVar[str]
    """What :meth:`_row` takes: the fields of a Row in their order, its version packed."""
    _never: ClassVar[str]
    """Before every version, in SQL."""

    _names: Names

    @abstractmethod
    async def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query, in a transaction of its own; StoreUnavailable if there is no answer."""

    @abstractmethod
    def _key(self, id: str) -> Any:
        """An id as the store takes it."""

    @abstractmethod
    def _id(self, key: Any) -> str:
        """The id that the store gave."""

    async def get(self, id: str) -> Row | None:
        rows = await self._fetch(
            f"SELECT {self._columns} FROM {self._names.memories} AS m WHERE id = ? AND live AND NOT EXISTS (SELECT 1"
            f" FROM {self._names.room_tombstones} AS t"
            " WHERE t.tbl = m.tbl AND t.room = m.room AND t.version > m.put_version)",
            (self._key(id),),
        )
        return self._row(rows[0]) if rows else None

    async def recent(self, query: Query, limit: int) -> list[Row]:
        where, parameters = self._where(query)
        # What follows a place is nearest to it in the order of the index; else its end is what is wanted.
        forward = query.after is not None and query.before is None
        order = "created_us, id" if forward else "created_us DESC, id DESC"
        rows = await self._fetch(
            f"SELECT {self._columns} FROM {self._names.memories} WHERE {where} ORDER BY {order} LIMIT ?",
            [*parameters, limit],
        )
        return [self._row(row) for row in (reversed(rows) if forward else rows)]

    async def count(self, query: Query) -> int:
        where, parameters = self._where(query, tombstone=False)
        sql = f"SELECT count(*) FROM {self._names.memories} WHERE {where}"
        if query.room is not None:
            # The index alone knows how many there are, but not how old. Few rooms were ever deleted.
            guarded, more = self._where(query)
            buried = f"SELECT 1 FROM {self._names.room_tombstones} WHERE tbl = ? AND room = ?"
            sql = (
                f"SELECT CASE WHEN EXISTS ({buried}) THEN"
                f" (SELECT count(*) FROM {self._names.memories} WHERE {guarded}) ELSE ({sql}) END"
            )
            parameters = [query.table, query.room, *more, *parameters]
        rows = await self._fetch(sql, parameters)
        return int(rows[0][0])

    async def embedding_length(self, table: str) -> int | None:
        rows = await self._fetch(f"SELECT embedding_length FROM {self._names.tables} WHERE tbl = ?", (table,))
        return int(rows[0][0]) if rows else None

    async def totals(self) -> Totals:
        return Totals(
            dict(
                await self._fetch(
                    f"SELECT tbl, count(*) FROM {self._names.memories} WHERE live GROUP BY tbl ORDER BY tbl"
                )
            )
        )

    def _where(self, query: Query, *, tombstone: bool = True) -> tuple[str, list[Any]]:
        sql = "live AND tbl = ?"
        parameters: list[Any] = [query.table]
        for name in ("room", "agent", "entity", "world"):
            value = getattr(query, name)
            if value is not None:
                sql += f" AND {name} = ?"
                parameters.append(value)
        if tombstone and query.room is not None:
            buried = f"SELECT version FROM {self._names.room_tombstones} WHERE tbl = ? AND room = ?"
            sql += f" AND put_version > coalesce(({buried}), {self._never})"
            parameters += (query.table, query.room)
        for cursor, operator in ((query.before, "<"), (query.after, ">")):
            if cursor is not None:
                sql += f" AND (created_us, id) {operator} (?, ?)"
                parameters += (cursor.created_us, self._key(cursor.id))
        return sql, parameters

    def _row(self, row: tuple[Any, ...]) -> Row:
        return Row._make((self._id(row[0]), *row[1:10], Version.unpack(row[10])))
