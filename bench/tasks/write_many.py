"""A hundred memories in one call, with and without embeddings: until they are logged, until PostgreSQL has them."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from mnemobus import Bus, Memory, connect

from ..alternatives import Item, load
from ..alternatives.survey import call
from ..inside import alternative, item
from ..measure import OURS, Result, interleave
from ..world import EMBEDDING, World, message, vector

BATCH = 100
LOGGED = f"{OURS}, logged"
COMMITTED = f"{OURS}, committed"
STORES = ("postgres-store-sync", "postgres-store")


async def run(world: World) -> list[Result]:
    settings = world.settings("postgres")
    with world.workers(settings):
        async with connect(**settings.model_dump()) as bus:
            return [await _of(world, bus, embeddings=False), await _of(world, bus, embeddings=True)]


async def _of(world: World, bus: Bus, *, embeddings: bool) -> Result:
    what = f"with {EMBEDDING} floats each" if embeddings else "without embeddings"
    result = Result("write_many", f"{BATCH} memories at once, {what}", "ms")
    vectors = [vector(n) if embeddings else None for n in range(BATCH)]
    numbers = iter(range(10_000_000))

    def batch() -> list[Memory]:
        return [
            message(f"room-{n % 10}", n, embedding=embedding)
            for embedding, n in zip(vectors, numbers, strict=False)
        ]

    async def ours(*, committed: bool) -> float:
        memories = batch()
        gc.collect()
        began = time.perf_counter()
        receipts = await bus.write_many(memories)
        logged = time.perf_counter()
        await asyncio.gather(*(receipt.committed(30) for receipt in receipts))
        return ((time.perf_counter() if committed else logged) - began) * 1e3

    async with AsyncExitStack() as stack:
        turns: dict[str, Any] = {
            LOGGED: partial(ours, committed=False),
            COMMITTED: partial(ours, committed=True),
        }
        for name in STORES:
            other = await alternative(
                world,
                name,
                "embeddings" if embeddings else "write_many",
                [result],
                vectors=EMBEDDING * embeddings,
            )
            if other is not None:
                stack.push_async_callback(call, other.close)
                turns[other.name] = partial(_batch, other, lambda: [item(memory) for memory in batch()])
        result.samples = await interleave(turns, world.rounds(15, 5))
    for name in STORES:
        result.at_most(1, load(name).name, LOGGED)
        result.at_most(2 if embeddings else 2.5, load(name).name, COMMITTED)
    result.notes.append(
        "a pool of workers runs throughout; each turn waits until the store has what it wrote"
    )
    if embeddings:
        result.notes.append(
            "vectors are stored and not indexed on either side; no model makes them: they are looked up"
        )
    return result


async def _batch(other: Any, make: Any) -> float:
    items: list[Item] = make()
    gc.collect()
    began = time.perf_counter()
    await call(other.write_many, items)
    return (time.perf_counter() - began) * 1e3
