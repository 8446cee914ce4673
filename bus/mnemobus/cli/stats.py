"""``mnemobus stats``: figures of the log, the feed and the store."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from ..connection.link import Link
from ..connection.server_errors import AWAY, SENSELESS
from ..errors import MnemobusError, SettingsError
from ..health.diagnosis import of_redis
from ..health.vitals import read, reading_clients
from ..keys import APPLY_GROUP, COPY_GROUP, REPLAY_GROUP, SLOTS, Version, applied_of
from ..settings import Settings, hide_password
from ..store import open_reader
from .console import emit, out, run_until_signal, size
from .inspection import ask, info, keyspace, looking_at, now, table, text


def run(*, watch: float | None, json: bool) -> int:
    settings = Settings.load()
    return run_until_signal(_once(settings, json) if watch is None else _watch(settings, watch, json))


async def _once(settings: Settings, json: bool) -> int:
    figures = await gather(settings)
    emit(figures) if json else out().print(render(figures))
    troubles = [figures[place]["error"] for place in ("redis", "store") if "error" in figures[place]]
    if troubles:
        raise MnemobusError("; ".join(troubles))
    return 0


async def _watch(settings: Settings, every: float, json: bool) -> int:
    from rich.live import Live

    screen = Live(console=out(), auto_refresh=False, screen=True) if out().is_terminal and not json else None
    with screen or nullcontext():
        while True:
            figures = await gather(settings)
            if json:
                emit(figures)
            elif screen:
                screen.update(render(figures), refresh=True)
            else:
                out().print(render(figures))
            await asyncio.sleep(every)


async def gather(settings: Settings) -> dict[str, Any]:
    """All figures, in the form of --json; ``error`` in place of those that can't be read."""
    redis, store = await asyncio.gather(redis_figures(settings), _store_figures(settings))
    partitions = redis.pop("log", [])
    return {
        "backlog": sum(p["backlog"] for p in partitions) if partitions else None,
        "dead_letters": sum(p["dead_letters"] for p in partitions) if partitions else None,
        "log": partitions,
        "workers": redis.pop("workers", []),
        "feed": redis.pop("feed", {}),
        "live": redis.pop("live", {}),
        "redis": redis,
        "store": store,
    }


async def redis_figures(settings: Settings) -> dict[str, Any]:
    """The figures of Redis, with the log partitions under ``log``; ``error`` if it can't be asked."""
    try:
        return await _figures(settings)
    except SENSELESS as error:  # somebody else has written to our keys
        return {"address": hide_password(settings.redis_url), "error": str(Link(settings).senseless(error))}


async def _figures(settings: Settings) -> dict[str, Any]:
    where = hide_password(settings.redis_url)
    try:
        async with looking_at(settings) as client:
            server = await info(client)
            keys = await keyspace(client, settings)
            partitions = keys.shape.all
            replies = await ask(
                client,
                [
                    command
                    for p in partitions
                    for command in (
                        ("XLEN", keys.log(p)),
                        ("HMGET", keys.meter(p), "added", "applied", "dead_left_out", "dead_given_up"),
                        ("XINFO", "GROUPS", keys.log(p)),
                        ("XINFO", "CONSUMERS", keys.log(p), APPLY_GROUP),
                        ("XLEN", keys.dead(p)),
                        ("XRANGE", keys.log(p), "-", "+", "COUNT", 1),
                        ("XPENDING", keys.log(p), APPLY_GROUP),
                        ("PUBSUB", "NUMSUB", *(keys.live_channel(p, slot) for slot in range(SLOTS))),
                        ("HGET", keys.heads(p), "n"),
                    )
                ],
            )
            each = len(replies) // len(partitions)
            told = [replies[n : n + each] for n in range(0, len(replies), each)]
            next_up = await ask(
                client,
                [
                    ("XRANGE", keys.log(p), f"({_last_delivered(of_p[2])}", "+", "COUNT", 1)
                    for p, of_p in zip(partitions, told, strict=True)
                ],
            )
            replays = [
                await _replays(client, keys.log(p), of_p[2]) for p, of_p in zip(partitions, told, strict=True)
            ]
            feeds = [keys.feed(f) for f in range(keys.feed_partitions)]
            listeners, epoch, clients, reports, *lengths = await ask(
                client,
                [
                    ("PUBSUB", "NUMSUB", *feeds),
                    ("HGET", keys.epoch, "epoch"),
                    ("CLIENT", "LIST"),
                    ("HGETALL", keys.workers),
                    *(("XLEN", feed) for feed in feeds),
                ],
            )
            clock = await now(client)
    except SettingsError as error:
        return {"address": where, "error": str(error)}
    except (*AWAY, RedisError) as error:
        return {"address": where, "error": str(of_redis(error, where))}
    return {
        "address": where,
        "version": server.get("valkey_version") or server.get("redis_version"),
        "epoch": text(epoch) if isinstance(epoch, bytes) else None,
        "used_memory": int(server.get("used_memory", 0)),
        "max_memory": int(server.get("maxmemory", 0)),
        "policy": server.get("maxmemory_policy"),
        "clients": int(server.get("connected_clients", 0)),
        "reading": None if isinstance(clients, Exception) else reading_clients(clients),
        "log": [
            {"current": p in keys.shape.current, **_partition(p, [*of_p[:7], after], reading, clock)}
            for p, of_p, after, reading in zip(partitions, told, next_up, replays, strict=True)
        ],
        "live": _live(told),
        "feed": {
            "partitions": keys.feed_partitions,
            "messages": sum(n for n in lengths if isinstance(n, int)),
            # Some servers, and some users' permissions, hide who listens.
            "subscriptions": None
            if isinstance(listeners, Exception)
            else sum(int(n) for n in table(listeners).values()),
        },
        "workers": []
        if isinstance(reports, Exception)
        else [
            {"name": w.name, "age": round(w.age, 3), "alive": w.alive, **asdict(w.report)}
            for w in read(reports, clock)
        ],
    }


def _last_delivered(groups: Any) -> str:
    for group in map(table, () if isinstance(groups, Exception) else groups):
        if text(group["name"]) == APPLY_GROUP:
            return text(group["last-delivered-id"])
    return "0-0"


def _names(groups: Any) -> list[str]:
    return (
        [] if isinstance(groups, Exception) else [text(group["name"]) for group in map(table, groups or ())]
    )


async def _replays(client: redis.asyncio.Redis, log: str, groups: Any) -> list[dict[str, Any]]:
    """The replays that read a log partition, and for how long they have been silent."""
    names = [name for name in _names(groups) if name.startswith((REPLAY_GROUP, COPY_GROUP))]
    replies = await ask(client, [("XINFO", "CONSUMERS", log, name) for name in names])
    return [
        {"group": name, "idle_ms": min((int(table(c)["idle"]) for c in consumers), default=None)}
        for name, consumers in zip(names, replies, strict=True)
        if not isinstance(consumers, Exception)
    ]


def _partition(number: int, replies: list[Any], replays: list[Any], clock: float) -> dict[str, Any]:
    length, meter, groups, consumers, dead, first, pending, next_up = (
        None if isinstance(reply, Exception) else reply for reply in replies
    )
    added, applied, left_out, given_up = (int(n or 0) for n in meter or (0, 0, 0, 0))
    applied = applied_of(applied)
    waiting = [pending[1]] if pending and pending[0] else [entry[0] for entry in next_up or ()]
    return {
        "partition": number,
        "length": length or 0,
        "added": added,
        "applied": applied,
        "backlog": max(added - applied, 0),
        "pending": int(pending[0]) if pending else 0,
        "waiting_seconds": _age(waiting[0], clock) if waiting else None,
        "oldest_seconds": _age(first[0][0], clock) if first else None,
        "dead_letters": dead or 0,
        "dead_left_out": left_out,
        "dead_given_up": given_up,
        "group": APPLY_GROUP in _names(groups),
        "replays": replays,
        "consumers": [
            {"name": text(c["name"]), "pending": int(c["pending"]), "idle_ms": int(c["idle"])}
            for c in map(table, consumers or ())
        ],
    }


def _live(partitions: list[list[Any]]) -> dict[str, Any]:
    """The channels on which the log announces its events: how many have listeners, and how many subscriptions they have
    together. Also how many events agents of an older version have ever logged without announcing them."""
    listeners: list[int] | None = []
    unannounced = 0
    for _, meter, *_, numsub, announced in partitions:
        if isinstance(numsub, Exception):
            listeners = None  # some servers, and some users' permissions, hide who listens
        elif listeners is not None:
            listeners += [int(n) for n in table(numsub).values() if int(n)]
        if not isinstance(meter, Exception) and not isinstance(announced, Exception):
            unannounced += max(int(meter[0] or 0) - int(announced or 0), 0)
    return {
        "channels": None if listeners is None else len(listeners),
        "subscriptions": None if listeners is None else sum(listeners),
        "unannounced": unannounced,
    }


def _age(id: bytes, clock: float) -> float:
    """Seconds since an entry was added, by the server's clock."""
    return max(round(clock - Version.parse(id).ms / 1000, 3), 0.0)


async def _store_figures(settings: Settings) -> dict[str, Any]:
    reader = open_reader(settings, create=False)
    where = hide_password(settings.database_url)
    try:
        await reader.open()
        totals = await reader.totals()
        return {
            "url": where,
            "schema": await reader.schema(),
            "tables": totals.tables,
            "memories": sum(totals.tables.values()),
            "exact": totals.exact,
        }
    except MnemobusError as error:
        return {"url": where, "error": f"the store can't be asked: {error}"}
    finally:
        await reader.close()


def render(figures: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    log = Table(title=f"log, at {time.strftime('%H:%M:%S')}", title_justify="left")
    for name in ("partition", "entries", "backlog", "waiting", "pending", "dead letters", "consumers"):
        log.add_column(name, justify="right")
    for p in figures["log"]:
        dead = f"[red]{p['dead_letters']:,}[/red]" if p["dead_letters"] else "0"
        log.add_row(
            str(p["partition"]) if p["current"] else f"[dim]{p['partition']} (ended)[/dim]",
            f"{p['length']:,}",
            f"{p['backlog']:,}",
            _span(p["waiting_seconds"]),
            f"{p['pending']:,}",
            dead,
            str(len(p["consumers"])),
        )
    rest = Table(show_header=False)
    rest.add_column()
    rest.add_column()
    redis, feed, live, store = figures["redis"], figures["feed"], figures["live"], figures["store"]
    if "error" in redis:
        rest.add_row("Redis", f"[red]{redis['error']}[/red]")
    else:
        limit = f" of {size(redis['max_memory'])}" if redis["max_memory"] else ", no limit"
        rest.add_row(
            "Redis",
            f"{redis['version']} at {redis['address']}, {size(redis['used_memory'])}{limit},"
            f" {redis['policy']}, {redis['clients']} clients",
        )
        rest.add_row(
            "feed",
            f"{feed['messages']:,} messages kept in {feed['partitions']} partitions,"
            + (
                " subscriptions can't be told"
                if feed["subscriptions"] is None
                else f" {feed['subscriptions']:,} subscriptions of agents"
            ),
        )
        heard = (
            "subscriptions can't be told"
            if live["channels"] is None
            else f"{live['channels']:,} channels of the log are listened to,"
            f" {live['subscriptions']:,} subscriptions of agents"
        )
        silent = live["unannounced"]
        if silent:
            heard += f"; {silent:,} events were not announced, by agents of an older version"
        rest.add_row("live", heard)
    if "error" in store:
        rest.add_row("store", f"[red]{store['error']}[/red]")
    else:
        about = "" if store["exact"] else "about "
        tables = ", ".join(f"{name} {about}{count:,}" for name, count in store["tables"].items()) or "empty"
        rest.add_row("store", f"{store['url']}, schema {store['schema']}: {tables}")
    parts = [log] * bool(figures["log"]) + [_workers(figures["workers"])] * bool(figures["workers"]) + [rest]
    return Group(*parts)


def _workers(workers: list[dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title="workers", title_justify="left")
    shown.add_column("name", no_wrap=True)
    for name in ("told", "up", "events", "last batch"):
        shown.add_column(name, justify="right")
    shown.add_column("waits for, or failed with")
    for w in workers:
        told = _span(abs(w["age"])) + " ago"
        trouble = f"{w['waits_for']}, for {_span(w['waiting'])}: {w['why']}" if w["waits_for"] else ""
        if not trouble and w["error"]:
            trouble = f"{_span(w['failed'])} ago: {w['error']}"
        shown.add_row(
            w["name"],
            told if w["alive"] else f"[red]{told}[/red]",
            _span(w["up"]),
            f"{w['events']:,}",
            "-" if w["applied"] is None else f"{_span(w['applied'])} ago",
            escape(trouble),
        )
    return shown


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
