"""Versions, scopes and partitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemobus.keys import Dimensions, Keyspace, Version, entity_scope, partition_of, room_scope

words = st.integers(0, 2**64 - 1)
versions = st.builds(Version, words, words)


@given(versions, versions)
def test_g2_versions_compare_numerically_however_they_are_kept(a: Version, b: Version) -> None:
    # Given two versions, whatever the width of their numbers
    # Then text, bytes and tuples agree about which is the later
    assert (a < b) == ((a.ms, a.seq) < (b.ms, b.seq))
    assert (a.pack() < b.pack()) == (a < b)
    assert Version.parse(str(a)) == Version.unpack(a.pack()) == Version.parse(str(a).encode()) == a
    assert a.pack() > b""


@pytest.mark.parametrize(
    "text",
    ["", "1", "-", "1-", "-1", "1-2-3", "a-1", "1-b", "-1-1", "1.5-0", " 1-1", "²-1", f"{2**64}-0", "1-+1"],
)
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="version"):
        Version.parse(text)


tables = st.from_regex(r"[A-Za-z0-9_.\-]{1,8}", fullmatch=True)
names = st.text(alphabet=":ab|", min_size=1, max_size=8)


@given(tables, names, tables, names)
def test_two_rooms_never_share_a_scope(table: str, room: str, other_table: str, other_room: str) -> None:
    """A table has no colon, so that no room's name can be mistaken for another table's."""
    same = (table, room) == (other_table, other_room)
    assert (room_scope(table, room) == room_scope(other_table, other_room)) == same
    assert room_scope(table, room) != entity_scope(other_table, other_room)


def test_a_write_touches_at_most_five_scopes() -> None:
    assert Dimensions("t", "r").scopes("i") == ["id:i", "room:t:r"]
    everything = Dimensions("t", "r", "a", "e", "w").scopes("i")
    assert sorted(everything) == ["agent:t:a", "entity:t:e", "id:i", "room:t:r", "world:t:w"]


@given(st.text(), st.integers(1, 4096))
def test_a_partition_is_in_range_and_always_the_same(name: str, partitions: int) -> None:
    assert 0 <= partition_of(name, partitions) < partitions
    assert partition_of(name, partitions) == partition_of(name, partitions)


def test_partitions_are_those_that_every_other_process_computes() -> None:
    """CRC-32 modulo the count; another hash would split a running bus in two."""
    keys = Keyspace("p", 4, 64)
    assert [keys.log_partition(room) for room in ("r1", "r2", "kitchen")] == [
        partition_of(r, 4) for r in ("r1", "r2", "kitchen")
    ]
    assert partition_of("123456789", 2**32) == 0xCBF43926  # the check value of CRC-32


def test_all_keys_of_a_partition_share_their_hash_tag() -> None:
    keys = Keyspace("p", 4, 64)
    scope = "room:t:r{x}"
    f = keys.feed_partition(scope)
    tags = {key[key.index("{") + 1 : key.index("}")] for key in (keys.feed(f), keys.bucket("e", scope))}
    assert tags == {f"p:f{f}"}
    tags = {
        key[key.index("{") + 1 : key.index("}")]
        for key in (keys.log(2), keys.producers(2), keys.meter(2), keys.dead(2), keys.reasons(2))
    }
    assert tags == {"p:l2"}
