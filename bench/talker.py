"""A process whose agents take turns: a context, a message, two contexts more, and every fifth time a fact.

`python -m bench.talker <who> <place>`, called through party.py; ``who`` is one of `contexts.KEEPERS`. Two such
processes share the rooms. Wrong answers are counted, by the same rules for all contestants:

lacking  the answer lacks an earlier write of the same agent
back     it lacks a memory that an earlier answer to the same agent had, and has an older one than that
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from .contexts import FACTS, KEEPERS, MESSAGES, Found, Keeper
from .party import moment, serve

TEXT = "nobody said so when the soup was served in the kitchen, but it was as salty as on the day before; who made it?"
"""The text of a message: as long as people's messages are."""


@dataclass
class Record:
    """The results of some turns; times in microseconds.

    turns    a whole turn, without the time to think
    own      the context after the agent's own message
    both     that message and that context together
    reads    the number of contexts
    lacking  how many of them lacked an own write; ``back``: how many went back; see the module
    """

    turns: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    reads: int = 0
    lacking: int = 0
    back: int = 0

    def add(self, other: Record) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def made_id() -> str:
    """A UUID; those of one machine sort by when they were made."""
    return str(uuid.UUID(int=(moment() // 1_000) << 80 | 7 << 76 | 2 << 62 | secrets.randbits(60)))


def lacks(found: Sequence[str], own: str, limit: int) -> bool:
    """Whether a listing lacks an own memory that it should have: only newer memories may have pushed it out."""
    return bool(own) and own not in found and (len(found) < limit or min(found) < own)


def goes_back(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether a listing, newest first, lacks a memory of an earlier one, and has an older one of it."""
    there = [id in now for id in before]
    return True in there and False in there[: len(there) - there[::-1].index(True)]


class Agent:
    """One agent, in one room. It remembers what it wrote last, and what it read last."""

    def __init__(self, keeper: Keeper, room: str, name: str) -> None:
        self._keeper = keeper
        self._room, self._name = room, name
        self._said = self._noted = ""
        self._shown: Found = (), ()
        self._turns = 0

    async def turn(self) -> Record:
        record = Record()
        self._turns += 1
        took = await self._read(record)
        wrote = await self._say()
        own = await self._read(record)
        took += wrote + own + await self._read(record)
        if self._turns % 5 == 0:
            took += await self._note()
        record.both.append(wrote + own)
        record.own.append(own)
        record.turns.append(took)
        return record

    async def _read(self, record: Record) -> float:
        began = time.perf_counter()
        answer = await self._keeper.context(self._room, self._name)
        took = time.perf_counter() - began
        found = self._keeper.ids(answer)
        record.reads += 1
        record.lacking += lacks(found[0], self._said, MESSAGES) or lacks(found[1], self._noted, FACTS)
        record.back += any(goes_back(*pair) for pair in zip(self._shown, found, strict=True))
        self._shown = found
        return took * 1e6

    async def _say(self) -> float:
        id, content = made_id(), self._content()
        began = time.perf_counter()
        await self._keeper.say(self._room, self._name, id, content)
        self._said = id
        return (time.perf_counter() - began) * 1e6

    async def _note(self) -> float:
        id, content = made_id(), self._content()
        began = time.perf_counter()
        await self._keeper.note(self._room, self._name, id, content)
        self._noted = id
        return (time.perf_counter() - began) * 1e6

    def _content(self) -> dict[str, Any]:
        return {"text": TEXT, "n": self._turns}


class Talkers:
    """The agents of this process."""

    def __init__(self, who: str, place: dict[str, str], stack: AsyncExitStack) -> None:
        self._keeper: Keeper = KEEPERS[who](place)
        self._stack = stack
        self._agents: dict[str, Agent] = {}

    async def open(self) -> None:
        await self._keeper.open(self._stack)

    async def talk(
        self, places: list[tuple[str, str]], warm: float, seconds: float, think: float
    ) -> dict[str, Any]:
        """Have agents, each given by its room and its name, take turns for some time. For turns that end in the first
        ``warm`` seconds, the times do not count, but the answers do."""
        record = Record()
        counts = time.perf_counter() + warm
        ends = counts + seconds

        async def live(agent: Agent) -> None:
            await asyncio.sleep(random.uniform(0, think))
            while time.perf_counter() < ends:
                taken = await agent.turn()
                if time.perf_counter() < counts:
                    taken = replace(taken, turns=[], own=[], both=[])
                record.add(taken)
                await asyncio.sleep(think * random.uniform(0.5, 1.5))

        await asyncio.gather(*(live(self._agent(*place)) for place in places))
        return vars(record)

    def _agent(self, room: str, name: str) -> Agent:
        agent = self._agents.get(f"{room}/{name}")
        if agent is None:
            agent = self._agents[f"{room}/{name}"] = Agent(self._keeper, room, name)
        return agent


async def main(who: str, place: dict[str, str]) -> None:
    async with AsyncExitStack() as stack:
        await serve(Talkers(who, place, stack))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], orjson.loads(sys.argv[2])))
