"""The lines of a file of memories: split, numbered and decoded, each into a memory or an error.

A line is taken exactly as it is, or refused. orjson is fast, but makes floats of integers beyond 64 bits, and takes the
last of two fields with the same name. So its result is checked, and in doubt Python's own parser reads the line again.

A line without an id gets one that is computed from its content, so that the same line is the same memory. Memories with
the same date are listed in the order of their ids, and must keep the file's order: see `Ties`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from gzip import BadGzipFile, GzipFile
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import orjson

from ..errors import InvalidMemory, MnemobusError, SettingsError
from ..memory import Memory
from ..records import Row, encode
from ..settings import Settings
from ..values import MAX_DEPTH

NAMESPACE = uuid.UUID("5f0d1d3e-6a53-5b0f-9a0e-8f6c1f5a7b42")
"""The namespace for the ids of lines that have none."""
_PIECE = 1 << 18
_TIES = 50_000
"""How many dates, and how many lines, are remembered."""
_PER_LINE = "each memory is one line: jq -c . FILE | mnemobus import -"
_PER_ELEMENT = "each element of an array is a line of its own: jq -c '.[]' FILE | mnemobus import -"


class Line(NamedTuple):
    """A good line.

    dated  whether it gives a date itself
    plain  the id that it would have without other lines of the same date, if that differs
    """

    number: int
    memory: Memory
    row: Row
    dated: bool
    plain: str | None = None

    def named(self, id: str) -> Line:
        """The same line under another id."""
        memory = Memory.from_dict(self.memory.to_dict() | {"id": id})
        return self._replace(memory=memory, row=self.row._replace(id=id), plain=None)


class Bad(NamedTuple):
    number: int
    reason: str


class Unreadable(Exception):
    """A file that can't be read any further, from this line on."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.bad = Bad(number, reason)


class Ties:
    """Makes ids for lines without one, such that lines with the same date are in the order of the file.

    The first line of a table with a date keeps the id that is computed from its content. For the next ones, the
    beginning of their own id is replaced: by that of the first one, plus one for each. So the same file gives the same
    ids, and a line that is alone with its date has the same id in any file. A line that comes twice is one memory.

    Only the last dates and lines are remembered, which bounds memory. If lines with the same date are further apart in
    a file, their order is not kept.
    """

    def __init__(self) -> None:
        self._dates: OrderedDict[tuple[str, int], tuple[int, int]] = OrderedDict()
        """By table and date: the beginning of the first id, and how many ids there are."""
        self._lines: OrderedDict[tuple[str, int, str], str] = OrderedDict()
        """By table, date and plain id: the id."""

    def id_of(self, table: str, created_us: int, plain: str) -> str:
        """The id of a line whose content alone gives ``plain``."""
        id = self._lines.get((table, created_us, plain))
        if id is None:
            first, count = self._dates.pop((table, created_us), (min(_beginning(plain), _LAST_BEGINNING), 0))
            self._dates[table, created_us] = (first, count + 1)
            id = _begin_with(first + count, plain)
            self._lines[table, created_us, plain] = id
            for known in (self._dates, self._lines):
                if len(known) > _TIES:
                    known.popitem(last=False)
        return id


_LAST_BEGINNING = (1 << 48) - (1 << 32)
"""Room for four billion lines after the first."""


def _beginning(id: str) -> int:
    return int(id[:8] + id[9:13], 16)


def _begin_with(number: int, id: str) -> str:
    spelled = f"{number:012x}"
    return f"{spelled[:8]}-{spelled[8:]}{id[13:]}"


def split(pieces: Iterable[bytes], limit: int) -> Iterator[list[tuple[int, bytes | None]]]:
    """Split the input into lines, numbered from 1, without their ends; None for a line that is longer than ``limit``
    bytes. It never keeps more than that of a line."""
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


def parse(
    number: int, line: bytes | None, settings: Settings, now: datetime, ties: Ties
) -> Line | Bad | None:
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
        return Bad(number, _why(line, error))
    if isinstance(record, list):
        return Bad(number, f"record: a JSON object is needed, not list; {_PER_ELEMENT}")
    try:
        dated, plain = True, None
        if isinstance(record, dict):
            record = _exact(line, record)
            dated = record.get("created_at") is not None
            if record.get("id") is None:
                record["id"] = plain = content_id(record)
            if not dated:
                record["created_at"] = now.isoformat()
        memory = Memory.from_dict(record)
        row = encode(memory, settings.max_memory_bytes)
    except InvalidMemory as error:
        return Bad(number, str(error))
    good = Line(number, memory, row, dated)
    if plain is not None and dated:
        id = ties.id_of(row.table, row.created_us, plain)
        if id != plain:
            good = good.named(id)._replace(plain=plain)
    return good


_NAME = re.compile(rb'"\s*:')
"""Matches the end of each field's name. It matches some text, too, so it never counts too few."""
_INEXACT = float(1 << 63)


def _exact(line: bytes, record: dict[str, Any]) -> dict[str, Any]:
    """Decode a line without orjson's changes. InvalidMemory if a name comes twice in an object."""
    names = len(record)
    left = [value for name, value in record.items() if name != "embedding" and type(value) in _DEEP]
    while left:
        value = left.pop()
        if type(value) is dict:
            names += len(value)
            left += (inner for inner in value.values() if type(inner) in _DEEP)
        elif type(value) is list:
            left += (inner for inner in value if type(inner) in _DEEP)
        elif abs(value) >= _INEXACT:
            names = -1  # it may have been an integer
            break
    if names == len(_NAME.findall(line)):
        return record
    try:
        return json.loads(line, object_pairs_hook=_unique)  # type: ignore[no-any-return]
    except InvalidMemory:
        raise
    except RecursionError:
        raise InvalidMemory("record", "nests too deep") from None
    except ValueError:  # Python does not even read an integer of thousands of digits
        raise InvalidMemory("record", "has an integer beyond 64 bits") from None


_DEEP = frozenset((dict, list, float))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidMemory(twice, "is given twice in one object; leave one of them out")
    return found


_WORDS = (
    (re.compile(r"-?(NaN|Infinity)"), "is not a number in JSON; write null, or leave the field out"),
    (re.compile(r"(True|False|None)"), "is Python's way to write it, not JSON's: true, false, null"),
)


def _why(line: bytes, error: orjson.JSONDecodeError) -> str:
    """Explain to people why a line is not JSON, and what to do."""
    try:
        text = line.decode()
    except UnicodeDecodeError as undecodable:
        place = f"byte {undecodable.start + 1} is 0x{line[undecodable.start]:02x}"
        return f"not UTF-8: {place}; convert the file: iconv -f ENCODING -t UTF-8 FILE"
    at = error.pos - text[: error.pos].endswith("-")
    here = f"column {at + 1}"
    for pattern, what in _WORDS:
        if word := pattern.match(text, at):
            return f"not JSON: {word[0]} ({here}) {what}"
    if "surrogate" in error.msg:
        return f"not JSON: half a character, a lone surrogate (before {here}); take it out, or write U+FFFD"
    if "depth" in error.msg:
        return f"not a memory: nests deeper than {MAX_DEPTH} levels"
    if "infinity" in error.msg:
        return f"not JSON: a number that is too large ({here})"
    if "end of data" in error.msg:
        if text.startswith("["):
            return f"not JSON: an array that goes on in the next line, or is cut short; {_PER_ELEMENT}"
        return f"not JSON: what goes on in the next line, or is cut short; {_PER_LINE}"
    if text.startswith("{") and text[at:] == ",":
        return f"not JSON: a comma after the object ({here}); {_PER_ELEMENT}"
    if text[0] in '"]}':
        return f"not JSON: a part of an object or an array; {_PER_LINE}"
    if not text.startswith("{") and at < 5:
        return f"not JSON: a line begins with {{, this one with {text[:1]!r}; each memory is a JSON object"
    if "after document" in error.msg:
        return f"not JSON: something follows the object ({here}); each memory is one line"
    if text[at : at + 1] == "'":
        return f"not JSON: names and text need double quotes ({here})"
    return f"not JSON: {error.msg} ({here})"


def content_id(record: dict[str, Any]) -> str:
    """The id of a line that has none: the same for the same content, in any order of its fields."""
    given = {name: value for name, value in record.items() if value is not None}
    try:
        spelled = orjson.dumps(given, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError as error:
        if "64-bit" not in str(error):
            raise InvalidMemory("record", "nests too deep") from None
        spelled = json.dumps(given, sort_keys=True)
    return str(uuid.uuid5(NAMESPACE, spelled))


def line_limit(settings: Settings) -> int:
    # JSON may need twenty characters for a float32, and six for a character of text.
    return 8 * settings.max_memory_bytes + 65_536


_Item = list[tuple[int, bytes | None]] | OSError | Unreadable | None


def _utf16(encoding: str) -> str:
    return f"the file is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 FILE | mnemobus import -"


_NO_TEXT = (
    (
        b"\x1f\x8b",
        "the file is compressed twice; decompress it once: gunzip -c FILE | mnemobus import -",
    ),
    (b"\xff\xfe\0\0", _utf16("UTF-32")),
    (b"\0\0\xfe\xff", _utf16("UTF-32")),
    (b"\xff\xfe", _utf16("UTF-16")),
    (b"\xfe\xff", _utf16("UTF-16")),
    (b"PK\3\4", "the file is a zip archive; unpack it: unzip -p FILE | mnemobus import -"),
    (b"BZh", "the file is compressed by bzip2; decompress it: bzcat FILE | mnemobus import -"),
    (b"\xfd7zXZ\0", "the file is compressed by xz; decompress it: xzcat FILE | mnemobus import -"),
    (b"\x28\xb5\x2f\xfd", "the file is compressed by zstd; decompress it: zstdcat FILE | mnemobus import -"),
    (b"PAR1", "the file is Parquet; write its rows as JSON, one a line"),
    (b"SQLite format 3\0", "the file is a database of SQLite; write its rows as JSON, one a line"),
)
"""The first bytes of files that have no lines, and what to do about them."""


def _check_text(head: bytes) -> None:
    """Unreadable if a file that begins like this has no lines of text in UTF-8."""
    for magic, what in _NO_TEXT:
        if head.startswith(magic):
            raise Unreadable(1, what)
    if b"\0" in head[:4]:
        raise Unreadable(1, _utf16("UTF-16"))


class _Begun:
    """The stream of a source whose first bytes were checked before."""

    def __init__(self, source: LineSource) -> None:
        self._source = source
        self.head = b""
        while len(self.head) < 16 and (piece := source._read(_PIECE)):  # a pipe may give one byte at a time
            self.head += piece

    def read(self, size: int) -> bytes:
        """Read some bytes; none at the end. A request for few bytes gets all of them: a header is not read in parts."""
        found, self.head = self.head[:size], self.head[size:]
        while (not found or len(found) < min(size, 16)) and (piece := self._source._read(size - len(found))):
            found += piece
        return found


class LineSource:
    """Reads in a thread of its own: standard input may keep a reader waiting for as long as it likes."""

    def __init__(self, file: str, limit: int) -> None:
        """A source for the file of this name, or for standard input if it is ``-``. SettingsError if it can't be
        opened."""
        # Unbuffered: a thread that waits in a buffered read keeps the interpreter from ending.
        try:
            self._file = FileIO(0, closefd=False) if file == "-" else FileIO(file)
        except OSError as error:
            raise SettingsError(f"{file} can't be read: {error.strerror}") from None
        self.name = "stdin" if file == "-" else Path(file).name
        self.size = os.fstat(self._file.fileno()).st_size or None
        """The file's size in bytes; None if it is unknown."""
        self.read = 0
        """How many bytes were read so far."""
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._room = threading.Semaphore(2)
        self._closed = False
        self._opened: _Begun | GzipFile | None = None
        self._decompressed = False
        threading.Thread(target=self._work, name="mnemobus-import-reader", daemon=True).start()

    def _work(self) -> None:
        last: OSError | Unreadable | None = None
        number = 0
        try:
            with self._file:
                for lines in split(self._pieces(), self._limit):
                    number = lines[-1][0] if lines else number
                    self._put(lines)
        except (EOFError, BadGzipFile, zlib.error) as error:
            reason = "ends too early" if isinstance(error, EOFError) else f"is damaged ({error})"
            last = Unreadable(
                number + 1, f"the gzip data {reason}; the lines before this one are whole. Get the file again"
            )
        except (OSError, Unreadable) as error:
            last = error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._put(last)

    def _put(self, item: _Item) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def _pieces(self) -> Iterator[bytes]:
        while not self._closed:
            self._room.acquire()
            if self._closed or not (piece := self._piece()):
                return
            yield piece

    def _piece(self) -> bytes:
        self._opened = self._opened or self._open()
        # read1 gives at most one piece, even of highly compressed data.
        if isinstance(self._opened, GzipFile):
            piece = self._opened.read1(_PIECE)
            if not self._decompressed:
                self._decompressed = True
                _check_text(piece)
            return piece
        return self._opened.read(_PIECE)

    def _open(self) -> _Begun | GzipFile:
        """The file's stream, decompressed if it is gzip. Unreadable if it has no lines of text in UTF-8."""
        begun = _Begun(self)
        head = begun.head
        if head.startswith(b"\x1f\x8b"):
            return GzipFile(mode="rb", fileobj=cast("IO[bytes]", begun))
        _check_text(head)
        return begun

    def _read(self, size: int) -> bytes:
        piece = self._file.read(size) or b""
        self.read += len(piece)
        return piece

    async def next(self) -> list[tuple[int, bytes | None]] | None:
        """The lines that the next piece completes; None at the end."""
        item = await self._queue.get()
        self._room.release()
        if isinstance(item, OSError):
            raise MnemobusError(f"reading failed: {item.strerror}") from None
        if isinstance(item, Unreadable):
            raise item
        return item

    def close(self) -> None:
        self._closed = True
        self._room.release()
