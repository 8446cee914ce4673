"""`mnemobus import`: exactly the file's memories, even if repeated, and every bad line is reported with its number."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import re
import secrets
import signal
import sqlite3
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

import mnemobus
from commands import Command
from mnemobus import Memory, Settings
from mnemobus.cli.lines import Bad, Line, Ties, content_id, parse, split
from mnemobus.keys import Keyspace
from mnemobus.store import Query, open_reader
from mnemobus.values import from_micros
from outside import refuse_poison
from servers import Workers, eventually, free_port, wait_until, worker_threads

Start = Callable[..., Command]
Connect = Callable[..., mnemobus.Bus]

BEGIN = datetime(2025, 6, 1, tzinfo=UTC)


def record(number: int, room: str = "kitchen", **fields: Any) -> dict[str, Any]:
    """A memory as a line of a file has it."""
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{room}/{number}")),
        "table": "messages",
        "room": room,
        "content": {"text": f"line {number}"},
        "created_at": (BEGIN + timedelta(seconds=number)).isoformat(),
        **fields,
    }


def lines(*records: dict[str, Any] | bytes | str) -> bytes:
    return b"".join(
        (r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()) + b"\n"
        for r in records
    )


async def stored(settings: Settings, table: str = "messages") -> dict[str, tuple[Any, ...]]:
    """Everything that a table of the store has, by id."""
    reader = open_reader(settings)
    await reader.open()
    try:
        rows = await reader.recent(Query(table), 100_000)
    finally:
        await reader.close()
    return {row.id: row for row in rows}


def logged(settings: Settings) -> int:
    """How many entries the log has."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    with redis.Redis.from_url(settings.redis_url) as client:
        return sum(int(client.xlen(keys.log(p))) for p in range(settings.log_partitions))


def conversations(rooms: int, each: int) -> list[dict[str, Any]]:
    """Lines of several rooms, shuffled together, with all that a line may have; some dates are the same."""
    pick = random.Random(7)
    found = []
    for number in range(rooms * each):
        room = f"room-{number % rooms}"
        moment = BEGIN + timedelta(seconds=pick.randrange(each))
        found.append(
            record(
                number,
                room,
                table=pick.choice(["messages", "messages", "facts"]),
                entity=pick.choice([None, "Amara", "名前"]),
                agent="importer",
                world="w",
                metadata={"turn": number, "nested": {"deep": [1, None, "ü"]}},
                embedding=[pick.random() for _ in range(4)] if number % 3 else None,
                created_at=moment.isoformat(),
            )
        )
    pick.shuffle(found)
    return found


async def test_an_import_is_the_file_and_a_second_one_changes_nothing(
    pool: Settings, connect: Connect, command: Start, tmp_path: Path
) -> None:
    # Given a file of 1,200 memories in six rooms
    records = conversations(rooms=6, each=200)
    file = tmp_path / "memories.jsonl"
    file.write_bytes(lines(*records))
    # If it is imported
    done = command("import", str(file), settings=pool)
    assert done.status == 0, done.err
    assert done.out.startswith(
        "1,200 lines: 1,200 written, 1,200 of them in the store, 0 there already, 0 bad; "
    )
    # Then the store has exactly those
    before = await stored(pool) | await stored(pool, "facts")
    assert len(before) == 1_200
    for each in records:
        row = before[each["id"]]
        assert row[1:6] == tuple(each[name] for name in ("table", "room", "agent", "entity", "world"))
        assert (json.loads(row.content), json.loads(row.metadata)) == (each["content"], each["metadata"])
        assert (row.embedding is None) == (each["embedding"] is None)
    # And what a room has newest is what the file has newest of it
    async with connect() as bus:
        for table in ("messages", "facts"):
            for room in {each["room"] for each in records}:
                of_room = [r for r in records if (r["table"], r["room"]) == (table, room)]
                newest = sorted(of_room, key=lambda r: (r["created_at"], r["id"]), reverse=True)[:20]
                assert [m.id for m in await bus.recent(table, room=room, limit=20)] == [
                    r["id"] for r in newest
                ]
    # If it is imported again
    again = command("import", "--json", str(file), settings=pool)
    # Then nothing is written, and nothing has changed: not even a version
    assert again.status == 0
    assert {k: again.json[k] for k in ("complete", "lines", "written", "unchanged", "bad")} == {
        "complete": True,
        "lines": 1_200,
        "written": 0,
        "unchanged": 1_200,
        "bad": 0,
    }
    assert await stored(pool) | await stored(pool, "facts") == before


async def test_standard_input_and_lines_without_id_or_date(
    pool: Settings, connect: Connect, command: Start
) -> None:
    # Given lines that say no more than they must, with a mark at the beginning, CRLF, and no end of the last line
    said = [{"table": "messages", "room": "r", "content": {"n": n}} for n in range(30)]
    text = b"\xef\xbb\xbf" + lines(*said).replace(b"\n", b"\r\n\r\n").strip()
    # If they are imported twice, once with the fields in another order
    first = command("import", "-", "--json", stdin=text, settings=pool).json
    assert (first["lines"], first["written"], first["committed"]) == (30, 30, 30)
    turned = lines(*({name: each[name] for name in reversed(each)} for each in said))
    second = command("import", "-", "--json", stdin=turned, settings=pool).json
    # Then the same lines are the same memories, in the order in which they came
    assert (second["lines"], second["written"], second["unchanged"]) == (30, 0, 30)
    async with connect() as bus:
        assert [m.content["n"] for m in await bus.recent("messages", room="r")] == list(range(29, 9, -1))
        assert await bus.count("messages", room="r") == 30


async def test_what_was_changed_since_is_left_as_it_is_unless_overwrite_is_given(
    pool: Settings, connect: Connect, command: Start, tmp_path: Path
) -> None:
    # Given an imported file, of which one memory was updated since, another deleted
    file = tmp_path / "three.jsonl"
    dateless = {
        "table": "messages",
        "room": "kitchen",
        "content": {"text": "no date"},
        "id": str(uuid.uuid4()),
    }
    file.write_bytes(lines(record(1), record(2), record(3), dateless))
    assert command("import", str(file), settings=pool).status == 0
    one, two = record(1)["id"], record(2)["id"]
    async with connect() as bus:
        receipts = [await bus.update(one, content={"text": "new"}), await bus.delete(two)]
        receipts.append(await bus.update(dateless["id"], content={"text": "new"}))
        for receipt in receipts:
            await receipt.committed()
        born = (await bus.get(dateless["id"])).created_at
        # If it is imported again
        done = command("import", str(file), settings=pool)
        # Then the update stays, and the deleted one is back
        assert done.status == 0
        assert (
            "4 lines: 1 written, 1 of them in the store, 1 there already, 2 changed since and left"
            in done.out
        )
        await asyncio.sleep(pool.heartbeat * 2)
        assert (await bus.get(one)).content == {"text": "new"}
        assert (await bus.get(two)).content == {"text": "line 2"}
        # If it is imported over what is there
        done = command("import", "--overwrite", "--json", str(file), settings=pool).json
        # Then the file wins; a line that gives no date leaves the one that is stored
        assert (done["written"], done["different"], done["unchanged"]) == (2, 0, 2)
        rows = await stored(pool)
        assert json.loads(rows[one].content) == {"text": "line 1"}
        assert json.loads(rows[dateless["id"]].content) == {"text": "no date"}
        assert from_micros(rows[dateless["id"]].created_us) == born


async def test_a_repeated_id_is_the_first_line_wherever_the_other_is(
    settings: Settings, command: Start, tmp_path: Path
) -> None:
    # Given a file with the same id three times
    file = tmp_path / "twice.jsonl"
    others = [record(n) for n in range(1, 700)]
    twice = [record(0), record(0, content={"text": "other"}), *others, record(0, content={"text": "third"})]
    file.write_bytes(lines(*twice))
    # If it is imported, and workers are slow to come
    running = command("import", "--json", str(file), settings=settings)
    wait_until(lambda: logged(settings) > 0)
    with worker_threads(settings):
        done = running.json
    # Then the first of the three is the memory, and the others count as changed since
    assert (done["lines"], done["written"], done["different"]) == (702, 700, 2)
    rows = await stored(settings)
    assert len(rows) == 700
    assert json.loads(rows[record(0)["id"]].content) == {"text": "line 0"}


# Bad lines

UNKNOWN = (
    "unknown field; known are agent, content, created_at, embedding, entity, id, metadata, room, table, world"
)
PER_LINE = "each memory is one line: jq -c . FILE | mnemobus import -"
PER_ELEMENT = "each element of an array is a line of its own: jq -c '.[]' FILE | mnemobus import -"
BAD: list[tuple[bytes | str | dict[str, Any], str]] = [
    ("{'table': 1}", "not JSON: names and text need double quotes (column 2)"),
    ("{table: 1}", "not JSON: unexpected character, expected a string key (column 2)"),
    (
        '{"table": "messages", "room": "r"',
        f"not JSON: what goes on in the next line, or is cut short; {PER_LINE}",
    ),
    (b'{"table": "messages", "room": "r\xff"}', "not UTF-8: byte 33 is 0xff; convert the file: iconv -f"),
    ("table,room,content", "not JSON: a line begins with {, this one with 't'; each memory is a JSON object"),
    ("# memories", "not JSON: a line begins with {, this one with '#'; each memory is a JSON object"),
    ('{"content": ' + "[" * 2_000 + "]" * 2_000 + "}", "not a memory: nests deeper than 64 levels"),
    ("[1, 2]", f"record: a JSON object is needed, not list; {PER_ELEMENT}"),
    ("{", f"not JSON: what goes on in the next line, or is cut short; {PER_LINE}"),
    ('  "table": "messages",', f"not JSON: a part of an object or an array; {PER_LINE}"),
    ("}", f"not JSON: a part of an object or an array; {PER_LINE}"),
    ("[", f"not JSON: an array that goes on in the next line, or is cut short; {PER_ELEMENT}"),
    ('{"table": "messages"},', f"not JSON: a comma after the object (column 22); {PER_ELEMENT}"),
    ("{} {}", "not JSON: something follows the object (column 4); each memory is one line"),
    (record(1, agent=float("inf")), "not JSON: Infinity (column "),
    (
        '{"content": {"n": -Infinity}}',
        "not JSON: -Infinity (column 19) is not a number in JSON; write null, or leave",
    ),
    (
        '{"content": {"n": None}}',
        "not JSON: None (column 19) is Python's way to write it, not JSON's: true, false",
    ),
    (r'{"content": {"n": "\ud83d"}}', "not JSON: half a character, a lone surrogate (before column "),
    ('{"table": "messages", "table": "facts"}', "table: is given twice in one object; leave one of them out"),
    (
        '{"table": "messages", "room": "r", "content": {"a": [{"b": 1, "c": 2, "b" : 1}]}}',
        "b: is given twice in one object; leave one of them out",
    ),
    (record(1, content={"wei": [1, {"n": 10**29}]}), "content.wei[1].n: an integer beyond 64 bits"),
    (record(1, metadata={"n": -(1 << 70)}), "metadata.n: an integer beyond 64 bits"),
    (record(1, content={"n": 1 << 63}), "content.n: an integer beyond 64 bits"),
    (
        {"table": "messages", "room": "r", "content": {"n": 1 << 64}},
        "content.n: an integer beyond 64 bits",
    ),
    (
        '{"table": "messages", "room": "r", "content": {"n": ' + "9" * 300 + "}}",
        "content.n: an integer beyond 64 bits",
    ),
    ("null", "record: a JSON object is needed, not nothing"),
    (record(1, id="not-a-uuid"), "id: 'not-a-uuid' is not a UUID"),
    (record(1, id=7), "id: 7 is not a UUID"),
    (record(1, ""), "room: is empty"),
    (record(1, room=None), "room: text is needed, not nothing"),
    ({"table": "messages", "content": {}}, "room: is missing"),
    (record(1, table="no such name!"), "table: 'no such name!' is not 1 to 64 letters"),
    (record(1, "r" * 600), "room: 600 bytes, which is more than 512"),
    (record(1, content={"n": float("nan")}), "not JSON: NaN (column "),
    (
        '{"table": "messages", "room": "r", "content": {"n": 1e999}}',
        "not JSON: a number that is too large (column 53)",
    ),
    (record(1, content=["a", "list"]), "content: a JSON object is needed, not list"),
    (record(1, content={"text": "x" * 1_100_000}), "memory: 1,100,0"),
    (record(1, embedding=[1.0, "two"]), "embedding: holds something that is not a number"),
    (record(1, embedding=[]), "embedding: is empty"),
    (record(1, created_at="2025-06-01T12:00:00"), "created_at: 2025-06-01T12:00:00 has no time zone"),
    (record(1, created_at="yesterday"), "created_at: 'yesterday' is not an ISO 8601 date"),
    (record(1, created_at=1748736000), "created_at: an ISO 8601 date is needed, not int"),
    (record(1, mood="good"), f"mood: {UNKNOWN}"),
    (record(1, content=json.loads('{"a":' * 100 + "1" + "}" * 100)), "content: nests deeper than 64 levels"),
    (f'{{"table": "messages", "room": "r", "content": {"[" * 300}{"]" * 300}}}', "record: nests too deep"),
    (b'{"table": "messages", "room": "' + b"x" * 9_000_000 + b'"}', "longer than 8,454,144 bytes"),
]


def test_each_kind_of_bad_line_is_named_and_the_rest_is_imported(
    pool: Settings, command: Start, tmp_path: Path
) -> None:
    # Given a file in which every other line is bad, each in its own way
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"".join(lines(record(n), line) for n, (line, _) in enumerate(BAD)) + lines(record(99)))
    # If bad lines are to be skipped
    done = command("import", "--on-error", "skip", str(file), settings=pool)
    # Then each is named, with its number and the reason; all the others are in the store; and the exit status says so
    assert done.status == 1
    for number, (_, reason) in enumerate(BAD):
        assert f"\nbad.jsonl:{2 * number + 2}: {reason}" in f"\n{done.err}"
    assert done.err.count("bad.jsonl:") == len(BAD)
    good = len(BAD) + 1
    assert done.out.startswith(
        f"{good + len(BAD)} lines: {good} written, {good} of them in the store, 0 there already, {len(BAD)} bad; "
    )
    assert len(asyncio.run(stored(pool))) == good
    assert max(map(len, done.err.splitlines())) < 350


def test_the_first_bad_line_stops_an_import_after_what_comes_before_it(
    pool: Settings, command: Start, tmp_path: Path
) -> None:
    # Given a file whose fourth line is bad
    file = tmp_path / "stop.jsonl"
    file.write_bytes(lines(record(1), record(2), "", "nonsense", record(3), "more nonsense"))
    # If nothing is said about bad lines
    done = command("import", str(file), settings=pool)
    # Then the import stops there, and what comes before it is in the store
    assert done.status == 1
    assert "stop.jsonl:4: not JSON" in done.err and "stop.jsonl:6" not in done.err
    assert "stopped at a bad line; --on-error skip goes on" in done.err
    assert "3 lines: 2 written, 2 of them in the store, 0 there already, 1 bad" in done.out
    assert set(asyncio.run(stored(pool))) == {record(1)["id"], record(2)["id"]}
    # If the line is mended
    file.write_bytes(lines(record(1), record(2), "", record(4), record(3)))
    # Then the same command goes on where it stopped
    result = command("import", "--json", str(file), settings=pool).json
    assert (result["complete"], result["written"], result["unchanged"], result["bad"]) == (True, 2, 2, 0)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_lines_that_only_the_store_can_refuse_are_named_too(
    pool: Settings, command: Start, tmp_path: Path, on_error: str
) -> None:
    # Given memories in the store
    file = tmp_path / "first.jsonl"
    file.write_bytes(lines(record(1), record(2), record(3, table="facts", embedding=[1, 2])))
    assert command("import", str(file), settings=pool).status == 0
    # And a file with one of these ids in another room, one that is deleted, and a vector of another length
    file.write_bytes(
        lines(
            record(4),
            record(1) | {"room": "elsewhere"},
            record(5),
            record(6, table="facts", embedding=[1, 2, 3]),
            record(7),
        )
    )
    # If it is imported
    done = command("import", "--json", "--on-error", on_error, str(file), settings=pool)
    assert done.status == 1
    moved = {
        "line": 2,
        "reason": f"id: memory {record(1)['id']} is stored with room 'kitchen', not 'elsewhere';",
    }
    moved["reason"] += " dimensions never change"
    if on_error == "skip":
        vector = {"line": 4, "reason": "embedding: 3 floats, but those of table 'facts' have 2"}
        assert done.json["bad_lines"] == [moved, vector]
        assert (done.json["complete"], done.json["lines"], done.json["written"]) == (True, 5, 3)
    else:
        assert done.json["bad_lines"] == [moved]
        assert (done.json["complete"], done.json["written"], done.json["committed"]) == (False, 1, 1)


async def test_a_line_that_a_worker_refuses_is_named_with_the_workers_reason(
    pool: Settings, connect: Connect, command: Start
) -> None:
    # Given a store that refuses what the bus can't know
    async with connect() as bus:
        await (await bus.write(Memory(table="messages", room="before", content={}))).committed()
    words = refuse_poison(pool)
    # If a line has that
    text = lines(record(1), record(2, content={"text": "poison"}), record(3))
    done = command("import", "--json", "--on-error", "skip", "-", stdin=text, settings=pool)
    # Then the worker's word is the reason
    assert done.status == 1
    [bad] = done.json["bad_lines"]
    assert bad["line"] == 2 and words in bad["reason"]
    assert (done.json["written"], done.json["committed"]) == (3, 2)


def test_an_empty_file_is_fine_and_a_missing_one_is_not(
    pool: Settings, command: Start, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    running = [
        command("import", str(tmp_path / "empty.jsonl"), settings=pool),
        command("import", str(tmp_path / "missing.jsonl"), settings=pool),
        command("import", str(tmp_path), settings=pool),
        command("import", "--on-error", "ignore", "-", settings=pool),
    ]
    empty, missing, folder, option = running
    assert empty.status == 0
    assert empty.out.startswith("0 lines: 0 written")
    assert missing.status == 2
    assert missing.err == f"mnemobus: {tmp_path}/missing.jsonl can't be read: No such file or directory\n"
    assert folder.status == 2
    assert "can't be read: Is a directory" in folder.err
    assert option.status == 2
    assert "'ignore' is neither 'stop' nor 'skip'" in option.err


# Interrupted


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
async def test_g1_an_import_that_was_stopped_half_way_is_completed_by_the_next(
    pool: Settings, command: Start, tmp_path: Path, how: int
) -> None:
    # Given an import that is half way: its input comes through a pipe, and stops coming
    records = [record(n, f"room-{n % 5}", **({} if n % 2 else {"created_at": None})) for n in range(2_000)]
    for each in records[::3]:
        del each["id"]
    file = tmp_path / "big.jsonl"
    file.write_bytes(lines(*records))
    read, write = os.pipe()
    running = command("import", "-", stdin=read, settings=pool)
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as pipe:
        pipe.write(lines(*records[:1_100]))
        wait_until(lambda: _rows(pool) >= 500, 20)
        # When it is stopped
        running.signal(how)
        assert running.status == (-how if how == signal.SIGKILL else 128 + how)
    if how != signal.SIGKILL:
        assert "not complete; run the same command again to go on" in running.err
        assert "Traceback" not in running.err
    # Then the next one completes it: exactly the lines of the file, each once
    done = command("import", "--json", str(file), settings=pool)
    assert done.status == 0
    assert done.json["lines"] == 2_000
    assert done.json["unchanged"] >= 500
    assert done.json["unchanged"] + done.json["written"] == 2_000
    rows = await stored(pool)
    assert len(rows) == 2_000
    assert {json.loads(row.content)["text"] for row in rows.values()} == {f"line {n}" for n in range(2_000)}
    # In the order of the file, also where a line gives no date
    dateless = [json.loads(r.content)["text"] for r in sorted(rows.values(), key=lambda r: r.created_us)]
    wanted = [r["content"]["text"] for r in records if r["created_at"] is None and r["room"] == "room-0"]
    assert [text for text in dateless if text in set(wanted)] == wanted


def _rows(settings: Settings) -> int:
    with sqlite3.connect(settings.database_url.removeprefix("sqlite:///")) as connection:
        return int(connection.execute("SELECT count(*) FROM mnemobus_memories").fetchone()[0])


async def test_g1_an_import_outlives_a_killed_worker(
    settings: Settings, postgres_url: str, workers: Callable[..., Workers], command: Start
) -> None:
    # Given PostgreSQL, two worker processes under Dramatiq's command line, and an import that is half way
    settings = settings.model_copy(update={"database_url": postgres_url, "batch_size": 20})
    first = workers(settings)
    records = [record(n, f"room-{n % 7}") for n in range(1_500)]
    read, write = os.pipe()
    running = command("import", "--json", "-", stdin=read, settings=settings)
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as pipe:
        pipe.write(lines(*records[:1_000]))
        async with mnemobus.connect(**settings.model_dump()) as bus:
            await eventually(lambda: _has_some(bus), 20)
        # If one of them is killed; Dramatiq then ends the other, and a service manager starts them again
        first.kill_one()
        pipe.write(lines(*records[1_000:]))
    workers(settings)
    # Then the import ends as if nothing had happened
    assert running.status == 0, running.err
    assert (running.json["written"], running.json["committed"], running.json["bad"]) == (1_500, 1_500, 0)
    assert set(await stored(settings)) == {each["id"] for each in records}


async def _has_some(bus: mnemobus.Bus) -> bool:
    return await bus.count("messages", room="room-0") > 0


# Files that are no plain lines


def trickle(data: bytes, settings: Settings, command: Start, *options: str) -> Command:
    """An import from a pipe that gives one byte, then another, then all the rest."""
    read, write = os.pipe()
    running = command("import", *options, "-", stdin=read, settings=settings)
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as pipe:
        for part in (data[:1], data[1:2], data[2:]):
            pipe.write(part)
            time.sleep(0.05)
    return running


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_gzip_is_read(pool: Settings, command: Start, tmp_path: Path, way: str) -> None:
    # Given a file of several parts, as `cat a.gz b.gz` makes them, and one that becomes a hundred times as large
    records = [record(n, content={"text": "x" * 5_000}) for n in range(300)]
    data = b"".join(gzip.compress(lines(*records[n : n + 100])) for n in range(0, 300, 100))
    file = tmp_path / "some.jsonl.gz"
    file.write_bytes(data)
    # If it is imported, from a file or a pipe
    done = (
        command("import", "--json", str(file), settings=pool)
        if way == "file"
        else trickle(data, pool, command, "--json")
    )
    # Then all of it is there
    assert done.status == 0, done.err
    assert (done.json["lines"], done.json["written"], done.json["committed"]) == (300, 300, 300)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_gzip_that_is_cut_short_is_no_complete_import(
    pool: Settings, command: Start, tmp_path: Path, on_error: str
) -> None:
    whole = gzip.compress(lines(*(record(n, content={"text": secrets.token_hex(99)}) for n in range(2_000))))
    for data, reason in (
        (
            whole[: len(whole) // 2],
            "the gzip data ends too early; the lines before this one are whole. Get the",
        ),
        (whole[:-8] + bytes(8), "the gzip data is damaged ("),
        (whole[:5], "the gzip data ends too early"),
    ):
        file = tmp_path / "cut.gz"
        file.write_bytes(data)
        done = command("import", "--on-error", on_error, "--json", str(file), settings=pool)
        assert done.status == 1
        assert done.json["complete"] is False
        [bad] = done.json["bad_lines"]
        assert bad["reason"].startswith(reason)
        assert bad["line"] == done.json["lines"] + 1
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{}".encode("utf-16"), "the file is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE"),
        ("{}".encode("utf-16-be"), "the file is UTF-16, not UTF-8; convert it"),
        ("{}".encode("utf-16-le"), "the file is UTF-16, not UTF-8; convert it"),
        ("{}".encode("utf-32"), "the file is UTF-32, not UTF-8; convert it"),
        (gzip.compress("{}".encode("utf-16"), mtime=0), "the file is UTF-16, not UTF-8; convert it"),
        (
            gzip.compress(gzip.compress(b"{}\n" * 50, mtime=0), mtime=0),
            "the file is compressed twice; decompress it once",
        ),
        (b"PK\3\4...", "the file is a zip archive; unpack it: unzip -p FILE | mnemobus import -"),
        (bz2.compress(b"{}"), "the file is compressed by bzip2; decompress it: bzcat FILE"),
        (lzma.compress(b"{}"), "the file is compressed by xz; decompress it: xzcat FILE"),
        (b"\x28\xb5\x2f\xfd...", "the file is compressed by zstd; decompress it: zstdcat FILE"),
        (b"PAR1....", "the file is Parquet; write its rows as JSON, one a line"),
        (b"SQLite format 3\0....", "the file is a database of SQLite; write its rows as JSON, one a line"),
    ],
)
def test_a_file_without_lines_is_named_and_nothing_of_it_imported(
    settings: Settings, command: Start, data: bytes, reason: str
) -> None:
    for on_error in ("stop", "skip"):
        done = trickle(data + b"\n" * 50, settings, command, "--on-error", on_error)
        assert done.status == 1
        assert f"stdin:1: {reason}" in done.err
        assert "--on-error skip goes on" not in done.err
        assert "Traceback" not in done.err
        assert done.out.startswith("0 lines: 0 written")
    assert logged(settings) == 0


# The order of the file


async def in_order(bus: mnemobus.Bus, **names: str) -> list[int]:
    """What a room's memories say, oldest first."""
    return [m.content["n"] for m in reversed(await bus.recent("messages", limit=1_000, **names))]


async def test_lines_with_the_same_date_keep_the_order_of_the_file(
    pool: Settings, connect: Connect, command: Start, tmp_path: Path
) -> None:
    # Given a conversation with a date for each day, of two rooms, some lines with ids of their own, one line twice
    file = tmp_path / "conversation.jsonl"
    said = [
        {
            "table": "messages",
            "room": f"room-{n % 2}",
            "entity": "Amara",
            "content": {"n": n},
            "created_at": (BEGIN + timedelta(days=n // 40)).isoformat(),
        }
        for n in range(120)
    ]
    file.write_bytes(lines(*said, said[5]))
    # If it is imported
    first = command("import", "--json", str(file), settings=pool).json
    assert (first["written"], first["unchanged"]) == (120, 1)
    async with connect() as bus:
        # Then it is listed in its order, by room and across rooms, also page by page
        assert await in_order(bus, room="room-0") == list(range(0, 120, 2))
        assert await in_order(bus, entity="Amara") == list(range(120))
        page, paged = await bus.recent("messages", entity="Amara", limit=7), []
        while page:
            paged += [m.content["n"] for m in page]
            page = await bus.recent("messages", entity="Amara", limit=7, before=page[-1])
        assert paged == list(reversed(range(120)))
        # And a second import changes nothing, nor does one of a file that goes on
        before = await stored(pool)
        again = command("import", "--json", str(file), settings=pool).json
        assert (again["written"], again["unchanged"]) == (0, 121)
        assert await stored(pool) == before
        more = {**said[-1], "content": {"n": 120}}
        file.write_bytes(lines(*said, said[5], more))
        again = command("import", "--json", str(file), settings=pool).json
        assert (again["written"], again["unchanged"]) == (1, 121)

        async def there() -> bool:
            return await in_order(bus, entity="Amara") == list(range(121))

        await eventually(there)


async def test_what_an_earlier_version_imported_stays_what_it_is(
    pool: Settings, connect: Connect, command: Start, tmp_path: Path
) -> None:
    # Given lines with the same date, in the store under ids that are made of nothing but what they say
    said = [
        {"table": "messages", "room": "r", "content": {"n": n}, "created_at": BEGIN.isoformat()}
        for n in range(9)
    ]
    async with connect() as bus:
        old = [Memory.from_dict({**each, "id": content_id(each)}) for each in said]
        for receipt in await bus.write_many(old):
            await receipt.committed()
        # And one of them was changed since
        await (await bus.update(old[4].id, content={"n": "changed"})).committed()
    before = await stored(pool)
    # If the file is imported again
    file = tmp_path / "old.jsonl"
    file.write_bytes(lines(*said))
    done = command("import", "--json", str(file), settings=pool).json
    # Then nothing is written twice
    assert (done["written"], done["unchanged"], done["different"]) == (0, 8, 1)
    assert await stored(pool) == before
    # And what is written over goes where it is
    done = command("import", "--overwrite", "--json", str(file), settings=pool).json
    assert (done["written"], done["unchanged"], done["different"]) == (1, 8, 0)
    rows = await stored(pool)
    assert rows.keys() == before.keys()
    assert json.loads(rows[old[4].id].content) == {"n": 4}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 2**128 - 1)), max_size=30))
def test_ids_of_lines_with_the_same_date_are_in_their_order(found: list[tuple[str, int, int]]) -> None:
    found += [("a", 0, 2**128 - 1), ("a", 0, 2**128 - 2), ("a", 0, 5)]
    made = [(table, date, str(uuid.UUID(int=plain))) for table, date, plain in found]
    ties, again = Ties(), Ties()
    ids = [ties.id_of(*line) for line in made]
    # The same file has the same ids, the same line too; others have others
    assert [again.id_of(*line) for line in made] == ids
    by_line: dict[tuple[str, int, str], str] = {}
    for line, id in zip(made, ids, strict=True):
        assert id == str(uuid.UUID(id))
        assert by_line.setdefault(line, id) == id
    # Each date of a table has them in order of appearance
    for table, date in {line[:2] for line in by_line}:
        of_date = [id for line, id in by_line.items() if line[:2] == (table, date)]
        assert of_date == sorted(of_date)


# What a line says


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8") | st.sampled_from('":\\')),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(codec="utf-8") | st.sampled_from('":\\'), max_size=4), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8")), JSON), st.booleans(), st.sampled_from([None, " "])
)
def test_a_line_is_taken_exactly(content: dict[str, Any], ascii: bool, space: str | None) -> None:
    separators = None if space is None else (",", " :\t")
    given = {"table": "t", "room": "r", "content": content}
    text = json.dumps(given, ensure_ascii=ascii, separators=separators)
    settings = Settings.load()
    line = parse(1, text.encode(), settings, BEGIN, Ties())
    assert isinstance(line, Line), line
    assert json.dumps(json.loads(line.row.content), sort_keys=True) == json.dumps(content, sort_keys=True)


@given(JSON, st.integers(), st.integers(1 << 63) | st.integers(max_value=-(1 << 63) - 1))
def test_what_a_line_would_lose_is_refused(value: Any, other: int, large: int) -> None:
    settings = Settings.load()
    inner = json.dumps({"a": value, "n": 0})
    twice = inner[:-1] + f', "n" : {json.dumps(value)}}}'
    too_large = inner[:-1] + f', "m": {large}}}'
    for text, reason in (
        (twice, "n: is given twice in one object"),
        (too_large, "content.x.m: an integer beyond"),
    ):
        line = parse(
            1, f'{{"table":"t","room":"r","content":{{"x":{text}}}}}'.encode(), settings, BEGIN, Ties()
        )
        assert isinstance(line, Bad)
        assert line.reason.startswith(reason)


# What people see


def test_a_bar_on_a_terminal(pool: Settings, command: Start, tmp_path: Path) -> None:
    file = tmp_path / "good.jsonl"
    file.write_bytes(lines(*(record(n) for n in range(100)), "bad"))
    done = command("import", "--on-error", "skip", str(file), settings=pool, terminal=True)
    assert done.status == 1
    wait_until(lambda: "101 lines: 100 written" in done.out)
    assert re.search("importing.*━━", done.out)
    assert "good.jsonl:101: not JSON" in done.out


def test_without_a_terminal_plain_lines_and_a_word_when_nobody_works(
    settings: Settings, command: Start
) -> None:
    # Given no worker at all, and a log that takes no more than the first lines
    settings = settings.model_copy(update={"max_backlog": 100, "write_timeout": 0.2})
    running = command("import", "-", stdin=lines(*(record(n) for n in range(1_200))), settings=settings)
    # Then an import does not hang without a word
    running.says("nothing was committed for 5 s")
    assert "are workers running? `mnemobus doctor` tells" in running.err
    assert re.search(r"\d+ lines, \d+/s, 0 bad, (\d+) written, \1 not yet in the store\n", running.err)
    assert "━" not in running.err and "\x1b" not in running.err
    # And goes on as soon as there are some
    with worker_threads(settings):
        assert running.status == 0
    assert running.out.startswith("1,200 lines: 1,200 written, 1,200 of them in the store")


PATIENT = "from mnemobus.cli import importing, main; importing.COMMIT_PATIENCE = 1; main()"


def test_without_workers_an_import_gives_up_in_the_end(settings: Settings, command: Start) -> None:
    given_up = command(
        "import", "-", stdin=lines(record(1), record(2)), settings=settings, program=("-c", PATIENT)
    )
    logged = command("import", "--no-wait", "-", stdin=lines(record(3)), settings=settings)
    assert given_up.status == 1
    assert "mnemobus: nothing was committed for 1 s. What was written is in the log" in given_up.err
    assert "Traceback" not in given_up.err
    # Unless nobody wants to wait for the store
    assert logged.status == 0
    assert logged.out.startswith("1 lines: 1 written, 0 there already, 0 bad; ")


def test_redis_or_the_store_away_is_a_clear_error_in_bounded_time(
    settings: Settings, command: Start, tmp_path: Path
) -> None:
    away = f"redis://127.0.0.1:{free_port()}"
    (tmp_path / "file").write_text("")
    no_redis = settings.model_copy(update={"redis_url": away, "write_timeout": 1.0})
    no_store = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/file/memories.db"})
    neither = no_store.model_copy(update={"redis_url": away})
    began = time.monotonic()
    runs = [
        command("import", "-", stdin=lines(record(1)), settings=each)
        for each in (no_redis, no_store, neither)
    ]
    assert [run.status for run in runs] == [1, 1, 1]
    assert time.monotonic() - began < 10
    assert f"mnemobus: Redis at {away} could not be reached in time" in runs[0].err
    assert "mnemobus: what is stored already can't be told: SQLite" in runs[1].err
    assert f"mnemobus: neither Redis ({away}" in runs[2].err
    assert not any("Traceback" in run.err for run in runs)


# Reading


@given(
    text=st.binary(max_size=60).map(lambda b: b.replace(b"a", b"\n"))
    | st.sampled_from([b"", b"\n", b"ab\n\nc"]),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    limit=st.integers(1, 8),
)
def test_lines_are_the_same_wherever_the_pieces_of_a_file_end(
    text: bytes, cuts: list[int], limit: int
) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    wanted = text.split(b"\n")
    if not wanted[-1]:
        wanted.pop()
    found = [line for some in split(pieces, limit) for line in some]
    assert found == [(n, line if len(line) <= limit else None) for n, line in enumerate(wanted, 1)]
