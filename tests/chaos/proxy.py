"""A party's connection to Redis, and the faults on it.

Each party (an agent, a pool of workers) has its own proxy, whose port is in its REDIS_URL. A fault of the proxy affects
every connection of that party, open ones and new ones, until it is lifted. It affects no other party.

    delay          each chunk is late, in either direction; order is kept
    cut            connections are closed, and new ones, too, as soon as they are accepted
    reset          open connections end with an RST
    withhold       nothing arrives any more, without an error: half open, in one direction or in both. What was held
                   is delivered when the fault is lifted, however late
    drop_pushes    single messages of feed and live channels are removed from what the server sends, and nothing else
    repeat_pushes  single messages of these channels come twice
    swap_pushes    a message of these channels comes after the next one on that connection
    trap           the next request that contains some bytes is withheld, or only the answer to it, and all after it on
                   that connection

To remove exactly one message, the proxy has to know where it begins and ends: it parses the server's side frame by
frame (RESP2 and RESP3). But it never waits for a complete frame if it has nothing to drop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

UP, DOWN = "up", "down"
"""The directions: from the party to Redis, and back."""

_CHUNK = 1 << 16
_RST = struct.pack("ii", 1, 0)
_MESSAGES = (b">3\r\n$7\r\nmessage\r\n", b"*3\r\n$7\r\nmessage\r\n")
_FEED = b":feed"
_LIVE = b"heads:"


def frame_end(data: bytes | bytearray, at: int = 0) -> int:
    """The end of the RESP frame that begins at ``at``; -1 if it is not complete. ValueError if it is invalid."""
    pending = 1
    while pending:
        end = data.find(b"\r\n", at)
        if end < 0:
            return -1
        kind, text = data[at : at + 1], bytes(data[at + 1 : end])
        at = end + 2
        pending -= 1
        if kind in (b"$", b"!", b"="):
            if int(text) >= 0:
                at += int(text) + 2
            if at > len(data):
                return -1
        elif kind in (b"*", b"~", b">"):
            pending += max(0, int(text))
        elif kind == b"%":
            pending += 2 * int(text)
        elif kind == b"|":  # attributes, and then the value that they describe
            pending += 2 * int(text) + 1
        elif kind not in (b"+", b"-", b":", b"_", b"#", b",", b"("):
            raise ValueError(f"no frame of RESP begins with {bytes(kind)!r}")
    return at


def feed_message(frame: bytes | bytearray) -> bool:
    """Whether a frame is a message on a feed channel."""
    if not frame.startswith(_MESSAGES):
        return False
    at = len(_MESSAGES[0])
    end = frame.find(b"\r\n", at)
    length = int(frame[at + 1 : end])
    channel = frame[end + 2 : end + 2 + length]
    return channel.endswith(_FEED) or _LIVE in channel


def _open_gates() -> dict[str, asyncio.Event]:
    gates = {UP: asyncio.Event(), DOWN: asyncio.Event()}
    for gate in gates.values():
        gate.set()
    return gates


class _Connection:
    """One connection of the party, and its counterpart to Redis."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.client, self.server = client, server
        self.own = _open_gates()
        self._recent = b""

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        frames = _Frames(self.proxy) if direction == DOWN else None
        while chunk := await reader.read(_CHUNK):
            if self.proxy.delay:
                await asyncio.sleep(self.proxy.delay)
            if direction == UP:
                self._look(chunk, UP)
            # One after the other, and again: one may be shut while this waits for the other.
            gates = (self.proxy.gates[direction], self.own[direction])
            while not all(gate.is_set() for gate in gates):
                for gate in gates:
                    await gate.wait()
            if frames is not None:
                chunk = frames.pass_on(chunk)
            else:
                self._look(chunk, DOWN)
                self._recent = chunk[-64:]
            if chunk:
                writer.write(chunk)
                await writer.drain()

    def _look(self, chunk: bytes, held: str) -> None:
        """Whether a request triggers a trap that withholds what goes in this direction."""
        for pattern, (direction, caught) in list(self.proxy.traps.items()):
            if direction == held and pattern in self._recent + chunk:
                self.own[direction].clear()
                del self.proxy.traps[pattern]
                if not caught.done():
                    caught.set_result(None)

    def close(self, *, reset: bool = False) -> None:
        for writer in (self.client, self.server):
            if reset:
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            # Nobody needs what is held any more.
            writer.transport.abort()


class _Frames:
    """The server's side of one connection, frame by frame."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._held = bytearray()
        """The part of an incomplete frame that was not passed on."""
        self._passed = 0
        """How many bytes of the same frame were passed on."""
        self._late = b""
        """A message that waits for the next one to overtake it."""

    def pass_on(self, chunk: bytes) -> bytes:
        """The bytes that may be passed on now."""
        held, out = self._held, bytearray()
        held += chunk
        at = 0
        while at < len(held):
            end = frame_end(held, at)
            if end < 0:
                break
            if not self._passed and feed_message(held[at:end]):
                out += self._message(bytes(held[at:end]))
            else:
                out += held[at + self._passed : end]
            self._passed = 0
            at = end
        del held[:at]
        proxy = self._proxy
        # Unless the rest of the frame has to be read first.
        if not (proxy.to_drop or proxy.to_repeat or proxy.to_swap or self._late):
            out += held[self._passed :]
            self._passed = len(held)
        return bytes(out)

    def _message(self, frame: bytes) -> bytes:
        """What is passed on in place of a message of the feed."""
        proxy = self._proxy
        if proxy.to_drop:
            proxy.to_drop -= 1
            proxy.dropped += 1
            return b""
        if proxy.to_repeat:
            proxy.to_repeat -= 1
            return frame + frame
        if proxy.to_swap and not self._late:
            proxy.to_swap -= 1
            self._late = frame
            return b""
        late, self._late = self._late, b""
        return frame + late


class Proxy:
    """A party's proxy to Redis. Used from one event loop."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = False
        self.port = 0
        self.delay = 0.0
        """Seconds that each chunk is late."""
        self.gates = _open_gates()
        self.traps: dict[bytes, tuple[str, asyncio.Future[None]]] = {}
        self.to_drop = self.to_repeat = self.to_swap = 0
        self.dropped = 0
        """Messages of the feed that were dropped so far."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.lift()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        try:
            from_server, to_server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, writer, to_server)
        self._connections.add(connection)
        ways = [
            asyncio.ensure_future(connection.carry(reader, to_server, UP)),
            asyncio.ensure_future(connection.carry(from_server, writer, DOWN)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._connections.discard(connection)
            connection.close()

    # What can happen

    def cut(self) -> None:
        """Close all connections, and every new one, until `lift`."""
        self._cut = True
        for connection in list(self._connections):
            connection.close()

    def lead_to(self, host: str, port: int) -> None:
        """Lead new connections to another server; open ones stay where they are."""
        self._target = (host, port)

    def reset(self) -> None:
        """End all open connections with an RST."""
        for connection in list(self._connections):
            connection.close(reset=True)

    def withhold(self, *directions: str, new: bool = True) -> None:
        """Hold what goes in these directions, or in both, until `lift`; ``new``: also on connections to come."""
        for direction in directions or (UP, DOWN):
            if new:
                self.gates[direction].clear()
            for connection in self._connections:
                connection.own[direction].clear()

    def drop_pushes(self, count: int = 1) -> None:
        """Drop the next messages of feed channels, on any connection."""
        self.to_drop += count

    def repeat_pushes(self, count: int = 1) -> None:
        """Send the next messages of feed channels twice."""
        self.to_repeat += count

    def swap_pushes(self, count: int = 1) -> None:
        """Send the next message of a feed channel after the one that follows it."""
        self.to_swap += count

    def trap(self, pattern: bytes, direction: str = DOWN) -> asyncio.Future[None]:
        """Withhold the answer to the next request with these bytes (64 at most); done once it has gone to Redis.

        With UP the request itself is withheld; done once it has come.
        """
        return self.traps.setdefault(pattern, (direction, asyncio.get_running_loop().create_future()))[1]

    def lift(self) -> None:
        """End all faults; what was held is delivered."""
        self._cut = False
        self.delay = 0.0
        self.to_drop = self.to_repeat = self.to_swap = 0
        for _, caught in self.traps.values():
            caught.cancel()
        self.traps.clear()
        for gate in self.gates.values():
            gate.set()
        for connection in self._connections:
            for gate in connection.own.values():
                gate.set()
