"""World "repartition": the log goes on in new partitions, and no write is lost, doubled, out of order or unseen.

The writes to one room go to one partition, the *old* one, and after the change to another, the *new* one. An agent
makes writes one after the other; its calls and their answers may be lost, and copies of calls arrive late. A worker
applies events. A command closes the log, and ends the old partition in the step that begins the new one. It may be
killed at any moment, and run again. Another agent holds the room live: it listens to the partition that it believes to
be the room's, and verifies that with a heartbeat. The writer may have opened without a layout. Then it may use the new
partition for the room too early: that partition exists already, for other rooms.

Modelled after cli/repartition.py, lua/close.lua, lua/relayout.lua, lua/publish.lua, log/routing.py (`Publishers`) and
feed/subscription.py (`_verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

OLD, NEW = 0, 1


class Call(NamedTuple):
    """A call of publish.lua. Each partition has a publisher with its own numbers."""

    partition: int
    sequence: int
    writes: tuple[int, ...]
    assumed: bool = False
    """Whether the writer did not know the layout of the log. No layout has that name."""


class State(NamedTuple):
    logs: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """The writes that each partition has, in order."""
    versions: tuple[tuple[int, int], ...] = ()
    """Of each write that is logged, its version."""
    applied: tuple[int, ...] = ()
    records: tuple[int, int] = (0, 0)
    """The number of the last call that each partition has done."""
    answers: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """The writes of that call."""
    closed: bool = False
    ended: bool = False
    floor: int = 0
    # The command
    command: str = ""
    kills: int = 0
    runs: int = 0
    # The agent
    guesses: int = 0
    knows: int = OLD
    assumes: bool = False
    network: tuple[Call, ...] = ()
    written: int = 0
    queue: tuple[int, ...] = ()
    calls: tuple[Call, ...] = ()
    """Under way: one, but for a rule that is switched off."""
    unanswered: bool = False
    """Whether a copy of the call got no answer, so that it has to be made again."""
    waits: bool = False
    """Whether the call was refused for a moment, and is to be made again."""
    sequences: tuple[int, int] = (0, 0)
    repeats: int = 0
    told: tuple[int, ...] = ()
    """The writes that were acknowledged."""
    # The agent that reads
    hears: int = OLD
    window: tuple[int, ...] = ()
    verified: tuple[int, ...] = ()
    """What was acknowledged before its last heartbeat, which was good."""


class Repartition(World):
    name = "repartition"
    about = "the log is laid out anew, under lost and late calls, with a command that is killed"
    sizes: ClassVar = {"writes": 2, "repeats": 1, "kills": 0, "runs": 1, "guesses": 0}
    small = ({}, {"kills": 1, "runs": 2}, {"writes": 3}, {"kills": 1}, {"guesses": 1})
    larger = ({"writes": 3, "repeats": 2, "kills": 1, "runs": 2, "guesses": 1},)
    rules = (
        Rule("floor", "the new partition begins by the clock, which was set back", "G2"),
        Rule("drained", "the old partition ends with events that are not applied", "G9"),
        Rule(
            "one-step", "whether all is applied is looked at before the step that ends the partition", "G9", 1
        ),
        Rule("ended", "the old partition takes calls after its end", "G9"),
        Rule("record", "the old partition forgets with its end what it has answered", "G1"),
        Rule("passing", "a log that is closed for a moment is taken for one that has ended", "G1", 1),
        Rule("lapses", "the log stays closed when the command that closed it is killed", "G1", 3),
        Rule("rest", "writes go to the new partition while a call to the old one is under way", "G2", 2),
        Rule("belongs", "a partition takes what was placed by a layout that is assumed, or lost", "G5", 4),
        Rule("elsewhere", "what the feed names of a partition that is not heard is taken for heard", "G4"),
        Rule("looks", "the heartbeat does not look at the layout", "G5"),
    )

    def start(self) -> State:
        return State(**{name: n for name, n in self.size.items() if name in State._fields})

    def broken(self, s: State) -> Iterator[str]:
        logged = s.logs[OLD] + s.logs[NEW]
        for write in set(logged):
            if logged.count(write) > 1:
                yield f"G1: write {write} is in the log twice"
        versions = [version for _, version in sorted(s.versions)]
        if any(before >= after for before, after in pairwise(versions)):
            yield f"G2: the writes have the versions {versions}, in their order"
        if set(s.applied) - set(s.window):
            yield f"G4: the feed has named {s.applied}, and the window shows {s.window}"
        missing = set(s.verified) - set(s.window)
        if missing and s.hears == NEW:
            yield f"G9: a window of the new partition lacks the writes {sorted(missing)}"
        elif missing:
            yield f"G5: a window that was verified lacks the writes {sorted(missing)}"

    def broken_at_rest(self, s: State) -> Iterator[str]:
        for write in range(1, s.written + 1):
            if write not in s.logs[OLD] + s.logs[NEW] and not self.given_up(s):
                yield f"G1: nothing goes on, and write {write} is not in the log"

    @staticmethod
    def given_up(s: State) -> bool:
        """Whether a call is no longer repeated only because this world is small."""
        return s.unanswered and not s.repeats

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self.server(s)
        yield from self.work(s)
        yield from self.change(s)
        yield from self.writer(s)
        yield from self.reader(s)

    # The log

    def server(self, s: State) -> Iterator[tuple[str, State]]:
        for i, call in enumerate(s.network):
            if call in s.network[:i]:
                continue
            after = s._replace(network=s.network[:i] + s.network[i + 1 :])
            if call in s.calls:
                yield f"{shown(call)} is lost", after._replace(unanswered=True)
            done, answer = self.executed(after, call)
            if call not in s.calls:
                yield f"a late {shown(call)}: {answer}", done
                continue
            yield f"{shown(call)}: {answer}", self.answered(done, call, answer)
            if answer == "logged":
                yield f"{shown(call)}: logged, the answer is lost", done._replace(unanswered=True)

    def executed(self, s: State, call: Call) -> tuple[State, str]:
        """publish.lua."""
        partition = call.partition
        if s.records[partition] == call.sequence:
            return s, "logged"
        if s.records[partition] > call.sequence:
            return s, "superseded"
        if partition == OLD and s.ended and self.keeps("ended"):
            return s, "ended"
        if call.assumed and self.keeps("belongs"):
            return s, "ended"
        if s.closed and partition == OLD:
            return s, "closed"
        last = max([version for write, version in s.versions if write in s.logs[partition]], default=0)
        if partition == NEW:
            last = max(last, s.floor)
        given = tuple((write, last + n) for n, write in enumerate(call.writes, 1))
        return s._replace(
            logs=put(s.logs, partition, s.logs[partition] + call.writes),
            versions=tuple(sorted({**dict(s.versions), **dict(given)}.items())),
            records=put(s.records, partition, call.sequence),
            # A listener receives it at once. Lost messages are in other worlds.
            window=s.window + call.writes if s.hears == partition else s.window,
        ), "logged"

    def work(self, s: State) -> Iterator[tuple[str, State]]:
        for write in s.logs[OLD] + s.logs[NEW]:
            if write not in s.applied:
                after = s._replace(applied=tuple(sorted({*s.applied, write})))
                if write not in s.logs[s.hears] and self.keeps("elsewhere"):
                    # The reader drops its window, and reads from the store.
                    after = after._replace(window=tuple(sorted({*s.window, *after.applied})))
                yield f"write {write} is applied, and the feed names it", after
                break

    # The command

    def change(self, s: State) -> Iterator[tuple[str, State]]:
        if not s.command and s.runs and not s.ended:
            yield (
                "the command closes the log",
                s._replace(command="closed", runs=s.runs - 1, closed=True),
            )
        if s.command == "closed":
            drained = set(s.logs[OLD]) <= set(s.applied)
            if drained or not self.keeps("drained"):
                if self.keeps("one-step"):
                    yield "the log is laid out anew", self.laid_out(s)
                else:
                    yield "the command finds that all is applied", s._replace(command="sure")
        if s.command == "sure":
            yield "the log is laid out anew", self.laid_out(s)
        if s.command in ("closed", "sure") and s.kills:
            yield "the command is killed", s._replace(command="", kills=s.kills - 1)
        # Also of a command that is only paused.
        if s.closed and not s.ended and self.keeps("lapses"):
            yield "the log is open again: the time has passed", s._replace(closed=False)

    def laid_out(self, s: State) -> State:
        last = max((version for _, version in s.versions), default=0)
        return s._replace(
            command="done",
            closed=False,
            ended=True,
            floor=last if self.keeps("floor") else 0,
            records=s.records if self.keeps("record") else (0, 0),
        )

    # The agent that writes

    def writer(self, s: State) -> Iterator[tuple[str, State]]:
        if s.guesses and not s.written and not s.ended:
            yield (
                "the writer opens, and takes the new partition for the room's",
                s._replace(knows=NEW, assumes=True, guesses=s.guesses - 1),
            )
        if s.written < self.size["writes"]:
            n = s.written + 1
            yield f"write {n}", s._replace(written=n, queue=(*s.queue, n))
        if s.ended and s.knows == OLD:
            yield "the writer's heartbeat finds the new layout", s._replace(knows=NEW, assumes=False)
        at_rest = not s.calls or (
            not self.keeps("rest") and all(call.partition != s.knows for call in s.calls)
        )
        if s.queue and at_rest:
            call = Call(s.knows, s.sequences[s.knows] + 1, s.queue, s.assumes)
            yield (
                f"it makes {shown(call)}",
                self.sent(s, call)._replace(queue=(), calls=(*s.calls, call)),
            )
        if s.waits and not s.closed:  # it looks again and again
            for call in s.calls:
                yield f"it makes {shown(call)} again", self.sent(s, call)._replace(waits=False)
        if s.unanswered and s.repeats:
            for call in s.calls:
                if call not in s.network:
                    again = self.sent(s, call)._replace(repeats=s.repeats - 1, unanswered=False)
                    yield f"it repeats {shown(call)}", again
        elif s.repeats:
            for call in s.calls:  # the answer takes too long; the first copy is still on its way
                yield f"it repeats {shown(call)}", self.sent(s, call)._replace(repeats=s.repeats - 1)

    @staticmethod
    def sent(s: State, call: Call) -> State:
        return s._replace(
            network=tuple(sorted((*s.network, call))),
            sequences=put(s.sequences, call.partition, call.sequence),
        )

    def answered(self, s: State, call: Call, answer: str) -> State:
        others = tuple(other for other in s.calls if other != call)
        if answer == "logged":
            return s._replace(
                calls=others, unanswered=False, waits=False, told=tuple(sorted((*s.told, *call.writes)))
            )
        if answer == "closed" and self.keeps("passing"):
            return s._replace(waits=True)
        if answer in ("closed", "ended"):
            # What it carries is queued again, before all that came later.
            knows = (NEW if s.ended else OLD) if answer == "ended" else s.knows
            return s._replace(
                calls=others,
                unanswered=False,
                waits=False,
                queue=call.writes + s.queue,
                knows=knows,
                assumes=False,
            )
        return s

    # The agent that reads

    def reader(self, s: State) -> Iterator[tuple[str, State]]:
        now = NEW if s.ended else OLD
        if s.hears != now and self.keeps("looks"):
            # Dropped and opened again: what the store has, and what the new partition has logged.
            window = tuple(sorted({*s.applied, *s.logs[NEW]}))
            yield (
                "the reader's heartbeat finds the new layout",
                s._replace(hears=NEW, window=window, verified=()),
            )
        elif s.verified != s.told:
            yield "the reader's heartbeat is good", s._replace(verified=s.told)


def put(pair: tuple, which: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (value, pair[1]) if which == OLD else (pair[0], value)


def shown(call: Call) -> str:
    where = "the old" if call.partition == OLD else "the new"
    return f"call {call.sequence} to {where} partition with {', '.join(map(str, call.writes))}"
