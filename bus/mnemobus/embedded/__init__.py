"""The whole system on one machine: a Redis server of its own and a pool of worker processes.

For development, the demo and the tests. Three promises:

- Nothing is left behind. Every process dies with this one, even by SIGKILL (see `tether`). The kernel holds the lock
  on the data directory, and releases it with the process.
- Nothing is lost. Redis keeps an append-only file in the data directory and starts again from it. It is stopped
  last, after the workers have finished their current batches.
- A process that dies is started again: a worker any number of times, with a growing pause; Redis as long as it starts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from ..errors import EmbeddedServerError
from ..settings import Settings
from ..store import open_reader
from .binary import Binary, find_server
from .processes import end_process, free_port, log_tail, sole_use, spawn
from .server import START_TIMEOUT, EmbeddedRedis, with_port
from .workers import WorkerPool, await_workers

logger = logging.getLogger("mnemobus.embedded")


def absolute(settings: Settings) -> Settings:
    """The settings with every path absolute, so that they don't depend on a process's working directory."""
    url = settings.database_url
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///")).absolute()
        url = f"sqlite:///{path}"
    return settings.model_copy(update={"database_url": url, "data_dir": Path(settings.data_dir).absolute()})


class Embedded:
    """Redis and workers on this machine, while the context is entered.

    settings  what an agent needs: pass them to :func:`mnemobus.connect`
    """

    def __init__(
        self,
        settings: Settings,
        *,
        processes: int | None = None,
        threads: int | None = None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.settings = absolute(settings)
        data_dir = self.settings.data_dir
        self.redis = EmbeddedRedis(self.settings, data_dir)
        self.workers = WorkerPool(
            self.settings,
            settings.worker_processes if processes is None else processes,
            settings.worker_threads if threads is None else threads,
            data_dir,
        )
        self._on_step = on_step
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Embedded:
        async with AsyncExitStack() as stack:
            stack.enter_context(sole_use(self.settings.data_dir))
            # Before anything runs: an unreachable database is reported here, not only in a log.
            await check_store(self.settings)
            stack.callback(self.redis.forget_password)
            stack.push_async_callback(self.redis.stop)
            await self.redis.start()
            self._on_step(f"{self.redis.binary} at {self.redis.address}")
            stack.push_async_callback(self.workers.stop)
            self.workers.start()
            await self._await_workers()
            self._on_step(f"{len(self.workers.pids())} worker processes")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def serve(self) -> None:
        """Run until cancelled, and restart Redis each time that it ends; EmbeddedServerError if that fails."""
        while True:
            code = await self.redis.wait()
            logger.warning("Redis exited (status %d) and is started again; see %s", code, self.redis.log)
            await self.redis.stop()
            await asyncio.sleep(0.2)
            await self.redis.start()

    async def _await_workers(self) -> None:
        try:
            async with asyncio.timeout(2 * START_TIMEOUT):
                await self.workers.started()
                await await_workers(self.settings, len(self.workers.pids()))
        except TimeoutError:
            raise EmbeddedServerError(
                f"the workers did not start in {2 * START_TIMEOUT:g} s; {self.workers.log} ends with:"
                f"{log_tail(self.workers.log, 12)}"
            ) from None


async def check_store(settings: Settings) -> None:
    """StoreError, or SettingsError, if the database can't be used."""
    reader = open_reader(settings)
    try:
        await reader.open()
    finally:
        await reader.close()


__all__ = [
    "Binary",
    "Embedded",
    "EmbeddedRedis",
    "WorkerPool",
    "absolute",
    "await_workers",
    "check_store",
    "end_process",
    "find_server",
    "free_port",
    "log_tail",
    "sole_use",
    "spawn",
    "with_port",
]
