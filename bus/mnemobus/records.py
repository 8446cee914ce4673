"""Memories: what they are, what makes one valid, and how they travel between processes.

A memory is validated when it is written (`encode`), not when it is made: an error then names the field.
What a bus hands out is immutable all the way down, since the same object is also the cached copy.
"""

from __future__ import annotations

import math
import os
import re
import struct
import time
import uuid
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from sys import intern
from threading import Lock
from typing import Any, NamedTuple, NoReturn, overload

import orjson

from .errors import InvalidMemory, MemoryTooLarge
from .keys import Dimensions, Version

MAX_DEPTH = 64
"""How deep content and metadata may nest."""
MAX_NAME_BYTES = 512
"""How long a room, agent, entity or world may be, in UTF-8 bytes: they are indexed."""

_TABLE = re.compile(r"[A-Za-z0-9_.\-]{1,64}\Z")
_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def new_id() -> str:
    """A new UUIDv7 (RFC 9562): unique, and in the order of creation to the millisecond."""
    ms = time.time_ns() // 1_000_000
    bits = (ms << 80) | (0x7 << 76) | int.from_bytes(os.urandom(10), "big") & ~(0xF << 76)
    bits = bits & ~(0x3 << 62) | (0x2 << 62)
    return str(uuid.UUID(int=bits))


def canonical_id(id: object) -> str:
    """The one spelling of a UUID that is used in keys; InvalidMemory if it is none."""
    if isinstance(id, str):
        if _CANONICAL.match(id):
            return id
        try:
            return str(uuid.UUID(id))
        except ValueError:
            pass
    if isinstance(id, uuid.UUID):
        return str(id)
    raise InvalidMemory("id", f"{id!r} is not a UUID")


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 of a datetime that has a zone: exact, unlike its timestamp()."""
    return (moment - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The datetime, in UTC, of so many microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=micros)


class FrozenDict(dict[str, Any]):
    """A dict that refuses to change; ``dict(d)`` or ``copy.deepcopy(d)`` gives one that does."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a memory is immutable: copy its content to change it, and write it with update()")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: object) -> dict[str, Any]:
        return thaw(self)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return freeze, (thaw(self),)


class FrozenList(list[Any]):
    """A list that refuses to change."""

    __slots__ = ()

    _refuse = FrozenDict._refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __copy__(self) -> list[Any]:
        return list(self)

    def __deepcopy__(self, memo: object) -> list[Any]:
        return thaw(self)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return freeze, (thaw(self),)


def freeze(value: Any, _depth: int = 0) -> Any:
    """A copy of a JSON value in which dicts and lists refuse to change."""
    if isinstance(value, dict) and _depth <= MAX_DEPTH:
        return FrozenDict({k: freeze(v, _depth + 1) for k, v in value.items()})
    if isinstance(value, (list, tuple)) and _depth <= MAX_DEPTH:
        return FrozenList([freeze(v, _depth + 1) for v in value])
    if type(value) not in _ATOMS and isinstance(value, Mapping) and _depth <= MAX_DEPTH:
        return FrozenDict({k: freeze(v, _depth + 1) for k, v in value.items()})
    return value


_ATOMS = frozenset((str, int, float, bool, type(None)))


def thaw(value: Any) -> Any:
    """A copy of a frozen JSON value in plain dicts and lists."""
    if isinstance(value, dict):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, list):
        return [thaw(v) for v in value]
    return value


class _Draft:
    """What a Memory is made of. It becomes one by changing its class, since a Memory's attributes can't be set: that
    takes a sixth of the time of setting them in spite of it."""

    __slots__ = (
        "_content",
        "_created",
        "_embedding",
        "_metadata",
        "_record",
        "dimensions",
        "id",
        "stale",
    )

    id: str
    dimensions: Dimensions
    stale: bool
    _record: bytes | None
    """As stored; None for one that was made here. Then the others are as given, else decoded when asked for."""
    _content: Any
    _metadata: Any
    _embedding: Any
    _created: Any


class Memory(_Draft):
    """One memory of an agent: immutable, and safe to share between tasks and threads.

    id          a UUID as text; a new UUIDv7 where none is given
    table       its kind ("messages", "facts", ...): 1 to 64 letters, digits, ``_ . -``
    room        the conversation it belongs to
    agent, entity, world
                whom else it concerns; each optional. These five never change while it is there.
    content     a JSON object
    metadata    a JSON object, empty by default
    embedding   numbers in order (a list, an array of one dimension, an iterator...), kept as float32; or None
    created_at  when it happened, with a zone; now by default. Kept to the microsecond, in UTC.
    version     the log's stream ID of the last change; None until a bus has read it
    stale       True on a copy that a bus could not verify (see docs/guarantees.md)

    Two memories are equal if all but ``version`` and ``stale`` are. What is given is copied: a list that changes
    afterwards changes no memory. Nothing is validated here; :meth:`mnemobus.Bus.write` does that and names the field
    that is wrong.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        table: str,
        room: str,
        content: Mapping[str, Any],
        id: str | uuid.UUID | None = None,
        agent: str | None = None,
        entity: str | None = None,
        world: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        embedding: Sequence[float] | None = None,
        created_at: datetime | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "id", new_id() if id is None else str(id) if isinstance(id, uuid.UUID) else id)
        put(self, "dimensions", Dimensions(table, room, agent, entity, world))
        put(self, "stale", False)
        put(self, "_record", None)
        put(self, "_content", freeze(content))
        put(self, "_metadata", FrozenDict() if metadata is None else freeze(metadata))
        put(self, "_embedding", _snapshot(embedding))
        put(self, "_created", datetime.now(UTC) if created_at is None else created_at)

    @classmethod
    def _stored(cls, id: str, dimensions: Dimensions, record: bytes) -> Memory:
        """A memory as a store or a cache has it; the record is decoded as it is asked for."""
        draft = _Draft()
        draft.id = id
        draft.dimensions = dimensions
        draft.stale = False
        draft._record = record
        draft._content = draft._metadata = draft._embedding = draft._created = None
        draft.__class__ = cls
        return draft  # type: ignore[return-value]

    def _share_id(self, id: str) -> None:
        """Use this string, which says the same, and is kept anyway."""
        object.__setattr__(self, "id", id)

    def _as_stale(self) -> Memory:
        copy = Memory.__new__(Memory)
        for name in _Draft.__slots__:
            object.__setattr__(copy, name, getattr(self, name))
        object.__setattr__(copy, "stale", True)
        return copy

    @property
    def table(self) -> str:
        return self.dimensions.table

    @property
    def room(self) -> str:
        return self.dimensions.room

    @property
    def agent(self) -> str | None:
        return self.dimensions.agent

    @property
    def entity(self) -> str | None:
        return self.dimensions.entity

    @property
    def world(self) -> str | None:
        return self.dimensions.world

    @property
    def version(self) -> Version | None:
        return None if self._record is None else Version(*_HEAD.unpack_from(self._record)[:2])

    @property
    def content(self) -> Mapping[str, Any]:
        found = self._content
        if found is None and self._record is not None:
            found = _decoded.keep(self, "_content", content_of(self._record))
        return found  # type: ignore[no-any-return]

    @property
    def metadata(self) -> Mapping[str, Any]:
        found = self._metadata
        if found is None and self._record is not None:
            found = _decoded.keep(self, "_metadata", metadata_of(self._record))
        return found  # type: ignore[no-any-return]

    @property
    def embedding(self) -> tuple[float, ...] | None:
        if self._record is not None:
            packed = embedding_of(self._record)
            return None if packed is None else tuple(_floats(packed))
        return self._embedding  # type: ignore[no-any-return]

    @property
    def created_at(self) -> datetime:
        if self._record is not None:
            return from_micros(_HEAD.unpack_from(self._record)[2])
        return self._created  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values that any JSON encoder takes; the reverse of :meth:`from_dict`."""
        return {
            "id": self.id,
            "table": self.table,
            "room": self.room,
            "agent": self.agent,
            "entity": self.entity,
            "world": self.world,
            "content": thaw(self.content),
            "metadata": thaw(self.metadata),
            "embedding": None if self.embedding is None else list(self.embedding),
            "created_at": self.created_at.isoformat(),
        }

    @classmethod
    def from_dict(cls, record: object) -> Memory:
        """A memory from a decoded JSON object, as one line of an import file is one.

        Raises InvalidMemory for a record that is no object, lacks a field, or has one that is unknown.
        """
        if not isinstance(record, dict):
            raise InvalidMemory("record", f"a JSON object is needed, not {_kind(record)}")
        unknown = record.keys() - _RECORD_FIELDS
        if unknown:
            raise InvalidMemory(
                sorted(unknown)[0], f"unknown field; known are {', '.join(sorted(_RECORD_FIELDS))}"
            )
        for field in ("table", "room", "content"):
            if field not in record:
                raise InvalidMemory(field, "is missing")
        created = record.get("created_at")
        if created is not None:
            if not isinstance(created, str):
                raise InvalidMemory("created_at", f"an ISO 8601 date is needed, not {_kind(created)}")
            try:
                created = datetime.fromisoformat(created)
            except ValueError:
                raise InvalidMemory("created_at", f"{created!r} is not an ISO 8601 date") from None
        return cls(**{**record, "created_at": created})

    def _identity(self) -> tuple[Any, ...]:
        embedding = self.embedding
        return (
            self.id,
            self.dimensions,
            self.content,
            self.metadata,
            None if embedding is None else array("f", embedding).tobytes(),
            self.created_at,
        )

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Memory) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a memory is immutable: {name} can't be set; change it with bus.update()")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a memory is immutable: {name} can't be deleted")

    def __copy__(self) -> Memory:
        return self

    def __deepcopy__(self, memo: object) -> Memory:
        return self  # what can't change needs no copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, tuple(getattr(self, name) for name in _Draft.__slots__)

    def __repr__(self) -> str:
        others = "".join(
            f", {name}={getattr(self, name)!r}"
            for name in ("agent", "entity", "world")
            if getattr(self, name)
        )
        names = f"id={self.id!r}, table={self.table!r}, room={self.room!r}{others}"
        return f"Memory({names}, content={self.content!r})"


DECODED = 16 << 20
"""Bytes that decoded contents take, about, of which memories that were read keep a hold in this process."""
_DECODED_EACH = 500
_DECODED_FACTOR = 12
"""How much larger than its JSON a decoded object is, about: many small strings, dicts and lists."""


class _Decoded:
    """What memories keep of their contents, decoded: that of those which were decoded last.

    The cached copy of a memory is the one that is handed out, and lives as long as it is cached. Were each content
    kept that was ever looked at, a cache of encoded records would come to ten times its bound. Safe for threads.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = Lock()
        self._held: deque[tuple[Memory, str, int]] = deque()
        self.bytes = 0

    def keep(self, memory: Memory, slot: str, encoded: bytes) -> Any:
        """Decode an object, put it into its slot, and empty the slots of others if it is too much."""
        if encoded == b"{}":
            return _NOTHING
        value = freeze(orjson.loads(encoded))
        # With the record: this may be what keeps the memory alive.
        cost = _DECODED_EACH + _DECODED_FACTOR * len(encoded) + len(memory._record or b"")
        if cost > self._limit:
            return value
        with self._lock:
            object.__setattr__(memory, slot, value)
            self._held.append((memory, slot, cost))
            self.bytes += cost
            while self.bytes > self._limit:
                other, name, size = self._held.popleft()
                object.__setattr__(other, name, None)
                self.bytes -= size
        return value


_NOTHING = FrozenDict()
_decoded = _Decoded(DECODED)


_RECORD_FIELDS = frozenset(
    ("id", "table", "room", "agent", "entity", "world", "content", "metadata", "embedding", "created_at")
)


def _restore(*values: Any) -> Memory:
    memory = Memory.__new__(Memory)
    for name, value in zip(_Draft.__slots__, values, strict=True):
        object.__setattr__(memory, name, value)
    return memory


class Memories(Sequence[Memory]):
    """The answer to a query: memories in order, where they came from, and whether that may be old. Immutable.

    source  "local" (this process), "shared" (Redis) or "store" (the database)
    stale   True if the bus could not verify that nothing newer exists
    """

    __slots__ = ("_items", "source", "stale")

    _items: tuple[Memory, ...]
    source: str
    stale: bool

    def __init__(self, items: tuple[Memory, ...], source: str, stale: bool = False) -> None:
        put = object.__setattr__
        put(self, "_items", items)
        put(self, "source", source)
        put(self, "stale", stale)

    @overload
    def __getitem__(self, index: int) -> Memory: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Memory, ...]: ...
    def __getitem__(self, index: int | slice) -> Memory | tuple[Memory, ...]:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Memory]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and not isinstance(other, str):
            return self._items == tuple(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an answer is immutable: {name} can't be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an answer is immutable: {name} can't be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return Memories, (self._items, self.source, self.stale)

    def __repr__(self) -> str:
        return f"Memories({list(self._items)!r}, source={self.source!r}, stale={self.stale!r})"


class Context(NamedTuple):
    """What an agent needs at the start of a turn: the room's messages and the facts, newest first."""

    messages: Memories
    facts: Memories


_HEAD = struct.Struct(">QQqII")
"""The beginning of a record: version, created_at in microseconds, bytes of content, bytes of metadata. Then follow
content, metadata and the embedding, if there is one, as a `Row` has them."""


def content_of(record: bytes) -> bytes:
    size = _HEAD.unpack_from(record)[3]
    return record[_HEAD.size : _HEAD.size + size]


def metadata_of(record: bytes) -> bytes:
    *_, content, metadata = _HEAD.unpack_from(record)
    return record[_HEAD.size + content : _HEAD.size + content + metadata]


def embedding_of(record: bytes) -> bytes | None:
    *_, content, metadata = _HEAD.unpack_from(record)
    return record[_HEAD.size + content + metadata :] or None


def place_of(memory: Memory) -> tuple[int, str]:
    """Where a stored memory stands in a listing: its date in microseconds since 1970, and its id."""
    assert memory._record is not None, "a memory that was read from a store"
    return _HEAD.unpack_from(memory._record)[2], memory.id


def size_of(memory: Memory) -> int:
    """Bytes of a stored memory's record."""
    return len(memory._record or b"")


def changed(
    memory: Memory, content: bytes | None, metadata: bytes | None, embedding: bytes | None, version: Version
) -> Memory:
    """A stored memory after an update; None leaves a field as it is, and ``b""`` removes the embedding."""
    record = memory._record
    assert record is not None, "a memory that was read from a store"
    content = content_of(record) if content is None else content
    metadata = metadata_of(record) if metadata is None else metadata
    embedding = embedding_of(record) if embedding is None else embedding
    head = _HEAD.pack(*version, _HEAD.unpack_from(record)[2], len(content), len(metadata))
    return Memory._stored(memory.id, memory.dimensions, b"".join((head, content, metadata, embedding or b"")))


class Row(NamedTuple):
    """One memory as it travels to and from a store: JSON and vectors still encoded.

    content, metadata  UTF-8 JSON objects
    embedding          little-endian float32, or None
    created_us         microseconds since 1970, UTC
    """

    id: str
    table: str
    room: str
    agent: str | None
    entity: str | None
    world: str | None
    content: bytes
    metadata: bytes
    embedding: bytes | None
    created_us: int
    version: Version

    def memory(self) -> Memory:
        """The memory that this is."""
        content, metadata = self.content, self.metadata
        head = _HEAD.pack(*self.version, self.created_us, len(content), len(metadata))
        record = b"".join((head, content, metadata, self.embedding or b""))
        return Memory._stored(self.id, shared_dimensions(*self[1:6]), record)


_dimensions: dict[tuple[str | None, ...], Dimensions] = {}
_DIMENSIONS = 10_000
"""How many are remembered."""


def shared_dimensions(*names: Any) -> Dimensions:
    """Dimensions of these names, the same object for the same names: few differ among many memories."""
    found = _dimensions.get(names)
    if found is None:
        if len(_dimensions) >= _DIMENSIONS:
            _dimensions.clear()
        # Rooms and agents are in many of them.
        found = Dimensions(*(intern(name) if type(name) is str else name for name in names))
        _dimensions[found] = found
    return found


def encode(memory: Memory, max_bytes: int) -> Row:
    """The memory, validated, as it travels; its version is still ZERO.

    Raises InvalidMemory (or MemoryTooLarge) that names the field. ``max_bytes`` bounds the whole record.
    """
    if not isinstance(memory, Memory):
        raise InvalidMemory("memory", f"a Memory is needed, not {_kind(memory)}")
    id = canonical_id(memory.id)
    check_dimensions(memory.dimensions)
    record = memory._record
    if record is not None:  # what came from a store is encoded, and valid
        content, metadata, embedding = content_of(record), metadata_of(record), embedding_of(record)
        created = _HEAD.unpack_from(record)[2]
    else:
        content = encode_object("content", memory._content)
        metadata = encode_object("metadata", memory._metadata)
        embedding = encode_embedding(memory._embedding)
        created = _encode_date(memory._created)
    row = Row(id, *memory.dimensions, content, metadata, embedding, created, Version(0, 0))
    check_size(row, max_bytes)
    return row


def check_size(row: Row, max_bytes: int) -> None:
    """MemoryTooLarge if the record's content, metadata, embedding and names exceed ``max_bytes``."""
    size = len(row.content) + len(row.metadata) + len(row.embedding or b"") + len(row.id)
    if size + 5 * MAX_NAME_BYTES <= max_bytes:
        return
    size += sum(len(name.encode()) for name in row[1:6] if name)
    if size > max_bytes:
        raise MemoryTooLarge("memory", f"{size:,} bytes, which is more than max_memory_bytes ({max_bytes:,})")


def check_dimensions(dimensions: Dimensions) -> None:
    """InvalidMemory that names the dimension which can't be stored."""
    try:
        known = dimensions in _checked
    except (TypeError, ValueError):  # a name that is a list, say
        known = False
    if not known:
        _check_dimensions(dimensions)
        if len(_checked) >= _DIMENSIONS:
            _checked.clear()
        _checked.add(dimensions)


_checked: set[Dimensions] = set()
"""Dimensions that are known to be fit: most writes have some that another had."""


def _check_dimensions(dimensions: Dimensions) -> None:
    check_table(dimensions.table)
    check_name("room", dimensions.room)
    for field in ("agent", "entity", "world"):
        value = getattr(dimensions, field)
        if value is not None:
            check_name(field, value)


def check_table(table: object) -> str:
    if not isinstance(table, str) or not _TABLE.match(table):
        raise InvalidMemory("table", f"{table!r} is not 1 to 64 letters, digits, '_', '.' or '-'")
    return table


def check_name(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidMemory(field, f"text is needed, not {_kind(value)}")
    if not value:
        raise InvalidMemory(field, "is empty")
    if "\0" in value:
        raise InvalidMemory(field, "contains a NUL character")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidMemory(field, "contains a lone surrogate, which UTF-8 can't encode") from None
    if size > MAX_NAME_BYTES:
        raise InvalidMemory(field, f"{size} bytes, which is more than {MAX_NAME_BYTES}")
    return value


def encode_object(field: str, value: object) -> bytes:
    """A JSON object as UTF-8."""
    if not isinstance(value, Mapping):
        raise InvalidMemory(field, f"a JSON object is needed, not {_kind(value)}")
    if not _is_plain(value):
        _check_json(field, value, 1)
    try:
        return orjson.dumps(value if isinstance(value, dict) else dict(value), default=_as_json)
    except (TypeError, ValueError) as error:  # a lone surrogate, say
        raise InvalidMemory(field, f"can't be encoded as JSON: {error}") from None


def _as_json(value: object) -> object:
    """What orjson leaves to others, and JSON has: mappings that are no dict, kinds of float (NumPy's)."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"{_kind(value)} is not a JSON value")


def _is_plain(value: Mapping[Any, Any]) -> bool:
    """Whether there is nothing in an object that would have to be looked into: what most are like."""
    for key, item in value.items():
        kind = type(item)
        if type(key) is not str or not (
            kind is str or (kind is int and -_LARGEST <= item < _LARGEST) or kind is bool or item is None
        ):
            return False
    return True


_LARGEST = 1 << 63


def _check_json(path: str, value: object, depth: int) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    if isinstance(value, int):
        if not -_LARGEST <= value < _LARGEST:
            raise InvalidMemory(path, "an integer beyond 64 bits")
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidMemory(path, f"{value} is not a JSON number")
        return
    if depth > MAX_DEPTH:
        raise InvalidMemory(path.partition(".")[0].partition("[")[0], f"nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidMemory(path, f"key {key!r} is not text")
            _check_json(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_json(f"{path}[{index}]", item, depth + 1)
    else:
        raise InvalidMemory(path, f"{_kind(value)} is not a JSON value")


def encode_embedding(value: object) -> bytes | None:
    """Little-endian float32; None stays None."""
    if value is None:
        return None
    numbers = value if type(value) is tuple else _numbers(value)
    try:
        if numbers and isinstance(numbers[0], bool):
            raise TypeError
        floats = array("f", numbers)
    except _ODD:
        raise InvalidMemory("embedding", "holds something that is not a number") from None
    if not floats:
        raise InvalidMemory("embedding", "is empty; use None for no embedding")
    # A sum is finite unless a part is not (or it overflows, which the slow path then clears up).
    if not math.isfinite(sum(floats)):
        for index, number in enumerate(floats):
            if not math.isfinite(number):
                raise InvalidMemory(f"embedding[{index}]", f"{number} is not a finite float32")
    if _BIG_ENDIAN:
        floats.byteswap()
    return floats.tobytes()


_ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What may come of converting what somebody else made."""


def _numbers(value: object) -> tuple[Any, ...]:
    """The elements of what has some in an order, along one dimension: sequences, iterators, arrays and series of NumPy,
    pandas, PyTorch and others. InvalidMemory for anything else: a mapping, a set, a table, text."""
    if isinstance(value, (list, tuple, Iterator)):
        return tuple(value)
    if isinstance(value, memoryview):
        if value.ndim == 1 and value.format in ("f", "d"):
            return tuple(value)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return tuple(value)
    elif getattr(value, "ndim", 1) == 1:
        listed = getattr(value, "tolist", None) or getattr(value, "to_list", None)
        if callable(listed):
            return tuple(listed())
    raise InvalidMemory("embedding", f"a sequence of numbers is needed, not {_kind(value)}")


def _snapshot(value: object) -> object:
    """An embedding as it is now, whatever its maker does with it afterwards; as it is if it is none, for `encode`."""
    if value is None or type(value) is tuple:
        return value
    try:
        return _numbers(value)
    except InvalidMemory:
        return value


_BIG_ENDIAN = struct.pack("=H", 1) == b"\0\1"


def _floats(packed: bytes) -> array[float]:
    floats = array("f")
    floats.frombytes(packed)
    if _BIG_ENDIAN:
        floats.byteswap()
    return floats


def _encode_date(created: object) -> int:
    try:
        micros = moment_of(created)
    except ValueError as error:
        raise InvalidMemory("created_at", str(error)) from None
    if not _FIRST <= micros <= _LAST:
        assert isinstance(created, datetime)
        raise InvalidMemory("created_at", f"{created.isoformat()} is not in the years 1 to 9999, UTC")
    return micros


_FIRST = to_micros(datetime.min.replace(tzinfo=UTC))
_LAST = to_micros(datetime.max.replace(tzinfo=UTC))


def moment_of(value: object) -> int:
    """Microseconds since 1970 of a datetime; ValueError, which says why, for what is no moment."""
    if not isinstance(value, datetime):
        raise ValueError(f"a datetime is needed, not {_kind(value)}")
    try:
        if value.utcoffset() is not None:
            return int(to_micros(value))
        text = value.isoformat()
    except _ODD:  # "not a time" of pandas is a datetime whose methods fail
        raise ValueError(f"{_kind(value)} is not a moment in time") from None
    raise ValueError(f"{text} has no time zone")


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    name = type(value).__name__
    return {"FrozenDict": "dict", "FrozenList": "list"}.get(name, name)


# How query results travel to and from L2: a JSON header (a list of dimensions; for each memory its id, which of these
# it has, and the bytes of its record), a newline, then the records end to end. Nothing large is decoded on the way.


def pack_memories(memories: Sequence[Memory]) -> bytes:
    """Stored memories as one value for L2."""
    known: dict[Dimensions, int] = {}
    items, records = [], [b"", b"\n"]
    for memory in memories:
        record = memory._record
        assert record is not None, "a memory that was read from a store"
        items.append((memory.id, known.setdefault(memory.dimensions, len(known)), len(record)))
        records.append(record)
    records[0] = orjson.dumps((tuple(map(tuple, known)), items))
    return b"".join(records)


def unpack_memories(packed: bytes) -> list[Memory]:
    """What :meth:`pack_memories` packed; ValueError or TypeError if it is anything else."""
    at = packed.find(b"\n") + 1
    if not at:
        raise ValueError("a cached result without a header")
    named, items = orjson.loads(packed[: at - 1])
    dimensions = [shared_dimensions(*names) for names in named]
    stored, least = Memory._stored, _HEAD.size
    memories = []
    for id, which, size in items:
        end = at + size
        if size < least:
            raise ValueError("a cached result with a record that is cut short")
        memories.append(stored(id, dimensions[which], packed[at:end]))
        at = end
    if at != len(packed):
        raise ValueError("a cached result of another length than its header says")
    return memories
