"""``mnemobus tail``: shows the log and the feed as they pass.

It reads the streams from a position of its own, not through the consumer group, so it takes nothing from the workers.
If Redis goes away, it waits, and then reads on from its position.

``--live`` listens, as agents with live scopes do, to the channels on which events are announced. It does not show
events that pass while Redis or the connection is away: pub/sub keeps nothing.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import orjson
import redis.asyncio
from redis.exceptions import RedisError
from rich.text import Text

from ..connection.server_errors import AWAY, DENIED, code_of, is_away, meaning
from ..errors import BadEvent
from ..feed.messages import Invalidation, decode_entry
from ..keys import SLOTS, ZERO, Keyspace, Version
from ..live.channel import decode_announced
from ..log.events import DELETE_ROOM, Event, decode
from ..settings import Settings, hide_password
from .console import emit, err, out, run_until_signal
from .inspection import ask, keyspace, looking_at, now, text
from .moments import parse_moment

_READ = 500


def run(
    *, events: bool, invalidations: bool, live: bool, since: str | None, count: int | None, json: bool
) -> int:
    settings = Settings.load()
    begin = None if since is None else parse_moment(since, "--since")
    tail = LiveTail(settings) if live else Tail(settings, events, invalidations)
    return run_until_signal(_main(settings, tail, begin, count, json))


class Announcement(NamedTuple):
    """An event as it is announced on channels of the log.

    event  None if it was too large for the message
    slots  the slots on whose channels it was announced
    """

    event: Event | None
    slots: tuple[int, ...]


Item = Event | Invalidation | Announcement | str
"""A decoded entry or message; or the reason why it can't be decoded."""


class Source(Protocol):
    """A source of the things that are shown."""

    async def begin(self, client: redis.asyncio.Redis, since: float | Version | None) -> None:
        """Begin at this moment; None means now."""

    async def next(self, client: redis.asyncio.Redis) -> list[tuple[Version, Item, int]]:
        """What came since the last call, in order, with its partition; after a moment, nothing."""


class Tail:
    """The streams to read, each with the last ID that was shown."""

    def __init__(self, settings: Settings, events: bool, invalidations: bool) -> None:
        self._settings = settings
        self._events = events
        self._invalidations = invalidations
        self._last: dict[str, str] = {}
        self._log: dict[str, int] = {}
        self._feed: dict[str, int] = {}

    async def begin(self, client: redis.asyncio.Redis, since: float | Version | None) -> None:
        keys = await keyspace(client, self._settings)
        if self._events:
            self._log = {keys.log(p): p for p in keys.shape.all}
        if self._invalidations:
            self._feed = {keys.feed(f): f for f in range(keys.feed_partitions)}
        streams = [*self._log, *self._feed]
        if since is None:
            heads = await ask(client, [("XREVRANGE", stream, "+", "-", "COUNT", 1) for stream in streams])
            for head in heads:
                if isinstance(head, Exception):
                    raise head
            self._last = {
                stream: text(head[0][0]) if head else "0-0"
                for stream, head in zip(streams, heads, strict=True)
            }
            return
        if isinstance(since, float):
            since = Version(max(int((await now(client) - since) * 1000), 0), 0)
        self._last = dict.fromkeys(streams, str(since.before()))

    async def next(self, client: redis.asyncio.Redis) -> list[tuple[Version, Item, int]]:
        """What came since the last call, in order, with its partition; after a moment, nothing."""
        block = int(self._settings.redis_timeout * 500)
        reply = await client.execute_command(
            "XREAD", "COUNT", _READ, "BLOCK", block, "STREAMS", *self._last, *self._last.values()
        )
        items: list[tuple[Version, Item, int]] = []
        for name, entries in reply.items() if isinstance(reply, dict) else reply or ():
            stream = text(name)
            for id, fields in entries:
                version = Version.parse(id)
                self._last[stream] = str(version)
                number = self._log.get(stream, self._feed.get(stream, 0))
                items.append((version, self._decode(stream, id, fields), number))
        if not items and self._events:
            await self._look(client)
        return sorted(items, key=lambda item: item[0])

    async def _look(self, client: redis.asyncio.Redis) -> None:
        """The log may have been repartitioned: read new partitions from their beginning."""
        keys = await keyspace(client, self._settings)
        for partition in keys.shape.current:
            if keys.log(partition) not in self._log:
                self._log[keys.log(partition)] = partition
                self._last[keys.log(partition)] = str(ZERO)

    def _decode(self, stream: str, id: bytes, fields: list[bytes]) -> Item:
        try:
            return decode(Version.parse(id), fields) if stream in self._log else decode_entry(id, fields)
        except (BadEvent, ValueError, TypeError) as error:
            return f"can't be decoded: {error}"


class LiveTail:
    """The channels on which events are announced. Each event comes once for each slot that it touches."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places: dict[str, tuple[int, int]] = {}
        self._pubsub: redis.asyncio.client.PubSub | None = None

    async def begin(self, client: redis.asyncio.Redis, since: float | Version | None) -> None:
        keys = await keyspace(client, self._settings)
        self._places = _places(keys)
        pubsub = client.pubsub()
        await pubsub.subscribe(*self._places)
        for _ in self._places:
            await pubsub.get_message(timeout=self._settings.redis_timeout)
        self._pubsub = pubsub

    async def next(self, client: redis.asyncio.Redis) -> list[tuple[Version, Item, int]]:
        assert self._pubsub is not None
        found: dict[tuple[int, Version], Announcement] = {}
        bad: list[tuple[Version, Item, int]] = []
        wait = self._settings.redis_timeout / 2
        while len(found) < _READ:
            message = await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=wait)
            if message is None:
                break
            wait = 0.02  # an event's messages come one after the other
            partition, slot = self._places[text(message["channel"])]
            try:
                told = decode_announced(message["data"])
            except ValueError as error:
                bad.append((Version(0, 0), f"slot {slot}: can't be decoded: {error}", partition))
                continue
            before = found.get((partition, told.version))
            slots = (*(before.slots if before else ()), slot)
            found[partition, told.version] = Announcement(told.event, slots)
        if not found:
            await self._look(client)
        return bad + [(version, item, partition) for (partition, version), item in sorted(found.items())]

    async def _look(self, client: redis.asyncio.Redis) -> None:
        """The log may have been repartitioned: listen to the channels of new partitions."""
        assert self._pubsub is not None
        places = _places(await keyspace(client, self._settings))
        new = places.keys() - self._places.keys()
        if new:
            self._places |= places
            await self._pubsub.subscribe(*new)


def _places(keys: Keyspace) -> dict[str, tuple[int, int]]:
    """Log partition and slot of each channel."""
    return {keys.live_channel(p, slot): (p, slot) for p in keys.shape.current for slot in range(SLOTS)}


async def _main(
    settings: Settings, tail: Source, since: float | Version | None, count: int | None, json: bool
) -> int:
    begun = away = False
    shown = 0
    async with looking_at(settings) as client:
        while True:
            try:
                if not begun:
                    await tail.begin(client, since)
                    begun = True
                items = await tail.next(client)
            except (*AWAY, RedisError) as error:
                if code_of(error) in DENIED or not is_away(error):
                    raise  # waiting would not help
                begun = begun and not isinstance(tail, LiveTail)  # it has to subscribe again
                if not away:
                    away = True
                    where = hide_password(settings.redis_url)
                    _say(f"Redis at {where} does not answer ({meaning(error)}); waiting for it")
                await asyncio.sleep(0.5)
                continue
            if away:
                away = False
                _say("Redis is back")
            for version, item, partition in items:
                if json:
                    emit(_record(version, item, partition))
                else:
                    out().print(_line(version, item), no_wrap=True, overflow="ellipsis")
                shown += 1
                if shown == count:
                    return 0


def _say(text: str) -> None:
    err().print(text, style="yellow", markup=False)


def _record(version: Version, item: Item, partition: int) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "error", "partition": partition, "version": str(version), "error": item}
    if isinstance(item, Invalidation):
        return {
            "type": "invalidation",
            "partition": partition,
            "version": str(version),
            "log_partition": item.log_partition,
            "versions": [str(v) for v in item.versions],
            "scopes": list(item.scopes),
            "rejected": {str(v): reason for v, reason in item.dead.items()},
        }
    record: dict[str, Any] = {"type": "event", "partition": partition, "version": str(version)}
    if isinstance(item, Announcement):
        record |= {"type": "announcement", "slots": list(item.slots)}
        if item.event is None:
            return record
        item = item.event
    record |= {
        "op": item.op,
        **item.dimensions._asdict(),
    }
    if item.version != version:  # a dead letter that was requeued
        record["as"] = str(item.version)
    if item.op != DELETE_ROOM:
        record["id"] = item.id
    for name in ("content", "metadata"):
        value = getattr(item, name)
        if value is not None:
            record[name] = orjson.loads(value)
    if item.embedding is not None:
        record["embedding_floats"] = len(item.embedding) // 4
    return record


_COLORS = {"put": "green", "update": "yellow", "delete": "red", "delete_room": "bold red"}


def _line(version: Version, item: Item) -> Text:
    moment = datetime.fromtimestamp(version.ms / 1000, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
    line = Text(f"{moment} ", style="dim", end="")
    if isinstance(item, str):
        return line.append(f"{version} {item}", style="red")
    if isinstance(item, Invalidation):
        line.append("drop        ", style="cyan")
        line.append(", ".join(map(_plain, item.scopes)), style="default")
        if item.dead:
            line.append(f"  rejected: {'; '.join(item.dead.values())}", style="red")
        return line
    if isinstance(item, Announcement):
        line.append(f"live {'/'.join(map(str, item.slots)):<16}", style="cyan")
        if item.event is None:
            return line.append(f"{version}, too large for the message", style="dim")
        item = item.event
    line.append(f"{item.op:<12}", style=_COLORS[item.op])
    names = " ".join(f"{k}={_plain(v)}" for k, v in item.dimensions._asdict().items() if v is not None)
    line.append(f"{names} {item.id}".rstrip(), style="default")
    if item.content is not None:
        line.append(f" {item.content.decode('utf-8', 'replace')}", style="dim")
    return line


def _plain(name: str) -> str:
    """A name on one line, with any characters in it."""
    return name if name.isprintable() else repr(name)
