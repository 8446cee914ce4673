"""The heartbeat: once a second, it proves that everything in Redis's feed is applied here, or fetches what is missing.

It does not use the connection that listens, and does not depend on pub/sub:

- It reads the heads of all partitions, in one round trip. If a head is not the position, and pub/sub has not brought
  the messages a moment later, it replays the stream from the position. If the stream no longer reaches back that far,
  or the head lies *before* the position, the partition's buckets are dropped and the head becomes the position.
- A heartbeat moves `LocalCache.fresh_until` on only if it left every position at (or beyond) its head. The new value
  is the moment when the heartbeat *began* plus ``max_staleness``. So a lost message, a half-open connection or a silent
  reconnect costs at most that much (G5), whatever pub/sub does; pub/sub only makes invalidations fast.
- It proves that its server is the one that takes the writes. A server that has become a replica still reports heads,
  but only those that it knows; it may never get what is written elsewhere now. So the last command of each heartbeat is
  a write without effect. A server that refuses it verifies nothing (READONLY, say, or NOREPLICAS: another server may
  be the master by now). A server that only can't write (it is full, or its disk is) and says that it is the master does
  verify: no other server can take writes either.
- A new epoch (Redis restarted, failed over or was flushed) drops everything, and positions are read again.
- It also reads the layout of the log. If that has changed, the live scopes are dropped: no event comes on their
  channels any more. Everything else is independent of the layout: what was in the log before is fanned out.

Each heartbeat also publishes a probe on the bus's own channel, to test the connection that listens (subscription.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from ..cache.l1 import LocalCache, clock
from ..connection.link import Call, Link, parse_info, script
from ..connection.server_errors import AWAY, Unfit, code_of, meaning
from ..connection.transport import Busy, Command
from ..errors import BusClosed, SettingsError
from ..keys import LAYOUT, Version
from ..log.pending import PendingWrites
from .messages import decode_entry
from .positions import HEAD_GRACE, Partition, Positions

if TYPE_CHECKING:
    from ..live.scopes import LiveScopes

logger = logging.getLogger("mnemobus.feed")

REPLAY = 500
"""Messages read at a time when the feed is replayed."""


class Heartbeat:
    """The heartbeat of one bus.

    look_after  called with each heartbeat that has reached Redis: it checks the listening connection
    on_bad      called with channel, content and reason for a stream entry that is not a message
    on_error    called with the error of a failed heartbeat
    """

    def __init__(
        self,
        link: Link,
        local: LocalCache,
        pending: PendingWrites,
        positions: Positions,
        own_channel: bytes,
        look_after: Callable[[], Awaitable[None]],
        on_bad: Callable[[bytes, object, Exception], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._link = link
        self._settings = link.settings
        self._local = local
        self._pending = pending
        self._positions = positions
        self._own_channel = own_channel
        self._look_after = look_after
        self._on_bad = on_bad
        self._on_error = on_error
        self.live: LiveScopes | None = None
        """The live scopes: the same heartbeat verifies them."""
        self._wake = asyncio.Event()
        self._epoch_doubts = 0
        """Messages of another epoch than ours since the last good heartbeat began."""
        self._beaten = asyncio.Condition()
        self._stopped = False
        self.beats = 0
        self.up = False
        """Whether the last heartbeat reached Redis."""
        self.trouble = ""
        """Why it did not reach Redis, or why the server that it reached can't be used; for people."""
        self.refusal = ""
        """Why Redis takes no writes, though it is the master, as the last good heartbeat found; for people."""
        self.on_good: list[Callable[[], None]] = []
        """Called after each good heartbeat."""
        self.last_good = 0.0
        """When, by `clock`, the last good heartbeat began."""
        self.replays = 0
        self.failures = 0

    # When it beats

    async def run(self) -> None:
        """Beat for ever: at the interval, and at each `wake`."""
        interval = self._settings.heartbeat
        retry = self._settings.redis_create_retry_interval / 1000
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(interval if self.up else min(interval, retry)):
                    await self._wake.wait()
            self._wake.clear()
            await self.beat()

    async def beat(self) -> None:
        started = clock()
        doubts = self._epoch_doubts
        try:
            async with asyncio.timeout(self._settings.redis_timeout):
                await self.verify()
        except (*AWAY, RedisError, SettingsError) as error:
            self._on_error(error)
            self.failures += 1
            trouble = meaning(error) if str(error) else "no answer in time"
            if self.up or trouble != self.trouble:
                logger.warning("no heartbeat with Redis at %s: %s", self._link.address, trouble)
            self.up, self.trouble = False, trouble
        else:
            if not self.up and self.trouble:
                logger.info("Redis at %s is back", self._link.address)
            self.up, self.trouble = True, ""
            # Also if the last heartbeat was good: Redis may have been away and back between the two.
            for callback in self.on_good:
                callback()
            self._epoch_doubts -= doubts  # those that came meanwhile are left to the next heartbeat
            self.last_good = started
            self._local.fresh_until = started + self._settings.max_staleness
        self.beats += 1
        async with self._beaten:
            self._beaten.notify_all()

    async def sync(self) -> bool:
        """Wait for a heartbeat that begins now; return whether everything that Redis has is applied here."""
        target = self.beats + 2  # one that began before may be under way
        self._wake.set()
        async with self._beaten:
            while self.beats < target:
                await self._beaten.wait()
                if self._stopped:
                    raise BusClosed("the bus was closed while a token was waited for")
                self._wake.set()
        return self.up

    def wake(self) -> None:
        """Beat now."""
        self._wake.set()

    def doubt_epoch(self) -> None:
        """A message of another epoch came: ask Redis nothing until a heartbeat has read the epoch."""
        self._epoch_doubts += 1
        self._wake.set()

    def suspect(self, error: Exception) -> None:
        """A call could not reach Redis: beat at once, so that other calls need not wait for the same."""
        if self.up and not isinstance(error, Busy):
            self.up, self.trouble = False, meaning(error)
            logger.warning("Redis at %s can't be used: %s", self._link.address, self.trouble)
            self._wake.set()

    @property
    def reachable(self) -> bool:
        """Whether to ask Redis at all. If a heartbeat is overdue, a call would hang, too. If a heartbeat has to read a
        new epoch first, an answer may be of another epoch."""
        return self.up and not self._epoch_doubts and clock() < self._local.fresh_until

    def stop(self) -> None:
        """End all waiting: the bus is being closed."""
        self._stopped = True
        self._wake.set()

    async def close(self) -> None:
        self._stopped = True
        async with self._beaten:
            self._beaten.notify_all()

    # What it does

    async def verify(self) -> None:
        """Compare every position with its head, and catch up; raise if that is impossible."""
        for _ in range(3):
            epoch, laid_out = self._link.epoch, self._link.keys.shape
            # Keep the positions of this moment: a head that is read later and lies before its position shows a loss.
            known = [(p, p.position) for p in self._positions if p.confirmed or p.position is not None]
            commands: list[Command | Call] = [
                ("HGET", self._link.keys.epoch, "epoch"),
                ("HMGET", self._link.keys.layout, *LAYOUT),
                ("PUBLISH", self._own_channel, str(self.beats)),
                *(self.head(p) for p, _ in known),
                self._link.proof(),
            ]
            *replies, proof = await self._link.pipeline(commands, pool=self._link.probe)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            refusal = await self._unwilling(proof) if isinstance(proof, Exception) else ""
            # Another connection may have been faster, and this answer may be out of date: then begin again.
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
                    self._positions.place(partition, head)
                elif before is not None and head < before:
                    self._positions.reset(partition, head)
            await self._catch_up([(partition, head) for partition, _, head in heads])
            if self._pending.in_doubt:
                doubts = self._pending.doubts
                missing = await self._pending.forget_missing()
                if missing:
                    logger.error(
                        "Redis was flushed or lost data: %d writes may be lost with its log", missing
                    )
                self._pending.in_doubt = doubts != self._pending.doubts
            await self._pending.beat()
            if self.live is not None:
                await self.live.verify()
            await self._look_after()
            if epoch == self._link.epoch:
                self._accept(refusal)
                return
        raise TimeoutError("Redis restarts, or is laid out anew, again and again")

    async def _unwilling(self, error: Exception) -> str:
        """Why a server takes no writes although it is the master; raises if it may not be the master."""
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

    async def _catch_up(self, heads: list[tuple[Partition, Version]]) -> None:
        for pause in HEAD_GRACE:
            if not any(p.behind(head) for p, head in heads):
                return
            await asyncio.sleep(pause)
        for partition, head in heads:
            if partition.behind(head):
                await self._replay(partition)
            if partition.behind(head):  # the stream was removed after its head was read
                self._positions.reset(partition, head)

    async def _replay(self, partition: Partition) -> None:
        """Apply the stream's messages after the position."""
        position = self._positions.hold(partition)
        self.replays += 1
        logger.debug("replaying feed partition %d from %s", partition.number, position)
        epoch = self._link.epoch
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
                        self._on_bad(partition.channel, fields, error)
                        self._positions.lose(partition)
                        position = Version.parse(id)
                        continue
                    position = self._positions.replayed(partition, position, message)
                if len(entries) < REPLAY:
                    break
        finally:
            if epoch == self._link.epoch:
                self._positions.place(partition, position)

    def head(self, partition: Partition) -> Call:
        return (script("head"), [self._link.keys.feed(partition.number)], ())
