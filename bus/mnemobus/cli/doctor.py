"""``mnemobus doctor``: what is wrong, and what to do about it.

It looks without the handshake of a bus, which would stop at the first thing that is wrong; and it changes nothing
in Redis.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from ..connection import AWAY
from ..errors import IdentityMismatch, MnemobusError, SchemaError, SettingsError
from ..identity import Registered, check, check_owner, misgivings
from ..keys import Keyspace
from ..settings import POLICIES, Settings, hide_password
from ..store import SCHEMA, open_reader
from .console import emit, out, size
from .inspection import info, looking_at
from .stats import redis_figures

OK, WARN, FAIL = "ok", "warn", "fail"

FLOOR = (6, 2)
FULL = 0.9
"""Share of maxmemory above which a warning is due."""
SILENT = 60.0
"""Seconds without a sign of life after which a replay is asked about."""
LATE = 30.0
"""Seconds after which an event that is not applied is overdue."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``advice`` says what to do, unless all is well."""

    check: str
    status: str
    found: str
    advice: str = ""


def run(*, json: bool) -> int:
    settings = Settings.load()
    findings = asyncio.run(examine(settings))
    failed = any(finding.status == FAIL for finding in findings)
    if json:
        emit({"ok": not failed, "checks": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    return 1 if failed else 0


def _print(findings: list[Finding]) -> None:
    colors = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        out().print(
            f"[{colors[finding.status]}]{finding.status:<4}[/]  {finding.check:<{width}}  ",
            end="",
            soft_wrap=True,
        )
        out().print(finding.found, markup=False, soft_wrap=True)
        if finding.advice:
            out().print(f"{'':{width + 8}}{finding.advice}", markup=False, soft_wrap=True)


async def examine(settings: Settings) -> list[Finding]:
    """Everything there is to look at, the server first."""
    where = hide_password(settings.redis_url)
    findings: list[Finding] = []
    there = Registered()
    try:
        async with looking_at(settings) as client:
            server = await info(client)
            product = f"Valkey {server['valkey_version']}" if "valkey_version" in server else "Redis"
            if product == "Redis":
                product = f"Redis {server.get('redis_version', '?')}"
            findings.append(Finding("redis", OK, f"{product} at {where}"))
            findings += _server(settings, server)
            findings.append(await _layout(settings, client))
            there = await _registered(settings, client)
    except SettingsError as error:
        findings.append(
            Finding("redis", FAIL, str(error), "set REDIS_PASSWORD, or REDIS_URL with a password")
        )
    except (*AWAY, RedisError) as error:
        advice = "start it (`mnemobus up` runs one here), or set REDIS_URL"
        findings.append(Finding("redis", FAIL, f"{where} does not answer: {error}", advice))
    else:
        findings += _workers(settings, await redis_figures(settings))
    findings.append(await _store(settings))
    findings += await _belonging(settings, there)
    return findings


def _server(settings: Settings, server: dict[str, str]) -> Iterator[Finding]:
    major, minor, *_ = (*server.get("redis_version", "0.0").split("."), "0")
    if (int(major), int(minor)) < FLOOR:
        yield Finding("version", FAIL, f"speaks Redis {major}.{minor}", "6.2 is needed, or Valkey")
    policy = server.get("maxmemory_policy", "noeviction")
    if policy in POLICIES:
        yield Finding("policy", OK, policy)
    else:
        yield Finding(
            "policy",
            FAIL,
            f"{policy}: Redis may evict the log",
            "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
        )
    wanted = settings.redis_eviction_policy
    if wanted is not None and wanted != policy:
        yield Finding(
            "REDIS_EVICTION_POLICY",
            FAIL,
            f"is {wanted}, but the server has {policy}",
            f"redis-cli CONFIG SET maxmemory-policy {wanted}, or unset it",
        )
    yield from _memory(settings, server)
    yield _persistence(server)


def _memory(settings: Settings, server: dict[str, str]) -> Iterator[Finding]:
    used, limit = int(server.get("used_memory", 0)), int(server.get("maxmemory", 0))
    advice = "raise maxmemory, or lower MNEMOBUS_RETENTION; a full Redis refuses writes"
    if not limit:
        yield Finding("memory", OK, f"{size(used)} used, no limit")
    elif used >= limit:
        yield Finding("memory", FAIL, f"full: {size(used)} of {size(limit)} used", advice)
    elif used > FULL * limit:
        yield Finding("memory", WARN, f"nearly full: {size(used)} of {size(limit)} used", advice)
    else:
        yield Finding("memory", OK, f"{size(used)} of {size(limit)} used")
    wanted = settings.max_memory()
    if wanted is not None and wanted != limit:
        yield Finding(
            "REDIS_MAX_MEMORY",
            FAIL,
            f"is {settings.redis_max_memory} ({wanted:,} bytes), but the server has {limit:,}",
            f"redis-cli CONFIG SET maxmemory {wanted}, or unset it",
        )


def _persistence(server: dict[str, str]) -> Finding:
    if server.get("aof_enabled") != "1":
        return Finding(
            "persistence",
            WARN,
            "no append-only file: a Redis that restarts forgets what was not yet applied",
            "redis-cli CONFIG SET appendonly yes, and the same in redis.conf",
        )
    for field in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if server.get(field, "ok") != "ok":
            return Finding(
                "persistence",
                FAIL,
                f"the append-only file can't be written ({field}: {server[field]})",
                "look into the server's log; its disk may be full",
            )
    return Finding("persistence", OK, "append-only file")


async def _layout(settings: Settings, client: redis.asyncio.Redis) -> Finding:
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    found = await client.hmget(keys.layout, ["log_partitions", "feed_partitions"])
    there = [int(n) for n in found if n is not None]
    if len(there) < 2:
        return Finding("layout", OK, f"nobody has used the prefix {keys.prefix!r} yet")
    wrong = [
        f"{name} is {mine} here but {theirs} there"
        for name, mine, theirs in zip(
            ("MNEMOBUS_LOG_PARTITIONS", "MNEMOBUS_FEED_PARTITIONS"),
            (settings.log_partitions, settings.feed_partitions),
            there,
            strict=True,
        )
        if theirs != mine
    ]
    if wrong:
        return Finding(
            "layout", FAIL, "; ".join(wrong), "set it to what is there, or another REDIS_KEY_PREFIX"
        )
    return Finding(
        "layout", OK, f"{settings.log_partitions} log and {settings.feed_partitions} feed partitions"
    )


async def _registered(settings: Settings, client: redis.asyncio.Redis) -> Registered:
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    return Registered.of(await client.execute_command("HGETALL", keys.identity))


async def _belonging(settings: Settings, there: Registered) -> list[Finding]:
    """Whether the store is the bus's, and the one that it was."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    reader = open_reader(settings, create=False)
    try:
        await reader.open()
        identity = await reader.identity()
        address = hide_password(settings.redis_url)
        check_owner(keys, address, identity)
        if not there.store:
            return []
        check(keys, address, identity, there)
    except IdentityMismatch as error:
        return [Finding("identity", FAIL, str(error))]
    except MnemobusError:  # the store can't be read: that is told already
        return [Finding("identity", FAIL, problem) for problem in there.problems]
    finally:
        await reader.close()
    found = misgivings(identity, there)
    words = f"the store {there.store[:8]} belongs to the bus {keys.prefix!r}"
    return [Finding("identity", FAIL, each) for each in found] or [Finding("identity", OK, words)]


def _workers(settings: Settings, figures: dict[str, Any]) -> Iterator[Finding]:
    log = figures.get("log", [])
    yield _readers(settings, figures.get("reading"), log)
    yield _lag(settings, log)
    dead = sum(p["dead_letters"] for p in log)
    if dead:
        yield Finding(
            "dead letters",
            WARN,
            f"{dead:,} writes that no worker could apply",
            "see why: mnemobus dead list; then requeue or drop them",
        )
    else:
        yield Finding("dead letters", OK, "none")
    yield from _replays(settings, log)


def _replays(settings: Settings, log: list[dict[str, Any]]) -> Iterator[Finding]:
    """Replays that were killed, it seems: nothing is trimmed that they have not read."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    for partition in log:
        for replay in partition["replays"]:
            idle, name = replay["idle_ms"], replay["group"]
            if idle is None or idle > 1000 * SILENT:
                silent = "" if idle is None else f" for {idle / 1000:.0f} s"
                yield Finding(
                    "replay",
                    WARN,
                    f"{name} on log partition {partition['partition']} has been silent{silent}, and keeps the log"
                    " from being trimmed",
                    "if it was killed, run it again. Workers forget it after an hour; or"
                    f"  redis-cli XGROUP DESTROY '{keys.log(partition['partition'])}' {name}",
                )


def _readers(settings: Settings, reading: int | None, log: list[dict[str, Any]]) -> Finding:
    """Whether workers read every partition. ``reading`` connections wait for some log of this server; a worker of
    this bus makes a consumer group on each partition as soon as it starts."""
    if reading is None:
        # Managed servers hide CLIENT LIST. Consumers tell less: an idle one may just have no work.
        within = 1000 * max(10.0, 2 * settings.claim_idle)
        without = [p for p in log if not any(c["idle_ms"] <= within for c in p["consumers"])]
        found = "consumers at work on every log partition"
    else:
        without = log if reading == 0 else [p for p in log if not p["group"]]
        found = f"{reading} connections read {len(log)} log partitions"
    start = "start them: mnemobus worker (or mnemobus up)"
    if len(without) == len(log):
        return Finding("workers", FAIL, "there are none", start)
    if without:
        numbers = ", ".join(str(p["partition"]) for p in without)
        return Finding("workers", FAIL, f"nobody works on log partition {numbers}", start)
    if reading is not None and reading < len(log):
        return Finding("workers", WARN, found, start)
    return Finding("workers", OK, found)


def _lag(settings: Settings, log: list[dict[str, Any]]) -> Finding:
    backlog = sum(p["backlog"] for p in log)
    full = [p["partition"] for p in log if p["backlog"] >= settings.max_backlog]
    if full:
        return Finding(
            "backlog",
            FAIL,
            f"{backlog:,} events; log partition {full[0]} takes no more (MNEMOBUS_MAX_BACKLOG)",
            "start more workers: mnemobus worker",
        )
    ages = [p["waiting_seconds"] for p in log if p["waiting_seconds"] is not None]
    if ages and max(ages) > LATE:
        return Finding(
            "backlog",
            WARN,
            f"{backlog:,} events, the oldest for {max(ages):.0f} s",
            "look into the workers' log; is the database reachable from there?",
        )
    return Finding("backlog", OK, f"{backlog:,} events")


async def _store(settings: Settings) -> Finding:
    url = hide_password(settings.database_url)
    reader = open_reader(settings, create=False)
    try:
        await reader.open()
        schema = await reader.schema()
    except SchemaError as error:
        return Finding("store", FAIL, str(error), "or is MNEMOBUS_DATABASE_URL another than the workers'?")
    except MnemobusError as error:
        return Finding("store", FAIL, str(error), "check MNEMOBUS_DATABASE_URL and the database")
    finally:
        await reader.close()
    if schema > SCHEMA:
        newer = f"{url} has schema {schema}, newer than {SCHEMA}, which this version of mnemobus knows"
        return Finding("store", WARN, newer, "upgrade mnemobus here")
    return Finding("store", OK, f"{url}, schema {schema}")
