"""One module for each task: what it measures is in its first sentence, what it must reach in its ``result.at_most``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ..measure import Result
from ..world import World

Task = Callable[[World], Awaitable[list[Result]]]


def tasks() -> dict[str, Task]:
    """Every task by name, in the order of the table."""
    from . import agents, conversation, hot, interest, propagation

    return {
        "hot": hot.run,
        "propagation": propagation.run,
        "interest": interest.run,
        "agents": agents.run,
        "conversation": conversation.run,
    }
