"""The replay of a part of the log: it applies events once more, to the bus's own store or to another one.

The store makes this possible (store/merge.py): an event that was applied before changes nothing, any other is merged as
if it came late. So a replay needs no order with the workers, which go on meanwhile, and one that was killed is run
again. The replay takes care of the rest:

- *Nothing may be trimmed before it is read.* On each partition the replay has a consumer group of its own, which it
  moves up to the last entry that it has applied; trimming stops below every group (lua/trim.lua). It reads entries by
  their IDs, not through the group: it can repeat a read whose answer was lost, and nothing is pending. It removes the
  groups when it ends, also after an error; upkeep removes those of a replay that was killed.
- *It reports what the log no longer has*: LogTrimmed, unless the caller accepts a part (``partial``).
- *Copies go stale if rows change.* If the replay writes to the bus's own store, it fans out each batch as the workers
  do. A replay may be killed between commit and fan-out, and not be run again; so upkeep begins a new epoch after a
  kill.
- *Dead letters are left out.* They are not in the store, so they are no part of the result. The replay names other
  events that it can't apply, but writes no dead letters for them: the workers find out whether they can apply them.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from redis.exceptions import RedisError

from mnemobus.connection.link import ThreadedLink
from mnemobus.connection.server_errors import AWAY, code_of
from mnemobus.errors import LogTrimmed, MnemobusError, SettingsError
from mnemobus.keys import COPY_GROUP, REPLAY_GROUP, ZERO, Version
from mnemobus.settings import Settings
from mnemobus.store import open_writer

from .apply import Applier, decode_all
from .broker import BatchSize, Entry
from .standing import agree

logger = logging.getLogger("mnemobus.replay")

NAMED = 1_000
"""For at most this many events that can't be applied, the version and the reason are kept."""
_LETTERS = 8

Moment = float | Version
"""Seconds ago, by the clock of Redis, or a version."""


class Unapplied(NamedTuple):
    """An event that can't be applied, and is not a dead letter."""

    partition: int
    version: Version
    reason: str


@dataclass(slots=True)
class Outcome:
    """The progress of a replay.

    events        entries that were read
    applied       events that the store has now; in a dry run, those that it would get
    changed       memories that changed, counted once a batch, without those that a room's deletion removed
    dead_letters  events that were left out because they are dead letters
    unfit         how many other events can't be applied; ``named`` has the first of them
    ops           applied events by op; ``partitions``, by log partition
    first, last   versions of the first and the last entry read
    missing       at most how many of the requested events are no longer in the log
    share         the part of the work that is done, from 0 to 1
    """

    events: int = 0
    applied: int = 0
    changed: int = 0
    dead_letters: int = 0
    unfit: int = 0
    named: list[Unapplied] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)
    partitions: Counter[int] = field(default_factory=Counter)
    first: Version | None = None
    last: Version | None = None
    missing: int = 0
    share: float = 0.0


class _Stretch(NamedTuple):
    """The part of a log partition that is read: entries after ``start``, up to and including ``end``."""

    partition: int
    start: Version
    first: Version
    end: Version


class _Reach(NamedTuple):
    """The extent of a log partition: see lua/reach.lua."""

    first: Version | None
    last: Version | None
    trimmed_to: Version | None
    removed: int
    trimmed: int

    def lost(self, since: Version) -> int:
        """At most how many of the events from ``since`` on are no longer there."""
        if self.first is not None and self.first <= since:
            return 0
        if self.trimmed_to is not None and since >= self.trimmed_to:
            # All trimmed events were before that. Events that somebody deleted by hand may have been anywhere.
            return max(self.removed - self.trimmed, 0)
        return self.removed


class Replay:
    """One replay. `run` blocks; `stop` and ``outcome`` are for other threads.

    since, until  the first and the last version, or seconds ago; None for all that the log has
    partitions    None for all
    into          URL of a store, if it is not the bus's own
    partial       whether to go on if the log no longer reaches back to ``since``
    on_progress   called after each batch with the number of events that were read
    """

    def __init__(
        self,
        settings: Settings,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        partitions: Sequence[int] | None = None,
        into: str | None = None,
        partial: bool = False,
        dry_run: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.outcome = Outcome()
        self._since, self._until = since, until
        self._wanted = sorted(set(partitions or ()))
        self._partitions: Sequence[int] = ()
        """The partitions to read, oldest first: the log may have been repartitioned."""
        self._fan_out = into is None
        self._partial, self._dry_run = partial, dry_run
        self._on_progress = on_progress
        self._stopping = threading.Event()
        self._link = ThreadedLink(settings, connections=4)
        kind = REPLAY_GROUP if into is None else COPY_GROUP
        self.group = f"{kind}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._held: list[int] = []
        self._writer = open_writer(
            settings if into is None else settings.model_copy(update={"database_url": into})
        )
        self._applier = Applier(settings, self._link, self._writer, self._stopping)
        self._size = BatchSize(settings)

    def stop(self) -> None:
        """Make `run` return after the current batch."""
        self._stopping.set()

    def run(self) -> bool:
        """Apply the events; whether it came to the end.

        LogTrimmed if the log no longer has all of them, before anything is applied, or if they are trimmed meanwhile;
        IdentityMismatch if the store is not the bus's; StoreUnavailable, SchemaError or one of AWAY if a server can't
        be reached at the beginning. Later the replay waits for servers. Stopping if `stop` is called while it waits.
        """
        try:
            stretches = self._begin()
            if not self._dry_run:
                self._writer.open()
            if self._fan_out and not self._dry_run:
                identity = self._writer.identity()
                agree(self._link, identity, "")
                self._writer.expect(identity.store)
            for done, stretch in enumerate(stretches):
                self._replay(stretch, done, len(stretches))
            self.outcome.share = 1.0
            return not self._stopping.is_set()
        finally:
            self._release()
            self._writer.close()
            self._link.close()

    # Finding out what to read

    def _begin(self) -> list[_Stretch]:
        layout = self._link.keys.layout
        gone, gone_to = self._link.client.execute_command("HMGET", layout, "gone", "gone_to")
        since, until = self._version(self._since), self._version(self._until)
        there = self._link.keys.shape.all
        for partition in self._wanted:
            if partition not in there:
                raise SettingsError(
                    f"--partition {partition}: there are log partitions {there.start} to {there.stop - 1}"
                )
        self._partitions = self._wanted or there
        if since is not None and until is not None and until < since:
            raise SettingsError("--until is before --since")
        start = since.before() if since is not None else ZERO
        for partition in self._partitions if not self._dry_run else ():
            if self._link.run("hold", [self._link.keys.log(partition)], [self.group, str(start)]):
                self._held.append(partition)
        found = []
        gaps: list[tuple[int, Version | None]] = []
        if gone_to is not None and (since is None or since <= Version.parse(gone_to)) and not self._wanted:
            self.outcome.missing += int(gone)
            gaps.append((self._partitions[0], None))
        for partition in self._partitions:
            reach = self._reach(partition)
            lost = reach.lost(since or ZERO)
            if lost:
                gaps.append((partition, reach.first))
                self.outcome.missing += lost
            if reach.first is not None and reach.last is not None:
                end = reach.last if until is None else min(until, reach.last)
                if end > start:
                    found.append(_Stretch(partition, start, max(reach.first, start), end))
        if gaps and since is not None and not self._partial:
            where = ", ".join(
                f"at {first or 'nothing: it is empty'} in log partition {p}" for p, first in gaps
            )
            raise LogTrimmed(
                f"the log no longer reaches back to {since}: it begins {where}. Up to {self.outcome.missing:,} events"
                " before that were trimmed (MNEMOBUS_RETENTION). --partial applies what is there"
            )
        return found

    def _version(self, moment: Moment | None) -> Version | None:
        if moment is None or isinstance(moment, Version):
            return moment
        seconds, micros = self._link.client.time()
        return Version(max(int((seconds + micros / 1e6 - moment) * 1000), 0), 0)

    def _reach(self, partition: int) -> _Reach:
        keys = self._link.keys
        first, last, removed, trimmed, to = self._link.run(
            "reach", [keys.log(partition), keys.meter(partition)], []
        )
        first, last, to = (Version.parse(id) if id else None for id in (first, last, to))
        return _Reach(first, last, to, removed, trimmed)

    # Reading and applying

    def _replay(self, stretch: _Stretch, done: int, of: int) -> None:
        partition, position = stretch.partition, stretch.start
        letters = _Letters(self._link, partition)
        letters.read()
        named = len(self.outcome.named)
        while position < stretch.end and not self._stopping.is_set():
            entries = self._read(partition, position, stretch.end)
            if entries:
                self._take(partition, entries, letters)
                position = Version.parse(entries[-1][0])
                self._note(stretch, entries, position, done, of)
                if self._on_progress is not None:
                    self._on_progress(self.outcome.events)
            self._move(partition, position)
            if not entries:
                break
        # Workers may have written dead letters meanwhile: these count like the others.
        if len(self.outcome.named) > named:
            letters.read()
            ours = self.outcome.named[named:]
            self.outcome.named[named:] = [each for each in ours if each.version not in letters]
            found = len(ours) - len(self.outcome.named[named:])
            self.outcome.unfit -= found
            self.outcome.dead_letters += found
        for _, version, reason in self.outcome.named[named:]:
            logger.error("event %s of log partition %d can't be applied: %s", version, partition, reason)

    def _read(self, partition: int, position: Version, end: Version) -> list[Entry]:
        command = (
            "XRANGE",
            self._link.keys.log(partition),
            f"({position}",
            str(end),
            "COUNT",
            self._size.count,
        )
        entries: list[Entry] = self._applier.insist("the log", lambda: self._link.command(*command))
        if entries:
            self._size.saw(entries)
        return entries

    def _take(self, partition: int, entries: list[Entry], letters: _Letters) -> None:
        events, bad = decode_all(entries)
        unfit = [(version, reason) for version, reason in bad if version not in letters]
        fit = [event for event in events if event.version not in letters]
        self.outcome.dead_letters += len(entries) - len(fit) - len(unfit)
        if fit and not self._dry_run:
            applied = self._applier.repeat(partition, fit, fan_out=self._fan_out)
            self.outcome.changed += len(applied.won)
            refused = {item.event.version: item.reason for item in applied.refused}
            unfit += refused.items()
            fit = [event for event in fit if event.version not in refused]
        self.outcome.unfit += len(unfit)
        room = NAMED - len(self.outcome.named)
        self.outcome.named += [Unapplied(partition, version, reason) for version, reason in unfit[:room]]
        self.outcome.applied += len(fit)
        self.outcome.partitions[partition] += len(fit)
        self.outcome.ops.update(event.op for event in fit)

    def _note(self, stretch: _Stretch, entries: list[Entry], position: Version, done: int, of: int) -> None:
        outcome = self.outcome
        outcome.events += len(entries)
        first = Version.parse(entries[0][0])
        outcome.first = first if outcome.first is None else min(outcome.first, first)
        outcome.last = position if outcome.last is None else max(outcome.last, position)
        span = stretch.end.ms - stretch.first.ms
        outcome.share = (done + ((position.ms - stretch.first.ms) / span if span else 1.0)) / of

    # The group

    def _move(self, partition: int, position: Version) -> None:
        """Allow trimming up to here, and show that this replay is alive. LogTrimmed if the group is gone."""
        if partition not in self._held:
            return
        log = self._link.keys.log(partition)
        alive = ("XREADGROUP", "GROUP", self.group, self.group, "COUNT", 1, "STREAMS", log, "0")
        moved = ("XGROUP", "SETID", log, self.group, str(position))

        def move() -> Exception | None:
            for reply in self._link.pipeline([alive, moved]):
                if not isinstance(reply, Exception):
                    continue
                if code_of(reply) == "NOGROUP":
                    return reply
                if code_of(reply) == "OOM":
                    continue  # Redis 7.0 moves no group while it is full; then it is moved later, and more is kept
                raise reply
            return None

        if self._applier.insist("the log", move) is not None:
            self._held.remove(partition)
            raise LogTrimmed(
                f"the group {self.group!r} of log partition {partition} is gone: Redis was flushed or has restarted"
                " without it, or this process was paused for long. Run the same command again"
            )

    def _release(self) -> None:
        keys = self._link.keys
        try:
            for partition in self._held:
                self._link.run("release", [keys.log(partition)], [self.group])
        except (MnemobusError, RedisError, *AWAY) as error:
            logger.warning("the group %r could not be removed; workers will do that: %s", self.group, error)


class _Letters:
    """The versions of a log partition's dead letters."""

    def __init__(self, link: ThreadedLink, partition: int) -> None:
        self._link = link
        self._key = link.keys.dead(partition)
        self._last = "0-0"
        self._versions: set[Version] = set()

    def __contains__(self, version: Version) -> bool:
        return version in self._versions

    def read(self) -> None:
        """Read those that are new."""
        while found := self._link.command("XRANGE", self._key, f"({self._last}", "+", "COUNT", _LETTERS):
            self._last = found[-1][0].decode()
            for _, fields in found:
                with suppress(ValueError):
                    self._versions.add(Version.parse(fields[1]))
