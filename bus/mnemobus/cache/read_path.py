"""The way of a query: this process (L1), Redis (L2), the store.

What the order of the steps has to keep:

- A query that a write of this bus touches waits for it first (G6).
- The bucket is taken before anything is read, so that an invalidation which comes meanwhile takes the bucket out of
  sight, and the fill with it (G4). It is a live one only if the bus listens to the scope's feed partition.
- Redis is not asked while no heartbeat reaches it: its buckets may be of an epoch that is over.
- Concurrent reads of one query share the load of the first, unless an invalidation or a write of this bus came between
  them: then the later one finds another bucket, without a load. Where nothing may be cached they share an orphan
  bucket, for as long as they load: else a Redis that is away would turn each read into a query. Reads whose wait
  for a write of this bus timed out answer stale, and share with each other only. A read that meets a write of this bus
  which was logged after it began shares with nobody.
- Nor is a load shared that began ``max_staleness`` ago (in a process that was paused, say, and has not heard yet what
  came meanwhile): what it brings may be as old (G5). The load is part of the first one's task: if that is cancelled,
  the others begin again, and one of them loads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from ..connection.server_errors import AWAY
from ..errors import SettingsError, StoreError, StoreUnavailable
from ..feed.subscription import Feed
from ..keys import Keyspace
from ..live.scopes import LiveScopes
from ..log.pending import PendingWrites
from ..settings import Settings
from .l1 import EACH, MISS, Bucket, Key, LocalCache, clock
from .l2 import Lease, SharedCache
from .query import Plan

logger = logging.getLogger("mnemobus.reads")

_FEED_PATIENCE = 0.05
"""Seconds that a read waits for its feed partition; without it the read is not cached."""


Answer = tuple[Any, str, bool]
"""What a load found, as L1 keeps it; where; and whether it is only the last known copy."""


class Load:
    """A read of one query that is under way, and that other reads may share.

    began: when, by `clock`
    """

    __slots__ = ("_waiting", "began")

    def __init__(self, began: float) -> None:
        self.began = began
        self._waiting: list[asyncio.Future[Answer | None]] = []

    async def wait(self) -> Answer | None:
        """The result; None if the task that loads was cancelled. Raises what the load raises."""
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        return await answer

    def succeed(self, found: Answer | None) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_result(found)

    def fail(self, error: BaseException) -> None:
        if not isinstance(error, Exception):  # the task that loads was cancelled; the others were not
            self.succeed(None)
            return
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(error)


class ReadPath:
    """The tiers of one bus, nearest first. `Bus` answers from L1 itself, without a call to this class."""

    def __init__(
        self,
        settings: Settings,
        keys: Keyspace,
        local: LocalCache,
        shared: SharedCache,
        feed: Feed,
        pending: PendingWrites,
        knows: Callable[[], bool],
        live: LiveScopes,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._live = live
        self._local = local
        self._shared = shared
        self._feed = feed
        self._pending = pending
        self._knows = knows
        """Whether the store is known to be the bus's. Others must not be given what another store has."""
        self._loads: dict[tuple[Bucket, Key], Load] = {}
        """Reads under way, by bucket and query."""
        self.misses = 0
        self.shared_loads = 0
        self.stale_reads = 0
        self.own_write_waits = 0
        self.own_write_timeouts = 0

    async def read(self, plan: Plan) -> Any:
        """The answer, shown as the caller of the query gets it. StoreUnavailable if no tier has it."""
        away: StoreError | None = None
        if self._live.concerns(plan) and self._feed.reachable:
            try:
                kept, source = await self._live.read(plan)
            except StoreError as error:
                away = error  # others may have shared the answer to this very query
            else:
                if kept is not MISS:
                    self._outdo(plan)
                    return plan.kind.show(kept, source, False)
        partition = self._keys.feed_partition(plan.scope)
        while True:
            stale = plan.scope in self._pending and not await self._wait_for_own_writes(plan.scope)
            stale = not await self._live.committed(plan, self._feed.reachable) or stale
            joined = self._feed.joined(partition) or await self._feed.join(partition, _FEED_PATIENCE)
            marked = plan.scope in self._pending
            if joined and not stale and not marked:
                bucket = self._local.open(plan.name, partition, self._settings.ttl(plan.table))
            elif marked and not stale:
                bucket = Bucket(plan.name, partition, 0.0)
            else:
                bucket = self._local.orphan(plan.name, partition, stale=stale)
            load = self._loads.get((bucket, plan.key))
            if load is None or clock() - load.began >= self._settings.max_staleness:
                kept, source, last_known = await self._lead(plan, bucket, away)
                if not self._local.has(bucket):
                    self._live.missed(plan, kept)
            else:
                self.shared_loads += 1
                answer = await load.wait()
                if answer is None:
                    continue
                kept, source, last_known = answer
            stale = stale or last_known
            self.stale_reads += stale
            return plan.kind.show(kept, source, stale)

    def _outdo(self, plan: Plan) -> None:
        """A window has answered a query. A load of that query that began earlier may find less: nobody may see it
        any more."""
        if any((bucket, plan.key) in self._loads for bucket in self._local.beside(plan.name)):
            self._local.drop(plan.scope)

    async def _lead(self, plan: Plan, bucket: Bucket, away: StoreError | None) -> Answer:
        """Load what others may wait for."""
        load = self._loads[bucket, plan.key] = Load(clock())
        try:
            found = await self._load(plan, bucket, away)
        except BaseException as error:
            load.fail(error)
            raise
        else:
            load.succeed(found)
            return found
        finally:
            if self._loads.get((bucket, plan.key)) is load:
                del self._loads[bucket, plan.key]

    async def _wait_for_own_writes(self, scope: str) -> bool:
        """Whether the writes of this bus that touch a scope are in the store, after waiting for it."""
        self.own_write_waits += 1
        await self._feed.join(self._keys.feed_partition(scope), 0)
        if await self._pending.settle(scope):
            return True
        self.own_write_timeouts += 1
        return False

    async def _load(self, plan: Plan, bucket: Bucket, away: StoreError | None) -> Answer:
        """What is found for a query beyond L1: (found, source, whether it is only the last known copy).

        away: what the store has just answered; it is not asked again then
        """
        lease: Lease | None = None
        if self._feed.reachable:
            try:
                reply = await self._shared.lookup(plan.scope, plan.field, self._settings.ttl(plan.table))
                if isinstance(reply, bytes):
                    found = await self._unpack(plan, reply)
                    if found is not MISS:
                        return self._keep(plan, bucket, found, len(reply)), "shared", False
                else:
                    lease = reply
            except (*AWAY, SettingsError) as error:
                self._feed.suspect(error)
            except RedisError as error:
                self._shared.refused(error)
        try:
            if away is not None:
                raise away
            found = await plan.find()
        except StoreUnavailable:
            last = self._local.last_known(plan.scope, plan.key)
            if last is MISS:
                last = self._live.last_known(plan)
            if last is MISS:
                raise
            return last, "local", True
        self.misses += 1
        packed = plan.kind.pack(found)
        kept = self._keep(plan, bucket, found, len(packed))
        if lease is not None and self._knows():
            try:
                await self._shared.fill(lease, packed)
            except (*AWAY, SettingsError) as error:
                self._feed.suspect(error)
        return kept, "store", False

    def _keep(self, plan: Plan, bucket: Bucket, found: Any, size: int) -> Any:
        kept = plan.kind.keep(found)
        if isinstance(found, list) and len(found) > 1:
            size += EACH * len(found)
        self._local.put(bucket, plan.key, kept, size)
        return kept

    async def _unpack(self, plan: Plan, packed: bytes) -> Any:
        try:
            return plan.kind.unpack(packed)
        except (ValueError, TypeError, LookupError) as error:
            logger.error("a shared result for %s makes no sense (%s): dropping it", plan.scope, error)
            await self._shared.discard(plan.scope)
            return MISS
