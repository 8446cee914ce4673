"""The bus as users see it: writes, reads, paging, own writes, tokens, durability, errors.

Every test runs on every server version that this machine has, with RESP2 and RESP3, and on both stores. Workers run as
threads of the test's process (`pool`), on the same broker that Dramatiq's command line would use. test_processes.py
tests the promises between processes.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

import mnemobus
from mnemobus import (
    BusClosed,
    DimensionChanged,
    InvalidMemory,
    InvalidQuery,
    Memory,
    MemoryNotFound,
    NotCommitted,
    Settings,
    WriteRejected,
)
from mnemobus.memory import new_id
from servers import eventually

Connect = Callable[..., mnemobus.Bus]


@pytest.fixture
def settings(everywhere: Settings) -> Settings:
    return everywhere


def said(text: str, room: str = "r1", **fields: object) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)  # type: ignore[arg-type]


async def test_g1_g2_what_one_agent_writes_another_reads_from_ever_nearer_tiers(
    pool: Settings, connect: Connect
) -> None:
    # Given two agents
    async with connect() as alice, connect() as bob:
        # When one writes, and the store has it
        memory = said("hi", entity="alice", metadata={"mood": "good"}, embedding=[0.5, 0.25])
        receipt = await alice.write(memory)
        assert receipt.id == memory.id
        await receipt.committed()

        # Then the other reads it: from the store, from its own copy, and a third agent from Redis
        first = await bob.recent("messages", room="r1")
        assert first.source == "store"

        async def from_its_own_copy() -> mnemobus.Memories | None:
            again = await bob.recent("messages", room="r1")
            return again if again.source == "local" else None

        assert list(first) == list(await eventually(from_its_own_copy)) == [memory]
        assert not first.stale
        async with connect() as carol:
            assert (await carol.recent("messages", room="r1")).source == "shared"
            assert await carol.recent("messages", room="r1") == [memory]
        found = await bob.get(memory.id)
        assert found == memory
        assert found is not None
        assert found.version == receipt.version
        assert found.content == {"text": "hi"}
        assert found.embedding == (0.5, 0.25)


async def test_a_change_reaches_every_query_of_every_agent(pool: Settings, connect: Connect) -> None:
    async with connect() as alice, connect() as bob:
        # Given a memory that another agent has cached under all five of its scopes
        memory = said("old", entity="e", agent="a", world="w")
        await (await alice.write(memory)).committed()
        for _ in range(2):
            assert (await bob.get(memory.id)) == memory
            for dimension in ({"room": "r1"}, {"entity": "e"}, {"agent": "a"}, {"world": "w"}):
                assert (await bob.recent("messages", **dimension))[0].content == {"text": "old"}  # type: ignore[arg-type]
                assert await bob.count("messages", **dimension) == 1  # type: ignore[arg-type]
        assert bob.stats().entries == 9

        # When it changes
        await (await alice.update(memory.id, content={"text": "new"})).committed()

        # Then each of the queries gives the new one
        async def sees_new() -> bool:
            one = await bob.get(memory.id)
            lists = [
                await bob.recent("messages", **dimension)  # type: ignore[arg-type]
                for dimension in ({"room": "r1"}, {"entity": "e"}, {"agent": "a"}, {"world": "w"})
            ]
            return one is not None and all(
                m.content == {"text": "new"} for m in [one, *(found[0] for found in lists)]
            )

        await eventually(sees_new)


async def test_an_update_changes_what_is_given_and_nothing_else(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        memory = said("a", metadata={"n": 1}, embedding=[1.0, 2.0])
        await bus.write(memory)
        await bus.update(memory.id, metadata={"n": 2})
        found = await bus.get(memory.id)
        assert found is not None
        assert (found.content, found.metadata, found.embedding) == ({"text": "a"}, {"n": 2}, (1.0, 2.0))
        assert found.created_at == memory.created_at

        await bus.update(memory.id, content={"text": "b"}, embedding=None)
        found = await bus.get(memory.id)
        assert found is not None
        assert (found.content, found.metadata, found.embedding) == ({"text": "b"}, {"n": 2}, None)


async def test_g2_two_agents_that_update_different_fields_both_win(pool: Settings, connect: Connect) -> None:
    async with connect() as alice, connect() as bob:
        memory = said("a", metadata={"n": 1})
        await (await alice.write(memory)).committed()
        # Given that both hold the old one
        assert await alice.get(memory.id) == await bob.get(memory.id) == memory
        # When each changes another field of it, at once
        receipts = await asyncio.gather(
            alice.update(memory.id, content={"text": "by alice"}),
            bob.update(memory.id, metadata={"by": "bob"}),
        )
        await asyncio.gather(*(r.committed() for r in receipts))
        # Then neither change is lost
        await bob.observe(alice.token())
        found = await bob.get(memory.id)
        assert found is not None
        assert (found.content, found.metadata) == ({"text": "by alice"}, {"by": "bob"})


async def test_what_is_not_there_can_be_deleted_but_not_updated(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        id = new_id()
        with pytest.raises(MemoryNotFound, match=f"there is no memory {id}"):
            await bus.update(id, content={})
        assert await bus.delete(id) is None
        memory = said("x")
        await bus.write(memory)
        there, gone = await bus.delete_many([memory.id, id])
        assert there is not None
        assert there.id == memory.id
        assert gone is None
        with pytest.raises(InvalidMemory, match="update: give content, metadata or embedding"):
            await bus.update(memory.id)
        # What this bus has deleted is not there either, by itself or with its room, until it is written again
        with pytest.raises(MemoryNotFound):
            await bus.update(memory.id, content={})
        assert await bus.delete(memory.id) is None
        await bus.write(memory)
        assert (await bus.update(memory.id, content={"text": "y"})).id == memory.id
        await bus.delete_room("messages", room="r1")
        with pytest.raises(MemoryNotFound):
            await bus.update(memory.id, content={})


async def test_g3_what_is_deleted_is_gone_from_every_tier(pool: Settings, connect: Connect) -> None:
    async with connect() as alice, connect() as bob:
        memories = [said(str(n), entity="e") for n in range(3)]
        for receipt in await alice.write_many(memories):
            await receipt.committed()
        assert len(await bob.recent("messages", room="r1")) == 3
        assert len(await bob.recent("messages", entity="e")) == 3

        await alice.delete(memories[0].id)
        assert await alice.get(memories[0].id) is None
        assert await alice.count("messages", room="r1") == 2
        await bob.observe(alice.token())
        assert await bob.get(memories[0].id) is None
        assert len(await bob.recent("messages", entity="e")) == 2

        # A whole room at once: also what other agents hold under an entity, or by its id
        assert await bob.get(memories[1].id) is not None
        receipt = await alice.delete_room("messages", room="r1")
        assert receipt.id == "r1"
        assert await alice.get(memories[1].id) is None
        assert len(await alice.recent("messages", entity="e")) == 0
        await bob.observe(alice.token())
        assert await bob.get(memories[1].id) is None
        assert (
            len(await bob.recent("messages", room="r1")) == len(await bob.recent("messages", entity="e")) == 0
        )

        # And a room that was deleted can be talked in again
        await alice.write(said("again"))
        assert [m.content["text"] for m in await alice.recent("messages", room="r1")] == ["again"]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
async def test_paging_neither_repeats_nor_misses_even_among_equal_dates(
    pool: Settings, connect: Connect, size: int
) -> None:
    # Given memories of which many have the same date
    start = datetime(2026, 1, 1, tzinfo=UTC)
    memories = [said(str(n), created_at=start + timedelta(seconds=n // 5)) for n in range(23)]
    async with connect() as bus:
        await bus.write_many(memories, durability="committed")
        newest_first = sorted(memories, key=lambda m: (m.created_at, m.id), reverse=True)

        # When they are read page by page, back from the newest, and forward from the oldest
        back: list[Memory] = []
        page = await bus.recent("messages", room="r1", limit=size)
        while page:
            back += page
            page = await bus.recent("messages", room="r1", limit=size, before=back[-1])
        forward: list[Memory] = []
        page = await bus.recent("messages", room="r1", limit=size, after=start - timedelta(days=1))
        while page:
            forward += reversed(page)
            page = await bus.recent(
                "messages", room="r1", limit=size, after=(forward[-1].created_at, forward[-1].id)
            )

        # Then both give every memory once, in order
        assert back == newest_first
        assert forward == newest_first[::-1]
        # and a date alone stands outside all that have it
        third = start + timedelta(seconds=2)
        assert await bus.count("messages", room="r1", before=third) == 10
        assert await bus.count("messages", room="r1", after=third) == 8
        assert len(await bus.recent("messages", room="r1", after=start, before=third)) == 5


async def test_more_than_one_dimension_narrows(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        await bus.write_many(
            [said("1", entity="alice"), said("2", entity="bob"), said("3", entity="alice", room="r2")],
            durability="committed",
        )
        assert [m.content["text"] for m in await bus.recent("messages", room="r1", entity="alice")] == ["1"]
        assert await bus.count("messages", entity="alice") == 2
        assert await bus.count("messages", room="r1", entity="bob") == 1
        # and the same room with other dimensions is another query
        assert await bus.count("messages", room="r1") == 2


async def test_the_context_of_a_turn_is_read_at_once(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        fact = Memory(table="facts", room="r9", entity="alice", content={"likes": "soup"})
        other = Memory(table="facts", room="r1", entity="bob", content={"likes": "bread"})
        await bus.write_many([said(str(n)) for n in range(7)] + [fact, other], durability="committed")
        context = await bus.context(room="r1", entity="alice")
        assert len(context.messages) == 5
        assert list(context.facts) == [fact]
        assert list((await bus.context(room="r1", messages=2)).facts) == [other]


async def test_g6_a_bus_reads_its_own_writes_in_every_query(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        for n in range(20):
            memory = said(str(n), entity="e", agent="a", world="w")
            # Given that the answer without it is cached
            await bus.get(memory.id)
            await bus.recent("messages", entity="e")
            # When the bus writes, and asks at once
            await bus.write(memory)
            # Then each answer has the write, whether or not the store had it then
            assert await bus.get(memory.id) == memory
            assert (await bus.recent("messages", room="r1"))[0] == memory
            assert (await bus.recent("messages", entity="e"))[0] == memory
            assert (await bus.recent("messages", agent="a"))[0] == memory
            assert (await bus.recent("messages", world="w"))[0] == memory
            assert await bus.count("messages", room="r1") == n + 1
        assert bus.stats().own_write_timeouts == bus.stats().stale_reads == 0


async def test_g6_without_workers_an_own_write_is_waited_for_once_and_the_answer_is_marked(
    settings: Settings, connect: Connect
) -> None:
    # Given that no worker runs
    async with connect(own_write_timeout=0.2, live="off") as bus:
        await bus.write(said("x"))
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = await bus.recent("messages", room="r1")
        assert loop.time() - began >= 0.15
        # Then the answer lacks the write, and says so
        assert len(answer) == 0
        assert answer.stale
        # and the next one does not wait again
        waits = bus.stats().own_write_timeouts
        assert (await bus.recent("messages", room="r1")).stale
        assert bus.stats().own_write_timeouts == waits + 1
        assert bus.stats().stale_reads == 2
        # nor is anything else marked
        assert not (await bus.recent("messages", room="r2")).stale


async def test_g6_a_token_hands_own_writes_on(pool: Settings, connect: Connect) -> None:
    async with connect() as alice, connect() as bob:
        for n in range(10):
            assert len(await bob.recent("messages", room="r1", limit=100)) == n
            await alice.write(said(str(n)))
            await bob.observe(alice.token())
            assert len(await bob.recent("messages", room="r1", limit=100)) == n + 1
        # and on
        async with connect() as carol:
            await carol.observe(bob.token())
            assert len(await carol.recent("messages", room="r1", limit=100)) == 10


@pytest.mark.parametrize("token", ["", "x", "!!", "bnVsbA", "eyIwIjoieCJ9", "eyI5IjoiMS0wIn0"])
async def test_what_is_no_token_is_refused(settings: Settings, connect: Connect, token: str) -> None:
    async with connect() as bus:
        with pytest.raises(InvalidQuery, match="token"):
            await bus.observe(token)


async def test_observing_what_is_never_committed_ends_with_a_clear_error(
    settings: Settings, connect: Connect
) -> None:
    async with connect(write_timeout=0.2) as alice, connect() as bob:
        receipt = await alice.write(said("x"))
        with pytest.raises(NotCommitted, match=r"was not in the store after 0\.1 s\. Are workers running"):
            await bob.observe(alice.token(), timeout=0.1)
        with pytest.raises(
            NotCommitted, match=r"version \d+-\d+ of log partition \d was not in the store after 0.1 s"
        ):
            await receipt.committed(timeout=0.1)
        with pytest.raises(NotCommitted):
            await alice.write(said("y"), durability="committed")


async def test_nothing_leaves_the_process_if_anything_is_invalid(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        with pytest.raises(InvalidMemory, match=r"^memories\[1\].room: is empty$"):
            await bus.write_many([said("good"), said("bad", room=""), said("good")])
        with pytest.raises(InvalidMemory, match=r"content.n: nan is not a JSON number"):
            await bus.write(Memory(table="t", room="r", content={"n": float("nan")}))
        assert bus.stats().writes == 0
        assert await bus.count("messages", room="r1") == 0


async def test_dimensions_never_change(pool: Settings, connect: Connect) -> None:
    async with connect() as alice, connect() as bob:
        memory = said("x", entity="e")
        await (await alice.write(memory)).committed()
        # Who knows the memory refuses the write
        with pytest.raises(
            DimensionChanged, match="room: is 'r1' and would become 'r2'; dimensions never change while"
        ):
            await alice.write(said("y", room="r2", id=memory.id, entity="e"))
        # Who doesn't is told by the worker, and the memory stays as it is
        receipt = await bob.write(said("y", id=memory.id, entity="other"))
        with pytest.raises(
            WriteRejected, match="would change its entity from 'e' to 'other'; dimensions never change"
        ):
            await receipt.committed()
        assert await bob.get(memory.id) == memory
        health = await bob.health()
        assert health.dead_letters == 1
        assert health.problems == ("1 dead letters: writes that no worker could apply",)


async def test_a_table_has_embeddings_of_one_length(pool: Settings, connect: Connect) -> None:
    async with connect() as alice, connect() as bob:
        await alice.write(said("x", embedding=[0.1] * 3), durability="committed")
        for bus in (alice, bob):
            with pytest.raises(
                InvalidMemory, match="embedding: 4 floats, but those of table 'messages' have 3"
            ):
                await bus.write(said("y", embedding=[0.1] * 4))
        await bob.write(
            Memory(table="facts", room="r", content={}, embedding=[0.1] * 4), durability="committed"
        )


async def test_an_embedding_that_was_never_written_fixes_no_length(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        # Given a call that was refused for another of its memories
        with pytest.raises(InvalidMemory, match=r"memories\[1\].room: is empty"):
            await bus.write_many([said("x", embedding=[0.1] * 3), said("y", room="")])
        # Then the length of its first counts for nothing
        await bus.write(said("x", embedding=[0.1] * 4))
        # But that of a write counts at once, and so does that of another memory of the same call
        with pytest.raises(InvalidMemory, match="3 floats, but those of table 'messages' have 4"):
            await bus.write(said("x", embedding=[0.1] * 3))
        facts = [Memory(table="facts", room="r", content={}, embedding=[0.1] * n) for n in (2, 5)]
        with pytest.raises(InvalidMemory, match=r"memories\[1\].embedding: 5 floats, but those of .* have 2"):
            await bus.write_many(facts)
        await bus.write(facts[1], durability="committed")


async def test_write_many_keeps_the_order_and_goes_out_in_few_calls(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        memories = [said(str(n), room=f"r{n % 9}") for n in range(500)]
        receipts = await bus.write_many(memories)
        assert [r.id for r in receipts] == [m.id for m in memories]
        assert bus.stats().publish_calls <= bus.settings.log_partitions
        await asyncio.gather(*(r.committed() for r in receipts))
        assert sum([await bus.count("messages", room=f"r{n}") for n in range(9)]) == 500
        assert await bus.write_many([]) == []


async def test_writes_of_many_tasks_go_together(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        receipts = await asyncio.gather(*(bus.write(said(str(n))) for n in range(300)))
        # one room is one partition: the first call, and one with all that had gathered
        assert bus.stats().publish_calls <= 3
        versions = [r.version for r in receipts]
        assert versions == sorted(versions)
        assert len(set(versions)) == 300


async def test_reads_of_one_query_share_one_load(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        await bus.write(said("x"), durability="committed")
        answers = await asyncio.gather(*(bus.recent("messages", room="r1") for _ in range(50)))
        assert all(len(answer) == 1 for answer in answers)
        stats = bus.stats()
        assert stats.misses == 1
        assert stats.shared_loads + stats.hits_local == 49


async def test_a_read_that_is_cancelled_takes_no_answer_from_those_that_share_its_load(
    pool: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as writer, connect() as bus:
        await writer.write(said("x"), durability="committed")
        await bus.recent("messages", room="r1", limit=1)  # listens to the room's feed partition from here on
        # Given a slow store, a read, and others that wait for what the first one finds
        loads, go_on = 0, asyncio.Event()
        recent = bus._reader.recent

        async def slow(*args: Any) -> Any:
            nonlocal loads
            loads += 1
            await go_on.wait()
            return await recent(*args)

        monkeypatch.setattr(bus._reader, "recent", slow)
        first, *others = [asyncio.create_task(bus.recent("messages", room="r1")) for _ in range(5)]
        await eventually(lambda: loads == 1 and bus.stats().shared_loads == 4)
        # When the one that loads is cancelled
        first.cancel()
        await eventually(lambda: loads == 2)
        go_on.set()
        # Then the others have their answer, from one more load
        async with asyncio.timeout(10):
            assert [len(answer) for answer in await asyncio.gather(*others)] == [1] * 4
        assert first.cancelled() and loads == 2
        assert not bus._path._loads


async def test_a_copy_can_be_taken_but_not_changed(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        memory = Memory(table="t", room="r", content={"list": [1, {"a": 2}]})
        await bus.write(memory, durability="committed")
        for _ in range(3):
            found = await bus.get(memory.id)
            assert found is not None
            with suppress(TypeError):
                found.content["list"].append(3)
            with suppress(TypeError):
                found.content["list"][1]["a"] = 3
            assert found.content == {"list": [1, {"a": 2}]}
        answer = await bus.recent("t", room="r")
        with pytest.raises(TypeError):
            answer[0] = memory  # type: ignore[index]
        with pytest.raises(AttributeError, match="an answer is immutable: stale can't be set"):
            answer.stale = True
        with pytest.raises(AttributeError, match="an answer is immutable: source can't be deleted"):
            del answer.source
        assert pickle.loads(pickle.dumps(answer)) == answer


class NotATime(datetime):
    """As pandas has it: a datetime whose methods fail."""

    def utcoffset(self) -> None:
        raise ValueError("NaTType does not support utcoffset")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "name at least one of room, entity, agent and world"),
        ({"room": ""}, "room: is empty"),
        ({"room": "r", "limit": 0}, "limit must be between 1 and 10000, not 0"),
        ({"room": "r", "limit": 10_001}, "limit must be between 1 and 10000"),
        ({"room": "r", "limit": "5"}, "limit must be a whole number, not '5'"),
        ({"room": "r", "limit": 1.0}, r"limit must be a whole number, not 1\.0"),
        ({"room": "r", "limit": True}, "limit must be a whole number, not True"),
        ({"room": "r", "limit": None}, "limit must be a whole number, not None"),
        (
            {"room": "r", "before": 5},
            "before: a Memory, a datetime, or a datetime and an id is needed, not 5",
        ),
        (
            {"room": "r", "after": True},
            "after: a Memory, a datetime, or a datetime and an id is needed, not True",
        ),
        ({"room": "r", "before": datetime(2026, 1, 1)}, "before: 2026-01-01T00:00:00 has no time zone"),
        ({"room": "r", "before": NotATime(1, 1, 1)}, "before: NotATime is not a moment in time"),
        ({"room": "r", "after": (datetime(2026, 1, 1, tzinfo=UTC), "x")}, "after: id: 'x' is not a UUID"),
        ({"room": 5}, "room: text is needed, not int"),
        ({"room": ["r"]}, "room: text is needed, not list"),
        ({"room": "r", "agent": {}}, "agent: text is needed, not dict"),
        ({"entity": b"e"}, "entity: text is needed, not bytes"),
        ({"world": "\0"}, "world: contains a NUL character"),
    ],
)
async def test_a_query_that_makes_no_sense_says_why(
    settings: Settings, connect: Connect, query: dict[str, object], message: str
) -> None:
    async with connect() as bus:
        with pytest.raises(InvalidQuery, match=message):
            await bus.recent("messages", **query)  # type: ignore[arg-type]
        with pytest.raises(InvalidQuery, match="table: 'a b' is not"):
            await bus.count("a b", room="r")
        for id in ("x", None, 5, ["x"], b"x", "room:t:r"):
            with pytest.raises(InvalidMemory, match=r"id: .* is not a UUID"):
                await bus.get(id)  # type: ignore[arg-type]


class Text:
    """Spelled like a name, and none."""

    def __init__(self, spelled: str) -> None:
        self.spelled = spelled

    def __str__(self) -> str:
        return self.spelled


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("t:a", {"room": "b"}),
        ("t", {"room": Text("a:b")}),
        (Text("t"), {"room": "a:b"}),
        ("t:a", {"entity": "b"}),
        ("t:a", {"agent": "b"}),
        ("t:a", {"world": "b"}),
        ("t", {"entity": Text("a:b")}),
    ],
)
async def test_names_that_are_none_are_refused_whatever_is_cached(
    pool: Settings, connect: Connect, table: Any, names: dict[str, Any]
) -> None:
    async with connect() as bus:
        # Given that what such a query would spell is cached, for another one
        [(kind, _)] = names.items()
        memory = Memory(table="t", content={"secret": 1}, **{"room": "r", kind: "a:b"})
        await bus.write(memory, durability="committed")

        async def cached() -> bool:
            await bus.recent("t", **{kind: "a:b"})
            await bus.count("t", **{kind: "a:b"})
            return bus.stats().hits_local > 0

        await eventually(cached)
        # Then it is refused, each time
        for _ in range(3):
            with pytest.raises(InvalidQuery, match=r"table: |room: |entity: |agent: |world: "):
                await bus.recent(table, **names)
            with pytest.raises(InvalidQuery, match=r"table: |room: |entity: |agent: |world: "):
                await bus.count(table, **names)


async def test_a_limit_is_a_whole_number_whatever_is_cached(pool: Settings, connect: Connect) -> None:
    class Integer:  # as NumPy's are
        def __index__(self) -> int:
            return 1

    async with connect() as bus:
        await bus.write(Memory(table="t", room="r", content={}), durability="committed")

        async def cached() -> bool:
            await bus.recent("t", room="r", limit=1)
            return bus.stats().hits_local > 0

        await eventually(cached)
        for limit in (True, 1.0, None):
            with pytest.raises(InvalidQuery, match="limit must be a whole number"):
                await bus.recent("t", room="r", limit=limit)  # type: ignore[arg-type]
        assert len(await bus.recent("t", room="r", limit=Integer())) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("durability", ["lodged", "", 0, False, ["logged"]])
async def test_a_durability_that_there_is_not_is_refused(connect: Connect, durability: Any) -> None:
    async with connect() as bus:
        for call in (
            lambda: bus.write(said("x"), durability=durability),
            lambda: bus.write_many([said("x")], durability=durability),
            lambda: bus.write_many([], durability=durability),
            lambda: bus.delete_room("messages", room="r", durability=durability),
        ):
            with pytest.raises(InvalidQuery, match="durability must be logged, synced or committed, not "):
                await call()
        assert bus.stats().writes == 0


async def test_a_timeout_is_a_number_of_seconds(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        receipt = await bus.write(said("x"))
        for calls in (receipt.committed, lambda timeout: bus.observe(bus.token(), timeout), bus.health):
            for timeout in ("1", [1], True, float("nan"), memoryview(b"1")):
                with pytest.raises(InvalidQuery, match="timeout must be a number of seconds, not "):
                    await calls(timeout)
            # However long, and without end
            for timeout in (10**400, float("inf"), None):
                await calls(timeout)


async def test_a_name_of_a_type_that_no_set_can_hold_is_named(connect: Connect) -> None:
    name: Any = memoryview(bytearray(b"r"))  # its hash is a ValueError
    async with connect() as bus:
        with pytest.raises(InvalidMemory, match="room"):
            await bus.write(Memory(table="t", room=name, content={}))
        for call in (bus.recent("t", room=name), bus.count("t", room=name), bus.recent(name, room="r")):
            with pytest.raises(InvalidQuery, match=r"text is needed|letters"):
                await call
        with pytest.raises(InvalidMemory, match="id"):
            await bus.get(name)


async def test_an_id_may_be_spelled_as_one_likes(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        memory = said("x")
        await bus.write(memory, durability="committed")
        assert await bus.get(memory.id.upper()) == await bus.get(memory.id.replace("-", "")) == memory


async def test_a_bus_is_used_between_open_and_close(settings: Settings, connect: Connect) -> None:
    bus = connect()
    with pytest.raises(BusClosed, match="the bus is not open yet"):
        await bus.write(said("x"))
    async with bus:
        pass
    await bus.close()
    for use in (bus.write(said("x")), bus.recent("messages", room="r"), bus.get(new_id()), bus.health()):
        with pytest.raises(BusClosed, match="the bus is closed"):
            await use
    with pytest.raises(BusClosed, match="opened once"):
        await bus.open()


async def test_a_closed_bus_serves_nothing_from_its_own_copies(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        memory = said("x")
        await bus.write(memory, durability="committed")
        await eventually(lambda: _read_locally(bus, memory.id))
    with pytest.raises(BusClosed, match="the bus is closed"):
        await bus.get(memory.id)


async def _read_locally(bus: mnemobus.Bus, id: str) -> bool:
    hits = bus.stats().hits_local
    return await bus.get(id) is not None and bus.stats().hits_local > hits


async def test_a_close_that_is_cancelled_is_finished_all_the_same(pool: Settings, connect: Connect) -> None:
    for turns in range(8):
        bus = connect()
        await bus.open()
        closing = asyncio.ensure_future(bus.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        with suppress(asyncio.CancelledError):
            await closing
        await bus.close()
        left = [task.get_name() for task in asyncio.all_tasks() if "mnemobus" in task.get_name()]
        assert left == []


async def test_closing_publishes_what_is_queued(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        writes = [asyncio.ensure_future(bus.write(said(str(n)))) for n in range(50)]
        await asyncio.sleep(0)
    assert len({(await write).version for write in writes}) == 50


async def test_cancelling_gives_up_the_answer_and_nothing_else(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        # Given calls that are cancelled at each of their awaits in turn
        for turns in range(12):
            memory = said(f"{turns}", room=f"r{turns}")
            for call in (bus.write(memory), bus.recent("messages", room=f"r{turns}"), bus.get(memory.id)):
                task = asyncio.ensure_future(call)
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        # Then the bus goes on, and what was logged is what it reads
        for turns in range(12):
            await bus.write(said("after", room=f"r{turns}"))
            texts = [m.content["text"] for m in await bus.recent("messages", room=f"r{turns}")]
            assert texts in (["after"], ["after", f"{turns}"])
        assert bus.stats().restarted_tasks == 0


async def test_figures_and_health_tell_what_happened(pool: Settings, connect: Connect) -> None:
    async with connect() as bus:
        await bus.write(said("x"), durability="committed")
        for _ in range(3):
            await bus.recent("messages", room="r1")
        stats = bus.stats()
        assert (stats.writes, stats.misses, stats.hits_local) == (1, 1, 2)
        assert stats.listening >= 1
        with pytest.raises(AttributeError):
            stats.writes = 5  # type: ignore[misc]
        health = await bus.health()
        assert health.ok
        assert health.problems == ()
        assert health.redis.startswith(("Redis ", "Valkey "))
        assert (health.backlog, health.dead_letters) == (0, 0)


async def test_a_bus_whose_opening_is_cancelled_leaves_nothing_behind(connect: Connect) -> None:
    before = asyncio.all_tasks()
    # Given buses whose opening is cancelled at every moment of its way
    for moment in range(20):
        bus = connect()
        opening = asyncio.create_task(bus.open())
        await asyncio.sleep(moment * 0.001)
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening
        # Then each lets go of its connections, once closed, and none goes on listening
        await bus.close()
        assert bus._link.pool.size == bus._link.probe.size == 0
    # (a connection to SQLite that was being opened is closed once it is open)
    await eventually(lambda: not asyncio.all_tasks() - before)


async def test_a_bus_that_is_closed_while_it_is_opened_says_so(connect: Connect) -> None:
    before = asyncio.all_tasks()
    bus = connect()
    opening = asyncio.create_task(bus.open())
    await asyncio.sleep(0)
    await bus.close()
    with pytest.raises(BusClosed, match="while it was being opened"):
        await opening
    assert not asyncio.all_tasks() - before


@pytest.mark.parametrize("id", [[], {}, None, 3, b"x", "room:messages:r"])
async def test_what_is_no_id_is_named(connect: Connect, id: Any) -> None:
    async with connect() as bus:
        with pytest.raises(InvalidMemory, match="is not a UUID"):
            await bus.get(id)


async def test_a_cached_answer_is_no_answer_to_an_invalid_query(connect: Connect, pool: Settings) -> None:
    async with connect() as bus:
        await bus.write(Memory(table="messages", room="r", content={}), durability="committed")

        async def cached() -> bool:
            return (await bus.recent("messages", room="r")).source == "local"

        async with asyncio.timeout(5):
            while not await cached():
                await asyncio.sleep(0.01)
        for name in ("entity", "agent", "world"):
            with pytest.raises(InvalidQuery, match="is empty"):
                await bus.recent("messages", room="r", **{name: ""})


def test_a_process_that_never_closes_its_bus_ends_all_the_same(settings: Settings, pool: Settings) -> None:
    program = (
        "import asyncio, mnemobus\nasync def main():\n    bus = mnemobus.connect()\n    await bus.open()\n"
    )
    program += "    await bus.recent('messages', room='r1')\nasyncio.run(main())\n"
    environment = os.environ | settings.environment()
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


async def test_observe_ends_in_time_though_its_cancellation_is_lost(connect: Connect) -> None:
    # Given a Redis that can't be asked, and a cancellation that is lost, as happens while a connection is made
    async with connect() as bus:
        await bus.write(Memory(table="messages", room="r1", content={}))

        lost: list[asyncio.CancelledError] = []

        async def state(partitions: Sequence[int]) -> list[Any]:
            try:
                await asyncio.sleep(0.5)
            except asyncio.CancelledError as error:
                if lost:
                    raise
                lost.append(error)
            raise redis.ConnectionError("no connection")

        bus._pending.state = state  # type: ignore[method-assign]
        # If it observes a token, then it gives up when its time is over
        async with asyncio.timeout(5):
            with pytest.raises(NotCommitted, match=r"was not in the store after 0\.1 s"):
                await bus.observe(bus.token(), timeout=0.1)
