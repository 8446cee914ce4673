"""Connections to Redis, and the checks of a server before a connection is used.

Every connection, of every pool, begins with the same handshake. It asks the server for its role and its run id: one
round trip. A replica is refused: its data may be old, and it takes no writes. It counts as away, because it may become
the master, or the address may lead to another server soon. If a server becomes a replica, the first answer that says so
(server_errors.py) ends its connection, and all others: new connections find the new master.

A run id that this process does not know means that the server restarted, failed over or was restored, and may have lost
its last second. A server that was a replica meanwhile may have lost more: it took over its master's data. Then the
process does the following, on the same connection and before it sends anything else:

1. It checks the eviction policy: under ``allkeys-*`` Redis may drop the log, and is refused. 2. It agrees on the layout
   (how many partitions). The layout in Redis counts, not the configured one; a process that is configured for another
   number of feed partitions is refused. 3. It agrees on the epoch. A new run id, or a new promotion, begins a new
   epoch; the first process to see it names it.

L2 buckets carry the epoch in their key, so nobody finds, after a restart, what was cached before it. If the epoch
changes while a command is on its way, the command used keys of the old epoch. So a caller that used an epoch in a key
compares it with ``link.epoch`` once it has the answer, and starts again if they differ.

The log's layout may change while a bus is in use (`mnemobus repartition`). The log refuses a writer that knows an old
layout; the heartbeat and the workers' upkeep look for a new one. They take it (`lay_out`), and go on.

redis-py would repeat a command that timed out, up to ten times, and tell nobody. This is switched off here: only a
caller that knows that it is safe repeats a command.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha1
from importlib import resources
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from .. import password
from ..errors import AccessDenied, SettingsError, UnsafeRedis
from ..keys import Keyspace, Shape
from ..settings import POLICIES, Settings, hide_password
from ..tasks import end
from .server_errors import AWAY, PASSING, REPLACED, SENSELESS, Unfit, code_of, meaning
from .transport import Argument, BlockingWire, BlockingWires, Command, Pool, Wire

logger = logging.getLogger("mnemobus.connection")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of the package. The comment at its beginning explains its keys and arguments."""

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
    """The command that runs a script which the server knows already."""
    which, keys, args = call
    return ("EVALSHA", which.sha, len(keys), *keys, *args)


def evaluate(call: Call) -> Command:
    """The command that runs a script even if the server does not know it."""
    which, keys, args = call
    return ("EVAL", which.source, len(keys), *keys, *args)


@dataclass(frozen=True, slots=True)
class Server:
    """What a Redis server reports about itself.

    name              "redis" or "valkey"
    version           of that product, for people
    speaks      the version of Redis whose commands it knows
    run_id            new with every start of the server process
    promotion         new whenever it becomes the master, having been a replica; empty if it never was, or forgot
    policy            its maxmemory-policy
    max_memory        bytes, 0 for no limit
    aof, fsync_always whether it has an append-only file, and writes it before it answers
    replicas          how many are connected
    """

    name: str
    version: str
    speaks: tuple[int, int]
    run_id: str
    promotion: str
    policy: str
    max_memory: int
    aof: bool
    fsync_always: bool
    replicas: int

    def __str__(self) -> str:
        return f"{'Valkey' if self.name == 'valkey' else 'Redis'} {self.version}"


_TRANSPORTS = {
    "redis": (redis.asyncio.Connection, redis.Connection),
    "rediss": (redis.asyncio.SSLConnection, redis.SSLConnection),
    "unix": (redis.asyncio.UnixDomainSocketConnection, redis.UnixDomainSocketConnection),
}
"""By the scheme of a URL: the connection classes for asyncio, and for threads."""


def _address(url: str) -> tuple[tuple[type[Any], type[Any]], dict[str, Any]]:
    """The classes of its connections, and their options. SettingsError if the URL can't be used."""
    classes = _TRANSPORTS[url.partition(":")[0].lower()]
    options: dict[str, Any] = {}
    try:
        options = dict(redis.asyncio.connection.parse_url(url))
        options.pop("connection_class", None)
        for cls in classes:
            cls(**options, driver_info=None)  # else its version is read from a file, each time
    except (TypeError, ValueError, AttributeError, RedisError) as error:
        named = [name for name in options if f"'{name}'" in str(error)]
        what = f"?{named[0]}= is not an option of such a connection; leave it out" if named else error
        raise SettingsError(f"REDIS_URL: {what}") from None
    return classes, options


def parse_info(reply: Any) -> dict[str, str]:
    """The fields of an INFO reply."""
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)
    pairs = (line.partition(":") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


class _Link:
    """The parts that the asynchronous and the threaded link share: settings, keys, handshake, epoch."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
        self.server: Server | None = None
        self.give_way_at = 0.0
        """When, by the cache's clock, L2 may be asked again to make room for the log."""
        self.epoch = ""
        """The epoch in force, as far as this process knows; empty before the first connection."""
        self.on_epoch: list[Callable[[str], None]] = []
        """Called, with the new epoch, whenever it changed; never for the first."""
        self.on_layout: list[Callable[[], None]] = []
        """Called whenever the log's layout in `keys` has changed."""
        self.laid_out = False
        """Whether the log's layout was read from Redis."""
        self.on_late: list[Callable[[], None]] = []
        """Called when the epoch of the log's answer to a write differs from that of the request."""
        self._class, self._address = _address(settings.redis_url)

    @property
    def address(self) -> str:
        """The address of Redis, without its password."""
        return hide_password(self.settings.redis_url)

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options = dict(self._address)
        word = settings.redis_password or password.find(settings)
        if word is not None:
            options["password"] = word
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
        """The commands that open every connection, as a dialogue: it yields a command, and receives the reply."""
        info = parse_info((yield ("INFO",)))
        run_id, role = info.get("run_id", ""), info.get("role", "")
        if not run_id:
            raise SettingsError(
                f"{self.address} does not tell its run_id in INFO server: is it a Redis server?"
            )
        if info.get("redis_mode") == "sentinel":
            raise SettingsError(
                f"Redis at {self.address} is a Sentinel, which is not supported: set REDIS_URL to the address of the"
                " master itself"
            )
        if role in ("slave", "replica"):
            where = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
            raise Unfit(f"Redis at {self.address} is a replica, of {where}, and takes no writes")
        known = self.server
        if known is None or run_id != known.run_id or _promotion(info) not in ("", known.promotion):
            yield from self.meet(info)

    def meet(self, info: dict[str, str]) -> Generator[Command, Any, None]:
        """Check a server process that this process did not know, and agree with all others on layout and epoch."""
        try:
            reply = yield ("CONFIG", "GET", "appendfsync")
            fsync_always = b"always" in (reply.values() if isinstance(reply, dict) else reply)
        except ResponseError:  # managed servers hide CONFIG; then the policy is unknown
            fsync_always = False
        server = _server(info, fsync_always)
        if server.policy not in POLICIES:
            raise UnsafeRedis(
                f"Redis at {self.address} has maxmemory-policy {server.policy}, under which it may evict the"
                " log. Set it to noeviction or volatile-lru:  redis-cli CONFIG SET maxmemory-policy noeviction"
                "  (and in redis.conf)"
            )
        yield from self.agree(server)
        self.server = server

    def agree(self, server: Server) -> Generator[Command, Any, None]:
        """Agree on layout and epoch with all who use this prefix."""
        shape = self.keys.shape
        while True:
            meters = map(self.keys.meter, shape.current)
            arguments = (self.keys.feed_partitions, shape.first, secrets.token_hex(6))
            *numbers, life = yield evaluate((script("layout"), [self.keys.layout, *meters], arguments))
            feed, first, count, oldest = map(int, numbers)
            if feed != self.keys.feed_partitions:
                raise SettingsError(
                    f"the bus {self.keys.prefix!r} at {self.address} is laid out differently: MNEMOBUS_FEED_PARTITIONS"
                    f" is {self.keys.feed_partitions} here but {feed} there. The feed's partitions can't change while a"
                    " bus is in use: set it to what is there, or use another REDIS_KEY_PREFIX"
                )
            known, shape = shape, Shape(first, count, oldest, str(life, "ascii"))
            if known[:2] == shape[:2]:
                break
        self.lay_out(shape)
        reply = yield evaluate(
            (script("epoch"), [self.keys.epoch], (server.run_id, secrets.token_hex(6), server.promotion))
        )
        self.enter(self.epoch_in(reply))

    def epoch_in(self, reply: Any) -> str:
        """The epoch in Redis's answer; SettingsError if it is not an epoch."""
        try:
            return str(reply, "ascii")
        except SENSELESS as error:
            raise self.senseless(error) from error

    def shape_in(self, reply: Any) -> Shape | None:
        """The log's layout in Redis's answer to HMGET of `LAYOUT`; None if there is none; SettingsError if it is not a
        layout."""
        try:
            return Shape.read(reply)
        except SENSELESS as error:
            raise self.senseless(error) from error

    def senseless(self, error: Exception) -> SettingsError:
        """The message for one of SENSELESS."""
        return SettingsError(
            f"Redis at {self.address} answers what makes no sense ({error}): is it another kind of server, or does"
            f" other software use keys with the prefix {self.keys.prefix!r} (REDIS_KEY_PREFIX)?"
        )

    def enter(self, epoch: str) -> None:
        """Enter an epoch that another process began."""
        before, self.epoch = self.epoch, epoch
        if before and before != epoch:
            logger.warning("Redis at %s restarted or lost data: epoch %s begins", self.address, epoch)
            for callback in self.on_epoch:
                callback(epoch)

    def lay_out(self, shape: Shape) -> None:
        """Take over the log's present layout."""
        configured = self.settings.log_partitions
        if not self.laid_out and shape.size != configured:
            logger.info(
                "the log of the bus %r has %d partitions; MNEMOBUS_LOG_PARTITIONS (%d here) counts for a new bus only",
                self.keys.prefix,
                shape.size,
                configured,
            )
        before, self.keys.shape = self.keys.shape, shape
        if self.laid_out and before.current != shape.current:
            logger.info(
                "the log of the bus %r has a new layout: %d partitions instead of %d",
                self.keys.prefix,
                shape.size,
                before.size,
            )
        self.laid_out = True
        if before.current != shape.current:
            for callback in self.on_layout:
                callback()

    def proof(self) -> Command:
        """A write without effect: only a server that takes writes carries it out."""
        return ("HSETNX", self.keys.layout, "log_partitions", self.keys.log_partitions)

    def explain(self, error: Exception) -> Exception:
        """Translate an error of connecting or of the handshake: to a SettingsError if an operator must act, else to one
        of AWAY."""
        if isinstance(error, SettingsError):
            return error
        code = code_of(error)
        told = f"Redis at {self.address} can't be used: {meaning(error)}"
        if code in ("NOAUTH", "WRONGPASS"):
            hint = ""
            if not password.has_password(self.settings):
                hint = "; or set MNEMOBUS_DATA_DIR as `mnemobus up` has it, which keeps its password there"
            return AccessDenied(
                f"Redis at {self.address} refuses the login: {error}. Set REDIS_PASSWORD{hint}"
            )
        if code == "NOPERM":
            return AccessDenied(told)
        if code == "OOM" or (code in PASSING and code not in ("MOVED", "ASK")):
            return Unfit(told)
        return error if isinstance(error, AWAY) else SettingsError(told)


def _promotion(info: dict[str, str]) -> str:
    """The name of a server's last promotion: the replication history that it followed until then."""
    history = info.get("master_replid2", "")
    return history if history.strip("0") else ""


def _server(info: dict[str, str], fsync_always: bool) -> Server:
    major, minor, *_ = (*re.findall(r"\d+", info.get("redis_version", "")), "0", "0")
    valkey = "valkey_version" in info
    return Server(
        name="valkey" if valkey else "redis",
        version=info["valkey_version"] if valkey else info.get("redis_version", "?"),
        speaks=(int(major), int(minor)),
        run_id=info["run_id"],
        promotion=_promotion(info),
        policy=info.get("maxmemory_policy", "noeviction"),
        max_memory=int(info.get("maxmemory", 0)),
        aof=info.get("aof_enabled") == "1",
        fsync_always=fsync_always and info.get("aof_enabled") == "1",
        replicas=int(info.get("connected_slaves", 0)),
    )


class Link(_Link):
    """The bus's link to Redis. Every method raises one of AWAY if Redis can't be reached, and a SettingsError if it
    can't be used until somebody repairs it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.on_given_up: list[Callable[[Exception], None]] = []
        """Called when connections were cut because their server said that it takes no writes."""
        self.pool = Pool(
            self._connect,
            on_refusal=self.give_up,
            timeout=settings.redis_timeout,
            minimum=settings.redis_pool_min,
            maximum=settings.redis_pool_max,
            acquire=settings.redis_acquire_timeout / 1000,
            idle=settings.redis_idle_timeout / 1000,
            destroy=settings.redis_destroy_timeout / 1000,
        )
        self.probe = Pool(
            self._connect,
            on_refusal=self.give_up,
            timeout=settings.redis_timeout,
            maximum=4,
            acquire=settings.redis_timeout,
        )
        """For the heartbeat, which must not wait for a busy pool: it measures the link, not the load."""
        self._reaper: asyncio.Task[None] | None = None

    async def _connect(self) -> Wire:
        connection = self.dedicated()
        await connection.connect()
        return Wire(connection)

    def give_up(self, refusal: Exception) -> None:
        """All connections lead to a server that takes no writes: cut them. New ones may lead to another."""
        self.pool.renew()
        self.probe.renew()
        for callback in self.on_given_up:
            callback(refusal)

    async def _on_connect(self, connection: AbstractConnection) -> None:
        try:
            await connection.on_connect()
            await self._converse(connection, self.handshake())
        except RedisError as error:
            await connection.disconnect(nowait=True)
            raise self.explain(error) from error.__cause__
        except SENSELESS as error:
            await connection.disconnect(nowait=True)
            raise self.senseless(error) from error
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
        """A connection of its own, not yet connected, for a caller that must hear when it breaks (the feed)."""
        options = self.options()
        options["redis_connect_func"] = self._on_connect
        connection: AbstractConnection = options.pop("connection_class")(**options)
        return connection

    def options(self) -> dict[str, Any]:
        """The class and the options with which redis-py opens a connection; without this module's handshake."""
        options = self._options()
        options["connection_class"] = self._class[0]
        options["retry"] = redis.asyncio.retry.Retry(NoBackoff(), 0)
        options.pop("maint_notifications_config")  # for a client of redis-py, not for a connection
        return options

    async def start(self) -> None:
        """Begin to maintain the pool."""
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
        await self.pool.close()
        await self.probe.close()

    async def command(self, *command: Argument, pool: Pool | None = None) -> Any:
        """The reply to one command; raises the error that Redis answers."""
        [reply] = await (pool or self.pool).execute([command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def run(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run one script, and load it first where the server doesn't have it."""
        call = (script(name), keys, args)
        try:
            return await self.command(*evalsha(call))
        except NoScriptError:
            return await self.command(*evaluate(call))

    async def pipeline(self, commands: Sequence[Command | Call], pool: Pool | None = None) -> list[Any]:
        """Commands and scripts in one round trip; the answers in order, errors among them as values."""
        pool = pool or self.pool
        replies = await pool.execute([_command(c, evalsha) for c in commands])
        missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            again = await pool.execute([_command(commands[i], evaluate) for i in missing])
            for i, reply in zip(missing, again, strict=True):
                replies[i] = reply
        return replies

    async def renew_epoch(self) -> None:
        """Agree again on layout and epoch, because Redis has lost them (it was flushed)."""
        server = self.server
        assert server is not None
        connection = self.dedicated()
        try:
            await connection.connect()
            await self._converse(connection, self.agree(server))
        finally:
            await connection.disconnect(nowait=True)


def _command(item: Command | Call, form: Callable[[Call], Command]) -> Command:
    return form(item) if isinstance(item[0], Script) else item


def _giving_up(base: type[Any]) -> type[Any]:
    """A class of connections that are replaced, once given back, when their server said that it takes no writes."""

    class GivingUp(base):  # type: ignore[misc]
        def read_response(self, *args: Any, **options: Any) -> Any:
            try:
                return super().read_response(*args, **options)
            except RedisError as error:
                if code_of(error) in REPLACED:
                    self.mark_for_reconnect()
                raise

    return GivingUp


class ThreadedLink(_Link):
    """The workers' link to Redis: the same handshake, for threads. Raises as `Link` does.

    client: redis-py's, for rare questions; the commands of each batch go over this package's own wires
    """

    def __init__(self, settings: Settings, connections: int) -> None:
        super().__init__(settings)
        options = self._options()
        options |= {"retry": redis.retry.Retry(NoBackoff(), 0), "redis_connect_func": self._on_connect}
        made: Callable[..., Any] = _giving_up(self._class[1])
        self._made: Callable[[], Any] = partial(made, **options)
        self.client = redis.Redis(
            connection_pool=redis.BlockingConnectionPool(
                connection_class=made,
                max_connections=connections,
                timeout=settings.redis_acquire_timeout / 1000,
                **options,
            )
        )
        self._wires = BlockingWires(self._connect)

    def _connect(self) -> BlockingWire:
        connection = self._made()
        connection.connect()
        return BlockingWire(connection, self.settings.redis_timeout)

    def _on_connect(self, connection: Any) -> None:
        # An embedded server has another password each time that it is started; the pool has that of the first.
        connection.password = password.find(self.settings) or connection.password
        try:
            connection.on_connect()
            self._converse(connection, self.handshake())
        except RedisError as error:
            connection.disconnect()
            raise self.explain(error) from error.__cause__
        except SENSELESS as error:
            connection.disconnect()
            raise self.senseless(error) from error
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
        self._wires.close()
        self.client.close()
        self.client.connection_pool.disconnect()

    def command(self, *command: Argument) -> Any:
        """The reply to one command, as it came; raises the error that Redis answers."""
        [reply] = self._wires.execute([command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def run(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run one script, and load it first where the server doesn't have it."""
        call = (script(name), keys, args)
        try:
            return self.command(*evalsha(call))
        except NoScriptError:
            return self.command(*evaluate(call))

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
        return self._wires.execute(commands)
