"""Shadow reads: a share of the caches' answers is read from the store, too, in the background, and compared.

A difference alone is not a breach: the write may just have been committed, and its invalidation may be on the way. So
a copy that is older than the store is checked again, once two things are certain:

- The workers have confirmed everything that had been delivered to them when the store was read. A worker fans out
  before it confirms. So the invalidation was sent, even if a worker died between the two and another took over.
- ``max_staleness`` and one heartbeat have passed since then: no local copy may live longer than that (G5).

If the same copy is still served, and the store still differs, a promise is broken. That is counted and logged, and the
copy is dropped. It must never happen, so each case is worth an investigation.

Nothing waits for a shadow read. Only a few are under way at a time; until one ends, no more begin. If the store or
Redis is away, the comparison is skipped. The number of a hit decides whether it is sampled; at each sample, the number
of the next is drawn. So a hit costs only the comparison of two integers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from math import log
from typing import Any

from redis.exceptions import RedisError

from ..connection.server_errors import AWAY
from ..errors import MnemobusError
from ..log.pending import PendingWrites
from ..records import Row, unpack_memories
from ..settings import Settings
from ..tasks import end
from .l1 import MISS, Bucket, Key, LocalCache, clock
from .l2 import SharedCache
from .query import Question, Versions, versions_of

logger = logging.getLogger("mnemobus.shadow")

_READING = 2
"""Most shadow reads that ask the store at the same time."""
_WAITING = 32
"""Most shadow reads under way, including those that wait for their second check."""
_TOLD = 3
"""Most memories that a log message names."""
_SHADOW_PATIENCE = 60.0
"""Seconds to wait for workers to confirm; a longer delay is a problem of the workers, not of the caches."""


class Shadow:
    """The shadow reads of one bus. ``ask`` asks its store a question."""

    def __init__(
        self,
        settings: Settings,
        ask: Callable[[Question], Awaitable[list[Row] | int]],
        local: LocalCache,
        shared: SharedCache,
        pending: PendingWrites,
    ) -> None:
        self._share = settings.shadow_reads
        self._heartbeat = settings.heartbeat
        self._bound = settings.max_staleness + settings.heartbeat
        self._ask = ask
        self._local = local
        self._shared = shared
        self._pending = pending
        self.loop: asyncio.AbstractEventLoop | None = None
        """The thread of the bus; hits in other threads are not sampled."""
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.reads = 0
        self.breaches_local = 0
        self.breaches_shared = 0
        if self._share > 0:
            local.on_sample, local.sample_at = self._sample_local, self._gap()
            shared.on_sample, shared.sample_at = self._sample_shared, self._gap()

    async def close(self) -> None:
        """Take no more samples, and cancel those under way."""
        self._local.on_sample = self._shared.on_sample = None
        await end(self._tasks)

    @property
    def under_way(self) -> int:
        """Shadow reads without a result yet."""
        return len(self._tasks)

    def _gap(self) -> int:
        """Hits until the next sample, such that each hit is sampled with probability `share`."""
        if self._share >= 1:
            return 1
        return 1 + int(log(1.0 - random.random()) / log(1.0 - self._share))

    def _sample_local(self, bucket: Bucket, key: Key, value: Any) -> None:
        self._local.sample_at = self._local.hits + self._gap()
        if not self._busy():
            self._start(self._check_local(bucket, key, value))

    def _sample_shared(self, scope: str, field: bytes, packed: bytes) -> None:
        self._shared.sample_at = self._shared.hits + self._gap()
        if not self._busy():
            self._start(self._check_shared(scope, field, packed))

    def _busy(self) -> bool:
        if asyncio._get_running_loop() is not self.loop:
            return True
        return len(self._tasks) >= _WAITING or len(self._tasks) - self._waiting >= _READING

    def _start(self, check: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await check
            except (MnemobusError, RedisError, *AWAY) as error:
                logger.debug("a shadow read came to nothing: %s", error)
            except Exception:
                logger.exception("a shadow read failed")

        task = asyncio.create_task(run(), name="mnemobus-shadow-read")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before it began never runs its coroutine.
        task.add_done_callback(lambda _: check.close())

    async def _check_local(self, bucket: Bucket, key: Key, value: Any) -> None:
        async def served() -> bool:
            # The same object in the same bucket: a copy that was dropped and loaded again is another object.
            return self._local.has(bucket) and self._local.served(bucket.scope).get(key, MISS) is value

        question = Question.local(bucket.scope, key)
        breach = await self._older(question, versions_of(value), served)
        if breach:
            self.breaches_local += 1
            logger.error("the local copy of %s %s. Dropped it", bucket.scope, breach)
            self._local.drop(bucket.scope)
            self._local.drop_live(bucket.scope)

    async def _check_shared(self, scope: str, field: bytes, packed: bytes) -> None:
        async def served() -> bool:
            return await self._shared.peek(scope, field) == packed

        question = Question.shared(scope, field)
        try:
            copy = int(packed) if question.kind == "count" else versions_of(unpack_memories(packed))
        except (ValueError, TypeError, LookupError):
            return  # the read that got it reports it, and drops it
        breach = await self._older(question, copy, served)
        if breach:
            self.breaches_shared += 1
            logger.error("the shared copy of %s %s. Dropped it", scope, breach)
            await self._shared.discard(scope)
            self._local.drop(scope)
            self._local.drop_live(scope)

    async def _older(
        self, question: Question, copy: Versions, served: Callable[[], Awaitable[bool]]
    ) -> str | None:
        """A description of how a copy is older than promised; None if it is not."""
        truth = versions_of(await self._ask(question))
        self.reads += 1
        if not _behind(copy, truth):
            return None
        since = clock()
        self._waiting += 1
        try:
            await self._fanned_out()
            await asyncio.sleep(self._bound)
        finally:
            self._waiting -= 1
        truth = versions_of(await self._ask(question))
        if not _behind(copy, truth) or not await served():
            return None
        return (
            f"was older than the store for {clock() - since:.1f} s, where {self._bound:g} s are promised:"
            f" {_difference(copy, truth)}"
        )

    async def _fanned_out(self) -> None:
        """Return once everything delivered to workers so far is fanned out; TimeoutError if that takes too long."""
        async with asyncio.timeout(_SHADOW_PATIENCE):
            partitions = self._pending.partitions_there
            given = await self._pending.state(partitions)
            states = given
            while not all(
                given.last is None or state.passed(given.last)
                for given, state in zip(given, states, strict=True)
            ):
                await asyncio.sleep(self._heartbeat)
                states = await self._pending.state(partitions)


def _behind(copy: Versions, truth: Versions) -> bool:
    """Whether a copy differs from the store's answer, and is not the newer of the two."""
    if isinstance(copy, int) or isinstance(truth, int):
        return copy != truth
    known = dict(truth)
    return copy != truth and not any(id in known and version > known[id] for id, version in copy)


def _difference(copy: Versions, truth: Versions) -> str:
    if isinstance(copy, int) or isinstance(truth, int):
        return f"it counts {copy}, the store {truth}"
    had, known = dict(copy), dict(truth)
    wrong = [id for id in dict.fromkeys([*known, *had]) if had.get(id) != known.get(id)]
    told = [
        f"{id} is {had.get(id, 'missing')} there, {known.get(id, 'missing')} in the store" for id in wrong
    ]
    more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
    return "; ".join(told[:_TOLD] or ["the order differs"]) + more
