"""``mnemobus tail``: the log and the feed as they pass.

It reads the streams from a position of its own, not through the consumer group, so the workers don't notice.
A Redis that goes away is waited for; its streams are read on from where they were.
"""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from typing import Any

import orjson
import redis.asyncio
from redis.exceptions import RedisError
from rich.text import Text

from ..connection import AWAY
from ..errors import BadEvent, SettingsError
from ..events import DELETE_ROOM, Event, decode
from ..feed import Invalidation, decode_entry
from ..keys import Keyspace, Version
from ..settings import Settings, hide_password
from .console import emit, err, out
from .inspection import ask, keyspace, looking_at, refusal

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_READ = 500


def run(*, events: bool, invalidations: bool, since: str | None, count: int | None, json: bool) -> None:
    settings = Settings.load()
    begin = None if since is None else parse_since(since)
    asyncio.run(_main(settings, events, invalidations, begin, count, json))


def parse_since(text: str) -> float | Version:
    """Seconds ago, or a version; SettingsError if it is neither."""
    match = _AGO.match(text.strip())
    if match:
        return float(match[1]) * _SECONDS[match[2]]
    try:
        return Version.parse(text.strip())
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise SettingsError(
            f"--since {text!r} is none of 90s, 15m, 2h, 1d, a date with a zone, a stream ID"
        ) from None
    if moment.utcoffset() is None:
        raise SettingsError(f"--since {text!r}: the date needs a zone, as in 2025-06-01T12:00:00Z")
    return Version(max(int(moment.timestamp() * 1000), 0), 0)


class _Tail:
    """The streams that are read, each with the ID that was shown last."""

    def __init__(self, settings: Settings, events: bool, invalidations: bool) -> None:
        self._settings = settings
        self._events = events
        self._invalidations = invalidations
        self._last: dict[str, str] = {}
        self._log: dict[str, int] = {}
        self._feed: dict[str, int] = {}

    async def begin(self, client: redis.asyncio.Redis, since: float | Version | None) -> None:
        keys: Keyspace = await keyspace(client, self._settings)
        if self._events:
            self._log = {keys.log(p): p for p in range(keys.log_partitions)}
        if self._invalidations:
            self._feed = {keys.feed(f): f for f in range(keys.feed_partitions)}
        streams = [*self._log, *self._feed]
        if isinstance(since, float):
            seconds, micros = await client.time()
            since = Version(max(int((seconds + micros / 1e6 - since) * 1000), 0), 0)
        if since is not None:
            # XREAD answers what is after an ID, and this one is asked for too.
            before = (since.ms, since.seq - 1) if since.seq else (since.ms - 1, (1 << 64) - 1)
            start = f"{before[0]}-{before[1]}" if since > (0, 0) else "0-0"
            self._last = dict.fromkeys(streams, start)
            return
        heads = await ask(client, [("XREVRANGE", stream, "+", "-", "COUNT", 1) for stream in streams])
        self._last = {
            stream: head[0][0].decode() if isinstance(head, list) and head else "0-0"
            for stream, head in zip(streams, heads, strict=True)
        }

    async def next(
        self, client: redis.asyncio.Redis
    ) -> list[tuple[Version, Event | Invalidation | str, int]]:
        """What came since the last call, in order; after a moment, nothing."""
        block = int(self._settings.redis_timeout * 500)
        reply = await client.execute_command(
            "XREAD", "COUNT", _READ, "BLOCK", block, "STREAMS", *self._last, *self._last.values()
        )
        items: list[tuple[Version, Event | Invalidation | str, int]] = []
        for name, entries in (reply.items() if isinstance(reply, dict) else reply) if reply else ():
            stream = name.decode()
            # redis-py wraps the entries of a stream once more under RESP3.
            if (
                isinstance(reply, dict)
                and entries
                and entries[0]
                and isinstance(entries[0][0], (list, tuple))
            ):
                entries = entries[0]
            for id, fields in entries:
                version = Version.parse(id)
                self._last[stream] = str(version)
                number = self._log.get(stream, self._feed.get(stream, 0))
                items.append((version, self._decode(stream, version, fields), number))
        return sorted(items, key=lambda item: item[0])

    def _decode(self, stream: str, version: Version, fields: Any) -> Event | Invalidation | str:
        pairs = [x for pair in fields.items() for x in pair] if isinstance(fields, dict) else fields
        try:
            if stream in self._log:
                return decode(version, pairs)
            return decode_entry(str(version).encode(), pairs)
        except (BadEvent, ValueError, TypeError) as error:
            return f"can't be decoded: {error}"


async def _main(
    settings: Settings,
    events: bool,
    invalidations: bool,
    since: float | Version | None,
    count: int | None,
    json: bool,
) -> None:
    tail = _Tail(settings, events, invalidations)
    begun = away = False
    left = count
    async with looking_at(settings) as client:
        while True:
            try:
                if not begun:
                    await tail.begin(client, since)
                    begun = True
                items = await tail.next(client)
                if away:
                    away = False
                    err().print("Redis is back", style="dim")
            except (*AWAY, RedisError) as error:
                if refused := refusal(settings, error):
                    raise refused from None
                if not away:
                    away = True
                    err().print(
                        f"Redis at {hide_password(settings.redis_url)} does not answer ({error}); waiting for it",
                        style="yellow",
                        markup=False,
                    )
                await asyncio.sleep(0.5)
                continue
            for version, item, partition in items:
                if json:
                    emit(_record(version, item, partition))
                else:
                    out().print(
                        _line(version, item),
                        no_wrap=True,
                        overflow="ellipsis",
                        soft_wrap=not out().is_terminal,
                    )
                if left is not None:
                    left -= 1
                    if not left:
                        return


def _record(version: Version, item: Event | Invalidation | str, partition: int) -> dict[str, Any]:
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
    record: dict[str, Any] = {
        "type": "event",
        "partition": partition,
        "version": str(version),
        "op": item.op,
        **item.dimensions._asdict(),
    }
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


def _line(version: Version, item: Event | Invalidation | str) -> Text:
    moment = datetime.fromtimestamp(version.ms / 1000, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
    line = Text(f"{moment} ", style="dim", end="")
    if isinstance(item, str):
        return line.append(f"{version} {item}", style="red")
    if isinstance(item, Invalidation):
        line.append("drop        ", style="cyan")
        line.append(", ".join(item.scopes), style="default")
        if item.dead:
            line.append(f"  rejected: {'; '.join(item.dead.values())}", style="red")
        return line
    line.append(f"{item.op:<12}", style=_COLORS[item.op])
    names = " ".join(f"{k}={v}" for k, v in item.dimensions._asdict().items() if v is not None)
    line.append(f"{names} {item.id}".rstrip(), style="default")
    if item.content is not None:
        line.append(f" {item.content.decode('utf-8', 'replace')}", style="dim")
    return line


__all__ = ["parse_since", "run"]
