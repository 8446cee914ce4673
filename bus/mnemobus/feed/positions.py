"""The position of the bus in each partition of the feed. Nothing here does any I/O or reads a clock: callers do.

Each message has an ID and names the message before it. For every partition that it listens to, the bus knows its
*position*: the ID up to which everything is applied here.

Invariant: a bucket is in use only in a partition whose position is known, and every invalidation of it that is not
yet applied here lies after that position. So messages may come in any order, or not at all, as long as the heartbeat
reads the stream from the position on.

::

              join                            place(head)
    (none) ─────────► SEEKING ──────────────────────────────────────────► PLACED ───┐ a message that follows:
       ▲              no position;                                          │  ▲    │ drop what it names; the
       │              messages are applied, and kept in `early`             │  └────┘ position moves to it
       │                 ▲  ▲  │                                            │
       │                 │  │  └─ forget: a new epoch; position and         │ a message at or before the position:
       │ leave           │  │     `early` are gone                          │ nothing, it was applied before
       │ (no bucket)     │  │                                               │
       └─────────────────┼──┼───────────────────────────────────────────────┤ any other: a gap. What it names is
                         │  │                                               │ dropped, the position stays, on_gap
                         │  └── hold: the stream is being replayed  ◄───────┤
                         └───── reset: the stream does not reach    ◄───────┘
                                back; on_lost, then place(head)

`place` applies the same rules to the messages in `early`. So a message that came while the position was unknown is not
missed, and one that was not kept (`EARLY`) shows as a gap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..keys import Version
from .messages import Invalidation

HEAD_GRACE = (0.002, 0.005, 0.010)
"""If a head is ahead of its position for this many seconds, pub/sub counts as having lost a message."""
EARLY = 4_096
"""Most messages of a partition that are kept until its position is known."""


@dataclass(slots=True)
class Partition:
    """What the bus knows about one feed partition that it listens to.

    confirmed  whether Redis has confirmed the subscription on the present connection
    ready      set while the position is known
    """

    number: int
    channel: bytes
    position: Version | None = None
    """None while the position is unknown; messages wait in `early` then."""
    early: list[Invalidation] = field(default_factory=list)
    confirmed: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    idle_since: float | None = None

    def behind(self, head: Version) -> bool:
        """Whether the stream has messages after the position."""
        return self.position is not None and self.position < head


class Positions:
    """The partitions that one bus listens to.

    on_message  called with a partition and a message: its scopes have to be dropped. May be called twice for a message.
    on_gap      called if a message was missed: a heartbeat has to fetch it
    on_lost     called with a partition whose missed messages can't be fetched: all of it has to be dropped
    """

    def __init__(
        self,
        on_message: Callable[[Partition, Invalidation], None],
        on_gap: Callable[[], None],
        on_lost: Callable[[Partition], None],
    ) -> None:
        self._on_message = on_message
        self._on_gap = on_gap
        self._on_lost = on_lost
        self._partitions: dict[int, Partition] = {}
        self._by_channel: dict[bytes, Partition] = {}
        self.gaps = 0
        self.resets = 0

    def __len__(self) -> int:
        return len(self._partitions)

    def __iter__(self) -> Iterator[Partition]:
        return iter(list(self._partitions.values()))

    def get(self, number: int) -> Partition | None:
        return self._partitions.get(number)

    def of(self, channel: bytes) -> Partition | None:
        """The partition that has this channel."""
        return self._by_channel.get(channel)

    def join(self, number: int, channel: bytes) -> Partition:
        partition = self._partitions[number] = self._by_channel[channel] = Partition(number, channel)
        return partition

    def leave(self, partition: Partition) -> None:
        del self._partitions[partition.number]
        del self._by_channel[partition.channel]

    def place(self, partition: Partition, position: Version) -> None:
        """Give a partition its position, and apply the messages that came before it was known."""
        partition.position = position
        early, partition.early = partition.early, []
        for message in early:
            self.receive(partition, message)
        partition.ready.set()

    def receive(self, partition: Partition, message: Invalidation) -> None:
        """A message came; the order does not matter."""
        position = partition.position
        if position is None:
            if len(partition.early) < EARLY:  # a message that is not kept shows as a gap
                partition.early.append(message)
            self._on_message(partition, message)  # a replay may be under way; it is safe to drop too much
            return
        if message.id <= position:
            return
        self._on_message(partition, message)
        if message.previous == position:
            partition.position = message.id
            return
        self.gaps += 1
        self._on_gap()

    def hold(self, partition: Partition) -> Version:
        """The stream will be replayed from the position, which is returned; messages wait until `place`."""
        position = partition.position
        assert position is not None, "a partition is replayed from its position on"
        partition.position = None
        return position

    def replayed(self, partition: Partition, position: Version, message: Invalidation) -> Version:
        """Apply the stream's next message after a position; return the new position."""
        if message.previous != position:  # the stream no longer reaches back
            self.resets += 1
            self._on_lost(partition)
        self._on_message(partition, message)
        return message.id

    def lose(self, partition: Partition) -> None:
        """The stream of a partition has an invalid entry."""
        self._on_lost(partition)

    def reset(self, partition: Partition, head: Version) -> None:
        """Drop all of a partition, because what happened between its position and the head is unknown."""
        self.resets += 1
        self._on_lost(partition)
        partition.position = None
        self.place(partition, head)

    def forget(self) -> None:
        """A new epoch began: no position is valid any more."""
        for partition in self:
            partition.position = None
            partition.early.clear()
            partition.ready.clear()
