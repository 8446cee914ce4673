"""World "join": how a bus gets to know its position in the feed (G5).

One agent and one feed partition with two scopes: A, which the agent reads, and B, which only others read. Writes are
committed and fanned out at once, first those to A; message n of the feed is about write n. Pub/sub may lose, delay,
reorder and repeat messages, connections break, the stream may be trimmed or deleted.

Modelled one to one after feed/ (subscription.py, positions.py, heartbeat.py): SUBSCRIBE and its confirmation, `_settle`
(as many at once as there were confirmations), messages that come early, the heartbeat with its question, its answer and
its replay, leaving and joining again; and the local cache: a read takes its bucket first and fills it later.

Time. Any one of the invalidations is marked when it is sent (`MARKED`), and at some time after it the bound has passed
(`PASSED`): from then on no heartbeat counts that began before it was sent, and no result that it invalidated may be
served.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

UNMARKED, MARKED, PASSED = 0, 1, 2
NONE = -1
"""The head of an empty stream: before every message."""
NEVER, BEFORE, AFTER = 0, 1, 2
"""When a heartbeat began: before the invalidation that is singled out, or after it."""


class Part(NamedTuple):
    """What the agent knows of the partition (feed/positions.py)."""

    confirmed: bool = False
    position: int | None = None
    early: tuple[int, ...] = ()
    ready: bool = False
    """Whether it had a position already; during a replay it has none."""


class Beat(NamedTuple):
    """A heartbeat under way.

    at      asked: on its way to Redis; told: `head` is on its way back; waits: for pub/sub to bring the head;
            replays: the stream is being asked for what lies after `position`; replayed: its answer comes back
    known   whether the partition was asked about, and the position it had then
    """

    began: int
    at: str
    known: bool
    known_position: int | None
    head: int = 0
    goal: int = 0
    position: int = 0
    low: int = 0


class Read(NamedTuple):
    """A read of A that missed.

    live   whether its bucket is still the one that others see
    value  what the store said; None before
    """

    live: bool
    value: int | None = None


class State(NamedTuple):
    sent: int = 0
    """How many writes are committed, and their invalidations sent."""
    low: int = 0
    """The first message that the stream still has; message 0 is an old one, about something else."""
    first: int = 0
    """The message that names none before it: the stream was empty."""
    called: bool = False
    """Whether something was noticed that the heartbeat has to look into at once."""
    subscribed: bool = False
    commands: tuple[str, ...] = ()
    wire: tuple[int, ...] = ()
    """What pub/sub has on its way: messages by number, 0 for the confirmation of a SUBSCRIBE."""
    part: Part | None = None
    settles: tuple[int | None, ...] = ()
    """Questions for the head after a confirmation; the answer, once there is one."""
    beat: Beat | None = None
    fresh: int = NEVER
    """When the last good heartbeat began; NEVER if that is too long ago."""
    bucket: int | None = None
    """None: no bucket; -1: an empty one; else the version that is cached."""
    read: Read | None = None
    moment: int = UNMARKED
    overdue: int = 0
    """What was sent by that moment."""
    joins: int = 0
    reads: int = 0
    losses: int = 0
    oddities: int = 0
    """Messages that overtake another, or come twice."""
    cuts: int = 0
    trims: int = 0
    deletions: int = 0


class Join(World):
    name = "join"
    about = "positions: subscribing, settling, heartbeats, replay, lost messages, a trimmed or deleted feed"
    sizes: ClassVar = {
        "writes": 1, "others": 0, "joins": 1, "reads": 1, "losses": 0, "oddities": 0, "cuts": 0, "trims": 0,
        "deletions": 0,
    }  # fmt: skip
    small = (
        {"oddities": 1},
        {"joins": 0, "losses": 1, "deletions": 1},
        {"joins": 0, "others": 1, "losses": 1, "trims": 1},
        {"joins": 2},
        {"joins": 0, "cuts": 1},
    )
    larger = (
        {"losses": 1, "cuts": 1},
        {"others": 1, "losses": 1, "trims": 1, "deletions": 1},
        {"writes": 2, "others": 1, "joins": 2, "reads": 2, "losses": 1, "oddities": 1, "cuts": 1, "trims": 1},
    )
    rules = (
        Rule("predecessor", "a message that does not follow the position moves it on all the same", "G5", 2),
        Rule("heartbeat", "heads are not compared: what pub/sub lost is never noticed", "G5"),
        Rule("verified", "local copies are served however long ago the last good heartbeat was", "G5"),
        Rule("beginning", "a heartbeat counts from its end, not from its beginning", "G5"),
        Rule("replay-chain", "a replay takes what the stream has left, though older messages were trimmed", "G5", 2),
        Rule("replay-reaches", "a replay that does not reach its head, the stream being gone since, counts", "G5", 1),
        Rule("reset", "a head before the position is taken for nothing new", "G5", 1),
        Rule("bucket", "a late fill lands in whatever bucket is there then", "G5"),
        Rule("position-first", "a bucket goes live before the position is known", "G5"),
        Rule("settle-once", "a late answer about the head overwrites a position that is known already", "G5"),
        Rule("confirmed", "the head is read before the subscription is confirmed", "speed"),
        Rule("early", "messages that come before the position is known are not gone through again", "speed"),
    )  # fmt: skip

    limits = (
        Rule(
            "old-feed",
            "the feed's stream is deleted by hand, and was still empty when the agent joined: it looks the same",
            "G5",
            1,
        ),
    )

    def start(self) -> State:
        old = self.keeps("old-feed")
        joined = Part(confirmed=True, position=0, ready=True) if not self.size["joins"] else None
        return State(
            part=joined,
            subscribed=joined is not None,
            low=0 if old else 1,
            first=0 if old else 1,
            **{name: n for name, n in self.size.items() if name in State._fields},
        )

    def touches(self, message: int) -> bool:
        """Whether a write is one to A."""
        return message <= self.size["writes"]

    def version(self, writes: int) -> int:
        """The version of A after so many writes."""
        return min(writes, self.size["writes"])

    # What is checked

    def broken(self, s: State) -> Iterator[str]:
        served = s.fresh if self.keeps("verified") else AFTER
        if s.moment == PASSED and served == AFTER and s.bucket not in (None, -1) and s.bucket < s.overdue:
            yield f"G5: version {s.bucket} is served; the invalidation of {s.overdue} is older than the bound"
        undisturbed = all(
            getattr(s, name) == self.size[name]
            for name in ("losses", "oddities", "cuts", "trims", "deletions")
        )
        at_rest = not (s.wire or s.commands or s.settles or s.beat or s.called)
        if undisturbed and at_rest and s.part and s.part.position is not None and s.part.position != s.sent:
            yield f"speed: nothing was lost, but {s.part.position} is the position once {s.sent} was sent"

    # What can happen

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self.server(s)
        yield from self.pubsub(s)
        yield from self.joining(s)
        yield from self.heartbeat(s)
        yield from self.reading(s)
        if s.moment == MARKED:
            fresh = NEVER if s.fresh == BEFORE else s.fresh
            yield "(max_staleness has passed)", s._replace(moment=PASSED, fresh=fresh)

    def server(self, s: State) -> Iterator[tuple[str, State]]:
        if s.sent < self.size["writes"] + self.size["others"]:
            n = s.sent + 1
            after = s._replace(sent=n, wire=(*s.wire, n) if s.subscribed else s.wire)
            label = f"write {n}, to {'A' if self.touches(n) else 'B'}, is committed and fanned out"
            if s.moment == UNMARKED and self.touches(n):
                yield f"{label}; from here on the bound is counted", after._replace(moment=MARKED, overdue=n)
            if s.moment != UNMARKED or n != self.size["writes"]:
                yield label, after
        if s.trims and s.low < s.sent:
            yield "trim the feed to its last message", s._replace(low=s.sent, trims=s.trims - 1)
        if s.deletions and s.low <= s.sent:
            yield (
                "the feed's stream is deleted",
                s._replace(low=s.sent + 1, first=s.sent + 1, deletions=s.deletions - 1),
            )
        if s.commands:
            command, *rest = s.commands
            s = s._replace(commands=tuple(rest))
            if command == "SUBSCRIBE":
                yield "SUBSCRIBE arrives", s._replace(subscribed=True, wire=(*s.wire, 0))
            else:
                yield "UNSUBSCRIBE arrives", s._replace(subscribed=False)

    def head(self, s: State) -> int:
        return s.sent if s.low <= s.sent else NONE

    def previous(self, s: State, message: int) -> int:
        """The ID that a message names as the one before it."""
        return NONE if message == s.first else message - 1

    def pubsub(self, s: State) -> Iterator[tuple[str, State]]:
        for i, item in enumerate(s.wire):
            rest = s._replace(wire=s.wire[:i] + s.wire[i + 1 :])
            if item == 0:
                # Confirmations keep their order among what was sent; a message may be delayed for longer.
                if i == 0:
                    yield "the confirmation arrives", self.confirmed(rest)
                continue
            if i == 0:
                yield f"message {item} arrives", self.receive(rest, item)
            if s.oddities:
                odd = s.oddities - 1
                if i > 0:
                    yield (
                        f"message {item} arrives before its turn",
                        self.receive(rest, item)._replace(oddities=odd),
                    )
                yield f"message {item} arrives, and will again", self.receive(s, item)._replace(oddities=odd)
            if s.losses:
                yield f"message {item} is lost", rest._replace(losses=s.losses - 1)
        if s.cuts and s.part is not None:
            yield (
                "the listening connection breaks, and is replaced",
                s._replace(
                    wire=(), commands=("SUBSCRIBE",), subscribed=False, cuts=s.cuts - 1,
                    part=s.part._replace(confirmed=False),
                ),
            )  # fmt: skip

    def confirmed(self, s: State) -> State:
        if s.part is None or s.part.confirmed:
            return s
        settles = s.settles
        if s.part.position is None and self.keeps("confirmed"):
            settles = (*settles, None)
        called = s.called or s.part.position is not None
        return s._replace(part=s.part._replace(confirmed=True), settles=settles, called=called)

    def receive(self, s: State, message: int) -> State:
        part = s.part
        if part is None:
            return s
        if part.position is None:
            s = self.apply(s, message)
            if self.keeps("early"):
                s = s._replace(part=part._replace(early=(*part.early, message)))
            return s
        if message <= part.position:
            return s
        s = self.apply(s, message)
        if self.previous(s, message) == part.position or not self.keeps("predecessor"):
            return s._replace(part=part._replace(position=message))
        return s._replace(called=True)

    def apply(self, s: State, message: int) -> State:
        return self.drop(s) if self.touches(message) else s

    def drop(self, s: State) -> State:
        return s._replace(bucket=None, read=s.read and s.read._replace(live=False))

    def place(self, s: State, position: int) -> State:
        assert s.part is not None
        early = s.part.early
        s = s._replace(part=s.part._replace(position=position, early=(), ready=True))
        for message in early:
            s = self.receive(s, message)
        return s

    def joining(self, s: State) -> Iterator[tuple[str, State]]:
        if s.part is None and s.joins:
            settles = s.settles if self.keeps("confirmed") else (*s.settles, None)
            yield (
                "the agent joins the partition",
                s._replace(
                    part=Part(), joins=s.joins - 1, commands=(*s.commands, "SUBSCRIBE"), settles=settles
                ),
            )
        for i, head in enumerate(s.settles):
            if head is None:
                answered = (*s.settles[:i], self.head(s), *s.settles[i + 1 :])
                yield f"Redis answers the joiner: the head is {self.head(s)}", s._replace(settles=answered)
                continue
            done = s._replace(settles=s.settles[:i] + s.settles[i + 1 :])
            assert s.part is not None
            if s.part.ready and self.keeps("settle-once"):
                yield f"the joiner hears of head {head}, too late", done
            else:
                yield f"the joiner takes {head} as its position", self.place(done, head)

    def heartbeat(self, s: State) -> Iterator[tuple[str, State]]:
        beat, part = s.beat, s.part
        if beat is None:
            known = part is not None and (part.confirmed or part.position is not None)
            began = BEFORE if s.moment == UNMARKED else AFTER
            position = part.position if part is not None else None
            yield "a heartbeat begins", s._replace(beat=Beat(began, "asked", known, position), called=False)
        elif beat.at == "asked":
            yield (
                f"Redis answers the heartbeat: the head is {self.head(s)}",
                s._replace(beat=beat._replace(at="told", head=self.head(s))),
            )
        elif beat.at == "told":
            label = "the heartbeat's answer is there"
            if beat.known:
                assert part is not None
                if part.position is None:
                    s = self.place(s, beat.head)
                    label += ": it is the position"
                elif (
                    beat.known_position is not None
                    and beat.head < beat.known_position
                    and self.keeps("reset")
                ):
                    s = self.place(self.drop(s)._replace(part=part._replace(position=None)), beat.head)
                    label += ": it lies before the position; drop all"
            yield label, s._replace(beat=beat._replace(at="waits", known_position=None))
        elif beat.at == "waits":
            if beat.known:
                assert part is not None and part.position is not None
                if part.position < beat.head and self.keeps("heartbeat"):
                    yield (
                        f"the heartbeat replays from {part.position}",
                        s._replace(
                            beat=beat._replace(at="replays", position=part.position, goal=beat.head),
                            part=part._replace(position=None),
                        ),
                    )
                    return
            yield from self.beaten(s)
        elif beat.at == "replays":
            yield (
                "Redis answers the replay",
                s._replace(beat=beat._replace(at="replayed", head=s.sent, low=s.low)),
            )
        else:
            position = beat.position
            for message in range(max(position + 1, beat.low), beat.head + 1):
                if self.previous(s, message) != position and self.keeps("replay-chain"):
                    s = self.drop(s)
                s = self.apply(s, message)
                position = message
            s = self.place(s, position)
            if s.part.position < beat.goal and self.keeps("replay-reaches"):
                s = self.place(self.drop(s), beat.goal)
            for label, after in self.beaten(s):
                yield "the replay is applied; " + label, after

    def beaten(self, s: State) -> Iterator[tuple[str, State]]:
        """The end of a good heartbeat."""
        assert s.beat is not None
        began = s.beat.began
        if not self.keeps("beginning") and s.moment != UNMARKED:
            began = AFTER
        if began == BEFORE and s.moment == PASSED:
            began = NEVER
        s = s._replace(beat=None, fresh=max(s.fresh, began))
        yield "the heartbeat was good", s
        if s.part is not None and s.part.confirmed and s.bucket is None and s.joins:
            # Nothing was held there for half a minute: any confirmation is long there, or the link was replaced. An
            # answer to a joiner of the partition that is left finds nobody.
            yield (
                "the heartbeat was good; the partition is left",
                s._replace(part=None, settles=(), commands=(*s.commands, "UNSUBSCRIBE")),
            )

    def reading(self, s: State) -> Iterator[tuple[str, State]]:
        read = s.read
        if read is None:
            joined = s.part is not None and (s.part.position is not None or not self.keeps("position-first"))
            if s.reads and joined and s.bucket in (None, -1):
                yield (
                    "a read of A misses, and takes a bucket",
                    s._replace(read=Read(True), bucket=-1, reads=s.reads - 1),
                )
        elif read.value is None:
            value = self.version(s.sent)
            yield f"the store answers the read: version {value}", s._replace(read=read._replace(value=value))
        elif read.live or not self.keeps("bucket"):
            yield (
                f"the read puts version {read.value} into its bucket",
                s._replace(read=None, bucket=read.value),
            )
        else:
            yield "the read's bucket is gone", s._replace(read=None)
