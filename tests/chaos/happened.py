"""What happened in a run: its writes, matched with their versions.

The version of an acknowledged write is known. A write that was outboxed, or whose answer never came, may have happened
or not: it did if its value is in the log, in the store, or in any answer. A write of unknown outcome that is nowhere
stays *loose*: its effect is allowed, and not required.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache

from chaos.history import Applied, Fault, Final, History, Published, Read, Record, Write

Room = tuple[str, str]
"""A table and a room in it."""

NEVER = -1
"""Before every version."""


@cache
def number(version: str) -> int:
    """A version as a number; numbers have the order of versions."""
    ms, _, seq = version.partition("-")
    return (int(ms) << 64) | int(seq)


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept.

    promise  G1 to G7; "history" if the records contradict each other, so that no judgement is possible
    records  the fewest records that show it
    times    how often one agent saw the same about one write
    """

    promise: str
    sentence: str
    records: tuple[Record, ...]
    times: int = 1

    def __str__(self) -> str:
        again = f" ({self.times} times; the first is shown)" if self.times > 1 else ""
        return "\n".join(
            [f"{self.promise}: {self.sentence}{again}", *(f"    {shown(r)}" for r in self.records)]
        )


def shown(record: Record, width: int = 600) -> str:
    """A record on one line, without its empty fields."""
    fields = {name: value for name, value in asdict(record).items() if value not in (None, "", [], {}, False)}
    line = json.dumps({"kind": fields.pop("kind"), **fields})
    return line if len(line) <= width else line[: width - 4] + " ..."


class Findings:
    """Violations; only the first of those that show the same."""

    def __init__(self) -> None:
        self._found: dict[object, tuple[str, str, tuple[Record, ...]]] = {}
        self._times: dict[object, int] = defaultdict(int)

    def add(self, promise: str, same: object, sentence: str, *records: Record | None) -> None:
        key = (promise, same)
        self._times[key] += 1
        if key not in self._found:
            once = {id(record): record for record in records if record is not None}
            self._found[key] = (promise, sentence, tuple(once.values()))

    def all(self) -> tuple[Violation, ...]:
        return tuple(Violation(*found, self._times[key]) for key, found in self._found.items())


@dataclass(eq=False, slots=True)
class Event:
    """A write with its version.

    write      its record; None if there is none
    proof      the record that shows the version
    began      the earliest possible begin
    in_log     whether the log has it at the end
    committed  the latest possible time of its commit, and the record that shows that
    sure       whether the store must have it at the end
    doubled    whether it should not exist, because its write has another version
    """

    version: int
    text: str
    op: str
    table: str
    room: str
    id: str
    value: str
    write: Write | None
    proof: Record
    began: float
    in_log: bool = False
    committed: tuple[float, Record] | None = None
    sure: bool = True
    doubled: bool = False

    @property
    def target(self) -> str:
        return f"memory {self.id}" if self.id else f"room {self.table}:{self.room}"

    def touched(self, applied: Applied, scopes: set[str], unique: bool) -> list[str]:
        """The scopes of an invalidation that belong to this event.

        unique  whether no event of another log partition has the same version
        """
        own = [f"room:{self.table}:{self.room}"]
        if self.op != "delete_room":
            own.append(f"id:{self.id}")
            if unique:  # the memory's entity is not recorded: any such scope may belong to it
                own += [scope for scope in applied.scopes if not scope.startswith(("id:", "room:"))]
        return [scope for scope in own if scope in scopes]


class Happened:
    """The events of a history, and what is loose.

    of_id, of_room  puts, updates and deletes by memory; room deletions by room; in the order of their versions
    loose           writes that may have happened, at a version that nobody knows
    home            the room of each memory
    seen            by memory and version: the first read that showed it
    """

    def __init__(self, history: History, findings: Findings) -> None:
        self.history = history
        self.findings = findings
        self.writes: list[Write] = history.of(Write)
        self.reads: list[Read] = sorted(history.of(Read), key=lambda read: read.ended)
        self.applied: list[Applied] = sorted(history.of(Applied), key=lambda applied: applied.at)
        self.faults: list[Fault] = history.of(Fault)
        finals = history.of(Final)
        if len(finals) != 1:
            findings.add(
                "history", "end", f"there are {len(finals)} records of the end: there must be one", *finals
            )
        self.final: Final = finals[0] if finals else Final(math.inf, lost_log=True)
        self.has_end = bool(finals)
        self._whole = self.final.whole or not (self.final.lost_log or self.final.lost)
        self._losses = [(f.began, f.ended or math.inf) for f in self.faults if f.loses_log]

        self.home: dict[str, Room] = {}
        self.by_version: dict[int, list[Event]] = defaultdict(list)
        self.of_id: dict[str, list[Event]] = defaultdict(list)
        self.of_room: dict[Room, list[Event]] = defaultdict(list)
        self.seen: dict[tuple[str, int], Read] = {}
        self._events: dict[tuple[int, str], Event] = {}
        self._by_value: dict[str, Write] = {}
        self._of_write: dict[int, list[Event]] = defaultdict(list)
        self._unclaimed: dict[tuple[str, str, str], dict[str, tuple[list[str], Record, bool]]] = defaultdict(
            dict
        )
        self._accounted: set[int] = set()
        """Deletions that happened; which of several in the log they are is not known."""

        self.never_logged = 0
        """Acknowledged writes that are nowhere."""
        self._take_writes()
        self._take_published()
        self._take_log()
        self._take_reads()
        self._take_store()
        self._take_applied()
        self._take_dead()
        self.loose = self._left()
        self._check_doubled()
        for events in (*self.of_id.values(), *self.of_room.values()):
            events.sort(key=lambda event: event.version)

    def may_be_lost(self, write: Write, until: float = math.inf) -> bool:
        """Whether Redis may have lost a write, or the record of it, before a moment."""
        if not self.final.lost_log:
            return False
        return not self._losses or any(a <= until and b >= write.began for a, b in self._losses)

    def event_of(self, write: Write) -> Event | None:
        events = self._of_write.get(id(write))
        return events[-1] if events else None

    @property
    def events(self) -> Iterable[Event]:
        return self._events.values()

    def end(self, log: Sequence[list[str]] = (), store: Sequence[list[str]] = ()) -> Final:
        """The record of the end, without irrelevant parts."""
        return Final(self.final.at, log=list(log), store=list(store), lost_log=self.final.lost_log)

    def log_entry(self, event: Event) -> Final | None:
        if not event.in_log:
            return None
        return self.end(log=[[event.text, event.op, event.table, event.room, event.id, event.value]])

    # What the records say

    def _add(
        self, version: str, like: Write | Event, write: Write | None, proof: Record, began: float
    ) -> Event:
        key = (number(version), like.room)  # all of a room is in one stream
        event = self._events.get(key)
        if event is not None:
            if (event.op, event.id, event.value) != (like.op, like.id, like.value):
                sentence = (
                    f"version {version} is a {event.op} of {event.target} ({event.value!r}), and yet a {like.op}"
                    f" with value {like.value!r}"
                )
                self.findings.add("G2", ("same version", key), sentence, event.proof, proof)
            return event
        event = Event(
            key[0], version, like.op, like.table, like.room, like.id, like.value, write, proof, began
        )
        self._events[key] = event
        self.by_version[key[0]].append(event)
        if event.op == "delete_room":
            self.of_room[event.table, event.room].append(event)
        else:
            self.of_id[event.id].append(event)
            self.home.setdefault(event.id, (event.table, event.room))
        if write is not None:
            self._of_write[id(write)].append(event)
        return event

    def _take_writes(self) -> None:
        numbers: dict[str, set[int]] = defaultdict(set)
        for write in self.writes:
            if write.number:
                numbers[write.agent].add(write.number)
            if write.id:
                self.home.setdefault(write.id, (write.table, write.room))
            if write.value:
                other = self._by_value.setdefault(write.value, write)
                if other is not write:
                    sentence = f"{write.value!r} was written twice: it does not tell which write it is from"
                    self.findings.add("history", ("value", write.value), sentence, other, write)
            if write.version is not None:
                self._add(write.version, write, write, write, write.began)
        for agent, known in numbers.items():
            missing = sorted(set(range(1, max(known) + 1)) - known)
            if missing:
                sentence = f"the records of {agent}'s writes {missing[:10]} are missing"
                self.findings.add("history", ("numbers", agent), sentence)

    def _unresolved(self) -> dict[tuple[str, str, str], list[Write]]:
        """Deletions that may have happened and whose version is not known, by what they delete."""
        found: dict[tuple[str, str, str], list[Write]] = defaultdict(list)
        for write in self.writes:
            if (
                not write.value
                and write.outcome in ("acked", "unknown")
                and not self._of_write.get(id(write))
            ):
                found[_target(write)].append(write)
        return found

    def _take_published(self) -> None:
        by_number = {(w.agent, w.number): w for w in self.writes if w.number}
        for record in self.history.of(Published):
            write = by_number.get((record.agent, record.number)) or self._by_value.get(record.value)
            if write is not None:
                self._add(record.version, write, write, record, write.began)
            elif record.op:
                entry = [record.version, record.op, record.table, record.room, record.id, record.value]
                self._take_unclaimed(entry, record, in_log=False)

    def _take_log(self) -> None:
        for entry in self.final.log:
            known = self._events.get((number(entry[0]), entry[3]))
            proof = self.end(log=[entry])
            if known is None:
                self._take_unclaimed(entry, proof, in_log=True)
            else:
                known.in_log = True
                self._add(entry[0], _like(entry), None, proof, -math.inf)
        unresolved = self._unresolved()
        for target, found in self._unclaimed.items():
            self._take_deletes(target, list(found.values()), unresolved[target])

    def _take_unclaimed(self, entry: list[str], proof: Record, *, in_log: bool) -> None:
        """An event whose writer did not get its version. To match deletions with writers, all of them are needed."""
        version, _, table, room, memory, value = entry
        if value:
            write = self._by_value.get(value)
            self._check_writer(write, memory, value, proof)
            began = -math.inf if write is None else write.began
            self._add(version, _like(entry), write, proof, began).in_log |= in_log
        else:
            found = self._unclaimed[table, room, memory]
            _, first, logged = found.get(version, (entry, proof, False))
            found[version] = (entry, first, in_log or logged)

    def _take_deletes(
        self,
        target: tuple[str, str, str],
        found: list[tuple[list[str], Record, bool]],
        candidates: list[Write],
    ) -> None:
        """Deletions don't name their writers; if several writers are possible, a deletion is matched with none."""
        candidates = sorted(candidates, key=lambda write: (write.outcome != "acked", write.began))
        began = min((write.began for write in candidates), default=-math.inf)
        for entry, proof, in_log in found:
            write = candidates[0] if len(candidates) == 1 else None
            self._add(entry[0], _like(entry), write, proof, began).in_log = in_log
        self._accounted.update(id(write) for write in candidates[: len(found)] if write.outcome == "acked")
        if len(found) > len(candidates):
            self._check_deleter(target, found[-1][1])

    def _check_deleter(self, target: tuple[str, str, str], proof: Record) -> None:
        same = [w for w in self.writes if not w.value and _target(w) == target]
        happened = [w for w in same if w.outcome in ("acked", "unknown")]
        what = target[2] or f"{target[0]}:{target[1]}"
        if not same:
            self.findings.add("history", target, f"nobody recorded that {what} was deleted", proof)
        elif not happened:
            refused = [write for write in same if write.outcome == "refused"]
            self.findings.add(
                "G7", target, f"a deletion of {what} that was refused happened", *refused, proof
            )
        elif not any(map(self.may_be_lost, happened)):
            logged = [
                entry for entry in self.final.log if entry[1] == same[0].op and tuple(entry[2:5]) == target
            ]
            sentence = (
                f"{what} was deleted {len(happened)} times, and the log has {len(logged)} deletions of it"
            )
            self.findings.add("G1", ("twice", target), sentence, *happened, self.end(log=logged))

    def _check_writer(self, write: Write | None, id: str, value: str, proof: Record) -> None:
        if write is None:
            sentence = (
                f"nobody recorded that {value!r} was written: a record is missing, or the value is made up"
            )
            self.findings.add("history", ("nobody's", value), sentence, proof)
        elif write.id != id:
            sentence = f"{value!r} was written to {write.id} and is seen under {id}"
            self.findings.add("G1", ("moved", value), sentence, write, proof)
        elif write.outcome not in ("acked", "unknown"):
            sentence = f"the {write.op} of {value!r} was refused, and yet it happened"
            self.findings.add("G7", ("refused", value), sentence, write, proof)

    def _take_reads(self) -> None:
        known: set[tuple[str, str, str]] = set()
        for read in self.reads:
            for memory, version, value in read.seen:
                triple = (memory, version, value)
                if triple not in known:
                    known.add(triple)
                    event = self._met(memory, version, value, read)
                    if event is not None and not read.live:
                        self.seen.setdefault((memory, number(version)), read)
                        event.committed = event.committed or (read.ended, read)
                    elif read.live:
                        known.discard(triple)  # another read may show that the store has it

    def _take_store(self) -> None:
        for entry in self.final.store:
            memory, version, value, *_ = entry
            self._met(memory, version, value, self.end(store=[entry]))

    def _met(self, memory: str, version: str, value: str, proof: Record) -> Event | None:
        """A memory was seen at a version: return its event, if it is consistent."""
        write = self._by_value.get(value)
        mine = write is not None and write.id == memory
        room = write.room if write is not None and mine else self.home.get(memory, ("", ""))[1]
        event = self._events.get((number(version), room))
        if event is not None and (event.id, event.value) == (memory, value):
            return event
        self._check_writer(write, memory, value, proof)
        if write is None or not mine:
            return None
        event = self._add(version, write, write, proof, write.began)
        return event if event.value == value else None

    def _take_applied(self) -> None:
        for applied in self.applied:
            scopes = set(applied.scopes)
            for text in applied.versions:
                events = self.by_version.get(number(text), ())
                for event in events:
                    if event.touched(applied, scopes, len(events) == 1) and (
                        event.committed is None or event.committed[0] > applied.at
                    ):
                        event.committed = (applied.at, applied)

    def _take_dead(self) -> None:
        """Dead letters have no effect. Events that Redis lost need not have one."""
        poison = set(self.final.poison)
        for text in self.final.dead:
            events = self.by_version.pop(number(text), [])
            if text not in poison:
                sentence = f"version {text} is in the dead letters: it is acknowledged, and not in the store"
                proofs = [event.proof for event in events] or [Final(self.final.at, dead=[text])]
                self.findings.add("G1", ("dead", text), sentence, *proofs)
            for event in events:
                self._events.pop((event.version, event.room))
                self.of_id[event.id] = [e for e in self.of_id[event.id] if e is not event]
                room = (event.table, event.room)
                self.of_room[room] = [e for e in self.of_room[room] if e is not event]
        lost = {(number(entry[0]), entry[3]) for entry in self.final.lost}
        for key, event in self._events.items():
            kept = key not in lost and (event.in_log or self._whole)
            event.sure = event.committed is not None or kept

    def _left(self) -> list[Write]:
        left = [
            write
            for write in self.writes
            if write.outcome in ("acked", "unknown")
            and not self._of_write.get(id(write))
            and id(write) not in self._accounted
        ]
        if not self.has_end:
            return left
        for write in left:
            if write.outcome == "acked" and (self._whole or not self.may_be_lost(write)):
                sentence = (
                    f"the {write.op} of {write.id or write.room} was acknowledged, and never got into the log"
                )
                self.findings.add("G1", ("lost", id(write)), sentence, write)
                self.never_logged += 1
        # A log that has everything also has those of these that happened.
        return [] if self._whole and all(event.in_log for event in self._events.values()) else left

    def _check_doubled(self) -> None:
        for events in self._of_write.values():
            write = events[0].write
            if len(events) > 1 and write is not None:
                acked = write.outcome == "acked" and not write.outboxed and write.ended is not None
                if not self.may_be_lost(write, write.ended or math.inf if acked else math.inf):
                    first, second = events[:2]
                    what = f"{write.value!r}" if write.value else f"the {write.op} of {first.target}"
                    sentence = (
                        f"{what} was written once, and has two versions: {first.text} and {second.text}"
                    )
                    self.findings.add("G1", ("twice", id(write)), sentence, write, first.proof, second.proof)
                    for event in events[1:]:  # one report is enough: nothing else is judged by it
                        event.doubled, event.sure = True, False


def _like(entry: list[str]) -> Write:
    """An entry of the log, in the form of a write without a writer."""
    _, op, table, room, memory, value = entry
    return Write("", -math.inf, None, op, table, room, memory, value, "unknown")


def _target(write: Write) -> tuple[str, str, str]:
    return (write.table, write.room, write.id)
