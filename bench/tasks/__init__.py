"""One module for each task: what it measures is in its first sentence, what it must reach in its ``result.at_most``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ..measure import Result
from ..world import World

Task = Callable[[World], Awaitable[list[Result]]]


def tasks() -> dict[str, Task]:
    """Every task by name, in the order of the table."""
    from . import cold, dropping, footprint, hot, start, warm, write, write_many, writers

    return {
        "hot": hot.run,
        "warm": warm.run,
        "cold": cold.run,
        "write": write.run,
        "writers": writers.run,
        "write_many": write_many.run,
        "dropping": dropping.run,
        "footprint": footprint.run,
        "start": start.run,
    }
