"""mnemobus raises only its own errors: from every public call, and every command, in every condition of a server or
a disk.

Each condition is produced on real servers. The table says for each what happens to a bus that opens in it, what happens
to a write on a bus that is open (kept in the outbox, or refused), and the exit status of commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.exceptions

import mnemobus
from conftest import quick
from mnemobus import Memory, MnemobusError, Settings
from mnemobus.cli import main as command_line
from mnemobus.cli.doctor import examine
from mnemobus.cli.stats import redis_figures
from mnemobus.keys import Keyspace
from servers import RedisServer, Workers, free_port, wait_until

ROOM = "r1"
TOKEN = "eyIwIjoiMTc5NTU3ODAwMDAwMC0wIn0"
"""Of a bus that has written something."""
PATIENCE = 30.0
"""Seconds that no call may take, however busy the machine is."""

Run = Callable[..., tuple[int, str]]


class World:
    """The servers of one test, and how a bus reaches them."""

    def __init__(self, start: Callable[..., RedisServer], folder: Path) -> None:
        self.start, self.folder = start, folder
        self.redis = start()
        self.url = self.redis.url
        self.database = f"sqlite:///{folder}/memories.db"
        self.data = folder / "data"
        self.more: dict[str, Any] = {}
        self.after = contextlib.ExitStack()

    def settings(self, **overrides: Any) -> Settings:
        return quick(
            redis_url=self.url,
            database_url=self.database,
            data_dir=self.data,
            log_partitions=1,
            redis_timeout=1.0,
            database_timeout=2.0,
            write_timeout=1.5,
            own_write_timeout=0.05,
            **self.more | overrides,
        )

    def ask(self, *words: Any) -> Any:
        with redis.Redis.from_url(self.redis.url, socket_timeout=60) as client:
            return client.execute_command(*words)

    def cut(self) -> None:
        """End all connections, so that what follows makes new ones."""
        self.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        self.ask("CLIENT", "KILL", "TYPE", "pubsub")

    def user(self, *rules: str) -> None:
        """Have mnemobus come as a user with these rules."""
        self.ask("ACL", "SETUSER", "agent", "reset", "on", ">right", "~*", "&*", *rules)
        self.url = f"redis://agent:right@127.0.0.1:{self.redis.port}"


# The conditions


def replica(world: World) -> None:
    world.ask("REPLICAOF", "127.0.0.1", free_port())


def replica_that_has_lost_its_master(world: World) -> None:
    replica(world)
    world.ask("CONFIG", "SET", "replica-serve-stale-data", "no")


def loading(world: World) -> None:
    world.ask("EVAL", "for n = 1, 100000 do redis.call('SET', 'key' .. n, n) end", 0)
    world.ask("SAVE")
    world.redis.kill()
    # It takes a minute, which is longer than a test does; and meanwhile it answers every 30 ms.
    world.redis.options += ("--appendonly", "no", "--key-load-delay", "600")
    world.redis.options += ("--loading-process-events-interval-bytes", "1024")
    world.redis.start(wait=False)
    wait_until(lambda: _says(world, "LOADING"))


def _says(world: World, code: str) -> bool:
    try:
        world.ask("GET", "key")
    except redis.RedisError as error:
        return code == (getattr(error, "status_code", None) or str(error).partition(" ")[0])
    return False


def too_few_replicas(world: World) -> None:
    world.ask("CONFIG", "SET", "min-replicas-to-write", 1)


def disk_that_fails(world: World) -> None:
    (world.redis.folder / "dump.rdb").mkdir()  # which a snapshot can't take the place of
    world.ask("CONFIG", "SET", "save", "3600 1000000")
    world.ask("BGSAVE")
    with redis.Redis.from_url(world.redis.url) as client:
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def full(world: World) -> None:
    world.ask("CONFIG", "SET", "maxmemory", "1")


def busy(world: World) -> None:
    world.ask("CONFIG", "SET", "lua-time-limit", 10)
    script = threading.Thread(target=_run_for_long, args=(world,))
    script.start()
    world.after.callback(script.join)
    world.after.callback(world.ask, "SCRIPT", "KILL")
    wait_until(lambda: _says(world, "BUSY"))


def _run_for_long(world: World) -> None:
    with contextlib.suppress(redis.RedisError), redis.Redis.from_url(world.redis.url) as client:
        client.execute_command("EVAL", "while true do end", 0)


def wrong_password(world: World) -> None:
    world.ask("ACL", "SETUSER", "agent", "resetpass", ">changed")
    world.cut()


def no_password(world: World) -> None:
    world.ask("CONFIG", "SET", "requirepass", "secret")
    world.redis.url = f"redis://:secret@127.0.0.1:{world.redis.port}"
    world.url = f"redis://127.0.0.1:{world.redis.port}"
    world.cut()


def no_right_to_anything(world: World) -> None:
    world.ask("ACL", "SETUSER", "agent", "-@all", "+hello", "+ping", "+client")


def no_right_to_write(world: World) -> None:
    world.ask("ACL", "SETUSER", "agent", "-xadd")


def no_right_to_channels(world: World) -> None:
    world.ask("ACL", "SETUSER", "agent", "resetchannels")


def no_right_to_listen(world: World) -> None:
    world.ask("ACL", "SETUSER", "agent", "-subscribe")


def no_such_database(world: World) -> None:
    world.more["redis_db"] = 4711


def cluster_that_is_down(world: World) -> None:
    _cluster(world)


def cluster_that_keeps_it_elsewhere(world: World) -> None:
    _cluster(world)
    other = world.start("--cluster-enabled", "yes", port=_cluster_port())
    with redis.Redis.from_url(other.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
    world.ask("CLUSTER", "MEET", "127.0.0.1", other.port)
    wait_until(lambda: _says(world, "MOVED"), 30)


def _cluster(world: World) -> None:
    world.redis = world.start("--cluster-enabled", "yes", port=_cluster_port())
    world.url = world.redis.url


def _cluster_port() -> int:
    """A free port, with room for the one that nodes talk on: 10,000 above."""
    while (port := free_port()) > 50_000:
        pass
    return port


def away(world: World) -> None:
    world.redis.kill()


@dataclass(frozen=True)
class Condition:
    """A condition of Redis.

    arrange   brings it about
    refused   what a bus says that is opened in it, if it can't be; else it opens, without Redis
    write     what is said, in it, to a write of a bus without an outbox
    kept      whether the outbox takes such a write
    status    of commands that ask Redis
    restrict  whether mnemobus comes as a user of its own
    reads     whether what only reads, from Redis and without a bus, may succeed
    later     whether it can come over a bus that is open
    """

    arrange: Callable[[World], None]
    write: str
    refused: str = ""
    kept: bool = True
    status: int = 1
    restrict: bool = False
    reads: bool = False
    later: bool = True

    @property
    def name(self) -> str:
        return self.arrange.__name__


REDIS = [
    Condition(away, "could not be reached in time"),
    Condition(replica, "is a replica"),
    Condition(replica_that_has_lost_its_master, "is a replica"),
    Condition(loading, "it is loading its data", later=False),
    Condition(too_few_replicas, "min-replicas-to-write", reads=True),
    Condition(disk_that_fails, "check its disk", reads=True),
    Condition(full, "Raise maxmemory", kept=False, reads=True),
    Condition(busy, "SCRIPT KILL"),
    Condition(wrong_password, "REDIS_PASSWORD", "REDIS_PASSWORD", status=2, restrict=True),
    Condition(no_password, "REDIS_PASSWORD", "REDIS_PASSWORD", status=2),
    Condition(no_right_to_anything, "ACL SETUSER", "ACL SETUSER", kept=False, status=2, restrict=True),
    Condition(no_right_to_write, "ACL SETUSER", kept=False, reads=True, restrict=True),
    Condition(no_right_to_channels, "", "ACL SETUSER", status=2, reads=True, restrict=True),
    Condition(no_right_to_listen, "", "ACL SETUSER", status=2, reads=True, restrict=True),
    Condition(no_such_database, "", "DB index is out of range", status=2, later=False),
    Condition(cluster_that_is_down, "its cluster is down", later=False),
    Condition(cluster_that_keeps_it_elsewhere, "", "clusters are not supported", status=2, later=False),
]


@pytest.fixture
def world(own_redis: Any, tmp_path: Path) -> Iterator[World]:
    world = World(own_redis, tmp_path)
    with world.after:
        yield world
    world.redis.kill()  # one that can't save would not stop when asked


# Every public call


def memory(text: str = "") -> Memory:
    return Memory(table="messages", room=ROOM, content={"text": text})


async def calls(bus: mnemobus.Bus, known: mnemobus.Receipt | None) -> dict[str, Any]:
    """What comes of every public call: what it gives, or the exception."""
    nobody = "00000000-0000-4000-8000-000000000000"
    id = nobody if known is None else known.id
    done: dict[str, Any] = {}

    async def attempt(name: str, call: Callable[[], Awaitable[Any] | Any]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                answer = call()
                done[name] = await answer if isinstance(answer, Awaitable) else answer
        except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
            done[name] = error

    work: dict[str, Callable[[], Any]] = {
        "write": lambda: bus.write(memory("late")),
        "write synced": lambda: bus.write(memory("synced"), durability="synced"),
        "write committed": lambda: bus.write(memory("committed"), durability="committed"),
        "write_many": lambda: bus.write_many([memory("a"), memory("b")]),
        "update": lambda: bus.update(id, content={"text": "x"}),
        "delete": lambda: bus.delete(nobody),
        "delete_many": lambda: bus.delete_many([id, nobody]),
        "delete_room": lambda: bus.delete_room("messages", room="r2"),
        "get": lambda: bus.get(id),
        "recent": lambda: bus.recent("messages", room=ROOM),
        "count": lambda: bus.count("messages", room=ROOM),
        "context": lambda: bus.context(room=ROOM, entity="e"),
        "token": bus.token,
        "observe": lambda: bus.observe(TOKEN, timeout=0.2),
        "stats": bus.stats,
        "health": bus.health,
    }
    if known is not None:
        work["committed"] = lambda: known.committed(timeout=0.2)
    await asyncio.gather(*(attempt(name, call) for name, call in work.items()))
    return done


def are_ours(done: dict[str, Any]) -> None:
    """Whatever was raised is an error of mnemobus's, and says something."""
    for name, answer in done.items():
        if isinstance(answer, BaseException):
            assert isinstance(answer, MnemobusError), f"{name}: {answer!r}"
            assert len(str(answer)) > 20, f"{name}: {answer!r}"


async def close(bus: mnemobus.Bus) -> None:
    async with asyncio.timeout(PATIENCE):
        await bus.close()


@pytest.mark.parametrize("condition", REDIS, ids=lambda each: each.name)
async def test_a_bus_that_opens_in_it(world: World, condition: Condition) -> None:
    # Given a Redis in that condition, which a bus has been at before
    if condition.restrict:
        world.user("+@all")
    settings = world.settings()
    async with mnemobus.connect(**settings.model_dump()):
        pass
    condition.arrange(world)
    settings = world.settings()
    # If a bus opens, then it does, or says why it can't
    bus = mnemobus.connect(**settings.model_dump())
    if condition.refused:
        with pytest.raises(mnemobus.SettingsError) as refused:
            await bus.open()
        assert condition.refused in str(refused.value)
        return
    await bus.open()
    # And whatever it is asked, nothing but errors of ours comes of it; it closes, and leaves nothing behind
    try:
        are_ours(await calls(bus, None))
    finally:
        await close(bus)


@pytest.mark.parametrize(
    "condition", [each for each in REDIS if each.later], ids=lambda condition: condition.name
)
async def test_a_bus_over_which_it_comes(
    world: World, condition: Condition, caplog: pytest.LogCaptureFixture
) -> None:
    # Given two buses at work, one without an outbox
    if condition.restrict:
        world.user("+@all")
    first = mnemobus.connect(**world.settings().model_dump())
    second = mnemobus.connect(**world.settings(outbox="off").model_dump())
    async with first, second:
        known = await first.write(memory("before"))
        await second.write(memory("before"))
        await first.recent("messages", room=ROOM)
        # If the condition comes over them
        await asyncio.to_thread(condition.arrange, world)
        # Then nothing but errors of ours comes of any call
        done, bare = await asyncio.gather(calls(first, known), calls(second, None))
        are_ours(done)
        are_ours(bare)
        # And a write is kept in the outbox, or refused with what to do about it
        if condition.write:
            assert isinstance(bare["write"], MnemobusError), bare["write"]
            assert condition.write in str(bare["write"])
            if condition.kept:
                assert done["write"].outboxed, done["write"]
                assert not (await first.health()).ok
            else:
                assert condition.write in str(done["write"])
        # And whatever is wrong, tasks of the bus live on, and no traceback is in the log
        assert first.stats().restarted_tasks == second.stats().restarted_tasks == 0
        world.after.close()
        with contextlib.suppress(redis.RedisError):
            await asyncio.to_thread(world.redis.kill)
    assert [record.message for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize(
    "condition", [each for each in REDIS if each.later], ids=lambda condition: condition.name
)
async def test_a_read_of_what_would_be_held_live_that_is_the_first_to_notice(
    world: World, condition: Condition
) -> None:
    # Given a bus whose next heartbeat is far, with scopes of a room that are held live, and one that would be next time
    if condition.restrict:
        world.user("+@all")
    settings = world.settings(heartbeat=60.0, max_staleness=120.0, outbox="off")
    async with mnemobus.connect(**settings.model_dump()) as bus:
        for table in ("messages", "notes"):
            for _ in range(2):
                bus._local.drop(f"room:{table}:{ROOM}")
                await bus.recent(table, room=ROOM)
        await bus.recent("facts", room=ROOM)
        bus._local.drop(f"room:facts:{ROOM}")
        assert len(bus._live) == 2
        # If the condition comes over it, then reads are answered all the same
        await asyncio.to_thread(condition.arrange, world)
        async with asyncio.timeout(PATIENCE):
            assert not await bus.recent("facts", room=ROOM)
            assert not await bus.recent("messages", room=ROOM, limit=3)
            assert not await bus.recent("notes", room=ROOM, limit=1000)
            assert await bus.count("facts", room=ROOM) == 0
            assert await bus.get("00000000-0000-4000-8000-000000000000") is None
        world.after.close()


# Something else there


def _speaks(reply: bytes) -> str:
    """An address where something listens that answers this to each command."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while asked := connection.recv(4096):
                connection.sendall(reply * asked.count(b"*"))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"redis://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    "reply",
    ["+OK", ":1", "$-1", "$0\r\n", "*0", "-FOO no", "$5\r\nHMGET", "HTTP/1.1 400"],
    ids=["ok", "one", "nothing", "no text", "no list", "an error", "text", "http"],
)
def test_what_is_no_redis_though_it_answers(world: World, run: Run, reply: str) -> None:
    # Given something else at the address, which answers whatever it is asked
    world.url = _speaks(f"{reply}\r\n".encode())
    # If a bus opens, then it is refused
    with pytest.raises(mnemobus.SettingsError, match=r"127\.0\.0\.1"):
        asyncio.run(_use(world.settings()))
    # And commands say what is wrong
    for name, words in commands(world.folder).items():
        status, said = run(world.settings(), *words)
        assert status in (1, 2), (name, status, said)
        assert "Traceback" not in said and len(said) > 20, (name, said)


@pytest.mark.parametrize("what", ["text", "hash"])
@pytest.mark.parametrize(
    "key", ["layout", "epoch", "identity", "workers", "log", "meter", "heads", "producers", "dead", "reasons"]
)
async def test_keys_that_other_software_has_written(
    world: World, key: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = world.settings()
    keys = Keyspace(settings.redis_key_prefix, 1, settings.feed_partitions)
    name = getattr(keys, key)
    name = name if isinstance(name, str) else name(0)
    async with mnemobus.connect(**settings.model_dump()) as bus:
        known = await bus.write(memory())
        await bus.recent("messages", room=ROOM)
        # Given a key of the bus that somebody else has written
        if what == "text":
            world.ask("DEL", name)
            world.ask("SET", name, "x")
        else:
            if key in ("log", "dead"):
                world.ask("DEL", name)
            mine = world.ask("HKEYS", name)
            for field in [
                *mine,
                "resync",
                "resynced",
                "beats",
                "w0",
                "epoch",
                "log_partitions",
                "n",
                "added",
            ]:
                world.ask("HSET", name, field, b"[\xff")
        # Then nothing but errors of ours comes of any call, and no traceback is in the log
        are_ours(await calls(bus, known))
        if what == "text" and key != "reasons":
            health = await bus.health()
            assert (
                not health.ok
            )  # where workers report to, nothing can be: it is not taken for workers that are well
            assert key == "workers" or any("workers" not in problem for problem in health.problems), health
        assert bus.stats().restarted_tasks == 0
    # And a bus that opens now does, or says why it can't
    another = mnemobus.connect(**settings.model_dump())
    try:
        with contextlib.suppress(mnemobus.SettingsError):
            await another.open()
            are_ours(await calls(another, None))
    finally:
        await close(another)
    assert [record.message for record in caplog.records if record.exc_info] == []
    # And the doctor and the figures are told
    assert await examine(settings)
    assert await redis_figures(settings)


# The store


def a_directory(world: World) -> None:
    (world.folder / "place").mkdir()
    world.database = f"sqlite:///{world.folder}/place"


def below_a_file(world: World) -> None:
    (world.folder / "file").write_text("")
    world.database = f"sqlite:///{world.folder}/file/memories.db"


def no_database(world: World) -> None:
    (world.folder / "other.db").write_text("this is no database, and long enough to be taken for one" * 20)
    world.database = f"sqlite:///{world.folder}/other.db"


def nobody_listens(world: World) -> None:
    world.database = f"postgresql://me@127.0.0.1:{free_port()}/memories"


STORES = [a_directory, below_a_file, no_database, nobody_listens]


@pytest.mark.parametrize("arrange", STORES, ids=lambda arrange: arrange.__name__)
async def test_a_store_that_can_not_be(world: World, arrange: Callable[[World], None]) -> None:
    arrange(world)
    await drive(world.settings())


@pytest.mark.parametrize("case", ["no such database", "no such user"])
async def test_a_postgres_that_does_not_let_us_in(world: World, postgres_url: str, case: str) -> None:
    server = postgres_url.rpartition("/")[0]
    host = server.rpartition("@")[2].removeprefix("postgresql://")
    world.database = (
        f"{server}/nothing_here" if case == "no such database" else f"postgresql://nobody:wrong@{host}/x"
    )
    await drive(world.settings())


async def drive(settings: Settings) -> None:
    """Every call to a bus, if it opens; nothing but our errors comes of it, nor of opening it."""
    bus = mnemobus.connect(**settings.model_dump())
    try:
        await bus.open()
    except MnemobusError as error:
        assert len(str(error)) > 20
        return
    try:
        done = await calls(bus, None)
        are_ours(done)
        assert isinstance(done["get"], mnemobus.StoreError), done["get"]
        assert not done["health"].ok
    finally:
        await close(bus)


# The outbox


def outbox_is_a_directory(world: World) -> None:
    (world.folder / "place").mkdir()
    world.more["outbox"] = str(world.folder / "place")


def outbox_is_below_a_file(world: World) -> None:
    (world.folder / "file").write_text("")
    world.more["outbox"] = str(world.folder / "file" / "outbox.db")


def outbox_is_no_database(world: World) -> None:
    (world.folder / "other.db").write_text("this is no database, and long enough to be taken for one" * 20)
    world.more["outbox"] = str(world.folder / "other.db")


def outbox_is_the_store(world: World) -> None:
    asyncio.run(_use(world.settings()))
    world.more["outbox"] = world.database.removeprefix("sqlite:///")


OUTBOXES = [outbox_is_a_directory, outbox_is_below_a_file, outbox_is_no_database, outbox_is_the_store]


@pytest.mark.parametrize("arrange", OUTBOXES, ids=lambda arrange: arrange.__name__)
async def test_an_outbox_that_is_named_and_can_not_be(world: World, arrange: Callable[[World], None]) -> None:
    await asyncio.to_thread(arrange, world)
    with pytest.raises(mnemobus.errors.OutboxError, match=r"the outbox .* can't be used"):
        await mnemobus.connect(**world.settings().model_dump()).open()


async def test_a_data_directory_that_can_not_be_is_told_when_a_bus_opens(world: World) -> None:
    # Given a data directory that can't be made
    (world.folder / "file").write_text("")
    world.data = world.folder / "file" / "data"
    async with mnemobus.connect(**world.settings().model_dump()) as bus:
        # Then the bus works, and says what will not
        await bus.write(memory())
        problems = (await bus.health()).problems
        assert any(
            "writes can't wait in" in problem and "MNEMOBUS_DATA_DIR" in problem for problem in problems
        )
        # And without Redis, writes fail with that reason
        await asyncio.to_thread(world.redis.kill)
        with pytest.raises(mnemobus.LogUnavailable, match="MNEMOBUS_DATA_DIR"):
            await bus.write(memory())
        are_ours(await calls(bus, None))


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1/?db=none",
        "redis://127.0.0.1/?retry=3",
        "redis://127.0.0.1/?ssl_cert_reqs=none",
        "rediss://127.0.0.1/?ssl_cert_reqs=perhaps",
        "redis://127.0.0.1/?credential=x",
        "unix:///nowhere?nonsense=1",
    ],
)
def test_an_address_that_no_connection_can_be_made_from(url: str, tmp_path: Path) -> None:
    with pytest.raises(mnemobus.SettingsError, match=r"REDIS_URL: .*\w{4}"):
        mnemobus.connect(redis_url=url, database_url=f"sqlite:///{tmp_path}/m.db", data_dir=tmp_path)


# Every command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process: its exit status, and all that it said."""

    def run(settings: Settings, *words: str) -> tuple[int, str]:
        for name, value in settings.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["mnemobus", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out + err

    return run


def commands(folder: Path) -> dict[str, tuple[str, ...]]:
    file = folder / "lines.jsonl"
    file.write_text('{"table": "messages", "room": "r1", "content": {"text": "imported"}}\n')
    return {
        "doctor": ("doctor",),
        "stats": ("stats", "--json"),
        "verify": ("verify", "--seconds", "0.1", "--marks", "0.1", "--patience", "0.2"),
        "replay": ("replay", "--dry-run"),
        "dead list": ("dead", "list"),
        "dead show": ("dead", "show", "1-1"),
        "dead requeue": ("dead", "requeue", "--all"),
        "dead drop": ("dead", "drop", "--all", "--yes"),
        "import": ("import", "--no-wait", str(file)),
    }


LOOK = ("doctor", "stats", "verify")
"""Commands that only look, without the handshake of a bus: they may well get an answer where a bus does not."""


@pytest.mark.parametrize("condition", REDIS, ids=lambda each: each.name)
def test_commands_in_it(world: World, condition: Condition, run: Run) -> None:
    # Given a Redis in that condition
    if condition.restrict:
        world.user("+@all")
    asyncio.run(_use(world.settings()))
    condition.arrange(world)
    settings = world.settings()
    # If any command is run, then it says what is wrong, without a traceback, and its status is right
    wrong = []
    for name, words in commands(world.folder).items():
        status, said = run(settings, *words)
        fine = {condition.status}
        if name != "import" and (condition.reads or name in LOOK):
            fine |= {0, 1}
        if status not in fine or "Traceback" in said or not said.strip():
            wrong.append((name, status, said[-2000:]))
    assert wrong == []


async def _use(settings: Settings) -> None:
    async with mnemobus.connect(**settings.model_dump()) as bus:
        await bus.write(memory("before"))


@pytest.mark.parametrize("arrange", STORES, ids=lambda arrange: arrange.__name__)
def test_commands_with_a_store_that_can_not_be(
    world: World, arrange: Callable[[World], None], run: Run
) -> None:
    arrange(world)
    for name, words in commands(world.folder).items():
        status, said = run(world.settings(), *words)
        assert "Traceback" not in said, (name, said)
        if name in ("doctor", "stats", "verify", "import"):
            assert status == 1, (name, status, said)


def test_tail_waits_for_what_passes_and_ends_for_what_does_not(
    world: World, command: Callable[..., Any]
) -> None:
    world.user("+@all")
    settings = world.settings()
    # Given a tail of a Redis that is loading, or away: it waits, and goes on
    world.redis.kill()
    waiting = command("tail", "--count", "1", "--events", "--since", "1h", settings=settings)
    waiting.says("waiting for it")
    world.redis.start()
    asyncio.run(_use(quick(**settings.model_dump() | {"redis_url": world.redis.url})))
    world.user("+@all")
    assert waiting.status == 0
    # If its user may not read the streams, then it says so and ends
    world.ask("ACL", "SETUSER", "agent", "-xread")
    ended = command("tail", "--count", "1", settings=settings)
    assert ended.status == 2
    assert "ACL SETUSER" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    "condition",
    [each for each in REDIS if each.arrange in (away, replica, busy, wrong_password, no_right_to_anything)],
    ids=lambda each: each.name,
)
def test_workers_wait_for_it_to_pass_and_stop_when_asked(
    world: World, condition: Condition, workers: Callable[..., Workers]
) -> None:
    # Given workers that start in that condition
    if condition.restrict:
        world.user("+@all")
    asyncio.run(_use(world.settings()))
    condition.arrange(world)
    pool = workers(world.settings(), 1, 1)
    # Then they say what is wrong and what to do, and go on trying
    wait_until(lambda: "trying until it can" in pool.log.read_text(), 20)
    said = pool.log.read_text()
    assert condition.write in said or condition.name == "away", said
    assert "Traceback" not in said
    # And end in order when they are asked to
    assert pool.stop() == 0
    assert "Traceback" not in pool.log.read_text()


def test_a_worker_is_not_started_with_an_address_that_makes_no_sense(
    world: World, command: Callable[..., Any]
) -> None:
    ended = command("worker", settings=world.settings(), REDIS_URL=f"{world.url}/?nonsense=1")
    assert ended.status == 2
    assert "nonsense" in ended.err and "Traceback" not in ended.err
