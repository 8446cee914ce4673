"""Chooses the publisher of a write: that of its log partition, also while the log is repartitioned.

The log may be repartitioned while writes are under way (`mnemobus repartition`). A partition that has ended refuses
new calls for ever, but still answers repeated ones. So a call of unknown outcome is repeated there until it is answered
(publisher.py). Once no call is under way, all waiting writes go to the new partitions, in their order, before any later
write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from redis.exceptions import RedisError

from ..connection.link import Link
from ..connection.server_errors import AWAY
from ..errors import SettingsError
from .events import Event
from .marks import Write
from .parcel import Parcel, parcels
from .publisher import OnLogged, Overflow, Publisher


async def forget_producers(link: Link, publishers: Iterable[Publisher]) -> None:
    """Remove from the log what it keeps for repeated calls of a bus that is being closed; best effort.

    Only if each call was answered the first time: the log would do a late copy of a call of an unknown producer again.
    """
    done = [publisher for publisher in publishers if publisher.done]
    commands = [("HDEL", link.keys.producers(each.partition), each.producer) for each in done]
    if commands:
        with suppress(*AWAY, RedisError, SettingsError):
            await link.pipeline(commands)


class Publishers:
    """The publishers of all log partitions that this bus has written to.

    Once the log is repartitioned, all of them come to rest, and new writes wait. Then the writes that waited in the
    publishers go to the new partitions, and after them the new ones: so writes to one room stay in their order.
    """

    def __init__(
        self, link: Link, producer: str, on_logged: OnLogged, overflow: Overflow | None = None
    ) -> None:
        self._link = link
        self._producer = producer
        self._on_logged = on_logged
        self._overflow = overflow
        self._by_partition: dict[int, Publisher] = {}
        self.events = self.calls = self.retries = 0
        """Figures of the publishers of ended partitions."""
        self._line: list[Parcel] | None = None
        """The writes that wait until all publishers have come to rest; None while none has to."""
        link.on_layout.append(self._on_layout)

    def __iter__(self) -> Iterator[Publisher]:
        return iter(list(self._by_partition.values()))

    def publish(self, events: Sequence[Event]) -> list[tuple[list[int], list[asyncio.Future[list[Write]]]]]:
        """Queue events. Returns for each log partition the places of its events, and the futures that give their
        Writes in this order; see `Publisher.publish`."""
        partition_of = self._link.keys.log_partition
        if len(events) == 1 and self._line is None:  # the common case
            return [([0], self._of(partition_of(events[0].dimensions.room)).publish(events))]
        by_partition: dict[int, list[int]] = {}
        for index, event in enumerate(events):
            by_partition.setdefault(partition_of(event.dimensions.room), []).append(index)
        queued = []
        for partition, indexes in by_partition.items():
            those = [events[index] for index in indexes]
            if self._line is None:
                queued.append((indexes, self._of(partition).publish(those)))
                continue
            deadline = asyncio.get_running_loop().time() + self._link.settings.write_timeout
            waiting = parcels(those, deadline)
            self._line += waiting
            queued.append((indexes, [pending.done for pending in waiting]))
        return queued

    def _of(self, partition: int) -> Publisher:
        publisher = self._by_partition.get(partition)
        if publisher is None:
            publisher = self._by_partition[partition] = Publisher(
                self._link, partition, self._producer, self._on_logged, self._overflow, self._on_rest
            )
        return publisher

    async def close(self) -> None:
        """Wait until all that is queued is in the log, or has failed."""
        while True:
            for publisher in self:
                await publisher.close()
            if all(publisher.is_idle for publisher in self):
                if self._line is None:
                    return
                self._on_rest()  # one of them was cancelled, and did not call back

    def _on_layout(self) -> None:
        if self._line is None:
            self._line = []
        for publisher in self:
            publisher.rest()
        self._on_rest()

    def _on_rest(self) -> None:
        """One publisher has come to rest."""
        if self._line is None or not all(publisher.is_idle for publisher in self):
            return
        line = [pending for publisher in self for pending in publisher.take_queue()] + self._line
        self._line = None
        for partition, publisher in list(self._by_partition.items()):
            publisher.resting = False
            if partition < self._link.keys.shape.oldest:
                del self._by_partition[partition]
                self.events += publisher.events
                self.calls += publisher.calls
                self.retries += publisher.retries
        for pending in line:
            self._again(pending)

    def _again(self, pending: Parcel) -> None:
        """Queue again what was queued for the old layout."""
        partition_of = self._link.keys.log_partition
        by_partition: dict[int, list[int]] = {}
        for index, event in enumerate(pending.events):
            by_partition.setdefault(partition_of(event.dimensions.room), []).append(index)
        if len(by_partition) == 1:
            self._of(next(iter(by_partition))).enqueue([pending])
            return
        writes: list[Write | None] = [None] * len(pending.events)
        left = len(by_partition)

        def answered(indexes: list[int], done: asyncio.Future[list[Write]]) -> None:
            nonlocal left
            left -= 1
            if pending.done.done():
                return
            error = done.exception()
            if error is not None:
                pending.done.set_exception(error)
                pending.done.exception()  # a writer that was cancelled won't fetch it
                return
            for index, write in zip(indexes, done.result(), strict=True):
                writes[index] = write
            if not left:
                pending.done.set_result([write for write in writes if write is not None])

        for partition, indexes in by_partition.items():
            part = Parcel(
                [pending.events[index] for index in indexes],
                [pending.fields[index] for index in indexes],
                sum(len(field) for index in indexes for field in pending.fields[index]),
                pending.deadline,
                asyncio.get_running_loop().create_future(),
            )
            part.done.add_done_callback(partial(answered, indexes))
            self._of(partition).enqueue([part])
