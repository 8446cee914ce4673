"""Whatever happens to memories, and however the log delivers it: every order ends in the same state."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemobus import store
from mnemobus.keys import Dimensions, Version
from mnemobus.log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event
from mnemobus.settings import Settings
from mnemobus.store import Query, Writer
from mnemobus.store.merge import Delta, collapse
from rows import named

MEMORIES = 3
"""Two in the first room, one in the second."""


class Step(NamedTuple):
    """One write: to a memory, or to the room of a memory. Its place in the history is its version."""

    op: str
    memory: int
    fields: frozenset[str] = frozenset()


FIELDS = ("content", "metadata", "embedding")

steps = st.one_of(
    st.builds(Step, st.sampled_from([PUT, PUT, DELETE, DELETE_ROOM]), st.integers(0, MEMORIES - 1)),
    st.builds(
        Step,
        st.just(UPDATE),
        st.integers(0, MEMORIES - 1),
        st.frozensets(st.sampled_from([*FIELDS, "no embedding"]), min_size=1),
    ),
)


class World:
    """The memories and rooms of one example, apart from those of all others in the same database."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.ids = sorted(str(uuid.uuid4()) for _ in range(MEMORIES))
        self.dimensions = [
            Dimensions("t", f"{self.name}/{n // 2}", "agent", f"e{n}" if n else None) for n in range(MEMORIES)
        ]

    def events(self, history: list[Step]) -> list[Event]:
        return [self._event(step, n) for n, step in enumerate(history, 1)]

    def _event(self, step: Step, n: int) -> Event:
        dimensions, version = self.dimensions[step.memory], Version(1, n)
        if step.op == DELETE_ROOM:
            return Event(DELETE_ROOM, Dimensions(*dimensions[:2]), version=version)
        event: dict[str, Any] = {}
        if step.op == PUT:
            event = {"content": b'{"put":%d}' % n, "metadata": b"{}", "created_us": n}
            if n % 2:
                event["embedding"] = n.to_bytes(4, "little") * 2
        if step.op == UPDATE:
            values = {
                "content": b'{"update":%d}' % n,
                "metadata": b'{"update":%d}' % n,
                "embedding": n.to_bytes(4, "little") * 2,
            }
            event = {field: value for field, value in values.items() if field in step.fields}
            if "no embedding" in step.fields:
                event["embedding"] = b""
        return Event(step.op, dimensions, self.ids[step.memory], version=version, **event)


def happened(history: list[Step], world: World) -> list[dict[str, Any] | None]:
    """The memories after all of this, one step after the other. It knows nothing of registers."""
    memories: list[dict[str, Any] | None] = [None] * MEMORIES
    for event, step in zip(world.events(history), history, strict=True):
        if step.op == PUT:
            memories[step.memory] = {
                "content": event.content,
                "metadata": event.metadata,
                "embedding": event.embedding,
                "created_us": event.created_us,
                "version": event.version,
            }
        elif step.op == UPDATE:
            memory = memories[step.memory]
            if memory is not None:
                for field in FIELDS:
                    value = getattr(event, field)
                    if value is not None:
                        memory[field] = value or None
                memory["version"] = event.version
        elif step.op == DELETE:
            memories[step.memory] = None
        else:
            for n in range(MEMORIES):
                if n // 2 == step.memory // 2:
                    memories[n] = None
    return memories


@st.composite
def deliveries(draw: st.DrawFn, length: int) -> list[list[int]]:
    """Batches of places in a history: each at least once, in any order, some again."""
    places = list(range(length))
    order = draw(st.permutations(places + draw(st.lists(st.sampled_from(places), max_size=4))))
    cuts = draw(st.lists(st.integers(0, len(order)), max_size=4))
    ends = sorted({*cuts, len(order)})
    return [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False) if begin < end]


@st.composite
def stories(draw: st.DrawFn) -> tuple[list[Step], list[list[int]]]:
    history = draw(st.lists(steps, min_size=1, max_size=9))
    return history, draw(deliveries(len(history)))


class Store:
    def __init__(self, url: str) -> None:
        self.url = url
        self.writer: Writer = store.open_writer(Settings.load(database_url=url))
        self.reader = store.open_reader(Settings.load(database_url=url))
        self.loop = asyncio.Runner()

    def seen(self, world: World) -> list[dict[str, Any] | None]:
        """The memories as a reader sees them."""

        async def read() -> list[dict[str, Any] | None]:
            rows = [await self.reader.get(id) for id in world.ids]
            listed = [
                row
                for dimensions in sorted({d[:2] for d in world.dimensions})
                for row in await self.reader.recent(Query(*dimensions), 99)
            ]
            assert sorted(listed) == sorted(row for row in rows if row)
            return [
                row
                and {
                    "content": row.content,
                    "metadata": row.metadata,
                    "embedding": row.embedding,
                    "created_us": row.created_us,
                    "version": row.version,
                }
                for row in rows
            ]

        return self.loop.run(read())

    def registers(self, world: World) -> list[tuple[Any, ...]]:
        """The rows as they are. A row's tombstone is its own or its room's."""
        statement = """
            SELECT put_version, content_version, metadata_version, embedding_version,
                CASE WHEN t.version > deleted_version THEN t.version ELSE deleted_version END,
                content, metadata, embedding, created_us
            FROM memories AS m LEFT JOIN room_tombstones AS t ON t.tbl = m.tbl AND t.room = m.room
            WHERE m.room LIKE ? ORDER BY id
        """
        statement = named(self.url, statement)
        parameters = (f"{world.name}/%",)
        if self.url.startswith("sqlite"):
            with closing(sqlite3.connect(self.url.removeprefix("sqlite:///"))) as connection:
                return connection.execute(statement, parameters).fetchall()
        import psycopg

        with psycopg.connect(self.url) as connection:
            return connection.execute(statement.replace("?", "%s").encode(), parameters).fetchall()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    sqlite = request.param == "sqlite"
    database = Store(
        f"sqlite:///{tmp_path}/memories.db" if sqlite else request.getfixturevalue("postgres_url")
    )
    database.writer.open()
    database.loop.run(database.reader.open())
    yield database
    database.writer.close()
    database.loop.run(database.reader.close())
    database.loop.close()


many = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@many
@given(story=stories())
def test_g2_g3_g8_every_order_of_batches_ends_in_the_same_state(
    database: Store, story: tuple[list[Step], list[list[int]]]
) -> None:
    history, batches = story
    # Given one world in which everything is applied in its order, one by one
    straight = World()
    for event in straight.events(history):
        assert not database.writer.apply([event]).refused
    assert database.seen(straight) == happened(history, straight)
    # When the same comes to another world in batches, out of order, some of it twice
    mixed = World()
    events = mixed.events(history)
    for batch in batches:
        assert not database.writer.apply([events[n] for n in batch]).refused
    # Then it is the same that is there, down to the registers
    assert database.seen(mixed) == happened(history, mixed)
    assert database.registers(mixed) == database.registers(straight)
    # And all of it once more, as a replay brings it, changes nothing that is seen; the next time, nothing at all
    for batch in batches:
        database.writer.apply([events[n] for n in batch])
    assert database.seen(mixed) == happened(history, mixed)
    assert database.registers(mixed) == database.registers(straight)
    for batch in batches:
        assert database.writer.apply([events[n] for n in batch]).won == set()


@many
@given(story=stories())
def test_g3_whatever_a_deletion_of_a_room_put_an_end_to_is_told(
    database: Store, story: tuple[list[Step], list[list[int]]]
) -> None:
    history, batches = story
    world = World()
    events = world.events(history)
    before = database.seen(world)
    for batch in batches:
        # When a worker dies between commit and fan-out, and its batch comes again
        database.writer.apply([events[n] for n in batch])
        applied = database.writer.apply([events[n] for n in batch])
        # Then what is gone from sight is named: by an event of its own, or as cleared with its room
        after = database.seen(world)
        told = {id for id, _ in applied.cleared} | {events[n].id for n in batch}
        for id, dimensions, was, now in zip(world.ids, world.dimensions, before, after, strict=True):
            assert was == now or id in told
            assert all(cleared == dimensions for other, cleared in applied.cleared if other == id)
        before = after


@settings(max_examples=300, deadline=None, derandomize=True)
@given(story=stories())
def test_collapsing_does_not_depend_on_order_or_duplicates(story: tuple[list[Step], list[list[int]]]) -> None:
    history, batches = story
    events = World().events(history)
    straight = collapse(events)
    mixed = collapse([events[n] for batch in batches for n in batch])
    assert straight == mixed
    assert straight.refused == []
    assert [delta.id for delta in straight.deltas] == sorted({event.id for event in events if event.id})


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[list[tuple[str, frozenset[str]]]], list[list[int]], list[int]]:
    """What happens to one id that is deleted and made again; the order of each life's events; and late deliveries."""
    ops = st.tuples(st.sampled_from([PUT, UPDATE]), st.frozensets(st.sampled_from(FIELDS), min_size=1))
    found = [
        [(PUT, frozenset[str]()), *life]
        for life in draw(st.lists(st.lists(ops, max_size=2), min_size=2, max_size=4))
    ]
    found = [[*life, (DELETE, frozenset[str]())] for life in found[:-1]] + [found[-1]]
    orders = [draw(st.permutations(range(len(life)))) for life in found]
    late = draw(st.lists(st.integers(0, sum(map(len, found)) - 1), max_size=8))
    return found, orders, late


@many
@given(story=lives(), cut=st.integers(1, 4))
def test_g3_g8_whatever_is_late_of_an_earlier_life_changes_nothing(
    database: Store,
    story: tuple[list[list[tuple[str, frozenset[str]]]], list[list[int]], list[int]],
    cut: int,
) -> None:
    history, orders, late = story
    id, name = str(uuid.uuid4()), uuid.uuid4().hex
    # Given an id that lives several times, each time in another room, made again only once its deletion is applied
    events: list[list[Event]] = []
    n = 0
    for life, steps in enumerate(history):
        events.append([])
        for op, fields in steps:
            n += 1
            values: dict[str, Any] = {}
            if op == PUT:
                values = {"content": b'{"put":%d}' % n, "metadata": b"{}", "created_us": n}
            if op == UPDATE:
                values = dict.fromkeys(fields, b'{"update":%d}' % n)
                if "embedding" in values:
                    values["embedding"] = n.to_bytes(4, "little") * 2
            dimensions = Dimensions("t", f"{name}/{life % 3}", None, f"e{life}")
            events[-1].append(Event(op, dimensions, id, version=Version(1, n), **values))
    all_events = [event for life in events for event in life]

    def state() -> list[Any]:
        world = World()
        world.name, world.ids, world.dimensions = name, [id], [events[-1][0].dimensions]
        return [database.seen(world), database.registers(world)]

    for event in all_events:
        assert not database.writer.apply([event]).refused
    straight = state()
    assert straight[0][0] is not None
    # When the same comes anew elsewhere, the events of each life in any order, and then some of all of it late
    id, name = str(uuid.uuid4()), uuid.uuid4().hex
    moved = [
        [e._replace(id=id, dimensions=e.dimensions._replace(room=f"{name}/{k % 3}")) for e in life]
        for k, life in enumerate(events)
    ]
    flat = [event for life in moved for event in life]
    for life, order in zip(moved, orders, strict=True):
        for event in (life[n] for n in order):
            assert not database.writer.apply([event]).refused
    for start in range(0, len(late), cut):
        assert not database.writer.apply([flat[n] for n in late[start : start + cut]]).refused
    # Then it is the same that is there, down to the registers
    events = moved
    assert state() == straight
    # And a replay of all of it changes nothing
    assert database.writer.apply(flat).won == set()


@st.composite
def late_lives(draw: st.DrawFn) -> tuple[list[list[str]], list[list[tuple[int, int]]]]:
    """What happens to one id that is deleted, with its room or alone, and made again; and the phases of its delivery:
    each begins when a deletion is applied, and brings the next life, and what had not come of those before."""
    found = [
        [PUT, *life, draw(st.sampled_from([DELETE, DELETE_ROOM]))]
        for life in draw(
            st.lists(st.lists(st.sampled_from([PUT, UPDATE, DELETE]), max_size=2), min_size=2, max_size=4)
        )
    ]
    found[-1].pop()
    phases: list[list[tuple[int, int]]] = [[] for _ in found]
    for life, ops in enumerate(found):
        for n in range(len(ops) - (life < len(found) - 1)):
            phases[draw(st.integers(life, len(found) - 1))].append((life, n))
    phases = [draw(st.permutations(phase)) for phase in phases]
    for life, ops in enumerate(found[:-1]):
        phases[life].append((life, len(ops) - 1))
    return found, phases


@many
@given(story=late_lives(), again=st.booleans())
def test_g1_g3_nothing_is_refused_of_an_earlier_life_that_comes_late(
    database: Store, story: tuple[list[list[str]], list[list[tuple[int, int]]]], again: bool
) -> None:
    lives, phases = story

    def world() -> tuple[World, list[list[Event]]]:
        made, n = World(), 0
        made.ids = made.ids[:1]
        events: list[list[Event]] = []
        for life, ops in enumerate(lives):
            events.append([])
            made.dimensions = [Dimensions("t", f"{made.name}/{life % 2}", None, f"e{life}")]
            for op in ops:
                n += 1
                events[-1].append(made._event(Step(op, 0, frozenset(FIELDS)), n))
        return made, events

    # Given an id that lived several times, in its order
    straight, ordered = world()
    for event in [event for life in ordered for event in life]:
        assert not database.writer.apply([event]).refused
    # When the same comes elsewhere, and of each life only the deletion before the next one
    mixed, events = world()
    for phase in phases:
        for life, n in phase:
            assert not database.writer.apply([events[life][n]]).refused
            if again:
                assert not database.writer.apply([events[life][n]]).refused
    # Then it is the same that is there
    assert database.seen(mixed) == database.seen(straight)


def test_what_known_dimensions_refuse_leaves_no_delta() -> None:
    id = str(uuid.uuid4())
    event = Event(PUT, Dimensions("t", "r"), id, b"{}", b"{}", version=Version(1, 1))
    assert collapse([event], {id: Dimensions("t", "other")}).deltas == []
    batch = collapse([event], {id: Dimensions("t", "r")})
    assert batch.deltas == [
        Delta(id, Dimensions("t", "r"), put=Version(1, 1).pack(), content=b"{}", metadata=b"{}")
    ]
