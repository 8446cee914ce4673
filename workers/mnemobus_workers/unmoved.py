"""What a dead worker held while Redis's clock was set back.

How long an entry has been idle is what Redis's wall clock says now, less the time that the entry got when it was
delivered or renewed. Once that clock was set back, this time lies ahead of it, and Redis answers 0 until the clock has
caught up. A dead worker's batch would be claimed by nobody for as long as the clock was set back.

So each process watches by its own clock, of which only durations are used. A live worker renews what it holds three
times within ``claim_idle``, and that gives the entries the time of the clock as it is now: hardly any look finds them
idle for 0 ms, let alone every look. Entries that every look found idle for 0 ms, over
``claim_idle``, have nobody who renews them. They are given the idle time that they really have, and are claimed as all
others (broker.py).

A look asks for the first entry of each consumer. A consumer's later entries are looked at once the first one makes no
sense: the page that is fetched then holds all that a process can have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mnemobus.connection.link import ThreadedLink
from mnemobus.keys import APPLY_GROUP

logger = logging.getLogger("mnemobus.broker")

LOOKS = 4
"""Looks that must have found an entry unmoved before the last; one may have hit the very millisecond of a renewal."""
_PAUSE = 0.003
"""Seconds between the two questions of a look; entries that were just delivered have an idle time then."""
_AT_ONCE = 1_000
"""Entries of one call of renew.lua."""


@dataclass(slots=True)
class _Watch:
    """What a consumer had that was idle for 0 ms, by ID with its deliveries, and since when that is looked at."""

    since: float
    entries: dict[bytes, int]
    looks: int = 0


class Unmoved:
    """Watches the pending entries of one log partition.

    claim_idle  seconds without a sign of life after which a batch is given to another
    page        entries that one consumer can have at most
    """

    def __init__(self, link: ThreadedLink, key: str, claim_idle: float, page: int) -> None:
        self._link = link
        self._key = key
        self._claim_idle = claim_idle
        self._page = page
        self._watched: dict[bytes, _Watch] = {}

    def look(self, consumers: Sequence[bytes], mine: Collection[bytes]) -> int:
        """Look once more. How many entries may be claimed since, because nobody has moved them for ``claim_idle``.

        consumers: those that have anything pending
        mine: IDs of what this process works on
        """
        now = time.monotonic()
        watched: dict[bytes, _Watch] = {}
        freed = 0
        for name in self._hidden_first(consumers):
            watch = self._watched.get(name) or _Watch(now, self._hidden(name, mine))
            watch.looks += 1
            if watch.looks <= LOOKS or now - watch.since < self._claim_idle:
                watched[name] = watch
                continue
            still = self._hidden(name, mine)
            freed += self._free(name, [id for id, n in watch.entries.items() if still.get(id) == n])
        self._watched = watched
        return freed

    def _hidden_first(self, consumers: Sequence[bytes]) -> list[bytes]:
        """Those whose first pending entry has an idle time of 0, and still has it some milliseconds later."""
        for pause in (0.0, _PAUSE):
            if not consumers:
                return []
            time.sleep(pause)
            replies = self._link.pipeline(
                [("XPENDING", self._key, APPLY_GROUP, "-", "+", 1, name) for name in consumers]
            )
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            found = zip(consumers, replies, strict=True)
            consumers = [name for name, first in found if first and first[0][2] <= 0]
        return list(consumers)

    def _hidden(self, consumer: bytes, mine: Collection[bytes]) -> dict[bytes, int]:
        pending = self._link.client.execute_command(
            "XPENDING", self._key, APPLY_GROUP, "-", "+", self._page, consumer
        )
        return {id: deliveries for id, _, idle, deliveries in pending if idle <= 0 and id not in mine}

    def _free(self, consumer: bytes, ids: Sequence[bytes]) -> int:
        idle = int(self._claim_idle * 1000)
        freed = 0
        for first in range(0, len(ids), _AT_ONCE):
            some = ids[first : first + _AT_ONCE]
            freed += int(self._link.run("renew", [self._key], [APPLY_GROUP, consumer, idle, 0, *some]))
        if freed:
            logger.warning(
                "Redis's clock was set back: %d events that %s left may be claimed all the same",
                freed,
                consumer.decode("utf-8", "replace"),
            )
        return freed
