"""Wires: a bus's connections to Redis, each for one call at a time, and the pool of wires.

redis-py opens a connection: address, TLS, login, protocol. Then a `Wire` takes over the transport. A call is one write.
Its replies are parsed as they arrive and delivered together: there is no task, lock or stream in between.
docs/performance.md tells the gain.

One call at a time uses a wire, and may carry many commands. A call that is cancelled, or not answered in time, leaves
replies that nobody waits for: its wire is cut. The pool notices at once if an idle wire breaks, and gives it to nobody.
If a server says that it takes no writes, as after a failover, its wire is cut, and all others of the same age with it.

An `Ear` is a connection on which the server sends messages that nobody asked for. They are delivered in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import hiredis
import redis.exceptions
from redis.asyncio.connection import AbstractConnection

from .server_errors import REPLACED, code_of

Argument = str | bytes | int | float
Command = tuple[Argument, ...]


class Busy(redis.exceptions.ConnectionError):
    """All connections of the pool were in use for too long. The load is too high; this does not mean that Redis is
    away."""


Done = Callable[[list[Any] | Exception], None]
"""Called with the outcome of a call."""

_MORE: Final = object()
"""The parser's answer while a reply is incomplete."""


def pack(commands: Sequence[Command]) -> bytes:
    """Encode commands for a wire."""
    return b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]


def _error(parse: Callable[[str], Exception], text: str) -> Exception:
    """The redis-py exception for an error that a server answered."""
    try:
        return parse(text)
    except (ValueError, LookupError):  # MOVED or ASK, and then not what redis-py expects
        return redis.exceptions.ResponseError(text)


def _broken(error: Exception | None) -> redis.exceptions.ConnectionError:
    """That a connection was closed, and why."""
    return redis.exceptions.ConnectionError(
        f"Error while reading: {error}" if error else "Connection closed by server."
    )


class _Line(asyncio.Protocol):
    """An open connection, whose handshake is done. Used from one event loop."""

    def __init__(self, connection: AbstractConnection) -> None:
        writer = connection._writer
        assert writer is not None, "the connection is open"
        # From here on this class owns the transport, and closes it. The writer would close it on its own deletion.
        self._writer, connection._writer, connection._reader = writer, None, None
        self._transport = writer.transport
        self._parse_error: Callable[[str], Exception] = connection._parser.parse_error
        self._parser = hiredis.Reader(
            replyError=self._refused,
            protocolError=redis.exceptions.InvalidResponse,
            notEnoughData=_MORE,
        )
        self._transport.set_protocol(self)

    def _refused(self, text: str) -> Exception:
        """An error that the server answered."""
        return _error(self._parse_error, text)

    def cut(self) -> None:
        """Close at once."""
        self._transport.abort()


class Ear(_Line):
    """A connection on which the server speaks unasked.

    hear   called with each thing that it says, in order, from the event loop, in the moment in which it arrives
    ended  raises why nothing comes any more: an error that the server answered, redis-py's ConnectionError, or what
           `hear` raised
    """

    def __init__(self, connection: AbstractConnection, hear: Callable[[Any], None]) -> None:
        super().__init__(connection)
        self._hear = hear
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, *command: Argument) -> None:
        """Send a command, unless the connection is closed. What is answered is heard."""
        if not self._transport.is_closing():
            self._transport.write(pack((command,)))

    def data_received(self, data: bytes) -> None:
        parser, hear = self._parser, self._hear
        try:
            parser.feed(data)
            while (said := parser.gets()) is not _MORE:
                if isinstance(said, Exception):
                    raise said
                hear(said)
        except redis.exceptions.InvalidResponse as error:
            self._end(redis.exceptions.ConnectionError(f"this is no Redis: {error}"))
        except Exception as error:  # noqa: BLE001 (who listens is told, whatever it is)
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(_broken(error))

    def _end(self, error: Exception) -> None:
        self._transport.abort()
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()  # who was cancelled won't fetch it


class Wire(_Line):
    """A connection for one call at a time."""

    def __init__(self, connection: AbstractConnection) -> None:
        super().__init__(connection)
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()
        """When it was opened."""
        self._timer: asyncio.TimerHandle | None = None
        """Set for the deadline of this call or of one before: most are answered long before."""
        self._deadline = 0.0
        self._replies: list[Any] = []
        self._expected = 0
        self._done: Done | None = None
        self.refusal: Exception | None = None
        """What its server said, if that means that it takes no writes."""
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done once it is closed, by either side."""

    @property
    def open(self) -> bool:
        """Whether a call may still succeed."""
        return self.refusal is None and not self._transport.is_closing()

    def _refused(self, text: str) -> Exception:
        error = _error(self._parse_error, text)
        if code_of(error) in REPLACED:
            self.refusal = error
        return error

    def call(self, packed: bytes, expected: int, timeout: float, done: Done) -> None:
        """Send commands, and call ``done`` with their replies, in order, with errors as values; or with redis-py's
        ConnectionError or TimeoutError, which end the wire. It is called once, from the event loop, as soon as the last
        reply arrives, and must not raise."""
        if self._transport.is_closing():
            self._loop.call_soon(done, redis.exceptions.ConnectionError("Connection closed by server."))
            return
        self._expected, self._replies, self._done = expected, [], done
        self._deadline = deadline = self._loop.time() + timeout
        timer = self._timer
        if timer is None or timer.when() > deadline:
            if timer is not None:
                timer.cancel()
            self._timer = self._loop.call_at(deadline, self._look_at_time, timeout)
        self._transport.write(packed)

    def _look_at_time(self, timeout: float) -> None:
        self._timer = None
        if self._done is None:
            return
        if self._loop.time() < self._deadline:  # that of a later call
            self._timer = self._loop.call_at(self._deadline, self._look_at_time, timeout)
        else:
            self._fail(redis.exceptions.TimeoutError(f"no answer within {timeout:g} s"))

    def _fail(self, error: Exception) -> None:
        self._transport.abort()
        self._finish(error)

    def _finish(self, outcome: list[Any] | Exception) -> None:
        done, self._done, self._expected, self._replies = self._done, None, 0, []
        if done is not None:
            done(outcome)

    def data_received(self, data: bytes) -> None:
        parser, replies = self._parser, self._replies
        try:
            parser.feed(data)
            while (reply := parser.gets()) is not _MORE:
                if not isinstance(reply, hiredis.PushNotification):  # nobody asked for one
                    replies.append(reply)
        except redis.exceptions.InvalidResponse as error:
            self._fail(redis.exceptions.ConnectionError(f"this is not Redis: {error}"))
            return
        missing = self._expected - len(replies)
        if missing < 0:
            self._fail(redis.exceptions.ConnectionError("the server said more than it was asked"))
        elif not missing:
            self._finish(replies)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._finish(_broken(error))
        if not self.closed.done():
            self.closed.set_result(None)

    async def close(self, patience: float) -> None:
        """Close in order; after ``patience`` seconds, without waiting for the server."""
        self._transport.close()
        try:
            async with asyncio.timeout(patience):
                await asyncio.shield(self.closed)
        except TimeoutError:
            self.cut()


class Pool:
    """Wires to one server. They are opened when needed, at most ``maximum``. Call `reap` from time to time: it closes
    those that were idle for ``idle`` seconds, and keeps ``minimum`` ready."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Wire]],
        *,
        on_refusal: Callable[[Exception], None],
        timeout: float,
        maximum: int,
        acquire: float,
        minimum: int = 0,
        idle: float = float("inf"),
        destroy: float = 0.0,
    ) -> None:
        self._connect = connect
        self._on_refusal = on_refusal
        """Called when a wire is dropped because its server takes no writes; it must call `renew`."""
        self._timeout = timeout
        self._maximum = maximum
        self._acquire = acquire
        self._minimum = minimum
        self._idle_seconds = idle
        self._destroy = destroy
        self._idle: list[tuple[Wire, float]] = []
        """The idle wires, each with the time since when; the last used one comes last."""
        self._waiting: deque[asyncio.Future[Wire | None]] = deque()
        """The callers that wait for a wire. None as a result means that the caller may open one."""
        self._closed = False
        self._renewed = float("-inf")
        """When all wires were given up, by the loop's clock."""
        self.size = 0
        """How many wires there are: idle, in use, or being opened."""

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write. Returns the replies, in order, with errors as values.

        Raises Busy if no connection was free, and redis-py's ConnectionError or TimeoutError if Redis can't be reached;
        then Redis may have executed any of the commands, or none.
        """
        packed = pack(commands)
        wire = await self.take()
        answered: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def done(outcome: list[Any] | Exception) -> None:
            if answered.done():  # the caller was cancelled
                return
            if isinstance(outcome, list):
                answered.set_result(outcome)
            else:
                answered.set_exception(outcome)

        try:
            wire.call(packed, len(commands), self._timeout, done)
            replies = await answered
        except BaseException:
            self.drop(wire)
            raise
        self.give_back(wire)
        return replies

    def idle(self) -> Wire | None:
        """Take an idle wire, if there is one. The caller gives it back or drops it."""
        while self._idle:
            wire, _ = self._idle.pop()
            if wire.open:
                return wire
            self._gone()
        return None

    async def take(self) -> Wire:
        """Take a wire. The caller gives it back or drops it. Raises as `execute`."""
        wire = self.idle()
        if wire is not None:
            return wire
        if self.size < self._maximum:
            return await self._open()
        try:
            async with asyncio.timeout(self._acquire):
                found = await self._wait()
        except TimeoutError:
            raise Busy(
                f"all {self._maximum} connections were in use for {self._acquire:g} s (REDIS_POOL_MAX,"
                " REDIS_ACQUIRE_TIMEOUT)"
            ) from None
        return found or await self._open()

    async def _wait(self) -> Wire | None:
        """Wait for a wire that another caller gives back; None once the caller may open one."""
        while True:
            turn: asyncio.Future[Wire | None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                wire = await turn
            except BaseException:
                if turn.done() and not turn.cancelled():  # too late: it is somebody else's turn
                    given = turn.result()
                    self._pass_on(None) if given is None else self.give_back(given)
                raise
            if wire is not None:
                if wire.open:
                    return wire
                self._gone()
            if self.size < self._maximum:
                return None

    async def _open(self) -> Wire:
        self.size += 1
        try:
            if self._closed:
                raise redis.exceptions.ConnectionError("the bus is closed")
            return await self._connect()
        except BaseException:
            self._gone()
            raise

    def give_back(self, wire: Wire) -> None:
        if wire.open and not self._closed and wire.since > self._renewed:
            self._pass_on(wire)
        else:
            self.drop(wire)

    def drop(self, wire: Wire) -> None:
        """Cut a wire whose call was cancelled, or that broke."""
        wire.cut()
        self._gone()
        if wire.refusal is not None and wire.since > self._renewed:
            self._on_refusal(wire.refusal)

    def renew(self) -> None:
        """Give up all wires that there are: those that are idle now, those in use when they are given back."""
        self._renewed = asyncio.get_running_loop().time()
        idle, self._idle = self._idle, []
        for wire, _ in idle:
            self.drop(wire)

    def _gone(self) -> None:
        self.size -= 1
        self._pass_on(None)

    def _pass_on(self, wire: Wire | None) -> None:
        """Give a wire, or permission to open one, to the caller that has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(wire)
                return
        if wire is not None:
            self._idle.append((wire, asyncio.get_running_loop().time()))

    async def reap(self) -> None:
        """Close idle wires down to the minimum, and open up to it."""
        limit = asyncio.get_running_loop().time() - self._idle_seconds
        while self._idle and self.size > self._minimum and self._idle[0][1] <= limit:
            wire, _ = self._idle.pop(0)
            self._gone()
            await wire.close(self._destroy)
        while self.size < self._minimum:
            self.give_back(await self._open())

    async def close(self) -> None:
        """Close all idle wires, in order. Those in use are cut when they are given back."""
        self._closed = True
        idle, self._idle = self._idle, []
        self.size -= len(idle)
        await asyncio.gather(*(wire.close(self._destroy) for wire, _ in idle))


class BlockingWire:
    """An open connection, whose handshake is done, for one thread at a time."""

    def __init__(self, connection: Any, timeout: float) -> None:
        # From here on this class owns the socket, and closes it.
        taken: socket.socket = connection._sock
        self._socket, connection._sock = taken, None
        self._timeout = timeout
        self.since = time.monotonic()
        self.used = self.since
        self.refusal: Exception | None = None
        """What its server said, if that means that it takes no writes."""
        self._parse_error: Callable[[str], Exception] = connection._parser.parse_error
        self._parser = hiredis.Reader(
            replyError=self._refused,
            protocolError=redis.exceptions.InvalidResponse,
            notEnoughData=_MORE,
        )
        if type(taken) is socket.socket:
            # The system watches the timeout: Python would check before each call whether the socket is ready.
            taken.settimeout(None)
            whole = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, whole)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, whole)
        else:
            taken.settimeout(timeout)

    def _refused(self, text: str) -> Exception:
        error = _error(self._parse_error, text)
        if code_of(error) in REPLACED:
            self.refusal = error
        return error

    def call(self, commands: Sequence[Command]) -> list[Any]:
        """As `Pool.execute`; an error ends the wire."""
        parser, expected = self._parser, len(commands)
        replies: list[Any] = []
        try:
            self._socket.sendall(pack(commands))
            while True:
                reply = parser.gets()
                if reply is _MORE:
                    data = self._socket.recv(65_536)
                    if not data:
                        raise redis.exceptions.ConnectionError("Connection closed by server.")
                    parser.feed(data)
                elif not isinstance(reply, hiredis.PushNotification):  # nobody asked for one
                    replies.append(reply)
                    if len(replies) == expected:
                        break
        except (TimeoutError, BlockingIOError):
            raise redis.exceptions.TimeoutError(f"no answer within {self._timeout:g} s") from None
        except OSError as error:
            raise redis.exceptions.ConnectionError(f"Error while reading: {error}") from error
        except redis.exceptions.InvalidResponse as error:
            raise redis.exceptions.ConnectionError(f"this is not Redis: {error}") from error
        self.used = time.monotonic()
        return replies

    @property
    def quiet(self) -> bool:
        """Whether nothing arrived outside of a call, such as the end of the connection."""
        watch = select.poll()
        watch.register(self._socket, select.POLLIN)
        return not watch.poll(0)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


class BlockingWires:
    """Wires to one server, for threads. They are opened when needed: there are as many as simultaneous calls."""

    _UNCERTAIN: Final = 0.5
    """Seconds after which an idle wire is checked before it is used: it may have broken."""

    def __init__(self, connect: Callable[[], BlockingWire]) -> None:
        self._connect = connect
        self._idle: deque[BlockingWire] = deque()
        self._renewed = float("-inf")
        """When all wires were given up."""
        self._closed = False

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """As `Pool.execute`."""
        wire = self._take()
        try:
            replies = wire.call(commands)
        except BaseException:
            wire.cut()
            self.renew()  # the others of its age lead to the same server
            raise
        if wire.refusal is not None:
            wire.cut()
            self.renew()
        elif self._closed or wire.since <= self._renewed:
            wire.cut()
        else:
            self._idle.append(wire)
        return replies

    def _take(self) -> BlockingWire:
        if self._closed:
            raise redis.exceptions.ConnectionError("the connections are closed")
        while True:
            try:
                wire = self._idle.pop()
            except IndexError:
                return self._connect()
            if wire.since > self._renewed and (time.monotonic() - wire.used < self._UNCERTAIN or wire.quiet):
                return wire
            wire.cut()

    def renew(self) -> None:
        """Give up all wires that there are: those that are idle now, those in use when they are given back."""
        self._renewed = time.monotonic()
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().cut()

    def close(self) -> None:
        self._closed = True
        self.renew()
