"""Upkeep: what a worker process does besides applying. It renews its entries, reports its state, and tidies the log.

There are two threads per process: one works with Redis alone, the other also asks the store. No error ends them: they
log it, and try again the next time.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from typing import Any

import dramatiq
import orjson
from dramatiq.middleware import Middleware
from redis.exceptions import RedisError

from mnemobus.connection.server_errors import AWAY, meaning
from mnemobus.errors import IdentityMismatch, MnemobusError
from mnemobus.keys import APPLY_GROUP, COPY_GROUP, ENDED, REPLAY_GROUP, Version

from .apply import Applier
from .broker import HELD_BATCHES, Stopping, StreamBroker
from .report import Reporter
from .standing import MARGIN

logger = logging.getLogger("mnemobus.upkeep")

TIDY_EVERY = 10.0
"""About how many seconds pass between two rounds of tidying."""
CONSUMER_IDLE = 3600.0
"""Seconds without a sign of life after which a consumer that holds nothing is forgotten."""
REPLAY_IDLE = 3600.0
"""Seconds without a sign of life after which a replay counts as killed, and no longer holds back trimming."""
PRODUCER_IDLE = 7 * 86_400.0
"""Seconds after which a producer's last call is forgotten. An outbox may repeat it when its agent starts again, after a
weekend, say."""
PRODUCER_WATCHED = 3600.0
"""Seconds, by this process's own clock, for which such a record must also have stayed unchanged. Redis's clock may have
jumped ahead, and a producer that is at work must not be forgotten because of that."""
_SAMPLES = 32
"""Deliveries that are remembered over the time of retention."""
_SETTLES = 0.2
"""Seconds before a change is reported: other changes of that time are reported with it."""
PRODUCERS = 20_000
"""At most this many producers of a log partition are remembered; the oldest are forgotten first."""
REASONS = 10_000
"""For at most this many requeued and dropped dead letters of a log partition, Redis keeps the result, for
`PRODUCER_IDLE`."""
_REASONS_EVERY = 3600.0
_LAYOUT_EVERY = 0.25
"""Seconds between two checks whether the log was repartitioned: writes to new partitions wait for the next check."""
_TRIM_ROUNDS = 20
_SCAN = 500


class Delivered:
    """The last deliveries of a log partition, with the times of this process's own clock.

    This is for IDs that are ahead of Redis's clock: it was set back, and does not tell how old they are.
    """

    def __init__(self, retention: float) -> None:
        self._retention = retention
        self._samples: deque[tuple[float, bytes]] = deque()
        self._epoch = ""
        self.old = b"0-0"
        """All entries up to this ID were delivered at least ``retention`` seconds ago."""

    def note(self, last: bytes, epoch: str) -> None:
        """``last`` is the ID that was delivered last, in the log of this epoch."""
        now = time.monotonic()
        if epoch != self._epoch:  # it may be another log
            self._samples.clear()
            self._epoch, self.old = epoch, b"0-0"
        if not self._samples or now - self._samples[-1][0] >= self._retention / _SAMPLES:
            self._samples.append((now, last))
        while self._samples and now - self._samples[0][0] >= self._retention:
            self.old = self._samples.popleft()[1]


class Upkeep:
    """The upkeep of one worker process."""

    def __init__(self, broker: StreamBroker, applier: Applier) -> None:
        self._broker = broker
        self._applier = applier
        self._settings = broker.settings
        self._link = broker.link
        self._state = broker.state
        self._reporter = Reporter(broker.link, broker.consumer_name, broker.state, broker.settings.claim_idle)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._delivered: defaultdict[int, Delivered] = defaultdict(
            lambda: Delivered(self._settings.retention)
        )
        """By log partition."""
        self._leaving: dict[int, dict[bytes, tuple[bytes, float]]] = {}
        """By log partition: producers that will be forgotten, each with its record, and since when it is watched."""
        self._given_up = 0
        """Partitions with lower numbers were given up by the last round."""
        self.failures = 0
        self._said = ""
        self._reasons_at: dict[int, float] = {}
        """By log partition: when to look through the reasons again."""

    def start(self) -> None:
        # The store may take any time to answer, and renewing must not wait for it.
        for name, work in (("upkeep", self._run), ("standing", self._look_again_and_again)):
            self._threads.append(threading.Thread(target=work, name=f"mnemobus-{name}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        self._stop.set()
        self._state.changed.set()
        for thread in self._threads:
            thread.join()
        if self._threads:
            self._reporter.leave()
        if self._broker.standing is not None:
            self._broker.standing.stop()

    def _run(self) -> None:
        opener = threading.Thread(target=self._open_store, name="mnemobus-open-store", daemon=True)
        opener.start()
        renew_every = self._settings.claim_idle / 3
        now = time.monotonic()
        renew_at, tidy_at, tell_at, look_at = now + renew_every, now + random.uniform(0, TIDY_EVERY), now, now
        while not self._stop.is_set():
            # A change is reported at once, but not several times in a fraction of a second.
            if self._state.changed.wait(max(0.0, min(renew_at, tell_at, look_at) - now)):
                self._stop.wait(_SETTLES)
            now = time.monotonic()
            if self._stop.is_set():
                break
            if now >= look_at:
                self._look_at_layout()
                look_at = now + _LAYOUT_EVERY
            if now >= renew_at:
                self._attempt("renewing what is being applied", self._broker.renew)
                renew_at = now + renew_every
            if now >= tell_at or self._state.changed.is_set():
                self._state.changed.clear()
                self._reporter.tell()
                tell_at = now + self._reporter.every
            if now >= tidy_at:
                self._attempt("tidying the log", self.tidy)
                tidy_at = now + random.uniform(0.5, 1.5) * TIDY_EVERY
            now = time.monotonic()

    def _open_store(self) -> None:
        """Make the schema before the first event comes: agents wait for it."""
        try:
            self._applier.open()
        except Stopping as error:
            logger.info("%s", error)
        except Exception as error:
            self.failures += 1
            self._state.failed("opening the store", error)
            logger.exception("the store can't be opened; the next batch tries again")

    def _look_again_and_again(self) -> None:
        while not self._stop.wait(self._settings.claim_idle / 3):
            self._look()

    def _look(self) -> None:
        """Check that the store is the bus's, and that it has lost nothing. Each error is logged once."""
        if self._broker.standing is None or not self._broker.standing.begun:
            return
        try:
            self._broker.standing.look()
            self._said = ""
        except IdentityMismatch as error:
            self._state.failed("who the store is", error)  # the log has it
        except (RedisError, MnemobusError, *AWAY) as error:
            self._state.failed("looking after the store", error)
            if str(error) != self._said:
                self._said = str(error)
                logger.warning("looking after the store failed, trying again: %s", error)
        except Exception:
            self.failures += 1
            logger.exception("looking after the store failed, trying again")

    def _look_at_layout(self) -> None:
        try:
            self._broker.look_at_layout()
        except (RedisError, MnemobusError, *AWAY) as error:
            logger.debug(
                "how the log is laid out can't be asked now: %s", error
            )  # the consumers log that, too
        except Exception:
            self.failures += 1
            logger.exception("looking at the log's layout failed, trying again")

    def _attempt(self, what: str, work: Any) -> None:
        try:
            work()
        except (RedisError, MnemobusError, *AWAY) as error:
            self._state.failed(what, error)
            logger.warning("%s failed, trying again later: %s", what, meaning(error))
        except Exception as error:
            self.failures += 1
            self._state.failed(what, error)
            logger.exception("%s failed, trying again later", what)

    def tidy(self) -> None:
        """Trim the log, forget replays, consumers, producers and workers that ended long ago, and correct the
        meters."""
        keys, link = self._link.keys, self._link
        self._reporter.tidy()
        for partition in self._broker.partitions():
            log = keys.log(partition)
            self._forget_replays(partition)
            if self._broker.standing is None or not self._broker.standing.resyncing:
                self._trim(partition)
            link.run("reap", [log], [APPLY_GROUP, int(CONSUMER_IDLE * 1000)])
            self._forget_producers(partition)
            self._forget_reasons(partition)
            off = link.run("settle", [log, keys.meter(partition)], [APPLY_GROUP, ENDED])
            if off:
                logger.warning(
                    "log partition %d: the backlog was off by %d; somebody else deleted events",
                    partition,
                    off,
                )

        if self._broker.standing is None or not self._broker.standing.resyncing:
            self._retire()

    def _retire(self) -> None:
        """Retire partitions that have ended and that nobody needs any more, the oldest first.

        Their keys are removed in the next round: workers read there until they notice. The meter stays, because it
        keeps agents of an older version from writing there.
        """
        keys = self._link.keys
        for p in range(int(self._link.client.hget(keys.layout, "swept") or 0), self._given_up):
            names = (keys.log, keys.producers, keys.heads, keys.dead, keys.reasons)
            if not self._link.run("sweep", [keys.layout, *(name(p) for name in names)], [p]):
                break
            self._link.client.hdel(keys.identity, f"w{p}")
            for by_partition in (self._delivered, self._leaving, self._reasons_at):
                by_partition.pop(p, None)
        self._given_up = keys.shape.oldest
        kept = int(self._settings.retention * 1000)
        for p in range(keys.shape.oldest, keys.shape.first):
            names = (keys.log, keys.producers, keys.dead, keys.reasons, keys.meter)
            places = [keys.layout, *(name(p) for name in names)]
            if not self._link.run("retire", places, [p, kept, APPLY_GROUP]):
                break
            logger.info("log partition %d, which had ended, is given up", p)

    def _forget_replays(self, partition: int) -> None:
        log = self._link.keys.log(partition)
        gone = self._link.run("abandoned", [log], [int(REPLAY_IDLE * 1000), REPLAY_GROUP, COPY_GROUP])
        for name in gone:
            logger.warning("forgot %s of log partition %d: it was killed", name.decode(), partition)
        if any(name.startswith(REPLAY_GROUP.encode()) for name in gone):
            # Its last batch may have changed rows without a fan-out: a new epoch drops every copy.
            self._link.client.delete(self._link.keys.epoch)

    def _trim(self, partition: int) -> None:
        keys = [self._link.keys.log(partition), self._link.keys.meter(partition)]
        kept = int(self._settings.retention * 1000)
        delivered = self._delivered[partition]
        old = delivered.old
        standing = self._broker.standing
        if standing is not None and standing.reached is not None:
            seconds, micros = self._link.client.time()
            kept = max(kept, seconds * 1000 + micros // 1000 - standing.reached + MARGIN)
            old = b"0-0"  # none, however old: the store may not have it on its disk
        for _ in range(_TRIM_ROUNDS):
            removed, last = self._link.run("trim", keys, [kept, APPLY_GROUP, old])
            if not removed:
                break
        delivered.note(last, self._link.epoch)

    def _forget_producers(self, partition: int) -> None:
        key = self._link.keys.producers(partition)
        seconds, micros = self._link.client.time()
        oldest = (seconds + micros / 1e6 - PRODUCER_IDLE) * 1000
        now = time.monotonic()
        before, leaving = self._leaving.get(partition, {}), {}
        kept: list[tuple[float, bytes, bytes]] = []
        for producer, record in self._link.client.hscan_iter(key, count=_SCAN):
            try:
                last = float(orjson.loads(record)["t"])
            except (ValueError, KeyError, TypeError):
                logger.error("the record of producer %r in %s makes no sense: %r", producer, key, record)
                continue
            if last >= oldest:
                kept.append((last, producer, record))
                continue
            watched = before.get(producer)
            since = watched[1] if watched is not None and watched[0] == record else now
            if now - since >= PRODUCER_WATCHED:
                self._link.run("forget", [key], [producer, record])
            else:
                leaving[producer] = (record, since)
        self._leaving[partition] = leaving
        if len(kept) > PRODUCERS:
            kept.sort()
            for _, producer, record in kept[: len(kept) - PRODUCERS]:
                self._link.run("forget", [key], [producer, record])
            logger.warning("%s: more than %d producers within a week; forgot the oldest", key, PRODUCERS)

    def _forget_reasons(self, partition: int) -> None:
        """Remove the notes about dead letters that were requeued or dropped long ago: nobody asks about them."""
        keys, client = self._link.keys, self._link.client
        reasons, meter = keys.reasons(partition), keys.meter(partition)
        settled = client.hlen(reasons) - client.xlen(keys.dead(partition))
        if settled <= 0 or (settled <= REASONS and time.monotonic() < self._reasons_at.get(partition, 0.0)):
            return
        self._reasons_at[partition] = time.monotonic() + _REASONS_EVERY
        seconds, _ = client.time()
        oldest = (seconds - PRODUCER_IDLE) * 1000
        notes: list[tuple[Version, bytes]] = []
        for version, note in client.hscan_iter(reasons, count=_SCAN):
            if not note.startswith(b"dead "):
                with suppress(ValueError):
                    notes.append((Version.parse(version), note))
        notes.sort()
        surplus = max(len(notes) - REASONS, 0)
        for n, (version, note) in enumerate(notes):
            if n < surplus or version.ms < oldest:
                self._link.run("lapse", [reasons, meter], [str(version), note])


class Lifecycle(Middleware):
    """Ties the store and the upkeep to the life of Dramatiq's worker."""

    def __init__(self, broker: StreamBroker, applier: Applier) -> None:
        self._broker = broker
        self._applier = applier
        self._upkeep = Upkeep(broker, applier)

    def before_worker_boot(self, broker: dramatiq.Broker, worker: Any) -> None:
        self._broker.held.most = max(HELD_BATCHES, worker.worker_threads)
        self._upkeep.start()

    def before_worker_shutdown(self, broker: dramatiq.Broker, worker: Any) -> None:
        self._broker.stopping.set()

    def after_worker_shutdown(self, broker: dramatiq.Broker, worker: Any) -> None:
        self._upkeep.stop()
        for batch in self._broker.held.batches():
            self._broker.hand_back(batch, begun=True)
        self._applier.close()
