"""What the scenarios share: memories, local copies, and processes that play a part."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mnemobus
from mnemobus import Memory, Settings
from servers import end, eventually, spawn

Connect = Callable[..., mnemobus.Bus]


def opened(settings: Settings, **overrides: Any) -> mnemobus.Bus:
    return mnemobus.connect(**{**settings.model_dump(), **overrides})


def said(text: str, room: str = "r1", **fields: Any) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)


def texts(memories: mnemobus.Memories) -> list[str]:
    return [memory.content["text"] for memory in memories]


async def held(bus: mnemobus.Bus, room: str = "r1") -> list[str]:
    """Wait until the bus has a room in its own process; return its content."""

    async def local() -> mnemobus.Memories | None:
        found = await bus.recent("messages", room=room)
        return found if found.source == "local" else None

    # An empty answer is one, too.
    while (found := await local()) is None:
        await asyncio.sleep(0.005)
    return texts(found)


async def sees(bus: mnemobus.Bus, expected: list[str], timeout: float, room: str = "r1") -> None:
    """Wait until the bus gives the expected answer."""

    async def there() -> bool:
        return texts(await bus.recent("messages", room=room)) == expected

    await eventually(there, timeout)


class Player:
    """A process that plays a part of player.py; it gets its orders, and reports, in one line of JSON each."""

    def __init__(self, settings: Settings, folder: Path, part: str) -> None:
        self._log = (folder / f"{part}-{id(self):x}.log").open("wb")
        self._process = spawn(
            [sys.executable, str(Path(__file__).with_name("player.py")), part],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | settings.environment(),
            cwd=folder,
        )

    def _tell(self, orders: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(orders).encode() + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, Path(self._log.name).read_text()
        return json.loads(line)

    async def tell(self, **orders: Any) -> None:
        await asyncio.to_thread(self._tell, orders)

    async def hear(self) -> Any:
        return await asyncio.to_thread(self._hear)

    def close(self) -> None:
        end(self._process, patience=5)
        self._log.close()
