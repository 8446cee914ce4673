"""Settings: read from the environment, errors name the setting, and each has the effect that env.template says.

Effects that need workers or the embedded server are tested in test_broker.py, test_workers.py, test_embedded.py and
test_cli.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

import mnemobus
from mnemobus import Memory, NotCommitted, Settings, SettingsError, StoreUnavailable, UnsafeRedis
from mnemobus.connection.link import Link
from mnemobus.connection.server_errors import AWAY
from mnemobus.settings import hide_password
from servers import RedisServer, eventually

Connect = Callable[..., mnemobus.Bus]


def said(text: str, room: str = "r1", **fields: object) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)  # type: ignore[arg-type]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without any of our variables, in an empty folder."""
    for name in Settings.load().environment() | {"DATABASE_URL": "", "REDIS_PASSWORD": "", "REDIS_DB": ""}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


# How they are read


def test_keywords_override_the_environment_and_that_the_file(
    clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert Settings.load().claim_idle == 5
    (tmp_path / ".env").write_text("MNEMOBUS_CLAIM_IDLE=7\nMNEMOBUS_LEASE=3\nSOMEBODY_ELSES=1\n")
    assert Settings.load().claim_idle == 7
    clean.setenv("MNEMOBUS_CLAIM_IDLE", "8")
    assert Settings.load().claim_idle == 8
    assert Settings.load(claim_idle=9).claim_idle == 9
    assert Settings.load().lease == 3


def test_an_empty_variable_is_none_for_every_setting(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = Settings.load()
    for name in [*all_names(), "DATABASE_URL"]:
        for empty in ("", " ", '""', "\n"):
            clean.setenv(name, empty)
            assert Settings.load() == plain, name
        # Nor does it hide what the file says
        clean.setenv(name, "")
        (tmp_path / ".env").write_text("MNEMOBUS_LEASE=3\nREDIS_URL=redis://file\nMNEMOBUS_DURABILITY=\n")
        found = Settings.load()
        assert (found.lease, found.redis_url, found.durability) == (3, "redis://file", "logged")
        (tmp_path / ".env").unlink()
        clean.delenv(name)
    # Also as a keyword, which others fill from the environment
    assert Settings.load(redis_url="", redis_db="", outbox=" ") == plain


def all_names() -> list[str]:
    """Every variable."""
    return [str(field.validation_alias.choices[1]) for field in Settings.model_fields.values()]  # type: ignore[union-attr]


def test_what_comes_along_from_files_is_taken_off(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As `docker --env-file` and files of secrets hand values over
    clean.setenv("REDIS_URL", '"redis://h:1/2"\n')
    clean.setenv("MNEMOBUS_DURABILITY", " 'committed' ")
    clean.setenv("MNEMOBUS_LEASE", "3\r\n")
    clean.setenv("REDIS_PASSWORD", "' with quotes and spaces '\n")
    settings = Settings.load()
    assert (settings.redis_url, settings.durability, settings.lease) == ("redis://h:1/2", "committed", 3)
    assert settings.redis_password == "' with quotes and spaces '"
    # As some editors save files
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfMNEMOBUS_HEARTBEAT=0.5\n")
    assert Settings.load().heartbeat == 0.5
    (tmp_path / ".env").write_bytes("MNEMOBUS_HEARTBEAT=0.5\n".encode("utf-16"))
    with pytest.raises(SettingsError, match=r"\.env can't be read as text in UTF-8"):
        Settings.load()


def test_database_url_of_another_program_comes_last_and_is_named(
    clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Given a variable that another program reads, too
    clean.setenv("DATABASE_URL", "mysql://u:hunter2@h/d")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert str(caught.value).startswith("DATABASE_URL: must be sqlite:///path/to/file.db or postgresql://")
    assert "it is read only where the same name with MNEMOBUS_ in front is not set" in str(caught.value)
    # Then what is set for mnemobus wins, wherever it is set
    (tmp_path / ".env").write_text("MNEMOBUS_DATABASE_URL=sqlite:///file.db\n")
    assert Settings.load().database_url == "sqlite:///file.db"
    clean.setenv("MNEMOBUS_DATABASE_URL", "sqlite:///environment.db")
    assert Settings.load().database_url == "sqlite:///environment.db"
    # And an error names the one that is meant
    clean.setenv("MNEMOBUS_DATABASE_URL", "mysql://x")
    with pytest.raises(SettingsError, match=r"^MNEMOBUS_DATABASE_URL: must be"):
        Settings.load()
    # It is read from the file as well
    clean.delenv("MNEMOBUS_DATABASE_URL")
    clean.delenv("DATABASE_URL")
    (tmp_path / ".env").write_text("DATABASE_URL=postgres://h/d\n")
    assert Settings.load().database_url == "postgresql://h/d"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REDIS_URL", "http://x", "REDIS_URL: must begin with redis://, rediss:// or unix://"),
        ("REDIS_URL", "redis://h:port/0", "REDIS_URL: the port must be a number from 1 to 65535"),
        ("REDIS_URL", "redis://h:65536", "REDIS_URL: the port must be a number from 1 to 65535"),
        ("REDIS_URL", "redis://h:0", "REDIS_URL: the port must be a number from 1 to 65535"),
        (
            "REDIS_URL",
            "rediss://h/x",
            "REDIS_URL: what follows the address must be a database's number, not '/x'",
        ),
        ("REDIS_DB", "-1", "REDIS_DB: Input should be greater than or equal to 0 (it is '-1')"),
        ("REDIS_KEY_PREFIX", "a{b}", "REDIS_KEY_PREFIX: String should match pattern"),
        ("REDIS_MAX_MEMORY", "lots", "REDIS_MAX_MEMORY: must be a size as Redis has them: 100mb, 2gb"),
        (
            "REDIS_EVICTION_POLICY",
            "allkeys-lru",
            "REDIS_EVICTION_POLICY: must be one of noeviction, volatile-lru",
        ),
        ("REDIS_POOL_MAX", "0", "REDIS_POOL_MAX: Input should be greater than or equal to 1"),
        ("REDIS_POOL_MIN", "50", "REDIS_POOL_MIN (50) must not exceed REDIS_POOL_MAX (16)"),
        ("REDIS_IDLE_TIMEOUT", "soon", "REDIS_IDLE_TIMEOUT: Input should be a valid number"),
        ("MNEMOBUS_RETENTION", "inf", "MNEMOBUS_RETENTION: Input should be a finite number (it is 'inf')"),
        ("MNEMOBUS_MAX_STALENESS", "nan", "MNEMOBUS_MAX_STALENESS: Input should be"),
        ("MNEMOBUS_REDIS_PROTOCOL", "4", "MNEMOBUS_REDIS_PROTOCOL: Input should be less than or equal to 3"),
        (
            "MNEMOBUS_DATABASE_URL",
            "mysql://x",
            "MNEMOBUS_DATABASE_URL: must be sqlite:///path/to/file.db or postgresql",
        ),
        ("DATABASE_URL", "sqlite:///", "must be sqlite:///path/to/file.db or postgresql://"),
        (
            "MNEMOBUS_LOG_PARTITIONS",
            "0",
            "MNEMOBUS_LOG_PARTITIONS: Input should be greater than or equal to 1",
        ),
        (
            "MNEMOBUS_DURABILITY",
            "maybe",
            "MNEMOBUS_DURABILITY: Input should be 'logged', 'synced' or 'committed'",
        ),
        ("MNEMOBUS_CLAIM_IDLE", "0", "MNEMOBUS_CLAIM_IDLE: Input should be greater than or equal to 0.1"),
        (
            "MNEMOBUS_MAX_STALENESS",
            "0.5",
            "MNEMOBUS_MAX_STALENESS (0.5 s) must exceed MNEMOBUS_HEARTBEAT (1 s)",
        ),
        (
            "MNEMOBUS_TABLE_TTL",
            "messages",
            "MNEMOBUS_TABLE_TTL: 'messages' is not of the form table=short|medium|long",
        ),
        (
            "MNEMOBUS_TABLE_TTL",
            "messages=soon",
            "MNEMOBUS_TABLE_TTL: messages=soon is neither short, medium, long nor",
        ),
        ("MNEMOBUS_TABLE_TTL", "messages=-1", "MNEMOBUS_TABLE_TTL: messages=-1: seconds must be above 0"),
    ],
)
def test_what_is_wrong_is_named(clean: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    clean.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert message in str(caught.value)


def test_a_keyword_that_is_no_setting_is_refused(clean: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"reddis_url is not a setting; see env\.template"):
        mnemobus.connect(reddis_url="redis://x")


def test_settings_can_be_handed_to_another_process(clean: pytest.MonkeyPatch) -> None:
    settings = Settings.load(
        redis_password="p",
        redis_db=3,
        table_ttl={"a": 5.0, "b": "short"},
        redis_max_memory="1gb",
        data_dir="d",
    )
    for name, value in settings.environment().items():
        clean.setenv(name, value)
    assert Settings.load() == settings


def test_passwords_are_not_shown(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("REDIS_URL", "redis://user:hunter2@h:1/0")
    clean.setenv("REDIS_PASSWORD", "hunter2")
    clean.setenv("DATABASE_URL", "postgres://u:hunter2@h/d")
    settings = Settings.load()
    assert settings.database_url == "postgresql://u:hunter2@h/d"
    assert hide_password(settings.redis_url) == "redis://user:***@h:1/0"
    assert "hunter2" not in repr(settings)
    clean.setenv("DATABASE_URL", "mysql://u:hunter2@h/d")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0?password=hunter2&db=3", "redis://h:1/0?password=***&db=3"),
        ("redis://h/0?username=me&Password=hunter2", "redis://h/0?username=me&Password=***"),
        ("rediss://h/0?ssl_password=hunter2&ssl_ca_certs=/ca.pem", "rediss://h/0?ssl_password=***&ssl_ca_certs=/ca.pem"),
        ("unix:///run/redis.sock?password=hunter2", "unix:///run/redis.sock?password=***"),
        ("unix://me:hunter2@/run/redis.sock", "unix://me:***@/run/redis.sock"),
        ("redis://:hunter2@[::1]:7/0", "redis://:***@[::1]:7/0"),
        ("postgresql://me@h/db?password=hunter2&sslmode=require", "postgresql://me@h/db?password=***&sslmode=require"),
        ("postgresql://me@h/db?sslpassword=hunter2", "postgresql://me@h/db?sslpassword=***"),
        ("postgresql://me@h/db?p%61ssword=hunter2", "postgresql://me@h/db?p%61ssword=***"),
        ("postgresql://h/db?passfile=/etc/me.pgpass", "postgresql://h/db?passfile=/etc/me.pgpass"),
        # Not well formed: a / or # in a password, no number for a port
        ("redis://:hunt/er2@h:1/0", "redis://***@h:1/0"),
        ("redis://:hunt#er2@h:1/0?password=hunter2", "redis://***@h:1/0"),
        ("postgresql://me:hunter2@h:port/db", "postgresql://***@h:port/db"),
        ("redis://[hunter2", "redis://***"),
        # Nothing to hide
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("sqlite:///a/b@c.db", "sqlite:///a/b@c.db"),
        ("redis://h:1/0", "redis://h:1/0"),
    ],
)  # fmt: skip
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_no_error_of_settings_shows_a_password(clean: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("REDIS_URL", "redis://:hunter2@h:port/0"),
        ("REDIS_URL", "redis://:7/hunter2@h/0"),
        ("REDIS_URL", "http://h/0?password=hunter2"),
        ("MNEMOBUS_DATABASE_URL", "mysql://h/db?password=hunter2"),
    ):
        with pytest.raises(SettingsError) as caught:
            Settings.load(**{name.removeprefix("MNEMOBUS_").lower(): value})
        assert "hunter2" not in str(caught.value)
    for settings in (
        Settings.load(redis_url="redis://h/0?password=hunter2", redis_password="hunter2"),
        Settings.load(database_url="postgresql://h/db?password=hunter2"),
    ):
        assert "hunter2" not in repr(settings) + str(settings)


# What they do: Redis


async def test_redis_password(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.config_set("requirepass", "secret")
    given = {**settings.model_dump(), "redis_url": server.url}
    for wrong in (None, "guess"):
        with pytest.raises(SettingsError, match=r"refuses the login: .*\. Set REDIS_PASSWORD"):
            async with mnemobus.connect(**{**given, "redis_password": wrong}):
                pass
    async with mnemobus.connect(**{**given, "redis_password": "secret"}) as bus:
        await bus.write(said("x"))


async def test_redis_db_and_key_prefix(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    given = {**settings.model_dump(), "redis_url": server.url, "redis_db": 3, "redis_key_prefix": "here"}
    async with mnemobus.connect(**given) as bus:
        await bus.write(said("x"))
        await bus.recent("messages", room="r2")
    async with redis.asyncio.Redis.from_url(server.url, db=3) as client:
        keys = [key.decode() async for key in client.scan_iter()]
        assert len(keys) >= 5
        assert all(key.startswith("{here") for key in keys)
    async with redis.asyncio.Redis.from_url(server.url, db=0) as client:
        assert await client.dbsize() == 0


async def test_partitions_are_those_of_the_first_to_connect(settings: Settings, connect: Connect) -> None:
    async with connect(log_partitions=3, feed_partitions=5) as bus:
        async with redis.asyncio.Redis.from_url(settings.redis_url) as client:
            layout = await client.hgetall(bus._link.keys.layout)
            assert layout.pop(b"life")
            assert layout == {b"log_partitions": b"3", b"feed_partitions": b"5"}
        # Those of the log may be changed while the bus is in use: what is there counts
        async with connect(log_partitions=4, feed_partitions=5) as other:
            assert other._link.keys.log_partitions == 3
        with pytest.raises(SettingsError, match="MNEMOBUS_FEED_PARTITIONS is 64 here but 5 there"):
            async with connect(log_partitions=3, feed_partitions=64):
                pass


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_a_server_that_may_evict_the_log_is_refused(
    own_redis: Any, settings: Settings, policy: str
) -> None:
    server: RedisServer = own_redis()
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.config_set("maxmemory-policy", policy)
    with pytest.raises(
        UnsafeRedis, match=f"maxmemory-policy {policy}, under which it may evict the log. Set it to"
    ):
        async with mnemobus.connect(**{**settings.model_dump(), "redis_url": server.url}):
            pass


async def test_the_pool_has_its_bounds_and_shrinks_when_idle(settings: Settings, connect: Connect) -> None:
    async with connect(
        redis_pool_min=2, redis_pool_max=6, redis_idle_timeout=100, redis_reap_interval=50
    ) as bus:
        pool = bus._link.pool
        # REDIS_POOL_MIN: so many are ready before anybody asks
        await eventually(lambda: pool.size == 2)
        # REDIS_POOL_MAX: however many ask at once
        await asyncio.gather(*(bus._link.command("PING") for _ in range(50)))
        assert pool.size == 6
        # REDIS_IDLE_TIMEOUT and REDIS_REAP_INTERVAL: what is idle goes, down to the minimum
        await eventually(lambda: pool.size == 2)
        assert await bus._link.command("PING")


async def test_redis_reap_interval_is_how_often_idle_connections_are_looked_for(connect: Connect) -> None:
    async with connect(redis_pool_min=0, redis_idle_timeout=1, redis_reap_interval=3_600_000) as bus:
        await asyncio.gather(*(bus._link.command("PING") for _ in range(5)))
        await asyncio.sleep(0.1)
        assert bus._link.pool.size == 5


async def test_redis_acquire_timeout_bounds_the_wait_for_a_connection(connect: Connect) -> None:
    async with connect(redis_pool_min=0, redis_pool_max=1, redis_acquire_timeout=50) as bus:
        wire = await bus._link.pool.take()
        with pytest.raises(
            redis.ConnectionError,
            match=r"all 1 connections were in use for 0\.05 s \(REDIS_POOL_MAX, REDIS_ACQUIRE_TIMEOUT\)",
        ):
            await bus._link.command("PING")
        # And a busy pool is not taken for a Redis that is away: a read goes on to the store, L1 stays in use
        assert await bus.get("00000000-0000-0000-0000-000000000001") is None
        assert bus.stats().misses == 1
        assert (await bus.get("00000000-0000-0000-0000-000000000001"), bus.stats().hits_local) == (None, 1)
        assert bus._feed.heartbeat.up
        bus._link.pool.give_back(wire)
        assert await bus._link.command("PING")


async def test_redis_create_timeout_bounds_the_opening_of_a_connection(settings: Settings) -> None:
    # Given an address that takes no connection: the queue of the listening socket is full
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:
            caller.setblocking(False)
            with suppress(BlockingIOError):
                caller.connect(deaf.getsockname())
        link = Link(
            settings.model_copy(
                update={
                    "redis_url": f"redis://127.0.0.1:{deaf.getsockname()[1]}",
                    "redis_create_timeout": 100,
                    "redis_timeout": 60,
                }
            )
        )
        async with asyncio.timeout(20):
            with pytest.raises(redis.TimeoutError, match="Timeout connecting to server"):
                await link.command("PING")
        for caller in callers:
            caller.close()
        await link.close()


async def test_mnemobus_redis_timeout_bounds_the_wait_for_an_answer(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    link = Link(settings.model_copy(update={"redis_url": server.url, "redis_timeout": 0.1}))
    await link.command("PING")
    server.pause()
    async with asyncio.timeout(20):
        with pytest.raises(AWAY):
            await link.command("PING")
    server.resume()
    await link.close()


async def test_redis_destroy_timeout_bounds_the_closing_of_a_connection(
    own_redis: Any, settings: Settings
) -> None:
    # Given a connection that can't be closed in order: what was sent on it last is not taken by the server
    server: RedisServer = own_redis()
    link = Link(settings.model_copy(update={"redis_url": server.url, "redis_destroy_timeout": 100}))
    wire = await link.pool.take()
    server.pause()
    heard: list[object] = []
    wire.call(b"x" * (16 << 20), 1, 60, heard.append)
    link.pool.give_back(wire)
    # Then it is cut after that time
    async with asyncio.timeout(20):
        await link.close()
    assert wire.closed.done() and [type(outcome) for outcome in heard] == [redis.ConnectionError]
    server.resume()


async def test_redis_create_retry_interval_is_the_pause_between_attempts(
    settings: Settings, connect: Connect
) -> None:
    async def attempts(interval: int) -> int:
        """How often a bus tries to connect, in half a second, to a server that hangs up at once."""
        calls = 0

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal calls
            calls += 1
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with connect(redis_url=f"redis://127.0.0.1:{port}", redis_create_retry_interval=interval):
            calls = 0
            await asyncio.sleep(0.5)
            found = calls
        server.close()
        return found

    assert await attempts(20) > 3 * await attempts(400)


@pytest.mark.parametrize("protocol", [2, 3])
async def test_mnemobus_redis_protocol(settings: Settings, connect: Connect, protocol: int) -> None:
    async with connect(redis_protocol=protocol) as bus:
        # A hash is a map in version 3, and a list of names and values in version 2
        layout = await bus._link.command("HGETALL", bus._link.keys.layout)
        assert type(layout) is {2: list, 3: dict}[protocol]


# What they do: the store


async def test_database_url_and_the_folder_is_made(
    settings: Settings, tmp_path: Path, connect: Connect
) -> None:
    path = tmp_path / "some" / "where" / "memories.db"
    async with connect(database_url=f"sqlite:///{path}"):
        assert path.exists()


async def test_database_pool_max_and_timeout(settings: Settings, postgres_url: str, connect: Connect) -> None:
    import psycopg

    async with connect(
        database_url=postgres_url, database_pool_max=2, database_timeout=0.5, local_max_entries=0
    ) as bus:
        await asyncio.gather(*(bus.recent("messages", room=f"r{n}") for n in range(20)))
        async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as other:
            cursor = await other.execute(
                "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
                " and backend_type = 'client backend'"
            )
            row = await cursor.fetchone()
            assert row is not None
            assert 1 <= row[0] <= 2
            # A query that hangs is given up
            async with other.transaction():
                await other.execute("lock table mnemobus.memories in access exclusive mode")
                with pytest.raises(StoreUnavailable):
                    await bus.recent("messages", room="other")
        assert len(await bus.recent("messages", room="other")) == 0


# What they do: writes


async def test_mnemobus_durability_is_the_default_of_each_write(connect: Connect) -> None:
    async with connect(durability="committed", write_timeout=0.1) as bus:
        with pytest.raises(NotCommitted):
            await bus.write(said("x"))
        await bus.write(said("x"), durability="logged")


async def test_mnemobus_max_memory_bytes(connect: Connect) -> None:
    async with connect(max_memory_bytes=200) as bus:
        with pytest.raises(mnemobus.MemoryTooLarge, match=r"more than max_memory_bytes \(200\)"):
            await bus.write(said("x" * 200))
        await bus.write(said("x" * 20))


# What they do: caches


async def test_mnemobus_heartbeat_is_how_often_the_feed_is_verified(connect: Connect) -> None:
    async with (
        connect(heartbeat=0.05, max_staleness=1) as often,
        connect(heartbeat=0.5, max_staleness=1) as seldom,
    ):
        before = often._feed.heartbeat.beats, seldom._feed.heartbeat.beats
        await asyncio.sleep(1)
        assert often._feed.heartbeat.beats - before[0] > 2 * (seldom._feed.heartbeat.beats - before[1])


async def test_mnemobus_max_staleness_is_how_long_a_copy_is_served_unverified(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    given = {**settings.model_dump(), "redis_url": server.url, "heartbeat": 0.1, "redis_timeout": 0.2}
    async with (
        mnemobus.connect(**{**given, "max_staleness": 0.3}) as short,
        mnemobus.connect(**{**given, "max_staleness": 60}) as long,
    ):

        async def source(bus: mnemobus.Bus) -> str:
            return (await bus.recent("messages", room="r1")).source

        for bus in (short, long):
            await bus.recent("messages", room="r1")
            assert await source(bus) == "local"
        server.stop()
        await eventually(lambda: is_store(short))
        assert await source(long) == "local"


async def is_store(bus: mnemobus.Bus) -> bool:
    return (await bus.recent("messages", room="r1")).source == "store"


async def test_mnemobus_lease_is_how_long_one_reader_holds_back_the_others(
    settings: Settings, connect: Connect
) -> None:
    async with connect(lease=0.2) as bus:
        shared = bus._shared
        first = await shared.lookup("room:t:r", b"q", 60)
        assert first is not None
        assert await shared.lookup("room:t:r", b"q", 60) is None
        await eventually(lambda: granted(bus))
        # The first came too late
        assert not await shared.fill(first, b"late")  # type: ignore[arg-type]


async def granted(bus: mnemobus.Bus) -> bool:
    return await bus._shared.lookup("room:t:r", b"q", 60) is not None


async def test_mnemobus_local_max_entries_and_bytes(connect: Connect) -> None:
    async with connect(local_max_entries=5) as few, connect(local_max_bytes=3000) as small:
        for bus in (few, small):
            for n in range(20):
                await bus.recent("messages", room=f"r{n}")
            assert bus.stats().evictions > 0
        assert few.stats().entries == 5
        assert small.stats().bytes <= 3000


async def test_times_to_live_by_class_and_table(settings: Settings, connect: Connect) -> None:
    ttls = {
        "ttl_short": 100,
        "ttl_medium": 200,
        "ttl_long": 300,
        "table_ttl": {"messages": "short", "facts": "medium", "x": 40.0},
    }
    async with connect(**ttls) as bus, redis.asyncio.Redis.from_url(settings.redis_url) as client:
        for table, seconds in (("messages", 100), ("facts", 200), ("anything", 300), ("x", 40)):
            await bus.recent(table, room="r")
            key = bus._link.keys.bucket(bus._link.epoch, f"room:{table}:r")
            assert seconds - 5 < await client.ttl(key) <= seconds


async def test_a_copy_is_not_served_beyond_its_time_to_live(connect: Connect) -> None:
    async with connect(ttl_short=0.3) as bus:
        await bus.recent("messages", room="r")
        assert (await bus.recent("messages", room="r")).source == "local"
        await eventually(lambda: not_local(bus))


async def not_local(bus: mnemobus.Bus) -> bool:
    return (await bus.recent("messages", room="r")).source != "local"


def test_the_environment_of_a_real_process(tmp_path: Path) -> None:
    """Through the environment of another process, as a deployment sets them."""
    code = (
        "from mnemobus import Settings; s = Settings.load(); print(s.batch_size, s.retention, s.feed_length)"
    )
    environment = os.environ | {
        "MNEMOBUS_BATCH_SIZE": "7",
        "MNEMOBUS_RETENTION": "60",
        "MNEMOBUS_FEED_LENGTH": "99",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["7", "60.0", "99"]
