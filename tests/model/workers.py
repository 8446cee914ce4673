"""World "workers": every event gets into the store and is fanned out, even if any process dies at any moment (G1).

One log partition and its consumer group, and some workers. A worker reads a batch of waiting events, commits it, fans
it out and confirms it; the last two in one step, or in two if the batch is large. It may be killed before any of them,
or be delayed for so long that another claims its batch while it still lives. Upkeep trims the log at any time. Redis's
clock may be set back: then an entry's idle time is hidden, until its worker renews it, or another worker has seen that
none does.

Modelled after broker.py, unmoved.py, apply.py, fanout.py, lua/fanout.lua and lua/trim.lua (with a retention of
nothing).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

READ, COMMITTED, SENT = "read", "committed", "sent"


class Worker(NamedTuple):
    batch: tuple[int, ...] = ()
    stage: str = READ


class Pending(NamedTuple):
    """An event that was delivered and is not confirmed.

    idle    whether its worker has been inactive for long enough
    hidden  whether Redis can't tell: its clock was set back since the worker was last active
    """

    event: int
    idle: bool = False
    hidden: bool = False


class State(NamedTuple):
    logged: int = 0
    trimmed: int = 0
    """Up to here the log's events are gone."""
    delivered: int = 0
    pending: tuple[Pending, ...] = ()
    workers: tuple[Worker, ...] = ()
    stored: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()
    kills: int = 0
    pauses: int = 0
    steps: int = 0


class Workers(World):
    name = "workers"
    about = "delivery, crashes, claims, confirmation and trimming"
    sizes: ClassVar = {"events": 2, "workers": 2, "kills": 1, "pauses": 1, "steps": 1}
    larger = (
        {"events": 3, "kills": 2, "pauses": 2, "steps": 2},
        {"events": 4, "workers": 3, "kills": 3, "pauses": 2, "steps": 1},
    )
    rules = (
        Rule("confirm-last", "a batch is confirmed before it is committed", "G1"),
        Rule("fan-out-confirmed", "a batch is confirmed before it is fanned out", "G1"),
        Rule("claim", "nobody takes up what a dead worker has left", "G1"),
        Rule("unmoved", "idle times are believed though Redis's clock was set back", "G1"),
        Rule("low-water", "the log is trimmed up to what was delivered last, whatever is pending", "G1"),
        Rule("undelivered", "the log is trimmed without regard to what was not delivered yet", "G1"),
    )

    def start(self) -> State:
        workers = (Worker(),) * self.size["workers"]
        return State(
            workers=workers, kills=self.size["kills"], pauses=self.size["pauses"], steps=self.size["steps"]
        )

    def broken(self, s: State) -> Iterator[str]:
        return iter(())

    def broken_at_rest(self, s: State) -> Iterator[str]:
        events = set(range(1, self.size["events"] + 1))
        if missing := events - set(s.stored):
            yield f"G1: nothing goes on, and event {min(missing)} is not in the store"
        if missing := events - set(s.sent):
            yield f"G1: nothing goes on, and event {min(missing)} was never fanned out"

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        if s.logged < self.size["events"]:
            yield f"event {s.logged + 1} is logged", s._replace(logged=s.logged + 1)
        mark = s.delivered
        if s.pending and self.keeps("low-water"):
            mark = s.pending[0].event - 1
        if not self.keeps("undelivered"):
            mark = s.logged
        if mark > s.trimmed:
            yield f"the log is trimmed up to {mark}", s._replace(trimmed=mark)
        if s.steps and any(not entry.hidden for entry in s.pending):
            pending = tuple(entry._replace(hidden=True) for entry in s.pending)
            yield "Redis's clock is set back", s._replace(pending=pending, steps=s.steps - 1)
        unmoved = tuple(entry.event for entry in s.pending if entry.idle and entry.hidden)
        if unmoved and self.keeps("unmoved"):
            pending = tuple(entry._replace(hidden=entry.hidden and not entry.idle) for entry in s.pending)
            yield f"{name(unmoved)} found unmoved for long", s._replace(pending=pending)
        seen = set()
        for i, worker in enumerate(s.workers):
            if worker in seen:  # workers are alike
                continue
            seen.add(worker)
            for label, after, state in self.worker(s, worker):
                workers = sorted((*s.workers[:i], after, *s.workers[i + 1 :]))
                yield label, state._replace(workers=tuple(workers))

    def worker(self, s: State, worker: Worker) -> Iterator[tuple[str, Worker, State]]:
        batch, stage = worker
        if not batch:
            first = max(s.delivered, s.trimmed) + 1
            if first <= s.logged:
                new = tuple(range(first, s.logged + 1))
                pending = tuple(sorted((*s.pending, *map(Pending, new))))
                yield (
                    f"a worker reads {name(new)}",
                    Worker(new),
                    s._replace(delivered=s.logged, pending=pending),
                )
            silent = tuple(entry.event for entry in s.pending if entry.idle and not entry.hidden)
            if silent and self.keeps("claim"):
                there = tuple(event for event in silent if event > s.trimmed)
                pending = tuple(
                    Pending(entry.event) if entry.event in silent else entry
                    for entry in s.pending
                    if entry.event not in silent or entry.event in there
                )
                yield f"a worker claims {name(silent)}", Worker(there), s._replace(pending=pending)
            return
        if any(entry.event in batch and entry.hidden and not entry.idle for entry in s.pending):
            pending = tuple(
                Pending(entry.event) if entry.event in batch and not entry.idle else entry
                for entry in s.pending
            )
            yield f"{name(batch)} renewed", worker, s._replace(pending=pending)
        if s.kills:
            pending = tuple(entry._replace(idle=entry.idle or entry.event in batch) for entry in s.pending)
            yield (
                f"the worker that has {name(batch)} is killed",
                Worker(),
                s._replace(pending=pending, kills=s.kills - 1),
            )
        if s.pauses and any(entry.event in batch and not entry.idle for entry in s.pending):
            pending = tuple(entry._replace(idle=entry.idle or entry.event in batch) for entry in s.pending)
            yield (
                f"the worker that has {name(batch)} is held up",
                worker,
                s._replace(pending=pending, pauses=s.pauses - 1),
            )
        confirmed = s._replace(pending=tuple(entry for entry in s.pending if entry.event not in batch))
        if stage == READ:
            after = s if self.keeps("confirm-last") else confirmed
            yield (
                f"{name(batch)} confirmed" if after is confirmed else f"{name(batch)} about to be committed",
                Worker(batch, "begun"),
                after,
            )
        elif stage == "begun":
            stored = tuple(sorted({*s.stored, *batch}))
            yield f"{name(batch)} committed", Worker(batch, COMMITTED), s._replace(stored=stored)
        elif stage == COMMITTED:
            sent = tuple(sorted({*s.sent, *batch}))
            if self.keeps("fan-out-confirmed"):
                yield f"{name(batch)} fanned out", Worker(batch, SENT), s._replace(sent=sent)
                yield f"{name(batch)} fanned out and confirmed", Worker(), confirmed._replace(sent=sent)
            else:
                yield f"{name(batch)} confirmed", Worker(batch, SENT), confirmed
        elif self.keeps("fan-out-confirmed"):
            yield f"{name(batch)} confirmed", Worker(), confirmed
        else:
            sent = tuple(sorted({*s.sent, *batch}))
            yield f"{name(batch)} fanned out", Worker(), s._replace(sent=sent)


def name(batch: tuple[int, ...]) -> str:
    return "event " + " and ".join(map(str, batch))
