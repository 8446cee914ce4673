"""World "rooms": a room is deleted in steps, while others write into it (G3), and every agent learns of it (G5).

A room with two memories, and agents that hold copies of both. Its deletion is event 2. Meanwhile a put that is older
(event 1, of a third memory) and one that is newer (event 3, of the second memory) are committed. A put reads the room's
tombstone, and commits later. A worker sets the tombstone, clears one memory after another, reads the names of all
deleted memories, notifies the agents, and confirms. It may be killed before any of these steps, or be delayed for so
long that another begins the same deletion.

Modelled after the steps of store/merge.py, and `Applier._tell` of apply.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from .kernel import Rule, World

DELETION = 2
IDLE, BURY, CLEAR, READ, TELL, CONFIRM = "idle", "bury", "clear", "read", "tell", "confirm"


class Memory(NamedTuple):
    """Its registers, and the version of the copy that some agent has; 0 for none."""

    put: int = 0
    deleted: int = 0
    copy: int = 0

    @property
    def live(self) -> bool:
        return self.put > self.deleted


class Put(NamedTuple):
    """A put that is to come: of which memory, its version, and the tombstone that it has read, if it has begun."""

    memory: int
    version: int
    seen: int | None = None


class Worker(NamedTuple):
    stage: str = IDLE
    place: int = 0
    """The memory that is cleared next."""
    names: tuple[int, ...] = ()
    """The memories of which to tell."""


class State(NamedTuple):
    memories: tuple[Memory, ...]
    puts: tuple[Put, ...]
    workers: tuple[Worker, ...]
    kills: int
    pauses: int
    tombstone: int = 0
    free: bool = True
    """Whether a worker may take the deletion up."""
    confirmed: bool = False


class Rooms(World):
    name = "rooms"
    about = "the deletion of a room in steps, and writes into it meanwhile"
    sizes: ClassVar = {"workers": 2, "kills": 1, "pauses": 1, "more": 0}
    larger = ({"kills": 2, "pauses": 2, "more": 1},)
    rules = (
        Rule("tombstone-first", "memories are cleared before the tombstone is set", "G3"),
        Rule("room-lock", "the tombstone does not wait for puts that have not seen it", "G3"),
        Rule("all-steps", "the deletion is confirmed before its last step", "G3"),
        Rule("names-last", "a worker tells of what it has cleared itself", "G5"),
    )

    def start(self) -> State:
        there = Memory(put=1, copy=1)
        return State(
            memories=(there, there, Memory(), *(there,) * self.size["more"]),
            puts=(Put(2, 1), Put(1, 3)),
            workers=(Worker(),) * self.size["workers"],
            kills=self.size["kills"],
            pauses=self.size["pauses"],
        )

    def broken(self, s: State) -> Iterator[str]:
        return iter(())

    def broken_at_rest(self, s: State) -> Iterator[str]:
        for number, memory in enumerate(s.memories):
            if memory.live and memory.put < DELETION:
                yield f"G3: the room is deleted, and memory {number} of before is there"
            if memory.put > DELETION and not memory.live:
                yield f"G3: memory {number} was put after the deletion, and is not there"
            if memory.copy and not memory.live:
                yield f"G5: memory {number} is gone, and nobody drops the copy of it"

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        for number, memory in enumerate(s.memories):
            if memory.live and memory.copy != memory.put:
                yield f"an agent reads memory {number}", self.change(s, number, copy=memory.put)
        for put in s.puts:
            others = tuple(other for other in s.puts if other is not put)
            if put.seen is None:
                begun = put._replace(seen=s.tombstone)
                yield (
                    f"put {put.version} reads the tombstone",
                    s._replace(puts=tuple(sorted((*others, begun), key=str))),
                )
                continue
            old = s.memories[put.memory]
            # Its own fan-out belongs to another world: here it comes with the commit.
            after = self.change(
                s, put.memory, put=max(old.put, put.version), deleted=max(old.deleted, put.seen), copy=0
            )
            yield f"put {put.version} commits", after._replace(puts=others)
        seen = set()
        for i, worker in enumerate(s.workers):
            if worker in seen:  # workers are alike
                continue
            seen.add(worker)
            for label, then, state in self.worker(s, worker):
                workers = tuple(sorted((*s.workers[:i], then, *s.workers[i + 1 :])))
                yield label, state._replace(workers=workers)

    def worker(self, s: State, worker: Worker) -> Iterator[tuple[str, Worker, State]]:
        first = BURY if self.keeps("tombstone-first") else CLEAR
        if worker.stage == IDLE:
            if s.free and not s.confirmed:
                yield "a worker takes the deletion", Worker(first), s._replace(free=False)
            return
        if s.kills:
            yield (
                f"the worker that is about to {worker.stage} is killed",
                Worker(),
                s._replace(free=True, kills=s.kills - 1),
            )
        if s.pauses and not s.free:
            yield (
                f"the worker that is about to {worker.stage} is held up",
                worker,
                s._replace(free=True, pauses=s.pauses - 1),
            )
        if worker.stage == BURY:
            if self.keeps("room-lock") and any(put.seen is not None for put in s.puts):
                return
            then = worker._replace(stage=CLEAR if self.keeps("tombstone-first") else READ)
            after = s._replace(tombstone=DELETION)
            if not self.keeps("all-steps"):
                after = after._replace(confirmed=True)
            yield "the tombstone is set", then, after
        elif worker.stage == CLEAR:
            number = worker.place
            if number == len(s.memories):
                yield "nothing is left to clear", worker._replace(stage=READ if first == BURY else BURY), s
                return
            memory = s.memories[number]
            then, after = worker._replace(place=number + 1), s
            if memory.live and memory.put < DELETION:
                then = then._replace(names=(*worker.names, number))
                after = self.change(s, number, deleted=DELETION)
            yield f"memory {number} is cleared", then, after
        elif worker.stage == READ:
            names = worker.names
            if self.keeps("names-last"):
                names = tuple(
                    number
                    for number, memory in enumerate(s.memories)
                    if not memory.live and memory.deleted == DELETION
                )
            yield "the names of what it ended are read", Worker(TELL, names=names), s
        elif worker.stage == TELL:
            after = s
            for number in worker.names:
                after = self.change(after, number, copy=0)
            yield f"agents drop {list(worker.names)}", Worker(CONFIRM), after
        else:
            yield "the deletion is confirmed", Worker(), s._replace(confirmed=True)

    def change(self, s: State, number: int, **registers: int) -> State:
        memories = list(s.memories)
        memories[number] = memories[number]._replace(**registers)
        return s._replace(memories=tuple(memories))
