"""Ways to keep a conversation for agents: mnemobus and its alternatives, each used in its best way.

All do the same: read the context of a turn (the room's newest messages and the newest facts about a person, in one
call and, if the library can, in one round trip), write a message, write a fact. An answer stays in the library's own
form; `ids` extracts its content, newest first, and is not timed.

| | keeps the conversation in | cache in front of it |
|---|---|---|
| mnemobus | the log and PostgreSQL | copies in the process, kept current from the log |
| psycopg | PostgreSQL | nothing: a pool of connections, prepared statements, one statement a context |
| cashews | PostgreSQL, as psycopg | copies in the process, and in Redis; the writer deletes them |
| redis-py | Redis lists | its own client-side caching |
| plain Redis | Redis lists | nothing: a pipeline |
| LangGraph | PostgreSQL, by its store | nothing |

Those on Redis lists have no database: they lose what Redis loses, and keep the newest of each list only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Protocol

import orjson
import psycopg

import mnemobus
from mnemobus import Memory

from .measure import OURS

MESSAGES, FACTS = 5, 6
"""How many of each a context has: the defaults of `Bus.context`."""
KEPT = 64
"""Entries of a list in Redis: as many as a window of mnemobus has."""
POOL = 8
"""Most connections of a process to PostgreSQL: the default of mnemobus."""

Found = tuple[Sequence[str], Sequence[str]]
"""Ids of messages and of facts, newest first."""


class Keeper(Protocol):
    """The way in which the agents of one process keep a conversation."""

    title: ClassVar[str]

    def __init__(self, place: Mapping[str, str]) -> None:
        """place: ``redis_url``, ``database_url`` and ``prefix``, which separates it from others."""

    async def open(self, stack: AsyncExitStack) -> None: ...
    async def context(self, room: str, entity: str) -> Any: ...
    async def say(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None: ...
    async def note(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None: ...
    def ids(self, answer: Any) -> Found: ...


class Mnemobus:
    """The settings are those of the environment."""

    title: ClassVar[str] = OURS

    def __init__(self, place: Mapping[str, str]) -> None:
        """It needs nothing from the place."""

    async def open(self, stack: AsyncExitStack) -> None:
        self.bus = await stack.enter_async_context(mnemobus.connect())

    async def context(self, room: str, entity: str) -> mnemobus.Context:
        return await self.bus.context(room=room, entity=entity)

    async def say(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self.bus.write(Memory(id=id, table="messages", room=room, entity=entity, content=content))

    async def note(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self.bus.write(Memory(id=id, table="facts", room=room, entity=entity, content=content))

    def ids(self, answer: mnemobus.Context) -> Found:
        return [str(m.id) for m in answer.messages], [str(m.id) for m in answer.facts]


_SCHEMA = """
CREATE TABLE IF NOT EXISTS said (n bigint GENERATED ALWAYS AS IDENTITY, id uuid PRIMARY KEY, kind text NOT NULL,
    place text NOT NULL, content text NOT NULL);
CREATE INDEX IF NOT EXISTS said_newest ON said (kind, place, n DESC);
"""


def prepare(database_url: str) -> None:
    """The table that psycopg's contestants share, and LangGraph's."""
    from langgraph.store.postgres import PostgresStore

    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(_SCHEMA.encode())
    with PostgresStore.from_conn_string(database_url) as store:
        store.setup()


class Psycopg:
    """A table with the index that its query needs. A context is one statement: two, in a pipeline, take half as long
    again."""

    title: ClassVar[str] = "psycopg, no cache"

    _NEWEST = "SELECT kind, id, content FROM said WHERE kind = %s AND place = %s ORDER BY n DESC LIMIT %s"
    _CONTEXT = f"({_NEWEST}) UNION ALL ({_NEWEST})".encode()
    _WRITE = b"INSERT INTO said (id, kind, place, content) VALUES (%s, %s, %s, %s)"

    def __init__(self, place: Mapping[str, str]) -> None:
        self._url = place["database_url"]
        self._prefix = place["prefix"]

    async def open(self, stack: AsyncExitStack) -> None:
        from psycopg_pool import AsyncConnectionPool

        options = {"autocommit": True, "prepare_threshold": 0}
        pool = AsyncConnectionPool(self._url, min_size=POOL, max_size=POOL, kwargs=options, open=False)
        self.pool = await stack.enter_async_context(pool)
        await self.pool.wait()

    async def context(self, room: str, entity: str) -> list[tuple[Any, ...]]:
        values = ("m", self._prefix + room, MESSAGES, "f", self._prefix + entity, FACTS)
        async with self.pool.connection() as connection:
            cursor = await connection.execute(self._CONTEXT, values, binary=True)
            return await cursor.fetchall()

    async def newest(self, kind: str, place: str, limit: int) -> list[tuple[Any, ...]]:
        async with self.pool.connection() as connection:
            query = self._NEWEST.encode()
            cursor = await connection.execute(query, (kind, self._prefix + place, limit), binary=True)
            return await cursor.fetchall()

    async def say(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._write("m", room, id, content)

    async def note(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._write("f", entity, id, content)

    async def _write(self, kind: str, place: str, id: str, content: dict[str, Any]) -> None:
        values = (id, kind, self._prefix + place, orjson.dumps(content).decode())
        async with self.pool.connection() as connection:
            await connection.execute(self._WRITE, values)

    def ids(self, answer: list[tuple[Any, ...]]) -> Found:
        return (
            [str(row[1]) for row in answer if row[0] == "m"],
            [str(row[1]) for row in answer if row[0] == "f"],
        )


class Cashews:
    """A cache in front of the same table: psycopg loads what is not in it; the writer deletes the listing. See
    alternatives/cashews.py for ``protocol``."""

    title: ClassVar[str] = "cashews, client side, before psycopg"
    _TTL = 300

    def __init__(self, place: Mapping[str, str]) -> None:
        self._source = Psycopg(place)
        self._redis_url, self._prefix = place["redis_url"], place["prefix"]

    async def open(self, stack: AsyncExitStack) -> None:
        from cashews import Cache

        await self._source.open(stack)
        self._cache = Cache()
        self._cache.setup(
            self._redis_url,
            client_side=True,
            client_side_prefix=f"{self._prefix}:c:",
            suppress=False,
            protocol=2,
        )
        await self._cache.init()
        stack.push_async_callback(self._cache.close)

    async def context(self, room: str, entity: str) -> tuple[Any, Any]:
        said, known = await self._cache.get("m:" + room), await self._cache.get("f:" + entity)
        if said is None and known is None:
            said, known = await asyncio.gather(
                self._load("m", room, MESSAGES), self._load("f", entity, FACTS)
            )
        elif said is None:
            said = await self._load("m", room, MESSAGES)
        elif known is None:
            known = await self._load("f", entity, FACTS)
        return said, known

    async def _load(self, kind: str, place: str, limit: int) -> list[tuple[Any, ...]]:
        rows = await self._source.newest(kind, place, limit)
        await self._cache.set(f"{kind}:{place}", rows, expire=self._TTL)
        return rows

    async def say(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._source.say(room, entity, id, content)
        await self._cache.delete("m:" + room)

    async def note(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._source.note(room, entity, id, content)
        await self._cache.delete("f:" + entity)

    def ids(self, answer: tuple[Any, Any]) -> Found:
        said, known = answer
        return [str(row[1]) for row in said], [str(row[1]) for row in known]


class PlainRedis:
    """A list for each room and each entity, the newest first, cut to its newest entries."""

    title: ClassVar[str] = "plain Redis lists"

    def __init__(self, place: Mapping[str, str]) -> None:
        self._url, self._prefix = place["redis_url"], place["prefix"]

    async def open(self, stack: AsyncExitStack) -> None:
        from redis.asyncio import Redis

        self._client: Redis = Redis.from_url(self._url)
        stack.push_async_callback(self._client.aclose)
        await self._client.ping()

    def _key(self, kind: str, place: str) -> str:
        return f"{self._prefix}:{kind}:{place}"

    async def context(self, room: str, entity: str) -> list[list[bytes]]:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.lrange(self._key("m", room), 0, MESSAGES - 1)
            pipe.lrange(self._key("f", entity), 0, FACTS - 1)
            return await pipe.execute()

    async def say(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._push(self._key("m", room), id, content)

    async def note(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._push(self._key("f", entity), id, content)

    async def _push(self, key: str, id: str, content: dict[str, Any]) -> None:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.lpush(key, orjson.dumps({"id": id, **content}))
            pipe.ltrim(key, 0, KEPT - 1)
            await pipe.execute()

    def ids(self, answer: list[list[bytes]]) -> Found:
        return _listed(answer[0]), _listed(answer[1])


def _listed(entries: Sequence[bytes]) -> list[str]:
    return [orjson.loads(entry)["id"] for entry in entries]


class RedisPy:
    """The same lists through redis-py's client-side caching, which only its synchronous client has; see
    alternatives/redis_py.py. A call blocks the event loop while it runs: a hop to a thread would take longer."""

    title: ClassVar[str] = "redis-py client-side caching"

    def __init__(self, place: Mapping[str, str]) -> None:
        self._url, self._prefix = place["redis_url"], place["prefix"]

    async def open(self, stack: AsyncExitStack) -> None:
        from redis import Redis
        from redis.cache import CacheConfig
        from redis.exceptions import RedisError

        from .alternatives import Unfit

        self._client = Redis.from_url(self._url, protocol=3, cache_config=CacheConfig(max_size=10_000))
        stack.callback(self._client.close)
        try:
            self._client.ping()
        except RedisError as error:
            if "caching" in str(error):
                raise Unfit(str(error)) from None
            raise

    def _key(self, kind: str, place: str) -> str:
        return f"{self._prefix}:{kind}:{place}"

    async def context(self, room: str, entity: str) -> tuple[Any, Any]:
        return (
            self._client.lrange(self._key("m", room), 0, MESSAGES - 1),
            self._client.lrange(self._key("f", entity), 0, FACTS - 1),
        )

    async def say(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        self._push(self._key("m", room), id, content)

    async def note(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        self._push(self._key("f", entity), id, content)

    def _push(self, key: str, id: str, content: dict[str, Any]) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.lpush(key, orjson.dumps({"id": id, **content}))
            pipe.ltrim(key, 0, KEPT - 1)
            pipe.execute()

    def ids(self, answer: tuple[Any, Any]) -> Found:
        return _listed(answer[0]), _listed(answer[1])


class LangGraph:
    """AsyncPostgresStore on a pool: a room and an entity are namespaces. It batches simultaneous calls."""

    title: ClassVar[str] = "LangGraph AsyncPostgresStore"

    def __init__(self, place: Mapping[str, str]) -> None:
        self._url, self._prefix = place["database_url"], place["prefix"]

    async def open(self, stack: AsyncExitStack) -> None:
        from langgraph.store.postgres import AsyncPostgresStore

        opening = AsyncPostgresStore.from_conn_string(
            self._url, pool_config={"min_size": POOL, "max_size": POOL}
        )
        self._store = await stack.enter_async_context(opening)
        stack.callback(self._forget)

    def _forget(self) -> None:
        del self._store  # its task, which gathers calls, ends only with the object

    async def context(self, room: str, entity: str) -> list[Any]:
        return await asyncio.gather(
            self._store.asearch((self._prefix, "m", room), limit=MESSAGES),
            self._store.asearch((self._prefix, "f", entity), limit=FACTS),
        )

    async def say(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._store.aput((self._prefix, "m", room), id, content, index=False)

    async def note(self, room: str, entity: str, id: str, content: dict[str, Any]) -> None:
        await self._store.aput((self._prefix, "f", entity), id, content, index=False)

    def ids(self, answer: list[Any]) -> Found:
        said, known = answer
        return [item.key for item in said], [item.key for item in known]


KEEPERS: dict[str, type[Any]] = {
    "mnemobus": Mnemobus,
    "psycopg": Psycopg,
    "cashews": Cashews,
    "redis-py": RedisPy,
    "plain-redis": PlainRedis,
    "langgraph": LangGraph,
}


def title(who: str) -> str:
    return str(KEEPERS[who].title)
