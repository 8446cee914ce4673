"""Interest: the cost of an invalidation for 195 agents that hold other scopes, while 5 hold the scope that it names."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack

from mnemobus import Bus, Memory, connect
from mnemobus.keys import Dimensions, Keyspace, id_scope, room_scope

from ..agents import started
from ..measure import Result
from ..party import Party
from ..world import World

HOLD = "one of the 5 that hold the room"
OTHERS = "one of the other 195"
SHARE = "the same, holding a room of the same partition"
HOLDERS = 5
PROCESSES = 3
EACH = 65


class Places:
    """Rooms and memories by the feed partition that their scopes belong to."""

    def __init__(self, bus: Bus) -> None:
        settings = bus.settings
        self._keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
        self._random = random.Random(1)

    def room(self, partition: int) -> str:
        return next(r for r in self._rooms() if self.partition(room_scope("messages", r)) == partition)

    def room_outside(self, partitions: set[int]) -> str:
        return next(r for r in self._rooms() if self.partition(room_scope("messages", r)) not in partitions)

    def id(self, partition: int) -> str:
        return next(i for i in self._ids() if self.partition(id_scope(i)) == partition)

    def partition(self, scope: str) -> int:
        return self._keys.feed_partition(scope)

    def touched(self, memory: Memory) -> set[int]:
        dimensions = Dimensions(memory.table, memory.room, memory.agent, memory.entity, memory.world)
        return {self.partition(scope) for scope in dimensions.scopes(str(memory.id))}

    def _rooms(self) -> Iterator[str]:
        while True:
            yield f"room-{self._random.getrandbits(40):x}"

    def _ids(self) -> Iterator[str]:
        while True:
            yield str(uuid.UUID(int=self._random.getrandbits(128), version=4))


async def run(world: World) -> list[Result]:
    bytes_ = Result("interest", "one invalidation, 200 agents of which 5 hold the room: received", "bytes")
    cpu = Result("interest", "the same: CPU of an agent's process", "us")
    seconds = world.some(3, 1)
    settings = world.settings(live="off")
    with world.workers(settings):
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(connect(**settings.model_dump()))
            near = await stack.enter_async_context(Party(**started(settings)))
            far = [await stack.enter_async_context(Party(**started(settings))) for _ in range(PROCESSES)]
            places = Places(bus)
            id, number = str(uuid.uuid4()), -1
            touched = places.touched(_said(id, number))
            elsewhere = [places.room_outside(touched) for _ in range(10)]
            beside = places.room(places.partition(room_scope("messages", "kitchen")))
            await asyncio.gather(near.ask("open", HOLDERS), *(party.ask("open", EACH) for party in far))
            await asyncio.gather(*(party.ask("hold", 0, EACH, elsewhere) for party in far))

            async def window(write: bool) -> tuple[dict[str, float], dict[str, float], int]:
                """The costs of both kinds of agents during some seconds, and the number of writes."""
                before = await _figures([near]), await _figures(far)
                ends, writes = time.monotonic() + seconds, 0
                nonlocal number
                while write and time.monotonic() < ends:
                    number += 1
                    receipt = await bus.write(_said(id, number))
                    await receipt.committed()
                    writes += 1
                await asyncio.sleep(max(0.0, ends - time.monotonic()))
                after = await _figures([near]), await _figures(far)
                held, other = (
                    {name: now[name] - then[name] for name in now}
                    for then, now in zip(before, after, strict=True)
                )
                return held, other, writes

            for result, names in ((bytes_, (HOLD, OTHERS, SHARE)), (cpu, (HOLD, OTHERS, SHARE))):
                result.samples = {name: [] for name in names}
            reached = reached_sharing = total = reads = stale = 0
            for sharing in (False, True):
                if sharing:
                    await asyncio.gather(*(party.ask("hold", 0, EACH, [beside]) for party in far))
                for _ in range(world.rounds(3, 1)):
                    newest = (await near.ask("hold", 0, HOLDERS, ["kitchen"]))[0]
                    reads, stale = reads + HOLDERS, stale + sum(n < number for n in newest)
                    quiet_near, quiet_far, _ = await window(False)
                    busy_near, busy_far, writes = await window(True)
                    for name, agents, quiet, busy in (
                        (HOLD, HOLDERS, quiet_near, busy_near),
                        (SHARE if sharing else OTHERS, PROCESSES * EACH, quiet_far, busy_far),
                    ):
                        if sharing and name == HOLD:
                            continue
                        beat = quiet["bytes"] / quiet["beats"]
                        bytes_.samples[name].append((busy["bytes"] - beat * busy["beats"]) / writes / agents)
                        cpu.samples[name].append((busy["cpu"] - quiet["cpu"]) / writes / agents * 1e6)
                    if sharing:
                        reached_sharing += int(busy_far["invalidations"])
                    else:
                        reached += int(busy_far["invalidations"])
                        total += writes
    bytes_.at_most(0.01, HOLD, OTHERS)
    cpu.at_most(0.05, HOLD, OTHERS)
    bytes_.notes += [
        f"{total:,} writes, one at a time, each to the same message; it touches {len(touched)} of"
        f" {settings.feed_partitions} feed partitions, and the rooms of the others lie in none of them",
        f"messages that reached the other {PROCESSES * EACH} in all rounds together: {reached} (where they hold a room"
        f" of the same partition: {reached_sharing:,})",
        "received: by all connections of the processes to Redis, as the kernel counts them, less the heartbeats, whose"
        f" size is taken from {seconds} s without a write before each round",
    ]
    bytes_.notes.append(f"reads of the room after each round: {reads}, of them stale: {stale}")
    cpu.notes.append(
        f"CPU of the processes ({HOLDERS} agents in one, {EACH} in each of {PROCESSES}) in {seconds} s with writes,"
        " less that in as long without; their heartbeats go on in both, and are all that is left to differ"
    )
    return [bytes_, cpu]


def _said(id: str, number: int) -> Memory:
    return Memory(id=id, table="messages", room="kitchen", entity="ann", agent="bench", content={"n": number})


async def _figures(parties: list[Party]) -> dict[str, float]:
    found = await asyncio.gather(*(party.ask("figures") for party in parties))
    return {name: sum(figures[name] for figures in found) for name in found[0]}
