"""The campaign itself: its proxies do what they say, it finds what is broken, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from chaos import faults
from chaos.campaign import Campaign, Options, parse
from chaos.checker import check
from chaos.history import Bounds, Fault, Final, History, Write
from chaos.proxy import DOWN, UP, Proxy, _Frames, feed_message, frame_end
from chaos.report import tell
from servers import RedisServer, end, eventually, redis_binaries, spawn, wait_until

FEED, OTHER = "{chaos:f0}:feed", "{chaos}:agent:1"
TESTS = Path(__file__).parent


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[Proxy]:
    address = redis.asyncio.connection.parse_url(redis_url)
    proxy = Proxy(address.get("host", "127.0.0.1"), address.get("port", 6379))
    await proxy.start()
    yield proxy
    await proxy.close()


def client_of(proxy: Proxy, protocol: int = 3, timeout: float = 5.0) -> redis.asyncio.Redis:
    return redis.asyncio.Redis(
        port=proxy.port, protocol=protocol, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )


# Frames

_lines = st.binary(max_size=20).filter(lambda text: b"\r" not in text and b"\n" not in text)
_flat = st.one_of(
    st.builds(lambda kind, text: kind + text + b"\r\n", st.sampled_from([b"+", b"-", b",", b"("]), _lines),
    st.builds(lambda n: b":%d\r\n" % n, st.integers()),
    st.builds(
        lambda kind, text: kind + b"%d\r\n%s\r\n" % (len(text), text),
        st.sampled_from([b"$", b"!"]),
        st.binary(),
    ),
    st.sampled_from([b"_\r\n", b"#t\r\n", b"$-1\r\n", b"*-1\r\n", b"*0\r\n"]),
)
_frames = st.recursive(
    _flat,
    lambda inner: st.one_of(
        st.builds(
            lambda kind, items: kind + b"%d\r\n" % len(items) + b"".join(items),
            st.sampled_from([b"*", b"~", b">"]),
            st.lists(inner, max_size=4),
        ),
        st.builds(
            lambda pairs: b"%%%d\r\n" % len(pairs) + b"".join(k + v for k, v in pairs),
            st.lists(st.tuples(inner, inner), max_size=3),
        ),
        st.builds(lambda key, value, what: b"|1\r\n" + key + value + what, inner, inner, inner),
    ),
    max_leaves=12,
)


@given(st.lists(_frames, min_size=1, max_size=5))
def test_frames_end_where_they_end(frames: list[bytes]) -> None:
    data, at = b"".join(frames), 0
    for frame in frames:
        assert frame_end(data, at) == at + len(frame)
        assert all(frame_end(data[: at + cut], at) == -1 for cut in range(len(frame)))
        at += len(frame)


def test_what_is_no_frame_is_an_error() -> None:
    with pytest.raises(ValueError, match="no frame of RESP begins with b'x'"):
        frame_end(b"x\r\n")


def message(channel: str, kind: bytes = b">") -> bytes:
    name = channel.encode()
    return kind + b"3\r\n$7\r\nmessage\r\n$%d\r\n%s\r\n$2\r\nhi\r\n" % (len(name), name)


@pytest.mark.parametrize("kind", [b">", b"*"])
def test_messages_of_the_feed_are_known(kind: bytes) -> None:
    assert feed_message(message(FEED, kind))
    assert not feed_message(message(OTHER, kind))
    assert not feed_message(b"*3\r\n$7\r\nMESSAGE\r\n$1\r\nx\r\n$1\r\ny\r\n")


@given(st.data())
def test_what_passes_does_not_depend_on_how_it_comes(data: st.DataObject) -> None:
    frames = data.draw(st.lists(st.sampled_from([message(FEED), message(OTHER), b"+OK\r\n"]), max_size=8))
    drops = data.draw(st.integers(0, 3))
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    proxy = Proxy("127.0.0.1", 0)
    proxy.drop_pushes(drops)
    passing, passed = _Frames(proxy), b""
    for begin, finish in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        passed += passing.pass_on(stream[begin:finish])

    left, expected = drops, []
    for frame in frames:
        if frame == message(FEED) and left:
            left -= 1
        else:
            expected.append(frame)
    assert passed == b"".join(expected)
    assert (proxy.to_drop, proxy.dropped) == (left, drops - left)


# The proxy


async def test_what_is_said_goes_through(proxy: Proxy, prefix: str) -> None:
    async with client_of(proxy) as client:
        large = os.urandom(1 << 20)
        await client.set(f"{{{prefix}}}:x", large)
        assert await client.get(f"{{{prefix}}}:x") == large


@pytest.mark.parametrize("protocol", [2, 3])
async def test_exactly_one_message_of_the_feed_is_dropped(proxy: Proxy, protocol: int) -> None:
    async with (
        client_of(proxy, protocol) as client,
        client.pubsub(ignore_subscribe_messages=True) as listener,
    ):
        await listener.subscribe(FEED, OTHER)
        await listener.get_message(timeout=1)
        await listener.get_message(timeout=1)

        # If one message of the feed is to be dropped, with others around it
        proxy.drop_pushes(1)
        for channel, text in ((OTHER, "1"), (FEED, "2"), (OTHER, "3"), (FEED, "4")):
            await client.publish(channel, text)

        # Then it is the first of the feed, and only that one
        heard: list[bytes] = []

        async def hear() -> bool:
            said = await listener.get_message(timeout=0.05)
            if said is not None:
                heard.append(said["data"])
            return len(heard) == 3

        await eventually(hear)
        assert heard == [b"1", b"3", b"4"]
        assert (proxy.to_drop, proxy.dropped) == (0, 1)


def test_a_message_of_the_feed_may_come_twice_or_after_the_next() -> None:
    proxy = Proxy("127.0.0.1", 0)
    passing, one, two = _Frames(proxy), message(FEED), message(FEED.replace("f0", "f1"))
    proxy.repeat_pushes()
    assert passing.pass_on(one + two) == one + one + two
    proxy.swap_pushes()
    assert passing.pass_on(one[:9]) == b""
    assert passing.pass_on(one[9:] + message(OTHER)) == message(OTHER)
    assert passing.pass_on(two + one) == two + one + one


async def test_a_cut_ends_connections_and_refuses_new_ones(proxy: Proxy) -> None:
    async with client_of(proxy) as client:
        assert await client.ping()
        proxy.cut()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                await client.ping()
        proxy.lift()
        assert await client.ping()


async def test_a_reset_is_an_rst(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"PING\r\n")
    assert await reader.readline() == b"+PONG\r\n"
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_withheld_answers_are_of_requests_that_got_through(
    proxy: Proxy, redis_url: str, prefix: str
) -> None:
    key = f"{{{prefix}}}:x"
    async with client_of(proxy) as client, redis.asyncio.Redis.from_url(redis_url) as direct:
        await client.ping()
        proxy.withhold(DOWN)
        answer = asyncio.create_task(client.set(key, "1"))
        await eventually(lambda: direct.exists(key))
        assert not answer.done()
        proxy.lift()
        assert await answer


async def test_withheld_requests_come_late(proxy: Proxy, redis_url: str, prefix: str) -> None:
    key = f"{{{prefix}}}:x"
    async with client_of(proxy, timeout=0.1) as client, redis.asyncio.Redis.from_url(redis_url) as direct:
        await client.ping()
        proxy.withhold(UP)

        # If the client gives up, and closes its connection
        with pytest.raises(redis.TimeoutError):
            await client.set(key, "1")
        await client.aclose()
        assert not await direct.exists(key)

        # Then the request arrives all the same, as from a network that held it
        proxy.lift()
        await eventually(lambda: direct.exists(key))


async def test_a_delay_is_felt_both_ways(proxy: Proxy) -> None:
    async with client_of(proxy) as client:
        await client.ping()
        proxy.delay = 0.05
        began = time.monotonic()
        await client.ping()
        assert time.monotonic() - began >= 0.1


async def test_a_trap_withholds_one_answer(proxy: Proxy, redis_url: str, prefix: str) -> None:
    key = f"{{{prefix}}}:trapped"
    async with (
        client_of(proxy) as one,
        client_of(proxy) as other,
        redis.asyncio.Redis.from_url(redis_url) as direct,
    ):
        await asyncio.gather(one.ping(), other.ping())
        caught = proxy.trap(b":trapped\r\n")
        answer = asyncio.create_task(one.incr(key))
        await asyncio.wait_for(caught, 5)

        # The request is carried out, and unanswered; other connections go on, with the same key, too
        await eventually(lambda: direct.exists(key))
        assert await other.incr(key) == 2
        assert not answer.done()
        proxy.lift()
        assert await answer == 1


async def test_a_trap_may_withhold_the_request_itself(proxy: Proxy, redis_url: str, prefix: str) -> None:
    key = f"{{{prefix}}}:trapped"
    async with client_of(proxy) as client, redis.asyncio.Redis.from_url(redis_url) as direct:
        await client.ping()
        caught = proxy.trap(b":trapped\r\n", UP)
        answer = asyncio.create_task(client.incr(key))
        await asyncio.wait_for(caught, 5)
        assert not await direct.exists(key)
        proxy.lift()
        assert await answer == 1


# What is judged


def test_an_emptied_redis_may_lose_what_was_noted_and_nothing_else() -> None:
    """Where all that was ever in the log is known, an acknowledged write that is not there is lost for certain."""
    write = Write("a", 1, 2, "put", "messages", "r", "m", "a/1", "acked", "1-0")
    entry = ["1-0", "put", "messages", "r", "m", "a/1"]
    emptied = Fault("redis-flushed", "redis", 3, 3.1, loses_log=True)

    def promises(**end: Any) -> list[str]:
        final = Final(100, lost_log=True, whole=True, **end)
        return [v.promise for v in check(History(Bounds(1, 0.2, 1), [write, emptied, final])).violations]

    # It was in the log when that went, and not applied: announced
    assert promises(log=[entry], lost=[entry]) == []
    # It was in the log and applied
    assert promises(log=[entry]) == ["G1"]
    # It never was in the log
    assert promises() == ["G1"]


# The campaign

pytestmark_servers = pytest.mark.skipif(
    "TEST_CHAOS" not in os.environ or not redis_binaries(),
    reason="takes minutes, and looks for what is not known yet: set TEST_CHAOS=1, and have a redis-server",
)


def campaign(folder: Path, *arguments: str, path: str = "") -> subprocess.Popen[Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), path]))}
    command = [sys.executable, "-m", "chaos.campaign", "--folder", str(folder), *arguments]
    return spawn(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that have to do with a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            inside = Path(os.readlink(process / "cwd")).is_relative_to(folder)
        except OSError:
            continue
        if str(folder) in command or inside:
            found.append(command)
    return found


@pytestmark_servers
def test_a_small_campaign_with_all_faults_finds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = campaign(folder, "--minutes", "0.3", "--seed", "7", "--agents", "3")
    try:
        told, _ = run.communicate(timeout=110)
    finally:
        end(run)
    assert run.returncode == 0, told
    assert "every promise that was watched was kept" in told
    assert left_behind(folder) == []


@pytest.mark.skipif(not redis_binaries(), reason="there is no redis-server")
def test_a_campaign_finds_what_is_broken_and_shows_it(tmp_path: Path) -> None:
    # Given agents that heed no invalidation
    (tmp_path / "sitecustomize.py").write_text(
        "from mnemobus.cache.l1 import LocalCache\nLocalCache.drop = lambda self, scope: False\n"
    )
    # If they play, even without any fault
    folder = tmp_path / "run"
    run = campaign(folder, "--minutes", "0.08", "--seed", "3", "--faults", "none", path=str(tmp_path))
    try:
        told, _ = run.communicate(timeout=110)
    finally:
        end(run)
    # Then it is seen, with what shows it, and how to see more
    assert run.returncode == 1, told
    assert "G4: " in told or "G6: " in told
    assert '"kind": "read"' in told
    assert "seed 3; all of it: python tests/chaos/checker.py" in told
    assert left_behind(folder) == []


@pytestmark_servers
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_campaign_that_is_ended_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "run"
    run = campaign(folder, "--minutes", "5", "--agents", "1", "--workers", "1", "--pause", "0.5")
    try:
        wait_until(lambda: (folder / "history" / "a0.1.jsonl").exists(), 60, what="the agent to begin")
        assert left_behind(folder)
        run.send_signal(how)
        told, _ = run.communicate(timeout=60)
    finally:
        end(run)
    if how != signal.SIGKILL:
        assert run.returncode == 130
        assert "stopped; nothing is left running" in told
    wait_until(lambda: left_behind(folder) == [], what="nothing to be left")


def test_a_fault_that_there_is_none_of_is_named(tmp_path: Path) -> None:
    run = campaign(tmp_path, "--faults", "all,-worker-killed,rain")
    told, _ = run.communicate(timeout=30)
    assert run.returncode == 2
    assert "there is no fault 'rain'; there are worker-killed, " in told


@pytest.mark.parametrize(
    "given, said",
    [
        (["--agents", "0"], "argument --agents: invalid number above 0 value: '0'"),
        (["--workers", "x"], "argument --workers: invalid number above 0 value: 'x'"),
        (["--minutes", "nan"], "argument --minutes: invalid number above 0 value: 'nan'"),
        (["--pause", "-1"], "argument --pause: invalid number above 0 value: '-1'"),
        (["--store", "mysql"], "argument --store: invalid choice: 'mysql'"),
        (["--folder", str(TESTS)], "not an empty folder"),
    ],
)
def test_what_is_called_wrongly(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(given)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_fault_that_nobody_felt_is_not_counted_and_one_that_nobody_ever_feels_is_told(
    tmp_path: Path,
) -> None:
    run = Campaign(Options(), tmp_path)
    for number in range(3):
        run.tried.update(["cut", "redis-full"])
        with run.fault("cut", "a1"):
            pass
        with run.fault("redis-full", "redis", loses_log=True) as effect:
            effect.felt = False
        assert run.counts == {"cut": number + 1}
    assert run.without_effect() == ["redis-full was tried 3 times, and had no effect"]
    records = History.load(with_bounds(tmp_path / "history")).of(Fault)
    assert [record.what for record in records] == ["cut"] * 3


def test_a_fault_that_nobody_felt_breaks_no_promise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given a run in which a kind of fault never had an effect, and nothing else is wrong
    run = Campaign(Options(), tmp_path)
    run.warnings = ["redis-full was tried 9 times, and had no effect"]
    history = History.load(with_bounds(tmp_path / "history"))
    history.records.append(Final(1.0, [], [], {}, whole=True))
    # Then that is told, and the run has not failed
    assert tell(run, history) == 0
    assert "warning: redis-full was tried 9 times, and had no effect" in capsys.readouterr().out
    # as it has if a promise was broken
    run.problems = ["not quiet 60 s after all faults were lifted"]
    assert tell(run, history) == 1


@pytest.mark.parametrize("binary", redis_binaries())
async def test_a_full_redis_is_felt_by_those_who_write_whatever_its_version(
    binary: str, own_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    run = Campaign(Options(), tmp_path)
    server = own_redis(binary=binary)
    async with redis.asyncio.Redis.from_url(server.url) as run._client:
        # Given nobody who writes, then nobody can feel it
        await faults.redis_full(run, random.Random(1))
        assert run.counts["redis-full"] == 0

        async def write() -> None:
            while True:
                with contextlib.suppress(redis.ResponseError):
                    await run._client.eval("return redis.call('XADD', KEYS[1], '*', 'a', 'b')", 1, "log")

        # Given somebody who writes as the bus does, then it is
        writing = asyncio.create_task(write())
        await faults.redis_full(run, random.Random(1))
        writing.cancel()
        assert run.counts["redis-full"] == 1


def with_bounds(folder: Path) -> Path:
    (folder / "bounds.json").write_text('{"max_staleness": 1, "heartbeat": 0.2, "own_write_timeout": 1}')
    return folder


def test_every_fault_is_described() -> None:
    """A kind's name is its function's, each lane has some, and each says what it does."""
    assert len(faults.names()) == len(set(faults.names())) >= 27
    assert all(kinds for kinds in faults.LANES.values())
    assert [name for lane in faults.LANES.values() for name, kind in lane.items() if not kind.__doc__] == []


def test_there_is_a_fault_of_each_kind_that_the_promises_speak_of() -> None:
    assert set(faults.names()) >= {
        *("worker-killed-before-commit", "worker-killed-after-commit", "worker-killed-before-ack"),
        *("agent-killed-unanswered", "agent-paused", "feed-trimmed", "database-away", "redis-full"),
        *("redis-killed-always", "redis-killed-everysec", "redis-emptied", "redis-flushed"),
        *("delayed", "cut", "connections-reset", "half-open", "push-dropped", "clients-killed"),
        *("agent-clock-ahead", "worker-clock-ahead"),
    }
