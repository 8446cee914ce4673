"""The checker of chaos runs: it finds nothing in a correct run, and whatever is planted there, and nothing else.

Planted faults go into imagined runs (chaos/imagined.py), of several seeds. What is allowed, though it looks like a
fault, is told by hand, in a few records each; most of these say, too, what would not be allowed.
"""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos.checker import Report, check, main
from chaos.happened import number
from chaos.history import Applied, Bounds, Fault, Final, History, Observed, Published, Read, Record, Write
from chaos.imagined import Imagined

ROOM = ("messages", "r")
R, M = "room:messages:r", "id:m"
BOUND = 3.0
"""max_staleness and a heartbeat."""


# Correct runs


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


def test_the_time_that_it_takes_grows_with_the_records_and_no_faster() -> None:
    # Given a long run: ten minutes come to a hundred times as much, and are to be judged in a minute
    history = Imagined(1, agents=8, rooms=4, memories=6, seconds=10, busy=0.9).history
    assert len(history.records) > 5_000
    # Then it takes half a second, or some more on a busy machine; comparing each with each would take far longer
    began = time.process_time()
    check(history)
    assert time.process_time() - began < 4


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

    def shuffled(self, items: list[Any]) -> list[Any]:
        return self.rng.sample(items, len(items))

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

    def after(self, entry: list[str]) -> list[list[str]]:
        """The log's entries about a memory that come after it was as this: [id, version, value]."""
        return [event for event in self.events(entry[0]) if number(event[0]) > number(entry[1])]

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
    return pickle.dumps(Imagined(seed, seconds=9).history)


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
    for before, event in run.shuffled(run.overwritten()):
        older = [e for e in run.final.log if e[3] == event[3] and number(e[0]) < number(before[1])]
        if older and before[1] in run.by_version:  # else it looks as if the log had been trimmed
            run.final.log[:] = [e for e in run.final.log if e[0] != before[1]]
            return "G1", [run.by_version[before[1]]]
    return None


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
    if not run.stored:
        return None
    entry = run.some(e for e in run.stored.values() if e[1] in run.by_version)
    if entry is None:
        return None
    read = run.read_of(entry[0], "b", run.final.at - 2, [entry[0], entry[1] + "00", entry[2]])
    run.read_of(entry[0], "c", run.final.at - 1, entry[:3], "store")
    return "G1", [run.by_version[entry[1]], read]


def value_under_another_memory(run: Run) -> Planted:
    write = run.some(w for w in run.writes if w.op == "put" and w.version)
    other = run.some(m for m in run.stored if m != write.id)
    read = run.read_of(other, "b", run.final.at - 1, [other, f"{10**6}-0", write.value])
    return "G1", [write, read]


def two_writes_under_one_version(run: Run) -> Planted:
    lost = run.some(w for w in run.writes if w.value and w.outcome == "unknown")
    write = lost and run.some(w for w in run.writes if w.value and w.version and w.id == lost.id)
    if not write:
        return None
    read = run.read_of(write.id, "b", run.final.at - 1, [write.id, write.version, lost.value])
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
    for before, event in run.shuffled(run.deleted()):
        heard = run.heard(f"id:{before[0]}", event[0])
        if heard is not None and run.after(before) == [event]:
            read = run.read_of(before[0], "b", heard.at + BOUND + 0.01, before, "shared")
            return "G3", [run.by_version[event[0]], heard, read]
    return None


def read_of_a_member_of_a_deleted_room(run: Run) -> Planted:
    for before, event in run.shuffled(run.deleted("delete_room")):
        heard = run.heard(f"room:{event[2]}:{event[3]}", event[0])
        if heard is not None and run.after(before) == [event]:
            read = run.read_of(before[0], "b", heard.at + BOUND + 0.01, before)
            return "G3", [run.by_version[event[0]], heard, read]
    return None


def read_older_than_an_applied_invalidation(run: Run) -> Planted:
    for before, event in run.shuffled(run.overwritten()):
        heard = run.heard(f"id:{event[4]}", event[0])
        if heard is not None:
            # Who has heard of it reads what there was, right after; and has written nothing itself
            applied = Applied("b", heard.at, [f"id:{event[4]}"], [event[0]])
            run.add(applied)
            return "G4", [applied, run.read_of(event[4], "b", heard.at + 0.001, before)]
    return None


def read_beyond_the_bound(run: Run) -> Planted:
    for before, event in run.shuffled(run.overwritten()):
        heard = run.heard(f"id:{event[4]}", event[0])
        if heard is not None and run.after(before) == [event]:
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
    if not run.stored:
        return None
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
    if not run.stored:
        return None
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


def overwritten_and_seen_before(run: Run) -> tuple[list[str], Write] | None:
    """What there was, known to all, and what it was overwritten with."""
    for before, event in run.shuffled(run.overwritten()):
        write = run.by_version[event[0]]
        if any(before in read.seen and read.ended < write.began for read in run.history.of(Read)):
            return before, write
    return None


def own_write_not_seen(run: Run) -> Planted:
    found = overwritten_and_seen_before(run)
    if found is None:
        return None
    before, write = found
    return "G6", [write, run.read_of(write.id, write.agent, write.ended + 0.0005, before)]


def own_deletion_not_seen(run: Run) -> Planted:
    found = run.some(run.deleted("delete_room"))
    if found is None:
        return None
    write = run.by_version[found[1][0]]
    return "G6", [write, run.read_of(found[0][0], write.agent, write.ended + 0.0005, found[0])]


def observed_write_not_seen(run: Run) -> Planted:
    found = overwritten_and_seen_before(run)
    if found is None:
        return None
    before, write = found
    # If b observes the writer, and c observes b
    first = Observed("b", write.ended + 0.002, write.agent, write.ended + 0.001)
    second = Observed("c", write.ended + 0.004, "b", write.ended + 0.003)
    run.add(first, second)
    return "G6", [write, second, run.read_of(write.id, "c", write.ended + 0.005, before)]


def first_seen(run: Run, event: list[str]) -> Read | None:
    """The first read that saw a write, if nothing deletes it later."""
    after = run.events(event[4])[run.events(event[4]).index(event) :]
    reads = [r for r in run.history.of(Read) if [event[4], event[0], event[5]] in r.seen]
    return None if any("delete" in e[1] for e in after) else min(reads, key=lambda r: r.ended, default=None)


def store_going_back(run: Run) -> Planted:
    for before, event in run.shuffled(run.overwritten()):
        seen = first_seen(run, event)
        if seen is not None:
            return "G2", [run.read_of(event[4], "b", seen.ended + 0.001, before, "store")]
    return None


def store_losing_what_it_had(run: Run) -> Planted:
    found = []
    for memory in sorted({w.id for w in run.writes if w.id}):
        states = run.states(memory)
        found += [after for (_, before), (_, after) in pairwise(states) if after and not before]
    for memory, version, _ in run.shuffled(found):
        event = next(e for e in run.final.log if e[0] == version)
        seen, heard = first_seen(run, event), run.heard(f"id:{memory}", version)
        if seen is not None and (heard is None or seen.ended < heard.at + BOUND - 0.01):
            return "G1", [run.read_of(memory, "b", seen.ended + 0.001, None, "store")]
    return None


def agent_that_disagrees(run: Run) -> Planted:
    found = run.some((b, e) for b, e in run.overwritten() if run.stored.get(e[4], ["", ""])[1] == e[0])
    if found is None:
        return None
    run.final.views["a0"][f"id:{found[0][0]}"] = [found[0]]
    return "G5", []


def agent_that_lacks_a_memory(run: Run) -> Planted:
    if not run.stored:
        return None
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
    if not run.stored:
        return None
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
    made = ("acked", "unknown")
    for _, event in run.shuffled(run.deleted()):
        write = run.by_version[event[0]]
        if [w for w in run.writes if (w.op, w.id) == ("delete", write.id) and w.outcome in made] == [write]:
            write.outcome, write.version = "refused", None
            return "G7", [write]
    return None


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


# What is allowed. Times are seconds; by 50 everything has long been heard by everyone.


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


def put(agent: str, at: float, value: str, version: str | None, **more: Any) -> Write:
    return replace(_write(agent, at, "put", value, version), **more)


def update(agent: str, at: float, value: str, version: str | None, **more: Any) -> Write:
    return replace(_write(agent, at, "update", value, version), **more)


def delete(agent: str, at: float, version: str | None, **more: Any) -> Write:
    return replace(_write(agent, at, "delete", "", version), **more)


def delete_room(agent: str, at: float, version: str | None, **more: Any) -> Write:
    return replace(_write(agent, at, "delete_room", "", version, id=""), **more)


def get(
    agent: str, at: float, version: str = "", value: str = "", *, source: str = "local", **more: Any
) -> Read:
    seen = [["m", version, value]] if version else []
    return replace(Read(agent, at, at + 0.001, M, 0, seen, source), **more)


def heard(agent: str, at: float, *versions: str, scope: str = M) -> Applied:
    return Applied(agent, at, [scope], list(versions))


def entries(*writes: Write) -> list[list[str]]:
    return [[w.version or "?", w.op, w.table, w.room, w.id, w.value] for w in writes]


def row(version: str, value: str, id: str = "m") -> list[str]:
    return [id, version, value, *ROOM]


def judged(*records: Record, store: list[list[str]] | None = None, **end: Any) -> Report:
    """A run of these records. The log has all acknowledged writes in the order of their versions, if not told."""
    writes = sorted(
        (r for r in records if isinstance(r, Write) and r.version), key=lambda w: number(w.version or "")
    )
    end.setdefault("log", entries(*writes))
    return check(History(Bounds(2.0, 1.0, 1.0), [*records, Final(100.0, store=store or [], **end)]))


def promises(report: Report) -> list[str]:
    return [violation.promise for violation in report.violations]


def test_a_write_of_unknown_outcome_may_have_happened() -> None:
    # Given an update whose answer never came
    first = put("a", 1, "a/1", "1-0")
    lost = update("b", 2, "b/1", None, outcome="unknown", ended=None)
    seen = get("c", 3, "2-0", "b/1", source="store")
    # If it is seen, and in the log and the store, then it happened
    log = [*entries(first), *entries(replace(lost, version="2-0"))]
    assert judged(first, lost, seen, log=log, store=[row("2-0", "b/1")]).violations == ()
    # And from then on it is to be kept
    assert promises(judged(first, lost, seen, log=log, store=[row("1-0", "a/1")])) == ["G2"]
    # But its writer was not told, and may read what was there before it
    told = replace(lost, ended=2.5)
    own = get("b", 2.6, "1-0", "a/1")
    assert judged(first, told, own, seen, log=log, store=[row("2-0", "b/1")]).violations == ()
    # If it is nowhere, then it did not
    assert judged(first, lost, get("c", 50, "1-0", "a/1"), store=[row("1-0", "a/1")]).violations == ()


def test_g9_what_was_shown_live_is_not_to_be_unseen() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    live = get("b", 3, "2-0", "a/2", live=True)
    end = {"store": [row("2-0", "a/2")]}
    # A live answer may show what the store does not have yet: another agent's may be older for a while
    elsewhere = get("c", 3.1, "1-0", "a/1", source="store")
    assert judged(first, second, live, elsewhere, **end).violations == ()
    # But the agent that was shown it must not see it older again, however it is answered
    for source in ("local", "shared", "store"):
        back = get("b", 3.2, "1-0", "a/1", source=source)
        assert promises(judged(first, second, live, back, **end)) == ["G9"]
    # Where an answer says that it is stale, or Redis may have lost the write, that is no breach
    assert judged(first, second, live, get("b", 3.2, "1-0", "a/1", stale=True), **end).violations == ()


def test_a_delete_of_unknown_outcome_may_be_why_a_memory_is_not_there() -> None:
    first = put("a", 1, "a/1", "1-0")
    nothing = get("c", 50, source="store")
    lost = delete("b", 2, None, outcome="unknown", ended=None)
    log = [*entries(first), ["2-0", "delete", *ROOM, "m", ""]]
    assert judged(first, heard("c", 2, "1-0"), lost, nothing, log=log).violations == ()
    # But not of one that began after the read, or was refused
    late = replace(lost, began=60)
    assert promises(judged(first, heard("c", 2, "1-0"), late, nothing, log=log)) == ["G4"]
    refused = replace(lost, outcome="refused", ended=3)
    assert "G7" in promises(judged(first, heard("c", 2, "1-0"), refused, nothing, log=log))


def test_where_the_log_was_lost_what_is_not_in_it_may_have_happened() -> None:
    # Given a put and a delete of unknown outcome, of which the log has nothing
    first, gone, later = put("a", 1, "a/1", "1-0"), delete("a", 2, "2-0"), update("a", 4, "a/2", "4-0")
    lost_put = put("b", 3, "b/1", None, outcome="unknown", ended=None)
    lost_delete = delete("b", 3, None, outcome="unknown", ended=None)
    lost_room = delete_room("b", 3, None, outcome="unknown", ended=None)
    # Then the put may be why a deleted memory is there again
    known, seen = heard("c", 3, "2-0"), get("c", 50, "4-0", "a/2")
    store = [row("4-0", "a/2")]
    assert judged(first, gone, later, lost_put, known, seen, store=store, lost_log=True).violations == ()
    assert set(promises(judged(first, gone, later, known, seen, store=store, lost_log=True))) == {"G3", "G4"}
    # And the deletes may be why one is not there
    known, seen = heard("c", 3, "1-0"), get("c", 50)
    for lost in (lost_delete, lost_room):
        assert judged(first, lost, known, seen, lost_log=True).violations == ()
    assert set(promises(judged(first, known, seen, lost_log=True))) == {"G1", "G4"}


def test_of_several_deletes_without_a_version_any_may_be_the_one_in_the_log() -> None:
    first = put("a", 1, "a/1", "1-0")
    waiting = delete("b", 2, None, outboxed=True)
    lost = delete("c", 3, None, outcome="unknown", ended=None)
    one, other = ["2-0", "delete", *ROOM, "m", ""], ["3-0", "delete", *ROOM, "m", ""]
    assert judged(first, waiting, lost, log=[*entries(first), one]).violations == ()
    assert judged(first, waiting, lost, log=[*entries(first), one, other]).violations == ()
    # But more than were made are too many, and fewer than were acknowledged are too few
    third = ["4-0", "delete", *ROOM, "m", ""]
    assert promises(judged(first, waiting, lost, log=[*entries(first), one, other, third])) == ["G1"]
    second = delete("c", 3, None, outboxed=True)
    assert promises(judged(first, waiting, second, log=[*entries(first), one])) == ["G1"]


def test_g5_an_answer_that_is_marked_stale_may_be_as_old_as_it_likes() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    known = heard("c", 3, "2-0")
    old = get("c", 50, "1-0", "a/1", stale=True)
    assert judged(first, second, known, old, store=[row("2-0", "a/2")]).violations == ()
    assert promises(judged(first, second, known, replace(old, stale=False), store=[row("2-0", "a/2")])) == [
        "G4"
    ]


def test_g5_what_others_read_may_be_old_within_the_bound() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    known = heard("b", 10, "2-0")
    store = [row("2-0", "a/2")]
    report = judged(first, second, known, get("c", 10 + BOUND - 0.01, "1-0", "a/1"), store=store)
    assert report.violations == ()
    # And how old it was is told
    assert report.longest_staleness == pytest.approx(BOUND - 0.01)
    late = judged(first, second, known, get("c", 10 + BOUND + 0.01, "1-0", "a/1"), store=store)
    assert (promises(late), late.beyond_bound) == (["G5"], 1)


def test_g5_what_workers_have_not_committed_is_not_stale() -> None:
    # Given that no worker was there for a minute
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    old = [get("c", at, "1-0", "a/1", source=source) for at, source in ((20, "store"), (60, "local"))]
    known = heard("c", 61, "2-0")
    store = [row("2-0", "a/2")]
    # Then what others read is as old as the store
    report = judged(first, second, *old, known, get("c", 61.1, "2-0", "a/2"), store=store)
    assert (report.violations, report.longest_staleness) == ((), 0.0)
    # But who wrote it is told that it is old
    own = get("a", 30, "1-0", "a/1")
    assert judged(first, second, known, replace(own, stale=True), store=store).violations == ()
    assert promises(judged(first, second, known, own, store=store)) == ["G6"]


def test_g5_what_was_seen_counts_as_heard_only_where_the_run_bounds_the_time_between() -> None:
    # Given a worker that died after its commit: somebody has seen what nobody has heard of
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    seen, old = get("b", 3, "2-0", "a/2", source="store"), get("c", 20, "1-0", "a/1")
    report = judged(first, second, seen, old, store=[row("2-0", "a/2")])
    assert (report.violations, report.longest_staleness) == ((), 0.0)
    assert report.longest_since_seen == pytest.approx(20 - 3.001)


def test_g6_a_read_that_overlaps_the_write_may_miss_it() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0", ended=2.5)
    before = get("a", 2.4, "1-0", "a/1", ended=4.0)
    assert judged(first, second, before, store=[row("2-0", "a/2")]).violations == ()
    after = get("a", 2.51, "1-0", "a/1")
    assert promises(judged(first, second, after, store=[row("2-0", "a/2")])) == ["G6"]


def test_g6_a_token_hands_on_what_was_acknowledged_when_it_was_made() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    old = get("b", 5, "1-0", "a/1")
    store = [row("2-0", "a/2")]
    assert judged(first, second, Observed("b", 4, "a", 1.5), old, store=store).violations == ()
    assert promises(judged(first, second, Observed("b", 4, "a", 2.5), old, store=store)) == ["G6"]
    assert judged(first, second, Observed("b", 6, "a", 2.5), old, store=store).violations == ()


def test_g6_does_not_hold_for_what_redis_forgot() -> None:
    # Given that Redis was emptied while an update was on its way, which a worker had already
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    emptied = Fault("emptied", "redis", 2.1, 2.2, loses_log=True)
    old = get("a", 3, "1-0", "a/1", source="store")
    store = [row("2-0", "a/2")]
    assert judged(first, second, emptied, old, store=store, lost_log=True).violations == ()
    # But for what was written, or read, on one side of it, it does
    early = get("a", 2.05, "1-0", "a/1")
    assert promises(judged(first, second, emptied, early, store=store, lost_log=True)) == ["G6"]
    emptied = replace(emptied, began=1.5, ended=1.6)
    assert promises(judged(first, second, emptied, old, store=store, lost_log=True)) == ["G6"]


def test_g1_what_redis_lost_with_its_log_may_be_in_the_store_or_not() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    for row_ in (row("1-0", "a/1"), row("2-0", "a/2")):
        assert judged(first, second, store=[row_], log=entries(first), lost_log=True).violations == ()
    assert judged(first, second, store=[], log=[], lost_log=True).lost_with_log == 2
    # But not what somebody has seen
    seen = get("b", 3, "2-0", "a/2", source="store")
    assert promises(judged(first, second, seen, store=[row("1-0", "a/1")], log=[], lost_log=True)) == ["G1"]
    # Nor what the log has, unless it is said to be lost
    both = entries(first, second)
    assert promises(judged(first, second, store=[row("1-0", "a/1")], log=both, lost_log=True)) == ["G2"]
    lost = both[1:]
    assert (
        judged(first, second, store=[row("1-0", "a/1")], log=both, lost=lost, lost_log=True).violations == ()
    )


def test_g1_a_write_that_redis_forgot_before_it_answered_may_be_there_twice() -> None:
    write = put("a", 1, "a/1", "5-0", ended=4.0)
    emptied = Fault("emptied", "redis", 2, 3, loses_log=True)
    seen = get("b", 1.5, "1-0", "a/1", source="store")
    store = [row("5-0", "a/1")]
    assert judged(write, emptied, seen, store=store, lost_log=True).violations == ()
    assert promises(judged(write, seen, store=store)) == ["G1"]


def test_g1_a_log_may_be_trimmed_but_only_from_its_beginning() -> None:
    writes = [put("a", n, f"a/{n}", f"{n}-0", number=n) for n in (1, 2, 3)]
    store = [row("3-0", "a/3")]
    assert judged(*writes, log=entries(*writes[1:]), store=store).violations == ()
    assert promises(judged(*writes, log=entries(writes[0], writes[2]), store=store)) == ["G1"]
    # What neither the log nor the store has is lost once
    lost = judged(*writes, log=entries(*writes[:2]), store=[row("2-0", "a/2")])
    assert (promises(lost), lost.acknowledged_lost) == (["G1"], 1)


def test_g1_a_dead_letter_may_be_expected() -> None:
    write = put("a", 1, "a/1", "1-0")
    assert judged(write, dead=["1-0"], poison=["1-0"]).violations == ()
    assert promises(judged(write, dead=["1-0"])) == ["G1"]
    # And one of a write that nobody knows of is one, too
    assert promises(judged(dead=["7-0"])) == ["G1"]


def test_g2_an_update_below_a_later_put_leaves_no_trace() -> None:
    first, late = put("a", 1, "a/1", "1-0"), update("b", 2, "b/1", "2-0")
    whole = put("a", 2, "a/2", "3-0")
    assert judged(first, late, whole, store=[row("3-0", "a/2")]).violations == ()
    assert promises(judged(first, late, whole, store=[row("2-0", "b/1")])) == ["G2"]


def test_g1_who_sees_an_update_has_seen_that_the_memory_is_there() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    seen, nothing = get("b", 3, "2-0", "a/2", source="store"), get("c", 4, source="store")
    assert promises(judged(first, second, seen, nothing, store=[row("2-0", "a/2")])) == ["G1"]
    assert judged(first, second, nothing, replace(seen, began=5, ended=6), store=[row("2-0", "a/2")]).ok


def test_g3_a_memory_may_be_put_back_but_not_updated_back() -> None:
    first, gone = put("a", 1, "a/1", "1-0"), delete("a", 2, "2-0")
    again, known = put("b", 3, "b/1", "3-0"), heard("c", 3, "2-0")
    seen = get("c", 50, "3-0", "b/1", source="store")
    assert judged(first, gone, again, known, seen, store=[row("3-0", "b/1")]).violations == ()
    assert promises(judged(first, gone, again, known)) == ["G1"]
    late = replace(again, op="update")
    assert judged(first, gone, late, known).violations == ()
    assert promises(judged(first, gone, late, known, seen)) == ["G4"]
    assert promises(judged(first, gone, late, known, store=[row("3-0", "b/1")])) == ["G3"]


def test_g3_the_deletion_of_a_room_ends_what_was_put_before_and_nothing_else() -> None:
    inside, gone = put("a", 1, "a/1", "1-0"), delete_room("b", 2, "2-0")
    after = put("a", 3, "a/2", "3-0", id="n")
    table = put("a", 1, "a/3", "1-0", id="o", room="elsewhere")
    store = [row("3-0", "a/2", "n"), ["o", "1-0", "a/3", "messages", "elsewhere"]]
    assert judged(inside, gone, after, table, store=store).violations == ()
    assert promises(judged(inside, gone, after, table, store=[*store, row("1-0", "a/1")])) == ["G3"]
    # And who hears of it in the room is not to find any of it there
    seen = [["m", "1-0", "a/1"], ["n", "3-0", "a/2"]]
    read = Read("c", 4, 4.1, R, 20, seen, "shared")
    report = judged(inside, gone, after, table, heard("c", 3.5, "2-0", scope=R), read, store=store)
    assert promises(report) == ["G4"]


def test_a_listing_that_is_full_may_leave_memories_out() -> None:
    writes = [put("a", n, f"a/{n}", f"{n}-0", id=f"m{n}", number=n) for n in (1, 2, 3)]
    known = heard("b", 4, "1-0", "2-0", "3-0", scope=R)
    store = [row(f"{n}-0", f"a/{n}", f"m{n}") for n in (1, 2, 3)]
    read = Read("b", 50, 50.1, R, 2, [e[:3] for e in store[1:]], "local")
    assert judged(*writes, known, read, store=store).violations == ()
    assert promises(judged(*writes, known, replace(read, limit=3), store=store)) == ["G4"]


def test_g2_a_read_that_shares_a_load_is_as_old_as_the_load() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    # Given a slow load that began before somebody saw the update
    slow = get("c", 2.5, "1-0", "a/1", source="store", ended=4.0)
    seen = get("b", 3, "2-0", "a/2", source="store")
    # Then who joined it may get what it found
    joined = get("c", 3.5, "1-0", "a/1", source="store", ended=4.0)
    store = [row("2-0", "a/2")]
    assert judged(first, second, slow, seen, joined, store=store).violations == ()
    assert promises(judged(first, second, seen, joined, store=store)) == ["G2"]


def test_a_failed_read_and_an_agent_of_which_nothing_is_left_prove_nothing() -> None:
    first = put("a", 1, "a/1", "1-0")
    failed = get("a", 50, error="StoreUnavailable: away")
    report = judged(first, failed, store=[row("1-0", "a/1")])
    assert (report.violations, report.failed_reads) == ((), 1)


def test_g4_what_is_applied_at_the_very_moment_when_a_read_begins_may_come_after_it() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    old = get("c", 3, "1-0", "a/1")
    store = [row("2-0", "a/2")]
    assert judged(first, second, heard("c", 3, "2-0"), old, store=store).violations == ()
    assert promises(judged(first, second, heard("c", 2.999, "2-0"), old, store=store)) == ["G4"]


def test_a_write_of_which_no_record_is_left_is_missed() -> None:
    writes = [put("a", n, f"a/{n}", f"{n}-0", number=n) for n in (1, 2, 4)]
    report = judged(*writes, store=[row("4-0", "a/4")])
    assert [str(violation) for violation in report.violations] == [
        "history: the records of a's writes [3] are missing"
    ]


def test_two_partitions_may_give_the_same_version() -> None:
    one = put("a", 1, "a/1", "1-0", number=1)
    other = put("a", 2, "a/2", "1-0", id="n", room="elsewhere", number=2)
    store = [row("1-0", "a/1"), ["n", "1-0", "a/2", "messages", "elsewhere"]]
    # If an invalidation names one of them, then nobody is to have heard of the other
    reads = [get("b", 5, "1-0", "a/1"), Read("b", 5, 5.1, "id:n", 0, [], "local")]
    assert judged(one, other, heard("b", 3, "1-0"), *reads, store=store).violations == ()
    # Nor where it names a scope that may have either
    scope = "entity:messages:e"
    seen = Read("c", 4, 4.1, scope, 20, [row("1-0", "a/1"), ["n", "1-0", "a/2"]], "store")
    reads = [Read("b", 5, 5.1, scope, 20, [row("1-0", "a/1")[:3]], "local")]
    seen.seen[0] = seen.seen[0][:3]
    assert judged(one, other, heard("b", 3, "1-0", scope=scope), seen, *reads, store=store).violations == ()
    other = replace(other, version="2-0")
    store[1][1] = seen.seen[1][1] = "2-0"
    assert promises(judged(one, other, heard("b", 3, "2-0", scope=scope), seen, *reads, store=store)) == [
        "G4"
    ]


# What it tells


def test_it_counts_what_there_was() -> None:
    writes = [
        put("a", 1, "a/1", "1-0", number=1),
        put("a", 2, "a/2", None, number=2, outcome="refused"),
        update("a", 3, "a/3", None, number=3, outcome="unknown", ended=None),
        delete("a", 4, None, number=4, outcome="missing"),
        update("a", 5, "a/4", None, number=5, outboxed=True),
    ]
    reads = [
        get("b", 6),
        get("b", 7, "1-0", "a/1", source="store"),
        get("b", 8, stale=True),
        get("b", 9, error="no"),
    ]
    faults = [Fault("cut", "a", 2, 3), Fault("cut", "b", 8, 10), Fault("killed", "w", 3)]
    log = [*entries(writes[0]), ["2-0", "update", *ROOM, "m", "a/4"]]
    last = get("b", 12, "1-0", "a/1")
    now = get("b", 13, "2-0", "a/4")
    report = judged(
        *writes, *reads, *faults, last, now, heard("b", 5.5, "1-0"), log=log, store=[row("2-0", "a/4")]
    )
    assert report.violations == () or promises(report) == ["G4"]
    assert (report.writes, report.acknowledged, report.unknown, report.refused, report.outboxed) == (
        5,
        2,
        1,
        2,
        1,
    )
    assert (report.reads, report.stale_reads, report.failed_reads) == (6, 1, 1)
    assert report.reads_by_source == {"local": 4, "store": 1}
    assert report.faults == {"cut": 2, "killed": 1}
    assert (report.invalidations, report.seconds) == (1, 99.0)
    # From the end of the last fault until the last answer that was not as in the end
    assert report.converged_after == pytest.approx(2.001)


def test_a_violation_that_lasts_is_told_once() -> None:
    first, second = put("a", 1, "a/1", "1-0"), update("a", 2, "a/2", "2-0")
    old = [get("c", 50 + n, "1-0", "a/1") for n in range(30)]
    report = judged(first, second, heard("c", 3, "2-0"), *old, store=[row("2-0", "a/2")])
    [violation] = report.violations
    assert (violation.times, violation.records[-1], report.beyond_bound) == (30, old[0], 30)
    assert str(violation).splitlines()[0] == (
        "G4: c saw m at an older version than the update of version 2-0, whose invalidation it had applied"
        " (30 times; the first is shown)"
    )


def command(folder: Path) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "chaos" / "checker.py"
    return subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=60)


def test_the_command_prints_the_report_and_what_was_not_kept(tmp_path: Path) -> None:
    # Given the records of a correct run, then it says so
    run = Run(1)
    run.history.save(tmp_path)
    done = command(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "violations          0\n" in done.stdout
    # If a write is lost, then it says which
    planted = lost_write_and_its_entry_in_the_log(run)
    assert planted is not None
    [lost] = planted[1]
    run.history.save(tmp_path)
    done = command(tmp_path)
    assert done.returncode == 1
    assert "violations          1\n" in done.stdout
    assert "acknowledged lost   1\n" in done.stdout
    assert "\nG1: " in done.stdout
    assert f'"value": "{lost.value}"' in done.stdout


def test_a_line_that_a_kill_cut_short_is_left_out_and_any_other_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given an agent that was killed in the midst of a write, and of the line that says so
    run = Run(1)
    run.history.save(tmp_path)
    meant = put("killed", 101, "killed/1", None, outcome="unknown", ended=None, number=1)
    line = json.dumps({name: getattr(meant, name) for name in meant.__dataclass_fields__})
    (tmp_path / "killed.jsonl").write_text(f"{line}\n{line[:-20]}")
    assert main([str(tmp_path)]) == 0
    # If a line is cut in the middle of the file, then the records are no good
    (tmp_path / "killed.jsonl").write_text(f"{line[:-20]}\n{line}\n")
    assert main([str(tmp_path)]) == 1
    assert "can't be read: killed.jsonl, line 1: " in capsys.readouterr().out
