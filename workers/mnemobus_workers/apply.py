"""What a worker does with a batch: commit it, tell everyone, and never lose an event on the way.

The order is what keeps the promises. The commit comes first; then the dead letters, if any; then the fan-out; the
broker confirms last. A worker may die between any two of these, or in them: all of it is done again, to no
further effect, except that invalidations are sent twice.

Invalidations are sent for every event of the batch, also for those that lost against a newer version in the store: a
batch that is applied again after a crash between commit and fan-out looks just like that.

Whose fault is it?

- The data's (`Rejected`): the batch is halved until the event that is to blame stands alone. That one goes to the dead
  letters, with the database's words; the rest is committed.
- Its amount's (`StoreTooSlow`): the batch is halved the same way, and what follows begins that small until the database
  is quick again. A single event that takes too long is given twice as long each time.
- The database's or Redis's (anything else that they raise): wait and try again, for as long as it takes. The entries
  stay pending, upkeep renews them, nothing goes to the dead letters.
- Our own (any other exception): the batch fails, stays pending, and is claimed again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import TypeVar

import orjson
from redis.exceptions import RedisError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

from mnemobus.connection.link import Call, Script, ThreadedLink, script
from mnemobus.connection.server_errors import AWAY, code_of, meaning
from mnemobus.connection.transport import Command
from mnemobus.errors import (
    BadEvent,
    IdentityMismatch,
    MnemobusError,
    Rejected,
    SchemaError,
    SettingsError,
    StoreTooSlow,
)
from mnemobus.keys import Dimensions, Version, id_scope
from mnemobus.log.events import DELETE_ROOM, Event, decode, version_of
from mnemobus.log.pending import INDEXED
from mnemobus.settings import Settings
from mnemobus.store import Applied, Cursor, Deletion, Refused, Writer
from mnemobus.store.merge import BEGINNING, STEP

from .broker import Batch, Entry, Stopping
from .report import State
from .standing import Standing, Witness, witness

logger = logging.getLogger("mnemobus.apply")

SCOPES_PER_CALL = 500
"""Scopes that one fan-out names at most: a script blocks the server while it runs."""
FEED_BYTES = 4 << 20
"""Bytes of messages that a feed partition keeps, about."""
_REPORT_EVERY = 30.0
_PLACES = 4_096
"""Combinations of names whose scopes are remembered: events repeat them."""

_STEP_SECONDS = 0.1
"""How long a step of a deletion takes, about: others may have to wait for it."""
_FEWEST, _MOST = 50, 2_000
"""Rows of such a step, as long as the database gets them done at all."""
_MOST_PATIENCE = 64.0
"""How many times as long as MNEMOBUS_DATABASE_TIMEOUT a single event may take."""

T = TypeVar("T")

Touched = defaultdict[int, tuple[dict[str, str], dict[str, None]]]
"""By feed partition: scopes, each with the last version that touched it, if any; and versions. Each once, in order."""


def _passes(error: BaseException) -> bool:
    """Whether trying again can help: a server that is away, or is not fit for use until somebody sees to it."""
    return isinstance(error, (MnemobusError, RedisError, *AWAY)) and not isinstance(error, Rejected)


def decode_all(entries: Sequence[Entry]) -> tuple[list[Event], list[tuple[Version, str]]]:
    """The events of log entries; and the version of each entry that is none, with the reason."""
    events, bad = [], []
    for entry_id, fields in entries:
        id = Version.parse(entry_id)
        try:
            events.append(decode(id, fields))
        except BadEvent as error:
            bad.append((version_of(id, fields), str(error)))
    return events, bad


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
        self._shared_places = lru_cache(_PLACES)(self._find_places)
        self._size = settings.batch_size
        """Events that are committed at once, at most: fewer while the database is slow."""
        self._figures = threading.Lock()
        self._events = 0
        self._batches = 0
        self._reported = time.monotonic()

    def open(self) -> None:
        """Open the store, waiting for it if need be. Stopping if the worker shuts down meanwhile, or if the store is
        not the bus's."""
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
        """Commit, fan out. What this raises leaves the batch pending."""
        self.open()
        events, dead = decode_all(batch.entries)
        applied = Applied()
        if batch.hopeless is not None:
            id, fields = batch.entries[0]
            dead = [(version_of(Version.parse(id), fields), batch.hopeless)]
        elif events:
            applied = self._commit(events)
            dead += [(refused.event.version, refused.reason) for refused in applied.refused]
        last = None
        if self._standing is not None:
            last = witness(batch.partition, events, dict(dead), applied.won)
        # Who follows the log has seen these, but for what keeps an older version.
        read_in = "" if any(b"as" in fields[::2] for _, fields in batch.entries) else batch.epoch
        while True:
            epoch = self._link.epoch
            if dead:
                self.insist("the dead letters", lambda: self._bury(batch, dead))
            self._tell(batch.partition, events, applied, dict(dead), last, read_in)
            if not dead or epoch == self._link.epoch:
                break
            # Redis restarted meanwhile, and may have lost the letters: what is confirmed, nobody looks at again.
        self._report(len(batch.entries))

    def repeat(self, partition: int, events: Sequence[Event], *, fan_out: bool) -> Applied:
        """Commit events that may have been applied before, and fan out those that are not refused. Nothing is
        buried. Stopping if a server is away until we are to stop."""
        applied = self._commit(events)
        if fan_out:
            # To name one that was refused would tell its writer that the store has it.
            refused = {item.event.version for item in applied.refused}
            kept = [event for event in events if event.version not in refused]
            self._tell(partition, kept, applied, {})
        else:
            for deletion in applied.unfinished:
                self._clear(deletion)
        return applied

    def _tell(
        self,
        partition: int,
        events: Sequence[Event],
        applied: Applied,
        dead: dict[Version, str],
        last: Witness | None = None,
        read_in: str = "",
    ) -> None:
        """Fan out what was committed. Deletions that are not finished are finished first; all others are told of
        before that, and that these rooms are empty now, too."""
        later: list[Event] = []
        if applied.unfinished:
            large = {deletion.room for deletion in applied.unfinished}
            later = [e for e in events if e.op == DELETE_ROOM and e.dimensions[:2] in large]
            ids = {event.version for event in later}
            events = [event for event in events if event.version not in ids]
        emptied = list({event.dimensions for event in later})
        self.insist(
            "the fan-out",
            lambda: self._fan_out(partition, events, applied.cleared, dead, last, emptied, read_in),
        )
        if not later:
            return
        for deletion in applied.unfinished:
            self._clear(deletion)

            def tell(deletion: Deletion = deletion) -> None:
                for some in self._writer.ended(deletion):
                    self._fan_out(partition, [], some, {}, read_in=read_in)

            self.insist("the fan-out", tell)
        self.insist("the fan-out", lambda: self._fan_out(partition, later, [], {}, read_in=read_in))

    def _commit(self, events: Sequence[Event]) -> Applied:
        """Commit what can be committed, as much at once as the database gets done; the rest is in ``refused``."""
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
                # Twice as much takes twice as long, about.
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
        """Do what is left of a deletion, in steps that hold nobody up. Stopping if we are to stop before it is done."""
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
        """Do what took too long, and can't be made smaller: each time it is given twice as long."""
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
        """Do something that a database or Redis may be in no state for, until it is done or we shut down.

        smaller  whether to raise StoreTooSlow, as the caller can ask for less
        """

        def passes(error: BaseException) -> bool:
            return _passes(error) and not (smaller and isinstance(error, StoreTooSlow))

        try:
            return work()  # tenacity takes as long as a round trip, and is hardly ever needed
        except Exception as error:
            if not passes(error):
                raise
            logger.debug("%s: %s; trying again at once", what, error)

        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if error is not None:
                self._state.waits(what, error)
            log = logger.warning if state.attempt_number in (1, 10, 100) else logger.debug
            if isinstance(error, (SchemaError, SettingsError)):  # it needs somebody to see to it
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
            raise Stopping(f"{what} was not to be had before the worker shut down: {error}") from error

    def _bury(self, batch: Batch, dead: Sequence[tuple[Version, str]]) -> None:
        entries = {version_of(Version.parse(id), fields): (id, fields) for id, fields in batch.entries}
        keys, partition = self._link.keys, batch.partition
        places = [keys.dead(partition), keys.reasons(partition), keys.meter(partition)]
        while self._link.run("index", places, [INDEXED]):
            pass  # letters of an older worker: one of them may be of this very batch
        calls: list[Call] = []
        for version, reason in dead:
            logger.error(
                "event %s of log partition %d can't be applied: %s", version, batch.partition, reason
            )
            id, fields = entries[version]
            if id != str(version).encode():  # it was requeued: the letter says which version it has by itself
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

    def _fan_out(
        self,
        log_partition: int,
        events: Sequence[Event],
        cleared: Sequence[tuple[str, Dimensions]],
        dead: dict[Version, str],
        last: Witness | None = None,
        emptied: Sequence[Dimensions] = (),
        read_in: str = "",
    ) -> None:
        """``read_in``: the epoch in which the events were read from the log, each under its own ID; empty otherwise."""
        fanout = self._script()
        while True:
            epoch = self._link.epoch
            calls: list[Call | Command] = []
            for feed_partition, scopes, payload in self._messages(
                log_partition, epoch, events, cleared, dead, emptied, bool(read_in) and read_in == epoch
            ):
                keys = [self._link.keys.feed(feed_partition)]
                keys += [self._link.keys.bucket(epoch, scope) for scope in scopes]
                calls.append((fanout, keys, (payload, self._settings.feed_length, FEED_BYTES)))
            # A flush begins an epoch without breaking a connection. Where there is none, nobody has filled a bucket
            # since the flush, and whoever does so later reads what is committed already.
            calls.append(("HGET", self._link.keys.epoch, "epoch"))
            if last is not None:
                calls.append(("HSET", self._link.keys.identity, *last))
            replies = self._link.pipeline(calls)
            noted = replies.pop() if last is not None else None
            # A full Redis notes nothing new. The witness of an earlier batch has to do.
            if isinstance(noted, Exception) and code_of(noted) != "OOM":
                raise noted
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            current = replies[-1]
            if current is not None and current.decode() != self._link.epoch:
                self._link.enter(current.decode())
            if epoch == self._link.epoch:
                return
            # Redis restarted or was flushed meanwhile: the buckets that agents fill now are others.

    def _script(self) -> Script:
        """fanout.lua; where the server has the flag for it, also when memory is full.

        It frees buckets and keeps the feed at its length: to refuse it would leave agents with stale copies.
        """
        plain = script("fanout")
        server = self._link.server
        return plain if server is None or server.speaks < (7, 0) else plain.flagged("allow-oom")

    def _messages(
        self,
        log_partition: int,
        epoch: str,
        events: Sequence[Event],
        cleared: Sequence[tuple[str, Dimensions]],
        dead: dict[Version, str],
        emptied: Sequence[Dimensions],
        first_hand: bool,
    ) -> Iterator[tuple[int, list[str], bytes]]:
        """Feed partition, scopes and payload of each message; those of deleted rooms themselves come last."""
        touched: Touched = defaultdict(lambda: ({}, {}))
        rooms: Touched = defaultdict(lambda: ({}, {}))
        partition_of = self._link.keys.feed_partition
        for event in events:
            version = str(event.version)
            if event.op == DELETE_ROOM:
                [scope] = event.scopes()
                scopes, versions = rooms[partition_of(scope)]
                scopes[scope], versions[version] = version, None
                continue
            for scope, partition in self._places(event.id, event.dimensions):
                scopes, versions = touched[partition]
                scopes[scope], versions[version] = version, None
        for id, dimensions in cleared:
            for scope, partition in self._places(id, dimensions):
                touched[partition][0].setdefault(scope, "")
        for dimensions in emptied:
            for scope, partition in self._shared_places(dimensions):
                touched[partition][0].setdefault(scope, "")
        reasons = {str(version): reason for version, reason in dead.items()}
        for group in (touched, rooms):
            for partition, (scopes, versions) in group.items():
                names = list(scopes)
                for start in range(0, len(names), SCOPES_PER_CALL):
                    last = start + SCOPES_PER_CALL >= len(names)
                    part = names[start : start + SCOPES_PER_CALL]
                    # A version is named with the last of its scopes: who waits for it may then read all of them.
                    body: dict[str, object] = {
                        "p": log_partition,
                        "e": epoch,
                        "v": list(versions) if last else [],
                        "s": part,
                    }
                    letters = {v: reasons[v] for v in versions if v in reasons} if last and reasons else {}
                    if letters:
                        body["d"] = letters
                    if first_hand:
                        body["l"] = 1
                        if last and len(versions) > 1:
                            places = {version: place for place, version in enumerate(versions)}
                            body["t"] = [places.get(scopes[scope], 0) for scope in part]
                    yield partition, part, orjson.dumps(body)

    def _places(self, id: str, dimensions: Dimensions) -> list[tuple[str, int]]:
        """The scopes that a write touches, and the feed partition of each."""
        scope = id_scope(id)
        return [(scope, self._link.keys.feed_partition(scope)), *self._shared_places(dimensions)]

    def _find_places(self, dimensions: Dimensions) -> list[tuple[str, int]]:
        """Those that memories of these dimensions share."""
        return [(scope, self._link.keys.feed_partition(scope)) for scope in dimensions.shared_scopes()]

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
