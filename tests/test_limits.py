"""What grows is bounded, by what it costs; docs/limits.md lists all of it, and is right."""

from __future__ import annotations

import ast
import asyncio
import gc
import importlib
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
import redis.asyncio

import mnemobus
from chaos.proxy import Proxy
from commands import Command
from mnemobus import LogFull, Memory, Settings, memory
from mnemobus.cache import l2
from mnemobus.connection.link import Link, ThreadedLink
from mnemobus.keys import Keyspace, Version
from mnemobus.log.marks import MARKS
from mnemobus.log.pending import PendingWrites
from mnemobus.memory import new_id
from mnemobus.records import Row
from mnemobus_workers import upkeep
from servers import RedisServer, eventually, worker_threads

Connect = Callable[..., mnemobus.Bus]
Start = Callable[..., Command]

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "limits.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what")]
LIVING = [
    *(ROOT / "bus" / "mnemobus").glob("*.py"),
    *(
        path
        for folder in ("log", "live", "feed", "cache", "connection", "health", "store")
        for path in (ROOT / "bus" / "mnemobus" / folder).rglob("*.py")
    ),
    *(ROOT / "workers" / "mnemobus_workers").glob("*.py"),
]
"""The modules whose objects live as long as an agent or a worker; commands end."""
MODULES = {
    name: ".".join(
        path.relative_to(path.parents[len(path.relative_to(ROOT).parts) - 2]).with_suffix("").parts
    )
    for path in LIVING
    for name in (path.stem, f"{path.parent.name}.{path.stem}")
}
"""By their names, with their folders where several have one name."""
MAKERS = {
    *("dict", "list", "set", "bytearray", "deque", "OrderedDict", "Counter", "defaultdict"),
    *("WeakValueDictionary", "WeakKeyDictionary", "WeakSet", "Queue", "LifoQueue", "SimpleQueue"),
    *("lru_cache", "cache"),
}


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def begins_empty(value: ast.expr) -> bool:
    """Whether an expression makes a collection to be filled later."""
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, (ast.List, ast.Set)):
        return not value.elts
    if not isinstance(value, ast.Call):
        return False
    if isinstance(value.func, ast.Call):
        return begins_empty(value.func)
    if name_of(value.func) == "field":
        return any(k.arg == "default_factory" and name_of(k.value) in MAKERS for k in value.keywords)
    return name_of(value.func) in MAKERS


def collections(tree: ast.AST, of: str = "", at_top: bool = True) -> Iterator[str]:
    """The names of attributes, class variables and globals that are, and of functions that have a cache."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from collections(node, f"{node.name}.")
            continue
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for decorator in node.decorator_list:
                made = decorator.func if isinstance(decorator, ast.Call) else decorator
                if name_of(made) in ("cache", "lru_cache"):
                    yield f"{of}{node.name}"
        if (
            isinstance(node, (ast.Assign, ast.AnnAssign))
            and node.value is not None
            and begins_empty(node.value)
        ):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and name_of(target.value) == "self":
                    yield f"{of}{target.attr}"
                elif isinstance(target, ast.Name) and at_top:
                    yield f"{of}{target.id}"
        yield from collections(node, of, at_top and not function)


def test_every_collection_is_listed() -> None:
    listed = set(re.findall(r"`([\w.]+)`", "\n".join(ROWS)))
    for path in LIVING:
        for name in collections(ast.parse(path.read_text())):
            assert name in listed, f"{path.name}: docs/limits.md does not say what bounds {name}"


def test_every_collection_that_is_listed_is_there() -> None:
    there = {name for path in LIVING for name in collections(ast.parse(path.read_text()))}
    listed = set(re.findall(r"`(_?[A-Z]\w*\.\w+|_[a-z]\w+)`", "\n".join(ROWS)))
    assert listed - there == set()
    assert len(there) > 40


def shown(number: float) -> str:
    """A number as the page has it, where it stands for bytes or not."""
    return f"{number:,.0f}"


BOUNDS = re.findall(r"`((?:[a-z]+\.)*_?[A-Z][A-Z_]+)` \(([\d,]+)( MiB| h| ms| s)?\)", PAGE)


@pytest.mark.parametrize("name, figure, unit", BOUNDS)
def test_every_bound_is_that_of_the_code(name: str, figure: str, unit: str) -> None:
    module, _, constant = name.rpartition(".")
    if module:
        value = getattr(importlib.import_module(MODULES[module]), constant)
    else:
        value = Settings.model_fields[constant.lower().removeprefix("mnemobus_")].default
    scale = {" MiB": 1 << 20, " h": 3600}.get(unit, 1)
    assert f"{value / scale:,.0f}" == figure


def test_there_are_bounds() -> None:
    assert len(BOUNDS) > 25


def test_every_key_is_listed() -> None:
    keys = Keyspace("p", 4, 64)
    made = [
        *(
            keys.layout,
            keys.epoch,
            keys.log(0),
            keys.producers(0),
            keys.meter(0),
            keys.heads(0),
            keys.identity,
            keys.dead(0),
            keys.reasons(0),
            keys.workers,
            keys.probe,
        ),
        *(keys.feed(0), keys.bucket("e", "id:x").partition(":e:")[0]),
    ]
    rows = [
        row.split("|")[1]
        for row in PAGE.partition("## In Redis")[2].partition("## On disk")[0].splitlines()
        if "|" in row
    ]
    listed = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert listed == {key.rpartition(":")[2] for key in made}


# In an agent


def said(text: str, room: str = "r1", **fields: Any) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)


async def test_tens_of_thousands_of_unapplied_writes_take_some_megabytes(settings: Settings) -> None:
    link = Link(settings)
    marks = PendingWrites(link)
    tracemalloc.start()
    try:
        # When a bus has so many writes that no worker applies, and nobody holds their receipts
        for n in range(1, 40_001):
            scopes = [f"id:{new_id()}", f"room:messages:r{n % 50}", "agent:messages:a"]
            marks.mark(n % 4, Version(1_700_000_000_000 + n, 0), scopes, 1e9 + n)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Then what it knows of them is bounded, and none of them is forgotten
    assert taken < 1_000 * MARKS
    assert len(marks) == 40_000
    assert "id:whatever" in marks
    await link.close()


def rows(count: int) -> Iterator[Row]:
    content = orjson.dumps({"facts": [{"k": f"key{n}", "v": n * 1.5, "tags": ["a", "b"]} for n in range(20)]})
    for n in range(count):
        yield Row(new_id(), "t", f"r{n % 30}", None, None, None, content, b"{}", None, 0, Version(1, n))


def test_what_is_decoded_does_not_stay_with_every_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_decoded", memory._Decoded(1 << 20))
    held = [row.memory() for row in rows(2_000)]
    gc.collect()
    tracemalloc.start()
    try:
        # When the contents of many memories that are kept are looked at
        first = held[0].content
        for each in held:
            assert each.content["facts"][3]["tags"] == ["a", "b"]
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Then the process grows by the bound, about, and those of the last ones are there at once
    assert taken < 2 << 20
    assert held[-1].content is held[-1].content
    assert held[0].content == first and held[0].content is not first


def test_a_memory_that_is_gone_is_not_kept_for_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = memory._Decoded(1 << 20)
    monkeypatch.setattr(memory, "_decoded", decoded)
    # Given memories with small contents and large embeddings, which nobody keeps
    for row in rows(200):
        assert row._replace(embedding=bytes(400_000)).memory().content
    # Then what was decoded keeps few of them alive
    assert sum(sys.getsizeof(each._record) for each, *_ in decoded._held) < 2 << 20


# In Redis


async def test_a_bucket_that_is_full_gives_way_to_newer_results(
    settings: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(l2, "MAX_FIELDS", 8)
    with worker_threads(settings):
        async with connect(shadow_reads=0, live="off") as one, connect(shadow_reads=0, live="off") as two:
            await one.write(said("x"), durability="committed")
            # Given more questions about a room than its bucket takes
            for limit in range(1, 30):
                await one.recent("messages", room="r1", limit=limit)
            # Then what was asked last is shared
            for limit in (28, 29):
                assert (await two.recent("messages", room="r1", limit=limit)).source == "shared"
    keys = keys_of(settings)
    with redis.Redis.from_url(settings.redis_url) as client:
        assert all(client.hlen(key) <= 8 for key in client.scan_iter(keys.buckets, count=1_000))


def keys_of(settings: Settings) -> Keyspace:
    return Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)


async def test_shared_results_leave_room_for_the_log(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    # Given a Redis that evicts nothing, and much to read
    server = own_redis("--maxmemory", "12mb")
    settings = settings.model_copy(update={"redis_url": server.url, "local_max_entries": 0})
    text = "x" * 4_000
    with worker_threads(settings), redis.Redis.from_url(server.url) as client:
        async with mnemobus.connect(**settings.model_dump()) as bus:
            for room in range(8):
                await bus.write_many([said(text, f"r{room}") for _ in range(50)], durability="committed")
            for room in range(8):
                for limit in range(20, 51):
                    await bus.recent("messages", room=f"r{room}", limit=limit)
            # Then results are shared only up to a part of it, and that is said
            assert client.info("memory")["used_memory"] < 12_000_000 * 0.75
            assert bus.stats().fills > 10
            assert any("what is left is for the log" in problem for problem in (await bus.health()).problems)
            # And writes are taken
            await bus.write_many([said(text) for _ in range(100)], durability="committed")


async def test_shared_results_go_before_a_write_is_refused(
    own_redis: Callable[..., RedisServer], settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    keys = keys_of(settings)
    with redis.Redis.from_url(server.url) as client:
        async with mnemobus.connect(**settings.model_dump()) as bus:
            await bus.write(said("x"))
            # Given shared results that fill Redis, of this epoch and of an older one, and keys of others
            for n in range(40):
                client.hset(keys.bucket("old" if n % 2 else bus._link.epoch, f"id:{n}"), "q:x", "x" * 100_000)
            client.set("other", "y" * 1_000)
            client.config_set("maxmemory", client.info("memory")["used_memory"])
            # When something is written, then they give way
            await bus.write(said("y" * 1_000))
            assert client.keys(keys.buckets) == []
            assert client.get("other") == b"y" * 1_000
            assert "dropped the shared results of 40 scopes" in caplog.text
            # And where there are none, a write is refused as ever
            client.config_set("maxmemory", "1mb")
            with pytest.raises(LogFull):
                await bus.write(said("z"))


async def test_a_bus_that_is_closed_in_order_leaves_no_producers(
    own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    keys = keys_of(settings)
    proxy = Proxy("127.0.0.1", server.port)
    await proxy.start()
    with redis.Redis.from_url(server.url) as client:

        def producers() -> list[tuple[bytes, bytes]]:
            found = [client.hgetall(keys.producers(p)) for p in range(settings.log_partitions)]
            return [each for records in found for each in records.items()]

        async with mnemobus.connect(**settings.model_dump()) as bus:
            await bus.write_many([said("x", f"r{n}") for n in range(2_000)])
            # Given the records of its last calls: each is small, however many events there were
            assert len(producers()) == settings.log_partitions
            assert max(len(record) for _, record in producers()) < 1_000
        # Then they are gone with it
        assert producers() == []
        # If a call was not answered the first time, a copy of it may come yet: the log must know it then
        options = settings.model_dump() | {"redis_url": proxy.url, "redis_timeout": 0.5, "outbox": "off"}
        async with mnemobus.connect(**options) as bus:
            await bus.write(said("1"))
            trapped = proxy.trap(b"}:producers\r\n")
            writing = asyncio.create_task(bus.write(said("2")))
            await asyncio.wait_for(trapped, 5)
            await asyncio.sleep(0)
            await eventually(lambda: bus.stats().publish_retries > 0)
            proxy.lift()
            await writing
        assert [name for name, _ in producers()] == [bus.id.encode()]
    await proxy.close()


async def test_a_call_is_answered_again_whoever_wrote_its_record(settings: Settings) -> None:
    link = Link(settings)
    keys = link.keys
    places = [keys.log(0), keys.producers(0), keys.meter(0), keys.heads(0)]
    # Given records of an older mnemobus, of IDs that follow each other, and of some that don't
    records = {
        "old": b'{"seq":3,"d":"d","t":1,"ids":["5-1","5-2"]}',
        "new": b'{"seq":3,"d":"d","t":1,"runs":[["5-1",3],["6-0",1]]}',
    }
    for name, record in records.items():
        await link.command("HSET", places[1], name, record)
    # Then a repetition is answered as the first time, by whatever layout it was made
    assert await link.run("publish", places, ["old", 3, 10, "d", "", ""]) == [[b"5-1", b"5-2"]]
    assert await link.run("publish", places, ["new", 3, 10, "d", "", ""]) == [
        [b"5-1", b"5-2", b"5-3", b"6-0"]
    ]
    await link.command("XADD", places[0], f"9999999999999-{(1 << 63) - 1}", "op", "x")
    far = ["far", 1, 10, "d", "", keys.shape.name, *[1, 7, "", 2, "op", "x"] * 2]
    first, _ = await link.run("publish", places, far)
    assert await link.run("publish", places, far) == [first]
    await link.close()


# Dead letters


def bury(
    link: ThreadedLink, version: str, *fields: str, limit: int = 10_000, reason: str = "why"
) -> list[Any]:
    places = [link.keys.dead(0), link.keys.reasons(0), link.keys.meter(0)]
    answer: list[Any] = link.run("dead", places, [version, reason, limit, *fields])
    return answer


def test_dead_letters_have_a_limit_in_bytes(settings: Settings, command: Start) -> None:
    settings = settings.model_copy(update={"log_partitions": 1})
    link = ThreadedLink(settings, connections=2)
    client, keys = link.client, link.keys
    event = ["op", "put", "table", "t", "room", "r", "id", new_id(), "at", "1", "metadata", "{}", "content"]
    entries = [
        client.xadd(keys.log(0), dict(zip(event[::2], [*event[1::2], "x" * 3_200], strict=True))).decode()
        for _ in range(4)
    ]
    # Given letters up to the limit: the next ones come without their content
    answers = [bury(link, version, *event, "x" * 3_200) for version in entries]
    assert [left_out for _, left_out, _ in answers] == [0, 0, 1, 1]
    assert int(client.hget(keys.meter(0), "dead_bytes")) < 10_000
    listed = command("dead", "list", settings=settings)
    assert listed.status == 0, listed.err
    assert listed.out.count("(without its content of ") == 2
    doctor = command("doctor", settings=settings)
    assert doctor.status in (0, 1)
    assert "2 were kept without their content" in doctor.out
    # If such a one is requeued, then it has its content again, from the log
    done = command("dead", "requeue", entries[2], settings=settings)
    assert done.status == 0
    [(_, fields)] = client.xrange(keys.log(0), f"({entries[3]}")
    assert fields[b"content"] == b"x" * 3_200 and fields[b"as"].decode() == entries[2]
    assert b"left_out" not in fields
    # Unless the log no longer has it: then that is said, and the letter stays
    client.xdel(keys.log(0), entries[3])
    failed = command("dead", "requeue", entries[3], settings=settings)
    assert failed.status == 1 and "has been trimmed since: drop it" in failed.err
    assert client.xlen(keys.dead(0)) == 3
    # And what is dropped leaves room
    assert command("dead", "drop", entries[0], entries[3], "--yes", settings=settings).status == 0
    assert bury(link, "9-9", *event, "x" * 3_200)[1] == 0
    link.close()


def test_where_headings_fill_the_limit_the_oldest_letters_are_given_up(settings: Settings) -> None:
    link = ThreadedLink(settings, connections=2)
    client, keys = link.client, link.keys
    for n in range(1, 101):
        bury(link, f"1-{n}", "op", "put", "room", "r" * 100)
    # Then there are the last ones, within the limit, and what is gone is counted, and known as unknown
    left = [fields[b"version"] for _, fields in client.xrange(keys.dead(0))]
    meter = {name.decode(): value.decode() for name, value in client.hgetall(keys.meter(0)).items()}
    assert left[-1] == b"1-100" and len(left) < 40
    assert int(meter["dead_bytes"]) <= 10_000
    assert int(meter["dead_given_up"]) == 100 - len(left)
    assert meter["dead_forgotten"] == f"1-{100 - len(left)}"
    assert client.hlen(keys.reasons(0)) == len(left)
    link.close()


def test_large_dead_letters_hold_up_nobody(settings: Settings) -> None:
    link = ThreadedLink(settings, connections=4)
    client, keys = link.client, link.keys
    # Given hundreds of large letters, of an older worker
    pipe = client.pipeline(transaction=False)
    for n in range(300):
        pipe.xadd(
            keys.dead(0), {"version": f"{n + 1}-0", "reason": "why", "op": "put", "content": "x" * 200_000}
        )
    pipe.execute()
    places = [keys.dead(0), keys.reasons(0), keys.meter(0)]
    while link.run("index", places, [2]):
        pass
    assert client.hlen(keys.reasons(0)) == 300
    # Then to bury, and to ask, takes no longer than with none: no letter is read
    before = client.info("commandstats").get("cmdstat_xrange", {"usec": 0})["usec"]
    for n in range(50):
        bury(link, f"{n + 1}-0", "op", "put", limit=1 << 30)
        bury(link, f"{n + 1}-1", "op", "put", limit=1 << 30)
        link.run("applied", [keys.log(0), *places[:2], places[2]], ["apply", "1-1"])
    spent = client.info("commandstats")["cmdstat_xrange"]["usec"] - before
    assert spent < 50_000
    link.close()


def test_upkeep_bounds_producers_and_what_became_of_letters(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "PRODUCERS", 5)
    monkeypatch.setattr(upkeep, "REASONS", 3)
    with worker_threads(settings):
        pass  # they make the groups
    link = ThreadedLink(settings, connections=4)
    client, keys = link.client, link.keys
    now = int(client.time()[0]) * 1000
    for n in range(9):
        client.hset(keys.producers(0), f"p{n}", f'{{"seq":1,"t":{now + n},"runs":[]}}')
        client.hset(keys.reasons(0), f"{now}-{n}", "dropped why")
    client.hset(keys.reasons(0), f"{now}-99", "dead 1-1 why")
    client.xadd(keys.dead(0), {"version": f"{now}-99", "reason": "why"})
    # When upkeep tidies, then the oldest are gone, and of these is known that nothing is known
    from mnemobus_workers.pool import make_broker

    broker = make_broker(settings)
    upkeep.Upkeep(broker, None).tidy()  # type: ignore[arg-type]
    assert sorted(client.hkeys(keys.producers(0))) == [b"p4", b"p5", b"p6", b"p7", b"p8"]
    assert sorted(client.hkeys(keys.reasons(0))) == [f"{now}-{n}".encode() for n in (6, 7, 8, 99)]
    assert client.hget(keys.meter(0), "dead_forgotten") == f"{now}-5".encode()
    broker.close()
    link.close()
