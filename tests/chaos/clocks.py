"""Clocks that disagree, on one machine.

A wall clock (CLOCK_REALTIME) can't be another one for one process: Python's is replaced in that process instead. The
clocks that count durations (CLOCK_MONOTONIC and CLOCK_BOOTTIME) can, in a time namespace, where the kernel has them and
lets us. A server that asks for the time of day by gettimeofday, as Redis does, gets another answer from a library
that is loaded before all others (wall_clock.c).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from pathlib import Path


def set_ahead(seconds: float) -> None:
    """Have this process's wall clock be ahead of everybody else's."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def in_the_future(seconds: int) -> list[str]:
    """What to put before a command so that its other clocks are ahead, too; nothing where that can't be had."""
    command = [
        "unshare", "--time", "--monotonic", str(seconds), "--boottime", str(seconds), "--fork", "--kill-child",
    ]  # fmt: skip
    return command if _works(tuple(command)) else []


@functools.cache
def _works(command: tuple[str, ...]) -> bool:
    try:
        return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


class NoWallClock(Exception):
    """A server can't have a wall clock of its own here, and this is why."""


class WallClock:
    """The wall clock of servers that are started with ``environment``: right, until it is set."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise NoWallClock("no C compiler")
        library, self._file = folder / "wall_clock.so", folder / "wall_clock"
        source = Path(__file__).with_name("wall_clock.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(self._file)}

    def set_ahead(self, seconds: int) -> None:
        """By how much it is ahead of ours; below 0: behind."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
