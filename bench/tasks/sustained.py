"""Sustained writes: how many a second, if old copies are dropped elsewhere within 100 ms, on one machine.

The rate is found by bisection. A rate is offered for some seconds. It is kept if the 99th percentile of the propagation
stays below the bound, and all offered writes were logged. Writer, Redis, workers and PostgreSQL share the machine.
"""

from __future__ import annotations

import math
import time

from ..measure import OURS, Result, Target, percentile
from ..world import World
from .propagation import OTHERS, Parties, drained, parties

BOUND = 100.0
"""Milliseconds."""
LOW, HIGH = 2_500.0, 20_000.0
"""Writes a second: a rate that is surely kept, and one that is surely not."""
STEPS = 4
REACHED = 0.95
"""Share of the offered writes that have to be made; below it, the machine can't offer that rate."""


async def run(world: World) -> list[Result]:
    result = Result(
        "sustained", f"writes a second with a propagation (p99) below {BOUND:g} ms, PostgreSQL", "1/s"
    )
    seconds = world.some(3, 1)
    result.samples = {OURS: []}
    tails: list[str] = []
    for _ in range(world.rounds(2, 1)):
        async with parties(world) as found:
            low, high = LOW, HIGH
            for _ in range(STEPS):
                rate = math.sqrt(low * high)
                kept, tail = await _offer(found, rate, seconds)
                tails.append(f"{rate:,.0f}/s: {tail:.0f} ms{'' if kept else ', too much'}")
                low, high = (rate, high) if kept else (low, rate)
                await drained(found.bus)
        result.samples[OURS].append(low)
    result.targets.append(Target(f"{OURS}, {result.unit}", result.spread(OURS), 7_000, "at least"))
    result.notes += [
        f"each rate for {seconds} s, by one process, into {len(OTHERS)} rooms, with the shipped number of worker"
        f" processes; found to {(HIGH / LOW) ** (1 / 2**STEPS) * 100 - 100:.0f} %. Propagation: from the"
        " acknowledgement of a write to the drop in another process, which holds another room as a classic scope",
        "; ".join(tails),
    ]
    return [result]


async def _offer(found: Parties, rate: float, seconds: float) -> tuple[bool, float]:
    """Whether a rate is kept, and the 99th percentile of the propagation meanwhile, in ms."""
    delays: list[float] = []
    await found.loading.ask("load", OTHERS, rate)
    began = time.monotonic()
    try:
        while time.monotonic() - began < seconds:
            delays += await found.ours.delays(1)
            if delays[-1] > 10 * BOUND:
                break
    finally:
        took = time.monotonic() - began
        written = await found.loading.ask("unload")
    tail = percentile(delays, 0.99)
    return tail < BOUND and written >= REACHED * rate * took, tail
