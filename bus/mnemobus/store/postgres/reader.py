"""How agents read from PostgreSQL. The queries themselves are in store/queries.py."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from ...errors import SchemaError, StoreUnavailable
from ...settings import Settings
from .. import Identity, Totals, migrations
from ..layout import TABLES
from ..queries import SqlReader
from . import schema
from .connections import AsyncConnections
from .server import PostgresServer
from .statements import PLACE

logger = logging.getLogger("mnemobus.store")


_COUNTED_PAGES, _SAMPLED_PAGES = 20_000, 5_000
"""Pages of the table up to which totals are counted, and which are read of a larger one."""
_COUNTED_ROWS = 10_000

# From one table's name to the next, through the index.
_TABLES_IN = """
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
        self._server = PostgresServer(settings)
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
        place = schema.place_in(self._server, await self._query(schema.LOOK, (list(TABLES),)))
        if place is None:
            return 0
        return schema.found_in(place, await self._query(schema.number_in(place))).number

    async def identity(self) -> Identity:
        try:
            [(place, history)] = await self._query(PLACE)
        except (StoreUnavailable, SchemaError) as error:
            logger.debug("can't tell where the store is: %s", error)
            place = history = ""
        [row] = await self._fetch(self._server.sql.identity.decode())
        return self._server.identity_of(row, place, history)

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
        for (table,) in await self._fetch(_TABLES_IN.format(memories=memories)):
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
                        await asyncio.to_thread(schema.upgrade, self._server)
                    except psycopg.Error as error:
                        raise self._server.error(error) from error
                    number = await self.schema()
                migrations.check_number(number, self._server.where)
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
