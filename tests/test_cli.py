"""The command line: how it is called, what it shows, what it finds wrong, and the demo."""

from __future__ import annotations

import asyncio
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import mnemobus
from commands import Command, descendants, wait_until_gone
from mnemobus import Memory, Settings
from mnemobus.cli import app
from mnemobus.cli.moments import parse_moment
from mnemobus.errors import SettingsError
from mnemobus.keys import SLOTS, Keyspace, Version, slot_of
from mnemobus.store import open_writer
from servers import RedisServer, eventually, free_port, wait_until

Start = Callable[..., Command]
Connect = Callable[..., mnemobus.Bus]
COMMANDS = [command.name for command in app.registered_commands]


def said(text: str, room: str = "kitchen", **fields: Any) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)


def keys(settings: Settings) -> Keyspace:
    return Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_url) as client:
        yield client


# How it is called


def test_help_describes_every_command_and_every_option(command: Start) -> None:
    # Given the help of everything
    top = command("--help")
    pages = {name: command(name, "--help") for name in COMMANDS}
    assert set(pages) >= {"demo", "up", "worker", "import", "stats", "tail", "doctor"}
    for name, page in pages.items():
        # Then each command is listed, described, and shown by an example
        assert page.status == 0
        assert re.search(rf"│ {name} +[A-Z]", top.out)
        assert "Examples:" in page.out and f"mnemobus {name}" in page.out
        # And each option says what it is for: its line has words after name, type and bounds
        options = re.findall(r"^│ (?:\*? +)?(-.*|FILE.*) │$", page.out, re.MULTILINE)
        assert options
        for option in options:
            assert re.search(r"(>|\]|WHEN|FILE|URL) +[A-Za-z-]+ ?.*\w", option), option
    assert "env.template" in top.out


def test_the_version_and_what_is_called_wrongly(command: Start) -> None:
    version, nothing, unknown, option, number = (
        command(*arguments)
        for arguments in (
            ("--version",),
            (),
            ("replicate",),
            ("stats", "--verbose"),
            ("demo", "--agents", "1"),
        )
    )
    assert version.status == 0
    assert version.out == f"mnemobus {mnemobus.__version__}\n"
    assert nothing.status == 2 and "Usage: mnemobus" in nothing.out + nothing.err
    assert unknown.status == 2 and "No such command 'replicate'" in unknown.err
    assert option.status == 2 and "No such option: --verbose" in option.err
    assert number.status == 2 and "--agents" in number.err


def test_a_bad_setting_is_named_by_every_command(command: Start) -> None:
    more = {"import": ["-"], "demo": ["--external"], "repartition": ["2"]}
    started = [command(name, *more.get(name, []), MNEMOBUS_HEARTBEAT="often") for name in COMMANDS]
    for failed in started:
        assert failed.status == 2
        assert failed.err.startswith("mnemobus: MNEMOBUS_HEARTBEAT: ")
        assert failed.err.count("\n") == 1
        assert failed.out == ""


# stats


@pytest.mark.parametrize("protocol", [2, 3])
async def test_stats_are_those_of_log_workers_feed_and_store(
    pool: Settings, connect: Connect, command: Start, client: redis.Redis, protocol: int
) -> None:
    pool = pool.model_copy(update={"redis_protocol": protocol})
    # Given a bus that has written, and listens to what it read
    async with connect() as bus:
        for receipt in await bus.write_many([said(str(n), f"room-{n}") for n in range(12)]):
            await receipt.committed()
        await bus.recent("messages", room="room-1")
        # And a dead letter
        client.xadd(keys(pool).dead(2), {"version": "1-1", "reason": "why not"})
        shown, figures = command("stats", settings=pool), command("stats", "--json", settings=pool)
        # Then a program reads the figures
        got = figures.json
        assert figures.status == 0
        assert (got["backlog"], got["dead_letters"]) == (0, 1)
        assert [p["partition"] for p in got["log"]] == [0, 1, 2, 3]
        assert sum(p["added"] for p in got["log"]) == sum(p["applied"] for p in got["log"]) == 12
        assert all(p["waiting_seconds"] is None and p["pending"] == 0 and p["group"] for p in got["log"])
        assert got["feed"]["messages"] >= 12 and got["feed"]["subscriptions"] >= 1
        assert (
            got["redis"]["reading"] >= 1 and got["redis"]["policy"] == "noeviction" and got["redis"]["epoch"]
        )
        assert got["store"] == {
            "url": pool.database_url,
            "schema": 2,
            "tables": {"messages": 12},
            "memories": 12,
            "exact": True,
        }
        # And people see them
        assert shown.status == 0
        assert re.search(r"│ +2 │ +\d+ │ +0 │ +- │ +0 │ +1 │ +\d+ │", shown.out)
        assert f"{pool.database_url}, schema 2: messages 12" in shown.out


async def test_stats_tell_what_waits(settings: Settings, connect: Connect, command: Start) -> None:
    # Given writes that no worker takes
    async with connect() as bus:
        await bus.write_many([said("hi"), said("ho")])
    # Then stats tell how many, and for how long; and watching them can be ended
    watching = command("stats", "--watch", "--every", "0.2", "--json", settings=settings)
    wait_until(lambda: len(watching.lines) >= 2)
    first, second, *_ = watching.lines
    assert first["backlog"] == 2
    [waiting] = [p["waiting_seconds"] for p in second["log"] if p["backlog"]]
    assert 0 < waiting < 60
    assert not any(p["group"] for p in second["log"])
    watching.signal(signal.SIGINT)
    assert watching.status == 130
    assert watching.err == ""


def test_stats_with_something_away_tell_the_rest(settings: Settings, command: Start) -> None:
    away = f"redis://127.0.0.1:{free_port()}"
    done = command("stats", settings=settings.model_copy(update={"redis_url": away}))
    assert done.status == 1
    assert f"Redis at {away} does not answer: " in done.out + done.err
    assert "has no schema yet: start a worker (mnemobus worker), which makes it" in done.err
    assert "Traceback" not in done.err
    # To look has changed nothing: there is no database now, where there was none before
    assert not Path(settings.database_url.removeprefix("sqlite:///")).exists()


# tail


@pytest.mark.parametrize("protocol", [2, 3])
async def test_tail_shows_events_and_invalidations_as_they_pass(
    pool: Settings, connect: Connect, command: Start, protocol: int
) -> None:
    pool = pool.model_copy(update={"redis_protocol": protocol})
    # Given one who watches, before anything happens
    watching = command("tail", "--json", "--count", "6", settings=pool)
    plain = command("tail", "--events", "-n", "4", settings=pool)
    async with connect() as bus:
        await asyncio.to_thread(_wait_for_readers, pool, 2)
        memory = said("salty", entity="alice", embedding=[1.0, 2.0])
        await (await bus.write(memory)).committed()
        await (await bus.update(memory.id, content={"text": "fine"})).committed()
        await (await bus.delete(memory.id)).committed()
        await bus.delete_room("messages", room="line\nbreak")
    # Then each write is there, and after it what it made stale
    assert watching.status == 0
    records = watching.lines
    assert len(records) == 6
    events = [r for r in records if r["type"] == "event"]
    assert [e["op"] for e in events][:2] == ["put", "update"]
    assert events[0] | {"partition": 0, "version": ""} == {
        "type": "event",
        "partition": 0,
        "version": "",
        "op": "put",
        "table": "messages",
        "room": "kitchen",
        "agent": None,
        "entity": "alice",
        "world": None,
        "id": memory.id,
        "content": {"text": "salty"},
        "metadata": {},
        "embedding_floats": 2,
    }
    dropped = [r for r in records if r["type"] == "invalidation"]
    assert {scope for r in dropped for scope in r["scopes"]} >= {
        "room:messages:kitchen",
        "entity:messages:alice",
    }
    assert events[0]["version"] in {version for r in dropped for version in r["versions"]}
    # And people see one line each
    assert plain.status == 0
    shown = plain.out.splitlines()
    assert len(shown) == 4
    assert re.fullmatch(
        rf'[\d:.]+ put         table=messages room=kitchen entity=alice {memory.id} {{"text":"salty"}}',
        shown[0],
    )
    assert "delete_room table=messages room='line\\nbreak'" in shown[3]


def _wait_for_readers(settings: Settings, count: int) -> None:
    """Until so many wait for the log outside of the consumer group."""
    with redis.Redis.from_url(settings.redis_url) as client:
        wait_until(lambda: sum(c["cmd"] == "xread" for c in client.client_list()) >= count, 20)


async def test_tail_shows_what_is_announced_to_agents_that_hold_it_live(
    settings: Settings, connect: Connect, command: Start, client: redis.Redis
) -> None:
    # Given one who listens where agents do
    watching = command("tail", "--live", "--json", "-n", "4", settings=settings)
    plain = command("tail", "--live", "-n", "4", settings=settings)
    channel = keys(settings).live_channel(0, SLOTS - 1)
    await eventually(lambda: client.pubsub_numsub(channel)[0][1] == 2, 20)
    # If something is written, too much to be sent along, or without sense
    async with connect() as bus:
        memory = said("salty", entity="alice")
        first = await bus.write(memory)
        large = await bus.write(said("x" * 100_000))
        await bus.delete_room("messages", room="kitchen")
        client.publish(channel, "nonsense")
    # Then each is one line, with the slots whose listeners hear it
    assert watching.status == plain.status == 0
    by_version = {record["version"]: record for record in watching.lines}
    put = by_version[str(first.version)]
    partition = keys(settings).log_partition("kitchen")
    assert (put["type"], put["op"], put["id"], put["partition"]) == (
        "announcement",
        "put",
        memory.id,
        partition,
    )
    assert set(put["slots"]) == {slot_of("room", "kitchen"), slot_of("entity", "alice")}
    assert "op" not in by_version[str(large.version)]
    assert next(r["error"] for r in watching.lines if r["type"] == "error").startswith(
        f"slot {SLOTS - 1}: can't"
    )
    assert re.search(rf"live [\d/]+ +put +table=messages room=kitchen entity=alice {memory.id}", plain.out)
    assert f"{large.version}, too large for the message" in plain.out


@pytest.mark.parametrize("option", ["--events", "--invalidations", "--since=1h"])
def test_what_is_announced_is_not_kept(settings: Settings, command: Start, option: str) -> None:
    tail = command("tail", "--live", option, settings=settings)
    assert tail.status == 2
    assert "announcements are not kept" in " ".join(tail.err.replace("│", " ").split())


async def test_stats_tell_of_live_scopes(
    settings: Settings, connect: Connect, command: Start, client: redis.Redis
) -> None:
    # Given two agents that hold a room live, and an event that an agent of an older version logged
    async with connect() as one, connect() as other:
        for bus in (one, other):
            limits = iter(range(1, 60))

            async def is_live(bus: mnemobus.Bus = bus, limits: Iterator[int] = limits) -> bool:
                await bus.recent("messages", room="kitchen", limit=next(limits))
                return bus.stats().live_windows == 1

            await eventually(is_live)
        partition = keys(settings).log_partition("elsewhere")
        client.xadd(keys(settings).log(partition), {"op": "delete_room", "table": "t", "room": "elsewhere"})
        client.hincrby(keys(settings).meter(partition), "added", 1)
        # Then both figures are there
        figures, shown = command("stats", "--json", settings=settings), command("stats", settings=settings)
        assert figures.status == shown.status == 0
        assert figures.lines[0]["live"] == {"channels": 1, "subscriptions": 2, "unannounced": 1}
        text = " ".join(shown.out.replace("│", " ").split())
        assert "1 channels of the log are listened to, 2 subscriptions of agents; 1 events were not" in text


async def test_tail_begins_where_it_is_told_and_shows_what_can_not_be_read(
    settings: Settings, connect: Connect, command: Start, client: redis.Redis
) -> None:
    # Given two writes, an entry that is none, and a message of the feed that is none
    async with connect() as bus:
        first, second = await bus.write_many([said("one"), said("two")])
    partition = keys(settings).log_partition("kitchen")
    client.xadd(keys(settings).log(partition), {"op": "put", "table": "messages"})
    client.xadd(keys(settings).feed(0), {"prev": "0-0", "m": "[]"})
    # If one begins at the second of them, or some time ago
    since = command(
        "tail", "--json", "--events", "--since", str(second.version), "-n", "2", settings=settings
    )
    ago = command("tail", "--json", "--since", "1h", "-n", "4", settings=settings)
    plain = command("tail", "--since", "1h", "-n", "4", settings=settings)
    # Then that is what comes first, and what can't be read is shown with the reason
    assert since.status == 0
    assert since.lines[0]["version"] == str(second.version)
    assert since.lines[1]["type"] == "error"
    assert since.lines[1]["error"] == "can't be decoded: the field 'room' is missing"
    assert ago.status == 0
    assert ago.lines[0]["version"] == str(first.version)
    assert [r["error"] for r in ago.lines if r["type"] == "error"] == [
        "can't be decoded: the field 'room' is missing",
        "can't be decoded: the payload is no JSON object",
    ]
    assert plain.status == 0
    assert "can't be decoded: the payload is no JSON object" in plain.out


def test_tail_waits_for_a_redis_that_is_away(
    settings: Settings, own_redis: Callable[..., RedisServer], command: Start
) -> None:
    # Given a Redis that is away
    server = own_redis()
    server.stop()
    settings = settings.model_copy(update={"redis_url": server.url})
    tail = command("tail", "--json", "-n", "1", settings=settings)
    tail.says(f"Redis at {server.url} does not answer")
    # If it comes, then something is seen
    server.start()
    tail.says("Redis is back")
    with redis.Redis.from_url(server.url) as client:
        client.xadd(keys(settings).log(0), {"op": "delete_room", "table": "messages", "room": "r"})
    assert tail.status == 0
    assert tail.lines[0]["op"] == "delete_room"


def test_when_to_begin() -> None:
    assert parse_moment("90s", "--since") == 90
    assert parse_moment(" 1.5 h ", "--since") == 5_400
    assert parse_moment("2d", "--since") == 172_800
    assert parse_moment("17-3", "--since") == Version(17, 3)
    assert parse_moment("1970-01-01T00:00:01Z", "--since") == Version(1_000, 0)
    with pytest.raises(
        SettingsError, match="--since 'soon' is not one of 90s, 15m, 2h, 1d, a date with a zone"
    ):
        parse_moment("soon", "--since")
    with pytest.raises(SettingsError, match="the date needs a zone"):
        parse_moment("2025-06-01T12:00:00", "--since")


# doctor


def checks(done: Command) -> dict[str, tuple[str, str, str]]:
    """What the doctor found: status, finding and advice, by check."""
    return {c["check"]: (c["status"], c["found"], c["advice"]) for c in done.json["checks"]}


async def test_the_doctor_finds_nothing_where_nothing_is_wrong(
    pool: Settings, connect: Connect, command: Start
) -> None:
    async with connect() as bus:
        await (await bus.write(said("hi"))).committed()
    plain, read = command("doctor", settings=pool), command("doctor", "--json", settings=pool)
    assert read.status == 0 and read.json["ok"]
    found = checks(read)
    assert {check: status for check, (status, _, _) in found.items()} == dict.fromkeys(
        (
            "redis", "policy", "memory", "persistence", "writes", "rights", "layout", "workers", "backlog",
            "dead letters", "store", "outbox", "identity",
        ),
        "ok",
    )  # fmt: skip
    assert not any(advice for _, _, advice in found.values())
    assert plain.status == 0
    assert re.search(r"^ok    store         sqlite:.*, schema 2$", plain.out, re.MULTILINE)


def test_the_doctor_where_nothing_runs_yet(settings: Settings, database_url: str, command: Start) -> None:
    # Given a Redis, but no worker, and so no schema
    settings = settings.model_copy(update={"database_url": database_url})
    done = command("doctor", "--json", settings=settings)
    assert done.status == 1 and not done.json["ok"]
    found = checks(done)
    assert found["workers"] == (
        "fail",
        "there are no workers, and none has read this log yet",
        "start them: mnemobus worker (or mnemobus up)",
    )
    assert found["layout"][:2] == ("ok", f"nobody has used the prefix {settings.redis_key_prefix!r} yet")
    assert found["store"][0] == "fail"
    assert "has no schema yet: start a worker (mnemobus worker), which makes it" in found["store"][1]
    # To look has made none
    assert checks(command("doctor", "--json", settings=settings))["store"] == found["store"]
    if database_url.startswith("sqlite"):
        assert not Path(database_url.removeprefix("sqlite:///")).exists()


def test_the_doctor_does_not_take_the_workers_of_another_bus_for_ours(
    pool: Settings, settings: Settings, command: Start
) -> None:
    done = command("doctor", "--json", settings=settings.model_copy(update={"redis_key_prefix": "another"}))
    assert checks(done)["workers"][0] == "fail" and "there are no workers" in checks(done)["workers"][1]


def test_the_doctor_where_redis_is_unfit(
    settings: Settings, own_redis: Callable[..., RedisServer], command: Start
) -> None:
    # Given a Redis that evicts, persists nothing, and is nearly full
    server = own_redis("--maxmemory", "600kb", "--maxmemory-policy", "allkeys-lru", "--appendonly", "no")
    unfit = settings.model_copy(
        update={"redis_url": server.url, "redis_eviction_policy": "noeviction", "redis_max_memory": "2gb"}
    )
    found = checks(command("doctor", "--json", settings=unfit))
    # Then each is named, with what to do
    assert found["policy"] == (
        "fail",
        "allkeys-lru: Redis may evict the log",
        "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
    )
    assert found["persistence"][0] == "warn"
    assert "CONFIG SET appendonly yes" in found["persistence"][2]
    assert found["memory"][0] in ("warn", "fail") and "full: " in found["memory"][1]
    assert found["REDIS_EVICTION_POLICY"][:2] == ("fail", "is noeviction, but the server has allkeys-lru")
    assert found["REDIS_MAX_MEMORY"][1] == "is 2gb (2,147,483,648 bytes), but the server has 614,400"


def test_the_doctor_where_redis_or_the_store_does_not_let_us_in(
    settings: Settings, own_redis: Callable[..., RedisServer], command: Start, tmp_path: Path
) -> None:
    locked = own_redis()
    with redis.Redis.from_url(locked.url) as client:
        client.config_set("requirepass", "secret")
    (tmp_path / "memories.db").write_text("this is no database" * 100)
    no_store = f"sqlite:///{tmp_path}/memories.db"
    away = f"redis://127.0.0.1:{free_port()}"
    refused = command("doctor", "--json", settings=settings.model_copy(update={"redis_url": locked.url}))
    gone = command(
        "doctor", settings=settings.model_copy(update={"redis_url": away, "database_url": no_store})
    )
    assert refused.status == gone.status == 1
    assert "Set REDIS_PASSWORD" in checks(refused)["redis"][1]
    assert "refuses the login" in checks(refused)["redis"][1]
    assert re.search(rf"^fail  redis   Redis at {away} does not answer: ", gone.out, re.MULTILINE)
    assert "start it (`mnemobus up` runs one here), or set REDIS_URL" in gone.out
    assert re.search(r"^fail  store   SQLite .*: file is not a database", gone.out, re.MULTILINE)
    assert "it is not an SQLite file: correct MNEMOBUS_DATABASE_URL" in gone.out


async def test_the_doctor_where_writes_wait_or_died(
    settings: Settings, connect: Connect, command: Start, client: redis.Redis
) -> None:
    # Given an event that has waited for an hour, and a dead letter
    async with connect(log_partitions=2) as bus:
        await bus.health()
    ours = settings.model_copy(update={"log_partitions": 2})
    seconds, _ = client.time()
    client.xadd(keys(ours).log(0), {"op": "put"}, id=f"{(seconds - 3_600) * 1000}-0")
    client.hset(keys(ours).meter(0), "added", 5)
    client.xadd(keys(ours).dead(1), {"version": "1-1", "reason": "why not"})
    late = command("doctor", "--json", settings=ours)
    full = command("doctor", "--json", settings=ours.model_copy(update={"max_backlog": 5}))
    other = command("doctor", "--json", settings=settings)
    # Then it says so
    status, found, advice = checks(late)["backlog"]
    assert (
        status == "warn"
        and re.fullmatch(r"5 events, the oldest for 36\d\d s", found)
        and "workers' log" in advice
    )
    status, found, advice = checks(late)["dead letters"]
    assert (status, found) == ("warn", "1 writes that no worker could apply")
    assert "mnemobus dead list" in advice
    # A log that takes no more is a failure; another number of partitions than is configured is none
    assert checks(full)["backlog"][0] == "fail"
    assert "log partition 0 takes no more" in checks(full)["backlog"][1]
    assert checks(other)["layout"] == ("ok", "2 log and 64 feed partitions", "")


def test_the_doctor_where_the_schema_is_of_another_version(settings: Settings, command: Start) -> None:
    writer = open_writer(settings)
    writer.open()
    writer.close()
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO mnemobus_migrations (number) VALUES (7)")
    newer = checks(command("doctor", "--json", settings=settings))["store"]
    assert (
        newer[0] == "warn"
        and "has schema 7, newer than 2" in newer[1]
        and newer[2] == "upgrade mnemobus here"
    )


# worker


def test_worker_is_dramatiq_with_the_settings(
    settings: Settings, command: Start, tmp_path: Path, client: redis.Redis
) -> None:
    # Given `mnemobus worker`, with an option of Dramatiq's own
    ours = settings.model_copy(update={"worker_threads": 3, "worker_processes": 2})
    running = command("worker", "--processes", "1", "--log-file", str(tmp_path / "log"), settings=ours)
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and "ready for action" in log.read_text(), 20)
    # Then it runs as it was told, and reads every partition
    line = Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")
    assert line[line.index(b"--processes") + 1] == b"1"
    assert line[line.index(b"--threads") + 1] == b"3"
    wait_until(lambda: all(client.exists(keys(ours).log(p)) for p in range(4)))
    # And SIGTERM stops it, with all its processes
    pids = descendants(running.pid)
    running.signal(signal.SIGTERM)
    assert running.status == 0
    wait_until_gone(pids, 0)
    assert running.err == ""


# demo


FIGURES = (
    "writes", "batches", "events_per_batch", "hits_local", "hits_shared", "misses", "invalidations",
    "propagation_p50_ms", "propagation_p99_ms", "writes_lost", "agents_that_disagree",
)  # fmt: skip


def test_g1_the_demo_proves_itself_and_leaves_nothing(command: Start, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    quick = {"MNEMOBUS_CLAIM_IDLE": "1", "TMPDIR": str(tmp_path / "tmp")}
    # Given a small demo
    running = command("demo", "--agents", "2", "--writes", "100", "--json", **quick)
    wait_until(lambda: len(descendants(running.pid)) >= 5, 20)
    pids = descendants(running.pid)
    # Then it ends well, and tells every figure
    assert running.status == 0, running.out + running.err
    summary = running.json
    assert summary["ok"] and summary["problems"] == []
    assert summary["worker_killed"]
    assert (summary["writes_lost"], summary["agents_that_disagree"]) == (0, 0)
    assert summary["writes"] >= 100 and summary["compared"] >= 50 and summary["propagation_samples"] >= 20
    assert all(summary[figure] > 0 for figure in FIGURES[:-2])
    # And neither process nor file is left
    wait_until_gone(pids, 0)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_demo_that_is_stopped_leaves_nothing(command: Start, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    running = command("demo", "--agents", "2", "--writes", "5000", TMPDIR=str(tmp_path / "tmp"))
    running.says("2 agent processes")
    pids = descendants(running.pid)
    assert len(pids) >= 7  # Redis, two masters with a worker each, two agents
    running.signal(signal.SIGINT)
    assert running.status == 130
    wait_until_gone(pids, 0)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "Traceback" not in running.err
    assert "Every agent agrees" not in running.out


def corrupted(database: str) -> str:
    """Runs the demo against a store in which one message is changed behind the bus's back, before the proof."""
    return f"""
import sqlite3
from mnemobus.cli import main
from mnemobus.cli.demo import play

prove = play._Demo._prove

async def spoil(self, reports):
    with sqlite3.connect({database!r}) as connection:
        message = self._rooms[0].message(0)
        connection.execute(
            "UPDATE mnemobus_memories SET content = '{{}}' WHERE id = ?", (bytes.fromhex(message.replace("-", "")),)
        )
        connection.execute(
            "UPDATE mnemobus_memories SET content = '{{}}' WHERE room = ?", (self._rooms[1].name,)
        )
    await prove(self, reports)

play._Demo._prove = spoil
main()
"""


def test_a_demo_that_finds_something_wrong_fails(pool: Settings, command: Start) -> None:
    # Given Redis, a store and workers that run already, and somebody who changes a row of the store by hand
    program = corrupted(pool.database_url.removeprefix("sqlite:///"))
    arguments = ("demo", "--external", "--agents", "2", "--writes", "100", "--json")
    failed = command(*arguments, settings=pool, program=("-c", program))
    # Then the demo finds that the store is not what was written, and that agents see something else
    assert failed.status == 1
    summary = failed.json
    assert not summary["ok"]
    assert summary["writes_lost"] >= 2
    assert summary["agents_that_disagree"] == 2
    assert "agents that see something else than the store: [0, 1]" in summary["problems"][1]
    assert "writes are lost, such as" in summary["problems"][0]


def test_a_demo_without_what_it_needs_says_so(settings: Settings, command: Start) -> None:
    # Given a Redis without workers
    failed = command("demo", "--external", "--wait", "1", settings=settings)
    assert failed.status == 1
    assert "were not there within 1 s; `mnemobus doctor` tells what is missing" in failed.err
    assert "Traceback" not in failed.err
