"""Agents converse in ten rooms, in three processes: how much a process answers itself, and how much of that is stale.

For all contestants, an answer is stale if it lacks a write from before the read began. Two bounds are counted: whether
the write was acknowledged by then, and whether it was known to be visible for more than MAX_STALENESS, which is
mnemobus's promise (G5). A listing's version is the number of its newest memory; see speaker.py.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ..measure import OURS, Result, Spread, Target
from ..party import Party, PartyFailed
from ..speaker import FACTS, MESSAGES, Line, Read, Write
from ..world import WORDS, World

FILE = Path(__file__).parents[2].parent / "shared" / "data" / "locomo10.jsonl"
"""A file beside the checkout; BENCH_CONVERSATIONS names another."""
PROCESSES = 3
PAUSE = 0.02
"""Seconds between a turn and the next one in its room. Agents that ask a model take seconds."""
MANY, FEW = 100, 20
"""Numbers of entries that each process may keep."""
COMMITTED = "mnemobus, writes await the commit"
ALTERNATIVES = ("cashews", "redis-py", "aiocache", "plain-redis")
BOUNDED = ALTERNATIVES[:2]
"""The contestants whose caches can be bounded."""


@dataclass
class Tally:
    """Reads of one contestant in one round.

    stale      lacked a write that was acknowledged before the read began
    behind     lacked one that was known to be visible to all before the read began
    beyond     lacked one that had been visible to all for longer than the promise
    own        lacked one of the same process
    marked     were marked stale
    """

    reads: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    good_hits: int = 0
    stale: int = 0
    behind: int = 0
    beyond: int = 0
    own: int = 0
    marked: int = 0

    def add(self, other: Tally) -> None:
        for name in ("reads", "good_hits", "stale", "behind", "beyond", "own", "marked"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sources.update(other.sources)


class Contestant:
    def __init__(self, name: str, parties: list[Party], max_staleness: float) -> None:
        self.name = name
        self._parties = parties
        self._bound = int(max_staleness * 1e9)
        self._writes: dict[str, list[tuple[int, Write]]] = defaultdict(list)
        self.rounds: list[Tally] = []

    async def replay(self, rooms: list[list[Line]]) -> None:
        """Take these turns: within a room one after the other, all rooms at the same time."""

        async def converse(first: int, lines: list[Line]) -> None:
            for turn, line in enumerate(lines, first):
                await self._parties[turn % PROCESSES].ask("turn", list(line))
                await asyncio.sleep(PAUSE)

        await asyncio.gather(*(converse(n, lines) for n, lines in enumerate(rooms)))
        reads: list[tuple[int, Read]] = []
        for process, party in enumerate(self._parties):
            read, written = await party.ask("records")
            reads += [(process, Read(*fields)) for fields in read]
            for fields in written:
                write = Write(**fields)
                self._writes[write.listing].append((process, write))
        self.rounds.append(self._judge(reads))

    def _judge(self, reads: list[tuple[int, Read]]) -> Tally:
        tally = Tally(len(reads))
        for process, read in reads:
            missed = [
                (writer, write)
                for writer, write in self._writes[read.listing]
                if write.number > read.version and write.acknowledged < read.began
            ]
            tally.sources[read.source] += 1
            tally.marked += read.marked
            tally.stale += bool(missed)
            tally.good_hits += read.source == "local" and not missed
            tally.behind += any(write.committed < read.began for _, write in missed)
            tally.beyond += any(write.committed < read.began - self._bound for _, write in missed)
            tally.own += not read.marked and any(writer == process for writer, _ in missed)
        return tally

    @property
    def total(self) -> Tally:
        total = Tally()
        for tally in self.rounds:
            total.add(tally)
        return total


async def run(world: World) -> list[Result]:
    rooms, which = conversations()
    rounds, lines = world.rounds(3, 1), world.some(70, 20)
    hits = Result("conversation", "answered by the process itself, and not stale", "%")
    tight = Result("conversation", f"the same, with room for {FEW} results", "%")
    tiers = Result("conversation", "answers by tier", "%")
    stale = Result("conversation", "answers that lack a write acknowledged before the read began", "%")
    everyone = [OURS, COMMITTED, *ALTERNATIVES]
    sizes = ((hits, MANY, everyone), (tight, FEW, [OURS, *BOUNDED]))
    for result, entries, names in sizes[:1] if world.quick else sizes:
        contestants = await _replay(world, rooms, entries, names, rounds, lines, result.absent)
        for c in contestants:
            result.samples[c.name] = [100 * t.good_hits / t.reads for t in c.rounds]
            if c.name not in (OURS, COMMITTED):
                _above(result, c.name)
        if result is hits:
            for c in contestants:
                stale.samples[c.name] = [100 * t.stale / t.reads for t in c.rounds]
                sources = ("local", "shared", "store") if c.name == OURS else ("local",)
                for source in sources:
                    tiers.samples[f"{c.name}, {source}"] = [
                        100 * t.sources[source] / t.reads for t in c.rounds
                    ]
        for c in contestants:
            stale.notes.append(f"{c.name}, {entries} entries: {_words(c)}")
            if c.name in (OURS, COMMITTED):
                broken = Spread.of([float(c.total.beyond + c.total.own)])  # in all rounds: one is too many
                what = f"{c.name}, {entries} entries: answers that break a promise"
                stale.targets.append(Target(what, broken, 0))
    hits.notes += [
        f"{which}; in each of {rounds} rounds the next {lines} lines of each room, {PAUSE * 1000:.0f} ms between two"
        f" turns of a room, every turn in the next of {PROCESSES} processes, with room for {MANY} entries in each"
        " (aiocache has no bound)",
        f"a turn reads the room's newest {MESSAGES} messages and the {FACTS} newest facts about the speaker, then"
        " writes; each read counts by itself. A fact is written without a read",
        "all that is read is 10 listings of messages and 20 of facts: with room for all, every cache that drops"
        " only what was written has the same hits",
    ]
    tiers.notes.append(
        'a local answer may be stale: aiocache\'s high share is one of copies that nobody dropped; "shared" is Redis'
    )
    tight.notes.append("fewer entries than listings; aiocache can't be bounded, plain Redis keeps nothing")
    return [hits, tiers, stale] if world.quick else [hits, tight, tiers, stale]


def _above(result: Result, other: str) -> None:
    """Our share must not be lower than the other's, in points."""
    pairs = zip(result.samples[OURS], result.samples[other], strict=True)
    points = Spread.of([ours - theirs for ours, theirs in pairs])
    result.targets.append(Target(f"{OURS} - {other}, in points", points, 0, "at least"))


async def _replay(
    world: World,
    rooms: list[list[Line]],
    entries: int,
    names: list[str],
    rounds: int,
    count: int,
    absent: dict[str, str],
) -> list[Contestant]:
    """Have contestants replay the beginning of the conversations, in turns, some lines of each room per round."""
    from ..alternatives import load

    settings = world.settings("postgres", local_max_entries=entries)
    contestants: list[Contestant] = []
    with world.workers(settings):
        async with AsyncExitStack() as stack:
            for name in names:
                if name in (OURS, COMMITTED):
                    title, who = name, "mnemobus"
                    arguments: list[Any] = ["committed" if name == COMMITTED else "logged"]
                else:
                    title, who = load(name).name, name
                    arguments = [settings.redis_url, f"{settings.redis_key_prefix}-{name}", entries]
                parties = [
                    Party(
                        "bench.speaker",
                        who,
                        orjson.dumps(arguments).decode(),
                        environment=settings.environment(),
                    )
                    for _ in range(PROCESSES)
                ]
                await asyncio.gather(*(stack.enter_async_context(party) for party in parties))
                try:
                    await asyncio.gather(*(party.ask("open") for party in parties))
                except PartyFailed as error:
                    if "Unfit" not in str(error):
                        raise
                    absent[title] = str(error)
                else:
                    contestants.append(Contestant(title, parties, settings.max_staleness))
            for round in range(rounds):
                first = round % len(contestants)
                for contestant in contestants[first:] + contestants[:first]:
                    own = f"{contestants.index(contestant)}:"  # the two of mnemobus share its store
                    stretch = slice(round * count, (round + 1) * count)
                    await contestant.replay(
                        [
                            [
                                line._replace(room=own + line.room, entity=own + line.entity)
                                for line in lines[stretch]
                            ]
                            for lines in rooms
                        ]
                    )
    return contestants


def _words(contestant: Contestant) -> str:
    t = contestant.total
    return (
        f"{t.reads:,} reads; {t.stale:,} lacked a write that was acknowledged, {t.behind:,} one that"
        f" was known to be visible, {t.beyond:,} one that had been for more than the promise; {t.own:,} one of their"
        " own process" + (f"; {t.marked:,} were marked stale" if t.marked else "")
    )


def conversations() -> tuple[list[list[Line]], str]:
    """The lines of ten rooms in their order, and a description of them."""
    path = Path(os.environ.get("BENCH_CONVERSATIONS") or FILE)
    rooms: dict[str, list[Line]] = defaultdict(list)
    if path.exists():
        for text in path.read_bytes().splitlines():
            record = orjson.loads(text)
            lines = rooms[record["room"]]
            # Different people of the same first name are in several of the rooms.
            entity = f"{record['room']}/{record['entity']}"
            lines.append(Line(record["table"], record["room"], entity, len(lines), record["content"]["text"]))
        return list(rooms.values()), f"the ten conversations of {path.name}"
    return _generated(), f"ten generated conversations ({path.name} is not there)"


def _generated() -> list[list[Line]]:
    """Of the same shape: about 590 messages and 67 facts in each room, the facts after each sitting."""
    say = random.Random(1)
    rooms = []
    for n in range(10):
        room, lines = f"room-{n}", list[Line]()
        people = [f"{room}/ann", f"{room}/bob"]

        def add(table: str, entity: str, words: int, room: str = room, lines: list[Line] = lines) -> None:
            text = " ".join(say.choice(WORDS) for _ in range(words))
            lines.append(Line(table, room, entity, len(lines), text))

        for _ in range(27):
            for turn in range(say.randint(16, 28)):
                add("messages", people[turn % 2], say.randint(8, 40))
            for _ in range(say.randint(1, 4)):
                add("facts", say.choice(people), say.randint(8, 16))
        rooms.append(lines)
    return rooms
