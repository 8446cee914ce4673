"""Reads that L1 could not answer at once: from a call to a query, and its place in each tier.

`Bus` itself asks L1, which saves a call on every hit. A query that misses goes on to cache/read_path.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cache.l1 import MISS, Key, LocalCache
from .cache.query import COUNT, GET, GET_FIELD, MANY, ONE, Plan, field_of
from .cache.read_path import ReadPath
from .errors import InvalidQuery
from .keys import id_scope
from .known import Known
from .live.scopes import LiveScopes
from .memory import Memories, Memory
from .store import Query, Reader

MAX_LIMIT = 10_000
"""Memories that one query returns at most."""


class Reads:
    """The reads of one bus.

    check  raises if the bus may not be used, here and now
    """

    def __init__(
        self,
        reader: Reader,
        local: LocalCache,
        live: LiveScopes,
        path: ReadPath,
        known: Known,
        check: Callable[[], None],
    ) -> None:
        self.reader = reader
        self._local = local
        self._live = live
        self._path = path
        self._known = known
        self._check = check

    async def get(self, id: str) -> Memory | None:
        """The memory with an id, in its canonical spelling."""
        found = self._local.hit(id, GET)  # the caller may have spelled it otherwise
        if found is not MISS:
            return found  # type: ignore[no-any-return]

        async def find() -> list[Memory]:
            row = await self.reader.get(id)
            return [] if row is None else [row.memory()]

        known = self._known.dimensions(id) or self._live.dimensions(id_scope(id))
        window = None if known is None else Query(known.table, known.room)
        memory: Memory | None = await self._answer(
            Plan(id_scope(id), id, "", GET, GET_FIELD, find, ONE, window, 1)
        )
        if memory is not None:
            memory._share_id(id)
        return memory

    async def recent(self, scope: str, key: Key, query: Query, limit: int) -> Memories:
        """The newest memories; ``scope`` and ``key`` name the answer in L1."""
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidQuery(f"limit must be between 1 and {MAX_LIMIT}, not {limit!r}")

        async def find() -> list[Memory]:
            return [row.memory() for row in await self.reader.recent(query, limit)]

        plan = Plan(
            scope,
            scope,
            query.table,
            key,
            field_of("recent", query, limit),
            find,
            MANY,
            _window(query),
            limit,
        )
        return await self._answer(plan)  # type: ignore[no-any-return]

    async def count(self, scope: str, key: Key, query: Query) -> int:
        """How many there are; ``scope`` and ``key`` name the answer in L1."""

        async def find() -> int:
            return await self.reader.count(query)

        plan = Plan(scope, scope, query.table, key, field_of("count", query, 0), find, COUNT, _window(query))
        return await self._answer(plan)  # type: ignore[no-any-return]

    async def _answer(self, plan: Plan) -> Any:
        self._check()
        return await self._path.read(plan)


def _window(query: Query) -> Query | None:
    """The query, if a window may answer it: pages are not kept live."""
    return query if query.before is None and query.after is None else None
