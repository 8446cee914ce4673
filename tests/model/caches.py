"""World "caches": nothing that was read before an invalidation is found after it (G4).

One scope, some writes to it, workers that apply them in any order and may die, and agents that read through L1 and L2.
An agent receives the messages of the feed one after the other, at any time. The world "join" shows that a lost message
is received later, or the agent serves nothing. Every read of an agent that misses L1 takes a bucket first, then asks
L2, which answers with a result, or a lease, or neither; then it reads the store, and fills first its bucket and then
L2.

Modelled after apply.py, lua/fanout.lua, lua/lookup.lua, lua/fill.lua, cache/l2.py, cache/l1.py and `Bus._load`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

LOGGED, COMMITTED, SENT, CONFIRMED = 0, 1, 2, 3
EMPTY = -1


class Load(NamedTuple):
    """What an agent does for a read that missed, and for those that share it.

    at     lookup: it asks L2; read: it reads the store; put: the result goes into L1; fill: and into L2
    live   whether the bucket with which it began is still the one that others see
    lease  0: none
    since  the newest invalidation that any of its readers had heard of when it began
    """

    at: str
    live: bool
    since: int
    value: int = EMPTY
    lease: int = 0


class Agent(NamedTuple):
    heard: int = 0
    """Messages of the feed that were applied."""
    bucket: int | None = None
    """What L1 has: EMPTY for an empty bucket, None for no bucket."""
    loads: tuple[Load, ...] = ()
    reads: int = 0


class State(NamedTuple):
    events: tuple[int, ...]
    """How far each event, which is a version, has got."""
    agents: tuple[Agent, ...]
    store: int = 0
    feed: tuple[int, ...] = ()
    shared: int = EMPTY
    """What L2 has."""
    lease: int = 0
    """Whose fill L2 accepts."""
    crashes: int = 0
    evictions: int = 0
    lapses: int = 0
    """Leases that lapse while their holder still works on it."""


class Caches(World):
    name = "caches"
    about = "L1, L2, leases, shared loads, eviction, redelivery after a crash"
    sizes: ClassVar = {"writes": 1, "agents": 1, "reads": 2, "crashes": 0, "evictions": 0, "lapses": 0}
    small = (
        {"crashes": 1, "evictions": 1, "lapses": 1},
        {"agents": 2, "reads": 1, "lapses": 1, "evictions": 1, "crashes": 1},
        {"writes": 2, "reads": 1, "crashes": 1},
        {"writes": 2},
    )
    larger = (
        {"writes": 2, "reads": 3, "crashes": 1, "evictions": 1, "lapses": 1},
        {"writes": 2, "agents": 2, "reads": 1, "crashes": 1, "evictions": 1, "lapses": 1},
        {"writes": 2, "agents": 2, "reads": 2, "crashes": 1, "evictions": 1},
    )
    rules = (
        Rule("lease", "L2 accepts a fill without a lease", "G4"),
        Rule("own-lease", "L2 accepts a fill while anybody has a lease", "G4", 1),
        Rule("unlink", "the fan-out leaves L2 alone", "G4"),
        Rule("unlink-leases", "the fan-out drops results, and leaves leases", "G4"),
        Rule("commit-first", "the fan-out comes before the commit", "G4"),
        Rule("losers-too", "what was committed before a crash is not fanned out when it is delivered again", "G4"),
        Rule("bucket", "a late fill lands in whatever bucket is there then", "G4"),
        Rule("share", "a read shares a load that began before an invalidation it has heard of", "G4"),
    )  # fmt: skip

    def start(self) -> State:
        return State(
            (LOGGED,) * self.size["writes"],
            (Agent(reads=self.size["reads"]),) * self.size["agents"],
            **{name: n for name, n in self.size.items() if name in State._fields and name != "agents"},
        )

    def broken(self, s: State) -> Iterator[str]:
        sent = max((version for version, at in enumerate(s.events, 1) if at >= SENT), default=0)
        if EMPTY < s.shared < sent:
            yield f"G4: L2 has version {s.shared} after the fan-out of {sent}"
        for agent in s.agents:
            heard = self.heard(s, agent)
            if agent.bucket is not None and EMPTY < agent.bucket < heard:
                yield f"G4: L1 has version {agent.bucket} after the invalidation of {heard}"
            for load in agent.loads:
                if load.at == "put" and load.value < load.since:
                    yield f"G4: a read that began after the invalidation of {load.since} is given {load.value}"

    def heard(self, s: State, agent: Agent) -> int:
        return max(s.feed[: agent.heard], default=0)

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self.workers(s)
        if s.evictions and (s.shared != EMPTY or s.lease):
            yield "L2 is evicted", s._replace(shared=EMPTY, lease=0, evictions=s.evictions - 1)
        for i, agent in enumerate(s.agents):
            if agent in s.agents[:i]:  # agents are alike
                continue
            for label, after, state in self.agent(s, agent):
                agents = sorted((*s.agents[:i], after, *s.agents[i + 1 :]), key=_order)
                yield label, state._replace(agents=tuple(agents))

    def workers(self, s: State) -> Iterator[tuple[str, State]]:
        for i, at in enumerate(s.events):
            version = i + 1

            def moved(to: int, i: int = i) -> tuple[int, ...]:
                return (*s.events[:i], to, *s.events[i + 1 :])

            committing = "committed" if self.keeps("commit-first") else "fanned out"
            if at == LOGGED and committing == "committed":
                known = s.store >= version
                skip = known and not self.keeps("losers-too")
                to = SENT if skip else COMMITTED
                yield f"{version} committed", s._replace(store=max(s.store, version), events=moved(to))
            elif at == COMMITTED and committing == "fanned out":
                yield f"{version} committed", s._replace(store=max(s.store, version), events=moved(SENT))
            elif at in (LOGGED, COMMITTED):
                shared = EMPTY if self.keeps("unlink") else s.shared
                lease = 0 if self.keeps("unlink-leases") and self.keeps("unlink") else s.lease
                yield (
                    f"{version} fanned out",
                    s._replace(feed=(*s.feed, version), shared=shared, lease=lease, events=moved(at + 1)),
                )
            elif at == SENT:
                yield f"{version} confirmed", s._replace(events=moved(CONFIRMED))
            if at in (COMMITTED, SENT) and s.crashes:
                yield (
                    f"the worker that has {version} is killed",
                    s._replace(events=moved(LOGGED), crashes=s.crashes - 1),
                )

    def agent(self, s: State, a: Agent) -> Iterator[tuple[str, Agent, State]]:
        if a.heard < len(s.feed):
            loads = tuple(load._replace(live=False) for load in a.loads)
            yield (
                f"an agent hears of {s.feed[a.heard]}, and drops its bucket",
                a._replace(heard=a.heard + 1, bucket=None, loads=loads),
                s,
            )
        if a.reads and a.bucket in (None, EMPTY):
            since = self.heard(s, a)
            left = a._replace(reads=a.reads - 1, bucket=EMPTY)
            shared = next(
                (load for load in a.loads if (load.live or not self.keeps("share")) and load.at != "fill"),
                None,
            )
            if shared is None:
                load = Load("lookup", True, since)
                yield "a read misses L1", left._replace(loads=_sorted((*a.loads, load))), s
            else:
                load = shared._replace(since=max(shared.since, since))
                yield "a read shares the load of another", left._replace(loads=_with(a, shared, load)), s
        for i, load in enumerate(a.loads):
            if load not in a.loads[:i]:
                yield from self.load(s, a, load)

    def load(self, s: State, a: Agent, load: Load) -> Iterator[tuple[str, Agent, State]]:
        def go(**changes: object) -> Agent:
            return a._replace(loads=_with(a, load, load._replace(**changes)))

        if load.at == "lookup":
            if s.shared != EMPTY:
                yield f"L2 answers: version {s.shared}", go(at="put", value=s.shared), s
                return
            if s.lease and s.lapses:
                token = self.token(s)
                yield (
                    "a lease has lapsed, and L2 gives a new one",
                    go(at="read", lease=token),
                    s._replace(lease=token, lapses=s.lapses - 1),
                )
            if s.lease:
                yield "L2 has nothing, and another has the lease", go(at="read"), s
            else:
                token = self.token(s)
                yield "L2 has nothing, and gives a lease", go(at="read", lease=token), s._replace(lease=token)
        elif load.at == "read":
            yield f"the store answers: version {s.store}", go(at="put", value=s.store), s
        elif load.at == "put":
            bucket = load.value if load.live or not self.keeps("bucket") else a.bucket
            loads = _with(
                a, load, load._replace(at="fill") if load.lease or not self.keeps("lease") else None
            )
            where = "L1" if bucket is not a.bucket or load.live else "nobody's bucket"
            yield f"version {load.value} goes into {where}", a._replace(bucket=bucket, loads=loads), s
        else:
            accepted = s.lease != 0 and (s.lease == load.lease or not self.keeps("own-lease"))
            accepted = accepted or not self.keeps("lease")
            after = s._replace(shared=load.value, lease=0) if accepted else s
            what = "accepts" if accepted else "refuses"
            yield f"L2 {what} version {load.value}", a._replace(loads=_with(a, load, None)), after

    @staticmethod
    def token(s: State) -> int:
        """A lease that nobody has."""
        taken = {s.lease, *(load.lease for agent in s.agents for load in agent.loads)}
        return next(n for n in range(1, len(taken) + 2) if n not in taken)


def _with(agent: Agent, load: Load, after: Load | None) -> tuple[Load, ...]:
    i = agent.loads.index(load)
    new = () if after is None else (after,)
    return _sorted((*agent.loads[:i], *new, *agent.loads[i + 1 :]))


def _sorted(loads: tuple[Load, ...]) -> tuple[Load, ...]:
    return tuple(sorted(loads))


def _order(agent: Agent) -> tuple[object, ...]:
    return (agent.heard, agent.bucket is not None, agent.bucket or 0, agent.loads, agent.reads)
