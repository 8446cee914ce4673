"""One agent of the demo, in its own process: ``python -m mnemobus.cli.demo.agent``.

It exchanges JSON lines with the demo. Input: its part, then "start", then any number of "verify"; it ends when the
input ends. Output: "ready"; "progress" from time to time; "done" with its promises (each acknowledged write) and what
it saw (each dropped copy); and for "verify" what it sees of every room.

In a conversation the agents take turns. The next agent reads the context until the turn before is in it. No message
says that it is: the agent waits until its copy of the room is dropped, and reads again. So the conversations are only
as fast as the invalidations, and stop if one is lost.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import orjson

from ...bus import Bus, connect
from ...errors import MemoryNotFound
from ...keys import room_scope
from ...memory import Memory
from .rooms import DemoRoom, Role, digest, rooms_of
from .samples import Turn

ROOMS_AT_ONCE = 24
"""Conversations that an agent takes part in at the same time."""
IMPATIENCE = 0.1
"""Seconds after which an agent reads again although nothing was dropped: it may have had no copy."""


class Agent:
    """Plays one part on its own bus."""

    def __init__(self, bus: Bus, part: Role) -> None:
        self._bus = bus
        self._part = part
        self._name = f"agent-{part.number}"
        self._rooms = rooms_of(part)
        self._places = asyncio.Semaphore(ROOMS_AT_ONCE)
        self._dropped: dict[str, asyncio.Event] = {}
        self._told = 0
        self.acknowledged: list[dict[str, Any]] = []
        self.drops: list[tuple[str, float]] = []
        bus.on_drop = self._on_drop

    def _on_drop(self, scope: str) -> None:
        if scope.startswith("room:messages:"):
            self.drops.append((scope, time.monotonic()))
        event = self._dropped.pop(scope, None)
        if event is not None:
            event.set()

    async def converse(self) -> None:
        """Take part in every conversation. All agents enter the rooms in the same order, so that no agent waits for
        one that waits for another room."""
        async with asyncio.TaskGroup() as group:
            for room in self._rooms:
                await self._places.acquire()
                group.create_task(self._attend(room))

    async def _attend(self, room: DemoRoom) -> None:
        try:
            for number, turn in enumerate(room.conversation.turns):
                if (turn.speaker + room.number) % self._part.agents == self._part.number:
                    await self._await_turn(room, number)
                    await self._speak(room, number, turn)
            # Stay to the end: `verify` finds the copy that is read then, and the store must have the same.
            await self._await_turn(room, len(room.conversation.turns))
        finally:
            self._places.release()

    async def _await_turn(self, room: DemoRoom, number: int) -> None:
        scope = room_scope("messages", room.name)
        before = room.message(number - 1)
        while True:
            dropped = self._dropped.setdefault(scope, asyncio.Event())
            context = await self._bus.context(room=room.name, entity=room.entity)
            if number == 0 or any(m.id == before for m in context.messages):
                return
            try:
                async with asyncio.timeout(IMPATIENCE):
                    await dropped.wait()
            except TimeoutError:
                continue

    async def _speak(self, room: DemoRoom, number: int, turn: Turn) -> None:
        last = number == len(room.conversation.turns) - 1
        if turn.learn:
            key, fact = turn.learn
            await self._write(room, "facts", room.fact(key), number, {"about": key, "fact": fact})
        if turn.revise:
            key, fact = turn.revise
            await self._update(room, room.fact(key), {"about": key, "fact": fact})
        if turn.forget:
            await self._delete(room, room.fact(turn.forget))
        if room.has_drafts and number == 0:
            await self._write(room, "drafts", room.draft(number), number, {"text": turn.text[:20]})
        if room.has_drafts and last:
            receipt = await self._bus.delete_room("drafts", room=room.name)
            self._note("delete_room", room, "drafts", "", receipt.version, None, 0.0)
        text = {"text": turn.text, "turn": number}
        await self._write(room, "messages", room.message(number), number, text)

    async def _write(self, room: DemoRoom, table: str, id: str, turn: int, content: dict[str, Any]) -> None:
        memory = Memory(
            id=id,
            table=table,
            room=room.name,
            entity=room.entity,
            agent=self._name,
            world=room.conversation.world,
            content=content,
            metadata={"turn": turn},
            created_at=room.conversation.began + timedelta(seconds=20 * turn),
        )
        began = time.monotonic()
        receipt = await self._bus.write(memory)
        self._note("put", room, table, id, receipt.version, content, began)

    async def _update(self, room: DemoRoom, id: str, content: dict[str, Any]) -> None:
        # The messages are in the store, but the facts may be in another batch that is not committed yet.
        while True:
            try:
                receipt = await self._bus.update(id, content=content)
            except MemoryNotFound:
                await asyncio.sleep(0.05)
            else:
                break
        self._note("update", room, "facts", id, receipt.version, content, 0.0)

    async def _delete(self, room: DemoRoom, id: str) -> None:
        while (receipt := await self._bus.delete(id)) is None:  # noqa: ASYNC110 (others write it)
            await asyncio.sleep(0.05)
        self._note("delete", room, "facts", id, receipt.version, None, 0.0)

    def _note(
        self, op: str, room: DemoRoom, table: str, id: str, version: object, content: Any, began: float
    ) -> None:
        self.acknowledged.append(
            {
                "op": op,
                "room": room.name,
                "table": table,
                "id": id,
                "version": str(version),
                "content": content,
                "began": began,
                "acknowledged": time.monotonic(),
            }
        )
        if len(self.acknowledged) >= self._told + 20:
            self._told = len(self.acknowledged)
            say({"progress": self._told})

    async def verify(self) -> dict[str, Any]:
        """What this agent sees of every room, wherever its answers come from."""
        sources: dict[str, int] = {"local": 0, "shared": 0, "store": 0}
        seen: dict[str, list[str]] = {}

        async def look(room: DemoRoom) -> None:
            async with self._places:
                context = await self._bus.context(room=room.name, entity=room.entity)
                listings = [*context]
                tables = ("messages", "facts", "drafts")
                listings += [await self._bus.recent(table, room=room.name, limit=20) for table in tables]
                single = [await self._bus.get(id) for id in room.ids()]
            for listing in listings:
                sources[listing.source] += 1
            digests = [digest(listing) for listing in listings]
            seen[room.name] = [*digests, *(digest([m] if m else []) for m in single)]

        await asyncio.gather(*(look(room) for room in self._rooms))
        return {"verified": seen, "sources": sources, "stats": asdict(self._bus.stats())}


def say(value: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


async def main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    part = Role(**orjson.loads(await reader.readline()))
    async with connect() as bus:
        agent = Agent(bus, part)
        say("ready")
        await reader.readline()
        await agent.converse()
        say(
            {
                "done": {
                    "acknowledged": agent.acknowledged,
                    "drops": agent.drops,
                    "stats": asdict(bus.stats()),
                }
            }
        )
        while await reader.readline():
            say(await agent.verify())


if __name__ == "__main__":
    from ..console import set_up_logging

    set_up_logging()
    asyncio.run(main())
