"""What an agent reads at the start of a turn: the newest memories of several tables, as a profile declares them.

No table has a meaning to the bus: a profile names those that an application has. Some profiles are here to begin with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, ItemsView, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .cache.l1 import MISS, Key
from .cache.query import limit_of, newest_key, scope_by
from .errors import InvalidMemory, InvalidQuery
from .memory import Memories
from .values import check_table

DIMENSIONS: Final = ("room", "entity", "agent", "world")


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest memories of a table.

    limit  how many
    by     of what: "room", "entity", "agent" or "world"; or several of these, of which the first that the caller
           names counts
    """

    limit: int
    by: str | tuple[str, ...] = "room"

    def dimensions(self) -> tuple[str, ...]:
        return (self.by,) if isinstance(self.by, str) else tuple(self.by)


class Profile:
    """Which tables are read at the start of a turn, and how much of each.

    ``Profile(messages=5, facts=Newest(6, by="entity"))``; a number alone is so many of the room. A table whose name is
    no Python identifier goes into a dict: ``Profile({"long-term": 3})``. The order is that of the answer.

    Raises InvalidQuery for what names no table, no dimension, or no number of memories.
    """

    __slots__ = ("parts",)

    parts: tuple[tuple[str, int, tuple[str, ...]], ...]
    """For each table: its name, how many, and of which dimensions."""

    def __init__(self, tables: Mapping[str, int | Newest] | None = None, /, **more: int | Newest) -> None:
        self.parts = tuple(_part(table, newest) for table, newest in (*(tables or {}).items(), *more.items()))
        names = [table for table, _, _ in self.parts]
        if not names or len(set(names)) < len(names):
            raise InvalidQuery("a profile names one table at least, and each of them once")

    def with_limits(self, limits: Mapping[str, int]) -> Profile:
        """The same with other numbers of memories for some tables."""
        unknown = limits.keys() - {table for table, _, _ in self.parts}
        if unknown:
            raise InvalidQuery(f"{min(unknown)!r} is no table of the profile {self!r}")
        return Profile({table: Newest(limits.get(table, limit), by) for table, limit, by in self.parts})

    def __repr__(self) -> str:
        tables = ", ".join(f"{table}: {limit} by {' or '.join(by)}" for table, limit, by in self.parts)
        return f"<Profile {tables}>"


def _part(table: str, newest: int | Newest) -> tuple[str, int, tuple[str, ...]]:
    try:
        check_table(table)
    except InvalidMemory as error:
        raise InvalidQuery(str(error)) from None
    if not isinstance(newest, Newest):
        newest = Newest(newest)
    dimensions = newest.dimensions()
    for name in dimensions:
        if name not in DIMENSIONS:
            raise InvalidQuery(f"{table}: {name!r} is not one of {', '.join(DIMENSIONS)}")
    if not dimensions:
        raise InvalidQuery(f"{table}: by names at least one of {', '.join(DIMENSIONS)}")
    return table, limit_of(newest.limit), dimensions


CHAT_ROOM = Profile(messages=5, facts=Newest(6, by=("entity", "room")))
"""A room with several people: what was said last, and what is known about who speaks."""
DIRECT_MESSAGES = Profile(messages=Newest(12, by=("entity", "room")), facts=Newest(6, by=("entity", "room")))
"""One person, wherever they write: the last messages and facts of that entity."""
LONG_TASK = Profile(
    tasks=Newest(20, by=("world", "room")), notes=Newest(10, by=("world", "room")), messages=10
)
"""Work of many turns: open tasks and notes of the whole project (the world), and what was said in the room."""


class Context(tuple[Memories, ...]):
    """The answer to a profile: each table's memories, newest first, in the order of the profile.

    ``context["facts"]``, ``context.facts``, or ``messages, facts = context``.
    """

    @classmethod
    def of(cls, tables: dict[str, Memories]) -> Context:
        context = cls(tables.values())
        context.__dict__ = tables
        return context

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, str):
            return self.__dict__[which]
        return super().__getitem__(which)

    def __getattr__(self, table: str) -> Memories:  # those that there are, are in its dict
        raise AttributeError(f"there is no table {table!r} in this context")

    def items(self) -> ItemsView[str, Memories]:
        """Each table with its memories."""
        return self.__dict__.items()

    def __repr__(self) -> str:
        return f"Context({', '.join(f'{table}={found!r}' for table, found in self.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Context.of, (dict(self.items()),)


async def read_context(
    profile: Profile,
    named: Mapping[str, str | None],
    hit: Callable[[str, Key], Any],
    recent: Callable[..., Awaitable[Memories]],
) -> Context:
    """Read all tables of a profile: what L1 has at once, the others together.

    hit     `LocalCache.hit`
    recent  `Bus.recent`
    """
    found: dict[str, Any] = {}
    missing: list[tuple[str, int, str, str]] = []
    for table, limit, dimensions in profile.parts:
        for dimension in dimensions:
            name = named[dimension]
            if name is not None:
                break
        else:
            raise InvalidQuery(f"{table}: the profile asks for {' or '.join(dimensions)}, and none is named")
        answer = found[table] = hit(scope_by(dimension, table, name), newest_key(dimension, name, limit))
        if answer is MISS:
            missing.append((table, limit, dimension, name))
    if missing:
        asked = [recent(table, limit=limit, **{dimension: name}) for table, limit, dimension, name in missing]
        answers = [await asked[0]] if len(asked) == 1 else await asyncio.gather(*asked)
        found.update(zip((table for table, *_ in missing), answers, strict=True))
    return Context.of(found)
