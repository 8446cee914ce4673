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

import re
import uuid
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import orjson

from ..errors import BadEvent, InvalidMemory
from ..keys import ZERO, Dimensions, Version, room_scope
from ..records import Row
from ..values import MAX_DEPTH, check_dimensions

PUT, UPDATE, DELETE, DELETE_ROOM = "put", "update", "delete", "delete_room"


class Event(NamedTuple):
    """One write. What an op does not use is None; see the module's table.

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


Pairs = Sequence[bytes] | dict[bytes, bytes]
"""An entry's field names and values: alternating, or by name."""

_OPS = {op.encode(): op for op in (PUT, UPDATE, DELETE, DELETE_ROOM)}
_KNOWN = frozenset(b"op table room id agent entity world at content metadata embedding as".split())
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")
_DIMENSIONS = 4_096
"""Combinations of names that are remembered as checked: events repeat them."""


def version_of(id: Version, pairs: Pairs) -> Version:
    """The version of a log entry's event: the entry's ID, or, where a dead letter was requeued, the version that
    the event had before. So it still loses against what was written since (G2). Also for what `decode` refuses."""
    try:
        had = _mapping(pairs).get(b"as")
        return id if had is None else _version(id, had)
    except BadEvent:
        return id


def _version(id: Version, had: bytes) -> Version:
    try:
        version = Version.parse(had)
    except ValueError as error:
        raise BadEvent(f"as: {error}") from None
    if version >= id:
        raise BadEvent(f"as: {version} is not before {id}, the version of the entry that carries it")
    return version


def _mapping(pairs: Pairs) -> dict[bytes, bytes]:
    if isinstance(pairs, dict):
        return pairs
    each = iter(pairs)
    return dict(zip(each, each, strict=True))


def decode(version: Version, pairs: Pairs) -> Event:
    """The event of a log entry, whose ID is ``version``; BadEvent, with a reason for people, for anything that is
    none."""
    fields = _mapping(pairs)
    get = fields.get
    if b"as" in fields:
        version = _version(version, fields[b"as"])
    if not fields.keys() <= _KNOWN:
        name = _text(min(fields.keys() - _KNOWN))
        raise BadEvent(f"unknown field {name!r}: written by a newer mnemobus?")
    written = get(b"op")
    if written is None:
        raise BadEvent("the field 'op' is missing")
    dimensions = _dimensions(get(b"table"), get(b"room"), get(b"agent"), get(b"entity"), get(b"world"))
    op = _OPS.get(written)
    if op is None:
        raise BadEvent(f"unknown op {_text(written)!r}: written by a newer mnemobus?")
    if op == DELETE_ROOM:
        return Event(op, dimensions, version=version)
    id = _id(get(b"id"))
    if op == DELETE:
        return Event(op, dimensions, id, version=version)
    content, metadata, embedding = get(b"content"), get(b"metadata"), get(b"embedding")
    created_us = 0
    if op == PUT:
        if content is None or metadata is None:
            raise BadEvent("a put without content or metadata")
        created_us = _micros(get(b"at"))
        if embedding == b"":
            embedding = None
    if content is not None:
        _check_object("content", content)
    if metadata is not None:
        _check_object("metadata", metadata)
    if embedding is not None and len(embedding) % 4:
        raise BadEvent(f"embedding: {len(embedding)} bytes are no whole number of float32")
    return Event(op, dimensions, id, content, metadata, embedding, created_us, version)


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise BadEvent(f"a name is not UTF-8: {error}") from None


@lru_cache(_DIMENSIONS)
def _dimensions(table: bytes | None, room: bytes | None, *others: bytes | None) -> Dimensions:
    if table is None:
        raise BadEvent("the field 'table' is missing")
    if room is None:
        raise BadEvent("the field 'room' is missing")
    agent, entity, world = (None if name is None else _text(name) for name in others)
    dimensions = Dimensions(_text(table), _text(room), agent, entity, world)
    try:
        check_dimensions(dimensions)
    except InvalidMemory as error:
        raise BadEvent(str(error)) from None
    return dimensions


def _id(written: bytes | None) -> str:
    if written is not None and _UUID.match(written):
        return written.decode()
    text = None if written is None else _text(written)
    try:
        return str(uuid.UUID(text or ""))
    except ValueError:
        raise BadEvent(f"id: {text!r} is not a UUID") from None


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


def _check_object(field: str, value: bytes) -> None:
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
    # Level by level: what JSON may nest is more than Python calls itself.
    depth = 0
    level = [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
