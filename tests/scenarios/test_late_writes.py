"""Deletions, and older writes that come after them: late, redelivered, or replayed with a day of other writes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import redis

import mnemobus
from commands import Command
from mnemobus import Settings
from mnemobus.keys import Keyspace
from mnemobus.log.events import Event
from mnemobus.records import encode
from outside import Log
from rows import rows
from rows import texts as living
from scenarios.telling import held, opened, said, sees
from servers import RedisServer, end, eventually, is_paused, spawn

HOUR = 3_600_000


@pytest.fixture
def settings(
    settings: Settings,
    protocol: int,
    request: pytest.FixtureRequest,
    own_redis: Callable[..., RedisServer],
) -> Settings:
    """Either store; all in one log partition; and a Redis that no other test uses."""
    store = request.getfixturevalue("sqlite_url" if protocol == 2 else "postgres_url")
    changes = {"redis_url": own_redis().url, "database_url": store, "log_partitions": 1, "claim_idle": 0.5}
    return settings.model_copy(update=changes)


@pytest.fixture
def paused(tmp_path: Path) -> Iterator[Callable[[Settings], subprocess.Popen[Any]]]:
    """Starts a worker process that stops with its first batch, until it is told to continue."""
    started: list[subprocess.Popen[Any]] = []

    def start(settings: Settings) -> subprocess.Popen[Any]:
        program = Path(__file__).parents[1] / "worker_process.py"
        command = [sys.executable, str(program), "batch", "pause"]
        started.append(spawn(command, env=os.environ | settings.environment(), cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        end(process, patience=0)


async def test_g3_g8_what_was_deleted_stays_deleted_when_older_batches_come_late_and_a_day_is_replayed(
    settings: Settings,
    pool_of: Callable[[Settings], AbstractContextManager[Settings]],
    paused: Callable[[Settings], subprocess.Popen[Any]],
    command: Callable[..., Command],
) -> None:
    log = Log(settings)
    keys = Keyspace(settings.redis_key_prefix, 1, settings.feed_partitions)
    memory, kept, doomed = said("deleted", "r1"), said("kept", "r1"), said("with its room", "r2")
    with redis.Redis.from_url(settings.redis_url) as client:
        # Given writes of the day before
        now = int(client.time()[0]) * 1000
        for n, each in enumerate((memory, doomed, kept)):
            event = Event.put(encode(each, 1 << 20))
            client.xadd(keys.log(0), dict(pairs(event)), id=f"{now - 20 * HOUR + n}-0")  # type: ignore[arg-type]
            client.hincrby(keys.meter(0), "added", 1)

        # and a worker that has them in hand, and stands still
        worker = paused(settings)
        await eventually(lambda: is_paused(worker.pid), timeout=30)
        stuck = list(log.pending())
        assert len(stuck) == 3

        async with opened(settings) as bus, opened(settings) as reader:

            async def unchanged(before: list[Any], **rooms: list[str]) -> None:
                """The store has what it had, and an agent sees what is left, in every query."""
                assert rows(settings.database_url) == before
                await seen(reader, [memory, doomed], rooms)

            with pool_of(settings):
                # When others claim and apply them, and then the memory is deleted, and the other one's room
                await eventually(log.done, 20)
                assert sorted(await held(reader, "r1")) == ["deleted", "kept"]
                assert await held(reader, "r2") == ["with its room"]
                await bus.delete(memory.id)
                await bus.delete_room("messages", room="r2")
                await bus.write(said("after", "r2"), durability="committed")
                await eventually(log.done)
                before = rows(settings.database_url)
                await unchanged(before, r1=["kept"], r2=["after"])

                # Then the batch that comes late, from the worker that goes on with it, brings nothing back
                told = sum(map(len, log.feed()))
                os.kill(worker.pid, signal.SIGCONT)
                await eventually(lambda: sum(map(len, log.feed())) > told, 20)
                await eventually(log.done)
                await unchanged(before, r1=["kept"], r2=["after"])
            end(worker, patience=0)

            # When a worker stands still with a put that nobody has applied, and its room is deleted meanwhile
            patient = settings.model_copy(update={"claim_idle": 60.0})
            worker = paused(patient)
            late = said("late", "r3")
            await bus.write(late)
            await eventually(lambda: is_paused(worker.pid), timeout=30)
            # and no longer has an ear at Redis, which would hand it the deletion, too
            await eventually(lambda: client.info("clients")["blocked_clients"] == 0)
            with pool_of(patient):
                await (await bus.delete_room("messages", room="r3")).committed()
                await bus.write(said("after", "r3"), durability="committed")
                await seen(reader, [late], {"r3": ["after"]})

                # Then it is dead when it comes
                os.kill(worker.pid, signal.SIGCONT)
                await eventually(log.done, 20)
                await seen(reader, [late], {"r3": ["after"]})
                before = rows(settings.database_url)

                # And copies of the first events that somebody puts into the log again, under their versions, change
                # nothing
                for id in stuck:
                    [(_, fields)] = client.xrange(keys.log(0), id, id)
                    client.xadd(keys.log(0), {**fields, b"as": id.encode()})
                    client.hincrby(keys.meter(0), "added", 1)
                await eventually(log.done)
                await unchanged(before, r1=["kept"], r2=["after"], r3=["after"])

                # nor does a replay of the day, over it all, nor one of what came before the deletions
                for stretch in (["--since", "24h"], ["--since", "24h", "--until", f"{now - HOUR}-0"]):
                    replay = command("replay", "--json", *stretch, settings=settings)
                    assert await asyncio.to_thread(lambda replay=replay: replay.status) == 0, replay.err
                    assert replay.json["events"] >= 3 and replay.json["changed"] == 0
                    await unchanged(before, r1=["kept"], r2=["after"], r3=["after"])

                # And into a new store, all of it comes to the same
                copy = f"sqlite:///{settings.data_dir}/copy.db"
                replay = command("replay", "--json", "--into", copy, settings=settings)
                assert await asyncio.to_thread(lambda: replay.status) == 0, replay.err
                assert rows(copy) == before
                assert len(living(copy)) == 3


def pairs(event: Event) -> Iterator[tuple[Any, Any]]:
    fields = iter(event.fields())
    return zip(fields, fields, strict=True)


async def seen(bus: mnemobus.Bus, dead: list[mnemobus.Memory], rooms: dict[str, list[str]]) -> None:
    """Wait until an agent sees none of the dead; and then it sees in each room what is there, in every query."""

    async def told() -> bool:
        return [await bus.get(memory.id) for memory in dead] == [None] * len(dead)

    await eventually(told)
    for room, expected in rooms.items():
        await sees(bus, expected, 10, room)
        assert await held(bus, room) == expected
        assert await bus.count("messages", room=room) == len(expected)
