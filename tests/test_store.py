"""What every durable store promises: one suite for SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from mnemobus import store
from mnemobus.errors import (
    Rejected,
    SchemaError,
    SettingsError,
    StoreError,
    StoreTooSlow,
    StoreUnavailable,
)
from mnemobus.keys import Dimensions, Version
from mnemobus.log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event
from mnemobus.settings import Settings
from mnemobus.store import Cursor, Deletion, Query, Reader, Writer, migrations
from mnemobus.store.merge import BEGINNING, STEP
from rows import named
from servers import wait_until

DIMENSIONS = Dimensions("messages", "r1")


def settings(url: str, **others: Any) -> Settings:
    return Settings.load(database_url=url, **others)


def new_id() -> str:
    return str(uuid.uuid4())


def v(n: int) -> Version:
    return Version(1_700_000_000_000, n)


def put(
    id: str,
    n: int,
    content: bytes = b'{"text":"hi"}',
    *,
    dimensions: Dimensions = DIMENSIONS,
    embedding: bytes | None = None,
    created_us: int = 0,
) -> Event:
    return Event(PUT, dimensions, id, content, b"{}", embedding, created_us, v(n))


def update(id: str, n: int, *, dimensions: Dimensions = DIMENSIONS, **fields: Any) -> Event:
    return Event(UPDATE, dimensions, id, version=v(n), **fields)


def delete(id: str, n: int, *, dimensions: Dimensions = DIMENSIONS) -> Event:
    return Event(DELETE, dimensions, id, version=v(n))


def delete_room(n: int, table: str = "messages", room: str = "r1") -> Event:
    return Event(DELETE_ROOM, Dimensions(table, room), version=v(n))


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/memories.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/memories.db"


@contextmanager
def opened(url: str, **others: Any) -> Iterator[Writer]:
    writer = store.open_writer(settings(url, **others))
    try:
        writer.open()
        yield writer
    finally:
        writer.close()


@pytest.fixture
def writer(url: str) -> Iterator[Writer]:
    with opened(url) as writer:
        yield writer


@pytest.fixture
async def reader(url: str) -> AsyncIterator[Reader]:
    reader = store.open_reader(settings(url))
    await reader.open()
    yield reader
    await reader.close()


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Ask the database itself."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            rows = connection.execute(named(url, statement)).fetchall()
            connection.commit()
            return rows
    import psycopg

    with psycopg.connect(url, autocommit=True, options="-csearch_path=mnemobus") as connection:
        cursor = connection.execute(named(url, statement).encode())
        return cursor.fetchall() if cursor.description else []


# What comes back


async def test_a_memory_comes_back_as_it_was_written(writer: Writer, reader: Reader) -> None:
    # Given JSON that a database would like to tidy up: escapes of NUL and of half a surrogate pair, spaces,
    # a key twice, numbers that no float holds; and a date before 1970
    content = (
        '{ "b":"\\u0000\\ud800","a": 1.10,"a":1e400,"n":123456789012345678901234567890,"ü":"日本"}'.encode()
    )
    dimensions = Dimensions("my.table-1", "räum", "agent", "entity '\"\\", "wörld")
    id = new_id()
    event = Event(PUT, dimensions, id, content, b' {"m":[]}', b"\0\0\x80\x3f" * 3, -1, v(1))
    # When it is applied
    applied = writer.apply([event])
    # Then it is byte for byte the same
    assert applied.won == {id}
    row = await reader.get(id)
    assert row == (id, *dimensions, content, b' {"m":[]}', b"\0\0\x80\x3f" * 3, -1, v(1))
    assert [type(value) for value in row] == [str] * 6 + [bytes] * 3 + [int, Version]
    assert await reader.recent(Query("my.table-1", room="räum"), 10) == [row]
    assert await reader.embedding_length("my.table-1") == 3
    assert await reader.embedding_length("messages") is None
    # And what was never written is not there
    assert await reader.get(new_id()) is None


async def test_names_of_the_greatest_length_can_be_indexed(writer: Writer, reader: Reader) -> None:
    names = [os.urandom(256).hex() for _ in range(4)]  # incompressible, 512 bytes
    dimensions = Dimensions("t" * 64, *names)
    writer.apply([put(new_id(), 1, dimensions=dimensions)])
    for name, value in zip(("room", "agent", "entity", "world"), names, strict=True):
        assert await reader.count(Query("t" * 64, **{name: value})) == 1


async def test_a_large_memory_is_stored(writer: Writer, reader: Reader) -> None:
    id = new_id()
    content = b'{"text":"%s"}' % (b"x" * (1 << 20))
    writer.apply([put(id, 1, content, embedding=os.urandom(4 * 4096))])
    row = await reader.get(id)
    assert row and row.content == content


def test_an_empty_batch_changes_nothing(writer: Writer) -> None:
    assert writer.apply([]) == store.Applied()


# Merging


async def test_g1_a_redelivered_batch_changes_nothing(writer: Writer, reader: Reader) -> None:
    ids = [new_id() for _ in range(5)]
    batch = [put(id, n) for n, id in enumerate(ids, 1)] + [update(ids[0], 9, content=b'{"text":"new"}')]
    assert writer.apply(batch).won == set(ids)
    assert writer.apply(batch) == store.Applied()
    assert writer.apply(batch[:2]).won == set()
    assert await reader.count(Query("messages", room="r1")) == 5


async def test_g2_the_last_version_wins_whatever_comes_first(writer: Writer, reader: Reader) -> None:
    id = new_id()
    # Given that an update overtakes its put
    writer.apply([update(id, 3, content=b'{"text":"updated"}')])
    assert await reader.get(id) is None
    assert await reader.recent(Query("messages", room="r1"), 9) == []
    assert (await reader.totals()).tables == {}
    # When the put arrives, then what the update changed stays changed, and the rest is the put's
    writer.apply([put(id, 1, b'{"text":"first"}', created_us=7, embedding=b"\0" * 8)])
    row = await reader.get(id)
    assert row and (row.content, row.metadata, row.created_us) == (b'{"text":"updated"}', b"{}", 7)
    assert row.version == v(3)
    # And a later update of another field leaves it alone; b"" takes an embedding away
    writer.apply([update(id, 4, metadata=b'{"k":1}'), update(id, 5, embedding=b"")])
    row = await reader.get(id)
    assert row and row[6:] == (b'{"text":"updated"}', b'{"k":1}', None, 7, v(5))
    # And an older put, still on its way, changes nothing that is seen
    writer.apply([put(id, 2, b'{"text":"between"}', created_us=8)])
    row = await reader.get(id)
    assert row and row[6:] == (b'{"text":"updated"}', b'{"k":1}', None, 8, v(5))
    # And a newer put replaces all of it
    writer.apply([put(id, 6, b'{"text":"last"}', created_us=9)])
    row = await reader.get(id)
    assert row and row[6:] == (b'{"text":"last"}', b"{}", None, 9, v(6))


async def test_versions_compare_as_numbers(writer: Writer, reader: Reader) -> None:
    id = new_id()
    for version in (Version(9, 9), Version(10, 0), Version(9, 10), Version(10, 2**64 - 1), Version(10, 255)):
        writer.apply([Event(PUT, DIMENSIONS, id, b"{}", b"{}", version=version)])
    row = await reader.get(id)
    assert row and row.version == Version(10, 2**64 - 1)


async def test_g3_what_was_deleted_stays_deleted(writer: Writer, reader: Reader, url: str) -> None:
    id = new_id()
    writer.apply([put(id, 1, embedding=b"\0" * 8), update(id, 2, content=b'{"text":"secret"}')])
    assert writer.apply([delete(id, 5)]).won == {id}
    # When all of it is delivered again, and what is older than the deletion arrives late
    writer.apply([put(id, 1), put(id, 3), update(id, 4, metadata=b'{"k":"secret"}')])
    # Then it is gone, from every query, and so is what it said
    assert await reader.get(id) is None
    assert await reader.recent(Query("messages", room="r1"), 9) == []
    assert await reader.count(Query("messages", room="r1")) == 0
    assert (await reader.totals()).tables == {}
    assert sql(url, "SELECT content, metadata, embedding FROM memories") == [(None, None, None)]
    # But what is written after the deletion is there
    writer.apply([put(id, 6, b'{"text":"again"}')])
    row = await reader.get(id)
    assert row and row.content == b'{"text":"again"}'


async def test_a_deletion_that_overtakes_its_put(writer: Writer, reader: Reader, url: str) -> None:
    id = new_id()
    writer.apply([delete(id, 2)])
    writer.apply([put(id, 1, b'{"text":"secret"}')])
    assert await reader.get(id) is None
    assert sql(url, "SELECT content FROM memories") == [(None,)]


# Rooms


async def test_g3_a_deleted_room_stays_deleted(writer: Writer, reader: Reader, url: str) -> None:
    ids = sorted(new_id() for _ in range(4))
    named = Dimensions("messages", "r1", "a", "e", "w")
    writer.apply([put(ids[0], 1), put(ids[1], 2, dimensions=named), delete(ids[2], 3)])
    others = [Dimensions("messages", "r2"), Dimensions("facts", "r1")]
    writer.apply([put(new_id(), 3, dimensions=dimensions) for dimensions in others])
    # When the room is deleted
    applied = writer.apply([delete_room(10)])
    # Then it tells what it put an end to, for the scopes that these were in
    assert sorted(applied.cleared) == [(ids[0], DIMENSIONS), (ids[1], named)]
    assert await reader.count(Query("messages", room="r1")) == 0
    assert await reader.count(Query("messages", entity="e")) == 0
    left = "SELECT tbl FROM memories WHERE room = 'r1' AND content IS NOT NULL"
    assert sql(url, left) == [("facts",)]
    # And a redelivery, after a crash before the fan-out, tells it again
    assert sorted(writer.apply([delete_room(10)]).cleared) == sorted(applied.cleared)
    # And what is older and arrives late stays dead, while what is newer lives
    writer.apply([put(ids[3], 9, b'{"text":"secret"}')])
    assert await reader.get(ids[3]) is None
    assert sql(url, "SELECT count(*) FROM memories WHERE live AND room = 'r1' AND tbl = 'messages'") == [(0,)]
    writer.apply([put(ids[0], 11)])
    assert [row.id for row in await reader.recent(Query("messages", room="r1"), 9)] == [ids[0]]
    # And other rooms, and rooms of that name in other tables, are untouched
    for dimensions in others:
        assert await reader.count(Query(dimensions.table, room=dimensions.room)) == 1


async def test_g8_what_is_applied_again_changes_nothing_though_a_room_was_deleted(
    writer: Writer, url: str
) -> None:
    # Given memories that were deleted, one by one and with their room, and one that was written after that
    ids = [new_id() for _ in range(3)]
    events = [put(ids[0], 1), delete(ids[0], 2), put(ids[1], 3), delete_room(4), put(ids[2], 5)]
    writer.apply(events)
    # If all of it is applied again, at once or one by one, then nothing counts as changed
    for batch in (events, *([event] for event in events)):
        assert writer.apply(batch).won == set()


async def test_a_room_deleted_within_a_batch(writer: Writer, reader: Reader) -> None:
    first, second, third = new_id(), new_id(), new_id()
    applied = writer.apply([put(first, 1), put(second, 2), delete_room(3), put(second, 4), put(third, 5)])
    assert {row.id for row in await reader.recent(Query("messages", room="r1"), 9)} == {second, third}
    assert applied.cleared == [(first, DIMENSIONS)]


async def test_a_late_deletion_of_a_room_spares_what_is_newer(writer: Writer, reader: Reader) -> None:
    old, new = new_id(), new_id()
    writer.apply([put(old, 1), put(new, 4), update(old, 5, metadata=b"{}")])
    applied = writer.apply([delete_room(3)])
    assert applied.cleared == [(old, DIMENSIONS)]
    assert [row.id for row in await reader.recent(Query("messages", room="r1"), 9)] == [new]


async def test_each_deletion_of_a_room_answers_for_what_it_ended(writer: Writer) -> None:
    first, second = new_id(), new_id()
    # Given two deletions, each of which ended something
    writer.apply([put(first, 1)])
    writer.apply([delete_room(2)])
    writer.apply([put(second, 3)])
    writer.apply([delete_room(4)])
    # Then each of them, and both in one batch, tell of it as often as they are delivered
    assert writer.apply([delete_room(2)]).cleared == [(first, DIMENSIONS)]
    assert writer.apply([delete_room(4)]).cleared == [(second, DIMENSIONS)]
    both = writer.apply([delete_room(4), delete_room(2)]).cleared
    assert sorted(both) == sorted([(first, DIMENSIONS), (second, DIMENSIONS)])


async def test_deleting_a_room_erases_what_waited_for_its_put(
    writer: Writer, reader: Reader, url: str
) -> None:
    id = new_id()
    writer.apply([update(id, 2, content=b'{"text":"secret"}')])
    writer.apply([delete_room(3)])
    assert sql(url, "SELECT content FROM memories") == [(None,)]
    writer.apply([put(id, 1)])
    assert await reader.get(id) is None


# What is refused


async def test_dimensions_never_change(writer: Writer, reader: Reader) -> None:
    known, fresh = new_id(), new_id()
    writer.apply([put(known, 1)])
    # Given a batch whose first event of a memory contradicts what is stored, and a later one does not
    elsewhere = Dimensions("messages", "r2", agent="a")
    wrong = put(known, 2, b'{"text":"wrong"}', dimensions=elsewhere)
    batch = [wrong, put(known, 3, b'{"text":"right"}'), put(fresh, 4), delete(known, 9, dimensions=elsewhere)]
    # When it is applied, once and again
    for _ in range(2):
        applied = writer.apply(batch)
        # Then just what contradicts is refused
        assert [refused.event for refused in applied.refused] == [wrong, batch[3]]
        assert applied.refused[0].reason == (
            f"memory {known} would change its room from 'r1' to 'r2', agent from None to 'a';"
            " dimensions never change"
        )
        row = await reader.get(known)
        assert row and row.content == b'{"text":"right"}'
        assert await reader.get(fresh)
    assert await reader.count(Query("messages", room="r2")) == 0


async def test_the_first_of_a_batch_decides_on_dimensions(writer: Writer, reader: Reader) -> None:
    id = new_id()
    other = put(id, 2, dimensions=Dimensions("messages", "r1", world="w"))
    assert [refused.event for refused in writer.apply([put(id, 1), other]).refused] == [other]
    row = await reader.get(id)
    assert row and row.version == v(1)


async def test_g3_what_was_deleted_may_be_made_again_with_other_dimensions(
    writer: Writer, reader: Reader
) -> None:
    id, there, away = new_id(), Dimensions("messages", "r1"), Dimensions("messages", "r2", agent="a")
    first = [put(id, 1), update(id, 2, content=b'{"text":"2"}'), delete(id, 3)]
    again = put(id, 4, b'{"text":"again"}', dimensions=away)
    # Given a memory that is deleted
    writer.apply(first)
    # When a memory of its id is written elsewhere, then it exists there, and caches of the old one are told
    applied = writer.apply([again])
    assert applied.refused == []
    assert applied.cleared == [(id, there)]
    row = await reader.get(id)
    assert row and (row.room, row.agent, row.content) == ("r2", "a", b'{"text":"again"}')
    assert await reader.count(Query("messages", room="r1")) == 0
    # If what was before comes late, or all of it once more, nothing changes and nothing is refused
    assert writer.apply([*first, again]) == store.Applied()
    assert await reader.get(id) == row
    # And as long as it lives, what contradicts it is refused as ever
    wrong = [put(id, 5), update(id, 6, content=b"{}"), delete(id, 7)]
    assert [refused.event for refused in writer.apply(wrong).refused] == wrong
    assert await reader.get(id) == row


async def test_what_is_made_again_waits_for_its_put_and_heeds_its_room(
    writer: Writer, reader: Reader
) -> None:
    id, away = new_id(), Dimensions("messages", "r2")
    writer.apply([put(id, 1), delete(id, 2), Event(DELETE_ROOM, away, version=v(5))])
    # Given an update of the new life that is applied before its put
    assert not writer.apply([update(id, 7, content=b'{"text":"7"}', dimensions=away)]).refused
    assert await reader.get(id) is None
    # If a put comes that is older than the deletion of the new room, then it stays dead
    assert not writer.apply([put(id, 4, dimensions=away)]).refused
    assert await reader.get(id) is None
    # And with one that is newer, the update counts
    writer.apply([put(id, 6, dimensions=away)])
    row = await reader.get(id)
    assert row and (row.content, row.version) == (b'{"text":"7"}', v(7))


async def test_what_contradicts_updates_of_a_life_whose_put_is_late_is_refused(
    writer: Writer, reader: Reader
) -> None:
    id, away = new_id(), Dimensions("messages", "r2")
    # Given a memory that was deleted, and an update of its next life that is applied before its put
    writer.apply([put(id, 1), delete(id, 2)])
    writer.apply([update(id, 4, content=b'{"text":"4"}', dimensions=away)])
    # If somebody who has not heard of the deletion updates what was, then that is refused
    late = update(id, 5, content=b'{"text":"5"}')
    assert [refused.event for refused in writer.apply([late]).refused] == [late]
    # And what waits for its put is not lost
    writer.apply([put(id, 3, dimensions=away)])
    row = await reader.get(id)
    assert row and (row.room, row.content, row.version) == ("r2", b'{"text":"4"}', v(4))


def test_a_batch_comes_in_as_soon_as_sqlite_is_free(tmp_path: Path) -> None:
    writer = store.open_writer(Settings.load(database_url=f"sqlite:///{tmp_path}/memories.db"))
    writer.open()
    other = sqlite3.connect(tmp_path / "memories.db", isolation_level=None)
    waits = []
    for _ in range(6):
        done: list[float] = []
        # Given somebody else who holds the lock for so long that SQLite itself looks every 100 ms, and has just looked
        other.execute("BEGIN IMMEDIATE")
        batch = threading.Thread(
            target=lambda d=done: (writer.apply([put(new_id(), 1)]), d.append(time.monotonic()))
        )
        batch.start()
        batch.join(0.345)
        assert not done
        released = time.monotonic()
        other.execute("COMMIT")
        batch.join()
        waits.append(done[0] - released)
    # Then a batch does not wait for the next look: it may find the lock taken again
    assert min(waits) < 0.04
    other.close()
    writer.close()


async def test_an_embedding_of_what_is_made_again_fits_its_table(writer: Writer, reader: Reader) -> None:
    one, two = new_id(), new_id()
    writer.apply([put(one, 1, embedding=b"\0" * 8), put(two, 2), delete(two, 3)])
    wrong = put(two, 4, embedding=b"\0" * 12, dimensions=Dimensions("messages", "r2"))
    assert "those of table" in writer.apply([wrong]).refused[0].reason
    assert await reader.get(two) is None


async def test_embeddings_of_a_table_are_of_one_length(writer: Writer, reader: Reader) -> None:
    first, second = new_id(), new_id()
    two, three = b"\0" * 8, b"\0" * 12
    writer.apply([put(first, 1, embedding=two)])
    # When a memory gets an embedding of another length, along with other changes
    wrong = update(first, 3, embedding=three)
    fact = put(second, 4, embedding=three, dimensions=Dimensions("facts", "r1"))
    applied = writer.apply([update(first, 2, content=b'{"text":"new"}'), wrong, fact])
    # Then only that is refused
    assert applied.refused == [(wrong, "an embedding of 3 floats; those of table 'messages' have 2")]
    row = await reader.get(first)
    assert row and (row.content, row.embedding) == (b'{"text":"new"}', two)
    # And another table has a length of its own
    assert await reader.embedding_length("messages") == 2
    assert await reader.embedding_length("facts") == 3


async def test_within_a_batch_the_first_embedding_decides(writer: Writer, reader: Reader) -> None:
    ids = sorted((new_id() for _ in range(2)), reverse=True)
    batch = [put(ids[0], 1, embedding=b"\0" * 8), put(ids[1], 2, embedding=b"\0" * 4)]
    assert [refused.event for refused in writer.apply(batch).refused] == batch[1:]
    assert await reader.embedding_length("messages") == 2


async def test_a_refused_event_decides_nothing(writer: Writer, reader: Reader) -> None:
    id = new_id()
    writer.apply([put(id, 1)])
    # Given a write that changes a dimension and has the first embedding of its table
    wrong = put(id, 2, embedding=b"\0" * 4, dimensions=Dimensions("messages", "r2"))
    right = put(new_id(), 3, embedding=b"\0" * 8)
    # Then it is the next one that fixes the length
    assert [refused.event for refused in writer.apply([wrong, right]).refused] == [wrong]
    assert await reader.embedding_length("messages") == 2


@pytest.mark.parametrize(
    "bad",
    [
        put(new_id(), 2, created_us=1 << 63),
        put(new_id(), 2, dimensions=Dimensions("messages", "\ud800")),
        put(new_id(), 2, b'{"text":"\xff"}'),
    ],
    ids=["date", "surrogate", "utf-8"],
)
async def test_data_that_the_database_refuses(writer: Writer, reader: Reader, bad: Event) -> None:
    good = put(new_id(), 1)
    # Given a batch with something in it that can't be stored, then it is the data's fault, and all is undone
    with pytest.raises(Rejected, match="refuses this data: ") as caught:
        writer.apply([good, bad])
    assert caught.value.__cause__ is not None
    assert (await reader.totals()).tables == {}
    # And the store goes on
    assert writer.apply([good]).won == {good.id}


# Listings


async def test_listings_are_newest_first_and_ties_go_by_id(writer: Writer, reader: Reader) -> None:
    # Given memories of which many share a date
    chance = random.Random(1)
    events = [
        put(
            new_id(),
            n,
            created_us=chance.randrange(6) - 2,
            dimensions=Dimensions(
                "messages",
                chance.choice(["r1", "r2"]),
                *(chance.choice([None, "x", "y"]) for _ in range(3)),
            ),
        )
        for n in range(1, 80)
    ]
    gone = [event for event in events if chance.random() < 0.2]
    writer.apply(events)
    writer.apply([delete(event.id, 1000, dimensions=event.dimensions) for event in gone])
    alive = [event for event in events if event not in gone]

    for dimensions in (
        {"room": "r1"},
        {"agent": "x"},
        {"entity": "y"},
        {"world": "x"},
        {"room": "r2", "entity": "x"},
        {"room": "r1", "agent": "x", "entity": "y", "world": "x"},
        {},
    ):
        expected = sorted(
            (
                Cursor(event.created_us, event.id)
                for event in alive
                if all(getattr(event.dimensions, name) == value for name, value in dimensions.items())
            ),
            key=lambda cursor: (cursor.created_us, uuid.UUID(cursor.id).bytes),
            reverse=True,
        )

        async def recent(limit: int = 1000, **bounds: Cursor) -> list[Cursor]:
            query = Query("messages", **dimensions, **bounds)  # noqa: B023
            rows = await reader.recent(query, limit)
            if limit == 1000:
                assert await reader.count(query) == len(rows)
            return [Cursor(row.created_us, row.id) for row in rows]

        assert await recent() == expected
        # Then pages of any size, in either direction, leave nothing out and repeat nothing
        back: list[Cursor] = await recent(3)
        while page := await recent(3, before=back[-1]) if back else []:
            back += page
        assert back == expected
        forward: list[Cursor] = expected[-1:]
        while page := await recent(3, after=forward[0]) if forward else []:
            forward = page + forward
        assert forward == expected
        # And bounds on both sides leave the newest of what is between
        if len(expected) > 5:
            assert await recent(2, before=expected[0], after=expected[4]) == expected[1:3]
            assert await recent(before=expected[0], after=expected[4]) == expected[1:4]
        # And a place need not be that of a memory
        assert await recent(before=Cursor(-100, new_id())) == []
        assert await recent(after=Cursor(-100, new_id())) == expected


@pytest.mark.parametrize("dimension", ["room", "agent", "entity", "world"])
@pytest.mark.parametrize("bound", [None, "before", "after"])
def test_a_listing_reads_its_index_and_sorts_nothing(
    writer: Writer, url: str, dimension: str, bound: str | None
) -> None:
    # Given the query of a listing as the reader sends it
    reader = store.open_reader(settings(url))
    sent: list[Any] = []

    async def catch(sql: str, parameters: Any = ()) -> list[Any]:
        sent.extend((sql, parameters))
        return []

    reader._fetch = catch  # type: ignore[attr-defined]
    bounds = {bound: Cursor(5, new_id())} if bound else {}
    asyncio.run(reader.recent(Query("messages", **{dimension: "x"}, **bounds), 20))
    statement, parameters = sent
    # When the database is asked for its plan (PostgreSQL as if the table were large)
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            plan = str(connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall())
        assert f"USING INDEX mnemobus_memories_{dimension} (tbl=? AND {dimension}=?" in plan
        assert "TEMP B-TREE" not in plan
        assert "created_us" in plan or bound is None
    else:
        import psycopg

        with psycopg.connect(url) as connection:
            connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
            query = f"EXPLAIN {statement.replace('?', '%s')}".encode()
            plan = "\n".join(row[0] for row in connection.execute(query, parameters).fetchall())
        assert f"using memories_{dimension}" in plan
        assert "Sort" not in plan
        listing = plan.partition(f"using memories_{dimension}")[2]
        assert "ROW(created_us, id)" in listing.partition("Index Cond")[2].partition("\n")[0] or bound is None


async def test_totals_count_the_living(writer: Writer, reader: Reader) -> None:
    ids = [new_id() for _ in range(3)]
    facts = Dimensions("facts", "r1")
    writer.apply([put(ids[0], 1), put(ids[1], 2), put(ids[2], 3, dimensions=facts), delete(ids[1], 4)])
    assert (await reader.totals()).tables == {"facts": 1, "messages": 1}


# Many at once


def chaos(seed: int, ids: list[str], rounds: int) -> list[list[Event]]:
    """Batches of events on the same few memories: the same for the same seed."""
    chance = random.Random(seed)
    batches = []
    for n in range(rounds):
        batch = []
        for k in range(20):
            id = chance.choice(ids)
            version = seed * 100_000 + n * 100 + k
            dimensions = Dimensions("messages", f"r{int(id[:4], 16) % 3}", entity="e")
            what = chance.random()
            if what < 0.6:
                content = b'{"n":%d}' % version
                batch.append(put(id, version, content, dimensions=dimensions, embedding=b"\0" * 8))
            elif what < 0.85:
                batch.append(update(id, version, dimensions=dimensions, metadata=b'{"n":%d}' % version))
            elif what < 0.97:
                batch.append(delete(id, version, dimensions=dimensions))
            else:
                batch.append(delete_room(version, room=dimensions.room))
        batches.append(batch)
    return batches


def replayed(events: list[Event]) -> dict[str, tuple[bytes, bytes, Version]]:
    """What is left when these happen one after the other."""
    memories: dict[str, tuple[Dimensions, bytes, bytes, Version]] = {}
    for event in sorted(events, key=lambda event: event.version):
        if event.op == PUT:
            assert event.content and event.metadata
            memories[event.id] = (event.dimensions, event.content, event.metadata, event.version)
        elif event.op == UPDATE and event.id in memories:
            dimensions, content, metadata, _ = memories[event.id]
            memories[event.id] = (
                dimensions,
                event.content or content,
                event.metadata or metadata,
                event.version,
            )
        elif event.op == DELETE:
            memories.pop(event.id, None)
        elif event.op == DELETE_ROOM:
            memories = {id: m for id, m in memories.items() if m[0][:2] != event.dimensions[:2]}
    return {id: memory[1:] for id, memory in memories.items()}


async def stored(reader: Reader, ids: list[str]) -> dict[str, tuple[bytes, bytes, Version]]:
    rows = [row for id in ids if (row := await reader.get(id))]
    return {row.id: (row.content, row.metadata, row.version) for row in rows}


async def test_g2_threads_on_the_same_memories(url: str, reader: Reader) -> None:
    ids = [new_id() for _ in range(12)]
    batches = {seed: chaos(seed, ids, 12) for seed in range(1, 5)}

    def work(writer: Writer, seed: int) -> None:
        for batch in batches[seed]:
            writer.apply(batch)

    # When two writers with two threads each apply what overlaps, then nobody fails, and the last write won
    with opened(url) as one, opened(url) as two, ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, (one, two)[seed % 2], seed) for seed in batches]:
            done.result(60)
    every = [event for series in batches.values() for batch in series for event in batch]
    assert await stored(reader, ids) == replayed(every)


PROCESS = """
import sys
import test_store
url, seed, ids = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
with test_store.opened(url) as writer:
    for batch in test_store.chaos(seed, ids, 12):
        writer.apply(batch)
"""


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    outputs = []
    for process in processes:
        try:
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, error
        outputs.append(output)
    return outputs


async def test_g2_processes_on_the_same_memories(url: str) -> None:
    # Given a database without schema, and processes that all begin at once
    ids = [new_id() for _ in range(12)]
    finish([python(PROCESS, url, str(seed), ",".join(ids)) for seed in range(1, 4)])
    # Then the schema was created once, and every memory is as its last write left it
    assert sql(url, "SELECT number FROM migrations") == [(n,) for n in range(1, store.SCHEMA + 1)]
    reader = store.open_reader(settings(url))
    await reader.open()
    every = [event for seed in range(1, 4) for batch in chaos(seed, ids, 12) for event in batch]
    assert await stored(reader, ids) == replayed(every)
    await reader.close()


def test_g3_a_put_and_the_deletion_of_its_room_do_not_miss_each_other(url: str) -> None:
    # Given two workers, one of which puts into a room that the other is deleting
    with opened(url) as one, opened(url) as two, ThreadPoolExecutor(2) as threads:
        for n in range(60):
            room, start = f"room{n}", threading.Barrier(2)
            batch = [put(new_id(), k, dimensions=Dimensions("messages", room)) for k in range(1, 30)]

            def apply(writer: Writer, events: list[Event], start: threading.Barrier = start) -> None:
                start.wait(10)
                writer.apply(events)

            done = [
                threads.submit(apply, one, batch),
                threads.submit(apply, two, [delete_room(100, room=room)]),
            ]
            for task in done:
                task.result(30)
    # Then whichever came first, nothing is left
    assert sql(url, "SELECT count(*) FROM memories WHERE live") == [(0,)]


OPENING = """
import asyncio, sys
from mnemobus import store
from mnemobus.settings import Settings
async def read(settings):
    reader = store.open_reader(settings)
    await reader.open()
    print(await reader.schema(), flush=True)
    await reader.close()
print("ready", flush=True)
for line in sys.stdin:
    settings = Settings.load(database_url=line.strip())
    if sys.argv[1] == "write":
        writer = store.open_writer(settings)
        writer.open()
        writer.close()
    asyncio.run(read(settings))
"""


def test_any_number_of_processes_may_create_the_schema(url: str) -> None:
    # Given writers and readers that are ready to begin at the same moment
    processes = [python(OPENING, ("write", "write", "read")[n % 3]) for n in range(6)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n", process.communicate()
    # When they meet an empty database, several times
    for n in range(6):
        if url.startswith("sqlite"):
            place = f"{url}.{n}"
        else:
            place = url
            sql(url, "DROP SCHEMA IF EXISTS mnemobus CASCADE")
        for process in processes:
            assert process.stdin
            process.stdin.write(f"{place}\n")
            process.stdin.flush()
        # Then each finds the schema, created once
        for process in processes:
            assert process.stdout and process.stdout.readline() == f"{store.SCHEMA}\n", process.communicate()
        assert sql(place, "SELECT count(*) FROM migrations") == [(store.SCHEMA,)]
    finish(processes)


# The schema


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_migrations_are_numbered_without_a_gap(kind: Any) -> None:
    assert [migration.number for migration in migrations.load(kind)] == list(range(1, store.SCHEMA + 1))


async def test_a_schema_is_upgraded_by_writers_alone(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    id = new_id()
    with opened(url) as writer:
        writer.apply([put(id, 1)])
    # Given a version of mnemobus with one migration more
    before = migrations.load
    following = migrations.Migration(
        store.SCHEMA + 1,
        "more",
        "CREATE TABLE more (n integer);\nINSERT INTO more VALUES (1);\n-- a comment; with a semicolon\n",
    )
    with monkeypatch.context() as newer:
        newer.setattr(store, "SCHEMA", following.number)
        newer.setattr(migrations, "load", lambda kind: [*before(kind), following])
        # Then its reader does not touch the schema, and says who will
        reader = store.open_reader(settings(url))
        with pytest.raises(SchemaError) as caught:
            await reader.open()
        assert str(caught.value).endswith(
            f"has schema {following.number - 1}, and this version of mnemobus needs {following.number}:"
            " start a worker of this version (mnemobus worker), which upgrades it"
        )
        # When a worker has, then it is fine
        with opened(url), opened(url):
            assert await reader.schema() == following.number
            assert await reader.get(id)
        await reader.close()
    assert sql(url, "SELECT n FROM more") == [(1,)]
    # And a reader of the version before reads on, but warns
    reader = store.open_reader(settings(url))
    await reader.open()
    assert await reader.get(id)
    assert "newer than" in caplog.text
    await reader.close()


async def test_a_migration_that_fails_leaves_nothing_behind(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = migrations.load
    broken = migrations.Migration(store.SCHEMA + 1, "x", "CREATE TABLE half (n integer);\nSELECT nothing;\n")
    monkeypatch.setattr(migrations, "load", lambda kind: [*before(kind), broken])
    with pytest.raises(StoreError, match="nothing"), opened(url):
        pass
    assert sql(url, "SELECT max(number) FROM migrations") == [(store.SCHEMA,)]
    with pytest.raises(Exception, match="half"):
        sql(url, "SELECT * FROM half")


async def test_a_reader_creates_the_schema_where_there_is_none(url: str) -> None:
    if url.startswith("sqlite"):
        url = url.replace("memories.db", "not/yet/there/memories.db")
    reader = store.open_reader(settings(url))
    await reader.open()
    assert await reader.schema() == store.SCHEMA
    assert await reader.recent(Query("messages", room="r1"), 5) == []
    with opened(url) as writer:
        writer.apply([put(new_id(), 1)])
    assert await reader.count(Query("messages", room="r1")) == 1
    await reader.close()


# Readers under cancellation


async def test_a_reader_survives_being_cancelled_anywhere(url: str, writer: Writer) -> None:
    ids = [new_id() for _ in range(30)]
    writer.apply([put(id, n) for n, id in enumerate(ids, 1)])
    reader = store.open_reader(settings(url, database_pool_max=3))
    await reader.open()
    chance = random.Random(2)
    # Given calls that are cancelled at every stage, several at a time
    for _ in range(40):
        calls = [
            asyncio.ensure_future(reader.recent(Query("messages", room="r1"), 30))
            for _ in range(chance.randrange(1, 9))
        ]
        for call in calls:
            if chance.random() < 0.5:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(chance.random() * 0.002)
            call.cancel()
        await asyncio.wait(calls)
    # Then all its connections are as good as new
    for _ in range(3):
        rows = await asyncio.wait_for(
            asyncio.gather(*(reader.recent(Query("messages", room="r1"), 30) for _ in range(9))), 5
        )
        assert [len(listing) for listing in rows] == [30] * 9
    await reader.close()


SLOW = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1e9) SELECT max(i) FROM n",
    "postgresql": "SELECT pg_sleep(60)",
}


async def test_a_slow_query_holds_up_no_other_and_can_be_cut_short(url: str, writer: Writer) -> None:
    id = new_id()
    writer.apply([put(id, 1)])
    reader: Any = store.open_reader(settings(url, database_pool_max=2, database_timeout=60))
    await reader.open()
    for _ in range(3):
        slow = asyncio.ensure_future(reader._fetch(SLOW[url.partition(":")[0]]))
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(reader.get(id), 5)
        assert not slow.done()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        # Both connections are free again
        assert all(await asyncio.wait_for(asyncio.gather(*(reader.get(id) for _ in range(8))), 5))
    await asyncio.wait_for(reader.close(), 5)


async def test_what_is_closed_says_so_and_can_be_opened_again(url: str) -> None:
    reader = store.open_reader(settings(url))
    await reader.open()
    await reader.close()
    with pytest.raises(StoreUnavailable, match="is closed"):
        await reader.get(new_id())
    await reader.open()
    assert await reader.get(new_id()) is None
    await reader.close()
    writer = store.open_writer(settings(url))
    writer.open()
    writer.close()
    with pytest.raises(StoreUnavailable, match="is closed"):
        writer.apply([put(new_id(), 1)])
    writer.open()
    assert writer.apply([put(new_id(), 1)]).won
    writer.close()


# SQLite alone


async def test_sqlite_paths_are_relative_or_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = store.open_writer(settings("sqlite:///sub dir/%41.db"))
    monkeypatch.chdir("/")
    writer.open()
    writer.close()
    assert (tmp_path / "sub dir" / "%41.db").exists()
    with pytest.raises(SettingsError, match="a database in memory can't be shared"):
        store.open_writer(settings("sqlite:///:memory:"))


async def test_sqlite_keeps_what_it_acknowledged(sqlite_url: str) -> None:
    with opened(sqlite_url) as writer:
        connection = writer._connection  # type: ignore[attr-defined]
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_sqlite_readers_wait_for_no_writer(sqlite_url: str) -> None:
    id = new_id()
    with opened(sqlite_url, database_timeout=0.2) as writer:
        writer.apply([put(id, 1)])
        reader = store.open_reader(settings(sqlite_url))
        await reader.open()
        # Given another process in the middle of a write
        with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert await reader.get(id)
            # Then a writer waits, but not for ever
            with pytest.raises(StoreUnavailable, match=r"SQLite /.*memories\.db: database is locked"):
                writer.apply([put(id, 2)])
            other.execute("ROLLBACK")
        assert writer.apply([put(id, 2)]).won == {id}
        await reader.close()


async def test_sqlite_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"something else " * 1000)
    for url, words in (
        (f"sqlite:///{tmp_path}/file", "file is not a database"),
        (f"sqlite:///{tmp_path}/file/x.db", "File exists|Not a directory"),
        (f"sqlite:///{tmp_path}", "unable to open database file"),
    ):
        reader, writer = store.open_reader(settings(url)), store.open_writer(settings(url))
        with pytest.raises(StoreUnavailable, match=words) as caught:
            await reader.open()
        assert caught.value.__cause__ is not None
        with pytest.raises(StoreUnavailable, match=words):
            writer.open()
        with pytest.raises(StoreUnavailable, match=words):
            await reader.get(new_id())
    # And once the cause is gone, they work
    (tmp_path / "file").unlink()
    url = f"sqlite:///{tmp_path}/file"
    reader, writer = store.open_reader(settings(url)), store.open_writer(settings(url))
    assert await reader.get(new_id()) is None
    assert writer.apply([put(new_id(), 1)]).won
    await reader.close()
    writer.close()


FULL = """
import resource, sys
import test_store
from mnemobus.errors import StoreUnavailable
with test_store.opened(sys.argv[1]) as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    big = test_store.put(test_store.new_id(), 1, b'{"x":"%s"}' % (b"x" * 500_000))
    try:
        writer.apply([big])
    except StoreUnavailable as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(writer.apply([big]).won == {big.id})
"""


def test_sqlite_on_a_full_disk(sqlite_url: str) -> None:
    (output,) = finish([python(FULL, sqlite_url)])
    assert "disk" in output and output.endswith("True\n")


# PostgreSQL alone


class Gate:
    """A way to the server that can be shut: connections are cut, and new ones refused."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener: socket.socket | None = None
        self._links: list[socket.socket] = []
        self.port = 0
        self.open()
        login = parts.netloc.rpartition("@")[0]
        self.url = urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{self.port}"))

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        assert self._listener
        for link in [self._listener, *self._links]:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self._links.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._links += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


async def test_postgres_lost_connections_are_replaced(postgres_url: str) -> None:
    id = new_id()
    with opened(postgres_url) as writer:
        writer.apply([put(id, 1)])
        reader = store.open_reader(settings(postgres_url))
        await reader.open()
        for n in range(2, 5):
            # Given several connections in each pool, when the server ends them all, as it does on a restart
            await asyncio.gather(*(reader.get(id) for _ in range(8)))
            sql(
                postgres_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            # Then nobody notices
            assert all(await asyncio.gather(*(reader.get(id) for _ in range(8))))
            assert writer.apply([put(id, n)]).won == {id}
        await reader.close()


async def test_postgres_away_and_back(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    id = new_id()
    gate = Gate(postgres_url)
    gate.shut()
    # Given a server that is away, then everything says so at once, in its words
    reader, writer = store.open_reader(settings(gate.url)), store.open_writer(settings(gate.url))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"PostgreSQL 127.0.0.1:{gate.port}/.*refused"):
        await reader.open()
    with pytest.raises(StoreUnavailable, match="refused"):
        writer.open()
    with pytest.raises(StoreUnavailable, match="refused"):
        await reader.get(id)
    with pytest.raises(StoreUnavailable, match="refused"):
        writer.apply([put(id, 1)])
    assert time.monotonic() - began < 3
    # When it is there, then the next call works
    gate.open()
    assert await reader.get(id) is None
    assert writer.apply([put(id, 1)]).won == {id}
    # And again, with connections that were good
    gate.shut()
    with pytest.raises(StoreUnavailable):
        writer.apply([put(id, 2)])
    with pytest.raises(StoreUnavailable):
        await reader.get(id)
    gate.open()
    assert writer.apply([put(id, 2)]).won == {id}
    row = await reader.get(id)
    assert row and row.version == v(2)
    await reader.close()
    writer.close()
    gate.shut()
    assert "error connecting" not in caplog.text


async def test_postgres_waits_no_longer_than_told(postgres_url: str) -> None:
    import psycopg

    id = new_id()
    with opened(postgres_url, database_timeout=0.3) as writer, psycopg.connect(postgres_url) as other:
        reader = store.open_reader(settings(postgres_url, database_timeout=0.3))
        await reader.open()
        other.execute("LOCK TABLE mnemobus.memories")
        with pytest.raises(StoreUnavailable, match="canceling statement due to statement timeout"):
            writer.apply([put(id, 1)])
        with pytest.raises(StoreUnavailable, match="canceling statement due to statement timeout"):
            await reader.get(id)
        other.rollback()
        assert writer.apply([put(id, 1)]).won == {id}
        assert await reader.get(id)
        await reader.close()


async def test_postgres_all_connections_busy(postgres_url: str) -> None:
    reader: Any = store.open_reader(settings(postgres_url, database_timeout=0.5, database_pool_max=1))
    await reader.open()
    await reader._fetch("SELECT set_config('statement_timeout', '0', false)")
    busy = asyncio.ensure_future(reader._fetch("SELECT pg_sleep(30)"))
    await asyncio.sleep(0.05)
    with pytest.raises(
        StoreUnavailable, match=r"all 1 connections \(MNEMOBUS_DATABASE_POOL_MAX\) were busy for 0.5 s"
    ):
        await reader.get(new_id())
    busy.cancel()
    await asyncio.wait([busy])
    assert await reader.get(new_id()) is None
    await reader.close()


async def test_postgres_missing_tables_are_no_fault_of_the_data(postgres_url: str) -> None:
    with opened(postgres_url) as writer:
        reader = store.open_reader(settings(postgres_url))
        await reader.open()
        sql(postgres_url, "DROP TABLE memories")
        with pytest.raises(SchemaError, match=r'relation "mnemobus\.memories" does not exist'):
            writer.apply([put(new_id(), 1)])
        with pytest.raises(SchemaError, match=r'relation "mnemobus\.memories" does not exist'):
            await reader.get(new_id())
        await reader.close()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (put(new_id(), 1, dimensions=Dimensions("messages", "a\0b")), "invalid byte sequence"),
        (put(new_id(), 1, b'{"text":'), "invalid input syntax for type json"),
        (put(new_id(), 1, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "stack depth limit exceeded"),
    ],
    ids=["nul", "json", "depth"],
)
def test_postgres_refuses_data_in_its_own_words(postgres_url: str, bad: Event, words: str) -> None:
    with opened(postgres_url) as writer:
        with pytest.raises(Rejected, match=words):
            writer.apply([put(new_id(), 1), bad])
        assert sql(postgres_url, "SELECT count(*) FROM memories") == [(0,)]
        good = put(new_id(), 1)
        assert writer.apply([good]).won == {good.id}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("22003", Rejected),
        ("23502", Rejected),
        ("54000", Rejected),
        ("08006", StoreUnavailable),
        ("25006", StoreUnavailable),
        ("40P01", StoreUnavailable),
        ("42501", SchemaError),
        ("53100", StoreUnavailable),
        ("57014", StoreTooSlow),
        ("58030", StoreUnavailable),
        ("XX001", StoreUnavailable),
    ],
)
def test_postgres_whose_fault_an_error_is(state: str, expected: type[Exception]) -> None:
    pytest.importorskip("psycopg")
    from psycopg import errors

    from mnemobus.store.postgres import PostgresWriter

    writer = PostgresWriter(settings("postgresql://h/db"))
    assert type(writer._server.error(errors.lookup(state)("words"))) is expected


async def test_postgres_passwords_are_not_shown(postgres_url: str) -> None:
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    writer = store.open_writer(settings(f"postgresql://me:s3cret@127.0.0.1:{port}/db"))
    with pytest.raises(StoreUnavailable, match=rf"PostgreSQL 127\.0\.0\.1:{port}/db: .*refused") as caught:
        writer.open()
    assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"
    writer.close()
    missing = urlunsplit(urlsplit(postgres_url)._replace(path="/not_there"))
    with pytest.raises(StoreUnavailable, match='database "not_there" does not exist'), opened(missing):
        pass


def test_postgres_in_another_encoding(postgres_url: str) -> None:
    name = f"latin_{uuid.uuid4().hex}"
    sql(postgres_url, f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
        with pytest.raises(SchemaError, match="has the encoding LATIN1"), opened(url):
            pass
    finally:
        sql(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


# Large rooms


def finish_deletion(writer: Writer, deletion: Deletion, rows: int) -> int:
    """In steps of so many rows; how many steps."""
    place: Cursor | None = BEGINNING
    for steps in range(1, 1_000):
        assert place is not None
        place = writer.clear(deletion, place, rows)
        if place is None:
            return steps
    raise AssertionError("it never ends")


def named_by(writer: Writer, deletion: Deletion) -> list[tuple[str, Dimensions]]:
    return [each for some in writer.ended(deletion) for each in some]


@pytest.fixture
def large(writer: Writer) -> list[str]:
    """The ids of a room's memories, more than a step deletes; one is another agent's, and one waits for its put."""
    ids = [new_id() for _ in range(STEP + 300)]
    writer.apply([put(id, n, created_us=n // 7, embedding=b"\0" * 4) for n, id in enumerate(ids[:-2], 1)])
    writer.apply(
        [put(ids[-2], 5, dimensions=Dimensions("messages", "r1", "a")), update(ids[-1], 6, content=b"{}")]
    )
    return ids


async def test_a_large_room_is_deleted_in_steps(
    writer: Writer, reader: Reader, url: str, large: list[str]
) -> None:
    # When a room is deleted that has more memories than fit into one step
    applied = writer.apply([delete_room(9_000)])
    # Then not all is done at once
    [deletion] = applied.unfinished
    assert applied.cleared == []
    left = sql(url, "SELECT count(*) FROM memories WHERE live")[0][0]
    assert 0 < left < len(large)
    # But a query for the room, or for one of its memories, does not find it any more
    assert await reader.recent(Query("messages", room="r1"), 10) == []
    assert await reader.count(Query("messages", room="r1")) == 0
    assert [row for id in large[::100] if (row := await reader.get(id))] == []
    # And each further step deletes no more than it was told to
    place: Cursor | None = BEGINNING
    while place is not None:
        place = writer.clear(deletion, place, 40)
        before, left = left, sql(url, "SELECT count(*) FROM memories WHERE live")[0][0]
        assert before - left <= 40
    # Then all of it is gone, and is named
    assert sql(url, "SELECT count(*) FROM memories WHERE live OR pending OR content IS NOT NULL") == [(0,)]
    ended = named_by(writer, deletion)
    assert sorted(id for id, _ in ended) == sorted(large)
    assert {dimensions for _, dimensions in ended} == {DIMENSIONS, Dimensions("messages", "r1", "a")}


async def test_g3_what_comes_while_a_room_is_deleted(
    writer: Writer, reader: Reader, large: list[str]
) -> None:
    [deletion] = writer.apply([delete_room(9_000)]).unfinished
    # Given that half of a room is deleted, when older and newer writes come
    late, new = new_id(), new_id()
    writer.apply([put(late, 8_000, created_us=-5), put(new, 9_001, created_us=-5)])
    writer.apply([put(large[-3], 9_002), put(large[0], 9_003), update(large[-4], 9_004, metadata=b'{"k":1}')])
    there = {new, large[-3], large[0]}
    assert {row.id for row in await reader.recent(Query("messages", room="r1"), 99)} == there
    assert await reader.count(Query("messages", room="r1")) == 3
    # Then what is newer stays, and nothing else
    finish_deletion(writer, deletion, 100)
    assert {row.id for row in await reader.recent(Query("messages", room="r1"), 99)} == there
    assert {id for id in (late, new, *large) if await reader.get(id)} == there


async def test_g1_a_deletion_that_was_broken_off_is_done_by_another(
    writer: Writer, url: str, reader: Reader, large: list[str]
) -> None:
    # Given a worker that dies in the midst of a deletion, after some steps of which nobody was told
    [deletion] = writer.apply([delete_room(9_000)]).unfinished
    writer.clear(deletion, BEGINNING, 10)
    with opened(url) as other:
        # When another is given the same event
        applied = other.apply([delete_room(9_000)])
        finish_deletion(other, deletion, 200)
        # Then it names all
        assert sorted(id for id, _ in named_by(other, deletion)) == sorted(large)
        # And so it does when it is given it once more, though it has nothing to do any more
        assert other.apply([delete_room(9_000)]).unfinished == applied.unfinished == [deletion]
        assert finish_deletion(other, deletion, STEP) == 1
        assert len(named_by(other, deletion)) == len(large)


def test_two_workers_at_the_same_deletion(writer: Writer, url: str, large: list[str]) -> None:
    [deletion] = writer.apply([delete_room(9_000)]).unfinished
    with opened(url) as other, ThreadPoolExecutor(3) as threads:
        # Given two that are at it, and a third that writes into its rows
        both = [threads.submit(finish_deletion, each, deletion, 7) for each in (writer, other)]
        batches = [[put(id, 9_001 + n) for id in large[:-2][n::20]] for n in range(20)]
        writing = threads.submit(lambda: [other.apply(batch) for batch in batches])
        for each in (*both, writing):
            each.result(60)
    # Then what was put since is there
    assert sql(url, "SELECT count(*) FROM memories WHERE live") == [(len(large) - 2,)]


def test_nobody_waits_for_the_deletion_of_another_room(writer: Writer, url: str, large: list[str]) -> None:
    # Given a room whose deletion stops in the midst of a step: somebody else has one of its rows
    [deletion] = writer.apply([delete_room(9_000)]).unfinished
    if url.startswith("sqlite"):
        pytest.skip("one at a time writes; how long a step takes is bounded by its rows")
    import psycopg

    with psycopg.connect(url) as holder, opened(url) as other, ThreadPoolExecutor(1) as threads:
        holder.execute("SELECT 1 FROM mnemobus.memories WHERE live FOR UPDATE")
        deleting = threads.submit(finish_deletion, writer, deletion, STEP)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%chunk%'"
        )
        wait_until(lambda: sql(url, waiting)[0][0])
        # Then a batch that touches every slot of rooms goes through meanwhile, and so does another room's deletion
        rooms = [Dimensions("messages", f"room{n}") for n in range(200)]
        assert len(other.apply([put(new_id(), 1, dimensions=each) for each in rooms]).won) == 200
        assert len(other.apply([delete_room(2, room="room7")]).cleared) == 1
        assert not deleting.done()
        holder.rollback()
        deleting.result(30)


def test_many_rooms_deleted_in_one_batch(writer: Writer, url: str) -> None:
    rooms = [f"room{n}" for n in range(50)]
    writer.apply(
        [put(new_id(), 1, dimensions=Dimensions("messages", room)) for room in rooms for _ in range(3)]
    )
    applied = writer.apply([delete_room(9, room=room) for room in rooms])
    assert applied.unfinished == []
    assert len(applied.cleared) == 150
    assert sql(url, "SELECT count(*) FROM memories WHERE live") == [(0,)]


async def test_totals_of_a_large_table_are_an_estimate(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    from mnemobus.store.postgres import reader as postgres_reader

    with opened(postgres_url) as writer:
        content = b'{"text":"%s"}' % (b"x" * 500)
        for table, count in (("messages", 3_000), ("facts", 1_500), ("few", 3)):
            dimensions = Dimensions(table, "r")
            writer.apply([put(new_id(), n, content, dimensions=dimensions) for n in range(1, count + 1)])
        gone, dimensions = new_id(), Dimensions("gone", "r")
        writer.apply([put(gone, 1, dimensions=dimensions), delete(gone, 2, dimensions=dimensions)])
        reader = store.open_reader(settings(postgres_url))
        await reader.open()
        assert await reader.totals() == store.Totals({"facts": 1_500, "few": 3, "messages": 3_000})
        # Given a table that is too large to be counted, then a part of it is
        monkeypatch.setattr(postgres_reader, "_COUNTED_PAGES", 100)
        monkeypatch.setattr(postgres_reader, "_SAMPLED_PAGES", 100)
        monkeypatch.setattr(postgres_reader, "_COUNTED_ROWS", 50)
        totals = await reader.totals()
        assert not totals.exact
        assert totals.tables.keys() == {"facts", "few", "messages"}
        assert totals.tables["few"] == 3
        assert 1_000 < totals.tables["messages"] < 9_000
        await reader.close()


def test_sqlite_errors_say_what_to_do(sqlite_url: str) -> None:
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with opened(sqlite_url) as writer:
        writer.apply([put(new_id(), n) for n in range(1, 400)])
    # Given a file whose pages are damaged
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    broken = store.open_writer(settings(sqlite_url))
    with pytest.raises(StoreUnavailable, match="put a backup in its place"):
        broken.open()
        broken.apply([put(new_id(), n) for n in range(1, 400)])
    # When it is as it was, then the same writer goes on
    path.write_bytes(whole)
    assert broken.apply([put(id := new_id(), 1)]).won == {id}
    broken.close()
