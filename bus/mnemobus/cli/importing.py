"""``mnemobus import``: writes one memory per line into the bus, and can be repeated.

It can be repeated because a memory that the store already has is not written again. If the stored memory differs from
the line, somebody has changed it since, and this is newer than any file; so it stays, unless --overwrite is given.

Memory is bounded: a thread reads the file in pieces (lines.py), each only after the one before was taken; and the
number of chunks that are logged and not committed is limited. Lines are logged in the file's order. If the id of a line
was logged just before, the line waits until that is in the store. So "already there" means the same for a repeated id,
wherever its lines are.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import orjson

from ..bus import Bus, Receipt
from ..errors import BacklogFull, InvalidMemory, NotCommitted, StoreUnavailable, WriteRejected
from ..keys import Dimensions
from ..memory import Memory
from ..records import Row
from ..settings import Settings
from ..store import Reader, open_reader
from ..tasks import end
from ..values import from_micros
from .console import emit, err, out, run_until_signal
from .lines import Bad, Line, LineSource, Ties, Unreadable, line_limit, parse
from .report import ImportReport

CHUNK = 500
"""Lines that are logged together."""
WINDOW = 8
"""How many chunks may be logged and not committed."""
LOOKUPS = 16
"""Questions to the store at a time."""
COMMIT_PATIENCE = 60.0
"""Seconds that nothing at all may be committed before the import gives up waiting."""
GRACE = 2.0
"""Seconds for which an import that ends early waits for the lines that it has logged."""


class Stopped(Exception):
    """The import ends at a bad line, before the end of the file. ``hint`` tells people what they may do."""

    def __init__(self, hint: str = "stopped at a bad line; --on-error skip goes on") -> None:
        super().__init__(hint)


class Importer:
    """Writes lines to the log, chunk by chunk, and waits until they are in the store."""

    def __init__(
        self, bus: Bus, reader: Reader, report: ImportReport, *, skip: bool, overwrite: bool, wait: bool
    ) -> None:
        self._bus = bus
        self._reader = reader
        self._report = report
        self._skip = skip
        self._overwrite = overwrite
        self._wait = wait
        self._chunk: dict[str, Line] = {}
        self._under_way: deque[tuple[set[str], asyncio.Task[None]]] = deque()
        self._refused = False
        self._ties = Ties()
        self._last_date = datetime.min.replace(tzinfo=UTC)
        self._lookups = asyncio.Semaphore(LOOKUPS)

    async def take(self, lines: Sequence[tuple[int, bytes | None]]) -> None:
        """Import some lines. Stopped at a bad line that may not be skipped; the lines before it are imported."""
        for number, text in lines:
            line = parse(number, text, self._bus.settings, self._now(), self._ties)
            if line is None:
                continue
            self._report.lines += 1
            if isinstance(line, Line):
                await self._add(line)
            else:
                if not self._skip:
                    await self._flush()
                self._fault(line)
        await self._flush()

    def _now(self) -> datetime:
        """A date for a line that has none, such that lines keep their order."""
        self._last_date = max(datetime.now(UTC), self._last_date + timedelta(microseconds=1))
        return self._last_date

    def _fault(self, bad: Bad) -> None:
        self._report.fault(bad)
        if not self._skip:
            raise Stopped

    async def _add(self, line: Line) -> None:
        id = line.row.id
        if id in self._chunk or len(self._chunk) >= CHUNK:
            await self._flush()
        if any(id in logged for logged, _ in self._under_way):
            await self._flush()
            await self.settle()
        self._chunk[id] = line

    async def _flush(self) -> None:
        """Log the lines of the chunk that the store doesn't have."""
        chunk, self._chunk = self._chunk, {}
        fresh = []
        for line, row in await asyncio.gather(*map(self._stored, chunk.values())):
            if row is None:
                fresh.append(line)
            elif row[1:6] != line.row[1:6]:
                await self._log(fresh)
                fresh = []
                self._fault(Bad(line.number, _dimensions_differ(line.row, row)))
            elif _same(line, row):
                self._report.unchanged += 1
            elif self._overwrite:
                fresh.append(line if line.dated else _dated(line, row))
            else:
                self._report.different += 1
        await self._log(fresh)

    async def _stored(self, line: Line) -> tuple[Line, Row | None]:
        """The stored memory of a line, if there is one, and the line in the form in which it would be written."""
        async with self._lookups:
            row = await self._reader.get(line.row.id)
            if row is None and line.plain is not None:
                # Imported from another file, or by a version that ignored the order of equal dates.
                row = await self._reader.get(line.plain)
                if row is not None:
                    line = line.named(line.plain)
        return line, row

    async def _log(self, lines: list[Line]) -> None:
        if not lines:
            return
        try:
            receipts = await self._publish([line.memory for line in lines])
        except InvalidMemory:
            # Only the bus and the store can tell this error: an embedding of another length.
            receipts, logged = [], []
            for line in lines:
                try:
                    receipts += await self._publish([line.memory])
                    logged.append(line)
                except InvalidMemory as error:
                    field = error.field.removeprefix("memories[0].")
                    self._report.fault(Bad(line.number, f"{field}: {error.reason}"))
                    if not self._skip:
                        self._refused = True
                        break
            lines = logged
        self._report.written += len(lines)
        if self._wait and lines:
            self._report.wait_for(len(lines))
            committed = asyncio.create_task(self._commit(lines, receipts))
            self._under_way.append(({line.row.id for line in lines}, committed))
        while len(self._under_way) > WINDOW or (self._under_way and self._under_way[0][1].done()):
            await self._next_committed()
        if self._refused:
            raise Stopped

    async def _publish(self, memories: list[Memory]) -> list[Receipt]:
        """Log memories. If the log is full, wait as long as the workers make progress."""
        began = time.monotonic()
        while True:
            try:
                return await self._bus.write_many(memories)
            except BacklogFull:
                if time.monotonic() - max(began, self._report.moved) > COMMIT_PATIENCE:
                    raise

    async def _commit(self, lines: list[Line], receipts: list[Receipt]) -> None:
        """Wait until the store has them. A write that a worker refused counts as a bad line."""
        began = time.monotonic()
        left = list(zip(lines, receipts, strict=True))
        while left:
            outcomes = await asyncio.gather(
                *(receipt.committed(timeout=2.0) for _, receipt in left), return_exceptions=True
            )
            asked, left = left, []
            for (line, receipt), outcome in zip(asked, outcomes, strict=True):
                if isinstance(outcome, NotCommitted):
                    left.append((line, receipt))
                    continue
                self._report.settled(committed=outcome is None)
                if isinstance(outcome, WriteRejected):
                    reason = str(outcome).partition("dead letters: ")[2] or str(outcome)
                    self._report.fault(Bad(line.number, reason))
                    self._refused = self._refused or not self._skip
                elif outcome is not None:
                    raise outcome
            if left and time.monotonic() - max(began, self._report.moved) > COMMIT_PATIENCE:
                raise NotCommitted(
                    f"nothing was committed for {COMMIT_PATIENCE:g} s. What was written is in the log and will get to"
                    " the store. Are workers running? `mnemobus doctor` tells"
                )

    async def _next_committed(self) -> None:
        _, task = self._under_way[0]
        try:
            await asyncio.shield(task)
        finally:
            if task.done():
                self._under_way.popleft()

    async def settle(self) -> None:
        """Wait until all logged lines are in the store. Stopped if a line was refused."""
        while self._under_way:
            await self._next_committed()
        if self._refused:
            raise Stopped

    async def end_at(self, bad: Bad) -> None:
        """The file can't be read any further: wait until the lines so far are in the store, and stop."""
        self._report.fault(bad)
        await self.settle()
        raise Stopped("")

    async def abandon(self) -> None:
        """Stop waiting for the store, after a moment."""
        tasks = [task for _, task in self._under_way]
        if tasks:
            await asyncio.wait(tasks, timeout=GRACE)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _same(line: Line, stored: Row) -> bool:
    row = line.row
    if line.dated and row.created_us != stored.created_us:
        return False
    return row.embedding == stored.embedding and all(
        a == b or orjson.loads(a) == orjson.loads(b)
        for a, b in ((row.content, stored.content), (row.metadata, stored.metadata))
    )


def _dated(line: Line, stored: Row) -> Line:
    record = line.memory.to_dict() | {"created_at": from_micros(stored.created_us).isoformat()}
    return line._replace(memory=Memory.from_dict(record))


def _dimensions_differ(row: Row, stored: Row) -> str:
    changes = ", ".join(
        f"{name} {before!r}, not {now!r}"
        for name, before, now in zip(Dimensions._fields, stored[1:6], row[1:6], strict=True)
        if before != now
    )
    return f"id: memory {row.id} is stored with {changes}; dimensions never change"


def run(*, file: str, skip: bool, overwrite: bool, wait: bool, json: bool) -> int:
    # No outbox: a line that can't be logged now is still in the file, and the next run finds it there.
    return run_until_signal(_main(Settings.load(outbox="off"), file, skip, overwrite, wait, json))


async def _main(settings: Settings, file: str, skip: bool, overwrite: bool, wait: bool, json: bool) -> int:
    source = LineSource(file, line_limit(settings))
    report = ImportReport(source.name, json)
    reader = open_reader(settings)
    complete = False
    async with Bus(settings) as bus:
        importer = Importer(bus, reader, report, skip=skip, overwrite=overwrite, wait=wait)
        showing = asyncio.create_task(report.show_progress(source))
        try:
            await _take_all(source, reader, importer)
            complete = True
        except Stopped as stopped:
            if not json and str(stopped):
                err().print(str(stopped), markup=False)
        finally:
            source.close()
            await importer.abandon()
            await end([showing])
            await reader.close()
            if json:
                emit(report.result(complete))
            else:
                out().print(report.summary(wait), soft_wrap=True)
                if not complete:
                    err().print("not complete; run the same command again to go on", markup=False)
    return 0 if complete and not report.bad else 1


async def _take_all(source: LineSource, reader: Reader, importer: Importer) -> None:
    try:
        await reader.open()
    except StoreUnavailable as error:
        raise StoreUnavailable(f"what is stored already can't be told: {error}") from None
    try:
        while (lines := await source.next()) is not None:
            await importer.take(lines)
    except Stopped:
        await importer.settle()
        raise
    except Unreadable as unreadable:
        await importer.end_at(unreadable.bad)
    await importer.settle()
