"""The listener of the log's channels: it joins them, repairs gaps from the log, and proves that nothing is missing.

The messages come on the feed's connection (feed/subscription.py), and the feed's heartbeat calls `verify`. So a bus
serves local copies, live or not, only while both know that they have heard everything.

An agent of an older version does not announce the events that it logs. Nobody would notice such a hole. So the
heartbeat also compares how many events each partition has had with how many were announced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from itertools import repeat
from typing import NamedTuple

from ..cache.l1 import clock
from ..connection.link import Call, Link, script
from ..connection.server_errors import SENSELESS
from ..connection.transport import Command
from ..errors import BadEvent
from ..feed.positions import HEAD_GRACE
from ..keys import Dimensions, Version, slot_of, slots_of
from ..log.events import DELETE_ROOM, Event, decode
from .channel import Announced, Channel, Heard, decode_announced

logger = logging.getLogger("mnemobus.live")

_PAGE = 500
"""Entries of the log that a repair reads at once."""
_FAR = 5_000
"""A repair reads at most this many entries. If the position is further behind, the windows are dropped instead."""
_MIXED = 60.0
"""Seconds after an event that was not announced for which nothing of its partition is held live."""
_CHANNEL_LINGER = 30.0
"""Seconds that a channel which nothing is held of is still listened to."""

Slot = tuple[int, int]
"""A log partition and a slot in it."""


def places_of(event: Event) -> tuple[int, ...] | None:
    """The slots that an event touches; None for all of its partition."""
    return None if event.op == DELETE_ROOM else slots_of(event.dimensions)


class Heads(NamedTuple):
    """What a log partition answers.

    unannounced  how many events were ever added without being announced
    heads        of the channels that were asked about, in order
    """

    unannounced: int
    heads: list[Version]


class Listener:
    """The channels of one bus.

    on_event  is called with each event of a channel, in the order of the log
    on_lost   is called with a channel that may have missed events for good: its windows must be dropped
    """

    def __init__(
        self,
        link: Link,
        send: Callable[..., Awaitable[None]],
        wake: Callable[[], None],
        on_event: Callable[[Channel, Event], None],
        on_lost: Callable[[Channel], None],
    ) -> None:
        self._link = link
        self._send = send
        self._wake = wake
        self._on_event = on_event
        self._on_lost = on_lost
        self._channels: dict[Slot, Channel] = {}
        self._by_name: dict[bytes, Channel] = {}
        self._unannounced: dict[int, int] = {}
        """By log partition: how many events were not announced at the first look."""
        self._mixed_until: dict[int, float] = {}
        """By log partition: until when nothing is held live, as an agent wrote without announcing."""
        self._repairing = asyncio.Lock()
        self._last: tuple[bytes, bytes, Announced] | None = None
        """The last message: its version, its bytes after the previous version, and the decoded message."""
        self.events = 0
        self.gaps = 0
        self.repairs = 0
        self.lost = 0

    def __len__(self) -> int:
        return len(self._channels)

    async def join(self, places: Iterable[Slot], patience: float) -> list[Channel] | None:
        """Channels whose positions are known; None if that takes longer than ``patience`` seconds."""
        channels, new = [], []
        for place in places:
            channel = self._channels.get(place)
            if channel is None:
                name = self._link.keys.live_channel(*place).encode()
                channel = self._channels[place] = self._by_name[name] = Channel(*place, name, self._take)
                new.append(name)
            channel.unused_since = None
            channels.append(channel)
        if new:
            await self._send("SUBSCRIBE", *new)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                for channel in channels:
                    await channel.ready.wait()
        return channels if all(channel.position is not None for channel in channels) else None

    def is_announced(self, partition: int) -> bool:
        """Whether all writes to a log partition are announced, as far as this bus knows."""
        return clock() >= self._mixed_until.get(partition, 0.0)

    def disconnected(self) -> list[bytes]:
        """The listening connection was replaced. Returns the channels that the new one must subscribe to."""
        for channel in self._channels.values():
            channel.confirmed = False
        return list(self._by_name)

    def confirm(self, name: bytes) -> Channel | None:
        """A subscription is confirmed. Returns the channel if its position must be found now."""
        channel = self._by_name.get(name)
        if channel is None or channel.confirmed:
            return None
        channel.confirmed = True
        if channel.position is None:
            return channel
        self._wake()  # a reconnect: the events that were missed come after the position
        return None

    def hear(self, name: bytes, data: bytes) -> bool:
        """A message came. Returns whether it is of one of our channels. ValueError if it is malformed."""
        channel = self._by_name.get(name)
        if channel is None:
            return False
        if channel.position is not None and self._is_known(channel.position, data):
            return True
        message = self._decode(data)
        if message.epoch != self._link.epoch:
            self._wake()  # one side does not know the other's epoch yet: the heartbeat finds out
        elif channel.hear(message) is Heard.GAP:
            self.gaps += 1
            self._wake()
        return True

    def _is_known(self, position: Version, data: bytes) -> bool:
        """Whether a message tells nothing new, by its head alone. So it is with all own writes: their answers come
        first."""
        version, _, epoch, _ = data[: data.find(b"\n")].split(b" ", 3)
        return Version.parse(version) <= position and epoch == self._link.epoch.encode()

    def _decode(self, data: bytes) -> Announced:
        """Decode a message. An event comes once for each of its slots that this bus listens to, in successive
        messages."""
        body = data.partition(b" ")[2].partition(b" ")[2]
        version = data[: -len(body)].partition(b" ")[0]
        if self._last is not None and self._last[:2] == (version, body):
            message = self._last[2]
            previous = data[len(version) + 1 : len(data) - len(body) - 1]
            return message._replace(previous=Version.parse(previous))
        message = decode_announced(data)
        self._last = (version, body, message)
        return message

    def answered(
        self, partition: int, event: Event, version: Version, previous: tuple[Version, ...] | None
    ) -> list[Channel]:
        """An own write is in the log; ``previous`` is as in `log.Logged`. Returns the channels that could not take it
        in yet."""
        slots = places_of(event)
        if slots is not None:
            found = [self._channels.get((partition, slot)) for slot in slots]
            pairs = zip(found, previous or repeat(None), strict=False)
            return [c for c, before in pairs if c is not None and not c.answered(event, version, before)]
        own = slot_of("room", event.dimensions.room)
        return [
            channel
            for (where, slot), channel in self._channels.items()
            if where == partition
            and not channel.answered(event, version, previous[0] if previous and slot == own else None)
        ]

    def _take(self, channel: Channel, event: Event) -> None:
        self.events += 1
        self._on_event(channel, event)

    # Proving that nothing is missing

    async def settle(self, channel: Channel) -> None:
        """Find the position of a channel whose subscription was just confirmed."""
        epoch = self._link.epoch
        [answer] = await self._heads({channel.partition: [channel]})
        if epoch == self._link.epoch and not channel.ready.is_set():
            self._unannounced.setdefault(channel.partition, answer.unannounced)
            self._place(channel, answer.heads[0])

    def _place(self, channel: Channel, position: Version) -> None:
        if not channel.place(position):
            self.gaps += 1
            self._wake()

    async def verify(self) -> None:
        """Compare every position with its head, and move it there. Raises if that fails."""
        asked: dict[int, list[Channel]] = {}
        for channel in self._channels.values():
            if channel.confirmed or channel.position is not None:
                asked.setdefault(channel.partition, []).append(channel)
        if not asked:
            return
        before = {channel: channel.position for channels in asked.values() for channel in channels}
        epoch = self._link.epoch
        answers = await self._heads(asked)
        if epoch != self._link.epoch:
            return  # the heartbeat begins again
        behind: list[tuple[Channel, Version]] = []
        for (partition, channels), (unannounced, heads) in zip(asked.items(), answers, strict=True):
            if self._unannounced.setdefault(partition, unannounced) != unannounced:
                logger.warning(
                    "log partition %d: events were logged that nobody announced, by agents of an older version?"
                    " What was held live is dropped",
                    partition,
                )
                self._unannounced[partition] = unannounced
                self._mixed_until[partition] = clock() + _MIXED
                for channel in channels:
                    self._lose(channel)
            for channel, head in zip(channels, heads, strict=True):
                known = before[channel]
                if channel.position is None:
                    self._place(channel, head)
                elif known is not None and head < known:
                    self._jump(channel, head)
                else:
                    behind.append((channel, head))
        for pause in HEAD_GRACE:
            if not any(_is_behind(*each) for each in behind):
                return
            await asyncio.sleep(pause)
        await self._repair([each for each in behind if _is_behind(*each)])

    async def catch_up(self, channels: Sequence[Channel]) -> None:
        """Move channels to their heads now, without waiting for pub/sub. Raises if that fails."""
        due = {channel: channel.due for channel in channels}
        asked: dict[int, list[Channel]] = {}
        for channel in channels:
            asked.setdefault(channel.partition, []).append(channel)
        epoch = self._link.epoch
        answers = await self._heads(asked)
        if epoch == self._link.epoch:
            told = [
                pair
                for each, (_, heads) in zip(asked.values(), answers, strict=True)
                for pair in zip(each, heads, strict=True)
            ]
            await self._repair([each for each in told if _is_behind(*each)])
            for channel, head in told:
                if not _is_behind(channel, head) and epoch == self._link.epoch:
                    channel.reached(head, due.get(channel))

    async def _heads(self, asked: dict[int, list[Channel]]) -> list[Heads]:
        keys = self._link.keys
        calls: list[Command | Call] = [
            (script("heads"), [keys.heads(partition), keys.meter(partition)], [c.number for c in channels])
            for partition, channels in asked.items()
        ]
        answers = []
        for reply in await self._link.pipeline(calls, pool=self._link.probe):
            if isinstance(reply, Exception):
                raise reply
            try:
                answers.append(Heads(int(reply[0]), [Version.parse(head) for head in reply[1:]]))
            except SENSELESS as error:
                raise self._link.senseless(error) from error
        return answers

    async def _repair(self, behind: Sequence[tuple[Channel, Version]]) -> None:
        """Take in the log's entries after the positions."""
        async with self._repairing:
            by_partition: dict[int, list[tuple[Channel, Version]]] = {}
            for channel, head in behind:
                if _is_behind(channel, head):
                    by_partition.setdefault(channel.partition, []).append((channel, head))
            for partition, channels in by_partition.items():
                self.repairs += 1
                await self._repair_partition(partition, channels)

    async def _repair_partition(self, partition: int, behind: list[tuple[Channel, Version]]) -> None:
        epoch = self._link.epoch
        since = {channel: channel.position for channel, _ in behind}
        start = min(position for position in since.values() if position is not None)
        goal = max(head for _, head in behind)
        read = 0
        trimmed = None
        while read < _FAR:
            entries, reach = await self._page(partition, start)
            if epoch != self._link.epoch:
                return
            trimmed = reach or trimmed
            for id, fields in entries:
                start = Version.parse(id)
                self._repeat(start, fields, [channel for channel, _ in behind])
            read += len(entries)
            if len(entries) < _PAGE or start >= goal:
                break
        for channel, head in behind:
            position = since[channel]
            cut = trimmed is not None and position is not None and position < trimmed
            if cut or _is_behind(channel, head):
                self._jump(channel, max(head, channel.position or head))

    async def _page(
        self, partition: int, start: Version
    ) -> tuple[list[tuple[bytes, list[bytes]]], Version | None]:
        """The log's entries after a version, and the version up to which the log is trimmed."""
        keys = self._link.keys
        entries, trimmed = await self._link.pipeline(
            [
                ("XRANGE", keys.log(partition), f"({start}", "+", "COUNT", _PAGE),
                ("HGET", keys.meter(partition), "trimmed_to"),
            ],
            pool=self._link.probe,
        )
        for reply in (entries, trimmed):
            if isinstance(reply, Exception):
                raise reply
        return entries, None if trimmed is None else Version.parse(trimmed)

    def _repeat(self, version: Version, fields: list[bytes], channels: Iterable[Channel]) -> None:
        """Give an entry of the log to the channels that have not taken it in."""
        if b"as" in fields[::2]:
            return  # it was not announced: the feed tells the result
        event: Event | None
        try:
            event = decode(version, fields)
        except BadEvent:
            event = None
        slots = _slots_of(fields) if event is None else places_of(event)
        for channel in channels:
            position = channel.position
            if position is not None and version > position and (slots is None or channel.number in slots):
                if event is None:
                    self._lose(channel)
                channel.move(event, version)

    def _jump(self, channel: Channel, head: Version) -> None:
        self._lose(channel)
        self._place(channel, head)

    def _lose(self, channel: Channel) -> None:
        self.lost += 1
        self._on_lost(channel)

    def forget(self) -> None:
        """A new epoch: all positions are unknown."""
        self._unannounced.clear()
        for partition in [p for p in self._mixed_until if p < self._link.keys.shape.oldest]:
            del self._mixed_until[partition]
        for channel in self._channels.values():
            channel.forget()

    async def leave(self, held: Callable[[Channel], bool]) -> list[Channel]:
        """Leave the channels that no window has needed for a while. Returns them."""
        now, gone = clock(), []
        for place, channel in list(self._channels.items()):
            if held(channel):
                channel.unused_since = None
            elif channel.unused_since is None:
                channel.unused_since = now
            elif now - channel.unused_since > _CHANNEL_LINGER:
                del self._channels[place], self._by_name[channel.name]
                gone.append(channel)
        if gone:
            await self._send("UNSUBSCRIBE", *(channel.name for channel in gone))
        return gone


def _is_behind(channel: Channel, head: Version) -> bool:
    return channel.position is not None and channel.position < head


def _slots_of(fields: list[bytes]) -> tuple[int, ...] | None:
    """The slots of an entry that is not a valid event, as far as its fields tell; None for all."""
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    try:
        room = named[b"room"].decode()
        others = (named.get(name) for name in (b"agent", b"entity", b"world"))
        return slots_of(Dimensions("", room, *(None if name is None else name.decode() for name in others)))
    except (KeyError, UnicodeDecodeError):
        return None
