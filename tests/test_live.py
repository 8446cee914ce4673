"""Scopes that are held live: a write is there as soon as the log has it, in every agent that holds its scope (G9)."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

import mnemobus
from mnemobus import Memory, Settings, WriteRejected
from mnemobus.keys import Dimensions, Keyspace, slot_of
from mnemobus.log.events import PUT, Event
from mnemobus.memory import new_id
from mnemobus_workers.fanout import SCOPES_PER_CALL
from outside import refuse_poison
from servers import RedisServer, eventually

Connect = Callable[..., mnemobus.Bus]
PoolOf = Callable[[Settings], Any]


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    return settings.model_copy(update={"redis_protocol": request.param})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(settings.redis_url)
    yield client
    await client.aclose()


def keys_of(settings: Settings) -> Keyspace:
    return Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)


def said(text: str, room: str = "r1", **fields: object) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)  # type: ignore[arg-type]


async def texts(bus: mnemobus.Bus, limit: int = 20, **dimensions: str) -> list[str]:
    found = await bus.recent("messages", limit=limit, **(dimensions or {"room": "r1"}))  # type: ignore[arg-type]
    return [memory.content["text"] for memory in found]


async def hold(bus: mnemobus.Bus, limit: int = 4, **dimensions: str) -> None:
    """Read a scope until it is held live: from the second read on that finds no copy."""
    [(kind, name)] = (dimensions or {"room": "r1"}).items()
    scope = f"{kind}:messages:{name}"

    async def held() -> bool:
        bus._local.drop(scope)
        await bus.recent("messages", limit=limit, **{kind: name})  # type: ignore[arg-type]
        return bus._local.live(scope) is not None

    await eventually(held)


async def becomes(expected: list[str], bus: mnemobus.Bus, **dimensions: str) -> None:
    """Wait until a scope reads like this."""

    async def as_expected() -> bool:
        return await texts(bus, len(expected) + 1, **dimensions) == expected

    await eventually(as_expected)


# What is written


async def test_g6_g9_an_own_write_is_in_the_next_answer_though_no_worker_runs(
    settings: Settings, connect: Connect
) -> None:
    # Given a room that an agent holds live, and no worker
    async with connect() as alice:
        await hold(alice)
        # When it writes, changes and deletes
        memories = [said(str(n)) for n in range(5)]
        for n, memory in enumerate(memories):
            await alice.write(memory)
            # Then the very next read has it, from the agent's own memory, and is not marked
            found = await alice.recent("messages", room="r1")
            assert [m.content["text"] for m in found] == [str(k) for k in range(n, -1, -1)]
            assert found.source == "local"
            assert not found.stale
        receipt = await alice.update(memories[0].id, content={"text": "changed"})
        found = await alice.recent("messages", room="r1")
        assert [m.content["text"] for m in found] == ["4", "3", "2", "1", "changed"]
        assert found[-1].version == receipt.version
        await alice.delete(memories[4].id)
        assert await texts(alice) == ["3", "2", "1", "changed"]
        assert alice.stats().own_write_waits == 0
        await alice.delete_room("messages", room="r1")
        assert await texts(alice) == []


async def test_g6_a_window_that_is_behind_an_own_write_catches_up_before_it_answers(
    settings: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as alice, connect() as bob:
        await hold(bob)
        # Given a write of another agent that did not arrive
        monkeypatch.setattr(bob._live.listener, "hear", lambda name, data: True)
        for n in range(5):
            await alice.write(said(f"{n} of others"))
            # If the agent writes itself, then the next answer has both
            await bob.write(said(f"{n} of mine"))
            assert (await texts(bob))[:2] == [f"{n} of mine", f"{n} of others"]


async def test_g9_a_window_that_is_opened_has_what_is_logged_and_not_committed(
    settings: Settings, connect: Connect
) -> None:
    # Given writes that no worker has come to
    async with connect() as alice, connect() as bob:
        memory = said("1")
        await alice.write_many([memory, said("2")])
        await alice.update(memory.id, content={"text": "changed"})
        # If another agent opens their room, then it has them
        await hold(bob)
        assert await texts(bob) == ["2", "changed"]


async def test_g9_another_agent_sees_each_write_without_waiting_for_the_commit(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as alice, connect() as bob:
        await hold(bob)
        memory = said("one", entity="e", metadata={"mood": "good"}, embedding=[0.5, 0.25])
        await alice.write(memory)
        await becomes(["one"], bob)
        assert (await bob.recent("messages", room="r1"))[0] == memory
        await alice.update(memory.id, content={"text": "two"}, embedding=None)
        await becomes(["two"], bob)
        [found] = await bob.recent("messages", room="r1")
        assert found.metadata == {"mood": "good"}
        assert found.embedding is None
        await alice.delete(memory.id)
        await becomes([], bob)


async def test_g9_scopes_of_entities_agents_and_worlds_span_the_partitions_of_the_log(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as alice, connect() as bob:
        # Given scopes of every kind that an agent holds, and one memory by its id
        for dimension in ("entity", "agent", "world"):
            await hold(bob, **{dimension: "x"})
        # When memories are written to rooms of all partitions
        rooms = [f"room-{n}" for n in range(12)]
        assert len({keys_of(settings).log_partition(room) for room in rooms}) == settings.log_partitions
        for n, room in enumerate(rooms):
            await alice.write(said(str(n), room=room, entity="x", agent="x", world="x"))
        # Then all of them are in each
        expected = [str(n) for n in range(11, -1, -1)]
        for dimension in ("entity", "agent", "world"):
            await becomes(expected, bob, **{dimension: "x"})
        # And the deletion of a room takes its own
        await alice.delete_room("messages", room="room-3")
        for dimension in ("entity", "agent", "world"):
            await becomes([text for text in expected if text != "3"], bob, **{dimension: "x"})


async def test_g9_a_memory_is_live_by_its_id(settings: Settings, pool: Settings, connect: Connect) -> None:
    async with connect() as alice, connect() as bob:
        memory = said("one")
        await alice.write(memory, durability="committed")

        async def held() -> bool:
            bob._local.drop(f"id:{memory.id}")
            return bool(await bob.get(memory.id)) and bob._local.live(memory.id) is not None

        await eventually(held)
        for text in ("two", "three"):
            await alice.update(memory.id, content={"text": text})

            async def changed(text: str = text) -> bool:
                found = await bob.get(memory.id)
                return found is not None and found.content["text"] == text

            await eventually(changed)
        await alice.delete(memory.id)

        async def gone() -> bool:
            return await bob.get(memory.id) is None

        await eventually(gone)


async def hold_id(bus: mnemobus.Bus, id: str) -> None:
    """Read a memory by its id until it is held live."""

    async def held() -> bool:
        bus._local.drop(f"id:{id}")
        return await bus.get(id) is not None and bus._local.live(id) is not None

    await eventually(held)


async def test_g6_g9_a_memory_that_is_made_again_in_another_room_is_found_there(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect(shadow_reads=0) as alice, connect(shadow_reads=0) as bob:
        # Given a memory that two agents hold live by its id, and that one of them deletes
        memory = said("one", entity="e")
        await alice.write(memory, durability="committed")
        for bus in (alice, bob):
            await hold_id(bus, memory.id)
        await alice.delete(memory.id, durability="committed")

        async def gone() -> bool:
            return await bob.get(memory.id) is None

        await eventually(gone)
        # When it is made again in another room, whose events come on another channel
        again = said("two", room="elsewhere", id=memory.id, entity="e")
        await alice.write(again)
        # Then its writer finds it at once, and the other one once it is committed
        assert await alice.get(memory.id) == again

        async def there() -> bool:
            return await bob.get(memory.id) == again

        await eventually(there)
        # And both follow it there
        for bus in (alice, bob):
            await hold_id(bus, memory.id)
        await alice.update(memory.id, content={"text": "three"})

        async def changed() -> bool:
            found = await bob.get(memory.id)
            return found is not None and found.content == {"text": "three"}

        await eventually(changed)


async def test_g9_a_memory_that_no_window_has_room_for_is_found_by_its_id(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect() as alice, connect(shadow_reads=0) as bob:
        # Given memories, one larger than a window may be, that are read by their ids again and again
        memories = [said("x" * size) for size in (10, settings.live_window_bytes)]
        await alice.write_many(memories, durability="committed")
        for _ in range(3):
            for memory in memories:
                bob._local.drop(f"id:{memory.id}")
                assert await bob.get(memory.id) == memory
        # If the small one grows, then it is found all the same
        await alice.update(memories[0].id, content={"text": "y" * settings.live_window_bytes})

        async def grown() -> bool:
            found = await bob.get(memories[0].id)
            assert found is not None
            return bool(found.content["text"][0] == "y")

        await eventually(grown)


async def test_g9_the_deletion_of_a_room_reaches_scopes_that_the_log_has_no_event_of(
    settings: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    async with connect() as alice:
        # Given a memory that was written before events were announced, by an older version, or into a Redis that was
        # flushed since
        await alice.write(said("one", entity="x"), durability="committed")
        await client.unlink(keys.heads(keys.log_partition("r1")))
        async with connect(shadow_reads=0) as bob:
            # And an agent that holds its entity live
            await hold(bob, entity="x")
            assert await texts(bob, entity="x") == ["one"]
            # If the room is deleted, then that agent hears of it
            await alice.delete_room("messages", room="r1")
            await becomes([], bob, entity="x")


# What a window can tell


async def test_filters_limits_and_counts_are_answered_from_one_window(
    settings: Settings, connect: Connect
) -> None:
    async with connect(live_window=8) as alice, connect() as bob:
        await hold(alice)
        for n in range(6):
            await bob.write(said(str(n), entity="even" if n % 2 == 0 else "odd"))
        await becomes(["5", "4", "3", "2", "1", "0"], alice)
        misses = alice.stats().misses
        assert await texts(alice, limit=2) == ["5", "4"]
        assert await texts(alice, limit=2, room="r1", entity="even") == ["4", "2"]
        assert await alice.count("messages", room="r1") == 6
        assert await alice.count("messages", room="r1", entity="odd") == 3
        assert alice.stats().misses == misses


async def test_g9_a_window_that_lost_memories_is_read_again_where_more_may_follow_below(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect(live_window=4) as alice, connect() as bob:
        # Given a room of more memories than its window has
        memories = [said(str(n)) for n in range(40)]
        await bob.write_many(memories, durability="committed")
        await hold(alice)
        assert await texts(alice, limit=4) == ["39", "38", "37", "36"]
        # When most of the window is deleted
        for memory in memories[22:]:
            await bob.delete(memory.id)
        # Then what lies below comes up

        async def moved_up() -> bool:
            return await texts(alice, limit=4) == ["21", "20", "19", "18"]

        await eventually(moved_up)
        # And what is older than the window does not enter it
        await bob.write(
            said("ancient", created_at=datetime.now(UTC) - timedelta(days=1)), durability="committed"
        )
        assert await texts(alice, limit=4) == ["21", "20", "19", "18"]


async def test_a_query_that_no_window_tells_follows_the_commit_beside_it(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect(live_window=4) as alice, connect() as bob:
        await hold(alice)
        for n in range(8):
            await bob.write(said(str(n)), durability="committed")
        await becomes(["7", "6", "5", "4", "3", "2", "1", "0"], alice)
        first = await alice.recent("messages", room="r1", limit=4)
        assert [m.content["text"] for m in first] == ["7", "6", "5", "4"]
        older = await alice.recent("messages", room="r1", limit=4, before=first[-1])
        assert [m.content["text"] for m in older] == ["3", "2", "1", "0"]
        await bob.write(said("8"), durability="committed")

        async def dropped() -> bool:
            return await texts(alice, limit=10) == ["8", "7", "6", "5", "4", "3", "2", "1", "0"]

        await eventually(dropped)


async def test_a_large_event_is_announced_without_its_body_and_fetched(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as alice, connect() as bob:
        await hold(bob)
        await alice.write(said("x" * 100_000))
        await alice.write(said("small"))
        await becomes(["small", "x" * 100_000], bob)


# What goes wrong


async def test_g5_a_lost_message_is_repaired_by_the_heartbeat(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as alice, connect() as bob:
        await hold(bob)
        # When a message does not arrive
        hear = bob._live.listener.hear
        lost: list[bytes] = []
        monkeypatch.setattr(bob._live.listener, "hear", lambda name, data: lost.append(data) or True)
        await alice.write(said("1"))
        await eventually(lambda: len(lost) == 1)
        # Then the heartbeat finds the head beyond the position, and fetches it from the log
        await becomes(["1"], bob)
        assert bob._live.listener.repairs == 1
        # And when one is missing before another that does arrive, the gap is seen at once
        await alice.write(said("2"))
        await eventually(lambda: len(lost) == 2)
        monkeypatch.setattr(bob._live.listener, "hear", hear)
        await alice.write(said("3"))
        await becomes(["3", "2", "1"], bob)


async def test_g5_what_the_feed_names_is_in_the_next_answer_though_it_was_not_heard_live(
    settings: Settings, pool: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as alice, connect() as bob:
        await hold(bob)
        # Given live messages that don't arrive, or late
        monkeypatch.setattr(bob._live.listener, "hear", lambda name, data: True)
        for n in range(5):
            heard = bob.stats().invalidations
            receipts = await alice.write_many([said(f"{n}"), said("elsewhere", room="r2")])
            # If the feed has told that they are committed
            await receipts[0].committed()
            await eventually(lambda heard=heard: bob.stats().invalidations > heard)
            # Then no answer is without them
            assert (await texts(bob))[0] == f"{n}"


async def test_g9_messages_that_are_late_or_doubled_change_nothing(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as alice, connect() as bob:
        await hold(bob)
        hear = bob._live.listener.hear
        heard: list[tuple[bytes, bytes]] = []

        def kept(name: bytes, data: bytes) -> bool:
            heard.append((name, data))
            return hear(name, data)

        monkeypatch.setattr(bob._live.listener, "hear", kept)
        memory = said("1")
        await alice.write(memory)
        await alice.delete(memory.id)
        await eventually(lambda: len(heard) == 2)
        for message in heard[:]:
            hear(*message)
        assert await texts(bob) == []


async def test_g5_an_event_that_nobody_announced_ends_what_is_held_live(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    partition = keys.log_partition("r1")
    async with connect() as bob:
        await hold(bob)
        # When an agent of a version that does not announce writes
        event = Event(PUT, Dimensions("messages", "r1"), new_id(), b'{"text":"old"}', b"{}", None, 1)
        fields = event.fields()
        await client.xadd(keys.log(partition), dict(zip(fields[::2], fields[1::2], strict=True)))  # type: ignore[arg-type]
        await client.hincrby(keys.meter(partition), "added", 1)
        # Then the window is given up, and for a while none is opened there
        await eventually(lambda: len(bob._live) == 0)
        assert not bob._live.listener.is_announced(partition)


async def test_g5_a_spoiled_message_is_counted_and_the_log_has_what_it_should_have_said(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    channel = keys.live_channel(keys.log_partition("r1"), slot_of("room", "r1"))
    async with connect() as alice, connect() as bob:
        await hold(bob)
        for spoiled in (b"", b"nonsense", b"1-1 0-0 e 3,4\nxx", b"1-1 0-0 \xff \n", b"9" * 100_000):
            await client.publish(channel, spoiled)
        await eventually(lambda: bob.stats().bad_messages == 5)
        await alice.write(said("1"))
        await becomes(["1"], bob)


async def test_g9_a_new_epoch_withdraws_what_redis_lost(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}) as bus:
        # Given a write that is shown and not committed
        await hold(bus)
        await bus.write(said("lost"))
        assert await texts(bus) == ["lost"]
        # When Redis starts again without it
        server.restart(empty=True)
        # Then nothing shows it any more
        await eventually(lambda: bus.stats().epochs == 1)
        await becomes([], bus)
        await hold(bus)
        await bus.write(said("new"))
        assert await texts(bus) == ["new"]


async def test_g5_a_window_that_is_opened_in_an_epoch_that_is_over_is_not_held(
    own_redis: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: RedisServer = own_redis()
    # Given a bus that does not ask for the epoch by itself for a while
    quiet = {"redis_url": server.url, "heartbeat": 20.0, "max_staleness": 40.0}
    async with mnemobus.connect(**{**settings.model_dump(), **quiet}) as bus:
        await bus.recent("messages", room="r1")
        bus._local.drop("room:messages:r1")
        epoch = bus._link.epoch
        # If Redis is flushed while a window is opened: its base is there, the tail of the log is not
        reached, go = gate(monkeypatch, bus._live, "_base")
        opening = asyncio.create_task(texts(bus))
        await reached.wait()
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.flushall()
        go.set()
        await opening
        # Then it is not held: an empty log does not mean that the base has all
        assert bus._link.epoch == epoch
        assert bus._local.live("room:messages:r1") is None
        # And it is opened anew once the bus is in the epoch that begins then
        assert await bus._feed.sync()
        assert bus._link.epoch != epoch
        await hold(bus)


async def test_g9_what_was_shown_does_not_go_back_over_a_restart_of_redis(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis("--appendonly", "yes", "--appendfsync", "always")
    settings = settings.model_copy(update={"redis_url": server.url, "own_write_timeout": 0.3})
    async with (
        mnemobus.connect(**settings.model_dump()) as alice,
        mnemobus.connect(**settings.model_dump()) as bob,
    ):
        # Given a write that is shown and not committed
        await hold(bob)
        await alice.write(said("kept"))
        await becomes(["kept"], bob)
        # When Redis starts again, and has it still
        server.restart()
        await eventually(lambda: bob.stats().epochs == 1)
        # Then an answer of the store does not pass for one that has it
        bob._live._missed.clear()
        found = await bob.recent("messages", room="r1")
        assert found.stale or [m.content["text"] for m in found] == ["kept"]
        await hold(bob)
        assert await texts(bob) == ["kept"]


async def test_g7_a_write_that_waits_in_the_outbox_is_waited_for_and_then_there(
    own_redis: Any, settings: Settings, pool_of: PoolOf
) -> None:
    server: RedisServer = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    async with mnemobus.connect(**{**settings.model_dump(), "own_write_timeout": 0.2}) as bus:
        await hold(bus)
        server.stop()
        receipt = await bus.write(said("kept"))
        assert receipt.outboxed
        assert (await bus.recent("messages", room="r1")).stale
        server.start()
        await eventually(lambda: bus.stats().outbox == 0)
        with pool_of(settings):
            await receipt.committed(20)
            await becomes(["kept"], bus)


async def test_g6_a_write_that_goes_to_the_outbox_while_redis_answers_is_not_missing_from_an_answer(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    async with (
        mnemobus.connect(**{**settings.model_dump(), "own_write_timeout": 0.05}) as bus,
        redis.asyncio.Redis.from_url(server.url) as client,
    ):
        await hold(bus)
        assert (await bus.recent("messages", room="r1", limit=4)).source == "local"
        # Given a Redis that answers, and takes no writes
        await client.config_set("min-replicas-to-write", "1")
        # If something is written, then the very next answer does not pass for one that has it
        receipt = await bus.write(said("kept"))
        assert receipt.outboxed
        assert (await bus.recent("messages", room="r1", limit=4)).stale
        await client.config_set("min-replicas-to-write", "0")
        await becomes(["kept"], bus)


def gate(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Holds back what calls of a method answer; the events: that there is a call, and that it may go on."""
    reached, go, real = asyncio.Event(), asyncio.Event(), getattr(owner, name)

    async def gated(*args: Any) -> Any:
        answer = await real(*args)
        reached.set()
        await go.wait()
        return answer

    monkeypatch.setattr(owner, name, gated)
    return reached, go


async def test_g6_g9_what_was_cached_before_a_scope_was_held_live_is_no_answer_any_more(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as alice, connect() as bob:
        # Given an answer in L1, and a write of somebody else since, which no worker commits
        assert await texts(bob, 10) == []
        await alice.write(said("0"))
        # When another query on the same scope opens a window, which shows it
        assert await texts(bob, 4) == ["0"]
        assert bob._local.live("room:messages:r1") is not None
        # Then the first query does not go back to what it was answered before
        assert await texts(bob, 10) == ["0"]
        # nor after an own write
        await bob.write(said("1"))
        assert await texts(bob, 10) == ["1", "0"]
        assert await texts(bob, 4) == ["1", "0"]


async def test_g9_what_is_cached_beside_a_window_does_not_outlive_what_the_window_shows(
    settings: Settings, pool_of: PoolOf, connect: Connect
) -> None:
    async with connect() as alice, connect(live_window=4, own_write_timeout=0.3) as bob:
        # Given a room that is held live, whose window does not tell who of an entity was the last to speak
        with pool_of(settings):
            spoke = [said(str(n), entity="e" if n < 2 else None) for n in range(40)]
            await alice.write_many(spoke, durability="committed")
        await hold(bob)

        async def of_entity() -> mnemobus.Memories:
            return await bob.recent("messages", room="r1", entity="e", limit=2)

        # And an answer to that, which is cached beside it
        assert [memory.content["text"] for memory in await of_entity()] == ["1", "0"]
        assert (await of_entity()).source == "local"
        # When the window shows that the entity spoke, and no worker commits it
        await alice.write(said("new", entity="e"))
        await eventually(lambda: shows(bob, "new"))
        # Then that answer is not given again as if it were sure
        found = await of_entity()
        assert found.stale or [memory.content["text"] for memory in found] == ["new", "1"]


async def shows(bus: mnemobus.Bus, text: str) -> bool:
    return (await texts(bus, 1)) == [text]


async def test_g9_an_answer_does_not_go_back_to_what_a_slow_load_found_beside_the_window(
    settings: Settings, pool_of: PoolOf, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as alice, connect(live_window=4) as bob:
        # Given a room that is held live, whose window does not tell who of an entity was the last to speak
        with pool_of(settings):
            await alice.write_many([said(str(n)) for n in range(40)], durability="committed")
        await hold(bob)
        # And a read that asks the store for that
        reached, go = gate(monkeypatch, bob._reader, "recent")
        slow = asyncio.create_task(texts(bob, 1, room="r1", entity="e"))
        await reached.wait()
        # When a write comes that tells the window, then that is the answer
        await alice.write(said("e speaks", entity="e"))

        async def shown() -> bool:
            return await texts(bob, 1, room="r1") == ["e speaks"]

        await eventually(shown)
        assert await texts(bob, 1, room="r1", entity="e") == ["e speaks"]
        # And it stays, whatever the store has answered meanwhile, and with the next event
        go.set()
        assert await slow == []
        assert await texts(bob, 1, room="r1", entity="e") == ["e speaks"]
        await alice.write(said("another"))

        async def moved() -> bool:
            return await texts(bob, 1, room="r1") == ["another"]

        await eventually(moved)
        assert await texts(bob, 1, room="r1", entity="e") == ["e speaks"]


async def test_g6_a_window_that_is_opened_while_a_write_goes_into_the_outbox_is_not_kept(
    own_redis: Any, settings: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: RedisServer = own_redis()
    async with connect(redis_url=server.url, own_write_timeout=0.2) as bus:
        await bus.recent("messages", room="r1")
        bus._local.drop("room:messages:r1")
        # Given a read that is about to open a window
        reached, go = gate(monkeypatch, bus._live.listener, "join")
        opening = asyncio.create_task(texts(bus))
        await reached.wait()
        # And a Redis that can be read, and takes no writes, for its disk fails
        (server.folder / "dump.rdb").mkdir()
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.config_set("save", "3600 1000000")
            await client.bgsave()

            async def fails() -> bool:
                return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == "err")

            await eventually(fails)
        # If the bus writes there meanwhile
        assert (await bus.write(said("mine"))).outboxed
        go.set()
        await opening
        # Then no answer lacks that without being marked
        found = await bus.recent("messages", room="r1")
        assert found.stale


async def test_g5_the_feed_is_listened_to_while_a_window_is_opened(
    settings: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as bus:
        partition = keys_of(settings).feed_partition("room:messages:r1")
        await bus.recent("messages", room="r1")
        bus._local.drop("room:messages:r1")
        # Given a window whose base is slow to come, and a feed that is not listened to for longer than it is needed
        reached, go = gate(monkeypatch, bus._reader, "recent")
        monkeypatch.setattr("mnemobus.feed.subscription._PARTITION_LINGER", 0.0)
        opening = asyncio.create_task(texts(bus))
        await reached.wait()
        for _ in range(4):
            await bus._feed.sync()
        go.set()
        await opening
        # Then it still hears what would have the window given up
        assert bus._local.live("room:messages:r1") is not None
        assert bus._feed.joined(partition)


async def test_g7_what_others_shared_is_answered_with_the_store_away(
    settings: Settings, connect: Connect
) -> None:
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    async with connect() as alice, connect() as bob:
        # Given a scope that an agent would hold live with its next read
        await bob.recent("messages", room="r1")
        bob._local.drop("room:messages:r1")
        # And an answer of it that another one has shared
        await alice.recent("messages", room="r1", limit=3)
        # If the store is away, then that is what the agent gets
        path.rename(f"{path}.away")
        assert (await bob.recent("messages", room="r1", limit=3)).source == "shared"
        with pytest.raises(mnemobus.StoreUnavailable):
            await bob.recent("messages", room="r1", limit=4)


async def test_g9_what_was_shown_live_is_not_missing_from_a_classic_answer_after_it(
    settings: Settings, connect: Connect
) -> None:
    # Given a window that shows a write of another agent which is not committed, and no worker
    async with connect(own_write_timeout=0.3) as alice, connect() as bob:
        await hold(alice)
        await bob.write(said("1"))
        await becomes(["1"], alice)
        # When the window is evicted, and the query is answered from the store
        alice._local.clear()
        alice._live._missed.clear()
        found = await alice.recent("messages", room="r1")
        # Then the answer lacks it, after waiting for it, and says so
        assert list(found) == []
        assert found.stale


async def test_g9_a_memory_that_was_shown_to_be_gone_is_not_there_again(
    settings: Settings, connect: Connect, pool_of: PoolOf
) -> None:
    async with connect(own_write_timeout=0.3) as alice, connect(own_write_timeout=0.3) as bob:
        memory = said("1")
        with pool_of(settings):
            await alice.write(memory, durability="committed")
        # Given an agent that holds a memory live, and no worker
        await bob.get(memory.id)
        bob._local.drop(f"id:{memory.id}")
        await bob.get(memory.id)
        assert bob._local.live(memory.id) is not None
        # When it is deleted
        await alice.delete(memory.id)
        await eventually(lambda: bob._local.live(memory.id) is None)
        # Then what the store has yet is no answer, or is counted as a stale one after waiting; also where the agent has
        # forgotten in which room it was
        bob._live._missed.clear()
        found = await bob.get(memory.id)
        assert found is None or bob.stats().stale_reads == 1


async def test_g9_what_the_store_refuses_is_withdrawn(
    settings: Settings, connect: Connect, pool_of: PoolOf
) -> None:
    async with connect() as alice, connect() as bob:
        with pool_of(settings):
            await alice.write(said("sound"), durability="committed")
            words = refuse_poison(settings)
        await hold(bob)
        # Given a write that is shown, though the store is going to refuse it, and others around it
        receipts = await alice.write_many([said("1"), said("poison"), said("2")])
        await becomes(["2", "poison", "1", "sound"], bob)
        # When workers come to it
        with pool_of(settings):
            with pytest.raises(WriteRejected, match=words):
                await receipts[1].committed(20)
            # Then it is nowhere any more, in the writer neither, nor where the room is opened anew
            for bus in (alice, bob):
                await becomes(["2", "1", "sound"], bus)
            await hold(alice)
            await becomes(["2", "1", "sound"], alice)


async def test_g9_what_the_store_refuses_is_withdrawn_however_much_else_its_batch_touched(
    settings: Settings, connect: Connect, pool_of: PoolOf
) -> None:
    # Given a bus with one feed partition: a batch that touches many scopes is told in several messages
    few = settings.model_copy(update={"log_partitions": 1, "feed_partitions": 1})
    async with connect(log_partitions=1, feed_partitions=1, shadow_reads=0) as bus:
        with pool_of(few):
            await bus.write(said("sound"), durability="committed")
            refuse_poison(few)
        await hold(bus)
        # When one event of such a batch is refused, whose scopes are in the first of them
        poison = await bus.write(said("poison"))
        assert await texts(bus) == ["poison", "sound"]
        many = [(f"{n}", f"{n}", f"{n}") for n in range(SCOPES_PER_CALL // 3)]
        await bus.write_many([said("", "r2", entity=e, agent=a, world=w) for e, a, w in many])
        with pool_of(few):
            with pytest.raises(WriteRejected):
                await poison.committed(20)
            # Then it is withdrawn
            await becomes(["sound"], bus)


async def test_g9_a_window_that_is_opened_leaves_out_what_is_known_as_refused(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    partition = keys.log_partition("r1")
    async with connect() as alice, connect() as bob:
        # Given events above the applied mark, one of which a worker has buried, and not confirmed yet
        receipts = await alice.write_many([said("1"), said("buried"), said("2")])
        await client.hset(keys.reasons(partition), str(receipts[1].version), "dead 1-1 no good")
        # If another agent opens the room, then it does not show that one
        await hold(bob)
        assert await texts(bob) == ["2", "1"]


async def test_g5_what_is_applied_without_being_in_the_log_is_read_anew(
    settings: Settings,
    pool: Settings,
    connect: Connect,
    command: Callable[..., Any],
    client: redis.asyncio.Redis,
) -> None:
    async with connect() as alice, connect() as bob:
        await alice.write(said("before"), durability="committed")
        await alice.write(said("after"), durability="committed")
        await hold(bob)
        assert await texts(bob) == ["after", "before"]
        # When a row is lost, not the last, which the workers would miss, and a replay brings it back
        path = settings.database_url.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("DELETE FROM mnemobus_memories WHERE content LIKE '%before%'")
            database.commit()
            assert database.execute("SELECT count(*) FROM mnemobus_memories").fetchone() == (1,)
        await client.delete(*[key async for key in client.scan_iter(f"{{{settings.redis_key_prefix}:f*:b:*")])
        bob._local.clear()
        await hold(bob)
        assert await texts(bob) == ["after"]
        assert bob._local.live("room:messages:r1") is not None
        replay = command("replay", "--since", "1h", settings=settings)
        assert await asyncio.to_thread(lambda: replay.status) == 0
        # Then the window has it
        await becomes(["after", "before"], bob)


async def test_g5_a_feed_that_was_lost_takes_windows_along(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    async with connect() as bus:
        await hold(bus)
        partition = keys.feed_partition("room:messages:r1")
        # When the feed of the room's partition does not reach back to where the bus was
        await client.xadd(
            keys.feed(partition), {"prev": "5-5", "m": b'{"p":0,"v":[],"s":[]}'}, id="9999999999999-1"
        )
        # Then what it may have told is not known: the window goes
        await eventually(lambda: bus.stats().resets == 1)
        assert bus._local.live("room:messages:r1") is None


async def test_g5_a_feed_that_is_lost_while_a_window_is_opened_takes_it_along(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(settings)
    async with connect() as bus:
        await hold(bus)
        bus._local.clear()
        # Given a room that is being opened, and its partition of the feed does not reach back meanwhile
        base = bus._live._base

        async def lost_meanwhile(plan: object) -> object:
            found = await base(plan)  # type: ignore[arg-type]
            message = {"prev": "5-5", "m": b'{"p":0,"v":[],"s":[]}'}
            await client.xadd(
                keys.feed(keys.feed_partition("room:messages:r1")), message, id="9999999999999-1"
            )
            await eventually(lambda: bus.stats().resets == 1)
            return found

        monkeypatch.setattr(bus._live, "_base", lost_meanwhile)
        assert await texts(bus) == []
        # Then nothing is held of it
        assert bus._local.live("room:messages:r1") is None


async def test_results_beside_a_window_are_counted_and_dropped_with_the_commit(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect(live_window=4) as bus:
        for n in range(8):
            await bus.write(said(str(n)), durability="committed")
        await hold(bus)
        before = bus.stats()

        async def beside() -> bool:
            return (await bus.recent("messages", room="r1", limit=100)).source == "local"

        await eventually(beside)
        after = bus.stats()
        assert (after.entries, after.live_windows) == (before.entries + 1, 1)
        assert after.bytes > before.bytes
        await bus.write(said("8"), durability="committed")
        assert len(await bus.recent("messages", room="r1", limit=100)) == 9
        bus._local.clear()
        assert (bus.stats().entries, bus.stats().bytes, bus.stats().live_windows) == (0, 0, 0)


async def test_live_may_be_off_and_on_by_table(settings: Settings, connect: Connect) -> None:
    for live, expected in (("off", 0), ("facts", 0), ("all,-messages", 0), ("messages", 1), ("all", 1)):
        async with connect(live=live) as bus:
            for _ in range(3):
                await bus.recent("messages", room="r1")
                bus._local.clear()
            await bus.recent("messages", room="r1")
            assert len(bus._live) == expected, live


async def test_a_scope_that_is_not_held_any_more_costs_no_channel(
    settings: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemobus.live.listener._CHANNEL_LINGER", 0.0)
    async with connect() as bus:
        await hold(bus)
        assert len(bus._live.listener) == 1
        bus._local.clear()
        bus._live._missed.clear()
        await eventually(lambda: len(bus._live.listener) == 0)
        await eventually(lambda: not bus._live._held)
        await hold(bus)


async def test_cancelling_a_read_that_opens_leaves_others_and_later_ones_their_answers(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as bus:
        await bus.recent("messages", room="r1")
        bus._local.clear()
        for _ in range(20):
            readers = [asyncio.create_task(bus.recent("messages", room="r1")) for _ in range(3)]
            await asyncio.sleep(0)
            readers[0].cancel()
            answers = await asyncio.gather(*readers, return_exceptions=True)
            assert all(list(answer) == [] for answer in answers[1:] if not isinstance(answer, BaseException))
            assert not any(isinstance(answer, Exception) for answer in answers[1:])
            bus._local.clear()
        assert not bus._live._openings
        assert not bus._live._waiting
