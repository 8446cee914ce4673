"""The worker pool, as `dramatiq chaos.dying_workers`; its processes kill themselves where the campaign says so.

The campaign makes a file, named after the point, in the folder CHAOS_DEATHS. The first process that reaches the point
removes the file, and kills itself with SIGKILL:

transaction  in a batch's transaction, before COMMIT
commit       between commit and fan-out
fan-out      when some of a batch's invalidations are sent, and some are not
ack          when all are sent and the batch is confirmed, before the process forgets it

CHAOS_AHEAD: seconds by which the wall clock of these processes is ahead.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from mnemobus.connection.link import ThreadedLink
from mnemobus.store import merge
from mnemobus.store.postgres import PostgresWriter
from mnemobus_workers import broker
from mnemobus_workers.apply import Applier
from mnemobus_workers.broker import StreamConsumer
from worker_process import is_fan_out, send_one_of_many, wrap

from .clocks import set_ahead

POINTS = ("transaction", "commit", "fan-out", "ack")
FOLDER = Path(os.environ["CHAOS_DEATHS"])


def due(point: str) -> bool:
    """Whether this process has to die here; no other process gets the same answer."""
    try:
        (FOLDER / point).unlink()
    except FileNotFoundError:
        return False
    return True


def die_at(point: str) -> None:
    if due(point):
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_fan_out(link: ThreadedLink, calls: list[Any]) -> None:
    if is_fan_out(calls) and due("fan-out"):
        send_one_of_many(link, calls)
        os.kill(os.getpid(), signal.SIGKILL)


set_ahead(float(os.environ.get("CHAOS_AHEAD", "0")))
wrap(PostgresWriter, "_apply_at_once", before=lambda *_: die_at("transaction"))
wrap(merge, "apply", after=lambda *_: die_at("transaction"))
wrap(Applier, "_commit", after=lambda *_: die_at("commit"))
wrap(ThreadedLink, "pipeline", before=die_in_fan_out)
wrap(StreamConsumer, "ack", before=lambda *_: die_at("ack"))

__all__ = ["POINTS", "broker"]
