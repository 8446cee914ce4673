"""MNEMOBUS_COMMIT=relaxed: a commit may not be on PostgreSQL's disk yet, but no acknowledged write is lost."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import psycopg
import pytest

import mnemobus
from mnemobus import Memory, Settings
from outside import Log, stored
from servers import PostgresServer, children, eventually

PoolOf = Callable[[Settings], AbstractContextManager[Settings]]
UPKEEP = importlib.import_module("mnemobus_workers.upkeep")


class Crashing:
    """A PostgreSQL that hardly ever writes to its disk of itself, so that a crash loses what did not have to wait."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.do("ALTER SYSTEM SET wal_writer_delay = '10s'")
        self.do("SELECT pg_reload_conf()")

    def do(self, query: str) -> list[Any]:
        with psycopg.connect(self._server.url, autocommit=True) as connection:
            cursor = connection.execute(query)
            return cursor.fetchall() if cursor.description else []

    def crash(self) -> None:
        """SIGKILL for all of its processes."""
        postmaster = self._server._process
        assert postmaster is not None
        processes = [postmaster.pid, *children(postmaster.pid)]
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        postmaster.wait()
        self._server._process = None

    def start(self) -> None:
        self._server.start()


@pytest.fixture
def postgres(own_postgres: PostgresServer) -> Crashing:
    return Crashing(own_postgres)


@pytest.fixture
def settings(settings: Settings, own_postgres: PostgresServer, monkeypatch: Any) -> Iterator[Settings]:
    """Relaxed commits, in the only partition of a log that keeps nothing which was applied, if it may."""
    monkeypatch.setattr(UPKEEP, "TIDY_EVERY", 0.1)
    changed = {
        "database_url": own_postgres.url,
        "commit": "relaxed",
        "claim_idle": 0.5,
        "log_partitions": 1,
        "retention": 0.0,
    }
    return settings.model_copy(update=changed)


@pytest.fixture
def tidied(monkeypatch: Any) -> list[None]:
    """Grows with each time that a worker has trimmed the log."""
    done: list[None] = []
    tidy = UPKEEP.Upkeep.tidy

    def counted(upkeep: Any) -> None:
        tidy(upkeep)
        done.append(None)

    monkeypatch.setattr(UPKEEP.Upkeep, "tidy", counted)
    return done


def opened(settings: Settings) -> mnemobus.Bus:
    return mnemobus.connect(**settings.model_dump())


def said(text: str) -> Memory:
    return Memory(table="messages", room="r1", content={"text": text})


async def reached(postgres: Crashing) -> int:
    [(moment,)] = await asyncio.to_thread(postgres.do, "SELECT reached_ms FROM mnemobus.identity")
    return int(moment or 0)


async def test_g1_what_a_crash_lost_is_applied_again_though_newer_commits_hide_it(
    settings: Settings, postgres: Crashing, pool_of: PoolOf, tidied: list[None], caplog: Any
) -> None:
    log = Log(settings)
    with pool_of(settings):
        async with opened(settings) as bus:
            await bus.write(said("before"), durability="committed")
            await eventually(lambda: reached(postgres))
            # Given events that are committed, confirmed, and not on the disk of the server
            since = [
                f"since {n}" for n in range(500)
            ]  # of many nodes of the stream: only whole ones are trimmed
            await bus.write_many([said(text) for text in since], durability="committed")
            await eventually(log.done)
            # and that could be trimmed, as they are applied and nothing is to be kept
            before = len(tidied)
            await eventually(lambda: len(tidied) > before + 1)
    # When it crashes, then it has lost them
    postgres.crash()
    postgres.start()
    assert set(since) - set(await stored(settings))
    # and the workers apply them again, however much has come since
    with pool_of(settings):
        async with opened(settings) as bus:
            await bus.write(said("after"), durability="committed")
            await eventually(lambda: is_all(settings, ["before", "after", *since]))
    assert "crashed, and may have lost the last commits" in caplog.text


async def is_all(settings: Settings, texts: list[str]) -> bool:
    return await stored(settings) == sorted(texts)


async def test_g1_nothing_acknowledged_is_lost_as_the_server_crashes_while_writes_go_on(
    settings: Settings, postgres: Crashing, pool_of: PoolOf
) -> None:
    written: list[str] = []
    with pool_of(settings):
        async with opened(settings) as bus:
            running = True

            async def write() -> None:
                while running:
                    text = f"text {len(written)}"
                    await bus.write(said(text))
                    written.append(text)
                    await asyncio.sleep(0.001)

            writing = asyncio.create_task(write())
            # When it crashes again and again, also while it gets again what it lost before
            for _ in range(3):
                count = len(written)
                await eventually(lambda count=count: len(written) > count + 100, 60)  # type: ignore[misc]
                await asyncio.to_thread(postgres.crash)
                await asyncio.to_thread(postgres.start)
            running = False
            await writing
            # Then the store has all of it in the end, once
            await eventually(lambda: is_all(settings, written), 60)


async def test_workers_whose_commits_are_relaxed_wait_for_the_disk_until_a_crash_would_be_noticed(
    settings: Settings, postgres: Crashing, pool_of: PoolOf
) -> None:
    with pool_of(settings):
        async with opened(settings) as bus:
            await bus.write(said("1"), durability="committed")
    # Then the server and Redis know the same epoch
    [(epoch,)] = postgres.do("SELECT epoch::text FROM mnemobus.server_epoch")
    log = Log(settings)
    assert log.client.hget(log.keys.identity, "epoch") == epoch.encode()
    # and a clean restart is no crash
    postgres._server.stop()
    postgres.start()
    assert postgres.do("SELECT epoch::text FROM mnemobus.server_epoch") == [(epoch,)]
