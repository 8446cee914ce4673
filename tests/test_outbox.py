"""G7 for writes: while the log is away, writes wait in a file. They reach the log once, in order, after any crash."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
import redis
from aiosqlite.context import contextmanager

import mnemobus
from mnemobus import LogUnavailable, Memory, NotCommitted, OutboxError, OutboxFull, OutboxInUse, Settings
from mnemobus.keys import Keyspace
from servers import RedisServer, eventually, spawn, worker_threads

OwnRedis = Callable[..., RedisServer]


def said(text: str, room: str = "r1") -> Memory:
    return Memory(table="messages", room=room, content={"text": text})


@pytest.fixture
def server(own_redis: OwnRedis) -> RedisServer:
    return own_redis()


@pytest.fixture
def settings(settings: Settings, server: RedisServer, tmp_path: Path) -> Settings:
    changes = {"redis_url": server.url, "data_dir": tmp_path / "data", "redis_timeout": 0.5}
    return settings.model_copy(update=changes)


@pytest.fixture
def connect(settings: Settings) -> Callable[..., mnemobus.Bus]:
    return lambda **overrides: mnemobus.connect(**{**settings.model_dump(), **overrides})


def logged(settings: Settings) -> list[str]:
    """The texts of all events in the log, in the order of each partition."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    texts = []
    with redis.Redis.from_url(settings.redis_url, decode_responses=True) as client:
        for partition in range(settings.log_partitions):
            texts += [fields["content"] for _, fields in client.xrange(keys.log(partition))]
    return [text.removeprefix('{"text":"').removesuffix('"}') for text in texts]


def files(settings: Settings) -> list[Path]:
    return sorted((settings.data_dir / "outbox").glob("*.db"))


async def test_g7_what_waits_is_published_as_soon_as_a_heartbeat_finds_redis_back(
    settings: Settings,
    server: RedisServer,
    connect: Callable[..., mnemobus.Bus],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Given a write in the outbox, which is tried again after half a minute
    async with connect(redis_create_retry_interval=30_000) as bus:
        await bus.write(said("0"))
        server.kill()
        assert (await bus.write(said("1"))).outboxed
        await eventually(lambda: "1 writes wait in the outbox" in caplog.text)
        # If Redis is back before, then the outbox does not wait for that
        await asyncio.to_thread(server.start)
        await eventually(lambda: bus.stats().outbox == 0)
        assert sorted(logged(settings)) == ["0", "1"]


async def test_g7_with_redis_away_writes_wait_and_are_published_once_and_in_order(
    settings: Settings, server: RedisServer, connect: Callable[..., mnemobus.Bus]
) -> None:
    with worker_threads(settings):
        async with connect() as bus:
            first = await bus.write(said("0"))
            assert not first.outboxed
            # Given that Redis is gone
            server.kill()
            # When a bus writes, then it says where the write is, and what it wrote last is not forgotten
            receipts = [await bus.write(said(str(n))) for n in range(1, 8)]
            assert all(receipt.outboxed and receipt.version is None for receipt in receipts)
            assert (bus.stats().outbox, bus.stats().outboxed) == (7, 7)
            assert any("7 writes wait in the outbox" in problem for problem in (await bus.health()).problems)
            with pytest.raises(
                LogUnavailable, match="7 writes wait in the outbox: a token can't name them yet"
            ):
                bus.token()
            with pytest.raises(NotCommitted, match="it is in the outbox, and goes on from there"):
                await receipts[0].committed(timeout=0.05)

            # When it is back, and more is written at once
            server.start()
            receipts += [await bus.write(said(str(n))) for n in range(8, 18)]
            for receipt in receipts:
                await receipt.committed(timeout=20)

            # Then all of it is in the log, once, in the order in which it was written, and in the store
            assert logged(settings) == [str(n) for n in range(18)]
            versions = [receipt.version for receipt in [first, *receipts]]
            assert versions == sorted(versions, key=lambda version: version or (0, 0))
            assert await bus.count("messages", room="r1") == 18
            assert bus.stats().outbox == 0
            bus.token()
    assert files(settings) == []


AGENT = """
import asyncio, os, signal, sys
import mnemobus
from mnemobus import Memory

async def main():
    async with mnemobus.connect() as bus:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            receipt = await bus.write(Memory(table="messages", room="r1", content={"text": line.strip()}))
            print(receipt.outboxed, flush=True)

asyncio.run(main())
"""


class Agent:
    """A process that writes what it is told."""

    def __init__(self, settings: Settings, program: str = AGENT, before: Sequence[str] = ()) -> None:
        self.process = spawn(
            [*before, sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings.environment(),
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def write(self, text: str) -> bool:
        """Whether it went to the outbox."""
        self.tell(text)
        return self.hear() == "True"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


async def test_g7_what_a_killed_agent_left_is_published_by_the_next_before_anything_newer(
    settings: Settings, server: RedisServer, connect: Callable[..., mnemobus.Bus]
) -> None:
    # Given agents that wrote with Redis away, and were killed
    alice, bob = Agent(settings), Agent(settings)
    server.kill()
    for n in range(5):
        assert alice.write(f"alice {n}")
        assert bob.write(f"bob {n}")
    alice.kill()
    assert len(files(settings)) == 2
    # When another starts there, while Redis is still away, then it takes what nobody holds, and no more
    async with connect() as bus:
        assert bus.stats().outbox == 5
        assert (await bus.write(said("new"))).outboxed
        # And once Redis is back, the old ones come first
        server.start()
        await eventually(lambda: bus.stats().outbox == 0)
        mine = [text for text in logged(settings) if not text.startswith("bob")]
        assert mine == [*(f"alice {n}" for n in range(5)), "new"]
    await eventually(lambda: len(logged(settings)) == 11)
    await eventually(lambda: not bob.write("bob 5"))  # once its file knows that it is empty
    bob.kill()


async def test_g1_a_call_with_unknown_outcome_is_not_doubled_by_the_outbox(
    settings: Settings, server: RedisServer, connect: Callable[..., mnemobus.Bus]
) -> None:
    async with connect() as bus:
        await bus.write(said("0"))
        # Given a Redis that takes the call, and answers only much later
        server.pause()
        receipt = await bus.write(said("1"))
        assert receipt.outboxed
        # When it goes on, and the outbox makes the same call again
        server.resume()
        await eventually(lambda: bus.stats().outbox == 0)
        # Then there is one event, and the receipt has its version
        assert logged(settings) == ["0", "1"]
        assert receipt.version is not None


DIES = AGENT.replace(
    "async def main",
    """
from mnemobus.log.outbox import OutboxFile

async def answered(self, call):
    os.kill(os.getpid(), signal.SIGKILL)

OutboxFile.answered = answered

async def main""",
)


async def test_g1_a_kill_between_publishing_and_taking_out_doubles_nothing(
    settings: Settings, server: RedisServer, connect: Callable[..., mnemobus.Bus]
) -> None:
    # Given an agent that dies once the log has what it kept, before the file knows
    agent = Agent(settings, DIES)
    server.kill()
    for n in range(3):
        assert agent.write(str(n))
    server.start()
    assert agent.process.wait(20) == -signal.SIGKILL
    assert logged(settings)[:1] == ["0"]
    # When the next starts
    async with connect() as bus:
        await eventually(lambda: bus.stats().outbox == 0)
    # Then all is there, once
    assert logged(settings) == ["0", "1", "2"]


async def test_a_full_outbox_is_a_clear_error_and_nothing_is_half_written(
    settings: Settings, server: RedisServer, connect: Callable[..., mnemobus.Bus]
) -> None:
    async with connect(outbox_max_bytes=2_000) as bus:
        server.kill()
        kept = 0
        with pytest.raises(OutboxFull, match=r"the outbox .* is full \(\d+ writes; .*; nothing was written"):
            while True:
                await bus.write(said("x" * 100))
                kept += 1
        assert kept > 3
        with pytest.raises(OutboxFull):
            await bus.write_many([said("x" * 100) for _ in range(3)])
        assert bus.stats().outbox == kept
        server.start()
        await eventually(lambda: bus.stats().outbox == 0)
        await bus.write(said("y"))
    assert len(logged(settings)) == kept + 1


async def test_a_disk_that_takes_no_more_is_a_clear_error_and_nothing_is_half_written(
    settings: Settings, server: RedisServer, tmp_path: Path
) -> None:
    # Given a file that can't grow beyond what a process may write: as near to a full disk as a test gets
    program = """
import asyncio, resource, signal
import mnemobus
from mnemobus import Memory, OutboxError

def said(text):
    return Memory(table="messages", room="r1", content={"text": text})

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with mnemobus.connect() as bus:
        print("ready", flush=True)
        await asyncio.to_thread(input)
        await bus.write(said("first"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        kept = 1
        try:
            while True:
                await bus.write(said("x" * 1000))
                kept += 1
        except OutboxError as error:
            print(type(error).__name__, error, flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await bus.write(said("last"))
        print(kept + 1, flush=True)
        await asyncio.to_thread(input)

asyncio.run(main())
"""
    agent = Agent(settings, program)
    server.kill()
    agent.tell("")
    error, kept = agent.hear(), int(agent.hear())
    assert error.startswith(("OutboxError the outbox", "OutboxFull the disk of the outbox"))
    assert kept > 2
    # Then what was acknowledged is there, and nothing else
    server.start()
    await eventually(lambda: len(logged(settings)) == kept, timeout=20)
    assert logged(settings)[-1] == "last"
    agent.kill()


def on_a_small_disk(folder: Path, size: str) -> list[str]:
    """What to put before a command so that a folder is a disk of this size to it."""
    folder.mkdir(parents=True)
    mount = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && exec "$@"'
    for user in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *user, "--mount", "sh", "-c", mount, "sh"]
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("can't mount a small disk here: that takes root, or user namespaces")


async def test_g7_a_disk_that_is_full_does_not_keep_writes_from_getting_out(
    settings: Settings, server: RedisServer
) -> None:
    program = """
import asyncio, os
import mnemobus
from mnemobus import Memory, OutboxFull

def said(text):
    return Memory(table="messages", room="r1", content={"text": text})

async def main():
    async with mnemobus.connect() as bus:
        print("ready", flush=True)
        await asyncio.to_thread(input)
        kept = 0
        with open(os.environ["MNEMOBUS_DATA_DIR"] + "/others", "wb") as others:
            for size in (3000, 100):
                try:
                    while True:
                        await bus.write(said(f"{kept} " + "x" * size))
                        kept += 1
                except OutboxFull as error:
                    print(error, flush=True)
            try:
                while True:
                    others.write(bytes(512))
                    others.flush()
            except OSError:
                print(kept, flush=True)
            await asyncio.to_thread(input)
            while bus.stats().outbox:
                await asyncio.sleep(0.05)
            receipt = await bus.write(said("last"))
            print(receipt.outboxed, flush=True)
            await asyncio.to_thread(input)

asyncio.run(main())
"""
    # Given a disk that writes to the outbox have filled, and whatever else was there
    agent = Agent(settings, program, before=on_a_small_disk(settings.data_dir, "8m"))
    server.kill()
    agent.tell("")
    full = agent.hear()
    assert full.startswith("the disk of the outbox ") and full.endswith(" is full; nothing was written")
    assert agent.hear() == full
    kept = int(agent.hear())
    assert kept > 100
    # When Redis is back, then all of it gets out, though the disk is as full as it was, and writes go on
    server.start()
    agent.tell("")
    assert agent.hear() == "False"
    assert [text.partition(" ")[0] for text in logged(settings)] == [*map(str, range(kept)), "last"]
    agent.kill()


async def test_two_buses_on_one_file_are_an_error_at_the_second(
    settings: Settings, connect: Callable[..., mnemobus.Bus], tmp_path: Path
) -> None:
    path = str(tmp_path / "outbox.db")
    async with connect(outbox=path):
        with pytest.raises(OutboxInUse, match=r"the outbox .*outbox\.db is in use by another bus"):
            async with connect(outbox=path):
                pass
        done = subprocess.run(
            [sys.executable, "-c", AGENT],
            env=os.environ | settings.environment() | {"MNEMOBUS_OUTBOX": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "OutboxInUse" in done.stderr
    async with connect(outbox=path):
        pass


async def test_an_outbox_of_another_bus_or_of_none_is_refused(
    connect: Callable[..., mnemobus.Bus], server: RedisServer, settings: Settings, tmp_path: Path
) -> None:
    # Given a file with writes for one bus, configured for another
    path = str(tmp_path / "outbox.db")
    async with connect(outbox=path) as bus:
        server.kill()
        await bus.write(said("x"))
    server.start()
    with pytest.raises(OutboxError, match="it belongs to another bus"):
        async with connect(outbox=path, redis_key_prefix=settings.redis_key_prefix + "2"):
            pass
    # And a file that is no outbox
    Path(path).write_bytes(b"no database at all, but long enough to be looked at" * 40)
    with pytest.raises(OutboxError, match=r"can't be used: file is not a database"):
        async with connect(outbox=path):
            pass


def hindered(folder: Path, how: str) -> Path:
    """A path at which no file can be made."""
    folder.mkdir()
    match how:
        case "below a file":
            (folder / "file").write_text("")
            return folder / "file" / "outbox.db"
        case "a folder":
            (folder / "outbox.db").mkdir()
        case "a link to nowhere":
            (folder / "link").symlink_to(folder / "gone")
            return folder / "link" / "outbox.db"
        case "not ours to write":
            if os.geteuid() == 0:
                pytest.skip("root may write everywhere")
            folder.chmod(0o500)
    return folder / "outbox.db"


HINDERED = ("below a file", "a folder", "a link to nowhere", "not ours to write")


@pytest.mark.parametrize("how", HINDERED)
async def test_a_file_that_can_not_be_made_is_an_error_when_the_bus_opens(
    how: str, connect: Callable[..., mnemobus.Bus], tmp_path: Path
) -> None:
    path = hindered(tmp_path / "x", how)
    with pytest.raises(OutboxError, match=re.escape(f"the outbox {path} can't be used: ")):
        await connect(outbox=str(path)).open()


@pytest.mark.parametrize("how", [how for how in HINDERED if how != "a folder"])
async def test_a_data_directory_that_can_not_be_had_is_told_and_keeps_nobody_from_reading(
    how: str,
    connect: Callable[..., mnemobus.Bus],
    server: RedisServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Given an agent whose outbox could not be made if it were needed
    folder = hindered(tmp_path / "x", how).parent
    async with connect(data_dir=folder / "data", write_timeout=4.0) as bus:
        # Then that is logged when it opens, health() says it, and the agent reads and writes
        assert "writes can't wait in the outbox" in caplog.text
        health = await bus.health()
        [problem] = [problem for problem in health.problems if "can't wait in the outbox" in problem]
        assert "Set MNEMOBUS_DATA_DIR, or MNEMOBUS_OUTBOX" in problem
        assert await bus.recent("messages", room="r1") == []
        await bus.write(said("x"))
        # and with Redis away a write waits as it would without an outbox, and fails with an error of ours
        server.kill()
        began = time.monotonic()
        with pytest.raises(
            LogUnavailable, match=r"may or may not be in the log; and the outbox .* can't be used"
        ):
            await bus.write(said("y"))
        assert time.monotonic() - began > 1.0
    # And where it can be made, nothing is said, and nothing is made before it is needed
    server.start()
    async with connect(data_dir=tmp_path / "new" / "data") as bus:
        assert not any("outbox" in problem for problem in (await bus.health()).problems)
        assert not (tmp_path / "new").exists()


async def test_the_outbox_is_for_nobody_else_whatever_the_umask(
    connect: Callable[..., mnemobus.Bus], server: RedisServer, settings: Settings, tmp_path: Path
) -> None:
    # Given a file that everybody can read, as an older mnemobus left it when it was killed
    async with connect(outbox=str(tmp_path / "old.db")) as bus:
        server.kill()
        await bus.write(said("old"))
    server.start()
    folder = settings.data_dir / "outbox"
    folder.mkdir(parents=True)
    for path in tmp_path.glob("old.db*"):
        path.rename(folder / path.name)
        (folder / path.name).chmod(0o666)
    before = os.umask(0)
    try:
        async with connect() as bus:
            # Then it is closed when it is taken up, and what is made anew is closed from the beginning
            await eventually(lambda: logged(settings) == ["old"])
            server.kill()
            assert (await bus.write(said("new"))).outboxed
            made = [folder, *folder.iterdir()]
            assert len(made) >= 3
            open_to_others = {path.name for path in made if path.stat().st_mode & 0o077}
            assert open_to_others == set()
    finally:
        os.umask(before)


async def test_a_damaged_file_that_is_found_is_left_where_it_is(
    connect: Callable[..., mnemobus.Bus], settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    folder = settings.data_dir / "outbox"
    folder.mkdir(parents=True)
    (folder / "old.db").write_bytes(b"no database at all, but long enough to be looked at" * 40)
    async with connect() as bus:
        await bus.write(said("x"))
    assert "old.db can't be used: file is not a database" in caplog.text
    assert [path.name for path in files(settings)] == ["old.db"]


async def test_a_file_that_its_owner_has_just_made_is_left_to_it(
    connect: Callable[..., mnemobus.Bus],
    settings: Settings,
    server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given a bus whose outbox is made, step by step, while others open
    steps = 0
    execute = aiosqlite.Connection.execute

    @contextmanager
    async def others_open(database: aiosqlite.Connection, statement: str, *more: Any) -> Any:
        nonlocal steps
        if statement.startswith(("PRAGMA", "BEGIN EXCLUSIVE", "CREATE")) and files(settings):
            monkeypatch.setattr(aiosqlite.Connection, "execute", execute)
            async with connect():
                steps += 1
            monkeypatch.setattr(aiosqlite.Connection, "execute", others_open)
        return await execute(database, statement, *more)

    async with connect() as bus:
        server.kill()
        monkeypatch.setattr(aiosqlite.Connection, "execute", others_open)
        # When it writes, then it has a file to write to
        receipt = await bus.write(said("x"))
        assert receipt.outboxed
        assert steps >= 5
        monkeypatch.undo()
        assert len(files(settings)) == 1
        server.start()
        await eventually(lambda: bus.stats().outbox == 0)
    assert logged(settings) == ["x"]


async def test_a_copied_outbox_is_published_under_another_number(
    settings: Settings, server: RedisServer, connect: Callable[..., mnemobus.Bus], tmp_path: Path
) -> None:
    # Given a file that was copied before it was published, and an original that has gone on since
    path, copy = tmp_path / "outbox.db", tmp_path / "copy.db"

    async def write_without_redis(*texts: str) -> None:
        async with connect(outbox=str(path)) as bus:
            await eventually(lambda: bus.stats().outbox == 0)
            server.kill()
            for text in texts:
                await bus.write(said(text))

    await write_without_redis("0", "1")
    shutil.copy(path, copy)
    server.start()
    await write_without_redis("2", "3")
    server.start()
    async with connect(outbox=str(path)) as bus:
        await eventually(lambda: bus.stats().outbox == 0)
    assert logged(settings) == ["0", "1", "2", "3"]
    # When the copy is used, then nothing that is in it gets lost, though it may be written twice
    async with connect(outbox=str(copy)) as bus:
        await eventually(lambda: bus.stats().outbox == 0)
    assert logged(settings) == ["0", "1", "2", "3", "1"]


async def test_without_an_outbox_writes_fail_as_they_did(
    server: RedisServer, connect: Callable[..., mnemobus.Bus]
) -> None:
    async with connect(outbox="off", write_timeout=0.3) as bus:
        server.kill()
        with pytest.raises(
            LogUnavailable, match=r"could not be reached in time .* may or may not be in the log"
        ):
            await bus.write(said("x"))
        assert bus.stats().outbox == 0


async def test_a_synced_write_is_not_taken_for_synced_because_it_is_in_the_outbox(
    own_redis: OwnRedis, settings: Settings
) -> None:
    server = own_redis("--appendfsync", "always")
    settings = settings.model_copy(update={"redis_url": server.url})
    async with mnemobus.connect(**settings.model_dump()) as bus:
        await bus.write(said("0"), durability="synced")
        server.kill()
        with pytest.raises(
            mnemobus.DurabilityUnavailable, match="the write is in the outbox, and will be logged"
        ):
            await bus.write(said("1"), durability="synced")
        server.start()
        await eventually(lambda: bus.stats().outbox == 0)
    assert logged(settings) == ["0", "1"]
