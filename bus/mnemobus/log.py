"""The log, as a writer sees it: events go in once, in order, and get their versions.

One publisher per partition, one call in flight. What arrives while a call is under way goes together in the
next one: an idle bus publishes a single write at once, a busy one publishes hundreds in one round trip.

A call carries the producer's id and a sequence number, and the script answers a repeated one with the IDs that
it gave the first time. So a call that timed out, its outcome unknown, is simply repeated (tenacity, exponential
backoff with jitter); a late first copy of it, arriving after its repetition, finds that it was overtaken.

Publishing is done by a task of the publisher, not of the caller: cancelling a write gives up the answer, not the
write, and everything that has to follow a logged write (`on_logged`) follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redis.exceptions import OutOfMemoryError, ResponseError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from .connection import AWAY, Argument, Link
from .errors import (
    BacklogFull,
    DurabilityUnavailable,
    LogFull,
    LogUnavailable,
    MnemobusError,
    WriteFailed,
)
from .events import Event
from .keys import Version
from .marks import Write
from .settings import Settings

logger = logging.getLogger("mnemobus.log")

CALL_EVENTS = 1_000
CALL_BYTES = 8 << 20
"""What one call carries at most; a script blocks the server while it runs."""

_PASSING = ("READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN", "UNBLOCKED")
"""Errors of a server that is failing over or starting: trying again helps."""


class _Busy(Exception):
    """The log can't take the call now, but may soon."""


@dataclass(slots=True)
class _Pending:
    """A write that waits to be published."""

    event: Event
    arguments: list[str | bytes | int]
    size: int
    deadline: float
    done: asyncio.Future[Write]


OnLogged = Callable[[int, Event, Version], Write]
"""Called with log partition, event and version for each event that is in the log, before its writer knows; what it
returns is the writer's answer."""


class Publisher:
    """Appends events to one partition of the log."""

    def __init__(self, link: Link, partition: int, producer: str, on_logged: OnLogged) -> None:
        self._link = link
        self._settings: Settings = link.settings
        self._partition = partition
        self._producer = producer
        self._on_logged = on_logged
        keys = link.keys
        self._keys = [keys.log(partition), keys.producers(partition), keys.meter(partition)]
        self._queue: deque[_Pending] = deque()
        self._task: asyncio.Task[None] | None = None
        self._sequence = 0
        self.calls = 0
        self.retries = 0
        self.events = 0

    def publish(self, event: Event) -> asyncio.Future[Write]:
        """Queue an event; the future gives what `on_logged` made of it once it is in the log, or a WriteFailed."""
        loop = asyncio.get_running_loop()
        fields = event.fields()
        size = sum(len(field) for field in fields if not isinstance(field, int))
        done: asyncio.Future[Write] = loop.create_future()
        deadline = loop.time() + self._settings.write_timeout
        self._queue.append(_Pending(event, fields, size, deadline, done))
        if self._task is None:
            self._task = loop.create_task(self._drain(), name=f"mnemobus-publish-{self._partition}")
        return done

    async def close(self) -> None:
        """Wait until what is queued is in the log, or has failed."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _drain(self) -> None:
        try:
            while self._queue:
                batch = self._take()
                try:
                    versions = await self._call(batch)
                except Exception as error:  # every writer must hear of it, whatever it is
                    if not isinstance(error, MnemobusError):
                        logger.exception("publishing to log partition %d failed", self._partition)
                    self._fail(batch, error)
                    continue
                for pending, version in zip(batch, versions, strict=True):
                    write = self._on_logged(self._partition, pending.event, version)
                    if not pending.done.done():
                        pending.done.set_result(write)
                self.events += len(batch)
        finally:
            self._task = None
            # Only if the loop is shutting down and cancelled this task is anything left.
            self._fail(self._queue, LogUnavailable("the bus was shut down before the write was published"))
            self._queue.clear()

    def _take(self) -> list[_Pending]:
        batch: list[_Pending] = []
        size = 0
        while self._queue and len(batch) < CALL_EVENTS:
            size += self._queue[0].size
            if batch and size > CALL_BYTES:
                break
            batch.append(self._queue.popleft())
        return batch

    @staticmethod
    def _fail(batch: Sequence[_Pending] | deque[_Pending], error: Exception) -> None:
        for pending in batch:
            if not pending.done.done():
                pending.done.set_exception(error)
                pending.done.exception()  # a writer that was cancelled won't fetch it

    async def _call(self, batch: list[_Pending]) -> list[Version]:
        self._sequence += 1
        arguments: list[Argument] = [self._producer, self._sequence, self._settings.max_backlog]
        for pending in batch:
            arguments.append(len(pending.arguments))
            arguments += pending.arguments
        deadline = batch[0].deadline
        loop = asyncio.get_running_loop()
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((*AWAY, _Busy)),
            wait=wait_random_exponential(multiplier=self._settings.redis_create_retry_interval / 1000, max=2),
            stop=lambda state: loop.time() + state.upcoming_sleep >= deadline,
            before_sleep=self._before_sleep,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await self._attempt(arguments)
        except _Busy as error:
            raise self._busy(error) from None
        except AWAY as error:
            raise LogUnavailable(
                f"Redis at {self._link.address} could not be reached in time ({error}; MNEMOBUS_WRITE_TIMEOUT is"
                f" {self._settings.write_timeout:g} s): the write may or may not be in the log"
            ) from error
        raise AssertionError("unreachable")

    async def _attempt(self, arguments: list[Argument]) -> list[Version]:
        self.calls += 1
        try:
            reply = await self._link.run("publish", self._keys, arguments)
        except OutOfMemoryError:
            raise self._full() from None
        except ResponseError as error:
            text = str(error)
            if "OOM command not allowed" in text:  # as 6.2 says it of a script
                raise self._full() from None
            if text.startswith(("BACKLOG", *_PASSING)):
                raise _Busy(text) from None
            if text.startswith("SUPERSEDED"):
                raise WriteFailed(
                    f"producer {self._producer} is in use by another process, or went on without this write:"
                    " nothing was written"
                ) from None
            raise WriteFailed(f"the log refuses the write: {text}") from error
        return [Version.parse(id) for id in reply]

    def _full(self) -> LogFull:
        return LogFull(
            f"Redis at {self._link.address} is out of memory (maxmemory); nothing was written. Raise maxmemory,"
            " or lower MNEMOBUS_RETENTION"
        )

    def _before_sleep(self, state: RetryCallState) -> None:
        self.retries += 1
        error = state.outcome.exception() if state.outcome else None
        log = logger.warning if state.attempt_number == 1 else logger.debug
        log("log partition %d: %s; trying again", self._partition, error)

    def _busy(self, error: _Busy) -> WriteFailed:
        word, _, number = str(error).partition(" ")
        if word == "BACKLOG":
            return BacklogFull(
                f"log partition {self._partition} holds {number} events that no worker has applied yet"
                f" (MNEMOBUS_MAX_BACKLOG is {self._settings.max_backlog}); nothing was written. Are workers"
                " running? `mnemobus doctor` tells"
            )
        return LogUnavailable(f"Redis at {self._link.address} does not take writes now: {error}")


class Syncer:
    """Waits until what was logged in one partition is on disk or on a replica, many waiters at once.

    WAITAOF and WAIT speak of what the same connection wrote before: a small write goes ahead of them, which
    is after everything that was logged when the wait began.
    """

    def __init__(self, link: Link, partition: int) -> None:
        self._link = link
        self._meter = link.keys.meter(partition)
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def check(self) -> None:
        """DurabilityUnavailable if the server can't do it, before anything is written."""
        server = self._link.server
        if (
            server is None
            or server.fsync_always
            or server.replicas
            or (server.aof and server.speaks >= (7, 2))
        ):
            return
        raise DurabilityUnavailable(
            f'durability="synced" needs an append-only file and Redis 7.2 (or appendfsync always), or a replica;'
            f" {server} at {self._link.address} has {'an' if server.aof else 'no'} append-only file and no"
            " replica. Nothing was written"
        )

    async def sync(self) -> None:
        """Return once everything logged so far is synced."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append(done)
        if self._task is None:
            self._task = loop.create_task(self._run(), name="mnemobus-sync")
        await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                try:
                    await self._once()
                except Exception as error:  # every waiter must hear of it, whatever it is
                    if not isinstance(error, MnemobusError):
                        logger.exception("waiting for the log to be synced failed")
                    for done in waiting:
                        if not done.done():
                            done.set_exception(error)
                            done.exception()
                    continue
                for done in waiting:
                    if not done.done():
                        done.set_result(None)
        finally:
            self._task = None

    async def _once(self) -> None:
        server = self._link.server
        assert server is not None
        if server.fsync_always:
            return
        loop = asyncio.get_running_loop()
        settings = self._link.settings
        deadline = loop.time() + settings.write_timeout
        patience = int(settings.redis_timeout * 1000 / 2)
        local = server.aof and server.speaks >= (7, 2)
        wait = ("WAITAOF", 1, 0, patience) if local else ("WAIT", 1, patience)
        while loop.time() < deadline:
            try:
                replies = await self._link.pipeline([("HINCRBY", self._meter, "syncs", 1), wait])
            except AWAY as error:
                raise DurabilityUnavailable(
                    f"the write is in the log, but Redis went away before it was synced: {error}"
                ) from error
            for reply in replies:
                if isinstance(reply, Exception):
                    raise DurabilityUnavailable(f"the write is in the log, but can't be synced: {reply}")
            if (replies[1][0] if local else replies[1]) >= 1:
                return
        raise DurabilityUnavailable(
            f"the write is in the log, but was not synced within {settings.write_timeout:g} s"
        )
