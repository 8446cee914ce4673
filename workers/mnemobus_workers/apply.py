"""How a worker applies a batch: it commits the batch, tells everyone, and never loses an event on the way.

The order of the steps keeps the promises. The commit comes first, one transaction for the events of all log partitions;
then the dead letters, if any; then the fan-out, which also confirms the batch (fanout.py). A worker may die between any
two steps, or during one: a batch that is not confirmed is applied again. That changes nothing more, except that
invalidations may be sent twice.

Invalidations are sent for every event of the batch, also for those that lost against a newer version in the store: a
batch that is applied again after a crash between commit and fan-out looks just like that.

Whose fault is it?

- The data's (`Rejected`): the batch is halved until the faulty event stands alone. That one becomes a dead letter, with
  the database's message as the reason; the rest is committed.
- Its amount's (`StoreTooSlow`): the batch is halved the same way, and later batches begin that small until the database
  is quick again. A single event that takes too long gets twice the time at each retry.
- The database's or Redis's (anything else that they raise): the worker waits and retries for as long as it takes. The
  entries stay pending, upkeep renews them, and none becomes a dead letter.
- The worker's own (any other exception): the batch fails, stays pending, and is claimed again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from redis.exceptions import RedisError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

from mnemobus.connection.link import Call, ThreadedLink, script
from mnemobus.connection.server_errors import AWAY, meaning
from mnemobus.errors import (
    BadEvent,
    IdentityMismatch,
    MnemobusError,
    Rejected,
    SchemaError,
    SettingsError,
    StoreTooSlow,
)
from mnemobus.keys import Version
from mnemobus.log.events import DELETE_ROOM, Event, decode, version_of
from mnemobus.log.pending import INDEXED
from mnemobus.settings import Settings
from mnemobus.store import Applied, Cursor, Deletion, Refused, Writer
from mnemobus.store.merge import BEGINNING, STEP

from .broker import Batch, Entry, Stopping
from .fanout import Confirmed, FanOut, Part
from .report import State
from .standing import Standing, Witness, witness

logger = logging.getLogger("mnemobus.apply")

_REPORT_EVERY = 30.0

_STEP_SECONDS = 0.1
"""About how long a step of a deletion may take: others may have to wait for it."""
_FEWEST, _MOST = 50, 2_000
"""Rows of such a step, as long as the database can do that many."""
_MOST_PATIENCE = 64.0
"""A single event may take at most this many times MNEMOBUS_DATABASE_TIMEOUT."""

T = TypeVar("T")


def _passes(error: BaseException) -> bool:
    """Whether a retry can help: a server is away, or can't be used until somebody repairs it."""
    return isinstance(error, (MnemobusError, RedisError, *AWAY)) and not isinstance(error, Rejected)


def decode_all(entries: Sequence[Entry]) -> tuple[list[Event], list[tuple[Version, str]]]:
    """The events of log entries; and the version of each entry that is not an event, with the reason."""
    events, bad = [], []
    for entry_id, fields in entries:
        id = Version.parse(entry_id)
        try:
            events.append(decode(id, fields))
        except BadEvent as error:
            bad.append((version_of(id, fields), str(error)))
    return events, bad


def _read(partition: int, entries: Sequence[Entry], epoch: str) -> Part:
    """A log partition's part of a batch, before its result is known."""
    events, bad = decode_all(entries)
    # Agents that follow the log have seen these events, except requeued ones, which keep an older version.
    requeued = any(b"as" in fields[::2] for _, fields in entries)
    return Part(partition, events, dict(bad), read_in="" if requeued else epoch)


def _share_out(applied: Applied, parts: Sequence[Part]) -> None:
    """Give each part the results of its own events."""
    if not (applied.refused or applied.cleared):
        return
    owners: dict[int, Part] = {}
    memories: dict[str, Part] = {}
    rooms: dict[tuple[str, str], Part] = {}
    for part in parts:
        for event in part.events:
            owners[id(event)] = part
            if event.op == DELETE_ROOM:
                rooms[event.dimensions[:2]] = part
            else:
                memories[event.id] = part
    for event, reason in applied.refused:
        owners[id(event)].dead[event.version] = reason
    for memory, dimensions in applied.cleared:
        # Its room was deleted, or it was made again with other dimensions.
        owner = rooms.get(dimensions[:2]) or memories.get(memory) or parts[0]
        owner.cleared.append((memory, dimensions))


def _divide(part: Part, large: Collection[tuple[str, str]]) -> tuple[Part, Part]:
    """Divide a part into what can be fanned out now, and the deletions of these rooms, which are not finished."""
    later = [e for e in part.events if e.op == DELETE_ROOM and e.dimensions[:2] in large]
    if not later:
        return part, replace(part, events=[], dead={}, cleared=[])
    late = {id(event) for event in later}
    now = [event for event in part.events if id(event) not in late]
    emptied = list(dict.fromkeys(event.dimensions for event in later))
    return replace(part, events=now, emptied=emptied), replace(part, events=later, dead={}, cleared=[])


class Applier:
    """Applies batches, from any number of threads."""

    def __init__(
        self,
        settings: Settings,
        link: ThreadedLink,
        writer: Writer,
        stopping: threading.Event,
        state: State | None = None,
        standing: Standing | None = None,
    ) -> None:
        self._settings = settings
        self._link = link
        self._writer = writer
        self._standing = standing
        self._open = False
        self._opening = threading.Lock()
        self._stopping = stopping
        self._state = state or State()
        self._everyone = FanOut(settings, link)
        self._size = settings.batch_size
        """Events that are committed at once, at most: fewer while the database is slow."""
        self._figures = threading.Lock()
        self._events = 0
        self._batches = 0
        self._reported = time.monotonic()

    def open(self) -> None:
        """Open the store; wait for it if necessary. Stopping if the worker shuts down meanwhile, or if the store is not
        the bus's."""
        with self._opening:
            if not self._open:
                self.insist("the store", self._writer.open)
                self.insist("who the store is", self._agree)
                self._open = True
        if self._standing is not None and self._standing.refused:
            raise Stopping(self._standing.refused)

    def _agree(self) -> None:
        if self._standing is not None:
            with suppress(IdentityMismatch):
                self._standing.agree()

    def close(self) -> None:
        with self._opening:
            self._open = False
            self._writer.close()

    def apply(self, batch: Batch) -> None:
        """Commit, fan out and confirm. If this raises, the batch stays pending."""
        self.open()
        parts = [_read(partition, entries, batch.epoch) for partition, entries in batch.parts.items()]
        applied = Applied()
        if batch.hopeless is not None:
            [part], [(id, fields)] = parts, batch.entries
            part.dead = {version_of(Version.parse(id), fields): batch.hopeless}
        elif events := [event for part in parts for event in part.events]:
            applied = self._commit(events)
            _share_out(applied, parts)
        witnesses: list[Witness] = []
        if self._standing is not None:
            found = (witness(part.partition, part.events, part.dead, applied.won) for part in parts)
            witnesses = [last for last in found if last is not None]
        while True:
            # Redis may restart meanwhile, and lose the letters, and nobody looks at a confirmed entry again. So the #
            # letters are written and the batch is confirmed in one epoch, or both are done again.
            epoch = self._link.epoch
            for part in parts:
                if part.dead:
                    self.insist("the dead letters", partial(self._bury, batch, part))
            if self._tell(parts, applied, epoch, batch.ids(), witnesses):
                break
        self._state.applied(len(batch))
        self._report(len(batch))

    def repeat(self, partition: int, events: Sequence[Event], *, fan_out: bool) -> Applied:
        """Commit events that may have been applied before, and fan out those that are not refused. This writes no dead
        letters, and confirms nothing. Stopping if a server is away until the worker has to stop."""
        applied = self._commit(events)
        if fan_out:
            # Naming a refused one would tell its writer that the store has it.
            refused = {item.event.version for item in applied.refused}
            kept = [event for event in events if event.version not in refused]
            self._tell([Part(partition, kept, cleared=applied.cleared)], applied, None, {})
        else:
            for deletion in applied.unfinished:
                self._clear(deletion)
        return applied

    def _tell(
        self,
        parts: Sequence[Part],
        applied: Applied,
        epoch: str | None,
        done: Confirmed,
        witnesses: Sequence[Witness] = (),
    ) -> bool:
        """Fan out what was committed, and confirm it in the same call. False if this epoch is over (None: any epoch
        will do). Deletions that are not finished are finished first. Before that, all other events are fanned out, and
        the message that these rooms are empty now."""

        def end(parts: Sequence[Part], done: Confirmed, witnesses: Sequence[Witness] = ()) -> bool:
            if epoch is None:
                self._everyone.tell(parts)
                return True
            return self._everyone.confirm(epoch, parts, done, witnesses)

        if not applied.unfinished:
            return self.insist("the fan-out", lambda: end(parts, done, witnesses))
        large = {deletion.room for deletion in applied.unfinished}
        before, later = zip(*(_divide(part, large) for part in parts), strict=True)
        # Other log partitions need not wait for these deletions.
        waiting = {part.partition: done.pop(part.partition, []) for part in later if part.events}
        if not self.insist("the fan-out", lambda: end(before, done, witnesses)):
            return False
        for deletion in applied.unfinished:
            self._clear(deletion)
            owner = next(
                part for part in later if any(e.dimensions[:2] == deletion.room for e in part.events)
            )

            def tell(deletion: Deletion = deletion, owner: Part = owner) -> None:
                for some in self._writer.ended(deletion):
                    self._everyone.tell([Part(owner.partition, [], cleared=some, read_in=owner.read_in)])

            self.insist("the fan-out", tell)
        return self.insist("the fan-out", lambda: end(later, waiting))

    def _commit(self, events: Sequence[Event]) -> Applied:
        """Commit what can be committed, in steps as large as the database can do; the rest is in ``refused``."""
        applied = Applied()
        left = list(events)
        while left:
            size = self._size
            some, left = left[:size], left[size:]
            began = time.monotonic()
            try:
                applied.add(self._commit_at_once(some))
            except Rejected as error:
                if len(some) > 1:
                    middle = len(some) // 2
                    applied.add(self._commit(some[:middle]))
                    applied.add(self._commit(some[middle:]))
                else:
                    applied.refused.append(Refused(some[0], str(error)))
            except StoreTooSlow as error:
                self._size = max(1, len(some) // 2)
                left = [*some, *left]
                logger.warning("%d events at once: %s; trying half as many", len(some), error)
            else:
                # Twice as many take about twice as long.
                if len(some) == size < self._settings.batch_size and self._quick(began):
                    self._size = min(2 * size, self._settings.batch_size)
        return applied

    def _commit_at_once(self, events: Sequence[Event]) -> Applied:
        try:
            return self.insist("the store", lambda: self._writer.apply(events), smaller=True)
        except StoreTooSlow:
            if len(events) > 1:
                raise
        return self._patiently(lambda patience: self._writer.apply(events, patience=patience))

    def _clear(self, deletion: Deletion) -> None:
        """Finish a deletion, in steps that delay nobody for long. Stopping if the worker has to stop before that."""
        place: Cursor | None = BEGINNING
        rows = STEP
        while place is not None:
            if self._stopping.is_set():
                raise Stopping("the deletion of a room was not done before the worker shut down")
            began = time.monotonic()
            step = partial(self._writer.clear, deletion, place, rows)
            try:
                place = self.insist("the store", step, smaller=True)
            except StoreTooSlow as error:
                logger.warning("%d memories of a deleted room at once: %s", rows, error)
                if rows == 1:
                    place = self._patiently(lambda patience, step=step: step(patience=patience))  # type: ignore[misc]
                rows = max(1, rows // 2)
                continue
            took = time.monotonic() - began
            if took > _STEP_SECONDS:
                rows = max(min(rows, _FEWEST), rows // 2)
            elif took < _STEP_SECONDS / 3:
                rows = min(2 * rows, _MOST)

    def _quick(self, began: float) -> bool:
        return time.monotonic() - began < self._settings.database_timeout / 4

    def _patiently(self, work: Callable[[float], T]) -> T:
        """Do work that took too long and can't be made smaller: each retry gets twice the time."""
        patience = 2.0

        def attempt() -> T:
            nonlocal patience
            try:
                return work(patience)
            except StoreTooSlow:
                patience = min(2 * patience, _MOST_PATIENCE)
                raise

        return self.insist("the store", attempt)

    def insist(self, what: str, work: Callable[[], T], *, smaller: bool = False) -> T:
        """Do something for which the database or Redis may not be ready; retry until it is done or the worker stops.

        smaller  whether to raise StoreTooSlow, as the caller can ask for less
        """

        def passes(error: BaseException) -> bool:
            return _passes(error) and not (smaller and isinstance(error, StoreTooSlow))

        try:
            return work()  # tenacity takes as long as a round trip, and is rarely needed
        except Exception as error:
            if not passes(error):
                raise
            logger.debug("%s: %s; trying again at once", what, error)

        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if error is not None:
                self._state.waits(what, error)
            log = logger.warning if state.attempt_number in (1, 10, 100) else logger.debug
            if isinstance(error, (SchemaError, SettingsError)):  # somebody has to repair it
                log = logger.error if state.attempt_number % 10 == 1 else logger.debug
            log("%s: %s; trying again until it works", what, meaning(error))

        retrying = Retrying(
            retry=retry_if_exception(passes),
            wait=wait_random_exponential(multiplier=0.1, max=1),
            sleep=sleep_using_event(self._stopping),
            stop=stop_when_event_set(self._stopping),
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            with self._state.trying(what):
                return retrying(work)
        except Exception as error:
            if not passes(error):
                raise
            raise Stopping(f"the worker shut down before {what} could be used: {error}") from error

    def _bury(self, batch: Batch, part: Part) -> None:
        partition = part.partition
        entries = {
            version_of(Version.parse(id), fields): (id, fields) for id, fields in batch.parts[partition]
        }
        keys = self._link.keys
        places = [keys.dead(partition), keys.reasons(partition), keys.meter(partition)]
        while self._link.run("index", places, [INDEXED]):
            pass  # letters of an older worker: one of them may be of this batch
        calls: list[Call] = []
        for version, reason in part.dead.items():
            logger.error("event %s of log partition %d can't be applied: %s", version, partition, reason)
            id, fields = entries[version]
            if id != str(version).encode():  # it was requeued: the letter names its version itself
                fields = [
                    part
                    for name in range(0, len(fields), 2)
                    if fields[name] != b"as"
                    for part in fields[name : name + 2]
                ]
            limit = self._settings.dead_letter_bytes
            calls.append((script("dead"), places, [str(version), reason, limit, *fields]))
        left_out = given_up = 0
        for reply in self._link.pipeline(calls):
            if isinstance(reply, Exception):
                raise reply
            left_out += reply[1]
            given_up += reply[2]
        if left_out:
            logger.error(
                "log partition %d: the dead letters have come to MNEMOBUS_DEAD_LETTER_BYTES: %d were kept without their"
                " content, and %d older ones were given up. Requeue or drop some: mnemobus dead list",
                partition,
                left_out,
                given_up,
            )

    def _report(self, events: int) -> None:
        with self._figures:
            self._events += events
            self._batches += 1
            now = time.monotonic()
            elapsed = now - self._reported
            if elapsed < _REPORT_EVERY:
                return
            logger.info(
                "applied %d events in %d batches, %.0f a second",
                self._events,
                self._batches,
                self._events / elapsed,
            )
            self._events = self._batches = 0
            self._reported = now
