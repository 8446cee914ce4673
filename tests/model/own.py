"""World "own": a bus reads its own writes, and does not report them as committed too early (G6, G1).

Event 1 is a write of our agent to memory X; event 2, if there is one, is another agent's write to another memory, in
the same partitions of log and feed. Workers take one event each. Another agent may fill L2 with what it read. Redis may
be flushed, or restart, with all its data or with less: then the log may have lost our write. If our write is invalid,
no worker can apply it: it becomes a dead letter, its reason is noted, and it is confirmed like any other.

Our agent publishes, gets the answer, marks X, reads X through L1 and L2, and learns from the feed, or from the consumer
group, that its write is applied. Modelled after log/pending.py, `Writes._logged`, `ReadPath.read`, apply.py and
lua/applied.lua.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple, TypeVar

from .kernel import Rule, World

T = TypeVar("T")

EMPTY = -1
UNSENT, SENT, TOLD, LOST = "unsent", "sent", "told", "lost"


class Redis(NamedTuple):
    logged: tuple[int, ...] = ()
    delivered: int = 0
    pending: tuple[int, ...] = ()
    shared: tuple[int, ...] = (EMPTY,)
    """What L2 has of X, for each epoch."""
    leases: tuple[bool, ...] = (False,)
    feed: tuple[tuple[int, bool, int], ...] = ()
    """Messages: the event that is named or 0, whether X is, and the epoch whose buckets were dropped."""
    epoch: int | None = 0
    """None: the key is gone."""
    noted: bool = False
    """Whether Redis knows why our write could not be applied."""


class Worker(NamedTuple):
    event: int = 0
    at: str = ""
    epoch: int = 0


class Read(NamedTuple):
    """A read of X by our agent that missed L1.

    own   whether it began after the write was told
    live  whether its bucket is the one that others see
    """

    own: bool
    live: bool
    value: int = EMPTY


class State(NamedTuple):
    redis: Redis = Redis()
    saved: Redis = Redis()
    epochs: int = 1
    """How many there were ever."""
    store: int = 0
    workers: tuple[Worker, ...] = ()
    write: str = UNSENT
    marked: bool = False
    committed: bool = False
    """Whether our writer was told that the store has it."""
    in_doubt: bool = False
    asked: int = 0
    """The epoch that our agent knew when it sent its write."""
    epoch: int = 0
    """The epoch that our agent knows."""
    connected: bool = True
    """False: Redis restarted since our agent last spoke to it."""
    heard: int = 0
    bucket: int | None = None
    read: Read | None = None
    filler: tuple[int, int] | None = None
    """The other agent's fill of L2: its epoch, and what it found in the store (EMPTY: not asked yet)."""
    reads: int = 0
    others: int = 0
    fills: int = 0
    crashes: int = 0
    flushes: int = 0
    restarts: int = 0
    wrong: str = ""


class Own(World):
    name = "own"
    about = "marks, the two signs that lift them, receipts, and what a flush or a restart does to them"
    sizes: ClassVar = {
        "workers": 1, "reads": 1, "others": 0, "fills": 0, "crashes": 0, "flushes": 0, "restarts": 0,
        "forgetful": 0, "unfit": 0,
    }  # fmt: skip
    small = (
        {"fills": 1, "crashes": 1},
        {"others": 1, "workers": 2},
        {"others": 1, "flushes": 1},
        {"others": 1, "restarts": 1, "forgetful": 1, "reads": 0},
        {"fills": 1, "restarts": 1},
        {"unfit": 1, "crashes": 1, "restarts": 1, "forgetful": 1, "reads": 0},
    )
    larger = (
        {"others": 1, "workers": 2, "fills": 1, "crashes": 1, "reads": 2},
        {"fills": 1, "restarts": 1, "forgetful": 1},
        {"others": 1, "workers": 2, "fills": 1, "crashes": 1, "restarts": 1, "forgetful": 1},
    )
    rules = (
        Rule("mark", "a read does not wait for the writes that touch it", "G6"),
        Rule("drop", "a write leaves what it touches in its writer's L1", "G6"),
        Rule("no-bucket", "a read that waited in vain is cached", "G6"),
        Rule("one-by-one", "a message answers for all events up to the one that it names", "G6", 1),
        Rule("named-last", "an event is named before the last of its scopes is dropped", "G6"),
        Rule("second-sign", "only the feed lifts a mark, though it may have named the event before", "G6"),
        Rule("pending", "what was delivered counts as applied", "G6"),
        Rule("confirm-last", "an event is confirmed before it is fanned out", "G6"),
        Rule("looked-for", "after Redis lost data nobody looks whether the log still has the write", "G1", 3),
        Rule("in-doubt", "the consumer group is believed before that look", "G1", 3),
        Rule("same-epoch", "an answer of the consumer group counts whatever the epoch is by then", "G1", 2),
        Rule("named-epoch", "a message lifts marks though it dropped buckets of another epoch only", "G6", 4),
        Rule("late-answer", "an answer of the log is believed that was asked for in another epoch", "G1", 3),
        Rule("reasons", "what is confirmed counts as committed, without a look at the reasons", "G1", 5),
        Rule("noted-again", "a worker that meets a new epoch buries nothing again", "G1", 5),
        Rule("noted-first", "an event that can't be applied is confirmed before its reason is noted", "G1", 5),
    )  # fmt: skip

    def start(self) -> State:
        budgets = {name: n for name, n in self.size.items() if name in State._fields and name != "workers"}
        return State(workers=(Worker(),) * self.size["workers"], **budgets)

    def broken(self, s: State) -> Iterator[str]:
        if s.wrong:
            yield s.wrong
        if s.write == TOLD and s.bucket is not None and EMPTY < s.bucket < 1:
            yield "G6: L1 has what was there before the bus's own write"
        if s.committed and not s.store:
            yield "G1: the writer was told that the store has the write, and it has not"

    def broken_at_rest(self, s: State) -> Iterator[str]:
        if s.marked and 1 not in s.redis.pending:
            yield "G6: nothing lifts the mark: every read of X will be marked stale"

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self.writing(s)
        for i, worker in enumerate(s.workers):
            if worker not in s.workers[:i]:
                for label, after, state in self.worker(s, worker):
                    workers = tuple(sorted((*s.workers[:i], after, *s.workers[i + 1 :])))
                    yield label, state._replace(workers=workers)
        yield from self.failing(s)
        yield from self.filling(s)
        yield from self.listening(s)
        yield from self.reading(s)

    # The write, and what lifts its mark

    def writing(self, s: State) -> Iterator[tuple[str, State]]:
        redis = s.redis
        if s.write == UNSENT and s.connected:
            yield (
                "our write is logged",
                s._replace(write=SENT, asked=s.epoch, redis=redis._replace(logged=(*redis.logged, 1))),
            )
        if s.write == SENT:
            # At any time later: the answer may have been on its way while Redis was away.
            late = s.asked != s.epoch and self.keeps("late-answer")
            told = s._replace(write=TOLD, marked=self.keeps("mark"), in_doubt=s.in_doubt or late)
            yield "the writer is told", self.drop(told) if self.keeps("drop") else told
            if (not s.connected or late) and 1 not in redis.logged:
                yield "the call breaks with its connection", s._replace(write=LOST)  # see "publish"
        if s.others and s.write != UNSENT:
            yield (
                "somebody else's write is logged",
                s._replace(others=s.others - 1, redis=redis._replace(logged=(*redis.logged, 2))),
            )
        asking = s.marked and s.connected and self.keeps("second-sign")
        if asking and (not s.in_doubt or not self.keeps("in-doubt")):
            passed = redis.delivered >= 1 and (1 not in redis.pending or not self.keeps("pending"))
            known = redis.epoch == s.epoch or not self.keeps("same-epoch")
            if passed and known:
                rejected = redis.noted and self.keeps("reasons")
                yield "the consumer group says that our write is applied", self.lift(s, rejected)

    def lift(self, s: State, rejected: bool) -> State:
        return s._replace(marked=False, committed=not rejected)

    def listening(self, s: State) -> Iterator[tuple[str, State]]:
        redis = s.redis
        if not s.connected or s.epoch != redis.epoch:
            if redis.epoch is None:
                if s.epoch == s.epochs - 1:
                    yield (
                        "our agent finds the epoch gone, and begins another",
                        self.meet(s._replace(redis=redis._replace(epoch=s.epochs), epochs=s.epochs + 1)),
                    )
            else:
                yield "our agent meets the new epoch, and drops L1", self.meet(s)
        elif s.in_doubt:
            lost = s.write == TOLD and s.marked and 1 not in redis.logged
            if lost and self.keeps("looked-for"):
                yield (
                    "our agent finds its write gone from the log",
                    s._replace(in_doubt=False, marked=False, write=LOST),
                )
            else:
                yield "our agent has looked at the log", s._replace(in_doubt=False)
        if s.connected and s.heard < len(redis.feed):
            named, touches, epoch = redis.feed[s.heard]
            after = s._replace(heard=s.heard + 1)
            if touches:
                after = self.drop(after)
            lifts = named == 1 or (named > 1 and not self.keeps("one-by-one"))
            if lifts and s.marked and (epoch == s.epoch or not self.keeps("named-epoch")):
                after = self.lift(after, bool(self.size["unfit"]))  # the message says so
            yield f"our agent hears a message that names {named or 'nothing'}", after

    def meet(self, s: State) -> State:
        assert s.redis.epoch is not None
        return self.drop(s)._replace(
            epoch=s.redis.epoch, connected=True, in_doubt=s.write in (TOLD, SENT), heard=len(s.redis.feed)
        )

    @staticmethod
    def drop(s: State) -> State:
        return s._replace(bucket=None, read=s.read and s.read._replace(live=False))

    # Workers

    def worker(self, s: State, w: Worker) -> Iterator[tuple[str, Worker, State]]:
        redis = s.redis
        if not w.event:
            new = [event for event in redis.logged if event > redis.delivered]
            if new:
                event = min(new)
                pending = tuple(sorted({*redis.pending, event}))
                yield (
                    f"a worker reads event {event}",
                    w._replace(event=event, at="read"),
                    s._replace(redis=redis._replace(delivered=event, pending=pending)),
                )
            for event in redis.pending:
                if all(other.event != event for other in s.workers):
                    yield f"a worker claims event {event}", w._replace(event=event, at="read"), s
            return
        event = w.event
        confirmed = s._replace(
            redis=redis._replace(pending=tuple(other for other in redis.pending if other != event))
        )
        confirmed_last = self.keeps("confirm-last")
        if s.crashes:
            yield (
                f"the worker with event {event} is killed",
                Worker(epoch=w.epoch),
                s._replace(crashes=s.crashes - 1),
            )
        if w.at == "read" and event == 1 and self.size["unfit"]:
            noted = redis._replace(noted=self.keeps("noted-first"))
            yield "event 1 is buried", w._replace(at="committed"), s._replace(redis=noted)
        elif w.at == "read":
            store = 1 if event == 1 else s.store
            yield f"event {event} is committed", w._replace(at="committed"), s._replace(store=store)
        elif w.at == "committed":
            if not confirmed_last:
                yield f"event {event} is confirmed", w._replace(at="confirmed"), confirmed
            else:
                yield from self.fan_out(s, w)
        elif w.at == "confirmed":
            yield from self.fan_out(s, w)
        elif w.at == "begun":
            # The message of X's feed partition, in a call of its own; then the epoch is compared.
            name = event if self.keeps("named-last") else 0
            yield from self.dropped(s, w, name)
        elif w.at == "sent":
            if redis.epoch is not None and redis.epoch != w.epoch:
                again = s
                if (
                    event == 1
                    and self.size["unfit"]
                    and self.keeps("noted-first")
                    and self.keeps("noted-again")
                ):
                    again = s._replace(redis=redis._replace(noted=True))
                yield (
                    "the worker meets the new epoch, and buries and fans out again",
                    Worker(event, "committed", redis.epoch),
                    again,
                )
            elif confirmed_last and event == 1 and self.size["unfit"] and not self.keeps("noted-first"):
                yield "event 1 is confirmed, its reason not noted", w._replace(at="unnoted"), confirmed
            elif confirmed_last:
                yield f"event {event} is confirmed", Worker(epoch=w.epoch), confirmed
            else:
                yield f"event {event} is done", Worker(epoch=w.epoch), s

        elif w.at == "unnoted":
            yield (
                "the reason of event 1 is noted",
                Worker(epoch=w.epoch),
                s._replace(redis=redis._replace(noted=True)),
            )

    def fan_out(self, s: State, w: Worker) -> Iterator[tuple[str, Worker, State]]:
        if w.event == 1 and not self.keeps("named-last"):
            feed = (*s.redis.feed, (1, False, w.epoch))
            yield "event 1 is named", w._replace(at="begun"), s._replace(redis=s.redis._replace(feed=feed))
        else:
            yield from self.dropped(s, w, w.event)

    def dropped(self, s: State, w: Worker, name: int) -> Iterator[tuple[str, Worker, State]]:
        redis = s.redis
        mine = w.event == 1
        feed = (*redis.feed, (name, mine, w.epoch))
        redis = redis._replace(feed=feed)
        if mine:
            redis = redis._replace(
                shared=_set(redis.shared, w.epoch, EMPTY, EMPTY),
                leases=_set(redis.leases, w.epoch, False, False),
            )
        yield (
            f"event {w.event} is fanned out, in epoch {w.epoch}",
            w._replace(at="sent"),
            s._replace(redis=redis),
        )

    # Redis

    def failing(self, s: State) -> Iterator[tuple[str, State]]:
        redis = s.redis
        if s.restarts and s.write != UNSENT:
            if s.saved != redis and self.size["forgetful"]:
                yield "Redis saves", s._replace(saved=redis)
            epoch = s.epochs
            back = (s.saved if self.size["forgetful"] else redis)._replace(epoch=epoch)
            yield (
                "Redis restarts with what it " + ("saved" if self.size["forgetful"] else "had"),
                s._replace(redis=back, restarts=s.restarts - 1, connected=False, epochs=epoch + 1),
            )
        if s.flushes and s.write != UNSENT:
            yield (
                "Redis is flushed",
                s._replace(redis=Redis(epoch=None), flushes=s.flushes - 1, heard=0),
            )
        if redis.epoch is None:
            yield (
                "another agent begins an epoch",
                s._replace(redis=redis._replace(epoch=s.epochs), epochs=s.epochs + 1),
            )

    def filling(self, s: State) -> Iterator[tuple[str, State]]:
        redis = s.redis
        if s.filler is None:
            if s.fills and redis.epoch is not None:
                epoch = redis.epoch
                if _get(redis.shared, epoch, EMPTY) == EMPTY and not _get(redis.leases, epoch, False):
                    yield (
                        "another agent gets a lease",
                        s._replace(
                            fills=s.fills - 1, filler=(epoch, EMPTY),
                            redis=redis._replace(leases=_set(redis.leases, epoch, True, False)),
                        ),
                    )  # fmt: skip
            return
        epoch, value = s.filler
        if value == EMPTY:
            yield f"the other agent reads version {s.store}", s._replace(filler=(epoch, s.store))
        elif _get(redis.leases, epoch, False):
            filled = redis._replace(
                shared=_set(redis.shared, epoch, value, EMPTY), leases=_set(redis.leases, epoch, False, False)
            )
            yield f"L2 takes its version {value}", s._replace(redis=filled, filler=None)
        else:
            yield "L2 refuses the fill", s._replace(filler=None)

    # Reads of our agent

    def reading(self, s: State) -> Iterator[tuple[str, State]]:
        read = s.read
        own = s.write == TOLD
        if read is None:
            if s.reads and s.bucket in (None, EMPTY):
                left = s._replace(reads=s.reads - 1)
                if not s.marked:
                    yield "our agent reads X", left._replace(read=Read(own, True), bucket=EMPTY)
                else:
                    # Each answer is marked stale.
                    live = not self.keeps("no-bucket")
                    yield (
                        "our agent reads X, having waited in vain",
                        left._replace(read=Read(False, live), bucket=EMPTY if live else s.bucket),
                    )
        elif read.value == EMPTY:
            shared = _get(s.redis.shared, s.epoch, EMPTY)
            if shared != EMPTY and s.connected:
                yield f"L2 answers: version {shared}", s._replace(read=read._replace(value=shared))
            else:
                yield f"the store answers: version {s.store}", s._replace(read=read._replace(value=s.store))
        else:
            done = s._replace(read=None, bucket=read.value if read.live else s.bucket)
            if read.own and s.write == TOLD and read.value < 1:
                done = done._replace(
                    wrong="G6: a read that began after the bus's own write is given what was before"
                )
            yield f"our agent is given version {read.value}", done


def _get(values: tuple[T, ...], epoch: int, default: T) -> T:
    return values[epoch] if epoch < len(values) else default


def _set(values: tuple[T, ...], epoch: int, value: T, empty: T) -> tuple[T, ...]:
    values += (empty,) * (epoch + 1 - len(values))
    return (*values[:epoch], value, *values[epoch + 1 :])
