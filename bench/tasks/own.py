"""A context after an own message: the time until the message is read again, while another process writes there, too.

As `turn`, with one agent in each of two processes, in one room, with almost no time to think: this gives enough samples
for the tail.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from ..measure import Result, percentile
from ..world import World
from .turn import fill, gathered, kept, taken

THINK = 0.01


async def run(world: World) -> list[Result]:
    async with AsyncExitStack() as stack:
        teams, absent = await gathered(world, stack)
        records = await taken(teams, 1, 1.0, THINK, world.rounds(3, 1))
    results = []
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        read = Result("own", f"the context after an own message, {name}", "us")
        both = Result("own", f"an own message and the context after it, {name}", "us")
        fill(read, records, lambda record, share=share: percentile(record.own, share))
        fill(both, records, lambda record, share=share: percentile(record.both, share))
        results += [read, both]
    results[0].within(15)
    results.append(kept("own", teams))
    for result in results:
        result.absent.update(absent)
    results[0].notes.append(
        f"an agent in each of two processes, both in one room, {THINK * 1000:.0f} ms between their turns. Who answers"
        " without the message is counted below"
    )
    return results
