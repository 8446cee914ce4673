"""Memories and answers, as users see them. What a bus hands out is immutable, since it is also the cached copy.

A memory that came from a store or a cache is a record (`HEAD`), decoded as it is asked for. The codec is in records.py,
the checks and encodings of its fields are in values.py.
"""

from __future__ import annotations

import os
import struct
import time
import uuid
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from threading import Lock
from typing import Any, NoReturn, overload

import orjson

from .errors import InvalidMemory
from .keys import Dimensions, Version
from .values import FrozenDict, freeze, from_micros, kind_of, snapshot, thaw, unpack_floats


def new_id() -> str:
    """A new UUIDv7 (RFC 9562): unique, and in the order of creation to the millisecond."""
    ms = time.time_ns() // 1_000_000
    bits = (ms << 80) | (0x7 << 76) | int.from_bytes(os.urandom(10), "big") & ~(0xF << 76)
    bits = bits & ~(0x3 << 62) | (0x2 << 62)
    return str(uuid.UUID(int=bits))


class _Draft:
    """What a Memory is made of. A Memory's attributes can't be set, so a draft becomes a Memory by changing its class.
    That takes a sixth of the time of `object.__setattr__`."""

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
        put(self, "_embedding", snapshot(embedding))
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
        """Use this string, which is equal, and is kept in memory anyway."""
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
        return None if self._record is None else Version(*HEAD.unpack_from(self._record)[:2])

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
            return None if packed is None else tuple(unpack_floats(packed))
        return self._embedding  # type: ignore[no-any-return]

    @property
    def created_at(self) -> datetime:
        if self._record is not None:
            return from_micros(HEAD.unpack_from(self._record)[2])
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
            raise InvalidMemory("record", f"a JSON object is needed, not {kind_of(record)}")
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
                raise InvalidMemory("created_at", f"an ISO 8601 date is needed, not {kind_of(created)}")
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
    """The decoded contents that memories keep: those that were decoded last.

    The cached copy of a memory is the one that is handed out, and lives as long as it is cached. If every decoded
    content were kept, a cache of encoded records would take ten times its bound. Safe for threads.
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


HEAD = struct.Struct(">QQqII")
"""The beginning of a record: version, created_at in microseconds, bytes of content, bytes of metadata. Then follow
content, metadata and the embedding, if there is one, as a `Row` has them."""


def content_of(record: bytes) -> bytes:
    size = HEAD.unpack_from(record)[3]
    return record[HEAD.size : HEAD.size + size]


def metadata_of(record: bytes) -> bytes:
    *_, content, metadata = HEAD.unpack_from(record)
    return record[HEAD.size + content : HEAD.size + content + metadata]


def embedding_of(record: bytes) -> bytes | None:
    *_, content, metadata = HEAD.unpack_from(record)
    return record[HEAD.size + content + metadata :] or None
