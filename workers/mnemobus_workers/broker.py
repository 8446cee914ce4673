"""The broker: Dramatiq on consumer groups of Redis Streams.

All log partitions that a process serves are one Dramatiq queue, and one Dramatiq message is one batch: the events that
have gathered in them, up to a number of events and of bytes. One read asks for all of them, and one transaction commits
them. No batch waits to be filled: an idle bus delivers one event at once, a busy one hundreds together. While a batch
is being applied, the next is read, and may be applied at the same time: the result in the store does not depend on the
order of batches.

Delivered entries stay *pending* in the consumer group until they are acknowledged. That comes last, with the fan-out
(apply.py). Consequences:

- A worker that dies leaves its entries pending. Others look for entries that have been idle for ``claim_idle`` and
  claim them. A live worker *renews* (upkeep.py) its entries, however long it takes. Redis's wall clock measures the
  idle times; unmoved.py finds the entries that this clock hides after it was set back.
- A failed batch is not acknowledged, and no longer renewed: it comes back the same way. Dramatiq would acknowledge a
  message whose actor raised (only its Retries middleware marks it failed, and that re-enqueues, which a batch can't
  be), so `BatchProxy` marks itself.
- Entries that were delivered several times come one by one, so that an event which kills its worker stands alone; in
  the end it becomes a dead letter.
- At shutdown a worker hands back the batches that it has not begun, and those that wait for a store or a Redis that is
  away. Their entries get an idle time so large that others claim them at once. This does not count as a delivery: no
  event becomes a dead letter because workers were restarted often. - A log partition that can't be read (somebody put
  something else there) is set aside for a moment, and the others go on.

Dramatiq prefetches messages; here a message is a batch, and a process holds at most one for each of its threads, and
two where it has one thread.

If Redis is away, this module waits for it, in fractions of a second; Dramatiq would restart its consumer after three.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import dramatiq
from dramatiq.errors import QueueNotFound
from dramatiq.middleware import Middleware
from redis.exceptions import RedisError, ResponseError

from mnemobus.connection.link import Call, ThreadedLink, script
from mnemobus.connection.server_errors import AWAY, code_of, is_away, meaning
from mnemobus.connection.transport import Command
from mnemobus.errors import MnemobusError
from mnemobus.keys import APPLY_GROUP, LAYOUT
from mnemobus.settings import Settings

from .fanout import FanOut
from .report import State
from .standing import Standing
from .unmoved import Unmoved

logger = logging.getLogger("mnemobus.broker")

ACTOR = "apply"
QUEUE = "log"
HELD_BATCHES = 2
"""A process may hold at least this many batches: one to work on, and the next one."""
ALONE_AFTER = 3
"""Deliveries after which an event comes in a batch of its own."""
DEAD_AFTER = 20
"""Deliveries after which it becomes a dead letter."""
_FIRST_GUESS = 64 << 10
"""The assumed bytes of an entry before any has been read."""
_HANDED_OVER = 7 * 86_400_000
"""The idle time in ms of an entry that any worker may claim."""
_ASIDE = 1.0
"""Seconds for which a log partition that can't be read is left alone."""

Entry = tuple[bytes, list[bytes]]
"""An ID, and field names and values, alternating."""
Parts = dict[int, list[Entry]]
"""Entries by log partition; none is empty."""


class Stopping(Exception):
    """The worker shuts down while a batch waits for the store or for Redis; the batch is left to others."""


class Batch:
    """Entries that were delivered together.

    epoch     the one that this process knew before it read them
    hopeless  why its only entry must not be tried again, or None
    """

    __slots__ = ("epoch", "hopeless", "parts")

    def __init__(self, parts: Parts, epoch: str, hopeless: str | None = None) -> None:
        self.parts = parts
        self.epoch = epoch
        self.hopeless = hopeless

    @property
    def entries(self) -> list[Entry]:
        return [entry for entries in self.parts.values() for entry in entries]

    def ids(self) -> dict[int, list[bytes]]:
        """The IDs of its entries, by log partition."""
        return {partition: [id for id, _ in entries] for partition, entries in self.parts.items()}

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __repr__(self) -> str:
        where = (
            f"log partition {partition} ({entries[0][0].decode()} to {entries[-1][0].decode()})"
            for partition, entries in self.parts.items()
        )
        return f"<{len(self)} events of {', '.join(where)}>"


class BatchProxy(dramatiq.MessageProxy):
    """A batch as Dramatiq passes it around; marks itself failed if applying it raised."""

    def __init__(self, batch: Batch) -> None:
        # Stopping is not a failure: the log needs no traceback of it.
        options = {"throws": Stopping}
        partition, [(first, _), *_] = next(iter(batch.parts.items()))
        id = f"{partition}:{first.decode()}"
        super().__init__(dramatiq.Message(QUEUE, ACTOR, (batch,), {}, options, message_id=id))
        self.batch = batch
        self.stopped = False
        self.error: BaseException | None = None

    def stuff_exception(self, exception: BaseException) -> None:
        super().stuff_exception(exception)
        self.stopped = isinstance(exception, Stopping)
        self.error = exception
        self.fail()


class StreamBroker(dramatiq.Broker):
    """Delivers the entries of the log. Nothing can be enqueued: agents write the log through a bus."""

    def __init__(self, settings: Settings, middleware: list[Middleware] | None = None) -> None:
        super().__init__(middleware=middleware or [])
        self.settings = settings
        # The consumer has one connection while it waits; worker threads and upkeep have others.
        self.link = ThreadedLink(settings, connections=64)
        self.consumer_name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.queues: dict[str, None] = {}
        self.held = Held()
        self.standing: Standing | None = None
        """Whether this process may take batches; None: it may."""
        self.stopping = threading.Event()
        """Set once the worker shuts down: nothing waits any more."""
        self.state = State()
        """What this process reports about itself."""

    def partitions(self) -> Sequence[int]:
        """The log partitions that this process serves now. They may change: ask again before each round.

        These are all that it knows (see `look_at_layout`), also those that take no more writes: their dead letters may
        be requeued.
        """
        return self.link.keys.shape.all

    def look_at_layout(self) -> None:
        """Find out whether the log was repartitioned. Raises if Redis can't be asked."""
        shape = self.link.shape_in(self.link.command("HMGET", self.link.keys.layout, *LAYOUT))
        if shape is not None:  # else Redis was flushed: the next process to connect writes the layout
            self.link.lay_out(shape)

    def declare_queue(self, queue_name: str) -> None:
        if queue_name in self.queues:
            return
        self.emit_before("declare_queue", queue_name)
        self.queues[queue_name] = None
        self.emit_after("declare_queue", queue_name)

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 1000) -> StreamConsumer:
        """A consumer of the log. It waits ``timeout`` ms for an event, or less if sockets time out earlier."""
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        return StreamConsumer(self, timeout)

    def enqueue(self, message: dramatiq.Message[Any], *, delay: int | None = None) -> dramatiq.Message[Any]:
        """Always a TypeError."""
        raise TypeError("this broker delivers mnemobus's log and nothing else: write through a bus instead")

    def hand_back(self, batch: Batch, *, begun: bool) -> None:
        """Let others claim a batch at once. They keep the entries that they have claimed already.

        A batch that was not begun counts as not delivered. If Redis is away, this is logged, and others claim the batch
        later.
        """
        try:
            self._set_idle([batch], _HANDED_OVER, int(not begun))
        except (RedisError, MnemobusError, *AWAY) as error:
            logger.warning("%r could not be handed back, and will be claimed: %s", batch, error)

    def renew(self) -> None:
        """Keep others from claiming what this process holds."""
        self._set_idle(self.held.batches(), 0, 0)

    def _set_idle(self, batches: Sequence[Batch], idle: int, undelivered: int) -> None:
        calls: list[Call] = [
            (
                script("renew"),
                [self.link.keys.log(partition)],
                [APPLY_GROUP, self.consumer_name, idle, undelivered, *ids],
            )
            for batch in batches
            for partition, ids in batch.ids().items()
        ]
        errors = (
            [reply for reply in self.link.pipeline(calls) if isinstance(reply, Exception)] if calls else []
        )
        if errors:
            raise errors[0]

    def close(self) -> None:
        self.link.close()


class Held:
    """The batches that this process holds. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._batches: dict[int, Batch] = {}
        self.most = HELD_BATCHES

    def add(self, batch: Batch) -> None:
        with self._lock:
            self._batches[id(batch)] = batch

    def drop(self, batch: Batch) -> None:
        with self._lock:
            self._batches.pop(id(batch), None)
            self._lock.notify_all()

    def batches(self) -> list[Batch]:
        with self._lock:
            return list(self._batches.values())

    def ids(self) -> set[tuple[int, bytes]]:
        """Log partitions and IDs of all entries."""
        return {
            (partition, id)
            for batch in self.batches()
            for partition, ids in batch.ids().items()
            for id in ids
        }

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until another batch may be taken. Returns whether it may."""
        with self._lock:
            return self._lock.wait_for(lambda: len(self._batches) < self.most, timeout)


class BatchSize:
    """How many entries to ask for, so that a batch stays within its number of bytes. The last entries' sizes tell."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mean = float(_FIRST_GUESS)

    @property
    def count(self) -> int:
        return max(1, min(self._settings.batch_size, int(self._settings.batch_bytes / self._mean)))

    def saw(self, entries: Sequence[Entry]) -> None:
        some = entries[:: max(1, len(entries) // 16)]
        mean = sum(len(field) for _, fields in some for field in fields) / len(some)
        self._mean = max(64.0, 0.5 * self._mean + 0.5 * mean, mean)


class StreamConsumer(dramatiq.Consumer):
    """Reads batches from the log: new ones, and from time to time those of a worker that died."""

    def __init__(self, broker: StreamBroker, timeout: int) -> None:
        self._broker = broker
        self._link = broker.link
        self._settings = broker.settings
        self._timeout = timeout / 1000
        # A read that blocks longer than the socket would time out on its own connection.
        self._block = max(1, min(timeout, int(self._settings.redis_timeout * 500)))
        self._claim_every = self._settings.claim_idle / 10
        self._claim_next = 0.0
        self._unmoved = Unmoved(
            broker.link, self._settings.claim_idle, broker.held.most * self._settings.batch_size
        )
        self._size = BatchSize(broker.settings)
        self._everyone = FanOut(broker.settings, broker.link)
        self._away = 0
        self._aside: dict[int, float] = {}
        """Log partitions that can't be read, and when to try them again."""

    def __next__(self) -> BatchProxy | None:
        standing = self._broker.standing
        if standing is not None and standing.refused:
            self._broker.stopping.wait(self._timeout)
            return None
        if not self._broker.held.wait_for_room(self._timeout):
            return None
        try:
            batch = self._next()
        except (MnemobusError, RedisError, *AWAY) as error:
            self._wait_out(error)
            return None
        if self._away:
            logger.info("the log: Redis is back")
            self._away = 0
            self._broker.state.goes_on("the log")
        if batch is None:
            return None
        self._broker.held.add(batch)
        return BatchProxy(batch)

    def _wait_out(self, error: Exception) -> None:
        self._away += 1
        self._broker.state.waits("the log", error)
        if self._away == 1:
            logger.warning("the log can't be read, trying until it can: %s", meaning(error))
        time.sleep(min(1.0, 0.05 * 2 ** min(self._away, 5)))

    def _next(self) -> Batch | None:
        now = time.monotonic()
        if now >= self._claim_next:
            batch = self._claim()
            if batch is not None:
                return batch  # and look for more before waiting for new ones
            self._claim_next = now + self._claim_every
        return self._read()

    # Which log partitions

    def _served(self) -> list[int]:
        """Log partitions that can be read, as far as this process knows."""
        partitions = self._broker.partitions()
        if not self._aside:
            return list(partitions)
        now = time.monotonic()
        return [p for p in partitions if self._aside.get(p, now) <= now]

    def _trouble(self, partition: int, error: Exception) -> None:
        """Handle a log partition that can't be read while others can: make its consumer group, or set it aside."""
        if code_of(error) == "NOGROUP":
            try:
                self._make_group(partition)
                return
            except ResponseError as why:
                if is_away(why):
                    raise
                error = why
        elif not isinstance(error, ResponseError) or is_away(error):
            raise error
        what = f"log partition {partition}"
        if partition not in self._aside:
            logger.error("%s can't be read, the others go on: %s", what, meaning(error))
        self._broker.state.waits(what, error)
        self._aside[partition] = time.monotonic() + _ASIDE

    def _fine(self, partition: int) -> None:
        if self._aside.pop(partition, None) is not None:
            logger.info("log partition %d can be read again", partition)
            self._broker.state.goes_on(f"log partition {partition}")

    def _make_group(self, partition: int) -> None:
        """Make the consumer group, from the log's beginning; also after Redis lost it. A partition that was given up
        gets none."""
        self._broker.look_at_layout()
        if partition not in self._broker.partitions():
            return
        try:
            self._link.run("group", [self._link.keys.log(partition)], [APPLY_GROUP])
            logger.info("log partition %d: made the consumer group %r", partition, APPLY_GROUP)
        except ResponseError as error:
            if code_of(error) != "BUSYGROUP":  # else another worker was faster
                raise

    # New events

    def _read(self) -> Batch | None:
        block = max(1, min(self._block, int(1000 * (self._claim_next - time.monotonic()))))
        partitions = self._served()
        if not partitions:
            self._broker.stopping.wait(block / 1000)
            return None
        epoch = self._link.epoch
        # COUNT is for each stream. The share that a quiet one does not use goes to others. Those that have ended
        # have next to nothing.
        count = max(1, self._size.count // self._link.keys.log_partitions)
        try:
            parts = self._found(partitions, self._link.command(*self._command(partitions, count, block)))
        except ResponseError as error:
            if is_away(error):
                raise
            parts = self._read_each(partitions, count)
        else:
            if self._aside:
                for partition in partitions:
                    self._fine(partition)
            full = [partition for partition, entries in parts.items() if len(entries) >= count]
            left = (self._size.count - sum(map(len, parts.values()))) // len(full) if full else 0
            if left > 0 and len(partitions) > 1:
                self._fill_up(parts, full, left)
        return self._batch(parts, epoch)

    def _command(self, partitions: Sequence[int], count: int, block: int | None) -> Command:
        waiting = () if block is None else ("BLOCK", block)
        logs = [self._link.keys.log(partition) for partition in partitions]
        name = self._broker.consumer_name
        return (
            "XREADGROUP", "GROUP", APPLY_GROUP, name, "COUNT", count, *waiting, "STREAMS", *logs, *(">" for _ in logs),
        )  # fmt: skip

    def _found(self, partitions: Sequence[int], reply: Any) -> Parts:
        """The entries in the answer of a read, by log partition."""
        streams = reply.items() if isinstance(reply, dict) else reply or ()
        names = {self._link.keys.log(partition).encode(): partition for partition in partitions}
        return {names[name]: entries for name, entries in streams if entries}

    def _fill_up(self, parts: Parts, partitions: Sequence[int], count: int) -> None:
        """Ask those that had more than their share for the rest of the batch."""
        try:
            more = self._found(partitions, self._link.command(*self._command(partitions, count, None)))
        except (MnemobusError, RedisError, *AWAY) as error:
            logger.debug(
                "no more is read for now: %s", error
            )  # keep what was read; the next read raises the error
            return
        for partition, entries in more.items():
            parts[partition] = [*parts[partition], *entries]

    def _read_each(self, partitions: Sequence[int], count: int) -> Parts:
        """Read the partitions one by one: one of them can't be read, and Redis answers a joint read with its error."""
        commands = [self._command([partition], count, None) for partition in partitions]
        parts: Parts = {}
        replies = self._link.pipeline(commands)
        for partition, reply in zip(partitions, replies, strict=True):
            if not isinstance(reply, Exception):
                self._fine(partition)
                parts |= self._found([partition], reply)
        for partition, reply in zip(partitions, replies, strict=True):
            if isinstance(reply, Exception):
                try:
                    self._trouble(partition, reply)
                except (MnemobusError, RedisError, *AWAY):
                    if not parts:
                        raise
        return parts

    def _batch(self, parts: Parts, epoch: str) -> Batch | None:
        if not parts:
            return None
        batch = Batch(parts, epoch)
        self._size.saw(batch.entries)
        return batch

    # Events that dead workers have left

    def _claim(self) -> Batch | None:
        """A batch of entries that nobody has renewed for too long; None if there are none."""
        idle = int(self._settings.claim_idle * 1000)
        epoch = self._link.epoch
        mine = self._broker.held.ids()
        pending, consumers = self._pending(idle)
        if self._unmoved.look(consumers, mine):
            pending, _ = self._pending(idle)
        stale = [
            (partition, id, deliveries)
            for partition, found in pending.items()
            for id, _, _, deliveries in found
            if (partition, id) not in mine
        ]
        if not stale:
            return None
        together: dict[int, list[bytes]] = {}
        for partition, id, deliveries in stale:
            if deliveries < ALONE_AFTER:
                together.setdefault(partition, []).append(id)
        if together:
            return self._batch(self._take(together, idle), epoch)
        partition, id, deliveries = stale[0]
        parts = self._take({partition: [id]}, idle)
        if not parts:
            return None
        reason = None
        if deliveries >= DEAD_AFTER:
            reason = f"delivered {deliveries} times, and no worker got as far as confirming it"
        return Batch(parts, epoch, reason)

    def _pending(self, idle: int) -> tuple[dict[int, list[Any]], list[tuple[int, bytes]]]:
        """The entries that have been idle for ``idle`` ms, by log partition, as XPENDING lists them; and the consumers
        that have pending entries, each with its partition."""
        partitions = self._served()
        count = max(1, self._size.count // max(1, len(partitions)))
        commands: list[Command] = []
        for partition in partitions:
            key = self._link.keys.log(partition)
            commands.append(("XPENDING", key, APPLY_GROUP, "IDLE", idle, "-", "+", count))
            commands.append(("XPENDING", key, APPLY_GROUP))
        replies = self._link.pipeline(commands) if commands else []
        pending, consumers = {}, []
        for partition, found, summary in zip(partitions, replies[::2], replies[1::2], strict=True):
            if isinstance(found, Exception) or isinstance(summary, Exception):
                self._trouble(partition, found if isinstance(found, Exception) else summary)
                continue
            pending[partition] = found
            consumers += [(partition, name) for name, _ in summary[3] or ()]
        return pending, consumers

    def _take(self, wanted: dict[int, list[bytes]], idle: int) -> Parts:
        name = self._broker.consumer_name
        keys = self._link.keys
        replies = self._link.pipeline(
            [("XCLAIM", keys.log(p), APPLY_GROUP, name, idle, *ids) for p, ids in wanted.items()]
        )
        parts: Parts = {}
        for (partition, ids), claimed in zip(wanted.items(), replies, strict=True):
            if isinstance(claimed, Exception):
                self._trouble(partition, claimed)
                continue
            entries: list[Entry] = [entry for entry in claimed if entry is not None and entry[1] is not None]
            if entries:
                parts[partition] = entries
                logger.warning(
                    "claimed %d events of log partition %d from another worker", len(entries), partition
                )
            got = {id for id, _ in entries}
            self._give_up_deleted(partition, [id for id in ids if id not in got])
        return parts

    def _give_up_deleted(self, partition: int, ids: Sequence[bytes]) -> None:
        """Confirm entries that somebody deleted from the stream. Entries that others claimed stay as they are."""
        key = self._link.keys.log(partition)
        for id in ids:
            if self._link.command("XRANGE", key, id, id):
                continue
            logger.error("event %s was deleted from the log before it was applied", id.decode())
            # A writer that waits for it must not take the confirmation for a commit.
            note = "dropped somebody deleted it from the log before it was applied"
            self._link.client.hsetnx(self._link.keys.reasons(partition), id.decode(), note)
            self._everyone.confirm(self._link.epoch, [], {partition: [id]})

    # How batches end

    def ack(self, message: dramatiq.MessageProxy) -> None:
        """Release a batch, which is applied and confirmed."""
        assert isinstance(message, BatchProxy)
        self._broker.held.drop(message.batch)

    def nack(self, message: dramatiq.MessageProxy) -> None:
        """Leave a batch pending. Others claim it once it has been idle for long enough, or at once if it failed only
        because the worker shuts down."""
        assert isinstance(message, BatchProxy)
        self._broker.held.drop(message.batch)
        if message.stopped:
            self._broker.hand_back(message.batch, begun=False)
        else:
            if message.error is not None:
                self._broker.state.failed("applying a batch", message.error)
            logger.warning("%r was not applied; it stays pending and will be claimed again", message.batch)

    def requeue(self, messages: Iterable[dramatiq.MessageProxy]) -> None:
        """Hand back batches that were not begun."""
        for message in messages:
            assert isinstance(message, BatchProxy)
            self._broker.held.drop(message.batch)
            self._broker.hand_back(message.batch, begun=False)

    def close(self) -> None:
        """Do nothing: the connections are the broker's."""
