"""Run a command that dies with its parent, even if the parent is killed by SIGKILL.

    python -IS tether.py PARENT COMMAND [ARGUMENT...]

On Linux the kernel does this (PR_SET_PDEATHSIG), and the command replaces this process and keeps its pid. A
callback between fork and exec could do the same, but is not safe in a process that has threads.

On other systems this process stays as the command's parent, and ends it once its own parent is dead. It kills its whole
process group, with the command's children and itself: so it has to be the leader of its own process group.

The signal is SIGKILL: no process is left that could wait and send a stronger one. Nothing is lost: Redis writes its
append-only file before it answers, and another worker claims what a killed worker was applying.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def tie(parent: int) -> bool:
    """Have the kernel kill this process once its parent, whose pid is ``parent``, is dead.

    Returns False if the kernel can't. The kernel watches the thread that forked: it should be the parent's main thread.
    """
    if sys.platform != "linux":
        return False
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:  # it died before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def watch(parent: int, command: list[str], every: float = 0.5) -> int:
    """Run a command, pass signals on to it, and kill the whole process group once ``parent`` is dead.

    Returns the command's exit status, as a shell reports it.
    """
    child = subprocess.Popen(command)

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    while True:
        try:
            code = child.wait(every)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                os.killpg(0, signal.SIGKILL)
        else:
            return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> NoReturn:
    parent, command = int(arguments[0]), arguments[1:]
    if tie(parent):
        os.execv(command[0], command)
    sys.exit(watch(parent, command))


if __name__ == "__main__":
    main(sys.argv[1:])
