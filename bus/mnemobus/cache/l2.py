"""L2: query results in Redis, shared by all agents.

A bucket is a hash, named by epoch and scope. A reader that misses takes a lease (a field of that hash), reads the
store and fills; the fill is accepted only while its lease is there. The fan-out of a write unlinks the whole hash,
leases and all, after the write is committed: so a fill that read the store before cannot arrive after (G4; leases as
in Nishtala et al., NSDI 2013). Eviction and expiry do the same as an invalidation: whatever is lost, it fails safe.

The lease also holds back the herd: others wait a moment for the fill, then read the store without filling.

The log comes first. Where Redis has a limit and evicts nothing (``noeviction``), results are shared only as long as it
is filled to no more than `SHARE` percent; and where it is full all the same, what L2 holds goes (log/full_redis.py)
before a write is refused.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from redis.exceptions import RedisError, ResponseError

from ..connection.link import Link
from ..connection.server_errors import AWAY, REPLACED, code_of, meaning
from ..errors import SettingsError
from .l1 import clock

logger = logging.getLogger("mnemobus.shared")

MAX_FIELDS = 512
"""Results and leases that one bucket may hold; with one more it is emptied first."""
SHARE = 60
"""Percent of a limited Redis up to which results are shared there."""
MAX_RESULT = 4 << 20
"""Bytes above which a result is not shared."""
REFUSED = 2
"""What `lookup` and `fill.lua` answer where Redis takes no result."""
_FILL_PATIENCE = (0.002, 0.005, 0.010, 0.020)
"""Seconds between looks for a fill that another has the lease for."""
_SPELL = 60.0
"""Seconds for which a refusal is remembered; others within that time are not logged."""


class Lease:
    """The right to fill one query's result."""

    __slots__ = ("epoch", "field", "key", "token")

    def __init__(self, key: str, field: bytes, token: str, epoch: str) -> None:
        self.key = key
        self.field = field
        self.token = token
        self.epoch = epoch


class SharedCache:
    """The L2 of a bus. Raises one of AWAY if Redis can't be reached."""

    def __init__(self, link: Link, lease: float) -> None:
        self._link = link
        self._lease_ms = int(lease * 1000)
        self._tokens = (f"{secrets.token_hex(6)}.{n}" for n in count())
        self.sample_at = 0
        """The number of the hit that `on_sample` is told of; 0 for none."""
        self.on_sample: Callable[[str, bytes, bytes], None] | None = None
        """Called with scope, field and result of that hit. Must not raise."""
        self.hits = 0
        self.fills = 0
        self.refused_fills = 0
        self._trouble = ""
        self._trouble_until = 0.0

    @property
    def trouble(self) -> str:
        """Why Redis refused to share a result, within the last minute; empty if it did not."""
        return self._trouble if clock() < self._trouble_until else ""

    def refused(self, error: object) -> None:
        """Redis takes no result: it is full, or a key of another kind is in the way."""
        if isinstance(error, Exception) and (code_of(error) in REPLACED or code_of(error) == "BUSY"):
            return  # Redis can't be used at all, and the feed says so
        log = logger.debug if self.trouble else logger.warning
        log("the shared cache can't be used: %s", meaning(error))
        self._trouble, self._trouble_until = meaning(error), clock() + _SPELL

    async def lookup(self, scope: str, field: bytes, ttl: float) -> bytes | Lease | None:
        """The result; or a lease to fill it; or None if there is no result and another reader has the lease."""
        for pause in (*_FILL_PATIENCE, None):
            reply, lease = await self._look(scope, field, ttl)
            if isinstance(reply, bytes):
                self.hits += 1
                if self.hits == self.sample_at and self.on_sample is not None:
                    self.on_sample(scope, field, reply)
                return reply
            if reply == 1:
                return lease
            if reply == REFUSED or pause is None:
                return None
            await asyncio.sleep(pause)
        return None

    async def _look(self, scope: str, field: bytes, ttl: float) -> tuple[bytes | int, Lease]:
        while True:
            epoch = self._link.epoch
            lease = Lease(self._link.keys.bucket(epoch, scope), field, next(self._tokens), epoch)
            args = (field, lease.token, self._lease_ms, int(ttl * 1000), MAX_FIELDS)
            try:
                reply = await self._link.run("lookup", [lease.key], args)
            except ResponseError as error:
                self.refused(error)
                return REFUSED, lease
            # What a bucket of an older epoch holds may be older than the store knows.
            if epoch == self._link.epoch:
                return reply, lease

    async def peek(self, scope: str, field: bytes) -> bytes | None:
        """The result, or None; takes no lease and counts as no hit."""
        key = self._link.keys.bucket(self._link.epoch, scope)
        result: bytes | None = await self._link.command("HGET", key, b"q:" + field)
        return result

    async def fill(self, lease: Lease, result: bytes) -> bool:
        """Share a result; False if the lease no longer held."""
        if len(result) > MAX_RESULT or lease.epoch != self._link.epoch:
            return False
        try:
            accepted = await self._link.run("fill", [lease.key], (lease.field, lease.token, result, SHARE))
        except ResponseError as error:
            self.refused(error)
            return False
        if accepted == REFUSED:
            self.refused(f"Redis is filled to more than {SHARE} % of maxmemory: what is left is for the log")
            return False
        if accepted:
            self.fills += 1
        else:
            self.refused_fills += 1
        return bool(accepted)

    async def discard(self, scope: str) -> None:
        """Drop a bucket whose content makes no sense."""
        with suppress(RedisError, SettingsError, *AWAY):
            await self._link.command("UNLINK", self._link.keys.bucket(self._link.epoch, scope))
