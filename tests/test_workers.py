"""The worker pool: every event of the log reaches the store, even if processes die, pause, fail or are away meanwhile.

Most pools here are threads of the test's process (`pool_of`), on the broker that Dramatiq's command line would use.
Where something is killed it is a process: `doomed`, which kills itself at a point that is given (worker_process.py), or
Dramatiq's own (`workers`). Agents in processes of their own are in test_processes.py; one bad event among hundreds, and
a store that is down for a minute, in scenarios/.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import mnemobus
from mnemobus import Memory, NotCommitted, Receipt, Settings, WriteRejected
from mnemobus.connection.link import ThreadedLink
from mnemobus.keys import APPLY_GROUP, Dimensions, Version
from mnemobus.log.events import PUT, Event
from mnemobus.memory import new_id
from mnemobus.records import encode
from mnemobus.store import Deletion, open_writer
from mnemobus.store.merge import BEGINNING, STEP
from mnemobus.store.sqlite import SqliteWriter
from mnemobus_workers.apply import Applier
from mnemobus_workers.broker import ALONE_AFTER, DEAD_AFTER
from outside import Log, stored
from servers import RedisServer, Workers, alive, end, eventually, is_paused, spawn

Connect = Callable[..., mnemobus.Bus]
PoolOf = Callable[[Settings], AbstractContextManager[Settings]]
Doomed = Callable[..., "subprocess.Popen[Any]"]

CLAIM_IDLE = 0.5


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"log_partitions": 1, "feed_partitions": 4, "claim_idle": CLAIM_IDLE})


@pytest.fixture
def both(settings: Settings, database_url: str) -> Settings:
    """The settings on each of the stores, which has its schema already."""
    settings = settings.model_copy(update={"database_url": database_url})
    writer = open_writer(settings)
    writer.open()
    writer.close()
    return settings


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Doomed]:
    """Starts a worker process that kills itself at a point, or pauses there, or does neither."""
    started: list[subprocess.Popen[Any]] = []

    def start(settings: Settings, *arguments: str) -> subprocess.Popen[Any]:
        command = [sys.executable, str(Path(__file__).with_name("worker_process.py")), *arguments]
        started.append(spawn(command, env=os.environ | settings.environment(), cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        end(process, patience=0)


def opened(settings: Settings, **overrides: Any) -> mnemobus.Bus:
    return mnemobus.connect(**{**settings.model_dump(), **overrides})


def said(text: str, room: str = "r1", **fields: Any) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)


async def write(bus: mnemobus.Bus, *texts: str, room: str = "r1") -> list[Receipt]:
    return await bus.write_many([said(text, room) for text in texts])


async def committed(receipts: list[Receipt], timeout: float = 10) -> None:
    await asyncio.gather(*(receipt.committed(timeout) for receipt in receipts))


def texts(count: int) -> list[str]:
    return sorted(f"text {n}" for n in range(count))


@contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """Nothing can be committed meanwhile."""
    url = settings.database_url
    if url.startswith("sqlite"):
        connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=10, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
    else:
        connection = psycopg.connect(url)
        connection.execute("LOCK TABLE mnemobus.memories IN EXCLUSIVE MODE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


# Killed


@pytest.mark.parametrize("point", ["transaction", "commit", "fan-out", "ack"])
async def test_g1_whatever_a_worker_was_at_when_it_was_killed_is_done_by_another(
    both: Settings, pool_of: PoolOf, doomed: Doomed, point: str
) -> None:
    log = Log(both)
    async with opened(both) as writer, opened(both) as reader:
        # Given an agent that holds a copy of a room
        await eventually(lambda: is_local(reader))
        # When a worker takes all that was written there, and is killed in the midst of applying it
        receipts = await write(writer, *texts(20))
        process = doomed(both, point)
        assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
        killed = time.monotonic()
        # Then it is in the store or not, and confirmed only if everyone was told
        versions = {str(receipt.version) for receipt in receipts}
        assert log.pending().keys() == (set() if point == "ack" else versions)
        assert await stored(both) == ([] if point == "transaction" else texts(20))
        scopes = ["room:messages:r1", *(f"id:{receipt.id}" for receipt in receipts)]
        messages = len({log.keys.feed_partition(scope) for scope in scopes})
        sent = sum(map(len, log.feed()))
        assert sent == {"transaction": 0, "commit": 0, "fan-out": 1, "ack": messages}[point]
        # and another worker does all of it again, soon after it may, unless it was confirmed
        with pool_of(both):
            await eventually(log.done)
            assert time.monotonic() - killed < CLAIM_IDLE + 5
            await committed(receipts)
        # each row once
        assert await stored(both) == texts(20)
        # with an invalidation, sent for the first time or again, for every agent that held a copy
        assert versions == log.named("room:messages:r1").keys()
        assert sum(map(len, log.feed())) == sent + (0 if point == "ack" else messages)
        await eventually(lambda: sees(reader, texts(20)))


async def is_local(bus: mnemobus.Bus) -> bool:
    return (await bus.recent("messages", room="r1", limit=100)).source == "local"


async def sees(bus: mnemobus.Bus, expected: list[str]) -> bool:
    found = await bus.recent("messages", room="r1", limit=100)
    return sorted(memory.content["text"] for memory in found) == expected


async def test_g1_what_killed_processes_held_is_claimed_and_applied_by_others(
    both: Settings, pool_of: PoolOf, workers: Callable[..., Workers]
) -> None:
    log = Log(both)
    async with opened(both) as bus:
        # Given processes that have applied something, and now hold batches that they can't commit
        pool = workers(both.model_copy(update={"batch_size": 50}))
        await committed(await write(bus, *texts(100)[:50]))
        with locked(both):
            receipts = await write(bus, *texts(100)[50:], *(f"more {n}" for n in range(350)))
            await eventually(lambda: len(log.pending()) == 200)
            owners = {owner for owner, _, _ in log.pending().values()}
            # When all of them are killed
            pool.kill()
        # Then others take over what they held and what nobody had begun, within about claim_idle
        began = time.monotonic()
        with pool_of(both):
            await committed(receipts)
            assert time.monotonic() - began < CLAIM_IDLE + 5
            await eventually(log.done)
        assert len(owners) == 2
        assert await stored(both) == sorted([*texts(100), *(f"more {n}" for n in range(350))])


async def test_g1_a_paused_worker_holds_up_nobody_and_doubles_nothing_when_it_goes_on(
    both: Settings, pool_of: PoolOf, doomed: Doomed
) -> None:
    log = Log(both)
    both = both.model_copy(update={"database_timeout": 1.0})
    async with opened(both) as bus:
        # Given a worker that is paused in the midst of its work; with the locks of a transaction, where the server is
        # one that takes them away from it
        receipts = await write(bus, *texts(20))
        process = doomed(both, "transaction" if "postgres" in both.database_url else "commit", "pause")
        await eventually(lambda: is_paused(process.pid), timeout=30)
        # Then another applies its batch
        with pool_of(both):
            await committed(receipts, 40)  # on a busy machine more than one try waits for its locks
            await eventually(log.done)
            assert await stored(both) == texts(20)
            # When it goes on with what it takes for its own, nothing changes
            named = log.named("room:messages:r1").total()
            os.kill(process.pid, signal.SIGCONT)
            await eventually(lambda: log.named("room:messages:r1").total() > named)
            await committed(await write(bus, "last"))
        assert await stored(both) == ["last", *texts(20)]
        await eventually(log.done)


async def test_g1_a_slow_worker_keeps_what_it_holds(both: Settings, pool_of: PoolOf) -> None:
    log = Log(both)
    # Given two worker processes' worth of pools, and a store that takes no commit for much longer than claim_idle
    async with opened(both) as bus:
        with pool_of(both), pool_of(both):
            with locked(both):
                receipts = await write(bus, *texts(20))
                before = await eventually(log.pending)
                deadline = time.monotonic() + 3 * CLAIM_IDLE
                while time.monotonic() < deadline:
                    await asyncio.sleep(CLAIM_IDLE / 10)
                    # Then nobody claims what another works on
                    assert [(owner, n) for owner, _, n in log.pending().values()] == [
                        (owner, 1) for owner, _, _ in before.values()
                    ]
            await committed(receipts)
            await eventually(log.done)
    assert set(log.named("room:messages:r1").values()) == {1}
    assert await stored(both) == texts(20)


async def test_a_graceful_stop_finishes_what_was_begun_and_hands_back_the_rest(
    settings: Settings, pool_of: PoolOf, workers: Callable[..., Workers]
) -> None:
    log = Log(settings)
    # Given workers that nobody claims from soon, with batches in hand: one begun, one to follow
    settings = settings.model_copy(update={"claim_idle": 60, "batch_size": 10})
    async with opened(settings) as bus:
        pool = workers(settings, processes=1, threads=1)
        pids = [pool.master, *pool.pids]
        with locked(settings):
            receipts = await write(bus, *texts(20))
            await eventually(lambda: len(log.pending()) == 20)
            # When they are asked to stop
            stopping = asyncio.create_task(asyncio.to_thread(pool.stop))
            await eventually(lambda: b"Shutting down..." in pool.log.read_bytes())
        # Then what was begun is finished, and the end is clean
        assert await stopping == 0
        assert not any(map(alive, pids))
        assert len(await stored(settings)) == 10
        # and the rest is there for others to claim at once, as if it had not been delivered
        left = log.pending()
        assert len(left) == 10
        assert all(idle > 60_000 and deliveries == 0 for _, idle, deliveries in left.values())
        with pool_of(settings):
            await committed(receipts, timeout=5)
        await eventually(log.done)


async def test_a_stop_while_the_store_is_away_hands_back_what_waits_for_it(
    settings: Settings, pool_of: PoolOf, caplog: Any
) -> None:
    log = Log(settings)
    settings = settings.model_copy(update={"claim_idle": 60, "database_timeout": 0.1})
    async with opened(settings) as bus:
        # Given a pool that can't commit
        with locked(settings):
            with pool_of(settings):
                receipts = await write(bus, *texts(20))
                await eventually(lambda: "trying again until it works" in caplog.text)
            # When it is stopped, it does not wait any longer
            assert all(idle > 60_000 and n == 0 for _, idle, n in log.pending().values())
            assert len(log.pending()) == 20
            assert "Traceback" not in caplog.text
        # Then the next one has it at once
        with pool_of(settings):
            await committed(receipts, timeout=5)


# Events that can't be applied


def test_a_letter_is_written_once_however_often_its_batch_comes(settings: Settings) -> None:
    link = ThreadedLink(settings, connections=2)
    places = [link.keys.dead(0), link.keys.reasons(0), link.keys.meter(0)]
    [first, *_] = link.run("dead", places, ["1-1", "why", 10_000, "op", "put"])
    [second, *_] = link.run("dead", places, ["1-2", "why", 10_000, "op", "put"])
    assert second != first
    assert link.run("dead", places, ["1-1", "why again", 10_000, "op", "put"]) == [first, 0, 0]
    assert [letter["version"] for letter in Log(settings).letters()] == ["1-1", "1-2"]
    link.close()


async def test_an_entry_that_is_no_event_at_all_does_not_stop_the_log(
    settings: Settings, pool_of: PoolOf
) -> None:
    log = Log(settings)
    async with opened(settings) as bus:
        # Given what somebody else put into the log: another program's entry, and one with thousands of fields
        await write(bus, "text 0")
        log.client.xadd(log.keys.log(0), {"hello": b"\xff"})
        log.client.xadd(log.keys.log(0), {f"field {n}": "x" for n in range(10_000)})
        receipts = await write(bus, "text 1")
        with pool_of(settings):
            await committed(receipts)
            await eventually(lambda: not log.pending())
    assert await stored(settings) == texts(2)
    assert [letter["reason"].partition(":")[0] for letter in log.letters()] == [
        "unknown field 'hello'",
        "unknown field 'field 0'",
    ]


async def test_an_event_that_kills_its_worker_again_and_again_is_given_up(
    settings: Settings, pool_of: PoolOf, doomed: Doomed
) -> None:
    log = Log(settings)
    async with opened(settings) as bus:
        # Given an event that no worker survives, amid others
        receipts = await write(bus, *texts(20)[:10], "poison", *texts(20)[10:])
        poison = receipts.pop(10)
        process = doomed(settings, "poison")
        assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
        assert len(log.pending()) == 21
        # When that has happened some times, then each comes alone, and only one is the worker's death
        log.forsake(*log.pending(), deliveries=ALONE_AFTER)
        process = doomed(settings, "poison")
        assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
        assert 1 <= len(log.pending()) <= 12  # one after another, in order, and by two threads
        assert len(await stored(settings)) >= 9
        # When that one has had its chances, it is given up, and workers live on
        log.forsake(str(poison.version), deliveries=DEAD_AFTER)
        process = doomed(settings, "poison")
        await committed(receipts)
        with pytest.raises(
            WriteRejected, match="delivered 20 times, and no worker got as far as confirming it"
        ):
            await poison.committed()
        await eventually(log.done)
        assert process.poll() is None
        assert [letter["version"] for letter in log.letters()] == [str(poison.version)]
        assert await stored(settings) == texts(20)


async def test_an_exception_of_our_own_leaves_the_batch_pending_and_it_comes_back(
    settings: Settings, pool_of: PoolOf, monkeypatch: Any, caplog: Any
) -> None:
    apply = SqliteWriter.apply
    failures = iter([ZeroDivisionError("a bug"), KeyError("another")])

    def stumble(writer: SqliteWriter, events: Any) -> Any:
        for error in failures:
            raise error
        return apply(writer, events)

    monkeypatch.setattr(SqliteWriter, "apply", stumble)
    log = Log(settings)
    settings = settings.model_copy(update={"claim_idle": 0.2})
    async with opened(settings) as bus:
        with pool_of(settings):
            receipts = await write(bus, *texts(20))
            await committed(receipts)
            await eventually(log.done)
    assert "ZeroDivisionError: a bug" in caplog.text
    assert caplog.text.count("was not applied; it stays pending and will be claimed again") == 2
    assert log.letters() == []
    assert await stored(settings) == texts(20)


# Away


async def test_a_store_that_stays_locked_kills_no_event(
    settings: Settings, pool_of: PoolOf, caplog: Any
) -> None:
    log = Log(settings)
    settings = settings.model_copy(update={"database_timeout": 0.1})
    async with opened(settings) as bus:
        with pool_of(settings):
            with locked(settings):
                receipts = await write(bus, *texts(20))
                await eventually(lambda: "database is locked; trying again until it works" in caplog.text)
                await asyncio.sleep(2 * CLAIM_IDLE)
                assert {n for _, _, n in log.pending().values()} == {1}
            await committed(receipts)
    assert log.letters() == []
    assert await stored(settings) == texts(20)


async def test_a_store_that_is_unfit_kills_no_event(
    settings: Settings, postgres_url: str, pool_of: PoolOf, caplog: Any
) -> None:
    log = Log(settings)
    name = postgres_url.rpartition("/")[2] + "_ascii"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0".encode()
        )
        try:
            # Given workers with a database in which not every memory could be stored
            unfit = settings.model_copy(update={"database_url": postgres_url + "_ascii"})
            async with opened(settings) as bus:
                with pool_of(unfit):
                    await write(bus, *texts(20))
                    await eventually(lambda: "has the encoding SQL_ASCII" in caplog.text)
                    await asyncio.sleep(2 * CLAIM_IDLE)
                    # Then they wait for somebody to mend that
                    assert {n for _, _, n in log.pending().values()} == {1}
                    assert "was not applied" not in caplog.text
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


async def test_a_flush_of_redis_is_survived(
    own_redis: Callable[..., RedisServer], settings: Settings, pool_of: PoolOf
) -> None:
    settings = settings.model_copy(update={"redis_url": own_redis().url})
    log = Log(settings)
    async with opened(settings) as writer, opened(settings) as reader:
        with pool_of(settings):
            await committed(await write(writer, "text 0"))
            await eventually(lambda: is_local(reader))
            # When all that Redis had is gone
            log.client.flushall()
            await eventually(lambda: writer.stats().epochs == reader.stats().epochs == 1)
            # Then what is written later is applied by the same workers
            await committed(await write(writer, "text 1"))
            await eventually(log.done)
            # and they drop what agents have cached since, in Redis too
            await eventually(lambda: is_local(reader))
            async with opened(settings, local_max_entries=0) as other:
                assert (await other.recent("messages", room="r1", limit=100)).source == "shared"
                await committed(await write(writer, "text 2"))
                assert await sees(other, texts(3))
    assert await stored(settings) == texts(3)


async def test_g1_a_redis_that_is_killed_and_restarted_loses_nothing(
    own_redis: Callable[..., RedisServer], settings: Settings, pool_of: PoolOf
) -> None:
    # Given a Redis that writes to disk before it answers
    server = own_redis("--appendfsync", "always")
    settings = settings.model_copy(update={"redis_url": server.url, "batch_size": 10})
    log = Log(settings)
    receipts: list[Receipt] = []
    async with opened(settings) as bus:

        async def work() -> None:
            for text in texts(300):
                receipts.extend(await write(bus, text))

        with pool_of(settings):
            # When it is killed amid writes and batches, twice
            writing = asyncio.create_task(work())
            for some in (50, 150):
                await eventually(lambda some=some: len(receipts) > some)
                server.kill()
                server.start()
            await writing
            # Then all that was acknowledged is applied, once
            await committed(receipts, timeout=30)
            await eventually(log.done)
    assert await stored(settings) == texts(300)
    assert log.letters() == []


async def test_workers_make_room_in_a_redis_that_is_full(each_server: Settings, pool_of: PoolOf) -> None:
    # Given a log that no worker has ever read, with a bad event in it, in a Redis that takes no more
    settings = each_server.model_copy(update={"retention": 0})
    log = Log(settings)
    async with opened(settings) as bus:
        await bus.recent("messages", room="r1")
        dimensions = Dimensions("messages", "r1")
        bad = Event(PUT, dimensions, new_id(), b"[]", b"{}")
        receipts = await bus._writes.publish(
            [bad, *(Event.put(encode(said(text), 1 << 20)) for text in texts(300))], None
        )
        try:
            log.client.config_set("maxmemory", "100kb")
            with pytest.raises(mnemobus.LogFull):
                await write(bus, "more")
            # Then they apply all of it the same
            with pool_of(settings):
                await committed(receipts[1:])
                with pytest.raises(WriteRejected, match="content: JSON, but no object"):
                    await receipts[0].committed()
                await eventually(log.done)
        finally:
            log.client.config_set("maxmemory", 0)
    assert await stored(settings) == texts(300)
    assert len(log.letters()) == 1


# The feed


async def test_g5_the_feed_has_no_gap_with_several_processes_at_work(
    settings: Settings, workers: Callable[..., Workers]
) -> None:
    # Given two processes with two threads each that fan out small batches into two feed partitions
    settings = settings.model_copy(update={"log_partitions": 3, "feed_partitions": 2, "batch_size": 3})
    pool = workers(settings, processes=2, threads=2)
    async with opened(settings) as bus:
        memories = [said(f"text {n}", f"room {n % 20}", entity=f"e{n % 7}") for n in range(400)]
        receipts = await bus.write_many(memories)
        await committed(receipts, timeout=30)
        assert pool.pids
        consumers = set()
        log = Log(settings)
        for partition in range(3):
            found = log.client.xinfo_consumers(log.keys.log(partition), APPLY_GROUP)
            consumers |= {consumer["name"] for consumer in found}
        assert len(consumers) == 2
        # Then each message names the one before it, and every version is named for every scope
        feed = log.feed()
        for messages in feed:
            assert len(messages) > 100
            previous = Version(0, 0)
            for message in messages:
                assert message.previous == previous
                previous = message.id
        named = [{version for message in messages for version in message.versions} for messages in feed]
        for memory, receipt in zip(memories, receipts, strict=True):
            for scope in Dimensions("messages", memory.room, entity=memory.entity).scopes(memory.id):
                assert receipt.version in named[log.keys.feed_partition(scope)]


async def test_mnemobus_feed_length_is_about_how_many_messages_the_feed_keeps(
    settings: Settings, pool_of: PoolOf
) -> None:
    kept = []
    for number, length in enumerate((5, 1000)):
        own = settings.model_copy(
            update={
                "feed_partitions": 1,
                "batch_size": 1,
                "feed_length": length,
                "redis_key_prefix": f"{settings.redis_key_prefix}-{number}",
                "database_url": f"{settings.database_url}.{number}",
            }
        )
        async with opened(own) as bus:
            with pool_of(own):
                await committed(await write(bus, *texts(120)))
        [messages] = Log(own).feed()
        kept.append(len(messages))
    # Redis removes a hundred at most at a time
    assert 5 <= kept[0] <= 105
    assert kept[1] == 120


@pytest.fixture
async def many(both: Settings, pool_of: PoolOf) -> list[str]:
    """The ids of a room's memories, more than one step deletes."""
    async with opened(both) as bus:
        with pool_of(both):
            receipts = await write(bus, *texts(STEP + 100))
            await receipts[-1].committed(30)
            await eventually(Log(both).done)
            return [receipt.id for receipt in receipts]


async def test_g1_a_large_room_whose_deletion_is_broken_off(
    both: Settings, pool_of: PoolOf, monkeypatch: Any, many: list[str]
) -> None:
    # Given a worker that fails in the midst of a deletion, after a step of which it has told nobody
    clear, failures = Applier._clear, iter([ZeroDivisionError("a bug")])

    def stumble(applier: Applier, deletion: Deletion) -> None:
        for error in failures:
            applier._writer.clear(deletion, BEGINNING, 30)
            raise error
        clear(applier, deletion)

    monkeypatch.setattr(Applier, "_clear", stumble)
    async with opened(both) as writer, opened(both) as reader:
        await eventually(lambda: is_local(reader))
        # And an agent with copies of memories that it begins with, and that it ends with
        some = many[::40]
        for id in some:
            assert await reader.get(id)
        with pool_of(both):
            # When the room is deleted
            receipt = await writer.delete_room("messages", room="r1")
            # Then another does the rest, and no copy is left
            await receipt.committed(30)
            await eventually(lambda: _none_of(reader, some))
            assert await reader.recent("messages", room="r1") == []
            await eventually(Log(both).done)


async def _none_of(bus: mnemobus.Bus, ids: list[str]) -> bool:
    return [await bus.get(id) for id in ids] == [None] * len(ids)


async def test_others_write_while_a_large_room_is_deleted(
    both: Settings, pool_of: PoolOf, monkeypatch: Any, many: list[str]
) -> None:
    # Given a deletion that stops between two of its steps
    clear, begun, go = Applier._clear, threading.Event(), threading.Event()

    def stop(applier: Applier, deletion: Deletion) -> None:
        begun.set()
        go.wait(30)
        clear(applier, deletion)

    monkeypatch.setattr(Applier, "_clear", stop)
    async with opened(both) as writer, opened(both) as reader:
        await eventually(lambda: is_local(reader))
        assert await reader.recent("messages", room="r1", limit=5)
        with pool_of(both):
            try:
                receipt = await writer.delete_room("messages", room="r1")
                await asyncio.to_thread(begun.wait, 30)
                # Then the room is empty for everybody, and what is written to others, and to itself, is committed
                await eventually(lambda: _is_empty(reader))
                await committed([*await write(writer, "a", room="r2"), *await write(writer, "b", room="r1")])
                with pytest.raises(NotCommitted):
                    await receipt.committed(0.1)
            finally:
                go.set()
            # And when it goes on, that is all that is left
            await receipt.committed(30)
            assert await stored(both) == ["b"]
            assert await reader.count("messages", room="r2") == 1


async def _is_empty(bus: mnemobus.Bus) -> bool:
    return await bus.recent("messages", room="r1", limit=5) == []


async def test_g6_a_deleted_room_waits_for_what_was_deleted_in_it_before(
    settings: Settings, doomed: Doomed, pool_of: PoolOf
) -> None:
    async with opened(settings, own_write_timeout=0.3) as mine, opened(settings) as other:
        # Given a memory that is shared, and that another agent deletes
        with pool_of(settings):
            [receipt] = await write(mine, "x")
            await receipt.committed()
            await eventually(lambda: not mine.stats().marks)
            assert await mine.get(receipt.id) is not None
        await other.delete(receipt.id)

        # If the worker dies once that is committed, before it is fanned out
        assert doomed(settings, "commit").wait(20) == -signal.SIGKILL

        # And I delete the room, and that is committed by another worker, which finds nothing left in it
        with pool_of(settings.model_copy(update={"claim_idle": 60.0})):
            await (await mine.delete_room("messages", room="r1")).committed()
            # Then I don't take for the present what is shared still
            memory = await mine.get(receipt.id)
            assert memory is None or memory.stale

        # Until the first deletion is claimed and fanned out
        with pool_of(settings):
            await eventually(lambda: not mine.stats().marks)
            assert await mine.get(receipt.id) is None
