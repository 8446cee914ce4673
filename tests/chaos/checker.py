"""Decides from the history of a run, and from nothing else, whether the promises were kept.

    python tests/chaos/checker.py FOLDER      prints the report and the violations; exit status 1 if there are any

- `happened.py` puts the writes together with their versions: nothing happened twice, nothing that was refused happened.
- `reads.py` judges every answer by what was known when its read began (G3 to G6).
- Here: what the store, the log and the agents have in the end (G1 to G3, G5), and the order of the log (G2, G7).

What a run can't show is not judged: a lost answer may stand for a write or for none; what Redis lost when it was
emptied may be in the store or not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos.happened import NEVER, Event, Findings, Happened, Violation, number
from chaos.history import Final, History, Record
from chaos.reads import Reads


@dataclass(frozen=True, slots=True)
class Report:
    """What a run comes to.

    seconds            from its first call to its end
    writes             calls of write, update, delete and delete_room
    acknowledged       those that returned
    unknown            those of which nobody knows whether they happened, from their answer
    refused            those that did not happen, by their answer; no such memory included
    outboxed           those that had to wait in an outbox
    reads              calls of get, recent and count
    reads_by_source    where the answers came from
    stale_reads        answers that were marked stale
    failed_reads       reads that had no answer
    invalidations      messages of the feed that agents applied
    faults             by kind
    acknowledged_lost  acknowledged writes that are not in the store, and should be
    lost_with_log      acknowledged writes of which nothing is left because Redis lost its log
    beyond_bound       reads, not marked stale, that were older than promised
    longest_staleness  the longest time, in seconds, that an answer lacked a write after its fan-out was known
    longest_since_seen the same, after anybody had seen it in the store
    backward           memories that an agent saw older than before in one scope (allowed before the fan-out)
    disagreements      agents' views that differ from the store in the end
    converged_after    seconds from the last write and the last fault to the last answer that differs from the end
    violations         promises that were not kept
    """

    seconds: float
    writes: int
    acknowledged: int
    unknown: int
    refused: int
    outboxed: int
    reads: int
    reads_by_source: dict[str, int]
    stale_reads: int
    failed_reads: int
    invalidations: int
    faults: dict[str, int]
    acknowledged_lost: int
    lost_with_log: int
    beyond_bound: int
    longest_staleness: float
    longest_since_seen: float
    backward: int
    disagreements: int
    converged_after: float
    violations: tuple[Violation, ...]

    @property
    def ok(self) -> bool:
        return not self.violations

    def lines(self) -> list[str]:
        """The figures, for people."""
        out = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "violations":
                value = len(value)
            elif isinstance(value, dict):
                value = ", ".join(f"{name or '?'} {count}" for name, count in sorted(value.items())) or "none"
            elif isinstance(value, float):
                value = f"{value:.3f}"
            out.append(f"{field.name.replace('_', ' '):<20}{value}")
        return out


def check(history: History) -> Report:
    """Judge a run."""
    findings = Findings()
    happened = Happened(history, findings)
    figures = Reads(happened, findings).judge()
    end = _End(happened, findings)
    if happened.has_end:
        end.check_store()
        end.check_log()
        end.check_views()
    end.check_order()

    writes, reads = happened.writes, happened.reads
    outcomes = Counter(write.outcome for write in writes)
    began = min((record.began for record in (*writes, *reads)), default=0.0)
    ended = max((read.ended for read in reads), default=began)
    return Report(
        seconds=(happened.final.at if happened.has_end else ended) - began,
        writes=len(writes),
        acknowledged=outcomes["acked"],
        unknown=outcomes["unknown"],
        refused=outcomes["refused"] + outcomes["missing"],
        outboxed=sum(write.outboxed for write in writes),
        reads=len(reads),
        reads_by_source=dict(Counter(read.source for read in reads if not read.error)),
        stale_reads=sum(read.stale for read in reads),
        failed_reads=sum(bool(read.error) for read in reads),
        invalidations=len(happened.applied),
        faults=dict(Counter(fault.what for fault in happened.faults)),
        acknowledged_lost=end.lost + happened.never_logged,
        lost_with_log=_lost_with_log(happened),
        beyond_bound=figures.beyond,
        longest_staleness=figures.longest,
        longest_since_seen=figures.longest_seen,
        backward=figures.backward,
        disagreements=end.disagreements,
        converged_after=end.converged_after(),
        violations=findings.all(),
    )


def _lost_with_log(happened: Happened) -> int:
    events = [event for event in happened.events if not event.sure]
    acked = {id(event.write) for event in events if event.write and event.write.outcome == "acked"}
    return len(acked) + sum(
        write.outcome == "acked" for write in happened.loose if happened.may_be_lost(write)
    )


class _End:
    """What there is in the end, against what there should be."""

    def __init__(self, happened: Happened, findings: Findings) -> None:
        self._happened = happened
        self._final: Final = happened.final
        self._findings = findings
        self._stored = {entry[0]: entry for entry in self._final.store}
        self._reported: set[int] = set()
        self.lost = 0
        self.disagreements = 0

    # The store

    def check_store(self) -> None:
        if len(self._stored) < len(self._final.store):
            ids = Counter(entry[0] for entry in self._final.store)
            twice = [entry for entry in self._final.store if ids[entry[0]] > 1]
            sentence = f"the store has {twice[0][0]} more than once"
            self._findings.add("G1", "store", sentence, self._happened.end(store=twice))
        for memory in self._happened.home:
            self._check_memory(memory)

    def _check_memory(self, memory: str) -> None:
        happened = self._happened
        table, room = happened.home[memory]
        events = happened.of_id[memory]
        sure = [event for event in events if event.sure]
        written = _last([event for event in sure if event.op != "delete"])
        put = _last([event for event in sure if event.op == "put"])
        deletions = [event for event in (*events, *happened.of_room[table, room]) if "delete" in event.op]
        deleted = _last([event for event in deletions if event.sure])
        entry = self._stored.get(memory)
        if entry is None:
            if put is None or (deleted is not None and deleted.version > put.version):
                return
            if not any(event.version > put.version for event in deletions) and not self._loose_deletion(
                memory
            ):
                self._lose(put, f"{memory} is not in the store, and nobody deleted it")
            return

        version, text = number(entry[1]), entry[1]
        shows = happened.end(store=[entry])
        puts = [event.version for event in events if event.op == "put" and event.version <= version]
        puts += [version for write in happened.loose if write.op == "put" and write.id == memory]
        if deleted is not None and deleted.version > max(puts, default=NEVER):
            last = _last([event for event in events if event.op == "put"])
            sentence = (
                f"{memory} is in the store at version {text}, and was deleted by version {deleted.text}"
            )
            self._findings.add(
                "G3", ("store", memory), sentence, last and last.proof, *_shown(deleted, happened), shows
            )
        elif written is not None and written.version > version:
            sentence = f"the store has {memory} at version {text}; its last write is version {written.text}"
            if written.in_log:
                self._reported.add(id(written))
                self._findings.add("G2", ("store", memory), sentence, *_shown(written, happened), shows)
            else:
                self._lose(written, sentence, shows)

    def _loose_deletion(self, memory: str) -> bool:
        home = self._happened.home[memory]
        return any(
            write.id == memory if write.op == "delete" else (write.table, write.room) == home
            for write in self._happened.loose
            if "delete" in write.op
        )

    def _lose(self, event: Event, sentence: str, *shows: Record) -> None:
        if id(event) not in self._reported:
            self._reported.add(id(event))
            self.lost += event.write is not None and event.write.outcome == "acked"
            self._findings.add("G1", ("lost", id(event)), sentence, *_shown(event, self._happened), *shows)

    # The log

    def check_log(self) -> None:
        """What was acknowledged is in the log, unless all that is older has been trimmed, too."""
        if self._final.lost_log and not self._final.whole:
            return
        oldest: dict[str, Event] = {}
        for event in self._happened.events:
            if event.in_log and event.version < oldest.get(event.room, event).version + 1:
                oldest[event.room] = event
        for event in self._happened.events:
            first = oldest.get(event.room)
            unknown = event.write is None or event.write.outcome != "acked"
            if event.doubled or (unknown and self._final.lost_log):
                continue  # it should not be there; or nobody noted what became of it
            if not event.in_log and first is not None and first.version < event.version:
                sentence = (
                    f"the log lacks version {event.text}, a {event.op} of {event.target}, and has older ones"
                )
                self._lose(event, sentence, *filter(None, [self._happened.log_entry(first)]))

    def check_order(self) -> None:
        """Who writes after another was acknowledged is after it in the log."""
        rooms: dict[str, list[Event]] = defaultdict(list)
        for event in self._happened.events:
            if event.write is not None and not event.doubled:
                rooms[event.room].append(event)
        for events in rooms.values():
            logged = [event for event in events if event.write and not event.write.outboxed]
            self._check_order(logged, events, "G2")
            own: dict[str, list[Event]] = defaultdict(list)
            for event in events:
                if event.write:
                    own[event.write.agent].append(event)
            for mine in own.values():  # an agent's writes stay in order in its outbox, too
                if any(event.write and event.write.outboxed for event in mine):
                    self._check_order(mine, mine, "G7")

    def _check_order(self, earlier: list[Event], later: list[Event], promise: str) -> None:
        acked = [
            (write.ended, event)
            for event in earlier
            if (write := event.write) and write.outcome == "acked" and write.ended is not None
        ]
        acked.sort(key=lambda pair: pair[0])
        last: Event | None = None
        index = 0
        for event in sorted(later, key=attrgetter("began")):
            while index < len(acked) and acked[index][0] <= event.began:
                if last is None or acked[index][1].version > last.version:
                    last = acked[index][1]
                index += 1
            if last is not None and event.version < last.version:
                sentence = (
                    f"version {event.text} was written after version {last.text} had been acknowledged, and is before"
                    " it in the log"
                )
                shows = [*_shown(last, self._happened, log=False), *_shown(event, self._happened, log=False)]
                self._findings.add(promise, ("order", id(event)), sentence, *shows)

    # The agents

    def check_views(self) -> None:
        rooms: dict[str, list[str]] = defaultdict(list)
        for memory, _, _, table, room in self._final.store:
            rooms[f"room:{table}:{room}"].append(memory)
        orders: dict[str, tuple[str, list[str]]] = {}
        for agent, views in self._final.views.items():
            for scope, view in views.items():
                wrong = self._differs(scope, view, rooms)
                if wrong is None:
                    order = [memory for memory, _, _ in view]
                    other, first = orders.setdefault(scope, (agent, order))
                    if first != order:
                        wrong = f"has its memories in another order than {other}"
                if wrong is not None:
                    self.disagreements += 1
                    shows = Final(
                        self._final.at,
                        store=[e for e in self._final.store if e[0] in wrong or e[0] == scope[len("id:") :]],
                        views={agent: {scope: view}},
                    )
                    sentence = f"in the end {agent} does not see what the store has: its {scope} {wrong}"
                    self._findings.add("G5", ("view", agent, scope), sentence, shows)

    def _differs(self, scope: str, view: list[list[str]], rooms: dict[str, list[str]]) -> str | None:
        """How an answer differs from what the store has, in words; None if it does not."""
        seen = set()
        for memory, version, value in view:
            seen.add(memory)
            entry = self._stored.get(memory)
            if entry is None:
                return f"has {memory}, and the store does not"
            if entry[1:3] != [version, value]:
                return f"has {memory} at version {version}, and the store at version {entry[1]}"
        if scope.startswith("room:"):
            expected = rooms.get(scope, [])
        elif scope.startswith("id:"):
            expected = [scope[len("id:") :]] if scope[len("id:") :] in self._stored else []
        else:
            expected = []
        missing = [memory for memory in expected if memory not in seen]
        return f"lacks {missing[0]}" if missing else None

    def converged_after(self) -> float:
        happened = self._happened
        moments = [write.ended or write.began for write in happened.writes]
        moments += [fault.ended or fault.began for fault in happened.faults]
        last = max(moments, default=-math.inf)
        rooms: dict[str, list[str]] = defaultdict(list)
        for memory, _, _, table, room in self._final.store:
            rooms[f"room:{table}:{room}"].append(memory)
        for read in reversed(happened.reads):
            if read.ended <= last:
                break
            if read.error or (read.limit and len(read.seen) >= read.limit):
                continue
            if read.count >= 0:
                differs = read.scope.startswith("room:") and read.count != len(rooms.get(read.scope, []))
            else:
                differs = self._differs(read.scope, read.seen, rooms) is not None
            if differs:
                return read.ended - last
        return 0.0


def _last(events: Sequence[Event]) -> Event | None:
    return max(events, key=attrgetter("version"), default=None)


def _shown(event: Event, happened: Happened, *, log: bool = True) -> list[Record]:
    """The records that tell of an event: who wrote it, how its version is known, and that it is in the log."""
    records: list[Record] = [event.write] if event.write is not None else []
    if event.proof is not event.write:
        records.append(event.proof)
    entry = happened.log_entry(event)
    if log and entry is not None and not isinstance(event.proof, Final):
        records.append(entry)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Judge a run of the campaign by its history.")
    parser.add_argument("folder", type=Path, help="where the run's *.jsonl and bounds.json are")
    parser.add_argument("--most", type=int, default=20, metavar="N", help="violations to print at most")
    options = parser.parse_args(arguments)
    try:
        history = History.load(options.folder)
    except (OSError, ValueError, TypeError) as error:
        print(f"history: the records in {options.folder} can't be read: {error}")
        return 1
    report = check(history)
    print("\n".join(report.lines()))
    for violation in report.violations[: options.most]:
        print(f"\n{violation}")
    left = len(report.violations) - options.most
    if left > 0:
        print(f"\nand {left} more; --most prints more of them")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
