"""Another number of log partitions while agents and workers are at work: nothing is lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis.asyncio

import mnemobus
from commands import Command
from mnemobus import InvalidQuery, LogUnavailable, Memory, MnemobusError, Settings, WriteRejected
from mnemobus.cli import repartition
from mnemobus.cli.repartition import Repartition
from mnemobus.connection.link import Link
from mnemobus.errors import PartitionEnded
from mnemobus.keys import LAYOUT, Dimensions, Keyspace, Shape, Version
from mnemobus.log import outbox, outbox_file
from mnemobus.log.append import append, publish_call
from mnemobus.log.events import PUT, Event
from mnemobus.memory import new_id
from mnemobus_workers.pool import make_broker
from mnemobus_workers.upkeep import Upkeep
from outside import refuse_poison, stored
from servers import eventually, worker_threads

Connect = Callable[..., mnemobus.Bus]
BEFORE = Path(__file__).with_name("publish_before.lua").read_text()
"""publish.lua as agents of the version before send it."""


def said(text: str, room: str = "r1", **fields: object) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)  # type: ignore[arg-type]


class Log:
    """The log from outside."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
        self.client = redis.asyncio.Redis.from_url(settings.redis_url)

    async def shape(self) -> Shape:
        shape = Shape.read(await self.client.hmget(self.keys.layout, list(LAYOUT)))
        assert shape is not None
        return shape

    async def entries(self) -> list[tuple[int, Version, dict[str, str]]]:
        """All that was ever logged: partition, ID, and the fields of the event."""
        found = []
        for partition in (await self.shape()).all:
            for id, fields in await self.client.xrange(self.keys.log(partition)):
                event = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
                found.append((partition, Version.parse(id), event))
        return found

    async def is_open(self) -> bool:
        """Whether writes are taken."""
        meters = [
            await self.client.hmget(self.keys.meter(p), "open", "closed")
            for p in (await self.shape()).current
        ]
        return all(opened and not closed for opened, closed in meters)


@pytest.fixture
async def log(settings: Settings) -> AsyncIterator[Log]:
    log = Log(settings)
    yield log
    await log.client.aclose()


@contextlib.asynccontextmanager
async def change(settings: Settings, partitions: int, **options: Any) -> AsyncIterator[Repartition]:
    """A repartition in this process, to stop at any of its steps."""
    link = Link(settings)
    options = {"timeout": 20.0, "pause": 10.0, "say": lambda _: None, **options}
    try:
        yield Repartition(link, partitions, **options)
    finally:
        await link.close()


async def to(settings: Settings, partitions: int, **options: Any) -> None:
    async with change(settings, partitions, **options) as work:
        assert await work.run(force=False)


async def are_there(settings: Settings, workers: int = 1) -> None:
    """Wait until workers have told that they are at work."""
    keys = Keyspace(settings.redis_key_prefix, 1, 1)
    async with redis.asyncio.Redis.from_url(settings.redis_url) as client:

        async def told() -> bool:
            return int(await client.hlen(keys.workers)) >= workers

        await eventually(told, 30)


def orderly(entries: list[tuple[int, Version, dict[str, str]]]) -> None:
    """Each memory's events are in the order in which they were written, whatever partition they are in."""
    last: dict[str, tuple[Version, int]] = {}
    for _, version, event in sorted(entries, key=lambda entry: entry[1]):
        text = orjson.loads(event["content"])["text"]
        if text.isdigit():
            before = last.get(event["id"], (None, -1))
            assert int(text) > before[1], (event["id"], before, version, text)
            last[event["id"]] = version, int(text)


# Under load


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
async def test_g1_g2_agents_and_workers_go_on_and_nothing_is_lost_doubled_or_out_of_order(
    request: pytest.FixtureRequest,
    settings: Settings,
    store: str,
    agent: Callable[..., Any],
    workers: Callable[..., Any],
    command: Callable[..., Command],
) -> None:
    settings = settings.model_copy(update={"database_url": request.getfixturevalue(f"{store}_url")})
    log = Log(settings)
    # Given two agents in processes of their own that write and read in the same rooms, and two processes of workers
    workers(settings, processes=2)
    await are_there(settings, 2)
    agents = [agent(settings, program="busy_agent_process.py") for _ in range(2)]
    # When the log gets other numbers of partitions under their hands
    for partitions in (1, 3, 4):
        written = sum([(await each.do("stats"))["writes"] for each in agents])

        async def goes_on(written: int = written) -> bool:
            return sum([(await each.do("stats"))["writes"] for each in agents]) > written + 100

        await eventually(goes_on, 30)
        assert command("repartition", str(partitions), settings=settings).status == 0
        assert (await log.shape()).size == partitions
    await eventually(goes_on, 30)
    records = [await each.do("stop") for each in agents]
    # Then no write failed, and no read went back
    assert [record["refused"] for record in records] == [[], []]
    assert [record["back"] for record in records] == [[], []]
    # and each acknowledged write is in the log once, in its order, and in the store
    told = sorted((id, text, version) for record in records for _, id, text, version in record["writes"])
    entries = await log.entries()
    assert told == sorted(
        (event["id"], orjson.loads(event["content"])["text"], str(version)) for _, version, event in entries
    )
    orderly(entries)
    assert {partition for partition, _, _ in entries} == set(range(12))
    newest = {
        id: text for _, id, text in sorted((len(text), id, text) for id, text, _ in told if text.isdigit())
    }
    once = [text for _, text, _ in told if not text.isdigit()]
    rooms = {event["room"] for _, _, event in entries}
    found = sorted([text for room in rooms for text in await stored(settings, room)])
    assert found == sorted([*once, *newest.values()])
    # and what the agents hold is what the store has
    async with mnemobus.connect(**{**settings.model_dump(), "live": "off"}) as bus:
        for room in sorted(rooms):
            there = await bus.recent("messages", room=room, limit=40)
            for each in agents:
                shown = (await each.do("shown"))[room]
                assert [tuple(item) for item in shown] == [
                    (m.id, m.content["text"], str(m.version)) for m in there
                ]
    await log.client.aclose()


async def test_receipts_and_tokens_are_answered_on_every_server(each_server: Settings) -> None:
    settings, log = each_server, Log(each_server)
    rooms = [f"r{n}" for n in range(16)]
    given = settings.model_dump()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(worker_threads(settings))
        await are_there(settings)
        bus = await stack.enter_async_context(mnemobus.connect(**given))
        other = await stack.enter_async_context(mnemobus.connect(**given))
        # one that does not hear of a change by itself
        slow = await stack.enter_async_context(
            mnemobus.connect(**{**given, "heartbeat": 30.0, "max_staleness": 60.0})
        )
        await slow._feed.send("UNSUBSCRIBE", log.keys.layout_channel(slow.id))
        # Given receipts of what is in the partitions there were
        before = await bus.write_many([said("0", room) for room in rooms])
        token = bus.token()
        # When the log has fewer
        async with change(settings, 1) as work:
            assert await work.run(force=True)
        # Then both agents write there, and all of it is in the store
        after = await bus.write_many([said("1", room) for room in rooms])
        late = [await other.write(said("2", room)) for room in rooms]
        for receipt in (*before, *after, *late):
            await receipt.committed(10)
        # and versions rise from one write to a room to the next
        for receipts in zip(before, after, late, strict=True):
            versions = [receipt.version for receipt in receipts]
            assert versions == sorted(versions)  # type: ignore[type-var]
        # and a token from before, as well as a new one, is observed
        await other.observe(token, 10)
        await other.observe(bus.token(), 10)
        assert slow._link.keys.shape[:2] == (0, 4)
        await slow.observe(other.token(), 10)
        for room in rooms:
            assert len(await slow.recent("messages", room=room)) == 3
            found = await other.recent("messages", room=room)
            assert sorted(m.content["text"] for m in found) == ["0", "1", "2"]
        with pytest.raises(InvalidQuery, match="other log partitions"):
            await bus.observe(base64.urlsafe_b64encode(b'{"9":"1-0"}').decode(), 1)
    assert (await log.shape())[:2] == (4, 1)
    await log.client.aclose()


async def test_g9_what_is_held_live_stays_current(
    settings: Settings, connect: Connect, pool: Settings, log: Log
) -> None:
    await are_there(settings)
    async with connect() as writer, connect() as reader:
        await writer.write(said("0"), durability="committed")

        async def held() -> bool:
            reader._local.drop("room:messages:r1")
            await reader.recent("messages", room="r1", limit=4)
            return reader._local.live("room:messages:r1") is not None

        # Given a room that an agent holds live
        await eventually(held)
        # When the log gets another number of partitions, and another agent writes
        await to(settings, 3)
        await writer.write(said("1"))

        # Then it shows that within the bound, and what follows as well
        async def shows(*texts: str) -> bool:
            found = await reader.recent("messages", room="r1", limit=4)
            return [m.content["text"] for m in found] == list(texts)

        await eventually(lambda: shows("1", "0"), settings.max_staleness)
        await eventually(held)
        await writer.write(said("2"))
        await eventually(lambda: shows("2", "1", "0"), settings.max_staleness)
        # and an own write is in the next answer, as ever
        await reader.write(said("3"))
        assert await shows("3", "2", "1", "0")


async def test_g9_what_is_logged_after_the_change_is_shown_though_no_worker_runs(
    settings: Settings, connect: Connect, log: Log
) -> None:
    async with connect() as writer, connect() as reader:

        async def held() -> bool:
            reader._local.drop("room:messages:r1")
            await reader.recent("messages", room="r1", limit=4)
            return reader._local.live("room:messages:r1") is not None

        # Given a room that an agent holds live, a log that is laid out anew, and no worker any more
        with worker_threads(settings):
            await are_there(settings)
            await writer.write(said("0"), durability="committed")
            await eventually(held)
            await to(settings, 3)
        # When another agent writes
        await writer.write(said("1"))

        # Then that is shown within the bound: the feed will not tell of it
        async def seen() -> bool:
            found = await reader.recent("messages", room="r1", limit=4)
            return [m.content["text"] for m in found] == ["1", "0"]

        await eventually(seen, 10 * settings.max_staleness)


async def test_g4_what_the_feed_names_of_a_new_partition_is_not_taken_for_heard(
    settings: Settings, connect: Connect, pool: Settings, log: Log
) -> None:
    await are_there(settings)
    async with connect() as writer, connect(heartbeat=30.0, max_staleness=60.0) as reader:
        await writer.write(said("0"), durability="committed")

        async def held() -> bool:
            reader._local.drop("room:messages:r1")
            await reader.recent("messages", room="r1", limit=4)
            return reader._local.live("room:messages:r1") is not None

        await eventually(held)
        # Given an agent that has not heard that the log was laid out anew
        await reader._feed.send("UNSUBSCRIBE", log.keys.layout_channel(reader.id))
        async with change(settings, 3) as work:
            assert await work.run(force=True)
        # When the feed names what was written since
        await writer.write(said("1"), durability="committed")

        # Then the agent no longer answers without it
        async def seen() -> bool:
            return len(await reader.recent("messages", room="r1", limit=4)) == 2

        await eventually(seen)


# What is in the way


async def test_without_workers_it_is_refused(
    settings: Settings, connect: Connect, command: Callable[..., Command], log: Log
) -> None:
    async with connect() as bus:
        await bus.write(said("0"))
        done = command("repartition", "2", settings=settings)
        assert done.status == 1
        assert "no worker runs, so nothing in the log would be applied: start workers" in done.err
        assert (await log.shape())[:2] == (0, 4)
        assert await log.is_open()


async def test_workers_and_agents_of_an_older_version_are_in_the_way(
    settings: Settings, connect: Connect, pool: Settings, log: Log
) -> None:
    await are_there(settings)
    async with connect() as bus:
        # Given an agent of an older version: it does not listen for a change
        await bus._feed.send("UNSUBSCRIBE", log.keys.layout_channel(bus.id))

        async def older() -> bool:
            return log.keys.layout_channel(bus.id).encode() not in await log.client.pubsub_channels()

        await eventually(older)
        async with change(settings, 2) as work:
            with pytest.raises(MnemobusError, match=rf"agents of an older version are connected.*{bus.id}"):
                await work.run(force=False)
        # When it is said that this does not matter, it is done
        async with change(settings, 2) as work:
            assert await work.run(force=True)
    assert (await log.shape())[:2] == (4, 2)
    # Given a worker of an older version
    seconds, _ = await log.client.time()
    report = orjson.dumps({"version": "0.1", "time": seconds})
    await log.client.hset(log.keys.workers, "old-worker", report)
    async with change(settings, 3) as work:
        with pytest.raises(MnemobusError, match=r"workers of an older version run.*old-worker"):
            await work.run(force=True)
    assert await log.is_open()


async def test_g2_an_agent_of_an_older_version_that_was_away_writes_nothing_where_nobody_would_order_it(
    settings: Settings, connect: Connect, pool: Settings, log: Log
) -> None:
    """publish_before.lua stands for it: that is the script that it sends."""
    await are_there(settings)
    async with connect() as bus:
        await bus.write(said("0"), durability="committed")
        await to(settings, 2)
    link = Link(settings)
    try:
        await link.command("PING")
        keys, arguments = call_before(link, 1, "old", 1, [put("late")])
        # When it calls the log as it has known it
        with pytest.raises(redis.asyncio.ResponseError, match="BACKLOG"):
            await link.command("EVAL", BEFORE, len(keys), *keys, *arguments)
        # Then nothing is written there, whatever a worker's upkeep does
        await asyncio.to_thread(tidy, settings)
        with pytest.raises(redis.asyncio.ResponseError, match="BACKLOG"):
            await link.command("EVAL", BEFORE, len(keys), *keys, *arguments)
    finally:
        await link.close()
    assert "late" not in str(await log.entries())
    # and nobody is told of a backlog
    async with connect() as bus:
        health = await bus.health()
        assert health.ok, health.problems
        assert health.backlog == 0


def put(text: str, room: str = "r1") -> list[bytes]:
    """An event as the log has it."""
    content = orjson.dumps({"text": text})
    return Event(PUT, Dimensions("messages", room), new_id(), content, b"{}", created_us=1).fields()


def call_before(*call: Any) -> tuple[list[str], list[Any]]:
    """KEYS and ARGV of a call as the version before makes it: without the layout."""
    keys, arguments = publish_call(*call)
    return keys, [*arguments[:5], *arguments[6:]]


def tidy(settings: Settings, rounds: int = 1) -> None:
    """What a worker's upkeep does every ten seconds."""
    broker = make_broker(settings)
    try:
        upkeep = Upkeep(broker, None)  # type: ignore[arg-type]
        for _ in range(rounds):
            broker.look_at_layout()
            upkeep.tidy()
    finally:
        broker.close()


# A writer whose call is under way


async def test_g1_a_lost_answer_across_the_change_is_no_second_write(
    settings: Settings, connect: Connect, pool: Settings, log: Log
) -> None:
    await are_there(settings)
    link = Link(settings)
    try:
        await link.command("PING")
        partition = link.keys.log_partition("r1")
        event = put("once")
        # Given a call that was done, and whose answer got lost
        first = await link.run("publish", *publish_call(link, partition, "me", 1, [event]))
        await to(settings, 1)
        # When it is repeated after the change, then it is answered as the first time
        again = await link.run("publish", *publish_call(link, partition, "me", 1, [event]))
        assert again[0] == first[0]
        # and a new one is refused, for ever
        with pytest.raises(redis.asyncio.ResponseError, match="ENDED"):
            await link.run("publish", *publish_call(link, partition, "me", 2, [event]))
        assert [e["content"] for _, _, e in await log.entries()] == ['{"text":"once"}']
    finally:
        await link.close()


async def test_g1_g2_what_waits_behind_a_call_goes_to_the_new_partitions_in_its_order(
    settings: Settings, connect: Connect, pool: Settings, log: Log
) -> None:
    await are_there(settings)
    ids = [new_id() for _ in range(8)]
    async with connect() as bus, connect() as other:
        await bus.write(said("0"))
        async with change(settings, 3) as work:
            # Given a log that is closed
            await work._link.command("PING")
            work.before = work._link.keys.shape
            await work._close()
            # When many writes to some rooms are made, which wait
            writing = [
                asyncio.create_task(bus.write(said(str(n), f"room-{k}", id=ids[k])))
                for n in range(1, 6)
                for k in range(8)
            ]
            many = asyncio.create_task(other.write_many([said("x", f"room-{k}") for k in range(8)]))
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in (*writing, many))
            # and the log is laid out anew
            await eventually(lambda: lay_out(work))
        # Then each of them is in the log once, in the order in which they were made
        receipts = [await task for task in writing] + await many
        for receipt in receipts:
            await receipt.committed(10)
        entries = await log.entries()
        assert len(entries) == 1 + 40 + 8
        orderly(entries)
        assert {partition for partition, _, _ in entries if partition >= 4} == {4, 5, 6}
        assert bus.stats().outboxed == 0
        memory = await other.get(ids[3])
        assert memory is not None and memory.content == {"text": "5"}


async def lay_out(work: Repartition) -> bool:
    return await work._lay_out() == 0


async def test_g7_what_waits_in_the_outbox_goes_to_the_new_partitions(
    settings: Settings,
    connect: Connect,
    own_redis: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = own_redis("--appendonly", "yes", "--appendfsync", "always")
    settings = settings.model_copy(update={"redis_url": server.url, "redis_timeout": 0.5})
    log = Log(settings)
    ids = [new_id() for _ in range(6)]

    async def lose(*_: Any) -> Any:
        raise TimeoutError

    with worker_threads(settings):
        await are_there(settings)
        async with mnemobus.connect(**settings.model_dump()) as bus:
            await bus.write(said("0"))
            # Given writes that wait in the outbox, the first as a call that may or may not have been done
            with monkeypatch.context() as away:
                away.setattr(outbox, "append", lose)
                server.kill()
                kept = [await bus.write(said("1", f"room-{k}", id=id)) for k, id in enumerate(ids)]
                assert all(receipt.outboxed for receipt in kept)
                server.start()
                # When the log is laid out anew before they get there
                await to(settings, 2)
            # Then they are in the log once, and committed
            for receipt in kept:
                await receipt.committed(20)
            entries = await log.entries()
            assert sorted(e["id"] for _, _, e in entries if e["id"] in ids) == sorted(ids)
            # and what follows comes after them
            await bus.write(said("2", "room-0", id=ids[0]), durability="committed")
            found = await bus.get(ids[0])
            assert found is not None and found.content == {"text": "2"}
    await log.client.aclose()


async def test_g2_what_waits_behind_calls_of_unknown_outcome_overtakes_none_of_them(tmp_path: Path) -> None:
    keys = Keyspace("p", 2, 1)
    first, second = ((keys.log_partition(room), room) for room in ("a", "d"))
    assert first[0] != second[0]

    file = outbox_file.OutboxFile(tmp_path / "outbox.db", keys, 1 << 20)
    await file.open()
    try:
        # Given two calls to two partitions, of unknown outcome, and writes that came later
        await file.append(first[0], [put("1", "a")], ("me", 1))
        await file.append(second[0], [put("2", "d")], ("me", 1))
        for n, (partition, room) in ((3, second), (4, first), (5, second)):
            await file.append(partition, [put(str(n), room)])
        # When the log is laid out anew, with one partition, and neither call was done
        keys.shape = Shape(2, 1)
        made = []
        while (call := await file.next_call()) is not None:
            if call.partition < 2:
                await file.ended(call)
            else:
                made += [dict(zip(e[::2], e[1::2], strict=True))[b"content"] for e in call.events]
                await file.answered(call)
        # Then they go to the new partition in the order in which they were written
        assert made == [b'{"text":"%d"}' % n for n in range(1, 6)]
    finally:
        await file.close()


async def test_a_bus_whose_calls_are_cancelled_while_it_goes_on_elsewhere_can_be_closed(
    settings: Settings, connect: Connect, pool: Settings
) -> None:
    await are_there(settings)
    async with change(settings, 2) as work:
        # Given a bus with a call to a log that is closed, and writes that wait for it to end
        await work._link.command("PING")
        work.before = work._link.keys.shape
        await work._close()
        bus = connect(heartbeat=30.0, max_staleness=60.0)
        await bus.open()
        first = asyncio.create_task(bus.write(said("0")))
        await eventually(lambda: any(publisher._task is not None for publisher in bus._writes.publishers))
        bus._link.lay_out(Shape(4, 2))
        # If that call is cancelled, and the heartbeat, as at the end of a loop
        for task in list(bus._feed._tasks):
            task.cancel()
        for publisher in bus._writes.publishers:
            if publisher._task is not None:
                publisher._task.cancel()
        with pytest.raises(LogUnavailable):
            await first
        # Then the bus can be closed
        async with asyncio.timeout(10):
            await bus.close()


# It may end at any moment


async def test_g1_a_log_that_was_closed_by_who_died_takes_writes_again(
    settings: Settings, connect: Connect, pool: Settings, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await are_there(settings)
    monkeypatch.setattr(repartition, "LEASE", 0.5)
    async with connect() as bus:
        # Given a command that closed the log, and died
        async with change(settings, 2) as work:
            await work._link.command("PING")
            work.before = work._link.keys.shape
            await work._close()
            assert not await log.is_open()
        # Then a write waits for a moment, and is logged as ever
        receipt = await bus.write(said("0"))
        assert receipt.version is not None
        await receipt.committed(10)
        assert (await log.shape())[:2] == (0, 4)
        # When the command is run again, then it is done
        await to(settings, 2)
        await bus.write(said("1"), durability="committed")
    assert (await log.shape())[:2] == (4, 2)
    assert await log.is_open()


async def test_while_one_is_at_it_another_is_refused(settings: Settings, pool: Settings, log: Log) -> None:
    await are_there(settings)
    async with change(settings, 2) as one, change(settings, 3) as other:
        await one._link.command("PING")
        one.before = one._link.keys.shape
        await one._close()
        with pytest.raises(MnemobusError, match="another `mnemobus repartition` is running"):
            await other.run(force=False)
        assert not await log.is_open()
        await eventually(lambda: lay_out(one))
    assert (await log.shape())[:2] == (4, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_a_command_that_waits_and_is_stopped_leaves_the_log_as_it_was(
    settings: Settings,
    connect: Connect,
    log: Log,
    command: Callable[..., Command],
    number: signal.Signals,
) -> None:
    async with connect() as bus:
        await bus.write(said("0"))
        # Given workers that tell that they are at work, and apply nothing
        seconds, _ = await log.client.time()
        report = orjson.dumps({"version": "x", "time": seconds, "every": 60.0, "follows": True})
        await log.client.hset(log.keys.workers, "w", report)
        at_it = command("repartition", "2", "--pause", "30", settings=settings)

        async def closed() -> bool:
            return not await log.is_open()

        await eventually(closed, 30)
        # When the command is stopped, or killed
        at_it.signal(number)
        assert at_it.status == (130 if number == signal.SIGINT else -9)
        # Then the log takes writes, at once or after some seconds
        assert (await log.is_open()) == (number == signal.SIGINT)
        assert (await bus.write(said("1"))).version is not None
        # and a command that has no patience says why, and leaves it as it was, too
        impatient = command("repartition", "2", "--pause", "0.3", settings=settings)
        assert impatient.status == 1
        assert "2 events were not applied within 0.3 s. The log takes writes again as before" in impatient.err
        assert await log.is_open()
        assert (await log.shape())[:2] == (0, 4)
        # When there are workers, then it is done
        with worker_threads(settings):
            assert command("repartition", "2", settings=settings).status == 0
            await bus.write(said("2"), durability="committed")


async def test_g1_a_redis_that_is_killed_meanwhile_costs_nothing(
    settings: Settings, own_redis: Callable[..., Any], command: Callable[..., Command]
) -> None:
    server = own_redis("--appendonly", "yes", "--appendfsync", "always")
    settings = settings.model_copy(update={"redis_url": server.url, "redis_timeout": 0.5})
    log = Log(settings)
    with worker_threads(settings):
        await are_there(settings)
        async with mnemobus.connect(**settings.model_dump()) as bus:
            receipts = [await bus.write(said(str(n), f"room-{n % 5}")) for n in range(20)]
            # When Redis is killed after the log was closed, and once more after it was laid out anew
            async with change(settings, 1) as work:
                await work._link.command("PING")
                work.before = work._link.keys.shape
                await work._close()
                writing = asyncio.create_task(bus.write(said("20")))
                server.kill()
                server.start()
                await work._switch()
                server.kill()
                server.start()
            receipts += [await writing, await bus.write(said("21"))]
            # Then all is there
            for receipt in receipts:
                await receipt.committed(20)
            assert len(await log.entries()) == 22
            assert (await log.shape())[:2] == (4, 1)
            # and an answer that got lost makes the command no less right
            assert command("repartition", "1", settings=settings).status == 0
    await log.client.aclose()


# What stays behind


async def test_dead_letters_and_the_log_of_ended_partitions_are_there(
    settings: Settings, connect: Connect, pool: Settings, log: Log, command: Callable[..., Command]
) -> None:
    await are_there(settings)
    async with connect() as bus:
        # a call of somebody in each partition may be repeated yet
        for n in range(1, 9):
            await bus.write(said("0", f"r{n}"), durability="committed")
        refuse_poison(settings)
        # Given a dead letter, and a log that is laid out anew
        refused = await bus.write(said("poison", "r2"))
        with pytest.raises(WriteRejected):
            await refused.committed(10)
        tails = [command("tail", option, "--json", settings=settings) for option in ("--events", "--live")]
        await to(settings, 2)
        await bus.write(said("1"), durability="committed")

        # Then who follows the log sees what is written there
        async def followed() -> bool:
            await bus.write(said("2", "r3"))
            return all(
                '"partition":' in tail.out and '"text":"2"' in tail.out.replace(" ", "") for tail in tails
            )

        await eventually(followed, 20)
        # and the letter is listed, and its writer is told as ever
        listed = command("dead", "list", "--json", settings=settings)
        assert listed.status == 0 and "poison" in listed.out
        with pytest.raises(WriteRejected):
            await refused.committed(10)
        # When it is requeued, then it is tried again, and its writer hears
        assert command("dead", "requeue", "--all", settings=settings).status == 0

        async def is_dead_again() -> bool:
            return bool(await log.client.xlen(log.keys.dead(log.keys.log_partition("r2"))))

        await eventually(is_dead_again)
        # and a replay reads all of the log, and each partition by its number
        replayed = command("replay", "--json", settings=settings).json
        assert replayed["events"] > 8 + 1 + 1 + 1
        assert replayed["changed"] == 0
        first = command(
            "replay", "--json", "--partition", str(log.keys.log_partition("r1")), settings=settings
        )
        assert first.json["applied"] >= 1
        # and so do figures, and the tail
        figures = command("stats", "--json", settings=settings).json
        assert [p["partition"] for p in figures["log"]] == list(range(6))
        assert [p["current"] for p in figures["log"]] == [False] * 4 + [True] * 2
        assert figures["backlog"] == 0
        tail = command("tail", "--since", "1h", "--count", "2", "--events", "--json", settings=settings)
        assert tail.status == 0
    doctor = command("doctor", "--json", settings=settings)
    assert doctor.status == 0
    assert "2 log and 64 feed partitions; what is in 4 earlier log partitions is kept for now" in doctor.out


async def test_g2_versions_rise_though_the_clock_of_redis_was_set_back(
    settings: Settings, own_redis: Callable[..., Any], wall_clock: Any
) -> None:
    server = own_redis(environment=wall_clock.environment)
    settings = settings.model_copy(update={"redis_url": server.url})
    with worker_threads(settings):
        await are_there(settings)
        async with mnemobus.connect(**settings.model_dump()) as bus:
            memory = said("0", id=new_id())
            before = await bus.write(memory, durability="committed")
            # When the clock is set back by a minute, and the log is laid out anew
            wall_clock.set_ahead(-60)
            await to(settings, 1)
            after = await bus.write(said("1", id=memory.id), durability="committed")
            # Then the later write is the later version, and counts
            assert before.version is not None and after.version is not None
            assert after.version > before.version
            found = await bus.get(str(memory.id))
            assert found is not None and found.content == {"text": "1"}


# What is configured


async def test_what_is_configured_counts_for_a_new_bus_only(
    settings: Settings, connect: Connect, pool: Settings, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mnemobus.connection")
    async with connect() as bus:
        await bus.write(said("0"), durability="committed")
        async with connect(log_partitions=9) as other:
            await other.write(said("1"), durability="committed")
            assert len(await bus.recent("messages", room="r1")) == 2
    assert (await log.shape())[:2] == (0, 4)
    assert "has 4 partitions; MNEMOBUS_LOG_PARTITIONS (9 here) counts for a new bus only" in caplog.text


async def test_a_bus_from_before_is_taken_over(settings: Settings, connect: Connect, log: Log) -> None:
    # Given a log that agents of the version before have written
    await log.client.hset(log.keys.layout, mapping={"log_partitions": 4, "feed_partitions": 64})
    link = Link(settings)
    keys, arguments = call_before(link, link.keys.log_partition("r1"), "old", 1, [put("0")])
    await log.client.eval(BEFORE, len(keys), *keys, *arguments)
    await link.close()
    # When a bus of this version comes, and workers do
    with worker_threads(settings):
        async with connect() as bus:
            await bus.write(said("1"), durability="committed")
            # Then all is applied, and the older one may go on
            more = await log.client.eval(BEFORE, len(keys), *keys, "old", 2, *arguments[2:])
            assert len(more[0]) == 1

            async def there() -> bool:
                return await stored(settings) == ["0", "1"]

            await eventually(there)


async def test_g1_a_flushed_redis_takes_no_write_to_partitions_that_nobody_serves(
    settings: Settings, own_redis: Callable[..., Any]
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    with worker_threads(settings):
        await are_there(settings)
        async with mnemobus.connect(**settings.model_dump()) as bus:
            await bus.write(said("0"), durability="committed")
            await to(settings, 1)
            await bus.write(said("1"), durability="committed")
            # When all is lost, and an agent writes before it has noticed
            async with redis.asyncio.Redis.from_url(server.url) as client:
                await client.flushall()
            receipt = await bus.write(said("2"))
            # Then that is committed
            await receipt.committed(20)
            assert await stored(settings) == ["0", "1", "2"]


async def where_they_belong(log: Log) -> None:
    """Each event is in the partition of its room, by the layout that the log has."""
    shape = await log.shape()
    for partition, _, event in await log.entries():
        assert partition == shape.partition(event["room"]), (shape, partition, event)


async def test_g2_a_layout_from_before_a_flush_is_none_though_its_partitions_are_there_again(
    settings: Settings, own_redis: Callable[..., Any]
) -> None:
    server = own_redis()
    slow = {"redis_url": server.url, "log_partitions": 1, "heartbeat": 50.0, "max_staleness": 60.0}
    settings = settings.model_copy(update=slow)
    log = Log(settings)
    with worker_threads(settings):
        await are_there(settings)
        await to(settings, 5)
    async with mnemobus.connect(**settings.model_dump()) as bus:
        # Given an agent that knows partitions 1 to 5
        assert bus.settings.redis_url == server.url
        await bus.write(said("0"))
        assert (await log.shape()).current == range(1, 6)
        # When all is lost, and another one lays the log out anew, from 0 to 4, before the first has noticed
        await log.client.flushall()
        async with mnemobus.connect(**settings.model_copy(update={"log_partitions": 5}).model_dump()):
            assert (await log.shape()).current == range(5)
            await asyncio.gather(*(bus.write(said(str(n), f"room-{n}")) for n in range(20)))
    # Then each room's writes are where everybody takes them to be
    assert len(await log.entries()) == 20
    await where_they_belong(log)
    await log.client.aclose()


async def test_g2_a_call_that_was_made_for_another_layout_is_refused_where_its_rooms_do_not_belong_now(
    settings: Settings, connect: Connect, log: Log
) -> None:
    async with connect(log_partitions=5):
        link = Link(settings)
        try:
            await link.command("PING")
            right = link.keys.log_partition("r1")
            # Given a call, as an outbox keeps it, to a partition that is written to, but not with that room
            with pytest.raises(PartitionEnded):
                await append(link, (right + 1) % 5, "me", 1, [put("0")])
            # Then none of it is there
            assert not await log.entries()
            await append(link, right, "me", 1, [put("0")])
            await where_they_belong(log)
        finally:
            await link.close()


async def test_g2_a_bus_that_opens_while_redis_is_away_writes_where_the_log_is_laid_out_to(
    settings: Settings, own_redis: Callable[..., Any]
) -> None:
    server = own_redis("--appendonly", "yes", "--appendfsync", "always")
    settings = settings.model_copy(update={"redis_url": server.url, "log_partitions": 5})
    log = Log(settings)
    async with mnemobus.connect(**settings.model_dump()) as bus:
        await bus.write(said("0"))
    # Given a Redis that is away as a bus opens whose settings name another number of partitions
    server.kill()
    outbox_off = {"log_partitions": 2, "outbox": "off"}
    async with mnemobus.connect(**settings.model_copy(update=outbox_off).model_dump()) as bus:
        writing = [asyncio.create_task(bus.write(said(str(n), f"room-{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        # When it is back
        server.start()
        await asyncio.gather(*writing)
    # Then the writes are where the others take them to be
    assert len(await log.entries()) == 21
    await where_they_belong(log)
    await log.client.aclose()


async def test_partitions_that_have_ended_are_given_up_once_nothing_is_asked_of_them(
    settings: Settings, connect: Connect, log: Log, command: Callable[..., Command]
) -> None:
    settings = settings.model_copy(update={"retention": 0.2})
    with worker_threads(settings):
        await are_there(settings)
        async with connect(retention=0.2) as bus:
            token = ""
            for room in (f"r{n}" for n in range(8)):
                await bus.write(said("0", room), durability="committed")
                token = bus.token()
            began = (await log.entries())[0][1]
            await to(settings, 2)
            await bus.write(said("1"), durability="committed")
            # While calls may be repeated that were made there, the partitions stay
            await asyncio.to_thread(tidy, settings)
            assert (await log.shape())[:2] == (4, 2)

            # When nobody can repeat one any more, and retention is over
            for partition in range(4):
                await log.client.delete(log.keys.producers(partition))
            left = sorted(log.keys.meter(p).encode() for p in range(4))

            async def given_up() -> bool:
                await asyncio.to_thread(tidy, settings, rounds=2)
                kept = [
                    key async for key in log.client.scan_iter(f"{{{settings.redis_key_prefix}:l[0-3]}}:*")
                ]
                return sorted(kept) == left

            # Then they are gone, but for what keeps agents of an older version out
            await eventually(given_up)
            assert (await log.shape())[:3] == (4, 2, 4)
            # and all goes on
            await bus.write(said("2"), durability="committed")
            await bus.observe(token, 10)
            assert (await bus.health()).ok
    # and a replay says that what it is asked for is there no longer
    done = command("replay", "--since", str(began), settings=settings)
    assert done.status == 1
    assert "the log no longer reaches back to" in done.err
