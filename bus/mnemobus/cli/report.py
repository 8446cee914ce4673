"""The report of an import: progress, bad lines, and the result."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NoReturn

from .console import err
from .lines import Bad, LineSource

_LINE_EVERY = 5.0
"""Seconds between lines of progress if there is no terminal."""
_QUIET = 5.0
"""Seconds without a commit after which a message asks about the workers."""
_LISTED = 1_000
"""The result lists at most this many bad lines."""
_REASON = 300
"""A reason has at most this many characters: it may quote a long value."""


class ImportReport:
    """Counts lines. ``moved`` is when the store last took something, or had nothing to take."""

    def __init__(self, name: str, json: bool) -> None:
        self.name = name
        self.json = json
        self.began = self.moved = time.monotonic()
        self.lines = 0
        self.written = 0
        self.unchanged = 0
        self.different = 0
        self.committed = 0
        self.waiting = 0
        """Lines that are logged, and that the store does not have yet."""
        self.bad = 0
        self._bad_lines: list[Bad] = []

    def fault(self, line: Bad) -> None:
        line = line._replace(reason=line.reason[:_REASON])
        self.bad += 1
        if self.bad <= _LISTED:
            self._bad_lines.append(line)
        if not self.json:
            err().print(f"{self.name}:{line.number}: {line.reason}", markup=False, soft_wrap=True)

    def wait_for(self, lines: int) -> None:
        """``count`` more lines were logged."""
        if not self.waiting:
            self.moved = time.monotonic()
        self.waiting += lines

    def settled(self, *, committed: bool) -> None:
        """The store has one more line, or has refused it."""
        self.moved = time.monotonic()
        self.waiting -= 1
        self.committed += committed

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
            "bad": self.bad,
            "bad_lines": [{"line": line.number, "reason": line.reason} for line in self._bad_lines],
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
        parts.append(f"{self.bad:,} bad")
        return f"{', '.join(parts)}; {self.seconds:.1f} s, {self.rate():,.0f} lines/s"

    async def show_progress(self, source: LineSource) -> NoReturn:
        """Until cancelled: a bar on a terminal, a line every few seconds elsewhere."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
        )
        has_bar = err().is_terminal and not self.json
        next_line = time.monotonic() + _LINE_EVERY
        warned = False
        with Progress("importing", *columns, console=err(), transient=True, disable=not has_bar) as bar:
            task = bar.add_task("", total=source.size, counts="")
            while True:
                await asyncio.sleep(0.1)
                now = time.monotonic()
                counts = f"{self.lines:,} lines, {self.rate():,.0f}/s, {self.bad:,} bad"
                # Lines that were read are not stored yet: the bar ends when the store has them.
                share = 1 - self.waiting / self.written if self.written else 1.0
                bar.update(task, completed=source.read * share, counts=counts)
                if not has_bar and now >= next_line:
                    next_line = now + _LINE_EVERY
                    done = f"{source.read / source.size:.0%} read, " if source.size else ""
                    err().print(
                        f"{done}{counts}, {self.written:,} written, {self.waiting:,} not yet in the store"
                    )
                if not self.waiting or now - self.moved < _QUIET:
                    warned = False
                elif not warned:
                    warned = True
                    err().print(
                        f"nothing was committed for {_QUIET:g} s, waiting on: are workers running?"
                        " `mnemobus doctor` tells"
                    )
