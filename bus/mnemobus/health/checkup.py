"""`bus.health()`: would a write now be logged and committed, and a read be answered?

The checkup answers this as far as it can without writing. It asks Redis in one round trip, and the store at the same
time:

- whether it takes writes: a write to a key that never exists, which would only change an existing key. Redis refuses it
  for the same reasons as any other (a replica, full, a disk that fails, too few replicas, no permission);
- what this user may do, if the server can tell (Redis 7);
- what waits in the log, and what the workers report (health/vitals.py);
- a read of a memory that does not exist.

A second round trip follows only if workers report nothing, or if events wait. If a managed server hides something, this
is not a problem: only a known fault is one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from ..cache.l1 import LocalCache, clock
from ..connection.link import Call, Link, parse_info, script
from ..connection.server_errors import AWAY, SENSELESS, code_of
from ..connection.transport import Argument, Command
from ..errors import MnemobusError, SettingsError
from ..keys import APPLY_GROUP, Keyspace, Version, applied_of
from ..settings import Settings
from ..stats import Health
from ..store import Reader
from .diagnosis import SLOW, Trouble, of_redis, of_server, of_store
from .vitals import Log, Worker, describe, judge, read, reading_clients, tables, text

if TYPE_CHECKING:
    from ..cache.l2 import SharedCache
    from ..cache.shadow import Shadow
    from ..feed.subscription import Feed
    from ..identity import Acquaintance
    from ..log.outbox import Outbox

logger = logging.getLogger("mnemobus.health")

NOBODY = "00000000-0000-0000-0000-000000000000"
"""An id that no memory has."""

AGENT_RIGHTS = (
    "EVAL 0 1 KEY", "EVALSHA 0 1 KEY", "XADD LOG * a b", "XRANGE LOG - +", "XREVRANGE FEED + -", "XLEN LOG",
    "XINFO GROUPS LOG", "XPENDING LOG g", "HGET LOG a", "HSET LOG a b", "HMGET LOG a", "HINCRBY LOG a 1",
    "HSETNX KEY a b", "HSET FEED a b", "HDEL FEED a", "HLEN FEED", "DEL KEY", "PEXPIRE FEED 1", "PTTL FEED", "TIME",
    "PUBLISH CHANNEL a", "SUBSCRIBE CHANNEL", "SUBSCRIBE FEED", "UNSUBSCRIBE FEED",
)  # fmt: skip
"""The commands of an agent, in the form that rights.lua takes."""
WORKER_RIGHTS = (
    "EVAL 0 1 KEY", "EVALSHA 0 1 KEY", "XADD LOG * a b", "XADD FEED * a b", "XRANGE LOG - +", "XREVRANGE FEED + -",
    "XREADGROUP GROUP g c STREAMS LOG >", "XACK LOG g 1-1", "XCLAIM LOG g c 0 1-1", "XDEL LOG 1-1", "XTRIM LOG MINID 0",
    "XGROUP CREATE LOG g 0", "XINFO CONSUMERS LOG", "XPENDING LOG g", "HGET LOG a", "HSET KEY a b", "HINCRBY LOG a 1",
    "HDEL KEY a", "HSCAN LOG 0", "DEL KEY", "UNLINK FEED", "TIME", "PUBLISH FEED a", "HGETALL KEY", "HSETNX KEY a b",
    "GET KEY", "SET KEY a", "PEXPIRE KEY 1", "PTTL KEY",
)  # fmt: skip
"""The commands of a worker."""


def write_probe(keys: Keyspace) -> Command:
    """A write that changes nothing, and that Redis refuses whenever it would refuse a real one."""
    return "XADD", keys.probe, "NOMKSTREAM", "*", "probe", ""


def rights(keys: Keyspace, channel: str, commands: Sequence[str]) -> Call:
    """Which of these commands the user may not run."""
    arguments: list[Argument] = [channel, *commands]
    return script("rights"), [keys.layout, keys.log(0), keys.feed(0)], arguments


def forbidden(refused: Any) -> list[str]:
    """The refused ones, for people to read, from the answer to `rights`."""
    if isinstance(refused, Exception):
        return [" ".join(str(refused).split())] if code_of(refused) == "NOPERM" else []
    return [] if refused is None else sorted({text(command).partition(" ")[0] for command in refused})


class Checkup:
    """Finds out the health of a bus. It examines the parts that it gets, and changes nothing."""

    def __init__(
        self,
        link: Link,
        reader: Reader,
        local: LocalCache,
        feed: Feed,
        shared: SharedCache,
        shadow: Shadow,
        outbox: Outbox | None,
        bus_id: str,
        acquaintance: Acquaintance,
    ) -> None:
        self._settings: Settings = link.settings
        self._link = link
        self._reader = reader
        self._local = local
        self._feed = feed
        self._shared = shared
        self._shadow = shadow
        self._outbox = outbox
        self._channel = link.keys.agent_channel(bus_id)
        self._acquaintance = acquaintance

    async def health(self, timeout: float) -> Health:
        """The present health of the bus. Takes at most ``timeout`` seconds, and does not raise."""
        redis, store, belonging = await asyncio.gather(
            self._redis(timeout), self._store(timeout), self._belonging(timeout)
        )
        problems = [*redis.problems, *store.problems, *belonging, *self._ours()]
        feed, blind = self._feed_state()
        if blind:
            problems.append(blind)
        unique = tuple(dict.fromkeys(problems))
        return Health(
            not unique,
            redis.state,
            store.state,
            feed,
            redis.backlog,
            redis.dead_letters,
            unique,
            redis.workers,
        )

    async def _belonging(self, timeout: float) -> list[str]:
        """Problems if the store is not the bus's, or has lost data; none if that can't be found out in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                return await self._acquaintance.problems()
        return []

    def _ours(self) -> list[str]:
        """The problems in this process."""
        problems = []
        if self._outbox is not None and self._outbox.waiting:
            problems.append(f"{self._outbox.waiting} writes wait in the outbox {self._outbox.where}")
        if self._outbox is not None and self._outbox.trouble:
            problems.append(f"while Redis is away, writes can't wait in the outbox: {self._outbox.trouble}")
        if self._shared.trouble:
            problems.append(f"results can't be shared, so reads go to the store: {self._shared.trouble}")
        shadow = self._shadow
        if shadow.breaches_local or shadow.breaches_shared:
            problems.append(
                f"copies were older than promised: {shadow.breaches_local} local, {shadow.breaches_shared} shared;"
                " the log names them"
            )
        return problems

    def _feed_state(self) -> tuple[str, str]:
        """The state of the feed, and its problems."""
        feed = self._feed
        if clock() >= self._local.fresh_until:
            return (
                "local copies are not served",
                f"the feed is not verified: {feed.heartbeat.trouble or 'no heartbeat yet'}",
            )
        state = f"local copies are served; verified {clock() - feed.heartbeat.last_good:.1f} s ago"
        return state, f"the feed can't be listened to: {feed.deaf}" if feed.deaf else ""

    # The store

    async def _store(self, timeout: float) -> _Part:
        try:
            async with asyncio.timeout(timeout):
                await self._reader.get(NOBODY)
                return _Part(f"schema {await self._reader.schema()}")
        except TimeoutError:
            trouble = Trouble(
                f"no answer within {timeout:g} s", "look at the database: is it slow, or locked?"
            )
        except MnemobusError as error:
            trouble = of_store(error)
        except Exception as error:
            logger.exception("the store could not be asked how it is")
            trouble = of_store(error)
        return _Part(trouble.what, [f"the store can't be read: {trouble}"])

    # Redis

    async def _redis(self, timeout: float) -> _Part:
        try:
            async with asyncio.timeout(timeout):
                return await self._ask()
        except TimeoutError:
            trouble = Trouble(
                f"Redis at {self._link.address} gave no answer within {timeout:g} s",
                SLOW,
            )
        except (*AWAY, RedisError, SettingsError) as error:
            trouble = of_redis(error, self._link.address)
        except SENSELESS as error:
            trouble = of_redis(self._link.senseless(error), self._link.address)
        except Exception as error:
            logger.exception("Redis could not be asked how it is")
            trouble = of_redis(error, self._link.address)
        return _Part(trouble.what, [str(trouble)], backlog=-1, dead_letters=-1)

    async def _ask(self) -> _Part:
        link, keys = self._link, self._link.keys
        partitions = keys.shape.all
        head: list[Command | Call] = [
            ("INFO",),
            write_probe(keys),
            ("TIME",),
            ("HGETALL", keys.workers),
            rights(keys, self._channel, AGENT_RIGHTS),
        ]
        each: list[list[Command]] = [
            [
                ("HMGET", keys.meter(p), "added", "applied", "dead_left_out", "dead_given_up")
                for p in partitions
            ],
            [("XLEN", keys.dead(p)) for p in partitions],
            [("XINFO", "GROUPS", keys.log(p)) for p in partitions],
            [("XPENDING", keys.log(p), APPLY_GROUP) for p in partitions],
            [("HLEN", keys.producers(p)) for p in partitions],
            [("HLEN", keys.heads(p)) for p in partitions],
            [("XLEN", keys.log(p)) for p in partitions],
        ]
        replies = await link.pipeline(
            [*head, *(command for some in each for command in some)], pool=link.probe
        )
        info, refusal, now, reports, refused = replies[: len(head)]
        rest = replies[len(head) :]
        meters, letters, groups, pending, *others = (
            rest[n * len(partitions) :][: len(partitions)] for n in range(len(each))
        )
        described = {} if isinstance(info, Exception) else parse_info(info)
        troubles = list(
            of_server(described, refusal if isinstance(refusal, Exception) else None, link.address)
        )
        writable = not troubles
        names = forbidden(refused)
        if names:
            what = f"the Redis user may not do what an agent does: {', '.join(names)}"
            troubles.append(Trouble(what, "allow it, keys and channels as well (ACL SETUSER)"))
        for reply in (*meters, *letters, *(reply for some in others for reply in some)):
            if isinstance(reply, Exception):
                troubles.append(of_redis(reply, link.address))
                return _Part(troubles[0].what, list(map(str, troubles)), backlog=-1, dead_letters=-1)
        backlogs = [max(int(added or 0) - applied_of(int(applied or 0)), 0) for added, applied, *_ in meters]
        problems = list(map(str, troubles))
        full = [(p, n) for p, n in zip(partitions, backlogs, strict=True) if n >= self._settings.max_backlog]
        if full:
            problems.append(
                f"log partition {full[0][0]} takes no more: {full[0][1]:,} events wait there"
                " (MNEMOBUS_MAX_BACKLOG): start more workers (mnemobus worker)"
            )
        dead = sum(letters)
        if dead:
            problems.append(f"{dead} dead letters: writes that no worker could apply")
        left_out, given_up = (sum(int(meter[n] or 0) for meter in meters) for n in (2, 3))
        if left_out or given_up:
            problems.append(
                f"the dead letters have come to MNEMOBUS_DEAD_LETTER_BYTES: {left_out} were kept without their content,"
                f" {given_up} older ones were given up (mnemobus dead list)"
            )
        workers = "not asked"
        if isinstance(now, list):
            moment = int(now[0]) + int(now[1]) / 1e6
            known = read(reports, moment) if isinstance(reports, (dict, list)) else []
            # If nothing can be written, workers can't report; the reason is among the problems already.
            if writable:
                log = await self._log(partitions, known, moment, backlogs, groups, pending)
                workers, stuck = judge(self._settings, known, log)
                problems += map(str, stuck)
            else:
                workers = describe(known)
        state = troubles[0].what if troubles else str(link.server)
        return _Part(state, problems, sum(backlogs), dead, workers)

    async def _log(
        self,
        partitions: range,
        workers: list[Worker],
        now: float,
        backlogs: list[int],
        groups: list[Any],
        pending: list[Any],
    ) -> Log:
        """What is known about the log's readers; this takes a second round trip if the first did not tell."""
        keys = self._link.keys
        given = [last_delivered(group) for group in groups]
        counts = [0 if isinstance(p, Exception) or not p else int(p[0]) for p in pending]
        oldest = [text(p[1]) for p in pending if not isinstance(p, Exception) and p and p[0]]
        alone = not any(worker.alive for worker in workers)
        commands: list[Command] = [
            ("XRANGE", keys.log(p), f"({last or '0-0'}", "+", "COUNT", 1)
            for p, last, backlog, count in zip(partitions, given, backlogs, counts, strict=True)
            if backlog > count
        ]
        if alone and all(given):
            commands.append(("CLIENT", "LIST"))
            commands += [("XINFO", "CONSUMERS", keys.log(p), APPLY_GROUP) for p in partitions]
        replies = await self._link.pipeline(commands, pool=self._link.probe) if commands else []
        reading, idle = None, []
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception):
                continue
            if command[0] == "XRANGE":
                oldest += [text(entry[0]) for entry in reply]
            elif command[0] == "CLIENT":
                reading = reading_clients(reply)
            else:
                idle += [int(consumer["idle"]) / 1000 for consumer in tables(reply)]
        ages = [now - Version.parse(id).ms / 1000 for id in oldest]
        return Log(
            backlog=sum(backlogs),
            groups=all(given),
            waiting=max(ages, default=None),
            reading=reading,
            active=min(idle, default=None),
        )


def last_delivered(groups: Any) -> str:
    """The last ID that was delivered to the workers' group, by XINFO GROUPS; empty if there is no such group."""
    for group in tables(groups):
        if text(group["name"]) == APPLY_GROUP:
            return text(group["last-delivered-id"])
    return ""


class _Part:
    """The findings about one of the two servers."""

    def __init__(
        self,
        state: str,
        problems: Sequence[str] = (),
        backlog: int = 0,
        dead_letters: int = 0,
        workers: str = "not asked",
    ) -> None:
        self.state = state
        self.problems = problems
        self.backlog = backlog
        self.dead_letters = dead_letters
        self.workers = workers
