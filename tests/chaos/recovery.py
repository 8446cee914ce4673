"""Measures the time to recover: ``python tests/chaos/recovery.py``. Medians go to docs/guarantees.md.

Each figure is measured several times with real processes and real servers, on one machine:

- A worker process is killed with SIGKILL during a load: the time until all writes that were acknowledged before the
  kill are in the store, less the (negligible) time without a kill. Promised: claim_idle + 1 s.
- Redis is killed, and started again: the time until an agent serves its own copies again. Promised: two heartbeats.
- One message of the feed is lost: the time until the agent that missed it drops its copy. Promised: max_staleness.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
import redis.asyncio

import mnemobus
from mnemobus import Memory, Settings
from mnemobus.cache.l1 import clock
from mnemobus.keys import room_scope

sys.path.insert(0, str(Path(__file__).parents[1]))
from servers import RedisServer, Workers, eventually, redis_binaries

ROOM = room_scope("messages", "r1")


def said(text: str, room: str = "r1") -> Memory:
    return Memory(table="messages", room=room, content={"text": text})


class Bench:
    """A Redis, an SQLite store and the settings of all parties: the defaults, except for claim_idle if given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        binaries = redis_binaries()
        self.redis = RedisServer(
            binaries.get("redis-system") or next(iter(binaries.values())), folder / "redis"
        )
        self.redis.start()

    def settings(self) -> Settings:
        """The settings of a new bus."""
        name = secrets.token_hex(4)
        return Settings.load(
            redis_url=self.redis.url,
            redis_key_prefix=name,
            database_url=f"sqlite:///{self.folder}/{name}.db",
            data_dir=self.folder / name,
        )

    async def killed_worker(self) -> float:
        settings = self.settings()
        pools = [Workers(settings, self.folder, 1, 2) for _ in range(2)]
        try:
            async with mnemobus.connect(**settings.model_dump()) as bus:
                receipts = []
                for n in range(40):
                    receipts += await bus.write_many([said(str(m), f"room-{n % 8}") for m in range(50)])
                    if n == 20:
                        pools[0].kill()
                        killed = time.monotonic()
                        before = list(receipts)
                for receipt in before:
                    await receipt.committed(timeout=60)
                return time.monotonic() - killed
        finally:
            for pool in pools:
                pool.kill()

    async def returned_redis(self) -> float:
        settings = self.settings()
        pool = Workers(settings, self.folder, 1, 2)
        try:
            async with mnemobus.connect(**settings.model_dump()) as bus:
                await bus.write(said("x"), durability="committed")
                await eventually(lambda: _local(bus))
                self.redis.kill()
                await eventually(lambda: clock() > bus._local.fresh_until)
                back = time.monotonic()
                self.redis.start()
                await eventually(lambda: _local(bus), timeout=30)
                return time.monotonic() - back
        finally:
            pool.kill()

    async def lost_message(self) -> float:
        settings = self.settings()
        pool = Workers(settings, self.folder, 1, 2)
        try:
            async with (
                mnemobus.connect(**settings.model_dump()) as bus,
                redis.asyncio.Redis.from_url(self.redis.url) as client,
            ):
                await bus.write(said("x"), durability="committed")
                await eventually(lambda: _local(bus))
                await asyncio.sleep(secrets.randbelow(1000) / 1000)  # anywhere between two heartbeats
                feed = bus._link.keys.feed(bus._link.keys.feed_partition(ROOM))
                [(last, _)] = await client.xrevrange(feed, count=1)
                payload = orjson.dumps({"p": 0, "v": ["1-1"], "s": [ROOM]})
                drops = bus.stats().drops
                lost = time.monotonic()
                await client.xadd(feed, {"prev": last, "m": payload})  # and no PUBLISH
                await eventually(lambda: bus.stats().drops > drops)
                return time.monotonic() - lost
        finally:
            pool.kill()


async def _local(bus: mnemobus.Bus) -> bool:
    return (await bus.recent("messages", room="r1")).source == "local"


async def main(rounds: int) -> int:
    logging.disable(logging.WARNING)  # the errors here are intended
    defaults = Settings.load()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        cases: list[tuple[str, Callable[[], Awaitable[float]], float]] = [
            ("a killed worker's batches are committed", bench.killed_worker, defaults.claim_idle + 1),
            (
                "own copies are served again after Redis returned",
                bench.returned_redis,
                2 * defaults.heartbeat,
            ),
            ("a lost message is repaired", bench.lost_message, defaults.max_staleness),
        ]
        for name, measure, bound in cases:
            times = []
            for number in range(rounds):
                times.append(await measure())
                print(f"  {name}: {number + 1}/{rounds}, {times[-1]:.2f} s", file=sys.stderr, flush=True)
            median = statistics.median(times)
            failed += median > bound
            verdict = "within" if median <= bound else "BEYOND"
            print(
                f"{name}: median {median:.2f} s, from {min(times):.2f} to {max(times):.2f} s,"
                f" {verdict} {bound:g} s ({rounds} times)"
            )
        bench.redis.stop()
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="how often each is measured (10)")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error("--rounds must be above 0")
    raise SystemExit(asyncio.run(main(rounds)))
