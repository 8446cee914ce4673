"""World "live": a bucket that is kept current from the log shows the log's state, in order, and never goes back (G9).

One room, in one partition of the log, and its channel. An agent holds the newest few of its memories live: it *opens* a
window from a base (what L2 or the store has) and a *tail* (what is logged above the applied mark), and merges every
event after that as the log has it. Another agent writes, and fills L2. Workers commit and fan out in any order. The
events are not fixed in advance: the publisher chooses. The answers of reads are checked in every state.

An event names x or y; z lies below both, and is never written. "low" is a put with an old date: its row moves down.

Not covered: several channels or partitions, time, epochs, entries with several events. The world "join" shows that a
lost message of the feed is repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

MENU = (("put", "x"), ("upd", "x"), ("del", "x"), ("put", "y"), ("low", "y"), ("del", "y"), ("room", ""))
"""What may be published: the first `kinds` of these."""
RANK = {"x": 1, "y": 2, "z": 0}
"""The dates of the memories; a low put has -1."""
FOREIGN = 0
"""The version of an event that is applied though this log never had it, such as one of a replay."""


class Event(NamedTuple):
    kind: str
    id: str
    own: bool


class Entry(NamedTuple):
    """A memory of a window: its date, and the versions of its put and of its last update."""

    rank: int
    id: str
    put: int
    update: int


class Window(NamedTuple):
    """The newest memories, and whether that is all there is."""

    rows: tuple[Entry, ...]
    complete: bool


class Bucket(NamedTuple):
    """A window that is held live.

    floor   the position in the log that it has come to
    events  those that it has merged, as a mask
    """

    window: Window
    floor: int
    events: int


class Opening(NamedTuple):
    """A bucket that is being opened.

    at      what is done next: settle, mark, lookup, base, tail, install
    mark    the applied mark
    base    the events that L2 or the store had merged, as a mask
    head    the last event of the log when the tail was read
    listed  whether the refused event was listed as such then
    leased  whether the fill of L2 is ours
    """

    at: str
    mark: int = -1
    base: int = 0
    head: int = -1
    listed: bool = False
    leased: bool = False


class State(NamedTuple):
    log: tuple[Event, ...] = ()
    committed: int = 0
    fanned: int = 0
    """Masks of events, as all that follow."""
    refused: int = 0
    """The event that the store refuses; 0: none."""
    told_refused: bool = False
    """Whether the feed has told the agent."""
    foreign: int = 0
    """Of the foreign event: 1 committed, 2 fanned out, 3 the feed has brought it."""
    answered: int = 0
    """Own writes whose answer is there."""
    next: int = 0
    """The message that pub/sub brings next; 0: not subscribed."""
    position: int = -1
    """Of the agent in the channel; -1: not known."""
    beat: int = 0
    """The head that a heartbeat was told; 0: none is under way."""
    opening: Opening | None = None
    bucket: Bucket | None = None
    shared: tuple[str, int] | None = None
    """L2: ("agent", 0) and ("other", 0) are leases, ("value", mask) is a result."""
    fill: tuple[str, int] | None = None
    """The other's: ("leased", 0), ("read", mask)."""
    shown: int = 0
    """Ghost: events that answers have shown."""
    heard: int = 0
    """Ghost: events that the agent was told of."""
    losses: int = 0
    evictions: int = 0
    fills: int = 0
    jumps: int = 0
    refusals: int = 0
    foreigners: int = 0


class Live(World):
    name = "live"
    about = "a window held live: opening, tails, gaps, own writes, dead letters, eviction"
    sizes: ClassVar = {
        "events": 1, "kinds": 7, "window": 1, "initial": 0b101, "beats": 1, "losses": 0, "evictions": 0, "fills": 0,
        "jumps": 0, "refusals": 0, "foreigners": 0,
    }  # fmt: skip
    small = (
        {"evictions": 1, "beats": 0},
        {"losses": 1, "window": 2, "initial": 0b111},
        {"jumps": 1, "window": 2, "initial": 0b010},
        {"fills": 1, "initial": 0b001, "beats": 0},
        {"refusals": 1, "window": 2, "initial": 0b001},
        {"foreigners": 1, "window": 2, "initial": 0b001, "beats": 0},
        {"events": 2, "kinds": 2, "losses": 1, "initial": 0b001},
        {"events": 2, "kinds": 1, "refusals": 1, "initial": 0b001, "beats": 0},
    )
    larger = (
        {"events": 2, "evictions": 1, "beats": 0},
        {"events": 2, "losses": 1, "window": 2, "initial": 0b111},
        {"events": 2, "jumps": 1, "window": 2, "initial": 0b010},
        {"events": 2, "fills": 1, "initial": 0b001, "beats": 0},
        {"events": 2, "refusals": 1, "window": 2, "initial": 0b001},
        {"events": 2, "foreigners": 1, "window": 2, "initial": 0b001, "beats": 0},
    )
    rules = (
        Rule("subscribe-first", "the channel is subscribed once the bucket is complete", "G9"),
        Rule("mark-first", "the applied mark is read after lookup and base, not before", "G9"),
        Rule("mark-fanned", "the applied mark counts what is committed, though not fanned out", "G9"),
        Rule("tail", "what is logged and not applied is not read", "G9"),
        Rule("tail-after-base", "the tail is read before the base", "G9", 6),
        Rule(
            "floor", "a bucket takes events at or below the position in the log that it was read at", "G9", 4
        ),
        Rule("in-order", "an own write is merged when it is answered, ahead of the position", "G9", 6),
        Rule("own-wait", "an answer does not wait until the bucket has come to the own writes", "G6", 6),
        Rule("predecessor", "a message that does not follow the position is merged all the same", "G9", 6),
        Rule("heartbeat", "heads are not compared", "G5", 1),
        Rule("jump-drops", "who jumps over a gap keeps the bucket", "G9", 2),
        Rule("cancel", "a drop (dead letter, jump) spares an opening that is under way", "G9", 4),
        Rule("dead-drop", "a dead letter's message drops no live bucket", "G9", 4),
        Rule("dead-list", "the tail does not leave out what is listed as refused", "G9", 7),
        Rule(
            "foreign", "what is applied without being in the log is taken for known by its version", "G5", 5
        ),
        Rule("shortfall", "a window that lost rows, with more below it, is served as it is", "G9"),
        Rule(
            "cutoff", "rows below the window's last one may enter it though others there are not known", "G9"
        ),
        Rule("lease", "L2 takes a fill without a lease", "G9"),
        Rule("one-flight", "while a bucket is opened, others read the classic way", "G9"),
        Rule("fallback-wait", "a classic answer does not wait until what was shown live is applied", "G9"),
    )

    def __init__(self, without: Iterable[str] = (), **sizes: int) -> None:
        super().__init__(without, **sizes)
        self.initial = [id for id in RANK if self.size["initial"] >> RANK[id] & 1]
        self.answers: dict[tuple[tuple[Event, ...], int], Window] = {}

    def start(self) -> State:
        budget = ("losses", "evictions", "fills", "jumps", "refusals", "foreigners")
        return State(**{name: self.size[name] for name in budget})

    # Merging

    def event(self, s: State, version: int) -> Event:
        return Event("put", "y", False) if version == FOREIGN else s.log[version - 1]

    def merge(self, s: State, base: Window, versions: Iterable[int], *, store: bool = False) -> Window | None:
        """The window with these events, register by register; None if too few of its rows are left."""
        low = base.rows[-1][:2] if base.rows and not base.complete else None
        registers = {row.id: [row.rank, row.put, row.update, -1] for row in base.rows}
        room = -1
        for version in versions:
            kind, id, _ = self.event(s, version)
            if kind == "room":
                room = max(room, version)
                continue
            register = registers.setdefault(id, [0, -1, -1, -1])
            if kind in ("put", "low"):
                if version > register[1]:
                    register[0], register[1] = (RANK[id] if kind == "put" else -1), version
            else:
                at = 2 if kind == "upd" else 3
                register[at] = max(register[at], version)
        rows = sorted(
            (
                Entry(rank, id, put, update)
                for id, (rank, put, update, deleted) in registers.items()
                if put > max(deleted, room)
            ),
            reverse=True,
        )
        if low and not store and self.keeps("cutoff"):
            rows = [row for row in rows if row[:2] >= low]
        limit = self.size["window"]
        if len(rows) < limit and not base.complete and self.keeps("shortfall"):
            return None
        complete = base.complete and len(rows) <= limit and not (store and len(rows) == limit)
        return Window(tuple(rows[:limit]), complete)

    def answer(self, s: State, events: int) -> Window:
        """What the store answers once it has merged these events."""
        known = self.answers.get((s.log, events))
        if known is None:
            rows = tuple(sorted((Entry(RANK[id], id, 0, -1) for id in self.initial), reverse=True))
            merged = self.merge(s, Window(rows, True), _versions(events), store=True)
            assert merged is not None
            known = self.answers[s.log, events] = merged
        return known

    def up_to(self, s: State, version: int, *, refused: bool = False) -> int:
        """The events of the log up to a version; without the refused one, unless that is asked for."""
        return sum(1 << v for v in range(1, version + 1) if refused or v != s.refused)

    def mark(self, s: State) -> int:
        """The applied mark."""
        applied = s.fanned if self.keeps("mark-fanned") else s.committed
        mark = 0
        while applied >> (mark + 1) & 1:
            mark += 1
        return mark

    def own(self, s: State) -> int:
        return sum(1 << version for version, event in enumerate(s.log, 1) if event.own)

    # The agent

    def take_in(self, s: State, versions: Iterable[int]) -> State:
        """Events reach the bucket, in this order."""
        for version in versions:
            bucket = s.bucket
            if bucket is None or (self.keeps("floor") and version <= bucket.floor):
                continue
            window = self.merge(s, bucket.window, [version])
            merged = (
                None
                if window is None
                else Bucket(window, max(bucket.floor, version), bucket.events | 1 << version)
            )
            s = s._replace(bucket=merged)
        return s

    def advance(self, s: State, version: int) -> State:
        """The position moves on to an event."""
        s = self.take_in(s._replace(position=version), [version])
        if s.bucket is not None:
            s = s._replace(bucket=s.bucket._replace(floor=max(s.bucket.floor, version)))
        return s

    def drop(self, s: State) -> State:
        return s._replace(bucket=None, opening=None if self.keeps("cancel") else s.opening)

    def install(self, s: State, opening: Opening) -> State:
        """The end of an opening: base and tail together, then what came meanwhile."""
        refused = 1 << s.refused if s.refused else 0
        tail = [
            version
            for version in range(opening.mark + 1, opening.head + 1)
            if self.keeps("tail")
            and not (version == s.refused and opening.listed and self.keeps("dead-list"))
        ]
        base = opening.base & ~refused
        # As a whole: one by one, a put whose delete the base has already would push a row out for nothing.
        window = self.merge(s, self.answer(s, base), tail)
        s = s._replace(opening=None)
        if window is None:
            return s
        events = base | self.up_to(s, opening.mark) | sum(1 << version for version in tail)
        s = s._replace(bucket=Bucket(window, opening.head, events))
        if not self.keeps("subscribe-first"):
            return s._replace(next=len(s.log) + 1, position=len(s.log))
        late = set(range(opening.head + 1, s.position + 1))
        if not self.keeps("in-order"):  # own writes that were answered meanwhile were kept, too
            late |= {version for version in _versions(s.answered) if version > opening.head}
        s = self.take_in(s, sorted(late))
        if s.bucket is not None:
            s = s._replace(bucket=s.bucket._replace(floor=max(opening.head, s.position)))
        return s

    def served(self, s: State) -> bool:
        """Whether a read is answered from the bucket now."""
        if s.bucket is None:
            return False
        waits = self.keeps("own-wait") and self.keeps("in-order")
        return not waits or s.bucket.floor >= _last(s.answered)

    def classic(self, s: State) -> bool:
        """Whether a read would be answered the classic way now."""
        seen = s.answered | (s.shown if self.keeps("fallback-wait") else 0)
        opening = s.opening is not None and self.keeps("one-flight")
        return s.bucket is None and not opening and self.mark(s) >= _last(seen)

    # What is checked

    def broken(self, s: State) -> Iterator[str]:
        if self.served(s):
            assert s.bucket is not None
            window = s.bucket.window
            for version in range(1, len(s.log) + 1):
                if self.lacks(s, window, version):
                    if s.answered >> version & 1:
                        yield f"G6: the answer lacks {version}, an own write"
                    if (s.heard | s.shown) >> version & 1:
                        yield f"G9: the answer lacks {version}, which was heard, or shown by an earlier one"
            least = max(s.position, _last(s.answered), 0)
            seen = _visible(window)
            foreign = (0,) if not s.foreign else (1,) if s.foreign == 3 else (0, 1)
            moments = range(least, len(s.log) + 1)
            states = [_visible(self.answer(s, self.up_to(s, k) | f)) for k in moments for f in foreign]
            if seen not in states:
                tolerated = [_visible(self.answer(s, self.up_to(s, k, refused=True))) for k in moments]
                if seen not in tolerated:
                    yield f"G9: the answer {seen} is no state of the log from {least} on"
                elif s.told_refused:
                    yield "G9: the answer has an event that is known as refused"
        elif self.classic(s):
            refused = 1 << s.refused if s.refused else 0
            window = self.answer(s, s.committed & ~refused)
            for version in range(1, len(s.log) + 1):
                if (s.shown | s.answered) >> version & 1 and self.lacks(s, window, version):
                    yield f"G9: a classic answer lacks {version}, which was shown live"
        if self.quiet(s):
            yield from self.at_rest(s)

    def lacks(self, s: State, window: Window, version: int) -> bool:
        """Whether an answer lacks an event."""
        kind, id, _ = self.event(s, version)
        if version == s.refused:
            return False
        row = next((row for row in window.rows if row.id == id), None)
        if kind == "upd":
            return row is not None and max(row.put, row.update) < version
        if kind == "del":
            return row is not None and row.put < version
        if kind == "room":
            return any(row.put < version for row in window.rows)
        if row is not None:
            return row.put < version
        later = any(
            event.kind == "room" or (event.kind != "upd" and event.id == id) for event in s.log[version:]
        )
        rank = RANK[id] if kind == "put" else -1
        full = len(window.rows) == self.size["window"] and window.rows[-1][:2] > (rank, id)
        return not later and not full

    def quiet(self, s: State) -> bool:
        """Whether only evictions, fills and openings are left to happen."""
        last = len(s.log)
        done = last == self.size["events"] and s.fanned & ~1 == self.up_to(s, last, refused=True)
        told = s.answered == self.own(s) and (s.told_refused or not s.refused) and s.foreign in (0, 3)
        heard = s.next == 0 or s.next > last
        reached = s.position == last or (s.next > 0 and not self.keeps("heartbeat"))
        return done and told and heard and reached and s.opening is None and not s.beat

    def at_rest(self, s: State) -> Iterator[str]:
        last = len(s.log)
        if s.next and 0 <= s.position != last:
            yield f"G5: the position stays {s.position}, the head is {last}"
        if s.bucket is not None and not self.served(s):
            yield "G5: a bucket stays that is never served"
        if s.bucket is not None:
            events = self.up_to(s, last) | (1 if s.foreign else 0)
            if _visible(s.bucket.window) != _visible(self.answer(s, events)):
                yield "G5: the answer stays another than the store's"

    # What can happen

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        for label, after in self.all_steps(s):
            refused = 1 << after.refused if after.refused else 0
            heard = after.heard | after.answered
            if after.position > 0:
                heard |= self.up_to(after, after.position, refused=True)
            shown = after.shown
            if self.served(after):
                assert after.bucket is not None
                shown |= after.bucket.events
            elif self.classic(after):
                shown |= after.committed
            yield label, after._replace(heard=heard, shown=shown & ~refused)

    def all_steps(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self.publishing(s)
        yield from self.workers(s)
        yield from self.pubsub(s)
        yield from self.opening(s)
        yield from self.evicting(s)
        yield from self.other(s)

    def publishing(self, s: State) -> Iterator[tuple[str, State]]:
        if len(s.log) < self.size["events"]:
            for own in (False, True):
                if own and self.own(s) & ~s.answered:  # one call in flight
                    continue
                for kind, id in MENU[: self.size["kinds"]]:
                    who = "the agent" if own else "the other"
                    event = Event(kind, id, own)
                    yield f"{who} publishes {len(s.log) + 1}: {kind} {id}", s._replace(log=(*s.log, event))
        for version in _versions(self.own(s) & ~s.answered):
            after = s._replace(answered=s.answered | 1 << version)
            if not self.keeps("in-order"):
                after = self.take_in(after, [version])
            elif s.position == version - 1:
                after = self.advance(after, version)
            yield f"the agent is answered for {version}", after

    def workers(self, s: State) -> Iterator[tuple[str, State]]:
        for version in range(1, len(s.log) + 1):
            bit = 1 << version
            if not s.committed & bit:
                yield f"commit {version}", s._replace(committed=s.committed | bit)
                if s.refusals and not s.refused:
                    yield (
                        f"the store refuses {version}",
                        s._replace(committed=s.committed | bit, refused=version, refusals=s.refusals - 1),
                    )
            elif not s.fanned & bit:
                yield f"fan-out of {version}", s._replace(fanned=s.fanned | bit, shared=None)
            elif version == s.refused and not s.told_refused:
                after = s._replace(told_refused=True)
                yield (
                    f"the feed tells that {version} was refused",
                    self.drop(after) if self.keeps("dead-drop") else after,
                )
        if s.foreign == 0 and s.foreigners:
            yield (
                "commit of a foreign event: put y",
                s._replace(foreign=1, committed=s.committed | 1, foreigners=s.foreigners - 1),
            )
        elif s.foreign == 1:
            yield "fan-out of the foreign event", s._replace(foreign=2, shared=None)
        elif s.foreign == 2:
            after = s._replace(foreign=3)
            yield "the feed brings the foreign event", self.drop(after) if self.keeps("foreign") else after

    def pubsub(self, s: State) -> Iterator[tuple[str, State]]:
        version, last = s.next, len(s.log)
        if 0 < version <= last:
            after = s._replace(next=version + 1)
            follows = s.position == version - 1 or (
                version > s.position >= 0 and not self.keeps("predecessor")
            )
            yield f"message {version} arrives", self.advance(after, version) if follows else after
            if s.losses:
                yield f"message {version} is lost", after._replace(losses=s.losses - 1)
        if not self.keeps("heartbeat") or not self.size["beats"] or s.position < 0:
            return
        if not s.beat and last > s.position:
            yield f"a heartbeat is told head {last}", s._replace(beat=last)
        elif s.beat:
            after = s._replace(beat=0)
            for missed in range(s.position + 1, s.beat + 1):
                after = self.advance(after, missed)
            yield f"the heartbeat repairs up to {s.beat}", after
            if s.jumps and s.beat > s.position:
                after = s._replace(beat=0, position=s.beat, jumps=s.jumps - 1)
                yield f"the agent jumps to {s.beat}", self.drop(after) if self.keeps("jump-drops") else after

    def opening(self, s: State) -> Iterator[tuple[str, State]]:
        opening, last = s.opening, len(s.log)
        listed = bool(s.refused and s.fanned >> s.refused & 1)
        if opening is None:
            if s.bucket is not None:
                return
            if s.next or not self.keeps("subscribe-first"):
                known = s.position >= 0 or not self.keeps("subscribe-first")
                yield "the agent opens", s._replace(opening=Opening("mark" if known else "settle"))
            else:
                yield (
                    "the agent opens, and subscribes",
                    s._replace(opening=Opening("settle"), next=last + 1),
                )
        elif opening.at == "settle":
            yield f"the position is {last}", s._replace(position=last, opening=opening._replace(at="mark"))
        elif opening.at == "mark":
            mark = self.mark(s) if self.keeps("mark-first") else -1
            opening = opening._replace(at="lookup", mark=mark)
            if not self.keeps("tail-after-base"):
                opening = opening._replace(head=last, listed=listed)
            yield f"the agent reads the mark: {mark}", s._replace(opening=opening)
        elif opening.at == "lookup":
            if s.shared is not None and s.shared[0] == "value":
                yield "the agent hits L2", s._replace(opening=opening._replace(at="tail", base=s.shared[1]))
            else:
                leased = s.shared is None
                yield (
                    "the agent misses L2",
                    s._replace(
                        opening=opening._replace(at="base", leased=leased), shared=s.shared or ("agent", 0)
                    ),
                )
        elif opening.at == "base":
            yield (
                "the agent reads the store",
                s._replace(opening=opening._replace(at="tail", base=s.committed)),
            )
        elif opening.at == "tail":
            fills = opening.leased and (s.shared == ("agent", 0) or not self.keeps("lease"))
            after = opening._replace(at="install", leased=False)
            if self.keeps("tail-after-base"):
                after = after._replace(head=last, listed=listed)
            if not self.keeps("mark-first"):
                after = after._replace(mark=self.mark(s))
            yield (
                f"the agent fills L2, and reads the tail up to {after.head}",
                s._replace(opening=after, shared=("value", opening.base) if fills else s.shared),
            )
        else:
            yield "the bucket is complete", self.install(s, opening)

    def evicting(self, s: State) -> Iterator[tuple[str, State]]:
        if (s.bucket is not None or s.opening is not None) and s.evictions:
            gone = s._replace(bucket=None, opening=None, evictions=s.evictions - 1)
            yield "the bucket is evicted", gone
            yield "the bucket is evicted, and the channel left", gone._replace(next=0, position=-1, beat=0)

    def other(self, s: State) -> Iterator[tuple[str, State]]:
        if s.fill is None:
            if s.shared is None and s.fills:
                yield (
                    "the other takes a lease",
                    s._replace(fill=("leased", 0), shared=("other", 0), fills=s.fills - 1),
                )
        elif s.fill[0] == "leased":
            yield "the other reads the store", s._replace(fill=("read", s.committed))
        else:
            accepted = s.shared == ("other", 0) or not self.keeps("lease")
            yield (
                "the other fills L2",
                s._replace(fill=None, shared=("value", s.fill[1]) if accepted else s.shared),
            )


def _versions(mask: int) -> list[int]:
    """The versions in a mask, in order."""
    return [version for version in range(mask.bit_length()) if mask >> version & 1]


def _last(mask: int) -> int:
    """The last version in a mask; 0 for none."""
    return max(mask.bit_length() - 1, 0)


def _visible(window: Window) -> tuple[tuple[int, str, int, int], ...]:
    """What a reader sees of a window."""
    return tuple((row.rank, row.id, row.put, max(row.put, row.update)) for row in window.rows)
