"""The faults of a run: a function for each kind of fault, which injects it, waits, and lifts it.

Each belongs to a lane. Faults of one lane come one after the other; one fault of each lane may be active at the same
time. The seed decides which comes next, its target and its duration.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from .proxy import DOWN, UP

if TYPE_CHECKING:
    from .campaign import Campaign

Inject = Callable[["Campaign", random.Random], Awaitable[None]]
LANES: dict[str, dict[str, Inject]] = {"workers": {}, "agents": {}, "links": {}, "servers": {}}


def name_of(inject: Inject) -> str:
    return inject.__name__.replace("_", "-")


def fault(lane: str) -> Callable[[Inject], Inject]:
    def register(inject: Inject) -> Inject:
        LANES[lane][name_of(inject)] = inject
        return inject

    return register


def names() -> list[str]:
    return [name for lane in LANES.values() for name in lane]


# Workers


@fault("workers")
async def worker_killed(run: Campaign, rng: random.Random) -> None:
    """SIGKILL of a worker process, at any moment."""
    pool = rng.choice(run.workers)
    await pool.ready.wait()
    if pool.kill_one():
        run.injected("worker-killed", pool.name)


async def _die_at(run: Campaign, rng: random.Random, point: str, kind: str) -> None:
    pool = rng.choice(run.workers)
    await pool.ready.wait()
    order = pool.die_at(point)
    for _ in range(100):
        await asyncio.sleep(0.05)
        if not order.exists():
            run.injected(kind, pool.name)
            return
    order.unlink(missing_ok=True)


@fault("workers")
async def worker_killed_before_commit(run: Campaign, rng: random.Random) -> None:
    """SIGKILL of a worker in the transaction of a batch, before COMMIT."""
    await _die_at(run, rng, "transaction", "worker-killed-before-commit")


@fault("workers")
async def worker_killed_after_commit(run: Campaign, rng: random.Random) -> None:
    """Between commit and fan-out."""
    await _die_at(run, rng, "commit", "worker-killed-after-commit")


@fault("workers")
async def worker_killed_in_fan_out(run: Campaign, rng: random.Random) -> None:
    """When some of a batch's invalidations are sent, and some are not."""
    await _die_at(run, rng, "fan-out", "worker-killed-in-fan-out")


@fault("workers")
async def worker_killed_before_ack(run: Campaign, rng: random.Random) -> None:
    """Between fan-out and XACK."""
    await _die_at(run, rng, "ack", "worker-killed-before-ack")


@fault("workers")
async def worker_paused(run: Campaign, rng: random.Random) -> None:
    """SIGSTOP for longer than claim_idle: others claim its batch, and later it continues with that batch."""
    pool = rng.choice(run.workers)
    await pool.ready.wait()
    pid = pool.pause_one()
    if pid is not None:
        with run.fault("worker-paused", pool.name):
            await asyncio.sleep(run.settings.claim_idle * rng.uniform(1.2, 3))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@fault("workers")
async def worker_clock_ahead(run: Campaign, rng: random.Random) -> None:
    """The pool's machine is some seconds ahead, until it is restarted."""
    pool = rng.choice(run.workers)
    await pool.ready.wait()
    pool.ahead = True
    with run.fault("worker-clock-ahead", pool.name):
        await pool.restart()
        await asyncio.sleep(rng.uniform(3, 6))
        pool.ahead = False
        await pool.restart()


# Agents


@fault("agents")
async def agent_killed(run: Campaign, rng: random.Random) -> None:
    """SIGKILL of an agent, at any moment."""
    agent = rng.choice(run.agents)
    await agent.ready.wait()
    run.injected("agent-killed", agent.current)
    agent.kill()


@fault("agents")
async def agent_killed_unanswered(run: Campaign, rng: random.Random) -> None:
    """SIGKILL of an agent whose write has reached the log, before the answer has reached the agent."""
    agent = rng.choice(run.agents)
    await agent.ready.wait()
    caught = agent.proxy.trap(b"}:producers\r\n")
    await asyncio.wait([caught], timeout=3)
    if not caught.done() or caught.cancelled():
        agent.proxy.traps.clear()
        return
    await asyncio.sleep(rng.uniform(0.01, 0.05))
    run.injected("agent-killed-unanswered", agent.current)
    agent.kill()
    agent.proxy.lift()


@fault("agents")
async def agent_paused(run: Campaign, rng: random.Random) -> None:
    """SIGSTOP for longer than max_staleness."""
    agent = rng.choice(run.agents)
    await agent.ready.wait()
    with run.fault("agent-paused", agent.current):
        agent.pause()
        await asyncio.sleep(run.settings.max_staleness * rng.uniform(1.1, 3))
        agent.resume()


@fault("agents")
async def agent_clock_ahead(run: Campaign, rng: random.Random) -> None:
    """The agent's machine is some seconds ahead, until it is restarted."""
    agent = rng.choice(run.agents)
    await agent.ready.wait()
    agent.ahead = True
    with run.fault("agent-clock-ahead", agent.name):
        await agent.restart()
        await asyncio.sleep(rng.uniform(3, 6))
        agent.ahead = False
        await agent.ready.wait()
        await agent.restart()


@fault("agents")
async def feed_trimmed(run: Campaign, rng: random.Random) -> None:
    """An agent receives nothing for a while, and then the feed no longer reaches back to its position."""
    agent = rng.choice(run.agents)
    await agent.ready.wait()
    with run.fault("feed-trimmed", agent.current) as effect:
        paused = rng.random() < 0.5
        if paused:
            agent.pause()
        else:
            agent.proxy.withhold(DOWN)
        await asyncio.sleep(rng.uniform(0.2, 1.5) * run.settings.max_staleness)
        effect.felt = await run.trim_feed() > 0
        if paused:
            agent.resume()
        else:
            agent.proxy.lift()


# The way to Redis


async def _held(run: Campaign, rng: random.Random, kind: str, *directions: str) -> None:
    party = rng.choice(run.parties)
    await party.ready.wait()
    with run.fault(kind, party.name):
        party.proxy.withhold(*directions)
        await asyncio.sleep(run.settings.max_staleness * rng.uniform(0.1, 3))
        if rng.random() < 0.5:
            party.proxy.reset()
        party.proxy.lift()


@fault("links")
async def half_open(run: Campaign, rng: random.Random) -> None:
    """Nothing arrives in either direction, without an error."""
    await _held(run, rng, "half-open")


@fault("links")
async def deaf(run: Campaign, rng: random.Random) -> None:
    """What a party sends arrives; what is sent to it does not."""
    await _held(run, rng, "deaf", DOWN)


@fault("links")
async def mute(run: Campaign, rng: random.Random) -> None:
    """What is sent to a party arrives; what it sends does not, or late."""
    await _held(run, rng, "mute", UP)


@fault("links")
async def delayed(run: Campaign, rng: random.Random) -> None:
    """Everything to and from a party is a little late."""
    party = rng.choice(run.parties)
    with run.fault("delayed", party.name):
        party.proxy.delay = rng.uniform(0.005, 0.15)
        await asyncio.sleep(rng.uniform(0.5, 2))
        party.proxy.lift()


@fault("links")
async def cut(run: Campaign, rng: random.Random) -> None:
    """For a while, connections are closed, and new ones, too."""
    party = rng.choice(run.parties)
    with run.fault("cut", party.name):
        party.proxy.cut()
        await asyncio.sleep(run.settings.max_staleness * rng.uniform(0.1, 3))
        party.proxy.lift()


@fault("links")
async def connections_reset(run: Campaign, rng: random.Random) -> None:
    """Open connections end with an RST."""
    party = rng.choice(run.parties)
    for _ in range(rng.randint(1, 3)):
        if party.proxy.connections:
            run.injected("connections-reset", party.name)
        party.proxy.reset()
        await asyncio.sleep(rng.uniform(0.02, 0.3))


@fault("links")
async def push_dropped(run: Campaign, rng: random.Random) -> None:
    """Single messages of the feed never arrive."""
    agent = rng.choice(run.agents)
    for _ in range(rng.randint(1, 4)):
        await agent.ready.wait()
        before = agent.proxy.dropped
        agent.proxy.drop_pushes(rng.choice((1, 1, 1, 5)))
        await asyncio.sleep(rng.uniform(0.2, 0.8))
        agent.proxy.to_drop = 0
        for _ in range(agent.proxy.dropped - before):
            run.injected("push-dropped", agent.current)


# Redis and the database


async def _redis_killed(run: Campaign, rng: random.Random, fsync: str) -> None:
    await run.redis_config("appendfsync", fsync)
    await asyncio.sleep(rng.uniform(0.2, 1))
    with run.fault(f"redis-killed-{fsync}", "redis", loses_log=fsync == "everysec"):
        await run.kill_redis()
        await asyncio.sleep(rng.choice((0, rng.uniform(0, 0.5), rng.uniform(0.5, 3))))
        await run.start_redis()


@fault("servers")
async def redis_killed_always(run: Campaign, rng: random.Random) -> None:
    """SIGKILL, and a restart with its append-only file, which was written before each answer."""
    await _redis_killed(run, rng, "always")


@fault("servers")
async def redis_killed_everysec(run: Campaign, rng: random.Random) -> None:
    """SIGKILL, and a restart with its append-only file."""
    await _redis_killed(run, rng, "everysec")


@fault("servers")
async def redis_paused(run: Campaign, rng: random.Random) -> None:
    """Redis hangs: connections stay open, and it answers nothing."""
    with run.fault("redis-paused", "redis"):
        run.redis.pause()
        await asyncio.sleep(rng.uniform(0.2, 2.5))
        run.redis.resume()


@fault("servers")
async def redis_emptied(run: Campaign, rng: random.Random) -> None:
    """SIGKILL, and a restart without any data."""
    with run.fault("redis-emptied", "redis", loses_log=True):
        await run.empty_redis()


@fault("servers")
async def redis_flushed(run: Campaign, rng: random.Random) -> None:
    """FLUSHALL: the same process goes on, without data."""
    with run.fault("redis-flushed", "redis", loses_log=True):
        await run.flush_redis()


@fault("servers")
async def redis_full(run: Campaign, rng: random.Random) -> None:
    """Redis at maxmemory, without keys that it may evict."""
    with run.fault("redis-full", "redis") as effect:
        await run.redis_config("maxmemory", "1")
        before = await run.scripts_called()
        await asyncio.sleep(rng.uniform(0.3, 2))
        effect.felt = await run.refuses_for_memory() and await run.scripts_called() > before
        await run.redis_config("maxmemory", "0")


@fault("servers")
async def repartition(run: Campaign, rng: random.Random) -> None:
    """The log is repartitioned; sometimes the command is killed before it ends."""
    with run.fault("repartition", "redis") as effect:
        await run.look_at_layout()
        partitions = rng.choice([n for n in (1, 2, 3, 5) if n != run.keys.shape.size])
        killed_after = None if rng.random() < 0.6 else rng.uniform(0.3, 3)
        effect.felt = await run.repartition(partitions, killed_after)


@fault("servers")
async def clients_killed(run: Campaign, rng: random.Random) -> None:
    """CLIENT KILL of all connections that listen to the feed."""
    if await run.kill_clients():
        run.injected("clients-killed", "redis")


@fault("servers")
async def database_away(run: Campaign, rng: random.Random) -> None:
    """PostgreSQL stopped or killed, and started again; SQLite locked against writes."""
    with run.fault("database-away", "database") as effect:
        async with run.without_database(at_once=rng.random() < 0.5) as effect.felt:
            await asyncio.sleep(rng.uniform(0.3, 3))
