"""``mnemobus repartition``: changes the number of log partitions, while agents and workers go on.

The log is closed to new writes, which wait; workers apply what it has; and once nothing is left, one script ends its
partitions and begins new ones (lua/relayout.lua). Writers go on there by themselves (log/routing.py).

This process may be killed at any moment: the closing expires by itself (lua/close.lua), and the script itself checks
that all events are applied. Then the log has its old layout or the new one, and takes writes in both cases.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from ..connection.link import Link
from ..connection.server_errors import AWAY, code_of, meaning
from ..errors import LogUnavailable, MnemobusError
from ..health.vitals import REPORT_EVERY, Worker, read, text
from ..keys import APPLY_GROUP, ENDED, Shape, applied_of
from ..settings import Settings
from .console import emit, err, out, run_until_signal

LEASE = 5.0
"""Seconds after which a closed log takes writes again, unless the closing is renewed."""
_RENEW = 1.0
_SMALL = 10_000
"""The log is closed only once at most this many events are left to apply, so that writers don't wait for long."""
_LOOK = 0.02
_RETRY = 0.2
"""Seconds between two checks whether all is applied; between two tries to reach Redis."""
_SIGN = 1.5 * REPORT_EVERY
"""Seconds to wait for a sign of life of workers: Redis's clock may have been set just now."""
_NAMED = 5
"""An error names at most this many agents and workers."""


def run(*, partitions: int, timeout: float, pause: float, force: bool, json: bool) -> int:
    return run_until_signal(_main(Settings.load(), partitions, timeout, pause, force, json))


async def _main(
    settings: Settings, partitions: int, timeout: float, pause: float, force: bool, json: bool
) -> int:
    async with _linked(settings) as link:
        status = err().status("...") if err().is_terminal and not json else None
        with status or nullcontext():

            def say(line: str) -> None:
                if status is not None:
                    status.update(line)
                elif not json:
                    err().print(line, markup=False, soft_wrap=True)

            work = Repartition(link, partitions, timeout, pause, say)
            changed = await work.run(force=force)
    before, after = work.before, link.keys.shape
    if json:
        emit(
            {
                "changed": changed,
                "partitions": after.size,
                "before": before.size,
                "numbers": [after.first, after.current.stop - 1],
                "closed_seconds": round(work.closed, 3),
            }
        )
    elif not changed:
        out().print(f"the log has {after.size} partitions already; nothing was changed")
    else:
        out().print(
            f"the log has {after.size} partitions now, {after.first} to {after.current.stop - 1}, instead of"
            f" {before.size}; writes waited for {work.closed:.2f} s"
        )
    return 0


@asynccontextmanager
async def _linked(settings: Settings) -> AsyncIterator[Link]:
    link = Link(settings)
    try:
        yield link
    except AWAY as error:
        raise LogUnavailable(
            f"Redis at {link.address} can't be reached: {error}. If the log was closed, it takes writes again after"
            f" {LEASE:g} s; run the same command again"
        ) from error
    except RedisError as error:
        raise LogUnavailable(f"Redis at {link.address} refuses: {meaning(error)}") from error
    finally:
        await link.close()


class Repartition:
    """One change of the log's layout.

    timeout  seconds for all of it
    pause    seconds for which writers may have to wait
    say      is called with the current step, for people
    before   the old layout of the log
    closed   seconds for which the log took no writes
    """

    def __init__(self, link: Link, partitions: int, timeout: float, pause: float, say: Any) -> None:
        self._link = link
        self._partitions = partitions
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._pause = pause
        self._say = say
        self._token = secrets.token_hex(8)
        self._closed_at: float | None = None
        self._renewed = 0.0
        self.before = Shape(0, 0)
        self.closed = 0.0

    async def run(self, *, force: bool) -> bool:
        """Change the layout. Returns whether there was anything to do. MnemobusError if it is not possible now; then
        the log has its old layout.

        force: go on even if agents of an older version are connected
        """
        await self._link.command("PING")  # now the log's layout is known
        self.before = self._link.keys.shape
        if self.before.size == self._partitions:
            return False
        await self._check_workers()
        if not force:
            await self._check_agents()
        await self._wait_for_little()
        try:
            await self._switch()
        finally:
            await self._open()
        await self._tell()
        return True

    # Agents and workers

    async def _workers(self) -> list[Worker]:
        reports, (seconds, micros) = await self._link.pipeline(
            [("HGETALL", self._link.keys.workers), ("TIME",)]
        )
        if isinstance(reports, Exception):
            raise reports
        return [worker for worker in read(reports, int(seconds) + int(micros) / 1e6) if worker.alive]

    async def _check_workers(self) -> None:
        workers: list[Worker] = []
        for _ in range(int(_SIGN / _RETRY)):
            workers = await self._workers()
            if workers:
                break
            await asyncio.sleep(_RETRY)
        else:
            raise MnemobusError(
                "no worker runs, so nothing in the log would be applied: start workers (mnemobus worker). Nothing was"
                " changed"
            )
        older = [worker.name for worker in workers if not worker.report.follows]
        if older:
            raise MnemobusError(
                f"workers of an older version run, which would not serve the new partitions: {_some(older)}. Bring them"
                " up to date first. Nothing was changed"
            )

    async def _check_agents(self) -> None:
        keys = self._link.keys
        own, layout = keys.agent_channel(""), keys.layout_channel("")
        try:
            there, following = [
                {text(name).removeprefix(channel) for name in await self._channels(channel)}
                for channel in (own, layout)
            ]
        except NoPermissionError:
            self._say("can't find out whether agents of an older version are connected: the user may not ask")
            return
        older = sorted(there - following)
        if older:
            raise MnemobusError(
                f"agents of an older version are connected, which would fail to write afterwards: {_some(older)}. Bring"
                " them up to date first, or give --force. Nothing was changed"
            )

    async def _channels(self, prefix: str) -> list[bytes]:
        found: list[bytes] = await self._link.command("PUBSUB", "CHANNELS", f"{prefix}*")
        return found

    # What is left to apply

    async def _backlog(self) -> int:
        meters = await self._link.pipeline(
            [("HMGET", self._link.keys.meter(p), "added", "applied") for p in self.before.current]
        )
        left = 0
        for meter in meters:
            if isinstance(meter, Exception):
                raise meter
            added, applied = (int(n or 0) for n in meter)
            left += max(added - applied_of(applied), 0)
        return left

    async def _wait_for_little(self) -> None:
        """Wait until closing the log would not delay writers for long."""
        while (left := await self._backlog()) > _SMALL:
            self._say(f"waiting for workers: {left:,} events are to be applied")
            if time.monotonic() >= self._deadline:
                raise MnemobusError(
                    f"{left:,} events were not applied within {self._timeout:g} s; nothing was changed. Start more"
                    " workers, or give a longer --timeout"
                )
            await asyncio.sleep(10 * _LOOK)

    # The change

    async def _switch(self) -> None:
        said = None
        while True:
            try:
                await self._close()
                left = await self._lay_out()
            except AWAY as error:
                # The change happens as a whole or not at all, and the layout shows which.
                if time.monotonic() >= self._deadline:
                    raise
                self._say(f"Redis can't be reached, trying again: {error}")
                await asyncio.sleep(_RETRY)
                continue
            if not left:
                return
            if left != said:
                said = left
                self._say(f"the log is closed; {left} partitions have events to be applied")
            assert self._closed_at is not None
            if time.monotonic() >= min(self._deadline, self._closed_at + self._pause):
                raise MnemobusError(await self._why_not())
            await asyncio.sleep(_LOOK)

    async def _close(self) -> None:
        """Make writers wait, or renew this."""
        if self._closed_at is not None and time.monotonic() < self._renewed + _RENEW:
            return
        if self._closed_at is None:
            self._closed_at = time.monotonic()
        try:
            await self._run_close(LEASE)
            self._renewed = time.monotonic()
        except ResponseError as error:
            if code_of(error) == "BUSY":
                ms = int(str(error).rpartition(" ")[2])
                raise MnemobusError(
                    f"another `mnemobus repartition` is running; if it was killed, try again in {ms / 1000:.0f} s"
                ) from None
            if code_of(error) != "LAYOUT":
                raise
            await self._look()

    async def _run_close(self, seconds: float) -> None:
        keys = self._link.keys
        meters = map(keys.meter, self.before.current)
        arguments = (self._token, int(1000 * seconds), self.before.first, self.before.size)
        await self._link.run("close", [keys.layout, *meters], arguments)

    async def _lay_out(self) -> int:
        """How many partitions have events left to apply; 0 if the log has its new layout."""
        if self._link.keys.shape != self.before:
            return 0
        keys, before = self._link.keys, self.before
        first = before.current.stop
        partitions = [*before.current, *range(first, first + self._partitions)]
        names = [name for p in partitions for name in (keys.log(p), keys.meter(p))]
        arguments = (self._token, APPLY_GROUP, before.first, before.size, self._partitions, ENDED)
        try:
            left = int(await self._link.run("relayout", [keys.layout, *names], arguments))
        except ResponseError as error:
            if code_of(error) != "LAYOUT":
                raise
            self._renewed = 0.0  # Redis may have restarted and lost the closing: close the log again
            await self._look()
            return 1 if self._link.keys.shape == before else 0
        if not left:
            await self._look()
        return left

    async def _look(self) -> None:
        """Read the present layout. MnemobusError if another command has changed it to a different one."""
        await self._link.renew_epoch()
        shape, before = self._link.keys.shape, self.before
        if shape[:2] not in (before[:2], (before.current.stop, self._partitions)):
            raise MnemobusError(
                f"another command has repartitioned the log meanwhile: it has {shape.size} partitions now"
            )

    async def _why_not(self) -> str:
        stuck = [worker for worker in await self._workers() if worker.report.waits_for]
        why = f"{await self._backlog():,} events were not applied within {self._pause:g} s"
        if stuck:
            report = stuck[0].report
            why += f": a worker waits for {report.waits_for} ({report.why})"
        return f"{why}. The log takes writes again as before; try again, or give a longer --pause"

    async def _open(self) -> None:
        """In every case, let writers go on."""
        if self._closed_at is None:
            return
        self.closed = time.monotonic() - self._closed_at
        if self._link.keys.shape != self.before:
            return
        with suppress(*AWAY, RedisError, MnemobusError):  # then it expires
            async with asyncio.timeout(self._link.settings.redis_timeout):
                await self._run_close(0)

    async def _tell(self) -> None:
        """Make agents check the layout at once. Others find out within a heartbeat, or with their next write."""
        with suppress(*AWAY, RedisError):
            names = await self._channels(self._link.keys.layout_channel(""))
            await self._link.pipeline([("PUBLISH", name, "") for name in names])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
