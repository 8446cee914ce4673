"""Entries of a dead worker after Redis's clock was set back.

Redis computes an entry's idle time: its wall clock now, minus the time of the entry's delivery or renewal. Once that
clock was set back, the second time is in the future, and Redis answers 0 until the clock has caught up. During that
time nobody would claim a dead worker's batch.

So each process watches by its own clock, and uses only durations. A live worker renews its entries three times within
``claim_idle``. That gives them the clock's present time, so a look rarely finds them idle for 0 ms, and never at every
look. If every look over ``claim_idle`` finds an entry idle for 0 ms, nobody renews it. Then it gets its real idle time,
and is claimed like all others (broker.py).

A look asks for the first entry of each consumer. If two looks find the same one idle for 0 ms, and it still is some
milliseconds later, the consumer's later entries are checked: one page holds all that a process can have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mnemobus.connection.link import ThreadedLink
from mnemobus.connection.transport import Command
from mnemobus.keys import APPLY_GROUP

logger = logging.getLogger("mnemobus.broker")

LOOKS = 4
"""This many earlier looks must have found an entry unmoved; one may have come in the same millisecond as a renewal."""
_PAUSE = 0.003
"""Seconds between the two questions of a look; after them, entries that were just renewed have an idle time."""
_AT_ONCE = 1_000
"""Entries of one call of renew.lua."""

ConsumerKey = tuple[int, bytes]
"""A log partition, and a consumer there."""


@dataclass(slots=True)
class _Watch:
    """The entries of a consumer that were idle for 0 ms, by ID with the deliveries, and since when they are watched."""

    since: float
    entries: dict[bytes, int]
    looks: int = 0


class Unmoved:
    """Watches the pending entries of the log.

    claim_idle  seconds without a sign of life after which another worker gets a batch
    page        entries of a log partition that one consumer can have at most
    """

    def __init__(self, link: ThreadedLink, claim_idle: float, page: int) -> None:
        self._link = link
        self._claim_idle = claim_idle
        self._page = page
        self._first: dict[ConsumerKey, bytes] = {}
        """What was idle for 0 ms at the last look, and came first."""
        self._watched: dict[ConsumerKey, _Watch] = {}

    def look(self, places: Sequence[ConsumerKey], mine: Collection[tuple[int, bytes]]) -> int:
        """Look once more. How many entries may be claimed since, because nobody has moved them for ``claim_idle``.

        places: where anything is pending
        mine: log partitions and IDs of what this process works on
        """
        now = time.monotonic()
        watched: dict[ConsumerKey, _Watch] = {}
        freed = 0
        for place in self._hidden_first(places):
            watch = self._watched.get(place) or _Watch(now, self._hidden(place, mine))
            watch.looks += 1
            if watch.looks <= LOOKS or now - watch.since < self._claim_idle:
                watched[place] = watch
                continue
            still = self._hidden(place, mine)
            freed += self._free(place, [id for id, n in watch.entries.items() if still.get(id) == n])
        self._watched = watched
        return freed

    def _hidden_first(self, places: Sequence[ConsumerKey]) -> list[ConsumerKey]:
        """Those whose first pending entry has an idle time of 0, as it had at the last look, and some milliseconds
        later: none that was delivered or renewed just now."""
        before, self._first = self._first, self._look(places)
        same = [place for place, id in self._first.items() if before.get(place) == id]
        if not same:  # nearly always: don't delay the consumer
            return []
        time.sleep(_PAUSE)
        return list(self._look(same))

    def _look(self, places: Sequence[ConsumerKey]) -> dict[ConsumerKey, bytes]:
        """Where the first pending entry has an idle time of 0, and which one it is."""
        commands: list[Command] = [
            ("XPENDING", self._link.keys.log(partition), APPLY_GROUP, "-", "+", 1, name)
            for partition, name in places
        ]
        found = {}
        for place, reply in zip(places, self._link.pipeline(commands) if commands else (), strict=True):
            if isinstance(reply, Exception):
                raise reply
            if reply and reply[0][2] <= 0:
                found[place] = reply[0][0]
        return found

    def _hidden(self, place: ConsumerKey, mine: Collection[tuple[int, bytes]]) -> dict[bytes, int]:
        partition, name = place
        pending = self._link.command(
            "XPENDING", self._link.keys.log(partition), APPLY_GROUP, "-", "+", self._page, name
        )
        return {id: n for id, _, idle, n in pending if idle <= 0 and (partition, id) not in mine}

    def _free(self, place: ConsumerKey, ids: Sequence[bytes]) -> int:
        partition, name = place
        key, idle = self._link.keys.log(partition), int(self._claim_idle * 1000)
        freed = 0
        for first in range(0, len(ids), _AT_ONCE):
            some = ids[first : first + _AT_ONCE]
            freed += int(self._link.run("renew", [key], [APPLY_GROUP, name, idle, 0, *some]))
        if freed:
            logger.warning(
                "Redis's clock was set back: %d events that %s left may be claimed all the same",
                freed,
                name.decode("utf-8", "replace"),
            )
        return freed
