"""The CPU time of a batch of one: what a worker process spends on a single event, beside the chain by hand.

Events come so slowly that the worker finishes each before the next. The processor time of the process counts, in user
and kernel mode, over all of its threads; waiting costs nothing. It is measured in ticks of the system's clock, so a
round has to be long compared with a tick.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from mnemobus import Bus, connect

from ..measure import OURS, Result, interleave
from ..world import World, message
from .propagation import BY_HAND

RATE = 100
"""Events a second."""
_TICK = 1e6 / os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> float:
    """Microseconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK


async def run(world: World) -> list[Result]:
    from ..floors.chain import Chain
    from ..floors.store import prepare

    if not Path("/proc/self/stat").exists():
        return []
    settings, by_hand = world.settings("postgres"), world.database()
    prepare(by_hand)
    events = world.some(300, 50)
    result = Result("single", "CPU time of a worker for a batch of one, PostgreSQL", "us")
    sizes = []
    with world.workers(settings) as pool:
        async with connect(**settings.model_dump()) as bus, Chain(settings.redis_url, by_hand) as chain:
            [worker] = pool.pids

            async def ours() -> float:
                before = await _batches(bus)
                spent = await _spent(worker, events, lambda n: bus.write(message(f"room-{n % 20}", n)))
                batches = await _batches(bus) - before
                sizes.append(events / batches)
                return spent / batches

            async def chained() -> float:
                return (
                    await _spent(
                        chain._processes[1].pid, events, lambda n: chain.write(message(f"room-{n % 20}", n))
                    )
                    / events
                )

            result.samples = await interleave({OURS: ours, BY_HAND: chained}, world.rounds(3, 2))
    result.at_most(2, BY_HAND)
    result.notes.append(
        f"{RATE} events a second, {events} a round; one worker process; {max(sizes):.2f} events a batch at most, on"
        " average of a round"
    )
    return [result]


async def _spent(pid: int, events: int, write: Callable[[int], Awaitable[object]]) -> float:
    """Microseconds that a process spent while these events were written, one after the other."""
    loop = asyncio.get_running_loop()
    before, due = cpu(pid), loop.time()
    for n in range(events):
        await write(n)
        due += 1 / RATE
        await asyncio.sleep(max(0.0, due - loop.time()))
    return cpu(pid) - before


async def _batches(bus: Bus) -> int:
    """How many events the workers have confirmed, once nothing is left to apply."""
    keys, link = bus._link.keys, bus._link
    while True:
        meters = await link.pipeline(
            [("HMGET", keys.meter(p), "added", "applied", "batches") for p in range(keys.log_partitions)]
        )
        if all(meter[0] == meter[1] for meter in meters):
            return sum(int(meter[2] or 0) for meter in meters)
        await asyncio.sleep(0.005)
