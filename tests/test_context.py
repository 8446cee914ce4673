"""The context of a turn: several tables, read at once as a profile declares."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import mnemobus
from mnemobus import (
    CHAT_ROOM,
    DIRECT_MESSAGES,
    LONG_TASK,
    Context,
    InvalidQuery,
    Memory,
    Newest,
    Profile,
    Settings,
)

Connect = Callable[..., mnemobus.Bus]


def memory(table: str, room: str, n: int, **names: str) -> Memory:
    created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n)
    return Memory(table=table, room=room, content={"n": n}, created_at=created, **names)


def numbers(memories: Any) -> list[int]:
    return [memory.content["n"] for memory in memories]


async def test_a_profile_says_which_tables_are_read_by_what_and_how_much_of_each(
    pool: Settings, connect: Connect
) -> None:
    profile = Profile(
        {"long-term": Newest(2, by="agent")}, messages=3, tickets=Newest(4, by=("entity", "room"))
    )
    async with connect() as bus:
        await bus.write_many(
            [
                *(memory("messages", "r1", n, entity="ann") for n in range(5)),
                *(memory("messages", "r2", n) for n in range(10, 12)),
                *(memory("tickets", "r2", n, entity="ann") for n in range(20, 22)),
                *(memory("tickets", "r1", n, entity="bob") for n in range(30, 31)),
                *(memory("long-term", "r3", n, agent="a") for n in range(40, 44)),
            ],
            durability="committed",
        )
        # Read twice: from the store, then from this process
        for _ in range(2):
            context = await bus.context(profile, room="r1", entity="ann", agent="a")
            assert numbers(context["long-term"]) == [43, 42]
            assert numbers(context.messages) == [4, 3, 2]
            assert numbers(context.tickets) == [21, 20]
            long, messages, tickets = context
            assert (long, messages, tickets) == (context[0], context[1], context[2])
            assert [table for table, _ in context.items()] == ["long-term", "messages", "tickets"]
        assert all(found.source == "local" for found in context)
        # The first dimension that is named counts
        assert numbers((await bus.context(profile, room="r1", agent="a")).tickets) == [30]
        # and a call may ask for other numbers
        assert numbers((await bus.context(profile, room="r1", agent="a", messages=1)).messages) == [4]


async def test_each_profile_that_is_shipped_reads_what_it_says(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        await bus.write_many(
            [
                *(
                    memory(table, "r1", n, entity="ann", world="w")
                    for table in ("messages", "facts")
                    for n in range(30)
                ),
                *(
                    memory(table, "r2", n + 100, entity="ann", world="w")
                    for table in ("messages", "facts")
                    for n in range(3)
                ),
                *(memory(table, "r3", n + 200, world="w") for table in ("tasks", "notes") for n in range(30)),
            ],
            durability="committed",
        )

        async def counts(*profile: Profile, **named: str) -> dict[str, tuple[int, int]]:
            """For each table how many, and the number of the newest."""
            context = await bus.context(*profile, **named)  # type: ignore[arg-type]
            return {table: (len(found), numbers(found)[0]) for table, found in context.items()}

        assert await counts(room="r1", entity="ann") == {"messages": (5, 29), "facts": (6, 102)}
        assert await counts(CHAT_ROOM, room="r1") == {"messages": (5, 29), "facts": (6, 29)}
        assert await counts(DIRECT_MESSAGES, entity="ann") == {"messages": (12, 102), "facts": (6, 102)}
        assert await counts(LONG_TASK, room="r1", world="w") == {
            "tasks": (20, 229),
            "notes": (10, 229),
            "messages": (10, 29),
        }


async def test_what_a_profile_lacks_is_named(settings: Settings, connect: Connect) -> None:
    for wrong, what in (
        (lambda: Profile(), "one table"),
        (lambda: Profile({"a": 1}, a=2), "each of them once"),
        (lambda: Profile({"a b": 1}), "a b"),
        (lambda: Profile(a=Newest(1, by="place")), "place"),
        (lambda: Profile(a=Newest(1, by=())), "at least one"),
        (lambda: Profile(a=1.5), "whole number"),  # type: ignore[arg-type]
        (lambda: CHAT_ROOM.with_limits({"tasks": 1}), "tasks"),
    ):
        with pytest.raises(InvalidQuery, match=what):
            wrong()
    async with connect() as bus:
        with pytest.raises(InvalidQuery, match=r"facts.*entity or room"):
            await bus.context(Profile(facts=Newest(1, by=("entity", "room"))), agent="a")
        with pytest.raises(InvalidQuery, match="limit"):
            await bus.context(room="r1", messages=0)
        with pytest.raises(InvalidQuery, match="room"):
            await bus.context(room="")


def test_a_context_is_a_value() -> None:
    found = mnemobus.Memories((), "local")
    context = Context.of({"messages": found, "count": found})
    assert context == (found, found)
    assert context["count"] is context.count  # whatever a table is called
    for again in (copy.copy(context), pickle.loads(pickle.dumps(context))):
        assert (again, dict(again.items())) == (context, dict(context.items()))
    assert repr(context).startswith("Context(messages=Memories(")
    with pytest.raises(AttributeError, match="facts"):
        context.facts  # noqa: B018
    with pytest.raises(KeyError):
        context["facts"]
