"""A bus reports the truth about its own writes: for any number of them, after any failure, and after manual changes."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, closing
from typing import Any

import pytest
import redis.asyncio

import mnemobus
from commands import Command
from mnemobus import (
    BacklogFull,
    BusClosed,
    DimensionChanged,
    Memory,
    MemoryNotFound,
    NotCommitted,
    Settings,
    WriteRejected,
    known,
)
from mnemobus.keys import Keyspace, id_scope, room_scope
from mnemobus.log import marks
from mnemobus.memory import new_id
from servers import RedisServer, eventually, worker_threads

Connect = Callable[..., mnemobus.Bus]
PoolOf = Callable[[Settings], AbstractContextManager[Settings]]
Start = Callable[..., Command]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"log_partitions": 2})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(settings.redis_url)
    yield client
    await client.aclose()


def keys_of(settings: Settings) -> Keyspace:
    return Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)


def said(text: str, id: str | None = None, room: str = "r1", **fields: Any) -> Memory:
    return Memory(id=id, table="messages", room=room, content={"text": text}, **fields)


async def rejected(bus: mnemobus.Bus, ids: list[str]) -> list[mnemobus.Receipt]:
    """Writes that contradict what is there."""
    return await bus.write_many([said("wrong", id, entity="another") for id in ids])


async def outcome(receipt: mnemobus.Receipt) -> BaseException | None:
    try:
        await receipt.committed(20)
    except (WriteRejected, NotCommitted) as error:
        return error
    return None


# Rejections


async def test_each_rejected_write_is_told_however_many_there_are(
    pool: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "MARKS", 300)
    ids = [new_id() for _ in range(1_200)]
    async with connect() as first, connect() as second:
        written = await first.write_many([said("x", id) for id in ids], durability="committed")
        # Given many writes that are rejected, by a bus that listens to no feed
        receipts = await rejected(second, ids)
        fates = await asyncio.gather(*map(outcome, receipts))
        # Then each of them is told, and those that were fine are as fine as before
        assert all(isinstance(fate, WriteRejected) and "its entity from None" in str(fate) for fate in fates)
        assert await asyncio.gather(*map(outcome, written)) == [None] * len(ids)


async def test_a_write_whose_letter_was_dropped_before_anyone_asked_was_rejected(
    settings: Settings, connect: Connect, pool_of: PoolOf, command: Start
) -> None:
    id = new_id()
    async with connect() as first, connect(heartbeat=60, max_staleness=120) as second:
        with pool_of(settings):
            await first.write(said("x", id), durability="committed")
        [receipt] = await rejected(second, [id])
        # Given a letter that somebody has dropped
        with pool_of(settings):
            await eventually(lambda: dead(first, 1))
            dropped = command("dead", "drop", "--all", "--yes", settings=settings)
            assert await asyncio.to_thread(lambda: dropped.status) == 0
            assert await dead(first, 0)
            # Then its writer is told all the same
            assert "the letter was dropped since" in str(await outcome(receipt))


async def dead(bus: mnemobus.Bus, count: int) -> bool:
    return (await bus.health()).dead_letters == count


async def test_a_write_that_is_requeued_is_committed_once_it_is_applied_from_there(
    settings: Settings, connect: Connect, pool_of: PoolOf, command: Start
) -> None:
    id = new_id()
    async with connect() as first, connect() as second:
        with pool_of(settings):
            await first.write(said("x", id), durability="committed")
            [early, late] = await rejected(second, [id, id])
            assert isinstance(await outcome(early), WriteRejected)
            await eventually(lambda: dead(first, 2))
        # Given that what was in the way is gone, and both are in the log again, not applied yet
        with closing(sqlite3.connect(settings.database_url.removeprefix("sqlite:///"))) as connection:
            connection.execute("DELETE FROM mnemobus_memories")
            connection.commit()
        requeued = command("dead", "requeue", "--all", settings=settings)
        assert await asyncio.to_thread(lambda: requeued.status) == 0
        with pytest.raises(NotCommitted):
            await late.committed(0.1)
        with pytest.raises(NotCommitted):
            await early.committed(0.1)
        # Then they are committed when they are
        with pool_of(settings):
            await late.committed(10)
            await early.committed(10)
            assert (await second.get(id)).entity == "another"  # type: ignore[union-attr]


async def test_letters_of_an_older_worker_are_found(
    settings: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    partition = keys.log_partition("r1")
    async with connect() as bus:
        receipt = await bus.write(said("x"))
        # Given letters as an older worker leaves them, and a confirmed batch
        for n in range(20):
            fields = {"version": f"{n}-1", "reason": "older", "op": "put", "content": "x" * 1000}
            await client.xadd(keys.dead(partition), fields)  # type: ignore[arg-type]
        await client.xadd(
            keys.dead(partition), {"version": str(receipt.version), "reason": "why", "op": "put"}
        )
        await client.xgroup_create(keys.log(partition), "apply", "0")
        entries = await client.xreadgroup("apply", "old", {keys.log(partition): ">"})
        await client.xack(keys.log(partition), "apply", *[id for _, found in entries for id, _ in found])
        # Then the writer is told, and the reasons are noted once for all
        with pytest.raises(WriteRejected, match="why"):
            await receipt.committed()
        assert await client.hlen(keys.reasons(partition)) == 21


async def test_what_cannot_be_known_any_more_is_said_to_be_unknown(
    settings: Settings, connect: Connect, pool_of: PoolOf, client: redis.asyncio.Redis
) -> None:
    keys = keys_of(settings)
    partition = keys.log_partition("r1")
    async with connect(heartbeat=60, max_staleness=120) as bus:
        receipt = await bus.write(said("x"))
        later = await bus.write(said("x"))
        # Given that letters were given up for room, up to a version that is after the first of two writes
        await client.hset(keys.meter(partition), "dead_forgotten", str(receipt.version))
        await client.hset(keys.reasons(partition), "1-1", "dead 1-1 why")
        with pool_of(settings):
            await eventually(lambda: backlog(bus, 0))
            # Then of the first nobody can say, and of the second everybody
            assert "can't be known any more" in str(await outcome(receipt))
            assert await outcome(later) is None


async def backlog(bus: mnemobus.Bus, count: int) -> bool:
    return (await bus.health()).backlog == count


# Closing


async def test_who_waits_for_a_commit_or_a_token_is_told_at_once_that_the_bus_is_closed(
    settings: Settings, connect: Connect
) -> None:
    # Given writes that nobody applies, and who waits for them
    keys = keys_of(settings)
    elsewhere = next(f"r{n}" for n in range(100) if keys.log_partition(f"r{n}") != keys.log_partition("r1"))
    async with connect(own_write_timeout=30, max_backlog=2, write_timeout=5) as bus, connect() as other:
        receipt = await bus.write(said("x"))
        await other.write(said("y", room=elsewhere))
        waiting = [
            asyncio.ensure_future(receipt.committed(60)),
            asyncio.ensure_future(bus.write(said("z"), durability="committed")),
            asyncio.ensure_future(bus.observe(other.token(), 60)),
            asyncio.ensure_future(bus.recent("messages", room="r1")),
        ]
        await eventually(lambda: bus.stats().writes == 2)
        await asyncio.sleep(0.05)
        # If the bus is closed, which takes a while, for one more write waits for room, then each ends with that at once
        late = asyncio.ensure_future(bus.write(said("late")))
        await eventually(lambda: bus.stats().publish_retries > 0)
        closing = asyncio.ensure_future(bus.close())
        _, pending = await asyncio.wait(waiting, timeout=3)
        assert not pending
        assert not closing.done()
        await closing
        with pytest.raises(BacklogFull):
            await late
        assert [type(task.exception()) for task in waiting] == [BusClosed] * 4
        with pytest.raises(BusClosed, match="goes on from there"):
            await receipt.committed()


# Deleting and updating


async def test_g6_what_was_written_long_ago_and_is_not_applied_can_be_deleted_and_updated(
    settings: Settings, connect: Connect, pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a bus that remembers five of its thirty writes, with workers away
    monkeypatch.setattr(known, "_DIMENSIONS", 5)
    monkeypatch.setattr(marks, "MARKS", 5)
    ids = [new_id() for _ in range(30)]
    async with connect(own_write_timeout=0.1) as bus:
        await bus.write_many([said(str(n), id, room=f"r{n % 3}", entity="e") for n, id in enumerate(ids)])
        await bus.delete_room("messages", room="r2")
        deleted = await bus.delete(ids[0])
        await bus.update(ids[1], content={"text": "new"})
        # Then what is deleted is known to be, also with its room, and what was never written is not there
        assert deleted is not None
        assert await bus.delete(ids[2]) is None
        with pytest.raises(MemoryNotFound):
            await bus.update(new_id(), content={})
        # And when workers come, it is as it was said
        with pool_of(settings):
            await deleted.committed(20)
            await eventually(lambda: bus.stats().marks == 0)
            assert await bus.get(ids[0]) is None
            assert (await bus.get(ids[1])).content == {"text": "new"}  # type: ignore[union-attr]
            assert await bus.count("messages", entity="e") == 19


async def test_g6_a_delete_is_refused_rather_than_dropped_where_nobody_can_tell(
    own_redis: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_DIMENSIONS", 5)
    server: RedisServer = own_redis()
    options = {"redis_url": server.url, "own_write_timeout": 0.1, "redis_timeout": 0.5, "outbox": "off"}
    async with mnemobus.connect(**{**settings.model_dump(), **options}) as bus:
        ids = [new_id() for _ in range(10)]
        await bus.write_many([said("x", id) for id in ids])
        # Given writes in a log that can't be asked
        server.kill()
        # Then whether there is such a memory can't be known, and that is what is said
        with pytest.raises(NotCommitted, match="can't be known now: earlier writes of this bus"):
            await bus.delete(ids[0])


async def test_g7_what_an_earlier_process_left_in_the_outbox_can_be_deleted(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    options = settings.model_dump() | {
        "redis_url": server.url,
        "redis_timeout": 0.5,
        "own_write_timeout": 0.1,
    }
    settings = settings.model_copy(update={"redis_url": server.url})
    id, other = new_id(), new_id()
    with worker_threads(settings):
        async with mnemobus.connect(**options) as bus:
            await bus.get(id)
            server.kill()
            # Given an outbox with a write, one that merely mentions another id, and a deletion
            for memory in (said(f"id {other}", id), said("gone")):
                assert (await bus.write(memory)).outboxed
            gone = memory.id
            await bus.delete(gone)
        async with mnemobus.connect(**options) as bus:
            assert bus.stats().outbox == 3
            # When the next process deletes it, still without Redis, then that is taken; and what is not there is not
            assert (await bus.delete(id)).outboxed  # type: ignore[union-attr]
            assert await bus.delete(gone) is None
            server.start()
            await eventually(lambda: bus.stats().outbox == 0, timeout=20)
            await eventually(lambda: backlog(bus, 0), timeout=20)
            assert await bus.get(id) is None


async def test_g6_what_came_out_of_an_outbox_is_waited_for(
    own_redis: Any, settings: Settings, pool_of: PoolOf
) -> None:
    server: RedisServer = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url, "redis_timeout": 0.5})
    id = new_id()
    async with mnemobus.connect(**settings.model_dump()) as bus:
        await bus.get(id)
        server.kill()
        await bus.write(said("x", id))
    async with mnemobus.connect(**settings.model_dump()) as bus:
        # Given that the write of the process before is in the log, and not applied
        server.start()
        await eventually(lambda: bus.stats().outbox == 0, timeout=20)
        # If it is deleted there, then the deletion is logged behind it
        receipt = await bus.delete(id)
        assert receipt is not None
        with pool_of(settings):
            await receipt.committed(20)
            assert await bus.get(id) is None


async def test_what_somebody_else_deleted_cannot_be_updated(pool: Settings, connect: Connect) -> None:
    async with connect() as one, connect() as two:
        receipt = await one.write(said("x"), durability="committed")
        await two.delete(receipt.id, durability="committed")
        await one.observe(two.token())
        with pytest.raises(MemoryNotFound):
            await one.update(receipt.id, content={})


async def test_what_was_deleted_can_be_written_elsewhere_once_that_is_committed(
    settings: Settings, connect: Connect, pool_of: PoolOf
) -> None:
    async with connect(own_write_timeout=0.1) as one, connect() as two:
        with pool_of(settings):
            receipt = await one.write(said("x"), durability="committed")
        # Given a deletion that is not applied yet: its room may be in another log partition
        gone = await one.delete(receipt.id)
        with pytest.raises(DimensionChanged, match="is being deleted; to make it again elsewhere, wait"):
            await one.write(said("y", receipt.id, room="r2"))
        with pool_of(settings):
            assert gone is not None
            await gone.committed(20)
            await one.write(said("y", receipt.id, room="r2"), durability="committed")
            # Then everybody finds it there, and nowhere else
            await two.observe(one.token())
            for bus in (one, two):
                assert (await bus.get(receipt.id)).room == "r2"  # type: ignore[union-attr]
                assert await bus.count("messages", room="r1") == 0
                assert await bus.count("messages", room="r2") == 1


# PendingWrites beyond their number


async def test_g6_marks_beyond_their_number_come_together_and_still_hold(
    settings: Settings, connect: Connect, pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "MARKS", 10)
    async with connect(own_write_timeout=0.3) as bus:
        # Given more writes than marks, in one log partition
        keys = keys_of(settings)
        room = next(f"r{n}" for n in range(100) if keys.log_partition(f"r{n}") == 0)
        elsewhere = next(f"r{n}" for n in range(100) if keys.log_partition(f"r{n}") == 1)
        memories = [said(str(n), room=room) for n in range(25)]
        receipts = await bus.write_many(memories)
        assert len(bus._pending._writes[0]) <= 10
        assert bus.stats().marks == 25
        # Then whatever they may touch waits, rooms of other partitions do not
        assert id_scope(memories[0].id) in bus._pending
        assert room_scope("messages", room) in bus._pending
        assert room_scope("messages", elsewhere) not in bus._pending
        assert (await bus.recent("messages", room=room)).stale
        assert not (await bus.recent("messages", room=elsewhere)).stale
        # And with workers there, all of it is seen, each receipt is answered, and no mark stays
        with pool_of(settings):
            await asyncio.gather(*(receipt.committed(20) for receipt in receipts))
            assert await bus.count("messages", room=room) == 25
            await eventually(lambda: bus.stats().marks == 0)
            assert not (await bus.recent("messages", room=room)).stale


async def test_g1_a_flush_is_told_to_writes_without_marks_of_their_own(
    own_redis: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "MARKS", 4)
    server: RedisServer = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    async with mnemobus.connect(**settings.model_dump()) as bus:
        receipts = await bus.write_many([said(str(n)) for n in range(12)])
        # Given that Redis lost all of them
        epochs = bus.stats().epochs
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.flushall()
        await eventually(lambda: bus.stats().epochs > epochs and not bus._pending.in_doubt, timeout=20)
        # When what is newer is applied, then nobody is told that the others were, and nothing waits for them
        with worker_threads(settings):
            newer = await bus.write(said("newer"), durability="committed")
            assert await outcome(newer) is None
            fates = await asyncio.gather(*map(outcome, receipts))
            assert all(
                isinstance(fate, NotCommitted) and "no longer in the log" in str(fate) for fate in fates
            )
            await eventually(lambda: bus.stats().marks == 0)
            assert not (await bus.recent("messages", room="r1")).stale


async def test_g7_marks_of_an_outbox_beyond_their_number_still_hold(
    own_redis: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "MARKS", 4)
    server: RedisServer = own_redis()
    settings = settings.model_copy(
        update={"redis_url": server.url, "redis_timeout": 0.5, "own_write_timeout": 0.1}
    )
    with worker_threads(settings):
        async with mnemobus.connect(**settings.model_dump()) as bus:
            await bus.get(new_id())
            server.kill()
            receipts = [await bus.write(said(str(n))) for n in range(12)]
            assert len(bus._pending._scopes) <= 2 * 4 + 2
            assert (await bus.recent("messages", room="r1")).stale
            server.start()
            await asyncio.gather(*(receipt.committed(30) for receipt in receipts))
            await eventually(lambda: bus.stats().marks == 0, timeout=20)

            async def complete() -> bool:
                found = await bus.recent("messages", room="r1")
                return len(found) == 12 and not found.stale

            await eventually(complete)  # to ask what is applied may take longer than the 0.1 s
