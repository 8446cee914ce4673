"""What each alternative can and can't do: found by experiment, on real servers, with two instances of each."""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psycopg

from . import Item, Place, load

PATIENCE = 2.0
"""Seconds within which another instance has to see a write, if it ever does."""


@dataclass(frozen=True)
class Findings:
    """What two instances of an alternative, A and B, do.

    reads      A reads what it wrote, new and changed, as single memories and in a listing, newest first
    many       all of `write_many` can be read
    across     seconds until B, which had a copy, gets what A changed; None if it did not within PATIENCE
    listing    the same for a listing that B had, and a memory that A added
    hits       B's first read asked a server, its second of the same did not
    """

    reads: bool
    many: bool
    across: float | None
    listing: float | None
    hits: bool


@contextmanager
def database(url: str) -> Iterator[str]:
    """A new database on a server, in UTF-8: with any other encoding LangGraph's store finds no key again."""
    name = f"bench_{secrets.token_hex(4)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0".encode())
        try:
            yield url.rpartition("/")[0] + "/" + name
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


async def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call either kind of method."""
    answer = function(*args)
    return await answer if inspect.isawaitable(answer) else answer


async def until(condition: Callable[[], Any]) -> float | None:
    """Seconds until a condition, a coroutine function, holds; None if it does not within PATIENCE."""
    start = time.perf_counter()
    while time.perf_counter() - start < PATIENCE:
        if await condition():
            return time.perf_counter() - start
        await asyncio.sleep(0.001)
    return None


async def survey(name: str | type[Any], place: Place) -> Findings:
    """Try an alternative, of `NAMES` or a class, under a prefix of its own."""
    cls: Any = load(name) if isinstance(name, str) else name
    place = replace(place, prefix=f"{place.prefix}-{secrets.token_hex(4)}")
    a, b = cls(place), cls(place)
    await call(a.open)
    await call(b.open)
    try:
        return await _try(cls, a, b, place)
    finally:
        await call(b.close)
        await call(a.close)


async def _try(cls: Any, a: Any, b: Any, place: Place) -> Findings:
    lists = "recent" not in cls.cannot

    def item(id: str, n: int) -> Item:
        vector = [float(n)] * place.vectors if place.vectors and "embeddings" not in cls.cannot else None
        return Item("r", id, {"text": f"{id} {n}", "n": n}, vector)

    async def read(instance: Any, id: str) -> Any:
        value = instance.value(await call(instance.get, instance.address("r", id)))
        return None if value is None else value["n"]

    async def listed(instance: Any, limit: int) -> list[int]:
        return [instance.value(one)["n"] for one in await call(instance.recent, "r", limit)]

    seen = [await read(a, "absent")]
    for n in (1, 2):
        await call(a.put, item("x", n))
        seen.append(await read(a, "x"))
    reads = seen == [None, 1, 2]
    await call(a.put, item("y", 3))
    if lists:
        reads = reads and await listed(a, 10) == [3, 2] and await listed(a, 1) == [3]

    await call(a.write_many, [item(f"m{n}", n) for n in range(100, 200)])
    many = [await read(a, f"m{n}") for n in range(100, 200)] == list(range(100, 200))
    if lists:
        many = many and sorted(await listed(a, 100)) == list(range(100, 200))

    counts = [b.loads]
    shared = []
    for _ in range(2):
        shared.append(await read(b, "x"))
        counts.append(b.loads)
    hits = shared == [2, 2] and counts[0] < counts[1] == counts[2]

    await call(a.put, item("x", 4))

    async def changed() -> bool:
        return bool(await read(b, "x") == 4)

    across = await until(changed)
    listing = None
    if lists:
        await listed(b, 5)
        await call(a.put, item("z", 5))

        async def added() -> bool:
            return 5 in await listed(b, 5)

        listing = await until(added)
    return Findings(reads, many, across, listing, hits)
