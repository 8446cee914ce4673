"""The log, as a writer sees it: events enter it once, in order, and get their versions.

There is one publisher per partition, with one call in flight. Writes that arrive while a call is under way go together
in the next call: an idle bus publishes a single write at once, a busy one publishes hundreds in one round trip.

Usually a call needs no task: the caller that queues the first write sends it, and the writers get their answers in the
moment in which the reply arrives. A task takes over in three cases: no connection is idle, the call fails, or the
outbox is in use. It repeats the same call, with the same number, as long as that can help.

A call carries the producer's id and a sequence number. The script answers a repeated call with the IDs that it gave the
first time. So a call that timed out, with an unknown outcome, is simply repeated (tenacity, exponential backoff with
jitter). If the first copy arrives after its repetition, it finds that it was overtaken. Two processes that use one
producer id (because an outbox was copied, or a process forked) must not take each other's answers for their own: so a
repetition is also recognised by a digest of its events.

::

    IDLE ─── publish; a connection is idle ──────────────────────► FLYING: a call is under way, without a task
     │                                                              │  │
     │                                          answered: writers ◄─┘  └─ no answer, or a refusal
     │                                          are told; the next                │
     │                                          call, or IDLE                     ▼
     └────── publish; none is idle, or older writes are in the outbox ──────► DRAINING: a task sees to it
                                                                                  │
        no answer: the same call again, with the same number              ◄───────┤
        answered: writers are told                                        ◄───────┤
        no answer for `_LOG_PATIENCE`, or older writes are in the outbox:         │
        it goes there, and writers are told                               ◄───────┤
        no outbox, and the deadline is over: writers get an error         ◄───────┤
        nothing is left: IDLE                                             ◄───────┘

A publisher that is `resting` begins no call. The call under way is finished; then `on_rest` is called.

routing.py decides which publisher a write goes to, and what happens to the publishers when the log is repartitioned.

If the log can't be reached, the publisher waits for a moment. If the log stays away, the writes of the call, and all
later ones, go to the outbox (log/outbox.py) if there is one. The outbox makes the same call once the log is back.

Publishing is not part of the caller's task: a cancelled caller gives up the answer, not the write. Everything that
has to follow a logged write (`on_logged`) still happens.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import repeat
from typing import Any, Protocol

from redis.exceptions import RedisError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    retry_if_not_exception_type,
    wait_random,
    wait_random_exponential,
)

from ..connection.link import Link, evalsha, script
from ..connection.server_errors import AWAY
from ..connection.transport import Wire, pack
from ..errors import (
    BacklogFull,
    LogClosed,
    LogFull,
    LogUnavailable,
    MnemobusError,
    PartitionEnded,
    SettingsError,
    Unready,
)
from ..keys import Version
from ..settings import Settings
from .append import CALL_BYTES, CALL_EVENTS, Field, Logged, append, publish_call, read_reply
from .events import Event
from .marks import Write
from .parcel import Parcel, fields_of, parcels

logger = logging.getLogger("mnemobus.log")


_CLOSED_PAUSE = (0.01, 0.05)
"""Least and most seconds between two checks whether a log that is being repartitioned takes writes again."""

_LOG_PATIENCE = 0.5
"""Seconds to wait for a log that can't be reached, before writes go to the outbox."""


class Overflow(Protocol):
    """Where writes go while the log can't be reached: the outbox."""

    @property
    def waiting(self) -> int:
        """How many writes wait there; newer ones have to wait behind them."""

    @property
    def trouble(self) -> str | None:
        """Why no write can be kept there; None if writes can be kept."""

    async def keep(
        self, partition: int, events: Sequence[tuple[Event, Sequence[bytes]]], call: tuple[str, int] | None
    ) -> list[Write]:
        """Keep writes until the log is back; ``call``: producer and number under which it may have them already."""


OnLogged = Callable[[int, Event, Version, tuple[Version, ...] | None], Write]
"""Called for each event that is in the log, before its writer gets an answer; it returns the answer. Arguments: log
partition, event, version, and the event before it in each of its slots (see `Logged`)."""


class Publisher:
    """Appends events to one partition of the log.

    on_rest  called when it is at rest, after `rest` was called
    """

    def __init__(
        self,
        link: Link,
        partition: int,
        producer: str,
        on_logged: OnLogged,
        overflow: Overflow | None = None,
        on_rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._settings: Settings = link.settings
        self._partition = self.partition = partition
        self._producer = self.producer = producer
        self._on_logged = on_logged
        self._overflow = overflow
        self._on_rest = on_rest
        self.resting = False
        """Whether to begin no call for now. The call under way is finished."""
        self._queue: deque[Parcel] = deque()
        self._task: asyncio.Task[None] | None = None
        self._flying: list[Parcel] | None = None
        """The batch of the call that is under way without a task."""
        self._made = 0.0
        """When that call was made, and in which epoch."""
        self._epoch = ""
        self._landed = asyncio.Event()
        self._sequence = 0
        self._copies = False
        """Whether a copy of a call may still be on its way: one got no answer, even if its repetition got one."""
        self.calls = 0
        self.retries = 0
        self.events = 0

    def publish(self, events: Sequence[Event]) -> list[asyncio.Future[list[Write]]]:
        """Queue events, in as few calls as they fit in. The futures give their Writes, in order, once they are in the
        log or in the outbox; or a WriteFailed."""
        return self.enqueue(parcels(events, self._loop.time() + self._settings.write_timeout))

    def enqueue(self, waiting: list[Parcel]) -> list[asyncio.Future[list[Write]]]:
        """The same, for events that are already in parcels."""
        self._queue.extend(waiting)
        if self.is_idle and self._queue and not self.resting:
            self._begin()
        return [pending.done for pending in waiting]

    def rest(self) -> bool:
        """Make no more calls until `resting` is unset and `enqueue` is called; return whether none is under way."""
        self.resting = True
        return self.is_idle

    def take_queue(self) -> list[Parcel]:
        """Take what waits, in order; the caller owns it from now on."""
        queue = list(self._queue)
        self._queue.clear()
        return queue

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way."""
        return self._task is None and self._flying is None

    async def close(self) -> None:
        """Wait until all that is queued is in the log, or has failed."""
        while not self.is_idle:
            if self._task is not None:
                await asyncio.shield(self._task)
            else:
                self._landed.clear()
                await self._landed.wait()

    @property
    def done(self) -> bool:
        """Whether the log may forget this producer: it has made calls, each was answered, and none will follow."""
        return self._sequence > 0 and self.is_idle and not self._queue and not self._copies

    def _begin(self) -> None:
        """Make the next call: at once if a connection is idle, else in a task."""
        wire = None if self._behind_outbox else self._link.pool.idle()
        if wire is None:
            self._hand_over()
            return
        self._flying = self._take()
        self._made, self._epoch = self._loop.time(), self._link.epoch
        self._sequence += 1
        self.calls += 1
        wire.call(
            pack([evalsha((script("publish"), *self._arguments(self._flying)))]),
            1,
            self._settings.redis_timeout,
            partial(self._land, wire),
        )

    def _land(self, wire: Wire, outcome: list[Any] | Exception) -> None:
        """Handle the reply, or the failure, of a call that had no task."""
        batch, self._flying = self._flying, None
        assert batch is not None
        if isinstance(outcome, Exception):
            self._copies = True
            self._link.pool.drop(wire)
            self._again(1, outcome)
            self._hand_over(batch, unanswered=True)
        elif isinstance(outcome[0], Exception):
            self._link.pool.give_back(wire)
            self._hand_over(batch)  # which hears the same, and knows what to do about it
        else:
            self._link.pool.give_back(wire)
            try:
                self._tell(batch, read_reply(self._link, self._epoch, fields_of(batch), outcome[0]))
            except Exception as error:  # every writer must hear of it, whatever it is
                logger.exception("publishing to log partition %d failed", self._partition)
                self._fail(batch, error)
            if self.resting:
                self._on_rest()
            elif self._queue:
                self._begin()
        self._landed.set()

    @property
    def _behind_outbox(self) -> bool:
        """Whether newer writes have to wait behind others in the outbox."""
        return self._overflow is not None and self._overflow.waiting > 0

    def _hand_over(self, batch: list[Parcel] | None = None, *, unanswered: bool = False) -> None:
        """Start a task that publishes ``batch``, whose call has failed, and then what is queued."""
        work = self._drain(batch, unanswered)
        self._task = asyncio.get_running_loop().create_task(work, name=f"mnemobus-publish-{self._partition}")

    async def _drain(self, batch: list[Parcel] | None, unanswered: bool) -> None:
        made = None if batch is None else self._made
        try:
            while batch or (self._queue and not self.resting):
                batch = batch or self._take()
                try:
                    await self._publish(batch, made, unanswered)
                except PartitionEnded:
                    # If the new layout is known by now, `Publishers` moves these writes. If not, the same call fails
                    # again.
                    self._queue.extendleft(reversed(batch))
                except Exception as error:  # every writer must hear of it, whatever it is
                    if not isinstance(error, MnemobusError):
                        logger.exception("publishing to log partition %d failed", self._partition)
                    self._fail(batch, error)
                batch, made, unanswered = None, None, False
        except BaseException:  # the loop is shutting down, and cancelled this task
            self._task = None
            self._copies = self._copies or bool(batch)
            self._queue.extendleft(batch or ())
            self._fail(self._queue, LogUnavailable("the bus was shut down before the write was published"))
            self._queue.clear()
            raise
        self._task = None
        if self.resting:
            self._on_rest()

    def _take(self) -> list[Parcel]:
        batch: list[Parcel] = []
        events = size = 0
        while self._queue:
            events += len(self._queue[0].events)
            size += self._queue[0].size
            if batch and (size > CALL_BYTES or events > CALL_EVENTS):
                break
            batch.append(self._queue.popleft())
        return batch

    @staticmethod
    def _fail(batch: Sequence[Parcel] | deque[Parcel], error: Exception) -> None:
        for pending in batch:
            if not pending.done.done():
                pending.done.set_exception(error)
                pending.done.exception()  # a writer that was cancelled won't fetch it

    async def _publish(self, batch: list[Parcel], made: float | None, unanswered: bool) -> None:
        """Publish, or keep in the outbox, and answer the writers.

        made, unanswered: if the call was made already and failed, when that was, and whether it got no answer
        """
        overflow = self._overflow
        call = unavailable = None
        if made is not None or not self._behind_outbox:
            if made is None:
                self._sequence += 1
            try:
                self._tell(batch, await self._insist(batch, made, unanswered))
                return
            except PartitionEnded:
                raise
            except LogUnavailable as error:
                if overflow is None:
                    raise
                call, unavailable = (self._producer, self._sequence), error
                self._copies = True  # the outbox makes it again
        assert overflow is not None
        events = [pair for p in batch for pair in zip(p.events, p.fields, strict=True)]
        try:
            kept = await overflow.keep(self._partition, events, call)
        except MnemobusError as full:
            if unavailable is None:
                raise
            raise LogUnavailable(f"{unavailable}; and {full}") from full
        self._answer(batch, kept)

    def _tell(self, batch: list[Parcel], logged: Logged) -> None:
        """The batch is in the log."""
        versions = logged.versions
        self.events += len(versions)
        events = (event for pending in batch for event in pending.events)
        told = zip(events, versions, logged.previous or repeat(None, len(versions)), strict=True)
        self._answer(batch, [self._on_logged(self._partition, *each) for each in told])

    @staticmethod
    def _answer(batch: list[Parcel], writes: list[Write]) -> None:
        at = 0
        for pending in batch:
            count = len(pending.events)
            if not pending.done.done():
                pending.done.set_result(writes[at : at + count])
            at += count

    def _arguments(self, batch: list[Parcel]) -> tuple[list[str], list[Field]]:
        return publish_call(self._link, self._partition, self._producer, self._sequence, fields_of(batch))

    async def _insist(self, batch: list[Parcel], made: float | None, unanswered: bool) -> Logged:
        """Repeat the call until it is answered, or until another attempt can't help. ``made``: when it was made first,
        and failed."""
        deadline = batch[0].deadline
        loop = asyncio.get_running_loop()
        spill_at = deadline
        if self._overflow is not None and self._overflow.trouble is None:
            spill_at = min(deadline, (loop.time() if made is None else made) + _LOG_PATIENCE)
        if loop.time() >= spill_at:
            raise self._unreachable("no answer in time")

        def stop(state: RetryCallState) -> bool:
            if isinstance(_error(state), (BacklogFull, LogClosed)):
                return loop.time() >= deadline
            return loop.time() + state.upcoming_sleep >= spill_at

        backoff = wait_random_exponential(multiplier=self._settings.redis_create_retry_interval / 1000, max=2)
        soon = wait_random(*_CLOSED_PAUSE)

        def wait(state: RetryCallState) -> float:
            error = _error(state)
            pause = soon(state) if isinstance(error, LogClosed) else backoff(state)
            # Workers may make room until the very end.
            last = isinstance(error, (BacklogFull, LogClosed))
            return min(pause, max(deadline - loop.time(), 0)) if last else pause

        retrying = AsyncRetrying(
            retry=retry_if_exception_type((*AWAY, Unready, BacklogFull))
            & retry_if_not_exception_type(PartitionEnded),
            wait=wait,
            stop=stop,
            before_sleep=self._before_sleep,
            reraise=True,
        )
        events = fields_of(batch)
        try:
            async for attempt in retrying:
                with attempt:
                    self.calls += 1
                    try:
                        return await append(
                            self._link, self._partition, self._producer, self._sequence, events
                        )
                    except AWAY:
                        unanswered = self._copies = True
                        raise
                    except PartitionEnded:
                        await self._learn()
                        raise
                    except SettingsError as error:
                        # It was fit for use when the bus was opened: people will repair it, and the outbox can wait.
                        if self._overflow is None and not unanswered:
                            raise
                        raise Unready(f"{error}: nothing was written") from error
        except AWAY as error:
            raise self._unreachable(error) from error
        except (BacklogFull, LogFull, Unready) as error:
            if not unanswered or isinstance(error, PartitionEnded):
                raise
            # The first copy of the call may still be on its way, and arrive when Redis has space again.
            raise LogUnavailable(
                f"the write was not answered, and may or may not be in the log; when it was repeated: {error}"
            ) from error
        raise AssertionError("unreachable")

    async def _learn(self) -> None:
        """Read the layout of the log again: the one that is known here is out of date."""
        shape = self._link.keys.shape
        with suppress(*AWAY, RedisError, SettingsError):
            await self._link.renew_epoch()
        if shape == self._link.keys.shape:  # or Redis was flushed, and the partition was made again
            await asyncio.sleep(random.uniform(*_CLOSED_PAUSE))

    def _unreachable(self, reason: object) -> LogUnavailable:
        return LogUnavailable(
            f"Redis at {self._link.address} could not be reached in time ({reason}; MNEMOBUS_WRITE_TIMEOUT is"
            f" {self._settings.write_timeout:g} s): the write may or may not be in the log"
        )

    def _before_sleep(self, state: RetryCallState) -> None:
        self._again(state.attempt_number, _error(state))

    def _again(self, attempt: int, error: BaseException | None) -> None:
        self.retries += 1
        log = logger.warning if attempt == 1 else logger.debug
        log("log partition %d: %s; trying again", self._partition, error)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
