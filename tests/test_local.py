"""L1 alone: late fills, freshness, bounds, and what eviction keeps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemobus.cache.l1 import MISS, OVERHEAD, LocalCache, clock


def cache(entries: int = 1000, size: int = 1 << 30) -> LocalCache:
    local = LocalCache(entries, size)
    local.fresh_until = clock() + 60
    return local


def test_g4_a_late_fill_lands_where_nobody_sees_it() -> None:
    # Given a read that has taken its bucket and is still on its way
    local = cache()
    bucket = local.open("room:t:r", 0, 60)

    # When the scope is invalidated before the read comes back
    local.drop("room:t:r")
    local.put(bucket, "q", "old", 10)

    # Then no later read finds what it brought
    assert local.hit("room:t:r", "q") is MISS
    assert local.open("room:t:r", 0, 60).results == {}
    assert local.entries == local.bytes == 0


def test_g5_nothing_is_served_once_it_is_no_longer_fresh() -> None:
    local = cache()
    local.put(local.open("id:1", 0, 60), "q", "value", 10)
    assert local.hit("1", "q") == "value"
    local.fresh_until = clock()
    assert local.hit("1", "q") is MISS
    assert local.last_known("id:1", "q") == "value"


def test_nothing_is_served_beyond_its_time_to_live() -> None:
    local = cache()
    local.put(local.open("id:1", 0, 0.0), "q", "value", 10)
    assert local.hit("1", "q") is MISS
    # and its bucket is not used again
    assert local.open("id:1", 0, 60).results == {}
    assert local.entries == 0


def test_g7_what_has_expired_stays_the_last_known_copy_while_nothing_can_be_verified() -> None:
    # Given a copy whose time to live ends while the bus can't vouch for anything
    local = cache()
    bucket = local.open("id:1", 0, -1)
    local.put(bucket, "q", "value", 10)
    local.fresh_until = clock()
    # Then a read that finds no other answer finds this one, however often
    for _ in range(2):
        assert local.open("id:1", 0, 60) is bucket
        assert local.last_known("id:1", "q") == "value"
    # And once the bus is in step again, it is not served
    local.fresh_until = clock() + 60
    assert local.hit("1", "q") is MISS
    assert local.open("id:1", 0, 60) is not bucket


def test_none_is_a_result_like_any_other() -> None:
    local = cache()
    local.put(local.open("id:1", 0, 60), "q", None, 0)
    assert local.hit("1", "q") is None


def test_what_is_hit_outlives_what_is_not() -> None:
    """SIEVE: one hit since the hand last passed spares a bucket."""
    local = cache(entries=10)
    for n in range(10):
        local.put(local.open(f"id:{n}", 0, 60), "q", n, 10)
    for n in (0, 3, 7):
        local.hit(f"{n}", "q")
    for n in range(10, 17):
        local.put(local.open(f"id:{n}", 0, 60), "q", n, 10)
    kept = {n for n in range(17) if local.hit(f"{n}", "q") is not MISS}
    assert {0, 3, 7} <= kept
    assert len(kept) == local.entries == 10
    assert local.evictions == 7


def test_bytes_are_bounded_and_one_that_is_too_large_is_not_kept() -> None:
    local = cache(size=10 * (OVERHEAD + 128))
    for n in range(30):
        local.put(local.open(f"id:{n}", 0, 60), "q", n, 128)
        assert local.bytes <= 10 * (OVERHEAD + 128)
    local.put(local.open("id:huge", 0, 60), "q", "huge", 10 * (OVERHEAD + 128))
    assert local.hit("huge", "q") is MISS
    assert local.entries == 10


def test_a_cache_of_no_entries_keeps_nothing() -> None:
    local = cache(entries=0)
    local.put(local.open("id:1", 0, 60), "q", 1, 10)
    assert local.hit("1", "q") is MISS


def test_a_partition_is_dropped_as_a_whole_and_alone() -> None:
    local = cache()
    dropped: list[str] = []
    local.on_drop = dropped.append
    for n in range(6):
        local.put(local.open(f"id:{n}", n % 2, 60), "q", n, 10)
    local.drop_partition(1)
    assert [n for n in range(6) if local.hit(f"{n}", "q") is not MISS] == [0, 2, 4]
    assert sorted(dropped) == ["id:1", "id:3", "id:5"]
    assert local.holds(0)
    assert not local.holds(1)


steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "hit", "drop", "reput", "clear"]), st.integers(0, 12), st.integers(0, 3)
    ),
    max_size=80,
)


@given(steps, st.integers(1, 8))
def test_the_books_balance_whatever_happens(steps: list[tuple[str, int, int]], limit: int) -> None:
    """Counts and bytes are those of what is there, the bounds hold, and a hit never gives what was dropped."""
    local = cache(entries=limit)
    latest: dict[tuple[str, int], int] = {}
    serial = 0
    for step, n, query in steps:
        scope = f"room:t:{n}"
        if step in ("put", "reput"):
            serial += 1
            local.put(local.open(scope, n % 3, 60), query, serial, random.Random(serial).randrange(100))
            latest[scope, query] = serial
        elif step == "hit":
            found = local.hit(scope, query)
            assert found is MISS or found == latest[scope, query]
        elif step == "drop":
            local.drop(scope)
            latest = {key: value for key, value in latest.items() if key[0] != scope}
        elif n == 0:
            local.clear()
            latest.clear()
        assert local.entries == sum(local._buckets[s].count for s in local)
        assert local._units == sum(local._buckets[s].size for s in local)
        assert local.entries <= limit
        assert len(list(local)) <= limit
    for scope in list(local):
        local.drop(scope)
    assert local.entries == local.bytes == 0
    assert local._oldest is local._newest is local._hand is None


@pytest.mark.parametrize("size", [100, 10_000])
def test_dropping_a_scope_leaves_the_others(size: int) -> None:
    local = cache(entries=size)
    for n in range(size):
        local.put(local.open(f"id:{n}", n % 64, 60), "q", n, 10)
    assert local.drop(f"id:{size // 2}")
    assert not local.drop(f"id:{size // 2}")
    assert local.entries == size - 1
