"""The public face: one `Bus` per process, opened by `connect`.

Each call goes on in the part that it concerns: a write in writes.py, a read in reads.py, a token in tokens.py. Only the
hit in L1 is here, because a further call would cost as much as the hit itself. docs/walk.md follows a write and a read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from .cache.l1 import MISS, Key
from .cache.query import (
    GET,
    ROOM_SCOPES,
    Place,
    cursor_of,
    limit_of,
    query_of,
    scope_of,
    scope_of_room,
    timeout_of,
)
from .context import CHAT_ROOM, Context, Profile, read_context
from .lifecycle import LifeCycle
from .memory import Memories, Memory
from .parts import BusParts
from .settings import Settings
from .stats import Health, Stats
from .values import canonical_id
from .writes import KEEP, Durability, Keep, Receipt


def connect(**settings: Any) -> Bus:
    """A bus, to be used as ``async with mnemobus.connect() as bus``.

    Settings come from the environment and ``.env``; keywords, named as the fields of
    :class:`mnemobus.Settings`, override them. Raises SettingsError that names the variable.
    """
    return Bus(Settings.load(**settings))


class Bus:
    """An agent's way to its memories. One per event loop; tasks share it.

    It belongs to the event loop in which it is opened. In any other, in another thread or after a fork, calls raise
    WrongLoop. A bus that is not open yet may be forked: each process then opens a bus of its own.

    Any call may be cancelled at any time. A cancelled write may or may not have been logged; the bus
    behaves as if it had been.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._life = LifeCycle(settings, self._use)

    def _use(self, parts: BusParts) -> None:
        """Have the parts at hand: a call, and a hit above all, makes no detour. Tests look at the others."""
        self._parts = parts
        self.id = parts.id
        """Names this bus among all that share its Redis: its producer id in the log."""
        self._local, self._reads, self._writes, self._tokens = (
            parts.local,
            parts.reads,
            parts.writes,
            parts.tokens,
        )
        self._link, self._reader, self._shared, self._path = (
            parts.link,
            parts.reader,
            parts.shared,
            parts.path,
        )
        self._pending, self._outbox, self._feed, self._live = (
            parts.pending,
            parts.outbox,
            parts.feed,
            parts.live,
        )
        self._checkup, self._shadow, self._acquaintance = parts.checkup, parts.shadow, parts.acquaintance

    # Life

    async def open(self) -> None:
        """Connect. Done by ``async with``.

        If either Redis or the store can't be reached, the bus opens without it and recovers later. Raises
        StoreUnavailable if neither can be reached; SettingsError if Redis is not fit for use (it could evict the log,
        refuses the login, does not fit the settings); IdentityMismatch if the store is another bus's.
        """
        await self._life.open()

    async def close(self) -> None:
        """Publish what is queued, then close everything. Done by ``async with``; safe to repeat.

        Calls that wait for a write to be committed, or for what a token names, raise BusClosed at once.

        If this call is cancelled, the bus closes all the same; a repeated call waits until it has.
        """
        await self._life.close()

    async def __aenter__(self) -> Bus:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def on_drop(self) -> Callable[[str], None] | None:
        """Called with each scope whose cached results were just dropped; for measuring. Must not raise."""
        return self._local.on_drop

    @on_drop.setter
    def on_drop(self, callback: Callable[[str], None] | None) -> None:
        self._local.on_drop = callback

    # Writes

    async def write(self, memory: Memory, *, durability: Durability | None = None) -> Receipt:
        """Log a memory: a new one, or one that replaces the memory with its id as a whole.

        durability  when the call returns. "logged" (the default, see MNEMOBUS_DURABILITY): the write is in the log;
                    "synced": it is also on the disk of Redis, or on a replica; "committed": it is also in the store

        Raises InvalidMemory, which names the field, before anything leaves the process; WriteFailed if the log does
        not take the write.
        """
        self._life.check()
        return await self._writes.write(memory, durability)

    async def write_many(
        self, memories: Iterable[Memory], *, durability: Durability | None = None
    ) -> list[Receipt]:
        """Log memories; receipts in the order given. One publish per partition of the log.

        All are validated before the first is logged. This is no transaction: if it raises WriteFailed, memories of
        other partitions may be in the log.
        """
        self._life.check()
        return await self._writes.write_many(memories, durability)

    async def update(
        self,
        id: str,
        *,
        content: Mapping[str, Any] | Keep = KEEP,
        metadata: Mapping[str, Any] | Keep = KEEP,
        embedding: Sequence[float] | Keep | None = KEEP,
        durability: Durability | None = None,
    ) -> Receipt:
        """Change the given fields of a memory, and no others; ``embedding=None`` removes its embedding.

        If two agents update different fields at once, both changes stay. Raises MemoryNotFound if this bus knows of no
        such memory; NotCommitted if that can't be known now; and what `write` raises. If a deletion comes before the
        update in the log, and this bus has not heard of it yet, the update has no effect.
        """
        self._life.check()
        return await self._writes.update(id, content, metadata, embedding, durability)

    async def delete(self, id: str, *, durability: Durability | None = None) -> Receipt | None:
        """Delete a memory; None if there is none with this id.

        Writes of this bus count, even if they are not in the store yet. Raises NotCommitted if it can't be known now
        whether there is such a memory; and what `write` raises.
        """
        [receipt] = await self.delete_many([id], durability=durability)
        return receipt

    async def delete_many(
        self, ids: Iterable[str], *, durability: Durability | None = None
    ) -> list[Receipt | None]:
        """Delete memories; for each id, in order, a receipt, or None if there is no such memory."""
        self._life.check()
        return await self._writes.delete_many(ids, durability)

    async def delete_room(self, table: str, *, room: str, durability: Durability | None = None) -> Receipt:
        """Delete all memories of a table in a room, including those that are logged and not committed yet."""
        self._life.check()
        return await self._writes.delete_room(table, room, durability)

    # Reads

    async def get(self, id: str) -> Memory | None:
        """The memory with this id, or None.

        It comes from the nearest tier that has it and is current. Raises StoreUnavailable if no tier can answer.
        """
        try:
            found = self._local.hit(id, GET)
        except (TypeError, ValueError):  # a list, say: `canonical_id` tells
            found = MISS
        if found is not MISS:
            return found  # type: ignore[no-any-return]
        return await self._reads.get(canonical_id(id))

    async def recent(
        self,
        table: str,
        *,
        room: str | None = None,
        entity: str | None = None,
        agent: str | None = None,
        world: str | None = None,
        limit: int = 20,
        before: Place | None = None,
        after: Place | None = None,
    ) -> Memories:
        """The newest ``limit`` memories of a table that match every dimension given, newest first.

        ``before`` and ``after`` are for pages: pass the last memory of one page to get the next. Each is a memory, a
        datetime, or a datetime and an id. Memories with the same date are in the order of their ids, so no page repeats
        or misses one. With ``after`` alone, the answer has the memories that follow it directly.

        Raises InvalidQuery, which names the argument; StoreUnavailable if no tier can answer.
        """
        if type(limit) is not int:  # True is 1 to a cache
            limit = limit_of(limit)
        key: Key = limit  # nothing else: what is asked for in nearly every case makes no tuple
        narrower = entity is not None or agent is not None or world is not None
        if room is not None and not narrower and before is None and after is None:
            try:
                scope = ROOM_SCOPES[table][room]
            except (KeyError, TypeError, ValueError):
                scope = scope_of_room(table, room)
        else:
            scope = scope_of(table, room, entity, agent, world)
            key = (limit, entity, agent, world)
            if before is not None or after is not None:
                key = (limit, entity, agent, world, cursor_of(before), cursor_of(after, last=True))
        found = self._local.hit(scope, key)
        if found is not MISS:
            return found  # type: ignore[no-any-return]
        query = query_of(table, room, entity, agent, world, before, after)
        return await self._reads.recent(scope, key, query, limit)

    async def count(
        self,
        table: str,
        *,
        room: str | None = None,
        entity: str | None = None,
        agent: str | None = None,
        world: str | None = None,
        before: Place | None = None,
        after: Place | None = None,
    ) -> int:
        """How many memories of a table match every dimension given. Raises as `recent`."""
        scope = scope_of(table, room, entity, agent, world)
        query = query_of(table, room, entity, agent, world, before, after)
        key = ("count", query)
        found = self._local.hit(scope, key)
        if found is not MISS:
            return found  # type: ignore[no-any-return]

        return await self._reads.count(scope, key, query)

    async def context(
        self,
        profile: Profile = CHAT_ROOM,
        *,
        room: str | None = None,
        entity: str | None = None,
        agent: str | None = None,
        world: str | None = None,
        **limits: int,
    ) -> Context:
        """What an agent needs at the start of a turn, read at once: the newest memories of each table of a profile.

        ``limits`` are other numbers for some of its tables: ``bus.context(room="r1", messages=20)``. By default that is
        the last 5 of table "messages" in the room, and of "facts" the last 6 about the entity, or in the room where no
        entity is named.

        Raises InvalidQuery if the profile asks for a dimension that is not named; else what `recent` raises.
        """
        if limits:
            profile = profile.with_limits(limits)
        named = {"room": room, "entity": entity, "agent": agent, "world": world}
        return await read_context(profile, named, self._local.hit, self.recent)

    # Across agents

    def token(self) -> str:
        """A token for another bus, which can `observe` all that this bus has written and observed so far.

        Raises LogUnavailable while writes wait in the outbox: they have no version yet that the other bus could wait
        for.
        """
        self._life.check_process()
        self._writes.check_versions()
        return self._tokens.token()

    async def observe(self, token: str, timeout: float = 5.0) -> None:
        """Return once every query of this bus sees what the bus that made the token had written by then.

        Raises NotCommitted after ``timeout`` seconds, InvalidQuery for a token that is none.
        """
        self._life.check()
        await self._tokens.observe(token, timeout_of(timeout))

    # Figures and health

    def stats(self) -> Stats:
        """Figures since the bus was opened."""
        self._life.check_process()
        return self._parts.stats()

    async def health(self, timeout: float = 2.0) -> Health:
        """The health of the bus now. It asks Redis and the store, for ``timeout`` seconds at most.

        Raises only BusClosed, WrongLoop, and InvalidQuery for a timeout that is not a number."""
        self._life.check_state()
        return await self._checkup.health(timeout_of(timeout))


__all__ = ["KEEP", "Bus", "Receipt", "connect"]
