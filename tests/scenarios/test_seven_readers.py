"""One writer and seven readers, each a process, on one memory, for half a minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnemobus import Settings
from scenarios.telling import Player, opened, said
from servers import Workers, eventually

SECONDS = 30.0


@pytest.fixture
def protocol() -> int:
    """Of the writer; the readers have one or the other."""
    return 3


async def test_g2_g5_g6_versions_only_rise_for_seven_readers_and_the_writer_reads_its_own(
    settings: Settings, workers: Callable[..., Workers], tmp_path: Path
) -> None:
    # Given a memory, one process that will write it, and seven that will read it, with RESP2 and RESP3 by turns
    settings = settings.model_copy(
        update={"heartbeat": 1.0, "max_staleness": 2.0, "own_write_timeout": 20.0, "claim_idle": 5.0}
    )
    workers(settings)
    memory = said("before")
    writer = Player(settings, tmp_path, "write")
    readers = [
        Player(settings.model_copy(update={"redis_protocol": 2 + n % 2}), tmp_path, "read") for n in range(7)
    ]
    try:
        async with opened(settings) as bus:
            await bus.write(memory, durability="committed")
            for player in (writer, *readers):
                await player.tell(part="look", ids=[memory.id])
            await asyncio.gather(*(player.hear() for player in (writer, *readers)))

            # When they do so for half a minute
            until = time.monotonic() + SECONDS
            for player in (writer, *readers):
                await player.tell(id=memory.id, until=until)
            wrote = await writer.hear()
            read = await asyncio.gather(*(reader.hear() for reader in readers))

            # Then the writer has read each of its writes, and no reader an older version after a newer one
            assert wrote["unread"] == []
            assert [report["fallen"] for report in read] == [[]] * 7
            # and they really went along, from copies of their own
            assert wrote["writes"] > 100
            for report in read:
                assert report["versions"] > wrote["writes"] / 10 and report["reads"] > report["versions"]

            # And in the end all have the last one
            async def backlog() -> int:
                return (await bus.health()).backlog

            async def applied() -> bool:
                return await backlog() == 0

            await eventually(applied)
            ends = []
            for player in (writer, *readers):

                async def last(player: Player = player) -> bool:
                    await player.tell(part="look", ids=[memory.id])
                    ends.append(await player.hear())
                    return bool(ends[-1]["seen"][memory.id][1] == {"n": wrote["writes"]})

                await eventually(last, timeout=settings.max_staleness)
            assert all(report["held"] > 0 for report in ends)
    finally:
        for player in (writer, *readers):
            player.close()
