"""Ties a worker process to its Dramatiq master: a worker must die with its master, and Dramatiq does not ensure that.

`workers` names this module on Dramatiq's command line, among those that every worker process imports. It also
writes the pid of the worker process to a file: tests that kill the master need it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from .tether import tie

PID_FILE = "MNEMOBUS_WORKER_PID_FILE"
"""The environment variable with the path to write to."""

if PID_FILE in os.environ and (master := multiprocessing.parent_process()) is not None:
    tie(os.getppid())
    if not master.is_alive():  # it died before the kernel was told, and another process is the parent now
        os.kill(os.getpid(), signal.SIGKILL)
    Path(os.environ[PID_FILE]).write_text(str(os.getpid()))
