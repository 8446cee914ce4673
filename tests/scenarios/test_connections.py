"""The listening connection: before its first confirmation, right after a reconnect, and killed without an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import redis.asyncio

import mnemobus
from chaos.proxy import DOWN, UP
from mnemobus import Settings
from mnemobus.cache.l1 import clock
from scenarios.conftest import Way
from scenarios.telling import held, opened, said, sees, texts
from servers import RedisServer, eventually, worker_threads

SUBSCRIBE = b"SUBSCRIBE\r\n"
SOON: dict[str, Any] = {}
LATE: dict[str, Any] = {"heartbeat": 30.0, "max_staleness": 60.0}
"""No heartbeat helps, unless the test calls it."""

heartbeats = pytest.mark.parametrize("heartbeat", [SOON, LATE], ids=["heartbeats-soon", "heartbeats-late"])


async def answers(bus: mnemobus.Bus, until: Callable[[], bool]) -> list[tuple[float, list[str]]]:
    """The answers of the bus, with the times by `clock` when it was asked, until a condition holds."""
    found = []
    while not until():
        asked = clock()
        found.append((asked, texts(await bus.recent("messages", room="r1"))))
        await asyncio.sleep(0.01)
    return found


@pytest.mark.parametrize("withheld", [UP, DOWN], ids=["the-command", "its-confirmation"])
async def test_g4_g5_an_invalidation_between_subscribe_and_its_confirmation_is_not_missed(
    settings: Settings, pool: Settings, way: Way, withheld: str
) -> None:
    # Given an agent whose SUBSCRIBE is on its way, or has come to Redis and is not confirmed
    proxy, mine = await way(settings)
    async with opened(mine) as reader, opened(settings) as writer:
        await writer.write(said("old"), durability="committed")
        sent = proxy.trap(SUBSCRIBE, withheld)
        assert texts(await reader.recent("messages", room="r1")) == ["old"]
        await asyncio.wait_for(sent, 5)
        # and that reads meanwhile, again and again
        for _ in range(5):
            answer = await reader.recent("messages", room="r1")
            assert texts(answer) == ["old"] and answer.source != "local"

        # When the room changes
        await writer.write(said("new"), durability="committed")
        committed = clock()
        # and it is confirmed only then, amid other reads
        stop = asyncio.Event()
        reading = asyncio.create_task(answers(reader, stop.is_set))
        await asyncio.sleep(0.05)
        proxy.lift()

        # Then the agent begins to serve copies, and none of them is the old one
        assert await held(reader) == ["new", "old"]
        stop.set()
        late = [found for asked, found in await reading if asked > committed and found == ["old"]]
        assert late == []
        # and it hears what comes next
        await writer.write(said("last"), durability="committed")
        await sees(reader, ["last", "new", "old"], settings.max_staleness)


@heartbeats
async def test_g5_a_connection_that_is_lost_again_right_after_its_reconnect_loses_nothing(
    settings: Settings, pool: Settings, way: Way, heartbeat: dict[str, Any]
) -> None:
    proxy, mine = await way(settings)
    async with opened(mine, **heartbeat) as reader, opened(settings) as writer:
        expected = ["0"]
        await writer.write(said("0"), durability="committed")
        for n in range(1, 3):
            # Given an agent with a copy, whose connections are all lost
            assert await held(reader) == expected
            lost = reader.stats().reconnects
            back = proxy.trap(SUBSCRIBE)
            proxy.reset()
            # and that has just subscribed again, on a new one
            await asyncio.wait_for(back, 10)

            # When a write is told on that one, and that is lost, too, before anything has come through it
            await writer.write(said(str(n)), durability="committed")
            committed = clock()
            expected.insert(0, str(n))
            proxy.reset()

            # Then the agent does not serve what it had for longer than promised
            if heartbeat is SOON:
                bound = committed + settings.max_staleness
                seen = await answers(reader, lambda bound=bound: clock() > bound + 0.5)
                assert [found for asked, found in seen if asked > bound and found != expected] == []
            # and at the latest when it is back, it hears of the write
            await sees(reader, expected, 5)
            assert reader.stats().reconnects >= lost + 2


@heartbeats
async def test_g5_client_kill_of_the_listening_connection_loses_nothing(
    own_redis: Callable[..., RedisServer], settings: Settings, heartbeat: dict[str, Any]
) -> None:
    # Given an agent on a Redis whose listeners the test may kill
    settings = settings.model_copy(update={"redis_url": own_redis().url})
    with worker_threads(settings):
        async with (
            opened(settings, **heartbeat) as reader,
            opened(settings) as writer,
            client_of(settings) as client,
        ):
            expected: list[str] = []

            async def listening() -> bool:
                found = await client.client_list(_type="pubsub")
                return any(int(listener["sub"]) > 1 for listener in found)

            for n in range(6):
                if n:
                    assert await held(reader) == expected
                    await eventually(listening)
                    # When its listening connection is killed, and something is written before it is back
                    await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                await writer.write(said(str(n)), durability="committed")
                committed = clock()
                expected.insert(0, str(n))

                # Then it hears of it within the bound, though nothing told it that a message was lost
                await sees(reader, expected, settings.max_staleness + 0.5)
                assert clock() - committed < settings.max_staleness + 0.5
            assert reader.stats().reconnects >= 5
            assert reader.stats().failed_heartbeats == 0


def client_of(settings: Settings) -> Any:
    return redis.asyncio.Redis.from_url(settings.redis_url, decode_responses=True)
