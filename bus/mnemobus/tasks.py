"""Background work and its end: tasks are certain to end, threads end with the process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import aiosqlite

logger = logging.getLogger("mnemobus")

_END_PATIENCE = 0.5


async def end(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel tasks and wait until they have ended, with or without an error.

    One cancellation may be lost: asyncio.wait_for, which redis-py sends with, swallows it before Python 3.12
    if what it waits for ends at the same moment. So it is repeated for as long as a task goes on.
    """
    running = {task for task in tasks if task is not None and not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_END_PATIENCE)


def in_background(connecting: aiosqlite.Connection) -> aiosqlite.Connection:
    """A connection to SQLite that is about to be opened, with a thread that does not keep the process from ending.

    Else a process that forgot to close its bus would never end. What the thread has committed is on disk; nobody was
    told that anything else is.
    """
    # Before 0.22 the connection itself was the thread.
    thread: Any = getattr(connecting, "_thread", connecting)
    thread.daemon = True
    run = thread.run

    def run_until_nobody_waits() -> None:
        try:
            run()
        except RuntimeError as error:
            if "loop is closed" not in str(error):
                raise
            logger.debug("a statement ended after the loop whose task had asked for it: %s", error)

    thread.run = run_until_nobody_waits
    return connecting
