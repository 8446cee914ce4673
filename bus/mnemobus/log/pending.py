"""Pending writes: those of this bus that are on their way to the store. Calls wait for them here, and Redis is asked.

The scopes that they touch are marked (marks.py). A query on such a scope has to wait (G6): until the feed has named the
write in that scope's feed partition, or Redis says that the log's consumer group has applied it. Either means that the
write is committed and that the older results in L2 are dropped.

The second sign covers what was fanned out before the bus listened to that partition. The bus asks for it while a call
waits, and with each heartbeat for the other marks. One question covers everything below the low-water mark: a caller
that waits for ten thousand receipts, one after the other, costs a few questions, not ten thousand.

To the consumer group, a dead letter looks like an applied write. So if Redis has any reasons of dead letters, the bus
asks for them by version before it takes a write as stored, whatever their number, and whether or not the feed's
message came. If the outcome is no longer known, the bus says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from redis.exceptions import RedisError

from ..connection.link import Call, Link, script
from ..connection.server_errors import AWAY
from ..connection.transport import Command
from ..errors import BusClosed, NotCommitted, SettingsError, WriteRejected
from ..keys import APPLY_GROUP, LAST, ZERO, Version
from ..tasks import end
from .marks import Marks, Write
from .progress import Fate, Progress

logger = logging.getLogger("mnemobus.pending")

_POLL = (0.001, 0.1)
"""Seconds between questions to Redis while a call waits: the first, and the longest."""
_SLOWER = 1.25
"""Each pause is this many times as long as the one before."""

_ASKED = 200
"""Most versions above the low-water mark that one question names."""

_PART = 1_000
"""Reasons to ask for at a time."""
_LOOKED_FOR = 100
"""Entries of the log to look for at a time: each may hold a megabyte."""

INDEXED = 1
"""Dead letters whose reasons are noted in one step: each may hold a megabyte, and the step blocks the server."""
_STEPS = 64
"""Such steps with one question; the next question goes on."""


class PendingWrites(Marks):
    """The writes of one bus that are not known to be in the store: what they mark, and the calls that wait for them.
    Used from one event loop."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.in_doubt = False
        """Whether Redis may have lost writes of this bus. Until `forget_missing` has looked, its answers about applied
        writes do not count: a write that is gone from the log looks as if it had been applied."""
        self._poller: asyncio.Task[None] | None = None
        self._pause = _POLL[0]
        self._closed = False

    async def wait(self, write: Write, timeout: float) -> None:
        """Return once the event is applied.

        NotCommitted after ``timeout`` seconds, or if Redis lost it, or if nobody can tell; WriteRejected if it is a
        dead letter; BusClosed if the bus is closed meanwhile.
        """
        if write.rejected is not None:
            await self._look_again(write)
        if not write.applied:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if write.waiters is None:
                write.waiters = []
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
                if write.waiters is not None:
                    with suppress(ValueError):
                        write.waiters.remove(done)
                _release(self._waiting, write)
        if write.lost:
            raise NotCommitted(
                f"version {write.version} of log partition {write.partition} is no longer in the log: Redis was"
                " flushed, or restarted without it. Unless a worker had it already, it will not get into the store"
            )
        if write.unknown:
            raise NotCommitted(
                f"whether the store has version {write.version} of log partition {write.partition} can't be known any"
                " more: it is done with, and there were so many dead letters since that older ones were given up"
                " (MNEMOBUS_DEAD_LETTER_BYTES). Read the memory"
            )
        if write.rejected is not None:
            raise WriteRejected(
                f"the write of version {write.version} could not be applied and is in the dead letters:"
                f" {write.rejected}"
            )

    async def _look_again(self, write: Write) -> None:
        """A write that was a dead letter may have been requeued since."""
        key = self._link.keys.reasons(write.partition)
        with suppress(*AWAY, RedisError, SettingsError):
            fate = Fate.read(await self._link.command("HGET", key, str(write.version), pool=self._link.probe))
            if fate.requeued is not None:
                write.applied, write.rejected, write.entry = False, None, fate.requeued

    async def settle(self, scope: str) -> bool:
        """Wait until nothing marks the scope; False if the marks' deadlines passed before, BusClosed if the bus is
        closed meanwhile."""
        loop = asyncio.get_running_loop()
        while scope in self:
            remaining = self._deadline(scope) - loop.time()
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
            if self._closed:
                raise BusClosed("the bus was closed while a read waited for a write of its own")
        return True

    def _start_polling(self) -> None:
        self._pause = _POLL[0]
        if self._poller is None and not self._closed:
            self._poller = asyncio.get_running_loop().create_task(self._poll(), name="mnemobus-pending")

    async def _poll(self) -> None:
        """Ask Redis about pending writes, as long as a call waits for any."""
        try:
            while wanted := self._wanted():
                try:
                    await self._learn(wanted)
                except (*AWAY, RedisError, SettingsError) as error:  # the heartbeat says so
                    logger.debug("can't ask what is applied: %s", error)
                except Exception:  # the poller must live as long as a call waits
                    logger.exception("asking Redis what is applied failed; going on")
                if not self._wanted():
                    return
                await asyncio.sleep(self._pause)
                self._pause = min(self._pause * _SLOWER, _POLL[1])
        finally:
            self._poller = None

    async def beat(self) -> None:
        """Ask about marks that no call waits for; part of the heartbeat."""
        if self._writes or self._covers:
            asked = {p: list(islice(writes.values(), _ASKED)) for p, writes in self._writes.items()}
            await self._learn({p: [] for p in self._covers} | asked)

    async def state(self, partitions: Sequence[int]) -> list[Progress]:
        """What the consumer group has applied, for each of these log partitions."""
        return await self._learn({partition: [] for partition in partitions})

    async def _learn(self, named: dict[int, list[Write]]) -> list[Progress]:
        """Ask about log partitions and about these writes of theirs, and settle the writes that the answer decides."""
        named = {partition: writes[:_ASKED] for partition, writes in named.items()}
        epoch = self._link.epoch
        doubts = self.doubts
        answers = await self._believed(
            epoch, [self._question(partition, writes) for partition, writes in named.items()]
        )
        states = []
        for (partition, asked), answer in zip(named.items(), answers, strict=True):
            last, pending, known, unnoted, forgotten, *flags = answer
            # If the partition was retired, all of its events are settled.
            given_up = not last and partition < self._link.keys.shape.oldest
            if given_up:
                last = str(LAST)
            state = Progress(
                Version.parse(last) if last else None, Version.parse(pending) if pending else None
            )
            states.append(state)
            if unnoted and not await self._note_reasons(partition):
                continue  # one of them may be about a write of ours: the next question goes on
            applied = self._passed(partition, state)
            for write, is_pending in zip(asked, flags, strict=False):
                if write.entry is None or state.last is None or write.entry > state.last or is_pending:
                    continue
                applied[write] = write.entry
            missed = [write for write in applied if not write.scopes and write.doubts != doubts]
            if missed:  # they have no marks, so they were not looked for since Redis may have lost them
                await self._look_for(missed, doubts)
            asked = [write for write in applied if not write.applied] if known or unnoted else []
            fates = dict(zip(asked, await self._fates(epoch, partition, asked), strict=True)) if asked else {}
            floor = Version.parse(forgotten) if forgotten else None
            for write, entry in applied.items():
                fate = Fate.read(fates.get(write))
                assert write.version is not None
                if fate.requeued is not None and fate.requeued != entry:
                    write.entry = fate.requeued  # it has to be applied from there
                    continue
                unknown = not fate.noted and (given_up or (floor is not None and write.version <= floor))
                self._applied(write, fate.rejected, passed=state.passed(write.version), unknown=unknown)
            cover = self._covers.get(partition)
            if cover is not None and state.passed(cover.version):
                del self._covers[partition]
        self._tell()
        return states

    async def _believed(self, epoch: str, calls: Sequence[Call | Command]) -> list[Any]:
        """The answers to questions; TimeoutError if Redis may have lost the writes since."""
        *answers, current = await self._link.pipeline(
            [*calls, ("HGET", self._link.keys.epoch, "epoch")], pool=self._link.probe
        )
        if self.in_doubt or epoch != self._link.epoch or current != epoch.encode():
            raise TimeoutError(
                "Redis restarted or was flushed: what it says of earlier writes has to be checked first"
            )
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _fates(self, epoch: str, partition: int, writes: Sequence[Write]) -> list[bytes | None]:
        """What Redis has noted of these writes. It notes only those that could not be applied."""
        key = self._link.keys.reasons(partition)
        parts = [writes[start : start + _PART] for start in range(0, len(writes), _PART)]
        found = await self._believed(
            epoch, [("HMGET", key, *(str(w.version) for w in part)) for part in parts]
        )
        return [fate for part in found for fate in part]

    async def _note_reasons(self, partition: int) -> bool:
        """Note the reasons of dead letters that an older mnemobus wrote; return whether these were all."""
        keys = self._link.keys
        places = [keys.dead(partition), keys.reasons(partition), keys.meter(partition)]
        for _ in range(_STEPS):
            [done] = await self._link.pipeline([(script("index"), places, (INDEXED,))], pool=self._link.probe)
            if isinstance(done, Exception):
                raise done
            if done < INDEXED:
                return True
        return False

    def _question(self, partition: int, writes: Sequence[Write]) -> Call:
        keys = self._link.keys
        places = [keys.log(partition), keys.dead(partition), keys.reasons(partition), keys.meter(partition)]
        return (script("applied"), places, (APPLY_GROUP, *(str(write.entry) for write in writes)))

    def doubt(self) -> None:
        """Redis may have lost writes of this bus, including those whose answers are still on their way."""
        self.in_doubt = True
        self.doubts += 1

    async def forget_missing(self) -> int:
        """Drop the marks of writes that Redis has lost with its log; return how many these were.

        No worker will ever apply them. Later writes are in the new log, and stay marked.
        """
        missing, doubts = 0, self.doubts
        for writes in list(self._writes.values()):
            missing += await self._look_for(list(writes.values()), doubts)
        for partition, cover in list(self._covers.items()):
            if cover.doubts != doubts:
                # Redis loses the newest writes: this is the last one that it still has.
                asked = cover.version
                found = await self._link.command(
                    "XREVRANGE",
                    self._link.keys.log(partition),
                    str(asked),
                    "-",
                    "COUNT",
                    1,
                    pool=self._link.probe,
                )
                if self._covers.get(partition) is not cover or cover.version != asked:
                    continue
                last = Version.parse(found[0][0]) if found else ZERO
                if last != asked:
                    missing += cover.writes
                cover.version, cover.doubts = last, doubts
                if last == ZERO:
                    del self._covers[partition]
        self._tell()
        return missing

    async def _look_for(self, writes: Sequence[Write], doubts: int) -> int:
        """Settle the writes that the log no longer has; return how many these were."""
        missing = 0
        for start in range(0, len(writes), _LOOKED_FOR):
            part = writes[start : start + _LOOKED_FOR]
            by_partition: dict[int, list[Write]] = {}
            for write in part:
                by_partition.setdefault(write.partition, []).append(write)
            for partition, those in by_partition.items():
                ids = [write.entry for write in those if write.entry is not None]
                for write, entry in zip(those, await self._entries(partition, ids), strict=True):
                    write.doubts = doubts
                    if not entry:
                        missing += 1
                        write.settle(None, lost=True)
                        self._unmark(write, write.scopes)
        return missing

    async def _entries(self, partition: int, ids: Sequence[Version]) -> list[Any]:
        key = self._link.keys.log(partition)
        found = await self._link.pipeline(
            [("XRANGE", key, str(id), str(id)) for id in ids], pool=self._link.probe
        )
        for entries in found:
            if isinstance(entries, Exception):
                raise entries
        return found

    def stop(self) -> None:
        """End all waiting: the bus is being closed."""
        self._closed = True
        for write in list(self._waiting):
            where = "outbox" if write.version is None else "log"
            for done in write.waiters or ():
                if not done.done():
                    done.set_exception(
                        BusClosed(
                            "the bus was closed before the store was known to have the write; it is in the"
                            f" {where}, and goes on from there"
                        )
                    )
        self._tell()

    async def close(self) -> None:
        self.stop()
        await end([self._poller])


T = TypeVar("T")


def _release(counter: Counter[T], item: T) -> None:
    counter[item] -= 1
    if not counter[item]:
        del counter[item]
