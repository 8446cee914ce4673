"""Propagation: from a write being acknowledged to the copy being dropped in another process, idle and at half load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import redis.asyncio

from mnemobus import Bus, connect
from mnemobus.keys import Keyspace
from servers import eventually

from ..agents import started
from ..measure import OURS, Result, interleave, percentile
from ..party import Party, moment
from ..world import World, message

ROOM = "kitchen"
OTHERS = [f"room-{n}" for n in range(100)]
"""Where the load goes; spread over all partitions of the log."""
BACKLOG = 4_000
"""Events that the pool has before it while it is saturated."""
_PATIENCE = 60
"""Seconds that a turn may take: who can't follow the load fails instead of taking for ever."""
BY_HAND = "the chain by hand"


class Listener:
    """An agent in a process of its own that holds the room, and says when it dropped it."""

    def __init__(self, party: Party) -> None:
        self._party = party
        self._dropped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        party.on_told = self._told

    def _told(self, what: tuple[str, list[int]]) -> None:
        if not self._dropped.done():
            self._dropped.set_result(what[1][0])

    async def hold(self) -> int:
        """Read the room; the number of the newest message in the answer."""
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
    from ..floors.chain import Chain
    from ..floors.store import prepare

    settings = world.settings("postgres")
    by_hand = world.database()
    prepare(by_hand)
    probes = world.some(120, 15)
    with world.workers(settings, 1):
        async with (
            connect(**settings.model_dump()) as bus,
            Party(**started(settings)) as listening,
            Party(**started(settings)) as loading,
            Chain(settings.redis_url, by_hand) as chain,
        ):
            await listening.ask("open", 1)
            await loading.ask("open", 1)
            ours = Ours(bus, Listener(listening))

            async def chained(count: int) -> list[float]:
                chain._acknowledged.clear()
                chain._heard.clear()
                found: list[float] = []
                for n in range(count):
                    await chain.write(message(ROOM, n))
                    found = await chain.delays()
                return [seconds * 1e3 for seconds in found]

            idle = await _compare("idle", world.rounds(7, 2), probes, ours.delays, chained)
            saturated = await _saturate(settings.redis_url, bus, loading, world.some(4, 1))
            rate = saturated / 2

            async def loaded(count: int) -> list[float]:
                await loading.ask("load", OTHERS, rate)
                await asyncio.sleep(0.2)
                try:
                    return await ours.delays(count)
                finally:
                    await loading.ask("unload")
                    await _drained(bus)

            async def chained_loaded(count: int) -> list[float]:
                await loading.ask("load_by_hand", chain._log, OTHERS, rate)
                await asyncio.sleep(0.2)
                try:
                    return await chained(count)
                finally:
                    await loading.ask("unload")
                    await _caught_up(settings.redis_url, chain._log)

            half = await _compare("at half load", world.rounds(7, 2), probes, loaded, chained_loaded)
            figures = await listening.ask("figures")
    for result in idle:
        result.notes.append(
            "one write at a time; PostgreSQL, fsync on; mnemobus: "
            f"one worker process; by hand: one; {probes} writes a round"
        )
    for result in half:
        result.notes.append(
            f"both are offered {rate:,.0f} writes/s into {len(OTHERS)} other rooms: half of the {saturated:,.0f}/s that"
            f" one worker process applied with always about {BACKLOG:,} before it"
        )
    half[0].notes.append(
        f"reads of the room after each drop: {ours.reads}, of them stale: {ours.stale}; the listener's gaps:"
        f" {figures['gaps']:.0f}, replays: {figures['replays']:.0f}, resets: {figures['resets']:.0f}"
    )
    return idle + half


Probe = Callable[[int], Awaitable[list[float]]]


async def _compare(when: str, rounds: int, probes: int, ours: Probe, by_hand: Probe) -> list[Result]:
    tails: dict[str, list[float]] = {OURS: [], BY_HAND: []}

    async def turn(name: str, probe: Probe) -> float:
        async with asyncio.timeout(_PATIENCE):
            delays = await probe(probes)
        tails[name].append(percentile(delays, 0.99))
        return percentile(delays, 0.5)

    middle = Result("propagation", f"acknowledged to dropped elsewhere, {when}, p50", "ms")
    tail = Result("propagation", f"acknowledged to dropped elsewhere, {when}, p99", "ms")
    middle.samples = await interleave(
        {OURS: lambda: turn(OURS, ours), BY_HAND: lambda: turn(BY_HAND, by_hand)}, rounds
    )
    tail.samples = {name: values[1:] for name, values in tails.items()}  # without the turn that doesn't count
    middle.at_most(2, BY_HAND)
    tail.at_most(3, BY_HAND)
    return [middle, tail]


async def _saturate(url: str, bus: Bus, loading: Party, seconds: float) -> float:
    """Events that the pool applies a second, with always some before it."""
    keys = Keyspace(bus.settings.redis_key_prefix, bus.settings.log_partitions, bus.settings.feed_partitions)
    async with redis.asyncio.Redis.from_url(url) as client:

        async def applied() -> int:
            partitions = range(keys.log_partitions)
            return sum([int(await client.hget(keys.meter(p), "applied") or 0) for p in partitions])

        await loading.ask("flood", OTHERS, BACKLOG)
        await asyncio.sleep(seconds / 4)
        began, before = time.monotonic(), await applied()
        await asyncio.sleep(seconds)
        rate = (await applied() - before) / (time.monotonic() - began)
    await loading.ask("unload")
    await _drained(bus)
    return rate


async def _drained(bus: Bus) -> None:
    async def drained() -> bool:
        return (await bus.health()).backlog == 0

    await eventually(drained, 60)


async def _caught_up(url: str, log: str) -> None:
    """The chain has nothing before it any more."""
    async with redis.asyncio.Redis.from_url(url) as client:

        async def caught_up() -> bool:
            [group] = await client.xinfo_groups(log)
            return group["lag"] == 0 and group["pending"] == 0

        await eventually(caught_up, 60)
