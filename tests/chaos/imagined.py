"""A simulated run in which every promise is kept: the checker must find nothing in it. Tests plant faults in it.

It has a log, workers that apply it in batches (out of order, late, sometimes with a long pause before the fan-out), a
store, a shared cache, and agents. The agents have their own caches, whose invalidations are lost and repaired; they
write, read, time out, use an outbox and observe each other. Time passes in ticks; nothing waits.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from chaos.history import Applied, Bounds, Final, History, Observed, Published, Read, Record, Write

TICK = 0.01
Answer = list[list[str]]


@dataclass
class _Logged:
    version: str
    order: int
    op: str
    table: str
    room: str
    id: str
    value: str

    @property
    def scopes(self) -> list[str]:
        room = f"room:{self.table}:{self.room}"
        return [room] if self.op == "delete_room" else [f"id:{self.id}", room]

    @property
    def entry(self) -> list[str]:
        return [self.version, self.op, self.table, self.room, self.id, self.value]


@dataclass
class _Agent:
    name: str
    cache: dict[str, dict[str, Answer]] = field(default_factory=dict)
    inbox: list[tuple[float, str, list[str]]] = field(default_factory=list)
    marks: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    """By scope: versions of own writes, or "<number>" in the outbox, and the deadline to wait for them."""
    outbox: list[Write] = field(default_factory=list)
    back_at: float = 0.0
    last_known: dict[str, Answer] = field(default_factory=dict)
    numbers: int = 0


class Imagined:
    """One run; `history` has its records."""

    def __init__(
        self,
        seed: int,
        *,
        agents: int = 4,
        rooms: int = 2,
        memories: int = 4,
        seconds: float = 20,
        busy: float = 0.4,
    ) -> None:
        self._rng = random.Random(seed)
        self._busy = busy
        self.now = 100.0
        self.history = History(Bounds(max_staleness=2.0, heartbeat=1.0, own_write_timeout=1.0))
        self.rooms = [("facts" if n % 2 else "messages", f"r{n}") for n in range(rooms)]
        self.home = {f"m{n}": self.rooms[n % rooms] for n in range(rooms * memories)}
        self._agents = [_Agent(f"a{n}") for n in range(agents)]
        self._log: list[_Logged] = []
        self._pending: list[_Logged] = []
        self._commits: list[tuple[float, list[_Logged]]] = []
        self._fan_outs: list[tuple[float, list[_Logged], list[str]]] = []
        self._last: dict[tuple[str, str], _Logged] = {}
        """What is committed: the last put, update and delete by memory, and delete_room by room."""
        self._unsaid = 0
        """Events that are not fanned out."""
        self._said: dict[str, float] = {}
        """Versions that are fanned out, and since when."""
        self._shared: dict[str, dict[str, Answer]] = defaultdict(dict)
        end = self.now + seconds
        workers_back = 0.0
        while self.now < end or self._pending or self._commits or self._fan_outs or self._waiting():
            self.now += TICK
            if self._chance(0.001):
                workers_back = self.now + self._rng.uniform(0.5, 5)  # they are all down
            if self.now > workers_back:
                self._work()
            for agent in self._agents:
                self._hear(agent)
                self._publish_outbox(agent)
                if self.now < end:
                    self._play(agent)
        self._finish()

    # Small things

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _record(self, record: Record) -> None:
        self.history.records.append(record)

    def _waiting(self) -> bool:
        return any(agent.inbox or agent.outbox for agent in self._agents)

    def _members(self, scope: str) -> list[str]:
        if scope.startswith("id:"):
            return [scope[3:]]
        return [id for id, (table, room) in self.home.items() if scope == f"room:{table}:{room}"]

    # The log, the workers, the store

    def _append(self, write: Write) -> _Logged:
        order = len(self._log)
        # Versions of many widths: they are numbers, and not text.
        logged = _Logged(
            f"{95 + order // 7}-{8 + order % 7}",
            order,
            write.op,
            write.table,
            write.room,
            write.id,
            write.value,
        )
        self._log.append(logged)
        self._pending.append(logged)
        self._unsaid += 1
        return logged

    def _work(self) -> None:
        if self._pending and self._chance(0.5):
            size = self._rng.randint(1, len(self._pending))
            batch, self._pending = self._pending[:size], self._pending[size:]
            late = (
                self._rng.uniform(0.1, 0.5) if self._chance(0.1) else 0.0
            )  # and younger batches overtake it
            self._commits.append((self.now + late, batch))
        due, self._commits = self._due(self._commits)
        for _, batch in due:
            cleared = []
            for event in batch:
                where = event.id or f"{event.table}:{event.room}"
                if event.op == "delete_room":
                    cleared += [f"id:{id}" for id in self._members(event.scopes[0])]
                self._merge(where, event)
            late = self._rng.uniform(0.1, 3) if self._chance(0.03) else 0.0  # killed in between
            self._fan_outs.append((self.now + late, batch, cleared))
        said, self._fan_outs = self._due(self._fan_outs)
        for _, batch, cleared in said:
            self._fan_out(batch, cleared)

    def _due(self, items: list) -> tuple[list, list]:
        return [i for i in items if i[0] <= self.now], [i for i in items if i[0] > self.now]

    def _fan_out(self, batch: list[_Logged], cleared: list[str]) -> None:
        scopes: dict[str, list[str]] = {scope: [] for scope in cleared}
        for event in sorted(batch, key=lambda event: event.op == "delete_room"):
            for scope in event.scopes:
                scopes.setdefault(scope, []).append(event.version)
        for scope, versions in scopes.items():
            self._shared.pop(scope, None)
            for agent in self._agents:
                lost = self._chance(0.05)
                delay = self._rng.uniform(0.1, 1.9) if lost else self._rng.uniform(0, 0.02)
                agent.inbox.append((self.now + delay, scope, versions))
        for event in batch:
            self._said[event.version] = self.now
            self._unsaid -= 1

    def _merge(self, where: str, event: _Logged) -> None:
        last = self._last.get((where, event.op))
        if last is None or event.order > last.order:
            self._last[where, event.op] = event

    def _stored(self, id: str) -> list[str] | None:
        """What the store has of a memory: [id, version, value]."""
        room = ":".join(self.home[id])
        ops = ("put", "update", "delete")
        put, update, delete, emptied = (
            self._last.get(k) for k in (*((id, op) for op in ops), (room, "delete_room"))
        )
        if put is None or any(d is not None and d.order > put.order for d in (delete, emptied)):
            return None
        last = put if update is None or put.order > update.order else update
        return [id, last.version, last.value]

    def _answer(self, scope: str) -> Answer:
        return [row for id in self._members(scope) if (row := self._stored(id))]

    # The agents

    def _hear(self, agent: _Agent, everything: bool = False) -> None:
        for item in list(agent.inbox):
            at, scope, versions = item
            if at <= self.now or everything:
                agent.inbox.remove(item)
                agent.cache.pop(scope, None)
                marks = agent.marks[scope]
                for version in versions:
                    marks.pop(version, None)
                self._record(Applied(agent.name, self.now, [scope], versions))
        if self._chance(0.05):  # a heartbeat asks the consumer group
            for marks in agent.marks.values():
                for version in marks.keys() & self._said.keys():
                    del marks[version]

    def _play(self, agent: _Agent) -> None:
        if self._chance(0.002):
            agent.back_at = self.now + self._rng.uniform(0.2, 1.5)  # its link to Redis is cut
        if not self._chance(self._busy):
            return
        what = self._rng.choices(["read", "write", "observe"], [80, 20, 2])[0]
        if what == "read":
            self._read(agent)
        elif what == "write":
            self._write(agent)
        else:
            self._observe(agent)

    def _read(self, agent: _Agent) -> None:
        rng = self._rng
        kind = rng.choice(["get", "get", "recent", "count"])
        table, room = rng.choice(self.rooms)
        scope = f"id:{rng.choice(list(self.home))}" if kind == "get" else f"room:{table}:{room}"
        read = Read(agent.name, self.now, self.now + 0.0005, scope, 20 if kind == "recent" else 0)
        marks = agent.marks[scope]
        if marks and max(marks.values()) > self.now:
            return  # it would wait
        if marks:
            read.stale, read.source, answer = True, "store", self._answer(scope)
        elif self.now < agent.back_at and self._chance(0.5) and scope in agent.last_known:
            read.stale, read.source, answer = True, "local", agent.last_known[scope]
        elif scope in agent.cache and kind in agent.cache[scope]:
            read.source, answer = "local", agent.cache[scope][kind]
        elif kind in self._shared[scope] and self.now >= agent.back_at:
            read.source, answer = "shared", self._shared[scope][kind]
            agent.cache.setdefault(scope, {})[kind] = answer
        else:
            read.source, answer = "store", self._answer(scope)
            if self._chance(0.1):
                read.ended = self.now + rng.uniform(0.01, 0.5)  # slow, and its fill comes too late
            elif self.now >= agent.back_at:
                agent.cache.setdefault(scope, {})[kind] = answer
                self._shared[scope][kind] = answer
        agent.last_known[scope] = answer
        if kind == "count":
            read.count = len(answer)
        else:
            read.seen = answer
        self._record(read)

    def _write(self, agent: _Agent) -> None:
        rng = self._rng
        agent.numbers += 1
        id = rng.choice(list(self.home))
        table, room = self.home[id]
        op = rng.choices(["put", "update", "delete", "delete_room"], [10, 8, 3, 1])[0]
        value = f"{agent.name}/{agent.numbers}" if op in ("put", "update") else ""
        write = Write(agent.name, self.now, self.now + 0.002, op, table, room, id, value, "acked")
        write.number = agent.numbers
        if op == "delete_room":
            write.id = ""
        self._record(write)
        if op in ("update", "delete") and not self._stored(id):
            write.outcome = "missing"
        elif self.now < agent.back_at or agent.outbox:
            write.outboxed = True
            agent.outbox.append(write)
            self._mark(agent, write, f"{write.number}")
        elif self._chance(0.02):
            write.outcome = "refused"
        elif self._chance(0.05):
            write.outcome, write.ended = "unknown", rng.choice([None, self.now + 5])
            if self._chance(0.5):
                self._append(write)
        else:
            write.version = self._append(write).version
            self._mark(agent, write, write.version)

    def _mark(self, agent: _Agent, write: Write, version: str) -> None:
        room = f"room:{write.table}:{write.room}"
        ids = self._members(room) if write.op == "delete_room" else [write.id]
        for scope in (room, *(f"id:{id}" for id in ids)):
            agent.cache.pop(scope, None)
            agent.marks[scope][version] = self.now + 1.0

    def _publish_outbox(self, agent: _Agent) -> None:
        if self.now < agent.back_at:
            return
        for write in agent.outbox:
            version = self._append(write).version
            for marks in agent.marks.values():
                if str(write.number) in marks:
                    marks[version] = marks.pop(str(write.number))
            if self._chance(0.7):  # else the log alone tells
                record = Published(agent.name, self.now, write.id, write.value, version, write.op)
                record.table, record.room, record.number = write.table, write.room, write.number
                self._record(record)
        agent.outbox.clear()

    def _observe(self, agent: _Agent) -> None:
        other = self._rng.choice(self._agents)
        done = self._unsaid == 0
        if other is not agent and done and not other.outbox and self.now >= agent.back_at:
            self._hear(agent, everything=True)
            self._record(Observed(agent.name, self.now + 0.001, other.name, self.now))

    def _finish(self) -> None:
        self.now += 10
        store = [[*row, *self.home[id]] for id in self.home if (row := self._stored(id))]
        scopes = [f"room:{table}:{room}" for table, room in self.rooms] + [f"id:{id}" for id in self.home]
        views = {
            agent.name: {scope: [list(row) for row in self._answer(scope)] for scope in scopes}
            for agent in self._agents
        }
        self._record(Final(self.now + 20, [event.entry for event in self._log], store, views))
