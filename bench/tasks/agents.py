"""1, 10, 100 and 500 agents beside one stream of writes: propagation, and Redis's cost of a write; classic and live."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import redis.asyncio

from mnemobus import Bus, Memory, connect
from mnemobus.keys import room_scope

from ..agents import started
from ..inside import TABLE
from ..measure import Result, percentile
from ..party import Party, moment
from ..world import World
from .interest import Places

PROCESSES = 4
FEW = 5
WRITES = 10
ALL, SOME = "all hold the room", "5 hold the room"
LIVE = "all hold the room live"
TALK = "talk"
"""A table whose scopes may be held live; those of messages are not."""


@dataclass
class Variant:
    """Rooms of one feed partition, and a message of each that belongs there, too. These are written again and again.

    version  the present number of the messages
    watched  how many agents hold the first room live
    """

    name: str
    rooms: list[str]
    ids: list[str]
    version: int = -1
    watched: int = 0
    reads: int = 0
    stale: int = 0


@dataclass
class Crowd:
    """The processes with agents."""

    parties: list[Party]
    sizes: list[int]
    heard: dict[str, list[int]] = field(default_factory=dict)
    """When a scope was dropped, by scope; or when a write was in a window, by version."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        for party in self.parties:
            party.on_told = self._told

    def _told(self, what: tuple[str, list[int]]) -> None:
        scope, moments = what
        self.heard.setdefault(scope, []).extend(moments)
        self.changed.set()

    async def grow(self, count: int) -> None:
        """Start agents, spread over the processes as evenly as possible."""
        wanted = _spread(count, len(self.parties))
        more = zip(self.parties, wanted, self.sizes, strict=True)
        await asyncio.gather(*(party.ask("open", now - before) for party, now, before in more))
        self.sizes = wanted

    async def hold(self, variant: Variant, count: int) -> None:
        """Have this many agents read the rooms."""
        self.heard.clear()
        wanted = _spread(count, len(self.parties))
        found = await asyncio.gather(
            *(
                party.ask("hold", 0, n, variant.rooms)
                for party, n in zip(self.parties, wanted, strict=True)
                if n
            )
        )
        read = [number for newest in found for numbers in newest for number in numbers]
        variant.reads += len(read)
        variant.stale += sum(number < variant.version for number in read)

    async def watch(self, room: str, count: int) -> None:
        """Have this many agents hold a room live."""
        self.heard.clear()
        wanted = zip(self.parties, _spread(count, len(self.parties)), strict=True)
        await asyncio.gather(*(party.ask("watch", 0, n, TALK, room) for party, n in wanted if n))

    async def unwatch(self) -> None:
        await asyncio.gather(*(party.ask("unwatch") for party in self.parties))

    async def moments(self, what: str, count: int) -> list[int]:
        """When each of this many agents dropped a scope, or had a write in its window."""
        async with asyncio.timeout(30):
            while len(self.heard.get(what, ())) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.heard[what]


def _spread(count: int, over: int) -> list[int]:
    return [count // over + (n < count % over) for n in range(over)]


async def run(world: World) -> list[Result]:
    counts = [1, 10] if world.quick else [1, 10, 100, 500]
    reach = Result(
        "agents", "acknowledged to dropped, or taken in, by each agent that holds the room, p99", "ms"
    )
    cost = Result("agents", "CPU of Redis for one write", "us")
    quiet = 0.4 if world.quick else 1.0
    settings = world.settings(local_max_entries=1_000, live=f"all,-{TABLE}")
    with world.workers(settings):
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(connect(**settings.model_dump()))
            server = await stack.enter_async_context(redis.asyncio.Redis.from_url(settings.redis_url))
            parties = [await stack.enter_async_context(Party(**started(settings))) for _ in range(PROCESSES)]
            crowd = Crowd(parties, [0] * PROCESSES)
            variants = _variants(Places(bus))
            for count in counts:
                await crowd.grow(count)
                for variant in variants:
                    listeners = FEW if variant.name == SOME else count
                    if listeners > count:
                        continue
                    name = (
                        f"{count} agents, {variant.name}"
                        if count > 1
                        else f"1 agent, {variant.name.replace('all hold', 'holds')}"
                    )
                    tails, costs = reach.samples[name], cost.samples[name] = [], []
                    for _ in range(world.rounds(3, 2)):
                        one = _live_round if variant.name == LIVE else _round
                        tail, used = await one(bus, server, crowd, variant, listeners, quiet)
                        tails.append(tail)
                        costs.append(used)
                    await crowd.unwatch()
                    for result in (reach, cost):
                        curve = result.curves.setdefault(variant.name, [])
                        curve.append((count, result.spread(name).median))
            figures = await asyncio.gather(*(party.ask("figures") for party in parties))
    if not world.quick:
        cost.at_most(1.5, f"10 agents, {SOME}", f"500 agents, {SOME}")
    reach.notes.append(
        f"one write at a time, {WRITES} a round, each into another room of one feed partition; agents in {PROCESSES}"
        " processes, SQLite. A write touches this partition alone; those that don't hold the room listen to another one"
    )
    reach.notes.append("where the room is held live, all writes go into one, and each is a new message")
    reach.notes.append(
        f"reads of the rooms after each round: {sum(v.reads for v in variants):,}, of them stale:"
        f" {sum(v.stale for v in variants)}; gaps {sum(f['gaps'] for f in figures):.0f}, replays"
        f" {sum(f['replays'] for f in figures):.0f}, resets {sum(f['resets'] for f in figures):.0f}, failed heartbeats"
        f" {sum(f['failed_heartbeats'] for f in figures):.0f}"
    )
    cost.notes.append(
        "user and system CPU of the server while it is written to, less what the heartbeats of all agents take in as"
        " long: their cost is the same for every variant of as many agents, and grows with the agents"
    )
    return [reach, cost]


def _variants(places: Places) -> list[Variant]:
    def variant(name: str, partition: int) -> Variant:
        return Variant(
            name,
            [places.room(partition) for _ in range(WRITES)],
            [places.id(partition) for _ in range(WRITES)],
        )

    return [variant(ALL, 0), variant(SOME, 1), Variant(LIVE, [f"live-{n}" for n in range(WRITES)], [])]


async def _round(
    bus: Bus, server: redis.asyncio.Redis, crowd: Crowd, variant: Variant, listeners: int, quiet: float
) -> tuple[float, float]:
    """The 99th percentile of the delays in ms, and us of the server's CPU for each write."""
    await crowd.hold(variant, listeners)
    began, before = time.monotonic(), await _cpu(server)
    await asyncio.sleep(quiet)
    rate = (await _cpu(server) - before) / (time.monotonic() - began)
    variant.version += 1
    delays: list[float] = []
    began, before = time.monotonic(), await _cpu(server)
    for room, id in zip(variant.rooms, variant.ids, strict=True):
        await bus.write(Memory(id=id, table="messages", room=room, content={"n": variant.version}))
        at = moment()
        drops = await crowd.moments(room_scope(TABLE, room), listeners)
        delays += [(drop - at) / 1e6 for drop in drops]
    used = await _cpu(server) - before - rate * (time.monotonic() - began)
    return percentile(delays, 0.99), used / len(variant.rooms) * 1e6


async def _live_round(
    bus: Bus, server: redis.asyncio.Redis, crowd: Crowd, variant: Variant, listeners: int, quiet: float
) -> tuple[float, float]:
    """The same for one room that is held live: no agent has to read it again after each write."""
    if variant.version < 0 or variant.watched != listeners:
        variant.watched = listeners
        await crowd.watch(variant.rooms[0], listeners)
    began, before = time.monotonic(), await _cpu(server)
    await asyncio.sleep(quiet)
    rate = (await _cpu(server) - before) / (time.monotonic() - began)
    delays: list[float] = []
    began, before = time.monotonic(), await _cpu(server)
    for _ in range(WRITES):
        variant.version += 1
        memory = Memory(table=TALK, room=variant.rooms[0], content={"n": variant.version})
        receipt = await bus.write(memory)
        at = moment()
        taken = await crowd.moments(str(receipt.version), listeners)
        delays += [(moment - at) / 1e6 for moment in taken]
    used = await _cpu(server) - before - rate * (time.monotonic() - began)
    return percentile(delays, 0.99), used / WRITES * 1e6


async def _cpu(server: redis.asyncio.Redis) -> float:
    info = await server.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])
