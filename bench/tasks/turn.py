"""A turn of an agent: a context, a message, two contexts more, and every fifth time a fact; two processes share rooms.

The agents read the same conversation that they write, so a high hit rate of unchanged data does not help. talker.py
says what is counted of every answer; contexts.py has the contestants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import orjson

from ..contexts import KEEPERS, prepare, title
from ..measure import OURS, Result, interleave, percentile
from ..party import Party, PartyFailed
from ..talker import Record
from ..world import World

PROCESSES = 2
AGENTS = (1, 4, 16, 64)
"""Agents in each process."""
THINK = 0.1
"""Seconds between an agent's turns, on average."""
WARM = 0.3
SOME = ("mnemobus", "psycopg", "plain-redis")
"""The contestants of a quick run."""


class Team:
    """The processes of one contestant."""

    def __init__(self, who: str, parties: list[Party]) -> None:
        self.title = title(who)
        self.total = Record()
        self._parties = parties

    async def talk(self, agents: int, seconds: float, think: float) -> Record:
        """Have this many agents of each process take turns, two in a room: one of each process."""
        found = await asyncio.gather(
            *(
                party.ask(
                    "talk",
                    [(f"{agents}-{n}", f"{agents}-{process}-{n}") for n in range(agents)],
                    WARM,
                    seconds,
                    think,
                )
                for process, party in enumerate(self._parties)
            )
        )
        record = Record()
        for part in found:
            record.add(Record(**part))
        self.total.add(record)
        return record

    @property
    def words(self) -> str:
        t = self.total
        return (
            f"{self.title}: of {t.reads:,} contexts {t.lacking:,} lacked an own write, {t.back:,} went back"
        )


async def gathered(world: World, stack: AsyncExitStack) -> tuple[dict[str, Team], dict[str, str]]:
    """Every contestant with its processes, open; and why others can't take part."""
    settings = world.settings("postgres")
    stack.enter_context(world.workers(settings))
    database = world.database()
    await asyncio.to_thread(prepare, database)
    teams: dict[str, Team] = {}
    absent: dict[str, str] = {}
    for who in SOME if world.quick else KEEPERS:
        place = {"redis_url": world.redis_url, "database_url": database, "prefix": f"talk-{who}"}
        arguments = who, orjson.dumps(place).decode()
        made = [
            Party("bench.talker", *arguments, environment=settings.environment()) for _ in range(PROCESSES)
        ]
        parties = await asyncio.gather(*(stack.enter_async_context(party) for party in made))
        try:
            await asyncio.gather(*(party.ask("open") for party in parties))
        except PartyFailed as error:
            if "Unfit" not in str(error):
                raise
            absent[title(who)] = str(error)
        else:
            teams[who] = Team(who, parties)
    return teams, absent


async def run(world: World) -> list[Result]:
    results: list[Result] = []
    async with AsyncExitStack() as stack:
        teams, absent = await gathered(world, stack)
        for agents in AGENTS[1:2] if world.quick else AGENTS:
            results += await _of(world, teams, agents)
    results.append(kept("turn", teams))
    for result in results:
        result.absent.update(absent)
    results[0].notes += [
        f"in each room an agent of each of {PROCESSES} processes; {THINK * 1000:.0f} ms to think, on average;"
        " PostgreSQL with fsync, one worker process. A turn is the sum of its calls. Answers stay in the form that each"
        " library gives them",
        f"{title('plain-redis')} and {title('redis-py')} have no database: what they answer is lost with Redis, and"
        " what is older than a list is long has gone",
    ]
    return results


async def _of(world: World, teams: dict[str, Team], agents: int) -> list[Result]:
    who = "1 agent a process" if agents == 1 else f"{agents} agents a process"
    middle = Result("turn", f"a turn, {who}, p50", "ms")
    tail = Result("turn", f"a turn, {who}, p99", "ms")
    own = Result("turn", f"the context after an own message, {who}, p50", "us")
    seconds = world.some(5, 2) / 2 if agents == 1 else world.some(2, 1) / 2  # few agents take few turns
    records = await taken(teams, agents, seconds, THINK, world.rounds(3, 1))
    fill(middle, records, lambda record: percentile(record.turns, 0.5) / 1e3)
    fill(tail, records, lambda record: percentile(record.turns, 0.99) / 1e3)
    fill(own, records, lambda record: percentile(record.own, 0.5))
    middle.at_most(0.3, title("psycopg"))
    middle.at_most(1, title("plain-redis"))
    tail.at_most(0.8, title("psycopg"))
    own.within(15)
    return [middle, tail, own]


async def taken(
    teams: dict[str, Team], agents: int, seconds: float, think: float, rounds: int
) -> dict[str, list[Record]]:
    """The results of the turns of every contestant, round by round."""
    turns = {team.title: partial(team.talk, agents, seconds, think) for team in teams.values()}
    return await interleave(turns, rounds, warm=False)


def fill(result: Result, records: dict[str, list[Record]], figure: Callable[[Record], float]) -> None:
    result.samples = {name: [figure(record) for record in rounds] for name, rounds in records.items()}


def kept(task: str, teams: dict[str, Team]) -> Result:
    """How many answers of a task lacked an own write or went back; ours must have none."""
    result = Result(task, "contexts that lack an own write, or go back", "contexts")
    for team in teams.values():
        total = team.total
        result.samples[f"{team.title}, lacking"] = [float(total.lacking)]
        result.samples[f"{team.title}, back"] = [float(total.back)]
        result.notes.append(team.words)
    for what in ("lacking", "back"):
        result.within(0, f"{OURS}, {what}")
    return result
