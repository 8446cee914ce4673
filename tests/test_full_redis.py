"""A full Redis refuses writes (test_log.py), but reads, and commands that free space, still work."""

from __future__ import annotations

from typing import Any

import pytest
import redis.asyncio

import mnemobus
from conftest import worker_threads
from mnemobus import LogFull, Memory, Settings
from mnemobus_workers import upkeep
from servers import RedisServer, eventually

ROOM = "r1"


async def fill(server: RedisServer, settings: Settings) -> Settings:
    """Write more than Redis may hold. Workers have been there, but are gone: none of it is applied."""
    settings = settings.model_copy(update={"redis_url": server.url, "retention": 0})
    async with mnemobus.connect(**settings.model_dump()) as bus:
        with worker_threads(settings):
            receipt = await bus.write(Memory(table="messages", room=ROOM, content={}))
            await receipt.committed()
        content = {"text": "x" * 2000}
        await bus.write_many([Memory(table="messages", room=ROOM, content=content) for _ in range(2500)])
    return settings


async def test_a_full_redis_lets_agents_in_and_workers_make_room(
    own_redis: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 0.5)
    # Given a Redis that is full of events
    server: RedisServer = own_redis()
    settings = await fill(server, settings)
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.config_set("maxmemory", "5mb")
    # If an agent connects, then it can read, and is told why it can't write
    async with mnemobus.connect(**settings.model_dump()) as bus:
        assert len(await bus.recent("messages", room=ROOM)) == 1
        with pytest.raises(LogFull):
            await bus.write(Memory(table="messages", room=ROOM, content={}))
        # And however much it reads, this is said once, and by health() as long as it lasts
        for n in range(20):
            assert len(await bus.recent("messages", room=ROOM, limit=2 + n)) == 1
        assert "\n".join(caplog.messages).count("the shared cache can't be used") == 1
        assert any("results can't be shared" in problem for problem in (await bus.health()).problems)
        # If workers start, then they apply what is there, and trim it
        with worker_threads(settings):
            await eventually(lambda: backlog(bus, 0), timeout=20)
            assert await bus.count("messages", room=ROOM) == 2501
            await eventually(lambda: writes(bus), timeout=40)


async def test_a_redis_that_restarts_full_lets_everyone_in(own_redis: Any, settings: Settings) -> None:
    # Given a Redis that has more than it may hold as soon as it starts
    server: RedisServer = own_redis()
    settings = await fill(server, settings)
    server.options += ("--maxmemory", "5mb")
    server.restart()
    # If an agent connects, then it begins the new epoch, and workers do their work
    async with mnemobus.connect(**settings.model_dump()) as bus:
        assert len(await bus.recent("messages", room=ROOM)) == 1
        with worker_threads(settings):
            await eventually(lambda: backlog(bus, 0), timeout=20)


async def backlog(bus: mnemobus.Bus, expected: int) -> bool:
    return (await bus.health()).backlog == expected


async def writes(bus: mnemobus.Bus) -> bool:
    try:
        await bus.write(Memory(table="messages", room=ROOM, content={}))
    except LogFull:
        return False
    return True
