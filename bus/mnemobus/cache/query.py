"""Queries: which scope one depends on, what it is called in each tier, and how its answer is shown.

A `Question` goes the other way: from what an answer is called in a tier back to the query, to ask it again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from numbers import Real
from operator import index
from reprlib import repr as _short
from typing import Any, Final

import orjson

from ..errors import InvalidMemory, InvalidQuery
from ..keys import Version
from ..memory import Memories, Memory
from ..records import Row, pack_memories, unpack_memories
from ..store import Cursor, Query, Reader
from ..values import canonical_id, check_name, check_table, moment_of
from .l1 import Key

Place = Memory | datetime | tuple[datetime, str]
"""A place in a listing: a memory, or a date, or a date and the id of the memory that has it."""

GET: Final = "get"
"""What a memory by its id is called in either tier."""
GET_FIELD: Final = GET.encode()

_FIRST_ID = "00000000-0000-0000-0000-000000000000"
_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


@dataclass(frozen=True, slots=True)
class Kind:
    """The forms of the answers to one kind of query, in each place.

    name    get, recent or count
    pack    as L2 keeps what the store answered
    unpack  the reverse
    keep    as L1 keeps it
    show    what the caller gets of what L1 keeps: (kept, source, stale)
    """

    name: str
    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes], Any]
    keep: Callable[[Any], Any]
    show: Callable[[Any, str, bool], Any]


@dataclass(slots=True)
class Plan:
    """One query: what it depends on, its name in each tier, and how its answer is found.

    name    of its bucket in L1
    key     in L1
    field   in L2
    find    asks the store
    window  the query, if a window of its scope may answer it; None if not. ``limit`` is its limit
    """

    scope: str
    name: str
    table: str
    key: Key
    field: bytes
    find: Callable[[], Awaitable[Any]]
    kind: Kind
    window: Query | None = None
    limit: int = 0


_SCOPES: dict[str, dict[str, dict[str, str]]] = {"room": {}, "entity": {}, "agent": {}, "world": {}}
"""By kind, table and name: scopes that are fit. A scope is not spelled from anything else: "a:b" is no table, but
spelled with a room "c" it would name the room "b:c" of table "a"."""
_MOST_SCOPES = 10_000
"""How many of each kind are remembered."""
_remembered: Counter[str] = Counter()
ROOM_SCOPES: Final[Mapping[str, Mapping[str, str]]] = _SCOPES["room"]
"""Those of rooms, by table and room, for the hot path; `scope_of_room` has the others."""


def scope_of_room(table: str, room: str) -> str:
    """The scope of a room; InvalidQuery if there can be none."""
    return scope_by("room", table, room)


def scope_of(table: str, room: str | None, entity: str | None, agent: str | None, world: str | None) -> str:
    """The scope that a query depends on: the narrowest that it names."""
    if room is not None:
        return scope_by("room", table, room)
    if entity is not None:
        return scope_by("entity", table, entity)
    if agent is not None:
        return scope_by("agent", table, agent)
    if world is not None:
        return scope_by("world", table, world)
    raise InvalidQuery("name at least one of room, entity, agent and world")


def scope_by(kind: str, table: str, name: str) -> str:
    """The scope of a room, entity, agent or world; InvalidQuery if there can be none."""
    known = _SCOPES[kind]
    try:
        return known[table][name]
    except (KeyError, TypeError, ValueError):  # a list, for example: the check names it
        _check_names(table, {kind: name})
    if _remembered[kind] >= _MOST_SCOPES:
        known.clear()
        _remembered[kind] = 0
    _remembered[kind] += 1
    scope = known.setdefault(table, {})[name] = f"{kind}:{table}:{name}"
    return scope


def newest_key(kind: str, name: str, limit: int) -> Key:
    """What the newest memories of a room, entity, agent or world are called in L1, in its scope."""
    if kind == "room":
        return limit
    return (
        limit,
        name if kind == "entity" else None,
        name if kind == "agent" else None,
        name if kind == "world" else None,
    )


def _check_names(table: str, names: Mapping[str, str | None]) -> None:
    try:
        check_table(table)
        for field, value in names.items():
            if value is not None:
                check_name(field, value)
    except InvalidMemory as error:
        raise InvalidQuery(str(error)) from None


def limit_of(limit: Any) -> int:
    """A limit of another type as an int; InvalidQuery if it is not a whole number, or is a bool."""
    try:
        if not isinstance(limit, bool):
            return index(limit)
    except TypeError:
        pass
    raise InvalidQuery(f"limit must be a whole number, not {limit!r}")


def timeout_of(timeout: Any) -> float:
    """Seconds as a float, None for any time; InvalidQuery if it is no number."""
    if timeout is None:
        return math.inf
    if not isinstance(timeout, bool) and isinstance(timeout, Real) and timeout == timeout:
        try:
            return float(timeout)
        except OverflowError:
            return math.inf
    raise InvalidQuery(f"timeout must be a number of seconds, not {_short(timeout)}")


def query_of(
    table: str,
    room: str | None,
    entity: str | None,
    agent: str | None,
    world: str | None,
    before: Place | None,
    after: Place | None,
) -> Query:
    _check_names(table, {"room": room, "entity": entity, "agent": agent, "world": world})
    return Query(table, room, agent, entity, world, cursor_of(before), cursor_of(after, last=True))


def cursor_of(place: Place | None, *, last: bool = False) -> Cursor | None:
    """A place as the store compares it. A date alone stands before (``last``: after) all that have it."""
    if place is None:
        return None
    if isinstance(place, Memory):
        place = (place.created_at, place.id)
    if isinstance(place, datetime):
        place = (place, _LAST_ID if last else _FIRST_ID)
    field = "after" if last else "before"
    if not isinstance(place, tuple) or len(place) != 2 or not isinstance(place[0], datetime):
        raise InvalidQuery(
            f"{field}: a Memory, a datetime, or a datetime and an id is needed, not {_short(place)}"
        )
    try:
        return Cursor(moment_of(place[0]), canonical_id(place[1]))
    except (InvalidMemory, ValueError) as error:
        raise InvalidQuery(f"{field}: {error}") from None


def field_of(kind: str, query: Query, limit: int) -> bytes:
    """The query's name in its L2 bucket, the same in every process."""
    before = None if query.before is None else list(query.before)
    after = None if query.after is None else list(query.after)
    return orjson.dumps([kind, limit, query.entity, query.agent, query.world, before, after])


def _first(memories: Sequence[Memory]) -> Memory | None:
    return memories[0] if memories else None


def _show_one(memory: Memory | None, source: str, stale: bool) -> Memory | None:
    return memory._as_stale() if stale and memory is not None else memory


def _keep_many(memories: Sequence[Memory]) -> Memories:
    return Memories(tuple(memories), "local")


def _show_many(kept: Memories, source: str, stale: bool) -> Memories:
    return Memories(kept._items, source, stale)


def _same(count: int, *_: object) -> int:
    return count


ONE: Final = Kind(GET, pack_memories, unpack_memories, _first, _show_one)
MANY: Final = Kind("recent", pack_memories, unpack_memories, _keep_many, _show_many)
COUNT: Final = Kind("count", lambda count: b"%d" % count, int, _same, _same)


Versions = tuple[tuple[str, Version], ...] | int
"""An answer by versions: id and version of each memory, in order; of a count, the count."""


def versions_of(answer: Any) -> Versions:
    """The versions of an answer, as the store gave it or as L1 keeps it."""
    if isinstance(answer, int):
        return answer
    if answer is None:
        return ()
    memories: Iterable[Any] = (answer,) if isinstance(answer, Memory) else answer
    return tuple((memory.id, memory.version) for memory in memories)


@dataclass(frozen=True, slots=True)
class Question:
    """A query by itself, with which the store can be asked for what a tier answered.

    query  None for a memory by its id, which is in the scope
    """

    scope: str
    kind: str
    query: Query | None = None
    limit: int = 0

    @classmethod
    def local(cls, scope: str, key: Key) -> Question:
        """The question whose answer is under this key in L1."""
        if isinstance(key, str):
            return cls(scope, GET)
        if isinstance(key, int):  # nothing but a limit, as `Bus.recent` has it
            key = (key, None, None, None)
        if key[0] == "count":
            return cls(scope, "count", key[1])
        limit, entity, agent, world, *cursors = key
        before, after = cursors or (None, None)
        return cls(scope, "recent", _query_in(scope, entity, agent, world, before, after), limit)

    @classmethod
    def shared(cls, scope: str, field: bytes | str) -> Question:
        """The question whose answer is in this field in L2; ValueError if it is no such field."""
        if field in (GET, GET_FIELD):
            return cls(scope, GET)
        try:
            kind, limit, entity, agent, world, before, after = orjson.loads(field)
            cursors = [None if c is None else Cursor(int(c[0]), canonical_id(c[1])) for c in (before, after)]
            query = _query_in(scope, entity, agent, world, *cursors)
            if kind not in ("recent", "count") or not isinstance(limit, int):
                raise ValueError("neither recent nor count")
        except (ValueError, TypeError, IndexError, InvalidMemory) as error:
            raise ValueError(f"{field!r} names no query: {error}") from None
        return cls(scope, kind, query, limit)

    @property
    def field(self) -> bytes:
        """The name of its answer in L2."""
        return GET_FIELD if self.query is None else field_of(self.kind, self.query, self.limit)

    async def ask(self, reader: Reader) -> list[Row] | int:
        """The store's answer. Raises StoreUnavailable."""
        if self.query is None:
            row = await reader.get(self.scope.removeprefix("id:"))
            return [] if row is None else [row]
        if self.kind == "count":
            return await reader.count(self.query)
        return await reader.recent(self.query, self.limit)


def _query_in(
    scope: str,
    entity: str | None,
    agent: str | None,
    world: str | None,
    before: Cursor | None,
    after: Cursor | None,
) -> Query:
    kind, table, name = scope.split(":", 2)
    return Query(table, name if kind == "room" else None, agent, entity, world, before, after)
