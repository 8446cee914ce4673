"""A process with any number of agents, each with its own bus: for the tasks with several processes.

`python -m bench.agents`, with the settings in the environment; called through party.py.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import lru_cache, partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import Redis

import mnemobus
from mnemobus import Memory, Settings
from mnemobus.cache.l1 import LiveBucket
from mnemobus.keys import room_scope
from servers import eventually

from .inside import all_of
from .party import moment, serve, tell
from .world import message

_TICK = 0.005
"""Seconds between the writes of a load with a given rate."""
_MADE = 5_000
T = TypeVar("T")
_TCP_BYTES_RECEIVED = 128
"""The offset in Linux's ``struct tcp_info``."""


class Agents:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._settings = Settings.load()
        self._port = urlsplit(self._settings.redis_url).port or 6379
        self._buses: list[mnemobus.Bus] = []
        self._holders: Counter[str] = Counter()
        """How many of the agents hold a scope; 0 again once all of them have dropped it."""
        self._drops: dict[str, list[int]] = {}
        self._seen: dict[str, list[int]] = {}
        """By version of a write: when each agent that watches its room had it."""
        self._load: asyncio.Task[None] | None = None
        self._unloading = False
        self._written = 0
        self._before = 0
        """The number of writes of earlier loads."""

    async def open(self, count: int) -> None:
        """Start this many more agents."""
        for _ in range(count):
            bus = await self._stack.enter_async_context(mnemobus.connect())
            bus.on_drop = self._dropped
            self._buses.append(bus)

    def _dropped(self, scope: str) -> None:
        at = moment()
        if scope not in self._holders:
            return
        drops = self._drops.setdefault(scope, [])
        drops.append(at)
        if len(drops) == self._holders[scope]:
            del self._holders[scope], self._drops[scope]
            tell([scope, drops])

    async def hold(self, first: int, last: int, rooms: list[str]) -> list[list[int]]:
        """Have agents, to which `MNEMOBUS_LIVE` allows nothing, read rooms until they have them; return for each room
        the numbers of the newest message they got.

        Once all of them have dropped a room, the parent is told: [scope, moments].
        """
        newest: list[list[int]] = []
        for room in rooms:
            scope = room_scope("messages", room)
            read = await asyncio.gather(*(self._hold(bus, room) for bus in self._buses[first:last]))
            self._holders[scope] = self._holders[scope] + last - first
            newest.append(read)
        return newest

    async def _hold(self, bus: mnemobus.Bus, room: str) -> int:
        found = await bus.recent("messages", room=room, limit=5)
        newest = max((memory.content["n"] for memory in found), default=-1)

        async def held() -> bool:
            return (await bus.recent("messages", room=room, limit=5)).source == "local"

        await eventually(held, 30)
        return newest

    async def watch(self, first: int, last: int, table: str, room: str) -> None:
        """Have agents hold a room live. Once all of them have an event in their window, tell: [version, moments]."""
        scope = room_scope(table, room)

        def watched(bus: mnemobus.Bus) -> None:
            changed = bus._local.changed

            def see(bucket: LiveBucket) -> None:
                changed(bucket)
                if bucket.name == scope:  # from here on a read has it
                    self._has(str(bucket.window.rows[-1].version), moment(), last - first)

            bus._local.changed = see  # type: ignore[method-assign]

        for bus in self._buses[first:last]:
            watched(bus)
        await self.follow(first, last, table, [room])

    async def unwatch(self) -> None:
        for bus in self._buses:
            vars(bus._local).pop("changed", None)

    async def follow(self, first: int, last: int, table: str, rooms: list[str]) -> None:
        """Have agents read rooms until they hold them live."""

        async def held(bus: mnemobus.Bus, room: str) -> bool:
            bus._local.drop(room_scope(table, room))
            await bus.recent(table, room=room, limit=5)
            return bus._local.live(room_scope(table, room)) is not None

        await all_of(
            eventually(partial(held, bus, room), 60) for room in rooms for bus in self._buses[first:last]
        )

    def _has(self, version: str, at: int, watching: int) -> None:
        seen = self._seen.setdefault(version, [])
        seen.append(at)
        if len(seen) == watching:
            del self._seen[version]
            tell([version, seen])

    async def newest(self, room: str) -> list[int]:
        """The number of the newest message that each agent reads."""
        found = [await bus.recent("messages", room=room, limit=5) for bus in self._buses]
        return [int(each[0].content["n"]) for each in found]

    async def figures(self) -> dict[str, float]:
        """Totals of all agents of this process: bytes received from Redis, the process's CPU seconds, counters."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        stats = [bus.stats() for bus in self._buses]
        return {
            "bytes": _received(self._port),
            "cpu": usage.ru_utime + usage.ru_stime,
            "beats": sum(bus._feed.heartbeat.beats for bus in self._buses),
            "invalidations": sum(s.invalidations for s in stats),
            "gaps": sum(s.gaps for s in stats),
            "live_gaps": sum(s.live_gaps for s in stats),
            "live_lost": sum(s.live_lost for s in stats),
            "live_windows": sum(s.live_windows for s in stats),
            "replays": sum(s.replays for s in stats),
            "resets": sum(s.resets for s in stats),
            "failed_heartbeats": sum(s.failed_heartbeats for s in stats),
            "stale_reads": sum(s.stale_reads for s in stats),
        }

    # Load

    async def flood(self, rooms: list[str], backlog: int) -> None:
        """Write so fast that about this many events always wait for the pool."""
        bus = self._buses[0]
        memories = _made(tuple(rooms))

        async def write() -> None:
            while not self._unloading:
                if (await bus.health()).backlog > backlog:
                    await asyncio.sleep(_TICK)
                    continue
                await self._send(bus, memories, backlog // 4)

        self._load = asyncio.create_task(write())

    async def load(self, rooms: list[str], rate: float) -> None:
        """Write at a rate."""
        bus = self._buses[0]
        memories = _made(tuple(rooms))

        async def write() -> None:
            began, sent = moment(), 0
            while not self._unloading:
                due = int((moment() - began) / 1e9 * rate)
                await self._send(bus, memories, due - sent)
                sent = due
                await asyncio.sleep(_TICK)

        self._load = asyncio.create_task(write())

    async def _send(self, bus: mnemobus.Bus, memories: list[Memory], count: int) -> None:
        await bus.write_many(list(islice(_around(memories, self._written), count)))
        self._written += count

    async def load_by_hand(self, log: str, rooms: list[str], rate: float) -> None:
        """XADD at a rate."""
        from .floors.writes import fields

        client: Redis = Redis.from_url(self._settings.redis_url)
        self._stack.push_async_callback(client.aclose)
        entries = [fields(memory) for memory in _made(tuple(rooms))]

        async def write() -> None:
            began, sent = moment(), 0
            while not self._unloading:
                due = int((moment() - began) / 1e9 * rate)
                if due > sent:
                    async with client.pipeline(transaction=False) as pipe:
                        for entry in islice(_around(entries, self._written), due - sent):
                            pipe.xadd(log, entry)
                        await pipe.execute()
                self._written += due - sent
                sent = due
                await asyncio.sleep(_TICK)

        self._load = asyncio.create_task(write())

    async def load_published(self, channel: str, payload: str, rate: float) -> None:
        """PUBLISH at a rate, without listeners."""
        client: Redis = Redis.from_url(self._settings.redis_url)
        self._stack.push_async_callback(client.aclose)

        async def write() -> None:
            began, sent = moment(), 0
            while not self._unloading:
                due = int((moment() - began) / 1e9 * rate)
                if due > sent:
                    async with client.pipeline(transaction=False) as pipe:
                        for _ in range(due - sent):
                            pipe.publish(channel, payload)
                        await pipe.execute()
                sent = due
                await asyncio.sleep(_TICK)

        self._load = asyncio.create_task(write())

    async def unload(self) -> int:
        """End the load; return how many writes it has made."""
        assert self._load is not None
        self._unloading = True  # not by cancelling: a call under way could swallow that
        await self._load
        self._load, self._unloading = None, False
        made, self._before = self._written - self._before, self._written
        return made


@lru_cache
def _made(rooms: tuple[str, ...]) -> list[Memory]:
    """The writes of a load, made in advance and repeated, so that the load takes little of the machine."""
    return [message(rooms[n % len(rooms)], n) for n in range(_MADE)]


def _around(items: list[T], start: int) -> Iterator[T]:
    start %= len(items)
    return chain(items[start:], cycle(items))


def _received(port: int) -> int:
    """Bytes that the connections of this process to a port have received, as the kernel counts them."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            mine = socket.socket(fileno=int(entry.name))
        except OSError:
            continue  # no socket, or closed meanwhile
        try:
            if mine.family in (socket.AF_INET, socket.AF_INET6) and mine.getpeername()[1] == port:
                info = mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _TCP_BYTES_RECEIVED)[0]
        except OSError:
            continue  # not connected
        finally:
            mine.detach()
    return total


async def main() -> None:
    async with AsyncExitStack() as stack:
        await serve(Agents(stack))


def started(settings: Settings) -> dict[str, Any]:
    """The arguments of a `Party` for such a process."""
    return {"module": "bench.agents", "environment": settings.environment()}


if __name__ == "__main__":
    asyncio.run(main())
