"""``mnemobus import``: one memory per line into the bus, as often as one likes.

What makes it repeatable: a memory that the store has already is not written again. If what is stored differs from
the line, somebody has changed it since, and that is newer than any file; so it stays, unless --overwrite is given.

Memory is bounded: a thread reads pieces of the file, the next only when one has been taken; and only so many
chunks may be logged without being committed yet. Lines are logged in the file's order. A line whose id was
logged a moment ago waits until that is in the store, so that "already there" means the same for a repeated id
wherever its lines are.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from ..bus import Bus, Receipt
from ..errors import (
    BacklogFull,
    InvalidMemory,
    MnemobusError,
    NotCommitted,
    StoreUnavailable,
    WriteRejected,
)
from ..keys import Dimensions
from ..memory import Memory, Row, encode, from_micros
from ..settings import Settings
from ..store import Reader, open_reader
from .console import SIGNALS, emit, err, out

NAMESPACE = uuid.UUID("5f0d1d3e-6a53-5b0f-9a0e-8f6c1f5a7b42")
"""Of the ids of lines that have none."""
CHUNK = 500
"""Lines that are logged together."""
WINDOW = 8
"""Chunks that may be logged and not committed."""
LOOKUPS = 16
"""Questions to the store at a time."""
PATIENCE = 60.0
"""Seconds that nothing at all may be committed before the import gives up waiting."""
_PIECE = 1 << 18
_REASON = 300


class Line(NamedTuple):
    """A good line: ``dated`` tells whether it gives a date itself."""

    number: int
    memory: Memory
    row: Row
    dated: bool


class Bad(NamedTuple):
    number: int
    reason: str


class Stopped(Exception):
    """The import ends before the end of the file."""


# Reading


def split(pieces: Iterable[bytes], limit: int) -> Iterator[list[tuple[int, bytes | None]]]:
    """Lines, numbered from 1, as they become complete, without their ends; None for one that is longer than
    ``limit`` bytes. However long it is, no more than that is kept of it."""
    number = 1
    rest = b""
    skipping = False
    for piece in pieces:
        lines: list[tuple[int, bytes | None]] = []
        *complete, tail = piece.split(b"\n")
        for part in complete:
            line = None if skipping or len(rest) + len(part) > limit else rest + part
            lines.append((number, line))
            number += 1
            rest, skipping = b"", False
        skipping = skipping or len(rest) + len(tail) > limit
        rest = b"" if skipping else rest + tail
        yield lines
    if rest or skipping:
        yield [(number, None if skipping else rest)]


def parse(number: int, line: bytes | None, settings: Settings, now: datetime) -> Line | Bad | None:
    """The memory of a line; None for an empty line."""
    if line is None:
        return Bad(number, f"longer than {_line_limit(settings):,} bytes")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    line = line.strip(b" \t\r")
    if not line:
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as undecodable:
            return Bad(number, f"not UTF-8: byte {undecodable.start + 1} is 0x{line[undecodable.start]:02x}")
        return Bad(number, f"not JSON: {error}")
    try:
        dated = True
        if isinstance(record, dict):
            dated = record.get("created_at") is not None
            if record.get("id") is None:
                record["id"] = content_id(record)
            if not dated:
                record["created_at"] = now.isoformat()
        memory = Memory.from_dict(record)
        row = encode(memory, settings.max_memory_bytes)
    except InvalidMemory as error:
        return Bad(number, str(error)[:_REASON])
    return Line(number, memory, row, dated)


def content_id(record: dict[str, Any]) -> str:
    """The id of a line that has none: the same for the same content, whatever the order of its fields."""
    given = {name: value for name, value in record.items() if value is not None}
    return str(uuid.uuid5(NAMESPACE, orjson.dumps(given, option=orjson.OPT_SORT_KEYS).decode()))


def _line_limit(settings: Settings) -> int:
    # JSON may spell a float32 with twenty characters, and one of text with six.
    return 8 * settings.max_memory_bytes + 65_536


class Source:
    """Reads in a thread of its own: standard input may keep a reader waiting for as long as it likes."""

    def __init__(self, file: Path, limit: int) -> None:
        # Unbuffered: a thread that waits in a buffered read keeps the interpreter from ending.
        self._file = FileIO(0, closefd=False) if str(file) == "-" else FileIO(str(file))
        self.size = None if str(file) == "-" else file.stat().st_size or None
        self.read = 0
        """Bytes so far."""
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[tuple[int, bytes | None]] | OSError | None] = asyncio.Queue()
        self._room = threading.Semaphore(2)
        self._closed = False
        threading.Thread(target=self._work, name="mnemobus-import-reader", daemon=True).start()

    def _work(self) -> None:
        last: OSError | None = None
        try:
            with self._file:
                for lines in split(self._pieces(), self._limit):
                    self._put(lines)
        except OSError as error:
            last = error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._put(last)

    def _put(self, item: list[tuple[int, bytes | None]] | OSError | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def _pieces(self) -> Iterator[bytes]:
        while not self._closed:
            self._room.acquire()
            if self._closed or not (piece := self._file.read(_PIECE)):
                return
            self.read += len(piece)
            yield piece

    async def next(self) -> list[tuple[int, bytes | None]] | None:
        """The lines that were completed by the next piece; None at the end."""
        item = await self._queue.get()
        self._room.release()
        if isinstance(item, OSError):
            raise MnemobusError(f"reading failed: {item.strerror}") from None
        return item

    def close(self) -> None:
        self._closed = True
        self._room.release()


# Writing


class Report:
    """What has happened so far, and how people hear of it."""

    def __init__(self, name: str, json: bool) -> None:
        self.name = name
        self._json = json
        self.began = time.monotonic()
        self.lines = 0
        self.written = 0
        self.unchanged = 0
        self.different = 0
        self.committed = 0
        self.bad: list[Bad] = []
        self.bad_lines = 0

    def fault(self, bad: Bad) -> None:
        self.bad_lines += 1
        if len(self.bad) < 1000:
            self.bad.append(bad)
        if not self._json:
            err().print(f"{self.name}:{bad.number}: {bad.reason}", markup=False, soft_wrap=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def rate(self) -> float:
        """Lines per second."""
        return self.lines / max(self.seconds, 1e-3)

    def result(self, complete: bool) -> dict[str, Any]:
        return {
            "complete": complete,
            "lines": self.lines,
            "written": self.written,
            "committed": self.committed,
            "unchanged": self.unchanged,
            "different": self.different,
            "bad": self.bad_lines,
            "bad_lines": [{"line": b.number, "reason": b.reason} for b in self.bad],
            "seconds": round(self.seconds, 3),
            "lines_per_second": round(self.rate()),
        }

    def summary(self, waited: bool) -> str:
        parts = [f"{self.lines:,} lines: {self.written:,} written"]
        if waited:
            parts.append(f"{self.committed:,} of them in the store")
        parts.append(f"{self.unchanged:,} there already")
        if self.different:
            parts.append(f"{self.different:,} changed since and left as they are (--overwrite)")
        parts.append(f"{self.bad_lines:,} bad")
        return f"{', '.join(parts)}; {self.seconds:.1f} s, {self.rate():,.0f} lines/s"


class Importer:
    """Takes lines to the log, chunk by chunk, and sees them into the store."""

    def __init__(
        self, bus: Bus, reader: Reader, report: Report, *, skip: bool, overwrite: bool, wait: bool
    ) -> None:
        self._bus = bus
        self._reader = reader
        self._report = report
        self._skip = skip
        self._overwrite = overwrite
        self._wait = wait
        self._under_way: deque[tuple[set[str], asyncio.Task[None]]] = deque()
        self._progress = 0.0
        self._stopped = False
        self._last_date = datetime.min.replace(tzinfo=UTC)
        self._lookups = asyncio.Semaphore(LOOKUPS)

    async def take(self, lines: Sequence[tuple[int, bytes | None]]) -> None:
        """Import some lines. Stopped, after what comes before it, at a bad line that may not be skipped."""
        chunk: list[Line] = []
        ids: set[str] = set()
        for number, text in lines:
            parsed = parse(number, text, self._bus.settings, self._now())
            if isinstance(parsed, Line):
                self._report.lines += 1
                id = parsed.row.id
                if id in ids or len(chunk) >= CHUNK:
                    await self._import(chunk)
                    chunk, ids = [], set()
                if self._wait and any(id in logged for logged, _ in self._under_way):
                    await self._import(chunk)
                    chunk, ids = [], set()
                    await self.settle()
                chunk.append(parsed)
                ids.add(id)
            elif parsed is not None:
                self._report.lines += 1
                if not self._skip:
                    await self._import(chunk)
                await self._fault(parsed)
        await self._import(chunk)

    def _now(self) -> datetime:
        """A date for a line that has none: lines keep the order in which they came."""
        self._last_date = max(datetime.now(UTC), self._last_date + timedelta(microseconds=1))
        return self._last_date

    async def _fault(self, bad: Bad) -> None:
        self._report.fault(bad)
        if not self._skip:
            raise Stopped

    async def _import(self, chunk: list[Line]) -> None:
        if not chunk:
            return
        fresh = []
        for line, stored in zip(
            chunk, await asyncio.gather(*(self._stored(line.row.id) for line in chunk)), strict=True
        ):
            if stored is None:
                fresh.append(line)
            elif stored[1:6] != line.row[1:6]:
                await self._log(fresh)
                fresh = []
                await self._fault(Bad(line.number, _dimensions_differ(line.row, stored)))
            elif _same(line, stored):
                self._report.unchanged += 1
            elif self._overwrite:
                fresh.append(line if line.dated else _dated(line, stored))
            else:
                self._report.different += 1
        await self._log(fresh)

    async def _stored(self, id: str) -> Row | None:
        async with self._lookups:
            return await self._reader.get(id)

    async def _log(self, lines: list[Line]) -> None:
        if not lines:
            return
        try:
            receipts = await self._publish([line.memory for line in lines])
        except InvalidMemory:
            # Found only together with what the bus and the store know: an embedding of another length.
            receipts, logged = [], []
            for line in lines:
                try:
                    receipts += await self._publish([line.memory])
                    logged.append(line)
                except InvalidMemory as error:
                    field = error.field.removeprefix("memories[0].")
                    await self._fault(Bad(line.number, f"{field}: {error.reason}"[:_REASON]))
            lines = logged
        self._report.written += len(lines)
        if not self._wait:
            return
        committed = asyncio.create_task(self._commit(lines, receipts))
        self._under_way.append(({line.row.id for line in lines}, committed))
        while len(self._under_way) > WINDOW or (self._under_way and self._under_way[0][1].done()):
            await self._next_committed()
        if self._stopped:
            raise Stopped

    async def _publish(self, memories: list[Memory]) -> list[Receipt]:
        """Log memories; a log that is full is waited for, as long as the workers get anywhere."""
        began = time.monotonic()
        while True:
            try:
                return await self._bus.write_many(memories)
            except BacklogFull:
                if time.monotonic() - max(began, self._progress) > PATIENCE:
                    raise

    async def _commit(self, lines: list[Line], receipts: list[Receipt]) -> None:
        """Wait until the store has them; what a worker refused is a bad line."""
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
                if isinstance(outcome, WriteRejected):
                    reason = str(outcome).partition("dead letters: ")[2] or str(outcome)
                    self._report.fault(Bad(line.number, reason[:_REASON]))
                    self._stopped = not self._skip
                elif outcome is not None:
                    raise outcome
                else:
                    self._report.committed += 1
                self._progress = time.monotonic()
            if left and time.monotonic() - max(began, self._progress) > PATIENCE:
                raise NotCommitted(
                    f"nothing was committed for {PATIENCE:g} s. What was written is in the log and will get to the"
                    " store. Are workers running? `mnemobus doctor` tells"
                )

    async def _next_committed(self) -> None:
        _, task = self._under_way[0]
        try:
            await asyncio.shield(task)
        finally:
            if task.done():
                self._under_way.popleft()

    async def settle(self) -> None:
        """Wait until everything that was logged is in the store; Stopped if a worker refused a line."""
        while self._under_way:
            await self._next_committed()
        if self._stopped:
            raise Stopped

    async def abandon(self, grace: float) -> None:
        """Stop waiting for the store, after a moment."""
        tasks = [task for _, task in self._under_way]
        if tasks and grace:
            await asyncio.wait(tasks, timeout=grace)
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
    return f"id: memory {row.id} is stored with {changes}; dimensions never change"[:_REASON]


# Showing


def _progress(report: Report, source: Source, json: bool) -> AbstractContextManager[Callable[[], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; what it gives is to be called often."""
    if not json and err().is_terminal:
        return _Bar(report, source)
    return _Lines(report, source, json)


class _Lines:
    def __init__(self, report: Report, source: Source, json: bool) -> None:
        self._report, self._source, self._json = report, source, json
        self._next = time.monotonic() + 5

    def __enter__(self) -> Callable[[], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        return None

    def _show(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 5
        report = self._report
        done = f" ({self._source.read / self._source.size:.0%} read)" if self._source.size else ""
        text = f"{report.lines:,} lines{done}, {report.written:,} written, {report.committed:,} committed"
        print(f"{text}, {report.rate():,.0f} lines/s", file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, report: Report, source: Source) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._report, self._source = report, source
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
            console=err(),
            transient=True,
        )
        self._task = self._bar.add_task("importing", total=source.size, counts="")

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self) -> None:
        report = self._report
        counts = f"{report.lines:,} lines, {report.rate():,.0f}/s"
        if report.bad_lines:
            counts += f", {report.bad_lines:,} bad"
        # What is read is not yet stored: the bar ends when the store has it.
        share = report.committed / report.written if report.written else 1.0
        self._bar.update(self._task, completed=self._source.read * share, counts=counts)


def run(*, file: Path, skip: bool, overwrite: bool, wait: bool, json: bool) -> int:
    return asyncio.run(_main(Settings.load(), file, skip, overwrite, wait, json))


async def _main(settings: Settings, file: Path, skip: bool, overwrite: bool, wait: bool, json: bool) -> int:
    report = Report("stdin" if str(file) == "-" else file.name, json)
    source = Source(file, _line_limit(settings))
    reader = open_reader(settings)
    signals: list[int] = []
    complete = False
    async with Bus(settings) as bus:
        importer = Importer(bus, reader, report, skip=skip, overwrite=overwrite, wait=wait)
        work = asyncio.create_task(_work(source, reader, importer, wait))
        try:
            with ExitStack() as stack:
                stack.enter_context(_signals_end(work, signals))
                show = stack.enter_context(_progress(report, source, json))
                while not work.done():
                    await asyncio.wait([work], timeout=0.1)
                    show()
            await work
            complete = True
        except Stopped:
            if not json:
                err().print("stopped at a bad line; --on-error skip goes on", markup=False)
        except asyncio.CancelledError:
            if not signals:
                raise
        finally:
            source.close()
            # Stopped or failed: what was logged gets to the store in any case.
            await importer.abandon(2.0 if wait and not complete else 0)
            await reader.close()
            if json:
                emit(report.result(complete))
            else:
                out().print(report.summary(wait), soft_wrap=True)
                if not complete:
                    err().print("not complete; run the same command again to go on", markup=False)
    if signals:
        return 128 + signals[0]
    return 0 if complete and not report.bad_lines else 1


async def _work(source: Source, reader: Reader, importer: Importer, wait: bool) -> None:
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
    await importer.settle()


class _signals_end(AbstractContextManager[None]):
    """SIGINT, SIGTERM and SIGHUP cancel the work; a second one ends the process."""

    def __init__(self, work: asyncio.Task[None], received: list[int]) -> None:
        self._work, self._received = work, received
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._receive, number)

    def _receive(self, number: int) -> None:
        self._received.append(number)
        self._work.cancel()
        for each in SIGNALS:
            self._loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        if not self._received:
            for number in SIGNALS:
                self._loop.remove_signal_handler(number)
