"""Connections to Redis, and what has to be known about the server before one is used.

Every connection, of every pool, begins with the same handshake. It asks the server for its run id: one round
trip. A run id that this process has not met means that the server restarted, failed over or was restored, and
may have lost its last second. Then, on that very connection and before anything else is sent on it:

1. the eviction policy is checked: under ``allkeys-*`` Redis may drop the log, and is refused;
2. the layout (how many partitions) is agreed on: whoever is configured differently is refused;
3. the epoch is agreed on. An unseen run id begins a new one; the first to say so names it.

L2 buckets carry the epoch in their key, so what was cached before a restart is out of reach after it. An
epoch that changes while a command is on its way makes that command's keys those of the old epoch: whoever put
an epoch into keys compares it with ``link.epoch`` once the answer is there, and starts again if it differs.

redis-py would repeat a command that timed out ten times without a word; here that is off. What may be
repeated is decided where it is known to be safe.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib import resources
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection, BlockingConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, OutOfMemoryError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from .errors import SettingsError, UnsafeRedis
from .keys import Keyspace
from .settings import POLICIES, Settings, hide_password
from .tasks import end

logger = logging.getLogger("mnemobus.connection")

Argument = str | bytes | int | float
Command = tuple[Argument, ...]

AWAY = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError, TimeoutError)
"""What a Redis that can't be reached looks like."""


class Busy(redis.exceptions.ConnectionError):
    """All connections of the pool were in use for too long: too much is asked at once, which is no sign that Redis is
    away."""


def is_full(error: ResponseError) -> bool:
    """Whether Redis refuses for lack of memory; 6.2 says so of a script in other words."""
    return isinstance(error, OutOfMemoryError) or "OOM command not allowed" in str(error)


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of the package. Its head says what its keys and arguments are."""

    name: str
    source: str
    sha: str

    def flagged(self, flags: str) -> Script:
        """The script with flags that Redis 7 and later understand, such as "allow-oom"."""
        return _script(self.name, f"#!lua flags={flags}\n{self.source}")


@cache
def script(name: str) -> Script:
    """The script in ``lua/<name>.lua`` of this package."""
    source = resources.files("mnemobus").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return _script(name, source)


@cache
def _script(name: str, source: str) -> Script:
    return Script(name, source, sha1(source.encode(), usedforsecurity=False).hexdigest())


Call = tuple[Script, Sequence[str], Sequence[Argument]]
"""A script with its KEYS and ARGV."""


def evalsha(call: Call) -> Command:
    """The command that runs a script which the server has."""
    which, keys, args = call
    return ("EVALSHA", which.sha, len(keys), *keys, *args)


def evaluate(call: Call) -> Command:
    """The command that runs a script whether or not the server has it."""
    which, keys, args = call
    return ("EVAL", which.source, len(keys), *keys, *args)


@dataclass(frozen=True, slots=True)
class Server:
    """What a Redis server says of itself.

    name              "redis" or "valkey"
    version           of that product, for people
    speaks            the version of Redis whose commands it has
    run_id            new with every start of the server process
    policy            its maxmemory-policy
    max_memory        bytes, 0 for no limit
    aof, fsync_always whether it has an append-only file, and writes it before it answers
    replicas          how many are connected
    """

    name: str
    version: str
    speaks: tuple[int, int]
    run_id: str
    policy: str
    max_memory: int
    aof: bool
    fsync_always: bool
    replicas: int

    def __str__(self) -> str:
        return f"{'Valkey' if self.name == 'valkey' else 'Redis'} {self.version}"


def parse_info(reply: Any) -> dict[str, str]:
    """The fields of an INFO reply."""
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)
    pairs = (line.partition(":") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


class _Link:
    """What the asynchronous and the threaded link share: settings, keys, handshake, epoch."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
        self.server: Server | None = None
        self.epoch = ""
        """The epoch in force, as far as this process knows; empty before the first connection."""
        self.on_epoch: list[Callable[[str], None]] = []
        """Called, with the new epoch, whenever it changed; never for the first."""

    @property
    def address(self) -> str:
        """Where Redis is, without its password."""
        return hide_password(self.settings.redis_url)

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = dict(redis.asyncio.connection.parse_url(settings.redis_url))
        options.pop("connection_class", None)
        if settings.redis_password is not None:
            options["password"] = settings.redis_password
        if settings.redis_db is not None:
            options["db"] = settings.redis_db
        options.update(
            protocol=settings.redis_protocol,
            decode_responses=False,
            socket_timeout=settings.redis_timeout,
            socket_connect_timeout=settings.redis_create_timeout / 1000,
            driver_info=None,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        return options

    def handshake(self) -> Generator[Command, Any, None]:
        """The commands that open every connection, as a dialogue: yields one, is sent the reply."""
        info = parse_info((yield ("INFO", "server")))
        run_id = info.get("run_id", "")
        if not run_id:
            raise SettingsError(
                f"{self.address} does not tell its run_id in INFO server: is it a Redis server?"
            )
        if self.server is not None and run_id == self.server.run_id:
            return
        yield from self.meet(info)

    def meet(self, info: dict[str, str]) -> Generator[Command, Any, None]:
        """Check a server process that is new to this one, and agree with everyone on layout and epoch."""
        info = info | parse_info((yield ("INFO", "memory")))
        info |= parse_info((yield ("INFO", "persistence")))
        info |= parse_info((yield ("INFO", "replication")))
        try:
            reply = yield ("CONFIG", "GET", "appendfsync")
            fsync_always = b"always" in (reply.values() if isinstance(reply, dict) else reply)
        except ResponseError:  # managed servers hide CONFIG; then nothing is promised
            fsync_always = False
        server = _server(info, fsync_always)
        if server.policy not in POLICIES:
            raise UnsafeRedis(
                f"Redis at {self.address} has maxmemory-policy {server.policy}, under which it may evict the"
                " log. Set it to noeviction or volatile-lru:  redis-cli CONFIG SET maxmemory-policy noeviction"
                "  (and in redis.conf)"
            )
        yield from self.agree(server.run_id)
        self.server = server

    def agree(self, run_id: str) -> Generator[Command, Any, None]:
        """Agree with everyone who uses this prefix on layout and epoch."""
        mine = (self.keys.log_partitions, self.keys.feed_partitions)
        reply = yield evaluate((script("layout"), [self.keys.layout], mine))
        theirs = tuple(int(n) for n in reply)
        if theirs != mine:
            names = ("MNEMOBUS_LOG_PARTITIONS", "MNEMOBUS_FEED_PARTITIONS")
            wrong = [
                f"{n} is {m} here but {t} there"
                for n, m, t in zip(names, mine, theirs, strict=True)
                if m != t
            ]
            raise SettingsError(
                f"the bus {self.keys.prefix!r} at {self.address} is laid out differently: {'; '.join(wrong)}."
                " Partition counts can't change while a bus is in use: set it to what is there,"
                " or use another REDIS_KEY_PREFIX"
            )
        reply = yield evaluate((script("epoch"), [self.keys.epoch], (run_id, secrets.token_hex(6))))
        self.enter(reply.decode())

    def enter(self, epoch: str) -> None:
        """Take an epoch that somebody else began."""
        before, self.epoch = self.epoch, epoch
        if before and before != epoch:
            logger.warning("Redis at %s restarted or lost data: epoch %s begins", self.address, epoch)
            for callback in self.on_epoch:
                callback(epoch)

    def explain(self, error: Exception) -> Exception:
        """A refused login as the SettingsError that it is; any other error as it is."""
        if isinstance(error, AuthenticationError) or "NOAUTH" in str(error) or "WRONGPASS" in str(error):
            return SettingsError(f"Redis at {self.address} refuses the login: {error}. Set REDIS_PASSWORD")
        return error


def _server(info: dict[str, str], fsync_always: bool) -> Server:
    major, minor, *_ = (*info.get("redis_version", "0.0").split("."), "0", "0")
    valkey = "valkey_version" in info
    return Server(
        name="valkey" if valkey else "redis",
        version=info["valkey_version"] if valkey else info.get("redis_version", "?"),
        speaks=(int(major), int(minor)),
        run_id=info["run_id"],
        policy=info.get("maxmemory_policy", "noeviction"),
        max_memory=int(info.get("maxmemory", 0)),
        aof=info.get("aof_enabled") == "1",
        fsync_always=fsync_always and info.get("aof_enabled") == "1",
        replicas=int(info.get("connected_slaves", 0)),
    )


class Pool(BlockingConnectionPool):
    """A pool that keeps at least ``minimum`` connections and closes what was idle for too long.

    A `reap` that somebody calls every now and then does both.
    """

    def __init__(self, *, minimum: int, idle: float, destroy: float, **options: Any) -> None:
        super().__init__(**options)
        self._minimum = minimum
        self._idle = idle
        self._destroy = destroy
        self._released: dict[AbstractConnection, float] = {}

    @property
    def size(self) -> int:
        """Connections that there are, idle or in use."""
        return len(self._available_connections) + len(self._in_use_connections)

    async def get_connection(
        self, command_name: Any = None, *keys: Any, **options: Any
    ) -> AbstractConnection:
        connection: AbstractConnection
        try:
            connection = await super().get_connection()  # type: ignore[no-untyped-call]
        except redis.exceptions.ConnectionError as error:
            if isinstance(error.__cause__, TimeoutError) and str(error) == "No connection available.":
                raise Busy(
                    f"all {self.max_connections} connections were in use for {self.timeout:g} s (REDIS_POOL_MAX,"
                    " REDIS_ACQUIRE_TIMEOUT)"
                ) from None
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        self._released[connection] = asyncio.get_running_loop().time()
        await super().release(connection)

    async def reap(self) -> None:
        """Close idle connections down to the minimum, and open up to it."""
        limit = asyncio.get_running_loop().time() - self._idle
        for connection in list(self._available_connections):
            if self.size <= self._minimum:
                break
            if self._released.get(connection, 0.0) <= limit and connection in self._available_connections:
                self._available_connections.remove(connection)
                self._released.pop(connection, None)
                await self.destroy(connection)
        held = []
        try:
            while (
                self.size < self._minimum
            ):  # idle ones are taken first, so all are held until there are enough
                held.append(await self.get_connection())
        finally:
            for connection in held:
                await self.release(connection)

    async def destroy(self, connection: AbstractConnection) -> None:
        """Close a connection; after the time for that, without waiting for the server."""
        try:
            async with asyncio.timeout(self._destroy):
                await connection.disconnect()
        except (TimeoutError, *AWAY):
            with suppress(*AWAY):
                await connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        for connection in [*self._available_connections, *self._in_use_connections]:
            await self.destroy(connection)
        self._released.clear()


class Link(_Link):
    """The bus's link to Redis. Every method raises one of AWAY if Redis can't be reached."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._class = redis.asyncio.connection.parse_url(settings.redis_url).get(
            "connection_class", redis.asyncio.Connection
        )
        self.pool = Pool(
            minimum=settings.redis_pool_min,
            idle=settings.redis_idle_timeout / 1000,
            destroy=settings.redis_destroy_timeout / 1000,
            max_connections=settings.redis_pool_max,
            timeout=settings.redis_acquire_timeout / 1000,
            **self._connection_options(),
        )
        self.client = redis.asyncio.Redis(connection_pool=self.pool)
        # The heartbeat must not wait behind a busy pool: what it measures is the link, not the load.
        self.probe = redis.asyncio.Redis(
            connection_pool=BlockingConnectionPool(
                max_connections=4, timeout=settings.redis_timeout, **self._connection_options()
            )
        )
        self._reaper: asyncio.Task[None] | None = None

    def _connection_options(self) -> dict[str, Any]:
        options = self._options()
        options["connection_class"] = self._class
        options["retry"] = redis.asyncio.retry.Retry(NoBackoff(), 0)
        options["redis_connect_func"] = self._on_connect
        return options

    async def _on_connect(self, connection: AbstractConnection) -> None:
        try:
            await connection.on_connect()
            await self._converse(connection, self.handshake())
        except RedisError as error:
            await connection.disconnect(nowait=True)
            raise self.explain(error) from error.__cause__
        except BaseException:  # a cancelled or refused handshake leaves no half-open connection
            await connection.disconnect(nowait=True)
            raise

    @staticmethod
    async def _converse(connection: AbstractConnection, dialogue: Generator[Command, Any, None]) -> None:
        with suppress(StopIteration):
            command = next(dialogue)
            while True:
                await connection.send_command(*command, check_health=False)
                try:
                    reply = await connection.read_response()
                except ResponseError as error:
                    command = dialogue.throw(error)
                else:
                    command = dialogue.send(reply)

    def dedicated(self) -> AbstractConnection:
        """A connection of its own, not yet connected, for who must hear when it breaks (the feed)."""
        options = self._connection_options()
        options.pop("connection_class")
        options.pop("maint_notifications_config")
        connection: AbstractConnection = self._class(**options)
        return connection

    async def start(self) -> None:
        """Begin to look after the pool."""
        self._reaper = asyncio.create_task(self._reap(), name="mnemobus-pool-reaper")

    async def _reap(self) -> None:
        interval = self.settings.redis_reap_interval / 1000
        while True:
            try:
                await self.pool.reap()
            except (RedisError, SettingsError, *AWAY) as error:
                logger.debug("can't keep %d connections ready: %s", self.settings.redis_pool_min, error)
            except Exception:
                logger.exception("looking after the connection pool failed; going on")
            await asyncio.sleep(interval)

    async def close(self) -> None:
        await end([self._reaper])
        await self.pool.aclose()
        with suppress(*AWAY):
            await self.probe.connection_pool.aclose()

    async def run(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run one script, and load it first where the server doesn't have it."""
        call = (script(name), keys, args)
        try:
            return await self.client.execute_command(*evalsha(call))
        except NoScriptError:
            return await self.client.execute_command(*evaluate(call))

    async def pipeline(
        self, commands: Sequence[Command | Call], client: redis.asyncio.Redis | None = None
    ) -> list[Any]:
        """Commands and scripts in one round trip; the answers in order, errors among them as values."""
        client = client or self.client
        replies = await self._pipeline(client, [_command(c, evalsha) for c in commands])
        missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            again = await self._pipeline(client, [_command(commands[i], evaluate) for i in missing])
            for i, reply in zip(missing, again, strict=True):
                replies[i] = reply
        return replies

    @staticmethod
    async def _pipeline(client: redis.asyncio.Redis, commands: Sequence[Command]) -> list[Any]:
        async with client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute(raise_on_error=False)

    async def renew_epoch(self) -> None:
        """Agree anew on layout and epoch, because they are gone from Redis (it was flushed)."""
        server = self.server
        assert server is not None
        connection = await self.pool.get_connection()
        try:
            await self._converse(connection, self.agree(server.run_id))
        finally:
            await self.pool.release(connection)


def _command(item: Command | Call, form: Callable[[Call], Command]) -> Command:
    return form(item) if isinstance(item[0], Script) else item


class ThreadedLink(_Link):
    """The workers' link to Redis: the same handshake, for threads. Raises one of AWAY as `Link` does."""

    def __init__(self, settings: Settings, connections: int) -> None:
        super().__init__(settings)
        options = self._options()
        cls = redis.connection.parse_url(settings.redis_url).get("connection_class", redis.Connection)
        self.client = redis.Redis(
            connection_pool=redis.BlockingConnectionPool(
                connection_class=cls,
                max_connections=connections,
                timeout=settings.redis_acquire_timeout / 1000,
                retry=redis.retry.Retry(NoBackoff(), 0),
                redis_connect_func=self._on_connect,
                **options,
            )
        )

    def _on_connect(self, connection: Any) -> None:
        try:
            connection.on_connect()
            self._converse(connection, self.handshake())
        except RedisError as error:
            connection.disconnect()
            raise self.explain(error) from error.__cause__
        except BaseException:
            connection.disconnect()
            raise

    @staticmethod
    def _converse(connection: Any, dialogue: Generator[Command, Any, None]) -> None:
        with suppress(StopIteration):
            command = next(dialogue)
            while True:
                connection.send_command(*command, check_health=False)
                try:
                    reply = connection.read_response()
                except ResponseError as error:
                    command = dialogue.throw(error)
                else:
                    command = dialogue.send(reply)

    def close(self) -> None:
        self.client.close()
        self.client.connection_pool.disconnect()

    def run(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run one script, and load it first where the server doesn't have it."""
        call = (script(name), keys, args)
        try:
            return self.client.execute_command(*evalsha(call))
        except NoScriptError:
            return self.client.execute_command(*evaluate(call))

    def pipeline(self, commands: Sequence[Command | Call]) -> list[Any]:
        """Commands and scripts in one round trip; the answers in order, errors among them as values."""
        replies = self._pipeline([_command(c, evalsha) for c in commands])
        missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            again = self._pipeline([_command(commands[i], evaluate) for i in missing])
            for i, reply in zip(missing, again, strict=True):
                replies[i] = reply
        return replies

    def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        with self.client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return pipe.execute(raise_on_error=False)
