"""An agent that does what it is told: one JSON object a line on standard input, one answer a line.

``{"call": "write", "memory": {...}}`` calls ``bus.write``; other arguments are those of the method. Memories go as
dicts, receipts as [id, version], answers of `recent` with their source.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import Any

import mnemobus
from mnemobus import Memories, Memory, Receipt


def shown(value: Any) -> Any:
    if isinstance(value, Memory):
        return {**value.to_dict(), "version": str(value.version)}
    if isinstance(value, Memories):
        return {"items": [shown(m) for m in value], "source": value.source, "stale": value.stale}
    if isinstance(value, Receipt):
        return [value.id, str(value.version)]
    if isinstance(value, list):
        return [shown(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


async def serve(bus: mnemobus.Bus) -> None:
    receipts: list[Receipt] = []
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        call = command.pop("call")
        try:
            if call == "committed":  # everything that this agent was given a receipt for
                for receipt in receipts:
                    await receipt.committed(**command)
                receipts.clear()
                answer: Any = True
            else:
                if "memory" in command:
                    command["memory"] = Memory.from_dict(command["memory"])
                if "memories" in command:
                    command["memories"] = [Memory.from_dict(record) for record in command["memories"]]
                answer = getattr(bus, call)(**command)
                if asyncio.iscoroutine(answer):
                    answer = await answer
                receipts += [
                    r for r in (answer if isinstance(answer, list) else [answer]) if isinstance(r, Receipt)
                ]
        except mnemobus.MnemobusError as error:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
        else:
            print(json.dumps({"answer": shown(answer)}), flush=True)


async def main() -> None:
    async with mnemobus.connect() as bus:
        print(json.dumps({"answer": "ready"}), flush=True)
        await serve(bus)


if __name__ == "__main__":
    asyncio.run(main())
