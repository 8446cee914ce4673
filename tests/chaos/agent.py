"""An agent of the campaign: a process that plays at random, from a seed, and records all that it does.

It is started with a Plan as its argument and the bus's settings in its environment, and is told and tells the rest by
lines of JSON:

    says  ready                    the bus is open
          token token at           all that it was acknowledged by `at`
          answer ...               to what it was told
    told  observe token of of_at   observe the token of another
          quiet                    play no more; answers once nothing is under way
          outbox                   answers how many writes wait there
          view                     answers what it sees in every scope
          stop                     close the bus, and end

`Applied` and `Published` are no calls: the feed and the outbox are wrapped, here and nowhere else, to learn of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mnemobus
import mnemobus.log.outbox
from mnemobus import Bus, Memory, Receipt
from mnemobus.cache.read_path import ReadPath
from mnemobus.errors import LogUnavailable, MemoryNotFound, MnemobusError, NotCommitted, StoreUnavailable
from mnemobus.feed.messages import Invalidation
from mnemobus.feed.subscription import Feed
from mnemobus.keys import Version, id_scope
from mnemobus.writes import Writes

from .clocks import set_ahead
from .history import Applied, Observed, Published, Read, Recorder, Write
from .world import Room, rooms

TOKEN_EVERY = 0.7
"""Seconds between two tokens that an agent says."""


@dataclass
class Plan:
    """What an agent is started with.

    name    of this process: a restarted agent has another one
    pause   seconds between two operations of one player, on average
    writes  how often it writes, compared with one that writes as often as it reads a list
    ahead   seconds by which its wall clock is ahead of everybody else's
    offset  seconds by which its CLOCK_MONOTONIC is, because it runs in a time namespace of its own
    """

    name: str
    folder: str
    seed: str
    rooms: int
    memories: int
    players: int
    pause: float
    writes: float = 1.0
    ahead: float = 0.0
    offset: float = 0.0


_READS = {"get": 34, "recent": 24, "count": 6, "hot": 5}
_WRITES = {"put": 14, "update": 12, "delete": 5, "delete_room": 1}

_how: contextvars.ContextVar[tuple[str, bool]] = contextvars.ContextVar("how")
"""Source and staleness of the answer to the read that is under way; `count` and None can't tell."""


class Agent:
    bus: Bus

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self.plan = plan
        self._record = recorder.record
        self._rooms = rooms(plan.rooms, plan.memories)
        self._random = random.Random(f"{plan.seed}/{plan.name}")
        self._numbers = 0
        self._outboxed: dict[int, Receipt] = {}
        self._appended: dict[tuple[int, Version], dict[str, str]] = {}
        self._quiet = asyncio.Event()

    def clock(self) -> float:
        return time.monotonic() - self.plan.offset

    # What it learns without asking

    def watch(self) -> None:
        """Wrap the feed, the outbox and the reads of this process."""
        apply, read, learn = Feed._apply, ReadPath.read, Writes._published
        append = mnemobus.log.outbox.append

        def applied(feed: Feed, partition: Any, message: Invalidation) -> None:
            apply(feed, partition, message)
            scopes, versions = list(message.scopes), [str(v) for v in message.versions]
            self._record(Applied(self.plan.name, self.clock(), scopes, versions))

        async def answered(path: ReadPath, plan: Any) -> Any:
            def show(found: Any, source: str, stale: bool) -> Any:
                _how.set((source, stale))
                return plan.kind.show(found, source, stale)

            kind = dataclasses.replace(plan.kind, show=show)
            return await read(path, dataclasses.replace(plan, kind=kind))

        async def appended(link: Any, partition: int, producer: str, sequence: int, events: Any) -> Any:
            logged = await append(link, partition, producer, sequence, events)
            for version, fields in zip(logged.versions, events, strict=True):
                self._appended[partition, version] = _named(fields)
            return logged

        def published(writes: Writes, partition: int, write: Any, version: Version) -> None:
            learn(writes, partition, write, version)
            self._published(write, version, self._appended.pop((partition, version)))

        Feed._apply = applied  # type: ignore[method-assign]
        ReadPath.read = answered  # type: ignore[method-assign]
        Writes._published = published  # type: ignore[method-assign]
        mnemobus.log.outbox.append = appended

    def _published(self, write: Any, version: Version, event: dict[str, str]) -> None:
        """A write is out of the outbox; ``write`` is None if it is one of an earlier process."""
        own = [number for number, receipt in self._outboxed.items() if write and receipt._write is write]
        self._record(
            Published(
                self.plan.name,
                self.clock(),
                event.get("id", ""),
                json.loads(event.get("content", "{}")).get("n", ""),
                str(version),
                event["op"],
                event["table"],
                event["room"],
                own[0] if own else 0,
            )
        )
        for number in own:
            del self._outboxed[number]

    # What it does

    async def play(self) -> None:
        """All players, until it is to be quiet."""
        await asyncio.gather(
            *(self._play(random.Random(self._random.random())) for _ in range(self.plan.players))
        )

    async def _play(self, rng: random.Random) -> None:
        names = [*_READS, *_WRITES]
        weights = [*_READS.values(), *(weight * self.plan.writes for weight in _WRITES.values())]
        while not self._quiet.is_set():
            [name] = rng.choices(names, weights)
            # One room is quiet: what is missed there is not made up for by the next write.
            weights_of_rooms = [1.0] * (len(self._rooms) - 1) + [0.1 if name in _WRITES else 1.0]
            [room] = rng.choices(self._rooms, weights_of_rooms)
            await self._do(name, room, rng)
            await asyncio.sleep(rng.expovariate(1 / self.plan.pause))

    async def _do(self, name: str, room: Room, rng: random.Random) -> None:
        id = rng.choice(room.ids)
        if name == "get":
            await self.get(id)
        elif name == "recent":
            # All that there are, or the newest few: what one query has cached must not outlive what another has shown.
            await self.recent(room, rng.choice((None, 3)))
        elif name == "count":
            await self.count(room)
        elif name == "hot":
            for _ in range(12):
                await self.get(id)
        elif name == "put":
            number, value = self._next_value()
            at = datetime.fromtimestamp(time.time(), UTC)
            memory = Memory(table=room.table, room=room.name, id=id, content={"n": value}, created_at=at)
            await self._write(number, "put", room, id, value, lambda: self.bus.write(memory))
        elif name == "update":
            number, value = self._next_value()
            await self._write(
                number, "update", room, id, value, lambda: self.bus.update(id, content={"n": value})
            )
        elif name == "delete":
            number, _ = self._next_value()
            await self._write(number, "delete", room, id, "", lambda: self.bus.delete(id))
        else:
            number, _ = self._next_value()
            await self._write(
                number, "delete_room", room, "", "", lambda: self.bus.delete_room(room.table, room=room.name)
            )

    def _next_value(self) -> tuple[int, str]:
        self._numbers += 1
        return self._numbers, f"{self.plan.name}/{self._numbers}"

    async def _write(
        self, number: int, op: str, room: Room, id: str, value: str, call: Callable[[], Any]
    ) -> None:
        note = Write(
            self.plan.name, self.clock(), None, op, room.table, room.name, id, value, "unknown", number=number
        )
        self._record(note)
        try:
            receipt = await call()
        except MemoryNotFound:
            note.outcome = "missing"
        except (LogUnavailable, NotCommitted) as error:
            note.error = str(error)
        except MnemobusError as error:
            note.outcome, note.error = "refused", f"{type(error).__name__}: {error}"
        else:
            note.outcome = "acked" if receipt is not None else "missing"
            if receipt is not None:
                note.version = None if receipt.version is None else str(receipt.version)
                note.outboxed = receipt.outboxed
                if receipt.outboxed:
                    self._outboxed[number] = receipt
        note.ended = self.clock()
        self._record(note)

    async def get(self, id: str) -> list[list[str]]:
        return await self._read(id_scope(id), 0, lambda: self.bus.get(id))

    async def recent(self, room: Room, limit: int | None = None) -> list[list[str]]:
        limit = limit or 2 * len(room.ids)
        return await self._read(
            room.scope, limit, lambda: self.bus.recent(room.table, room=room.name, limit=limit)
        )

    async def count(self, room: Room) -> None:
        await self._read(room.scope, 0, lambda: self.bus.count(room.table, room=room.name))

    async def _read(self, scope: str, limit: int, call: Callable[[], Any]) -> list[list[str]]:
        _how.set(("local", False))
        name = scope.removeprefix("id:")
        live = self.bus._local.live(name) is not None
        began = self.clock()
        try:
            answer = await call()
        except StoreUnavailable as error:
            self._record(Read(self.plan.name, began, self.clock(), scope, limit, error=str(error)))
            return []
        source, stale = _how.get()
        live = live or self.bus._local.live(name) is not None
        note = Read(self.plan.name, began, self.clock(), scope, limit, source=source, stale=stale, live=live)
        if isinstance(answer, int):
            note.count = answer
        else:
            found: Sequence[Memory] = [answer] if isinstance(answer, Memory) else answer or []
            note.seen = [[m.id, str(m.version), m.content["n"]] for m in found]
        self._record(note)
        return note.seen

    # What it is told, and tells

    async def view(self) -> dict[str, list[list[str]]]:
        out = {}
        for room in self._rooms:
            out[room.scope] = await self.recent(room)
            for id in room.ids:
                out[id_scope(id)] = await self.get(id)
        return out

    async def obey(self, lines: asyncio.StreamReader, group: asyncio.TaskGroup) -> None:
        playing = group.create_task(self.play())
        group.create_task(self.offer_tokens())
        while line := await lines.readline():
            told = json.loads(line)
            what = told.pop("told")
            if what == "observe":
                group.create_task(self._observe(**told))
            elif what == "quiet":
                self._quiet.set()
                await playing
                say("answer")
            elif what == "outbox":
                say("answer", waiting=self.bus.stats().outbox)
            elif what == "view":
                say("answer", view=await self.view(), stats=dataclasses.asdict(self.bus.stats()))
            elif what == "stop":
                break
        self._quiet.set()

    async def _observe(self, token: str, of: str, of_at: float) -> None:
        try:
            await self.bus.observe(token)
        except MnemobusError:
            return
        self._record(Observed(self.plan.name, self.clock(), of, of_at))

    async def offer_tokens(self) -> None:
        while not self._quiet.is_set():
            await asyncio.sleep(TOKEN_EVERY * self._random.uniform(0.5, 1.5))
            at = self.clock()
            try:
                token = self.bus.token()
            except LogUnavailable:
                continue
            say("token", token=token, at=at)


def _named(fields: Sequence[Any]) -> dict[str, str]:
    text = [f.decode() if isinstance(f, bytes) else str(f) for f in fields]
    return dict(zip(text[::2], text[1::2], strict=True))


def say(what: str, **more: Any) -> None:
    sys.stdout.write(json.dumps({"says": what, **more}) + "\n")
    sys.stdout.flush()


async def main(plan: Plan) -> None:
    if plan.ahead:
        set_ahead(plan.ahead)
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    with (Path(plan.folder) / f"{plan.name}.jsonl").open("w") as file:
        agent = Agent(plan, Recorder(file))
        agent.watch()
        async with mnemobus.connect() as agent.bus:
            say("ready")
            async with (
                asyncio.TaskGroup() as group
            ):  # what goes wrong in any of them ends the process, loudly
                group.create_task(agent.obey(lines, group))


if __name__ == "__main__":
    asyncio.run(main(Plan(**json.loads(sys.argv[1]))))
