"""From nothing to the first answer: `connect`, and one read."""

from __future__ import annotations

import statistics
import time

from mnemobus import connect

from ..floors.start import start
from ..inside import fill
from ..measure import OURS, Result, interleave
from ..world import World, message

BARE = "bare connections and one query"


async def run(world: World) -> list[Result]:
    return [await _of(world, "postgres", "PostgreSQL"), await _of(world, "sqlite", "SQLite")]


async def _of(world: World, store: str, title: str) -> Result:
    result = Result("start", f"connect to first answer, {title}", "ms")
    memories = [message(f"room-{n}", n) for n in range(500)]
    settings = world.settings(store)
    fill(settings, memories)
    given = {"redis_url", "redis_key_prefix", "database_url", "data_dir"}
    keywords = settings.model_dump(include=given)
    times = world.some(5, 3)
    unread = iter([memory.id for memory in memories])

    async def ours() -> float:
        took = []
        for _ in range(times):
            id = next(unread)
            began = time.perf_counter()
            async with connect(**keywords) as bus:
                found = await bus.get(id)
                took.append(time.perf_counter() - began)
            if found is None:
                raise RuntimeError("the first answer was none")
        return statistics.median(took) * 1e3

    async def bare() -> float:
        took = [await start(settings.redis_url, settings.database_url) for _ in range(times)]
        return statistics.median(took) * 1e3

    result.samples = await interleave({OURS: ours, BARE: bare}, world.rounds(15, 4))
    result.at_most(3, BARE)
    result.notes.append("modules are loaded already; each time another memory, which only the store has")
    return result
