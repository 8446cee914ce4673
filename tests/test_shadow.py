"""Shadow reads find copies that are really stale, in either tier; races, dead workers and outages are not breaches.

A stale copy is planted by changing the row in the database behind the bus's back: through the store's own Writer, with
a newer version, and with no fan-out.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson
import pytest
import redis
from redis.commands.core import Script

import mnemobus
from mnemobus import Memory, Settings
from mnemobus.connection.link import script
from mnemobus.keys import APPLY_GROUP, Keyspace, Version, room_scope
from mnemobus.log.events import DELETE, UPDATE, Event
from mnemobus.store import open_writer
from servers import RedisServer, eventually

Connect = Callable[..., mnemobus.Bus]
ROOM = room_scope("messages", "r1")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Every hit is compared, and the bound is short."""
    return settings.model_copy(update={"shadow_reads": 1.0, "heartbeat": 0.05, "max_staleness": 0.3})


def said(text: str, **fields: Any) -> Memory:
    return Memory(table="messages", room="r1", content={"text": text}, **fields)


def later() -> Version:
    return Version(time.time_ns() // 1_000_000 + 1000, 0)


async def plant(settings: Settings, memory: Memory, op: str = UPDATE) -> Version:
    """Change a memory in the store, or delete it, and tell nobody."""
    version = later()
    content = b'{"text": "planted"}' if op == UPDATE else None

    def apply() -> None:
        with closing(open_writer(settings)) as writer:
            writer.open()
            writer.apply([Event(op, memory.dimensions, memory.id, content=content, version=version)])

    await asyncio.to_thread(apply)
    return version


def fan_out(settings: Settings, *scopes: str) -> None:
    """Tell everyone of it, as a worker does."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    with redis.Redis.from_url(settings.redis_url) as client:
        for scope in scopes:
            epoch = client.hget(keys.epoch, "epoch") or b""
            buckets = [key.decode() for key in client.scan_iter(f"*:b:*:{scope}")]
            names = [keys.epoch, keys.identity, keys.feed(keys.feed_partition(scope)), *buckets]
            payload = orjson.dumps({"p": 0, "v": [], "s": [scope]})
            arguments = [epoch, 100, 1 << 20, "apply", 1, payload, len(buckets), 0]
            Script(client, script("fanout").source)(keys=names, args=arguments)


async def decided(bus: mnemobus.Bus) -> None:
    """Wait until no shadow read is under way."""
    await eventually(lambda: bus._shadow.under_way == 0)


async def verified(bus: mnemobus.Bus) -> None:
    """Wait for a heartbeat: local copies are served for a while, however busy the machine is."""
    assert await bus._feed.sync()


async def breach_of(bus: mnemobus.Bus, ask: Callable[[], Any], number: int = 1) -> None:
    """Wait until a breach is found; ask again, in case the copy was not served just when it was looked at again."""

    async def found() -> bool:
        if bus.stats().breaches_local + bus.stats().breaches_shared == number:
            return True
        if not bus._shadow.under_way:
            await ask()
        return False

    await eventually(found)
    await decided(bus)


async def stored(bus: mnemobus.Bus, memory: Memory) -> Memory:
    """Write a memory, and have it cached in this bus and in Redis."""
    await bus.write(memory, durability="committed")

    async def local() -> bool:
        await bus.get(memory.id)
        return (await bus.recent("messages", room="r1")).source == "local"

    await eventually(local)
    await decided(bus)
    return memory


QUERIES: dict[str, Callable[[mnemobus.Bus, Memory], Any]] = {
    "get": lambda bus, memory: bus.get(memory.id),
    "recent": lambda bus, memory: bus.recent("messages", room="r1", limit=5),
    "recent, of an entity in a room": lambda bus, memory: bus.recent("messages", room="r1", entity="e"),
    "recent, by entity": lambda bus, memory: bus.recent("messages", entity="e"),
    "recent, by agent": lambda bus, memory: bus.recent("messages", agent="a"),
    "recent, by world": lambda bus, memory: bus.recent("messages", world="w"),
    "recent, a page": lambda bus, memory: bus.recent(
        "messages", room="r1", before=memory.created_at + timedelta(seconds=1)
    ),
    "recent, forward": lambda bus, memory: bus.recent(
        "messages", room="r1", after=(memory.created_at, str(UUID(int=0)))
    ),
}


@pytest.mark.parametrize("ask", QUERIES.values(), ids=QUERIES)
async def test_g5_a_stale_local_copy_is_counted_logged_and_dropped(
    settings: Settings, pool: Settings, connect: Connect, caplog: pytest.LogCaptureFixture, ask: Any
) -> None:
    async with connect() as bus:
        # Given a copy in this process, made by any kind of query
        memory = await stored(bus, said("old", entity="e", agent="a", world="w"))
        for _ in range(3):
            first = await ask(bus, memory)
        await decided(bus)
        before = bus.stats()
        assert before.breaches_local == before.breaches_shared == 0
        assert (await bus.health()).ok

        # When the store has something newer, and nobody says so
        newer = await plant(settings, memory)
        await verified(bus)
        drops = bus.stats().drops
        assert await ask(bus, memory) == first
        assert bus.stats().hits_local == before.hits_local + 1

        # Then it is found
        await breach_of(bus, lambda: ask(bus, memory))
        # and dropped here
        assert bus.stats().drops == drops + 1
        # and in the log, with scope, age and versions; but not before the bound had passed
        [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
        said_so = re.fullmatch(
            r"the local copy of \w+:\S+ was older than the store for (\d\.\d) s, where 0\.35 s are promised:"
            rf" {memory.id} is \d+-\d+ there, {newer} in the store\. Dropped it",
            record.getMessage(),
        )
        assert said_so
        assert float(said_so[1]) >= 0.3
        # and in the state of health
        assert (await bus.health()).problems == (
            "copies were older than promised: 1 local, 0 shared; the log names them",
        )


async def test_g5_a_stale_count_and_a_copy_of_what_is_deleted_are_found(
    settings: Settings, pool: Settings, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect() as bus:
        memory = await stored(bus, said("old"))
        assert await bus.count("messages", room="r1") == 1
        await plant(settings, memory, DELETE)
        await verified(bus)
        await breach_of(bus, lambda: bus.count("messages", room="r1"))
        assert "it counts 1, the store 0" in caplog.text

        await verified(bus)
        await breach_of(bus, lambda: bus.get(memory.id), 2)
        assert "missing in the store" in caplog.text
        assert bus.stats().breaches_local == 2


async def test_g5_a_stale_shared_copy_is_counted_logged_and_dropped(
    settings: Settings, pool: Settings, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a copy in Redis, and an agent that has none of its own
    async with connect(shadow_reads=0) as writer, connect(local_max_entries=0) as bus:
        memory = await stored(writer, said("old"))
        newer = await plant(settings, memory)

        # When it is read from there
        await verified(bus)
        answer = await bus.recent("messages", room="r1")
        assert (answer.source, answer[0].content["text"]) == ("shared", "old")

        # Then it is found, after the bound
        await breach_of(bus, lambda: bus.recent("messages", room="r1"))
        assert bus.stats().breaches_local == 0
        assert re.search(rf"the shared copy of {ROOM} was older .* {newer} in the store", caplog.text)
        # and is gone for everyone
        await verified(bus)
        answer = await bus.recent("messages", room="r1")
        assert (answer.source, answer[0].content["text"]) == ("store", "planted")


async def test_a_race_between_commit_and_fan_out_is_no_breach(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect() as bus, connect(local_max_entries=0) as remote:
        # Given copies in both tiers that are compared just after a commit
        memory = await stored(bus, said("old"))
        await plant(settings, memory)
        await verified(bus)
        assert (await bus.recent("messages", room="r1"))[0].content["text"] == "old"
        await verified(remote)
        assert (await remote.recent("messages", room="r1"))[0].content["text"] == "old"
        await eventually(lambda: bus._shadow.under_way and remote._shadow.under_way)
        # When its fan-out comes a moment later
        fan_out(settings, ROOM)
        # Then there is nothing to say
        await decided(bus)
        await decided(remote)
        assert (await bus.recent("messages", room="r1"))[0].content["text"] == "planted"
        for stats in (bus.stats(), remote.stats()):
            assert stats.shadow_reads >= 1
            assert stats.breaches_local == stats.breaches_shared == 0


async def test_a_worker_that_died_between_commit_and_fan_out_is_no_breach(
    settings: Settings, pool_of: Any, connect: Connect
) -> None:
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    log = keys.log(keys.log_partition("r1"))
    with redis.Redis.from_url(settings.redis_url) as client:
        async with connect() as bus:
            with pool_of(settings):
                memory = await stored(bus, said("old"))
            # Given an event that a worker has read and committed, but neither fanned out nor confirmed
            event = Event(UPDATE, memory.dimensions, memory.id, content=b'{"text": "new"}')
            fields = event.fields()
            client.xadd(log, dict(zip(fields[::2], fields[1::2], strict=True)))
            client.xreadgroup(APPLY_GROUP, "dead", {log: ">"})
            await plant(settings, memory)

            # When the copy is compared, and the bound passes
            await verified(bus)
            assert (await bus.get(memory.id)).content["text"] == "old"  # type: ignore[union-attr]
            await eventually(lambda: bus.stats().shadow_reads >= 1 and bus._shadow.under_way)
            checks = set(bus._shadow._tasks)
            beats = bus._feed.heartbeat.beats
            await eventually(lambda: bus._feed.heartbeat.beats > beats + 12)

            # Then it is not held against the caches
            assert not any(check.done() for check in checks)
            assert bus.stats().breaches_local == 0
            # nor is it when another worker takes over, and does what was left
            with pool_of(settings):
                await eventually(lambda: all(check.done() for check in checks))
            assert bus.stats().breaches_local == 0


async def test_shadow_reads_0_compares_nothing(settings: Settings, pool: Settings, connect: Connect) -> None:
    async with connect(shadow_reads=0) as bus:
        memory = await stored(bus, said("old"))
        await plant(settings, memory)
        await verified(bus)
        for _ in range(1000):
            await bus.get(memory.id)
        assert bus.stats().hits_local >= 1000
        assert bus._shadow.under_way == 0
        assert bus.stats().shadow_reads == 0


async def test_shadow_reads_sets_the_share_that_is_compared(pool: Settings, connect: Connect) -> None:
    async with connect(shadow_reads=0.05) as bus:
        memory = await stored(bus, said("x"))
        before = bus.stats()
        for _ in range(4000):
            await bus.get(memory.id)
            if bus._shadow.under_way:
                await decided(bus)
        compared = bus.stats().shadow_reads - before.shadow_reads
        # 200 are expected; 5 standard deviations are 69
        assert 130 < compared < 270
        assert bus.stats().breaches_local == 0


async def test_only_a_few_shadow_reads_are_under_way(
    pool: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as bus:
        memory = await stored(bus, said("x"))
        # Given a store that takes its time
        gate, asked = asyncio.Event(), 0
        read = bus._reader.get

        async def slow(id: str) -> Any:
            nonlocal asked
            asked += 1
            await gate.wait()
            return await read(id)

        monkeypatch.setattr(bus._reader, "get", slow)
        # When there are many hits
        await verified(bus)
        for _ in range(100):
            assert await bus.get(memory.id) == memory
            await asyncio.sleep(0)
        # Then none of them waits, and hardly any is compared
        assert asked == bus._shadow.under_way == 2
        gate.set()
        await decided(bus)
        # and later ones are again
        await bus.get(memory.id)
        await eventually(lambda: asked == 3)


async def test_g7_with_the_store_or_redis_away_nothing_is_compared_and_nothing_said(
    settings: Settings,
    pool_of: Any,
    connect: Connect,
    own_redis: Callable[..., RedisServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    async with connect(redis_url=server.url, max_staleness=20) as bus:
        with pool_of(settings):
            memory = await stored(bus, said("x"))
        caplog.clear()
        asked = 0

        async def away(id: str) -> Any:
            nonlocal asked
            asked += 1
            raise mnemobus.StoreUnavailable("it is away")

        with monkeypatch.context() as patch:
            patch.setattr(bus._reader, "get", away)
            assert await bus.get(memory.id) == memory
            await eventually(lambda: asked == 1)
            await decided(bus)
        # With Redis away, it can't be told what was fanned out
        await plant(settings, memory)
        server.kill()
        reads = bus.stats().shadow_reads
        assert await bus.get(memory.id) == memory
        await eventually(lambda: bus.stats().shadow_reads == reads + 1)
        await decided(bus)
        assert bus.stats().breaches_local == 0
        assert not [r for r in caplog.records if r.name == "mnemobus.shadow"]


async def test_closing_the_bus_ends_its_shadow_reads(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    # Given one that waits for its second look, and one that has just begun
    bus = connect(max_staleness=20)
    await bus.open()
    memory = await stored(bus, said("x"))
    await plant(settings, memory)
    await bus.get(memory.id)
    await eventually(lambda: bus._shadow._waiting == 1)
    await bus.get(memory.id)
    assert bus._shadow.under_way == 2
    # When the bus is closed
    await bus.close()
    # Then no task of it is left, and a late hit begins none
    assert [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("mnemobus")] == []
    bus._local.fresh_until = float("inf")
    bus._local.hit(f"id:{memory.id}", "get")
    assert bus._shadow.under_way == 0
