"""World "publish": a write is in the log once, and in its writer's order, whatever is lost on the way (G1, G7).

One agent, one partition of the log, some writes one after the other. Calls and answers may be lost; a copy of a call
may arrive late, also after its repetition, and after its process was killed. The agent may be killed at any time and
is started again. Redis may restart without its unsaved data, and may be too full to take a call.

Modelled after log/publisher.py (the publisher: one call in flight), log/outbox.py (the file) and lua/publish.lua.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

NOTHING, UNKNOWN, KEPT, LOGGED = "nothing was written", "may or may not be logged", "kept", "logged"


class Call(NamedTuple):
    """A call of publish.lua. Producers are numbered: 1, 2... are the processes, 11, 12... their outboxes."""

    producer: int
    sequence: int
    writes: tuple[int, ...]


class Kept(NamedTuple):
    """A write in the outbox, and the call that it is part of, once there is one."""

    write: int
    producer: int = 0
    sequence: int = 0


class Redis(NamedTuple):
    log: tuple[int, ...] = ()
    producers: tuple[tuple[int, int, int], ...] = ()
    """For each producer the number of its last call, and how many writes that answered for."""

    def last(self, producer: int) -> tuple[int, int]:
        for known, sequence, writes in self.producers:
            if known == producer:
                return sequence, writes
        return 0, 0


class State(NamedTuple):
    redis: Redis = Redis()
    saved: Redis = Redis()
    """What Redis comes back with after a restart."""
    network: tuple[Call, ...] = ()
    process: int = 1
    up: bool = True
    written: int = 0
    queue: tuple[int, ...] = ()
    sequence: int = 0
    calls: tuple[Call, ...] = ()
    """The publisher's calls whose outcome is not known yet: one at most."""
    repeated: bool = False
    """Whether the last of them was made again, since its answer did not come."""
    file: tuple[Kept, ...] = ()
    file_producer: int = 11
    file_sequence: int = 0
    draining: Call | None = None
    """The outbox's call."""
    answered: bool = False
    """Whether that was answered, and its writes are about to be removed."""
    told: tuple[str, ...] = ()
    """What the writer of each write was told."""
    repeats: int = 0
    kills: int = 0
    restarts: int = 0
    full: int = 0
    """How often Redis may refuse a call for lack of room."""
    lost: bool = False
    """Whether Redis has lost anything."""


class Publish(World):
    name = "publish"
    about = "repeated and late calls, the outbox, kills of the agent, restarts of Redis, a full one"
    sizes: ClassVar = {"writes": 2, "repeats": 1, "kills": 0, "restarts": 0, "full": 0, "outbox": 1}
    small = (
        {"outbox": 0},
        {},
        {"kills": 1, "restarts": 1},
        {"kills": 1, "writes": 3},
        {"full": 1, "outbox": 0},
        {"full": 1},
    )
    larger = (
        {"repeats": 2, "kills": 1},
        {"writes": 2, "repeats": 2, "kills": 1, "restarts": 1},
        {"writes": 3, "repeats": 2, "kills": 2, "restarts": 1},
    )
    rules = (
        Rule("repeated", "a call that comes again is done again", "G1"),
        Rule("overtaken", "a call is done though the producer has gone on to another", "G1"),
        Rule("one-call", "the next call goes out before the one before it was answered", "G1"),
        Rule("outbox-number", "a call of unknown outcome enters the outbox without its number", "G1", 1),
        Rule("behind", "newer writes go to the log while older ones wait in the outbox", "G7", 1),
        Rule("number-first", "the outbox makes a call, and writes its number into the file afterwards", "G1", 3),
        Rule("remove-last", "writes leave the outbox when their call is made, not when it is answered", "G1", 2),
        Rule("same-call", "what joins the outbox later goes along when a call is repeated", "G1", 1),
        Rule("refusal", "a refusal for lack of room is believed, though an earlier copy may arrive later", "G1", 4),
        Rule("producer-kept", "the log forgets a producer while a call of it may still be repeated", "G1"),
    )  # fmt: skip

    def start(self) -> State:
        return State(**{name: n for name, n in self.size.items() if name in State._fields})

    def broken(self, s: State) -> Iterator[str]:
        log = s.redis.log
        for write in set(log):
            if log.count(write) > 1:
                yield f"G1: write {write} is in the log twice"
            if s.told[write - 1] == NOTHING:
                yield f"G1: write {write} is in the log, and its writer was told that nothing was written"
        sure = [write for write in log if s.told[write - 1] in (KEPT, LOGGED)]
        if sure != sorted(sure) and len(sure) == len(set(sure)):
            yield f"G7: the log has the writes in the order {sure}"

    def broken_at_rest(self, s: State) -> Iterator[str]:
        for write, told in enumerate(s.told, 1):
            if told in (KEPT, LOGGED) and write not in s.redis.log and not (s.lost and told == LOGGED):
                yield f"G1: write {write} was acknowledged as {told}, and is not in the log"

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self.server(s)
        if not s.up:
            yield "the agent starts again", self.started(s)
            return
        if s.written < self.size["writes"]:
            n = s.written + 1
            yield f"write {n}", s._replace(written=n, queue=(*s.queue, n), told=(*s.told, ""))
        yield from self.publisher(s)
        yield from self.outbox(s)
        if s.kills:
            yield "the agent is killed", s._replace(
                up=False, kills=s.kills - 1, queue=(), calls=(), sequence=0, draining=None, answered=False
            )  # fmt: skip

    def started(self, s: State) -> State:
        # A bus that finds no file makes its own, under another producer.
        process = s.process + 1
        return s._replace(
            up=True,
            process=process,
            file_producer=s.file_producer if s.file else 10 + process,
            file_sequence=s.file_sequence if s.file else 0,
        )

    # The log

    def server(self, s: State) -> Iterator[tuple[str, State]]:
        for i, call in enumerate(s.network):
            if call in s.network[:i]:
                continue
            after = s._replace(network=s.network[:i] + s.network[i + 1 :])
            yield f"{shown(call)} is lost", after
            redis, reply = self.executed(s.redis, call)
            after = after._replace(redis=redis)
            answered = self.answered(after, call, reply)
            what = "refused" if reply is None else "done" if redis is not s.redis else "answered as before"
            if answered is not None:
                yield f"{shown(call)} is {what}", answered
            if answered is not after and redis is not s.redis:
                yield f"{shown(call)} is {what}; the answer is lost", after
            if s.full and redis is not s.redis:
                refused = after._replace(redis=s.redis, full=s.full - 1)
                yield f"{shown(call)} is refused: Redis is full", self.refused(refused, call)
        if s.restarts and s.saved != s.redis:
            yield "Redis saves", s._replace(saved=s.redis)
            yield (
                "Redis restarts with what it saved, and all connections break",
                s._replace(redis=s.saved, restarts=s.restarts - 1, lost=True, network=()),
            )
        if not self.keeps("producer-kept"):
            for producer in s.redis.producers:
                kept = tuple(other for other in s.redis.producers if other != producer)
                yield (
                    f"producer {producer[0]} is forgotten",
                    s._replace(redis=s.redis._replace(producers=kept)),
                )

    def executed(self, redis: Redis, call: Call) -> tuple[Redis, int | None]:
        """publish.lua: how many writes it answers for; None if it refuses."""
        sequence, writes = redis.last(call.producer)
        if sequence == call.sequence and self.keeps("repeated"):
            return redis, writes
        if sequence > call.sequence and self.keeps("overtaken"):
            return redis, None
        record = (call.producer, call.sequence, len(call.writes))
        others = tuple(other for other in redis.producers if other[0] != call.producer)
        return Redis(redis.log + call.writes, tuple(sorted((*others, record)))), len(call.writes)

    def answered(self, s: State, call: Call, reply: int | None) -> State | None:
        """The agent hears what became of a call."""
        if not s.up:
            return s
        if s.draining is not None and s.draining[:2] == call[:2] and not s.answered:
            if reply is not None:
                return s._replace(answered=True)
            # The number was used for another call: take a new one, of a new producer.
            file = tuple(Kept(row.write) if row.write in call.writes else row for row in s.file)
            return s._replace(file=file, draining=None, file_producer=s.file_producer + 100, file_sequence=0)
        for i, mine in enumerate(s.calls):
            if mine[:2] == call[:2]:
                told = NOTHING if reply is None else LOGGED
                return self.tell(s._replace(calls=s.calls[:i] + s.calls[i + 1 :]), mine.writes, told)
        return s

    def refused(self, s: State, call: Call) -> State:
        """The agent gets the answer that Redis has no space for a call. The outbox repeats its call."""
        for mine in s.calls if s.up else ():
            if mine[:2] != call[:2]:
                continue
            s = s._replace(calls=tuple(other for other in s.calls if other != mine))
            if not s.repeated or not self.keeps("refusal"):
                return self.tell(s, mine.writes, NOTHING)
            return self.unknown(s, mine)
        return s

    def unknown(self, s: State, call: Call) -> State:
        """The publisher gives up a call that may be in the log."""
        if not self.size["outbox"]:
            return self.tell(s, call.writes, UNKNOWN)
        number = call[:2] if self.keeps("outbox-number") else (0, 0)
        kept = s._replace(file=s.file + tuple(Kept(write, *number) for write in call.writes))
        return self.tell(kept, call.writes, KEPT)

    def tell(self, s: State, writes: tuple[int, ...], what: str) -> State:
        told = list(s.told)
        for write in writes:
            if told[write - 1] == "" or what == LOGGED:
                told[write - 1] = what
        return s._replace(told=tuple(told))

    # The agent

    def publisher(self, s: State) -> Iterator[tuple[str, State]]:
        if s.queue and (not s.calls or (not self.keeps("one-call") and len(s.calls) < 2)):
            if s.file and self.keeps("behind"):
                kept = s._replace(queue=(), file=s.file + tuple(map(Kept, s.queue)))
                yield f"writes {s.queue} wait in the outbox, too", self.tell(kept, s.queue, KEPT)
            else:
                call = Call(s.process, s.sequence + 1, s.queue)
                yield (
                    f"the publisher makes {shown(call)}",
                    s._replace(
                        queue=(),
                        sequence=call.sequence,
                        calls=(*s.calls, call),
                        repeated=False,
                        network=self.sent(s, call),
                    ),
                )
        for i, call in enumerate(s.calls):
            if s.repeats:
                yield (
                    f"the publisher repeats {shown(call)}",
                    s._replace(repeats=s.repeats - 1, repeated=True, network=self.sent(s, call)),
                )
            given_up = self.unknown(s._replace(calls=s.calls[:i] + s.calls[i + 1 :]), call)
            if self.size["outbox"]:
                yield f"the log is away: {shown(call)} enters the outbox", given_up
            elif not s.repeats:
                yield f"the publisher gives up {shown(call)}", given_up

    @staticmethod
    def sent(s: State, call: Call) -> tuple[Call, ...]:
        return tuple(sorted((*s.network, call)))

    def outbox(self, s: State) -> Iterator[tuple[str, State]]:
        draining = s.draining
        if draining is None:
            if s.file:
                after, call = self.next_call(s)
                yield (
                    f"the outbox makes {shown(call)}",
                    after._replace(draining=call, network=self.sent(s, call)),
                )
        elif s.answered:
            writes = draining.writes
            left = tuple(row for row in s.file if row.write not in writes)
            done = s._replace(file=left, draining=None, answered=False)
            yield f"writes {writes} leave the outbox", self.tell(done, writes, LOGGED)
        else:
            if not self.keeps("number-first") and any(not row.producer for row in s.file):
                yield "the number of the call is written", self.numbered(s, draining)
            # A repetition that was lost costs nothing: the outbox goes on until it is answered.
            if draining not in s.network:
                call = draining
                if not self.keeps("same-call"):
                    more = tuple(row.write for row in s.file if not row.producer)
                    call = call._replace(writes=call.writes + more)
                    s = self.numbered(s, call)
                yield (
                    f"the outbox repeats {shown(call)}",
                    s._replace(draining=call, network=self.sent(s, call)),
                )

    def next_call(self, s: State) -> tuple[State, Call]:
        """The call to make next, and the file with its number in it (OutboxFile.next_call)."""
        first = s.file[0]
        if first.producer:
            writes = tuple(row.write for row in s.file if row[1:] == first[1:])
            return s, Call(first.producer, first.sequence, writes)
        call = Call(
            s.file_producer, s.file_sequence + 1, tuple(row.write for row in s.file if not row.producer)
        )
        if not self.keeps("remove-last"):
            return s._replace(file=(), file_sequence=call.sequence), call
        return (self.numbered(s, call) if self.keeps("number-first") else s), call

    @staticmethod
    def numbered(s: State, call: Call) -> State:
        file = tuple(
            Kept(row.write, call.producer, call.sequence) if row.write in call.writes else row
            for row in s.file
        )
        return s._replace(file=file, file_sequence=call.sequence)


def shown(call: Call) -> str:
    who = f"process {call.producer}" if call.producer < 10 else f"outbox {call.producer - 10}"
    return f"call {call.sequence} of {who} with {', '.join(map(str, call.writes))}"
