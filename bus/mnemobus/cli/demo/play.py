"""``mnemobus demo``: the whole system at work, and the proof that it kept its promises.

Agents, each in its own process (agent.py), hold the conversations of samples.py. They record each of their acknowledged
writes, and when each of their copies was dropped. Half way, one worker is killed. When everything is applied, the store
is read directly, without any cache, and two questions are answered:

- Is every acknowledged write in it, with its last value? The expected content is computed from the writes alone, in
  the order of their versions.
- Does every agent see what the store has? Most of its answers are copies that it has kept from the conversations: a
  lost invalidation would show here.

Propagation is measured from the moment when a write was acknowledged to its writer to the moment when another agent
dropped its copy of the room. All processes of a machine share the clock that is used.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from redis.exceptions import RedisError

from ...connection.server_errors import AWAY
from ...embedded import (
    Embedded,
    absolute,
    await_workers,
    check_store,
    end_process,
    free_port,
    log_tail,
    spawn,
    with_port,
)
from ...errors import MnemobusError, StoreUnavailable
from ...settings import Settings
from ...store import open_reader
from ..console import emit, err, run_until_signal
from ..inspection import ask, keyspace, looking_at
from . import proof
from .rooms import Role, rooms_of
from .summary import Summary, show

AGENT = f"{__package__}.agent"
"""The module that is an agent's process."""
WORKERS = 2
DEADLINE = 50.0
"""Seconds for the conversations of a demo of the default size; a larger one gets more."""
QUIET = 20.0
"""Seconds until the log must be applied after the last write."""


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
                outbox="off",  # the proof needs the version of each write at once
            )
        )
        system = Embedded(settings, processes=WORKERS, threads=2, on_step=say)
        async with system:
            return await _Demo(system.settings, agents, writes, json, system, Path(directory)).play()


async def _external(agents: int, writes: int, wait: float, json: bool) -> int:
    settings = absolute(Settings.load(outbox="off"))
    say = _teller(json)
    try:
        async with asyncio.timeout(wait):
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
    """The demo's side of an agent process."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number = number
        self.process = process
        self.progress = 0

    async def tell(self, value: Any) -> None:
        assert self.process.stdin is not None
        with suppress(ConnectionError):  # if the process died, the missing answer shows it
            self.process.stdin.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
            await self.process.stdin.drain()

    async def hear(self) -> Any:
        """Its next message; MnemobusError if there is none."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise MnemobusError(f"agent {self.number} ended (status {await self.process.wait()})")
        return orjson.loads(line)

    async def hear_out(self) -> dict[str, Any]:
        """Its final message, after all those about its progress."""
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
        self._parts = [Role(number, agents, writes, name) for number in range(agents)]
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
            show(summary)
        return 0 if summary.ok else 1

    async def _start_agents(self, stack: AsyncExitStack) -> None:
        environment = os.environ | self._settings.environment()
        for part in self._parts:
            with self._log.open("ab") as log:
                process = await spawn(
                    [sys.executable, "-m", AGENT],
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    limit=1 << 28,
                )
            stack.push_async_callback(end_process, process, 2.0)
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
        """Show the progress, and kill a worker half way."""
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
        try:
            await reader.open()
            stored = {room.name: await proof.stored(reader, room) for room in self._rooms}
        finally:
            await reader.close()
        lost = proof.lost(writes, {row.id: row for rows, _ in stored.values() for row in rows})
        self._summary.writes_lost = len(lost)
        if lost:
            self._summary.problems.append(f"{len(lost):,} writes are lost, such as {'; '.join(lost[:3])}")
        await self._compare({room: answers for room, (_, answers) in stored.items()})
        proof.measure(self._summary, reports, self._rooms)

    async def _compare(self, stored: dict[str, list[str]]) -> None:
        """Ask every agent what it sees, until it agrees or its time is over."""

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
