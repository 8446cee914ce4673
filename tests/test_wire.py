"""Wires and their pool, with a real Redis: each reply reaches its caller, whatever is cancelled or breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.exceptions import ResponseError

from mnemobus import Settings
from mnemobus.connection.link import Link
from mnemobus.connection.transport import BlockingWire, Busy, Ear, Wire, pack
from servers import RedisServer, eventually


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
async def link(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Link]:
    link = Link(settings.model_copy(update={"redis_pool_max": 2, "redis_protocol": request.param}))
    yield link
    await link.close()


async def test_replies_come_in_order_and_errors_are_values(link: Link, prefix: str) -> None:
    replies = await link.pipeline(
        [("SET", prefix, "x"), ("GET", prefix), ("LPUSH", prefix, "y"), ("GET", prefix)]
    )
    assert replies[:2] == [b"OK", b"x"] and replies[3] == b"x"
    assert isinstance(replies[2], ResponseError)
    # But who sends a single command gets its error raised
    with pytest.raises(ResponseError, match="wrong kind of value"):
        await link.command("LPUSH", prefix, "y")


async def test_a_reply_larger_than_any_buffer_comes_whole(link: Link, prefix: str) -> None:
    large = bytes(range(256)) * (1 << 14)
    await link.command("SET", prefix, large)
    assert await link.command("GET", prefix) == large


async def test_a_cancelled_call_leaves_no_reply_to_the_next(link: Link, prefix: str) -> None:
    await link.command("SET", prefix, "mine")
    # Given many calls that are cancelled at every moment of their way
    for moment in range(40):
        call = asyncio.create_task(link.command("ECHO", f"not yours {moment}"))
        for _ in range(moment % 8):
            await asyncio.sleep(0)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        # Then the next one has its own reply, and no connection is lost to the pool
        assert await link.command("GET", prefix) == b"mine"
    assert link.pool.size <= 2


async def test_who_is_cancelled_while_waiting_for_a_connection_takes_none_along(link: Link) -> None:
    # Given a pool whose two connections are in use, and three who wait
    held = [await link.pool.take(), await link.pool.take()]
    waiting = [asyncio.create_task(link.command("PING")) for _ in range(3)]
    await asyncio.sleep(0)
    # When a connection comes back in the very moment in which the first of them is cancelled
    link.pool.give_back(held.pop())
    waiting[0].cancel()
    # Then the others have their turn
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiting[1:]) == [b"PONG", b"PONG"]
    link.pool.give_back(held.pop())
    assert link.pool.size == 2


async def test_a_connection_that_breaks_under_a_call_fails_it_and_is_replaced(link: Link) -> None:
    me = await link.command("CLIENT", "ID")
    waits = asyncio.create_task(link.command("BLPOP", "nobody-pushes", 0))
    await eventually(lambda: link.pool.size == 1 and not link.pool._idle)
    await link.command("CLIENT", "KILL", "ID", me)
    with pytest.raises(redis.ConnectionError):
        await waits
    assert await link.command("PING") == b"PONG"


async def test_a_connection_that_broke_while_idle_is_given_to_nobody(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    link = Link(settings.model_copy(update={"redis_url": server.url}))
    assert await link.command("PING") == b"PONG"
    # When Redis was restarted while nobody asked anything
    [(idle, _)] = link.pool._idle
    server.restart()
    await eventually(lambda: not idle.open)
    # Then the next call succeeds at once
    assert await link.command("PING") == b"PONG"
    assert link.pool.size == 1
    await link.close()


async def test_a_pool_that_fails_to_connect_lets_the_next_one_try(own_redis: Any, settings: Settings) -> None:
    server: RedisServer = own_redis()
    update = {"redis_url": server.url, "redis_pool_max": 1, "redis_acquire_timeout": 5_000}
    link = Link(settings.model_copy(update=update))
    server.kill()
    # Given that Redis is away, ten calls on a pool of one all hear of it; none waits for a place that nobody frees
    async with asyncio.timeout(4):
        answers = await asyncio.gather(*(link.command("PING") for _ in range(10)), return_exceptions=True)
    assert all(isinstance(a, redis.ConnectionError) and not isinstance(a, Busy) for a in answers)
    server.start()
    assert await link.command("PING") == b"PONG"
    await link.close()


async def test_a_call_that_is_not_answered_in_time_fails_and_its_late_reply_reaches_nobody(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    link = Link(settings.model_copy(update={"redis_url": server.url, "redis_timeout": 0.2}))
    assert await link.command("PING") == b"PONG"
    server.pause()
    with pytest.raises(redis.TimeoutError, match=r"no answer within 0\.2 s"):
        await link.command("ECHO", "late")
    server.resume()
    assert await link.command("PING") == b"PONG"
    await link.close()


async def test_a_call_has_its_whole_time_after_others_on_its_connection(
    own_redis: Any, settings: Settings
) -> None:
    server: RedisServer = own_redis()
    link = Link(settings.model_copy(update={"redis_url": server.url}))
    loop = asyncio.get_running_loop()
    wire = await link.pool.take()

    async def ask(timeout: float) -> Any:
        answered: asyncio.Future[Any] = loop.create_future()
        wire.call(pack([("PING",)]), 1, timeout, answered.set_result)
        return await answered

    # Given a connection whose first call was answered, and whose deadline is to come
    began = loop.time()
    assert await ask(0.3) == [b"PONG"]
    while loop.time() < began + 0.2:
        await asyncio.sleep(0.01)
    # If the next one is not answered
    server.pause()
    began = loop.time()
    outcome = await ask(0.3)
    # Then it ends at its own deadline
    assert isinstance(outcome, redis.TimeoutError)
    assert loop.time() - began >= 0.29
    server.resume()
    # And a shorter one is not held up by a longer one before
    wire = await link.pool._connect()
    assert await ask(600.0) == [b"PONG"]
    server.pause()
    assert isinstance(await asyncio.wait_for(ask(0.1), 30), redis.TimeoutError)
    server.resume()
    await link.close()


async def test_what_a_server_says_unasked_is_heard_until_it_refuses_or_the_hearer_fails(link: Link) -> None:
    async def listen(hear: Any) -> Ear:
        connection = link.dedicated()
        await connection.connect()
        return Ear(connection, hear)

    # Given a connection that listens, what is published is heard, in order
    heard: list[Any] = []
    ear = await listen(heard.append)
    ear.send("SUBSCRIBE", "wire-a", "wire-b")
    await eventually(lambda: len(heard) == 2)
    await link.command("PUBLISH", "wire-a", "1")
    await link.command("PUBLISH", "wire-b", "2" * 200_000)
    await eventually(lambda: len(heard) == 4)
    assert [list(said) for said in heard[2:]] == [
        [b"message", b"wire-a", b"1"],
        [b"message", b"wire-b", b"2" * 200_000],
    ]
    # If it is cut, who waits for its end hears of that; what is sent then goes nowhere
    ear.cut()
    with pytest.raises(redis.ConnectionError, match=r"Connection closed by server\."):
        await ear.ended
    ear.send("SUBSCRIBE", "wire-c")
    # So it is with what the server refuses
    ear = await listen(heard.append)
    ear.send("SUBSCRIBE")
    with pytest.raises(ResponseError, match="wrong number of arguments"):
        await ear.ended

    # And with what goes wrong where it is heard
    def fail(said: object) -> None:
        raise LookupError("a mistake")

    ear = await listen(fail)
    ear.send("SUBSCRIBE", "wire-a")
    with pytest.raises(LookupError, match="a mistake"):
        await ear.ended


# What is taken from redis-py besides its public face (docs/decisions/0008)

SEEN = "8.1.0"
"""The version of redis-py whose connections were looked at. Change it once that was done for another one."""


def test_redis_py_is_of_the_version_whose_connections_were_looked_at() -> None:
    assert redis.__version__ == SEEN, (
        f"redis-py is {redis.__version__}, and not {SEEN}. connection/transport.py takes over its connections, by"
        " attributes that are not public. Look in redis/asyncio/connection.py for _writer, _reader (both None after"
        " disconnect(), and not touched otherwise once connect() has returned) and in redis/connection.py for _sock;"
        " in redis/_parsers for parse_error(text). Then run tests/test_wire.py, test_security.py (TLS, logins) and"
        " scenarios/test_connections.py, and write the new version here"
    )


async def test_a_connection_of_redis_py_gives_its_stream_away(redis_url: str) -> None:
    pool = redis.asyncio.ConnectionPool.from_url(redis_url)
    connection = pool.make_connection()
    await connection.connect()
    # Given a connection of redis-py, it has a stream, and its parser makes errors from what a server says
    assert isinstance(connection._writer, asyncio.StreamWriter)
    assert isinstance(connection._reader, asyncio.StreamReader)
    assert isinstance(connection._parser.parse_error("WRONGTYPE no"), ResponseError)
    # If a wire takes it over
    wire = Wire(connection)
    # Then redis-py knows of none any more, and leaves the wire alone when it disconnects or forgets
    assert connection._writer is None and connection._reader is None
    assert not connection.is_connected
    await connection.disconnect()
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    wire.call(b"*1\r\n$4\r\nPING\r\n", 1, 5.0, answered.set_result)
    assert await answered == [b"PONG"]
    await wire.close(1.0)


def test_a_blocking_connection_of_redis_py_gives_its_socket_away(redis_url: str) -> None:
    connection = redis.ConnectionPool.from_url(redis_url).make_connection()
    connection.connect()
    assert connection._sock is not None
    wire = BlockingWire(connection, 5.0)
    assert connection._sock is None
    connection.disconnect()
    assert wire.call([("PING",)]) == [b"PONG"]
    wire.cut()
