"""What a worker process reports about itself (health/vitals.py): its threads note it, and upkeep puts it into Redis."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

import mnemobus
from mnemobus.connection.link import ThreadedLink
from mnemobus.connection.server_errors import AWAY, code_of
from mnemobus.errors import MnemobusError
from mnemobus.health.vitals import REPORT_EVERY, Report, read

logger = logging.getLogger("mnemobus.report")

_KEPT = 100
"""At most this many reports of dead workers are kept, for people to read."""
_KEPT_SECONDS = 3600.0


class State:
    """What the threads of this process are doing. Safe for threads; never waits for anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._events = 0
        self._applied: float | None = None
        self._waits: dict[tuple[str, int], tuple[float, str]] = {}
        """By thread, and by what it waits for: since when, and the error."""
        self._error = ""
        self._failed: float | None = None
        self.changed = threading.Event()
        """Set when a wait begins or ends: upkeep reports this at once."""

    def applied(self, events: int) -> None:
        """A batch was confirmed."""
        with self._lock:
            self._events += events
            self._applied = time.monotonic()

    def failed(self, what: str, error: BaseException) -> None:
        """Something failed, and is not retried in the same way."""
        with self._lock:
            self._error, self._failed = f"{what}: {words(error)}", time.monotonic()

    def waits(self, what: str, error: BaseException) -> None:
        """This thread retries something until it works."""
        key = what, threading.get_ident()
        with self._lock:
            since, _ = self._waits.get(key, (time.monotonic(), ""))
            new = key not in self._waits
            self._waits[key] = since, words(error)
        if new:
            self.changed.set()

    def goes_on(self, what: str) -> None:
        """It worked, or this thread gave it up."""
        with self._lock:
            there = self._waits.pop((what, threading.get_ident()), None)
        if there is not None:
            self.changed.set()

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """This thread no longer waits for it, whether it worked or not."""
        try:
            yield
        finally:
            self.goes_on(what)

    def report(self, now: float, every: float, database: str) -> Report:
        """The whole report; ``now`` is the time of Redis's clock."""
        with self._lock:
            clock = time.monotonic()
            (what, _), (since, why) = min(
                self._waits.items(), key=lambda item: item[1][0], default=(("", 0), (clock, ""))
            )
            return Report(
                version=mnemobus.__version__,
                follows=True,
                time=now,
                every=every,
                database=database,
                up=round(clock - self._began, 1),
                events=self._events,
                applied=None if self._applied is None else round(clock - self._applied, 3),
                waits_for=what,
                waiting=round(clock - since, 1),
                why=why,
                error=self._error,
                failed=None if self._failed is None else round(clock - self._failed, 1),
            )


def words(error: BaseException) -> str:
    """An error on one line, with the code that redis-py takes off it."""
    text, code = " ".join(str(error).split()) or type(error).__name__, code_of(error)
    return text if not code or text.startswith(code) else f"{code} {text}"


class Reporter:
    """Keeps one process's field in the hash of reports. Used from one thread."""

    def __init__(self, link: ThreadedLink, name: str, state: State, claim_idle: float) -> None:
        self._link = link
        self._key = link.keys.workers
        self._name = name
        self._state = state
        self.every = max(0.25, min(REPORT_EVERY, claim_idle / 3))
        self._said = ""

    def tell(self) -> None:
        """Put the report into Redis. If Redis is away, is full or forbids it, the next call tries again."""
        try:
            report = self._state.report(self._now(), self.every, "")
            self._link.client.execute_command("HSET", self._key, self._name, report.encode())
            self._said = ""
        except (RedisError, MnemobusError, *AWAY) as error:
            log = logger.debug if self._said == type(error).__name__ else logger.warning
            log("this worker can't tell how it is, trying again every %.1f s: %s", self.every, error)
            self._said = type(error).__name__

    def leave(self) -> None:
        """Remove the report: this process ends in order."""
        try:
            self._link.client.execute_command("HDEL", self._key, self._name)
        except (RedisError, MnemobusError, *AWAY) as error:
            logger.info("this worker's report stays in Redis, and is removed by others: %s", error)

    def tidy(self) -> None:
        """Remove old reports of killed workers, and all but the newest hundred."""
        now = self._now()
        workers = read(dict(self._link.client.hscan_iter(self._key)), now)
        silent = sorted((abs(worker.age), worker.name) for worker in workers if not worker.alive)
        gone = [name for n, (age, name) in enumerate(silent) if n >= _KEPT or age > _KEPT_SECONDS]
        if gone:
            self._link.client.execute_command("HDEL", self._key, *gone)

    def _now(self) -> float:
        seconds, micros = self._link.client.time()
        return float(seconds) + micros / 1e6
