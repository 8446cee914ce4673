"""Floors of reads: from a dict, from Redis, from the store."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiosqlite
import psycopg
from psycopg.types.json import set_json_loads
from redis.asyncio import Redis

from mnemobus.store.postgres import PostgresReader
from mnemobus.store.sqlite import SqliteReader

K = TypeVar("K")
V = TypeVar("V")


def held(values: Mapping[K, V]) -> Callable[[K], Awaitable[V]]:
    """A coroutine function that looks up a key in a dict: the least cost of any await."""

    async def get(key: K) -> V:
        return values[key]

    return get


class Hash:
    """Hashes in Redis, as in L2, read by a bare HGET."""

    async def open(self, redis_url: str) -> None:
        self.client: Redis = Redis.from_url(redis_url)
        await self.client.ping()
        self.get = self.client.hget
        """``await get(key, field)``: bytes or None."""

    async def close(self) -> None:
        await self.client.aclose()


Rows = list[tuple[Any, ...]]


class Cold(Protocol):
    """A read that finds nothing in Redis, asks the store, and leaves the answer in Redis: HGET, the query, HSET."""

    async def open(self, redis_url: str, database_url: str) -> None: ...
    async def close(self) -> None: ...
    async def get(self, id: str) -> Rows: ...
    async def recent(self, table: str, room: str, limit: int) -> Rows: ...


class _Cold:
    def __init__(self, prefix: str = "bench") -> None:
        self._prefix = prefix

    async def open(self, redis_url: str, database_url: str) -> None:
        self._redis: Redis = Redis.from_url(redis_url)
        await self._redis.ping()
        await self._connect(database_url)

    async def close(self) -> None:
        await self._disconnect()
        await self._redis.aclose()

    async def get(self, id: str) -> Rows:
        return await self._read(f"{self._prefix}:id:{id}", self._one, (self._key(id),))

    async def recent(self, table: str, room: str, limit: int) -> Rows:
        return await self._read(f"{self._prefix}:room:{table}:{room}", self._many, (table, room, limit))

    async def _read(self, key: str, query: str, parameters: tuple[Any, ...]) -> Rows:
        # Even if an earlier read left an answer there, this one asks the store.
        await self._redis.hget(key, "none")
        rows = await self._fetch(query, parameters)
        await self._redis.hset(key, "q", b"\n".join(row[6] for row in rows))
        return rows

    _one: str
    _many: str

    def _key(self, id: str) -> Any:
        raise NotImplementedError

    async def _connect(self, database_url: str) -> None:
        raise NotImplementedError

    async def _disconnect(self) -> None:
        raise NotImplementedError

    async def _fetch(self, query: str, parameters: tuple[Any, ...]) -> Rows:
        raise NotImplementedError


class ColdPostgres(_Cold):
    _one = f"SELECT {PostgresReader._columns} FROM mnemobus.memories WHERE id = %s AND live"
    _many = (
        f"SELECT {PostgresReader._columns} FROM mnemobus.memories WHERE live AND tbl = %s AND room = %s"
        " ORDER BY created_us DESC, id DESC LIMIT %s"
    )

    def _key(self, id: str) -> Any:
        return uuid.UUID(id)

    async def _connect(self, database_url: str) -> None:
        self._connection = await psycopg.AsyncConnection.connect(database_url, autocommit=True)
        set_json_loads(bytes, self._connection)  # as it is, unparsed

    async def _disconnect(self) -> None:
        await self._connection.close()

    async def _fetch(self, query: str, parameters: tuple[Any, ...]) -> Rows:
        async with self._connection.cursor(binary=True) as cursor:
            await cursor.execute(query.encode(), parameters)
            return await cursor.fetchall()


class ColdSqlite(_Cold):
    _one = f"SELECT {SqliteReader._columns} FROM mnemobus_memories WHERE id = ? AND live"
    _many = (
        f"SELECT {SqliteReader._columns} FROM mnemobus_memories WHERE live AND tbl = ? AND room = ?"
        " ORDER BY created_us DESC, id DESC LIMIT ?"
    )

    def _key(self, id: str) -> Any:
        return uuid.UUID(id).bytes

    async def _connect(self, database_url: str) -> None:
        path = Path(database_url.removeprefix("sqlite:///"))
        self._connection = await aiosqlite.connect(path, isolation_level=None)

    async def _disconnect(self) -> None:
        await self._connection.close()

    async def _fetch(self, query: str, parameters: tuple[Any, ...]) -> Rows:
        return list(await self._connection.execute_fetchall(query, parameters))  # type: ignore[arg-type]


def cold(database_url: str) -> Cold:
    return ColdSqlite() if database_url.startswith("sqlite") else ColdPostgres()
