"""The programs with which mnemobus is compared do what the benchmarks assume: the alternatives, if their extra is
installed, and the hand-written floors."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from bench.agents import started
from bench.alternatives import NAMES, Item, Place, Unfit, load
from bench.alternatives.survey import Findings, call, survey
from bench.contexts import KEEPERS, MESSAGES, prepare
from bench.floors import chain, drain, hop, reads, start, store, writes
from bench.inside import fill
from bench.party import Party
from bench.talker import Agent, Record, goes_back, lacks, made_id
from conftest import Connect
from mnemobus import Memory, Settings
from mnemobus.keys import Keyspace, Version
from mnemobus.log.events import Event
from mnemobus.records import encode
from mnemobus.store import Query, open_reader, open_writer
from servers import Workers, eventually

ROOT = Path(__file__).parent.parent


def memory(n: int, *, embedding: bool = False) -> Memory:
    return Memory(
        table="messages",
        room=f"r{n % 3}",
        agent="a" if n % 2 else None,
        content={"text": f"number {n} ü", "n": n},
        metadata={"n": n},
        embedding=[float(n)] * 8 if embedding else None,
    )


# Alternatives


@pytest.fixture
def place(request: pytest.FixtureRequest, redis_url: str) -> Callable[[str], Place]:
    """Where an alternative works; skips what is not installed."""

    def of(name: str) -> Place:
        pytest.importorskip("cashews", reason="the extra `bench` is not installed")
        database = request.getfixturevalue("postgres_url") if name.startswith("postgres") else ""
        return Place(redis_url=redis_url, database_url=database, vectors=8, ttl=60.0)

    return of


@pytest.mark.parametrize("name", NAMES)
async def test_an_alternative_does_what_it_does_not_say_it_cannot(
    name: str, place: Callable[[str], Place]
) -> None:
    where = place(name)
    cannot = load(name).cannot
    try:
        found = await survey(name, where)
    except Unfit as error:
        pytest.skip(str(error))
    assert found.reads
    assert found.many
    # What is found in the process is asked of nobody: the caches do so, the stores and plain Redis do not
    assert found.hits == (name in ("cashews", "redis-py", "aiocache"))
    # Another instance sees a change, in a record and in a listing, or the table says why not
    assert (found.across is None) == ("processes" in cannot)
    if "recent" not in cannot:
        assert (found.listing is None) == ("processes" in cannot)


@pytest.mark.parametrize("protocol", [None, 3])
async def test_cashews_misses_every_invalidation_unless_it_is_told_to_speak_resp2(
    protocol: int | None, place: Callable[[str], Place]
) -> None:
    where = place("cashews")
    # Given cashews as it is set up by default on redis-py 8, which speaks RESP3, or with RESP3 asked for
    other = type("Other", (load("cashews"),), {"protocol": protocol})
    # Then another instance never sees what was written, though each by itself is right
    found = await survey(other, where)
    assert found == Findings(reads=True, many=True, across=None, listing=None, hits=True)


async def test_agents_of_one_ccs_store_see_each_other_but_not_in_listings(
    place: Callable[[str], Place],
) -> None:
    where = place("ccs-store")
    cls = load("ccs-store")
    # Given two agents on one store, of which the second has read what the first wrote
    a = cls(where, agent="a")
    a.open()
    b = cls(where, agent="b", store=a.store)
    for n in (1, 2):
        # If the first writes, then the second sees it
        a.put(Item("r", "x", {"n": n}))
        assert b.value(b.get(b.address("r", "x"))) == {"n": n}
        b.forget(b.address("r", "x"))
        assert b.value(b.get(b.address("r", "x"))) == {"n": n}
    # But its search does not find it
    assert [i.key for i in a.store.search(("a", where.prefix, "r"))] == ["x"]
    assert b.store.search(("b", where.prefix, "r")) == []
    b.close()
    a.close()


@pytest.mark.parametrize("name", ["cashews", "redis-py", "aiocache"])
async def test_a_cached_copy_can_be_dropped(name: str, place: Callable[[str], Place]) -> None:
    where = place(name)
    alternative = load(name)(where)
    try:
        await call(alternative.open)
    except Unfit as error:
        pytest.skip(str(error))
    id = secrets.token_hex(4)
    address = alternative.address("r", id)
    await call(alternative.put, Item("r", id, {"n": 1}))
    await call(alternative.get, address)
    assert alternative.cached(address)
    await call(alternative.forget, address)
    assert not alternative.cached(address)
    await call(alternative.close)


# Those that keep a conversation


@pytest.mark.parametrize("who", KEEPERS)
async def test_what_keeps_a_conversation_gives_the_newest_to_every_process(
    who: str,
    redis_url: str,
    prefix: str,
    postgres_url: str,
    tmp_path: Path,
    workers: Callable[..., Workers],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cashews", reason="the extra `bench` is not installed")
    own = Settings.load(
        redis_url=redis_url, redis_key_prefix=prefix, database_url=postgres_url, data_dir=tmp_path / "bus"
    )
    for name, value in own.environment().items():
        monkeypatch.setenv(name, value)
    if who == "mnemobus":
        workers(own, 1)
    prepare(postgres_url)
    place = {"redis_url": redis_url, "database_url": postgres_url, "prefix": f"{{{prefix}}}:talk"}
    async with AsyncExitStack() as stack:
        a, b = KEEPERS[who](place), KEEPERS[who](place)
        try:
            await a.open(stack)
            await b.open(stack)
        except Unfit as error:
            pytest.skip(str(error))
        # Given two that have read the room, before anything was said and in between
        said, noted = [], []
        for n in range(MESSAGES + 2):
            for reader in (a, b):
                await reader.context("kitchen", "ann")
            # If one of them says something, and notes a fact
            writer = (a, b)[n % 2]
            said.insert(0, made_id())
            noted.insert(0, made_id())
            await writer.say("kitchen", "ann", said[0], {"text": "hello", "n": n})
            await writer.note("kitchen", "ann", noted[0], {"text": "a fact", "n": n})
            # Then both have it, the newest first, and no more than were asked for
            for reader in (a, b):

                async def has_it(reader: Any = reader) -> bool:
                    found = reader.ids(await reader.context("kitchen", "ann"))
                    return (list(found[0]), found[1][0]) == (said[:MESSAGES], noted[0])

                await eventually(has_it)
        # And another room is another conversation
        assert [list(ids) for ids in a.ids(await a.context("hall", "bob"))] == [[], []]


def test_what_an_answer_lacks_or_takes_back_is_told_from_what_others_pushed_out() -> None:
    old, *newer = (made_id() for _ in range(6))
    assert sorted([old, *newer]) == [old, *newer]
    # An own memory that is not there is lacking; not if the listing is full of newer ones
    assert lacks([], old, 5)
    assert not lacks([], "", 5)
    assert lacks(newer[:3], old, 5)
    assert not lacks(newer[::-1], old, 5)
    assert lacks([old, *newer[:4]][::-1], newer[4], 5)
    # Newest first: what is pushed out at the end is gone for good, what is gone above it went back
    assert not goes_back(["3", "2", "1"], ["4", "3", "2"])
    assert not goes_back(["3", "2", "1"], ["6", "5", "4"])
    assert not goes_back([], ["1"])
    assert goes_back(["3", "2", "1"], ["2", "1", "0"])
    assert goes_back(["3", "2", "1"], ["4", "3", "1"])


@pytest.mark.parametrize(("late", "lacking"), [(0, 0), (1, 5)])
async def test_answers_without_an_own_message_are_counted(late: int, lacking: int) -> None:
    class Late:
        """Shows all but the last so many messages."""

        def __init__(self) -> None:
            self.said: list[str] = []

        async def context(self, room: str, entity: str) -> list[str]:
            return self.said[late:]

        async def say(self, room: str, entity: str, id: str, content: Any) -> None:
            self.said.insert(0, id)

        def ids(self, answer: list[str]) -> tuple[list[str], list[str]]:
            return answer, []

    record, talker = Record(), Agent(Late(), "kitchen", "ann")  # type: ignore[arg-type]
    for _ in range(2):
        record.add(await talker.turn())
    # Given two turns, each a read, a message, and two more reads
    assert record.reads == 6
    assert (len(record.turns), len(record.own), len(record.both)) == (2, 2, 2)
    # Then all reads after the first message lack it, of one who is late: of the first turn two, then three
    assert (record.lacking, record.back) == (lacking, 0)


async def test_agents_tell_when_a_write_is_in_the_window_of_each(
    settings: Settings, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    # Given two agents in another process that hold a room live
    fill(settings, [memory(0)])
    told: list[Any] = []
    async with connect() as bus, Party(**started(settings)) as party:
        party.on_told = told.append
        await party.ask("open", 2)
        await party.ask("watch", 0, 2, "messages", "r0")
        await party.ask("follow", 0, 2, "messages", ["r1"])
        # If somebody writes into it, and into another room that they hold
        await bus.write(memory(1))
        receipt = await bus.write(memory(3))
        # Then it is told once, when each of them had it, and both read it
        await eventually(lambda: told)
        [[version, moments]] = told
        assert (version, len(moments)) == (str(receipt.version), 2)
        assert await party.ask("newest", "r0") == [3, 3]
        # And nothing more once that is over
        await party.ask("unwatch")
        await bus.write(memory(6))
        await eventually(lambda: newest_of(party, [6, 6]))
        assert len(told) == 1


async def newest_of(party: Party, expected: list[int]) -> bool:
    return bool(await party.ask("newest", "r0") == expected)


# Floors


async def test_a_hand_written_drain_moves_what_the_bus_wrote_into_the_store(
    connect: Connect, settings: Settings, database_url: str
) -> None:
    # Given memories that a bus wrote to its log, and no worker
    memories = [memory(n, embedding=n % 4 == 0) for n in range(1200)]
    async with connect(database_url=database_url) as bus:
        receipts = await bus.write_many(memories)
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    logs = [keys.log(p) for p in range(settings.log_partitions)]
    with redis.Redis.from_url(settings.redis_url) as client:
        drain.group(client, "floor", logs)
        # If two processes drain it
        processes = [
            subprocess.Popen(
                drain.command(settings.redis_url, database_url, "floor", logs),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )
            for _ in range(2)
        ]  # fmt: skip
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        answers = [json.loads(process.communicate("go\n", timeout=60)[0]) for process in processes]
        # Then they moved all of it, and confirmed it
        assert sum(answer["events"] for answer in answers) == len(memories)
        assert all(answer["seconds"] > 0 for answer in answers)
        assert sum(client.xpending(log, "floor")["pending"] for log in logs) == 0
    # And the store has what a worker would have put there
    reader = open_reader(settings.model_copy(update={"database_url": database_url}))
    await reader.open()
    for given, receipt in zip(memories, receipts, strict=True):
        assert await reader.get(given.id) == encode(given, 1 << 20)._replace(version=receipt.version)
    assert (await reader.totals()).tables == {"messages": len(memories)}
    await reader.close()


async def test_the_hand_written_chain_hears_of_every_write(redis_url: str, database_url: str) -> None:
    store.prepare(database_url)
    memories = [memory(n) for n in range(30)]
    async with chain.Chain(redis_url, database_url) as running:
        for one in memories:
            await running.write(one)
            await asyncio.sleep(0)
        delays = await running.delays()
    assert len(delays) == len(memories)
    assert all(-1 < delay < 30 for delay in delays)
    reader = open_reader(Settings.load(database_url=database_url))
    await reader.open()
    assert (await reader.totals()).tables == {"messages": len(memories)}
    await reader.close()


async def test_a_hop_by_hand_is_as_long_as_its_message_takes(redis_url: str) -> None:
    async with hop.Hop(redis_url) as one:
        found = [await one.publish(b"x" * 400) for _ in range(20)]
    # From the call it takes some time, and longer than from the answer, which the message may overtake
    assert all(0 < times.sent < 30e9 for times in found)
    assert all(times.answered < times.sent for times in found)


async def test_hand_written_reads_give_the_rows_of_the_store(
    redis_url: str, prefix: str, database_url: str
) -> None:
    # Given memories in the store
    settings = Settings.load(database_url=database_url)
    memories = [memory(n, embedding=True) for n in range(9)]
    writer = open_writer(settings)
    writer.open()
    rows = [encode(one, 1 << 20) for one in memories]
    writer.apply([Event.put(row)._replace(version=Version(1, n)) for n, row in enumerate(rows)])
    writer.close()
    reader = open_reader(settings)
    await reader.open()
    by_hand = reads.cold(database_url)
    await by_hand.open(redis_url, database_url)
    # Then one read by hand is what the store's reader gives
    for one in memories:
        expected = await reader.get(one.id)
        assert expected is not None
        (row,) = await by_hand.get(one.id)
        assert row[1:10] == expected[1:10]
    # And so is a listing
    expected_many = await reader.recent(Query("messages", room="r1"), 2)
    many = await by_hand.recent("messages", "r1", 2)
    assert [row[6] for row in many] == [row.content for row in expected_many]
    assert len(many) == 2
    await by_hand.close()
    await reader.close()


async def test_hand_written_writes_are_the_entries_of_the_log(
    connect: Connect, settings: Settings, redis_url: str, prefix: str
) -> None:
    # Given what the bus writes for a memory
    one = memory(1, embedding=True)
    async with connect() as bus:
        await bus.write(one)
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        ((_, written),) = await client.xrange(keys.log(keys.log_partition(one.room)))
        # Then XADD by hand writes the same, alone, in pipelines and over raw sockets
        key = f"{{{prefix}}}:floor"
        await writes.one(client, key, writes.fields(one))
        assert await writes.pipelined(client, key, [writes.fields(one)] * 250, size=100) > 0
        wire, blocking = await writes.Wire.open(redis_url), writes.Blocking(redis_url)
        await wire.call("XADD", key, "*", *writes.flat(one))
        await asyncio.to_thread(blocking.call, "XADD", key, "*", *writes.flat(one))
        wire.close()
        blocking.close()
        entries = await client.xrange(key)
        assert len(entries) == 253
        assert all(fields == written for _, fields in entries)


async def test_the_other_floors(redis_url: str, prefix: str, database_url: str) -> None:
    assert await reads.held({"a": 1})("a") == 1
    plain = reads.Hash()
    await plain.open(redis_url)
    await plain.client.hset(f"{{{prefix}}}:h", "f", b"v")
    assert await plain.get(f"{{{prefix}}}:h", "f") == b"v"
    await plain.close()
    store.prepare(database_url)
    assert await start.start(redis_url, database_url) > 0
