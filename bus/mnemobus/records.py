"""The codec of records: memories as they travel to and from a store, and to and from L2.

A memory is validated when it is written (`encode`), not when it is made: an error then names the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import orjson

from .errors import InvalidMemory, MemoryTooLarge
from .keys import Dimensions, Version
from .memory import HEAD, Memory, content_of, embedding_of, metadata_of
from .values import (
    MAX_NAME_BYTES,
    canonical_id,
    check_dimensions,
    encode_date,
    encode_embedding,
    encode_object,
    kind_of,
    shared_dimensions,
)


def place_of(memory: Memory) -> tuple[int, str]:
    """Where a stored memory stands in a listing: its date in microseconds since 1970, and its id."""
    assert memory._record is not None, "a memory that was read from a store"
    return HEAD.unpack_from(memory._record)[2], memory.id


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
    head = HEAD.pack(*version, HEAD.unpack_from(record)[2], len(content), len(metadata))
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
        head = HEAD.pack(*self.version, self.created_us, len(content), len(metadata))
        record = b"".join((head, content, metadata, self.embedding or b""))
        return Memory._stored(self.id, shared_dimensions(*self[1:6]), record)


def encode(memory: Memory, max_bytes: int) -> Row:
    """The memory, validated, as it travels; its version is still ZERO.

    Raises InvalidMemory (or MemoryTooLarge) that names the field. ``max_bytes`` bounds the whole record.
    """
    if not isinstance(memory, Memory):
        raise InvalidMemory("memory", f"a Memory is needed, not {kind_of(memory)}")
    id = canonical_id(memory.id)
    check_dimensions(memory.dimensions)
    record = memory._record
    if record is not None:  # what came from a store is encoded, and valid
        content, metadata, embedding = content_of(record), metadata_of(record), embedding_of(record)
        created = HEAD.unpack_from(record)[2]
    else:
        content = encode_object("content", memory._content)
        metadata = encode_object("metadata", memory._metadata)
        embedding = encode_embedding(memory._embedding)
        created = encode_date(memory._created)
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
    stored, least = Memory._stored, HEAD.size
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
