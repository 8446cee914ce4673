"""Channels of the log: which events a listener has heard, and whether it has heard all of them.

A *slot* is a log partition and one of SLOTS numbers, the hash of a room, or of an entity, agent or world. As it logs an
event, `publish.lua` announces it on the channels of the slots that it touches, and keeps the version of each slot's
last event, its *head*. A message names the event before it in its slot. So the position of a channel, the last event
that was taken in here, tells what is missing:

    position unknown ──(subscribed, then the head)──► known
        messages wait                                  │ the message follows the position: take it in, move on
                                                       │ at or before the position: known already
                                                       │ anything else: a gap; the position stays, repair is called
                                                       ▼
    known ──(repair: the log from the position on, up to the head)──► known
    known ──(the log no longer reaches back)──► at the head; the windows are dropped
    known ──(a new epoch)──► unknown; the windows are dropped

This module has no I/O.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

from ..keys import Version
from ..log.events import Event, decode

EARLY_EVENTS = 1_000
"""Messages that wait for a position at most; beyond them the position is found by repair."""


class Announced(NamedTuple):
    """One message of a channel.

    event  None if it was too large for the message: the log has it
    """

    version: Version
    previous: Version
    epoch: str
    event: Event | None


def decode_announced(data: bytes) -> Announced:
    """Decode a message of a live channel: ``<version> <previous> <epoch> <sizes>\\n<fields>``.

    The fields follow each other without separators. Sizes are the lengths of the entry's field names and values,
    separated by commas; they are empty if the event is not in the message. ValueError if the message has another
    form; BadEvent, a ValueError, if the entry is not an event.
    """
    head, separator, body = data.partition(b"\n")
    parts = head.split(b" ")
    if not separator or len(parts) != 4:
        raise ValueError("not of the form <version> <previous> <epoch> <sizes> and a body")
    version = Version.parse(parts[0])
    event = decode(version, _cut(parts[3], body)) if parts[3] else None
    return Announced(version, Version.parse(parts[1]), parts[2].decode(), event)


def _cut(sizes: bytes, body: bytes) -> Sequence[bytes]:
    fields, at = [], 0
    for size in map(int, sizes.split(b",")):
        fields.append(body[at : at + size])
        at += size
    if at != len(body) or len(fields) % 2:
        raise ValueError("the body is not as long as its sizes say")
    return fields


class Heard(Enum):
    """What `Channel.hear` did with a message."""

    TAKEN = "taken"
    KNOWN = "known"
    EARLY = "early"
    GAP = "gap"


class Channel:
    """One slot that a listener listens to. It calls ``take`` with each event, in the order of the log."""

    __slots__ = (
        "_early",
        "_take",
        "confirmed",
        "due",
        "name",
        "number",
        "partition",
        "position",
        "ready",
        "unused_since",
    )

    def __init__(
        self, partition: int, number: int, name: bytes, take: Callable[[Channel, Event], None]
    ) -> None:
        self.partition = partition
        self.number = number
        self.name = name
        self._take = take
        self.position: Version | None = None
        self.confirmed = False
        """Whether Redis has confirmed the subscription."""
        self.due: Version | None = None
        """The last version beyond the position that is known to be in the log: of an own write, or named by the feed.
        Windows may not be served until the position has reached it, or has reached the head."""
        self.ready = asyncio.Event()
        self.unused_since: float | None = None
        self._early: list[Announced] = []

    def hear(self, message: Announced) -> Heard:
        """A message arrives."""
        if self.position is None:
            if len(self._early) < EARLY_EVENTS:
                self._early.append(message)
            return Heard.EARLY
        if message.version <= self.position:
            return Heard.KNOWN
        if message.previous != self.position or message.event is None:
            return Heard.GAP
        self.move(message.event, message.version)
        return Heard.TAKEN

    def answered(self, event: Event, version: Version, previous: Version | None) -> bool:
        """An own write was answered. Returns whether it is taken in. ``previous`` is None if the answer does not
        tell."""
        if self.position is not None:
            if version <= self.position:
                return True
            if previous == self.position:
                self.move(event, version)
                return True
        self.tell(version)
        return False

    def tell(self, version: Version) -> bool:
        """An event of the slot is known to be in the log. Returns whether it is beyond the position."""
        if self.position is not None and version <= self.position:
            return False
        if self.due is None or version > self.due:
            self.due = version
        return True

    def move(self, event: Event | None, version: Version) -> None:
        """Take in the next event of the slot; None for an entry that changes nothing here, such as one that is not an
        event."""
        self.position = version
        if self.due is not None and version >= self.due:
            self.due = None
        if event is not None:
            self._take(self, event)

    def reached(self, head: Version, due: Version | None) -> None:
        """The position has reached the head. The head was read after ``due`` was known to be in the log: if ``due``
        is beyond the head, it belongs to another slot."""
        if self.position is not None and self.position >= head and self.due == due:
            self.due = None

    def place(self, position: Version) -> bool:
        """Set the position. Returns whether the messages that waited for it followed it without a gap."""
        self.position = position
        if self.due is not None and position >= self.due:
            self.due = None
        early, self._early = self._early, []
        heard = [self.hear(message) for message in early]
        self.ready.set()
        return Heard.GAP not in heard

    def forget(self) -> None:
        """Mark the position as unknown."""
        self.position = None
        self.due = None
        self._early.clear()
        self.ready.clear()
