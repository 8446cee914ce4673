"""The public face: one `Bus` per process, opened by `connect`.

A write goes to the log (log/publisher.py) and leaves marks on what it touches (log/pending.py). A read looks in this
process (cache/l1.py), then goes on to Redis and the store (cache/read_path.py). What is read again is kept current from
the log (live/), and the feed (feed/subscription.py) drops what went stale.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import binascii
import logging
import os
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Final, Literal

import orjson
from redis.exceptions import RedisError

from .cache.l1 import MISS, LocalCache
from .cache.l2 import SharedCache
from .cache.query import (
    COUNT,
    GET,
    GET_FIELD,
    MANY,
    ONE,
    ROOM_SCOPES,
    Place,
    Plan,
    Question,
    cursor_of,
    field_of,
    limit_of,
    query_of,
    room_scope,
    scope_of,
    timeout_of,
)
from .cache.read_path import Tiers
from .cache.shadow import Shadow
from .connection.link import Link
from .connection.server_errors import AWAY
from .errors import (
    BusClosed,
    DimensionChanged,
    DurabilityUnavailable,
    IdentityMismatch,
    InvalidMemory,
    InvalidQuery,
    LogUnavailable,
    MemoryNotFound,
    NotCommitted,
    SettingsError,
    StoreError,
    StoreUnavailable,
    WrongLoop,
)
from .feed.subscription import Feed
from .health.checkup import Checkup
from .identity import Acquaintance
from .keys import (
    Dimensions,
    Version,
    id_scope,
)
from .live.scopes import LiveScopes
from .log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event
from .log.outbox import Outbox
from .log.pending import Marks, Write
from .log.publisher import Publishers, Syncer, forget_producers, last_pending
from .memory import (
    Context,
    Memories,
    Memory,
    Row,
    canonical_id,
    check_dimensions,
    check_size,
    encode,
    encode_embedding,
    encode_object,
)
from .settings import Settings
from .stats import Health, Stats
from .store import Query, open_reader
from .tasks import end

logger = logging.getLogger("mnemobus")

Durability = Literal["logged", "synced", "committed"]
MAX_LIMIT = 10_000
"""Memories that one query returns at most."""
_KNOWN_DIMENSIONS = 10_000
"""Memories whose dimensions a bus remembers."""

_LOOKUPS = 256
"""Memories that a call looks up at once: they share the pool with all other calls."""


_KNOWN_TABLES = 1_000
"""Tables whose embeddings' length a bus remembers."""


def _keep(lengths: dict[str, int], table: str, length: int) -> None:
    if len(lengths) >= _KNOWN_TABLES and table not in lengths:
        del lengths[next(iter(lengths))]
    lengths[table] = length


class _Keep:
    def __repr__(self) -> str:
        return "KEEP"


KEEP: Final = _Keep()
"""In place of a field that :meth:`Bus.update` shall leave as it is."""


class Receipt:
    """A write that is in the log, or in the outbox on its way there.

    id  of the memory; of the room for `delete_room`
    """

    __slots__ = ("_bus", "_write", "id")

    def __init__(self, bus: Bus, id: str, write: Write) -> None:
        self._bus = bus
        self._write = write
        self.id = id

    @property
    def version(self) -> Version | None:
        """What the log gave the write; None while it waits in the outbox."""
        return self._write.version

    @property
    def outboxed(self) -> bool:
        """Whether the write waits in the outbox, because the log could not be reached."""
        return self._write.version is None

    async def committed(self, timeout: float = 5.0) -> None:
        """Return once the store has the write.

        Raises NotCommitted after ``timeout`` seconds (the write is in the log or the outbox, and will get there) and
        WriteRejected if it went to the dead letters.
        """
        await self._bus._committed(self._write, timeout_of(timeout))

    def __repr__(self) -> str:
        return f"Receipt(id={self.id!r}, version={str(self.version)!r})"


def connect(**settings: Any) -> Bus:
    """A bus, to be used as ``async with mnemobus.connect() as bus``.

    Settings come from the environment and ``.env``; keywords, named as the fields of
    :class:`mnemobus.Settings`, override them. Raises SettingsError that names the variable.
    """
    return Bus(Settings.load(**settings))


class Bus:
    """An agent's way to its memories. One per event loop; tasks share it.

    It belongs to the event loop in which it is opened. In any other, in another thread or after a fork, calls raise
    WrongLoop. One that is not yet open may be forked: each process then opens a bus of its own.

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
        self._marks = Marks(self._link)
        self._feed = Feed(self._link, self._local, self._marks, self.id)
        self._acquaintance = Acquaintance(self._link, self._reader, self._local.clear)
        self._live = LiveScopes(
            settings,
            self._link,
            self._local,
            self._shared,
            self._marks,
            self._ask,
            self._feed.join,
            self._feed.send,
            self._feed.wake,
            self._acquaintance.knows,
        )
        self._feed.live = self._live
        self._tiers = Tiers(
            settings,
            self._link.keys,
            self._local,
            self._shared,
            self._feed,
            self._marks,
            self._acquaintance.knows,
            self._live,
        )
        self._shadow = Shadow(settings, self._ask, self._local, self._shared, self._marks)
        self._outbox = (
            None
            if settings.outbox == "off"
            else Outbox(self._link, self.id, self._kept, self._published, self._marks.landed)
        )
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
            self._feed.on_good.append(self._outbox.hurry)
        self._publishers = Publishers(self._link, self.id, self._logged, self._outbox)
        self._syncer = Syncer(self._link)
        self._dimensions: OrderedDict[str, Dimensions] = OrderedDict()
        self._deleted: set[str] = set()
        """Those of them that this bus deleted."""
        self._embedding_lengths: dict[str, int] = {}
        """By table, as the store told them: they never change any more."""
        self._own_embeddings: dict[str, int] = {}
        """By table, those that this bus wrote before the store had any."""
        self._seen: dict[int, Version] = {}
        """The last version that this bus wrote or observed, by log partition: its token."""
        self._state: Literal["new", "open", "closed", "forked"] = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        """That in which it was opened."""
        self._opening: list[asyncio.Task[Any]] = []
        self._closing: asyncio.Task[None] | None = None
        self._epochs = 0
        self._link.on_epoch.append(self._count_epoch)
        self._link.on_layout.append(self._on_layout)

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
        """Publish what is queued, then let go of everything. Done by ``async with``; safe to repeat.

        Who waits for a write to be committed, or for what a token names, gets BusClosed at once.

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
            self._marks.stop()
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
            steps.push_async_callback(self._marks.close)
            steps.push_async_callback(forget_producers, self._link, self._publishers)
            steps.push_async_callback(self._shadow.close)
            if self._outbox is not None:
                steps.push_async_callback(self._outbox.close, self.settings.write_timeout)
            steps.push_async_callback(self._publishers.close)

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

    def _on_layout(self) -> None:
        for partition in [p for p in self._seen if p < self._link.keys.shape.oldest]:
            del self._seen[partition]  # all of it is applied

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
        lengths: dict[str, int] = {}
        [receipt] = await self._publish([await self._put(memory, lengths)], durability, lengths)
        return receipt

    async def write_many(
        self, memories: Iterable[Memory], *, durability: Durability | None = None
    ) -> list[Receipt]:
        """Log memories; receipts in the order given. One publish per partition of the log.

        All are validated before the first is logged. Not a transaction: if it raises WriteFailed, memories of
        other partitions may have been logged.
        """
        self._check_open()
        events = []
        lengths: dict[str, int] = {}
        for index, memory in enumerate(memories):
            try:
                events.append(await self._put(memory, lengths))
            except InvalidMemory as error:
                raise type(error)(f"memories[{index}].{error.field}", error.reason) from None
        return await self._publish(events, durability, lengths)

    async def _put(self, memory: Memory, lengths: dict[str, int]) -> Event:
        row = encode(memory, self.settings.max_memory_bytes)
        event = Event.put(row)
        known = self._known_dimensions(row.id)
        if known is not None and known != event.dimensions:
            await self._check_dimensions(row.id, event.dimensions)
        if row.embedding is not None:
            await self._check_embedding(row.table, row.embedding, lengths)
        return event

    async def _check_dimensions(self, id: str, given: Dimensions) -> None:
        """DimensionChanged if there is such a memory, with others. One that was deleted may be made again with any."""
        if id in self._deleted and not await self._marks.settle(id_scope(id)):
            # Its room may be in another log partition: the new one could come before the deletion.
            raise DimensionChanged(
                "id", f"{id} is being deleted; to make it again elsewhere, wait until that is committed"
            )
        known = await self._find_dimensions(id, there=True)
        if known is None:
            return
        for name, before, now in zip(Dimensions._fields, known, given, strict=True):
            if before != now:
                raise DimensionChanged(
                    name,
                    f"is {before!r} and would become {now!r}; dimensions never change while a memory is there:"
                    " use a new id, or delete it first",
                )

    async def _check_embedding(self, table: str, embedding: bytes, lengths: dict[str, int]) -> None:
        """InvalidMemory if its table's embeddings are of another length.

        lengths: by table, those of the same call, which count once it is published
        """
        given = len(embedding) // 4
        length = self._embedding_lengths.get(table)
        if length is None:
            length = lengths.get(table) or self._own_embeddings.get(table)
            if length != given:
                with suppress(StoreError):  # then it is left to the worker
                    stored = await self._reader.embedding_length(table)
                    if stored is not None:
                        length = stored
                        _keep(self._embedding_lengths, table, stored)
                        self._own_embeddings.pop(table, None)
        if length is not None and length != given:
            raise InvalidMemory("embedding", f"{given} floats, but those of table {table!r} have {length}")
        lengths[table] = given

    async def update(
        self,
        id: str,
        *,
        content: Mapping[str, Any] | _Keep = KEEP,
        metadata: Mapping[str, Any] | _Keep = KEEP,
        embedding: Sequence[float] | _Keep | None = KEEP,
        durability: Durability | None = None,
    ) -> Receipt:
        """Change what is given, and nothing else, of a memory; ``embedding=None`` removes its embedding.

        Two agents that update different fields at once both win. Raises MemoryNotFound if there is no such memory, as
        far as this bus has heard (a deletion that comes before the update in the log, and is heard of later, leaves it
        without effect); NotCommitted if that can't be known now; else as `write`.
        """
        self._check_open()
        id = canonical_id(id)
        if content is KEEP and metadata is KEEP and embedding is KEEP:
            raise InvalidMemory("update", "give content, metadata or embedding")
        new_content = None if isinstance(content, _Keep) else encode_object("content", content)
        new_metadata = None if isinstance(metadata, _Keep) else encode_object("metadata", metadata)
        new_embedding = None if isinstance(embedding, _Keep) else (encode_embedding(embedding) or b"")
        dimensions = await self._find_dimensions(id, there=True)
        if dimensions is None:
            raise MemoryNotFound(f"there is no memory {id}")
        row = Row(id, *dimensions, new_content or b"", new_metadata or b"", new_embedding, 0, Version(0, 0))
        check_size(row, self.settings.max_memory_bytes)
        lengths: dict[str, int] = {}
        if new_embedding:
            await self._check_embedding(dimensions.table, new_embedding, lengths)
        event = Event(UPDATE, dimensions, id, new_content, new_metadata, new_embedding)
        [receipt] = await self._publish([event], durability, lengths)
        return receipt

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
        names = [canonical_id(id) for id in ids]
        found: list[Dimensions | None] = []
        for start in range(0, len(names), _LOOKUPS):
            found += await asyncio.gather(*map(self._find_dimensions, names[start : start + _LOOKUPS]))
        events = [
            Event(DELETE, dimensions, id)
            for id, dimensions in zip(names, found, strict=True)
            if dimensions is not None
        ]
        receipts = iter(await self._publish(events, durability))
        return [None if dimensions is None else next(receipts) for dimensions in found]

    async def delete_room(self, table: str, *, room: str, durability: Durability | None = None) -> Receipt:
        """Delete all of a table's memories in a room, also those logged before and not committed yet."""
        self._check_open()
        dimensions = Dimensions(table, room)
        check_dimensions(dimensions)
        [receipt] = await self._publish([Event(DELETE_ROOM, dimensions)], durability)
        return receipt

    async def _publish(
        self,
        events: Sequence[Event],
        durability: Durability | None,
        embedding_lengths: Mapping[str, int] | None = None,
    ) -> list[Receipt]:
        if durability is None:
            durability = self.settings.durability
        if not isinstance(durability, str) or durability not in ("logged", "synced", "committed"):
            raise InvalidQuery(f"durability must be logged, synced or committed, not {durability!r}")
        if durability == "synced":
            self._syncer.check()
        futures = self._publishers.publish(events)
        epoch = self._link.epoch
        writes: list[Any] = [None] * len(events)
        try:
            for indexes, parts in futures:
                at = iter(indexes)
                for part in parts:
                    for write in await part:
                        writes[next(at)] = write
        except (LogUnavailable, asyncio.CancelledError):
            # Any of them may have been logged, or be logged yet: what they touch is not to be trusted.
            for event in events:
                self._drop(event)
            raise
        for table, length in (embedding_lengths or {}).items():
            if table not in self._embedding_lengths:
                _keep(self._own_embeddings, table, length)
        receipts = [
            Receipt(self, event.id or event.dimensions.room, write)
            for event, write in zip(events, writes, strict=True)
        ]
        if durability == "synced":
            if any(write.version is None for write in writes):
                raise DurabilityUnavailable(
                    "the log can't be reached: the write is in the outbox, and will be logged, but is not synced"
                )
            if writes:
                await self._syncer.sync()
            if epoch and epoch != self._link.epoch:
                raise DurabilityUnavailable(
                    "Redis failed over or restarted before the write was synced: it may be lost"
                )
        elif durability == "committed":
            await asyncio.gather(*(receipt.committed(self.settings.write_timeout) for receipt in receipts))
        return receipts

    def _logged(
        self,
        partition: int,
        event: Event,
        version: Version | None,
        previous: tuple[Version, ...] | None = None,
    ) -> Write:
        """A write of this bus is in the log: nothing that it touches may be answered without it."""
        scopes = self._drop(event)
        if version is None:
            self._live.outboxed(event)
        else:
            self._live.answered(partition, event, version, previous)
        deadline = asyncio.get_running_loop().time() + self.settings.own_write_timeout
        everywhere = event.op == DELETE_ROOM
        write = self._marks.mark(partition, version, scopes, deadline, everywhere=everywhere)
        if version is not None:
            self._saw(partition, version)
        if event.op == DELETE_ROOM:
            room = (event.dimensions.table, event.dimensions.room)
            self._deleted.update(id for id, known in self._dimensions.items() if known[:2] == room)
        else:
            self._remember_dimensions(event)
        return write

    def _kept(self, partition: int, event: Event) -> Write:
        """A write of this bus is in the outbox: the same holds."""
        return self._logged(partition, event, None)

    def _published(self, partition: int, write: Write | None, version: Version) -> None:
        """A write is out of the outbox and in the log; None for one of an earlier process, or that nobody holds."""
        self._saw(partition, version)
        if write is not None:
            write.partition = partition  # the log may have been laid out anew while it waited
            self._marks.logged(write, version)
        else:
            deadline = asyncio.get_running_loop().time() + self.settings.own_write_timeout
            self._marks.cover(partition, version, deadline)

    def _saw(self, partition: int, version: Version) -> None:
        self._seen[partition] = max(self._seen.get(partition, version), version)

    def _drop(self, event: Event) -> list[str]:
        """Drop what a write touches; the scopes that are known from the event alone."""
        if event.op == DELETE_ROOM:
            self._local.drop_orphans()
            for scope in list(self._local):
                if not scope.startswith("room:"):
                    self._local.drop(scope)
        scopes = event.scopes()
        for scope in scopes:
            self._local.drop(scope)
        return scopes

    def _known_dimensions(self, id: str) -> Dimensions | None:
        known = self._dimensions.get(id)
        if known is None:
            cached = self._local.last_known(id_scope(id), GET)
            if isinstance(cached, Memory):
                known = cached.dimensions
            else:
                held = self._local.live(id)
                if held is not None and held.window.rows:
                    known = held.window.rows[-1].dimensions
        return known

    def _remember_dimensions(self, event: Event) -> None:
        self._dimensions[event.id] = event.dimensions
        self._dimensions.move_to_end(event.id)
        if event.op == DELETE:
            self._deleted.add(event.id)
        elif event.op == PUT:
            self._deleted.discard(event.id)
        if len(self._dimensions) > _KNOWN_DIMENSIONS:
            forgotten, _ = self._dimensions.popitem(last=False)
            self._deleted.discard(forgotten)

    async def _find_dimensions(self, id: str, *, there: bool = False) -> Dimensions | None:
        """The dimensions of a memory that there is, or was when this bus last heard of it; else None.

        there: only if it still is, as far as the nearest tier that has it can tell
        """
        known = self._known_dimensions(id)
        deleted = id in self._deleted
        scope = id_scope(id)
        # A write of our own that is on its way says so itself; what is stored, somebody else may have deleted since.
        on_its_way = id in self._dimensions and scope in self._marks
        if known is not None and not deleted and (on_its_way or not there):
            return known
        try:
            memory = await self.get(id)
        except StoreUnavailable:
            if known is None or deleted:
                raise
            return known
        if memory is not None:
            return memory.dimensions
        if scope in self._marks or (self._outbox is not None and self._outbox.waiting):
            return await self._find_pending(id)
        return None

    async def _find_pending(self, id: str) -> Dimensions | None:
        """The dimensions of a memory by the last that the outbox or the log has of it which is not applied yet; None if
        it was deleted there, or is nowhere. NotCommitted if that can't be known now."""
        if self._outbox is not None and self._outbox.waiting:
            event = await self._outbox.last_of(id)
            if event is not None:
                return None if event.op == DELETE else event.dimensions
        try:
            async with asyncio.timeout(self.settings.write_timeout):
                found = await last_pending(self._link, self._marks, id)
        except (*AWAY, RedisError, SettingsError) as error:
            raise NotCommitted(
                f"whether there is a memory {id} can't be known now: earlier writes of this bus are not in the store"
                f" yet, and the log can't be searched for it ({str(error) or 'it takes too long'}); nothing was written"
            ) from None
        if found is not None:
            return None if found.op == DELETE else found.dimensions
        memory = await self.get(id)  # it may have been applied before we looked there
        return None if memory is None else memory.dimensions

    async def _committed(self, write: Write, timeout: float) -> None:
        if self._state == "closed" and not write.applied:
            raise BusClosed(
                "the bus was closed before the store was known to have the write; what is in the log or the outbox"
                " goes on from there"
            )
        self._check_open()
        await self._marks.wait(write, timeout)

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
        return await self._get(canonical_id(id))

    async def _get(self, id: str) -> Memory | None:
        found = self._local.hit(id, GET)  # the caller may have spelled it otherwise
        if found is not MISS:
            return found  # type: ignore[no-any-return]

        async def find() -> list[Memory]:
            row = await self._reader.get(id)
            return [] if row is None else [row.memory()]

        known = self._known_dimensions(id) or self._live.dimensions(id_scope(id))
        window = None if known is None else Query(known.table, known.room)
        memory: Memory | None = await self._read(
            Plan(id_scope(id), id, "", GET, GET_FIELD, find, ONE, window, 1)
        )
        if memory is not None:
            memory._share_id(id)
        return memory

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
        key: Any = limit  # nothing else: what is asked for in nearly every case makes no tuple
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
        return await self._recent(scope, key, table, room, entity, agent, world, limit, before, after)

    def _hit(self, table: str, *, room: str | None = None, entity: str | None = None, limit: int) -> Any:
        """What L1 answers to `recent` of a room or of an entity; MISS if it can't."""
        if type(limit) is not int:
            return MISS
        if entity is not None:
            return self._local.hit(scope_of(table, None, entity, None, None), (limit, entity, None, None))
        return self._local.hit(scope_of(table, room, None, None, None), limit)

    async def _recent(
        self,
        scope: str,
        key: Any,
        table: str,
        room: str | None,
        entity: str | None,
        agent: str | None,
        world: str | None,
        limit: int,
        before: Place | None,
        after: Place | None,
    ) -> Memories:
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidQuery(f"limit must be between 1 and {MAX_LIMIT}, not {limit!r}")
        query = query_of(table, room, entity, agent, world, before, after)

        async def find() -> list[Memory]:
            return [row.memory() for row in await self._reader.recent(query, limit)]

        window = query if before is None and after is None else None
        plan = Plan(scope, scope, table, key, field_of("recent", query, limit), find, MANY, window, limit)
        return await self._read(plan)  # type: ignore[no-any-return]

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

        async def find() -> int:
            return await self._reader.count(query)

        window = query if before is None and after is None else None
        plan = Plan(scope, scope, table, key, field_of("count", query, 0), find, COUNT, window)
        return await self._read(plan)  # type: ignore[no-any-return]

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

    async def _read(self, plan: Plan) -> Any:
        self._check_open()
        return await self._tiers.read(plan)

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
        state = {str(partition): str(version) for partition, version in sorted(self._seen.items())}
        return base64.urlsafe_b64encode(orjson.dumps(state)).decode().rstrip("=")

    async def observe(self, token: str, timeout: float = 5.0) -> None:
        """Return once every query of this bus sees what the bus that made the token had written by then.

        Raises NotCommitted after ``timeout`` seconds, InvalidQuery for a token that is none.
        """
        self._check_open()
        timeout = timeout_of(timeout)
        wanted = self._parse_token(token)
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._check_token(wanted)
                await self._observe(wanted, deadline)
        except TimeoutError:
            raise NotCommitted(
                f"what the token names was not in the store after {timeout:g} s. Are workers running?"
            ) from None
        for partition, version in wanted.items():
            self._saw(partition, version)

    def _parse_token(self, token: str) -> dict[int, Version]:
        try:
            state = orjson.loads(base64.b64decode(token + "=" * (-len(token) % 4), b"-_", validate=True))
            wanted = {int(partition): Version.parse(version) for partition, version in state.items()}
        except (ValueError, TypeError, AttributeError, binascii.Error):
            raise InvalidQuery(f"{token!r} is not a token of this bus") from None
        return wanted

    async def _check_token(self, wanted: Iterable[int]) -> None:
        """InvalidQuery for log partitions that there never were."""
        if not self._link.laid_out or all(p in range(self._link.keys.shape.all.stop) for p in wanted):
            return
        with suppress(*AWAY, RedisError, SettingsError):
            await self._link.renew_epoch()  # who made it may know a newer layout
            if not all(p in range(self._link.keys.shape.all.stop) for p in wanted):
                raise InvalidQuery("the token is of a bus with other log partitions")

    async def _observe(self, wanted: dict[int, Version], deadline: float) -> None:
        """Return once all of it is applied and fanned out, and that is known here; TimeoutError after the deadline."""
        left = dict(wanted)
        pause = 0.002
        while left:
            self._check_open()
            self._check_time(deadline)
            try:
                states = await self._marks.state(list(left))
            except (*AWAY, RedisError, SettingsError) as error:
                logger.debug("can't ask what is applied: %s", error)
            else:
                left = {
                    partition: version
                    for (partition, version), state in zip(left.items(), states, strict=True)
                    if not state.passed(version)
                }
                if not left:
                    break
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        # All of it is fanned out. What the fan-out has not brought here yet, a heartbeat fetches.
        while not await self._feed.sync():
            self._check_time(deadline)
            logger.debug("the heartbeat failed; another one")
        # What is being loaded under a scope that the bus does not listen to may be from before.
        self._local.drop_orphans()

    @staticmethod
    def _check_time(deadline: float) -> None:
        """A timeout cancels once, and that may be lost while a connection is made: see tasks.py."""
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError

    # What it tells of itself

    def stats(self) -> Stats:
        """Figures since the bus was opened."""
        self._check_process()
        local, shared, feed, tiers = self._local, self._shared, self._feed, self._tiers
        return Stats(
            hits_local=local.hits,
            hits_shared=shared.hits,
            misses=tiers.misses + self._live.misses,
            shared_loads=tiers.shared_loads + self._live.shared_loads,
            stale_reads=tiers.stale_reads,
            own_write_waits=tiers.own_write_waits,
            own_write_timeouts=tiers.own_write_timeouts,
            entries=local.entries,
            bytes=local.bytes,
            drops=local.drops,
            evictions=local.evictions,
            fills=shared.fills,
            refused_fills=shared.refused_fills,
            writes=sum(p.events for p in (self._publishers, *self._publishers)),
            publish_calls=sum(p.calls for p in (self._publishers, *self._publishers)),
            publish_retries=sum(p.retries for p in (self._publishers, *self._publishers)),
            outbox=0 if self._outbox is None else self._outbox.waiting,
            outboxed=0 if self._outbox is None else self._outbox.kept,
            marks=len(self._marks),
            listening=feed.listening,
            invalidations=feed.invalidations,
            gaps=feed.gaps,
            replays=feed.replays,
            resets=feed.resets,
            reconnects=feed.reconnects,
            epochs=self._epochs,
            bad_messages=feed.bad_messages,
            failed_heartbeats=feed.failed_heartbeats,
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
