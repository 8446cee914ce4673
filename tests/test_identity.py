"""Who is who: a bus and its store belong together, and a store that went back in time is noticed and made good."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
import redis

import mnemobus
from commands import Command
from mnemobus import IdentityMismatch, Memory, NotCommitted, Settings, errors, identity, store
from mnemobus.cli.doctor import examine
from mnemobus.errors import SchemaError
from mnemobus.keys import Keyspace, Version
from mnemobus.store import Identity, Query, migrations
from mnemobus.store.layout import OURS
from mnemobus_workers import standing
from outside import Log
from rows import named
from servers import PostgresServer, RedisServer, eventually

PoolOf = Callable[[Settings], AbstractContextManager[Settings]]
Start = Callable[..., Command]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"log_partitions": 1, "feed_partitions": 4, "claim_idle": 0.3})


@pytest.fixture
def both(settings: Settings, database_url: str) -> Settings:
    """The settings on each of the stores."""
    return settings.model_copy(update={"database_url": database_url})


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done every few seconds is done at once."""
    monkeypatch.setattr(identity, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(identity, "_LEARN_EVERY", 0.1)
    monkeypatch.setattr(standing, "REACH_EVERY", 0)


def opened(settings: Settings, **overrides: Any) -> mnemobus.Bus:
    return mnemobus.connect(**{**settings.model_dump(), **overrides})


def elsewhere(settings: Settings, folder: Path, name: str = "other.db") -> Settings:
    return settings.model_copy(update={"database_url": f"sqlite:///{folder}/{name}"})


def path_of(settings: Settings) -> Path:
    return Path(settings.database_url.removeprefix("sqlite:///"))


def hash_of(settings: Settings) -> dict[str, str]:
    """What Redis has of the bus and its store."""
    with redis.Redis.from_url(settings.redis_url, decode_responses=True) as client:
        return dict(client.hgetall(Keyspace(settings.redis_key_prefix, 1, 1).identity))


def identity_of(settings: Settings) -> Identity:
    """What the store says of itself."""
    writer = store.open_writer(settings)
    writer.open()
    try:
        return writer.identity()
    finally:
        writer.close()


def texts(settings: Settings) -> set[str]:
    """The memories that the database has, asked past everything of ours."""
    statement = named(settings.database_url, "SELECT content FROM memories WHERE live")
    if settings.database_url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(settings))) as connection:
            return {orjson.loads(content)["text"] for (content,) in connection.execute(statement)}
    with psycopg.connect(settings.database_url) as connection:
        return {content["text"] for (content,) in connection.execute(statement.encode())}


async def write(bus: mnemobus.Bus, *said: str, timeout: float = 10) -> list[mnemobus.Receipt]:
    receipts = await bus.write_many(
        [Memory(table="messages", room="r", content={"text": text}) for text in said]
    )
    await asyncio.gather(*(receipt.committed(timeout) for receipt in receipts))
    return receipts


def served(settings: Settings) -> bool:
    """Whether a worker has agreed, and the store knows."""
    return "stamped" in hash_of(settings)


# Others' stores, others' buses


async def test_an_agent_with_another_database_than_the_workers_is_refused(
    both: Settings, pool_of: PoolOf, tmp_path: Path, command: Start
) -> None:
    with pool_of(both):
        await eventually(lambda: served(both))
        # Given an agent for which somebody forgot to set the database
        forgotten = elsewhere(both, tmp_path)
        bus = opened(forgotten)
        # Then it does not open, and the error names both databases and says what to do
        with pytest.raises(IdentityMismatch) as caught:
            await bus.open()
        told = str(caught.value)
        assert hash_of(both)["where"] in told and f"SQLite {path_of(forgotten)}" in told
        assert "Set it to what the other agents and workers of this bus have" in told
        assert "mnemobus adopt" in told
        # And so does the doctor
        findings = {finding.check: finding for finding in await examine(forgotten)}
        assert findings["identity"].status == "fail" and findings["identity"].found == told
        assert {f.check: f.status for f in await examine(both)}["identity"] == "ok"
        # And so does a replay into the bus's own store
        replay = command("replay", settings=forgotten)
        assert replay.status == 2 and "has the store" in replay.err
        # And those with the right one go on
        async with opened(both) as bus:
            await write(bus, "hi")
            assert (await bus.health()).ok


async def test_a_second_pool_with_another_database_takes_no_batch(
    both: Settings, pool_of: PoolOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pool_of(both), pool_of(both):
        await eventually(lambda: served(both))
        # When a pool joins whose database is another
        with pool_of(elsewhere(both, tmp_path)):
            async with opened(both) as bus:
                # Then everything is committed where all the others have it
                said = [f"text {n}" for n in range(40)]
                for text in said:
                    await write(bus, text)
                assert texts(both) == set(said)
                await eventually(lambda: "taking no part" in caplog.text)
                # And once it knows, it takes none from them
                caplog.clear()
                for n in range(20):
                    await write(bus, f"more {n}")
                assert "from another worker" not in caplog.text
                assert (await bus.health()).ok
        assert texts(elsewhere(both, tmp_path)) == set()


async def test_an_agent_that_came_first_with_a_wrong_database_gives_way_to_the_workers(
    settings: Settings, pool_of: PoolOf, tmp_path: Path
) -> None:
    # Given an agent with a database that no worker has, before there is any worker
    async with opened(elsewhere(settings, tmp_path)) as bus:
        assert await bus.get(str(uuid.uuid4())) is None
        # When the workers come
        with pool_of(settings):
            # Then it is refused from then on, read and write alike, and says why
            async def refused() -> bool:
                try:
                    await bus.get(str(uuid.uuid4()))
                except IdentityMismatch:
                    return True
                return False

            await eventually(refused)
            with pytest.raises(IdentityMismatch, match="MNEMOBUS_DATABASE_URL leads to the store"):
                await bus.write(Memory(table="t", room="r", content={}))
            health = await bus.health()
            assert not health.ok and any("has the store" in problem for problem in health.problems)


async def test_a_second_bus_on_one_database_is_refused(both: Settings, pool_of: PoolOf) -> None:
    with pool_of(both):
        await eventually(lambda: served(both))
        # Given another bus, by its key prefix, with the same database
        other = both.model_copy(update={"redis_key_prefix": f"{both.redis_key_prefix}-two"})
        bus = opened(other)
        # Then it is refused, with both named, and leaves nothing in Redis
        with pytest.raises(
            IdentityMismatch, match=rf"belongs to the bus '{both.redis_key_prefix}' .* not to the bus"
        ):
            await bus.open()
        assert hash_of(other) == {}
        findings = {finding.check: finding for finding in await examine(other)}
        assert findings["identity"].status == "fail"
        # And so are its workers
        with pool_of(other):
            async with opened(both) as bus:
                await write(bus, "hi")
        assert hash_of(other) == {}
    # But a namespace of its own is a store of its own
    own = other.model_copy(update={"database_namespace": "two"})
    with pool_of(own):
        async with opened(own) as bus:
            await write(bus, "hello")
            assert [m.content["text"] for m in await bus.recent("messages", room="r")] == ["hello"]
    assert texts(both) == {"hi"}


async def test_two_redis_servers_with_one_prefix_on_one_database_are_both_told(
    both: Settings, own_redis: Callable[..., RedisServer], pool_of: PoolOf
) -> None:
    with pool_of(both):
        await eventually(lambda: served(both))
        # Given workers of another Redis with the same key prefix: nothing there says that they don't belong
        other = both.model_copy(update={"redis_url": own_redis().url})
        with pool_of(other):
            # Then the store changes hands again and again, and each side hears of it
            for one in (both, other):
                await eventually(lambda one=one: "rival" in hash_of(one))
                async with opened(one) as bus:
                    health = await bus.health()
                    assert any("used by workers of another Redis" in problem for problem in health.problems)
                findings = [f for f in await examine(one) if f.check == "identity"]
                assert findings[0].status == "fail" and "another Redis" in findings[0].found


# What one of them has lost


@pytest.mark.parametrize("empty", [False, True], ids=["flushed", "replaced"])
async def test_a_redis_that_lost_everything_is_the_same_bus_again(
    both: Settings, own_redis: Callable[..., RedisServer], pool_of: PoolOf, empty: bool
) -> None:
    server = own_redis()
    both = both.model_copy(update={"redis_url": server.url})
    with pool_of(both):
        async with opened(both) as bus:
            await write(bus, "before")
            await eventually(lambda: served(both))
            before = hash_of(both)
            # When Redis forgets all, or an empty one takes its place
            if empty:
                server.restart(empty=True)
            else:
                with redis.Redis.from_url(server.url) as client:
                    client.flushall()
            # Then the identity comes back from the store, by itself, and all goes on
            await eventually(lambda: served(both))
            after = hash_of(both)
            assert (after["bus"], after["store"]) == (before["bus"], before["store"])
            assert after["life"] != before["life"]
            await write(bus, "after")
            await eventually(lambda: identity_of(both).life == after["life"])

            async def well() -> bool:
                return (await bus.health()).ok

            await eventually(well)
    assert texts(both) == {"before", "after"}


async def test_an_agent_that_starts_while_the_store_is_away_learns_later_that_it_is_another(
    settings: Settings, own_postgres: PostgresServer, pool_of: PoolOf
) -> None:
    own_postgres.stop()
    with pool_of(settings):
        await eventually(lambda: served(settings))
        # Given an agent that opens while its database, which is not the workers', is away
        async with opened(settings, database_url=own_postgres.url) as bus:
            # When that comes
            own_postgres.start()

            # Then the agent is refused
            async def refused() -> bool:
                with suppress(errors.StoreUnavailable):
                    try:
                        await bus.get(str(uuid.uuid4()))
                    except IdentityMismatch:
                        return True
                return False

            await eventually(refused, 20)


async def test_an_agent_that_starts_while_redis_is_away_learns_later_that_it_is_another(
    settings: Settings, own_redis: Callable[..., RedisServer], pool_of: PoolOf, tmp_path: Path
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    with pool_of(settings):
        await eventually(lambda: served(settings))
    # Given an agent with another database that opens while Redis is away
    server.stop()
    async with opened(elsewhere(settings, tmp_path)) as bus:
        assert await bus.get(str(uuid.uuid4())) is None
        # When Redis is back
        server.start()

        # Then the agent is refused
        async def refused() -> bool:
            try:
                await bus.get(str(uuid.uuid4()))
            except IdentityMismatch:
                return True
            return False

        await eventually(refused)


async def test_g4_nobody_shares_what_comes_from_a_store_that_may_be_another(
    settings: Settings, own_redis: Callable[..., RedisServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    server.stop()
    monkeypatch.setattr(identity, "_LEARN_EVERY", 3600)
    # Given an agent that could not find out yet whether its store is the bus's, as Redis was away
    async with opened(settings, local_max_entries=0) as bus:
        server.start()

        # When it reads, with Redis back
        async def asked() -> bool:
            await bus.recent("messages", room="r")
            with redis.Redis.from_url(server.url) as client:
                return bool(list(client.scan_iter("*:b:*")))

        await eventually(asked)
        # Then it looks what others have shared, and shares nothing
        assert bus.stats().fills == bus.stats().hits_shared == 0
        # And once it knows, it does
        await bus._acquaintance._agree()

        async def shared() -> bool:
            await bus.recent("messages", room="r")
            return bus.stats().fills > 0

        await eventually(shared)


async def test_a_copy_of_the_store_is_not_used_by_a_second_pool_beside_it(
    both: Settings, pool_of: PoolOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pool_of(both):
        async with opened(both) as bus:
            await write(bus, "before")
        await eventually(lambda: served(both))
    copy = copied(both, tmp_path)
    assert identity_of(copy).store == identity_of(both).store
    with pool_of(both):
        first = hash_of(both).get("beats", 0)
        await eventually(lambda: hash_of(both).get("beats", 0) != first)
        # When a second pool is started on the copy
        with pool_of(copy):
            # Then it stands aside
            await eventually(lambda: "commit to another copy of the store" in caplog.text)
            async with opened(both) as bus:
                for n in range(10):
                    await write(bus, f"text {n}")
        assert texts(copy) == {"before"}
        # And an agent that reads the copy is told
        async with opened(copy) as bus:
            health = await bus.health()
            assert any("another copy of the store" in problem for problem in health.problems)
    # But once the first is gone, the copy may take its place; what it lacks comes from the log
    with pool_of(copy):
        async with opened(copy) as bus:
            await write(bus, "after")
        await eventually(lambda: len(texts(copy)) == 12)


def copied(settings: Settings, folder: Path) -> Settings:
    if settings.database_url.startswith("sqlite"):
        copy = elsewhere(settings, folder, "copy.db")
        with (
            closing(sqlite3.connect(path_of(settings))) as source,
            closing(sqlite3.connect(path_of(copy))) as target,
        ):
            source.backup(target)
        return copy
    server, _, name = settings.database_url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}_copy TEMPLATE {name}".encode())
    return settings.model_copy(update={"database_url": f"{settings.database_url}_copy"})


async def test_an_operator_moves_a_bus_to_another_database(
    both: Settings, pool_of: PoolOf, tmp_path: Path, command: Start
) -> None:
    with pool_of(both):
        async with opened(both) as bus:
            await write(bus, "one", "two")
        await eventually(lambda: served(both))
    # Given another database, built from the log, which does not take itself for the bus's
    new = elsewhere(both, tmp_path, "new.db")
    before = hash_of(both)
    assert command("replay", "--into", new.database_url, settings=both).status == 0
    assert hash_of(both) == before and identity_of(new).bus is None
    # When the operator says that it is to be it
    asked = command("adopt", settings=new)
    assert asked.status == 2 and "give --yes" in asked.err
    done = command("adopt", "--yes", settings=new)
    assert done.status == 0 and "is the store of the bus" in done.out, done.err
    # Then it is, for everyone
    with pool_of(new):
        async with opened(new) as bus:
            await write(bus, "three")

            async def well() -> bool:
                return (await bus.health()).ok

            await eventually(well)
    assert texts(new) == {"one", "two", "three"}
    assert hash_of(new)["bus"] == before["bus"] == identity_of(new).bus
    with pytest.raises(IdentityMismatch):
        await opened(both).open()


async def test_an_operator_gives_a_store_to_a_bus_with_another_prefix(
    both: Settings, pool_of: PoolOf, command: Start
) -> None:
    with pool_of(both):
        async with opened(both) as bus:
            await write(bus, "one")
        await eventually(lambda: served(both))
    # When partition counts change, and the prefix with them, and the operator says that it is the same store
    other = both.model_copy(update={"redis_key_prefix": f"{both.redis_key_prefix}-2", "log_partitions": 2})
    assert command("adopt", "--yes", settings=other).status == 0
    # Then the new bus has it, and the old one no more
    with pool_of(other):
        async with opened(other) as bus:
            await write(bus, "two")
            assert len(await bus.recent("messages", room="r")) == 2
    with pytest.raises(IdentityMismatch, match="belongs to the bus"):
        await opened(both).open()


# A file that is replaced


async def test_g1_a_file_that_is_replaced_under_the_workers_swallows_nothing(
    settings: Settings, pool_of: PoolOf, caplog: pytest.LogCaptureFixture
) -> None:
    path = path_of(settings)
    with pool_of(settings):
        async with opened(settings, local_max_entries=0) as bus:
            await write(bus, *(f"before {n}" for n in range(20)))
            await eventually(lambda: identity_of(settings).reached is not None)
            backup = copied(settings, path.parent)
            await write(bus, "since")
            # When a backup is put in the place of the file, and writes come at once
            os.replace(path_of(backup), path)
            await write(bus, *(f"after {n}" for n in range(20)))
            # Then all of it is in the file that is there now, and what the backup did not have comes back
            wanted = {f"{when} {n}" for when in ("before", "after") for n in range(20)} | {"since"}
            await eventually(lambda: texts(settings) == wanted)
            assert "was replaced; opening it again" in caplog.text
            # And agents read it, too

            async def seen() -> bool:
                return await bus.count("messages", room="r") == len(wanted)

            await eventually(seen)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_g1_a_file_that_is_removed_under_the_workers_is_not_made_anew(
    settings: Settings, pool_of: PoolOf, caplog: pytest.LogCaptureFixture
) -> None:
    path = path_of(settings)
    with pool_of(settings):
        async with opened(settings) as bus:
            await write(bus, "before")
            await eventually(lambda: served(settings))
            # When the file is removed
            hidden = path.with_suffix(".hidden")
            path.rename(hidden)
            # Then nothing is confirmed that went nowhere, no empty one takes its place, and both sides say so
            with pytest.raises(NotCommitted):
                await write(bus, "meanwhile", timeout=0.5)
            await eventually(lambda: "was removed. Put it back" in caplog.text)
            assert not (await bus.health()).ok
            assert not path.exists()
            # And once it is back, all goes on
            hidden.rename(path)
            await eventually(lambda: texts(settings) == {"before", "meanwhile"})
            await write(bus, "after")
    assert texts(settings) == {"before", "meanwhile", "after"}


# Back in time


class Backup:
    """A copy of what a store has, to be put back in place: the database stays the one that it is."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tables = [*OURS, "identity"]
        if settings.database_url.startswith("sqlite"):
            self._copy = sqlite3.connect(":memory:", check_same_thread=False)
            with closing(sqlite3.connect(path_of(settings))) as source:
                source.backup(self._copy)
            return
        with psycopg.connect(settings.database_url) as connection:
            for table in self._tables:
                connection.execute(f"CREATE TABLE backup_{table} AS TABLE mnemobus.{table}".encode())

    def restore(self) -> None:
        if self._settings.database_url.startswith("sqlite"):
            with closing(sqlite3.connect(path_of(self._settings), timeout=10)) as target:
                self._copy.backup(target)
            return
        with psycopg.connect(self._settings.database_url) as connection:
            for table in self._tables:
                columns = ", ".join(sorted(OURS.get(table, set()) - {"live", "pending"})) or "*"
                connection.execute(f"DELETE FROM mnemobus.{table}".encode())
                names = "" if columns == "*" else f"({columns})"
                connection.execute(
                    f"INSERT INTO mnemobus.{table} {names} SELECT {columns} FROM backup_{table}".encode()
                )


async def test_a_store_that_went_back_in_time_gets_from_the_log_what_it_lost(
    both: Settings, pool_of: PoolOf, caplog: pytest.LogCaptureFixture
) -> None:
    with pool_of(both):
        async with opened(both) as bus:
            [first] = await write(bus, "before")
            await eventually(lambda: identity_of(both).reached is not None)
            backup = Backup(both)
            await write(bus, "since 1", "since 2")
            await (await bus.update(first.id, content={"text": "changed"})).committed()
            assert (await bus.get(first.id)).content["text"] == "changed"  # type: ignore[union-attr]
            epochs = bus.stats().epochs
            # When a backup is restored in place, only moments after it was made
            await asyncio.to_thread(backup.restore)
            # Then workers notice, and apply again what it lost, and no copy of what was there before is served
            await eventually(lambda: texts(both) == {"changed", "since 1", "since 2"})
            await eventually(lambda: "resynced" in hash_of(both))
            assert "the store went back in time" in caplog.text and "the log is applied again" in caplog.text
            await eventually(lambda: bus.stats().epochs > epochs)
            # And the bus is well again
            assert "resync" not in hash_of(both)

            async def well() -> bool:
                return (await bus.health()).ok

            await eventually(well)
            await write(bus, "after")
    assert texts(both) == {"changed", "since 1", "since 2", "after"}


async def test_a_store_that_is_restored_while_nobody_works_is_noticed_at_the_start(
    both: Settings, pool_of: PoolOf
) -> None:
    with pool_of(both):
        async with opened(both) as bus:
            await write(bus, "before")
            await eventually(lambda: identity_of(both).reached is not None)
            backup = Backup(both)
            await write(bus, "since")
    backup.restore()
    assert texts(both) == {"before"}
    with pool_of(both):
        await eventually(lambda: texts(both) == {"before", "since"})


async def test_what_the_log_no_longer_has_is_said_until_it_is_accepted(
    both: Settings, pool_of: PoolOf, command: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with pool_of(both):
        async with opened(both) as bus:
            await write(bus, "before")
            await eventually(lambda: identity_of(both).reached is not None)
            backup = Backup(both)
            await write(bus, "lost")
            await asyncio.sleep(1.1)  # beyond the margin
            await write(bus, "kept")
            # Given a log that no longer reaches back to the backup
            with redis.Redis.from_url(both.redis_url) as client:
                key = Keyspace(both.redis_key_prefix, 1, 4).log(0)
                while client.xlen(key) > 1:
                    client.xdel(key, client.xrange(key, count=1)[0][0])
            # When that is restored
            await asyncio.to_thread(backup.restore)
            # Then what there is comes back, and the rest is named
            await eventually(lambda: "resynced" in hash_of(both))
            assert texts(both) == {"before", "kept"}
            await eventually(lambda: "may be lost" in caplog.text)
            health = await bus.health()
            assert not health.ok
            assert any("up to" in p and "writes from then on may be lost" in p for p in health.problems)
            findings = [f for f in await examine(both) if f.check == "identity"]
            assert findings[0].status == "fail"
        # And an operator who has seen it says so
        assert command("adopt", "--yes", settings=both).status == 0
        async with opened(both) as bus:
            await eventually(lambda: served(both))
            assert not any("lost" in problem for problem in (await bus.health()).problems)


async def test_another_worker_goes_on_with_what_a_dead_one_left_half_done(
    both: Settings, pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool_of(both):
        async with opened(both) as bus:
            await write(bus, "before")
            await eventually(lambda: identity_of(both).reached is not None)
            backup = Backup(both)
            await write(bus, "since")
    backup.restore()
    # Given a worker that died while it applied the log again, and keeps others from it for a while; and a clock that
    # was set back since
    keys = Keyspace(both.redis_key_prefix, 1, 4)
    with redis.Redis.from_url(both.redis_url) as client:
        client.hset(keys.identity, "resync", orjson.dumps({"why": "x", "since": ""}))
        client.set(keys.resync, "dead", px=3_600_000)
        # When another starts
        with pool_of(both):
            # Then it does the work
            await eventually(lambda: texts(both) == {"before", "since"})
            await eventually(lambda: not client.exists(keys.resync))
            assert "resync" not in hash_of(both)


async def test_nothing_is_applied_again_where_nothing_was_lost(both: Settings, pool_of: PoolOf) -> None:
    with pool_of(both), pool_of(both):
        async with opened(both) as bus:
            receipts = await write(bus, *(f"text {n}" for n in range(50)))
            for receipt in receipts:
                await bus.delete(receipt.id)
            await (await bus.delete_room("messages", room="r")).committed()
            await write(bus, "left")
            beats = int(hash_of(both).get("beats", 0))
            await eventually(lambda: int(hash_of(both).get("beats", 0)) > beats + 4)
    assert "resync" not in hash_of(both) and "resynced" not in hash_of(both)


async def test_a_failover_to_a_standby_that_was_behind_is_made_good(
    settings: Settings, own_postgres: PostgresServer, pool_of: PoolOf, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings.model_copy(update={"database_url": own_postgres.url})
    with pool_of(settings):
        async with opened(settings) as bus:
            await write(bus, "before")
            await eventually(lambda: identity_of(settings).reached is not None)
            # Given a standby, and writes that did not get there any more
            own_postgres.stop()
            data = own_postgres._folder / "data"
            standby = own_postgres._folder / "standby"
            shutil.copytree(data, standby)
            own_postgres.start()
            await write(bus, "since", timeout=20)
            assert texts(settings) == {"before", "since"}
            # When the primary is lost, and that standby takes its place
            own_postgres.stop(signal.SIGQUIT)
            for each in (standby, *standby.rglob("*")):
                os.chown(each, data.stat().st_uid, data.stat().st_gid)
            shutil.rmtree(data)
            standby.rename(data)
            (data / "standby.signal").touch()
            own_postgres.start()
            with psycopg.connect(own_postgres.url, autocommit=True) as connection:
                connection.execute("SELECT pg_promote()")
            # Then what it lacks is applied again
            await eventually(lambda: texts(settings) == {"before", "since"}, 30)
            assert "the store went back in time" in caplog.text
            await write(bus, "after", timeout=20)
            assert hash_of(settings)["history"] == "00000002"


# Whose tables


def old_schema(url: str) -> None:
    """A database as the version before made it, with a memory in each state."""
    kind: Any = "sqlite" if url.startswith("sqlite") else "postgres"
    [first] = [migration for migration in migrations.load(kind) if migration.number == 1]
    id, gone, version = uuid.UUID(int=7), uuid.UUID(int=8), Version(1_700_000_000_000, 1).pack()
    later = Version(1_700_000_000_000, 2).pack()
    insert = (
        "INSERT INTO memories (id, created_us, tbl, room, content, metadata, put_version, content_version,"
        " metadata_version, embedding_version, deleted_version) VALUES (?, 5, 'messages', 'r', ?, '{}', ?, ?, ?, ?, ?)"
    )
    rest = [
        "INSERT INTO migrations (number) VALUES (1)",
        "INSERT INTO tables (tbl, embedding_length) VALUES ('messages', 3)",
    ]
    rows = [(id, '{"text":"old"}', version, b"", b"", b"", b""), (gone, None, version, b"", b"", b"", later)]
    if kind == "sqlite":
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(first.sql)
            connection.executemany(insert, [(row[0].bytes, *row[1:]) for row in rows])
            for statement in rest:
                connection.execute(statement)
            connection.commit()
        return
    with psycopg.connect(url) as connection:
        connection.execute(first.sql.encode())
        for row in rows:
            connection.execute(insert.replace("?", "%s").encode(), row)
        for statement in rest:
            connection.execute(statement.encode())


async def test_a_database_and_a_redis_of_the_version_before_come_up_with_their_data(
    both: Settings, pool_of: PoolOf, tmp_path: Path
) -> None:
    # Given a database of schema 1, and a Redis with a layout and a log with a write that nobody has applied yet, and
    # without anything about identity
    old_schema(both.database_url)
    log = Log(both)
    async with opened(elsewhere(both, tmp_path)) as bus:
        await bus.write(Memory(table="messages", room="r", content={"text": "logged"}))
    with redis.Redis.from_url(both.redis_url) as client:
        client.delete(Keyspace(both.redis_key_prefix, 1, 4).identity)
    # Then an agent of this version waits for the workers
    with pytest.raises(
        SchemaError, match=r"has schema 1, and this version of mnemobus needs 2: start a worker"
    ):
        await opened(both).open()
    # When workers of this version start
    with pool_of(both):
        await eventually(log.done)
        await eventually(lambda: served(both))
    # Then all is there, in our own place
    assert texts(both) == {"old", "logged"}
    assert identity_of(both).bus == hash_of(both)["bus"]
    async with opened(both) as bus:
        found = await bus.get(str(uuid.UUID(int=7)))
        assert (
            found is not None
            and found.content == {"text": "old"}
            and found.version == Version(1_700_000_000_000, 1)
        )
        assert await bus.get(str(uuid.UUID(int=8))) is None
        with pytest.raises(errors.InvalidMemory, match="3"):
            await bus.write(Memory(table="messages", room="r", content={}, embedding=[1.0, 2.0]))
    # And agents of the version before read on, by what they ask
    for question, answer in (
        ("SELECT max(number) FROM migrations", 2),
        ("SELECT count(*) FROM memories WHERE tbl = 'messages' AND room = 'r' AND live", 2),
        ("SELECT embedding_length FROM tables WHERE tbl = 'messages'", 3),
        ("SELECT count(*) FROM room_tombstones", 0),
    ):
        assert old_answer(both.database_url, question) == answer


def old_answer(url: str, question: str) -> Any:
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            return connection.execute(question).fetchone()[0]
    with psycopg.connect(url) as connection:
        row = connection.execute(question.encode()).fetchone()
        assert row is not None
        return row[0]


def test_workers_of_the_version_before_go_on_on_postgresql(postgres_url: str) -> None:
    old_schema(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader_of_old")
        try:
            connection.execute(
                "GRANT SELECT ON memories, tables, room_tombstones, migrations TO reader_of_old"
            )
            writer = store.open_writer(Settings.load(database_url=postgres_url))
            writer.open()
            # What they send is merged as ever, by the same rules
            from mnemobus.store.layout import Names
            from mnemobus.store.postgres.statements import PostgresStatements

            upsert = PostgresStatements(Names("")).upsert
            connection.execute("SET search_path TO public")
            values = [
                [uuid.UUID(int=7)],
                ["messages"],
                ["r"],
                [None],
                [None],
                [None],
                [5],
                ['{"text":"new"}'],
                ["{}"],
            ]
            versions = [[None], [Version(1_700_000_000_001, 0).pack()], [b""], [b""], [b""], [b""]]
            types = ["uuid", *["text"] * 5, "bigint", "json", "json", *["bytea"] * 6]
            arrays = b"unnest(" + b", ".join(b"%s::" + f"{t}[]".encode() for t in types) + b")"
            cast = upsert.replace(b"unnest(" + b", ".join([b"%s"] * 15) + b")", arrays)
            assert connection.execute(cast, values + versions).fetchall() == [(str(uuid.UUID(int=7)),)]
            version = Version(1_700_000_000_000, 1).pack()
            values_kept = ", ".join(
                f"{field} = CASE WHEN greatest(put_version, {field}_version) > %s THEN {field} END"
                for field in ("content", "metadata", "embedding")
            )
            for which in ("live", "pending"):
                connection.execute(
                    f"UPDATE memories SET deleted_version = %s, {values_kept}"
                    f" WHERE tbl = %s AND room = %s AND {which} AND deleted_version < %s".encode(),
                    [version] * 4 + ["messages", "r", version],
                )
            # And a role that could read can, under the old names and the new ones
            connection.execute("SET ROLE reader_of_old")
            for table in ("memories", "mnemobus.memories", "mnemobus.identity"):
                assert connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
            writer.close()
        finally:
            connection.execute("RESET ROLE")
            connection.execute("DROP OWNED BY reader_of_old")
            connection.execute("DROP ROLE reader_of_old")


FOREIGN = {
    "migrations": "CREATE TABLE migrations (id integer PRIMARY KEY, migration text, batch integer)",
    "memories": "CREATE TABLE memories (id integer PRIMARY KEY, content text)",
    "tables": "CREATE TABLE tables (id integer PRIMARY KEY)",
}


def ask(url: str, *statements: str) -> list[Any]:
    """Ask the database itself."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            rows = [connection.execute(statement).fetchall() for statement in statements]
            connection.commit()
            return rows[-1]
    with psycopg.connect(url, autocommit=True) as connection:
        cursors = [connection.execute(statement.encode()) for statement in statements]
        return cursors[-1].fetchall() if cursors[-1].description else []


async def test_tables_of_others_are_left_alone(both: Settings, pool_of: PoolOf) -> None:
    # Given a database of another program, with tables of the names that ours had
    url = both.database_url
    ask(
        url,
        *FOREIGN.values(),
        "INSERT INTO memories VALUES (1, 'theirs')",
        "INSERT INTO migrations VALUES (9, 'x', 1)",
    )
    with pool_of(both):
        async with opened(both) as bus:
            # Then mnemobus works beside it
            await write(bus, "hi")
            assert len(await bus.recent("messages", room="r")) == 1
            assert (await bus.health()).ok
    # And nothing of theirs was touched
    assert ask(url, "SELECT * FROM memories") == [(1, "theirs")]
    assert ask(url, "SELECT * FROM migrations") == [(9, "x", 1)]
    assert ask(url, "SELECT * FROM tables") == []


async def test_tables_in_our_place_that_are_not_ours_are_a_schema_error(both: Settings) -> None:
    for statement in (
        *(["CREATE SCHEMA mnemobus"] if both.database_url.startswith("postgres") else []),
        named(both.database_url, FOREIGN["memories"]),
    ):
        ask(both.database_url, statement)
    with pytest.raises(SchemaError, match="tables that are not mnemobus's") as caught:
        await opened(both).open()
    assert "table memories has no column agent" in str(caught.value)
    assert "MNEMOBUS_DATABASE_NAMESPACE" in str(caught.value)
    with pytest.raises(SchemaError):
        store.open_writer(both).open()
    # Another name is the way out
    own = both.model_copy(update={"database_namespace": "ours"})
    async with opened(own) as bus:
        assert await bus.count("messages", room="r") == 0


async def test_old_tables_that_somebody_changed_are_a_schema_error_and_not_moved(both: Settings) -> None:
    old_schema(both.database_url)
    ask(both.database_url, "DROP TABLE tables")
    for open_it in (lambda: opened(both).open(), lambda: asyncio.to_thread(store.open_writer(both).open)):
        with pytest.raises(SchemaError, match=r"of an earlier version of mnemobus.*table tables is missing"):
            await open_it()
    assert ask(both.database_url, "SELECT count(*) FROM memories") == [(2,)]


async def test_the_search_path_of_a_role_does_not_matter(postgres_url: str) -> None:
    ask(postgres_url, "CREATE SCHEMA elsewhere")
    paths = [f"{postgres_url}?options=-csearch_path%3D{path}" for path in ("elsewhere", "public")]
    writer = store.open_writer(Settings.load(database_url=paths[0]))
    writer.open()
    identity = writer.identity()
    reader = store.open_reader(Settings.load(database_url=paths[1]))
    await reader.open()
    assert (await reader.identity()).store == identity.store
    assert await reader.recent(Query("messages", room="r"), 5) == []
    await reader.close()
    writer.close()


@pytest.fixture
async def weak(postgres_url: str) -> AsyncIterator[str]:
    """The URL of a role without any right in the database."""
    role = f"weak_{uuid.uuid4().hex[:8]}"
    name = postgres_url.rpartition("/")[2]
    ask(
        postgres_url,
        f"CREATE ROLE {role} LOGIN PASSWORD 'weak'",
        f"REVOKE CREATE ON DATABASE {name} FROM PUBLIC",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    )
    _, _, host = postgres_url.rpartition("@")
    yield f"postgresql://{role}:weak@{host}"
    ask(
        postgres_url,
        f"REASSIGN OWNED BY {role} TO CURRENT_USER",
        f"DROP OWNED BY {role}",
        f"DROP ROLE {role}",
    )


async def test_a_role_that_may_not_make_a_schema_is_told_what_to_run(postgres_url: str, weak: str) -> None:
    writer = store.open_writer(Settings.load(database_url=weak))
    with pytest.raises(SchemaError) as caught:
        writer.open()
    told = str(caught.value)
    assert "may not make mnemobus's tables: permission denied" in told
    # When one does as it is told
    statements = told.partition("in this database: ")[2].partition(";")
    second = statements[2].partition("; and if")[0]
    ask(postgres_url, statements[0], second)
    # Then it goes on
    writer.open()
    assert writer.identity().store
    # And an agent of another role is told what that lacks
    reader = store.open_reader(Settings.load(database_url=weak))
    await reader.open()
    ask(postgres_url, "ALTER SCHEMA mnemobus OWNER TO CURRENT_USER")
    other = store.open_reader(Settings.load(database_url=weak))
    with pytest.raises(SchemaError, match="GRANT USAGE ON SCHEMA mnemobus"):
        await other.open()
    await other.close()
    await reader.close()
    writer.close()


async def test_mnemobus_database_namespace_is_where_the_tables_are(both: Settings) -> None:
    writer = store.open_writer(both.model_copy(update={"database_namespace": "my_bus"}))
    writer.open()
    writer.close()
    table = "my_bus_memories" if both.database_url.startswith("sqlite") else "my_bus.memories"
    assert ask(both.database_url, f"SELECT count(*) FROM {table}") == [(0,)]


@pytest.mark.parametrize("name", ["Mine", "pg_mine", "sqlite_x", "a b", "9a", 'a"b', "a" * 41])
def test_a_namespace_that_no_database_takes_is_refused(name: str) -> None:
    with pytest.raises(errors.SettingsError, match="MNEMOBUS_DATABASE_NAMESPACE"):
        Settings.load(database_namespace=name)


def test_what_a_rare_reply_of_redis_makes(settings: Settings) -> None:
    # Witnesses that came before anybody agreed on anything are no identity
    found = identity.Registered.of([b"w3", b"00000000-0000-0000-0000-000000000007 5-6"])
    assert found.store == "" and found.witnesses == {3: (str(uuid.UUID(int=7)), Version(5, 6))}
