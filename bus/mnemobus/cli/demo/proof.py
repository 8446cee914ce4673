"""What a run has to prove, computed from the agents' records and the content of the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import orjson

from ...keys import Version, room_scope
from ...records import Row
from ...store import Query, Reader
from .rooms import DemoRoom, digest
from .summary import Summary


async def stored(reader: Reader, room: DemoRoom) -> tuple[list[Row], list[str]]:
    """What the store has of a room, and what an agent has to see of it."""
    listings = [
        await reader.recent(Query(table, room=room.name), 1_000) for table in ("messages", "facts", "drafts")
    ]
    about = await reader.recent(Query("facts", entity=room.entity), 6)
    single = [await reader.get(id) for id in room.ids()]
    seen = [listings[0][:5], about, *(rows[:20] for rows in listings)]
    answers = [digest(rows) for rows in seen]
    answers += [digest([row] if row else []) for row in single]
    return [row for rows in listings for row in rows], answers


def lost(writes: Sequence[dict[str, Any]], stored: dict[str, Row]) -> list[str]:
    """The memories whose content in the store differs from the result of the acknowledged writes."""
    expected: dict[str, Any] = {}
    in_room: dict[tuple[str, str], set[str]] = defaultdict(set)
    # All writes to one memory are in one log partition, whose order is that of the versions.
    for write in sorted(writes, key=lambda write: Version.parse(write["version"])):
        place = (write["table"], write["room"])
        if write["op"] == "delete_room":
            expected.update(dict.fromkeys(in_room[place]))
        elif write["op"] == "delete":
            expected[write["id"]] = None
        else:
            in_room[place].add(write["id"])
            expected[write["id"]] = write["content"]
    wrong = []
    for id in expected.keys() | stored.keys():
        row = stored.get(id)
        found = None if row is None else orjson.loads(row.content)
        if found != expected.get(id):
            wrong.append(f"{id}: {found} instead of {expected.get(id)}")
    return wrong


def measure(summary: Summary, reports: list[dict[str, Any]], rooms: Sequence[DemoRoom]) -> None:
    """Propagation: for each turn, the time from the begin of its write until each other agent dropped its old copy."""
    turns: dict[str, list[tuple[float, int]]] = defaultdict(list)
    drops: list[dict[str, list[float]]] = []
    for number, report in enumerate(reports):
        for write in report["acknowledged"]:
            if write["table"] == "messages":
                turns[write["room"]].append((write["began"], number))
        mine: dict[str, list[float]] = defaultdict(list)
        for scope, moment in report["drops"]:
            mine[scope].append(moment)
        drops.append(mine)
    samples: list[float] = []
    for room in rooms:
        scope = room_scope("messages", room.name)
        said = sorted(turns[room.name])
        for (began, writer), following in pairwise([*said, (float("inf"), -1)]):
            for number, mine in enumerate(drops):
                if number != writer:
                    # Before the next turn begins, all drops of the room belong to this turn.
                    dropped = [t for t in mine[scope] if began <= t < following[0]]
                    samples += [dropped[0] - began] if dropped else []
    samples.sort()
    summary.propagation_samples = len(samples)
    if samples:
        summary.propagation_p50_ms = round(1000 * samples[len(samples) // 2], 2)
        summary.propagation_p99_ms = round(1000 * samples[min(len(samples) * 99 // 100, len(samples) - 1)], 2)
        summary.propagation_max_ms = round(1000 * samples[-1], 2)
