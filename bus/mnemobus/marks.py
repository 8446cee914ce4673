"""What a bus knows of its own writes that are on their way to the store.

A logged write leaves a mark on every scope that it touches. A query on a marked scope has to wait (G6): until the
feed has named the write in that scope's feed partition, or Redis says that the log's consumer group has applied
it. Either means that the write is committed and that what L2 held before is gone.

The second sign answers for what was fanned out before the bus listened there. It is asked for while somebody
waits, and with each heartbeat for marks that nobody asks about. One question answers for all that lies below the
low-water mark, so to wait for ten thousand receipts one after the other costs a few questions, not as many.

`delete_room` touches scopes that its writer can't name: it marks every other scope too. That mark is lifted only once
the low-water mark has passed it: the memories in the room that an earlier write had already deleted are that write's
to fan out, and its worker may have died before it did.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import NamedTuple, TypeVar

from redis.exceptions import RedisError

from .connection import Call, Link, script
from .errors import NotCommitted, SettingsError, WriteRejected
from .keys import APPLY_GROUP, Version
from .redis_errors import AWAY
from .tasks import end
from .wire import Command

logger = logging.getLogger("mnemobus.marks")

_EVERYWHERE = "*"
"""In place of a scope: the mark of a delete_room on all scopes but rooms."""

_POLL = (0.001, 0.1)
"""Seconds between questions to Redis while somebody waits: the first, and the longest."""
_SLOWER = 1.25
"""How much longer than the last each is."""

_ASKED = 200
"""Versions above the low-water mark that one question names at most."""

LETTERS = 1_000
"""Dead letters of a log partition that are read at a time, and kept."""


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


class Write:
    """One write of this bus that is in the log, or in the outbox on its way there.

    version  None while it is in the outbox
    applied   whether its fate is known: the store has it, or it went to the dead letters, or Redis lost it
    rejected  why it went to the dead letters, or None
    lost      whether Redis lost it before it was known to be applied
    """

    __slots__ = ("applied", "lost", "partition", "rejected", "scopes", "version", "waiters")

    def __init__(self, partition: int, version: Version | None, scopes: Iterable[str]) -> None:
        self.partition = partition
        self.version = version
        self.scopes = set(scopes)
        """Those that it still marks."""
        self.applied = False
        self.rejected: str | None = None
        self.lost = False
        self.waiters: list[asyncio.Future[None]] = []

    def settle(self, rejected: str | None, *, lost: bool = False) -> None:
        if self.applied:
            return
        self.applied, self.rejected, self.lost = True, rejected, lost
        waiters, self.waiters = self.waiters, []
        for done in waiters:
            if not done.done():
                done.set_result(None)


class _Letters:
    """The dead letters of one log partition, as far as they were read: the last ones."""

    def __init__(self) -> None:
        self.last = ""
        self.reasons: dict[Version, str] = {}

    def read(self, letters: Sequence[tuple[bytes, bytes, bytes]]) -> bool:
        """Note letters, each with ID, version and reason; whether these were all that are new."""
        for id, version, reason in letters:
            self.last = id.decode()
            with suppress(ValueError):  # what has no version is about no write
                self.reasons[Version.parse(version)] = reason.decode("utf-8", "replace")
        while len(self.reasons) > LETTERS:
            del self.reasons[next(iter(self.reasons))]
        return len(letters) < LETTERS


class Marks:
    """The marks of one bus, and those who wait for them. Used from one event loop."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._scopes: dict[str, dict[Write, float]] = {}
        self._writes: dict[int, dict[Version, Write]] = {}
        """Those that mark anything, by log partition; in each, in the order of their versions."""
        self._waiting: Counter[Write] = Counter()
        self._settling: Counter[str] = Counter()
        self._letters: dict[int, _Letters] = {}
        self._changed = asyncio.Event()
        self.in_doubt = False
        """Whether Redis may have lost writes of this bus. Until `forget_missing` has looked, it is not believed when it
        says what is applied: what is not in the log any more looks as if it had been."""
        self.doubts = 0
        """How often that came up: to have looked settles only what came up before."""
        self._poller: asyncio.Task[None] | None = None
        self._pause = _POLL[0]

    def mark(
        self,
        partition: int,
        version: Version | None,
        scopes: Iterable[str],
        deadline: float,
        *,
        everywhere: bool = False,
    ) -> Write:
        """Mark scopes; ``deadline``, by the loop's clock, is when queries stop waiting for this write.

        version: None for a write in the outbox; `logged` follows
        """
        write = Write(partition, None, [*scopes, _EVERYWHERE] if everywhere else scopes)
        if version is not None:
            self.logged(write, version)
        for scope in write.scopes:
            self._scopes.setdefault(scope, {})[write] = deadline
        return write

    def logged(self, write: Write, version: Version) -> None:
        """A write is in the log."""
        write.version = version
        self._writes.setdefault(write.partition, {})[version] = write
        if self._waiting or self._settling:
            self._start_polling()

    def __contains__(self, scope: str) -> bool:
        return scope in self._scopes or (_EVERYWHERE in self._scopes and not scope.startswith("room:"))

    def __len__(self) -> int:
        return sum(map(len, self._writes.values()))

    def on(self, scope: str) -> dict[Write, float]:
        """The writes that a query on this scope has to wait for, and until when."""
        marks = self._scopes.get(scope, {})
        if _EVERYWHERE in self._scopes and not scope.startswith("room:"):
            marks = marks | self._scopes[_EVERYWHERE]
        return marks

    def named(
        self,
        feed_partition: int,
        log_partition: int,
        versions: Iterable[Version],
        dead: dict[Version, str],
        *,
        dropped: bool = True,
    ) -> None:
        """The feed has named these events in this feed partition.

        dropped: whether what L2 had before is gone, too; if not, they are committed, but their marks stay
        """
        writes = self._writes.get(log_partition)
        if not writes:
            return
        feed_of = self._link.keys.feed_partition
        for version in versions:
            write = writes.get(version)
            if write is not None:
                write.settle(dead.get(version))
                if not dropped:
                    continue
                self._unmark(
                    write, [s for s in write.scopes if s != _EVERYWHERE and feed_of(s) == feed_partition]
                )

    def _applied(self, write: Write, rejected: str | None, *, passed: bool) -> None:
        """The consumer group has applied this event; ``passed``: and everything before it."""
        write.settle(rejected)
        self._unmark(write, [scope for scope in write.scopes if passed or scope != _EVERYWHERE])

    def _unmark(self, write: Write, scopes: Iterable[str]) -> None:
        for scope in scopes:
            write.scopes.discard(scope)
            marks = self._scopes.get(scope)
            if marks is not None:
                marks.pop(write, None)
                if not marks:
                    del self._scopes[scope]
        if not write.scopes and write.version is not None:
            writes = self._writes.get(write.partition, {})
            writes.pop(write.version, None)
            if not writes:
                self._writes.pop(write.partition, None)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self, write: Write, timeout: float) -> None:
        """Return once the event is applied.

        NotCommitted after ``timeout`` seconds, or if Redis lost it; WriteRejected if a worker said that it went to the
        dead letters.
        """
        if not write.applied:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            write.waiters.append(done)
            self._waiting[write] += 1
            self._start_polling()
            try:
                async with asyncio.timeout(timeout):
                    await done
            except TimeoutError:
                if write.version is None:
                    raise NotCommitted(
                        f"the write was not in the store after {timeout:g} s; it is in the outbox, and goes on from"
                        " there once Redis is back"
                    ) from None
                raise NotCommitted(
                    f"version {write.version} of log partition {write.partition} was not in the store after"
                    f" {timeout:g} s; it is in the log and will get there. Are workers running?"
                ) from None
            finally:
                with suppress(ValueError):
                    write.waiters.remove(done)
                _release(self._waiting, write)
        if write.lost:
            raise NotCommitted(
                f"version {write.version} of log partition {write.partition} is no longer in the log: Redis was"
                " flushed, or restarted without it. Unless a worker had it already, it will not get into the store"
            )
        if write.rejected is not None:
            raise WriteRejected(
                f"the write of version {write.version} could not be applied and is in the dead letters:"
                f" {write.rejected}"
            )

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
                _release(self._settling, scope)
        return True

    def _start_polling(self) -> None:
        self._pause = _POLL[0]
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._poll(), name="mnemobus-marks")

    def _wanted(self) -> list[Write]:
        wanted = dict.fromkeys(self._waiting)
        for scope in self._settling:
            wanted.update(dict.fromkeys(self.on(scope)))
        return [write for write in wanted if write.version is not None]

    async def _poll(self) -> None:
        """Ask Redis about what is waited for, for as long as anything is."""
        try:
            while wanted := self._wanted():
                try:
                    await self._ask(wanted)
                except (*AWAY, RedisError, SettingsError) as error:  # the heartbeat says so
                    logger.debug("can't ask what is applied: %s", error)
                except Exception:  # the poller must live as long as somebody waits
                    logger.exception("asking Redis what is applied failed; going on")
                if not self._wanted():
                    return
                await asyncio.sleep(self._pause)
                self._pause = min(self._pause * _SLOWER, _POLL[1])
        finally:
            self._poller = None

    async def beat(self) -> None:
        """Ask about marks that nobody waits for; part of the heartbeat."""
        if self._writes:
            await self._ask(
                [write for writes in self._writes.values() for write in islice(writes.values(), _ASKED)]
            )

    async def _ask(self, wanted: Iterable[Write]) -> None:
        named: dict[int, list[Write]] = {}
        for write in wanted:
            named.setdefault(write.partition, []).append(write)
        await self._learn(named)

    async def state(self, partitions: Sequence[int]) -> list[Applied]:
        """What the consumer group has applied, for each of these log partitions."""
        return await self._learn({partition: [] for partition in partitions})

    async def _learn(self, named: dict[int, list[Write]]) -> list[Applied]:
        """Ask about log partitions, and about these writes of theirs, and settle what the answer settles."""
        named = {partition: writes[:_ASKED] for partition, writes in named.items()}
        calls: list[Call | Command] = [
            self._question(partition, writes) for partition, writes in named.items()
        ]
        epoch = self._link.epoch
        *answers, current = await self._link.pipeline(
            [*calls, ("HGET", self._link.keys.epoch, "epoch")], pool=self._link.probe
        )
        if self.in_doubt or epoch != self._link.epoch or current != epoch.encode():
            raise TimeoutError(
                "Redis restarted or was flushed: what it says of earlier writes has to be checked first"
            )
        states = []
        for (partition, asked), answer in zip(named.items(), answers, strict=True):
            if isinstance(answer, Exception):
                raise answer
            last, pending, letters, *flags = answer
            state = Applied(
                Version.parse(last) if last else None, Version.parse(pending) if pending else None
            )
            states.append(state)
            if not self._letters.setdefault(partition, _Letters()).read(letters):
                continue  # there are more, and one may be about a write of ours: the next question reads on
            applied: list[tuple[Version, Write]] = []
            for version, write in self._writes.get(partition, {}).items():
                if not state.passed(version):
                    break
                applied.append((version, write))
            for write, is_pending in zip(asked, flags, strict=False):
                version_asked = write.version
                if version_asked is None or state.last is None or version_asked > state.last or is_pending:
                    continue
                applied.append((version_asked, write))
            for version, write in applied:
                reason = self._letters[partition].reasons.get(version)
                self._applied(write, reason, passed=state.passed(version))
        return states

    def _question(self, partition: int, writes: Sequence[Write]) -> Call:
        keys = [self._link.keys.log(partition), self._link.keys.dead(partition)]
        letters = self._letters.get(partition)
        known = letters.last if letters is not None else ""
        return (script("applied"), keys, (APPLY_GROUP, known, LETTERS, *(str(w.version) for w in writes)))

    def doubt(self) -> None:
        """Redis may have lost writes of this bus, those included that it is about to hear of."""
        self.in_doubt = True
        self.doubts += 1

    async def forget_missing(self) -> int:
        """Drop the marks of writes that the log no longer has, because Redis lost it; how many they were.

        Nobody will ever apply them. What was written since is in the new log, and stays marked.
        """
        missing = 0
        self._letters.clear()
        for partition, writes in list(self._writes.items()):
            known = list(writes.items())
            key = self._link.keys.log(partition)
            for start in range(0, len(known), LETTERS):
                part = known[start : start + LETTERS]
                found = await self._link.pipeline(
                    [("XRANGE", key, str(version), str(version)) for version, _ in part],
                    pool=self._link.probe,
                )
                for (_, write), entries in zip(part, found, strict=True):
                    if isinstance(entries, Exception):
                        raise entries
                    if not entries:
                        missing += 1
                        write.settle(None, lost=True)
                        self._unmark(write, list(write.scopes))
        return missing

    async def close(self) -> None:
        await end([self._poller])


T = TypeVar("T")


def _release(counter: Counter[T], item: T) -> None:
    counter[item] -= 1
    if not counter[item]:
        del counter[item]
