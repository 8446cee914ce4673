"""Identities: a bus and its store belong together, and the store must not lose data unnoticed.

A store has a UUID, made with its schema, and names the bus that it belongs to. A bus has a UUID in Redis, and names its
store. The first process that connects writes this there. An agent or a worker that comes later with another store, or
with a store of another bus, is refused. With `mnemobus adopt` an operator confirms an intended change.

If one side loses its identity, it gets it back from the other: a Redis that was flushed, or replaced by an empty one,
is the same bus again, in another *life*. Workers write the present life into the store. If a worker finds there an
older life, which its own had replaced, it has a rival: another Redis with the same key prefix, whose workers use the
same store.

A copy of a store has the same UUID. But it has another *place* (the file's inode; the identifiers of the server and the
database), and workers may commit to one place at a time. A place counts as given up once its workers' beats no longer
rise. None of this depends on a clock.

**Back in time.** A store that is restored from a backup, or whose server fails over to a standby that was behind, has
lost committed writes, while all processes believe that it has them. Two things show this:

- a *witness* for each log partition: the last event that was fanned out; the fan-out writes it to Redis. Its memory has
  this version or a later one for ever (store/merge.py), unless the store went back;
- another place, or another *history* (PostgreSQL's timeline).

Then the log is applied again from the moment up to which the store is known to have had everything (``reached``, which
workers write into it every ten seconds or so), and a new epoch begins: mnemobus_workers/standing.py.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from redis.exceptions import RedisError

from .connection.link import Link
from .connection.server_errors import AWAY, SENSELESS
from .errors import IdentityMismatch, MnemobusError, SettingsError, StoreError
from .keys import Keyspace, Version
from .store import Identity, Reader
from .tasks import end

logger = logging.getLogger("mnemobus.identity")

LOOK_EVERY = 5.0
"""Seconds between two checks of an agent; shorter as long as it does not know the identity yet."""
_LEARN_EVERY = 1.0


@dataclass(frozen=True, slots=True)
class Registered:
    """What Redis knows about a bus: see lua/identity.lua.

    epoch      of the store's server, which a server that crashed has forgotten; "" while all commits are on disk before
               they count (MNEMOBUS_COMMIT)
    witnesses  by log partition, a memory's id and the version that it has at least
    beats      rises while workers commit at ``place``
    stamped    whether this life was written into the store
    rival      what is known about another Redis that uses the same store, or ""
    resync     what is being applied again and why, or None; ``resynced``: what came of the last time
    """

    bus: str = ""
    store: str = ""
    where: str = ""
    life: str = ""
    served: bool = False
    place: str = ""
    history: str = ""
    beats: int = 0
    stamped: bool = False
    rival: str = ""
    epoch: str = ""
    resync: dict[str, Any] | None = None
    resynced: dict[str, Any] | None = None
    witnesses: Mapping[int, tuple[str, Version]] = field(default_factory=dict)

    @classmethod
    def of(cls, reply: Any) -> Registered:
        """Decode the reply to HGETALL, in either version of the protocol, or to the script. SettingsError if it is
        malformed."""
        try:
            return cls._of(reply)
        except SENSELESS as error:
            raise SettingsError(
                f"what Redis notes of this bus and its store makes no sense ({error}): does other software use its keys"
                " (REDIS_KEY_PREFIX)?"
            ) from error

    @classmethod
    def _of(cls, reply: Any) -> Registered:
        pairs = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
        fields = {name.decode(): value.decode("utf-8", "replace") for name, value in pairs}
        witnesses = {}
        for name, value in fields.items():
            if name[:1] == "w" and name[1:].isdigit():
                id, _, version = value.partition(" ")
                witnesses[int(name[1:])] = (id, Version.parse(version))
        return cls(
            **{
                name: fields.get(name, "")
                for name in ("bus", "store", "where", "life", "place", "history", "rival", "epoch")
            },
            served="served" in fields,
            beats=int(fields.get("beats", 0)),
            stamped="stamped" in fields,
            resync=_note(fields.get("resync"), "why", "since"),
            resynced=_note(fields.get("resynced"), "why", "since", "missing"),
            witnesses=witnesses,
        )

    @property
    def problems(self) -> list[str]:
        """The problems that Redis's side alone shows, one sentence each."""
        found = []
        if self.rival:
            found.append(self.rival)
        if self.resync is not None:
            found.append(
                f"the store went back in time ({self.resync['why']}): the log is applied again since"
                f" {self.resync['since'] or 'its beginning'}, {self.resync.get('events', 0):,} events so far"
            )
        elif self.resynced is not None and self.resynced["missing"]:
            found.append(
                f"the store went back in time ({self.resynced['why']}), and the log no longer reaches back to"
                f" {self.resynced['since']}: up to {self.resynced['missing']:,} writes from then on may be lost."
                " Restore a later backup if there is one; to accept it as it is: mnemobus adopt"
            )
        return found


def _note(text: str | None, *needed: str) -> dict[str, Any] | None:
    """Decode a note of upkeep; ValueError if it is malformed."""
    note = None if text is None else orjson.loads(text)
    if note is not None and not (isinstance(note, dict) and note.keys() >= set(needed)):
        raise ValueError(f"{text!r} is not a note with {', '.join(needed)}")
    return note


def arguments(identity: Identity, role: str = "") -> list[str]:
    """The arguments for lua/identity.lua, which explains ``role``."""
    bus, new = identity.bus or "", secrets.token_hex(16)
    return [identity.store, identity.where, bus, new, identity.place, identity.history, role]


def check_owner(keys: Keyspace, address: str, identity: Identity) -> None:
    """IdentityMismatch if the store belongs to a bus of another key prefix. Call this before Redis learns the store."""
    if identity.bus is not None and identity.prefix not in (None, keys.prefix):
        raise _taken(keys, address, identity)


def check_match(keys: Keyspace, address: str, identity: Identity, there: Registered) -> None:
    """IdentityMismatch unless the store and the bus in Redis belong together; it names both."""
    if there.store != identity.store:
        raise IdentityMismatch(
            f"the bus {keys.prefix!r} at {address} has the store {there.store[:8]} ({there.where}), but"
            f" MNEMOBUS_DATABASE_URL leads to the store {identity.store[:8]} ({identity.where}). Set it to what the"
            " other agents and workers of this bus have. If this store shall take the place of that one: stop them all,"
            " and run mnemobus adopt"
        )
    if identity.bus not in (None, there.bus):
        raise _taken(keys, address, identity)


def _taken(keys: Keyspace, address: str, identity: Identity) -> IdentityMismatch:
    bus = (identity.bus or "")[:8]
    return IdentityMismatch(
        f"the store {identity.store[:8]} ({identity.where}) belongs to the bus {identity.prefix!r} ({bus}), not to the"
        f" bus {keys.prefix!r} at {address}: one would not hear of what the other writes. Use another database or"
        " MNEMOBUS_DATABASE_NAMESPACE, or that bus's REDIS_URL and REDIS_KEY_PREFIX. If that bus is no more, and this"
        " one shall go on with its store: stop all agents and workers, and run mnemobus adopt"
    )


def misgivings(identity: Identity, there: Registered) -> list[str]:
    """The problems between a store and a bus that belong together, one sentence each."""
    found = there.problems
    if identity.life is not None and identity.life != there.life and not there.rival:
        found.append(
            f"the store ({identity.where}) was last written by workers of another Redis than this one, or of before it"
            " lost its data: no worker of this one has come since, or both use the store"
        )
    if identity.place and there.place and identity.place != there.place:
        found.append(
            f"this process reads another copy of the store ({identity.where}) than the one that workers commit to"
            f" ({there.where})"
        )
    return found


class Acquaintance:
    """Ensures that an agent's bus and store belong together. It checks when the agent opens (later, if one of them was
    away), and for as long as the agent is open. For one event loop."""

    def __init__(self, link: Link, reader: Reader, on_refusal: Callable[[], None]) -> None:
        self._link = link
        self._reader = reader
        self._on_refusal = on_refusal
        self._agreed: tuple[str, str, str, int] | None = None
        """Bus, store, life, and the reader's count of openings, at the last check of both sides. None as long as the
        store names no bus: another bus may still take it."""
        self._known = False
        self._ahead: Identity | None = None
        """The store's identity, read while the bus was connecting to Redis."""
        self._task: asyncio.Task[None] | None = None
        self.refused = ""
        """Why this bus and this store must not be used together."""

    async def look(self) -> None:
        """Read the store's identity, for `start`, before Redis is connected. Raises StoreError."""
        self._ahead = await self._reader.identity()

    async def start(self) -> None:
        """Check now, and go on checking. IdentityMismatch if they don't belong together."""
        try:
            await self._agree()
        except (StoreError, RedisError, *AWAY) as error:
            logger.debug("who the store is will be found out later: %s", error)
        self._task = asyncio.create_task(self._watch(), name="mnemobus-identity")

    async def close(self) -> None:
        await end([self._task])

    def knows(self) -> bool:
        """Whether the store is known to be the bus's."""
        return self._known

    async def problems(self) -> list[str]:
        """The problems that `Bus.health` reports now; none while Redis or the store is away."""
        try:
            identity, there = await self._agree()
        except IdentityMismatch as error:
            return [str(error)]
        except (StoreError, *AWAY):
            return []
        except (SettingsError, RedisError) as error:
            return [f"Redis does not tell which store this bus has: {error}"]
        return misgivings(identity, there)

    async def _agree(self) -> tuple[Identity, Registered]:
        link, openings = self._link, self._reader.openings
        identity, self._ahead = self._ahead, None
        if identity is None:
            identity = await self._reader.identity()
        try:
            check_owner(link.keys, link.address, identity)
            reply = await link.run("identity", [link.keys.identity], arguments(identity))
            there = Registered.of(reply)
            check_match(link.keys, link.address, identity, there)
        except IdentityMismatch as error:
            if not self.refused:
                logger.error("%s", error)
            self.refused = str(error)
            self._agreed, self._known = None, False
            self._on_refusal()
            raise
        if self.refused:
            logger.info("the store %s and the bus belong together again", identity.where)
        self.refused, self._known = "", True
        self._agreed = (there.bus, there.store, there.life, openings) if identity.bus is not None else None
        return identity, there

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY if self._known else _LEARN_EVERY)
            try:
                if self._agreed is None or await self._now() != self._agreed:
                    await self._agree()
            except (MnemobusError, RedisError, *AWAY) as error:
                logger.debug("who the store is will be found out later: %s", error)
            except Exception:
                logger.exception("reading the store's identity failed; going on")

    async def _now(self) -> tuple[str, str, str, int]:
        found = await self._link.command(
            "HMGET", self._link.keys.identity, "bus", "store", "life", pool=self._link.probe
        )
        bus, store, life = (value.decode() if value is not None else "" for value in found)
        return bus, store, life, self._reader.openings
