"""One hop through Redis, by hand: PUBLISH over a raw socket, and a process that receives it on another.

    async with Hop(redis_url) as hop:
        times = await hop.publish(payload)

Moments are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from typing import NamedTuple, Self

from .writes import Blocking, Wire


class Times(NamedTuple):
    """Nanoseconds until the message was received: from the call of PUBLISH, and from its answer. The second is negative
    if the message overtakes the answer."""

    sent: int
    answered: int


class Hop:
    """A channel, a connection that publishes, and the process that listens."""

    def __init__(self, redis_url: str) -> None:
        self._url = redis_url
        self._channel = f"bench:{secrets.token_hex(4)}"

    async def __aenter__(self) -> Self:
        self._wire = await Wire.open(self._url)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.floors.hop", self._url, self._channel, stdout=asyncio.subprocess.PIPE
        )
        assert self._process.stdout is not None
        if await self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the listener did not start")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._wire.call("PUBLISH", self._channel, b"end")
        await self._process.wait()
        self._wire.close()

    async def publish(self, payload: bytes) -> Times:
        """Publish, and wait until the message is received."""
        assert self._process.stdout is not None
        sent = time.monotonic_ns()
        await self._wire.call("PUBLISH", self._channel, payload)
        answered = time.monotonic_ns()
        heard = int(await asyncio.wait_for(self._process.stdout.readline(), 30))
        return Times(heard - sent, heard - answered)


def listen(redis_url: str, channel: str) -> None:
    connection = Blocking(redis_url)
    connection.call("SUBSCRIBE", channel)
    print("ready", flush=True)
    while True:
        message = connection.receive()
        at = time.monotonic_ns()
        if message[2] == b"end":
            break
        print(at, flush=True)
    connection.close()


if __name__ == "__main__":
    listen(*sys.argv[1:])
