"""An agent that writes and reads all the time, and keeps a record of it; it takes orders as agent_process.py does.

In some rooms that it shares with others, it makes memories, changes one of its own again and again, and reads the
newest. ``stop`` ends that, and answers with the answers that it got: see `Record`. ``shown`` answers what it reads.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass, field

import mnemobus
from mnemobus import Memory, Receipt
from mnemobus.memory import new_id

ROOMS = 6


@dataclass
class Record:
    """The answers that the agent got.

    writes   room, id, text and version of each acknowledged write, in the order in which it was made in that room
    refused  what writes failed with
    back     what a read lacked, or had older, than a read or a write of this agent before it
    """

    writes: list[tuple[str, str, str, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)
    reads: int = 0


class Busy:
    def __init__(self, bus: mnemobus.Bus) -> None:
        self.bus = bus
        self.record = Record()
        self.receipts: list[tuple[str, str, str, Receipt]] = []
        self.stopping = False
        self.tasks = [asyncio.create_task(self.be_in(f"room-{n}")) for n in range(ROOMS)]

    async def write(self, room: str, id: str, text: str) -> bool:
        memory = Memory(table="messages", room=room, id=id, content={"text": text})
        try:
            receipt = await self.bus.write(memory)
        except mnemobus.MnemobusError as error:
            self.record.refused.append(f"{type(error).__name__}: {error}")
            return False
        self.receipts.append((room, id, text, receipt))
        return True

    async def be_in(self, room: str) -> None:
        own = new_id()
        newest: dict[
            str, int
        ] = {}  # of each memory that is changed, by whomever: the last text that was seen
        n = 0
        while not self.stopping:
            n += 1
            wrote = await self.write(room, own, str(n))
            if wrote:
                newest[own] = n
            if n % 4 == 0:
                await self.write(room, new_id(), f"once {n}")
            found = await self.bus.recent("messages", room=room, limit=40)
            self.record.reads += 1
            if not found.stale:
                for memory in found:
                    text = memory.content["text"]
                    if text.isdigit():
                        if int(text) < newest.get(memory.id, 0):
                            self.record.back.append(f"{memory.id}: {text} after {newest[memory.id]}")
                        newest[memory.id] = max(newest.get(memory.id, 0), int(text))
            if n % 10 == 0:
                await self.receipts[-1][3].committed(30)
            await asyncio.sleep(0.005)

    async def stop(self) -> Record:
        self.stopping = True
        await asyncio.gather(*self.tasks)
        for room, id, text, receipt in self.receipts:
            await receipt.committed(30)
            self.record.writes.append((room, id, text, str(receipt.version)))
        return self.record

    async def shown(self) -> dict[str, list[tuple[str, str, str]]]:
        """By room: id, text and version of its newest memories."""
        rooms = [f"room-{n}" for n in range(ROOMS)]
        found = [await self.bus.recent("messages", room=room, limit=40) for room in rooms]
        return {
            room: [(memory.id, memory.content["text"], str(memory.version)) for memory in memories]
            for room, memories in zip(rooms, found, strict=True)
        }


async def main() -> None:
    async with mnemobus.connect() as bus:
        busy = Busy(bus)
        print(json.dumps({"answer": "ready"}), flush=True)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            call = json.loads(line)["call"]
            answer: object = None
            if call == "stop":
                answer = asdict(await busy.stop())
            elif call == "shown":
                answer = await busy.shown()
            elif call == "stats":
                answer = asdict(bus.stats())
            print(json.dumps({"answer": answer}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
