"""A store that is down for a minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from mnemobus import Settings
from mnemobus_workers.broker import DEAD_AFTER
from outside import Log, stored
from scenarios.telling import held, opened, said
from servers import PostgresServer, Workers, eventually

SECONDS = 60.0
CLAIM_IDLE = 0.5


@pytest.fixture
def protocol() -> int:
    """Of one bus; the other has RESP2."""
    return 3


async def test_g1_g7_a_store_that_is_down_for_a_minute_makes_no_dead_letters(
    own_postgres: PostgresServer, settings: Settings, workers: Callable[..., Workers]
) -> None:
    # Given two buses with workers of their own, RESP2 and RESP3, on a PostgreSQL; workers that claim from each other so
    # soon that an event would be given up after a few seconds, if it were the event's fault
    changes = {"database_url": own_postgres.url, "claim_idle": CLAIM_IDLE, "log_partitions": 1}
    both = {
        f"r{p}": settings.model_copy(
            update={
                **changes,
                "redis_protocol": p,
                "redis_key_prefix": f"{settings.redis_key_prefix}-{p}",
                "database_namespace": f"bus{p}",
                "data_dir": settings.data_dir / str(p),
            }
        )
        for p in (2, 3)
    }
    assert SECONDS > 2 * DEAD_AFTER * CLAIM_IDLE
    async with AsyncExitStack() as stack:
        buses = {room: await stack.enter_async_context(opened(s)) for room, s in both.items()}
        logs = {room: Log(s) for room, s in both.items()}
        pools = {}
        for room, s in both.items():
            pools[room] = await asyncio.to_thread(workers, s, 2, 1)
            await buses[room].write(said("before", room), durability="committed")
            assert await held(buses[room], room) == ["before"]

        # When the store is down for a minute, while writes go on, and halfway all workers are killed and replaced
        own_postgres.stop()
        began = time.monotonic()
        receipts = []
        written = {room: ["before"] for room in both}
        replaced = False
        while time.monotonic() - began < SECONDS:
            for room, bus in buses.items():
                text = f"text {len(written[room])}"
                receipts.append(await bus.write(said(text, room)))
                written[room].append(text)
            if not replaced and time.monotonic() - began > SECONDS / 2:
                replaced = True
                for room, s in both.items():
                    pools[room].kill()
                    pools[room] = await asyncio.to_thread(workers, s, 2, 1)
            await asyncio.sleep(0.5)

        # Then nothing is given up, and what was delivered stays with those that wait for the store
        for room, log in logs.items():
            assert log.letters() == []
            pending = log.pending()
            assert pending and max(n for _, _, n in pending.values()) <= 3
            assert "trying again until it works" in pools[room].log.read_text()

        # And when it is back, all of it is committed
        own_postgres.start()
        await asyncio.gather(*(receipt.committed(20) for receipt in receipts))
        for room, log in logs.items():
            await eventually(log.done)
            assert log.letters() == []
            assert await stored(both[room], room) == sorted(written[room])
