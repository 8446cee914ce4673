"""What `bus.health()` and `mnemobus doctor` report in each failure: one table, each failure on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

import mnemobus
from commands import Command
from conftest import quick
from mnemobus import Memory, Settings
from mnemobus.cli.doctor import examine, exit_status
from mnemobus.cli.finding import Finding
from mnemobus.connection.link import ThreadedLink
from mnemobus.health.vitals import Report, Worker, decode_report, read
from mnemobus.keys import Keyspace
from mnemobus.stats import Health
from mnemobus.store import open_writer
from mnemobus_workers.apply import Applier
from mnemobus_workers.report import _KEPT, Reporter, State
from servers import PostgresServer, RedisServer, Workers, eventually, free_port, wait_until, worker_threads

Start = Callable[..., Command]


def said(text: str = "x") -> Memory:
    return Memory(table="messages", room="r", content={"text": text})


@dataclass
class World:
    """A bus of a test's own, with all that belongs to it."""

    redis: RedisServer
    settings: Settings
    folder: Path
    request: pytest.FixtureRequest
    stack: contextlib.ExitStack
    bus: mnemobus.Bus | None = None
    workers: Any = None
    closing: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.redis.port)

    @property
    def keys(self) -> Keyspace:
        return Keyspace(
            self.settings.redis_key_prefix, self.settings.log_partitions, self.settings.feed_partitions
        )

    @property
    def database(self) -> Path:
        return Path(self.settings.database_url.removeprefix("sqlite:///"))

    def change(self, **settings: Any) -> None:
        self.settings = self.settings.model_copy(update=settings)

    async def write(self, times: int = 1) -> None:
        assert self.bus is not None
        for _ in range(times):
            await self.bus.write(said())

    def sql(self, statement: str, url: str | None = None) -> None:
        with psycopg.connect(url or self.settings.database_url, autocommit=True) as connection:
            connection.execute(statement.encode())


Provoke = Callable[[World], Any]


@dataclass(frozen=True)
class Condition:
    """What is wrong, and what is to be said of it.

    health   words of one problem; "" if the bus is well; None if no bus opens in this condition
    doctor   check, status, words of what was found, words of the advice
    status   the exit status of the doctor
    store, workers   what there is of these: "sqlite", "postgres", "own_postgres"; "threads", "processes", ""
    early    whether it is there before a bus opens
    """

    name: str
    provoke: Provoke
    health: str | None
    doctor: tuple[str, str, str, str]
    status: int = 1
    store: str = "sqlite"
    workers: str = "threads"
    early: bool = False
    options: tuple[str, ...] = ()


def nothing(w: World) -> None:
    pass


# Redis


def kill_redis(w: World) -> None:
    w.redis.kill()


def pause_redis(w: World) -> None:
    w.redis.pause()
    w.stack.callback(w.redis.resume)


def demote(w: World) -> None:
    other = w.request.getfixturevalue("own_redis")()
    w.client.replicaof("127.0.0.1", other.port)
    wait_until(lambda: w.client.info("replication")["master_link_status"] == "up")


def demote_without_link(w: World) -> None:
    w.client.config_set("replica-serve-stale-data", "no")
    w.client.replicaof("127.0.0.1", free_port())


def fill(w: World) -> None:
    w.client.config_set("maxmemory", 1)


def want_replicas(w: World) -> None:
    w.client.config_set("min-replicas-to-write", 1)


def lose_the_disk(w: World) -> None:
    shutil.rmtree(w.redis.folder)
    w.client.config_set("save", "900 1")
    w.client.bgsave()
    wait_until(lambda: w.client.info("persistence")["rdb_last_bgsave_status"] == "err")


def load(w: World) -> None:
    with w.client.pipeline(transaction=False) as pipe:
        for n in range(4000):
            pipe.set(f"other-{n}", "x" * 100)
        pipe.execute()
    w.client.save()
    w.redis.stop()
    w.redis.options += ("--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")
    w.redis.start(wait=False)
    w.closing.append(w.redis.kill)
    wait_until(lambda: _is_loading(w))


def _is_loading(w: World) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(w.client.info("persistence")["loading"])
    return False


def take_rights(*rules: str) -> Provoke:
    def provoke(w: World) -> None:
        w.client.execute_command("ACL", "SETUSER", "default", *rules)

    return provoke


def redis_url(form: str) -> Provoke:
    def provoke(w: World) -> None:
        w.change(redis_url=form.format(port=w.redis.port, free=free_port()))

    return provoke


def ask_for_a_password(w: World) -> None:
    w.client.config_set("requirepass", "secret")


def give_another_password(w: World) -> None:
    ask_for_a_password(w)
    w.change(redis_password="guess")


def evict(w: World) -> None:
    w.client.config_set("maxmemory-policy", "allkeys-lru")


def other_layout(w: World) -> None:
    w.client.hset(w.keys.layout, mapping={"log_partitions": 4, "feed_partitions": 32})


def listen_as_something_else(w: World) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()

    async def serve() -> None:
        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        w.closing.append(server.close)
        w.change(redis_url=f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    return serve()  # type: ignore[return-value]


# The store


def drop_the_schema(w: World) -> None:
    with contextlib.closing(sqlite3.connect(w.database)) as database:
        database.execute("DROP TABLE mnemobus_memories")
        database.commit()


def put_foreign_tables_there(w: World) -> None:
    with contextlib.closing(sqlite3.connect(w.database)) as database:
        database.execute("CREATE TABLE mnemobus_memories (a)")
        database.commit()


async def lock_the_database(w: World) -> None:
    database = sqlite3.connect(w.database, isolation_level=None)
    w.stack.callback(database.close)
    database.execute("BEGIN IMMEDIATE")
    await w.write()


def stop_postgres(w: World) -> None:
    server: PostgresServer = w.request.getfixturevalue("own_postgres")
    server.stop()


async def make_postgres_read_only(w: World) -> None:
    name = w.settings.database_url.rpartition("/")[2]
    server = w.request.getfixturevalue("session_postgres")
    w.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on", server)
    w.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'", server)
    await w.write()


def be_a_postgres_user_without_connections(w: World) -> None:
    name = f"few_{w.settings.database_url.rpartition('_')[2]}"
    server = w.request.getfixturevalue("session_postgres")
    w.sql(f"CREATE ROLE {name} LOGIN CONNECTION LIMIT 0", server)
    w.stack.callback(w.sql, f"DROP ROLE {name}", server)
    w.change(database_url=w.settings.database_url.replace("postgres@", f"{name}@"))


def be_another_postgres_user(w: World) -> None:
    writer = open_writer(w.settings)
    writer.open()
    writer.close()
    name = f"user_{w.settings.database_url.rpartition('_')[2]}"
    server = w.request.getfixturevalue("session_postgres")
    w.sql(f"CREATE ROLE {name} LOGIN", server)
    w.stack.callback(w.sql, f"DROP ROLE {name}", server)
    w.change(database_url=w.settings.database_url.replace("postgres@", f"{name}@"))


def database_url(change: Callable[[str], str]) -> Provoke:
    def provoke(w: World) -> None:
        w.change(database_url=change(w.settings.database_url))

    return provoke


# Workers


def stop_workers(w: World) -> None:
    w.workers.stop()


def kill_workers(w: World) -> None:
    w.workers.kill()


def pause_workers(w: World) -> None:
    os.killpg(w.workers.master, signal.SIGSTOP)
    w.stack.callback(os.killpg, w.workers.master, signal.SIGCONT)


def silence_workers(w: World) -> None:
    """As workers are that know nothing of reports."""
    patch = w.request.getfixturevalue("monkeypatch")
    patch.setattr(Reporter, "tell", lambda self: None)
    wait_until(
        lambda: w.client.delete(w.keys.workers) or time.sleep(0.3) or not w.client.exists(w.keys.workers)
    )


async def forbid_workers_to_publish(w: World) -> None:
    w.client.execute_command("ACL", "SETUSER", "worker", "on", ">pw", "~*", "&*", "+@all", "-publish")
    url = f"redis://worker:pw@127.0.0.1:{w.redis.port}"
    w.stack.enter_context(worker_threads(w.settings.model_copy(update={"redis_url": url})))
    await w.write()


async def fill_the_log(w: World) -> None:
    await w.write(3)
    w.change(max_backlog=3)
    assert w.bus is not None
    w.bus._link.settings = w.settings
    w.bus._checkup._settings = w.settings


def bury(w: World) -> None:
    w.client.xadd(w.keys.dead(0), {"version": "1-1", "reason": "why not"})


# The outbox


def be_no_directory(w: World) -> None:
    (w.folder / "file").write_text("")
    w.change(data_dir=w.folder / "file")


async def leave_an_outbox(w: World) -> None:
    away = w.settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}"})
    async with mnemobus.Bus(away) as bus:
        await bus.write(said())
        await bus.write(said())


CONDITIONS = [
    Condition("all-well", nothing, "", ("workers", "ok", "1 at work", ""), 0),
    Condition("all-well-processes", nothing, "", ("workers", "ok", "1 at work", ""), 0, workers="processes"),
    # Redis
    Condition("redis-killed", kill_redis, "does not answer", ("redis", "fail", "does not answer", "start it")),
    Condition("redis-paused", pause_redis, "no answer within", ("redis", "fail", "does not answer", "paused?")),
    Condition("replica", demote, "is a replica", ("writes", "fail", "is a replica of 127.0.0.1:", "REDIS_URL")),
    Condition("replica-without-primary", demote_without_link, "replica", ("writes", "fail", "replica", "REDIS_URL")),
    Condition("full", fill, "it is full", ("writes", "fail", "it is full", "raise maxmemory")),
    Condition(
        "too-few-replicas", want_replicas, "only 0 replicas",
        ("writes", "fail", "only 0 replicas", "bring its replicas")
    ),
    Condition(
        "disk-lost", lose_the_disk, "could not write its snapshot", ("writes", "fail", "MISCONF", "check its disk"),
        options=("--appendonly", "no"),
    ),
    Condition("loading", load, "loading its data", ("writes", "fail", "loading its data", "wait until"),
              options=("--appendonly", "no")),
    Condition("may-not-add", take_rights("-xadd"), "may not do what an agent does: XADD",
              ("rights", "fail", "XADD", "ACL SETUSER")),
    Condition("may-not-use-keys", take_rights("resetkeys", "~other"), "NOPERM",
              ("rights", "fail", "may not", "ACL SETUSER")),
    Condition("blind", take_rights("resetchannels"), "SUBSCRIBE", ("rights", "fail", "SUBSCRIBE", "channels")),
    Condition("may-not-subscribe", take_rights("-subscribe"), "SUBSCRIBE",
              ("rights", "fail", "SUBSCRIBE", "ACL SETUSER")),
    Condition("worker-only", take_rights("-subscribe", "-unsubscribe"), None,
              ("rights", "ok", "may do what workers do", ""), 1),
    Condition("agent-only", take_rights("-xack", "-xreadgroup"), None,
              ("rights", "ok", "not what a worker does: XACK, XREADGROUP", ""), 1),
    Condition("hides-who-listens", take_rights("-pubsub"), "", ("rights", "ok", "may do", ""), 0),
    Condition("hides-clients", take_rights("-@admin"), "", ("workers", "ok", "1 at work", ""), 0),
    Condition("password-needed", ask_for_a_password, None,
              ("redis", "fail", "authenticate", "set REDIS_PASSWORD")),
    Condition("password-wrong", give_another_password, None, ("redis", "fail", "invalid username-password", "correct")),
    Condition("no-such-number", redis_url("redis://127.0.0.1:{port}/99"), None,
              ("redis", "fail", "out of range", "use a lower number")),
    Condition("no-tls-there", redis_url("rediss://127.0.0.1:{port}"), None,
              ("redis", "fail", "does not answer", "not rediss://")),
    Condition("no-such-host", redis_url("redis://nowhere.invalid:{port}"), None,
              ("redis", "fail", "nowhere.invalid", "correct REDIS_URL")),
    Condition("no-socket", redis_url("unix:///nowhere/redis.sock"), None, ("redis", "fail", "nowhere", "start it")),
    Condition("no-redis", listen_as_something_else, None,
              ("redis", "fail", "127.0.0.1", "something else listens there")),
    Condition("cluster", nothing, None,
              ("cluster", "fail", "part of a Redis Cluster", "use a server that stands alone"),
              options=("--cluster-enabled", "yes", "--cluster-port", str(free_port()))),
    Condition("evicts", evict, None, ("policy", "fail", "may evict the log", "CONFIG SET maxmemory-policy")),
    Condition("other-layout", other_layout, None,
              ("layout", "fail", "MNEMOBUS_FEED_PARTITIONS is 64 here but 32 there", "set it to what is there")),
    # The store
    Condition("schema-dropped", drop_the_schema, "no such table", ("store", "fail", "table memories is missing", "")),
    Condition("foreign-tables", put_foreign_tables_there, None,
              ("store", "fail", "has tables that are not mnemobus's", ""), early=True, workers=""),
    Condition("database-locked", lock_the_database, "database is locked",
              ("workers", "fail", "the worker waits for the store", "another program holds the file")),
    Condition("postgres-stopped", stop_postgres, "Connection refused",
              ("store", "fail", "refused", "start the database"), store="own_postgres"),
    Condition("postgres-read-only-by-default", make_postgres_read_only, "", ("workers", "ok", "1 at work", ""), 0,
              store="postgres"),
    Condition("postgres-permission", be_another_postgres_user, None,
              ("store", "fail", "permission denied", "grant"), store="postgres", early=True, workers=""),
    Condition("postgres-no-connections-for-the-role", be_a_postgres_user_without_connections, None,
              ("store", "fail", "too many connections", "max_connections"), store="postgres", early=True, workers=""),
    Condition("postgres-no-such-database", database_url(lambda url: url + "_not"), None,
              ("store", "fail", "does not exist", "create the database"), store="postgres"),
    Condition("postgres-no-such-user", database_url(lambda url: url.replace("postgres@", "nobody@")), None,
              ("store", "fail", "nobody", "correct the user"), store="postgres"),
    Condition("postgres-no-such-host", database_url(lambda _: "postgresql://u@nowhere.invalid/d"), None,
              ("store", "fail", "nowhere.invalid", "correct MNEMOBUS_DATABASE_URL")),
    # Workers
    Condition("no-workers-yet", nothing, "none has read this log yet",
              ("workers", "fail", "none has read this log yet", "start them"), workers=""),
    Condition("workers-stopped", stop_workers, "there are no workers",
              ("workers", "fail", "there are no workers", "start them"), workers="processes"),
    Condition("workers-killed", kill_workers, "no worker gives a sign of life",
              ("workers", "fail", "no worker gives a sign of life", "start them"), workers="processes"),
    Condition("workers-paused", pause_workers, "no worker gives a sign of life",
              ("workers", "fail", "no worker gives a sign of life", "are they paused"), workers="processes"),
    Condition("workers-of-an-older-version", silence_workers, "",
              ("workers", "ok", "workers that report nothing", ""), 0),
    Condition("workers-may-not-publish", forbid_workers_to_publish, "waits for the fan-out",
              ("workers", "fail", "NOPERM", "ACL SETUSER"), workers=""),
    Condition("backlog-full", fill_the_log, "takes no more", ("backlog", "fail", "takes no more", "start more workers"),
              workers=""),
    Condition("dead-letters", bury, "1 dead letters", ("dead letters", "warn", "1 writes", "mnemobus dead list"), 0),
    # The outbox
    Condition("no-directory", be_no_directory, None, ("outbox", "fail", "is not a directory", "MNEMOBUS_DATA_DIR")),
    Condition("outbox-left", leave_an_outbox, "", ("outbox", "warn", "2 writes", "start an agent"), 0),
]  # fmt: skip


@pytest.fixture
def world(
    tmp_path: Path, own_redis: Callable[..., RedisServer], request: pytest.FixtureRequest
) -> Iterator[World]:
    condition: Condition | None = getattr(getattr(request.node, "callspec", None), "params", {}).get(
        "condition"
    )
    server = own_redis(*(condition.options if condition else ()))
    url = f"sqlite:///{tmp_path}/memories.db"
    if condition and condition.store == "postgres":
        url = request.getfixturevalue("postgres_url")
    if condition and condition.store == "own_postgres":
        url = request.getfixturevalue("own_postgres").url
    settings = quick(
        redis_url=server.url,
        database_url=url,
        data_dir=tmp_path / "data",
        redis_timeout=1.0,
        database_timeout=1.0,
    )
    with contextlib.ExitStack() as stack:
        yield World(server, settings, tmp_path, request, stack)


@contextlib.asynccontextmanager
async def opened(w: World) -> AsyncIterator[mnemobus.Bus]:
    async with mnemobus.Bus(w.settings) as bus:
        w.bus = bus
        yield bus


def start_workers(w: World, kind: str) -> None:
    if kind == "threads":
        w.stack.enter_context(worker_threads(w.settings))
    elif kind == "processes":
        w.workers = w.request.getfixturevalue("workers")(w.settings, processes=1)


async def provoke(w: World, condition: Condition) -> None:
    result = condition.provoke(w)
    if asyncio.iscoroutine(result):
        await result


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
async def test_what_is_wrong_is_told(condition: Condition, world: World) -> None:
    async with contextlib.AsyncExitStack() as stack:
        # Given a bus with workers, and all is well
        if condition.early:
            await provoke(world, condition)
        if condition.health is not None:
            bus = await stack.enter_async_context(opened(world))
            start_workers(world, condition.workers)
            if condition.workers:
                await eventually(lambda: _is_well(bus), 20)
        # If something happens
        if not condition.early:
            await provoke(world, condition)
        # Then health says so, and does not where nothing is wrong
        if condition.health is not None:
            expected = condition.health
            if expected:
                await _told(bus, expected)
            else:
                await eventually(lambda: _is_well(bus), 20)
        # And the doctor: what it is, what to do, and the exit status
        found = await _examine(world.settings, condition)
        assert exit_status(found) == condition.status, "\n".join(map(str, found))
        for close in world.closing:
            close()
        world.stack.close()


async def _examine(settings: Settings, condition: Condition) -> list[Finding]:
    """What the doctor finds, once it finds what is expected: what just died may look alive for some seconds."""
    check, status, what, advice = condition.doctor
    deadline = time.monotonic() + 20
    while True:
        found = await examine(settings)
        if any(
            f.check == check and f.status == status and what in f.found and advice in f.advice for f in found
        ):
            return found
        assert time.monotonic() < deadline, "\n".join(map(str, found))


async def _is_well(bus: mnemobus.Bus) -> Health | None:
    health = await bus.health()
    return health if health.ok else None


async def _told(bus: mnemobus.Bus, expected: str) -> None:
    """Wait until one of the problems has these words."""
    deadline = time.monotonic() + 20
    while True:
        health = await bus.health()
        if any(expected in problem for problem in health.problems):
            assert not health.ok
            return
        assert time.monotonic() < deadline, "\n".join(health.problems)
        await asyncio.sleep(0.05)


# What workers tell


async def test_a_worker_tells_how_it_is_and_takes_that_back_when_it_ends(
    world: World, workers: Callable[..., Workers], command: Start
) -> None:
    # Given two worker processes that have applied something
    pool = workers(world.settings, processes=2)
    async with opened(world) as bus:
        receipts = [await bus.write(Memory(table="messages", room=f"r{n}", content={})) for n in range(20)]
        for receipt in receipts:
            await receipt.committed()
        await eventually(lambda: sum(w.report.events for w in told(world)) == 20)
        # Then each has told who it is, and health and stats show them
        await eventually(lambda: [w.alive for w in told(world)] == [True, True])
        assert {w.report.version for w in told(world)} == {mnemobus.__version__}
        assert "2 at work, the last batch " in (await eventually(lambda: _is_well(bus), 20)).workers
        stats = command("stats", "--json", settings=world.settings).json
        assert len(stats["workers"]) == 2
        assert sum(w["events"] for w in stats["workers"]) == 20
        shown = command("stats", settings=world.settings)
        assert shown.status == 0 and all(w.name in shown.out for w in told(world))
        # When they end in order, nothing of it is left
        pool.stop()
        assert world.client.hgetall(world.keys.workers) == {}


def told(w: World) -> list[Worker]:
    seconds, micros = w.client.time()
    return read(w.client.hgetall(w.keys.workers), seconds + micros / 1e6)


async def test_a_worker_that_waits_says_for_what_and_stops_saying_it(world: World) -> None:
    # Given a database that another program holds
    async with opened(world) as bus:
        start_workers(world, "threads")
        await eventually(lambda: _is_well(bus), 20)
        with contextlib.closing(sqlite3.connect(world.database, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            receipt = await bus.write(said())
            await _told(bus, "the worker waits for the store, since")
            [worker] = told(world)
            assert worker.report.waits_for == "the store" and "database is locked" in worker.report.why
        # Once it is free again, the worker goes on, and says so
        await receipt.committed(20)
        await eventually(lambda: _is_well(bus), 20)
        [worker] = told(world)
        assert worker.report.waits_for == "" and worker.report.applied is not None
    world.stack.close()


async def test_a_worker_that_can_not_use_the_store_at_all_says_so_before_anything_is_written(
    world: World,
) -> None:
    # Given an agent, and tables of another program where the workers' are to be
    async with opened(world) as bus:
        (world.folder / "other").mkdir()
        other = f"sqlite:///{world.folder}/other/memories.db"
        with contextlib.closing(sqlite3.connect(other.removeprefix("sqlite:///"))) as database:
            database.execute("CREATE TABLE mnemobus_memories (a)")
        # If a worker starts, then health says so
        world.stack.enter_context(worker_threads(world.settings.model_copy(update={"database_url": other})))
        await _told(bus, "the worker waits for the store")
    world.stack.close()


async def test_nothing_is_applied_though_workers_say_that_they_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker whose driver hangs and says nothing
    monkeypatch.setattr("mnemobus.health.vitals.LATE", 0.5)
    hung, commit = threading.Event(), Applier._commit
    async with opened(world) as bus:
        start_workers(world, "threads")
        await eventually(lambda: _is_well(bus), 20)
        await (await bus.write(said())).committed()
        monkeypatch.setattr(Applier, "_commit", lambda *args: hung.wait(60) and commit(*args))
        await bus.write(said())
        # Then that is told, though nobody waits for anything
        await _told(bus, "no worker has applied any")
        hung.set()
        await eventually(lambda: _is_well(bus), 20)
    world.stack.close()


def test_what_killed_workers_left_is_removed_and_never_more_than_a_hundred_of_it(world: World) -> None:
    # Given reports of workers that died: one long ago, and very many just now, as of a pool that can't start
    client, key = world.client, world.keys.workers
    seconds, _ = client.time()
    client.hset(key, "long-gone", Report("1", time=seconds - 7_200).encode())
    for n in range(_KEPT + 50):
        client.hset(key, f"dead-{n:03}", Report("1", time=seconds - 60 - n).encode())
    for n in range(_KEPT + 50):
        client.hset(key, f"alive-{n}", Report("1", time=seconds, every=60).encode())
    # And something that nobody understands
    client.hset(key, "garbage", b"\xff{")
    with contextlib.closing(ThreadedLink(world.settings, 2)) as link:
        reporter = Reporter(link, "me", State(), 1.0)
        reporter.tidy()
        # Then the last hundred dead ones stay, for people, and all that live
        names = {name.decode() for name in world.client.hkeys(key)}
        assert {name for name in names if name.startswith("dead")} == {f"dead-{n:03}" for n in range(_KEPT)}
        assert sum(name.startswith("alive") for name in names) == _KEPT + 50
        assert "long-gone" not in names
        # And a worker puts its own there, and takes it out
        reporter.tell()
        assert world.client.hexists(key, "me")
        reporter.leave()
        assert not world.client.hexists(key, "me")


@pytest.mark.parametrize(
    "value",
    [b"", b"[]", b"{}", b"\xff", b'{"version": "1"}', b'{"version": 1, "time": 2}', b'{"version": "1", "time": "2"}',
     b'{"version": "1", "time": 2, "failed": "x"}', b'{"version": "1", "time": true}'],
)  # fmt: skip
def test_what_is_no_report_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError):
        decode_report(value)


def test_a_report_of_a_newer_version_is_read() -> None:
    assert decode_report(b'{"version": "9", "time": 5, "new": [1]}') == Report("9", time=5)
    assert decode_report(Report("1", time=2.5, why="x" * 5_000).encode()).why == "x" * 500


async def test_a_clock_of_redis_that_was_set_back_makes_no_worker_look_alive_for_long(world: World) -> None:
    # Given a report that was made an hour ahead, by a worker that is gone since
    async with opened(world) as bus:
        world.client.xgroup_create(world.keys.log(0), "apply", mkstream=True)
        for p in range(1, 4):
            world.client.xgroup_create(world.keys.log(p), "apply", mkstream=True)
        seconds, _ = world.client.time()
        world.client.hset(world.keys.workers, "w", Report("1", time=seconds + 3_600).encode())
        await _told(bus, "no worker gives a sign of life")


# Health itself


async def test_health_takes_its_time_and_no_more_and_does_not_raise(
    world: World, own_postgres: PostgresServer
) -> None:
    # Given a Redis and a database that both hang
    world.change(database_url=own_postgres.url)
    async with opened(world) as bus:
        with psycopg.connect(own_postgres.url) as other:
            other.execute("LOCK TABLE mnemobus.memories IN ACCESS EXCLUSIVE MODE")
            world.redis.pause()
            # Then health answers within the time it was given
            began = time.monotonic()
            health = await bus.health(timeout=0.3)
            assert time.monotonic() - began < 3  # on a busy machine
            assert not health.ok and (health.backlog, health.dead_letters) == (-1, -1)
            assert any("gave no answer within 0.3 s" in problem for problem in health.problems)
            assert any("the store can't be read: no answer within 0.3 s" in p for p in health.problems)
            world.redis.resume()
        # And nothing of it is left over
        await eventually(lambda: _store_answers(bus), 20)


async def _store_answers(bus: mnemobus.Bus) -> bool:
    return (await bus.health()).store.startswith("schema ")


async def test_health_changes_nothing_and_asks_once(world: World) -> None:
    # Given a bus with workers
    async with opened(world) as bus:
        start_workers(world, "threads")
        await eventually(lambda: _is_well(bus), 20)
        keys = set(world.client.keys("*"))
        calls = []
        execute = bus._link.probe.execute

        async def count(commands: Any) -> Any:
            calls.append([command[0] for command in commands])
            return await execute(commands)

        bus._link.probe.execute = count  # type: ignore[method-assign]
        assert (await bus.health()).ok
        # Then it is one round trip (the others are heartbeats), and no key is made
        assert len([names for names in calls if {"INFO", "XINFO", "CLIENT"} & set(names)]) == 1
        assert set(world.client.keys("*")) == keys
    world.stack.close()
