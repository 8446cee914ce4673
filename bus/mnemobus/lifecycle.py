"""The public face: one `Bus` per process, opened by `connect`. Its life cycle is here, and the hit in L1.

A write goes through writes.py to the log (log/publisher.py), and is pending (log/pending.py) until the store has it. A
read that L1 (cache/l1.py) does not answer at once goes through reads.py on to Redis and the store (cache/read_path.py).
What is read again is kept current from the log (live/), and the feed (feed/subscription.py) drops what went stale.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Literal

from .cache.l1 import MISS, Key, LocalCache
from .cache.l2 import SharedCache
from .cache.query import (
    GET,
    ROOM_SCOPES,
    Place,
    Question,
    cursor_of,
    limit_of,
    query_of,
    room_scope,
    scope_of,
    timeout_of,
)
from .cache.read_path import ReadPath
from .cache.shadow import Shadow
from .connection.link import Link
from .connection.server_errors import AWAY
from .errors import (
    BusClosed,
    IdentityMismatch,
    LogUnavailable,
    StoreError,
    StoreUnavailable,
    WrongLoop,
)
from .feed.subscription import Feed
from .health.checkup import Checkup
from .identity import Acquaintance
from .known import Known
from .live.scopes import LiveScopes
from .log.pending import PendingWrites, Write
from .log.publisher import forget_producers
from .memory import Context, Memories, Memory
from .reads import Reads
from .records import Row
from .settings import Settings
from .stats import Health, Stats
from .store import open_reader
from .tasks import end
from .tokens import Tokens
from .values import canonical_id
from .writes import KEEP, Durability, Keep, Receipt, Writes

logger = logging.getLogger("mnemobus")


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
        self._assemble()
        _buses.add(self)

    def _assemble(self) -> None:
        """Make its parts, none of which does anything before `open`."""
        settings = self.settings
        self.id = secrets.token_hex(8)
        """Names this bus among all that share its Redis: its producer id in the log."""
        self._link = Link(settings)
        self._reader = open_reader(settings)
        self._local = LocalCache(settings.local_max_entries, settings.local_max_bytes)
        self._shared = SharedCache(self._link, settings.lease)
        self._pending = PendingWrites(self._link)
        self._feed = Feed(self._link, self._local, self._pending, self.id)
        self._acquaintance = Acquaintance(self._link, self._reader, self._local.clear)
        self._live = LiveScopes(
            settings,
            self._link,
            self._local,
            self._shared,
            self._pending,
            self._ask,
            self._feed.join,
            self._feed.send,
            self._feed.wake,
            self._acquaintance.knows,
        )
        self._feed.live = self._live
        self._path = ReadPath(
            settings,
            self._link.keys,
            self._local,
            self._shared,
            self._feed,
            self._pending,
            self._acquaintance.knows,
            self._live,
        )
        known = Known(self._local)
        self._reads = Reads(self._reader, self._local, self._live, self._path, known, self._check_open)
        self._tokens = Tokens(self._link, self._pending, self._feed, self._local, self._check_open)
        self._writes = Writes(
            self.id,
            self._link,
            self._reader,
            self._local,
            self._live,
            self._pending,
            known,
            self._tokens,
            self.get,
            self._committed,
        )
        self._outbox = self._writes.outbox
        self._shadow = Shadow(settings, self._ask, self._local, self._shared, self._pending)
        self._checkup = Checkup(
            self._link,
            self._reader,
            self._local,
            self._feed,
            self._shared,
            self._shadow,
            self._outbox,
            self.id,
            self._acquaintance,
        )
        if self._outbox is not None:
            self._feed.heartbeat.on_good.append(self._outbox.hurry)
        self._state: Literal["new", "open", "closed", "forked"] = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        """That in which it was opened."""
        self._opening: list[asyncio.Task[Any]] = []
        self._closing: asyncio.Task[None] | None = None
        self._epochs = 0
        self._link.on_epoch.append(self._count_epoch)
        self._link.on_layout.append(self._tokens.forget_ended)

    def _fork(self) -> None:
        """Called in a child process, for what it has inherited."""
        if self._state == "new":
            on_drop = self.on_drop
            self._assemble()  # under an id of its own: the log takes two processes of one id for one
            self.on_drop = on_drop
        elif self._closing is None or not self._closing.done():
            self._state = "forked"
            self._local.stop()
            # Connections, files and locks are the parent's. Whatever is done with them here, closing them when they
            # are forgotten included, would harm it. So they are never forgotten.
            _keep_forever(self)

    # Life

    async def open(self) -> None:
        """Connect. Done by ``async with``.

        A Redis or a store that is away is no error (the bus degrades, and recovers), both are. A Redis that is not
        fit for use (it could evict the log, refuses the login, is laid out differently) is a SettingsError.
        """
        if self._state == "forked":
            raise self._elsewhere()
        if self._state != "new":
            raise BusClosed("a bus is opened once; connect() gives a new one")
        self._loop = asyncio._get_running_loop()
        if self._loop is None:
            raise WrongLoop("a bus needs an event loop of asyncio (or uvloop's), and none is running here")
        self._shadow.loop = self._loop
        self._state = "open"
        redis, store = asyncio.create_task(self._open_redis()), asyncio.create_task(self._open_store())
        self._opening = [redis, store]
        try:
            redis_error, store_error = await asyncio.gather(redis, store)
            if redis_error is not None and store_error is not None:
                raise StoreUnavailable(
                    f"neither Redis ({self._link.address}: {redis_error}) nor the store ({store_error}) can be"
                    " reached"
                )
            for what, error in (("Redis", redis_error), ("the store", store_error)):
                if error is not None:
                    logger.warning("%s is away, going on without it: %s", what, error)
            await self._acquaintance.start()
            if self._outbox is not None:
                await self._outbox.open()
        except BaseException as error:
            closed = self._closing is not None
            await self.close()
            task = asyncio.current_task()
            if closed and isinstance(error, asyncio.CancelledError) and not (task and task.cancelling()):
                raise BusClosed("the bus was closed while it was being opened") from None
            raise

    async def _open_redis(self) -> Exception | None:
        away = None
        try:
            self._link.pool.give_back(await self._link.pool.take())
        except AWAY as error:
            away = error
        await self._link.start()
        await self._feed.start()
        return away

    async def _open_store(self) -> Exception | None:
        try:
            await self._reader.open()
        except StoreUnavailable as error:
            return error
        try:
            await self._acquaintance.look()
        except StoreError as error:
            logger.debug("who the store is will be asked again: %s", error)
        return None

    async def close(self) -> None:
        """Publish what is queued, then close everything. Done by ``async with``; safe to repeat.

        Calls that wait for a write to be committed, or for what a token names, raise BusClosed at once.

        If it is cancelled, the bus goes on closing; a repeated call waits for that.
        """
        if self._state == "forked" or (
            self._loop is not asyncio._get_running_loop()
            and self._state != "new"
            and not (self._closing is not None and self._closing.done())
        ):
            raise self._elsewhere()
        if self._closing is None:
            self._state = "closed"
            self._pending.stop()
            self._feed.stop()
            self._closing = asyncio.create_task(self._close(), name="mnemobus-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        # Where one of them fails or is cancelled, the other may be at it yet, and would begin what nobody ends.
        await end(self._opening)
        async with AsyncExitStack() as steps:  # the last one first, and each whatever comes of the others
            steps.push_async_callback(self._link.close)
            steps.push_async_callback(self._close_store)
            steps.callback(self._local.stop)
            steps.push_async_callback(self._feed.close)
            steps.push_async_callback(self._acquaintance.close)
            steps.push_async_callback(self._pending.close)
            steps.push_async_callback(forget_producers, self._link, self._writes.publishers)
            steps.push_async_callback(self._shadow.close)
            if self._outbox is not None:
                steps.push_async_callback(self._outbox.close, self.settings.write_timeout)
            steps.push_async_callback(self._writes.publishers.close)

    async def _close_store(self) -> None:
        with suppress(StoreError):
            await self._reader.close()

    async def __aenter__(self) -> Bus:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        """That the bus may be used, here: of every call but a hit in L1, which needs no loop. IdentityMismatch if
        its store turned out to be another's."""
        self._check_state()
        if self._acquaintance.refused:
            raise IdentityMismatch(self._acquaintance.refused)

    def _check_state(self) -> None:
        self._check_process()
        if self._state != "open":
            raise BusClosed(f"the bus is {'closed' if self._state == 'closed' else 'not open yet'}")
        if asyncio._get_running_loop() is not self._loop:
            raise self._elsewhere()

    def _check_process(self) -> None:
        if self._state == "forked":
            raise self._elsewhere()

    def _elsewhere(self) -> WrongLoop:
        if self._state == "forked":
            return WrongLoop(
                "the bus was opened before this process was forked, and belongs to its parent. Open a bus in each"
                " process, after the fork"
            )
        ended = self._loop is not None and self._loop.is_closed()
        return WrongLoop(
            f"the bus was opened in another event loop{', which has ended' if ended else ''}. A bus belongs to the loop"
            " in which it is opened: open one in each, or hand calls over with asyncio.run_coroutine_threadsafe()"
        )

    def _count_epoch(self, epoch: str) -> None:
        self._epochs += 1

    @property
    def on_drop(self) -> Callable[[str], None] | None:
        """Called with each scope whose cached results were just dropped; for measuring. Must not raise."""
        return self._local.on_drop

    @on_drop.setter
    def on_drop(self, callback: Callable[[str], None] | None) -> None:
        self._local.on_drop = callback

    # Writes

    async def write(self, memory: Memory, *, durability: Durability | None = None) -> Receipt:
        """Log a memory, new or as a whole in place of what has its id.

        durability: "logged" (the default, see MNEMOBUS_DURABILITY): it is in the log; "synced": and on disk or on a
        replica there; "committed": and in the store.

        Raises InvalidMemory, which names the field, before anything leaves the process; WriteFailed if the log does
        not take it.
        """
        self._check_open()
        return await self._writes.write(memory, durability)

    async def write_many(
        self, memories: Iterable[Memory], *, durability: Durability | None = None
    ) -> list[Receipt]:
        """Log memories; receipts in the order given. One publish per partition of the log.

        All are validated before the first is logged. Not a transaction: if it raises WriteFailed, memories of
        other partitions may have been logged.
        """
        self._check_open()
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
        """Change what is given, and nothing else, of a memory; ``embedding=None`` removes its embedding.

        Two agents that update different fields at once both win. Raises MemoryNotFound if there is no such memory, as
        far as this bus has heard (a deletion that comes before the update in the log, and is heard of later, leaves it
        without effect); NotCommitted if that can't be known now; else as `write`.
        """
        self._check_open()
        return await self._writes.update(id, content, metadata, embedding, durability)

    async def delete(self, id: str, *, durability: Durability | None = None) -> Receipt | None:
        """Delete a memory; None if there is none with this id.

        What this bus has written counts, whether or not it is in the store yet. Raises NotCommitted if it can't be
        known now whether that is one of them; else as `write`.
        """
        [receipt] = await self.delete_many([id], durability=durability)
        return receipt

    async def delete_many(
        self, ids: Iterable[str], *, durability: Durability | None = None
    ) -> list[Receipt | None]:
        """Delete memories; for each id, in order, a receipt, or None if there is no such memory."""
        self._check_open()
        return await self._writes.delete_many(ids, durability)

    async def delete_room(self, table: str, *, room: str, durability: Durability | None = None) -> Receipt:
        """Delete all of a table's memories in a room, also those logged before and not committed yet."""
        self._check_open()
        return await self._writes.delete_room(table, room, durability)

    async def _committed(self, write: Write, timeout: float) -> None:
        if self._state == "closed" and not write.applied:
            raise BusClosed(
                "the bus was closed before the store was known to have the write; what is in the log or the outbox"
                " goes on from there"
            )
        self._check_open()
        await self._pending.wait(write, timeout)

    # Reads

    async def get(self, id: str) -> Memory | None:
        """The memory with this id, or None.

        From the nearest tier that has it and may answer. Raises StoreUnavailable if none can.
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

        ``before`` and ``after`` page: pass the last memory of one page to get the next. Memories with the same date
        are in the order of their ids, so that paging neither repeats nor misses one. With ``after`` alone the
        answer holds those nearest to it.

        Raises InvalidQuery, or StoreUnavailable if no tier can answer.
        """
        if type(limit) is not int:  # True is 1 to a cache
            limit = limit_of(limit)
        key: Key = limit  # nothing else: what is asked for in nearly every case makes no tuple
        narrower = entity is not None or agent is not None or world is not None
        if room is not None and not narrower and before is None and after is None:
            try:
                scope = ROOM_SCOPES[table][room]
            except (KeyError, TypeError, ValueError):
                scope = room_scope(table, room)
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

    def _hit(self, table: str, *, room: str | None = None, entity: str | None = None, limit: int) -> Any:
        """What L1 answers to `recent` of a room or of an entity; MISS if it can't."""
        if type(limit) is not int:
            return MISS
        if entity is not None:
            return self._local.hit(scope_of(table, None, entity, None, None), (limit, entity, None, None))
        return self._local.hit(scope_of(table, room, None, None, None), limit)

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
        self, *, room: str, entity: str | None = None, messages: int = 5, facts: int = 6
    ) -> Context:
        """What an agent needs at the start of a turn, read at once.

        The newest of table "messages" in the room, and of table "facts" about the entity (in the room, where no
        entity is given).
        """
        about: dict[str, Any] = {"room": room} if entity is None else {"entity": entity}
        said = self._hit("messages", room=room, limit=messages)
        known = self._hit("facts", **about, limit=facts)
        if said is MISS and known is MISS:
            said, known = await asyncio.gather(
                self.recent("messages", room=room, limit=messages),
                self.recent("facts", **about, limit=facts),
            )
        elif said is MISS:
            said = await self.recent("messages", room=room, limit=messages)
        elif known is MISS:
            known = await self.recent("facts", **about, limit=facts)
        return Context(said, known)

    async def _ask(self, question: Question) -> list[Row] | int:
        return await question.ask(self._reader)

    # Across agents

    def token(self) -> str:
        """What another bus needs to `observe` all that this one has written and observed so far.

        Raises LogUnavailable while writes wait in the outbox: they have no version yet that could be waited for.
        """
        self._check_process()
        if self._outbox is not None and self._outbox.waiting:
            raise LogUnavailable(
                f"{self._outbox.waiting} writes wait in the outbox: a token can't name them yet"
            )
        return self._tokens.token()

    async def observe(self, token: str, timeout: float = 5.0) -> None:
        """Return once every query of this bus sees what the bus that made the token had written by then.

        Raises NotCommitted after ``timeout`` seconds, InvalidQuery for a token that is none.
        """
        self._check_open()
        await self._tokens.observe(token, timeout_of(timeout))

    # What it tells of itself

    def stats(self) -> Stats:
        """Figures since the bus was opened."""
        self._check_process()
        local, shared, feed, path = self._local, self._shared, self._feed, self._path
        publishers = self._writes.publishers
        return Stats(
            hits_local=local.hits,
            hits_shared=shared.hits,
            misses=path.misses + self._live.misses,
            shared_loads=path.shared_loads + self._live.shared_loads,
            stale_reads=path.stale_reads,
            own_write_waits=path.own_write_waits,
            own_write_timeouts=path.own_write_timeouts,
            entries=local.entries,
            bytes=local.bytes,
            drops=local.drops,
            evictions=local.evictions,
            fills=shared.fills,
            refused_fills=shared.refused_fills,
            writes=sum(p.events for p in (publishers, *publishers)),
            publish_calls=sum(p.calls for p in (publishers, *publishers)),
            publish_retries=sum(p.retries for p in (publishers, *publishers)),
            outbox=0 if self._outbox is None else self._outbox.waiting,
            outboxed=0 if self._outbox is None else self._outbox.kept,
            marks=len(self._pending),
            listening=feed.listening,
            invalidations=feed.invalidations,
            gaps=feed.positions.gaps,
            replays=feed.heartbeat.replays,
            resets=feed.positions.resets,
            reconnects=feed.reconnects,
            epochs=self._epochs,
            bad_messages=feed.bad_messages,
            failed_heartbeats=feed.heartbeat.failures,
            restarted_tasks=feed.restarted_tasks,
            live_windows=len(self._live),
            live_channels=len(self._live.listener),
            live_reads=self._live.reads,
            live_events=self._live.listener.events,
            live_gaps=self._live.listener.gaps,
            live_repairs=self._live.listener.repairs,
            live_lost=self._live.listener.lost,
            live_opened=self._live.opened,
            shadow_reads=self._shadow.reads,
            breaches_local=self._shadow.breaches_local,
            breaches_shared=self._shadow.breaches_shared,
        )

    async def health(self, timeout: float = 2.0) -> Health:
        """How the bus is, now: asks Redis and the store, for ``timeout`` seconds at most. Raises only BusClosed, and
        InvalidQuery for a timeout that is no number."""
        self._check_state()
        return await self._checkup.health(timeout_of(timeout))


_buses: weakref.WeakSet[Bus] = weakref.WeakSet()
"""All that there are in this process."""


def _after_fork() -> None:
    for bus in list(_buses):
        bus._fork()


def _at_exit() -> None:
    """A bus that nobody closed ends with the process. To take it apart would be of no use, and its tasks and
    connections would complain of it, each with a traceback."""
    for bus in list(_buses):
        if bus._state == "open":
            _keep_forever(bus)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def _keep_forever(thing: object) -> None:
    """Have the interpreter not forget an object, nor what it refers to, even as it ends."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


__all__ = ["KEEP", "Bus", "Receipt", "connect"]
