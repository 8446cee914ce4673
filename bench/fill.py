"""Fills a log fast: with events as `write` makes them, added by the server itself, a million in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import redis

from mnemobus.keys import APPLY_GROUP, Keyspace
from mnemobus.log.events import Event
from mnemobus.records import encode
from mnemobus.settings import Settings

from .world import message, vector

ROOMS = 200
TEMPLATES = 1_000
"""Number of different messages; the events repeat them, each under its own id."""
_AT_ONCE = 10_000

# Adds events to one log partition, made from templates in turn: every event has another id and date.
#
# KEYS  log, meter
# ARGV  number of the first event, how many, step; then for each template how many arguments follow, and its fields:
#       their first two values are those of id and at
_FILL = """
local first, count, step = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local templates, at = {}, 4
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  templates[#templates + 1] = {unpack(ARGV, at + 1, last)}
  at = last + 1
end
for i = 0, count - 1 do
  local n = first + i * step
  local fields = templates[(n - n % step) / step % #templates + 1]
  fields[2] = string.format('01900000-%04x-7000-8000-%012x', math.floor(n / 65536), n)
  fields[4] = string.format('%d', 1700000000000000 + n)
  redis.call('XADD', KEYS[1], '*', unpack(fields))
end
redis.call('HINCRBY', KEYS[2], 'added', count)
"""


class Log:
    """The log of one bus, as the server sees it."""

    def __init__(self, settings: Settings, group: str = APPLY_GROUP) -> None:
        self._settings = settings
        self._group = group
        self._keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
        self._client = redis.Redis.from_url(settings.redis_url, socket_timeout=60)
        self._filled = 0
        self._templates: dict[bool, list[list[bytes | int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def names(self) -> list[str]:
        """The streams."""
        return [self._keys.log(partition) for partition in range(self._settings.log_partitions)]

    def fill(self, events: int, embeddings: bool = False) -> None:
        """Prepare a log of this many events, spread evenly over its partitions. No worker reads it yet."""
        partitions = self._settings.log_partitions
        if embeddings not in self._templates:
            self._templates[embeddings] = self._make(embeddings)
        for partition, arguments in enumerate(self._templates[embeddings]):
            keys = [self._next(partition), self._keys.meter(partition)]
            for first, count in _stretches(self._filled // partitions, events // partitions):
                number = partition + first * partitions
                self._client.eval(_FILL, len(keys), *keys, number, count, partitions, *arguments)
        self._filled += events // partitions * partitions

    def applied(self) -> int:
        """How many events the workers have confirmed."""
        return self._sum("applied")

    def begin(self) -> None:
        """Put it in the place of the log, in one step, with the consumer group at its beginning."""
        with self._client.pipeline() as pipe:
            for partition, name in enumerate(self.names):
                pipe.xgroup_create(self._next(partition), self._group, id="0")
                pipe.rename(self._next(partition), name)
            pipe.execute()

    def drop(self) -> None:
        """Remove what is left of the log."""
        self._client.delete(*self.names)

    def _next(self, partition: int) -> str:
        return self._keys.log(partition) + ":next"

    def _sum(self, field: str) -> int:
        with self._client.pipeline(transaction=False) as pipe:
            for partition in range(self._settings.log_partitions):
                pipe.hget(self._keys.meter(partition), field)
            return sum(int(found or 0) for found in pipe.execute())

    def _make(self, embeddings: bool) -> list[list[bytes | int]]:
        """The script's arguments, by log partition."""
        by_partition: list[list[bytes | int]] = [[] for _ in range(self._settings.log_partitions)]
        for number in range(TEMPLATES):
            room = f"room-{number % ROOMS}"
            memory = message(room, number, embedding=vector(number) if embeddings else None)
            fields = Event.put(encode(memory, self._settings.max_memory_bytes)).fields()
            pairs = dict(zip(fields[::2], fields[1::2], strict=True))
            pairs = {b"id": pairs.pop(b"id"), b"at": pairs.pop(b"at"), **pairs}
            into = by_partition[self._keys.log_partition(room)]
            into.append(len(fields))
            into += (part for pair in pairs.items() for part in pair)
        return by_partition


def _stretches(first: int, count: int) -> Iterator[tuple[int, int]]:
    for at in range(first, first + count, _AT_ONCE):
        yield at, min(_AT_ONCE, first + count - at)
