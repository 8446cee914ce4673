"""The lines of a file of memories: cut, numbered and read, each as a memory or as what is wrong with it."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from ..errors import InvalidMemory, MnemobusError, SettingsError
from ..memory import Memory, Row, encode
from ..settings import Settings

NAMESPACE = uuid.UUID("5f0d1d3e-6a53-5b0f-9a0e-8f6c1f5a7b42")
"""Of the ids of lines that have none."""
_PIECE = 1 << 18


class Line(NamedTuple):
    """A good line: ``dated`` tells whether it gives a date itself."""

    number: int
    memory: Memory
    row: Row
    dated: bool


class Bad(NamedTuple):
    number: int
    reason: str


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
        return Bad(number, f"longer than {line_limit(settings):,} bytes")
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
        return Bad(number, str(error))
    return Line(number, memory, row, dated)


def content_id(record: dict[str, Any]) -> str:
    """The id of a line that has none: the same for the same content, whatever the order of its fields."""
    given = {name: value for name, value in record.items() if value is not None}
    try:
        spelled = orjson.dumps(given, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:
        raise InvalidMemory("record", "nests too deep") from None
    return str(uuid.uuid5(NAMESPACE, spelled))


def line_limit(settings: Settings) -> int:
    # JSON may spell a float32 with twenty characters, and one of text with six.
    return 8 * settings.max_memory_bytes + 65_536


class Source:
    """Reads in a thread of its own: standard input may keep a reader waiting for as long as it likes."""

    def __init__(self, file: str, limit: int) -> None:
        """Of the file of this name, or of standard input for ``-``. SettingsError if it can't be opened."""
        # Unbuffered: a thread that waits in a buffered read keeps the interpreter from ending.
        try:
            self._file = FileIO(0, closefd=False) if file == "-" else FileIO(file)
        except OSError as error:
            raise SettingsError(f"{file} can't be read: {error.strerror}") from None
        self.name = "stdin" if file == "-" else Path(file).name
        self.size = os.fstat(self._file.fileno()).st_size or None
        """Bytes in all; None if that can't be known."""
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
