"""The reports of workers: what they contain, where agents and people find them, and what follows from them.

Each worker process writes its `Report` into a field of one hash in Redis, under its consumer's name: every few seconds,
and at once when it begins or stops waiting for something. It removes the report when it ends in order; other workers
remove the report of a killed one after an hour.

A report has its time by Redis's clock, and all other times as seconds before that. So nothing depends on the clocks of
two machines. If Redis's clock jumps, all reports look old, but only until the next ones.

Workers of an older version do not report. So a missing report means nothing as long as something reads the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson
from redis.exceptions import ResponseError

from ..settings import Settings
from .diagnosis import Trouble, of_redis, of_store

LATE = 30.0
"""Seconds after which an event that is not applied is overdue, if nothing else is applied either."""
REPORT_EVERY = 2.0
"""At most this many seconds pass between two reports of a worker."""
_TEXT = 500
"""A report has at most this many characters of an error."""


@dataclass(frozen=True, slots=True)
class Report:
    """The report of a worker process.

    version       of mnemobus there
    database      the identity of its store, as far as it is known
    time          when it was made, in seconds of Redis's clock
    every         seconds until it is made again, about
    up            seconds since the process began
    events     that it has applied since then
    applied       seconds since it last confirmed a batch; None if it has not yet
    waits_for  what it retries until it works: "the store", "the fan-out"...; empty if it waits for nothing
    waiting       seconds for which it has waited for that
    why        the error that makes it wait
    error         the last error of any other kind; empty if there was none
    failed        seconds since that
    follows    whether it goes on by itself after a repartition; an older version does not
    """

    version: str
    time: float
    every: float = REPORT_EVERY
    database: str = ""
    up: float = 0.0
    events: int = 0
    applied: float | None = None
    waits_for: str = ""
    waiting: float = 0.0
    why: str = ""
    error: str = ""
    failed: float | None = None
    follows: bool = False

    def encode(self) -> bytes:
        cut = {"why": self.why[:_TEXT], "error": self.error[:_TEXT]}
        return orjson.dumps(asdict(self) | cut)


_NAMES = {field.name for field in fields(Report)}


def decode_report(value: bytes) -> Report:
    """A report as it is in Redis; ValueError if it is none. Fields that a newer version adds are ignored."""
    body = orjson.loads(value)
    if not isinstance(body, dict):
        raise ValueError("no JSON object")
    found = {name: body[name] for name in _NAMES & body.keys()}
    for name in ("time", "every", "up", "waiting", "events"):
        if name in found and type(found[name]) not in (int, float):
            raise ValueError(f"{name} is no number")
    for name in ("applied", "failed"):
        if type(found.get(name)) not in (int, float, type(None)):
            raise ValueError(f"{name} is no number")
    if type(found.get("follows", False)) is not bool:
        raise ValueError("follows is neither true nor false")
    for name in ("version", "database", "waits_for", "why", "error"):
        if not isinstance(found.get(name, ""), str):
            raise ValueError(f"{name} is no text")
    try:
        return Report(**found)
    except TypeError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process, by its last report.

    age    seconds since the report, by Redis's clock; below 0 if that was set back since
    alive  whether it is new enough
    """

    name: str
    report: Report
    age: float
    alive: bool


def read(reply: Any, now: float) -> list[Worker]:
    """The workers in the hash, those that are alive first. An entry that is not a report is ignored: mnemobus did not
    write it."""
    found = []
    for name, value in table(reply).items():
        try:
            report = decode_report(value)
        except ValueError:
            continue
        age = now - report.time
        found.append(Worker(name, report, age, abs(age) <= silence(report.every)))
    return sorted(found, key=lambda worker: (not worker.alive, worker.age))


def silence(every: float) -> float:
    """Seconds without a report after which a worker counts as silent: several reports, for busy machines."""
    return 4 * max(every, 0.0) + 2.0


@dataclass(frozen=True, slots=True)
class Log:
    """What Redis knows about the log's readers.

    backlog    events that are not applied yet
    groups    whether there is a consumer group on each partition, which the first worker makes
    waiting   seconds since the oldest of them was added; None if there is none, or it is not known
    reading   connections that wait for a log of this server; None where that can't be asked
    active    seconds since some consumer was last given something; None where there is no consumer
    """

    backlog: int
    groups: bool
    waiting: float | None = None
    reading: int | None = None
    active: float | None = None


def describe(workers: Sequence[Worker]) -> str:
    """The workers that are alive, in a few words."""
    alive = [worker for worker in workers if worker.alive]
    silent = len(workers) - len(alive)
    text = f"{len(alive)} at work"
    applied = [w.report.applied + max(w.age, 0) for w in alive if w.report.applied is not None]
    if applied:
        text += f", the last batch {min(applied):.0f} s ago"
    versions = sorted({worker.report.version for worker in alive})
    if len(versions) > 1:
        text += f", of versions {' and '.join(versions)}"
    if silent:
        text += f"; {silent} silent for {min(abs(w.age) for w in workers if not w.alive):.0f} s or more"
    return text


def judge(settings: Settings, workers: Sequence[Worker], log: Log) -> tuple[str, list[Trouble]]:
    """The state of the workers, in a few words, and the problems that would keep them from applying a write."""
    alive = [worker for worker in workers if worker.alive]
    start = "start them: mnemobus worker (or mnemobus up)"
    if alive:
        troubles = _stuck(alive)
        applied = [w.report.applied for w in alive if w.report.applied is not None]
        if not troubles and log.backlog and (log.waiting or 0) > LATE and min(applied, default=LATE) >= LATE:
            troubles.append(
                Trouble(
                    f"{log.backlog:,} events wait, the oldest for {log.waiting:.0f} s, and no worker has applied any"
                    f" for {LATE:.0f} s",
                    "look into the workers' logs, and at the database: a long transaction, a lock?",
                )
            )
        return describe(workers), troubles
    if not log.groups and not workers:
        return "there are none", [Trouble("there are no workers, and none has read this log yet", start)]
    if log.reading:
        found = f"{log.reading} connections read the log, of workers that report nothing (an older version)"
        return found, _overdue(log)
    if workers:
        last = workers[0]
        what = f"no worker gives a sign of life; the last one, {last.name}, did {abs(last.age):.0f} s ago"
        if last.report.waits_for:
            what += f", and waited for {last.report.waits_for}: {last.report.why}"
        return "none gives a sign of life", [
            Trouble(what, f"{start}; or are they paused, or can't reach Redis?")
        ]
    if log.reading == 0:
        return "there are none", [Trouble("there are no workers, nobody reads the log", start)]
    if log.active is not None and log.active <= max(10.0, 2 * settings.claim_idle):
        return "consumers at work, which report nothing (an older version)", []
    return "nothing is known of workers", _overdue(log)


def _stuck(alive: Sequence[Worker]) -> list[Trouble]:
    """The things that workers wait for. Workers that wait for the same thing are named together."""
    by_cause: dict[tuple[str, str], list[Worker]] = {}
    for worker in alive:
        if worker.report.waits_for:
            by_cause.setdefault((worker.report.waits_for, worker.report.why), []).append(worker)
    troubles = []
    for (what, why), waiting in by_cause.items():
        longest = max(w.report.waiting + max(w.age, 0) for w in waiting)
        who = f"{len(waiting)} of {len(alive)} workers wait" if len(alive) > 1 else "the worker waits"
        troubles.append(
            Trouble(
                f"{who} for {what}, since {longest:.0f} s: {why}",
                f"{advice_on(what, why)} ({waiting[0].name})",
            )
        )
    return troubles


def advice_on(what: str, why: str) -> str:
    """What to do about something that a worker waits for."""
    trouble = of_store(why) if what == "the store" else of_redis(ResponseError(why), "")
    return trouble.advice


def _overdue(log: Log) -> list[Trouble]:
    if (log.waiting or 0) <= LATE:
        return []
    return [
        Trouble(
            f"{log.backlog:,} events wait, the oldest for {log.waiting:.0f} s, and nothing is known of workers",
            "look into the workers' logs; is the database reachable from there?",
        )
    ]


# Replies


def table(reply: Any) -> dict[str, Any]:
    """A map, from either version of the protocol, with names as text."""
    if not isinstance(reply, Mapping):
        reply = dict(zip(reply[::2], reply[1::2], strict=True))
    return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in reply.items()}


def text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def tables(reply: Iterable[Any] | Exception | None) -> list[dict[str, Any]]:
    """The maps of a list, such as the answer of XINFO; none if that is an error."""
    return [] if reply is None or isinstance(reply, Exception) else [table(item) for item in reply]


def reading_clients(clients: bytes | str, within: float = 5.0) -> int:
    """How many connections wait for the log, by CLIENT LIST: one of each worker process. A process of the version
    before has one for each log partition.

    A consumer group only tells who *got* something last; before Redis 7, it does not list a worker on an idle log.
    """
    text = clients.decode("utf-8", "replace") if isinstance(clients, bytes) else clients
    found = 0
    for line in text.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        found += fields.get("cmd") == "xreadgroup" and int(fields.get("idle", 0)) <= within
    return found
