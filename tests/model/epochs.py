"""World "epochs": Redis restarts without its last second, or is flushed, and no agent serves its lost results (G5).

One scope and one write to it; a worker, an agent whose caches are warm, and other processes, which only begin epochs. A
process that sends a command on a broken connection first connects again, learns the run id, and agrees on the epoch;
but the command's keys are those that were computed before. A flush breaks no connection. Pub/sub is not modelled: it
may lose everything, and the heartbeat alone has to be enough.

Time is counted from the moment when the fan-out is no longer due: it was sent, and the epoch compared; or Redis has
lost the event, so that no worker will send it. `MARKED` and `PASSED` are as in the world "join".

Modelled after connection/link.py (handshake, `agree`), lua/epoch.lua, cache/l2.py, `Applier._fan_out` and
feed/heartbeat.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

UNMARKED, MARKED, PASSED = 0, 1, 2
NEVER, BEFORE, AFTER = 0, 1, 2
EMPTY = -1
LEASED = -3
"""In place of L2's content: our agent has the lease."""


class Redis(NamedTuple):
    run: int = 0
    key: tuple[int, int] | None = (0, 0)
    """Run id and epoch that were agreed on."""
    event: bool = True
    """Whether the log has the write, not confirmed."""
    shared: tuple[int, ...] = (EMPTY,)
    """What L2 has, for each epoch."""
    head: int = 0
    """The last message of the feed."""
    head_epoch: int = 0
    """The epoch whose buckets were dropped with it."""


class Link(NamedTuple):
    """What a process knows of Redis."""

    run: int = 0
    epoch: int = 0


class Load(NamedTuple):
    """A read of the agent that missed.

    at     lookup: it asks L2; read: it reads the store; put: L1 and the reader get the result; fill: L2 gets it
    live   whether its bucket is the one that others see
    late   whether it began after the bound had passed, or after the agent had heard of the write
    epoch  the epoch of its keys
    """

    at: str
    live: bool
    late: bool
    epoch: int
    value: int = EMPTY
    leased: bool = False


class Beat(NamedTuple):
    """A heartbeat: when it began, in which epoch, from which position; and what it was told."""

    began: int
    epoch: int
    position: int | None
    told: bool = False
    key: int | None = None
    head: int = 0
    head_epoch: int = 0


class State(NamedTuple):
    redis: Redis = Redis()
    saved: Redis = Redis()
    epochs: int = 1
    messages: int = 0
    store: int = 0
    worker: str = ""
    worker_link: Link = Link()
    link: Link = Link()
    position: int | None = 0
    bucket: int | None = None
    load: Load | None = None
    beat: Beat | None = None
    fresh: int = BEFORE
    heard: bool = False
    """Whether our agent has applied an invalidation by the write, one of its own epoch."""
    moment: int = UNMARKED
    reads: int = 0
    crashes: int = 0
    restarts: int = 0
    flushes: int = 0
    saves: int = 0
    wrong: str = ""


class Epochs(World):
    name = "epochs"
    about = (
        "Redis restarts with less than it had, or is flushed: run ids, epochs, and comparing them afterwards"
    )
    sizes: ClassVar = {"reads": 1, "crashes": 0, "restarts": 0, "flushes": 0, "forgetful": 0, "saves": 0}
    small = (
        {"restarts": 1, "reads": 2},
        {"restarts": 1, "forgetful": 1},
        {"flushes": 1, "reads": 2},
        {"restarts": 1, "forgetful": 1, "crashes": 1},
    )
    larger = (
        {"restarts": 1, "forgetful": 1, "saves": 1, "reads": 2},
        {"restarts": 1, "forgetful": 1, "saves": 1, "flushes": 1},
        {"restarts": 2, "forgetful": 1, "saves": 1, "flushes": 1, "crashes": 1},
    )
    rules = (
        Rule("run-id", "a run id that nobody has met begins no new epoch", "G5", 1),
        Rule("keys", "buckets of L2 have the same keys in every epoch", "G5", 1),
        Rule("drop", "an agent that meets a new epoch keeps L1", "G5", 1),
        Rule("reader", "a reader does not compare the epoch once L2 has answered", "G5", 1),
        Rule("worker", "a worker does not compare the epoch once its fan-out was answered", "G5"),
        Rule("worker-looks", "a worker learns of epochs from new connections only", "G5", 2),
        Rule("beat-looks", "an agent learns of epochs from new connections only", "G5", 2),
        Rule(
            "no-return",
            "a late answer to a heartbeat takes the agent back to an epoch that it has left",
            "G5",
            1,
        ),
        Rule("renew", "nobody minds that the epoch is gone from Redis", "G5", 2),
    )
    limits = (
        Rule(
            "one-failure",
            "Redis loses an event that a worker has in hand, and the worker dies between commit and fan-out, too",
            "G5",
            3,
        ),
    )

    def start(self) -> State:
        budgets = {name: n for name, n in self.size.items() if name in State._fields}
        # Both caches are warm, and what Redis would come back with is from just before the write was logged.
        redis = Redis(shared=(0,))
        return State(redis, redis._replace(event=False), bucket=0, **budgets)

    def broken(self, s: State) -> Iterator[str]:
        if s.wrong:
            yield s.wrong
        if s.moment == PASSED and s.fresh == AFTER and s.bucket == 0:
            yield "G5: L1 serves what was there before a write that was fanned out longer ago than the bound"

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        for label, after in self.all_steps(s):
            # The bound is counted from the moment when the fan-out is no longer due.
            if after.moment == UNMARKED and after.store and not after.redis.event and not after.worker:
                fresh = BEFORE if after.fresh else NEVER
                after = after._replace(moment=MARKED, fresh=fresh)
                label += " (from here on the bound is counted)"
            yield label, after
        if s.moment == MARKED:
            fresh = NEVER if s.fresh == BEFORE else s.fresh
            yield "(max_staleness has passed)", s._replace(moment=PASSED, fresh=fresh)

    def all_steps(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self.failing(s)
        yield from self.working(s)
        yield from self.heartbeat(s)
        yield from self.reading(s)

    # Redis

    def failing(self, s: State) -> Iterator[tuple[str, State]]:
        redis = s.redis
        if s.restarts:
            if s.saves and s.saved != redis:
                yield "Redis saves", s._replace(saved=redis, saves=s.saves - 1)
            back = s.saved if self.size["forgetful"] else redis
            back = back._replace(run=redis.run + 1)
            what = "what it saved" if self.size["forgetful"] else "all that it had"
            yield f"Redis restarts with {what}", s._replace(redis=back, restarts=s.restarts - 1)
        if s.flushes:
            yield (
                "Redis is flushed",
                s._replace(
                    redis=Redis(run=redis.run, key=None, event=False, shared=()), flushes=s.flushes - 1
                ),
            )
        if redis.key is None or redis.key[0] != redis.run:
            after, epoch = self.agreed(s)
            if after.redis != redis:
                yield f"another agent connects, and begins epoch {epoch}", after

    def agreed(self, s: State) -> tuple[State, int]:
        """epoch.lua: the epoch that is in force, a new one if need be."""
        redis = s.redis
        if redis.key is not None and (redis.key[0] == redis.run or not self.keeps("run-id")):
            return s, redis.key[1]
        epoch = s.epochs
        return s._replace(redis=redis._replace(key=(redis.run, epoch)), epochs=epoch + 1), epoch

    def bucket_of(self, epoch: int) -> int:
        return epoch if self.keeps("keys") else 0

    def shared(self, s: State, epoch: int) -> int:
        at = self.bucket_of(epoch)
        return s.redis.shared[at] if at < len(s.redis.shared) else EMPTY

    def share(self, s: State, epoch: int, value: int) -> State:
        at, shared = self.bucket_of(epoch), s.redis.shared
        shared += (EMPTY,) * (at + 1 - len(shared))
        return s._replace(redis=s.redis._replace(shared=(*shared[:at], value, *shared[at + 1 :])))

    # The worker

    def working(self, s: State) -> Iterator[tuple[str, State]]:
        if s.crashes and s.worker:
            safe = s.worker != "committed" or s.redis.event
            if safe or not self.keeps("one-failure"):
                yield "the worker is killed", s._replace(worker="", crashes=s.crashes - 1)
        if not s.worker:
            if s.redis.event:
                yield "a worker takes the write", s._replace(worker="read")
        elif s.worker == "read":
            yield "the write is committed", s._replace(worker="committed", store=1)
        elif s.worker == "committed":
            keys = s.worker_link.epoch
            after = s
            if s.worker_link.run != s.redis.run:
                after, epoch = self.agreed(s)
                after = after._replace(worker_link=Link(s.redis.run, epoch))
            message = s.messages + 1
            after = self.share(after, keys, EMPTY)
            after = after._replace(
                messages=message, redis=after.redis._replace(head=message, head_epoch=keys)
            )
            key = after.redis.key
            if key is not None and self.keeps("worker-looks"):
                after = after._replace(worker_link=after.worker_link._replace(epoch=key[1]))
            label = f"the worker fans out in epoch {keys}"
            if keys != after.worker_link.epoch and self.keeps("worker"):
                yield f"{label}, and learns that it is {after.worker_link.epoch}", after
            else:
                yield label, after._replace(worker="sent")
        else:
            yield "the worker confirms", s._replace(worker="", redis=s.redis._replace(event=False))

    # The agent

    def connected(self, s: State) -> State:
        """Before a command: a connection that broke is made anew."""
        if s.link.run == s.redis.run:
            return s
        s, epoch = self.agreed(s)
        return self.enter(s._replace(link=s.link._replace(run=s.redis.run)), epoch)

    def enter(self, s: State, epoch: int) -> State:
        if epoch == s.link.epoch:
            return s
        s = s._replace(link=s.link._replace(epoch=epoch), position=None)
        return self.drop(s) if self.keeps("drop") else s

    @staticmethod
    def drop(s: State) -> State:
        return s._replace(bucket=None, load=s.load and s.load._replace(live=False))

    def heartbeat(self, s: State) -> Iterator[tuple[str, State]]:
        beat = s.beat
        if beat is None:
            began = BEFORE if s.moment == UNMARKED else AFTER
            yield "a heartbeat begins", s._replace(beat=Beat(began, s.link.epoch, s.position))
        elif not beat.told:
            s = self.connected(s)
            key = None if s.redis.key is None else s.redis.key[1]
            told = beat._replace(told=True, key=key, head=s.redis.head, head_epoch=s.redis.head_epoch)
            yield f"Redis answers the heartbeat: epoch {key}, head {s.redis.head}", s._replace(beat=told)
        else:
            label = "the heartbeat's answer is there"
            moved_on = s.link.epoch != beat.epoch and self.keeps("no-return")
            if moved_on:
                label = f"{label}, too late"
            elif beat.key is None and self.keeps("renew"):
                s, epoch = self.agreed(self.connected(s))
                s, label = self.enter(s, epoch), f"{label}: begin epoch {epoch}"
            elif beat.key is not None and beat.key != s.link.epoch and self.keeps("beat-looks"):
                s, label = self.enter(s, beat.key), f"{label}: enter epoch {beat.key}"
            if s.link.epoch != beat.epoch:
                # Begin again, at once; what counts is when the first attempt began.
                again = beat._replace(
                    epoch=s.link.epoch, position=s.position, told=False, key=None, head=0, head_epoch=0
                )
                yield f"{label}; again", s._replace(beat=again)
                return
            if s.position is None:
                s = s._replace(position=beat.head)
            elif beat.head != s.position:
                # Below the position that was known: reset. Above it: replay. Either drops what there is.
                heard = beat.head > s.position and beat.head_epoch == s.link.epoch
                s = self.drop(s)._replace(position=beat.head, heard=s.heard or heard)
            began = NEVER if beat.began == BEFORE and s.moment == PASSED else beat.began
            yield f"{label}: it was good", s._replace(beat=None, fresh=max(s.fresh, began))

    def reading(self, s: State) -> Iterator[tuple[str, State]]:
        load = s.load
        if load is None:
            if s.reads and s.position is not None and s.bucket in (None, EMPTY):
                reachable = s.fresh != NEVER
                new = Load(
                    "lookup" if reachable else "read", True, s.heard or s.moment == PASSED, s.link.epoch
                )
                yield "a read misses L1", s._replace(reads=s.reads - 1, bucket=EMPTY, load=new)
        elif load.at == "lookup":
            s = self.connected(s)
            load = s.load or load
            found = self.shared(s, load.epoch)
            if found == EMPTY:
                s = self.share(s, load.epoch, LEASED)
            what = {EMPTY: "a lease", LEASED: "nothing"}.get(found, f"version {found}")
            label = f"L2 answers in epoch {load.epoch}: {what}"
            if load.epoch != s.link.epoch and self.keeps("reader"):
                yield f"{label}; again", s._replace(load=load._replace(epoch=s.link.epoch))
            elif found >= 0:
                yield label, s._replace(load=load._replace(at="put", value=found))
            else:
                yield label, s._replace(load=load._replace(at="read", leased=found == EMPTY))
        elif load.at == "read":
            yield (
                f"the store answers: version {s.store}",
                s._replace(load=load._replace(at="put", value=s.store)),
            )
        elif load.at == "put":
            if load.late and load.value == 0:
                s = s._replace(wrong="G5: a read is given what it must not be given any more")
            fills = load.leased and load.epoch == s.link.epoch
            after = s._replace(load=load._replace(at="fill") if fills else None)
            if load.live:
                after = after._replace(bucket=load.value)
            yield f"the reader gets version {load.value}, and L1", after
        else:
            s = self.connected(s)
            if self.shared(s, load.epoch) == LEASED:
                s = self.share(s, load.epoch, load.value)
                yield f"L2 takes version {load.value} in epoch {load.epoch}", s._replace(load=None)
            else:
                yield "L2 refuses the fill", s._replace(load=None)
