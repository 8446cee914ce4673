"""The path of an invalidation by hand: XADD; a worker that reads, commits and publishes; a process that listens.

    async with Chain(redis_url, database_url) as chain:
        for memory in memories:
            await chain.write(memory)
        delays = await chain.delays()

A delay is the time from the moment when the writer has its answer to the moment when the reader has the message. Both
are read from CLOCK_MONOTONIC, which all processes of a machine share. A delay is negative if the message overtakes the
answer.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import threading
import time
from typing import Any, Self

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from mnemobus import Memory

from .drain import COUNT
from .store import sink
from .writes import fields

_GROUP = "floor"
_BLOCK_MS = 200


class Chain:
    """A log, a channel, and the two processes; the tables must be there (`store.prepare`)."""

    def __init__(self, redis_url: str, database_url: str) -> None:
        self._urls = redis_url, database_url
        self.log = f"bench:{secrets.token_hex(4)}:log"
        self._acknowledged: dict[str, int] = {}
        self._heard: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        self._client: AsyncRedis = AsyncRedis.from_url(self._urls[0])
        await self._client.xgroup_create(self.log, _GROUP, id="0", mkstream=True)
        self._processes = [await self._start("reader"), await self._start("worker")]
        self._listening = asyncio.create_task(self._listen(self._processes[0]))
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        await self._listening
        for process in self._processes:
            await process.wait()
        await self._client.delete(self.log)
        await self._client.aclose()

    async def _start(self, role: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.floors.chain", role, *self._urls, self.log,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        if await process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the {role} did not start")
        return process

    async def _listen(self, reader: asyncio.subprocess.Process) -> None:
        assert reader.stdout is not None
        async for line in reader.stdout:
            id, at = line.split()
            self._heard[id.decode()] = int(at)

    async def write(self, memory: Memory) -> str:
        id: bytes = await self._client.xadd(self.log, fields(memory))
        at = time.monotonic_ns()
        self._acknowledged[id.decode()] = at
        return id.decode()

    def clear(self) -> None:
        """Forget what was written so far."""
        self._acknowledged.clear()
        self._heard.clear()

    async def delays(self, timeout: float = 30.0) -> list[float]:
        """Seconds, in the order of the writes, once all messages have come; TimeoutError if they don't."""
        async with asyncio.timeout(timeout):
            while self._acknowledged.keys() - self._heard.keys():
                await asyncio.sleep(0.01)
        return [(self._heard[id] - at) / 1e9 for id, at in self._acknowledged.items()]


def _end_of_input() -> threading.Event:
    """Set once the process that started this one closes its input, or is gone."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return ended


def worker(redis_url: str, database_url: str, log: str) -> None:
    ended = _end_of_input()
    into = sink(database_url)
    with Redis.from_url(redis_url) as client:
        client.ping()
        print("ready", flush=True)
        while not ended.is_set():
            reply: Any = client.xreadgroup(_GROUP, "worker", {log: ">"}, count=COUNT, block=_BLOCK_MS)
            if reply:
                entries = reply[0][1]
                ids = [id for id, _ in entries]
                into.commit(entries)
                client.publish(f"{log}:channel", b" ".join(ids))
                client.xack(log, _GROUP, *ids)
    into.close()


def reader(redis_url: str, database_url: str, log: str) -> None:
    ended = _end_of_input()
    with Redis.from_url(redis_url) as client, client.pubsub(ignore_subscribe_messages=False) as channel:
        channel.subscribe(f"{log}:channel")
        while (message := channel.get_message(timeout=1)) is None or message["type"] != "subscribe":
            pass
        print("ready", flush=True)
        while not ended.is_set():
            message = channel.get_message(timeout=_BLOCK_MS / 1000)
            at = time.monotonic_ns()
            if message is not None:
                for id in message["data"].split():
                    print(id.decode(), at)
                sys.stdout.flush()


if __name__ == "__main__":
    {"worker": worker, "reader": reader}[sys.argv[1]](*sys.argv[2:])
