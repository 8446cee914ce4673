"""A process in which agents take turns in conversations: with mnemobus, or with an alternative.

`python -m bench.speaker <who> <arguments>`, called through party.py. A turn of the conversation is a read of the
context (the room's newest messages, the newest facts about the speaker) and the write of a message; a fact is only
written.

The records of reads and writes are enough to find stale answers by version: the version of a listing is the number of
its newest memory, and numbers rise in the order in which a room's memories are written.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import orjson

import mnemobus
from mnemobus import Memory

from .party import moment, serve

MESSAGES, FACTS = 5, 6


class Line(NamedTuple):
    """A line of a conversation; ``number`` is its place in the room."""

    table: str
    room: str
    entity: str
    number: int
    text: str

    @property
    def listing(self) -> str:
        """The scope of its reads: the messages of a room, or the facts about one entity."""
        return f"m:{self.room}" if self.table == "messages" else f"f:{self.entity}"


class Read(NamedTuple):
    """version: of the answer, -1 for an empty one; source: "local", or farther; marked: the answer said "stale"."""

    listing: str
    began: int
    version: int
    source: str
    marked: bool


@dataclass
class Write:
    """acknowledged: when `write` returned; committed: when it was known that every agent may see it."""

    listing: str
    number: int
    acknowledged: int
    committed: int


class Speaker(Protocol):
    async def open(self, stack: AsyncExitStack) -> None: ...
    async def read(self, line: Line) -> list[Read]: ...
    async def write(self, line: Line) -> Write: ...
    async def settle(self) -> None:
        """Nothing to do: the results of `write` say everything about the writes so far."""


class Mnemobus:
    """durability: as for `Bus.write`"""

    def __init__(self, durability: str) -> None:
        self._durability: Any = durability
        self._learning: set[asyncio.Task[None]] = set()

    async def open(self, stack: AsyncExitStack) -> None:
        self._bus = await stack.enter_async_context(mnemobus.connect())

    async def read(self, line: Line) -> list[Read]:
        began = moment()
        context = await self._bus.context(room=line.room, entity=line.entity, messages=MESSAGES, facts=FACTS)
        return [
            Read(
                listing,
                began,
                max((memory.content["n"] for memory in found), default=-1),
                found.source,
                found.stale,
            )
            for listing, found in (
                (f"m:{line.room}", context.messages),
                (f"f:{line.entity}", context.facts),
            )
        ]

    async def write(self, line: Line) -> Write:
        memory = Memory(
            table=line.table,
            room=line.room,
            entity=line.entity,
            agent="speaker",
            content={"text": line.text, "n": line.number},
        )
        receipt = await self._bus.write(memory, durability=self._durability)
        write = Write(line.listing, line.number, moment(), 0)
        task = asyncio.create_task(self._learn(receipt, write))
        self._learning.add(task)
        task.add_done_callback(self._learning.discard)
        return write

    async def _learn(self, receipt: mnemobus.Receipt, write: Write) -> None:
        await receipt.committed(30)
        write.committed = moment()

    async def settle(self) -> None:
        await asyncio.gather(*self._learning)


class Alternative:
    """One turn at a time: its misses in this process are counted before and after a read."""

    def __init__(self, name: str, redis_url: str, prefix: str, size: int) -> None:
        from .alternatives import Place, load

        self._it = load(name)(Place(redis_url=redis_url, prefix=prefix, size=size))
        self._turn = asyncio.Lock()

    async def open(self, stack: AsyncExitStack) -> None:
        await _call(self._it.open)
        stack.push_async_callback(_call, self._it.close)

    def _misses(self) -> int:
        """The source of a listing that no cache has yet is where it is loaded from."""
        source = getattr(self._it, "_source", None)
        return int(self._it.loads) + (0 if source is None else int(source.loads))

    async def read(self, line: Line) -> list[Read]:
        reads = []
        async with self._turn:
            for listing, room, limit in (
                (f"m:{line.room}", line.room, MESSAGES),
                (f"f:{line.entity}", f"facts:{line.entity}", FACTS),
            ):
                misses, began = self._misses(), moment()
                answer: Sequence[Any] = await _call(self._it.recent, room, limit)
                source = "local" if self._misses() == misses else "elsewhere"
                version = max((self._it.value(one)["n"] for one in answer), default=-1)
                reads.append(Read(listing, began, version, source, False))
        return reads

    async def write(self, line: Line) -> Write:
        from .alternatives import Item

        room = line.room if line.table == "messages" else f"facts:{line.entity}"
        async with self._turn:
            await _call(self._it.put, Item(room, str(uuid.uuid4()), {"text": line.text, "n": line.number}))
        at = moment()
        return Write(line.listing, line.number, at, at)

    async def settle(self) -> None:
        """It was known at once."""


async def _call(function: Any, *args: Any) -> Any:
    answer = function(*args)
    return await answer if inspect.isawaitable(answer) else answer


class Turns:
    def __init__(self, speaker: Speaker, stack: AsyncExitStack) -> None:
        self._speaker = speaker
        self._stack = stack
        self._reads: list[Read] = []
        self._writes: list[Write] = []

    async def open(self) -> None:
        await self._speaker.open(self._stack)

    async def turn(self, fields: list[Any]) -> None:
        line = Line(*fields)
        if line.table == "messages":
            self._reads += await self._speaker.read(line)
        self._writes.append(await self._speaker.write(line))

    async def records(self) -> list[Any]:
        """The reads and writes since the last call."""
        await self._speaker.settle()
        found = self._reads, self._writes
        self._reads, self._writes = [], []
        return [[list(read) for read in found[0]], found[1]]


async def main(who: str, arguments: list[Any]) -> None:
    speaker: Speaker = Mnemobus(*arguments) if who == "mnemobus" else Alternative(who, *arguments)
    async with AsyncExitStack() as stack:
        await serve(Turns(speaker, stack))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], orjson.loads(sys.argv[2])))
