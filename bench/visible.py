"""The time from a write's acknowledgement until another process that holds the room live sees it, beside one bare hop.

Redis sends the announcement before it answers the writer. So the other process often has the write first: that counts
as 0. A hop is counted from the call of PUBLISH until the message is received; from its answer it would often be 0, too.
Both are also shown from the other moment: ours from the call of `write`, the hop from its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from mnemobus import Bus, connect

from .agents import started
from .floors.hop import Hop
from .floors.writes import flat
from .measure import OURS, Result, interleave, percentile
from .party import Party, moment
from .world import World, message

ROOM = "kitchen"
OTHERS = [f"room-{n}" for n in range(100)]
"""The rooms of the load; they are spread over all partitions of the log."""
RATE = 1_000
"""Writes a second of the load."""
HOP = "a bare PUBLISH hop"
ANSWERED = "the same, from its answer"
CALLED = f"{OURS}, from the call of write"
BESIDE = f"{HOP}, beside our load"
_PATIENCE = 60


class Delays(NamedTuple):
    """Milliseconds of one turn: as the figure counts them, and from the other moment."""

    counted: list[float]
    other: list[float]


class Watched:
    """A room that an agent in another process holds live, and writes to it."""

    def __init__(self, bus: Bus, party: Party) -> None:
        self._bus, self._party = bus, party
        self._heard: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._number = -1
        self.reads = self.stale = 0
        party.on_told = self._told

    def _told(self, what: tuple[str, list[int]]) -> None:
        self._heard[what[0]] = what[1][0]
        self._changed.set()

    async def delays(self, count: int) -> Delays:
        """The delays of one write after the other; from its acknowledgement, and from its call."""
        delays = Delays([], [])
        for _ in range(count):
            self._number += 1
            memory = message(ROOM, self._number)
            called = moment()
            receipt = await self._bus.write(memory)
            acknowledged = moment()
            async with asyncio.timeout(30):
                while (at := self._heard.pop(str(receipt.version), None)) is None:
                    self._changed.clear()
                    await self._changed.wait()
            delays.counted.append(max(0, at - acknowledged) / 1e6)
            delays.other.append((at - called) / 1e6)
        [newest] = await self._party.ask("newest", ROOM)
        self.reads, self.stale = self.reads + 1, self.stale + (newest != self._number)
        return delays


async def run(world: World) -> list[Result]:
    settings = world.settings("postgres")
    probes = world.some(150, 30)
    payload = b"1700000000000-0 1700000000000-0 000000000000 " + b"".join(flat(message(ROOM, 1)))
    async with (
        connect(**settings.model_dump()) as bus,
        Party(**started(settings)) as watching,
        Party(**started(settings)) as loading,
        Hop(settings.redis_url) as hop,
    ):
        with world.workers(settings):
            await watching.ask("open", 1)
            await loading.ask("open", 1)
            room = Watched(bus, watching)
            await bus.write(message(ROOM, 0))
            await watching.ask("watch", 0, 1, "messages", ROOM)

            async def hops(count: int) -> Delays:
                times = [await hop.publish(payload) for _ in range(count)]
                return Delays([t.sent / 1e6 for t in times], [t.answered / 1e6 for t in times])

            async def loaded(probe: Callable[[int], Awaitable[Delays]], count: int, *load: object) -> Delays:
                await loading.ask(*load)
                await asyncio.sleep(0.3)
                try:
                    return await probe(count)
                finally:
                    await loading.ask("unload")

            by_ours = "load", OTHERS, RATE
            by_hand = "load_published", "bench:nobody", payload.decode("latin-1"), RATE
            rounds = world.rounds(7, 2)
            idle = await _compare("idle", {OURS: room.delays, HOP: hops}, rounds, probes)
            busy = await _compare(
                f"at {RATE:,}/s",
                {
                    OURS: lambda count: loaded(room.delays, count, *by_ours),
                    HOP: lambda count: loaded(hops, count, *by_hand),
                    BESIDE: lambda count: loaded(hops, count, *by_ours),
                },
                rounds,
                probes,
            )
            figures = await watching.ask("figures")
    idle[0].notes += [
        "live: one write at a time, into a room that an agent of another process holds live, until it is in the"
        " window there, from where the next read has it; the payload of the hop is as long as what the log announces",
        "where the other process has it before the writer has its acknowledgement, that counts as 0. A hop is counted"
        " from the call of PUBLISH until the message is heard, since from its answer it, too, is often nothing",
        f"reads of the room after each turn: {room.reads}, of them not the last write: {room.stale}; the watcher's live"
        f" gaps: {figures['live_gaps']:.0f}, channels lost: {figures['live_lost']:.0f}",
    ]
    busy[0].notes.append(
        f"both beside {RATE:,}/s in other rooms or channels: ours beside as many writes, with workers that commit them;"
        f" {HOP} beside as many bare PUBLISH, and once beside our writes"
    )
    return idle + busy


async def _compare(
    when: str, probes: dict[str, Callable[[int], Awaitable[Delays]]], rounds: int, count: int
) -> list[Result]:
    async def turn(probe: Callable[[int], Awaitable[Delays]]) -> Delays:
        async with asyncio.timeout(_PATIENCE):
            return await probe(count)

    found = await interleave({name: partial(turn, probe) for name, probe in probes.items()}, rounds)
    results = []
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        result = Result("propagation", f"logged to visible elsewhere (live), {when}, {name}", "ms")
        result.samples = {who: _each(found[who], 0, share) for who in found}
        result.samples[CALLED] = _each(found[OURS], 1, share)
        result.samples[ANSWERED] = _each(found[HOP], 1, share)
        result.at_most(2, HOP)
        results.append(result)
    return results


def _each(rounds: Sequence[Delays], which: int, share: float) -> list[float]:
    return [percentile(delays[which], share) for delays in rounds]
