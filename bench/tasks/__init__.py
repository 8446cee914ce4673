"""One module for each task. Its first sentence says what it measures; its ``result.at_most`` has the bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import import_module

from ..measure import Result
from ..world import World

Task = Callable[[World], Awaitable[list[Result]]]


NAMES = (
    "turn",
    "own",
    "hot",
    "warm",
    "cold",
    "write",
    "writers",
    "write_many",
    "drain",
    "single",
    "propagation",
    "sustained",
    "dropping",
    "interest",
    "holding",
    "agents",
    "footprint",
    "conversation",
    "start",
    "units",
)
"""The modules, in the order of the table."""


def tasks() -> dict[str, Task]:
    """Every task by name, in the order of the table."""
    return {name: import_module(f"{__name__}.{name}").run for name in NAMES}
