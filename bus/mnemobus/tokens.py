"""Tokens: with a token, another bus sees everything that this one has seen (G6).

A token names the last version that a bus wrote or observed, for each log partition. Observing it means waiting until
all events up to these versions are applied and fanned out, and then for a heartbeat, which fetches the messages that
are still missing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress

import orjson
from redis.exceptions import RedisError

from .cache.l1 import LocalCache
from .connection.link import Link
from .connection.server_errors import AWAY
from .errors import InvalidQuery, NotCommitted, SettingsError
from .feed.subscription import Feed
from .keys import Version
from .log.pending import PendingWrites

logger = logging.getLogger("mnemobus")


class Tokens:
    """The writes and observations of one bus.

    check  raises if the bus may not be used, here and now
    """

    def __init__(
        self,
        link: Link,
        pending: PendingWrites,
        feed: Feed,
        local: LocalCache,
        check: Callable[[], None],
    ) -> None:
        self._link = link
        self._pending = pending
        self._feed = feed
        self._local = local
        self._check = check
        self._seen: dict[int, Version] = {}
        """The last version that this bus wrote or observed, by log partition."""

    def forget_ended(self) -> None:
        """The log was repartitioned: everything in partitions that have ended is applied."""
        for partition in [p for p in self._seen if p < self._link.keys.shape.oldest]:
            del self._seen[partition]

    def saw(self, partition: int, version: Version) -> None:
        self._seen[partition] = max(self._seen.get(partition, version), version)

    def token(self) -> str:
        state = {str(partition): str(version) for partition, version in sorted(self._seen.items())}
        return base64.urlsafe_b64encode(orjson.dumps(state)).decode().rstrip("=")

    async def observe(self, token: str, timeout: float) -> None:
        """Return once every query of this bus sees what the token names; NotCommitted after ``timeout`` seconds."""
        wanted = self._parse(token)
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._check_partitions(wanted)
                await self._wait(wanted, deadline)
        except TimeoutError:
            raise NotCommitted(
                f"what the token names was not in the store after {timeout:g} s. Are workers running?"
            ) from None
        for partition, version in wanted.items():
            self.saw(partition, version)

    def _parse(self, token: str) -> dict[int, Version]:
        try:
            state = orjson.loads(base64.b64decode(token + "=" * (-len(token) % 4), b"-_", validate=True))
            wanted = {int(partition): Version.parse(version) for partition, version in state.items()}
        except (ValueError, TypeError, AttributeError, binascii.Error):
            raise InvalidQuery(f"{token!r} is not a token of this bus") from None
        return wanted

    async def _check_partitions(self, wanted: Iterable[int]) -> None:
        """InvalidQuery for log partitions that never existed."""
        if not self._link.laid_out or all(p in range(self._link.keys.shape.all.stop) for p in wanted):
            return
        with suppress(*AWAY, RedisError, SettingsError):
            await self._link.renew_epoch()  # the bus that made it may know a newer layout
            if not all(p in range(self._link.keys.shape.all.stop) for p in wanted):
                raise InvalidQuery("the token is of a bus with other log partitions")

    async def _wait(self, wanted: dict[int, Version], deadline: float) -> None:
        """Return once this bus knows that all of it is applied and fanned out; TimeoutError after the deadline."""
        left = dict(wanted)
        pause = 0.002
        while left:
            self._check()
            _check_time(deadline)
            try:
                states = await self._pending.state(list(left))
            except (*AWAY, RedisError, SettingsError) as error:
                logger.debug("can't ask what is applied: %s", error)
            else:
                left = {
                    partition: version
                    for (partition, version), state in zip(left.items(), states, strict=True)
                    if not state.passed(version)
                }
                if not left:
                    break
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        # All of it is fanned out. A heartbeat fetches messages that have not arrived here yet.
        while not await self._feed.sync():
            _check_time(deadline)
            logger.debug("the heartbeat failed; another one")
        # A load under a scope that the bus does not listen to may have begun before.
        self._local.drop_orphans()


def _check_time(deadline: float) -> None:
    """TimeoutError after the deadline. A timeout cancels only once, and that may be lost while a connection is
    made: see tasks.py."""
    if asyncio.get_running_loop().time() > deadline:
        raise TimeoutError
