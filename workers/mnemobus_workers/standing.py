"""A worker process and the store that it commits to: do they belong together, and is the store what it was?

identity.py in the bus says what is compared, and why. This module compares, when the store is opened and in every round
of upkeep: it asks the store once and Redis once. A process that does not belong takes no batches, and hands back those
that it has; it checks again in each round.

The first process that looks finds a store that went back in time. It writes into Redis what has to be applied again,
and begins a new epoch. One process at a time does the work, under a lease; if it dies, another one begins it again,
with the same result. Batches go on meanwhile. Until the work is done, nobody notes in the store how far it reaches.

With relaxed commits (MNEMOBUS_COMMIT) a crash of the server takes the store back by some tenths of a second, and newer
commits may hide this before anybody looks. So the server and Redis both keep an *epoch of the server*, which the server
forgets in a crash. A new one begins before the log is read again, and Redis gets it only after the work is noted: if a
process is killed in between, the log is applied once too often, never too rarely. The log is trimmed only up to where
the store is known to reach on disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
from redis.exceptions import OutOfMemoryError, RedisError

from mnemobus.connection.link import ThreadedLink, script
from mnemobus.connection.server_errors import AWAY
from mnemobus.errors import IdentityMismatch, MnemobusError
from mnemobus.identity import Registered, arguments, check_match, check_owner
from mnemobus.keys import APPLY_GROUP, Version
from mnemobus.log.events import DELETE_ROOM, Event
from mnemobus.settings import Settings
from mnemobus.store import Identity, Writer

logger = logging.getLogger("mnemobus.standing")

REACH_EVERY = 10_000
"""ms between two notes of how far the store reaches."""
MARGIN = 1_000
"""ms before that moment from which the log is applied again."""
_LEASE = 15_000
"""ms for which the lease of a silent process keeps others from applying the log again."""
_STILL = 3
"""Rounds without a new beat from a place after which it counts as given up."""
_SIGHTINGS = 2
"""How often another life must come back to count as a rival. A store that was restored from a backup has an old life
once."""
_CALM = 30
"""Rounds without such a sighting after which there is no rival any more."""


def agree(link: ThreadedLink, identity: Identity, role: str) -> Registered:
    """Agree with all other processes on the store of this bus. IdentityMismatch if it is not this one."""
    check_owner(link.keys, link.address, identity)
    there = Registered.of(link.run("identity", [link.keys.identity], arguments(identity, role)))
    check_match(link.keys, link.address, identity, there)
    return there


Witness = tuple[str, str]
"""A field of the hash in Redis, and its value."""


def witness(
    partition: int, events: Sequence[Event], dead: dict[Version, str], won: Collection[str]
) -> Witness | None:
    """The last of these events that the store must never lose; the fan-out notes it. ``won`` are the memories that
    changed: the store has no trace of events that came too late to change anything."""
    for event in reversed(events):
        if event.op != DELETE_ROOM and event.version not in dead and event.id in won:
            return f"w{partition}", f"{event.id} {event.version}"
    return None


class Standing:
    """Whether one worker process may work for its store. One thread calls `look`; all may read ``refused``."""

    def __init__(self, settings: Settings, link: ThreadedLink, writer: Writer, name: str) -> None:
        self._settings = settings
        self._link = link
        self._writer = writer
        self._name = name
        self._key = link.keys.identity
        self._place = ""
        """The place that this process commits to."""
        self._seen: tuple[str, int] | None = None
        """Another place that has workers, and their beats."""
        self._still = 0
        self._sightings = 0
        self._calm = 0
        self._reached_at = 0
        self._stretch: dict[int, tuple[str, Version]] = {}
        """The witnesses at the last note of how far the store reaches."""
        self._resync: Resync | None = None
        self.begun = False
        """Whether the store has answered once: before that there is nothing to compare."""
        self.refused = ""
        """Why this process must not take part, or empty."""
        self.reached: int | None = None
        """All events of the log before this moment (ms) are on the store's disk; None: all acknowledged ones are."""
        self.resyncing = False
        """Whether any process is applying the log again: nothing of it may be trimmed."""

    def agree(self) -> tuple[Identity, Registered]:
        """Find out whether this process may commit. IdentityMismatch if not; then ``refused`` tells other threads
        why."""
        identity = self._writer.identity()
        self.begun = True
        try:
            there = agree(self._link, identity, "worker")
            if identity.bus is None:  # another bus may do the same now: the first one counts
                self._writer.serve(there.bus, self._link.keys.prefix, there.life)
                identity = self._writer.identity()
                check_owner(self._link.keys, self._link.address, identity)
                check_match(self._link.keys, self._link.address, identity, there)
            self._check_place(identity, there)
        except IdentityMismatch as error:
            if str(error) != self.refused:
                logger.error("taking no part: %s", error)
            self.refused = str(error)
            raise
        self._writer.expect(identity.store)
        self._place = identity.place
        if self._settings.commit == "relaxed":
            if not there.epoch and (epoch := self._writer.epoch(begin=True)):
                with suppress(OutOfMemoryError):  # Redis is full: the next round tries again
                    if self._link.client.hsetnx(self._key, "epoch", epoch):
                        there = replace(there, epoch=epoch)
            # Only once both sides know the epoch: from then on a loss is noticed.
            self._writer.relax(bool(there.epoch))
        self.reached = (identity.reached or 0) if there.epoch else None
        if self.refused:
            logger.info("taking part again in the bus %r", self._link.keys.prefix)
        self.refused = ""
        return identity, there

    def look(self) -> None:
        """One round."""
        identity, there = self.agree()
        self._look_for_rivals(identity, there)
        why = self._went_back(identity, there)
        if why and there.resync is None:
            self._begin(identity, there, why)
        elif there.resync is None:
            self._reach(there)
        if (identity.place, identity.history) != (there.place, there.history):
            known: Any = {
                "place": identity.place or there.place,
                "history": identity.history or there.history,
            }
            self._link.client.hset(self._key, mapping=known)
        self.resyncing = bool(why) or there.resync is not None
        self._see_to_resync(there)
        with suppress(OutOfMemoryError):  # Redis is full: the next round tries again
            self._link.client.hincrby(self._key, "beats", 1)

    def stop(self) -> None:
        """Stop, and leave unfinished work to others."""
        if self._resync is not None:
            self._resync.stop()

    # The place

    def _check_place(self, identity: Identity, there: Registered) -> None:
        """IdentityMismatch while workers commit to another copy of this store."""
        if not (identity.place and there.place) or there.place in (identity.place, self._place):
            self._seen = None
            return
        place = (there.place, there.beats)
        self._still = self._still + 1 if self._seen == place else 0
        self._seen = place
        if self._still < _STILL:
            raise IdentityMismatch(
                f"the workers of the bus {self._link.keys.prefix!r} commit to another copy of the store"
                f" {identity.store[:8]} than this one ({identity.where}): there may be one at a time. Stop them, or"
                " point this one to their database; this goes on by itself once they are gone"
            )
        self._seen = None

    def _went_back(self, identity: Identity, there: Registered) -> str:
        """Why the store may have lost what was committed, or empty."""
        if identity.place and there.place and identity.place != there.place:
            return f"{identity.where} is at another place than it was"
        if identity.history and there.history and identity.history != there.history:
            return f"{identity.where} goes on from an earlier state: timeline {identity.history}"
        if there.epoch and self._writer.epoch() != there.epoch:
            return f"{identity.where} crashed, and may have lost the last commits"
        lost = self._writer.lacks(dict(there.witnesses.values()))
        if lost:
            return f"{identity.where} lacks the last write to {', '.join(lost[:3])}"
        return ""

    # Rivals

    def _look_for_rivals(self, identity: Identity, there: Registered) -> None:
        self._calm += 1
        if identity.life == there.life and identity.bus == there.bus:
            if not there.stamped:
                self._link.client.hset(self._key, "stamped", "1")
            if there.rival and self._calm > _CALM:
                self._link.client.hdel(self._key, "rival")
                self._sightings = 0
            return
        if there.stamped and self._writer.identity().life != there.life:
            self._calm = 0
            self._sightings += 1
            if self._sightings >= _SIGHTINGS:
                rival = (
                    f"the store ({identity.where}) is used by workers of another Redis, too, with the key prefix"
                    f" {identity.prefix!r}: agents here don't hear of what is written there. Stop those, or these"
                )
                logger.error("%s", rival)
                self._link.client.hset(self._key, "rival", rival)
        self._writer.serve(there.bus, self._link.keys.prefix, there.life)
        self._link.client.hset(self._key, "stamped", "1")

    # How far the store reaches

    def _reach(self, there: Registered) -> None:
        """From time to time, if anything was applied, note in the store the moment up to which it has all events."""
        seconds, micros = self._link.client.time()
        now = seconds * 1000 + micros // 1000
        if abs(now - self._reached_at) < REACH_EVERY or there.witnesses == self._stretch:
            return
        low = now
        keys = self._link.keys
        partitions = keys.shape.all
        calls = [
            (
                script("applied"),
                [keys.log(p), keys.dead(p), keys.reasons(p), keys.meter(p)],
                (APPLY_GROUP,),
            )
            for p in partitions
        ]
        for answer, head in zip(
            self._link.pipeline(calls),
            self._link.pipeline([("XREVRANGE", keys.log(p), "+", "-", "COUNT", 1) for p in partitions]),
            strict=True,
        ):
            for reply in (answer, head):
                if isinstance(reply, Exception):
                    raise reply
            last, pending, *_ = answer
            if pending:
                low = min(low, Version.parse(pending).ms)
            elif head and (not last or Version.parse(last) < Version.parse(head[0][0])):
                low = min(low, Version.parse(last).ms if last else 0)
        if not self._writer.reach(low, there.epoch):
            return  # it crashed just now: the next round handles that
        self._reached_at, self._stretch = now, dict(there.witnesses)

    # Applying the log again

    def _begin(self, identity: Identity, there: Registered, why: str) -> None:
        since = "" if identity.reached is None else str(Version(max(identity.reached - MARGIN, 0), 0))
        work = orjson.dumps({"why": why, "since": since})
        # A crash from here on is another one. All that was lost before is in the log, up to its end at a later moment.
        epoch = self._writer.epoch(begin=True) if there.epoch else ""
        # The first process that notes this also sets the moment to begin at: the store's own note soon moves on.
        if self._link.client.hsetnx(self._key, "resync", work):
            if epoch:
                self._link.client.hset(self._key, "epoch", epoch)
            logger.error(
                "the store went back in time: %s. A new epoch begins, and the log is applied again since %s",
                why,
                since or "its beginning",
            )
        self._link.client.delete(self._link.keys.epoch)

    def _see_to_resync(self, there: Registered) -> None:
        """Do the work if no other process does, or show that this one is alive."""
        resync = self._resync
        if resync is not None and resync.ended:
            self._resync = None
            if self._link.client.get(self._link.keys.resync) == self._name.encode():
                self._link.client.delete(self._link.keys.resync)
            return
        if resync is None and there.resync is None:
            return
        if resync is not None:
            self._link.client.pexpire(self._link.keys.resync, _LEASE)
            return
        if self._link.client.pttl(self._link.keys.resync) > _LEASE:
            self._link.client.delete(self._link.keys.resync)  # the clock was set back
        if self._link.client.set(self._link.keys.resync, self._name, nx=True, px=_LEASE):
            assert there.resync is not None
            self._resync = Resync(self._settings, self._link, there.resync)
            self._resync.start()


class Resync:
    """Applies the log again, in a thread of its own and over connections of its own."""

    def __init__(self, settings: Settings, link: ThreadedLink, work: dict[str, Any]) -> None:
        from .replay import Replay  # which knows the applier, which knows this module

        self._link = link
        self._work = work
        since = Version.parse(work["since"]) if work["since"] else None
        self._replay = Replay(settings, since=since, partial=True, on_progress=self._tell)
        self._thread = threading.Thread(target=self._run, name="mnemobus-resync", daemon=True)
        self._told = 0
        self.ended = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._replay.stop()
        self._thread.join()

    def _tell(self, events: int) -> None:
        if events - self._told >= 10_000:
            self._told = events
            self._note("resync", {**self._work, "events": events})

    def _note(self, name: str, value: dict[str, Any]) -> None:
        self._link.client.hset(self._link.keys.identity, name, orjson.dumps(value))

    def _run(self) -> None:
        try:
            if self._replay.run():
                self._finish()
        except (MnemobusError, RedisError, *AWAY) as error:
            logger.warning("applying the log again was interrupted, and will be begun again: %s", error)
        except Exception:
            logger.exception("applying the log again was interrupted, and will be begun again")
        finally:
            self.ended = True

    def _finish(self) -> None:
        outcome = self._replay.outcome
        # Without a moment to begin at, nobody knows what the store had.
        missing = outcome.missing if self._work["since"] else 0
        done = {**self._work, "events": outcome.events, "changed": outcome.changed, "missing": missing}
        self._note("resynced", done)
        self._link.client.hdel(self._link.keys.identity, "resync")
        logger.warning(
            "the log is applied again since %s: %d events, %d memories changed",
            self._work["since"] or "its beginning",
            outcome.events,
            outcome.changed,
        )
        if missing:
            logger.error(
                "the log no longer reaches back to %s: up to %d writes from then on may be lost",
                self._work["since"],
                missing,
            )
