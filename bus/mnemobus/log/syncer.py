"""`durability="synced"`: waits until what is logged is on disk, or on a replica."""

from __future__ import annotations

import asyncio
import logging

from ..connection.link import Link
from ..connection.server_errors import AWAY, meaning
from ..errors import DurabilityUnavailable, MnemobusError, SettingsError

logger = logging.getLogger("mnemobus.log")


class Syncer:
    """Waits until what was logged is on disk or on a replica; many calls share one wait.

    WAITAOF and WAIT apply to what the same connection wrote before. So a small write comes first: it is later than
    everything that was logged when the wait began.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
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
                except Exception as error:  # every waiter must get the error, whatever it is
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
            meter = self._link.keys.meter(self._link.keys.shape.first)
            try:
                replies = await self._link.pipeline([("HINCRBY", meter, "syncs", 1), wait])
            except (SettingsError, *AWAY) as error:
                raise DurabilityUnavailable(
                    f"the write is in the log, but Redis went away before it was synced: {error}"
                ) from error
            for reply in replies:
                if isinstance(reply, Exception):
                    raise DurabilityUnavailable(
                        f"the write is in the log, but can't be synced: {meaning(reply)}"
                    ) from reply
            if (replies[1][0] if local else replies[1]) >= 1:
                return
        raise DurabilityUnavailable(
            f"the write is in the log, but was not synced within {settings.write_timeout:g} s"
        )
