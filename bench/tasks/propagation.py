"""Propagation: from a write's acknowledgement until another process has it (live scopes), or has dropped its copy.

Live scopes are in visible.py. Here are classic scopes, which are dropped after the commit: idle, and at half load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import redis.asyncio

from mnemobus import Bus, Settings, connect
from mnemobus.keys import Keyspace
from servers import eventually

from .. import visible
from ..agents import started
from ..measure import OURS, Result, interleave, percentile
from ..party import Party, moment
from ..visible import OTHERS, ROOM
from ..world import World, message

if TYPE_CHECKING:
    from ..floors.chain import Chain

BACKLOG = 4_000
"""Events that wait for the pool while it is saturated."""
_PATIENCE = 60
"""Seconds that a turn may take: a contestant that can't follow the load fails, and does not run for ever."""
BY_HAND = "the chain by hand"
PROCESSES: int = Settings.model_fields["worker_processes"].default


class Listener:
    """An agent in its own process that holds the room, and reports when it dropped it."""

    def __init__(self, party: Party) -> None:
        self._party = party
        self._dropped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        party.on_told = self._told

    def _told(self, what: tuple[str, list[int]]) -> None:
        if not self._dropped.done():
            self._dropped.set_result(what[1][0])

    async def hold(self) -> int:
        """Read the room; return the number of the newest message in the answer."""
        self._dropped = asyncio.get_running_loop().create_future()
        [[newest]] = await self._party.ask("hold", 0, 1, [ROOM])
        return int(newest)

    async def dropped(self) -> int:
        async with asyncio.timeout(30):
            return await self._dropped


class Ours:
    def __init__(self, bus: Bus, listener: Listener) -> None:
        self._bus, self._listener = bus, listener
        self._last = -1
        self.reads = self.stale = 0

    async def delays(self, count: int) -> list[float]:
        """Milliseconds, one write after the other."""
        found = []
        for _ in range(count):
            self.reads += 1
            self.stale += await self._listener.hold() < self._last
            self._last += 1
            await self._bus.write(message(ROOM, self._last))
            at = moment()
            found.append((await self._listener.dropped() - at) / 1e6)
        return found


async def run(world: World) -> list[Result]:
    return [*await visible.run(world), *await _idle(world), *await _half(world)]


@asynccontextmanager
async def parties(world: World, processes: int = PROCESSES) -> AsyncIterator[Parties]:
    """Start both sides again. Nothing is held live: that is measured separately."""
    from ..floors.chain import Chain
    from ..floors.store import prepare

    settings = world.settings("postgres", live="off", worker_processes=processes)
    by_hand = world.database()
    await asyncio.to_thread(prepare, by_hand)
    with world.workers(settings, processes):
        async with (
            connect(**settings.model_dump()) as bus,
            Party(**started(settings)) as listening,
            Party(**started(settings)) as loading,
            Chain(settings.redis_url, by_hand) as chain,
        ):
            await listening.ask("open", 1)
            await loading.ask("open", 1)
            yield Parties(settings, bus, loading, Ours(bus, Listener(listening)), chain)


@dataclass
class Parties:
    """The parts of a measurement: a bus, another process that loads it, and both ways to drop a copy."""

    settings: Settings
    bus: Bus
    loading: Party
    ours: Ours
    chain: Chain

    async def chained(self, count: int) -> list[float]:
        """Milliseconds of the chain by hand, one write after the other."""
        self.chain.clear()
        found: list[float] = []
        for n in range(count):
            await self.chain.write(message(ROOM, n))
            found = await self.chain.delays()
        return [seconds * 1e3 for seconds in found]

    async def loaded(self, count: int, rate: float) -> list[float]:
        await self.loading.ask("load", OTHERS, rate)
        await asyncio.sleep(0.2)
        try:
            return await self.ours.delays(count)
        finally:
            await self.loading.ask("unload")
            await drained(self.bus)

    async def chained_loaded(self, count: int, rate: float) -> list[float]:
        await self.loading.ask("load_by_hand", self.chain.log, OTHERS, rate)
        await asyncio.sleep(0.2)
        try:
            return await self.chained(count)
        finally:
            await self.loading.ask("unload")
            await _caught_up(self.settings.redis_url, self.chain.log)


async def _idle(world: World) -> list[Result]:
    probes = world.some(100, 15)
    async with parties(world, 1) as found:
        turns = {OURS: partial(found.ours.delays, probes), BY_HAND: partial(found.chained, probes)}
        taken = await interleave({n: partial(_patiently, t) for n, t in turns.items()}, world.rounds(5, 2))
    results = _results("idle", taken)
    results[0].notes.append(
        f"classic scopes: one write at a time; PostgreSQL, fsync on; a worker process on each side; {probes} writes a"
        " round"
    )
    return results


async def _half(world: World) -> list[Result]:
    """At half load: with the default number of worker processes, and with one. All are started again for each
    repetition, because one pool may behave differently from the next."""
    probes, repetitions = world.some(100, 15), world.some(3, 1)
    results: list[Result] = []
    for processes in (PROCESSES,) if world.quick else (PROCESSES, 1):
        delays: dict[str, list[list[float]]] = {OURS: [], BY_HAND: []}
        rates, reads, stale = [], 0, 0
        for _ in range(repetitions):
            async with parties(world, processes) as found:
                saturated = await _saturate(found, world.some(2, 1))
                rates.append(saturated)
                turns = {
                    OURS: partial(found.loaded, probes, saturated / 2),
                    BY_HAND: partial(found.chained_loaded, probes, saturated / 2),
                }
                taken = await interleave({n: partial(_patiently, t) for n, t in turns.items()}, 2, warm=False)
                for name, rounds in taken.items():
                    delays[name].append([delay for each in rounds for delay in each])
                reads, stale = reads + found.ours.reads, stale + found.ours.stale
        who = "one worker process" if processes == 1 else f"{processes} worker processes, the default"
        half = _results(f"at half load, {who}", delays, worst=True)
        half[0].notes.append(
            f"{who}: {repetitions} repetitions, each with a pool of its own; both sides are offered half of what the"
            f" pool applied with always about {BACKLOG:,} before it:"
            f" {', '.join(f'{rate / 2:,.0f}/s' for rate in rates)}, into {len(OTHERS)} other rooms; {reads} reads of"
            f" the room after each drop, of them stale: {stale}"
        )
        results += half
    return results


async def _patiently(probe: Callable[[], Awaitable[list[float]]]) -> list[float]:
    async with asyncio.timeout(_PATIENCE):
        return await probe()


def _results(when: str, found: dict[str, list[list[float]]], *, worst: bool = False) -> list[Result]:
    """``worst``: the bound must be kept in each repetition, not only in most of them."""
    results = []
    for share, name, bound in ((0.5, "p50", 2.0), (0.99, "p99", 3.0)):
        result = Result("propagation", f"acknowledged to dropped elsewhere, {when}, {name}", "ms")
        result.samples = {
            who: [percentile(delays, share) for delays in rounds] for who, rounds in found.items()
        }
        if worst:
            result.at_most_ever(bound, BY_HAND)
        else:
            result.at_most(bound, BY_HAND)
        results.append(result)
    return results


async def _saturate(parties: Parties, seconds: float) -> float:
    """Events that the pool applies a second, while some always wait."""
    settings, loading = parties.settings, parties.loading
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    async with redis.asyncio.Redis.from_url(settings.redis_url) as client:

        async def applied() -> int:
            partitions = range(keys.log_partitions)
            return sum([int(await client.hget(keys.meter(p), "applied") or 0) for p in partitions])

        await loading.ask("flood", OTHERS, BACKLOG)
        await asyncio.sleep(seconds / 4)
        began, before = time.monotonic(), await applied()
        await asyncio.sleep(seconds)
        rate = (await applied() - before) / (time.monotonic() - began)
    await loading.ask("unload")
    await drained(parties.bus)
    return rate


async def drained(bus: Bus) -> None:
    async def drained() -> bool:
        return (await bus.health()).backlog == 0

    await eventually(drained, 60)


async def _caught_up(url: str, log: str) -> None:
    """Wait until the chain has nothing left to do."""
    async with redis.asyncio.Redis.from_url(url) as client:

        async def caught_up() -> bool:
            [group] = await client.xinfo_groups(log)
            return group["lag"] == 0 and group["pending"] == 0

        await eventually(caught_up, 60)
