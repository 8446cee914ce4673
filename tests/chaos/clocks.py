"""Clocks that disagree, on one machine.

One process can't have another wall clock (CLOCK_REALTIME), so Python's is replaced in that process. It can have other
clocks for durations (CLOCK_MONOTONIC and CLOCK_BOOTTIME): in a time namespace, if the kernel has these and allows them.
A server that reads the time of day by gettimeofday, as Redis does, gets another answer from a preloaded library
(wall_clock.c).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from pathlib import Path


def set_ahead(seconds: float) -> None:
    """Set this process's wall clock ahead of all others."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def in_the_future(seconds: int) -> list[str]:
    """The prefix of a command whose other clocks are ahead, too; empty if this is impossible here."""
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
    """A server can't have its own wall clock here; the text says why."""


class WallClock:
    """The wall clock of servers that are started with ``environment``; it is right until it is set."""

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
        """How far it is ahead of ours; negative if it is behind."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
