"""``mnemobus doctor``: finds problems, and says what to do about them.

It does not use the handshake of a bus, which would stop at the first problem; and it changes nothing in Redis.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError, ResponseError

from ..connection.link import evaluate
from ..connection.server_errors import AWAY
from ..errors import IdentityMismatch, MnemobusError, SettingsError
from ..health.checkup import AGENT_RIGHTS, NOBODY, WORKER_RIGHTS, forbidden, rights, write_probe
from ..health.diagnosis import Trouble, of_redis, of_server, of_store
from ..health.vitals import LATE, Log, Worker, judge, read
from ..identity import Registered, check_match, check_owner, misgivings
from ..keys import LAYOUT, Keyspace, Shape
from ..settings import POLICIES, Settings, hide_password
from ..store import SCHEMA, open_reader
from .console import emit, out, size
from .finding import FAIL, OK, WARN, Finding
from .inspection import ask, info, keyspace, looking_at, now, text
from .leftovers import look_at_outbox
from .stats import redis_figures

FLOOR = (6, 2)
FULL = 0.9
"""The doctor warns if more than this share of maxmemory is in use."""
SILENT = 60.0
"""Seconds without a sign of life after which the doctor mentions a replay."""
RECENT = 60.0
"""Seconds for which the doctor mentions a failure of a worker."""


def run(*, json: bool) -> int:
    settings = Settings.load()
    findings = asyncio.run(examine(settings))
    status = exit_status(findings)
    if json:
        emit({"ok": not status, "checks": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    return status


def exit_status(findings: list[Finding]) -> int:
    """1 if any check fails; a warning is not a failure."""
    return int(any(finding.status == FAIL for finding in findings))


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
    """All checks, the server first."""
    where = hide_password(settings.redis_url)
    findings: list[Finding] = []
    there = Registered()
    try:
        async with looking_at(settings) as client:
            await _redis(settings, client, where, findings)
            there = await _registered(settings, client)
    except (SettingsError, *AWAY, RedisError) as error:
        if exit_status(findings) == 0:  # else the earlier findings explain it
            findings.append(_fail("redis", of_redis(error, where)))
    findings += await _store(settings)
    findings += await asyncio.to_thread(lambda: list(look_at_outbox(settings)))
    findings += await _belonging(settings, there)
    return findings


def _fail(check: str, trouble: Trouble) -> Finding:
    return Finding(check, FAIL, trouble.what, trouble.advice)


async def _redis(
    settings: Settings, client: redis.asyncio.Redis, where: str, findings: list[Finding]
) -> None:
    """Check Redis. If this raises, ``findings`` has what was found before."""
    server = await info(client)
    if not server:
        await client.execute_command("PING")
        findings.append(Finding("redis", OK, f"answers at {where}; this user may not ask it for more (INFO)"))
    else:
        product = f"Valkey {server['valkey_version']}" if "valkey_version" in server else "Redis"
        if product == "Redis":
            product = f"Redis {server.get('redis_version', '?')}"
        findings.append(Finding("redis", OK, f"{product} at {where}"))
        if server.get("cluster_enabled") == "1":
            cluster = f"the server at {where} is part of a Redis Cluster, which is not supported"
            findings.append(Finding("cluster", FAIL, cluster, "use a server that stands alone"))
            return
        findings += _server(settings, server)
        if server.get("loading", "0") == "1":  # it answers nothing else
            findings += [_fail("writes", trouble) for trouble in of_server(server, None, where)]
            return
    writes = await _writes(settings, client, server, where)
    findings += writes
    findings += await _rights(settings, client)
    findings.append(await _layout(settings, client))
    figures = await redis_figures(settings)
    if "error" in figures:
        findings.append(Finding("log", FAIL, figures["error"]))
        return
    keys = await keyspace(client, settings)
    [reports], clock = await ask(client, [("HGETALL", keys.workers)]), await now(client)
    workers = [] if isinstance(reports, Exception) else read(reports, clock)
    findings += _workers(settings, figures, workers, taken=writes[0].status == OK)


async def _writes(
    settings: Settings, client: redis.asyncio.Redis, server: dict[str, str], where: str
) -> list[Finding]:
    """Check whether Redis would take a write, with one that would change nothing."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    [reply] = await ask(client, [write_probe(keys)])
    troubles = list(of_server(server, reply if isinstance(reply, Exception) else None, where))
    return [_fail("writes", trouble) for trouble in troubles] or [Finding("writes", OK, "would be taken")]


async def _rights(settings: Settings, client: redis.asyncio.Redis) -> list[Finding]:
    """Check whether the user may do what agents and workers do. It tries the feed itself, as older servers can't
    tell."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    channel = keys.agent_channel("doctor")
    agent, worker, whoami = await ask(
        client,
        [
            evaluate(rights(keys, channel, AGENT_RIGHTS)),
            evaluate(rights(keys, channel, WORKER_RIGHTS)),
            ("ACL", "WHOAMI"),
        ],
    )
    user = "this Redis user" if isinstance(whoami, Exception) else f"the Redis user {text(whoami)!r}"
    missing, others = forbidden(agent), forbidden(worker)
    deaf = await _deaf(client, keys.feed(0))
    if deaf is not None and "SUBSCRIBE" not in missing:
        missing.append(f"SUBSCRIBE ({deaf})")
    if not others and {"SUBSCRIBE", "UNSUBSCRIBE"} <= {name.partition(" ")[0] for name in missing}:
        return [Finding("rights", OK, f"{user} may do what workers do, and nothing else")]
    if missing:
        advice = "allow it, keys and channels as well: redis-cli ACL SETUSER ... (see docs/operations.md)"
        return [
            Finding("rights", FAIL, f"{user} may not do what every agent does: {', '.join(missing)}", advice)
        ]
    if others:
        found = f"{user} may do what an agent does, but not what a worker does: {', '.join(others)}"
        return [Finding("rights", OK, found)]
    return [Finding("rights", OK, f"{user} may do what agents and workers do")]


async def _deaf(client: redis.asyncio.Redis, channel: str) -> Exception | None:
    """Find out why it can't listen to the feed, if it can't."""
    connection = await client.connection_pool.get_connection()
    try:
        await connection.send_command("SUBSCRIBE", channel)
        await connection.read_response(push_request=True)
    except ResponseError as error:
        return error
    finally:
        await connection.disconnect(nowait=True)  # it hears messages from now on
        await client.connection_pool.release(connection)
    return None


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
    found = await client.execute_command("HMGET", keys.layout, *LAYOUT)
    shape = Shape.read(found)
    if shape is None:
        return Finding("layout", OK, f"nobody has used the prefix {keys.prefix!r} yet")
    feed = int(found[1])
    if feed != settings.feed_partitions:
        wrong = f"MNEMOBUS_FEED_PARTITIONS is {settings.feed_partitions} here but {feed} there"
        return Finding("layout", FAIL, wrong, "set it to what is there, or another REDIS_KEY_PREFIX")
    said = f"{shape.size} log and {feed} feed partitions"
    if shape.first > shape.oldest:
        said += f"; what is in {shape.first - shape.oldest} earlier log partitions is kept for now"
    return Finding("layout", OK, said)


async def _registered(settings: Settings, client: redis.asyncio.Redis) -> Registered:
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    return Registered.of(await client.execute_command("HGETALL", keys.identity))


async def _belonging(settings: Settings, there: Registered) -> list[Finding]:
    """Check that the store is the bus's, and that it has lost nothing."""
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    reader = open_reader(settings, create=False)
    try:
        await reader.open()
        identity = await reader.identity()
        address = hide_password(settings.redis_url)
        check_owner(keys, address, identity)
        if not there.store:
            return []
        check_match(keys, address, identity, there)
    except IdentityMismatch as error:
        return [Finding("identity", FAIL, str(error))]
    except MnemobusError:  # the store can't be read: another finding says so
        return [Finding("identity", FAIL, problem) for problem in there.problems]
    finally:
        await reader.close()
    found = misgivings(identity, there)
    words = f"the store {there.store[:8]} belongs to the bus {keys.prefix!r}"
    return [Finding("identity", FAIL, each) for each in found] or [Finding("identity", OK, words)]


def _workers(
    settings: Settings, figures: dict[str, Any], workers: list[Worker], *, taken: bool
) -> Iterator[Finding]:
    log = figures["log"]
    # A server that takes no writes takes no reports, either.
    yield from (
        _readers(settings, figures["reading"], log, workers)
        if taken
        else [Finding("workers", WARN, "can't be told while Redis takes no writes")]
    )
    yield _lag(settings, log)
    dead = sum(p["dead_letters"] for p in log)
    left_out, given_up = (sum(p[name] for p in log) for name in ("dead_left_out", "dead_given_up"))
    if dead or given_up:
        said = f"{dead:,} writes that no worker could apply"
        if left_out or given_up:
            said += (
                f"; they have come to MNEMOBUS_DEAD_LETTER_BYTES: {left_out:,} were kept without their content,"
                f" {given_up:,} older ones were given up"
            )
        yield Finding("dead letters", WARN, said, "see why: mnemobus dead list; then requeue or drop them")
    else:
        yield Finding("dead letters", OK, "none")
    yield from _replays(settings, log)


def _replays(settings: Settings, log: list[dict[str, Any]]) -> Iterator[Finding]:
    """Find replays that were probably killed: the log is not trimmed beyond what they have read."""
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


def _readers(
    settings: Settings, reading: int | None, log: list[dict[str, Any]], workers: list[Worker]
) -> Iterator[Finding]:
    """Check whether workers read every partition, and make progress."""
    ages = [p["waiting_seconds"] for p in log if p["waiting_seconds"] is not None]
    idle = [consumer["idle_ms"] / 1000 for p in log for consumer in p["consumers"]]
    known = Log(
        backlog=sum(p["backlog"] for p in log),
        groups=all(p["group"] for p in log),
        waiting=max(ages, default=None),
        reading=reading,
        active=min(idle, default=None),
    )
    found, troubles = judge(settings, workers, known)
    alive = [worker for worker in workers if worker.alive]
    if troubles:
        yield from (_fail("workers", trouble) for trouble in troubles)
    else:
        yield Finding("workers", OK, found)
    for worker in alive:
        report = worker.report
        if report.failed is not None and report.failed < RECENT:
            failure = f"{worker.name} failed {report.failed:.0f} s ago: {report.error}"
            yield Finding("workers", WARN, failure, "it tries again; if this goes on, look into its log")


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


async def _store(settings: Settings) -> list[Finding]:
    url = hide_password(settings.database_url)
    reader = open_reader(settings, create=False)
    try:
        await reader.open()
        await reader.get(NOBODY)
        schema = await reader.schema()
    except MnemobusError as error:
        return [_fail("store", of_store(error))]
    finally:
        await reader.close()
    if schema > SCHEMA:
        newer = f"{url} has schema {schema}, newer than {SCHEMA}, which this version of mnemobus knows"
        return [Finding("store", WARN, newer, "upgrade mnemobus here")]
    return [Finding("store", OK, f"{url}, schema {schema}")]
