"""``mnemobus demo``: the whole system at work, and the proof that it kept its promises.

Agents, each a process of its own (agent.py), hold the conversations of samples.py. They write down every write that
was acknowledged to them, and when a copy of theirs was dropped. Half way, one worker is killed. When all is quiet,
the store is read directly, past every cache, and two questions are asked:

- Is every acknowledged write in it, with its last value? What should be there is worked out from the writes alone,
  in the order of their versions.
- Does every agent see what the store has? Most of its answers are copies that it has kept from the conversations:
  if an invalidation had been lost, here is where it would show.

Propagation is measured from the moment that a write was acknowledged to its writer to the moment that a copy of the
room was dropped in another agent. All processes of a machine share the clock that is used.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
from redis.exceptions import RedisError

from ..connection import AWAY
from ..embedded import (
    Embedded,
    absolute,
    await_workers,
    check_store,
    end,
    free_port,
    log_tail,
    spawn,
    with_port,
)
from ..errors import MnemobusError, StoreUnavailable
from ..keys import Version, room_scope
from ..settings import Settings
from ..store import Query, open_reader
from .agent import Part, Room, digest, rooms_of
from .console import emit, err, out, run_until_signal
from .inspection import ask, keyspace, looking_at

WORKERS = 2
DEADLINE = 50.0
"""Seconds for the conversations of a demo of the usual size; a larger one gets more."""
QUIET = 20.0
"""Seconds that the log may take to be applied once nobody writes."""


@dataclass(slots=True)
class Summary:
    """What the demo tells in the end."""

    agents: int = 0
    rooms: int = 0
    writes: int = 0
    seconds: float = 0.0
    batches: int = 0
    events_per_batch: float = 0.0
    hits_local: int = 0
    hits_shared: int = 0
    misses: int = 0
    invalidations: int = 0
    drops: int = 0
    gaps: int = 0
    replays: int = 0
    worker_killed: bool = False
    propagation_samples: int = 0
    propagation_p50_ms: float = 0.0
    propagation_p99_ms: float = 0.0
    propagation_max_ms: float = 0.0
    dead_letters: int = 0
    compared: int = 0
    compared_local: int = 0
    writes_lost: int = 0
    agents_that_disagree: int = 0
    problems: list[str] = field(default_factory=list)
    ok: bool = False


def run(*, agents: int, writes: int, external: bool, wait: float, json: bool) -> int:
    work = _external(agents, writes, wait, json) if external else _embedded(agents, writes, json)
    return run_until_signal(work)


async def _embedded(agents: int, writes: int, json: bool) -> int:
    say = _teller(json)
    with tempfile.TemporaryDirectory(prefix="mnemobus-demo-", ignore_cleanup_errors=True) as directory:
        settings = absolute(
            Settings.load(
                redis_url=with_port("redis://127.0.0.1/0", free_port()),
                database_url=f"sqlite:///{directory}/memories.db",
                data_dir=Path(directory),
                durability="logged",
            )
        )
        system = Embedded(settings, processes=WORKERS, threads=2, on_step=say)
        async with system:
            return await _Demo(system.settings, agents, writes, json, system, Path(directory)).play()


async def _external(agents: int, writes: int, wait: float, json: bool) -> int:
    settings = absolute(Settings.load())
    say = _teller(json)
    try:
        async with asyncio.timeout(wait or None):
            say("waiting for Redis, the database and workers")
            while True:
                try:
                    await check_store(settings)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.5)
            await await_workers(settings)
    except TimeoutError:
        raise MnemobusError(
            f"Redis, the database and workers on every log partition were not there within {wait:g} s;"
            " `mnemobus doctor` tells what is missing"
        ) from None
    with tempfile.TemporaryDirectory(prefix="mnemobus-demo-", ignore_cleanup_errors=True) as directory:
        return await _Demo(settings, agents, writes, json, None, Path(directory)).play()


def _teller(json: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if not json:
            err().print(f"[dim]·[/dim] {text}", soft_wrap=True)

    return say


class _AgentProcess:
    """An agent, as the demo sees it."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number = number
        self.process = process
        self.progress = 0

    async def tell(self, value: Any) -> None:
        assert self.process.stdin is not None
        with suppress(ConnectionError):  # if it died, hearing nothing from it tells
            self.process.stdin.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
            await self.process.stdin.drain()

    async def hear(self) -> Any:
        """The next thing that it says; MnemobusError if it says no more."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise MnemobusError(f"agent {self.number} ended (status {await self.process.wait()})")
        return orjson.loads(line)

    async def hear_out(self) -> dict[str, Any]:
        """What it has to say when it is done, past all that it says on the way."""
        while True:
            said = await self.hear()
            if "done" in said:
                return dict(said["done"])
            self.progress = said["progress"]


class _Demo:
    def __init__(
        self,
        settings: Settings,
        agents: int,
        writes: int,
        json: bool,
        system: Embedded | None,
        directory: Path,
    ) -> None:
        self._settings = settings
        name = f"demo-{secrets.token_hex(3)}"
        self._parts = [Part(number, agents, writes, name) for number in range(agents)]
        self._rooms = rooms_of(self._parts[0])
        self._expected = sum(room.writes for room in self._rooms)
        self._json = json
        self._say = _teller(json)
        self._system = system
        self._log = directory / "agents.log"
        self._agents: list[_AgentProcess] = []
        self._summary = Summary(agents=agents, rooms=len(self._rooms))

    async def play(self) -> int:
        async with AsyncExitStack() as stack:
            try:
                await self._start_agents(stack)
                before = await self._meters()
                began = time.monotonic()
                reports = await self._converse()
                self._summary.seconds = round(time.monotonic() - began, 2)
                await self._await_quiet()
                await self._prove(reports)
                await self._count(reports, before)
            except MnemobusError as error:
                self._summary.problems.append(f"{error}{log_tail(self._log)}")
        summary = self._summary
        summary.ok = not summary.problems
        if self._json:
            emit(asdict(summary))
        else:
            _show(summary)
        return 0 if summary.ok else 1

    async def _start_agents(self, stack: AsyncExitStack) -> None:
        environment = os.environ | self._settings.environment()
        for part in self._parts:
            with self._log.open("ab") as log:
                process = await spawn(
                    [sys.executable, "-m", "mnemobus.cli.agent"],
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    limit=1 << 28,
                )
            stack.push_async_callback(end, process, 2.0)
            self._agents.append(_AgentProcess(part.number, process))
        for agent, part in zip(self._agents, self._parts, strict=True):
            await agent.tell(asdict(part))
        for agent in self._agents:
            await agent.hear()
        self._say(f"{len(self._agents)} agent processes")

    async def _converse(self) -> list[dict[str, Any]]:
        for agent in self._agents:
            await agent.tell("start")
        hearing = asyncio.gather(*(agent.hear_out() for agent in self._agents))
        deadline = DEADLINE * max(1.0, self._expected / 2_400)
        try:
            async with asyncio.timeout(deadline):
                await self._watch(hearing)
            return await hearing
        except TimeoutError:
            written = sum(agent.progress for agent in self._agents)
            raise MnemobusError(
                f"the conversations came to a halt: {written:,} of {self._expected:,} writes after {deadline:.0f} s"
            ) from None
        finally:
            hearing.cancel()
            with suppress(asyncio.CancelledError, MnemobusError):
                await hearing

    async def _watch(self, hearing: asyncio.Future[Any]) -> None:
        """Show how far they are, and kill a worker half way."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("  conversations"), BarColumn(), MofNCompleteColumn(), TextColumn("writes"))
        visible = err().is_terminal and not self._json
        with Progress(*columns, console=err(), disable=not visible, transient=True) as bar:
            task = bar.add_task("", total=self._expected)
            while not hearing.done():
                await asyncio.wait([hearing], timeout=0.05)
                written = sum(agent.progress for agent in self._agents)
                bar.update(task, completed=written)
                if written >= self._expected / 2 and self._system and not self._summary.worker_killed:
                    self._kill_a_worker(self._system, written)

    def _kill_a_worker(self, system: Embedded, written: int) -> None:
        pids = system.workers.pids()
        if not pids:
            return
        with suppress(ProcessLookupError):
            os.kill(pids[0], signal.SIGKILL)
            self._summary.worker_killed = True
            self._say(f"after {written:,} writes: killed worker process {pids[0]} (SIGKILL)")

    async def _meters(self) -> Counter[str]:
        """Events added and applied, and batches, over all log partitions; and dead letters."""
        totals: Counter[str] = Counter()
        try:
            async with looking_at(self._settings) as client:
                keys = await keyspace(client, self._settings)
                names = ("added", "applied", "batches")
                partitions = range(keys.log_partitions)
                replies = await ask(client, [("HMGET", keys.meter(p), *names) for p in partitions])
                for reply in replies:
                    totals.update(dict(zip(names, (int(n or 0) for n in reply), strict=True)))
                totals["dead"] = sum(await ask(client, [("XLEN", keys.dead(p)) for p in partitions]))
        except (*AWAY, RedisError) as error:
            raise MnemobusError(f"Redis can't be asked: {error}") from None
        return totals

    async def _await_quiet(self) -> None:
        deadline = time.monotonic() + QUIET
        while (meters := await self._meters())["applied"] < meters["added"]:
            if time.monotonic() > deadline:
                raise MnemobusError(
                    f"{meters['added'] - meters['applied']:,} events were not applied within {QUIET:g} s"
                )
            await asyncio.sleep(0.05)

    # The proof

    async def _prove(self, reports: list[dict[str, Any]]) -> None:
        writes = [write for report in reports for write in report["acknowledged"]]
        self._summary.writes = len(writes)
        if len(writes) != self._expected:
            self._summary.problems.append(f"{len(writes):,} writes were acknowledged, not {self._expected:,}")
        reader = open_reader(self._settings)
        await reader.open()
        try:
            stored = {room.name: await self._stored(reader, room) for room in self._rooms}
        finally:
            await reader.close()
        lost = _lost(writes, {row.id: row for rows, _ in stored.values() for row in rows})
        self._summary.writes_lost = len(lost)
        if lost:
            self._summary.problems.append(f"{len(lost):,} writes are lost, such as {'; '.join(lost[:3])}")
        await self._compare({room: answers for room, (_, answers) in stored.items()})
        _measure(self._summary, reports, self._rooms)

    async def _stored(self, reader: Any, room: Room) -> tuple[list[Any], list[str]]:
        """What the store has of a room, and what an agent that agrees would see of it."""
        listings = [
            await reader.recent(Query(table, room=room.name), 1_000)
            for table in ("messages", "facts", "drafts")
        ]
        about = await reader.recent(Query("facts", entity=room.entity), 6)
        single = [await reader.get(id) for id in room.ids()]
        seen = [listings[0][:5], about, *(rows[:20] for rows in listings)]
        answers = [digest(rows) for rows in seen]
        answers += [digest([row] if row else []) for row in single]
        return [row for rows in listings for row in rows], answers

    async def _compare(self, stored: dict[str, list[str]]) -> None:
        """Ask every agent what it sees, until it agrees or the time it has for that is over."""

        async def agrees(agent: _AgentProcess) -> tuple[bool, dict[str, Any]]:
            deadline = time.monotonic() + self._settings.max_staleness + 1.0
            while True:
                await agent.tell("verify")
                said = await agent.hear()
                wrong = [room for room, answers in stored.items() if said["verified"].get(room) != answers]
                if not wrong or time.monotonic() > deadline:
                    return not wrong, said
                await asyncio.sleep(0.1)

        answers = await asyncio.gather(*(agrees(agent) for agent in self._agents))
        disagree = [a.number for a, (agreed, _) in zip(self._agents, answers, strict=True) if not agreed]
        summary = self._summary
        summary.agents_that_disagree = len(disagree)
        if disagree:
            summary.problems.append(f"agents that see something else than the store: {disagree}")
        for _, said in answers:
            summary.compared += sum(said["sources"].values())
            summary.compared_local += said["sources"]["local"]

    async def _count(self, reports: list[dict[str, Any]], before: Counter[str]) -> None:
        summary = self._summary
        for report in reports:
            for name in ("hits_local", "hits_shared", "misses", "invalidations", "drops", "gaps", "replays"):
                setattr(summary, name, getattr(summary, name) + report["stats"][name])
        now = await self._meters()
        summary.batches = now["batches"] - before["batches"]
        if summary.batches:
            summary.events_per_batch = round((now["applied"] - before["applied"]) / summary.batches, 2)
        summary.dead_letters = now["dead"] - before["dead"]
        if summary.dead_letters:
            summary.problems.append(f"{summary.dead_letters} writes went to the dead letters")
        if self._system is not None and not summary.worker_killed:
            summary.problems.append("no worker was killed, so nothing was shown about that")


def _lost(writes: Sequence[dict[str, Any]], stored: dict[str, Any]) -> list[str]:
    """The memories that the store has otherwise than the acknowledged writes would leave them."""
    expected: dict[str, Any] = {}
    in_room: dict[tuple[str, str], set[str]] = defaultdict(set)
    # All writes to one memory are in one log partition, whose order is that of the versions.
    for write in sorted(writes, key=lambda write: Version.parse(write["version"])):
        place = (write["table"], write["room"])
        if write["op"] == "delete_room":
            expected.update(dict.fromkeys(in_room[place]))
        elif write["op"] == "delete":
            expected[write["id"]] = None
        else:
            in_room[place].add(write["id"])
            expected[write["id"]] = write["content"]
    lost = []
    for id in expected.keys() | stored.keys():
        row = stored.get(id)
        found = None if row is None else orjson.loads(row.content)
        if found != expected.get(id):
            lost.append(f"{id}: {found} instead of {expected.get(id)}")
    return lost


def _measure(summary: Summary, reports: list[dict[str, Any]], rooms: Sequence[Room]) -> None:
    """Propagation: for each turn, how long after its acknowledgement each other agent dropped its copy."""
    turns: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    drops: list[dict[str, list[float]]] = []
    for number, report in enumerate(reports):
        for write in report["acknowledged"]:
            if write["table"] == "messages":
                turns[write["room"]].append((write["began"], write["acknowledged"], number))
        mine: dict[str, list[float]] = defaultdict(list)
        for scope, moment in report["drops"]:
            mine[scope].append(moment)
        drops.append(mine)
    samples: list[float] = []
    for room in rooms:
        scope = room_scope("messages", room.name)
        said = sorted(turns[room.name])
        for (began, acknowledged, writer), following in pairwise([*said, (float("inf"), 0.0, -1)]):
            for number, mine in enumerate(drops):
                if number != writer:
                    # Before the next turn begins, the only drops of the room are those of this one.
                    dropped = [t for t in mine[scope] if began <= t < following[0]]
                    samples += [max(dropped[0] - acknowledged, 0.0)] if dropped else []
    samples.sort()
    summary.propagation_samples = len(samples)
    if samples:
        summary.propagation_p50_ms = round(1000 * samples[len(samples) // 2], 2)
        summary.propagation_p99_ms = round(1000 * samples[min(len(samples) * 99 // 100, len(samples) - 1)], 2)
        summary.propagation_max_ms = round(1000 * samples[-1], 2)


def _show(summary: Summary) -> None:
    from rich.table import Table

    table = Table(show_header=False, title="what happened", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    rate = f"{summary.writes / summary.seconds:,.0f} a second" if summary.seconds else ""
    reads = summary.hits_local + summary.hits_shared + summary.misses
    local = f"{summary.hits_local / reads:.0%} of all reads" if reads else ""
    killed = "one worker killed half way" if summary.worker_killed else ""
    zero = "[bold green]0[/]"
    rows = (
        ("agents, rooms", f"{summary.agents}, {summary.rooms}", ""),
        ("writes acknowledged", f"{summary.writes:,}", f"in {summary.seconds:.1f} s, {rate}"),
        ("batches", f"{summary.batches:,}", f"{summary.events_per_batch} writes each, on average"),
        ("read from this process (L1)", f"{summary.hits_local:,}", local),
        ("read from Redis (L2)", f"{summary.hits_shared:,}", ""),
        ("read from the store", f"{summary.misses:,}", ""),
        ("invalidations heard", f"{summary.invalidations:,}", f"{summary.drops:,} copies dropped"),
        (
            "propagation p50",
            f"{summary.propagation_p50_ms:.1f} ms",
            "write acknowledged to copy dropped elsewhere",
        ),
        ("propagation p99", f"{summary.propagation_p99_ms:.1f} ms", killed),
        (
            "writes lost",
            f"[bold red]{summary.writes_lost}[/]" if summary.writes_lost else zero,
            "the store, against every acknowledged write",
        ),
        (
            "agents that disagree",
            f"[bold red]{summary.agents_that_disagree}[/]" if summary.agents_that_disagree else zero,
            f"{summary.compared:,} answers compared, {summary.compared_local:,} of them local copies",
        ),
    )
    for row in rows:
        table.add_row(*row)
    out().print(table)
    for problem in summary.problems:
        err().print("[bold red]failed:[/] ", end="")
        err().print(problem, markup=False, soft_wrap=True)
    if summary.ok:
        out().print("[bold green]Every agent agrees with the store, and nothing was lost.[/]")
