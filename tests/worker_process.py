"""A worker process that kills itself at a point that is given as its argument; with a second one, "pause", it pauses.

batch        with a batch in hand, before it does anything with it
transaction  in a batch's transaction, before COMMIT
commit       between commit and fan-out
fan-out      when some of a batch's invalidations are sent, and some are not
ack          when all are sent and the batch is confirmed, before it lets go of it
poison       before it commits a batch with the word "poison" in it: as an event would that the process can't stand
never        not at all
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import dramatiq

from mnemobus import Settings
from mnemobus.connection.link import Script, ThreadedLink, evaluate
from mnemobus.store import merge
from mnemobus.store.postgres import PostgresWriter
from mnemobus_workers.apply import Applier
from mnemobus_workers.broker import StreamConsumer
from mnemobus_workers.pool import make_broker

paused = False


def die() -> None:
    """Or stand still, once, until somebody has the process continue."""
    global paused
    if not sys.argv[2:]:
        os.kill(os.getpid(), signal.SIGKILL)
    elif not paused:
        paused = True
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(
            0.1
        )  # another thread may get the signal first, and this one must not go on until all stand still


def wrap(owner: Any, name: str, *, before: Any = None, after: Any = None) -> None:
    """Have something done before or after a function is called."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        answer = original(*args, **kwargs)
        if after is not None:
            after(*args)
        return answer

    setattr(owner, name, wrapped)


def is_fan_out(calls: list[Any]) -> bool:
    """Whether a pipeline is a batch's fan-out; a worker sends others, too."""
    return isinstance(calls[0][0], Script) and calls[0][0].name == "fanout"


def send_one_of_many(link: ThreadedLink, calls: list[Any]) -> None:
    """The first message of a fan-out, as if it had been too large for one call; nothing is confirmed."""
    fanout, keys, (*head, _, payload, buckets), *_ = (*calls[0][:2], calls[0][2][:7])
    link._pipeline([evaluate((fanout, keys[: 3 + buckets], [*head, 1, payload, buckets, 0]))])


def die_in_fan_out(link: ThreadedLink, calls: list[Any]) -> None:
    """In place of the fan-out's pipeline."""
    if is_fan_out(calls):
        send_one_of_many(link, calls)
        die()


def main(point: str) -> None:
    if point == "batch":
        wrap(Applier, "_commit", before=lambda *_: die())
    elif point == "transaction":
        PostgresWriter._apply_at_once = lambda *_: None  # type: ignore[method-assign,assignment]
        wrap(merge, "apply", after=lambda *_: die())
    elif point == "commit":
        wrap(Applier, "_commit", after=lambda *_: die())
    elif point == "fan-out":
        wrap(ThreadedLink, "pipeline", before=die_in_fan_out)
    elif point == "ack":
        wrap(StreamConsumer, "ack", before=lambda *_: die())
    elif point == "poison":
        wrap(Applier, "_commit", before=lambda _, events: "poison" in repr(events) and die())
    elif point != "never":
        raise ValueError(point)
    broker = make_broker(Settings.load())
    dramatiq.Worker(broker, worker_timeout=100, worker_threads=2).start()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
