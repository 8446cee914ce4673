"""``mnemobus worker``: becomes Dramatiq's command line, with the settings."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..connection.link import Link
from ..errors import SettingsError
from ..settings import Settings


def run(*, processes: int | None, threads: int | None, extra: Sequence[str]) -> NoReturn:
    settings = Settings.load()
    Link(settings)  # an invalid REDIS_URL is reported here, in one sentence
    if importlib.util.find_spec("mnemobus_workers") is None:
        raise SettingsError("mnemobus_workers is not installed here: pip install mnemobus")
    command = [
        sys.executable,
        "-m",
        "dramatiq",
        "mnemobus_workers",
        "--processes",
        str(processes or settings.worker_processes),
        "--threads",
        str(threads or settings.worker_threads),
        *extra,
    ]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, os.environ | settings.environment())
