"""Positions in the feed, without Redis: the effect of each message on them, in any order of messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemobus.feed.messages import Invalidation
from mnemobus.feed.positions import EARLY, Partition, Positions
from mnemobus.keys import Version


def at(n: int) -> Version:
    return Version(n, 0)


def message(n: int, previous: int | None = None) -> Invalidation:
    """The n-th message of a partition; it touches a scope of its own number."""
    return Invalidation(at(n), at(n - 1 if previous is None else previous), 0, (), (str(n),), {}, "")


class Heard:
    """Positions, and what they asked for."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.calls = 0
        self.lost = 0
        self.positions = Positions(self._drop, self._call, self._lose)
        self.partition = self.positions.join(3, b"feed:3")

    def _drop(self, partition: Partition, message: Invalidation) -> None:
        assert partition is self.partition
        self.dropped += message.scopes

    def _call(self) -> None:
        self.calls += 1

    def _lose(self, partition: Partition) -> None:
        self.lost += 1

    def placed(self, n: int) -> Heard:
        self.positions.place(self.partition, at(n))
        return self


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_a_message_that_follows_moves_the_position(heard: Heard) -> None:
    heard.placed(1).positions.receive(heard.partition, message(2))
    assert (heard.partition.position, heard.dropped, heard.calls) == (at(2), ["2"], 0)


def test_g5_a_gap_is_dropped_and_leaves_the_position_and_calls_the_heartbeat(heard: Heard) -> None:
    heard.placed(1).positions.receive(heard.partition, message(3))
    assert (heard.partition.position, heard.dropped, heard.calls) == (at(1), ["3"], 1)
    assert heard.positions.gaps == 1
    assert heard.partition.behind(at(3))


def test_what_was_heard_before_does_nothing(heard: Heard) -> None:
    for n in (1, 2):
        heard.placed(2).positions.receive(heard.partition, message(n))
    assert (heard.partition.position, heard.dropped, heard.calls) == (at(2), [], 0)


def test_g5_what_comes_while_the_position_is_sought_is_dropped_at_once_and_gone_through_later(
    heard: Heard,
) -> None:
    # Given a partition that was just joined, and three messages
    for n in (4, 5, 6):
        heard.positions.receive(heard.partition, message(n))
    assert heard.dropped == ["4", "5", "6"]
    assert not heard.partition.ready.is_set()
    # If the head turns out to be that before the last two
    heard.placed(4)
    # Then they count from there
    assert heard.partition.position == at(6)
    assert heard.partition.ready.is_set()
    assert heard.calls == 0


def test_g5_what_is_not_kept_shows_as_a_gap(heard: Heard) -> None:
    for n in range(1, EARLY + 2):
        heard.positions.receive(heard.partition, message(n))
    heard.placed(0)
    assert heard.partition.position == at(EARLY)
    heard.positions.receive(heard.partition, message(EARLY + 2))
    assert heard.calls == 1


def test_g5_what_comes_during_a_replay_waits_for_its_end(heard: Heard) -> None:
    # Given a replay from 1 on
    heard.placed(1)
    position = heard.positions.hold(heard.partition)
    # If a message comes meanwhile, and the stream has what is before it
    heard.positions.receive(heard.partition, message(4))
    for n in (2, 3):
        position = heard.positions.replayed(heard.partition, position, message(n))
    heard.positions.place(heard.partition, position)
    # Then nothing is missing
    assert (heard.partition.position, heard.lost, heard.calls) == (at(4), 0, 0)
    assert set(heard.dropped) == {"2", "3", "4"}


def test_g5_a_stream_that_does_not_reach_back_loses_the_partition(heard: Heard) -> None:
    heard.placed(1)
    position = heard.positions.hold(heard.partition)
    assert heard.positions.replayed(heard.partition, position, message(9)) == at(9)
    assert (heard.lost, heard.positions.resets) == (1, 1)


def test_g5_a_head_before_the_position_loses_the_partition(heard: Heard) -> None:
    heard.placed(7).positions.reset(heard.partition, at(2))
    assert (heard.partition.position, heard.lost) == (at(2), 1)


def test_g5_a_new_epoch_forgets_every_position(heard: Heard) -> None:
    heard.positions.receive(heard.partition, message(5))
    heard.positions.forget()
    assert not heard.partition.ready.is_set()
    # What came before it is not gone through again
    heard.placed(1)
    assert (heard.partition.position, heard.calls) == (at(1), 0)


def test_a_partition_that_was_left_is_known_by_neither_name(heard: Heard) -> None:
    assert heard.positions.get(3) is heard.positions.of(b"feed:3") is heard.partition
    heard.positions.leave(heard.partition)
    assert heard.positions.get(3) is heard.positions.of(b"feed:3") is None
    assert len(heard.positions) == 0


@given(st.lists(st.integers(1, 12)), st.integers(0, 12))
def test_g5_a_position_is_never_beyond_what_was_heard(order: list[int], head: int) -> None:
    # Given twelve messages, of which some come in any order, some more than once, before and after a head is known
    heard = Heard()
    half = len(order) // 2
    for n in order[:half]:
        heard.positions.receive(heard.partition, message(n))
    heard.placed(head)
    for n in order[half:]:
        heard.positions.receive(heard.partition, message(n))
    # Then all up to the position was heard, and nothing that follows it directly after the head was known
    position = heard.partition.position
    assert position is not None
    assert {str(n) for n in range(head + 1, position.ms + 1)} <= set(heard.dropped)
    # And whatever is beyond it has called the heartbeat
    assert heard.calls or all(n <= position.ms for n in order[half:])
