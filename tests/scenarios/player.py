"""The parts that processes play in the scenarios: orders and reports are lines of JSON, times are CLOCK_MONOTONIC.

write    change one memory again and again, and read it after each write
read     read one memory again and again
race     change many memories, each at its moment, and read it right after
look     say what is seen of some memories
produce  write, under the name of a producer that is given
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import mnemobus
from mnemobus import Memory


async def write(bus: mnemobus.Bus, id: str, until: float) -> dict[str, Any]:
    rng = random.Random(1)
    number, unread = 0, []
    while time.monotonic() < until:
        for _ in range(rng.randint(1, 3)):  # the next while readers still fetch the last
            number += 1
            receipt = await bus.update(id, content={"n": number})
            await asyncio.sleep(rng.uniform(0, 0.008))
        memory = await bus.get(id)
        if memory is None or memory.version != receipt.version or memory.content["n"] != number:
            unread.append([number, memory and memory.content["n"]])
        await asyncio.sleep(rng.uniform(0, 0.05))
    return {"writes": number, "unread": unread}


async def read(bus: mnemobus.Bus, id: str, until: float) -> dict[str, Any]:
    reads, fallen, versions, last = 0, [], set(), None
    while time.monotonic() < until:
        memory = await bus.get(id)
        assert memory is not None
        reads += 1
        versions.add(memory.version)
        if last is not None and memory.version < last:
            fallen.append([str(last), str(memory.version)])
        last = memory.version
        await asyncio.sleep(0.01)
    return {"reads": reads, "versions": len(versions), "fallen": fallen}


async def race(bus: mnemobus.Bus, moments: dict[str, float], name: str) -> dict[str, Any]:
    versions = {}

    async def one(id: str, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        receipt = await bus.update(id, content={"text": name})
        versions[id] = str(receipt.version)
        await bus.get(id)

    await asyncio.gather(*(one(id, moment) for id, moment in moments.items()))
    return {"versions": versions}


async def look(bus: mnemobus.Bus, ids: list[str]) -> dict[str, Any]:
    """What this process sees now. It reads everything twice, so that its own copies are read, too."""
    seen = {}
    for _ in range(2):
        for id in ids:
            memory = await bus.get(id)
            assert memory is not None
            seen[id] = [str(memory.version), memory.content]
    return {"seen": seen, "held": bus.stats().hits_local, "waits": bus.stats().own_write_timeouts}


async def produce(bus: mnemobus.Bus, producer: str, text: str) -> dict[str, Any]:
    for publisher in (bus._writes.publishers, *bus._writes.publishers):
        publisher._producer = producer
    try:
        receipt = await bus.write(Memory(table="messages", room="r1", content={"text": text}))
    except mnemobus.MnemobusError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"version": str(receipt.version)}


PARTS = {"write": write, "read": read, "race": race, "look": look, "produce": produce}


async def main() -> None:
    async with mnemobus.connect() as bus:
        while line := await asyncio.to_thread(sys.stdin.readline):
            orders = json.loads(line)
            report = await PARTS[orders.pop("part", sys.argv[1])](bus, **orders)  # type: ignore[operator]
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
