"""Events: what a write is in the log.

An entry of the log is a flat list of named fields, readable with ``redis-cli XRANGE``:

    op          put | update | delete | delete_room
    table room  always
    id          always but for delete_room
    agent entity world   where the memory has them
    at          put: created_at in microseconds since 1970
    content metadata     put, and update where they change: UTF-8 JSON objects
    embedding   put, and update where it changes: raw float32; empty to remove it
    as          where a dead letter was requeued: the version that the event had, and keeps

Bytes go straight through: what `write` encoded is what the database driver is given.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from .errors import BadEvent, InvalidMemory
from .keys import ZERO, Dimensions, Version, room_scope
from .memory import MAX_DEPTH, Row, check_dimensions

PUT, UPDATE, DELETE, DELETE_ROOM = "put", "update", "delete", "delete_room"


@dataclass(frozen=True, slots=True)
class Event:
    """One write. What an op has no use for is None; see the module's table.

    embedding: float32 bytes; ``b""`` in an update removes it; None leaves it (update) or is none (put).
    version: ZERO until the log has given one.
    """

    op: str
    dimensions: Dimensions
    id: str = ""
    content: bytes | None = None
    metadata: bytes | None = None
    embedding: bytes | None = None
    created_us: int = 0
    version: Version = ZERO

    @classmethod
    def put(cls, row: Row) -> Event:
        dimensions = Dimensions(row.table, row.room, row.agent, row.entity, row.world)
        return cls(PUT, dimensions, row.id, row.content, row.metadata, row.embedding, row.created_us)

    def scopes(self) -> list[str]:
        """The scopes that are known to be touched from the event alone."""
        if self.op == DELETE_ROOM:
            return [room_scope(self.dimensions.table, self.dimensions.room)]
        return self.dimensions.scopes(self.id)

    def fields(self) -> list[bytes]:
        """Names and values, alternating, as XADD takes them."""
        table, room, agent, entity, world = self.dimensions
        out = [b"op", self.op.encode(), b"table", table.encode(), b"room", room.encode()]
        if self.id:
            out += (b"id", self.id.encode())
        if agent is not None:
            out += (b"agent", agent.encode())
        if entity is not None:
            out += (b"entity", entity.encode())
        if world is not None:
            out += (b"world", world.encode())
        if self.op == PUT:
            out += (b"at", b"%d" % self.created_us)
        if self.content is not None:
            out += (b"content", self.content)
        if self.metadata is not None:
            out += (b"metadata", self.metadata)
        if self.embedding is not None:
            out += (b"embedding", self.embedding)
        return out


Pairs = Sequence[bytes] | Mapping[bytes, bytes]
"""An entry's field names and values: alternating, or as a mapping."""

_KNOWN = frozenset(
    ("op", "table", "room", "id", "agent", "entity", "world", "at", "content", "metadata", "embedding", "as")
)


def version_of(id: Version, pairs: Pairs) -> Version:
    """The version of a log entry's event: the entry's ID, or, where a dead letter was requeued, the version that
    the event had before. So it still loses against what was written since (G2). Also for what `decode` refuses."""
    try:
        return _version(id, _mapping(pairs).get(b"as"))
    except BadEvent:
        return id


def _version(id: Version, had: bytes | None) -> Version:
    if had is None:
        return id
    try:
        version = Version.parse(had)
    except ValueError as error:
        raise BadEvent(f"as: {error}") from None
    if version >= id:
        raise BadEvent(f"as: {version} is not before {id}, the version of the entry that carries it")
    return version


def _mapping(pairs: Pairs) -> Mapping[bytes, bytes]:
    return pairs if isinstance(pairs, Mapping) else dict(zip(pairs[::2], pairs[1::2], strict=True))


def decode(version: Version, pairs: Pairs) -> Event:
    """The event of a log entry, whose ID is ``version``; BadEvent, with a reason for people, for anything that is
    none."""
    pairs = _mapping(pairs)
    version = _version(version, pairs.get(b"as"))
    try:
        names = {key.decode(): value for key, value in pairs.items()}
        if not names.keys() <= _KNOWN:
            raise BadEvent(
                f"unknown field {sorted(names.keys() - _KNOWN)[0]!r}: written by a newer mnemobus?"
            )
        text = {
            key: names[key].decode()
            for key in ("op", "table", "room", "id", "agent", "entity", "world")
            if key in names
        }
    except UnicodeDecodeError as error:
        raise BadEvent(f"a name is not UTF-8: {error}") from None
    for field in ("op", "table", "room"):
        if field not in text:
            raise BadEvent(f"the field {field!r} is missing")
    op = text["op"]
    dimensions = Dimensions(
        text["table"], text["room"], text.get("agent"), text.get("entity"), text.get("world")
    )
    try:
        check_dimensions(dimensions)
    except InvalidMemory as error:
        raise BadEvent(str(error)) from None
    if op == DELETE_ROOM:
        return Event(op, dimensions, version=version)
    if op not in (PUT, UPDATE, DELETE):
        raise BadEvent(f"unknown op {op!r}: written by a newer mnemobus?")
    try:
        id = str(uuid.UUID(text.get("id", "")))
    except ValueError:
        raise BadEvent(f"id: {text.get('id')!r} is not a UUID") from None
    if op == DELETE:
        return Event(op, dimensions, id, version=version)
    content, metadata, embedding = names.get("content"), names.get("metadata"), names.get("embedding")
    created_us = 0
    if op == PUT:
        if content is None or metadata is None:
            raise BadEvent("a put without content or metadata")
        created_us = _micros(names.get("at"))
        if embedding == b"":
            embedding = None
    _check_object("content", content)
    _check_object("metadata", metadata)
    if embedding is not None and len(embedding) % 4:
        raise BadEvent(f"embedding: {len(embedding)} bytes are no whole number of float32")
    return Event(op, dimensions, id, content, metadata, embedding, created_us, version)


_LATEST = 253_402_300_800_000_000  # the year 10000, where datetime ends
_EARLIEST = -62_135_596_800_000_000  # the year 1


def _micros(text: bytes | None) -> int:
    try:
        micros = int(text or b"")
    except ValueError:
        raise BadEvent(f"at: {text!r} is not a number of microseconds") from None
    if not _EARLIEST <= micros < _LATEST:
        raise BadEvent(f"at: {micros} is not between the years 1 and 9999")
    return micros


def _check_object(field: str, value: bytes | None) -> None:
    if value is None:
        return
    try:
        decoded = orjson.loads(value)
    except ValueError as error:
        raise BadEvent(f"{field}: not JSON: {error}") from None
    if not isinstance(decoded, dict):
        raise BadEvent(f"{field}: JSON, but no object")
    # Databases parse with limits of their own; deeper than `write` allows can only come from elsewhere.
    if value.count(b"{") + value.count(b"[") > MAX_DEPTH and _depth(decoded) > MAX_DEPTH + 1:
        raise BadEvent(f"{field}: nests deeper than {MAX_DEPTH} levels")


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
