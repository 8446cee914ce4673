"""The feed, as a listener sees it: the connection that listens, and the effects of each message.

Redis publishes each message of the feed (messages.py) on a channel. The positions (positions.py) decide what a message
means, and whether one is missing. The heartbeat (heartbeat.py) proves that none was missed.

To join a partition: SUBSCRIBE, wait for the confirmation, then take the head as the position. Messages that arrive
meanwhile are kept, and are applied once the position is known. The bus leaves a partition that has held no bucket for
a while.

Each heartbeat also publishes a probe on the bus's own channel. If not even the probes arrive, the connection is half
open, and is replaced. The questions of `mnemobus verify` (audit.py) come on the same channel; the events of live scopes
(live/listener.py) come on other channels.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from ..cache.l1 import LocalCache, clock
from ..connection.link import Link
from ..connection.server_errors import AWAY, meaning
from ..connection.transport import Ear
from ..errors import AccessDenied, SettingsError
from ..keys import Version
from ..log.pending import PendingWrites
from ..tasks import end
from .audit import Inquiry, decode_inquiry, encode_holding
from .heartbeat import Heartbeat
from .messages import Invalidation, decode_message
from .positions import Partition, Positions

if TYPE_CHECKING:
    from ..live.scopes import LiveScopes

logger = logging.getLogger("mnemobus.feed")

_LISTEN_PATIENCE = 0.5
"""Seconds that a bus, when it opens, waits for the confirmation that it listens."""
_ANSWERING = 16
"""Questions that are answered at the same time; others are ignored."""
_PARTITION_LINGER = 30.0
"""Seconds until the bus leaves a partition without a bucket."""


class Feed:
    """Listens to the feed for one bus and keeps its L1 in step."""

    def __init__(self, link: Link, local: LocalCache, pending: PendingWrites, bus_id: str) -> None:
        self._link = link
        self._settings = link.settings
        self._local = local
        self._pending = pending
        self._bus_id = bus_id
        self._own_channel = link.keys.agent_channel(bus_id).encode()
        self._layout_channel = link.keys.layout_channel(bus_id).encode()
        self.positions = Positions(self._apply, self.wake, self._lose)
        self.heartbeat = Heartbeat(
            link,
            local,
            pending,
            self.positions,
            self._own_channel,
            self._look_after,
            self._bad,
            self._note_denial,
        )
        self._ear: Ear | None = None
        """The connection that listens."""
        self._listening_to = ""
        """The run id of the server at its other end."""
        self._heard = clock()
        self._listened = asyncio.Event()
        """Set once the bus listens, or knows why it can't."""
        self._denied: AccessDenied | None = None
        """What Redis did not allow at the last attempt."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._answering = 0
        self.deaf = ""
        """Why no connection listens, for people; empty while one does."""
        self.invalidations = 0
        self.reconnects = 0
        self.bad_messages = 0
        self.restarted_tasks = 0

    @property
    def live(self) -> LiveScopes | None:
        """The live scopes: they use the same connection, and the same heartbeat verifies them."""
        return self.heartbeat.live

    @live.setter
    def live(self, live: LiveScopes) -> None:
        self.heartbeat.live = live

    # Life

    async def start(self) -> None:
        """Begin to listen and to beat; returns after the first heartbeat, good or not.

        AccessDenied if Redis does not allow one of them.
        """
        self._link.on_epoch.append(self._on_epoch)
        self._link.on_layout.append(self._on_layout)
        self._link.on_late.append(self._on_late)
        self._link.on_given_up.append(self._on_given_up)
        self._spawn("feed-listen", self._listen)
        await self.heartbeat.beat()
        self._spawn("feed-heartbeat", self.heartbeat.run)
        if self.heartbeat.up:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LISTEN_PATIENCE):
                    await self._listened.wait()
        if self._denied is not None:
            raise self._denied

    async def close(self) -> None:
        self.heartbeat.stop()
        await end(self._tasks)
        await self.heartbeat.close()
        with suppress(ValueError):
            self._link.on_epoch.remove(self._on_epoch)
            self._link.on_layout.remove(self._on_layout)
            self._link.on_late.remove(self._on_late)
            self._link.on_given_up.remove(self._on_given_up)

    def _spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run a task for the life of the feed. If it dies, log it, and start it again."""

        async def supervise() -> None:
            while True:
                try:
                    await work()
                    return
                except Exception:
                    if asyncio._get_running_loop() is None:  # the loop is gone, and the task with it
                        return
                    self.restarted_tasks += 1
                    logger.exception("%s died; starting it again", name)
                    await asyncio.sleep(self._settings.redis_create_retry_interval / 1000)

        task = asyncio.create_task(supervise(), name=f"mnemobus-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Listening

    async def join(self, number: int, patience: float) -> bool:
        """Listen to a feed partition, if the bus does not yet; return whether it does and knows the position.

        Waits for ``patience`` seconds at most; afterwards the join goes on in the background.
        """
        partition = self.positions.get(number)
        if partition is None:
            channel = self._link.keys.feed(number).encode()
            partition = self.positions.join(number, channel)
            await self.send("SUBSCRIBE", channel)
        if partition.position is not None:
            return True
        if self.heartbeat.up and patience > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await partition.ready.wait()
        return partition.position is not None

    def joined(self, number: int) -> bool:
        """Whether the bus listens to a feed partition and knows its position."""
        partition = self.positions.get(number)
        return partition is not None and partition.position is not None

    async def send(self, *command: str | bytes) -> None:
        """Send on the listening connection, if there is one; a new one subscribes to everything by itself."""
        if self._ear is not None:
            self._ear.send(*command)

    async def _listen(self) -> None:
        """Hold a connection to Redis that is subscribed to all partitions, and handle its messages."""
        while True:
            connection = self._link.dedicated()
            try:
                await connection.connect()
                self._heard = clock()
                for partition in self.positions:
                    partition.confirmed = False
                live = [] if self.live is None else self.live.listener.disconnected()
                self._ear = ear = Ear(connection, self._hear)
                self._listening_to = "" if self._link.server is None else self._link.server.run_id
                channels = [p.channel for p in self.positions]
                await self.send("SUBSCRIBE", self._own_channel, self._layout_channel, *channels, *live)
                await ear.ended
            except (*AWAY, RedisError, SettingsError) as error:
                self._broke(error)
            finally:
                if self._ear is not None:
                    self.reconnects += 1
                    self._ear.cut()
                    self._ear = None
                with suppress(*AWAY, RedisError):
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(self._settings.redis_create_retry_interval / 1000)

    def _broke(self, error: Exception) -> None:
        """The listening connection is lost, or could not be made."""
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
        """Handle one push of the listening connection. No content makes this raise."""
        self._heard = clock()
        if not isinstance(reply, list) or len(reply) < 3:
            return
        kind, channel, data = reply[:3]
        if kind == b"message":
            partition = self.positions.of(channel)
            if partition is None:
                if channel == self._own_channel:
                    if not data.isdigit():
                        self._asked(data)
                elif channel == self._layout_channel:
                    self.wake()
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
                self.positions.receive(partition, message)
        elif kind == b"subscribe":
            self.deaf = ""
            self._listened.set()
            partition = self.positions.of(channel)
            if partition is not None and not partition.confirmed:
                partition.confirmed = True
                if partition.position is None:
                    self._once(self._settle, partition)
                else:  # again, after a reconnect: what was missed lies after the position
                    self.wake()
            elif partition is None and self.live is not None:
                joined = self.live.listener.confirm(channel)
                if joined is not None:
                    self._once(self.live.listener.settle, joined)

    def _bad(self, channel: bytes, data: object, error: Exception) -> None:
        self.bad_messages += 1
        shown = data[:200] if isinstance(data, bytes) else data
        logger.error("a message on %r is not one of the feed: %s: %r", channel.decode(), error, shown)
        self.wake()  # if it was a message, and was damaged, the stream has it

    def _asked(self, data: bytes) -> None:
        """A question of `mnemobus verify`, or an invalid message."""
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
            partition = self.positions.get(self._link.keys.feed_partition(inquiry.scope))
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
        """Run a task once, in the background. If it fails, the heartbeat does the work later."""

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

    async def _settle(self, partition: Partition) -> None:
        """Find the position of a partition that was just joined."""
        epoch = self._link.epoch
        [head] = await self._link.pipeline([self.heartbeat.head(partition)], pool=self._link.probe)
        if isinstance(head, Exception):
            raise head
        # A heartbeat may have been faster. Then buckets are in use already, and the messages between its answer and
        # this one are not applied yet: this head must not skip them.
        if epoch == self._link.epoch and not partition.ready.is_set():
            self.positions.place(partition, Version.parse(head))

    def _apply(self, partition: Partition, message: Invalidation) -> None:
        self.invalidations += 1
        drop = self._local.drop
        for scope in message.scopes:
            drop(scope)
        # Worker and agent may not know the same epoch yet. A worker that is behind drops buckets of the epoch before,
        # says so, and does it again at once. If this agent is behind, no worker drops the buckets that the agent uses:
        # it does not read them until a heartbeat has read the new epoch.
        dropped = message.epoch == self._link.epoch
        if message.epoch and not dropped:
            self.heartbeat.doubt_epoch()
        if self.live is not None:
            self.live.invalidated(message)
        self._pending.named(
            partition.number, message.log_partition, message.versions, message.dead, dropped=dropped
        )

    # The heartbeat, for other modules

    def wake(self) -> None:
        """Beat now."""
        self.heartbeat.wake()

    async def sync(self) -> bool:
        """Wait for a heartbeat that begins now; return whether everything that Redis has is applied here."""
        return await self.heartbeat.sync()

    def suspect(self, error: Exception) -> None:
        """A call could not reach Redis."""
        self.heartbeat.suspect(error)

    @property
    def reachable(self) -> bool:
        """Whether to ask Redis at all; see `Heartbeat.reachable`."""
        return self.heartbeat.reachable

    def stop(self) -> None:
        """End all waiting: the bus is being closed."""
        self.heartbeat.stop()

    # The connection

    def _on_given_up(self, refusal: Exception) -> None:
        """Redis takes no writes. So its answers do not count, and no worker publishes where this bus listens."""
        if (
            self.heartbeat.up
        ):  # once: a new connection may lead there again, until one leads elsewhere (see `_follow`)
            self._reconnect()
        self.suspect(refusal)

    def _follow(self) -> None:
        """Listen to the server that the bus is connected to now, if it is not the same one."""
        server = self._link.server
        if server is not None and server.run_id != self._listening_to:
            self._reconnect()

    def _reconnect(self) -> None:
        """Cut the listening connection; a new one replaces it."""
        if self._ear is not None:
            self._ear.cut()

    def _lose(self, partition: Partition) -> None:
        """Drop all of a partition."""
        self._local.drop_partition(partition.number)
        if self.live is not None:
            self.live.feed_lost(partition.number)

    async def _look_after(self) -> None:
        silent = clock() - self._heard
        if self._ear is not None and silent > max(3 * self._settings.heartbeat, self._settings.max_staleness):
            logger.warning("nothing was heard from the feed for %.1f s: replacing its connection", silent)
            self._heard = clock()
            self._reconnect()
        now = clock()
        for partition in self.positions:
            opens = self.live is not None and self.live.opens(partition.number)
            if opens or self._local.holds(partition.number):
                partition.idle_since = None
            elif partition.idle_since is None:
                partition.idle_since = now
            elif now - partition.idle_since > _PARTITION_LINGER:
                self.positions.leave(partition)
                await self.send("UNSUBSCRIBE", partition.channel)

    def _on_late(self) -> None:
        self._pending.doubt()
        self.wake()

    def _on_epoch(self, epoch: str) -> None:
        """Everything may have changed without a message."""
        self._follow()
        self._local.clear()
        self._pending.doubt()
        self.positions.forget()
        if self.live is not None:
            self.live.on_epoch()
        self.wake()

    def _on_layout(self) -> None:
        """Live scopes have to be joined again. Classic copies may depend on the old windows: they are dropped, too."""
        self._local.clear()
        if self.live is not None:
            self.live.on_layout()
        self.wake()

    @property
    def listening(self) -> int:
        """How many feed partitions are listened to."""
        return len(self.positions)
