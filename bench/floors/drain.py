"""A process that moves the log into the store by hand: XREADGROUP, one upsert, XACK, until nothing is left.

`python -m bench.floors.drain REDIS_URL DATABASE_URL GROUP LOG...` says ``ready``, waits for a line, drains, and
prints ``{"events": ..., "batches": ..., "seconds": ...}``. The group must be there (`group`), and the tables
(`store.prepare`). Several such processes share the work.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from redis import Redis

from mnemobus import Settings

from .store import sink

COUNT: int = Settings.model_fields["batch_size"].default
"""Entries of a batch: the same limit as ours."""


@dataclass(frozen=True)
class Drained:
    """events and batches: how many this process moved; seconds: until nothing was left."""

    events: int
    batches: int
    seconds: float


def group(client: Redis, name: str, logs: Iterable[str]) -> None:
    """Make a consumer group at the beginning of all these streams."""
    for log in logs:
        client.xgroup_create(log, name, id="0", mkstream=True)


def command(redis_url: str, database_url: str, group: str, logs: Sequence[str]) -> list[str]:
    """The command line of such a process."""
    return [sys.executable, "-m", "bench.floors.drain", redis_url, database_url, group, *logs]


def drain(client: Redis, database_url: str, group: str, consumer: str, logs: Sequence[str]) -> Drained:
    into = sink(database_url)
    events = batches = 0
    start = time.perf_counter()
    left = list(logs)
    while left:
        for log in list(left):
            reply = client.xreadgroup(group, consumer, {log: ">"}, count=COUNT)
            if not reply:
                left.remove(log)
                continue
            entries = reply[0][1]
            into.commit(entries)
            client.xack(log, group, *(id for id, _ in entries))
            events += len(entries)
            batches += 1
    seconds = time.perf_counter() - start
    into.close()
    return Drained(events, batches, seconds)


def main(redis_url: str, database_url: str, group: str, *logs: str) -> None:
    import os

    with Redis.from_url(redis_url) as client:
        client.ping()
        print("ready", flush=True)
        sys.stdin.readline()
        print(
            json.dumps(asdict(drain(client, database_url, group, f"floor-{os.getpid()}", logs))), flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
