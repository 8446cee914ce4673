"""The log, the feed and the store from outside, without any cache; and data that a store refuses."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import suppress
from typing import Any

import orjson
import psycopg
import redis

from mnemobus import Settings
from mnemobus.feed.messages import Invalidation, decode_entry
from mnemobus.keys import APPLY_GROUP, Keyspace
from mnemobus.store import Query, open_reader


async def stored(settings: Settings, room: str = "r1") -> list[str]:
    """The texts that the store has of a room, sorted; without any cache."""
    reader = open_reader(settings)
    await reader.open()
    try:
        rows = await reader.recent(Query("messages", room=room), 10_000)
    finally:
        await reader.close()
    return sorted(orjson.loads(row.content)["text"] for row in rows)


class Log:
    """The log and the feed, seen from outside."""

    def __init__(self, settings: Settings) -> None:
        self.client = redis.Redis.from_url(settings.redis_url)
        self.keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)

    def pending(self) -> dict[str, tuple[str, int, int]]:
        """For each pending entry: its consumer, its idle time in ms, the number of its deliveries."""
        with suppress(redis.ResponseError):  # there is no group yet
            return {
                e["message_id"].decode(): (
                    e["consumer"].decode(),
                    e["time_since_delivered"],
                    e["times_delivered"],
                )
                for e in self.client.xpending_range(self.keys.log(0), APPLY_GROUP, "-", "+", 1000)
            }
        return {}

    def forsake(self, *ids: str, deliveries: int) -> None:
        """Make these entries idle for long, as if no worker had renewed them, after this many deliveries."""
        pending = self.pending()
        for id in ids:
            self.client.xclaim(
                self.keys.log(0), APPLY_GROUP, pending[id][0], 0, [id],
                idle=86_400_000, retrycount=deliveries, justid=True,
            )  # fmt: skip

    def backlog(self) -> int:
        added, applied = self.client.hmget(self.keys.meter(0), "added", "applied")
        return int(added or 0) - int(applied or 0)

    def letters(self) -> list[dict[str, str]]:
        """The dead letters, their fields as text."""
        return [
            {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
            for _, fields in self.client.xrange(self.keys.dead(0))
        ]

    def feed(self) -> list[list[Invalidation]]:
        """All messages, by feed partition."""
        found = []
        for partition in range(self.keys.feed_partitions):
            entries = self.client.xrange(self.keys.feed(partition))
            found.append(
                [decode_entry(id, [x for pair in fields.items() for x in pair]) for id, fields in entries]
            )
        return found

    def named(self, scope: str) -> Counter[str]:
        """How often the feed has named each version in the partition of a scope."""
        messages = self.feed()[self.keys.feed_partition(scope)]
        return Counter(str(version) for message in messages for version in message.versions)

    def done(self) -> bool:
        """Whether everything is applied and confirmed."""
        return self.backlog() == 0 and not self.pending()


def refuse_poison(settings: Settings) -> str:
    """Have the database refuse rows that contain "poison"; return the text of its error."""
    url = settings.database_url
    if url.startswith("sqlite"):
        connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"))
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON mnemobus_memories WHEN new.content LIKE '%poison%'"
            " BEGIN SELECT RAISE(ABORT, 'no poison here'); END"
        )
        connection.commit()
        connection.close()
        return "refuses this data: no poison here"
    with psycopg.connect(url) as connection:
        connection.execute(
            "ALTER TABLE mnemobus.memories ADD CONSTRAINT no_poison CHECK (content::text NOT LIKE '%poison%')"
        )
    return 'violates check constraint "no_poison"'
