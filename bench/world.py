"""The environment of every task: servers, settings, memories."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

import mnemobus
from mnemobus import Memory, Settings
from servers import (
    POSTGRES_IMAGE,
    REDIS_IMAGE,
    NoServer,
    PostgresServer,
    RedisServer,
    Workers,
    docker,
    free_port,
    has_image,
    redis_binaries,
    spawn,
    wait_until,
)
from servers import end as end_process

EMBEDDING = 384
"""Floats of an embedding, as many as small sentence models give."""


@dataclass(slots=True)
class World:
    """The servers, a folder, and how much to measure."""

    redis_url: str
    redis_version: str
    postgres_url: str
    postgres_version: str
    folder: Path
    quick: bool

    def rounds(self, full: int, quick: int = 3) -> int:
        return quick if self.quick else full

    def some(self, full: int, quick: int) -> int:
        """The number of items for a full run, or for a quick one."""
        return quick if self.quick else full

    def settings(self, store: str = "sqlite", **overrides: Any) -> Settings:
        """The settings of a new bus: the defaults, except for the servers."""
        name = f"bench-{secrets.token_hex(4)}"
        url = f"sqlite:///{self.folder}/{name}.db" if store == "sqlite" else self.database(name)
        return Settings.load(
            **{
                "redis_url": self.redis_url,
                "redis_key_prefix": name,
                "database_url": url,
                "data_dir": self.folder / name,
                **overrides,
            }
        )

    def database(self, name: str = "") -> str:
        """The URL of a new PostgreSQL database."""
        import psycopg
        from psycopg import sql

        name = name or f"bench-{secrets.token_hex(4)}"
        with psycopg.connect(self.postgres_url, autocommit=True) as connection:
            create = sql.SQL("create database {} encoding 'UTF8' template template0")
            connection.execute(create.format(sql.Identifier(name)))
        return self.postgres_url.rpartition("/")[0] + "/" + name

    @contextlib.contextmanager
    def workers(self, settings: Settings, processes: int = 1, threads: int = 0) -> Iterator[Workers]:
        """The worker pool, as in production."""
        pool = Workers(settings, self.folder, processes, threads or settings.worker_threads)
        try:
            yield pool
        finally:
            pool.stop()

    def flush(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()


WORDS = (
    "soup",
    "is",
    "salty",
    "and",
    "nobody",
    "said",
    "so",
    "when",
    "it",
    "was",
    "served",
    "in",
    "the",
    "kitchen",
)


def message(room: str, number: int, *, embedding: Sequence[float] | None = None, **more: Any) -> Memory:
    """A message as people write it: some dozens of words, a speaker, a time."""
    say = random.Random(number)
    text = " ".join(say.choice(WORDS) for _ in range(say.randint(8, 32)))
    return Memory(
        table="messages",
        room=room,
        entity=f"e{number % 7}",
        agent="bench",
        content={"text": text, "n": number},
        metadata={"turn": number, "session": number // 20},
        embedding=embedding,
        **more,
    )


def vector(number: int) -> list[float]:
    draw = random.Random(number)
    return [draw.uniform(-1, 1) for _ in range(EMBEDDING)]


# Servers: containers share the network of the machine, so that no proxy is between. fsync is on.


@contextlib.contextmanager
def _container(image: str, command: Sequence[str], **environment: str) -> Iterator[None]:
    docker()
    if not has_image(image):
        raise NoServer(f"the Docker engine has no image {image} and could not pull it")
    name = f"mnemobus-bench-{secrets.token_hex(4)}"
    run = ["docker", "run", "--rm", "--network", "host", "--name", name]
    for key, value in environment.items():
        run += ["-e", f"{key}={value}"]
    process = spawn([*run, image, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["docker", "stop", "-t", "5", name], capture_output=True, check=False)
        end_process(process)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, str]]:
    """URL and version of a Redis with an append-only file: a given one, one in a container, or a local binary."""
    with contextlib.ExitStack() as stack:
        url = os.environ.get("BENCH_REDIS_URL", "")
        if not url:
            try:
                port = free_port()
                command = [
                    "redis-server",
                    "--port",
                    str(port),
                    "--bind",
                    "127.0.0.1",
                    "--appendonly",
                    "yes",
                    "--save",
                    "",
                ]
                stack.enter_context(_container(REDIS_IMAGE, command))
                url = f"redis://127.0.0.1:{port}/0"
            except NoServer:
                found = redis_binaries()
                if not found:
                    raise
                server = RedisServer(found.get("redis-system") or next(iter(found.values())), folder)
                server.start()
                stack.callback(server.stop)
                url = f"{server.url}/0"
        with redis.Redis.from_url(url) as client:
            wait_until(lambda: _answers(client.ping), 30, what="Redis to answer")
            version = str(client.info("server")["redis_version"])
        yield url, version


@contextlib.contextmanager
def postgres_server() -> Iterator[tuple[str, str]]:
    """URL and version of a PostgreSQL."""
    import psycopg

    with contextlib.ExitStack() as stack:
        url = os.environ.get("BENCH_DATABASE_URL", "")
        if not url:
            try:
                port, password = free_port(), secrets.token_hex(8)
                command = [
                    "postgres",
                    "-p",
                    str(port),
                    "-c",
                    "listen_addresses=127.0.0.1",
                    "-c",
                    "max_connections=200",
                ]
                stack.enter_context(_container(POSTGRES_IMAGE, command, POSTGRES_PASSWORD=password))
                url = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
            except NoServer:
                server = PostgresServer(fsync=True)
                stack.callback(server.close)
                server.start()
                url = server.url
        wait_until(
            lambda: _answers(lambda: psycopg.connect(url, connect_timeout=2).close()),
            60,
            what="PostgreSQL to answer",
        )
        with psycopg.connect(url) as connection:
            version = f"{connection.info.server_version // 10_000}"
        yield url, version


def _answers(call: Any) -> bool:
    import psycopg

    with contextlib.suppress(redis.RedisError, psycopg.OperationalError):
        call()
        return True
    return False


async def stored(bus: mnemobus.Bus, memories: Sequence[Memory], durability: Any = None) -> None:
    """Write memories and wait until the store has them."""
    receipts = await bus.write_many(memories, durability=durability)
    for receipt in receipts:
        await receipt.committed(60)
