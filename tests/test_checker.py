"""The checker of chaos runs: it finds nothing in a correct run, and whatever is planted there, and nothing else.

Planted faults go into imagined runs (chaos/imagined.py), of several seeds. Cases that are allowed, though they look like
faults, are small histories by hand: `Told` writes them as one would tell them.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos.checker import check
from chaos.happened import number
from chaos.history import Applied, Final, Observed, Published, Read, Record, Write
from chaos.imagined import Imagined

ROOM = ("messages", "r")
R, M = "room:messages:r", "id:m"
BOUND = 3.0
"""max_staleness and a heartbeat."""


# Correct runs


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_it_finds_nothing_in_a_correct_run(seed: int) -> None:
    report = check(Imagined(seed, seconds=10).history)
    assert report.violations == ()
    assert report.ok


def test_it_finds_nothing_in_a_correct_run_with_more_of_everything() -> None:
    report = check(Imagined(1, agents=7, rooms=5, memories=8, seconds=15).history)
    assert report.violations == ()
    # And that run was no idle one
    assert report.reads_by_source.keys() == {"local", "shared", "store"}
    for figure in (
        "unknown",
        "refused",
        "outboxed",
        "stale_reads",
        "longest_staleness",
        "longest_since_seen",
    ):
        assert getattr(report, figure) > 0, figure


def test_a_run_of_ten_minutes_is_judged_in_less_than_a_minute() -> None:
    # Given a fiftieth of what ten minutes come to
    history = Imagined(1, agents=8, rooms=4, memories=6, seconds=20, busy=0.9).history
    assert len(history.records) > 10_000
    # Then it takes less than a fiftieth of a minute
    began = time.process_time()
    check(history)
    assert time.process_time() - began < 1.2


# Planted faults. Each takes a correct run and a random generator, and says what is to be found: the promise, and the
# records that must be among those that show it. None if the run has no place for it.

Planted = tuple[str, list[Record]] | None


class Run:
    """A correct run to plant a fault in, with what one needs to find the place."""

    def __init__(self, seed: int) -> None:
        self.history = pickle.loads(_correct(seed))
        self.rng = random.Random(seed)
        self.writes: list[Write] = self.history.of(Write)
        self.applied: list[Applied] = self.history.of(Applied)
        [self.final] = self.history.of(Final)
        self.stored = {entry[0]: entry for entry in self.final.store}
        told = {p.value: p.version for p in self.history.of(Published) if p.value}
        self.version = {w.value: w.version or told.get(w.value) for w in self.writes if w.value}
        self.by_version = {w.version: w for w in self.writes if w.version}

    def some(self, items: Any) -> Any:
        items = list(items)
        return self.rng.choice(items) if items else None

    def add(self, *records: Record) -> None:
        self.history.records += records

    def read_of(
        self, memory: str, agent: str, at: float, entry: list[str] | None, source: str = "local"
    ) -> Read:
        """A read that somebody else made, who has done nothing else."""
        read = Read(agent, at, at + 0.0005, f"id:{memory}", 0, source=source)
        read.seen = [] if entry is None else [entry]
        self.add(read)
        return read

    def events(self, memory: str) -> list[list[str]]:
        """The log's entries of a memory and of its room's deletion, in their order."""
        rooms = {tuple(e[2:4]) for e in self.final.log if e[4] == memory}
        return [
            e for e in self.final.log if e[4] == memory or (e[1] == "delete_room" and tuple(e[2:4]) in rooms)
        ]

    def shown(self) -> dict[str, list[list[list[str]]]]:
        """All places in the agents' views that have a memory, by memory."""
        found: dict[str, list[list[list[str]]]] = {}
        for views in self.final.views.values():
            for scope, view in views.items():
                memory = scope.removeprefix("id:")
                for each in {entry[0] for entry in view} | ({memory} if scope.startswith("id:") else set()):
                    found.setdefault(each, []).append(view)
        return found

    def store(self, memory: str, entry: list[str] | None) -> None:
        """Have the store, and all views, hold this of a memory: [id, version, value]."""
        home = next(w for w in self.writes if w.id == memory)
        room = f"room:{home.table}:{home.room}"
        self.final.store[:] = [e for e in self.final.store if e[0] != memory]
        if entry is not None:
            self.final.store.append([*entry, home.table, home.room])
        for views in self.final.views.values():
            for scope in (room, f"id:{memory}"):
                views[scope][:] = [e for e in views[scope] if e[0] != memory]
                if entry is not None:
                    views[scope].append(list(entry))

    def states(self, memory: str) -> list[tuple[list[str], list[str] | None]]:
        """Each of a memory's events, with what the memory is after it."""
        out: list[tuple[list[str], list[str] | None]] = []
        there: list[str] | None = None
        for event in self.events(memory):
            version, op, _, _, _, value = event
            if op == "put" or (op == "update" and there is not None):
                there = [memory, version, value]
            elif "delete" in op:
                there = None
            out.append((event, there))
        return out

    def overwritten(self) -> list[tuple[list[str], list[str]]]:
        """Acknowledged writes of values over older ones: what there was, and the log's entry of the write."""
        found = []
        for memory in {w.id for w in self.writes if w.id}:
            states = self.states(memory)
            for (_, before), (event, after) in pairwise(states):
                write = self.by_version.get(event[0])
                if before and after and before != after and write and write.outcome == "acked":
                    found.append((before, event))
        return sorted(found)

    def deleted(self, op: str = "delete") -> list[tuple[list[str], list[str]]]:
        """Acknowledged deletions: what there was, and the log's entry of the deletion."""
        found = []
        for memory in {w.id for w in self.writes if w.id}:
            states = self.states(memory)
            for (_, before), (event, after) in pairwise(states):
                write = self.by_version.get(event[0])
                if before and not after and event[1] == op and write and write.outcome == "acked":
                    found.append((before, event))
        return sorted(found)

    def heard(self, scope: str, version: str) -> Applied | None:
        """The first to have heard of a version in a scope."""
        heard = [a for a in self.applied if scope in a.scopes and version in a.versions]
        return min(heard, key=lambda a: a.at, default=None)


@cache
def _correct(seed: int) -> bytes:
    return pickle.dumps(Imagined(seed, seconds=12).history)


def lost_write(run: Run) -> Planted:
    states = {memory: run.states(memory) for memory in run.stored}
    memory = run.some(m for m, s in states.items() if s[-1][0][1] == "put" and s[-1][0][0] in run.by_version)
    if memory is None:
        return None
    run.store(memory, None)
    return "G1", [run.by_version[states[memory][-1][0][0]]]


def lost_write_and_its_entry_in_the_log(run: Run) -> Planted:
    planted = lost_write(run)
    if planted is not None:
        [write] = planted[1]
        assert isinstance(write, Write)
        run.final.log[:] = [e for e in run.final.log if e[0] != write.version]
    return planted


def lost_write_that_was_overwritten(run: Run) -> Planted:
    found = run.some((b, e) for b, e in run.overwritten() if b[1] in run.by_version)
    if found is None:
        return None
    run.final.log[:] = [e for e in run.final.log if e[0] != found[0][1]]
    return "G1", [run.by_version[found[0][1]]]


def lost_in_the_outbox(run: Run) -> Planted:
    write = replace(run.some(w for w in run.writes if w.op == "put"), agent="b", value="b/1", number=1)
    write.version, write.outcome, write.outboxed = None, "acked", True
    run.add(write)
    return "G1", [write]


def lost_update(run: Run) -> Planted:
    last = [(b, e) for b, e in run.overwritten() if run.stored.get(e[4], ["", ""])[1] == e[0]]
    found = run.some(last)
    if found is None:
        return None
    run.store(found[1][4], found[0])
    return "G2", [run.by_version[found[1][0]]]


def lost_update_and_its_entry_in_the_log(run: Run) -> Planted:
    planted = lost_update(run)
    if planted is None:
        return None
    [write] = planted[1]
    assert isinstance(write, Write)
    run.final.log[:] = [e for e in run.final.log if e[0] != write.version]
    return "G1", [write]


def doubled_event(run: Run) -> Planted:
    found = run.some(run.overwritten())
    if found is None:
        return None
    event = found[1]
    if found[0][1] not in run.by_version:
        return None
    first = next(e for e in run.final.log if e[0] == found[0][1])
    index = run.final.log.index(first)
    run.final.log.insert(index + 1, [first[0] + "00", *first[1:]])
    assert number(event[0]) > number(first[0])
    return "G1", [run.by_version[first[0]]]


def doubled_delete(run: Run) -> Planted:
    found = run.some(run.deleted())
    unsure = {
        w.id
        for w in run.writes
        if w.op == "delete" and w.version is None and w.outcome in ("acked", "unknown")
    }
    if found is None or found[1][4] in unsure:
        return None
    index = run.final.log.index(found[1])
    run.final.log.insert(index + 1, [found[1][0] + "00", *found[1][1:]])
    return "G1", [run.by_version[found[1][0]]]


def value_under_another_version(run: Run) -> Planted:
    entry = run.some(e for e in run.stored.values() if e[1] in run.by_version)
    read = run.read_of(entry[0], "b", run.final.at - 1, [entry[0], entry[1] + "00", entry[2]])
    return "G1", [run.by_version[entry[1]], read]


def value_under_another_memory(run: Run) -> Planted:
    write = run.some(w for w in run.writes if w.op == "put" and w.version)
    other = run.some(m for m in run.stored if m != write.id)
    read = run.read_of(other, "b", run.final.at - 1, [other, f"{10**6}-0", write.value])
    return "G1", [write, read]


def two_writes_under_one_version(run: Run) -> Planted:
    write = run.some(w for w in run.writes if w.value and w.version)
    value = run.some(w.value for w in run.writes if w.id == write.id and w.value and w is not write)
    other = next(w for w in run.writes if w.value == value)
    if other.outcome != "unknown":
        return None
    read = run.read_of(write.id, "b", run.final.at - 1, [write.id, write.version, value])
    read.stale = True
    return "G2", [write, read]


def resurrected_memory(run: Run) -> Planted:
    found = run.some((b, e) for b, e in run.deleted() if run.states(b[0])[-1][0] == e)
    if found is None:
        return None
    run.store(found[0][0], found[0])
    return "G3", [run.by_version[found[1][0]]]


def resurrected_member_of_a_room(run: Run) -> Planted:
    found = run.some((b, e) for b, e in run.deleted("delete_room") if run.states(b[0])[-1][0] == e)
    if found is None:
        return None
    run.store(found[0][0], found[0])
    return "G3", [run.by_version[found[1][0]]]


def read_of_what_was_deleted(run: Run) -> Planted:
    found = run.some(run.deleted())
    heard = found and run.heard(f"id:{found[0][0]}", found[1][0])
    if not heard:
        return None
    read = run.read_of(found[0][0], "b", heard.at + BOUND + 0.01, found[0], "shared")
    return "G3", [run.by_version[found[1][0]], heard, read]


def read_of_a_member_of_a_deleted_room(run: Run) -> Planted:
    found = run.some(run.deleted("delete_room"))
    heard = found and run.heard(f"room:{':'.join(found[1][2:4])}", found[1][0])
    if not heard:
        return None
    read = run.read_of(found[0][0], "b", heard.at + BOUND + 0.01, found[0])
    return "G3", [run.by_version[found[1][0]], heard, read]


def read_older_than_an_applied_invalidation(run: Run) -> Planted:
    for before, event in run.rng.sample(run.overwritten(), len(run.overwritten())):
        heard = run.heard(f"id:{event[4]}", event[0])
        if heard is not None:
            # Who has heard of it reads what there was, right after; and has written nothing itself
            applied = Applied("b", heard.at, [f"id:{event[4]}"], [event[0]])
            run.add(applied)
            return "G4", [applied, run.read_of(event[4], "b", heard.at + 0.001, before)]
    return None


def read_beyond_the_bound(run: Run) -> Planted:
    for before, event in run.rng.sample(run.overwritten(), len(run.overwritten())):
        heard = run.heard(f"id:{event[4]}", event[0])
        if heard is not None and first_seen(run, event) is not None:
            read = run.read_of(event[4], "b", heard.at + BOUND + 0.01, before)
            return "G5", [run.by_version[event[0]], heard, read]
    return None


def read_beyond_the_bound_of_what_was_only_seen(run: Run) -> Planted:
    # Given a run that bounds the time from commit to fan-out; no invalidation tells of this write
    run.history.bounds.fan_out = 6.0
    put = _write("c", run.final.at - 60, "put", "c/1", "9000-0", room=("messages", "c"), id="c")
    update = _write("c", run.final.at - 50, "update", "c/2", "9001-0", room=("messages", "c"), id="c")
    run.add(put, update)
    seen = run.read_of("c", "d", run.final.at - 40, ["c", "9001-0", "c/2"], "store")
    run.final.log += [[w.version, w.op, w.table, w.room, w.id, w.value] for w in (put, update)]
    run.final.store.append(["c", "9001-0", "c/2", "messages", "c"])
    read = run.read_of("c", "b", seen.ended + BOUND + 6.01, ["c", "9000-0", "c/1"])
    return "G5", [update, seen, read]


def memory_missing_in_an_answer(run: Run) -> Planted:
    memory = run.some(run.stored)
    event = next(e for e in run.final.log if e[0] == run.stored[memory][1])
    table, room = run.stored[memory][3:]
    if event[1] != "put" or event[0] not in run.by_version:
        return None
    rest = [e[:3] for e in run.stored.values() if e[3:] == [table, room] and e[0] != memory]
    read = Read("b", run.final.at - 1, run.final.at - 0.9, f"room:{table}:{room}", 20, rest, "shared")
    run.add(read)
    return "G5", [read]


def count_too_low(run: Run) -> Planted:
    table, room = run.some(run.stored.values())[3:]
    there = sum(e[3:] == [table, room] for e in run.stored.values())
    read = Read("b", run.final.at - 1, run.final.at - 0.9, f"room:{table}:{room}", 0, source="local")
    read.count = there - 1
    run.add(read)
    return "G5", [read]


def count_too_high(run: Run) -> Planted:
    table, room = run.some((w.table, w.room) for w in run.writes)
    there = sum(e[3:] == [table, room] for e in run.stored.values())
    members = {w.id for w in run.writes if (w.table, w.room) == (table, room) and w.op == "put"}
    if there == len(members):
        return None
    read = Read("b", run.final.at - 1, run.final.at - 0.9, f"room:{table}:{room}", 0, source="local")
    read.count = there + 1
    run.add(read)
    return "G5", [read]


def own_write_not_seen(run: Run) -> Planted:
    found = run.some(run.overwritten())
    if found is None:
        return None
    write = run.by_version[found[1][0]]
    return "G6", [write, run.read_of(write.id, write.agent, write.ended + 0.0005, found[0])]


def own_deletion_not_seen(run: Run) -> Planted:
    found = run.some(run.deleted("delete_room"))
    if found is None:
        return None
    write = run.by_version[found[1][0]]
    return "G6", [write, run.read_of(found[0][0], write.agent, write.ended + 0.0005, found[0])]


def observed_write_not_seen(run: Run) -> Planted:
    found = run.some(run.overwritten())
    if found is None:
        return None
    write = run.by_version[found[1][0]]
    # If b observes the writer, and c observes b
    first = Observed("b", write.ended + 0.002, write.agent, write.ended + 0.001)
    second = Observed("c", write.ended + 0.004, "b", write.ended + 0.003)
    run.add(first, second)
    return "G6", [write, second, run.read_of(write.id, "c", write.ended + 0.005, found[0])]


def first_seen(run: Run, event: list[str]) -> Read | None:
    """The first read that saw a write, if nothing deletes it later."""
    after = run.events(event[4])[run.events(event[4]).index(event) :]
    reads = [r for r in run.history.of(Read) if [event[4], event[0], event[5]] in r.seen]
    return None if any("delete" in e[1] for e in after) else min(reads, key=lambda r: r.ended, default=None)


def store_going_back(run: Run) -> Planted:
    for before, event in run.rng.sample(run.overwritten(), len(run.overwritten())):
        seen = first_seen(run, event)
        if seen is not None:
            return "G2", [run.read_of(event[4], "b", seen.ended + 0.001, before, "store")]
    return None


def store_losing_what_it_had(run: Run) -> Planted:
    for _, event in run.rng.sample(run.overwritten(), len(run.overwritten())):
        seen = first_seen(run, event)
        if seen is not None:
            return "G1", [run.read_of(event[4], "b", seen.ended + 0.001, None, "store")]
    return None


def agent_that_disagrees(run: Run) -> Planted:
    found = run.some((b, e) for b, e in run.overwritten() if run.stored.get(e[4], ["", ""])[1] == e[0])
    if found is None:
        return None
    run.final.views["a0"][f"id:{found[0][0]}"] = [found[0]]
    return "G5", []


def agent_that_lacks_a_memory(run: Run) -> Planted:
    table, room = run.some(run.stored.values())[3:]
    run.final.views["a1"][f"room:{table}:{room}"].pop()
    return "G5", []


def agent_that_has_another_order(run: Run) -> Planted:
    scope = run.some(s for s, view in run.final.views["a1"].items() if len(view) > 1)
    if scope is None:
        return None
    run.final.views["a1"][scope].reverse()
    return "G5", []


def dead_letter(run: Run) -> Planted:
    found = run.some((b, e) for b, e in run.overwritten() if e[1] == "update")
    if found is None:
        return None
    # A write that nobody has seen any effect of, because there was none
    write = _write("c", run.final.at - 30, "put", "c/1", "9000-0", room=("messages", "c"), id="c")
    run.add(write)
    run.final.log.append(["9000-0", "put", "messages", "c", "c", "c/1"])
    run.final.dead.append("9000-0")
    return "G1", [write]


def missing_record(run: Run) -> Planted:
    write = run.some(w for w in run.writes if w.value and w.version)
    run.history.records.remove(write)
    return "history", []


def made_up_value(run: Run) -> Planted:
    memory = run.some(run.stored)
    read = run.read_of(memory, "b", run.final.at - 1, [memory, f"{10**6}-0", "nobody/1"])
    return "history", [read]


def value_written_twice(run: Run) -> Planted:
    write = run.some(w for w in run.writes if w.value and w.version)
    again = replace(write, agent="b", number=1, outcome="refused", version=None)
    run.add(again)
    return "history", [write, again]


def no_end(run: Run) -> Planted:
    run.history.records.remove(run.final)
    return "history", []


def refused_write_that_happened(run: Run) -> Planted:
    write = run.some(w for w in run.writes if w.value and w.version)
    write.outcome, write.version = "refused", None
    return "G7", [write]


def refused_delete_that_happened(run: Run) -> Planted:
    found = run.some(run.deleted())
    if found is None:
        return None
    write = run.by_version[found[1][0]]
    same = [
        w for w in run.writes if w.op == "delete" and w.id == write.id and w.outcome in ("acked", "unknown")
    ]
    if len(same) > 1:
        return None
    write.outcome, write.version = "refused", None
    return "G7", [write]


def log_in_another_order(run: Run) -> Planted:
    put = _write("c", run.final.at - 60, "put", "c/1", "9001-0", room=("messages", "c"), id="c")
    update = _write("d", run.final.at - 50, "update", "d/1", "9000-0", room=("messages", "c"), id="c")
    run.add(put, update)
    run.final.log += [[w.version, w.op, w.table, w.room, w.id, w.value] for w in (update, put)]
    run.final.store.append(["c", "9001-0", "c/1", "messages", "c"])
    return "G2", [put, update]


def outbox_overtaken(run: Run) -> Planted:
    first = _write("c", run.final.at - 60, "put", "c/1", None, room=("messages", "c"), id="c")
    first.outboxed = True
    second = _write("c", run.final.at - 50, "put", "c/2", "9000-0", room=("messages", "c"), id="c")
    published = Published("c", run.final.at - 40, "c", "c/1", "9001-0")
    run.add(first, second, published)
    run.final.log += [
        [v, "put", "messages", "c", "c", value] for v, value in (("9000-0", "c/2"), ("9001-0", "c/1"))
    ]
    run.final.store.append(["c", "9001-0", "c/1", "messages", "c"])
    return "G7", [first, second]


FAULTS: list[Callable[[Run], Planted]] = [
    lost_write, lost_write_and_its_entry_in_the_log, lost_write_that_was_overwritten, lost_in_the_outbox,
    lost_update, lost_update_and_its_entry_in_the_log, doubled_event, doubled_delete, value_under_another_version,
    value_under_another_memory, two_writes_under_one_version, resurrected_memory, resurrected_member_of_a_room,
    read_of_what_was_deleted, read_of_a_member_of_a_deleted_room, read_older_than_an_applied_invalidation,
    read_beyond_the_bound, read_beyond_the_bound_of_what_was_only_seen, memory_missing_in_an_answer, count_too_low,
    count_too_high, own_write_not_seen, own_deletion_not_seen, observed_write_not_seen, store_going_back,
    store_losing_what_it_had, agent_that_disagrees, agent_that_lacks_a_memory, agent_that_has_another_order,
    dead_letter, missing_record, made_up_value, value_written_twice, no_end, refused_write_that_happened,
    refused_delete_that_happened, log_in_another_order, outbox_overtaken,
]  # fmt: skip


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_it_finds_what_is_planted_and_nothing_else(plant: Callable[[Run], Planted]) -> None:
    planted = 0
    for seed in range(20):
        run = Run(seed)
        # Given a correct run in which there is a place for the fault
        expected = plant(run)
        if expected is None:
            continue
        planted += 1
        promise, records = expected
        # If it is judged, then the fault is found, under its promise, and nothing else
        report = check(run.history)
        assert {v.promise for v in report.violations} == {promise}, "\n".join(map(str, report.violations))
        if promise != "history":
            assert len(report.violations) == 1, "\n".join(map(str, report.violations))
        # And what shows it is shown, and not much more
        shown = [record for v in report.violations for record in v.records]
        for record in records:
            assert any(record is r for r in shown), f"{record} is not in {report.violations}"
        assert len(shown) <= 8
        if planted == 2:
            return
    assert planted, "no run has a place for this"


def _write(
    agent: str,
    at: float,
    op: str,
    value: str,
    version: str | None,
    *,
    room: tuple[str, str] = ROOM,
    id: str = "m",
) -> Write:
    return Write(agent, at, at + 0.002, op, *room, id, value, "acked", version)
