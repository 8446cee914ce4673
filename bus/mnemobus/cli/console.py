"""Shared by all commands: output, and how they end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from functools import cache
from typing import Any

import orjson
from rich.console import Console


@cache
def out() -> Console:
    """Standard output: results."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


@cache
def err() -> Console:
    """Standard error: progress and trouble."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def emit(value: Any) -> None:
    """One line of JSON on standard output, at once."""
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE))
    sys.stdout.flush()


def size(count: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class _Handler(logging.Handler):
    """Log records through the console, so that a progress bar stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            err().print(f"{record.levelname.lower()}: {self.format(record)}", markup=False)
        except Exception:  # noqa: BLE001 (as every handler: logging must not break what logs)
            self.handleError(record)


def set_up_logging() -> None:
    """Warnings of the library go to standard error; MNEMOBUS_LOG=debug shows more."""
    level = os.environ.get("MNEMOBUS_LOG", "warning").upper()
    logging.basicConfig(level=logging.WARNING, handlers=[_Handler()], format="%(message)s")
    logging.getLogger("mnemobus").setLevel(level if level in logging.getLevelNamesMapping() else "WARNING")


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end, or until SIGINT, SIGTERM or SIGHUP cancels it; then the exit status is 128 + the signal's number.

    After a cancellation this waits for the cleanup. A second signal ends the process at once.
    """

    async def main() -> int:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        received: list[int] = []

        def stop(number: int) -> None:
            if received:
                os._exit(128 + number)
            received.append(number)
            task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        try:
            return await task
        except asyncio.CancelledError:
            if not received:
                raise
            return 128 + received[0]
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    return asyncio.run(main())
