"""Looking for a memory among the events of the log that are not applied yet."""

from __future__ import annotations

from contextlib import suppress

from ..connection.link import Link
from ..errors import BadEvent
from ..keys import ZERO, Version
from .events import DELETE, DELETE_ROOM, Event, decode
from .pending import PendingWrites

_SEARCHED = 500


_SEARCHED_BYTES = 1 << 20
"""Entries that a search of the log reads at a time, and about how many bytes."""


async def last_pending(link: Link, pending: PendingWrites, id: str) -> Event | None:
    """The last event of a memory that is not applied yet, in the log partitions that this bus waits for; a deletion,
    if its room was deleted after it. Raises one of AWAY, or what Redis answers."""
    partitions = pending.partitions
    last: Event | None = None
    for partition, state in zip(partitions, await pending.state(partitions), strict=True):
        position = state.pending.before() if state.pending is not None else state.last or ZERO
        size = _SEARCHED
        while True:
            entries = await link.command(
                "XRANGE", link.keys.log(partition), f"({position}", "+", "COUNT", size
            )
            for entry, pairs in entries:
                position = Version.parse(entry)
                with suppress(BadEvent):
                    event = decode(position, pairs)
                    if event.id == id:
                        if last is None or event.version > last.version:
                            last = event
                    elif last is not None and _deletes_room_of(event, last):
                        last = last._replace(op=DELETE, version=event.version)
            if len(entries) < size:
                break
            read = sum(len(field) for _, pairs in entries for field in pairs)
            size = max(1, min(_SEARCHED, size * _SEARCHED_BYTES // max(read, 1)))
    return last


def _deletes_room_of(event: Event, other: Event) -> bool:
    return (
        event.op == DELETE_ROOM
        and event.dimensions[:2] == other.dimensions[:2]
        and event.version > other.version
    )
