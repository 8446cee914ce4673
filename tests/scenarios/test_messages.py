"""Messages of the feed that are lost, late or repeated; and an agent that joins when the feed is long."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import pytest
import redis
from redis.commands.core import Script

from mnemobus import Settings
from mnemobus.cache.l1 import clock
from mnemobus.connection.link import script
from mnemobus.keys import Keyspace, room_scope
from scenarios.conftest import Way
from scenarios.telling import held, opened, said, sees, texts
from servers import AgentProcess, eventually

LONG = {"heartbeat": 30.0, "max_staleness": 60.0}
"""No heartbeat helps, unless the test calls it."""
LENGTH = 2000


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """One feed partition: the messages about one room and about the next follow each other."""
    return settings.model_copy(update={"feed_partitions": 1, "feed_length": LENGTH})


async def test_g5_exactly_one_lost_message_on_a_quiet_key_is_found_and_repaired_within_the_bound(
    settings: Settings, pool: Settings, way: Way
) -> None:
    # Given an agent that holds a room of which nobody says anything else
    proxy, mine = await way(settings)
    async with opened(mine) as reader, opened(settings) as writer:
        await writer.write(said("old"), durability="committed")
        assert await held(reader) == ["old"]
        before = reader.stats()

        # When exactly one message is lost on its way, the one about this room
        proxy.drop_pushes(1)
        await writer.write(said("new"), durability="committed")
        committed = clock()

        # Then its copy is dropped within max_staleness, by reading what was missed and not by dropping all
        await sees(reader, ["new", "old"], settings.max_staleness)
        assert clock() - committed < settings.max_staleness
        assert proxy.dropped == 1
        after = reader.stats()  # it may have been one of the feed, or of the log's announcements
        assert after.replays + after.live_repairs > before.replays + before.live_repairs
        assert (after.resets, after.reconnects) == (before.resets, before.reconnects)

        # And what comes next finds its predecessor
        assert await held(reader) == ["new", "old"]
        gaps = reader.stats().gaps
        await writer.write(said("last"), durability="committed")
        await sees(reader, ["last", "new", "old"], settings.max_staleness)
        assert reader.stats().gaps == gaps


async def test_g5_messages_out_of_order_are_seen_as_a_gap_and_none_is_stepped_over(
    settings: Settings, pool: Settings, way: Way
) -> None:
    # Given an agent that holds two rooms
    proxy, mine = await way(settings)
    async with opened(mine, **LONG) as reader, opened(settings) as writer:
        for room in ("r1", "r2"):
            await writer.write(said("old", room), durability="committed")
            assert await held(reader, room) == ["old"]
        before = reader.stats()

        # When both change, and the message about the first comes after that about the second
        proxy.swap_pushes()
        await writer.write(said("new", "r1"), durability="committed")
        assert reader.stats().invalidations == before.invalidations
        await writer.write(said("new", "r2"), durability="committed")

        # Then both are dropped at once, though no heartbeat is due for long
        for room in ("r1", "r2"):
            await sees(reader, ["new", "old"], 5, room)
            assert await held(reader, room) == ["new", "old"]
        assert reader.stats().gaps == before.gaps + 1
        assert reader.stats().resets == before.resets

        # And the late one has not moved the position back: once the gap is repaired, the next finds its predecessor
        await eventually(lambda: reader.stats().replays > before.replays)
        await writer.write(said("last", "r1"), durability="committed")
        await sees(reader, ["last", "new", "old"], 5)
        assert reader.stats().gaps == before.gaps + 1


async def test_g5_a_message_that_comes_twice_is_no_gap_and_drops_nothing_newer(
    settings: Settings, pool: Settings, way: Way
) -> None:
    proxy, mine = await way(settings)
    async with opened(mine, **LONG) as reader, opened(settings) as writer:
        await writer.write(said("old"), durability="committed")
        assert await held(reader) == ["old"]
        before = reader.stats()

        # When a message comes twice
        proxy.repeat_pushes()
        await writer.write(said("new"), durability="committed")
        await sees(reader, ["new", "old"], 5)
        assert await held(reader) == ["new", "old"]

        # And once more, when the agent has a newer copy
        feed = Keyspace(settings.redis_key_prefix, 4, 1).feed(0)
        with redis.Redis.from_url(settings.redis_url) as client:
            [(id, fields)] = client.xrevrange(feed, count=1)
            heard = client.publish(feed, id + b" " + fields[b"prev"] + b" " + fields[b"m"])
            assert heard >= 1
        # and another message after it, about something else, so that it has been heard for certain
        await writer.write(said("x", "r2"), durability="committed")
        await eventually(lambda: reader.stats().invalidations >= before.invalidations + 2)

        # Then each was applied once, the copy is still served, and nothing was taken for lost
        assert reader.stats().invalidations == before.invalidations + 2
        assert (await reader.recent("messages", room="r1")).source == "local"
        after = reader.stats()
        assert (after.gaps, after.replays, after.resets) == (before.gaps, before.replays, before.resets)


async def test_g4_g5_an_agent_that_starts_when_the_feed_is_long_drops_nothing_valid_and_serves_nothing_stale(
    settings: Settings, pool: Settings, agent: Callable[..., AgentProcess]
) -> None:
    # Given rooms in Redis, and a feed that has since said a lot about others, more than it keeps
    keys = Keyspace(settings.redis_key_prefix, 4, 1)
    async with opened(settings) as writer:
        for room in ("r1", "r2"):
            await writer.write(said("0", room), durability="committed")
            assert await held(writer, room) == ["0"]
        with redis.Redis.from_url(settings.redis_url) as client:
            fan_out = Script(client, script("fanout").source)
            epoch = client.hget(keys.epoch, "epoch")
            with client.pipeline(transaction=False) as pipe:
                for n in range(2 * LENGTH):
                    scope = room_scope("messages", f"other-{n}")
                    payload = orjson.dumps({"p": 0, "v": [f"1-{n}"], "s": [scope]})
                    names = [keys.epoch, keys.identity, keys.feed(0)]
                    fan_out(keys=names, args=[epoch, LENGTH, 1 << 20, "apply", 1, payload, 0, 0], client=pipe)
                pipe.execute()
            assert LENGTH <= client.xlen(keys.feed(0)) < 2 * LENGTH

        # When an agent starts
        late = agent(settings)

        async def recent(room: str) -> tuple[str, list[str]]:
            answer = await late.do("recent", table="messages", room=room)
            return answer["source"], [memory["content"]["text"] for memory in answer["items"]]

        # Then what Redis has is still good for it, and so is its own copy from then on
        assert await recent("r1") == ("shared", ["0"])
        assert await recent("r2") == ("shared", ["0"])
        for room in ("r1", "r2"):

            async def local(room: str = room) -> bool:
                return await recent(room) == ("local", ["0"])

            await eventually(local)
        began = clock()
        while clock() - began < 3 * settings.heartbeat:
            assert await recent("r1") == ("local", ["0"])
        stats = await late.do("stats")
        assert (stats["drops"], stats["resets"], stats["replays"], stats["gaps"]) == (0, 0, 0, 0)

        # And an agent that starts during writes never answers with less than was committed at the question
        expected = ["0"]
        for n in range(1, 6):
            new = agent(settings)
            receipt = await writer.write(said(str(n)))
            asked = await new.do("recent", table="messages", room="r1")
            expected.insert(0, str(n))
            assert [memory["content"]["text"] for memory in asked["items"]] in (expected, expected[1:])
            await receipt.committed()
            committed = clock()

            async def seen(reader: AgentProcess = new) -> bool:
                answer = await reader.do("recent", table="messages", room="r1")
                return [memory["content"]["text"] for memory in answer["items"]] == expected

            for reader in (new, late):
                await eventually(lambda reader=reader: seen(reader), settings.max_staleness)
            assert clock() - committed < settings.max_staleness + 1
            new.close()
        # while of the room that nobody touched its copy was never dropped
        assert await recent("r2") == ("local", ["0"])
        assert (await late.do("stats"))["resets"] == 0
        assert texts(await writer.recent("messages", room="r1")) == expected
