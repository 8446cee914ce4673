"""Events: the codec of the log, and that nothing which is no event passes for one."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemobus import BadEvent, Version
from mnemobus.keys import Dimensions
from mnemobus.log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event, decode

ID = "0190a2b4-0000-7000-8000-000000000001"
V = Version(1_700_000_000_000, 5)


def test_the_old_name_of_the_module_still_works_and_warns() -> None:
    sys.modules.pop("mnemobus.events", None)
    with pytest.warns(DeprecationWarning, match="moved to mnemobus.log.events"):
        old = importlib.import_module("mnemobus.events")
    assert old.Event is Event


def wire(event: Event) -> list[bytes]:
    """The fields as Redis gives them back."""
    return [f if isinstance(f, bytes) else str(f).encode() for f in event.fields()]


names = st.text(min_size=1, max_size=10).filter(lambda s: "\0" not in s)
dimensions = st.builds(
    Dimensions,
    st.sampled_from(["messages", "facts"]),
    names,
    st.none() | names,
    st.none() | names,
    st.none() | names,
)
jsons = st.sampled_from([b"{}", b'{"a":"\\u0000"}', b'{"text":"hi","n":[1,2.5,null]}'])
vectors = st.binary(min_size=4, max_size=16).map(lambda b: b[: len(b) // 4 * 4])
events = st.one_of(
    st.builds(
        Event,
        st.just(PUT),
        dimensions,
        st.just(ID),
        jsons,
        jsons,
        st.none() | vectors,
        st.integers(-(10**15), 10**16),
        st.just(V),
    ),
    st.builds(
        Event,
        st.just(UPDATE),
        dimensions,
        st.just(ID),
        st.none() | jsons,
        st.none() | jsons,
        st.none() | st.just(b"") | vectors,
        st.just(0),
        st.just(V),
    ),
    st.builds(lambda d: Event(DELETE, d, ID, version=V), dimensions),
    st.builds(lambda t, r: Event(DELETE_ROOM, Dimensions(t, r), version=V), st.just("messages"), names),
)


@given(events)
def test_the_codec_gives_back_what_it_was_given(event: Event) -> None:
    assert decode(V, wire(event)) == event
    pairs = wire(event)
    assert decode(V, dict(zip(pairs[::2], pairs[1::2], strict=True))) == event


GOOD = wire(Event(PUT, Dimensions("messages", "r"), ID, b"{}", b"{}", None, 5))


def changed(**changes: bytes | None) -> list[bytes]:
    fields = dict(zip(GOOD[::2], GOOD[1::2], strict=True))
    for name, value in changes.items():
        fields.pop(name.encode(), None)
        if value is not None:
            fields[name.encode()] = value
    return [x for pair in fields.items() for x in pair]


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([], "the field 'op' is missing"),
        (changed(table=None), "the field 'table' is missing"),
        (changed(op=b"upsert"), "unknown op 'upsert': written by a newer mnemobus?"),
        (changed(shape=b"round"), "unknown field 'shape': written by a newer mnemobus?"),
        (changed(id=b"7"), "id: '7' is not a UUID"),
        (changed(id=None), "id: None is not a UUID"),
        (changed(room=b""), "room: is empty"),
        (changed(room=b"\xff"), "a name is not UTF-8: "),
        (changed(entity=b"a\0"), "entity: contains a NUL character"),
        (changed(content=None), "a put without content or metadata"),
        (changed(content=b"nonsense"), "content: not JSON: "),
        (changed(content=b"[1]"), "content: JSON, but no object"),
        (changed(metadata=b'{"a":' * 90 + b"1" + b"}" * 90), "metadata: nests deeper than 64 levels"),
        (changed(metadata=b'{"a":' * 1000 + b"1" + b"}" * 1000), "metadata: nests deeper than 64 levels"),
        (changed(at=b"soon"), "at: b'soon' is not a number of microseconds"),
        (changed(at=None), "at: b'' is not a number of microseconds"),
        (changed(at=b"9" * 30), "is not between the years 1 and 9999"),
        (changed(embedding=b"abc"), "embedding: 3 bytes are no whole number of float32"),
    ],
)
def test_what_is_no_event_is_named(pairs: Sequence[bytes], reason: str) -> None:
    with pytest.raises(BadEvent) as caught:
        decode(V, pairs)
    assert reason in str(caught.value).replace("None", "b''" if "at:" in reason else "None")


@given(st.lists(st.binary(max_size=20), max_size=12).filter(lambda x: len(x) % 2 == 0))
def test_any_bytes_at_all_are_an_event_or_a_bad_one(pairs: list[bytes]) -> None:
    """A bad event must never stop a partition: no other exception may come out."""
    with contextlib.suppress(BadEvent):
        decode(V, pairs)
