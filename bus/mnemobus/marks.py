"""What a bus knows of its own writes that are on their way to the store.

A logged write leaves a mark on every scope that it touches. A query on a marked scope has to wait (G6): until the
feed has named the write in that scope's feed partition, or Redis says that the log's consumer group has applied
it. Either means that the write is committed and that what L2 held before is gone.

The second sign answers for what was fanned out before the bus listened there. It is asked for while somebody
waits, and with each heartbeat for marks that nobody asks about.

`delete_room` touches scopes that its writer can't name: it marks every other scope too, and only the second sign
lifts that mark, since the fan-out to all of them is complete only then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from .connection import AWAY, Call, Link, script
from .errors import NotCommitted, WriteRejected
from .keys import APPLY_GROUP, Version
from .tasks import end

logger = logging.getLogger("mnemobus.marks")


class Entry(NamedTuple):
    """One event in the log: its partition and its version."""

    partition: int
    version: Version


class Applied(NamedTuple):
    """What the consumer group of a log partition has applied.

    last      the last version that it was given
    pending   the lowest that it has not confirmed; None where nothing pends
    """

    last: Version | None
    pending: Version | None

    def passed(self, version: Version) -> bool:
        """Whether everything up to this version is applied: the low-water mark is beyond it."""
        if self.last is None or version > self.last:
            return False
        return self.pending is None or version < self.pending


_EVERYWHERE = "*"
"""In place of a scope: the mark of a delete_room on all scopes but rooms."""

_POLL = (0.003, 0.1)
"""Seconds between questions to Redis while somebody waits: the first, and the longest."""

_BEAT = 500
"""Marks that are asked about in one heartbeat."""


class Marks:
    """The marks of one bus, and those who wait for them. Used from one event loop."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._scopes: dict[str, dict[Entry, float]] = {}
        self._entries: dict[Entry, list[str]] = {}
        self._waiting: dict[Entry, list[asyncio.Future[None]]] = {}
        self._settling: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._pause = _POLL[0]

    def mark(self, entry: Entry, scopes: Iterable[str], deadline: float, *, everywhere: bool = False) -> None:
        """Mark scopes; ``deadline``, by the loop's clock, is when queries stop waiting for this write."""
        names = [*scopes, _EVERYWHERE] if everywhere else list(scopes)
        self._entries[entry] = names
        for scope in names:
            self._scopes.setdefault(scope, {})[entry] = deadline

    def __contains__(self, scope: str) -> bool:
        return scope in self._scopes or (_EVERYWHERE in self._scopes and not scope.startswith("room:"))

    def __len__(self) -> int:
        return len(self._entries)

    def on(self, scope: str) -> dict[Entry, float]:
        """The writes that a query on this scope has to wait for, and until when."""
        marks = self._scopes.get(scope, {})
        if _EVERYWHERE in self._scopes and not scope.startswith("room:"):
            marks = marks | self._scopes[_EVERYWHERE]
        return marks

    def named(
        self, feed_partition: int, log_partition: int, versions: Iterable[Version], dead: dict[Version, str]
    ) -> None:
        """The feed has named these events in this feed partition."""
        if not self._entries and not self._waiting:
            return
        feed_of = self._link.keys.feed_partition
        for version in versions:
            entry = Entry(log_partition, version)
            scopes = self._entries.get(entry)
            if scopes is not None:
                there = [s for s in scopes if s != _EVERYWHERE and feed_of(s) == feed_partition]
                self._unmark(entry, there)
            reason = dead.get(version)
            self._resolve(entry, None if reason is None else WriteRejected(_rejected(version, reason)))

    def applied(self, entry: Entry) -> None:
        """The consumer group has applied this event, everywhere."""
        self._unmark(entry, list(self._entries.get(entry, ())))
        self._resolve(entry, None)

    def _unmark(self, entry: Entry, scopes: list[str]) -> None:
        left = self._entries.get(entry)
        for scope in scopes:
            if left is not None:
                left.remove(scope)
            marks = self._scopes.get(scope)
            if marks is not None:
                marks.pop(entry, None)
                if not marks:
                    del self._scopes[scope]
        if left is not None and not left:
            del self._entries[entry]
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _resolve(self, entry: Entry, error: Exception | None) -> None:
        for done in self._waiting.pop(entry, ()):
            if not done.done():
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)
                    done.exception()

    async def wait(self, entry: Entry, timeout: float) -> None:
        """Return once the event is applied.

        NotCommitted after ``timeout`` seconds; WriteRejected if a worker said that it went to the dead letters.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        waiting = self._waiting.setdefault(entry, [])
        waiting.append(done)
        self._start_polling()
        try:
            async with asyncio.timeout(timeout):
                await done
        except TimeoutError:
            raise NotCommitted(
                f"version {entry.version} of log partition {entry.partition} was not in the store after"
                f" {timeout:g} s; it is in the log and will get there. Are workers running?"
            ) from None
        finally:
            with suppress(ValueError):
                waiting.remove(done)
            if not waiting and self._waiting.get(entry) is waiting:
                del self._waiting[entry]

    async def settle(self, scope: str) -> bool:
        """Wait until nothing marks the scope; False if the marks' deadlines passed before."""
        loop = asyncio.get_running_loop()
        while scope in self:
            remaining = max(self.on(scope).values()) - loop.time()
            if remaining <= 0:
                return False
            self._settling[scope] += 1
            self._start_polling()
            try:
                async with asyncio.timeout(remaining):
                    await self._changed.wait()
            except TimeoutError:
                pass
            finally:
                self._settling[scope] -= 1
                self._settling += Counter()  # keeps what is above 0
        return True

    def _start_polling(self) -> None:
        self._pause = _POLL[0]
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._poll(), name="mnemobus-marks")

    def _wanted(self) -> list[Entry]:
        wanted = set(self._waiting)
        for scope in self._settling:
            wanted.update(self.on(scope))
        return list(wanted)

    async def _poll(self) -> None:
        """Ask Redis about what is waited for, for as long as anything is."""
        try:
            while wanted := self._wanted():
                try:
                    await self._ask(wanted)
                except AWAY as error:
                    logger.debug("can't ask what is applied: %s", error)
                except Exception:  # the poller must live as long as somebody waits
                    logger.exception("asking Redis what is applied failed; going on")
                await asyncio.sleep(self._pause)
                self._pause = min(self._pause * 1.5, _POLL[1])
        finally:
            self._poller = None

    async def beat(self) -> None:
        """Ask about marks that nobody waits for; part of the heartbeat."""
        if self._entries:
            await self._ask(list(self._entries)[:_BEAT])

    async def _ask(self, entries: Sequence[Entry]) -> None:
        partitions: dict[int, list[Entry]] = {}
        for entry in entries:
            partitions.setdefault(entry.partition, []).append(entry)
        asked = list(partitions.items())
        commands = [self._question(p, [e.version for e in group]) for p, group in asked]
        for (_, group), reply in zip(
            asked, await self._link.pipeline(commands, client=self._link.probe), strict=True
        ):
            if isinstance(reply, Exception):
                raise reply
            state = _applied(reply)
            for entry, pending in zip(group, reply[2:] or [1] * len(group), strict=True):
                if not pending and state.last is not None and entry.version <= state.last:
                    await self._confirm(entry)

    async def _confirm(self, entry: Entry) -> None:
        # A dead letter is applied, too, as far as the consumer group is concerned.
        reason = await self._reason(entry) if entry in self._waiting else None
        if reason is not None:
            self._resolve(entry, WriteRejected(_rejected(entry.version, reason)))
        self.applied(entry)

    async def _reason(self, entry: Entry) -> str | None:
        dead: Any = await self._link.probe.xrevrange(self._link.keys.dead(entry.partition), count=1_000)
        wanted = str(entry.version).encode()
        for _, fields in dead:
            if fields.get(b"version") == wanted:
                return str(fields.get(b"reason", b"").decode("utf-8", "replace"))
        return None

    async def state(self, partitions: Sequence[int]) -> list[Applied]:
        """What the consumer group has applied, for each of these log partitions."""
        commands = [self._question(p, []) for p in partitions]
        replies = await self._link.pipeline(commands, client=self._link.probe)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return [_applied(reply) for reply in replies]

    def _question(self, partition: int, versions: Sequence[Version]) -> Call:
        arguments = (APPLY_GROUP, *(str(v) for v in versions))
        return (script("applied"), [self._link.keys.log(partition)], arguments)

    def forget(self) -> None:
        """Drop every mark: the log that they are about is gone."""
        self._scopes.clear()
        self._entries.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        await end([self._poller])


def _applied(reply: Sequence[bytes]) -> Applied:
    last, pending = reply[0], reply[1]
    return Applied(Version.parse(last) if last else None, Version.parse(pending) if pending else None)


def _rejected(version: Version, reason: str) -> str:
    return f"the write of version {version} could not be applied and is in the dead letters: {reason}"
