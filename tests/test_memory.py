"""Memories: what `write` refuses, by field; results are immutable; the encoding of results."""

from __future__ import annotations

import copy
import json
import math
import pickle
import uuid
from array import array
from collections import UserDict, UserList, deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemobus import InvalidMemory, Memory, MemoryTooLarge, Version
from mnemobus.keys import Dimensions
from mnemobus.memory import _Draft, new_id
from mnemobus.records import Row, encode, pack_memories, unpack_memories
from mnemobus.values import MAX_DEPTH, encode_object, from_micros, to_micros

MEGABYTE = 1 << 20


def memory(**changes: object) -> Memory:
    return Memory(**{"table": "messages", "room": "r1", "content": {"text": "hi"}, **changes})  # type: ignore[arg-type]


class Columns:
    """As a table of pandas: one can go through it, by the names of its columns."""

    columns = (0, 1)
    ndim = 2

    def __iter__(self) -> Iterator[int]:
        return iter(self.columns)


class Series:
    """As arrays and series of NumPy, pandas and PyTorch: no sequence, but they can be listed."""

    def __init__(self, *values: object, ndim: int = 1) -> None:
        self.values = list(values)
        self.ndim = ndim

    def __iter__(self) -> Iterator[object]:
        return iter(self.values)

    def tolist(self) -> object:
        return list(self.values) if self.ndim else self.values[0]


class NotATime(datetime):
    """As pandas has it: a datetime whose methods fail."""

    def utcoffset(self) -> None:
        raise ValueError("NaTType does not support utcoffset")


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "no-uuid"}, "id: 'no-uuid' is not a UUID"),
        ({"id": 7}, "id: 7 is not a UUID"),
        ({"table": "a:b"}, "table: 'a:b' is not 1 to 64 letters, digits, '_', '.' or '-'"),
        ({"table": ""}, "table: '' is not 1 to 64 letters, digits, '_', '.' or '-'"),
        ({"table": "a\n"}, "table: 'a\\n' is not 1 to 64 letters, digits, '_', '.' or '-'"),
        ({"room": ""}, "room: is empty"),
        ({"room": None}, "room: text is needed, not nothing"),
        ({"room": "a\0b"}, "room: contains a NUL character"),
        ({"room": "\ud800"}, "room: contains a lone surrogate, which UTF-8 can't encode"),
        ({"room": "x" * 513}, "room: 513 bytes, which is more than 512"),
        ({"agent": 3}, "agent: text is needed, not int"),
        ({"entity": ""}, "entity: is empty"),
        ({"world": b"w"}, "world: text is needed, not bytes"),
        ({"content": "text"}, "content: a JSON object is needed, not str"),
        ({"content": None}, "content: a JSON object is needed, not nothing"),
        ({"content": b'{"a":1}'}, "content: a JSON object is needed, not bytes"),
        ({"content": [1]}, "content: a JSON object is needed, not list"),
        ({"content": {"a": [1, math.nan]}}, "content.a[1]: nan is not a JSON number"),
        ({"content": {"a": math.inf}}, "content.a: inf is not a JSON number"),
        ({"content": {"a": datetime(2026, 1, 1, tzinfo=UTC)}}, "content.a: datetime is not a JSON value"),
        ({"content": {"a": uuid.uuid4()}}, "content.a: UUID is not a JSON value"),
        ({"content": {"a": {1: 2}}}, "content.a: key 1 is not text"),
        ({"content": {"a": 1 << 63}}, "content.a: an integer beyond 64 bits"),
        ({"content": nested(100)}, f"content: nests deeper than {MAX_DEPTH} levels"),
        ({"content": nested(5000)}, f"content: nests deeper than {MAX_DEPTH} levels"),
        ({"metadata": {"a": {1, 2}}}, "metadata.a: set is not a JSON value"),
        ({"metadata": "x"}, "metadata: a JSON object is needed, not str"),
        ({"embedding": [0.5, math.nan]}, "embedding[1]: nan is not a finite float32"),
        ({"embedding": [1e39]}, "embedding[0]: inf is not a finite float32"),
        ({"embedding": []}, "embedding: is empty; use None for no embedding"),
        ({"embedding": ["a"]}, "embedding: holds something that is not a number"),
        ({"embedding": "abc"}, "embedding: a sequence of numbers is needed, not str"),
        ({"embedding": b"abcd"}, "embedding: a sequence of numbers is needed, not bytes"),
        ({"embedding": bytearray(b"abcd")}, "embedding: a sequence of numbers is needed, not bytearray"),
        ({"embedding": memoryview(b"abcd")}, "embedding: a sequence of numbers is needed, not memoryview"),
        ({"embedding": {0: 0.5}}, "embedding: a sequence of numbers is needed, not dict"),
        ({"embedding": {0.5, 0.25}}, "embedding: a sequence of numbers is needed, not set"),
        ({"embedding": {"a": 0.5}.keys()}, "embedding: a sequence of numbers is needed, not dict_keys"),
        ({"embedding": Columns()}, "embedding: a sequence of numbers is needed, not Columns"),
        ({"embedding": Series(0.5, 1, ndim=2)}, "embedding: a sequence of numbers is needed, not Series"),
        ({"embedding": Series(0.5, ndim=0)}, "embedding: a sequence of numbers is needed, not Series"),
        ({"embedding": 0.5}, "embedding: a sequence of numbers is needed, not float"),
        ({"embedding": True}, "embedding: a sequence of numbers is needed, not bool"),
        ({"embedding": [True, False]}, "embedding: holds something that is not a number"),
        ({"embedding": [[0.5, 0.5]]}, "embedding: holds something that is not a number"),
        ({"embedding": Series(0.5, None)}, "embedding: holds something that is not a number"),
        ({"embedding": [10**400]}, "embedding: holds something that is not a number"),
        ({"created_at": datetime(2026, 1, 1)}, "created_at: 2026-01-01T00:00:00 has no time zone"),
        (
            {"created_at": datetime.fromisoformat("0001-01-01T00:00:00+14:00")},
            "created_at: 0001-01-01T00:00:00+14:00 is not in the years 1 to 9999, UTC",
        ),
        ({"created_at": "2026-01-01"}, "created_at: a datetime is needed, not str"),
        ({"created_at": 17}, "created_at: a datetime is needed, not int"),
        ({"created_at": NotATime(1, 1, 1)}, "created_at: NotATime is not a moment in time"),
        ({"created_at": datetime(2026, 1, 1).date()}, "created_at: a datetime is needed, not date"),
        ({"created_at": [datetime(2026, 1, 1, tzinfo=UTC)]}, "created_at: a datetime is needed, not list"),
        ({"content": {"a": NotATime(1, 1, 1)}}, "content.a: NotATime is not a JSON value"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidMemory) as caught:
        encode(memory(**change), MEGABYTE)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "embedding",
    [
        [0.5, 2],
        (0.5, 2),
        array("d", [0.5, 2]),
        memoryview(array("f", [0.5, 2])),
        UserList([0.5, 2]),
        deque([0.5, 2]),
        (number for number in (0.5, 2)),
        map(float, ("0.5", "2")),
        Series(0.5, 2),
        [Fraction(1, 2), Decimal(2)],
    ],
    ids=lambda given: type(given).__name__,
)
def test_an_embedding_is_whatever_has_numbers_in_an_order(embedding: Any) -> None:
    given = memory(embedding=embedding)
    # As often as one looks, and writes
    for _ in range(2):
        assert given.embedding == (0.5, 2)
        assert encode(given, MEGABYTE).embedding == array("f", [0.5, 2]).tobytes()


def test_what_is_changed_afterwards_changes_no_memory() -> None:
    # Given a memory made of what can change
    embedding, numbers = [0.5, 2.0], array("f", [0.5, 2.0])
    inner = {"b": [1]}
    content, proxy, user = {"a": inner}, MappingProxyType(inner), UserDict(inner)
    memories = [
        memory(embedding=embedding, content=content),
        memory(embedding=numbers, content=UserDict(a=proxy)),
        memory(embedding=Series(0.5, 2.0), content={"a": user}),
    ]
    before = [encode(each, MEGABYTE) for each in memories]
    # If all of it is changed
    embedding[0] = numbers[0] = 9
    inner["b"].append(2)
    inner["c"] = user["c"] = content["d"] = 1  # type: ignore[assignment]
    # Then the memories are what they were, in memory and encoded
    for each, row in zip(memories, before, strict=True):
        assert (each.embedding, each.content) == ((0.5, 2.0), {"a": {"b": [1]}})
        assert encode(each, MEGABYTE) == row


def test_kinds_of_float_and_mapping_in_content_are_stored_as_what_they_are() -> None:
    class Float64(float):  # NumPy's is one, too
        pass

    found = encode(memory(content={"a": Float64(1.5), "b": [MappingProxyType({"c": Float64(2)})]}), MEGABYTE)
    assert orjson.loads(found.content) == {"a": 1.5, "b": [{"c": 2.0}]}
    # Also where they are not copied first
    assert orjson.loads(encode_object("content", {"b": [MappingProxyType({"c": 2})]})) == {"b": [{"c": 2}]}
    with pytest.raises(InvalidMemory, match=r"content\.a: nan is not a JSON number"):
        encode(memory(content={"a": Float64("nan")}), MEGABYTE)


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes()
    | st.dates()
    | st.uuids()
    | st.decimals()
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers())
        | st.tuples(inner)
    ),
    max_leaves=6,
)


@given(
    st.sampled_from(["id", "table", "room", "agent", "content", "metadata", "embedding", "created_at"]), ODD
)
def test_whatever_is_given_is_stored_or_refused_by_its_field(field: str, value: object) -> None:
    given = memory(**{field: value})
    try:
        row = encode(given, MEGABYTE)
    except InvalidMemory as error:
        assert error.field.partition(".")[0].partition("[")[0] in (field, "memory")
    else:
        if field == "id":  # may be spelled otherwise
            assert value is None or uuid.UUID(row.id) == uuid.UUID(str(value))
        else:
            assert row.memory() == given


def test_content_may_not_be_deeper_than_the_limit_but_as_deep() -> None:
    encode(memory(content=nested(MAX_DEPTH)), MEGABYTE)
    with pytest.raises(InvalidMemory, match="nests deeper"):
        encode(memory(content=nested(MAX_DEPTH + 1)), MEGABYTE)


def test_a_cycle_is_refused_like_any_depth() -> None:
    content: dict[str, object] = {}
    content["self"] = content
    with pytest.raises(InvalidMemory, match="nests deeper"):
        encode(memory(content=content), MEGABYTE)


def test_a_record_over_the_limit_is_refused_with_its_size() -> None:
    encode(memory(content={"text": "x" * 900}), 1000)
    with pytest.raises(
        MemoryTooLarge, match=r"memory: 1,\d+ bytes, which is more than max_memory_bytes \(1,000\)"
    ):
        encode(memory(content={"text": "x" * 1000}), 1000)
    with pytest.raises(MemoryTooLarge):
        encode(memory(embedding=[0.5] * 300), 1000)


def test_what_is_no_memory_is_refused() -> None:
    with pytest.raises(InvalidMemory, match="memory: a Memory is needed, not dict"):
        encode({"table": "messages"}, MEGABYTE)  # type: ignore[arg-type]


def test_an_id_is_made_where_none_is_given_and_spelled_one_way() -> None:
    first, second = new_id(), new_id()
    assert uuid.UUID(first).version == 7
    assert uuid.UUID(first).variant == uuid.RFC_4122
    assert first != second
    given_id = uuid.UUID(int=0xABCDEF)
    assert encode(memory(id=str(given_id).upper()), MEGABYTE).id == str(given_id)
    assert encode(memory(id=given_id), MEGABYTE).id == str(given_id)


def test_a_memory_is_immutable_all_the_way_down() -> None:
    # Given a memory, made from something that its maker still holds
    mutable: dict[str, object] = {"tags": ["a"], "who": {"name": "alice"}}
    m = memory(content=mutable)

    # When its maker changes that, or somebody tries to change the memory
    mutable["tags"] = []
    with pytest.raises(
        AttributeError, match=r"a memory is immutable: room can't be set; change it with bus.update"
    ):
        m.room = "r2"
    with pytest.raises(TypeError, match="a memory is immutable"):
        m.content["x"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        m.content["tags"].append("b")
    with pytest.raises(TypeError):
        m.content["who"].update(name="bob")
    with pytest.raises(TypeError):
        m.metadata.setdefault("a", 1)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        del m.room

    # Then the memory is what it was, and copies of its content can be changed
    assert m.content == {"tags": ["a"], "who": {"name": "alice"}}
    mine = copy.deepcopy(m.content)
    mine["who"]["name"] = "bob"  # type: ignore[index]
    assert m.content["who"]["name"] == "alice"
    assert type(copy.copy(m.content)) is dict
    assert json.loads(json.dumps(m.content)) == orjson.loads(orjson.dumps(m.content)) == m.content


def test_a_memory_survives_pickling_and_dicts() -> None:
    m = memory(agent="planner", embedding=[0.1, -2.5], metadata={"a": [1, None, {"b": True}]})
    assert pickle.loads(pickle.dumps(m)) == m
    assert hash(pickle.loads(pickle.dumps(m))) == hash(m)
    again = Memory.from_dict(json.loads(json.dumps(m.to_dict())))
    assert again == m
    assert again != memory()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "record: a JSON object is needed, not list"),
        ({"table": "t", "room": "r"}, "content: is missing"),
        ({"room": "r", "content": {}}, "table: is missing"),
        (
            {"table": "t", "room": "r", "content": {}, "colour": 1},
            "colour: unknown field; known are agent, content, ",
        ),
        (
            {"table": "t", "room": "r", "content": {}, "created_at": 5},
            "created_at: an ISO 8601 date is needed, not int",
        ),
        (
            {"table": "t", "room": "r", "content": {}, "created_at": "soon"},
            "created_at: 'soon' is not an ISO 8601 date",
        ),
    ],
)
def test_a_record_that_is_no_memory_is_named(record: object, message: str) -> None:
    with pytest.raises(InvalidMemory) as caught:
        Memory.from_dict(record)
    assert str(caught.value).startswith(message)


dates = st.datetimes(
    min_value=datetime(1, 1, 2),
    max_value=datetime(9999, 12, 30),
    timezones=st.just(timezone(timedelta(hours=5))),
)


@given(dates)
def test_dates_are_exact_to_the_microsecond(moment: datetime) -> None:
    assert from_micros(to_micros(moment)) == moment


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(st.text(), json_values, max_size=4)
names = st.text(min_size=1, max_size=20).filter(lambda s: "\0" not in s)


@given(
    content=objects,
    metadata=objects,
    embedding=st.none()
    | st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    room=names,
    entity=st.none() | names,
    created_at=dates,
)
def test_the_codec_gives_back_what_it_was_given(**fields: object) -> None:
    """Through `encode`, L2's packing and back: the same memory, bit by bit."""
    m = memory(**fields)
    row = encode(m, MEGABYTE)._replace(version=Version(2**64 - 1, 2**63 + 1))
    first, again = unpack_memories(pack_memories([row.memory(), row.memory()]))
    assert first == again and first.dimensions is again.dimensions
    assert again == m
    assert again.version == row.version
    assert again.embedding == (None if fields["embedding"] is None else tuple(fields["embedding"]))  # type: ignore[arg-type]
    # What was read can be written again, decoded or not.
    assert encode(again, MEGABYTE)[:10] == row[:10]


@pytest.mark.parametrize(
    "spoiled",
    [
        b"",
        b"[]",
        b"{}\n",
        b"[[],[]]\nx",
        b"\xff\n",
        b"[[1]]\n",
        b'[[["t","r",null,null,null]],[["i",0,3]]]\nabc',
        b'[[["t","r",null,null,null]],[["i",0,"3"]]]\nabc',
        b'[[["t","r",null,null,null]],[["i",0,32]]]\nabc',
        b'[[["t","r",null,null,null]],[["i",1,3]]]\nabc',
        b'[[["t","r"]],[["i",0,-3]]]\nabc',
    ],
)
def test_a_spoiled_result_is_a_value_error_and_nothing_else(spoiled: bytes) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        unpack_memories(spoiled) or unpack_memories(spoiled + b"?")


def test_what_a_memory_is_made_of_can_become_one() -> None:
    """`Memory._stored` changes the class of a draft, which Python allows while both are laid out alike."""
    assert Memory.__slots__ == () and Memory.__bases__ == (_Draft,), (
        "a Memory has attributes of its own: Memory._stored can't make one of a draft any more"
    )
    assert Memory.__basicsize__ == _Draft.__basicsize__
    made = Memory._stored("i", Dimensions("t", "r"), b"")
    assert type(made) is Memory and not hasattr(made, "__dict__")
    with pytest.raises(AttributeError, match="immutable"):
        made.id = "j"


def test_rows_without_anything_pack() -> None:
    assert unpack_memories(pack_memories([])) == []
    memory = Row("i", "t", "r", None, None, None, b"{}", b"{}", None, 0, Version(1, 2)).memory()
    assert unpack_memories(pack_memories([memory])) == [memory]
