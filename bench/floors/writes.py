"""Floors of writes: XADD, with the fields that the bus writes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from redis.asyncio import Redis

from mnemobus import Memory
from mnemobus.log.events import Event
from mnemobus.memory import encode

Fields = dict[str | bytes | int, str | bytes | int]


def fields(memory: Memory) -> Fields:
    """The entry of the log that writing this memory makes."""
    flat = Event.put(encode(memory, 1 << 30)).fields()
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def one(client: Redis, key: str, entry: Fields) -> bytes:
    """A bare XADD; its ID."""
    id: bytes = await client.xadd(key, entry)
    return id


async def pipelined(client: Redis, key: str, entries: Sequence[Fields], size: int = 100) -> float:
    """All entries in pipelines of ``size`` XADDs, one pipeline after the other; the seconds that took."""
    start = time.perf_counter()
    for at in range(0, len(entries), size):
        async with client.pipeline(transaction=False) as pipe:
            for entry in entries[at : at + size]:
                pipe.xadd(key, entry)
            await pipe.execute()
    return time.perf_counter() - start
