"""Coherence by the feed: lost, repeated, damaged and forged messages, reconnects, restarts, flushes; late fills."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
import redis.asyncio

import mnemobus
from mnemobus import Memory, Settings, StoreUnavailable
from mnemobus.cache.l1 import clock
from mnemobus.keys import Keyspace, room_scope
from servers import RedisServer, eventually, worker_threads

Connect = Callable[..., mnemobus.Bus]
ROOM = room_scope("messages", "r1")


def said(text: str, room: str = "r1", **fields: object) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)  # type: ignore[arg-type]


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    return settings.model_copy(update={"redis_protocol": request.param})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(settings.redis_url, protocol=2)
    yield client
    await client.aclose()


def keys_of(settings: Settings) -> Keyspace:
    return Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)


async def cached(bus: mnemobus.Bus, room: str = "r1") -> list[str]:
    """The room as the bus has it, from its own copy."""

    async def local() -> bool:
        return (await bus.recent("messages", room=room)).source == "local"

    await eventually(local)
    return [m.content["text"] for m in await bus.recent("messages", room=room)]


async def test_g5_a_gap_is_seen_with_the_next_message(
    settings: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async with connect(heartbeat=5, max_staleness=20) as bus:
        await bus.write(said("1"), durability="committed")
        assert await cached(bus) == ["1"]
        feed = keys_of(settings).feed(keys_of(settings).feed_partition(ROOM))
        last = (await client.xrevrange(feed, count=1))[0][0]
        payload = orjson.dumps({"p": 0, "v": ["1-1"], "s": [ROOM]})
        other = orjson.dumps({"p": 0, "v": ["1-2"], "s": ["id:other"]})

        # Given a message about the room that is lost
        lost = await client.xadd(feed, {"prev": last, "m": payload})
        # When the next one, about something else, arrives long before a heartbeat is due
        following = await client.xadd(feed, {"prev": lost, "m": other})
        await client.publish(feed, following + b" " + lost + b" " + other)

        # Then the room is dropped all the same
        await eventually(lambda: bus.stats().drops == 1)
        assert (bus.stats().gaps, bus.stats().replays) == (1, 1)


async def test_messages_twice_late_spoiled_or_forged_do_no_harm(
    settings: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async with connect() as bus:
        await bus.write(said("1"), durability="committed")
        assert await cached(bus) == ["1"]
        feed = keys_of(settings).feed(keys_of(settings).feed_partition(ROOM))
        [(last, fields)] = await client.xrevrange(feed, count=1)

        # When a message comes again, and with it all kinds of things that are none
        again = last + b" " + fields[b"prev"] + b" " + fields[b"m"]
        for data in (
            again,
            again,
            b"",
            b"nonsense",
            b"1-1 0-0 {}",
            b"1-1 0-0 [1]",
            b'1-1 0-0 {"p":0,"v":[],"s":[7]}',
            b'1-1 0-0 {"p":0,"v":["x"],"s":[]}',
            b"\xff\xfe \x00 \x01",
            b'99999999999999-0 5-5 {"p":0,"v":[],"s":[]}',
            b"99999999999999999999999999-0 0-0 {}",
        ):
            await client.publish(feed, data)
        await eventually(lambda: bus.stats().bad_messages == 8)

        # Then the bus has heard them, and hears what follows
        await bus.write(said("2"), durability="committed")
        assert await cached(bus) == ["2", "1"]
        async with connect() as other:
            await other.write(said("3"), durability="committed")
        await eventually(lambda: bus.stats().entries == 0)
        assert await cached(bus) == ["3", "2", "1"]
        assert bus.stats().restarted_tasks == 0


async def test_a_forged_position_beyond_the_head_is_found_out(
    settings: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async with connect() as bus:
        await bus.write(said("1"), durability="committed")
        assert await cached(bus) == ["1"]
        feed = keys_of(settings).feed(keys_of(settings).feed_partition(ROOM))
        last = (await client.xrevrange(feed, count=1))[0][0]
        # Given a message that follows the last, with an ID from the future, that the stream does not have
        await client.publish(feed, b"99999999999999-0 " + last + b' {"p":0,"v":[],"s":[]}')
        # Then the heartbeat finds the position ahead of the head, and drops what it can't vouch for
        await eventually(lambda: bus.stats().resets == 1)
        assert await cached(bus) == ["1"]
        await bus.write(said("2"), durability="committed")
        assert await cached(bus) == ["2", "1"]


async def test_g5_a_feed_that_no_longer_reaches_back_drops_the_partition(
    settings: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async with connect() as bus:
        await bus.write(said("1"), durability="committed")
        assert await cached(bus) == ["1"]
        feed = keys_of(settings).feed(keys_of(settings).feed_partition(ROOM))
        last = (await client.xrevrange(feed, count=1))[0][0]
        # When messages are lost, and trimmed before the bus looks
        other = orjson.dumps({"p": 0, "v": [], "s": ["id:other"]})
        async with client.pipeline(transaction=True) as pipe:
            for n in range(3):
                pipe.xadd(feed, {"prev": last if n == 0 else b"1-1", "m": other})
            pipe.xtrim(feed, maxlen=1, approximate=False)
            await pipe.execute()
        # Then the room is dropped, though no message that is left names it
        await eventually(lambda: bus.stats().drops == 1)
        assert bus.stats().resets == 1


async def test_g5_local_copies_are_not_served_while_redis_does_not_answer(
    own_redis: Any, settings: Settings, tmp_path: Any
) -> None:
    # Given a bus with a local copy, on a Redis of its own
    server: RedisServer = own_redis()
    overrides = {"redis_url": server.url, "heartbeat": 0.1, "max_staleness": 0.5, "redis_timeout": 0.5}
    async with mnemobus.connect(**{**settings.model_dump(), **overrides}) as bus:
        await eventually(lambda: local_twice(bus))

        # When that Redis hangs
        server.pause()
        await asyncio.sleep(settings.max_staleness / 2 + 0.1)

        # Then reads come from the store, and say so
        answer = await bus.recent("messages", room="r1")
        assert (answer.source, answer.stale) == ("store", False)
        health = await bus.health()
        assert not health.ok
        assert any("the feed is not verified" in problem for problem in health.problems)

        # And when it goes on, local copies are served again
        server.resume()
        await eventually(lambda: local_twice(bus))


async def test_g5_a_server_that_has_become_a_replica_vouches_for_nothing(
    own_redis: Any, settings: Settings
) -> None:
    # Given a bus with a local copy
    server: RedisServer = own_redis()
    async with (
        mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus,
        redis.asyncio.Redis.from_url(server.url) as client,
    ):
        await eventually(lambda: local_twice(bus))
        # If its server becomes a replica, whose link to the master is dead, but which goes on answering
        await client.execute_command("REPLICAOF", "127.0.0.1", 1)
        await asyncio.sleep(settings.max_staleness)
        # Then the copy is not served any more, and health() says why
        answer = await bus.recent("messages", room="r1")
        assert (answer.source, answer.stale) == ("store", False)
        assert any("is a replica" in problem for problem in (await bus.health()).problems)
        # And once it is the master again, copies are
        await client.execute_command("REPLICAOF", "NO", "ONE")
        await eventually(lambda: local_twice(bus))


@pytest.mark.parametrize(
    ("setting", "value", "vouches"),
    [("maxmemory", 1, True), ("min-replicas-to-write", 1, False)],
    ids=["full", "too few replicas"],
)
async def test_g5_a_master_that_takes_no_writes_vouches_unless_it_may_have_been_left_behind(
    own_redis: Any, settings: Settings, setting: str, value: int, vouches: bool
) -> None:
    server: RedisServer = own_redis()
    async with (
        mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus,
        redis.asyncio.Redis.from_url(server.url) as client,
    ):
        await eventually(lambda: local_twice(bus))
        # If the master takes no writes any more
        await client.config_set(setting, value)
        await asyncio.sleep(settings.max_staleness)
        # Then copies are served as before where nobody else can take them, either; else, they come from the store
        answer = await bus.recent("messages", room="r1")
        assert answer.source == ("local" if vouches else "store")
        if not vouches:
            assert bus.stats().failed_heartbeats > 0
        await client.config_set(setting, 0)
        await eventually(lambda: local_twice(bus))


async def test_g5_a_full_replica_that_does_not_say_that_it_is_one_vouches_for_nothing(
    own_redis: Any, settings: Settings
) -> None:
    # Given a bus with a local copy, whose server may be full as a replica, too
    server: RedisServer = own_redis("--replica-ignore-maxmemory", "no")
    async with (
        mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus,
        redis.asyncio.Redis.from_url(server.url) as client,
    ):
        await eventually(lambda: local_twice(bus))
        # If it is full, and becomes a replica: that it is full, it says first
        await client.config_set("maxmemory", 1)
        await client.execute_command("REPLICAOF", "127.0.0.1", 1)
        await asyncio.sleep(settings.max_staleness)
        # Then the copy is not served any more
        assert (await bus.recent("messages", room="r1")).source == "store"


async def local_twice(bus: mnemobus.Bus) -> bool:
    await bus.recent("messages", room="r1")
    return (await bus.recent("messages", room="r1")).source == "local"


async def test_g5_a_server_that_was_a_replica_meanwhile_begins_a_new_epoch(
    own_redis: Any, settings: Settings
) -> None:
    # Given a bus with a local copy, and a write that is not applied
    server, other = own_redis(), own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        await eventually(lambda: local_twice(bus))
        receipt = await bus.write(Memory(table="messages", room="r2", content={}))
        # If its server becomes the replica of one that has nothing of that, and then the master again
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.execute_command("REPLICAOF", "127.0.0.1", other.port)

            async def in_step() -> bool:
                return (await client.info("replication"))["master_link_status"] == "up"

            await eventually(in_step)
            await eventually(lambda: bus.stats().failed_heartbeats > 0)
            await client.execute_command("REPLICAOF", "NO", "ONE")
        # Then it is known for one that may have lost something, though it is the same process
        await eventually(lambda: bus.stats().epochs == 1)
        await eventually(lambda: local_twice(bus))
        with pytest.raises(mnemobus.NotCommitted, match="no longer in the log"):
            await receipt.committed()
        # And no other epoch begins with the next connection
        async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as second:
            assert second._link.epoch == bus._link.epoch
        assert bus.stats().epochs == 1


async def test_g5_a_restart_of_redis_begins_a_new_epoch(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        await eventually(lambda: local_twice(bus))
        async with redis.asyncio.Redis.from_url(server.url) as client:
            before = await client.hget(keys_of(settings).epoch, "epoch")
            shared = [key async for key in client.scan_iter("*:b:*")]
        assert len(shared) == 1

        # When Redis restarts with all it had
        server.restart()

        # Then what L2 held is out of reach, under the old epoch, and L1 starts anew
        await eventually(lambda: bus.stats().epochs == 1)
        await eventually(lambda: bus._feed.reachable)
        assert (await bus.recent("messages", room="r1")).source == "store"
        await eventually(lambda: local_twice(bus))
        async with redis.asyncio.Redis.from_url(server.url) as client:
            after = await client.hget(keys_of(settings).epoch, "epoch")
            assert after != before

        # And when it restarts empty, once more
        server.restart(empty=True)
        await eventually(lambda: bus.stats().epochs == 2)
        await eventually(lambda: local_twice(bus))


async def test_g5_a_flush_begins_a_new_epoch(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        await eventually(lambda: local_twice(bus))
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.flushall()
        await eventually(lambda: bus.stats().epochs == 1)
        await eventually(lambda: local_twice(bus))


async def test_g5_a_load_is_not_shared_for_longer_than_a_copy_is_served(settings: Settings) -> None:
    bound = 0.3
    short = {**settings.model_dump(), "heartbeat": 0.1, "max_staleness": bound}
    async with mnemobus.connect(**short) as bus:
        # Given a read whose answer from the store is long under way
        release, recent = asyncio.Event(), bus._reader.recent

        async def held(*arguments: Any) -> Any:
            rows = await recent(*arguments)
            await release.wait()
            return rows

        bus._reader.recent = held  # type: ignore[method-assign]
        first = asyncio.create_task(bus.recent("messages", room="r1"))
        await eventually(lambda: bus._local.holds(bus._link.keys.feed_partition("room:messages:r1")))
        second = asyncio.create_task(bus.recent("messages", room="r1"))
        await eventually(lambda: bus.stats().shared_loads == 1)
        began = clock()
        bus._reader.recent = recent  # type: ignore[method-assign]

        # Then a read that begins later than copies are served for asks anew
        await eventually(lambda: clock() - began > bound)
        assert (await asyncio.wait_for(bus.recent("messages", room="r1"), 5)).source == "store"
        assert not first.done() and not second.done()
        release.set()
        assert (await first).source == (await second).source == "store"


async def test_g7_a_read_survives_that_the_feeds_connection_closes_under_it(settings: Settings) -> None:
    async with mnemobus.connect(**settings.model_dump()) as bus:
        for room in range(4):
            ear = await eventually(lambda: bus._feed._ear)
            # If the connection is closed just while a read begins to listen to another partition
            read = asyncio.create_task(bus.recent("messages", room=f"r{room}"))
            asyncio.get_running_loop().call_soon(ear.cut)
            answer = await read
            # Then the read is answered all the same
            assert list(answer) == []
        await eventually(lambda: local_twice(bus))


async def test_g6_a_write_between_a_flush_and_its_discovery_is_waited_for(
    own_redis: Any, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    server: RedisServer = own_redis()
    quiet = {"redis_url": server.url, "heartbeat": 5.0, "max_staleness": 10.0, "own_write_timeout": 0.2}
    async with mnemobus.connect(**{**settings.model_dump(), **quiet, "live": "off"}) as bus:
        await bus.recent("messages", room="r1")
        await bus.write(said("lost"))

        # When Redis is flushed, and the bus writes again before it finds that out
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.flushall()
        await bus.write(said("kept"))
        assert await bus._feed.sync()

        # Then it knows that the first is lost, and that the second is not in the store yet: there are no workers
        assert bus.stats().epochs == 1
        assert "Redis was flushed or lost data: 1 writes may be lost with its log" in caplog.text
        assert bus.stats().marks == 1
        assert (await bus.recent("messages", room="r1")).stale


async def test_g6_nothing_waits_for_a_write_that_went_with_redis(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        # Given a write that no worker has applied
        await bus.write(said("x"))
        assert bus.stats().marks == 1

        # When Redis starts again, without it
        server.restart(empty=True)

        # Then the reads that it would touch are answered as any others
        await eventually(lambda: bus.stats().marks == 0)
        await eventually(lambda: local_twice(bus))


async def test_g7_with_redis_away_reads_go_on_and_writes_fail_clearly(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    overrides = {"redis_url": server.url, "write_timeout": 0.5, "outbox": "off"}
    async with mnemobus.connect(**{**settings.model_dump(), **overrides}) as bus:
        await eventually(lambda: local_twice(bus))
        server.stop()
        await eventually(lambda: not bus._feed.heartbeat.up)
        assert (await bus.recent("messages", room="r2")).source == "store"
        with pytest.raises(
            mnemobus.LogUnavailable, match=r"could not be reached in time .* may or may not be in the log"
        ):
            await bus.write(said("x"))
        server.start()
        await eventually(lambda: local_twice(bus))
        await bus.write(said("x"))


async def test_g7_with_both_away_the_last_known_copy_is_served_and_marked(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        await eventually(lambda: local_twice(bus))
        await bus.count("messages", room="r1")
        server.stop()
        # When the store goes, too
        await bus._reader.close()

        # Then what was known is served, marked; what was not known is a clear error
        async def stale() -> bool:
            return (await bus.recent("messages", room="r1")).stale

        await eventually(stale)
        assert (await bus.recent("messages", room="r1")).source == "local"
        with pytest.raises(StoreUnavailable):
            await bus.recent("messages", room="r2")
        assert bus.stats().stale_reads >= 2


async def test_g7_a_bus_opens_with_redis_away_and_finds_it_later(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    server.stop()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        assert (await bus.recent("messages", room="r1")).source == "store"
        server.start()
        await eventually(lambda: local_twice(bus))


async def test_with_both_away_a_bus_does_not_open(settings: Settings, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    overrides = {"redis_url": "redis://127.0.0.1:1", "database_url": f"sqlite:///{tmp_path}/file/x.db"}
    with pytest.raises(StoreUnavailable, match=r"neither Redis .* nor the store .* can be reached"):
        async with mnemobus.connect(**{**settings.model_dump(), **overrides}):
            pass


async def test_a_herd_of_agents_reads_the_store_once(pool: Settings, connect: Connect) -> None:
    async with connect() as first, connect() as second, connect() as third:
        await first.write(said("x"), durability="committed")
        agents = (first, second, third)
        await asyncio.gather(*(agent.recent("messages", room="other") for agent in agents))
        before = sum(agent.stats().misses for agent in agents)
        answers = await asyncio.gather(*(agent.recent("messages", room="r1") for agent in agents))
        assert [len(answer) for answer in answers] == [1, 1, 1]
        assert sum(agent.stats().misses for agent in agents) == before + 1


async def test_an_agent_listens_only_to_what_it_holds(
    settings: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    channels = [keys.feed(f) for f in range(settings.feed_partitions)]

    async def listeners() -> int:
        reply = await client.execute_command("PUBSUB", "NUMSUB", *channels)
        return int(sum(n for _, n in reply) if isinstance(reply[0], tuple) else sum(reply[1::2]))

    async with connect() as bus:
        assert await listeners() == 0
        await bus.recent("messages", room="r1")
        assert await listeners() == 1
        await bus.recent("messages", room="r1", limit=5)
        await bus.count("messages", room="r1")
        assert await listeners() == 1


async def test_a_spoiled_result_in_redis_is_dropped_and_read_anew(
    settings: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async with connect() as first:
        await first.write(said("x"), durability="committed")
        await first.recent("messages", room="r1")
        [key] = [k async for k in client.scan_iter(f"*{settings.redis_key_prefix}:f*:b:*")]
        for field in await client.hkeys(key):
            await client.hset(key, field, b"spoiled")
        async with connect() as second:
            assert [m.content["text"] for m in await second.recent("messages", room="r1")] == ["x"]
            assert second.stats().misses == 1


async def test_g5_an_answer_to_a_joiner_that_comes_late_steps_over_nothing(
    settings: Settings, pool: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as bus, connect() as writer:
        await writer.write(said("old"), durability="committed")
        feed = bus._feed
        asked, release = asyncio.Event(), asyncio.Event()
        settle = feed._settle

        async def late(partition: Any) -> None:
            asked.set()
            await release.wait()
            await settle(partition)

        monkeypatch.setattr(feed, "_settle", late)
        # Given a bus that joins a partition, and whose question for its head takes long
        await bus.recent("messages", room="r1")
        await asked.wait()
        # and a heartbeat that is faster, so that a copy is cached
        assert await cached(bus) == ["old"]

        # When the room changes, and pub/sub is too slow to say so before the late answer is there
        hear, held = feed.positions.receive, []
        monkeypatch.setattr(feed.positions, "receive", lambda *message: held.append(message))
        monkeypatch.setattr(feed.heartbeat, "_replay", lambda partition: asyncio.sleep(0))
        await writer.write(said("new"), durability="committed")
        release.set()
        await eventually(lambda: held and not any("settle" in t.get_name() for t in feed._tasks))
        monkeypatch.undo()
        for message in held:
            hear(*message)

        # Then the bus hears of the change all the same
        async def heard() -> bool:
            return [m.content["text"] for m in await bus.recent("messages", room="r1")] == ["new", "old"]

        await eventually(heard)


async def test_g5_a_feed_that_vanishes_before_its_replay_drops_the_partition(
    settings: Settings,
    pool: Settings,
    connect: Connect,
    client: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with connect() as bus:
        await bus.write(said("1"), durability="committed")
        assert await cached(bus) == ["1"]
        name = keys_of(settings).feed(keys_of(settings).feed_partition(ROOM))
        heartbeat = bus._feed.heartbeat
        replay, catch_up = heartbeat._replay, heartbeat._catch_up
        after: list[mnemobus.Stats] = []

        async def replay_too_late(partition: Any) -> None:
            await client.delete(name)
            await replay(partition)

        async def catch_up_and_look(heads: Any) -> None:
            await catch_up(heads)
            after.append(bus.stats())

        monkeypatch.setattr(heartbeat, "_replay", replay_too_late)
        monkeypatch.setattr(heartbeat, "_catch_up", catch_up_and_look)
        # Given a lost message, whose head a heartbeat has seen
        [(last, fields)] = await client.xrevrange(name, count=1)
        before = bus.stats()
        await client.xadd(name, {"prev": last, "m": fields[b"m"]})
        # When the stream is gone before it is replayed
        replayed = await eventually(lambda: [s for s in after if s.replays > before.replays])
        # Then everything is dropped before that heartbeat counts as good
        assert replayed[0].drops == before.drops + 1


@pytest.mark.parametrize("loss", ["flush", "restart"])
async def test_g1_a_write_that_redis_lost_is_not_reported_as_committed(
    own_redis: Any, settings: Settings, pool_of: Any, loss: str
) -> None:
    server: RedisServer = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    async with mnemobus.connect(**settings.model_dump()) as bus:
        # Given a write that no worker has seen yet
        receipt = await bus.write(said("lost"))
        # When Redis loses it
        if loss == "flush":
            async with redis.asyncio.Redis.from_url(server.url) as client:
                await client.flushall()
        else:
            server.restart(empty=True)
        await eventually(lambda: bus.stats().epochs == 1)
        with pool_of(settings):
            # and goes on with others, so that the log is applied far beyond its version
            await bus.write(said("next"), durability="committed")
            # Then its writer is not told that the store has it
            with pytest.raises(
                mnemobus.NotCommitted, match=r"no longer in the log: Redis was flushed, or restarted"
            ):
                await receipt.committed()
            assert [m.content["text"] for m in await bus.recent("messages", room="r1")] == ["next"]


async def test_g6_what_was_dropped_in_another_epoch_lifts_no_mark(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    feed = keys.feed(keys.feed_partition(ROOM))
    async with connect(own_write_timeout=0.01, live="off") as bus:
        await eventually(lambda: local_twice(bus))
        receipt = await bus.write(said("mine"))

        async def named(epoch: bytes) -> None:
            heard = bus.stats().invalidations
            partition = keys.log_partition("r1")
            payload = {"p": partition, "e": epoch.decode(), "v": [str(receipt.version)], "s": [ROOM]}
            last = (await client.xrevrange(feed, count=1) or [(b"0-0", None)])[0][0]
            id = await client.xadd(feed, {"prev": last, "m": orjson.dumps(payload)})
            await client.publish(feed, id + b" " + last + b" " + orjson.dumps(payload))
            await eventually(lambda: bus.stats().invalidations > heard)

        # When a worker names the write, but has not met the epoch yet: it dropped buckets that nobody uses any more
        await named(b"before")
        # Then the writer knows that it is committed, and does not yet trust what it is given
        await receipt.committed(timeout=0.1)
        assert (await bus.recent("messages", room="r1")).stale
        # And when it has done the same in this epoch, it does
        epoch = await client.hget(keys.epoch, "epoch")
        assert epoch is not None
        await named(epoch)
        assert not (await bus.recent("messages", room="r1")).stale


async def test_g6_a_fan_out_says_in_which_epoch_it_dropped_buckets(
    own_redis: Any, settings: Settings, pool_of: Any
) -> None:
    server: RedisServer = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    keys = keys_of(settings)
    async with mnemobus.connect(**settings.model_dump()) as bus:
        with pool_of(settings):
            await bus.write(said("1"), durability="committed")
            # When Redis restarts, and a worker that knows only the epoch before fans something out
            server.restart()
            await eventually(lambda: bus.stats().epochs == 1)
            await bus.write(said("2"), durability="committed")

            # Then the last message of the room's partition is one of the new epoch
            async with redis.asyncio.Redis.from_url(server.url) as client:
                epoch = await client.hget(keys.epoch, "epoch")
                assert epoch is not None

                async def last() -> bool:
                    [(_, fields)] = await client.xrevrange(keys.feed(keys.feed_partition(ROOM)), count=1)
                    return bool(orjson.loads(fields[b"m"])["e"] == epoch.decode())

                await eventually(last)


async def test_g5_a_late_answer_to_a_heartbeat_leads_back_to_no_epoch(
    settings: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as bus:
        await eventually(lambda: local_twice(bus))
        link = bus._link
        pipeline, before = link.pipeline, link.epoch
        asked: list[str] = []

        async def overtaken(commands: Any, pool: Any = None) -> Any:
            replies = await pipeline(commands, pool=pool)
            if commands[0][0] == "HGET":
                asked.append(link.epoch)
                if len(asked) == 1:
                    link.enter("met-by-another-connection")
            return replies

        # When another connection meets a new epoch while the answer to a heartbeat, of before, is on its way
        monkeypatch.setattr(link, "pipeline", overtaken)
        await eventually(lambda: len(asked) >= 2)
        # Then the heartbeat does not go back there, but asks again
        assert asked[:2] == [before, "met-by-another-connection"]


async def test_g4_who_hears_of_an_epoch_from_the_feed_asks_no_more_for_buckets_of_the_last(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    async with connect(heartbeat=20, max_staleness=60) as bus:
        # Given an answer that is shared in the epoch that this agent knows
        with worker_threads(settings):
            await bus.write(said("old"), durability="committed")
        await eventually(lambda: local_twice(bus))
        # When another epoch begins, which is the only one that worker and writer have met
        await client.hset(keys.epoch, "epoch", "another")
        heard = bus.stats().invalidations
        with worker_threads(settings):
            async with connect() as writer:
                await writer.write(said("new"), durability="committed")
                await eventually(lambda: bus.stats().invalidations > heard)
                # Then what this agent has heard of, it does not read otherwise from the buckets that nobody drops
                assert [m.content["text"] for m in await bus.recent("messages", room="r1")] == ["new", "old"]
