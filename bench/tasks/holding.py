"""Holding scopes live: Redis's cost of an announcement without listeners; an agent that holds 10,000 rooms."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from functools import partial

import redis.asyncio

from mnemobus import Bus, connect
from mnemobus.connection.link import script
from mnemobus.log.append import publish_call

from ..agents import started
from ..floors.writes import flat
from ..inside import fill
from ..measure import Result, interleave
from ..party import Party
from ..world import World, message
from .units import Redis

FEW = 100
WRITES = 2_000
ANNOUNCED, SILENT = "announced, nobody listens", "not announced"


async def run(world: World) -> list[Result]:
    return [await _announcing(world), *await _many(world)]


async def _announcing(world: World) -> Result:
    """The script as it is, and without the lines that publish."""
    result = Result("holding", "Redis's CPU for one write", "us")
    times = world.some(1_000, 200)
    lines = script("publish").source.splitlines()
    silent = [line for line in lines if "'PUBLISH'" not in line]
    if len(silent) == len(lines):
        raise RuntimeError("publish.lua has no line that publishes")
    async with (
        connect(**world.settings(max_backlog=10**7).model_dump()) as bus,
        redis.asyncio.Redis.from_url(world.redis_url) as client,
    ):
        server = Redis(client)

        async def turn(name: str, sha: str) -> float:
            async def write() -> int:
                for _ in range(times):
                    sequences[name] += 1
                    event = flat(message("kitchen", sequences[name]))
                    keys, arguments = publish_call(bus._link, 0, name, sequences[name], [event])
                    await client.evalsha(sha, len(keys), *keys, *arguments)
                return times

            cpu, _, _ = await server.costs(write)
            return cpu

        sequences = {ANNOUNCED: 0, SILENT: 0}
        sources = {ANNOUNCED: lines, SILENT: silent}
        shas = {name: await client.script_load("\n".join(source)) for name, source in sources.items()}
        turns = {name: partial(turn, name, sha) for name, sha in shas.items()}
        result.samples = await interleave(turns, world.rounds(7, 2), warm=False)
    result.notes.append(
        "a message touches a room, an entity and an agent, so it is announced three times; alone in its call. Without"
        " the announcement: the same script without the lines that publish"
    )
    return result


async def _many(world: World) -> list[Result]:
    many, seconds = world.some(10_000, 500), world.some(3, 1)
    rooms = [f"room-{n}" for n in range(many)]
    settings = world.settings()
    fill(settings, [message(room, n) for room in rooms for n in range(2)])
    names = f"{FEW} rooms held live", f"{many:,} rooms held live"
    event = Result(
        "holding", "CPU of an agent for one write that it hears, by rooms that it holds live", "us"
    )
    beat = Result("holding", "CPU of an agent for one heartbeat, by rooms that it holds live", "us")
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connect(**settings.model_dump()))
        parties = [await stack.enter_async_context(Party(**started(settings))) for _ in names]
        for party, held in zip(parties, (rooms[:FEW], rooms), strict=True):
            await party.ask("open", 1)
            await party.ask("follow", 0, 1, "messages", held)
        for result in (event, beat):
            result.samples = {name: [] for name in names}
        for _ in range(world.rounds(3, 1)):
            before = await _figures(parties)
            await asyncio.sleep(seconds)
            quiet = await _figures(parties)
            writes = await _write(bus, rooms[:FEW], seconds)
            busy = await _figures(parties)
            for n, name in enumerate(names):
                beats = quiet[n]["beats"] - before[n]["beats"]
                idle = quiet[n]["cpu"] - before[n]["cpu"]
                beat.samples[name].append(idle / beats * 1e6)
                event.samples[name].append((busy[n]["cpu"] - quiet[n]["cpu"] - idle) / writes * 1e6)
        figures = await _figures(parties)
    event.notes.append(
        f"written at about {WRITES / seconds:,.0f}/s for {seconds} s into {FEW} rooms that both agents hold;"
        f" {figures[1]['live_windows']:,.0f} windows, live gaps: {figures[1]['live_gaps']:.0f}, channels lost:"
        f" {figures[1]['live_lost']:.0f}. No workers run meanwhile"
    )
    return [event, beat]


async def _figures(parties: list[Party]) -> list[dict[str, float]]:
    return list(await asyncio.gather(*(party.ask("figures") for party in parties)))


async def _write(bus: Bus, rooms: list[str], seconds: float) -> int:
    """This many writes, spread over some seconds."""
    ends, number = time.monotonic() + seconds, 0
    for step in range(steps := WRITES // len(rooms)):
        await bus.write_many([message(room, number + n) for n, room in enumerate(rooms)])
        number += len(rooms)
        left = ends - time.monotonic()
        await asyncio.sleep(max(0.0, left / (steps - step)))
    return number
