"""docs/operations.md is read in a hurry: what it names has to be there. Its examples are run by test_docs.py."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import redis

import mnemobus
from mnemobus import Health, Memory, Settings, Stats, errors
from mnemobus.keys import APPLY_GROUP, Keyspace
from mnemobus.log import publisher
from mnemobus_workers import upkeep
from mnemobus_workers.broker import DEAD_AFTER
from mnemobus_workers.pool import make_broker
from servers import eventually
from test_project import ROOT, variables

PAGE = (ROOT / "docs" / "operations.md").read_text()
SOURCES = [*(ROOT / "bus").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]


def rows(title: str) -> list[str]:
    """The first cells of the table that has this first title."""
    table = PAGE[PAGE.index(f"| {title} |") :].split("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/operations.md", "docs/how-it-works.md"]
)
def test_the_docs_name_only_settings_that_there_are(page: str) -> None:
    named = set(re.findall(r"`((?:MNEMOBUS|REDIS)_[A-Z_]+)", (ROOT / page).read_text()))
    assert named - set(variables()) - {"MNEMOBUS_LOG"} == set()


@pytest.mark.parametrize("kind", [Stats, Health])
def test_every_figure_is_explained(kind: Any) -> None:
    told = {name for row in rows(f"field of `{kind.__name__}`") for name in re.findall(r"`(\w+)`", row)}
    assert told == {field.name for field in dataclasses.fields(kind)}


def test_errors_that_are_named_exist() -> None:
    for name in re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", PAGE):
        assert hasattr(errors, name) or hasattr(mnemobus, name), name


def said(path: Path) -> list[str]:
    """Every text of a module, with what belongs together in one."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value for part in node.values if isinstance(part, ast.Constant))
            found.append("".join(map(str, parts)))
    return found


def test_lines_that_are_quoted_from_the_logs_are_written_there() -> None:
    texts = [text for path in SOURCES for text in said(path)]
    quoted = [line.strip("`") for line in rows("line")]
    assert len(quoted) > 5
    for line in quoted:
        assert any(line in text for text in texts), line


def test_the_table_of_keys_has_every_key() -> None:
    keys = Keyspace("mnemobus", 4, 64)
    made = [
        keys.layout,
        keys.epoch,
        keys.identity,
        keys.resync,
        keys.workers,
        keys.log(0),
        keys.producers(0),
        keys.meter(0),
        keys.heads(0),
        keys.live_channel(0, 7).removesuffix("7") + "<slot>",
        keys.dead(0),
        keys.reasons(0),
        keys.feed(0),
    ]
    scope = next(s for s in (f"id:{n}" for n in range(10_000)) if keys.feed_partition(s) == 0)
    made += [keys.bucket("<epoch>", scope).replace(scope, "<scope>"), keys.agent_channel("<bus>")]
    made.append(keys.layout_channel("<bus>"))
    assert [row.strip("`") for row in rows("key")] == made
    # And keys in commands are of these
    for key in re.findall(r"'(\{[^']+)'", PAGE):
        assert key in made


def test_times_and_counts_are_those_of_the_code() -> None:
    words = " ".join(PAGE.split())
    settings = Settings.model_fields
    assert upkeep.TIDY_EVERY == 10 and "About every ten seconds" in words
    assert upkeep.CONSUMER_IDLE == 3600 and upkeep.PRODUCER_IDLE == 7 * 86_400
    assert "silent for an hour" in words and "last calls after a week" in words
    assert f"delivered {DEAD_AFTER} times" in words
    assert settings["claim_idle"].default == 5 and "`MNEMOBUS_CLAIM_IDLE` (5 s)" in words
    consumer = make_broker(Settings.load()).consume("log")
    assert consumer._claim_every == consumer._settings.claim_idle / 10 and "a tenth of it" in words
    assert settings["retention"].default == 24 * 3600 and "`MNEMOBUS_RETENTION` (24 h)" in words
    assert settings["max_backlog"].default == 1_000_000 and "a million events" in words
    assert (
        settings["outbox_max_bytes"].default == 64 << 20 and "`MNEMOBUS_OUTBOX_MAX_BYTES` (64 MiB)" in words
    )
    assert publisher._LOG_PATIENCE == 0.5 and "outbox after half a second" in words
    assert settings["feed_partitions"].default == 64 and settings["feed_length"].default == 4_096
    assert "each of 64 partitions holds its 4,096 messages" in words


# What it tells to do by hand


async def test_g8_a_database_that_was_restored_gets_the_log_again(pool: Settings, connect: Any) -> None:
    # Given memories that were written, updated and deleted
    async with connect() as bus:
        memories = [
            Memory(table="messages", room=f"r{n % 5}", content={"n": n}, metadata={"v": 1}) for n in range(50)
        ]
        await bus.write_many(memories)
        await bus.update(memories[1].id, content={"n": "changed"})
        await bus.delete(memories[2].id)
        await bus.delete_room("messages", room="r3")
        await bus.observe(bus.token())
        before = await everything(bus)
        assert len(before) == 39
        # If the database loses them all, and the group is set back as the page says
        wipe(pool)
        keys = bus._link.keys
        with redis.Redis.from_url(pool.redis_url) as client:
            for partition in range(pool.log_partitions):
                client.execute_command("XGROUP", "SETID", keys.log(partition), APPLY_GROUP, "0")
            # and a new epoch begins
            client.delete(keys.epoch)

        # Then every copy of what was there meanwhile is gone, and everything comes back
        await eventually(lambda: bus.stats().epochs == 1)

        async def restored() -> bool:
            return await everything(bus) == before

        await eventually(restored)


async def everything(bus: mnemobus.Bus) -> list[tuple[str, str, Any]]:
    found = [await bus.recent("messages", room=f"r{n}", limit=100) for n in range(5)]
    return [(m.id, str(m.version), m.content) for memories in found for m in memories]


def wipe(settings: Settings) -> None:
    import sqlite3

    connection = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"))
    with connection:
        for table in ("mnemobus_memories", "mnemobus_room_tombstones"):
            connection.execute(f"DELETE FROM {table}")
    connection.close()


async def test_deleting_the_epoch_drops_every_copy(connect: Any, settings: Settings) -> None:
    async with connect() as bus:
        assert (await bus.recent("messages", room="r1")).source == "store"
        assert (await bus.recent("messages", room="r1")).source == "local"
        with redis.Redis.from_url(settings.redis_url) as client:
            client.delete(bus._link.keys.epoch)
        await eventually(lambda: bus.stats().epochs == 1)
        assert (await bus.recent("messages", room="r1")).source == "store"
