"""``mnemobus verify``: do agents hold copies that are older than what was invalidated?

It watches the feed. For a sample of the invalidated scopes it notes what the store has at that moment. At each *mark*
(1, 5 and 10 s later) it asks every live agent what hits on that scope would give there. There is no register of agents:
an agent is live if it listens on a channel of its own, as every bus does. An agent that does not answer is silent,
which is not the same as consistent.

An agent may hold what the store had then, or newer data. A copy that equals neither the store's answer then nor its
answer now is judged by versions (see `is_older`).

It writes nothing, and costs little on a busy bus: it follows a few scopes a second, fewer if there are many agents.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from ..cache.query import Question, Versions, versions_of
from ..connection.server_errors import AWAY, DENIED, SENSELESS, code_of, meaning
from ..errors import LogUnavailable, StoreUnavailable
from ..feed.audit import Holding, Inquiry, decode_holding, encode_inquiry
from ..feed.messages import Invalidation
from ..keys import Keyspace, Version
from ..records import Row
from ..settings import Settings, hide_password
from ..store import Cursor, Query, Reader, open_reader
from ..tasks import end
from .console import emit, err, out, run_until_signal
from .inspection import ask, keyspace, looking_at, text
from .tail import Tail

ASKED_AFTER = (1.0, 5.0, 10.0)
"""Seconds after an invalidation at which agents are asked."""
ANSWER_PATIENCE = 2.0
"""Seconds that an agent has to answer."""
NOTED_ROWS = 200
"""Memories of a scope, the newest, that are noted when it is invalidated."""
_SCOPES_A_SECOND = 5.0
_QUESTIONS_A_SECOND = 200.0
_BURST = 20.0
"""How many scopes may begin to be followed at the same time."""
_SHOWN = 20
"""How many older copies are shown one by one."""


def run(
    *, seconds: float, json: bool, marks: Sequence[float] = ASKED_AFTER, patience: float = ANSWER_PATIENCE
) -> int:
    return run_until_signal(_main(Settings.load(), seconds, json, marks, patience))


async def _main(
    settings: Settings, seconds: float, json: bool, marks: Sequence[float], patience: float
) -> int:
    reader = open_reader(settings, create=False)
    try:
        await reader.open()
        async with looking_at(settings) as client:
            verifier = Verifier(settings, client, reader, marks, patience)
            try:
                await verifier.run(seconds)
            except asyncio.CancelledError:
                if _tell(verifier.report(), json):
                    raise
                return 1
            return 0 if _tell(verifier.report(), json) else 1
    finally:
        await reader.close()


@dataclass(slots=True)
class Mark:
    """The agents' answers at one mark.

    asked expected answers: one for each agent and scope
    consistent  those without an older copy
    held        of these, those with any copy at all
    older       those with an older copy
    silent      answers that did not come
    """

    seconds: float
    asked: int = 0
    consistent: int = 0
    held: int = 0
    older: int = 0
    silent: int = 0


@dataclass(frozen=True, slots=True)
class Truth:
    """The store's memories under a scope, right after an invalidation.

    rows    newest first, at most `NOTED_ROWS`
    whole   whether these are all
    at      the ID of the invalidation: an event with a higher version was logged after it was sent
    """

    rows: list[Row]
    whole: bool
    at: Version

    @classmethod
    async def of(cls, scope: str, at: Version, reader: Reader) -> Truth:
        kind, table, name = (*scope.split(":", 2), "", "")[:3]
        if kind == "id":
            row = await reader.get(table)
            return cls([] if row is None else [row], True, at)
        if kind not in ("room", "entity", "agent", "world"):
            raise ValueError(f"{scope!r} is not a scope")
        by = {kind: name}
        query = Query(table, by.get("room"), by.get("agent"), by.get("entity"), by.get("world"))
        rows = await reader.recent(query, NOTED_ROWS)
        rows = [row._replace(content=b"", metadata=b"", embedding=None) for row in rows]
        return cls(rows, len(rows) < NOTED_ROWS, at)

    def answer(self, question: Question) -> Versions | None:
        """What the store would have answered then; None if the rows can't tell."""
        query = question.query
        if query is None:
            return versions_of(self.rows)
        rows = [row for row in self.rows if _matches(row, query)]
        if question.kind == "count":
            return len(rows) if self.whole else None
        if query.after is not None and query.before is None:
            return versions_of(rows[-question.limit :]) if self.whole else None
        return versions_of(rows[: question.limit]) if self.whole or len(rows) >= question.limit else None


def _matches(row: Row, query: Query) -> bool:
    place = Cursor(row.created_us, row.id)
    return (
        (query.room is None or row.room == query.room)
        and (query.agent is None or row.agent == query.agent)
        and (query.entity is None or row.entity == query.entity)
        and (query.world is None or row.world == query.world)
        and (query.before is None or place < query.before)
        and (query.after is None or place > query.after)
    )


def is_older(copy: Versions, then: Versions | None, now: Versions, truth: Truth) -> bool:
    """Whether a copy is older than what the store had then.

    then, now the store's answers to the same query: right after the invalidation, and after the agent's answer
    """
    if copy in (then, now):
        return False
    if isinstance(copy, int) or isinstance(now, int) or isinstance(then, int):
        return then == now  # else it may be the count of a moment between
    had = {row.id: row.version for row in truth.rows}
    if any(id in had and version < had[id] for id, version in copy):
        return True
    ids, left = {id for id, _ in copy}, {id for id, _ in now}
    if then is not None and any(id in left and id not in ids for id, _ in then):
        return True  # it lacks a memory that existed then, and still exists
    # It has a memory that was gone by then.
    return truth.whole and any(
        id not in had and id not in left and version <= truth.at for id, version in copy
    )


class _Asked:
    """A question to agents, and their answers so far."""

    def __init__(self, agents: Sequence[str]) -> None:
        self.left = set(agents)
        self.answers: dict[str, Holding] = {}
        self.done = asyncio.Event()

    def take(self, answer: Holding) -> None:
        if answer.agent in self.left:
            self.left.discard(answer.agent)
            self.answers[answer.agent] = answer
            if not self.left:
                self.done.set()


class Verifier:
    """One run of ``mnemobus verify``."""

    def __init__(
        self,
        settings: Settings,
        client: redis.asyncio.Redis,
        reader: Reader,
        marks: Sequence[float],
        patience: float,
    ) -> None:
        self._settings = settings
        self._client = client
        self._reader = reader
        self._patience = patience
        self._keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
        self._channel = self._keys.verify_channel(secrets.token_hex(8))
        self._numbers = count(1)
        self._open: dict[int, _Asked] = {}
        self._hearing = asyncio.Event()
        self._lost = 0
        """How often the connection for answers broke: answers to earlier questions may have been lost."""
        self._sending = asyncio.Lock()
        self._agents: tuple[float, list[str]] = (0.0, [])
        self._purse = _BURST
        self._filled = time.monotonic()
        self._following: set[asyncio.Task[None]] = set()
        self._began = time.monotonic()
        self._watched: float | None = None
        self._stop = asyncio.Event()
        self.watching = asyncio.Event()
        self.marks = [Mark(seconds) for seconds in sorted(marks)]
        self.scopes = 0
        self.followed = 0
        self.unknown = 0
        self.seen: set[str] = set()
        self.silent: dict[str, int] = {}
        self.older: list[dict[str, Any]] = []

    async def run(self, seconds: float) -> None:
        """Watch for ``seconds``, or until `stop`; then finish the scopes that are followed."""
        listening = asyncio.create_task(self._listen())
        try:
            tail = Tail(self._settings, events=False, invalidations=True)
            try:
                self._keys = await keyspace(self._client, self._settings)
                await tail.begin(self._client, None)
                agents = await self._live()
                async with asyncio.timeout(self._settings.redis_timeout):
                    await self._hearing.wait()
            except (*AWAY, RedisError) as error:
                if code_of(error) in DENIED:
                    raise
                where = hide_password(self._settings.redis_url)
                raise LogUnavailable(f"Redis at {where} can't be asked: {meaning(error)}") from None
            err().print(
                f"watching the feed for {seconds:g} s; {_many(len(agents), 'agent')} there", style="dim"
            )
            self._began = time.monotonic()
            self.watching.set()
            watch = asyncio.create_task(self._watch(tail))
            stop = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait([watch, stop], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                self._watched = time.monotonic() - self._began
            finally:
                await end([watch, stop])
            if not watch.cancelled():
                watch.result()
            if self._following:
                err().print(f"seeing {_many(len(self._following), 'scope')} to the end", style="dim")
                await asyncio.wait(self._following)
        finally:
            await end([listening, *self._following])

    def stop(self) -> None:
        """End the watching."""
        self._stop.set()

    # Which scopes are followed

    async def _watch(self, tail: Tail) -> None:
        away = False
        while True:
            try:
                items = await tail.next(self._client)
                away = False
            except (*AWAY, RedisError) as error:
                if not away:
                    away = True
                    err().print(
                        f"Redis does not answer ({meaning(error)}); waiting for it",
                        style="yellow",
                        markup=False,
                    )
                await asyncio.sleep(0.5)
                continue
            for _, item, _ in items:
                if isinstance(item, Invalidation):
                    for scope in random.sample(item.scopes, len(item.scopes)):
                        self.scopes += 1
                        if self._affords():
                            self._follow(scope, item.id)

    def _affords(self) -> bool:
        now = time.monotonic()
        questions = max(len(self._agents[1]), 1) * len(self.marks)
        rate = min(_SCOPES_A_SECOND, _QUESTIONS_A_SECOND / questions)
        self._purse = min(self._purse + (now - self._filled) * rate, _BURST)
        self._filled = now
        if self._purse < 1:
            return False
        self._purse -= 1
        return True

    def _follow(self, scope: str, at: Version) -> None:
        self.followed += 1
        task = asyncio.create_task(self._see(scope, at, time.monotonic()))
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _see(self, scope: str, at: Version, since: float) -> None:
        """Follow one scope from its invalidation to the last mark."""
        left = len(self.marks)
        try:
            truth = await Truth.of(scope, at, self._reader)
            for mark in self.marks:
                await asyncio.sleep(max(since + mark.seconds - time.monotonic(), 0))
                answers = await self._ask(scope)
                for agent, answer in answers.items():
                    await self._judge(mark, scope, truth, agent, answer)
                left -= 1
        except (*AWAY, RedisError, StoreUnavailable, ValueError):
            self.unknown += left

    # What agents answer

    async def _live(self) -> list[str]:
        """The ids of the live agents."""
        asked, agents = self._agents
        if time.monotonic() - asked > 0.2:
            prefix = self._keys.agent_channel("")
            channels = await self._client.execute_command("PUBSUB", "CHANNELS", prefix + "*")
            agents = [text(channel).removeprefix(prefix) for channel in channels]
            self._agents = (time.monotonic(), agents)
            self.seen.update(agents)
        return agents

    async def _ask(self, scope: str) -> dict[str, Holding | None]:
        """What each live agent holds under a scope; None for a silent agent. One of AWAY if that can't be found out."""
        async with asyncio.timeout(self._patience):
            await self._hearing.wait()
        lost = self._lost
        number = next(self._numbers)
        question = encode_inquiry(Inquiry(number, scope, self._channel))
        try:
            async with self._sending:
                agents = await self._live()
                asked = self._open[number] = _Asked(agents)
                heard = await ask(
                    self._client, [("PUBLISH", self._keys.agent_channel(id), question) for id in agents]
                )
            asked.left -= {id for id, n in zip(agents, heard, strict=True) if n == 0}  # it has just gone
            if asked.left:
                try:
                    async with asyncio.timeout(self._patience):
                        await asked.done.wait()
                except TimeoutError:
                    self._agents = (0.0, agents)
                    async with self._sending:
                        asked.left &= set(await self._live())  # one that is gone says nothing
        finally:
            self._open.pop(number, None)
        if asked.left and lost != self._lost:
            raise ConnectionError("answers may have been lost")
        return {**asked.answers, **dict.fromkeys(asked.left)}

    async def _listen(self) -> None:
        """Receive answers. A connection that breaks, or that brings something else than Redis's messages, is
        replaced."""
        while True:
            pubsub = self._client.pubsub()
            try:
                await pubsub.subscribe(self._channel)
                async for message in pubsub.listen():
                    if message["type"] == "subscribe":
                        self._hearing.set()
                    elif message["type"] == "message":
                        self._hear(message["data"])
            except AWAY:
                pass  # the reader of the feed reports it
            except (RedisError, *SENSELESS) as error:
                err().print(
                    f"the answers of agents can't be heard ({meaning(error)}); trying again",
                    style="yellow",
                    markup=False,
                )
            finally:
                self._hearing.clear()
                self._lost += 1
                await pubsub.aclose()
            await asyncio.sleep(0.2)

    def _hear(self, data: bytes) -> None:
        try:
            answer = decode_holding(data)
        except ValueError:
            return
        asked = self._open.get(answer.number)
        if asked is not None:
            asked.take(answer)

    # What that means

    async def _judge(self, mark: Mark, scope: str, truth: Truth, agent: str, answer: Holding | None) -> None:
        if answer is None:
            mark.asked += 1
            mark.silent += 1
            self.silent[agent] = self.silent.get(agent, 0) + 1
            return
        older: tuple[str, Versions, Versions] | None = None
        for field, copy in answer.holds.items() if answer.fresh else ():
            question = Question.shared(scope, field)
            then = truth.answer(question)
            if copy == then:
                continue
            now = versions_of(await question.ask(self._reader))
            if is_older(copy, then, now, truth):
                older = (field, copy, now)
                break
        mark.asked += 1
        if older is None:
            mark.consistent += 1
            mark.held += answer.fresh and bool(answer.holds)
            return
        mark.older += 1
        if len(self.older) < _SHOWN:
            field, copy, now = older
            self.older.append(
                {
                    "agent": agent,
                    "scope": scope,
                    "seconds": mark.seconds,
                    "query": field,
                    "position": None if answer.position is None else str(answer.position),
                    "copy": _shown(copy),
                    "store": _shown(now),
                }
            )

    def report(self) -> dict[str, Any]:
        """The whole report, in the form of --json."""
        last = self.marks[-1]
        # If no followed scope could be checked, nothing was verified.
        told = last.asked > 0 or self.unknown == 0
        watched = time.monotonic() - self._began if self._watched is None else self._watched
        return {
            "ok": last.older == last.silent == 0 and told,
            "seconds": round(watched, 1),
            "agents": len(self.seen),
            "scopes": self.scopes,
            "followed": self.followed,
            "unknown": self.unknown,
            "marks": [
                {**asdict(mark), "share": mark.consistent / mark.asked if mark.asked else None}
                for mark in self.marks
            ],
            "silent": self.silent,
            "older": self.older,
        }


def _shown(answer: Versions) -> Any:
    return answer if isinstance(answer, int) else {id: str(version) for id, version in answer[:_SHOWN]}


def _tell(report: dict[str, Any], json: bool) -> bool:
    """Print a report. Returns whether all agents were consistent."""
    if json:
        emit(report)
        return bool(report["ok"])

    def say(line: str, style: str = "") -> None:
        out().print(line, style=style, markup=False)

    say(
        f"watched {report['seconds']:g} s: {_many(report['scopes'], 'scope')} invalidated,"
        f" {report['followed']:,} followed, {_many(report['agents'], 'agent')}"
    )
    if not report["agents"]:
        say("no agent was there to be asked")
    elif not report["scopes"]:
        say("nothing was written meanwhile: nothing to verify")
    else:
        for mark in report["marks"]:
            say(
                f"{percent(mark['consistent'], mark['asked']):>9} consistent at {mark['seconds']:g} s"
                f" ({mark['consistent']:,} of {mark['asked']:,} answers, {mark['held']:,} with a copy;"
                f" {mark['older']:,} older, {mark['silent']:,} silent)",
                "red" if mark["older"] or mark["silent"] else "",
            )
    for agent, times in report["silent"].items():
        say(f"agent {agent} was silent {times:,} times: it is paused, busy or cut off", "red")
    for one in report["older"]:
        say(
            f"agent {one['agent']} held an older {one['query']} of {one['scope']} at {one['seconds']:g} s:"
            f" {one['copy']}; the store has {one['store']}",
            "red",
        )
    if report["unknown"]:
        say(f"{report['unknown']:,} times a check was not possible: Redis or the store was away", "yellow")
    return bool(report["ok"])


def percent(part: int, whole: int) -> str:
    """A share, rounded down: only all of them are 100 %."""
    if not whole:
        return "-"
    if part == whole:
        return "100 %"
    return f"{part * 100_000 // whole / 1000:.3f} %"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
