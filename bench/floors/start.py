"""From nothing to the first answer, by hand: a connection to Redis, one to the store, one query."""

from __future__ import annotations

import time
from pathlib import Path

import aiosqlite
import psycopg
from redis.asyncio import Redis

_QUERY = "SELECT content FROM {}memories LIMIT 1"


async def start(redis_url: str, database_url: str) -> float:
    """Seconds until the query is answered. The tables must be there (`store.prepare`)."""
    begin = time.perf_counter()
    client: Redis = Redis.from_url(redis_url)
    await client.ping()
    if database_url.startswith("sqlite"):
        lite = await aiosqlite.connect(Path(database_url.removeprefix("sqlite:///")))
        await lite.execute_fetchall(_QUERY.format("mnemobus_"))
        seconds = time.perf_counter() - begin
        await lite.close()
    else:
        connection = await psycopg.AsyncConnection.connect(database_url, autocommit=True)
        await connection.execute(_QUERY.format("mnemobus.").encode())
        seconds = time.perf_counter() - begin
        await connection.close()
    await client.aclose()
    return seconds
