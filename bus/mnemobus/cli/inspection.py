"""Read-only access to Redis. It does not use the handshake that opens a bus: that would write a layout and an epoch,
and would refuse a faulty server before its problems could be found."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import NoPermissionError, RedisError
from redis.maint_notifications import MaintNotificationsConfig

from ..connection.link import Link, parse_info
from ..connection.server_errors import SENSELESS
from ..connection.transport import Command
from ..health.vitals import table, text
from ..keys import LAYOUT, Keyspace, Shape
from ..settings import Settings


@asynccontextmanager
async def looking_at(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    """A client for the server in the settings, for `ask`: replies are as the server sent them.

    It raises one of AWAY, a RedisError, or a SettingsError if the server refuses the login, or if its answers make no
    sense.
    """
    link = Link(settings)
    # redis-py would ask for notices of maintenance; a user with few rights may not do that.
    quiet = MaintNotificationsConfig(enabled=False)
    pool = ConnectionPool(max_connections=4, maint_notifications_config=quiet, **link.options())
    client = redis.asyncio.Redis(connection_pool=pool)
    client.response_callbacks.clear()
    try:
        yield client
    except RedisError as error:
        raise link.explain(error) from None
    except SENSELESS as error:
        raise link.senseless(error) from error
    finally:
        await client.connection_pool.aclose()


async def ask(client: redis.asyncio.Redis, commands: Sequence[Command]) -> list[Any]:
    """The replies to commands, sent together; errors among them as values."""
    async with client.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        return list(await pipe.execute(raise_on_error=False))


async def info(client: redis.asyncio.Redis) -> dict[str, str]:
    """All fields of INFO; none if the user may not ask for it. ValueError if the answer does not come from a Redis."""
    try:
        found = parse_info(await client.execute_command("INFO"))
    except NoPermissionError:
        return {}
    if "redis_version" not in found and "valkey_version" not in found:
        raise ValueError("INFO names no version")
    return found


async def now(client: redis.asyncio.Redis) -> float:
    """Seconds since 1970, by the server's clock."""
    seconds, micros = await client.execute_command("TIME")
    return int(seconds) + int(micros) / 1e6


async def keyspace(client: redis.asyncio.Redis, settings: Settings) -> Keyspace:
    """The keys of the bus, with the layout in Redis; with the configured one if nobody has connected yet."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    there = await client.execute_command("HMGET", keys.layout, *LAYOUT)
    shape = Shape.read(there)
    if shape is not None:
        keys = Keyspace(settings.redis_key_prefix, shape.size, int(there[1]))
        keys.shape = shape
    return keys


__all__ = ["ask", "info", "keyspace", "looking_at", "now", "table", "text"]
