"""The feed, as a listener hears it: which invalidations there were, and whether all of them were heard.

A feed partition is a short stream and a channel that carry the same messages. Each message has an ID and names the
one before it. For every partition that it listens to, the bus knows its *position*: the ID up to which everything is
applied here.

Invariant: a bucket is live only in a partition whose position is known, and every invalidation of it that is not
yet applied here lies after that position. So it does not matter how messages come, or whether they come at all, as
long as someone goes through the stream from the position on:

- A message whose predecessor is the position is applied and becomes the position. One at or before the position
  was applied already. Any other shows a gap: what it names is dropped at once (that is always safe), the position
  stays, and the heartbeat is called.
- The heartbeat, on another connection, reads the heads of all partitions, in one round trip. Where a head is
  not the position, and pub/sub has not brought it a moment later, it replays the stream from the position. If the
  stream no longer reaches back that far, or the head lies *before* the position, the partition's buckets are
  dropped and the head becomes the position.
- Only a heartbeat that left every position at (or beyond) its head moves `LocalCache.fresh_until` on, to the moment
  the heartbeat *began* plus ``max_staleness``. A lost message, a half-open link or a reconnect without a word thus
  costs at most that much (G5), whatever pub/sub does; pub/sub is what makes it fast.
- A heartbeat proves that it speaks to the server that takes the writes. A server that has become a replica goes on
  telling heads, those that it knows of; what is written elsewhere by now it may never hear. So a write without effect
  goes along with each heartbeat, and is the last of it. What refuses it (READONLY, say, or NOREPLICAS: it may have been
  left behind) verifies nothing. A server that only can't (full, or without room on its disk) and says that it is the
  master does: nobody else can write either.
- A new epoch (Redis restarted, failed over or was flushed) drops everything, and positions are read anew.
- A heartbeat also reads how the log is laid out. Where that has changed, what is held live is of channels on which
  nothing comes any more: it is dropped. All else does not depend on it: what was in the log before is fanned out.

Joining a partition: SUBSCRIBE, its confirmation, then the head as the position; what arrives meanwhile is kept
and goes through the rules above once the position is known. Partitions that hold no bucket for a while are left.

Each heartbeat also publishes a probe on the bus's own channel. A link on which not even the probes arrive is half
open, and is replaced. The same channel brings what `mnemobus verify` asks (see feed/audit.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from ..cache.l1 import LocalCache, clock
from ..connection.link import Call, Link, parse_info, script
from ..connection.server_errors import AWAY, Unfit, code_of, meaning
from ..connection.transport import Busy, Command
from ..errors import AccessDenied, BusClosed, SettingsError
from ..keys import LAYOUT, Version
from ..log.pending import Marks
from ..tasks import end
from .audit import Inquiry, decode_inquiry, encode_holding

if TYPE_CHECKING:
    from ..live.scopes import LiveScopes

logger = logging.getLogger("mnemobus.feed")

REPLAY = 500
"""Messages read at a time when the feed is replayed."""
EARLY = 4_096
"""Messages of a partition that wait at most until its position is known."""
_GRACE = (0.002, 0.005, 0.010)
"""Seconds that a head may be ahead of its position before pub/sub counts as having lost something."""
_LISTEN_PATIENCE = 0.5
"""Seconds that a bus which opens waits to be told that it may listen."""
_ANSWERING = 16
"""Questions that are answered at once; who asks more is not answered."""
_LINGER = 30.0
"""Seconds that a partition without a bucket is still listened to."""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One message of the feed.

    versions  the events that it answers for, of one log partition
    scopes    what they touched, in the feed partition that the message went through
    dead      those of the events that could not be applied, with the reason
    epoch     the one whose shared buckets were dropped
    first_hand
              whether all of them came from this epoch's log, under the versions that it gave them: who follows the log
              knows them. Not of a replay, of requeued letters, nor of workers of an older version.
    last      for each scope the last of the versions that touched it; empty where that is not told
    """

    id: Version
    previous: Version
    log_partition: int
    versions: tuple[Version, ...]
    scopes: tuple[str, ...]
    dead: dict[Version, str]
    epoch: str
    first_hand: bool = False
    last: tuple[Version, ...] = ()


def decode(id: bytes | str, previous: bytes | str, payload: bytes) -> Invalidation:
    """The message of an ID, its predecessor's ID and a JSON payload; ValueError if it is none.

    Payload: {"p": log partition, "e": epoch, "v": [versions], "s": [scopes], "d": {version: reason}, "l": 1,
    "t": [places]}, "d" and "l" only where needed. "t" is there where there is more than one version: for each scope the
    place in "v" of the last version that touched it. "m" is in place of "l" where the log was laid out anew: an older
    agent listens to channels on which nothing comes any more, and has to drop what it holds live.
    """
    body = orjson.loads(payload)
    if not isinstance(body, dict):
        raise ValueError("the payload is no JSON object")
    partition, versions, scopes, dead = body.get("p"), body.get("v"), body.get("s"), body.get("d", {})
    if not isinstance(partition, int) or not isinstance(versions, list) or not isinstance(dead, dict):
        raise ValueError("p, v or d is missing or of another type")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise ValueError("s is no list of scopes")
    epoch = body.get("e", "")
    if not isinstance(epoch, str):
        raise ValueError("e is no epoch")
    named = tuple(Version.parse(str(v)) for v in versions)
    return Invalidation(
        Version.parse(id),
        Version.parse(previous),
        partition,
        named,
        tuple(scopes),
        {Version.parse(str(v)): str(reason) for v, reason in dead.items()},
        epoch,
        1 in (body.get("l"), body.get("m")),
        named * len(scopes) if len(named) == 1 else _last_of(body.get("t", []), named, len(scopes)),
    )


def _last_of(places: object, versions: tuple[Version, ...], count: int) -> tuple[Version, ...]:
    """The versions at these places, one for each scope; none if it is not told."""
    if not places:
        return ()
    if not isinstance(places, list) or len(places) != count:
        raise ValueError("t is no list with a place for each scope")
    if not all(type(place) is int and 0 <= place < len(versions) for place in places):
        raise ValueError("t names a version that is not in v")
    return tuple(versions[place] for place in places)


def decode_message(data: bytes) -> Invalidation:
    """A message of a feed channel: ``<id> <previous id> <payload>``; ValueError if it is none."""
    parts = data.split(b" ", 2)
    if len(parts) != 3:
        raise ValueError("not of the form <id> <previous id> <payload>")
    return decode(*parts)


def decode_entry(id: bytes, fields: Sequence[bytes]) -> Invalidation:
    """An entry of a feed stream; ValueError if it is none."""
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    if b"prev" not in named or b"m" not in named:
        raise ValueError("prev or m is missing")
    return decode(id, named[b"prev"], named[b"m"])


@dataclass(slots=True)
class _Partition:
    """What the bus knows of one feed partition that it listens to."""

    number: int
    channel: bytes
    position: Version | None = None
    """None while the position is being found out; messages wait in `early` then."""
    early: list[Invalidation] = field(default_factory=list)
    confirmed: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    idle_since: float | None = None


class Feed:
    """Listens to the feed for one bus and keeps its L1 in step."""

    def __init__(self, link: Link, local: LocalCache, marks: Marks, bus_id: str) -> None:
        self._link = link
        self._settings = link.settings
        self._local = local
        self._marks = marks
        self._bus_id = bus_id
        self._own_channel = link.keys.agent_channel(bus_id).encode()
        self._layout_channel = link.keys.layout_channel(bus_id).encode()
        self.live: LiveScopes | None = None
        """What is held live: it listens on the same connection, and is verified by the same heartbeat."""
        self._partitions: dict[int, _Partition] = {}
        self._by_channel: dict[bytes, _Partition] = {}
        self._connection: AbstractConnection | None = None
        self._listening_to = ""
        """The run id of the server at its other end."""
        self._heard = clock()
        self._listened = asyncio.Event()
        """Set once we listen, or know why not."""
        self._denied: AccessDenied | None = None
        """What Redis did not let us do when it was last asked."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._epoch_doubts = 0
        """Messages of another epoch than ours since the last good heartbeat began."""
        self._answering = 0
        self._beats = 0
        self._beaten = asyncio.Condition()
        self._stopped = False
        self.up = False
        """Whether the last heartbeat reached Redis."""
        self.trouble = ""
        """Why it did not, or why what it reached is not fit for use, for people."""
        self.refusal = ""
        """Why Redis takes no writes, though it is the master: for people, as the last good heartbeat found it."""
        self.deaf = ""
        """Why there is no connection that listens, for people; empty while there is one."""
        self.on_good: list[Callable[[], None]] = []
        """Called after each good heartbeat."""
        self.last_good = 0.0
        """When, by `clock`, the last good heartbeat began."""
        self.invalidations = 0
        self.gaps = 0
        self.replays = 0
        self.resets = 0
        self.reconnects = 0
        self.bad_messages = 0
        self.failed_heartbeats = 0
        self.restarted_tasks = 0

    # Life

    async def start(self) -> None:
        """Begin to listen and to beat; returns after the first heartbeat, good or not.

        AccessDenied if Redis does not let us do one of them.
        """
        self._link.on_epoch.append(self._on_epoch)
        self._link.on_layout.append(self._on_layout)
        self._link.on_late.append(self._on_late)
        self._link.on_given_up.append(self._on_given_up)
        self._spawn("feed-listen", self._listen)
        await self._beat_once()
        self._spawn("feed-heartbeat", self._beat)
        if self.up:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LISTEN_PATIENCE):
                    await self._listened.wait()
        if self._denied is not None:
            raise self._denied

    async def close(self) -> None:
        self._stopped = True
        await end(self._tasks)
        async with self._beaten:
            self._beaten.notify_all()
        if self._connection is not None:
            with suppress(*AWAY, RedisError):
                await self._connection.disconnect(nowait=True)
        with suppress(ValueError):
            self._link.on_epoch.remove(self._on_epoch)
            self._link.on_layout.remove(self._on_layout)
            self._link.on_late.remove(self._on_late)
            self._link.on_given_up.remove(self._on_given_up)

    def _spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run a task for the life of the feed: if it dies, say so, and start it again."""

        async def supervise() -> None:
            while True:
                try:
                    await work()
                    return
                except Exception:
                    if asyncio._get_running_loop() is None:  # it is being forgotten, together with its loop
                        return
                    self.restarted_tasks += 1
                    logger.exception("%s died; starting it again", name)
                    await asyncio.sleep(self._settings.redis_create_retry_interval / 1000)

        task = asyncio.create_task(supervise(), name=f"mnemobus-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Listening

    async def join(self, number: int, patience: float) -> bool:
        """Whether the bus listens to a feed partition and knows its position; begins to, if it doesn't.

        Waits ``patience`` seconds at most for that; afterwards it goes on in the background.
        """
        partition = self._partitions.get(number)
        if partition is None:
            channel = self._link.keys.feed(number).encode()
            partition = _Partition(number, channel)
            self._partitions[number] = partition
            self._by_channel[channel] = partition
            await self.send("SUBSCRIBE", channel)
        if partition.position is not None:
            return True
        if self.up and patience > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await partition.ready.wait()
        return partition.position is not None

    def joined(self, number: int) -> bool:
        """Whether the bus listens to a feed partition and knows its position."""
        partition = self._partitions.get(number)
        return partition is not None and partition.position is not None

    async def send(self, *command: str | bytes) -> None:
        """Send on the listening connection, if there is one; a new one subscribes to all on its own."""
        connection = self._connection
        if connection is not None:
            # The reader of this connection sees the same, and replaces it. redis-py gives way between finding it open
            # and writing: closed meanwhile, it has nothing to write to (AttributeError).
            with suppress(*AWAY, RedisError, AttributeError):
                await connection.send_command(*command, check_health=False)

    async def _listen(self) -> None:
        """Hold a connection to Redis, subscribed to all partitions, and hear what comes."""
        while True:
            connection = self._link.dedicated()
            try:
                await connection.connect()
                self._heard = clock()
                for partition in self._partitions.values():
                    partition.confirmed = False
                live = [] if self.live is None else self.live.listener.disconnected()
                self._connection = connection
                self._listening_to = "" if self._link.server is None else self._link.server.run_id
                channels = [p.channel for p in self._partitions.values()]
                await self.send("SUBSCRIBE", self._own_channel, self._layout_channel, *channels, *live)
                while True:
                    self._hear(await connection.read_response(timeout=float("inf"), push_request=True))
            except (*AWAY, RedisError, SettingsError) as error:
                self._broke(error)
            finally:
                self.reconnects += self._connection is not None
                self._connection = None
                with suppress(*AWAY, RedisError):
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(self._retry)

    def _broke(self, error: Exception) -> None:
        """There is no listening connection, or none any more."""
        self._note_denial(error)
        self._listened.set()
        said, self.deaf = self.deaf, meaning(error)
        if self.deaf != said:
            logger.warning("the feed's connection to Redis at %s broke: %s", self._link.address, self.deaf)

    def _note_denial(self, error: Exception) -> None:
        explained = self._link.explain(error)
        if isinstance(explained, AccessDenied):
            self._denied = explained

    def _hear(self, reply: Any) -> None:
        """One push of the listening connection; never raises for what it says."""
        self._heard = clock()
        if not isinstance(reply, list) or len(reply) < 3:
            return
        kind, channel, data = reply[:3]
        if kind == b"message":
            partition = self._by_channel.get(channel)
            if partition is None:
                if channel == self._own_channel:
                    if not data.isdigit():
                        self._asked(data)
                elif channel == self._layout_channel:
                    self._wake.set()
                elif self.live is not None:
                    try:
                        self.live.listener.hear(channel, data)
                    except ValueError as error:
                        self._bad(channel, data, error)
                return
            try:
                message = decode_message(data)
            except (ValueError, TypeError) as error:
                self._bad(channel, data, error)
            else:
                self._receive(partition, message)
        elif kind == b"subscribe":
            self.deaf = ""
            self._listened.set()
            partition = self._by_channel.get(channel)
            if partition is not None and not partition.confirmed:
                partition.confirmed = True
                if partition.position is None:
                    self._once(self._settle, partition)
                else:  # again, after a reconnect: what was missed lies after the position
                    self._wake.set()
            elif partition is None and self.live is not None:
                joined = self.live.listener.confirm(channel)
                if joined is not None:
                    self._once(self.live.listener.settle, joined)

    def _bad(self, channel: bytes, data: object, error: Exception) -> None:
        self.bad_messages += 1
        shown = data[:200] if isinstance(data, bytes) else data
        logger.error("a message on %r is not one of the feed: %s: %r", channel.decode(), error, shown)
        self._wake.set()  # if it was one, and spoiled, the stream has it

    def _asked(self, data: bytes) -> None:
        """A question of `mnemobus verify`, or garbage."""
        try:
            inquiry = decode_inquiry(data, self._link.keys)
        except (ValueError, TypeError) as error:
            self._bad(self._own_channel, data, error)
            return
        if self._answering < _ANSWERING:
            self._answering += 1
            self._once(self._answer, inquiry)

    async def _answer(self, inquiry: Inquiry) -> None:
        try:
            partition = self._partitions.get(self._link.keys.feed_partition(inquiry.scope))
            answer = encode_holding(
                self._bus_id,
                inquiry,
                clock() < self._local.fresh_until,
                None if partition is None else partition.position,
                self._local.served(inquiry.scope),
            )
            await self._link.command("PUBLISH", inquiry.reply, answer)
        finally:
            self._answering -= 1

    def _once(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Do something in the background; the heartbeat does what it leaves undone."""

        async def attempt() -> None:
            try:
                await work(*args)
            except (*AWAY, RedisError, SettingsError) as error:
                logger.debug("left to the next heartbeat: %s", error)
            except Exception:
                self.restarted_tasks += 1
                logger.exception("a task of the feed died; the next heartbeat goes on with it")

        task = asyncio.create_task(attempt(), name="mnemobus-feed-settle")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, partition: _Partition) -> None:
        """Find the position of a partition that was just joined."""
        epoch = self._link.epoch
        [head] = await self._link.pipeline([self._head(partition)], pool=self._link.probe)
        if isinstance(head, Exception):
            raise head
        # A heartbeat may have been faster. Then buckets are live already, and what was sent between its answer and
        # this one has yet to be applied: this head must not step over it.
        if epoch == self._link.epoch and not partition.ready.is_set():
            self._place(partition, Version.parse(head))

    def _place(self, partition: _Partition, position: Version) -> None:
        """Give a partition its position, and go through what came before it was known."""
        partition.position = position
        early, partition.early = partition.early, []
        for message in early:
            self._receive(partition, message)
        partition.ready.set()

    def _receive(self, partition: _Partition, message: Invalidation) -> None:
        position = partition.position
        if position is None:
            if len(partition.early) < EARLY:  # what is not kept shows as a gap
                partition.early.append(message)
            self._apply(partition, message)  # a replay may be under way; to drop too much is safe
            return
        if message.id <= position:
            return
        self._apply(partition, message)
        if message.previous == position:
            partition.position = message.id
            return
        self.gaps += 1
        self._wake.set()

    def _apply(self, partition: _Partition, message: Invalidation) -> None:
        self.invalidations += 1
        drop = self._local.drop
        for scope in message.scopes:
            drop(scope)
        # Worker and agent may not have met the same epoch yet. A worker that is behind drops buckets of the one before,
        # says so, and does it again at once. Where this agent is behind, nobody drops the buckets that it knows of: it
        # asks no more for them until a heartbeat has told it better.
        dropped = message.epoch == self._link.epoch
        if message.epoch and not dropped:
            self._epoch_doubts += 1
            self._wake.set()
        if self.live is not None:
            self.live.invalidated(message)
        self._marks.named(
            partition.number, message.log_partition, message.versions, message.dead, dropped=dropped
        )

    # The heartbeat

    async def _beat(self) -> None:
        interval = self._settings.heartbeat
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(interval if self.up else min(interval, self._retry)):
                    await self._wake.wait()
            self._wake.clear()
            await self._beat_once()

    @property
    def _retry(self) -> float:
        return self._settings.redis_create_retry_interval / 1000

    async def _beat_once(self) -> None:
        started = clock()
        doubts = self._epoch_doubts
        try:
            async with asyncio.timeout(self._settings.redis_timeout):
                await self._verify()
        except (*AWAY, RedisError, SettingsError) as error:
            self._note_denial(error)
            self.failed_heartbeats += 1
            trouble = meaning(error) if str(error) else "no answer in time"
            if self.up or trouble != self.trouble:
                logger.warning("no heartbeat with Redis at %s: %s", self._link.address, trouble)
            self.up, self.trouble = False, trouble
        else:
            if not self.up and self.trouble:
                logger.info("Redis at %s is back", self._link.address)
            self.up, self.trouble = True, ""
            # Also where the last one was good: Redis may have been away and come back between the two.
            for callback in self.on_good:
                callback()
            self._epoch_doubts -= doubts  # those that came meanwhile are left to the next one
            self.last_good = started
            self._local.fresh_until = started + self._settings.max_staleness
        self._beats += 1
        async with self._beaten:
            self._beaten.notify_all()

    async def sync(self) -> bool:
        """A heartbeat that begins now: whether everything that Redis has is applied here."""
        target = self._beats + 2  # one may be under way that began before
        self._wake.set()
        async with self._beaten:
            while self._beats < target:
                await self._beaten.wait()
                if self._stopped:
                    raise BusClosed("the bus was closed while a token was waited for")
                self._wake.set()
        return self.up

    def stop(self) -> None:
        """End all waiting: the bus is being closed."""
        self._stopped = True
        self._wake.set()

    def wake(self) -> None:
        """Call the heartbeat."""
        self._wake.set()

    def suspect(self, error: Exception) -> None:
        """A call found Redis away: look at once instead of letting others find out the same."""
        if self.up and not isinstance(error, Busy):
            self.up, self.trouble = False, meaning(error)
            logger.warning("Redis at %s can't be used: %s", self._link.address, self.trouble)
            self._wake.set()

    def _on_given_up(self, refusal: Exception) -> None:
        """Redis takes no writes, so what it says is not to be believed, and where we listen nobody speaks any more."""
        if self.up:  # once: a new connection may lead there again, until one leads elsewhere (see `_follow`)
            self._once(self._reconnect)
        self.suspect(refusal)

    async def _follow(self) -> None:
        """Listen to the server that the bus has come to, if it is another one."""
        server = self._link.server
        if server is not None and server.run_id != self._listening_to:
            await self._reconnect()

    async def _reconnect(self) -> None:
        """Have the listening connection replaced."""
        connection = self._connection
        if connection is not None:
            await connection.disconnect(nowait=True)

    def _head(self, partition: _Partition) -> Call:
        return (script("head"), [self._link.keys.feed(partition.number)], ())

    async def _verify(self) -> None:
        """Compare every position with its head, and bring it there; raises if that can't be done."""
        for _ in range(3):
            epoch, laid_out = self._link.epoch, self._link.keys.shape
            # With the positions as they are now: a head that is read later can't honestly lie before one of them.
            known = [
                (p, p.position) for p in self._partitions.values() if p.confirmed or p.position is not None
            ]
            commands: list[Command | Call] = [
                ("HGET", self._link.keys.epoch, "epoch"),
                ("HMGET", self._link.keys.layout, *LAYOUT),
                ("PUBLISH", self._own_channel, str(self._beats)),
                *(self._head(p) for p, _ in known),
                self._link.proof(),
            ]
            *replies, proof = await self._link.pipeline(commands, pool=self._link.probe)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            refusal = await self._unwilling(proof) if isinstance(proof, Exception) else ""
            # Another connection may have been faster, and this answer may be of before: then begin again.
            if epoch != self._link.epoch or laid_out != self._link.keys.shape:
                continue
            shape = self._link.shape_in(replies[1])
            if replies[0] is None or shape is None:
                await self._link.renew_epoch()
                shape = self._link.keys.shape
            elif (current := self._link.epoch_in(replies[0])) != epoch:
                self._link.enter(current)
            if shape != self._link.keys.shape:
                self._link.lay_out(shape)
                continue
            if epoch != self._link.epoch:  # Redis lost what it knew: begin again
                continue
            heads = [
                (p, before, Version.parse(head)) for (p, before), head in zip(known, replies[3:], strict=True)
            ]
            for partition, before, head in heads:
                if partition.position is None:
                    self._place(partition, head)
                elif before is not None and head < before:
                    self._reset(partition, head)
            await self._catch_up([(partition, head) for partition, _, head in heads])
            if self._marks.in_doubt:
                doubts = self._marks.doubts
                missing = await self._marks.forget_missing()
                if missing:
                    logger.error(
                        "Redis was flushed or lost data: %d writes may be lost with its log", missing
                    )
                self._marks.in_doubt = doubts != self._marks.doubts
            await self._marks.beat()
            if self.live is not None:
                await self.live.verify()
            await self._look_after_link()
            if epoch == self._link.epoch:
                self._accept(refusal)
                return
        raise TimeoutError("Redis restarts, or is laid out anew, again and again")

    async def _unwilling(self, error: Exception) -> str:
        """Why a server takes no writes that is the master nevertheless; raises if it may not be."""
        if code_of(error) not in ("OOM", "MISCONF"):
            raise error
        # Both come before READONLY, so a replica may say the same.
        info = parse_info(await self._link.command("INFO", "replication", pool=self._link.probe))
        if info.get("role") != "master":
            refusal = Unfit(f"Redis at {self._link.address} is no master any more")
            self._link.give_up(refusal)
            raise refusal
        return meaning(error)

    def _accept(self, refusal: str) -> None:
        if refusal and not self.refusal:
            logger.warning("Redis at %s takes no writes: %s", self._link.address, refusal)
        self.refusal = refusal

    async def _catch_up(self, heads: list[tuple[_Partition, Version]]) -> None:
        for pause in _GRACE:
            if not any(_behind(p, head) for p, head in heads):
                return
            await asyncio.sleep(pause)
        for partition, head in heads:
            if _behind(partition, head):
                await self._replay(partition)
            if _behind(partition, head):  # the stream is gone since it told its head
                self._reset(partition, head)

    def _lose(self, partition: _Partition) -> None:
        """Drop all of a partition."""
        self._local.drop_partition(partition.number)
        if self.live is not None:
            self.live.feed_lost(partition.number)

    def _reset(self, partition: _Partition, head: Version) -> None:
        """Drop all of a partition, because what happened between its position and the head is unknown."""
        self.resets += 1
        self._lose(partition)
        partition.position = None
        self._place(partition, head)

    async def _replay(self, partition: _Partition) -> None:
        """Apply what the stream has after the position."""
        position = partition.position
        assert position is not None
        self.replays += 1
        logger.debug("replaying feed partition %d from %s", partition.number, position)
        epoch = self._link.epoch
        partition.position = None  # messages that come meanwhile wait
        try:
            while True:
                entries = await self._link.command(
                    "XRANGE", self._link.keys.feed(partition.number), f"({position}", "+", "COUNT", REPLAY,
                    pool=self._link.probe,
                )  # fmt: skip
                for id, fields in entries:
                    try:
                        message = decode_entry(id, fields)
                    except (ValueError, TypeError) as error:
                        self._bad(partition.channel, fields, error)
                        self._lose(partition)
                        position = Version.parse(id)
                        continue
                    if message.previous != position:  # the stream no longer reaches back
                        self.resets += 1
                        self._lose(partition)
                    self._apply(partition, message)
                    position = message.id
                if len(entries) < REPLAY:
                    break
        finally:
            if epoch == self._link.epoch:
                self._place(partition, position)

    async def _look_after_link(self) -> None:
        silent = clock() - self._heard
        connection = self._connection
        if connection is not None and silent > max(
            3 * self._settings.heartbeat, self._settings.max_staleness
        ):
            logger.warning("nothing was heard from the feed for %.1f s: replacing its connection", silent)
            self._heard = clock()
            await self._reconnect()
        now = clock()
        for partition in list(self._partitions.values()):
            opens = self.live is not None and self.live.opens(partition.number)
            if opens or self._local.holds(partition.number):
                partition.idle_since = None
            elif partition.idle_since is None:
                partition.idle_since = now
            elif now - partition.idle_since > _LINGER:
                del self._partitions[partition.number]
                del self._by_channel[partition.channel]
                await self.send("UNSUBSCRIBE", partition.channel)

    def _on_late(self) -> None:
        self._marks.doubt()
        self._wake.set()

    def _on_epoch(self, epoch: str) -> None:
        """Everything may have changed without a word."""
        self._once(self._follow)
        self._local.clear()
        self._marks.doubt()
        for partition in self._partitions.values():
            partition.position = None
            partition.early.clear()
            partition.ready.clear()
        if self.live is not None:
            self.live.on_epoch()
        self._wake.set()

    def _on_layout(self) -> None:
        """What is held live has to be joined anew. Classic copies may depend on windows that were: they go as well."""
        self._local.clear()
        if self.live is not None:
            self.live.on_layout()
        self._wake.set()

    @property
    def reachable(self) -> bool:
        """Whether to ask Redis at all: a heartbeat that is overdue means that a call would hang, too; and one that is
        yet to tell the epoch, that the answer may be of another."""
        return self.up and not self._epoch_doubts and clock() < self._local.fresh_until

    @property
    def listening(self) -> int:
        """How many feed partitions are listened to."""
        return len(self._partitions)


def _behind(partition: _Partition, head: Version) -> bool:
    return partition.position is not None and partition.position < head
