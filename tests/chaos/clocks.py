"""Clocks that disagree, on one machine.

A wall clock (CLOCK_REALTIME) can't be another one for one process: Python's is replaced in that process instead. The
clocks that count durations (CLOCK_MONOTONIC and CLOCK_BOOTTIME) can, in a time namespace, where the kernel has them and
lets us.
"""

from __future__ import annotations

import functools
import subprocess
import time


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
