"""The broker: Dramatiq on consumer groups of Redis Streams.

Each log partition is a Dramatiq queue, and one Dramatiq message is one batch: whatever has gathered in the
partition, up to a number of events and of bytes. There is no waiting to fill a batch; an idle bus delivers
one event at once, a busy one hundreds together.

Delivered entries stay *pending* in the consumer group until they are acknowledged, and that comes last. What follows
from it:

- A worker that dies leaves its entries pending. Others look for entries that have been idle for ``claim_idle`` and
  claim them. A live worker *renews* (upkeep.py) what it holds, however long it takes. Idle times are by Redis's wall
  clock; what that hides once it was set back is found by other means (unmoved.py).
- A failed batch is not acknowledged, and no longer renewed: it comes back the same way. Dramatiq would
  acknowledge a message whose actor raised (only its Retries middleware marks it failed, and that re-enqueues,
  which a batch can't be), so `BatchProxy` marks itself.
- Entries that were delivered again and again come one by one, so that an event which kills its worker stands alone;
  in the end it goes to the dead letters.
- At shutdown what is held but not begun is handed back, idle enough for others to claim at once. So is what waits for
  a store that is away. Neither counts as a delivery: no event is given up for how often workers were restarted.

Dramatiq prefetches messages; here a message is a batch, so a process holds at most two batches per partition.

A Redis that is away is waited for here, in fractions of a second; Dramatiq would restart its consumer after three. Only
an acknowledgement that fails for long is left to Dramatiq, which repeats it for as long as it takes.
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
from dramatiq.errors import ConnectionClosed, QueueNotFound
from dramatiq.middleware import Middleware
from redis.exceptions import RedisError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from mnemobus.connection.link import ThreadedLink
from mnemobus.connection.server_errors import AWAY, code_of, is_away, meaning
from mnemobus.errors import MnemobusError
from mnemobus.keys import APPLY_GROUP
from mnemobus.settings import Settings

from .report import State
from .standing import Standing
from .unmoved import Unmoved

logger = logging.getLogger("mnemobus.broker")

ACTOR = "apply"
HELD_BATCHES = 2
"""Batches of one partition that a process holds at most: one to work on, one to follow."""
ALONE_AFTER = 3
"""Deliveries after which an event comes in a batch of its own."""
DEAD_AFTER = 20
"""Deliveries after which it is given up."""
_FIRST_GUESS = 64 << 10
"""Bytes that an entry is taken to have before any was seen."""
_ACK_PATIENCE = 2.0
_HANDED_OVER = 7 * 86_400_000
"""Milliseconds of idleness given to an entry that anybody may claim."""

Entry = tuple[bytes, list[bytes]]
"""An ID, and field names and values, alternating."""


class Stopping(Exception):
    """The worker shuts down while a batch waits for the store or for Redis; the batch is left to others."""


class Batch:
    """Entries of one log partition, delivered together.

    epoch     as this process knew it before they were read
    hopeless  why its only entry is not to be tried again, or None
    """

    __slots__ = ("entries", "epoch", "hopeless", "partition")

    def __init__(self, partition: int, entries: list[Entry], epoch: str, hopeless: str | None = None) -> None:
        self.partition = partition
        self.entries = entries
        self.epoch = epoch
        self.hopeless = hopeless

    @property
    def ids(self) -> list[bytes]:
        return [id for id, _ in self.entries]

    def __repr__(self) -> str:
        first, last = self.entries[0][0].decode(), self.entries[-1][0].decode()
        return f"<{len(self.entries)} events of log partition {self.partition}, {first} to {last}>"


class BatchProxy(dramatiq.MessageProxy):
    """A batch as Dramatiq passes it around; marks itself failed if applying it raised."""

    def __init__(self, queue: str, batch: Batch) -> None:
        # To stop is no failure that would be worth a traceback in the log.
        options = {"throws": Stopping}
        super().__init__(
            dramatiq.Message(queue, ACTOR, (batch,), {}, options, message_id=batch.ids[0].decode())
        )
        self.batch = batch
        self.stopped = False
        self.error: BaseException | None = None

    def stuff_exception(self, exception: BaseException) -> None:
        super().stuff_exception(exception)
        self.stopped = isinstance(exception, Stopping)
        self.error = exception
        self.fail()


def queue_name(partition: int) -> str:
    """The Dramatiq queue of a log partition."""
    return f"log-{partition}"


class StreamBroker(dramatiq.Broker):
    """Delivers what is in the log. Nothing can be enqueued: the log is written through a bus."""

    def __init__(self, settings: Settings, middleware: list[Middleware] | None = None) -> None:
        super().__init__(middleware=middleware or [])
        self.settings = settings
        # Each partition's consumer has one connection while it waits; worker threads and upkeep have others.
        self.link = ThreadedLink(settings, connections=2 * settings.log_partitions + 64)
        for command in ("XREADGROUP", "XPENDING", "XCLAIM"):
            self.link.client.set_response_callback(command, _as_it_is)
        self.consumer_name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.queues: dict[str, int] = {}
        self.held = Held(settings.log_partitions)
        self.standing: Standing | None = None
        """Whether this process may take batches; None: it may."""
        self.stopping = threading.Event()
        """Set once the worker shuts down: nothing is waited for any more."""
        self.state = State()
        """What this process tells of itself."""

    def declare_queue(self, queue_name: str) -> None:
        if queue_name in self.queues:
            return
        self.emit_before("declare_queue", queue_name)
        self.queues[queue_name] = int(queue_name.removeprefix("log-"))
        self.emit_after("declare_queue", queue_name)

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 1000) -> StreamConsumer:
        """A consumer of one log partition; waits ``timeout`` ms for an event, less if sockets time out before."""
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        return StreamConsumer(self, self.queues[queue_name], timeout)

    def enqueue(self, message: dramatiq.Message[Any], *, delay: int | None = None) -> dramatiq.Message[Any]:
        """Always a TypeError."""
        raise TypeError("this broker delivers mnemobus's log and nothing else: write through a bus instead")

    def hand_back(self, batch: Batch, *, begun: bool) -> None:
        """Let others claim a batch at once; what they have claimed already stays theirs.

        A batch that was not begun counts as not delivered. Redis being away is logged: it is claimed later then.
        """
        try:
            self.link.run(
                "renew",
                [self.link.keys.log(batch.partition)],
                [APPLY_GROUP, self.consumer_name, _HANDED_OVER, int(not begun), *batch.ids],
            )
        except (RedisError, MnemobusError, *AWAY) as error:
            logger.warning("%r could not be handed back, and will be claimed: %s", batch, error)

    def renew(self) -> None:
        """Keep others from claiming what this process holds."""
        for batch in self.held.batches():
            self.link.run(
                "renew",
                [self.link.keys.log(batch.partition)],
                [APPLY_GROUP, self.consumer_name, 0, 0, *batch.ids],
            )

    def close(self) -> None:
        self.link.close()


def _as_it_is(reply: Any, **_: Any) -> Any:
    return reply


class Held:
    """The batches that this process has been given and not let go of. Safe for threads."""

    def __init__(self, partitions: int) -> None:
        self._lock = threading.Condition()
        self._batches: list[dict[int, Batch]] = [{} for _ in range(partitions)]

    def add(self, batch: Batch) -> None:
        with self._lock:
            self._batches[batch.partition][id(batch)] = batch

    def drop(self, batch: Batch) -> None:
        with self._lock:
            self._batches[batch.partition].pop(id(batch), None)
            self._lock.notify_all()

    def batches(self) -> list[Batch]:
        with self._lock:
            return [batch for held in self._batches for batch in held.values()]

    def ids(self, partition: int) -> set[bytes]:
        with self._lock:
            return {id for batch in self._batches[partition].values() for id in batch.ids}

    def wait_for_room(self, partition: int, timeout: float) -> bool:
        """Whether another batch may be taken, after waiting for it if need be."""
        with self._lock:
            return self._lock.wait_for(lambda: len(self._batches[partition]) < HELD_BATCHES, timeout)


class BatchSize:
    """How many entries to ask for, so that a batch stays within its number of bytes: by the size of the last ones."""

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
    """Batches of one log partition: new ones, and from time to time those of a worker that died."""

    def __init__(self, broker: StreamBroker, partition: int, timeout: int) -> None:
        self._broker = broker
        self._link = broker.link
        self._settings = broker.settings
        self._partition = partition
        self._queue = queue_name(partition)
        self._what = f"log partition {partition}"
        self._key = broker.link.keys.log(partition)
        self._timeout = timeout / 1000
        # A read that blocks longer than the socket would time out on its own connection.
        self._block = max(1, min(timeout, int(self._settings.redis_timeout * 500)))
        self._claim_every = self._settings.claim_idle / 10
        self._claim_next = 0.0
        self._unmoved = Unmoved(
            broker.link, self._key, self._settings.claim_idle, HELD_BATCHES * self._settings.batch_size
        )
        self._size = BatchSize(broker.settings)
        self._away = 0

    def __next__(self) -> BatchProxy | None:
        standing = self._broker.standing
        if standing is not None and standing.refused:
            self._broker.stopping.wait(self._timeout)
            return None
        if not self._broker.held.wait_for_room(self._partition, self._timeout):
            return None
        try:
            batch = self._next()
        except (MnemobusError, RedisError, *AWAY) as error:
            if code_of(error) == "NOGROUP":
                self._make_group()
            else:
                self._wait_out(error)
            return None
        if self._away:
            logger.info("log partition %d: Redis is back", self._partition)
            self._away = 0
            self._broker.state.goes_on(self._what)
        if batch is None:
            return None
        self._broker.held.add(batch)
        return BatchProxy(self._queue, batch)

    def _wait_out(self, error: Exception) -> None:
        self._away += 1
        self._broker.state.waits(self._what, error)
        if self._away == 1:
            logger.warning(
                "log partition %d can't be read, trying until it can: %s", self._partition, meaning(error)
            )
        time.sleep(min(1.0, 0.05 * 2 ** min(self._away, 5)))

    def _make_group(self) -> None:
        """The consumer group, from the log's beginning; also after Redis lost it."""
        try:
            self._link.run("group", [self._key], [APPLY_GROUP])
            logger.info("log partition %d: made the consumer group %r", self._partition, APPLY_GROUP)
        except (MnemobusError, RedisError, *AWAY) as error:
            if code_of(error) != "BUSYGROUP":  # else another worker was faster
                self._wait_out(error)

    def _next(self) -> Batch | None:
        now = time.monotonic()
        if now >= self._claim_next:
            batch = self._claim()
            if batch is not None:
                return batch  # and look for more before waiting for new ones
            self._claim_next = now + self._claim_every
        return self._read()

    def _read(self) -> Batch | None:
        block = max(1, min(self._block, int(1000 * (self._claim_next - time.monotonic()))))
        epoch = self._link.epoch
        reply = self._link.client.execute_command(
            "XREADGROUP", "GROUP", APPLY_GROUP, self._broker.consumer_name, "COUNT", self._size.count,
            "BLOCK", block, "STREAMS", self._key, ">",
        )  # fmt: skip
        if not reply:
            return None
        streams = reply.items() if isinstance(reply, dict) else reply
        entries = [(id, fields) for _, found in streams for id, fields in found]
        return self._batch(entries, epoch)

    def _batch(self, entries: list[Entry], epoch: str) -> Batch | None:
        if not entries:
            return None
        self._size.saw(entries)
        return Batch(self._partition, entries, epoch)

    def _claim(self) -> Batch | None:
        """A batch of what nobody has renewed for too long; None if there is nothing of that kind."""
        idle = int(self._settings.claim_idle * 1000)
        epoch = self._link.epoch
        mine = self._broker.held.ids(self._partition)
        pending, consumers = self._pending(idle)
        if self._unmoved.look(consumers, mine):
            pending, _ = self._pending(idle)
        stale = [(id, deliveries) for id, _, _, deliveries in pending if id not in mine]
        if not stale:
            return None
        together = [id for id, deliveries in stale if deliveries < ALONE_AFTER]
        if together:
            return self._batch(self._take(together, idle), epoch)
        id, deliveries = stale[0]
        entries = self._take([id], idle)
        if not entries:
            return None
        reason = None
        if deliveries >= DEAD_AFTER:
            reason = f"delivered {deliveries} times, and no worker got as far as confirming it"
        return Batch(self._partition, entries, epoch, reason)

    def _pending(self, idle: int) -> tuple[list[Any], list[bytes]]:
        """What has been idle for so many ms, as XPENDING tells it; and the names of all who have anything pending."""
        pending, summary = self._link.pipeline(
            [
                ("XPENDING", self._key, APPLY_GROUP, "IDLE", idle, "-", "+", self._size.count),
                ("XPENDING", self._key, APPLY_GROUP),
            ]
        )
        for reply in (pending, summary):
            if isinstance(reply, Exception):
                raise reply
        return pending, [name for name, _ in summary[3] or ()]

    def _take(self, ids: Sequence[bytes], idle: int) -> list[Entry]:
        claimed = self._link.client.execute_command(
            "XCLAIM", self._key, APPLY_GROUP, self._broker.consumer_name, idle, *ids
        )
        entries: list[Entry] = [entry for entry in claimed if entry is not None and entry[1] is not None]
        if entries:
            logger.warning(
                "claimed %d events of log partition %d from another worker", len(entries), self._partition
            )
        got = {id for id, _ in entries}
        self._give_up_deleted([id for id in ids if id not in got])
        return entries

    def _give_up_deleted(self, ids: Sequence[bytes]) -> None:
        """Confirm entries that somebody deleted from the stream; those that others claimed are left alone."""
        for id in ids:
            if self._link.client.execute_command("XLEN", self._key) and self._exists(id):
                continue
            logger.error("event %s was deleted from the log before it was applied", id.decode())
            # Who waits for it must not take the confirmation for a commit.
            note = "dropped somebody deleted it from the log before it was applied"
            self._link.client.hsetnx(self._link.keys.reasons(self._partition), id.decode(), note)
            self._acknowledge([id])

    def _exists(self, id: bytes) -> bool:
        return bool(self._link.client.execute_command("XRANGE", self._key, id, id))

    def _acknowledge(self, ids: Sequence[bytes]) -> None:
        keys = [self._key, self._link.keys.meter(self._partition)]
        for attempt in Retrying(
            retry=retry_if_exception(is_away),
            wait=wait_random_exponential(multiplier=0.05, max=0.5),
            stop=stop_after_delay(_ACK_PATIENCE),
            reraise=True,
        ):
            with attempt:
                self._link.run("ack", keys, [APPLY_GROUP, *ids])

    def ack(self, message: dramatiq.MessageProxy) -> None:
        """Confirm a batch. ConnectionClosed if Redis is away; the batch is still held then."""
        assert isinstance(message, BatchProxy)
        try:
            self._acknowledge(message.batch.ids)
        except (MnemobusError, RedisError, *AWAY) as error:
            # One that was refused in the handshake is not fit for use until somebody sees to that.
            away = isinstance(error, MnemobusError) or is_away(error)
            if away and not self._broker.stopping.is_set():
                raise ConnectionClosed(
                    f"log partition {self._partition} can't be confirmed now: {error}"
                ) from error
            # It stays pending, will be claimed, and applied again, to no effect.
            logger.error("%r is applied but could not be confirmed: %s", message.batch, error)
            self._broker.state.failed("confirming a batch", error)
        else:
            self._broker.state.applied(len(message.batch.entries))
        self._broker.held.drop(message.batch)

    def nack(self, message: dramatiq.MessageProxy) -> None:
        """Leave a batch pending; it is claimed again once it has been idle for long enough, or at once if it failed
        only because the worker shuts down."""
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
        """Nothing of its own to close: the connections are the broker's."""
