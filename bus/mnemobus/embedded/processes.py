"""Child processes that leave nothing behind, and the directory for their data."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import private
from ..errors import EmbeddedServerError
from . import tether

logger = logging.getLogger("mnemobus.embedded")

STOP_TIMEOUT = 10.0
"""Seconds that a process may take to end after SIGTERM, before SIGKILL."""


@contextmanager
def sole_use(directory: Path) -> Iterator[None]:
    """Make a directory, and lock it for this process alone; EmbeddedServerError if another process holds the lock."""
    try:
        private.make_folder(directory)
        lock = private.open_file(directory / "embedded.lock", "a+")
    except OSError as error:
        raise EmbeddedServerError(
            f"the data directory {directory} can't be used: {error.strerror}. Set MNEMOBUS_DATA_DIR"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise EmbeddedServerError(
                f"the data directory {directory} is in use by another mnemobus (pid {lock.read().strip() or '?'})."
                " Use that one, or set MNEMOBUS_DATA_DIR and REDIS_URL to run a second"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


async def spawn(command: list[str], **options: Any) -> asyncio.subprocess.Process:
    """Start a process that dies with this one, and does not get the terminal's Ctrl-C."""
    launcher = [sys.executable, "-IS", tether.__file__, str(os.getpid())]
    return await asyncio.create_subprocess_exec(*launcher, *command, start_new_session=True, **options)


async def end_process(process: asyncio.subprocess.Process, timeout: float) -> None:
    """Send SIGTERM; if the process does not end in time, send SIGKILL to its whole session."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(timeout):
                await process.wait()
        except TimeoutError:
            logger.warning("process %d did not end in %g s and is killed", process.pid, timeout)
    # Also if it ended by itself: its children may still run.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def log_tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in text.splitlines()[-lines:])


def free_port() -> int:
    """A free port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
