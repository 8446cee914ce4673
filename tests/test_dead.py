"""`mnemobus dead`: events that no worker could apply are shown, retried under their own version, or dropped."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import pytest
import redis

import mnemobus
from commands import Command
from mnemobus import Settings
from mnemobus.errors import BadEvent
from mnemobus.feed.messages import decode_entry
from mnemobus.keys import Dimensions, Keyspace, Version
from mnemobus.log.events import PUT, Event, decode, version_of
from mnemobus.memory import new_id
from mnemobus_workers.broker import DEAD_AFTER
from rows import rows
from servers import RedisServer, eventually

Start = Callable[..., Command]
PoolOf = Callable[[Settings], AbstractContextManager[Settings]]
SHORT, LONG = b"\0\0\x80\x3f", b"\0\0\x80\x3f" * 2


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"log_partitions": 2, "feed_partitions": 4, "claim_idle": 0.5})


class Log:
    """The log and its dead letters, from outside."""

    def __init__(self, settings: Settings) -> None:
        self.client = redis.Redis.from_url(settings.redis_url)
        self.keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)

    def room(self, partition: int) -> str:
        """A room of this log partition."""
        return next(f"r{n}" for n in range(100) if self.keys.log_partition(f"r{n}") == partition)

    def write(self, event: Event) -> str:
        """An event in the log, whatever a bus would say to it; its version."""
        partition = self.keys.log_partition(event.dimensions.room)
        return self.add(partition, *event.fields())

    def add(self, partition: int, *fields: Any, id: str = "*") -> str:
        self.client.hincrby(self.keys.meter(partition), "added", 1)
        entry: bytes = self.client.execute_command("XADD", self.keys.log(partition), id, *fields)
        return entry.decode()

    def bury(self, partition: int, version: str, reason: str, *fields: Any, id: str = "*") -> str:
        """A dead letter."""
        key = self.keys.dead(partition)
        letter: bytes = self.client.execute_command(
            "XADD", key, id, "version", version, "reason", reason, *fields
        )
        return letter.decode()

    def letters(self, partition: int = 0) -> list[tuple[str, str]]:
        """Version and reason of each dead letter."""
        found = self.client.xrange(self.keys.dead(partition))
        return [(fields[b"version"].decode(), fields[b"reason"].decode()) for _, fields in found]

    def entries(self, partition: int = 0) -> list[tuple[str, dict[bytes, bytes]]]:
        return [(id.decode(), fields) for id, fields in self.client.xrange(self.keys.log(partition))]

    def backlog(self, partition: int = 0) -> int:
        added, applied = self.client.hmget(self.keys.meter(partition), "added", "applied")
        return int(added or 0) - int(applied or 0)


@pytest.fixture
def log(settings: Settings) -> Iterator[Log]:
    log = Log(settings)
    with log.client:
        yield log


def put(
    log: Log, text: str, partition: int = 0, id: str | None = None, embedding: bytes | None = None
) -> Event:
    content = json.dumps({"text": text}).encode()
    dimensions = Dimensions("messages", log.room(partition), entity="alice")
    return Event(PUT, dimensions, id or new_id(), content, b"{}", embedding, created_us=1)


def letters(log: Log) -> dict[str, dict[bytes, bytes]]:
    """All of each dead letter, by its version, in the order of versions."""
    found = [fields for _, fields in log.client.xrange(log.keys.dead(0))]
    return {fields[b"version"].decode(): fields for fields in sorted(found, key=lambda f: f[b"version"])}


def unblock(settings: Settings) -> None:
    """Remove what stood in the way: that the table's embeddings have a length already."""
    with closing(sqlite3.connect(settings.database_url.removeprefix("sqlite:///"))) as connection:
        connection.execute("DELETE FROM mnemobus_tables")
        connection.commit()


def live(settings: Settings) -> list[str]:
    """The contents of the memories that are there."""
    return [row[7] for row in rows(settings.database_url) if len(row) > 3 and row[10] > row[14]]


# Looking


def test_dead_letters_are_listed_and_shown(settings: Settings, log: Log, command: Start) -> None:
    # Given letters in both log partitions: of a put, and of something that nobody can read
    event = put(log, "héllo", embedding=LONG)
    log.bury(0, "1700000000000-5", "an embedding of 2 floats", *event.fields())
    log.bury(1, "1700000000001-0", "unknown [op] 'x'\nline 2", "op", "x", "raw", b"\xff\x00")
    # Then each is listed with what it is about
    listed, plain = (
        command("dead", "list", "--json", settings=settings),
        command("dead", "list", settings=settings),
    )
    assert listed.status == plain.status == 0
    assert listed.lines == [
        {
            "partition": 0,
            "version": "1700000000000-5",
            "at": "2023-11-14T22:13:20.000Z",
            "op": "put",
            "table": "messages",
            "room": log.room(0),
            "id": event.id,
            "reason": "an embedding of 2 floats",
        },
        {
            "partition": 1,
            "version": "1700000000001-0",
            "at": "2023-11-14T22:13:20.001Z",
            "op": "x",
            "table": None,
            "room": None,
            "id": None,
            "reason": "unknown [op] 'x'\nline 2",
        },
    ]
    first, second = plain.out.splitlines()
    assert first == (
        f"1700000000000-5  2023-11-14T22:13:20.000Z  put messages {log.room(0)}  {event.id}  an embedding of 2 floats"
    )
    assert second.endswith("x  -  unknown [op] 'x'\\nline 2")
    assert plain.err == "2 dead letters\n"
    # And shown in full, an embedding by its length, and bytes that are no text as such
    shown = command("dead", "show", "1700000000000-5", "--json", settings=settings)
    raw = command("dead", "show", "1700000000001-0", settings=settings)
    assert shown.json["fields"] == {
        "op": "put",
        "table": "messages",
        "room": log.room(0),
        "id": event.id,
        "entity": "alice",
        "at": "1",
        "content": {"text": "héllo"},
        "metadata": {},
        "embedding_floats": 2,
    }
    assert raw.status == 0
    assert json.loads(raw.out)["fields"] == {"op": "x", "raw": "\\xff\x00"}


def test_where_there_are_none(settings: Settings, command: Start) -> None:
    listed, requeued, dropped = (
        command("dead", *arguments, settings=settings)
        for arguments in (("list",), ("requeue", "--all"), ("drop", "--all"))
    )
    assert (listed.status, listed.out, listed.err) == (0, "", "no dead letters\n")
    assert requeued.status == 0 and requeued.out.startswith("0 requeued")
    assert (dropped.status, dropped.out) == (0, "0 dropped\n")


def test_what_is_called_wrongly(settings: Settings, log: Log, command: Start) -> None:
    for partition in (0, 1):
        log.bury(partition, "7-7", "why not", "op", "x")
    # Given calls that name nothing, too much, no version, or what is not there
    expected = {
        ("requeue",): (2, "mnemobus: name versions (mnemobus dead list), or give --all; one of the two\n"),
        ("drop", "7-7", "--all"): (
            2,
            "mnemobus: name versions (mnemobus dead list), or give --all; one of the two\n",
        ),
        ("show", "seven"): (2, "mnemobus: 'seven' is not a version of the form <milliseconds>-<sequence>\n"),
        ("requeue", "7-7", "8-8"): (1, "mnemobus: there is no dead letter of version 8-8\n"),
        # Two log partitions may have the same version
        ("requeue", "7-7"): (
            2,
            "mnemobus: version 7-7 is in log partitions 0 and 1: say which, with --partition\n",
        ),
        ("list", "--partition", "2"): (2, "mnemobus: --partition 2: there are log partitions 0 to 1\n"),
        ("drop", "7-7", "--partition", "1"): (
            2,
            "mnemobus: dead drop asks first, and there is no terminal to answer on: give --yes\n",
        ),
    }
    calls = {arguments: command("dead", *arguments, settings=settings) for arguments in expected}
    both = command("dead", "show", "7-7", "--json", settings=settings)
    # Then each is told what is wrong, and nothing has changed
    assert {arguments: (call.status, call.err) for arguments, call in calls.items()} == expected
    assert both.status == 0 and [letter["partition"] for letter in both.lines] == [0, 1]
    assert len(log.letters(0)) == len(log.letters(1)) == 1
    assert log.entries(0) == log.entries(1) == []


def test_without_redis(settings: Settings, command: Start) -> None:
    settings = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1"})
    failed = command("dead", "list", settings=settings)
    assert failed.status == 1
    assert failed.err.startswith("mnemobus: Redis at redis://127.0.0.1:1 can't be reached: ")


# Requeue


async def test_g2_what_is_requeued_is_applied_and_undoes_nothing_that_was_written_since(
    settings: Settings, log: Log, pool_of: PoolOf, command: Start, connect: Any
) -> None:
    with pool_of(settings):
        # Given a table of short embeddings, and two writes with a long one: dead letters
        log.write(put(log, "short", embedding=SHORT))
        old, only = put(log, "old", embedding=LONG), put(log, "only", embedding=LONG)
        dead = [log.write(old), log.write(only)]
        await eventually(lambda: sorted(version for version, _ in log.letters()) == dead)
        # And one of the two memories is written again
        newer = log.write(put(log, "newer", id=old.id))
        await eventually(lambda: live(settings) and any("newer" in text for text in live(settings)))
        # When what was in the way is gone, and both are requeued
        unblock(settings)
        async with mnemobus.connect(**{**settings.model_dump(), "outbox": "off"}) as bus:
            assert await bus.get(only.id) is None
            done = command("dead", "requeue", *dead, "--json", settings=settings)
            assert await asyncio.to_thread(lambda: done.status) == 0
            # Then the one is there for everyone, and of the other the last write stays
            await eventually(lambda: bus.get(only.id))
            assert (await bus.get(old.id)).content == {"text": "newer"}
            assert (await bus.get(old.id)).version == Version.parse(newer)
            assert (await bus.get(only.id)).version == Version.parse(dead[1])
    # And nothing is left: no letter, no backlog
    requeued = done.json["requeued"]
    assert [(item["version"], item["partition"]) for item in requeued] == [(dead[0], 0), (dead[1], 0)]
    entries = dict(log.entries())
    assert [entries[item["entry"]][b"as"].decode() for item in requeued] == dead
    assert log.letters() == []
    assert log.backlog() == 0
    tail = command("tail", "--events", "--json", "--since", dead[1], "-n", "4", settings=settings)
    assert await asyncio.to_thread(lambda: tail.status) == 0
    assert [event.get("as") for event in tail.lines] == [None, None, *dead]
    # And agents were told under the version that the write had
    feed = [entry for f in range(4) for entry in log.client.xrange(log.keys.feed(f))]
    named = [
        v for id, m in feed for v in decode_entry(id, [part for pair in m.items() for part in pair]).versions
    ]
    assert named.count(Version.parse(dead[1])) > 2
    assert not any(Version.parse(item["entry"]) in named for item in requeued)


async def test_what_fails_again_is_a_dead_letter_again_under_its_version_and_once(
    settings: Settings, log: Log, pool_of: PoolOf, command: Start
) -> None:
    with pool_of(settings):
        # Given two that can't be applied: refused by the store, and unreadable
        log.write(put(log, "short", embedding=SHORT))
        refused = log.write(put(log, "long", embedding=LONG))
        unreadable = log.add(0, "op", "x", "table", "messages", "room", log.room(0))
        await eventually(lambda: len(log.letters()) == 2)
        before = letters(log)
        assert list(before) == [refused, unreadable]
        # When they are requeued, and once more
        for _ in range(2):
            done = command("dead", "requeue", "--all", settings=settings)
            said = await asyncio.to_thread(done.says, "2 requeued")
            assert f"{refused} is in log partition 0 again, as " in said
            await eventually(lambda: len(log.letters()) == 2 and log.backlog() == 0)
            # Then they are what they were; the letters have not grown
            assert letters(log) == before


async def test_an_event_that_no_worker_survives_keeps_its_version_too(
    settings: Settings, log: Log, pool_of: PoolOf
) -> None:
    # Given a requeued event that was delivered again and again
    id = log.add(0, *put(log, "poison").fields(), "as", "5-5")
    log.client.xgroup_create(log.keys.log(0), "apply", "0")
    log.client.xreadgroup("apply", "gone", {log.keys.log(0): ">"})
    log.client.xclaim(
        log.keys.log(0), "apply", "gone", 0, [id], idle=86_400_000, retrycount=DEAD_AFTER, justid=True
    )
    # When a worker gives it up, then the letter is of the version that it had
    with pool_of(settings):
        await eventually(lambda: log.letters())
    [(version, reason)] = log.letters()
    assert version == "5-5" and reason.startswith(f"delivered {DEAD_AFTER} times")


def test_a_full_redis_takes_nothing_back_and_loses_nothing(
    own_redis: Callable[..., RedisServer], settings: Settings, command: Start
) -> None:
    server = own_redis("--maxmemory-policy", "noeviction")
    settings = settings.model_copy(update={"redis_url": server.url})
    log = Log(settings)
    with log.client:
        log.bury(0, "7-7", "why not", *put(log, "x").fields())
        assert command("dead", "list", settings=settings).status == 0  # somebody has used this bus before
        log.client.config_set("maxmemory", 1)
        failed = command("dead", "requeue", "7-7", settings=settings)
        assert failed.status == 1
        log.client.config_set("maxmemory", 0)
        assert "is out of memory (maxmemory); 7-7 stays a dead letter" in failed.err
        assert log.letters() == [("7-7", "why not")] and log.entries() == []


def test_a_letter_is_requeued_once_however_many_do_so(settings: Settings, log: Log, command: Start) -> None:
    for n in range(20):
        log.bury(n % 2, f"7-{n}", "why not", *put(log, "x", n % 2).fields())
    started = [command("dead", "requeue", "--all", "--json", settings=settings) for _ in range(2)]
    assert [each.status for each in started] == [0, 0]
    # Then between them they have done each once
    assert sum(len(each.json["requeued"]) for each in started) == 20
    assert [len(log.entries(p)) for p in (0, 1)] == [10, 10] == [log.backlog(p) for p in (0, 1)]
    assert log.letters(0) == log.letters(1) == []


def test_the_version_of_an_entry() -> None:
    plain = [b"op", b"delete_room", b"table", b"t", b"room", b"r"]
    id = Version(7, 7)
    assert decode(id, plain).version == version_of(id, plain) == id
    assert (
        decode(id, [*plain, b"as", b"7-6"]).version
        == version_of(id, [*plain, b"as", b"7-6"])
        == Version(7, 6)
    )
    # It can't be of the future, where it would win against all that comes
    for wrong, reason in ((b"7-7", "as: 7-7 is not before 7-7"), (b"soon", "as: 'soon' is not a version")):
        with pytest.raises(BadEvent, match=reason):
            decode(id, [*plain, b"as", wrong])
        assert version_of(id, [*plain, b"as", wrong]) == id


# Drop


def test_dead_letters_are_dropped_if_one_agrees(settings: Settings, log: Log, command: Start) -> None:
    for n in range(3):
        log.bury(0, f"7-{n}", "why not", "op", "x")
    # Given somebody who is asked, and says no
    asked = command("dead", "drop", "--all", settings=settings, terminal=True)
    asked.says("Drop 3 dead letters? What they would have written is lost")
    asked.type("n\n")
    assert asked.status == 1 and len(log.letters()) == 3
    # If it is one that is named, and nobody is to be asked, then that one goes
    one = command("dead", "drop", "7-1", "--yes", "--json", settings=settings)
    assert one.json == {"dropped": [{"partition": 0, "version": "7-1"}]}
    assert [version for version, _ in log.letters()] == ["7-0", "7-2"]
    # And if the answer is yes, all
    asked = command("dead", "drop", "--all", settings=settings, terminal=True)
    asked.says("Drop 2 dead letters?")
    asked.type("y\n")
    assert asked.status == 0 and "2 dropped" in asked.out
    assert log.letters() == []
