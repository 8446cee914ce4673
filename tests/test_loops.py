"""One bus belongs to one event loop: the effects of a fork, another loop, another thread and a forgotten close().

Also the cost of reads that may not be cached: they share their loads.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mnemobus
from mnemobus import Memory, Settings, WrongLoop
from mnemobus.cache.l1 import clock
from servers import RedisServer, eventually, free_port

Connect = Callable[..., mnemobus.Bus]


def said(text: str, room: str = "r1", **fields: object) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)  # type: ignore[arg-type]


def program(text: str, settings: Settings, folder: Path, **variables: str) -> tuple[int, list[str], str]:
    """A program of its own process: its exit status, the lines of its output, and what it complained of."""
    (folder / "program.py").write_text(text)
    process = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=folder,
        env=os.environ | settings.environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out.splitlines(), err


CALLS = """
import asyncio, inspect, json, os, signal, sys, time
import mnemobus
from mnemobus import Memory, MnemobusError

def memory(room="r"):
    return Memory(table="t", room=room, content={"by": os.getpid()})

async def all_calls(bus, id, receipt):
    "What each public call comes to, at once."
    calls = {
        "write": lambda: bus.write(memory()),
        "write_many": lambda: bus.write_many([memory()]),
        "update": lambda: bus.update(id, content={}),
        "delete": lambda: bus.delete(id),
        "delete_many": lambda: bus.delete_many([id]),
        "delete_room": lambda: bus.delete_room("t", room="r"),
        "get": lambda: bus.get(id),
        "recent": lambda: bus.recent("t", room="r"),
        "count": lambda: bus.count("t", room="r"),
        "context": lambda: bus.context(room="r"),
        "observe": lambda: bus.observe("e30"),
        "health": lambda: bus.health(),
        "committed": lambda: receipt.committed(),
        "close": lambda: bus.close(),
    }
    if not SAME_PROCESS:
        calls |= {"token": bus.token, "stats": bus.stats, "open": bus.open}
    found = {}
    for name, call in calls.items():
        try:
            async with asyncio.timeout(5):
                result = call()
                if inspect.isawaitable(result):
                    result = await result
            found[name] = f"answered {result!r}"
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
"""
ALL_CALLS = [
    "write",
    "write_many",
    "update",
    "delete",
    "delete_many",
    "delete_room",
    "get",
    "recent",
    "count",
    "context",
    "observe",
    "health",
    "committed",
    "close",
]

# Processes


def test_a_bus_made_before_a_fork_is_one_bus_in_each_process(
    settings: Settings, tmp_path: Path, pool_of: Callable[..., Any]
) -> None:
    # Given a server that makes its bus when it is loaded, and then forks
    text = """
import asyncio, os, mnemobus
from mnemobus import Memory

bus = mnemobus.connect()
bus.on_drop = print

async def serve(number):
    async with bus:
        for _ in range(3):
            receipt = await bus.write(Memory(table="t", room=f"r{number}", content={}))
            await receipt.committed(20)
        os.write(1, f"{bus.id} {await bus.count('t', room=f'r{number}')} {bus.on_drop is print}\\n".encode())

children = []
for number in range(3):
    pid = os.fork()
    if not pid:
        asyncio.run(serve(number))
        os._exit(0)
    children.append(pid)
asyncio.run(serve(3))  # the parent may, too
for pid in children:
    os.waitpid(pid, 0)
"""
    with pool_of(settings):
        status, lines, err = program(text, settings, tmp_path)
    # Then all four write, each under an id of its own
    assert (status, err) == (0, "")
    found = [line.split() for line in lines if len(line.split()) == 3]
    assert sorted(rest for _, *rest in found) == [["3", "True"]] * 4
    assert len({id for id, *_ in found}) == 4


OPENED_BEFORE = (
    CALLS
    + """
SAME_PROCESS = False
bus = mnemobus.connect()
loop = asyncio.new_event_loop()

async def before():
    await bus.open()
    receipt = await bus.write(memory())
    await receipt.committed(20)
    while not bus.stats().hits_local:
        await bus.get(receipt.id)
    return receipt

async def connections():
    "To have all at work at once, and what there is then."
    rooms = [f"r{n}" for n in range(8)]
    await asyncio.gather(*(bus.write(memory(r)) for r in rooms), *(bus.count("t", room=r) for r in rooms))
    return {wire for wire, _ in bus._link.pool._idle}

receipt = loop.run_until_complete(before())
known = loop.run_until_complete(connections())
pid = os.fork()
if not pid:
    for line in asyncio.run(all_calls(bus, receipt.id, receipt)).items():
        os.write(1, (json.dumps(line) + "\\n").encode())
    sys.exit(0)  # in order: all that there is will be taken apart
assert os.waitpid(pid, 0)[1] == 0

async def after():
    assert (await bus.get(receipt.id)).content["by"] == os.getpid()
    assert known <= await connections(), "another connection"
    stats = bus.stats()
    assert (stats.reconnects, stats.publish_retries, stats.failed_heartbeats) == (0, 0, 0), stats
    await (await bus.write(memory())).committed(20)
    await bus.close()

loop.run_until_complete(after())
"""
)


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_a_bus_opened_before_a_fork_is_the_parents(
    settings: Settings,
    own_redis: Callable[..., RedisServer],
    tmp_path: Path,
    pool_of: Callable[..., Any],
    request: pytest.FixtureRequest,
    store: str,
) -> None:
    # Given a bus that is open, and has something in L1, when its process is forked
    update = {"redis_url": own_redis().url, "heartbeat": 10, "max_staleness": 20}
    if store == "postgres":
        update["database_url"] = request.getfixturevalue("postgres_url")
    settings = settings.model_copy(update=update)
    with pool_of(settings):
        status, lines, err = program(OPENED_BEFORE, settings, tmp_path)
    # Then the parent goes on as if nothing had happened, over the same connections, although the child has ended
    assert (status, err) == (0, "")
    # And in the child every call says at once what is wrong, also of what is in L1
    found = dict(json.loads(line) for line in lines)
    assert sorted(found) == sorted([*ALL_CALLS, "token", "stats", "open"])
    for name, what in found.items():
        assert what.startswith("WrongLoop: the bus was opened before this process was forked"), name


def test_g1_a_fork_leaves_the_outbox_alone(
    settings: Settings, own_redis: Callable[..., RedisServer], tmp_path: Path, pool_of: Callable[..., Any]
) -> None:
    # Given a bus whose writes wait in the outbox, and a fork that ends in order
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url, "redis_create_retry_interval": 50})
    text = (
        CALLS
        + """
SAME_PROCESS = False
bus = mnemobus.connect()
loop = asyncio.new_event_loop()

async def keep(n):
    receipts = [await bus.write(memory()) for _ in range(n)]
    assert all(receipt.outboxed for receipt in receipts)
    return receipts

loop.run_until_complete(bus.open())
os.kill(int(os.environ["SERVER"]), signal.SIGKILL)
receipts = loop.run_until_complete(keep(3))
pid = os.fork()
if not pid:
    for call in (bus.write(memory()), bus.close()):
        try:
            asyncio.run(asyncio.wait_for(call, 5))
        except mnemobus.WrongLoop as error:
            print("told", "before this process was forked" in str(error), flush=True)
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
receipts += loop.run_until_complete(keep(3))
another = mnemobus.connect()
try:
    loop.run_until_complete(another._outbox._own.__class__(bus._outbox._own.path, bus._link.keys, 1).open())
    print("the lock is gone")
except mnemobus.OutboxInUse:
    print("locked", bus.stats().outbox)
"""
    )
    status, lines, err = program(text, settings, tmp_path, SERVER=str(server.pid))
    # Then the parent still has the file, and its lock; and a later process publishes all of it
    assert (status, lines) == (0, ["told True", "told True", "locked 6"]), err
    server.restart()

    async def later() -> int:
        async with mnemobus.connect(**settings.model_dump()) as bus:
            await eventually(lambda: bus.stats().outbox == 0)

            async def arrived() -> bool:
                return await bus.count("t", room="r") == 6

            await eventually(arrived)
            return await bus.count("t", room="r")

    with pool_of(settings):
        assert asyncio.run(later()) == 6


# Loops and threads


async def test_in_another_loop_or_thread_every_call_says_so_at_once(
    pool: Settings, connect: Connect, tmp_path: Path
) -> None:
    scope: dict[str, Any] = {"SAME_PROCESS": True}
    exec(CALLS, scope)
    async with connect() as bus:
        receipt = await bus.write(said("x"))
        await receipt.committed()
        found: dict[str, str] = {}
        # If a thread with a loop of its own uses it
        await asyncio.to_thread(
            lambda: found.update(asyncio.run(scope["all_calls"](bus, receipt.id, receipt)))
        )
        assert sorted(found) == sorted(ALL_CALLS)
        for name, what in found.items():
            assert what.startswith("WrongLoop: the bus was opened in another event loop. A bus belongs to"), (
                name
            )
        # Then nothing was done, and in its own loop it works as before
        again = await bus.get(receipt.id)
        assert again is not None and again.content == {"text": "x"}
        await (await bus.write(said("y"))).committed()
        assert bus.stats().writes == 2
        # Also calls that are handed over, as the error says
        loop = asyncio.get_running_loop()
        handed = asyncio.run_coroutine_threadsafe
        count = await asyncio.to_thread(lambda: handed(bus.count("messages", room="r1"), loop).result(10))
        assert count == 2


def test_a_loop_that_has_ended_is_named(settings: Settings, connect: Connect) -> None:
    bus = connect()
    asyncio.run(bus.open())
    with pytest.raises(WrongLoop, match="in another event loop, which has ended"):
        asyncio.run(bus.recent("messages", room="r"))
    with pytest.raises(WrongLoop, match="in another event loop, which has ended"):
        asyncio.run(bus.close())


def test_without_an_event_loop_of_asyncio_a_bus_does_not_open(connect: Connect) -> None:
    opening = connect().open()
    with pytest.raises(WrongLoop, match="a bus needs an event loop of asyncio"):
        opening.send(None)
    # One that was never opened closes in any
    bus = connect()
    asyncio.run(bus.close())
    asyncio.run(bus.close())


async def test_a_hit_in_another_thread_is_an_answer_but_no_sample(pool: Settings, connect: Connect) -> None:
    # Given a bus that compares every hit with the store
    async with connect(shadow_reads=1) as bus:
        receipt = await bus.write(said("x"))
        await receipt.committed()

        async def cached() -> bool:
            return await bus.get(receipt.id) is not None and bus.stats().hits_local > 0

        await eventually(cached)
        await eventually(lambda: not bus._shadow.under_way)
        reads = bus.stats().shadow_reads

        # If another thread hits L1
        async def hit() -> tuple[Memory | None, int]:
            return await bus.get(receipt.id), bus._shadow.under_way

        # Then it has its answer, and nothing else was begun in a loop that ends
        found, under_way = await asyncio.to_thread(lambda: asyncio.run(hit()))
        assert found is not None and found.content == {"text": "x"}
        assert (under_way, bus.stats().shadow_reads) == (0, reads)
        # And samples go on in the bus's own
        await bus.get(receipt.id)
        await eventually(lambda: bus.stats().shadow_reads > reads)


# The end


ENDS = {
    "run": "asyncio.run(main())",
    "an exception": "asyncio.run(main(fail=True))",
    "a loop that is closed": "loop = asyncio.new_event_loop(); loop.run_until_complete(main()); loop.close()",
    "a loop that is left": "loop = asyncio.new_event_loop(); loop.run_until_complete(main())",
    "a thread": "t = threading.Thread(target=lambda: asyncio.run(main())); t.start(); t.join()",
}


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
@pytest.mark.parametrize("away", [False, True], ids=["redis", "outbox"])
@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_never_closes_its_bus_ends_all_the_same(
    settings: Settings,
    own_redis: Callable[..., RedisServer],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    end: str,
    away: bool,
    store: str,
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url, "redis_timeout": 0.5})
    if store == "postgres":
        settings = settings.model_copy(update={"database_url": request.getfixturevalue("postgres_url")})
    text = f"""
import asyncio, logging, os, signal, threading, mnemobus
from mnemobus import Memory

logging.getLogger("mnemobus").setLevel(logging.ERROR)
held = []

async def main(fail=False):
    bus = mnemobus.connect()
    held.append(bus)
    await bus.open()
    await bus.write(Memory(table="t", room="r", content={{}}))
    await bus.recent("t", room="other")
    if {away}:
        os.kill({server.pid}, signal.SIGKILL)
        receipt = await bus.write(Memory(table="t", room="r", content={{}}))
        assert receipt.outboxed
        asyncio.ensure_future(bus.write(Memory(table="t", room="r", content={{}})))
        await asyncio.sleep(0)
    print("main has ended")
    if fail:
        raise SystemExit(3)

{ENDS[end]}
"""
    status, lines, err = program(text, settings, tmp_path)
    assert lines == ["main has ended"]
    assert (status, err) == (3 if end == "an exception" else 0, "")


# Reads that may not be cached


async def test_with_redis_away_from_the_start_equal_reads_share_one_query(connect: Connect) -> None:
    async with connect(redis_url=f"redis://127.0.0.1:{free_port()}") as bus:
        for read in (
            lambda: bus.recent("messages", room="r"),
            lambda: bus.recent("messages", entity="e", limit=5),
            lambda: bus.count("messages", room="r"),
            lambda: bus.get("00000000-0000-4000-8000-000000000000"),
        ):
            before = bus.stats()
            await asyncio.gather(*(read() for _ in range(300)))
            after = bus.stats()
            assert (after.misses - before.misses, after.shared_loads - before.shared_loads) == (1, 299)
        # One after the other each asks anew: nothing was cached
        await bus.recent("messages", room="r")
        await bus.recent("messages", room="r")
        assert bus.stats().misses == 6
        assert not bus._local._orphans


async def test_g6_reads_that_waited_in_vain_share_one_query_and_are_stale(connect: Connect) -> None:
    async with connect(redis_url=f"redis://127.0.0.1:{free_port()}", own_write_timeout=0.3) as bus:
        assert (await bus.write(said("x"))).outboxed
        before = bus.stats().misses
        answers = await asyncio.gather(*(bus.recent("messages", room="r1") for _ in range(100)))
        assert all(answer.stale for answer in answers)
        assert bus.stats().misses - before <= 2


async def held_up(
    bus: mnemobus.Bus, read: Callable[[], Awaitable[Any]]
) -> tuple[asyncio.Task[Any], asyncio.Event]:
    """A read whose answer is on its way from the store, and what lets it arrive."""
    real, arrive, asked = bus._reader.recent, asyncio.Event(), asyncio.Event()

    async def recent(*query: Any) -> Any:
        bus._reader.recent = real  # type: ignore[method-assign]
        rows = await real(*query)
        asked.set()
        await arrive.wait()
        return rows

    bus._reader.recent = recent  # type: ignore[method-assign]
    task = asyncio.ensure_future(read())
    await asked.wait()
    return task, arrive


async def test_g4_g6_a_load_from_before_a_write_is_not_shared_after_it(
    pool: Settings, connect: Connect
) -> None:
    # Given a bus that caches nothing, and a read of it whose answer is on its way
    async with connect(local_max_entries=0) as bus, connect() as other:
        for writer in (bus, other):
            read = partial(bus.recent, "messages", room=writer.id)
            first, arrive = await held_up(bus, read)
            # If a memory is written and committed meanwhile, here or by another that tells so by a token
            receipt = await writer.write(said("x", room=writer.id))
            await receipt.committed()
            if writer is other:
                await bus.observe(writer.token())
            # Then a read that begins now has it, and does not wait for the first one's
            assert receipt.id in {memory.id for memory in await asyncio.wait_for(read(), 30)}
            arrive.set()
            assert receipt.id not in {memory.id for memory in await first}


async def test_g6_what_another_wrote_is_seen_after_observe_where_the_bus_does_not_listen(
    pool: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect() as bus, connect() as other:
        # Given a bus that does not come to listen to the scope, and a read of it whose answer is on its way
        async def never(*_: object) -> bool:
            return False

        monkeypatch.setattr(bus._feed, "join", never)

        def read() -> Awaitable[Any]:
            return bus.recent("messages", room="r1")

        first, arrive = await held_up(bus, read)
        assert not first.done()
        # If another's write is committed, and observed
        receipt = await other.write(said("x"))
        await receipt.committed()
        await bus.observe(other.token())
        # Then a later read does not share what was read before
        assert receipt.id in {memory.id for memory in await asyncio.wait_for(read(), 30)}
        arrive.set()
        await first


async def test_g5_a_load_that_is_too_old_is_not_shared(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect(redis_url=f"redis://127.0.0.1:{free_port()}") as bus:

        def read() -> Awaitable[Any]:
            return bus.recent("messages", room="r1")

        first, arrive = await held_up(bus, read)
        later = clock() + bus.settings.max_staleness
        monkeypatch.setattr("mnemobus.cache.read_path.clock", lambda: later)
        await asyncio.wait_for(read(), 30)
        assert bus.stats().shared_loads == 0
        arrive.set()
        await first
