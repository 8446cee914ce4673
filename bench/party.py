"""Programs in their own processes, called line by line.

The parent's side is a `Party`. A program answers with the methods of an object (`serve`), any number of calls at the
same time, and may send the parent messages without a call (`tell`). It ends when its input ends: so it ends with the
parent, even if that is killed.

Moments are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import orjson

_LINE = 1 << 26
"""Most bytes of a line."""

moment = time.monotonic_ns


class PartyFailed(Exception):
    """A call of another process raised, or the process is gone."""


class Party:
    """A process that runs ``python -m <module> <arguments>``."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._calls = 0
        self.on_told: Callable[[Any], None] | None = None
        """Called with each message that the process sends without a call."""

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=_LINE,
        )
        self._listening = asyncio.create_task(self._listen())
        try:
            await self.ask("ready")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._listening

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            number, answer, error = orjson.loads(line)
            if number == 0:
                if self.on_told is not None:
                    self.on_told(answer)
                continue
            asked = self._asked.pop(number)
            if asked.done():  # the caller has given up
                continue
            if error:
                asked.set_exception(PartyFailed(error))
            else:
                asked.set_result(answer)
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(PartyFailed(f"{' '.join(self._command[1:])} is gone"))

    async def ask(self, call: str, *arguments: Any) -> Any:
        """Have the process call a method; return its answer."""
        assert self._process.stdin is not None
        if self._listening.done():
            raise PartyFailed(f"{' '.join(self._command[1:])} is gone")
        self._calls = number = self._calls + 1
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(orjson.dumps([number, call, arguments]) + b"\n")
        return await asked


def _send(number: int, answer: Any, error: str = "") -> None:
    sys.stdout.buffer.write(orjson.dumps([number, answer, error]) + b"\n")
    sys.stdout.buffer.flush()


def tell(what: Any) -> None:
    """Send the parent a message."""
    _send(0, what)


async def serve(program: Any) -> None:
    """Answer calls with the methods of an object, until the input ends."""
    reader = asyncio.StreamReader(_LINE)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    tasks: set[asyncio.Task[None]] = set()

    async def answer(number: int, call: str, arguments: list[Any]) -> None:
        try:
            found = None if call == "ready" else await getattr(program, call)(*arguments)
        except Exception as error:  # noqa: BLE001 - the parent raises it
            _send(number, None, f"{call}: {type(error).__name__}: {error}")
        else:
            _send(number, found)

    async for line in reader:
        task = asyncio.create_task(answer(*orjson.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in tasks:
        task.cancel()
