"""G8: any stretch of the log can be applied again, at any time, into the same store or another, to the same result."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import pytest
import redis

from commands import Command
from mnemobus import LogTrimmed, Settings, connect
from mnemobus.cli.moments import parse_moment
from mnemobus.connection.link import ThreadedLink
from mnemobus.errors import SettingsError
from mnemobus.keys import APPLY_GROUP, COPY_GROUP, REPLAY_GROUP, Dimensions, Keyspace, Version
from mnemobus.log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event
from mnemobus.store import open_writer
from mnemobus_workers import upkeep
from mnemobus_workers.pool import make_broker
from mnemobus_workers.replay import Replay
from mnemobus_workers.upkeep import Upkeep
from rows import rows
from servers import RedisServer, Workers, eventually, wait_until

Start = Callable[..., Command]
PoolOf = Callable[[Settings], AbstractContextManager[Settings]]

DYING = """
import os, signal
from mnemobus.cli import main
from mnemobus_workers.apply import Applier
commit, calls = Applier._commit, []
def dying(self, events):
    applied = commit(self, events)
    calls.append(events)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return applied
Applier._commit = dying
main()
"""
"""The command line, killed in its third batch, between commit and fan-out."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"log_partitions": 2, "feed_partitions": 4, "batch_size": 20, "database_timeout": 0.3}
    )


class Log:
    """The log, from outside."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = redis.Redis.from_url(settings.redis_url)
        self.keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)

    def rooms(self) -> list[str]:
        """Two rooms of each log partition."""
        names = [f"room-{n}" for n in range(100)]
        return [name for p in range(2) for name in [n for n in names if self.keys.log_partition(n) == p][:2]]

    def write(self, *events: Event, ms: int | None = None) -> list[Version]:
        """Events in the log; with ``ms``, of that time."""
        versions = []
        for event in events:
            partition = self.keys.log_partition(event.dimensions.room)
            self.client.hincrby(self.keys.meter(partition), "added", 1)
            id = "*" if ms is None else f"{ms}-{len(versions)}"
            versions.append(
                Version.parse(
                    self.client.execute_command("XADD", self.keys.log(partition), id, *event.fields())
                )
            )
        return versions

    def now(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds * 1000 + micros // 1000)

    def length(self) -> int:
        return sum(self.client.xlen(self.keys.log(p)) for p in range(2))

    def groups(self) -> list[str]:
        """The groups of replays, on any partition."""
        names = []
        for partition in range(2):
            if self.client.exists(self.keys.log(partition)):
                found = self.client.xinfo_groups(self.keys.log(partition))
                names += [g["name"].decode() for g in found if g["name"].decode() != APPLY_GROUP]
        return names

    def backlog(self) -> int:
        meters = [self.client.hmget(self.keys.meter(p), "added", "applied") for p in range(2)]
        return sum(int(added or 0) - int(applied or 0) for added, applied in meters)

    def told(self) -> int:
        """How many invalidations were sent."""
        return sum(self.client.xlen(self.keys.feed(f)) for f in range(4))


@pytest.fixture
def log(settings: Settings) -> Iterator[Log]:
    log = Log(settings)
    with log.client:
        yield log


def put(room: str, text: str, id: str | None = None, **fields: Any) -> Event:
    content = b'{"text":"%s"}' % text.encode()
    dimensions = Dimensions("messages", room, entity="alice")
    return Event(PUT, dimensions, id or str(uuid.uuid4()), content, b"{}", created_us=1, **fields)


def history(rooms: list[str], length: int, seed: int) -> list[Event]:
    """Puts, updates and deletions of few memories in few rooms: much of it meets."""
    rng = random.Random(seed)
    memories = [
        (str(uuid.UUID(int=rng.getrandbits(128))), Dimensions("messages", room, None, f"e{n % 3}"))
        for n, room in enumerate(rooms * 6)
    ]
    events = []
    for n in range(length):
        id, dimensions = rng.choice(memories)
        value = b'{"n":%d}' % n
        vector = rng.choice([None, b"", n.to_bytes(4, "little") * 2])
        op = rng.choices([PUT, UPDATE, DELETE, DELETE_ROOM], [8, 8, 3, 1])[0]
        if op == DELETE_ROOM:
            events.append(Event(op, Dimensions(*dimensions[:2])))
        elif op == DELETE:
            events.append(Event(op, dimensions, id))
        elif op == PUT:
            events.append(Event(op, dimensions, id, value, b"{}", vector or None, created_us=n))
        else:
            fields = rng.choice(
                [{"content": value}, {"metadata": value}, {"content": value, "embedding": vector}]
            )
            events.append(Event(op, dimensions, id, **fields))
    return events


async def applied(log: Log) -> None:
    await eventually(lambda: log.backlog() == 0, 20)


def replay(settings: Settings, **options: Any) -> Replay:
    """A replay that has been run."""
    done = Replay(settings, **options)
    assert done.run()
    return done


def other(settings: Settings, name: str = "other") -> str:
    """The URL of a store that is not there yet."""
    return f"sqlite:///{settings.data_dir}/{name}.db"


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Nothing can be committed meanwhile."""
    settings = Settings.load(database_url=url)
    writer = open_writer(settings)
    writer.open()
    writer.close()
    with closing(
        sqlite3.connect(url.removeprefix("sqlite:///"), timeout=10, isolation_level=None)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


class Halted:
    """A replay in a thread, which pauses before its batches until the test lets it continue."""

    def __init__(self, settings: Settings, at: int, **options: Any) -> None:
        self.replay = Replay(settings, **options)
        self.there, self._go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.complete = False
        repeat = self.replay._applier.repeat
        calls = iter(range(1_000_000))

        def halting(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                self.there.set()
                assert self._go.wait(60)
            return repeat(*args, **kwargs)

        self.replay._applier.repeat = halting  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.there.wait(20)

    def _run(self) -> None:
        try:
            self.complete = self.replay.run()
        except BaseException as error:  # noqa: BLE001 - asserted by the test
            self.error = error

    def go_on(self) -> None:
        self._go.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


def tidy(settings: Settings) -> None:
    """What each worker does every now and then."""
    broker = make_broker(settings)
    Upkeep(broker, None).tidy()  # type: ignore[arg-type]
    broker.close()


# The same result


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_g8_whatever_happened_a_replay_ends_in_the_same_rows(
    settings: Settings, log: Log, pool_of: PoolOf, database_url: str, seed: int
) -> None:
    target = database_url.replace("memories.db", "copy.db")
    # Given a history of writes, updates and deletions, which live workers applied in batches of their own making
    with pool_of(settings.model_copy(update={"batch_size": seed * 7})):
        for start in range(0, 400, 50):
            log.write(*history(log.rooms(), 400, seed)[start : start + 50])
        await applied(log)
    first = rows(settings.database_url)
    assert len(first) > 20
    # If it is replayed over what it made, then not a column changes
    for _ in range(2):
        again = replay(settings).outcome
        assert rows(settings.database_url) == first
    assert (again.events, again.applied, again.changed) == (400, 400, 0)
    # And into a new store, twice, in other batches, it makes the same
    for size in (7, 500):
        replay(settings.model_copy(update={"batch_size": size}), into=target)
        assert rows(target) == first
    # And nothing is left behind, nor added to the log or its meter
    assert log.groups() == []
    assert log.length() == 400 and log.backlog() == 0


async def test_g8_a_replay_while_writes_go_on(settings: Settings, log: Log, pool_of: PoolOf) -> None:
    events = history(log.rooms(), 600, 5)
    log.write(*events[:300])
    with pool_of(settings):
        # Given replays into both stores while agents write and workers apply
        for start in range(300, 600, 60):
            log.write(*events[start : start + 60])
            await asyncio.to_thread(replay, settings)
            await asyncio.to_thread(replay, settings, into=other(settings))
        await applied(log)
    # When a last one has brought the rest, then all three ways lead to the same
    replay(settings, into=other(settings))
    replay(settings, into=other(settings, "at-once"))
    assert rows(other(settings)) == rows(settings.database_url) == rows(other(settings, "at-once"))


async def test_g8_a_replay_while_workers_are_killed(
    settings: Settings, log: Log, workers: Callable[..., Workers]
) -> None:
    events = history(log.rooms(), 600, 8)
    # Given workers that are killed amid their batches, while the log is replayed into their store and another
    for start in range(0, 600, 200):
        pool = workers(settings, processes=1)
        log.write(*events[start : start + 200])
        replays = asyncio.gather(
            asyncio.to_thread(replay, settings), asyncio.to_thread(replay, settings, into=other(settings))
        )
        await eventually(lambda: log.backlog() < 200)
        pool.kill()
        await replays
    # When others have done what those left, then all ways lead to the same
    workers(settings, processes=1)
    await applied(log)
    replay(settings, into=other(settings))
    before = rows(settings.database_url)
    # What is dead may yet take over its room's tombstone; nothing was missing, and then nothing is left to do
    replay(settings)
    assert rows(settings.database_url) == before
    assert replay(settings).outcome.changed == 0
    replay(settings, into=other(settings, "at-once"))
    assert rows(other(settings)) == rows(settings.database_url) == rows(other(settings, "at-once"))


async def test_g3_g8_what_was_deleted_stays_deleted(settings: Settings, log: Log, pool_of: PoolOf) -> None:
    room, id = log.rooms()[0], str(uuid.uuid4())
    with pool_of(settings):
        # Given a deleted memory, and one in a room that was deleted
        [first, _] = log.write(put(room, "a", id), put(room, "b"))
        log.write(Event(DELETE, put(room, "a").dimensions, id))
        log.write(Event(DELETE_ROOM, Dimensions("messages", room)))
        [last] = log.write(put(room, "c"))
        await applied(log)
        before = rows(settings.database_url)
        # When only what came before is replayed, or all
        replay(settings, until=first)
        replay(settings, since=first, until=last.before())
        replay(settings)
    # Then nothing is back
    assert rows(settings.database_url) == before


async def test_g5_what_a_replay_changes_is_dropped_from_every_cache(
    settings: Settings, log: Log, pool_of: PoolOf
) -> None:
    room = log.rooms()[0]
    with pool_of(settings):
        [version] = log.write(put(room, "hi"))
        await applied(log)
    # Given a database that has lost a row, and an agent that holds what is left: nothing
    with closing(sqlite3.connect(settings.database_url.removeprefix("sqlite:///"))) as database:
        database.execute("DELETE FROM mnemobus_memories")
        database.commit()
    async with connect(**settings.model_dump()) as bus:

        async def held() -> bool:
            return (await bus.recent("messages", room=room)).source == "local"

        await eventually(held)
        assert len(await bus.recent("messages", room=room)) == 0
        # When the log is replayed into another store, then nobody is told
        told = log.told()
        await asyncio.to_thread(replay, settings, into=other(settings))
        assert log.told() == told and await held()
        # When it is into this one, then the agent sees the row again
        done = await asyncio.to_thread(replay, settings)
        assert done.outcome.changed == 1
        [memory] = await eventually(lambda: bus.recent("messages", room=room))
        assert memory.version == version


# Killed, stopped, overtaken


async def test_g8_a_replay_that_was_killed_is_run_again(
    settings: Settings, log: Log, command: Start, monkeypatch: Any, caplog: Any
) -> None:
    # Given a replay that is killed between commit and fan-out
    log.write(*history(log.rooms(), 200, 7))
    killed = command("replay", settings=settings, program=("-c", DYING))
    assert killed.status == -signal.SIGKILL
    assert rows(settings.database_url)
    [group, same] = log.groups()
    assert group == same and group.startswith(REPLAY_GROUP)
    # When it is run again, then all of it is there
    assert command("replay", settings=settings).status == 0
    replay(settings, into=other(settings))
    assert rows(settings.database_url) == rows(other(settings))
    # And the doctor names what the killed one left
    assert log.groups() == [group, group]
    monkeypatch.setattr("mnemobus.cli.doctor.SILENT", 0.0)
    from mnemobus.cli.doctor import examine

    [finding, _] = [f for f in await examine(settings) if f.check == "replay"]
    assert finding.status == "warn" and finding.found.startswith(
        f"{group} on log partition 0 has been silent for "
    )
    assert f"redis-cli XGROUP DESTROY '{log.keys.log(0)}' {group}" in finding.advice
    # And workers leave it for an hour, then remove it, and begin a new epoch: its last batch was told to nobody
    tidy(settings)
    assert log.groups() == [group, group] and log.client.exists(log.keys.epoch)
    monkeypatch.setattr(upkeep, "REPLAY_IDLE", 0.0)
    epoch = log.client.hget(log.keys.epoch, "epoch")
    await asyncio.sleep(0.002)  # idle for longer than no time at all
    tidy(settings)
    assert log.groups() == []
    assert log.client.hget(log.keys.epoch, "epoch") != epoch
    assert f"forgot {group} of log partition 0: it was killed" in caplog.text


def test_only_replays_that_were_killed_are_forgotten(settings: Settings, log: Log, monkeypatch: Any) -> None:
    log.write(put(log.rooms()[0], "x"))
    stream, link = log.keys.log(0), ThreadedLink(settings, 2)
    monkeypatch.setattr(upkeep, "REPLAY_IDLE", 0.2)
    # Given a group of somebody else, and those of two replays that are gone
    log.client.xgroup_create(stream, "replays-of-mine", "0")
    for name in (f"{COPY_GROUP}gone", f"{REPLAY_GROUP}nobody"):
        assert link.run("hold", [stream], [name, "0-0"]) == 1
    log.client.xgroup_delconsumer(stream, f"{REPLAY_GROUP}nobody", f"{REPLAY_GROUP}nobody")
    wait_until(lambda: log.client.xinfo_consumers(stream, f"{COPY_GROUP}gone")[0]["idle"] > 200)
    link.run("hold", [stream], [f"{COPY_GROUP}alive", "0-0"])
    tidy(settings)
    # Then the former is left alone, and so is one that is at work
    assert log.groups() == [f"{COPY_GROUP}alive", "replays-of-mine"]
    # And there is nothing to hold where there is no log
    assert link.run("hold", [log.keys.log(1)], [f"{COPY_GROUP}alive", "0-0"]) == 0
    link.close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_replay_that_is_stopped_leaves_no_group(
    settings: Settings, log: Log, command: Start, number: int, status: int
) -> None:
    # Given a replay that waits for a store
    log.write(*history(log.rooms(), 100, 3))
    with locked(other(settings)):
        stopped = command("replay", "--json", "--into", other(settings), settings=settings)
        stopped.says("trying again until it works")
        assert len(log.groups()) == 2 and log.groups()[0].startswith(COPY_GROUP)
        # When it is stopped, it says how far it came, and leaves nothing behind
        stopped.signal(number)
        assert stopped.status == status
    assert stopped.json["complete"] is False
    assert log.groups() == []
    # And run again, it goes through
    assert command("replay", "--into", other(settings), settings=settings).status == 0


def test_trimming_does_not_overtake_a_replay(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    # Given a log that is trimmed entry by entry, of which workers have applied everything, and which nothing else keeps
    server = own_redis("--stream-node-max-entries", "1")
    settings = settings.model_copy(update={"redis_url": server.url, "retention": 0})
    log = Log(settings)
    with log.client:
        events = [put(room, str(n)) for n in range(50) for room in log.rooms()]
        log.write(*events)
        for partition in range(2):
            log.client.xgroup_create(log.keys.log(partition), APPLY_GROUP, "$")
        # If it is trimmed while a replay is at its third batch
        halted = Halted(settings, 2, into=other(settings))
        tidy(settings)
        # Then what the replay has done is gone, but for the last of it; what it has not, is there
        assert [log.client.xlen(log.keys.log(p)) for p in (0, 1)] == [61, 100]
        halted.go_on()
        assert halted.error is None and halted.complete
        assert halted.replay.outcome.applied == 200 and halted.replay.outcome.missing == 0
        # And afterwards nothing keeps it
        tidy(settings)
        assert log.length() == 2
        # And a replay of all that there is tells that it was more; one from a date when there was more, refuses
        rest = replay(settings, into=other(settings, "late")).outcome
        assert (rest.applied, rest.missing) == (2, 198)
        with pytest.raises(LogTrimmed) as refused:
            replay(settings, since=3600.0, into=other(settings, "none"))
        assert "the log no longer reaches back to " in str(refused.value)
        assert "Up to 198 events before that were trimmed (MNEMOBUS_RETENTION)" in str(refused.value)
        assert log.groups() == []
        assert replay(settings, since=3600.0, partial=True, into=other(settings, "none")).outcome.applied == 2
        # And what is asked for from after it was trimmed, is all there
        log.write(put(log.rooms()[0], "new"))
        assert (
            replay(settings, since=Version(log.now() - 1, 0).before(), into=other(settings)).outcome.missing
            <= 198
        )


def test_a_quiet_log_is_not_taken_for_a_trimmed_one(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    server = own_redis("--stream-node-max-entries", "1")
    settings = settings.model_copy(update={"redis_url": server.url, "retention": 3600, "log_partitions": 1})
    log = Log(settings)
    hour = 3_600_000
    with log.client:
        # Given events of yesterday, which were trimmed, and one of a minute ago
        log.write(*(put("r", "old") for _ in range(5)), ms=log.now() - 24 * hour)
        recent = log.write(put("r", "recent"), ms=log.now() - 60_000)
        log.client.xgroup_create(log.keys.log(0), APPLY_GROUP, "$")
        tidy(settings)
        assert log.client.xlen(log.keys.log(0)) == 1
        # Then half an hour ago nothing is missing; two hours ago something may be
        assert replay(settings, since=1800.0, into=other(settings)).outcome.applied == 1
        with pytest.raises(LogTrimmed, match=f"it begins at {recent[0]} in log partition 0. Up to 5 events"):
            replay(settings, since=7200.0, into=other(settings))
        # And if somebody deletes entries, nobody knows which
        log.write(put("r", "last"))
        log.client.xdel(log.keys.log(0), str(recent[0]))
        with pytest.raises(LogTrimmed, match="Up to 1 events"):
            replay(settings, since=1800.0, into=other(settings))


def test_a_log_without_workers_is_not_trimmed_because_of_a_replay(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    server = own_redis("--stream-node-max-entries", "1")
    settings = settings.model_copy(update={"redis_url": server.url, "retention": 0})
    log = Log(settings)
    with log.client:
        # Given events that no worker has ever seen, and a replay that has
        log.write(*(put(room, str(n)) for n in range(20) for room in log.rooms()))
        halted = Halted(settings, 3, into=other(settings))
        tidy(settings)
        assert log.length() == 80
        halted.go_on()


def test_a_redis_that_is_flushed_under_a_replay_is_told(settings: Settings, log: Log) -> None:
    log.write(*history(log.rooms(), 100, 3))
    halted = Halted(settings, 1, into=other(settings))
    log.client.delete(log.keys.log(0), log.keys.log(1))
    halted.go_on()
    assert isinstance(halted.error, LogTrimmed)
    assert f"the group '{halted.replay.group}' of log partition 0 is gone" in str(halted.error)
    assert log.client.exists(log.keys.log(0)) == 0  # and it has not made an empty one


def test_a_full_redis_does_not_keep_a_replay_from_it(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    server = own_redis("--maxmemory-policy", "noeviction")
    settings = settings.model_copy(update={"redis_url": server.url})
    log = Log(settings)
    with log.client:
        log.write(*history(log.rooms(), 50, 3))
        replay(settings, dry_run=True)
        log.client.config_set("maxmemory", 1)
        assert replay(settings, into=other(settings)).outcome.applied == 50
        # Nor does it keep what held the log for the replay
        assert [log.client.xinfo_groups(log.keys.log(p)) for p in range(2)] == [[], []]


def test_g8_on_every_server(each_server: Settings, monkeypatch: Any) -> None:
    # Given a log on each server there is, and a replay that was left behind
    settings = each_server.model_copy(update={"log_partitions": 2, "feed_partitions": 4, "batch_size": 20})
    log = Log(settings)
    with log.client:
        log.write(*history(log.rooms(), 100, 9))
        left, stopped = Replay(settings, into=other(settings)), Replay(settings)
        left._begin()
        left._move(0, Version(1, 1))
        # If another one is stopped before it begins, one is a dry run, and others run to the end, at once
        stopped.stop()
        assert stopped.run() is False
        assert replay(settings, dry_run=True).outcome.applied == 100
        halted = Halted(settings, 2, into=other(settings, "halted"))
        assert replay(settings).outcome.applied == 100
        halted.go_on()
        # Then they don't mind each other
        assert rows(settings.database_url) == rows(other(settings, "halted"))
        assert log.groups() == [left.group, left.group]
        # And what was left behind is forgotten in time
        log.client.xgroup_create(log.keys.log(0), APPLY_GROUP, "0")
        tidy(settings)
        assert log.groups() == [left.group, left.group]
        monkeypatch.setattr(upkeep, "REPLAY_IDLE", 0.05)
        wait_until(lambda: log.client.xinfo_consumers(log.keys.log(0), left.group)[0]["idle"] > 50)
        tidy(settings)
        assert log.groups() == []
        log.client.delete(*log.client.scan_iter(f"{{{settings.redis_key_prefix}*"))


# What can't be applied


async def test_dead_letters_are_left_out_and_what_else_is_unfit_is_named(
    settings: Settings, log: Log, pool_of: PoolOf, command: Start
) -> None:
    room = log.rooms()[0]
    short, long = b"\0\0\x80\x3f", b"\0\0\x80\x3f" * 2
    with pool_of(settings):
        # Given dead letters: of an embedding of another length than the first, and of what is no event
        log.write(put(room, "first", embedding=short), put(room, "other", embedding=long))
        log.client.xadd(log.keys.log(0), {"op": "x"})
        log.client.hincrby(log.keys.meter(0), "added", 1)
        await applied(log)
    assert log.client.xlen(log.keys.dead(0)) == 2
    # Then a replay leaves them out, buries nothing, and is content
    done = command("replay", "--json", "--into", other(settings), settings=settings)
    assert done.status == 0
    assert (done.json["applied"], done.json["dead_letters"], done.json["unfit"]) == (1, 2, 0)
    assert rows(other(settings)) == rows(settings.database_url)
    # If they were dropped, it tries them, names them, and ends with 1; the rest is applied
    letters = log.client.xrange(log.keys.dead(0))
    log.client.delete(log.keys.dead(0))
    done = command("replay", "--json", settings=settings)
    shown = command("replay", settings=settings)
    assert done.status == shown.status == 1
    assert (done.json["complete"], done.json["applied"], done.json["unfit"]) == (True, 1, 2)
    versions = {fields[b"version"].decode() for _, fields in letters}
    assert {item["version"] for item in done.json["unfit_events"]} == versions
    assert all(f"{version} of log partition 0: " in shown.err for version in versions)
    assert "an embedding of 2 floats; those of table 'messages' have 1" in shown.err
    assert "the field 'table' is missing" in shown.err or "unknown op" in shown.err
    assert log.client.exists(log.keys.dead(0)) == 0


async def test_a_requeued_event_is_replayed_under_the_version_that_it_had(
    settings: Settings, log: Log
) -> None:
    room, id = log.rooms()[0], str(uuid.uuid4())
    [old, newer] = log.write(put(room, "old", id), put(room, "newer", id))
    log.client.execute_command(
        "XADD",
        log.keys.log(log.keys.log_partition(room)),
        "*",
        *put(room, "old", id).fields(),
        "as",
        str(old),
    )
    replay(settings, into=other(settings))
    [row] = rows(other(settings))
    assert row[7] == '{"text":"newer"}' and row[10] == newer.pack()


# How it is called


def test_since_until_partition_and_dry_run(settings: Settings, log: Log, command: Start) -> None:
    rooms = log.rooms()
    base = log.now() - 3_600_000
    # Given an event in both log partitions in each of ten minutes, an hour ago
    for minute in range(10):
        for room in (rooms[0], rooms[2]):
            log.write(put(room, str(minute)), ms=base + 60_000 * minute)

    def counted(
        since: str | None = None, until: str | None = None, **options: Any
    ) -> tuple[int, dict[int, int]]:
        moments = {
            name: parse_moment(when, name) for name, when in (("since", since), ("until", until)) if when
        }
        outcome = replay(settings, dry_run=True, **moments, **options).outcome
        return outcome.applied, dict(outcome.partitions)

    def at(minute: int) -> str:
        return str(Version(base + 60_000 * minute, 0))

    everything = command("replay", "--dry-run", settings=settings)
    span = ("--since", at(2), "--until", at(4), "--partition", "1")
    some = command("replay", "--dry-run", "--json", *span, settings=settings)
    assert counted() == (20, {0: 10, 1: 10})
    assert counted(partitions=[1]) == (10, {1: 10})
    # Both ends are inclusive
    assert counted(since=at(2), until=at(4)) == (6, {0: 3, 1: 3})
    assert counted(since="10m") == (0, {})
    assert counted(since="2h", until="59m") == (4, {0: 2, 1: 2})
    assert some.status == everything.status == 0
    assert (some.json["applied"], some.json["partitions"], some.json["ops"]) == (3, {"1": 3}, {"put": 3})
    assert some.json["first"]["version"] == at(2) and some.json["last"]["version"] == at(4)
    assert everything.out.startswith("20 events would be applied to sqlite:///")
    assert ": put 20\nfrom log partition 0 10, log partition 1 10\nwritten from " in everything.out
    assert f"({base}-0)" in everything.out and f"({at(9)})" in everything.out
    # And nothing was done
    assert log.groups() == [] and log.told() == 0
    with pytest.raises(sqlite3.OperationalError):
        rows(settings.database_url)


def test_what_is_called_wrongly(settings: Settings, log: Log, command: Start) -> None:
    log.write(put(log.rooms()[0], "x"))
    expected = {
        ("--since", "1h", "--until", "2h"): "mnemobus: --until is before --since\n",
        (
            "--since",
            "soon",
        ): "mnemobus: --since 'soon' is not one of 90s, 15m, 2h, 1d, a date with a zone, a stream ID\n",
        ("--until", "2025-06-01T12:00:00"): (
            "mnemobus: --until '2025-06-01T12:00:00': the date needs a zone, as in 2025-06-01T12:00:00Z\n"
        ),
        ("--partition", "2"): "mnemobus: --partition 2: there are log partitions 0 to 1\n",
        (
            "--into",
            settings.database_url,
        ): "mnemobus: --into names the store of the bus itself: leave it out\n",
        ("--into", "mysql://x"): (
            "mnemobus: --into: must be sqlite:///path/to/file.db or postgresql://user:password@host/database;"
            " mysql can't hold the memories\n"
        ),
    }
    calls = {arguments: command("replay", *arguments, settings=settings) for arguments in expected}
    assert {arguments: call.status for arguments, call in calls.items()} == dict.fromkeys(expected, 2)
    assert {arguments: call.err for arguments, call in calls.items()} == expected
    # The bus's own store is known however it is spelled: into it, agents would not hear what changed
    own = settings.model_copy(update={"database_url": "postgresql://me:secret@127.0.0.1/x"})
    for url in ("postgresql://localhost:5432/x?connect_timeout=3", "postgres://127.0.0.1/%78"):
        refused = command("replay", "--into", url, settings=own)
        assert refused.status == 2
        assert refused.err == "mnemobus: --into names the store of the bus itself: leave it out\n"
    failed = command("replay", "--into", "postgresql://localhost:port/x", settings=own)
    assert failed.status == 2
    assert failed.err.startswith("mnemobus: --into: is not of the form postgresql://user:password@host:port/")
    # A store or a Redis that is not there is told at once
    for changed, words in (
        ({"redis_url": "redis://127.0.0.1:1"}, "mnemobus: Redis at redis://127.0.0.1:1 can't be reached: "),
        ({"database_url": "postgresql://127.0.0.1:1/x"}, "mnemobus: PostgreSQL 127.0.0.1:1/x: "),
    ):
        failed = command("replay", settings=settings.model_copy(update=changed))
        assert failed.status == 1 and words in failed.err
    assert log.groups() == []


def test_progress_is_shown_on_a_terminal(settings: Settings, log: Log, command: Start) -> None:
    log.write(*history(log.rooms(), 100, 3))
    with locked(other(settings)):
        shown = command("replay", "--into", other(settings), settings=settings, terminal=True)
        shown.says("0 events, 0/s")
    assert shown.status == 0
    assert "100 events applied to sqlite:///" in shown.out


def test_a_partition_that_there_is_not_and_one_that_is_empty(settings: Settings, log: Log) -> None:
    with pytest.raises(SettingsError, match="--partition 2"):
        Replay(settings, partitions=[2]).run()
    done = replay(settings, into=other(settings)).outcome
    assert (done.events, done.first, done.last, done.missing, done.share) == (0, None, None, 0, 1.0)
