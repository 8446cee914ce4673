"""A window equals the store's later answer, whichever part of its tail the store has merged already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemobus.keys import Dimensions, Version
from mnemobus.live.channel import Announced, Channel, Heard, decode_announced
from mnemobus.live.window import Window
from mnemobus.log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event
from mnemobus.memory import Memory
from mnemobus.records import Row
from mnemobus.store import Query

ROOM = Dimensions("messages", "r1")
IDS = [f"00000000-0000-7000-8000-00000000000{n}" for n in range(6)]


def put(id: str, at: int, version: int, text: str = "") -> Event:
    content = orjson.dumps({"text": text or f"{version}"})
    return Event(PUT, ROOM, id, content, b"{}", None, at, Version(version, 0))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([PUT, PUT, UPDATE, UPDATE, DELETE, DELETE_ROOM]),
        st.sampled_from(IDS),
        st.integers(0, 5),
    ),
    max_size=14,
)


def events_of(drawn: Sequence[tuple[str, str, int]]) -> list[Event]:
    events = []
    for n, (op, id, at) in enumerate(drawn, 1):
        if op == PUT:
            events.append(put(id, at, n))
        elif op == UPDATE:
            content = orjson.dumps({"text": f"update {n}"}) if at % 2 else None
            metadata = None if content and at % 3 else orjson.dumps({"n": n})
            events.append(Event(op, ROOM, id, content, metadata, None, version=Version(n, 0)))
        else:
            events.append(Event(op, ROOM, id if op == DELETE else "", version=Version(n, 0)))
    return events


def after(events: Sequence[Event]) -> list[Memory]:
    """What is there after these events, newest first: the merge of registers, spelled out."""
    rows: dict[str, dict[str, Any]] = {}
    room = -1
    for event in events:
        version = event.version.ms
        if event.op == DELETE_ROOM:
            room = max(room, version)
            continue
        row = rows.setdefault(
            event.id, {"put": -1, "at": 0, "deleted": -1, "content": (-1, b""), "metadata": (-1, b"")}
        )
        if event.op == DELETE:
            row["deleted"] = max(row["deleted"], version)
        if event.op == PUT and version > row["put"]:
            row["put"], row["at"] = version, event.created_us
        for field in ("content", "metadata"):
            value = getattr(event, field)
            if event.op in (PUT, UPDATE) and value is not None:
                row[field] = max(row[field], (version, value))
    found = [
        Row(
            id, *ROOM, row["content"][1], row["metadata"][1], None, row["at"],
            Version(max(row["put"], row["content"][0], row["metadata"][0]), 0),
        ).memory()
        for id, row in rows.items()
        if row["put"] > max(row["deleted"], room)
    ]  # fmt: skip
    return sorted(found, key=lambda memory: (memory.created_at, memory.id), reverse=True)


def shown(memories: Sequence[Memory]) -> list[tuple[Any, ...]]:
    return [(m.id, m.version, m.content["text"], m.metadata, m.created_at) for m in memories]


@given(EVENTS, st.data())
@settings(max_examples=200, deadline=None)
def test_g9_base_and_tail_together_are_the_scope_as_the_log_has_it(
    drawn: list[tuple[str, str, int]], data: st.DataObject
) -> None:
    events = events_of(drawn)
    # Given an applied mark, and a base that has all up to it and any of what follows
    mark = data.draw(st.integers(0, len(events)))
    some = [event for event in events[mark:] if data.draw(st.booleans())]
    base = after([*events[:mark], *some])
    capacity = data.draw(st.integers(1, 4))
    # When a window is made of the base and the whole tail
    window = Window(base[:capacity], len(base) <= capacity, capacity, 1 << 20)
    window.merge(events[mark:])
    # Then it has what the log has, as far as it says that it knows
    truth = after(events)
    for limit in range(1, capacity + 1):
        answer = window.newest(Query("messages", "r1"), limit)
        if answer is not None:
            assert shown(answer) == shown(truth[:limit])
    if window.complete:
        assert window.count(Query("messages", "r1")) == len(truth)
    assert window.bytes == sum(len(row._record or b"") for row in window.rows)


@given(EVENTS, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_g9_a_window_that_takes_events_one_by_one_never_shows_what_the_log_has_not(
    drawn: list[tuple[str, str, int]], capacity: int
) -> None:
    events = events_of(drawn)
    window = Window([], True, capacity, 1 << 20)
    for n, event in enumerate(events, 1):
        window.take(event)
        truth = after(events[:n])
        for limit in range(1, capacity + 1):
            answer = window.newest(Query("messages", "r1"), limit)
            assert answer is None or shown(answer) == shown(truth[:limit])


def test_g9_what_is_older_than_all_that_a_window_knows_does_not_enter_it() -> None:
    # Given a window of the two newest of three
    window = Window([], True, 2, 1 << 20)
    for n in range(1, 4):
        window.take(put(IDS[n], n, n))
    # If one of the two goes, and something older comes
    window.take(Event(DELETE, ROOM, IDS[3], version=Version(4, 0)))
    window.take(put(IDS[0], 0, 5))
    # Then the window does not take it for the next: there is another between them
    assert window.newest(Query("messages", "r1"), 2) is None
    assert [m.id for m in window.newest(Query("messages", "r1"), 1) or ()] == [IDS[2]]


def test_a_window_is_bounded_in_bytes_and_is_not_complete_then() -> None:
    window = Window([], True, 64, 2_000)
    for n in range(10):
        window.take(put(IDS[0][:-2] + f"{n:02}", n, n + 1, "x" * 400))
    assert window.bytes <= 2_000
    assert not window.complete
    assert window.newest(Query("messages", "r1"), 10) is None
    assert [m.version for m in window.newest(Query("messages", "r1"), 2) or ()] == [
        Version(10, 0),
        Version(9, 0),
    ]


def test_g9_a_memory_that_was_made_again_in_another_room_is_not_taken_for_the_one_before() -> None:
    # Given a scope over several log partitions, and a memory that was deleted in one and made again in another
    window = Window([], True, 8, 1 << 20)
    before, room = put(IDS[0], 1, 1), Dimensions("messages", "r2")
    after = before._replace(dimensions=room, version=Version(3, 0))
    # If the events of the second come first, then those of the first that are late do nothing to it
    for event in (after, before, Event(DELETE, ROOM, IDS[0], version=Version(2, 0))):
        window.take(event)
    assert [row.dimensions for row in window.rows] == [room]
    window.take(Event(DELETE_ROOM, ROOM, "", version=Version(4, 0)))
    window.take(Event(UPDATE, ROOM, IDS[0], orjson.dumps({"text": "late"}), version=Version(5, 0)))
    assert [row.version for row in window.rows] == [Version(3, 0)]


def announced(version: int, previous: int, event: Event | None) -> Announced:
    return Announced(Version(version, 0), Version(previous, 0), "e", event)


def test_g9_a_channel_takes_what_follows_and_nothing_else() -> None:
    taken: list[int] = []
    channel = Channel(0, 7, b"c", lambda _, event: taken.append(event.version.ms))
    # Given messages that come before the position is known
    assert channel.hear(announced(1, 0, put(IDS[0], 1, 1))) is Heard.EARLY
    assert channel.hear(announced(2, 1, put(IDS[0], 1, 2))) is Heard.EARLY
    # When it is known, then they go through in order
    assert channel.place(Version(1, 0))
    assert taken == [2]
    # A repeated one is known, a later one is a gap, and the position stays
    assert channel.hear(announced(2, 1, put(IDS[0], 1, 2))) is Heard.KNOWN
    assert channel.hear(announced(4, 3, put(IDS[0], 1, 4))) is Heard.GAP
    assert channel.position == Version(2, 0)
    # One that follows without its event has to be fetched
    assert channel.hear(announced(3, 2, None)) is Heard.GAP
    channel.move(put(IDS[0], 1, 3), Version(3, 0))
    assert channel.hear(announced(4, 3, put(IDS[0], 1, 4))) is Heard.TAKEN
    assert taken == [2, 3, 4]


def test_g6_an_own_write_is_taken_where_it_follows_and_else_remembered() -> None:
    taken: list[int] = []
    channel = Channel(0, 7, b"c", lambda _, event: taken.append(event.version.ms))
    channel.place(Version(1, 0))
    assert channel.answered(put(IDS[0], 1, 2), Version(2, 0), Version(1, 0))
    assert taken == [2]
    assert channel.due is None
    # One that another's write came before waits for that
    assert not channel.answered(put(IDS[0], 1, 4), Version(4, 0), Version(3, 0))
    assert channel.due == Version(4, 0)
    channel.hear(announced(3, 2, put(IDS[0], 1, 3)))
    channel.hear(announced(4, 3, put(IDS[0], 1, 4)))
    assert channel.due is None
    assert taken == [2, 3, 4]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1-0",
        b"1-0 0-0 e 2,3\nabcd",
        b"1-0 0-0 e 2,x\nabcde",
        b"1-0 x e \n",
        b"1-0 0-0 e 2\nop",
        b"1-0 0-0 e 2,3\nopput",
    ],
)
def test_a_message_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_announced(data)


def test_what_a_channel_carries_is_decoded() -> None:
    event = put(IDS[0], 1, 5, "soup")
    fields = event.fields()
    sizes = ",".join(str(len(field)) for field in fields).encode()
    message = decode_announced(b"5-0 4-0 epoch " + sizes + b"\n" + b"".join(fields))
    assert message == Announced(Version(5, 0), Version(4, 0), "epoch", event)
    assert decode_announced(b"5-0 4-0 epoch \n").event is None
