"""A connection to Redis on which nothing arrives for 45 s, without an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from chaos.proxy import DOWN, UP
from mnemobus import Settings
from scenarios.conftest import Way
from scenarios.telling import opened, said
from servers import AgentProcess, Workers, eventually

SECONDS = 45.0


@pytest.fixture
def protocol() -> int:
    """Of the writer; of the agents each has one or the other."""
    return 3


async def test_g5_g7_a_half_open_link_for_45_seconds_serves_nothing_older_than_promised_and_recovers(
    settings: Settings, workers: Callable[..., Workers], agent: Callable[..., AgentProcess], way: Way
) -> None:
    # Given agents with a copy, each a process with its own way to Redis, of either protocol
    settings = settings.model_copy(update={"heartbeat": 1.0, "max_staleness": 2.0})
    workers(settings)
    async with opened(settings) as writer:
        memory = said("0")
        await writer.write(memory, durability="committed")
        agents, proxies = [], []
        for protocol in (2, 3):
            for directions in ((UP, DOWN), (DOWN,)):
                proxy, mine = await way(settings.model_copy(update={"redis_protocol": protocol}))
                agents.append(await asyncio.to_thread(agent, mine))
                proxies.append((proxy, directions))

        async def recent(reader: AgentProcess) -> dict[str, Any]:
            return dict(await reader.do("recent", table="messages", room="r1"))

        for reader in agents:

            async def local(reader: AgentProcess = reader) -> bool:
                return bool((await recent(reader))["source"] == "local")

            await eventually(local)

        # When nothing passes any more, or no answer, for 45 s, and the memory changes every second
        for proxy, directions in proxies:
            proxy.withhold(*directions)
        began = time.monotonic()
        committed = [(began, 0)]
        failures: list[Any] = []
        sources: list[set[str]] = [set() for _ in agents]

        async def read(number: int, reader: AgentProcess) -> None:
            while time.monotonic() - began < SECONDS:
                asked = time.monotonic()
                answer = await recent(reader)
                got = int(answer["items"][0]["content"]["text"])
                due = max(n for at, n in committed if at <= asked - settings.max_staleness or n == 0)
                sources[number].add(answer["source"])
                if got < due or answer["stale"]:
                    failures.append((number, asked - began, answer["source"], got, due))
                await asyncio.sleep(0.2)

        async def write() -> int:
            n = 0
            while time.monotonic() - began < SECONDS:
                n += 1
                await writer.update(memory.id, content={"text": str(n)}, durability="committed")
                committed.append((time.monotonic(), n))
                await asyncio.sleep(1.0)
            return n

        last, *_ = await asyncio.gather(write(), *(read(n, reader) for n, reader in enumerate(agents)))

        # Then no answer was older than max_staleness: they came from the store, once copies could not be vouched for
        assert failures == []
        for reader in agents:
            answer = await recent(reader)
            assert (answer["source"], answer["items"][0]["content"]["text"]) == ("store", str(last))
        assert all("store" in found for found in sources)

        # And when the link is back, with all that it held, they serve copies again, of the last version
        for proxy, _ in proxies:
            proxy.lift()
        for reader in agents:

            async def served(reader: AgentProcess = reader) -> bool:
                answer = await recent(reader)
                assert answer["items"][0]["content"]["text"] == str(last)
                return bool(answer["source"] == "local")

            await eventually(served, 2 * settings.max_staleness)
        await writer.update(memory.id, content={"text": "over"}, durability="committed")
        for reader in agents:

            async def sees(reader: AgentProcess = reader) -> bool:
                return bool((await recent(reader))["items"][0]["content"]["text"] == "over")

            await eventually(sees, settings.max_staleness)
