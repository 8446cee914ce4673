"""Room for the log where Redis is full: what is cached there goes before a write is refused."""

from __future__ import annotations

import asyncio
import logging
import time

from redis.exceptions import ResponseError

from ..connection.link import Link

logger = logging.getLogger("mnemobus.shared")

_SCAN = 1_000
"""Keys that are looked at in one step."""
_EVERY = 5.0
"""Seconds between two looks at most: Redis may have many keys of others."""
_LAZY = 0.02
"""Seconds that Redis has to free in the background what was unlinked."""


async def give_way(link: Link) -> bool:
    """Drop all that L2 holds; whether there was anything. Raises one of AWAY."""
    now = time.monotonic()
    if now < link.give_way_at:
        return False
    link.give_way_at = now + _EVERY
    cursor, dropped = b"0", 0
    try:
        while True:
            cursor, keys = await link.command("SCAN", cursor, "MATCH", link.keys.buckets, "COUNT", _SCAN)
            if keys:
                dropped += await link.command("UNLINK", *keys)
            if cursor == b"0":
                break
    except ResponseError as error:  # it is not allowed, for example
        logger.debug("the shared results can't be dropped: %s", error)
    if dropped:
        logger.warning("Redis at %s is full: dropped the shared results of %d scopes", link.address, dropped)
        await asyncio.sleep(_LAZY)
    return dropped > 0
