"""Queries: which scope one depends on, what it is called in each tier, and how its answer is shown."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from .errors import InvalidMemory, InvalidQuery
from .keys import agent_scope, entity_scope, room_scope, world_scope
from .memory import Memories, Memory, Row, canonical_id, check_name, check_table, to_micros
from .store import Cursor, Query

Place = Memory | datetime | tuple[datetime, str]
"""A place in a listing: a memory, or a date, or a date and the id of the memory that has it."""

_FIRST_ID = "00000000-0000-0000-0000-000000000000"
_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


@dataclass(slots=True)
class Plan:
    """One query: what it depends on, its name in each tier, and how its answer is found, packed and shown.

    key     in L1
    field   in L2
    find    asks the store
    show    makes what the caller gets of what was found: (found, source, stale)
    """

    scope: str
    table: str
    key: Any
    field: bytes
    find: Callable[[], Awaitable[Any]]
    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes], Any]
    show: Callable[[Any, str, bool], Any]


def scope_of(table: str, room: str | None, entity: str | None, agent: str | None, world: str | None) -> str:
    """The scope that a query depends on: the narrowest that it names."""
    if room is not None:
        return room_scope(table, room)
    if entity is not None:
        return entity_scope(table, entity)
    if agent is not None:
        return agent_scope(table, agent)
    if world is not None:
        return world_scope(table, world)
    raise InvalidQuery("name at least one of room, entity, agent and world")


def query_of(
    table: str,
    room: str | None,
    entity: str | None,
    agent: str | None,
    world: str | None,
    before: Place | None,
    after: Place | None,
) -> Query:
    try:
        check_table(table)
        for field, value in (("room", room), ("entity", entity), ("agent", agent), ("world", world)):
            if value is not None:
                check_name(field, value)
    except InvalidMemory as error:
        raise InvalidQuery(str(error)) from None
    return Query(table, room, agent, entity, world, cursor_of(before), cursor_of(after, last=True))


def cursor_of(place: Place | None, *, last: bool = False) -> Cursor | None:
    """A place as the store compares it. A date alone stands before (``last``: after) all that have it."""
    if place is None:
        return None
    if isinstance(place, Memory):
        place = (place.created_at, place.id)
    if isinstance(place, datetime):
        place = (place, _LAST_ID if last else _FIRST_ID)
    if not isinstance(place, tuple) or len(place) != 2 or not isinstance(place[0], datetime):
        raise InvalidQuery(
            f"before and after take a Memory, a datetime, or a datetime and an id, not {place!r}"
        )
    if place[0].utcoffset() is None:
        raise InvalidQuery(f"before and after need a time zone: {place[0].isoformat()}")
    try:
        return Cursor(to_micros(place[0]), canonical_id(place[1]))
    except InvalidMemory as error:
        raise InvalidQuery(str(error)) from None


def field_of(kind: str, query: Query, limit: int) -> bytes:
    """The query's name in its L2 bucket, the same in every process."""
    before = None if query.before is None else list(query.before)
    after = None if query.after is None else list(query.after)
    return orjson.dumps([kind, limit, query.entity, query.agent, query.world, before, after])


def show_one(rows: list[Row] | Memory | None, source: str, stale: bool) -> Memory | None:
    if not isinstance(rows, list):  # the last known copy
        memory = rows
    elif rows:
        memory = Memory._stored(rows[0])
    else:
        memory = None
    return memory._as_stale() if stale and memory is not None else memory


def show_many(rows: list[Row] | Memories, source: str, stale: bool) -> Memories:
    items = tuple(rows) if isinstance(rows, Memories) else tuple(map(Memory._stored, rows))
    return Memories(items, source, stale)


def show_count(count: int, source: str, stale: bool) -> int:
    return count


def pack_count(count: int) -> bytes:
    return b"%d" % count
