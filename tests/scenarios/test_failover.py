"""A planned failover: the master becomes a replica of its replica, and open connections stay where they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis.asyncio

from mnemobus import DurabilityUnavailable, LogUnavailable, Settings
from outside import stored
from scenarios.conftest import Way
from scenarios.telling import held, opened, said, sees
from servers import RedisServer, Workers, eventually

PAUSE = 0.02
"""Seconds between writes."""
BETWEEN = 1.5
"""Seconds without a server that takes writes."""
PROMISED = 1.0
BUSY = 2.0
"""Seconds that a busy machine may add."""


async def replicate(master: RedisServer, replica: RedisServer) -> None:
    async with redis.asyncio.Redis.from_url(replica.url) as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", master.port)

        async def in_step() -> bool:
            return (await client.info("replication"))["master_link_status"] == "up"

        await eventually(in_step)


async def hand_over(master: RedisServer, replica: RedisServer) -> None:
    """A failover as an operator makes it: nothing is lost, and no connection is closed."""
    async with redis.asyncio.Redis.from_url(master.url) as client:
        await client.execute_command("FAILOVER", "TO", "127.0.0.1", replica.port)

        async def over() -> bool:
            return (await client.info("replication"))["role"] == "slave"

        await eventually(over)


async def test_g1_g7_a_planned_failover_is_no_error_to_anybody_and_costs_a_second(
    settings: Settings, own_redis: Any, workers: Callable[..., Workers], way: Way
) -> None:
    # Given a master with a replica, workers and two agents, each with an address of its own that leads to the master
    old, new = own_redis(), own_redis()
    await replicate(old, new)
    settings = settings.model_copy(update={"redis_url": old.url, "claim_idle": 1.0})
    ways = [await way(settings) for _ in range(3)]
    await asyncio.to_thread(workers, ways[0][1], 1)
    writer, reader = opened(ways[1][1], write_timeout=20.0), opened(ways[2][1])
    async with writer, reader:
        receipts, ok_while_refused, refused_reads = [], [], []
        last_logged = 0.0
        done = asyncio.Event()

        async def write() -> None:
            nonlocal last_logged
            n = 0
            while not done.is_set():
                receipt = await writer.write(said(f"{n:05}"))
                receipts.append(receipt)
                if receipt.outboxed:
                    health = await writer.health()
                    # It may be back since the write was kept
                    if health.ok and receipt.outboxed:
                        ok_while_refused.append(health)
                else:
                    last_logged = time.monotonic()
                n += 1
                await asyncio.sleep(PAUSE)

        async def read() -> None:
            while not done.is_set():
                try:
                    await reader.recent("messages", room="r1")
                except Exception as error:  # noqa: BLE001 - none is wanted
                    refused_reads.append(error)
                await asyncio.sleep(PAUSE)

        writing, reading = asyncio.create_task(write()), asyncio.create_task(read())
        await receipts_of(receipts, 20)

        # If the master hands over to its replica, and the way there leads to it only after a while
        await hand_over(old, new)
        await asyncio.sleep(BETWEEN)
        during = await writer.health()
        assert not during.ok and during.problems
        led = time.monotonic()
        for proxy, _ in ways:
            proxy.lead_to("127.0.0.1", new.port)

        # Then writes are logged again within a second
        await eventually(lambda: last_logged > led, 20)
        assert last_logged - led < PROMISED + BUSY
        await receipts_of(receipts, len(receipts) + 20)
        done.set()
        await asyncio.gather(writing, reading)

        # And no call failed, health() said what was wrong for as long as it was, and is well again
        assert refused_reads == [] and ok_while_refused == []
        assert any(receipt.version for receipt in receipts) and writer.stats().outboxed > 0
        await eventually(lambda: writer.stats().outbox == 0)
        await eventually(lambda: is_well(writer), 20)
        # And every write is in the store, once and in its order, and both agents know
        for receipt in receipts:
            await receipt.committed(20)
        written = [f"{n:05}" for n in range(len(receipts))]
        assert await stored(ways[0][1]) == written
        versions = [receipt.version for receipt in receipts if receipt.version is not None]
        assert versions == sorted(versions) and len(versions) == len(written)
        await sees(reader, written[::-1][:20], 5)
        # And the feed is heard from the new one: an invalidation comes at once, not with a heartbeat
        await held(reader)
        await writer.write(said("after"), durability="committed")
        await sees(reader, ["after", *written[::-1][:19]], settings.max_staleness)


async def receipts_of(receipts: list[Any], count: int) -> None:
    await eventually(lambda: len(receipts) >= count, 30)


async def is_well(bus: Any) -> bool:
    return bool((await bus.health()).ok)


async def test_g7_without_an_outbox_a_failover_that_lasts_is_a_clear_error_and_a_short_one_is_none(
    settings: Settings, own_redis: Any, way: Way
) -> None:
    old, new = own_redis(), own_redis()
    await replicate(old, new)
    proxy, settings = await way(settings.model_copy(update={"redis_url": old.url}))
    async with opened(settings, outbox="off", write_timeout=1.0) as bus:
        await bus.write(said("0"))
        # If nobody takes writes for longer than a write may take, then it fails, and says why
        await hand_over(old, new)
        with pytest.raises(LogUnavailable, match=r"is a replica.*nothing was written"):
            await bus.write(said("1"))
        # And as soon as there is a way to the new master, the next one succeeds
        proxy.lead_to("127.0.0.1", new.port)
        assert (await bus.write(said("2"))).version is not None
        # If the failover is over by the time that it is noticed, then nobody hears of it
        await hand_over(new, old)
        proxy.lead_to("127.0.0.1", old.port)
        assert (await bus.write(said("3"))).version is not None


async def test_a_write_is_not_taken_for_synced_by_a_server_that_was_not_the_master_when_it_was_logged(
    settings: Settings, own_redis: Any, way: Way
) -> None:
    # Given a master with a replica that has one, too, so that either can confirm what it has written
    old, new, third = own_redis(), own_redis(), own_redis()
    await replicate(old, new)
    await replicate(new, third)
    proxy, settings = await way(settings.model_copy(update={"redis_url": old.url, "log_partitions": 1}))
    async with opened(settings) as bus:
        assert (await bus.write(said("0"), durability="synced")).version is not None
        # If the master hands over between logging a write and confirming it
        syncer = bus._writes.syncer
        sync = syncer.sync

        async def sync_after_failover() -> None:
            await hand_over(old, new)
            proxy.lead_to("127.0.0.1", new.port)
            await eventually(lambda: bus.stats().epochs == 1)
            await sync()

        syncer.sync = sync_after_failover  # type: ignore[method-assign]
        # Then the writer is told that it can't be known
        with pytest.raises(DurabilityUnavailable, match="failed over"):
            await bus.write(said("1"), durability="synced")
        # And the next one is confirmed by the new master
        syncer.sync = sync  # type: ignore[method-assign]
        assert (await bus.write(said("2"), durability="synced")).version is not None


async def test_g5_an_agent_that_is_left_with_the_old_master_serves_nothing_older_than_promised(
    settings: Settings, own_redis: Any, workers: Callable[..., Workers]
) -> None:
    # Given an agent with a local copy, and connections to the old master that nobody closes
    old, new = own_redis(), own_redis()
    await replicate(old, new)
    here, there = (settings.model_copy(update={"redis_url": server.url}) for server in (old, new))
    pool = await asyncio.to_thread(workers, here, 1)
    async with opened(here) as agent:
        memory = said("before")
        await agent.write(memory, durability="committed")
        assert await held(agent) == ["before"]
        await asyncio.to_thread(pool.stop)
        # If the new one takes over, and the old one, whose link to it is dead, hears nothing of what happens there
        async with redis.asyncio.Redis.from_url(new.url) as client:
            await client.execute_command("REPLICAOF", "NO", "ONE")
        async with redis.asyncio.Redis.from_url(old.url) as client:
            await client.execute_command("REPLICAOF", "127.0.0.1", 1)
        await asyncio.to_thread(workers, there, 1)
        async with opened(there) as other:
            await other.update(memory.id, content={"text": "after"}, durability="committed")
        # Then the copy is not served for longer than promised, and health() says why
        await asyncio.sleep(settings.max_staleness)
        found = await agent.recent("messages", room="r1")
        assert (found[0].content["text"], found.source) == ("after", "store")
        assert not (await agent.health()).ok
