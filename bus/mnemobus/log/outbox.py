"""Writes wait here while the log can't be reached (G7), in a bounded file that survives the process.

By these rules each write in the file (outbox_file.py) reaches the log exactly once, whichever process dies at any
moment:

- A write is in the file, synced to disk, before its writer gets an answer.
- Writes are published in calls, as all others (publisher.py). *Before* a call is made, the file has the writes of the
  call, its producer and its sequence number. They don't change until the call is answered. So the same call is made
  again after a crash, and `publish.lua` answers it without doing it twice.
- If the log goes away while a call is under way, its outcome is unknown. It enters the file with the number that it
  had.
- Writes are removed from the file after their call was answered, not earlier.
- The log partition of a write is decided together with its call, because the log may be repartitioned while the write
  waits. A call of unknown outcome is repeated in its first partition. If that partition has ended, the call has written
  nothing there, and never will; so its writes go to the new partitions.

Usually (MNEMOBUS_OUTBOX=auto) each bus has its own file in MNEMOBUS_DATA_DIR/outbox. The file is made when it is first
needed and removed when it is empty. A bus that opens looks there for files that no process holds any more, those of
killed agents. It publishes their writes before its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from .. import private
from ..connection.link import Link
from ..connection.server_errors import AWAY
from ..errors import BacklogFull, LogFull, MnemobusError, OutboxError, OutboxInUse, Overtaken, PartitionEnded
from ..keys import Version
from ..tasks import end
from .append import Field, append
from .events import Event
from .marks import Write
from .outbox_file import OutboxFile

logger = logging.getLogger("mnemobus.outbox")


def _has_begun(path: Path) -> bool:
    """Whether a file has, or had, any content. The bus that made an empty one may be about to lock it."""
    try:
        return path.stat().st_size > 0
    except OSError:  # its owner has just removed it, or we may not read it
        return False


class Outbox:
    """The outbox of a bus: its own file, and those that it found without an owner.

    on_kept: called with partition and event of each write that is in the file, before its writer gets an answer; it
        returns the answer
    on_published: called once such a write is in the log; with None if the write is of an earlier process, or if no
        caller holds it any more
    on_empty: called when all writes are in the log
    """

    def __init__(
        self,
        link: Link,
        bus_id: str,
        on_kept: Callable[[int, Event], Write],
        on_published: Callable[[int, Write | None, Version], None],
        on_empty: Callable[[], None],
    ) -> None:
        settings = link.settings
        self._link = link
        self._on_kept = on_kept
        self._on_published = on_published
        self._on_empty = on_empty
        self._max_bytes = settings.outbox_max_bytes
        self._largest = settings.max_memory_bytes
        self._auto = settings.outbox == "auto"
        folder = settings.data_dir / "outbox"
        self._folder = folder
        self._own = self._file(folder / f"{bus_id}.db" if self._auto else Path(settings.outbox))
        self._store = ""
        if settings.database_url.startswith("sqlite:///"):
            self._store = str(Path(settings.database_url.removeprefix("sqlite:///")).absolute())
        self._opened = False
        self._opening = asyncio.Lock()
        self._found: list[OutboxFile] = []
        self._writes: WeakValueDictionary[int, Write] = WeakValueDictionary()
        """By number in the bus's own file: the writes of this process that a caller still holds."""
        self._task: asyncio.Task[None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self._hurried = asyncio.Event()
        self.away = False
        """Whether the log could not be reached at the last attempt."""
        self.kept = 0

    def _file(self, path: Path, *, own: bool = True) -> OutboxFile:
        return OutboxFile(path, self._link.keys, self._max_bytes, own=own, largest=self._largest)

    @property
    def waiting(self) -> int:
        """How many writes are not in the log yet; while there are any, newer ones have to wait behind them."""
        own = self._own.entries
        return own + sum(file.entries for file in self._found) if self._found else own

    @property
    def where(self) -> str:
        return str(self._own.path)

    @property
    def trouble(self) -> str | None:
        """Why writes could not wait here if the log went away now; None if they could."""
        reason = None if self._opened else private.obstacle(self._own.path.parent)
        return reason and f"{reason}. Set MNEMOBUS_DATA_DIR, or MNEMOBUS_OUTBOX to a file, or to off"

    async def open(self) -> None:
        """Take over what an earlier process left. OutboxInUse, OutboxError if the configured file can't be used.

        With MNEMOBUS_OUTBOX=auto the file is made when it is needed. If that will be impossible, it is no error yet,
        because many agents only read. It is logged, and `trouble` says it.
        """
        if self._auto:
            if self.trouble:
                logger.warning("while Redis is away, writes can't wait in the outbox: %s", self.trouble)
            if self._folder.is_dir():
                private.close_tree_to_others(self._folder)
            for path in sorted(self._folder.glob("*.db")) if self._folder.is_dir() else ():
                if _has_begun(path):
                    await self._adopt(path)
        else:
            await self._open_own()
        if self.waiting:
            logger.warning(
                "%d writes of an earlier process wait in the outbox; publishing them first", self.waiting
            )
            self._start()

    async def _adopt(self, path: Path) -> None:
        file = self._file(path, own=False)
        try:
            await file.open()
        except OutboxInUse:
            return
        except OutboxError as error:  # the file stays where it is, for people to inspect
            logger.error("%s", error)
            return
        if file.entries:
            self._found.append(file)
        else:
            await file.close(remove=True)

    async def _open_own(self) -> None:
        async with self._opening:
            if not self._opened:
                if str(self._own.path.absolute()) == self._store:
                    raise OutboxError(
                        f"the outbox {self._own.path} can't be used: it is the store. Set MNEMOBUS_OUTBOX to"
                        " another file"
                    )
                await self._own.open()
                self._opened = True

    async def keep(
        self, partition: int, events: Sequence[tuple[Event, Sequence[Field]]], call: tuple[str, int] | None
    ) -> list[Write]:
        """Keep writes, all or none, until the log can be reached.

        call: producer and sequence number under which they may have been published already
        """
        await self._open_own()
        self.away = self.away or call is not None
        rows = await self._own.append(partition, [fields for _, fields in events], call)
        writes = []
        for row, (event, _) in zip(rows, events, strict=True):
            write = self._on_kept(partition, event)
            self._writes[row] = write
            writes.append(write)
        self.kept += len(rows)
        self._start()
        return writes

    async def last_of(self, id: str) -> Event | None:
        """The last write to a memory that waits here, of this process or an earlier one."""
        for file in [self._own, *reversed(self._found)]:
            if file.entries:
                event = await file.last_of(id)
                if event is not None:
                    return event
        return None

    def _start(self) -> None:
        self._empty.clear()
        if self._task is None:
            self._task = asyncio.create_task(self._drain(), name="mnemobus-outbox")

    def hurry(self) -> None:
        """The log can be reached: publish now what waits."""
        self._hurried.set()

    async def _drain(self) -> None:
        """Publish until nothing waits. Every failure is logged and retried."""
        least = self._link.settings.redis_create_retry_interval / 1000
        pause, said = least, ""
        try:
            while self.waiting:
                try:
                    await self._publish_next()
                    pause, said, self.away = least, "", False
                    continue
                except AWAY as error:
                    self.away, reason = True, f"the log can't be reached ({error})"
                except MnemobusError as error:
                    self.away = not isinstance(error, (BacklogFull, LogFull))
                    reason = str(error)
                except Exception as error:
                    logger.exception("publishing from the outbox failed")
                    reason = repr(error)
                if reason != said:
                    said = reason
                    logger.warning("%d writes wait in the outbox: %s", self.waiting, reason)
                self._hurried.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._hurried.wait()
                pause = min(2 * pause, 1.0)
            logger.warning("the outbox is empty again: all of it is in the log")
            self._empty.set()
            self._on_empty()
        finally:
            self._task = None

    async def _publish_next(self) -> None:
        file = self._found[0] if self._found else self._own
        call = await file.next_call()
        if call is None:
            await self._retire(file)
            return
        try:
            logged = await append(self._link, call.partition, call.producer, call.sequence, call.events)
            versions = logged.versions
            if len(versions) != len(call.events):
                raise Overtaken(f"call {call.sequence} of producer {call.producer} was another one")
        except PartitionEnded as error:
            logger.info("%s: %d writes of the outbox go to another", error, len(call.rows))
            await self._link.renew_epoch()
            await file.ended(call)
            return
        except Overtaken as error:
            # Only a copy of the file can have used the number for another call.
            logger.error("%s: was the outbox %s copied? Publishing under another number", error, file.path)
            await file.renumber(call)
            return
        for row, version in zip(call.rows, versions, strict=True):
            write = self._writes.pop(row, None) if file is self._own else None
            self._on_published(call.partition, write, version)
        await file.answered(call)
        if not file.entries:
            await self._retire(file)

    async def _retire(self, file: OutboxFile) -> None:
        if file in self._found:
            self._found.remove(file)
            await file.close(remove=True)

    async def close(self, patience: float) -> None:
        """If the log can be reached, publish what waits, for ``patience`` seconds at most. The rest stays here."""
        if self.waiting and not self.away:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._empty.wait()
        await end([self._task])
        if self.waiting:
            logger.warning(
                "%d writes stay in the outbox; the next bus that opens publishes them", self.waiting
            )
        for file in self._found:
            await file.close()
        if self._opened:
            await self._own.close(remove=self._auto)
