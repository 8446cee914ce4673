"""`mnemobus verify`: agents that are consistent, paused, or keep an older copy; how their answers are judged."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

import mnemobus
from commands import Command
from mnemobus import Settings
from mnemobus.cache.query import Question
from mnemobus.cli.inspection import looking_at
from mnemobus.cli.verify import Truth, Verifier, is_older, percent
from mnemobus.feed.audit import MAX_TOLD, Inquiry, decode_holding, encode_inquiry
from mnemobus.keys import Keyspace, Version, id_scope, room_scope
from mnemobus.memory import Memory
from mnemobus.records import Row
from mnemobus.store import Query, open_reader
from mnemobus.tasks import end
from servers import AgentProcess, RedisServer, eventually
from stuck_agent_process import StuckCache

Connect = Callable[..., mnemobus.Bus]
StartAgent = Callable[..., AgentProcess]
StartCommand = Callable[..., Command]
MARKS = (0.2, 0.4, 0.6)
QUICK = ("--marks", ",".join(map(str, MARKS)), "--patience", "5")
ROOM = room_scope("messages", "r1")


def said(text: str, room: str = "r1", **fields: Any) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)


async def has_a_copy(agent: AgentProcess, memory: Memory) -> None:
    """Wait until an agent has a memory, and its room, in its own process."""

    async def local() -> bool:
        await agent.do("get", id=memory.id)
        answer = await agent.do("recent", table="messages", room=memory.room, limit=20)
        return bool(answer["source"] == "local")

    await eventually(local)


async def cached(bus: mnemobus.Bus, memory: Memory) -> None:
    """The same, for a bus of this process."""

    async def local() -> bool:
        await bus.get(memory.id)
        return (await bus.recent("messages", room=memory.room)).source == "local"

    await eventually(local)


async def watching(command: StartCommand, settings: Settings, *options: str) -> Command:
    """`mnemobus verify`, once it has begun to watch."""
    verify = command("verify", *QUICK, *options, settings=settings)
    await asyncio.to_thread(verify.says, "watching the feed")
    return verify


@asynccontextmanager
async def verifying(
    settings: Settings,
    scopes: int,
    *,
    marks: tuple[float, ...] = MARKS,
    patience: float = 5.0,
    to_the_end: bool = True,
) -> AsyncIterator[Verifier]:
    """The same in this process. When the block is left, it has seen so many scopes, and ends, or is cancelled."""
    reader = open_reader(settings)
    await reader.open()
    async with looking_at(settings) as client:
        verifier = Verifier(settings, client, reader, marks, patience)
        task = asyncio.create_task(verifier.run(600))
        try:
            await eventually(lambda: verifier.watching.is_set() or task.done())
            yield verifier
            if to_the_end:
                await eventually(lambda: verifier.scopes >= scopes)
                verifier.stop()
                await task
        finally:
            await end([task])
            await reader.close()


async def test_answers_that_are_none_of_a_redis_do_not_end_the_listening(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given something at the address of Redis that answers each command with an empty list
    met = 0

    async def nonsense(hears: asyncio.StreamReader, says: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        while asked := await hears.read(4096):
            says.write(b"*0\r\n" * asked.count(b"*"))
        says.close()

    async with await asyncio.start_server(nonsense, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with looking_at(
            settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}"})
        ) as client:
            verifier = Verifier(settings, client, open_reader(settings), MARKS, 1.0)
            # When answers of agents are listened for
            listening = asyncio.create_task(verifier._listen())
            # Then it says what is wrong, and goes on
            await eventually(lambda: met > 2)
            assert not listening.done()
            assert "the answers of agents can't be heard" in capsys.readouterr().err
            await end([listening])


async def test_agents_that_are_consistent_are_said_to_be(
    settings: Settings, pool: Settings, agent: StartAgent, connect: Connect, command: StartCommand
) -> None:
    # Given two agents that have copies
    alice, bob = agent(settings), agent(settings)
    memory = said("0")
    async with connect() as writer:
        await writer.write(memory, durability="committed")
        verify = await watching(command, settings, "--seconds", "1", "--json")
        # When a third writes, again and again, and they read
        while "seeing" not in verify.err and verify.process.poll() is None:
            await writer.update(memory.id, content={"text": "new"}, durability="committed")
            await writer.write(said("another"), durability="committed")
            for each in (alice, bob):
                await has_a_copy(each, memory)
        # Then all of their answers are consistent, and the exit status says so
        report = await asyncio.to_thread(lambda: verify.json)
    assert verify.status == 0, report
    assert report["ok"] is True
    assert report["agents"] == 3
    assert report["scopes"] >= report["followed"] >= 4
    assert (report["older"], report["silent"], report["unknown"]) == ([], {}, 0)
    assert [mark["seconds"] for mark in report["marks"]] == list(MARKS)
    for mark in report["marks"]:
        assert mark["asked"] == mark["consistent"] == 3 * report["followed"]
        assert mark["share"] == 1
        # and not because they had nothing
        assert mark["held"] > 0


async def test_g5_an_agent_that_holds_an_older_copy_is_found_at_every_mark(
    settings: Settings, pool: Settings, agent: StartAgent, connect: Connect, command: StartCommand
) -> None:
    # Given an agent whose cache drops nothing, and a sound one
    stuck = agent(settings, program="stuck_agent_process.py")
    memory = said("old")
    async with connect() as sound:
        await sound.write(memory, durability="committed")
        await has_a_copy(stuck, memory)
        verify = await watching(command, settings, "--seconds", "2", "--json")

        # When the memory is changed
        old = await sound.get(memory.id)
        receipt = await sound.update(memory.id, content={"text": "new"}, durability="committed")

        # Then it is found, at every mark, for both scopes
        report = await asyncio.to_thread(lambda: verify.json)
    assert verify.status == 1
    assert report["ok"] is False
    for mark in report["marks"]:
        assert (mark["asked"], mark["consistent"], mark["older"], mark["silent"]) == (4, 2, 2, 0)
        assert mark["share"] == 0.5
    assert {(o["scope"], o["seconds"]) for o in report["older"]} == {
        (scope, mark) for scope in (id_scope(memory.id), ROOM) for mark in MARKS
    }
    # by name, with what it holds and what the store has
    assert len({o["agent"] for o in report["older"]} - {sound.id}) == 1
    for one in report["older"]:
        assert one["store"] == {memory.id: str(receipt.version)}
        assert old is not None
        assert one["copy"] == {memory.id: str(old.version)}


@pytest.mark.parametrize("change", ["insert", "delete", "delete_room"])
async def test_g5_older_is_also_what_lacks_a_new_memory_or_has_a_deleted_one(
    settings: Settings, pool: Settings, connect: Connect, change: str
) -> None:
    async with connect(live="off") as stuck, connect() as sound:
        # Given a bus whose cache drops nothing, and that has copies
        stuck._local.__class__ = StuckCache
        memory = said("old")
        await sound.write(memory, durability="committed")
        await cached(stuck, memory)
        await stuck.count("messages", room="r1")
        # When the room changes in a way that no version of the copy tells
        async with verifying(settings, 3 if change == "delete_room" else 2) as verifier:
            if change == "insert":
                await sound.write(said("new"), durability="committed")
            elif change == "delete":
                await sound.delete(memory.id, durability="committed")
            else:
                await sound.delete_room("messages", room="r1", durability="committed")
        # Then its copies are older, at every mark; but of a memory that is new it has none
        expected = {ROOM} if change == "insert" else {ROOM, id_scope(memory.id)}
        assert {(o["scope"], o["seconds"]) for o in verifier.older} == {
            (scope, mark) for scope in expected for mark in MARKS
        }
        assert {o["agent"] for o in verifier.older} == {stuck.id}
        assert not verifier.report()["ok"]


async def test_g9_a_window_that_takes_nothing_in_is_older(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect() as stuck, connect() as sound:
        # Given a bus that holds a room live, and whose window takes nothing in any more
        await sound.write(said("old"), durability="committed")

        async def held() -> bool:
            stuck._local.drop(ROOM)
            await stuck.recent("messages", room="r1")
            return stuck._local.live(ROOM) is not None

        await eventually(held)
        stuck._live.listener._on_event = lambda channel, event: None
        # When the room changes
        async with verifying(settings, 2) as verifier:
            await sound.write(said("new"), durability="committed")
        # Then its copy is older, at every mark
        assert {(o["agent"], o["scope"], o["seconds"]) for o in verifier.older} == {
            (stuck.id, ROOM, mark) for mark in MARKS
        }


async def test_an_agent_that_is_paused_is_silent_and_not_consistent(
    settings: Settings, pool: Settings, agent: StartAgent, connect: Connect, command: StartCommand
) -> None:
    # Given an agent that is paused, and one that writes
    paused = agent(settings)
    async with connect() as writer:
        paused.pause()
        verify = await watching(command, settings, "--seconds", "2", "--patience", "0.7")
        assert "2 agents there" in verify.err
        await writer.write(said("x"), durability="committed")
        status = await asyncio.to_thread(lambda: verify.status)
        paused.resume()
    # Then the paused one is silent at every mark, and that is not well
    assert status == 1
    lines = verify.out.splitlines()
    for line, mark in zip(lines[1:4], MARKS, strict=True):
        assert f"consistent at {mark:g} s" in line
        assert "0 older, 2 silent)" in line
        assert "100 %" not in line
    assert " was silent 6 times: it is paused, busy or cut off" in lines[4]
    assert len(lines) == 5


async def test_an_agent_that_goes_instead_of_answering_is_not_silent(
    settings: Settings, pool: Settings, agent: StartAgent, connect: Connect
) -> None:
    # Given an agent that has been asked, and will not answer
    gone = agent(settings)
    gone.pause()
    async with connect() as writer, verifying(settings, 2, patience=1) as verifier:
        await writer.write(said("x"), durability="committed")
        await eventually(lambda: verifier._open)
        # When it is killed
        gone.kill()
    # Then nobody counts it, there or later
    assert verifier.report()["ok"]
    assert [(mark.asked, mark.silent) for mark in verifier.marks] == [(2, 0)] * 3


async def test_who_could_not_hear_an_answer_does_not_call_an_agent_silent(
    settings: Settings, pool: Settings, agent: StartAgent, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async def listeners() -> set[str]:
        return {one["id"] for one in await client.client_list("pubsub")}

    # Given an agent that has been asked, and has not answered yet
    paused = agent(settings)
    async with connect() as writer:
        before = await listeners()
        async with verifying(settings, 2, marks=(0.2,), patience=1) as verifier:
            [own] = await listeners() - before
            paused.pause()
            await writer.write(said("x"), durability="committed")
            await eventually(lambda: len(verifier._open) == 2)
            # When the connection breaks that the answers would come on
            await client.client_kill_filter(_id=own)
        paused.resume()
    # Then it is not known what the agent holds, and not said either
    assert verifier.unknown == 2
    assert verifier.silent == {}
    # Nor is all said to be well: nothing was verified
    assert verifier.report()["ok"] is False


async def test_without_agents_or_writes_it_says_so(
    settings: Settings, pool: Settings, connect: Connect, command: StartCommand
) -> None:
    # Given nobody
    async with connect() as bus:
        await bus.write(said("x"), durability="committed")
    verify = await watching(command, settings, "--seconds", "0")
    assert verify.status == 0
    assert "0 agents there" in verify.err
    assert verify.out.splitlines() == [
        "watched 0 s: 0 scopes invalidated, 0 followed, 0 agents",
        "no agent was there to be asked",
    ]
    # or an agent that does nothing
    async with connect():
        verify = await watching(command, settings, "--seconds", "0")
        assert "1 agent there" in verify.err
        assert await asyncio.to_thread(lambda: verify.status) == 0
    assert verify.out.splitlines()[1:] == ["nothing was written meanwhile: nothing to verify"]


async def test_ctrl_c_ends_it_with_the_figures_so_far(
    settings: Settings, pool: Settings, connect: Connect, command: StartCommand
) -> None:
    async with connect() as bus:
        verify = command("verify", "--json", "--seconds", "600", "--marks", "0.1,300", settings=settings)
        await asyncio.to_thread(verify.says, "watching the feed for 600 s; 1 agent there")
        answered = bus._feed._answer
        asked = []

        async def answer(inquiry: Any) -> None:
            await answered(inquiry)
            asked.append(inquiry.scope)

        bus._feed._answer = answer  # type: ignore[method-assign]
        await bus.write(said("x"), durability="committed")
        await eventually(lambda: len(asked) == 2)
        # When it has heard these answers: it asks about what was written after them
        await bus.write(said("y"), durability="committed")
        await eventually(lambda: len(asked) == 4)
        verify.signal(signal.SIGINT)
        assert await asyncio.to_thread(lambda: verify.status) == 130
    report = verify.json
    assert report["followed"] == 4
    assert report["marks"][0]["consistent"] >= 2
    assert report["marks"][1]["asked"] == 0
    assert report["marks"][1]["share"] is None
    assert report["seconds"] < 60


async def test_it_follows_no_more_than_it_can_afford(
    settings: Settings, pool: Settings, connect: Connect
) -> None:
    async with connect() as bus:
        async with verifying(settings, 200) as verifier:
            await bus.write_many([said(str(n), room=f"room-{n}") for n in range(100)])
        report = verifier.report()
    assert report["ok"]
    assert report["scopes"] == 200
    assert 20 <= report["followed"] < 60
    assert report["marks"][-1]["asked"] == report["followed"]


async def test_it_goes_on_when_redis_is_back(
    settings: Settings, pool_of: Any, connect: Connect, own_redis: Callable[..., RedisServer], capfd: Any
) -> None:
    server = own_redis()
    settings = settings.model_copy(update={"redis_url": server.url})
    async with connect(redis_url=server.url) as bus:
        with pool_of(settings):
            async with verifying(settings, 0, patience=1, to_the_end=False) as verifier:
                await bus.write(said("x"), durability="committed")
                await eventually(lambda: verifier.followed == 2)
                # When Redis is away while agents are to be asked
                await asyncio.to_thread(server.stop)
                await eventually(lambda: not verifier._following)
                assert verifier.unknown > 0
                await asyncio.to_thread(server.start)
                # and something is written after that
                before = verifier.marks[-1].asked
                await bus.write(said("y"), durability="committed")
                # Then it is seen, and the agent's answers are heard
                await eventually(lambda: verifier.marks[-1].asked == before + 2)
                assert verifier.report()["ok"]
    assert capfd.readouterr().err.count("waiting for it") == 1


def test_without_redis_or_a_schema_it_says_what_is_wrong(
    settings: Settings, connect: Connect, command: StartCommand
) -> None:
    verify = command("verify", settings=settings)
    assert verify.status == 1
    assert "no schema" in verify.err

    async def make_a_schema() -> None:
        async with connect():
            pass

    asyncio.run(make_a_schema())
    verify = command("verify", settings=settings.model_copy(update={"redis_url": "redis://127.0.0.1:1"}))
    assert verify.status == 1
    assert "Redis at redis://127.0.0.1:1 can't be asked" in verify.err
    verify = command("verify", "--marks", "1,x", settings=settings)
    assert verify.status == 2
    assert "'1,x' are not seconds" in verify.err


# What an agent answers


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def each_protocol(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    return settings.model_copy(update={"redis_protocol": request.param})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(settings.redis_url)
    yield client
    await client.aclose()


class Asker:
    """Asks one bus, as `mnemobus verify` does."""

    def __init__(self, client: redis.asyncio.Redis, bus: mnemobus.Bus) -> None:
        settings = bus.settings
        keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
        self.to, self.reply = keys.agent_channel(bus.id), keys.verify_channel("test")
        self.client, self.pubsub = client, client.pubsub(ignore_subscribe_messages=True)

    async def __aenter__(self) -> Asker:
        await self.pubsub.subscribe(self.reply)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.pubsub.aclose()

    async def ask(self, scope: str) -> Any:
        await self.client.publish(self.to, encode_inquiry(Inquiry(7, scope, self.reply)))
        return await eventually(self.heard)

    async def heard(self) -> Any:
        message = await self.pubsub.get_message(timeout=0.1)
        return None if message is None else decode_holding(message["data"])


async def test_an_agent_tells_what_it_would_serve(
    each_protocol: Settings, pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async with connect(redis_protocol=each_protocol.redis_protocol) as bus, Asker(client, bus) as asker:
        # Given nothing that it has read
        answer = await asker.ask(ROOM)
        assert (answer.agent, answer.number, answer.fresh) == (bus.id, 7, True)
        assert (answer.position, answer.holds, answer.cut) == (None, {}, False)

        # When it has read a room in several ways, and a memory
        memories = [said(str(n), entity="e") for n in range(3)]
        receipts = await bus.write_many(memories, durability="committed")
        rows = [(r.id, r.version) for r in reversed(receipts)]
        for _ in range(3):
            await bus.recent("messages", room="r1")
            await bus.recent("messages", room="r1", entity="e", limit=2)
            await bus.count("messages", room="r1")
            await bus.get(memories[0].id)

        # Then it tells the versions, by the queries' names
        answer = await asker.ask(ROOM)
        assert sorted(map(str, answer.holds.values())) == sorted(map(str, [tuple(rows), tuple(rows[:2]), 3]))
        assert answer.position is not None
        answer = await asker.ask(id_scope(memories[0].id))
        assert answer.holds == {"get": (rows[2],)}

        # and each name leads back to its query
        for field, copy in (await asker.ask(ROOM)).holds.items():
            found = await Question.shared(ROOM, field).ask(bus._reader)
            assert copy == (found if isinstance(found, int) else tuple((r.id, r.version) for r in found))

        # And when it may serve nothing, then it tells nothing
        bus._feed.heartbeat._settings = bus.settings.model_copy(update={"max_staleness": -1.0})
        await eventually(lambda: not bus._local.served(ROOM))
        answer = await asker.ask(ROOM)
        assert (answer.fresh, answer.holds) == (False, {})


async def test_answers_are_told_whole_or_not_at_all(
    pool: Settings, connect: Connect, client: redis.asyncio.Redis
) -> None:
    async with connect(live="off") as bus, Asker(client, bus) as asker:
        memories = [said(str(n)) for n in range(MAX_TOLD // 2)]
        await bus.write_many(memories, durability="committed")
        for limit in (MAX_TOLD, MAX_TOLD // 2, 10):
            await bus.recent("messages", room="r1", limit=limit)
        answer = await asker.ask(ROOM)
        assert answer.cut
        assert sorted(map(len, answer.holds.values())) == [10, MAX_TOLD // 2]


GARBAGE = [
    b"garbage",
    b"{}",
    b"[]",
    b'"x"',
    b"\xff\x00",
    b"",
    b'{"ask": "1", "scope": "id:x", "reply": "R"}',
    b'{"ask": 1, "scope": 5, "reply": "R"}',
    b'{"ask": 1, "scope": "id:x"}',
    b'{"ask": 1, "scope": "id:x", "reply": "{elsewhere}:f1:feed"}',
    b'{"ask": 1, "scope": "' + b"x" * 5000 + b'", "reply": "R"}',
]


async def test_garbage_on_an_agents_channel_is_counted_and_does_no_harm(
    pool: Settings, connect: Connect, client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect() as bus, Asker(client, bus) as asker:
        for number, garbage in enumerate(GARBAGE, 1):
            caplog.clear()
            await client.publish(asker.to, garbage.replace(b'"R"', json.dumps(asker.reply).encode()))
            await eventually(lambda number=number: bus.stats().bad_messages == number)
            assert "is not one of the feed" in caplog.text, garbage
            # and it goes on
            assert (await asker.ask("id:x")).holds == {}
        assert bus.stats().bad_messages == len(GARBAGE)
        assert bus.stats().restarted_tasks == 0
        assert bus.stats().reconnects == 0


# What the answers mean


def row(id: str, version: int, created: int = 0, **dimensions: Any) -> Row:
    at = {"table": "t", "room": "r", "agent": None, "entity": None, "world": None, **dimensions}
    return Row(id, *at.values(), b"", b"", None, created, Version(version, 0))


def copy(**versions: int) -> Any:
    return tuple((id, Version(version, 0)) for id, version in versions.items())


WHOLE = Truth([row("b", 5), row("a", 3)], True, Version(5, 0))
PART = Truth([row("b", 5), row("a", 3)], False, Version(5, 0))
THEN = copy(b=5, a=3)


@pytest.mark.parametrize(
    ("held", "then", "now", "truth", "older"),
    [
        # what the store had then, or has now, is not older
        (THEN, THEN, copy(c=9, b=5, a=3), WHOLE, False),
        (copy(c=9, b=5, a=3), THEN, copy(c=9, b=5, a=3), WHOLE, False),
        # nor is what it had between
        (copy(c=9, b=5, a=3), THEN, copy(d=11, c=9, b=5, a=3), WHOLE, False),
        (copy(b=7, a=3), THEN, copy(b=8, a=3), WHOLE, False),
        (copy(c=9, b=5, a=3), THEN, copy(b=5, a=3), WHOLE, False),
        (copy(b=5), THEN, copy(b=8), WHOLE, False),
        # a lower version is, whatever else there is
        (copy(b=4, a=3), THEN, THEN, WHOLE, True),
        (copy(b=4, a=3), THEN, copy(c=9, b=5, a=3), WHOLE, True),
        (copy(b=4), None, copy(c=9, b=5, a=3), PART, True),
        # and what lacks a memory that was there then and still is
        (copy(a=3), THEN, THEN, WHOLE, True),
        (copy(a=3), THEN, copy(b=6, a=3), WHOLE, True),
        ((), THEN, THEN, WHOLE, True),
        # and what has one that was gone
        (copy(b=5, x=4, a=3), THEN, THEN, WHOLE, True),
        (copy(b=5, x=4, a=3), THEN, copy(c=9, b=5, a=3), WHOLE, True),
        # where that can't be told, it is not
        (copy(y=1), None, copy(z=2), PART, False),
        # counts
        (2, 2, 3, WHOLE, False),
        (3, 2, 3, WHOLE, False),
        (3, 2, 4, WHOLE, False),
        (1, 2, 2, WHOLE, True),
        (1, None, 2, PART, False),
    ],
)
def test_what_is_older(held: Any, then: Any, now: Any, truth: Truth, older: bool) -> None:
    assert is_older(held, then, now, truth) is older


def question(kind: str, limit: int, **fields: Any) -> Question:
    return Question("room:t:r", kind, Query("t", "r", **fields), limit)


def test_what_the_store_would_have_answered() -> None:
    rows = [row(id, 10 - n, 100 - n, entity=e) for n, (id, e) in enumerate(["dx", "cy", "bx", "ay"])]
    whole, part = Truth(rows, True, Version(10, 0)), Truth(rows, False, Version(10, 0))
    for truth in (whole, part):
        assert truth.answer(question("recent", 2)) == copy(d=10, c=9)
        assert truth.answer(question("recent", 2, entity="x")) == copy(d=10, b=8)
        assert truth.answer(question("recent", 2, before=(99, "c"))) == copy(b=8, a=7)
    # What lies beyond the rows can't be told
    for kind, limit, fields, answer in [
        ("recent", 5, {}, copy(d=10, c=9, b=8, a=7)),
        ("recent", 3, {"entity": "x"}, copy(d=10, b=8)),
        ("recent", 2, {"after": (97, "a")}, copy(c=9, b=8)),
        ("count", 0, {"entity": "y"}, 2),
    ]:
        assert whole.answer(question(kind, limit, **fields)) == answer
        assert part.answer(question(kind, limit, **fields)) is None


def test_a_share_is_rounded_down() -> None:
    assert percent(0, 0) == "-"
    assert percent(5, 5) == "100 %"
    assert percent(99_999, 100_000) == "99.999 %"
    assert percent(9_999_999, 10_000_000) == "99.999 %"
    assert percent(1, 3) == "33.333 %"
    assert percent(0, 3) == "0.000 %"
