"""Makes space for the log when Redis is full: what is cached there is dropped before a write is refused."""

from __future__ import annotations

import asyncio
import logging
import time

from redis.exceptions import ResponseError

from ..connection.link import Link

logger = logging.getLogger("mnemobus.shared")

_SCAN = 1_000
"""Keys to scan in one step."""
_EVERY = 5.0
"""Least seconds between two scans: Redis may have many keys of other users."""
_LAZY = 0.02
"""Seconds in which Redis can free the unlinked keys in the background."""


async def give_way(link: Link) -> bool:
    """Drop everything in L2; return whether there was anything. Raises one of AWAY."""
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
    except ResponseError as error:  # SCAN is not allowed, for example
        logger.debug("the shared results can't be dropped: %s", error)
    if dropped:
        logger.warning("Redis at %s is full: dropped the shared results of %d scopes", link.address, dropped)
        await asyncio.sleep(_LAZY)
    return dropped > 0
