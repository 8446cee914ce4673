"""LangGraph's store in PostgreSQL, without a cache: every call asks the database.

As in https://reference.langchain.com/python/langgraph.store.postgres/aio/AsyncPostgresStore: `from_conn_string`,
`setup`, a room is a namespace, `search` without a query returns its memories, the latest first, and many
writes are one `batch` of ``PutOp``. Once with asyncio, once without: their `batch` is the same.

With vectors, ``index`` names a function that embeds a ``text``. Here it looks up the vector that comes with the
memory, so no model takes any time. The index is ``flat``: vectors are stored and not indexed, as in mnemobus;
``ann`` chooses another index (``hnsw`` is LangGraph's default).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any, ClassVar, Literal

from langgraph.store.base import PutOp
from langgraph.store.postgres import AsyncPostgresStore, PostgresStore
from psycopg.errors import FeatureNotSupported

from . import Cannot, Item, Place, Unfit, Value

Address = tuple[tuple[str, ...], str]

_CANNOT: Cannot = {"bounded": "it keeps nothing in the process"}


class _Common:
    package: ClassVar[str] = "langgraph-checkpoint-postgres"
    cannot: ClassVar[Cannot] = _CANNOT
    ann: ClassVar[Literal["flat", "hnsw"]] = "flat"

    def __init__(self, place: Place) -> None:
        self._place = place
        self._vectors: dict[str, Sequence[float]] = {}
        self.loads = 0

    def address(self, room: str, id: str) -> Address:
        return (self._place.prefix, room), id

    def value(self, answer: Any) -> Value | None:
        return None if answer is None else answer.value

    def _index(self) -> Any:
        if not self._place.vectors:
            return None
        return {
            "dims": self._place.vectors,
            "embed": self._embed,
            "fields": ["text"],
            "ann_index_config": {"kind": self.ann},
        }

    def _setup(self) -> None:
        """Once for a database. The asyncio class's own refuses ``flat`` in 3.2: it runs the migration that makes an
        index whatever its condition says."""
        with PostgresStore.from_conn_string(self._place.database_url, index=self._index()) as store:
            try:
                store.setup()
            except FeatureNotSupported as error:
                raise Unfit(str(error).partition("\n")[0]) from None

    def _embed(self, texts: Sequence[str]) -> list[Any]:
        return [self._vectors[text] for text in texts]

    def _puts(self, items: Sequence[Item]) -> list[PutOp]:
        puts = []
        for item in items:
            if item.embedding is not None:
                self._vectors[item.value["text"]] = item.embedding
            namespace, key = self.address(item.room, item.id)
            puts.append(
                PutOp(namespace, key, item.value, index=None if item.embedding is not None else False)
            )
        return puts


class AsyncStore(_Common):
    name: ClassVar[str] = "LangGraph AsyncPostgresStore"
    sync: ClassVar[Literal[False]] = False

    async def open(self) -> None:
        self._stack = AsyncExitStack()
        opening = AsyncPostgresStore.from_conn_string(self._place.database_url, index=self._index())
        await asyncio.to_thread(self._setup)
        self._store = await self._stack.enter_async_context(opening)

    async def close(self) -> None:
        await self._stack.aclose()
        # Its task, which collects single calls into batches, ends only with the object.
        del self._store
        await asyncio.sleep(0)

    async def get(self, address: Address, /) -> Any:
        self.loads += 1
        return await self._store.aget(*address)

    async def recent(self, room: str, limit: int) -> Sequence[Any]:
        self.loads += 1
        return await self._store.asearch((self._place.prefix, room), limit=limit)

    async def put(self, item: Item) -> None:
        if item.embedding is not None:
            self._vectors[item.value["text"]] = item.embedding
        index = None if item.embedding is not None else False
        await self._store.aput(*self.address(item.room, item.id), item.value, index=index)
        self._vectors.clear()

    async def write_many(self, items: Sequence[Item]) -> None:
        await self._store.abatch(self._puts(items))
        self._vectors.clear()

    async def forget(self, address: Address) -> None:
        """There is nothing to forget."""


class SyncStore(_Common):
    name: ClassVar[str] = "LangGraph PostgresStore"
    sync: ClassVar[Literal[True]] = True

    def open(self) -> None:
        self._setup()
        self._stack = ExitStack()
        opening = PostgresStore.from_conn_string(self._place.database_url, index=self._index())
        self._store = self._stack.enter_context(opening)

    def close(self) -> None:
        self._stack.close()

    def get(self, address: Address, /) -> Any:
        self.loads += 1
        return self._store.get(*address)

    def recent(self, room: str, limit: int) -> Sequence[Any]:
        self.loads += 1
        return self._store.search((self._place.prefix, room), limit=limit)

    def put(self, item: Item) -> None:
        self.write_many([item])

    def write_many(self, items: Sequence[Item]) -> None:
        self._store.batch(self._puts(items))
        self._vectors.clear()

    def forget(self, address: Address) -> None:
        """There is nothing to forget."""
