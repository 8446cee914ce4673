"""The worker pool drains a backlog: events a second, beside a hand-written loop; and with a long backlog.

A log is filled under another name, then renamed, so that only the draining is timed. The pool's rate counts confirmed
events. The hand-written loop runs in its own process, with one connection to each server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from mnemobus import Settings

from ..fill import Log
from ..floors import drain as by_hand
from ..floors.store import prepare
from ..measure import OURS, Result, Target
from ..world import World

HAND = "by hand"
STORES = {"postgres": "PostgreSQL", "sqlite": "SQLite"}


class Pool:
    """The worker pool, and its own log."""

    def __init__(self, log: Log) -> None:
        self._log = log

    @classmethod
    @contextlib.contextmanager
    def of(cls, world: World, store: str, processes: int = 1) -> Iterator[Pool]:
        settings = world.settings(store)
        with world.workers(settings, processes), Log(settings) as log:
            yield cls(log)

    async def drain(self, events: int, embeddings: bool = False, *, first: int = 0) -> float:
        """Events a second: over all of the events, or over the first of them, and the rest is dropped."""
        self._log.fill(events, embeddings)
        before = self._log.applied()
        began = time.perf_counter()
        self._log.begin()
        while (done := self._log.applied() - before) < (first or events):
            await asyncio.sleep(0.005)
        rate = done / (time.perf_counter() - began)
        self._log.drop()
        return rate


class Hand:
    """The hand-written loop, in a new process each turn."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self._settings = settings
        self._log = log
        prepare(settings.database_url)

    @classmethod
    @contextlib.contextmanager
    def of(cls, world: World, store: str) -> Iterator[Hand]:
        settings = world.settings(store)
        with Log(settings, "floor") as log:
            yield cls(settings, log)

    async def drain(self, events: int, embeddings: bool = False) -> float:
        settings = self._settings
        self._log.fill(events, embeddings)
        self._log.begin()
        command = by_hand.command(settings.redis_url, settings.database_url, "floor", self._log.names)
        done = await asyncio.to_thread(_told_to_go, command)
        self._log.drop()
        assert done["events"] == events
        return done["events"] / done["seconds"]


def _told_to_go(command: list[str]) -> dict[str, float]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        answer: dict[str, float] = json.loads(process.stdout.readline())
        return answer


async def run(world: World) -> list[Result]:
    with _no_rewrites(world):
        results = []
        for store in STORES:
            results.append(await _beside_hand(world, store))
            if not world.quick:
                results.append(await _processes(world, store))
            world.flush()
        results.append(await _backlog(world))
    return results


async def _beside_hand(world: World, store: str) -> Result:
    events, vectors = world.some(60_000, 6_000), world.some(6_000, 2_000)
    result = Result("drain", f"{events:,} events into {STORES[store]}, one process", "1/s")
    with Pool.of(world, store) as pool, Hand.of(world, store) as hand:
        turns = {
            OURS: lambda: pool.drain(events),
            HAND: lambda: hand.drain(events),
            f"{OURS}, embeddings": lambda: pool.drain(vectors, embeddings=True),
            f"{HAND}, embeddings": lambda: hand.drain(vectors, embeddings=True),
        }
        for contestant in (pool, hand):  # connections, the tables' first pages
            await contestant.drain(2_000)
        result.samples = {name: [] for name in turns}
        for round in range(world.rounds(3, 2)):
            for name in sorted(turns, reverse=bool(round % 2)):
                result.samples[name].append(await turns[name]())
    result.at_least(0.6, HAND)
    result.at_least(0.6, f"{HAND}, embeddings", f"{OURS}, embeddings")
    result.notes.append(
        f"by hand: XREADGROUP {by_hand.COUNT:,}, as ours, one upsert, XACK; no version compared, nothing checked, no"
        " invalidation sent"
    )
    return result


async def _processes(world: World, store: str) -> Result:
    events = 30_000
    result = Result("drain", f"{events:,} events into {STORES[store]}, several processes", "1/s")
    for processes in (1, 2, 4):
        with Pool.of(world, store, processes) as pool:
            await pool.drain(2_000 * processes)
            name = "1 process" if processes == 1 else f"{processes} processes"
            result.samples[name] = [await pool.drain(events)]
            result.curves.setdefault(OURS, []).append((processes, result.samples[name][0]))
    result.notes.append(f"all together, on {os.cpu_count()} CPUs that Redis and the store share with them")
    return result


async def _backlog(world: World) -> Result:
    short, long, first = 10_000, world.some(300_000, 20_000), 8_000
    result = Result("drain", f"the first {first:,} of a backlog, into PostgreSQL", "1/s")
    few, many = f"of {short:,}", f"of {long:,}"
    with Pool.of(world, "postgres") as pool:
        await pool.drain(2_000)
        result.samples = {few: [], many: []}
        for _ in range(2):
            result.samples[few].append(await pool.drain(short, first=first))
            result.samples[many].append(await pool.drain(long, first=first))
    # Noise alone costs a tenth from time to time.
    result.targets.append(Target(f"{many} / {few}", result.ratio(many, few), 0.9, "at least"))
    return result


@contextlib.contextmanager
def _no_rewrites(world: World) -> Iterator[None]:
    """Redis rewrites its file when that has doubled. Prevent it: the rewrite would take a CPU from the benchmark."""
    name = "auto-aof-rewrite-percentage"
    with redis.Redis.from_url(world.redis_url) as client:
        before = client.config_get(name)[name]
        client.config_set(name, 0)
        try:
            yield
        finally:
            client.config_set(name, before)
