"""The embedded worker pool, and a check that workers run, here or elsewhere.

Dramatiq's master shuts its whole pool down when one of its processes dies. So each worker process gets its own master,
and the loss of one worker does not stop the others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from redis.exceptions import RedisError

from .. import private
from ..connection.link import Link
from ..connection.server_errors import AWAY
from ..health.vitals import reading_clients
from ..settings import Settings
from . import tethered
from .processes import STOP_TIMEOUT, end_process, spawn
from .tethered import PID_FILE

logger = logging.getLogger("mnemobus.embedded")

_PAUSES = (0.2, 5.0)
"""Seconds until a worker that exited is started again: the first pause, and the longest."""
_SETTLED = 10.0
"""After this many seconds, a worker counts as running."""


class WorkerPool:
    """This many worker processes, each with its own Dramatiq master. One that exits is started again.

    Their output goes to ``log``.
    """

    def __init__(self, settings: Settings, processes: int, threads: int, data_dir: Path) -> None:
        self._settings = settings
        self._command = [sys.executable, "-m", "dramatiq", "mnemobus_workers", tethered.__name__]
        self._command += ["--processes", "1", "--threads", str(threads)]
        self._command += ["--worker-shutdown-timeout", str(int(STOP_TIMEOUT * 500))]
        self.log = data_dir / "workers.log"
        self._pid_files = [data_dir / f"worker-{n}.pid" for n in range(processes)]
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for file in self._pid_files:
            file.unlink(missing_ok=True)  # of a pool that was killed
        self._keepers = [
            asyncio.create_task(self._keep(n), name=f"mnemobus-worker-{n}")
            for n in range(len(self._pid_files))
        ]

    def pids(self) -> list[int]:
        """The worker processes that have started."""
        pids = []
        for file in self._pid_files:
            with suppress(OSError, ValueError):
                pids.append(int(file.read_text()))
        return pids

    async def started(self) -> None:
        """Wait until each has started. Cancel it to give up."""
        while len(self.pids()) < len(self._pid_files):  # noqa: ASYNC110 (other processes write the files)
            await asyncio.sleep(0.02)

    async def _keep(self, slot: int) -> None:
        loop = asyncio.get_running_loop()
        pause = _PAUSES[0]
        while True:
            began = loop.time()
            how = await self._run(slot)
            if loop.time() - began > _SETTLED:
                pause = _PAUSES[0]
            logger.warning("worker %d %s; another starts in %g s. See %s", slot, how, pause, self.log)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _PAUSES[1])

    async def _run(self, slot: int) -> str:
        """Run a worker until it ends; return how it ended. If cancelled, let the worker finish its batch first."""
        file = self._pid_files[slot]
        try:
            with private.open_file(self.log, "ab") as log:
                process = await spawn(
                    self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    umask=private.MASK,
                    env=os.environ | self._settings.environment() | {PID_FILE: str(file)},
                )
        except OSError as error:
            return f"can't be started ({error})"
        try:
            return f"exited (status {await process.wait()})"
        finally:
            await end_process(process, STOP_TIMEOUT)
            file.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Let the workers finish their batches, and stop them."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)


async def await_workers(settings: Settings, processes: int = 1) -> None:
    """Wait until this many worker processes read the log. Redis may be unreachable meanwhile.

    Cancel it to give up.
    """
    link = Link(settings)
    keys = link.keys
    try:
        while True:
            with suppress(RedisError, *AWAY):
                await link.command("PING")  # this connects: from then on the layout of the log is known
                partitions = keys.shape.all
                clients, *groups = await link.pipeline(
                    [("CLIENT", "LIST"), *(("XINFO", "GROUPS", keys.log(p)) for p in partitions)]
                )
                joined = all(isinstance(group, list) and group for group in groups)
                # Managed servers hide CLIENT LIST; then only the groups can be checked.
                if joined and (isinstance(clients, Exception) or reading_clients(clients) >= processes):
                    return
            await asyncio.sleep(0.05)
    finally:
        await link.close()
