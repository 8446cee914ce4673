"""Judges the reads: compares each answer with what was known when the read began.

The checker goes through every scope once, in the order of time. On the way, four kinds of *floor* rise under its reads:

    own       own writes of the reader that were acknowledged, or that it had observed of another    G6
    applied   versions of an invalidation that the reader had applied, in this scope                 G4
    heard     versions of an invalidation that any agent had applied, in this scope: they were
              fanned out. Older answers are within the promise for max_staleness and a heartbeat     G5, G3
    stored    versions that anybody had seen: the store had them. A read of the store is not older   G2, G3, G1

An answer is below a floor in three cases: a memory in it is older than in the floor; it has a memory that the floor has
deleted and that was not put again; or it lacks a memory of the floor that nothing under way may have deleted.

Why G5 counts from the fan-out and not from the commit: an agent guarantees that it has applied every message that was
sent. A worker that dies between commit and fan-out has not sent one yet; another does so after claim_idle. If the run
bounds that time (`Bounds.fan_out`), answers are also judged by it, from the commit on. For the same reason an agent may
see a memory go back between two tiers before the fan-out: that is counted, and is not a violation.

The moment when a read *began* counts; for a read that shared another's load, the moment when that one began. Answers
marked stale promise nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

from chaos.happened import NEVER, Event, Findings, Happened, number
from chaos.history import Observed, Read, Record, Write

ALWAYS = 1 << 200
"""Above every version."""

Contradiction = tuple[float, Event, tuple[Record, ...]]
"""Since when a floor has been above an answer, the event that the answer lacks, and what shows that it was known."""


class Steps:
    """Something that only rises: a version, since when, and by what proof."""

    __slots__ = ("_proofs", "_times", "_versions", "top")

    def __init__(self) -> None:
        self._times: list[float] = []
        self._versions: list[int] = []
        self._proofs: list[tuple[Event, tuple[Record, ...]]] = []
        self.top = NEVER

    def rise(self, version: int, at: float, event: Event, records: tuple[Record, ...]) -> None:
        if version > self.top:
            self.top = version
            self._times.append(at)
            self._versions.append(version)
            self._proofs.append((event, records))

    def above(self, version: int) -> Contradiction | None:
        """The first step above a version."""
        index = bisect_right(self._versions, version)
        return None if index == len(self._versions) else (self._times[index], *self._proofs[index])


_NOTHING = Steps()


class Floor:
    """What is known of the memories of one scope."""

    __slots__ = ("_deleted", "_puts", "_room", "_values", "there")

    def __init__(self) -> None:
        self._values: dict[str, Steps] = defaultdict(Steps)
        self._puts: dict[str, Steps] = defaultdict(Steps)
        self._deleted: dict[str, Steps] = defaultdict(Steps)
        self._room = Steps()
        self.there: set[str] = set()
        """Memories that are put and not deleted, as far as is known."""

    def learn(self, at: float, event: Event, *records: Record) -> None:
        id, version = event.id, event.version
        if event.op == "delete_room":
            self._room.rise(version, at, event, records)
            self.there = {id for id in self.there if self._puts[id].top > version}
            return
        if event.op == "delete":
            self._deleted[id].rise(version, at, event, records)
        else:
            self._values[id].rise(version, at, event, records)
            if event.op == "put":
                self._puts[id].rise(version, at, event, records)
        put = self._puts.get(id)
        if put is not None and put.top > max(self._deleted.get(id, _NOTHING).top, self._room.top):
            self.there.add(id)
        else:
            self.there.discard(id)

    def is_above(self, id: str, version: int, put: int) -> bool:
        """Whether a memory at this version, whose last put is ``put``, is not all that is known of it."""
        values = self._values.get(id)
        if values is not None and values.top > version:
            return True
        deleted = self._deleted.get(id)
        return self._room.top > put or (deleted is not None and deleted.top > put)

    def newer(self, id: str, version: int) -> Contradiction | None:
        """Since when something newer than this version is known."""
        return self._values.get(id, _NOTHING).above(version)

    def deletion(self, id: str, put: int) -> Contradiction | None:
        """Since when a deletion after this put is known."""
        found = [f for f in (self._deleted.get(id, _NOTHING).above(put), self._room.above(put)) if f]
        return min(found, key=itemgetter(0), default=None)

    def put(self, id: str, deleted: int) -> Contradiction | None:
        """Since when a put after this deletion is known."""
        return self._puts.get(id, _NOTHING).above(deleted)


class Possible:
    """What may have been applied by a moment, known or not."""

    def __init__(self, happened: Happened) -> None:
        self._happened = happened
        self._puts: dict[str, list[int]] = {}
        self._put: dict[str, list[tuple[float, int]]] = {}
        self._deleted: dict[str, list[tuple[float, int]]] = {}
        loose: dict[tuple[str, bool], list[tuple[float, int]]] = defaultdict(list)
        for write in happened.loose:
            if write.op == "delete_room":
                loose[f"{write.table}:{write.room}", True].append((write.began, ALWAYS))
            elif write.op != "update":
                loose[write.id, write.op == "delete"].append((write.began, ALWAYS))
        for id, (table, room) in happened.home.items():
            events = happened.of_id[id]
            puts = [event for event in events if event.op == "put"]
            self._puts[id] = [event.version for event in puts]
            self._put[id] = _rising([*((e.began, e.version) for e in puts), *loose[id, False]])
            deleted = [
                *((e.began, e.version) for e in events if e.op == "delete"),
                *((e.began, e.version) for e in happened.of_room[table, room]),
                *loose[id, True],
                *loose[f"{table}:{room}", True],
            ]
            self._deleted[id] = _rising(deleted)
        self._put_of: dict[tuple[str, int], int] = {}

    def put_under(self, id: str, version: int, by: float) -> int:
        """The last possible put of a memory that was seen at this version."""
        put = self._put_of.get((id, version))
        if put is None:
            puts = self._puts.get(id, [])
            index = bisect_right(puts, version)
            put = self._put_of[id, version] = puts[index - 1] if index else NEVER
        if put < version and self.last_put(id, by) == ALWAYS:
            return version
        return put

    def first_put(self, id: str, version: int) -> Event | None:
        """The first possible put of a memory that was seen at this version."""
        for event in self._happened.of_id[id]:
            if event.op == "put":
                return event if event.version <= version else None
        return None

    def last_put(self, id: str, by: float) -> int:
        return _at(self._put.get(id, []), by)

    def last_deletion(self, id: str, by: float) -> int:
        return _at(self._deleted.get(id, []), by)


def _rising(pairs: list[tuple[float, int]]) -> list[tuple[float, int]]:
    out: list[tuple[float, int]] = []
    for at, version in sorted(pairs):
        if not out or version > out[-1][1]:
            out.append((at, version))
    return out


def _at(steps: list[tuple[float, int]], by: float) -> int:
    index = bisect_right(steps, (by, ALWAYS + 1))
    return steps[index - 1][1] if index else NEVER


@dataclass
class Figures:
    """The result of judging a run's reads.

    longest       the longest time, in seconds, that an answer lacked what had been fanned out before its read began
    longest_seen  the same, since anybody had seen it
    backward      memories that an agent saw older than it had seen them before in the same scope
    beyond        reads that were older than promised
    """

    longest: float = 0.0
    longest_seen: float = 0.0
    backward: int = 0
    beyond: int = 0


Step = tuple[float, int, object]
_READ, _LEARN = 0, 1
"""At the same moment reads come first: what becomes known at that moment does not bind them."""


class Reads:
    """Judges all reads of a run."""

    def __init__(self, happened: Happened, findings: Findings) -> None:
        self._happened = happened
        self._findings = findings
        self._possible = Possible(happened)
        self._ids: dict[str, set[str]] = defaultdict(set)
        """The memories of a room, by its scope."""
        self.figures = Figures()
        bounds = happened.history.bounds
        self._bound = bounds.max_staleness + bounds.heartbeat
        self._commit_bound = math.inf if bounds.fan_out is None else self._bound + bounds.fan_out

    def judge(self) -> Figures:
        for scope, steps in self._steps().items():
            steps.sort(key=itemgetter(0, 1))
            self._sweep(scope, steps)
        return self.figures

    # Preparing the events

    def _steps(self) -> dict[str, list[Step]]:
        """By scope: its reads, and what becomes known about its memories, by whom."""
        happened = self._happened
        steps: dict[str, list[Step]] = defaultdict(list)
        others: dict[str, set[str]] = defaultdict(set)
        for read in happened.reads:
            if not read.error and not read.stale:
                steps[read.scope].append((read.began, _READ, read))
                if not read.scope.startswith(("id:", "room:")):
                    for id, _, _ in read.seen:
                        others[id].add(read.scope)
        for id, (table, room) in happened.home.items():
            self._ids[f"room:{table}:{room}"].add(id)

        def scopes_of(event: Event) -> list[str]:
            room = f"room:{event.table}:{event.room}"
            if event.op == "delete_room":  # scopes other than rooms may have memories of other rooms, too
                return [room, *(f"id:{id}" for id in self._ids[room])]
            return [room, f"id:{event.id}", *others[event.id]]

        def learn(
            scopes: list[str], at: float, floor: str, agent: str, event: Event, *records: Record
        ) -> None:
            if event.doubled:
                return
            for scope in scopes:
                if scope in steps:
                    steps[scope].append((at, _LEARN, (floor, agent, event, records)))

        for applied in happened.applied:
            named = set(applied.scopes)
            for text in applied.versions:
                events = happened.by_version.get(number(text), ())
                for event in events:
                    touched = event.touched(applied, named, len(events) == 1)
                    learn(touched, applied.at, "applied", applied.agent, event, applied)
                    if event.op == "delete_room" and touched:  # its own scope is the last to be fanned out
                        touched = scopes_of(event)
                    learn(touched, applied.at, "heard", "", event, applied)
        for event in happened.events:
            if event.committed is not None:
                at, proof = event.committed
                learn(scopes_of(event), at, "stored", "", event, proof)
        for (id, version), read in happened.seen.items():
            put = self._possible.first_put(id, version)  # it, or a later one, is in the store
            if put is not None:
                learn(scopes_of(put), read.ended, "stored", "", put, read)
        for at, agent, event, records in self._acknowledged():
            learn(scopes_of(event), at, "own", agent, event, *records)
        return steps

    def _acknowledged(self) -> list[tuple[float, str, Event, tuple[Record, ...]]]:
        """What each agent must see from when on, because it wrote or observed it."""
        own: dict[str, list[tuple[float, Event, Write]]] = defaultdict(list)
        for event in self._happened.events:
            write = event.write
            if write is not None and write.outcome == "acked" and write.ended is not None and event.sure:
                own[write.agent].append((write.ended, event, write))
        for writes in own.values():
            writes.sort(key=itemgetter(0))
        ended = {agent: [at for at, _, _ in writes] for agent, writes in own.items()}
        out: list[tuple[float, str, Event, tuple[Record, ...]]] = [
            (at, agent, event, (write,)) for agent, writes in own.items() for at, event, write in writes
        ]
        # How far an agent has observed each other agent: in time, and in the writes of its tokens. An agent's own token
        # includes what it has observed.
        known: dict[str, list[tuple[float, dict[str, float]]]] = defaultdict(list)
        told: dict[tuple[str, str], int] = defaultdict(int)
        for observed in sorted(self._happened.history.of(Observed), key=lambda record: record.at):
            before = known[observed.agent][-1][1] if known[observed.agent] else {}
            now = dict(before)
            gained = {observed.of: observed.of_at}
            index = bisect_right(known[observed.of], observed.of_at, key=itemgetter(0))
            if index:
                gained |= {a: t for a, t in known[observed.of][index - 1][1].items() if a != observed.of}
            for agent, until in gained.items():
                if agent == observed.agent or until <= now.get(agent, -math.inf):
                    continue
                now[agent] = until
                last = bisect_right(ended.get(agent, []), until)
                newest: dict[tuple[str, str, str, str], tuple[Event, Write]] = {}
                for _, event, write in own[agent][told[observed.agent, agent] : last]:
                    key = (event.op, event.table, event.room, event.id)
                    if key not in newest or newest[key][0].version < event.version:
                        newest[key] = (event, write)
                out += [(observed.at, observed.agent, e, (w, observed)) for e, w in newest.values()]
                told[observed.agent, agent] = max(last, told[observed.agent, agent])
            known[observed.agent].append((observed.at, now))
        return out

    # Going through the events

    def _sweep(self, scope: str, steps: list[Step]) -> None:
        floors: dict[tuple[str, str], Floor] = defaultdict(Floor)
        heard, stored = floors["heard", ""], floors["stored", ""]
        loads: dict[str, list[tuple[float, float]]] = defaultdict(list)
        before: dict[tuple[str, str], tuple[int, float]] = {}
        shown: dict[tuple[str, str], tuple[Event, Read]] = {}
        for at, kind, what in steps:
            if kind == _LEARN:
                floor, agent, event, records = what  # type: ignore[misc]
                floors[floor, agent].learn(at, event, *records)
                continue
            read: Read = what  # type: ignore[assignment]
            load_began = self._load_began(loads[read.agent], read)
            self._count_backward(before, read)
            if self._judge_shown(scope, read, shown):
                self.figures.beyond += 1
            own, applied = floors.get(("own", read.agent)), floors.get(("applied", read.agent))
            for name, layer in (("own", own), ("applied", applied), ("heard", heard), ("stored", stored)):
                if layer is not None and self._judge(scope, read, name, layer, load_began):
                    self.figures.beyond += 1
                    break

    @staticmethod
    def _load_began(loads: list[tuple[float, float]], read: Read) -> float:
        """The earliest possible begin of the load that a read of the store shared."""
        if read.source != "store":
            return read.began
        loads[:] = [(began, ended) for began, ended in loads if ended > read.began]
        began = min([read.began, *(began for began, _ in loads)])
        loads.append((began, read.ended))
        return began

    def _count_backward(self, before: dict[tuple[str, str], tuple[int, float]], read: Read) -> None:
        for memory, text, _ in read.seen:
            version = number(text)
            last, ended = before.get((read.agent, memory), (NEVER, 0.0))
            if version > last:
                before[read.agent, memory] = (version, read.ended)
            elif version < last and ended <= read.began:
                self.figures.backward += 1

    def _judge_shown(self, scope: str, read: Read, shown: dict[tuple[str, str], tuple[Event, Read]]) -> bool:
        """Whether an answer shows a memory older than an earlier live answer of the same agent did, though the store
        has what that answer showed (G9)."""
        wrong = False
        for memory, text, _ in read.seen:
            version = number(text)
            last = shown.get((read.agent, memory))
            if last is not None and version < last[0].version and last[1].ended <= read.began:
                event, first = last
                lost = event.write is not None and self._happened.may_be_lost(event.write, read.ended)
                if event.sure and not lost:
                    wrong = True
                    sentence = (
                        f"{read.agent} saw {memory} in {scope} at an older version than {event.text}, which a live"
                        " answer had shown it before"
                    )
                    self._findings.add(
                        "G9", (read.agent, scope, memory, event.version), sentence, first, read
                    )
            elif read.live:
                events = self._happened.by_version.get(version, ())
                event_of = next((e for e in events if e.id == memory), None)
                if event_of is not None:
                    shown[read.agent, memory] = (event_of, read)
        return wrong

    def _judge(self, scope: str, read: Read, name: str, floor: Floor, load_began: float) -> bool:
        """Whether an answer is below a floor, by more than is allowed."""
        wrong = False
        for memory, how, contradiction in self._below(scope, read, floor):
            wrong |= self._weigh(scope, read, name, memory, how, contradiction, load_began)
        return wrong

    def _below(self, scope: str, read: Read, floor: Floor) -> Iterator[tuple[str, str, Contradiction]]:
        """Where an answer is below a floor: which memory, in what way, and what contradicts it."""
        possible = self._possible
        if read.count >= 0:
            found = self._miscounted(scope, read, floor)
            if found is not None:
                yield "", "counted", found
            return
        there = set()
        for memory, text, _ in read.seen:
            there.add(memory)
            version = number(text)
            put = possible.put_under(memory, version, read.ended)
            if floor.is_above(memory, version, put):
                deletion, newer = floor.deletion(memory, put), floor.newer(memory, version)
                if deletion is not None and (newer is None or deletion[0] <= newer[0]):
                    yield memory, "deleted", deletion
                elif newer is not None:
                    yield memory, "older", newer
        if (read.limit and len(read.seen) >= read.limit) or floor.there <= there:
            return
        for memory in floor.there - there:
            found = floor.put(memory, possible.last_deletion(memory, read.ended))
            if found is not None:
                yield memory, "missing", found

    def _miscounted(self, scope: str, read: Read, floor: Floor) -> Contradiction | None:
        """Since when a count has been too low or too high."""
        possible = self._possible
        puts = (floor.put(id, possible.last_deletion(id, read.ended)) for id in floor.there)
        there = sorted(filter(None, puts), key=itemgetter(0))
        if len(there) > read.count:
            return there[read.count]
        if not scope.startswith("room:"):
            return None
        last = {id: put for id in self._ids[scope] if (put := possible.last_put(id, read.ended)) > NEVER}
        deletions = (floor.deletion(id, put) for id, put in last.items())
        gone = sorted(filter(None, deletions), key=itemgetter(0))
        may_be_there = len(last) - read.count
        return gone[max(may_be_there, 0)] if len(gone) > may_be_there and gone else None

    def _weigh(
        self,
        scope: str,
        read: Read,
        name: str,
        memory: str,
        how: str,
        contradiction: Contradiction,
        load_began: float,
    ) -> bool:
        """Whether it is a violation that this event is not in this answer."""
        since, event, records = contradiction
        age = read.began - since
        promise = "G3" if how == "deleted" else "G5"
        if name == "own":
            if event.write is not None and self._happened.may_be_lost(event.write, read.ended):
                return False
            promise, known = "G6", "of its own" if len(records) == 1 else "that it had observed"
        elif name == "applied":
            promise, known = "G4", "whose invalidation it had applied"
        elif name == "heard":
            self.figures.longest = max(self.figures.longest, age)
            if age <= self._bound:
                return False
            known = f"that was fanned out {age:.3f} s before; {self._bound:g} s are allowed"
        else:
            self.figures.longest_seen = max(self.figures.longest_seen, age)
            if read.source == "store" and since < load_began:
                promise, known = _IN_STORE[how], "that the store had had before"
            elif age > self._commit_bound:
                known = f"that was in the store {age:.3f} s before; {self._commit_bound:g} s are allowed"
            else:
                return False
        sentence = (
            f"{read.agent} {_SAW[how].format(memory=memory, count=read.count, scope=scope)} the {event.op} of version"
            f" {event.text}, {known}"
        )
        same = (name, how, read.agent, scope, memory, event.version)
        self._findings.add(promise, same, sentence, event.write or event.proof, *records, read)
        return True


_SAW = {
    "older": "saw {memory} at an older version than",
    "deleted": "saw {memory} in spite of",
    "missing": "did not see {memory} in spite of",
    "counted": "counted {count} in {scope}, in spite of",
}
_IN_STORE = {"older": "G2", "deleted": "G3", "missing": "G1", "counted": "G1"}
