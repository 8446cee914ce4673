"""The log: each write once, in order, bounded, and as durable as requested."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import redis.asyncio

import mnemobus
from chaos.proxy import UP, Proxy
from mnemobus import (
    BacklogFull,
    DurabilityUnavailable,
    LogFull,
    LogUnavailable,
    Memory,
    NotCommitted,
    Settings,
    Version,
    WriteFailed,
)
from mnemobus.connection.link import Link
from mnemobus.errors import Overtaken
from mnemobus.keys import Dimensions
from mnemobus.log.append import append
from mnemobus.log.events import DELETE_ROOM, Event
from mnemobus.log.publisher import Publisher
from servers import RedisServer, eventually, worker_threads

Connect = Callable[..., mnemobus.Bus]


def said(text: str, room: str = "r1") -> Memory:
    return Memory(table="messages", room=room, content={"text": text})


async def length(url: str, settings: Settings) -> int:
    async with redis.asyncio.Redis.from_url(url) as client:
        keys = Link(settings).keys
        return sum([await client.xlen(keys.log(p)) for p in range(settings.log_partitions)])


def event(room: str = "r1") -> list[bytes]:
    return Event(DELETE_ROOM, Dimensions("messages", room)).fields()


async def test_g1_a_call_that_is_repeated_is_answered_and_not_done_again(settings: Settings) -> None:
    link = Link(settings.model_copy(update={"log_partitions": 1}))

    async def publish(producer: str, sequence: int, events: int) -> list[Version]:
        return (await append(link, 0, producer, sequence, [event()] * events)).versions

    first = await publish("a", 1, 3)
    assert len(first) == 3
    assert sorted(first) == first
    assert await publish("a", 1, 3) == first
    assert await publish("b", 1, 1) != first
    second = await publish("a", 2, 1)
    assert await publish("a", 2, 1) == second
    # A late copy of a call that was overtaken writes nothing
    with pytest.raises(Overtaken):
        await publish("a", 1, 3)
    assert await link.command("XLEN", link.keys.log(0)) == 5
    assert await link.command("HGET", link.keys.meter(0), "added") == b"5"
    await link.close()


async def test_g1_a_publish_whose_answer_is_lost_is_repeated_and_logged_once(
    own_redis: Any, settings: Settings
) -> None:
    # Given a Redis that takes calls and does not answer in time
    server: RedisServer = own_redis()
    overrides = {"redis_url": server.url, "redis_timeout": 0.3, "write_timeout": 10}
    async with mnemobus.connect(**{**settings.model_dump(), **overrides}) as bus:
        await bus.write(said("0"))
        server.pause()
        writing = asyncio.create_task(bus.write(said("1")))
        # When the call has timed out, was repeated, and Redis then goes on and executes what it had received
        await eventually(lambda: bus.stats().publish_retries >= 1)
        server.resume()
        await writing
        # Then the write is in the log once
        await bus.write(said("2"))
        assert await length(server.url, settings) == 3
        assert bus.stats().publish_calls > 3


async def test_g1_a_write_waits_out_a_restart(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        await bus.write(said("0"))
        server.stop()
        writes = [asyncio.create_task(bus.write(said(str(n)))) for n in range(20)]
        await eventually(lambda: bus.stats().publish_retries >= 1)
        server.start()
        versions = [(await write).version for write in writes]
        assert versions == sorted(versions)
        assert await length(server.url, settings) == 21


async def test_backpressure_makes_writes_wait_then_fail(settings: Settings, connect: Connect) -> None:
    # Given no workers, and room for five events
    async with connect(max_backlog=5, write_timeout=1) as bus:
        for n in range(5):
            await bus.write(said(str(n)))
        # Then the sixth write waits, tries again, and fails
        with pytest.raises(
            BacklogFull, match=r"holds 5 events that no worker has applied yet .*nothing was written"
        ):
            await bus.write(said("6"))
        assert bus.stats().publish_retries >= 1
        # while another partition takes writes as ever
        others = [
            r
            for r in map(str, range(50))
            if bus._link.keys.log_partition(r) != bus._link.keys.log_partition("r1")
        ]
        await bus.write(said("x", room=others[0]))
        assert await length(settings.redis_url, settings) == 6


async def test_backpressure_ends_when_workers_catch_up(pool: Settings, connect: Connect) -> None:
    async with connect(max_backlog=3, write_timeout=10) as bus:
        for n in range(40):
            await bus.write(said(str(n)))
        await eventually(lambda: counted(bus, 40))


async def counted(bus: mnemobus.Bus, n: int) -> bool:
    return await bus.count("messages", room="r1") == n


async def test_a_full_redis_refuses_the_write_and_nothing_is_half_written(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        await bus.write(said("0"))
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.config_set("maxmemory", "1")
            before = await length(server.url, settings)
            with pytest.raises(LogFull, match=r"out of memory .*nothing was written"):
                await bus.write_many([said(str(n)) for n in range(10)])
            assert await length(server.url, settings) == before
            await client.config_set("maxmemory", "0")
        await bus.write(said("1"))


async def test_synced_means_on_disk_or_an_error_before_anything_is_written(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    async with redis.asyncio.Redis.from_url(server.url) as client:
        info = await client.info()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        major, minor = (int(n) for n in info["redis_version"].split(".")[:2])
        if (major, minor) >= (7, 2):
            receipts = await asyncio.gather(
                *(bus.write(said(str(n)), durability="synced") for n in range(20))
            )
            assert len({r.version for r in receipts}) == 20
        else:
            with pytest.raises(
                DurabilityUnavailable, match=r"needs an append-only file and Redis 7.2 .*Nothing was written"
            ):
                await bus.write(said("x"), durability="synced")
            assert await length(server.url, settings) == 0
    # and a server that writes its file before it answers is as good
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.config_set("appendfsync", "always")
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        await bus.write(said("y"), durability="synced")


async def test_a_durability_that_does_not_exist_is_refused(settings: Settings, connect: Connect) -> None:
    async with connect() as bus:
        with pytest.raises(
            mnemobus.InvalidQuery, match="durability must be logged, synced or committed, not 'maybe'"
        ):
            await bus.write(said("x"), durability="maybe")  # type: ignore[arg-type]


async def test_a_producer_that_another_process_has_overtaken_is_told(settings: Settings) -> None:
    link = Link(settings.model_copy(update={"log_partitions": 1}))
    logged: list[Version] = []
    ahead = Publisher(link, 0, "same", lambda p, e, v, _: logged.append(v))
    behind = Publisher(link, 0, "same", lambda p, e, v, _: logged.append(v))
    event = Event(DELETE_ROOM, Dimensions("messages", "r"))
    for _ in range(2):
        [done] = ahead.publish([event])
        await done
    with pytest.raises(WriteFailed, match="producer same is in use by another process"):
        [done] = behind.publish([event])
        await done
    assert len(logged) == 2
    await link.close()


async def test_g1_what_follows_a_logged_write_follows_although_its_caller_is_gone(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as bus:
        task = asyncio.create_task(bus.write(said("x")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: bus.stats().writes == 1)
        assert bus.stats().marks == 1


async def test_thousands_of_receipts_are_waited_for_with_a_few_questions(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    async with (
        mnemobus.connect(**settings.model_dump()) as bus,
        redis.asyncio.Redis.from_url(server.url) as client,
    ):
        # Given many writes, that have been applied meanwhile
        receipts = await bus.write_many([said(str(n)) for n in range(3000)])
        with worker_threads(settings):
            await receipts[-1].committed(timeout=20)
        # When all receipts are waited for, one after the other
        await client.config_resetstat()
        for receipt in receipts:
            await receipt.committed()
        # Then that takes no round trip each
        asked = (await client.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]
        assert asked < 50


@pytest.mark.parametrize("outbox", ["auto", "off"])
async def test_g1_a_refusal_is_not_believed_while_an_unanswered_copy_may_still_arrive(
    own_redis: Any, settings: Settings, outbox: str
) -> None:
    server: RedisServer = own_redis()
    proxy = Proxy("127.0.0.1", server.port)
    await proxy.start()
    overrides = {"redis_url": proxy.url, "redis_timeout": 0.2, "outbox": outbox}
    async with (
        mnemobus.connect(**{**settings.model_dump(), **overrides}) as bus,
        redis.asyncio.Redis.from_url(server.url) as client,
    ):
        await bus.write(said("0"))
        # Given a call that the network holds, and that is repeated on another connection when Redis is full
        await client.config_set("maxmemory", "1")
        proxy.withhold(UP, new=False)
        receipt = None
        try:
            receipt = await bus.write(said("1"))
        except LogUnavailable as error:
            # Then its writer is not told that nothing was written
            assert "may or may not be in the log; when it was repeated: " in str(error)
        assert (receipt is not None and receipt.outboxed) == (outbox == "auto")
        # For when there is room, and the first copy arrives after all, it is in the log: once
        await client.config_set("maxmemory", "0")
        proxy.lift()
        await eventually(lambda: has(server.url, settings, 2))
        await bus.write(said("2"))
        await eventually(lambda: bus.stats().outbox == 0)
        assert await length(server.url, settings) == 3
    await proxy.close()


async def has(url: str, settings: Settings, events: int) -> bool:
    return await length(url, settings) == events


async def test_g1_an_answer_that_was_on_its_way_while_redis_lost_the_write_is_not_believed(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url, "redis_timeout": 20})
    proxy = Proxy("127.0.0.1", server.port)
    await proxy.start()
    async with (
        mnemobus.connect(**{**settings.model_dump(), "redis_url": proxy.url}) as bus,
        mnemobus.connect(**settings.model_dump()) as other,
    ):
        await bus.write(said("0"))
        # Given a write that Redis has taken, and whose answer the network holds
        trapped = proxy.trap(b"}:producers\r\n")
        writing = asyncio.create_task(bus.write(said("1")))
        await asyncio.wait_for(trapped, 5)
        await eventually(lambda: has(server.url, settings, 2))
        # When Redis comes back without it, the bus has looked for its writes, and what is newer is applied
        epochs = bus.stats().epochs
        server.kill()
        await asyncio.to_thread(server.restart, empty=True)
        await eventually(lambda: bus.stats().epochs > epochs and not bus._pending.in_doubt, timeout=20)
        with worker_threads(settings):
            await other.write(said("2"), durability="committed")
            # Then the answer, when it comes at last, is not taken for what the log has now
            proxy.lift()
            receipt = await writing
            with pytest.raises(NotCommitted, match="is no longer in the log"):
                await receipt.committed(timeout=10)
    await proxy.close()
