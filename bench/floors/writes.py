"""Floors of writes: XADD, with the fields that the bus writes; over a raw socket, and through redis-py."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import hiredis
from redis.asyncio import Redis

from mnemobus import Memory
from mnemobus.log.events import Event
from mnemobus.records import encode

Fields = dict[str | bytes | int, str | bytes | int]


def fields(memory: Memory) -> Fields:
    """The log entry of a write of this memory."""
    flat = Event.put(encode(memory, 1 << 30)).fields()
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def one(client: Redis, key: str, entry: Fields) -> bytes:
    """A bare XADD; its ID."""
    id: bytes = await client.xadd(key, entry)
    return id


async def pipelined(client: Redis, key: str, entries: Sequence[Fields], size: int = 100) -> float:
    """All entries in pipelines of ``size`` XADDs, one pipeline after the other; returns the seconds."""
    start = time.perf_counter()
    for at in range(0, len(entries), size):
        async with client.pipeline(transaction=False) as pipe:
            for entry in entries[at : at + size]:
                pipe.xadd(key, entry)
            await pipe.execute()
    return time.perf_counter() - start


class Wire(asyncio.Protocol):
    """Only a connection to Redis: one command at a time, written at once, its answer parsed by hiredis. No pool, no
    timeout, no login."""

    _transport: asyncio.Transport
    _answer: asyncio.Future[Any]

    def __init__(self) -> None:
        self._parser = hiredis.Reader()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, redis_url: str) -> Self:
        address = urlsplit(redis_url)
        _, wire = await asyncio.get_running_loop().create_connection(
            cls, address.hostname, address.port or 6379
        )
        return wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def call(self, *command: Any) -> asyncio.Future[Any]:
        self._answer = self._loop.create_future()
        self._transport.write(hiredis.pack_command(command))
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        answer = self._parser.gets()
        if answer is not False:
            self._answer.set_result(answer)

    def close(self) -> None:
        self._transport.close()


class Blocking:
    """The same without asyncio: a socket that is written to, and read until the answer is there."""

    def __init__(self, redis_url: str) -> None:
        address = urlsplit(redis_url)
        self._socket = socket.create_connection((address.hostname or "127.0.0.1", address.port or 6379))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = hiredis.Reader()

    def call(self, *command: Any) -> Any:
        self._socket.sendall(hiredis.pack_command(command))
        return self.receive()

    def receive(self) -> Any:
        """The next answer or message."""
        while (answer := self._parser.gets()) is False:
            self._parser.feed(self._socket.recv(65536))
        return answer

    def close(self) -> None:
        self._socket.close()


def flat(memory: Memory) -> list[Any]:
    """The fields of the entry, alternating with their values, as they follow ``XADD key *``."""
    return list(Event.put(encode(memory, 1 << 30)).fields())
