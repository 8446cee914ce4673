"""Parcels: encoded events of one caller that go to the log in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from .append import CALL_BYTES, CALL_EVENTS
from .events import Event
from .marks import Write


@dataclass(slots=True)
class Parcel:
    """Writes of one caller that wait to be published, together."""

    events: list[Event]
    fields: list[list[bytes]]
    size: int
    deadline: float
    done: asyncio.Future[list[Write]]


def parcels(events: Iterable[Event], deadline: float) -> list[Parcel]:
    """The parcels of these events, each with its own future."""
    loop = asyncio.get_running_loop()
    made: list[Parcel] = []
    for event in events:
        fields = event.fields()
        size = sum(map(len, fields))
        if not made or made[-1].size + size > CALL_BYTES or len(made[-1].events) == CALL_EVENTS:
            made.append(Parcel([], [], 0, deadline, loop.create_future()))
        made[-1].events.append(event)
        made[-1].fields.append(fields)
        made[-1].size += size
    return made


def fields_of(batch: Iterable[Parcel]) -> list[list[bytes]]:
    return [fields for pending in batch for fields in pending.fields]
