"""PostgreSQL in other setups: behind a pooler, with other defaults, and with few connections."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest

import mnemobus
from mnemobus import Memory, Settings, store
from mnemobus.errors import SettingsError, StoreTooSlow, StoreUnavailable
from mnemobus.store import Query
from mnemobus.store.postgres import connections
from mnemobus.store.postgres import writer as postgres_writer
from servers import NoServer, PgBouncer, eventually, wait_until
from test_store import delete_room, new_id, opened, put, sql
from test_store import settings as at

ROOM = Query("messages", room="r1")


@pytest.fixture
def pooler(postgres_url: str) -> Iterator[Callable[..., PgBouncer]]:
    """Starts a PgBouncer before the test's database."""
    with ExitStack() as stack:

        def start(mode: str = "transaction", size: int = 3) -> PgBouncer:
            try:
                started = PgBouncer(postgres_url, mode, size)
            except NoServer as error:
                pytest.skip(str(error))
            stack.callback(started.close)
            return started

        yield start


@pytest.fixture
def role(postgres_url: str) -> Iterator[Callable[..., str]]:
    """Makes a role that owns the database; the database's URL for it."""
    names = []
    parts = postgres_url.partition("://")[2].rpartition("@")
    assert parts[0]

    def make(options: str = "") -> str:
        name = f"role_{secrets.token_hex(6)}"
        sql(postgres_url, f"CREATE ROLE {name} LOGIN {options}")
        names.append(name)
        sql(postgres_url, f"ALTER DATABASE {postgres_url.rpartition('/')[2]} OWNER TO {name}")
        return f"postgresql://{name}@{parts[2]}"

    yield make
    for name in names:
        sql(postgres_url, f"DROP OWNED BY {name} CASCADE")
        sql(postgres_url, f"ALTER DATABASE {postgres_url.rpartition('/')[2]} OWNER TO CURRENT_USER")
        wait_until(lambda: held(postgres_url, name) == 0)  # noqa: B023
        sql(postgres_url, f"DROP ROLE {name}")


def held(url: str, role: str) -> int:
    """Connections that a role has."""
    return int(sql(url, f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}'")[0][0])


def inside(writer: Any, *names: str) -> list[str]:
    """Settings, as a worker's transaction has them."""
    asked = ", ".join(f"current_setting('{name}')" for name in names)
    [row] = writer._transact(lambda transaction: transaction.run(f"SELECT {asked}", ()), 1.0)
    return list(row)


# Other defaults

DEFAULTS = {
    "default_transaction_isolation": "'serializable'",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "statement_timeout": "'200ms'",
    "lock_timeout": "'1ms'",
    "idle_in_transaction_session_timeout": "'200ms'",
    "synchronous_commit": "off",
    "bytea_output": "'escape'",
    "standard_conforming_strings": "off",
    "datestyle": "'German'",
    "intervalstyle": "'sql_standard'",
    "timezone": "'Asia/Kathmandu'",
    "extra_float_digits": "-15",
    "search_path": "pg_catalog",
    "enable_indexscan": "off",
    "array_nulls": "off",
    "transform_null_equals": "on",
}


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
async def test_what_a_database_sets_for_its_sessions_breaks_nothing(
    postgres_url: str, pooler: Callable[..., PgBouncer], pooled: bool
) -> None:
    # Given a database whose defaults are none that anything could be built on
    with opened(postgres_url):
        pass
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        for name, value in DEFAULTS.items():
            alter = f"ALTER DATABASE {postgres_url.rpartition('/')[2]} SET {name} = {value}"
            admin.execute(alter.encode())
    url = pooler().url if pooled else postgres_url
    # Then a worker's transactions are as they have to be
    with opened(url) as writer:
        assert inside(
            writer,
            *("transaction_isolation", "transaction_read_only", "statement_timeout", "lock_timeout"),
            *("idle_in_transaction_session_timeout", "synchronous_commit"),
        ) == ["read committed", "off", "5s", "0", "5s", "on"]
        # And what is written is what is read
        ids = [new_id() for _ in range(20)]
        batch = [
            put(id, n, b'{"a":"\\\\ \'\\u0000"}', embedding=b"\0\x80\\\xff") for n, id in enumerate(ids, 1)
        ]
        assert writer.apply(batch).won == set(ids)
        reader = store.open_reader(at(url))
        await reader.open()
        rows = await reader.recent(ROOM, 100)
        assert {(row.content, row.embedding) for row in rows} == {
            (b'{"a":"\\\\ \'\\u0000"}', b"\0\x80\\\xff")
        }
        assert {row.id for row in rows} == set(ids)
        assert await reader.count(ROOM) == 20
        assert len(writer.apply([delete_room(100)]).cleared) == 20
        assert await reader.count(ROOM) == 0
        await reader.close()


def test_g3_a_put_that_waits_for_a_tombstone_sees_it_whatever_isolation_is_usual(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_writer, "_LOCK_PATIENCE", 60.0)  # the deletion gives way to nobody
    with opened(postgres_url, database_timeout=60):
        pass
    database = postgres_url.rpartition("/")[2]
    sql(postgres_url, f"ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'")
    with (
        opened(postgres_url, database_timeout=60) as one,
        opened(postgres_url, database_timeout=60) as two,
        ThreadPoolExecutor(2) as threads,
    ):
        with psycopg.connect(postgres_url) as holder:
            # Given a deletion that has its room's lock, and can't go on
            holder.execute("INSERT INTO mnemobus.room_tombstones VALUES ('messages', 'r1', '\\x00')")
            deletes = threads.submit(one.apply, [delete_room(9)])
            wait_until(lambda: _waits(postgres_url, "INSERT INTO%"))
            # When a put waits for that lock
            puts = threads.submit(two.apply, [put(new_id(), 1)])
            wait_until(lambda: _waits(postgres_url, "%advisory_xact_lock_shared%"))
            holder.rollback()
        deletes.result(30)
        puts.result(30)
    # Then it is dead
    assert sql(postgres_url, "SELECT count(*) FROM memories WHERE live") == [(0,)]


def _waits(url: str, query: str) -> bool:
    found = sql(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        f" AND query ILIKE '{query}'",
    )
    return bool(found[0][0])


# Poolers


async def test_a_pooler_that_lends_a_server_for_one_transaction(
    postgres_url: str, pooler: Callable[..., PgBouncer]
) -> None:
    url = pooler().url
    # Given more agents and workers than the pooler has connections, each with the same statements again and again
    with opened(url) as one, opened(url) as two:
        reader = store.open_reader(at(url))
        await reader.open()

        def work(writer: Any, room: int) -> None:
            for n in range(1, 25):
                writer.apply([put(new_id(), n * 10 + k, dimensions=_room(room)) for k in range(5)])
                if n % 8 == 0:
                    writer.apply([delete_room(n * 10 - 3, room=f"room{room}")])

        async def read(room: int) -> None:
            for _ in range(40):
                await reader.recent(Query("messages", room=f"room{room}"), 10)
                await reader.get(new_id())

        # Then none of their calls fails
        await asyncio.gather(
            *(asyncio.to_thread(work, (one, two)[n % 2], n) for n in range(6)), *(read(n) for n in range(6))
        )
        # And a worker that finds a prepared statement of its own name there, or none, goes on
        link = one._connections._take()  # type: ignore[attr-defined]
        link.pooled, link.prepare_threshold = False, 0
        one._connections._give_back(link)  # type: ignore[attr-defined]
        await asyncio.gather(*(asyncio.to_thread(work, one, 10 + n) for n in range(4)))
        await reader.close()
    # And nothing of ours is left on the server for its next user
    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as other:
        for _ in range(10):
            row = other.execute(
                "SELECT current_setting('statement_timeout'), current_setting('default_transaction_isolation'),"
                " (SELECT count(*) FROM pg_prepared_statements WHERE name <> '')"
            ).fetchone()
            assert row and row[:2] == ("0", "read committed")


def _room(number: int) -> Any:
    return mnemobus.keys.Dimensions("messages", f"room{number}")


async def test_the_time_limit_holds_behind_a_pooler(
    postgres_url: str, pooler: Callable[..., PgBouncer]
) -> None:
    url = pooler().url
    with opened(url, database_timeout=0.3) as writer, psycopg.connect(postgres_url) as other:
        reader = store.open_reader(at(url, database_timeout=0.3))
        await reader.open()
        other.execute("LOCK TABLE mnemobus.memories")
        with pytest.raises(StoreTooSlow, match="canceling statement due to statement timeout"):
            writer.apply([put(new_id(), 1)])
        with pytest.raises(StoreUnavailable, match="canceling statement due to statement timeout"):
            await reader.get(new_id())
        other.rollback()
        assert await reader.get(new_id()) is None
        await reader.close()


async def test_a_pooler_that_lends_for_one_statement_is_refused(
    postgres_url: str, pooler: Callable[..., PgBouncer]
) -> None:
    with opened(postgres_url):
        pass
    url = pooler("statement").url
    reader = store.open_reader(at(url))
    with pytest.raises(SettingsError, match="Set pool_mode to transaction or session"):
        await reader.open()
    with pytest.raises(SettingsError, match="Set pool_mode to transaction or session"), opened(url):
        pass
    await reader.close()


async def test_an_option_that_a_pooler_does_not_know_is_named(pooler: Callable[..., PgBouncer]) -> None:
    url = pooler().url + "?options=-cgeqo%3Doff"
    with (
        pytest.raises(SettingsError, match=r"unsupported startup parameter.*remove it, or add it"),
        opened(url),
    ):
        pass
    reader = store.open_reader(at(url))
    with pytest.raises(SettingsError, match="unsupported startup parameter"):
        await reader.open()


# Connections


async def test_agents_close_what_they_do_not_use(postgres_url: str, role: Callable[..., str]) -> None:
    url = role()
    name = url.partition("://")[2].partition("@")[0]
    with opened(url):
        pass
    reader = store.open_reader(at(url))
    await reader.open()
    # Given an agent that had several queries at once
    await asyncio.gather(*(reader.count(ROOM) for _ in range(20)))
    assert held(postgres_url, name) > 0
    # Then after a second without any it has no connection
    await eventually(lambda: held(postgres_url, name) == 0)
    # And it opens one again when it needs it
    assert await reader.count(ROOM) == 0
    await reader.close()
    await eventually(lambda: held(postgres_url, name) == 0)


async def test_agents_leave_connections_to_workers(postgres_url: str, role: Callable[..., str]) -> None:
    # Given a role with eight connections, and more agents than that, which read all the time
    url = role("CONNECTION LIMIT 8")
    with opened(url):
        pass
    readers = [store.open_reader(at(url, database_timeout=20)) for _ in range(12)]
    stop = asyncio.Event()
    answered = [0] * len(readers)

    async def read(number: int) -> None:
        await readers[number].open()
        while not stop.is_set():
            await readers[number].count(ROOM)
            answered[number] += 1
            await asyncio.sleep(0)

    reading = [asyncio.ensure_future(read(number)) for number in range(len(readers))]
    try:
        # Then they take turns
        await eventually(lambda: all(answered))

        # And workers get connections meanwhile
        def commit() -> bool:
            with opened(url) as writer:
                return bool(writer.apply([put(new_id(), 1)]).won)

        async def commits() -> bool:
            try:
                return await asyncio.to_thread(commit)
            except StoreUnavailable:  # while agents look whether there is room for one more
                return False

        await eventually(commits)
    finally:
        stop.set()
        results = await asyncio.gather(*reading, return_exceptions=True)
        for reader in readers:
            await reader.close()
    assert results == [None] * len(readers)


async def test_an_agent_for_which_there_is_no_connection_says_so(
    postgres_url: str, role: Callable[..., str]
) -> None:
    url = role("CONNECTION LIMIT 8")
    with opened(url), ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(psycopg.connect(url))
        reader = store.open_reader(at(url, database_timeout=0.3))
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="the rest is kept for workers: raise max_connections"):
            await reader.open()
        assert time.monotonic() - began >= 0.3
        # And a worker gets one all the same
        with opened(url):
            pass
        await reader.close()


async def test_connections_do_not_live_for_ever(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LIFE", 0.0)
    monkeypatch.setattr(connections, "WORKER_LIFE", 0.0)
    with opened(postgres_url) as writer:
        reader = store.open_reader(at(postgres_url))
        await reader.open()
        for _ in range(3):
            await reader.count(ROOM)
            writer.apply([put(new_id(), 1)])
        assert reader._connections._idle == []  # type: ignore[attr-defined]
        assert writer._connections._idle == []  # type: ignore[attr-defined]
        await reader.close()


# Too much at once


@contextmanager
def slow(url: str, seconds: float) -> Iterator[None]:
    """Each new row takes so long meanwhile."""
    sql(
        url,
        "CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        f" 'BEGIN PERFORM pg_sleep({seconds}); RETURN new; END'",
    )
    sql(
        url,
        "CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON memories FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    try:
        yield
    finally:
        sql(url, "DROP TRIGGER slow ON memories")


async def test_a_batch_that_takes_too_long_is_made_smaller(
    settings: Settings, postgres_url: str, pool_of: Any
) -> None:
    slowly = settings.model_copy(update={"database_url": postgres_url, "database_timeout": 0.5})
    with opened(postgres_url):
        pass
    async with mnemobus.connect(**slowly.model_dump()) as bus:
        with slow(postgres_url, 0.01):
            # Given more than the database gets done in its time
            await bus.write_many([Memory(table="t", room="r", content={"n": n}) for n in range(200)])
            with pool_of(slowly):
                # Then it is done in parts
                await eventually(lambda: _count(postgres_url) == 200, 30)
    assert not (await _letters(slowly))


async def test_a_single_event_that_takes_too_long_is_given_longer(
    settings: Settings, postgres_url: str, pool_of: Any
) -> None:
    slowly = settings.model_copy(update={"database_url": postgres_url, "database_timeout": 0.3})
    with opened(postgres_url):
        pass
    async with mnemobus.connect(**slowly.model_dump()) as bus:
        with slow(postgres_url, 1.0):
            receipt = await bus.write(Memory(table="t", room="r", content={}))
            with pool_of(slowly):
                await receipt.committed(30)
                # And so is the deletion of its room
                await (await bus.delete_room("t", room="r")).committed(30)


def _count(url: str) -> int:
    return int(sql(url, "SELECT count(*) FROM memories")[0][0])


async def _letters(settings: Settings) -> int:
    async with mnemobus.connect(**settings.model_dump()) as bus:
        return (await bus.health()).dead_letters
