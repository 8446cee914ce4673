"""The embedded Redis: a server process that mnemobus starts itself."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError

from .. import password, private
from ..errors import EmbeddedServerError
from ..password import LOOPBACK
from ..settings import Settings, hide_password
from .binary import Binary, find_server
from .processes import STOP_TIMEOUT, end_process, log_tail, spawn

logger = logging.getLogger("mnemobus.embedded")

START_TIMEOUT = 15.0
"""Seconds that Redis may take to answer."""
_REFUSED = (
    "-config +config|get -debug -module -acl +acl|whoami +acl|log -replicaof -slaveof -migrate -shutdown"
)
"""Forbidden over the network, even with the password: to write files elsewhere, load code, replicate another server."""


def with_port(url: str, port: int) -> str:
    """A Redis URL with another port."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or "127.0.0.1"
    return urlunsplit(parts._replace(netloc=f"{login}{at}{host}:{port}"))


class EmbeddedRedis:
    """A Redis server that mnemobus starts, at ``settings.redis_url``, with its data under ``data_dir``/redis.

    It is bound to the loopback interface and has an append-only file. The settings give the password, the memory limit
    and the eviction policy (noeviction by default). If they give no password, it gets a generated one (password.py):
    only users who can read the data directory can connect. And no client can make it write elsewhere, load code, or
    change its configuration.
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
        options = dict(parse_qsl(parts.query))
        self.password = (
            settings.redis_password or unquote(parts.password or "") or options.get("password", "")
        )
        self.has_own_password = not self.password
        """Whether it generates its password, and stores it in the data directory."""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Its address without the password, to show to people."""
        parts = urlsplit(self.settings.redis_url)
        if self.settings.redis_db is not None:
            parts = parts._replace(path=f"/{self.settings.redis_db}", query="")
        return urlunsplit(parts._replace(netloc=self.address))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start it and wait until it answers. EmbeddedServerError, with what to do, if it can't."""
        binary = self.binary = find_server()
        await self._refuse_occupied()
        private.make_folder(self._dir)
        private.close_tree_to_others(self._dir)
        private.make_file(self.log)
        if binary.name == "Redis" and binary.version < (7,) and (self._dir / "appendonlydir").exists():
            # 6.2 looks for its append-only file elsewhere, and would start empty.
            raise EmbeddedServerError(
                f"the data in {self._dir} was written by Redis 7 or newer, and {binary.path} is {binary}, which"
                " can't read it. Put the newer one on the PATH, or set MNEMOBUS_DATA_DIR"
            )
        if self.has_own_password and not self.password:
            self.password = password.generate(self.settings)
        # The configuration goes through standard input: `ps` must not show the password.
        process = await spawn(
            [str(binary.path), "-"],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=self._dir,
            umask=private.MASK,
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
        lines["user"] = f"default on #{sha256(self.password.encode()).hexdigest()} ~* &* +@all {_REFUSED}"
        if self.binary is not None and self.binary.speaks_seven:
            lines |= dict.fromkeys(
                ("enable-protected-configs", "enable-debug-command", "enable-module-command"), "no"
            )
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
            password=self.password or password.find(self.settings),
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
                # The time that this takes depends on the size of the data; Redis is still loading.
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
        """Wait until the process ends, for whatever reason; return its exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """Stop it; it writes its data to disk first. Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            await end_process(process, STOP_TIMEOUT)

    def forget_password(self) -> None:
        """It won't be started again: remove the generated password."""
        if self.has_own_password:
            self.password = ""
            password.forget(self.settings)


def _quote(text: str) -> str:
    r"""An argument of a Redis configuration line: in quotes, with escapes such as ``"\x41"`` where they are needed."""
    return (
        '"'
        + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in text.encode())
        + '"'
    )
