"""Writes: what is checked before one leaves the process, how it is published, and what its writer holds.

A write is checked by itself (`encode`), and against what this bus knows of its memory and table (known.py). Then it is
an event. A publisher puts it into the log (log/routing.py, log/publisher.py); while the log is away, the outbox keeps
it. As soon as it is logged, and before its writer knows, what it touches is dropped from L1 and marked as pending
(log/marks.py): from then on, no query of this bus is answered without it (G6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal

from redis.exceptions import RedisError

from .cache.l1 import LocalCache
from .cache.query import timeout_of
from .connection.link import Link
from .connection.server_errors import AWAY
from .errors import (
    BusClosed,
    DimensionChanged,
    DurabilityUnavailable,
    InvalidMemory,
    InvalidQuery,
    LogUnavailable,
    MemoryNotFound,
    NotCommitted,
    SettingsError,
    StoreError,
    StoreUnavailable,
)
from .keys import Dimensions, Version, id_scope
from .known import Known
from .live.scopes import LiveScopes
from .log.events import DELETE, DELETE_ROOM, UPDATE, Event
from .log.marks import Write
from .log.outbox import Outbox
from .log.pending import PendingWrites
from .log.routing import Publishers
from .log.search import last_pending
from .log.syncer import Syncer
from .memory import Memory
from .records import Row, check_size, encode
from .store import Reader
from .tokens import Tokens
from .values import canonical_id, check_dimensions, encode_embedding, encode_object

Durability = Literal["logged", "synced", "committed"]

_LOOKUPS = 256
"""Memories that a call looks up at once: they share the pool with all other calls."""


class Keep:
    def __repr__(self) -> str:
        return "KEEP"


KEEP: Final = Keep()
"""Stands for a field that :meth:`Bus.update` leaves as it is."""


class Receipt:
    """A write that is in the log, or in the outbox on its way there.

    id  of the memory; of the room for `delete_room`
    """

    __slots__ = ("_committed", "_write", "id")

    def __init__(self, committed: Callable[[Write, float], Awaitable[None]], id: str, write: Write) -> None:
        self._committed = committed
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
        await self._committed(self._write, timeout_of(timeout))

    def __repr__(self) -> str:
        return f"Receipt(id={self.id!r}, version={str(self.version)!r})"


class Writes:
    """The writes of one bus.

    get    reads a memory by its id, as `Bus.get` does
    check  raises if the bus may not be used, here and now
    """

    def __init__(
        self,
        bus_id: str,
        link: Link,
        reader: Reader,
        local: LocalCache,
        live: LiveScopes,
        pending: PendingWrites,
        known: Known,
        tokens: Tokens,
        get: Callable[[str], Awaitable[Memory | None]],
        check: Callable[[], None],
    ) -> None:
        settings = self._settings = link.settings
        self._link = link
        self._reader = reader
        self._local = local
        self._live = live
        self._pending = pending
        self._known = known
        self._tokens = tokens
        self._get = get
        self._check = check
        self.outbox = (
            None
            if settings.outbox == "off"
            else Outbox(link, bus_id, self._kept, self._published, pending.landed)
        )
        self.publishers = Publishers(link, bus_id, self._logged, self.outbox)
        self.syncer = Syncer(link)

    async def write(self, memory: Memory, durability: Durability | None) -> Receipt:
        lengths: dict[str, int] = {}
        [receipt] = await self.publish([await self._put(memory, lengths)], durability, lengths)
        return receipt

    async def write_many(self, memories: Iterable[Memory], durability: Durability | None) -> list[Receipt]:
        events = []
        lengths: dict[str, int] = {}
        for index, memory in enumerate(memories):
            try:
                events.append(await self._put(memory, lengths))
            except InvalidMemory as error:
                raise type(error)(f"memories[{index}].{error.field}", error.reason) from None
        return await self.publish(events, durability, lengths)

    async def update(
        self,
        id: str,
        content: Mapping[str, Any] | Keep,
        metadata: Mapping[str, Any] | Keep,
        embedding: Sequence[float] | Keep | None,
        durability: Durability | None,
    ) -> Receipt:
        id = canonical_id(id)
        if content is KEEP and metadata is KEEP and embedding is KEEP:
            raise InvalidMemory("update", "give content, metadata or embedding")
        new_content = None if isinstance(content, Keep) else encode_object("content", content)
        new_metadata = None if isinstance(metadata, Keep) else encode_object("metadata", metadata)
        new_embedding = None if isinstance(embedding, Keep) else (encode_embedding(embedding) or b"")
        dimensions = await self._find_dimensions(id, there=True)
        if dimensions is None:
            raise MemoryNotFound(f"there is no memory {id}")
        row = Row(id, *dimensions, new_content or b"", new_metadata or b"", new_embedding, 0, Version(0, 0))
        check_size(row, self._settings.max_memory_bytes)
        lengths: dict[str, int] = {}
        if new_embedding:
            await self._check_embedding(dimensions.table, new_embedding, lengths)
        event = Event(UPDATE, dimensions, id, new_content, new_metadata, new_embedding)
        [receipt] = await self.publish([event], durability, lengths)
        return receipt

    async def delete_many(self, ids: Iterable[str], durability: Durability | None) -> list[Receipt | None]:
        names = [canonical_id(id) for id in ids]
        found: list[Dimensions | None] = []
        for start in range(0, len(names), _LOOKUPS):
            found += await asyncio.gather(*map(self._find_dimensions, names[start : start + _LOOKUPS]))
        events = [
            Event(DELETE, dimensions, id)
            for id, dimensions in zip(names, found, strict=True)
            if dimensions is not None
        ]
        receipts = iter(await self.publish(events, durability))
        return [None if dimensions is None else next(receipts) for dimensions in found]

    async def delete_room(self, table: str, room: str, durability: Durability | None) -> Receipt:
        dimensions = Dimensions(table, room)
        check_dimensions(dimensions)
        [receipt] = await self.publish([Event(DELETE_ROOM, dimensions)], durability)
        return receipt

    # Checks against what is known

    async def _put(self, memory: Memory, lengths: dict[str, int]) -> Event:
        row = encode(memory, self._settings.max_memory_bytes)
        event = Event.put(row)
        known = self._known.dimensions(row.id)
        if known is not None and known != event.dimensions:
            await self._check_dimensions(row.id, event.dimensions)
        if row.embedding is not None:
            await self._check_embedding(row.table, row.embedding, lengths)
        return event

    async def _check_dimensions(self, id: str, given: Dimensions) -> None:
        """DimensionChanged if there is such a memory, with others. One that was deleted may be made again with any."""
        if self._known.deleted(id) and not await self._pending.settle(id_scope(id)):
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
        length = self._known.embedding_length(table)
        if length is None:
            length = lengths.get(table) or self._known.own_embedding_length(table)
            if length != given:
                with suppress(StoreError):  # then it is left to the worker
                    stored = await self._reader.embedding_length(table)
                    if stored is not None:
                        length = stored
                        self._known.store_has(table, stored)
        if length is not None and length != given:
            raise InvalidMemory("embedding", f"{given} floats, but those of table {table!r} have {length}")
        lengths[table] = given

    async def publish(
        self,
        events: Sequence[Event],
        durability: Durability | None,
        embedding_lengths: Mapping[str, int] | None = None,
    ) -> list[Receipt]:
        if durability is None:
            durability = self._settings.durability
        if not isinstance(durability, str) or durability not in ("logged", "synced", "committed"):
            raise InvalidQuery(f"durability must be logged, synced or committed, not {durability!r}")
        if durability == "synced":
            self.syncer.check()
        futures = self.publishers.publish(events)
        epoch = self._link.epoch
        writes: list[Any] = [None] * len(events)
        try:
            for indexes, parts in futures:
                at = iter(indexes)
                for part in parts:
                    for write in await part:
                        writes[next(at)] = write
        except (LogUnavailable, asyncio.CancelledError):
            # Any of them may have been logged, or may still be: copies of what they touch must go.
            for event in events:
                self._drop(event)
            raise
        self._known.wrote_embeddings(embedding_lengths or {})
        receipts = [
            Receipt(self._committed, event.id or event.dimensions.room, write)
            for event, write in zip(events, writes, strict=True)
        ]
        if durability == "synced":
            if any(write.version is None for write in writes):
                raise DurabilityUnavailable(
                    "the log can't be reached: the write is in the outbox, and will be logged, but is not synced"
                )
            if writes:
                await self.syncer.sync()
            if epoch and epoch != self._link.epoch:
                raise DurabilityUnavailable(
                    "Redis failed over or restarted before the write was synced: it may be lost"
                )
        elif durability == "committed":
            await asyncio.gather(*(receipt.committed(self._settings.write_timeout) for receipt in receipts))
        return receipts

    async def _committed(self, write: Write, timeout: float) -> None:
        """Return once the store has a write; see `Receipt.committed`."""
        try:
            self._check()
        except BusClosed:
            if write.applied:
                raise
            raise BusClosed(
                "the bus was closed before the store was known to have the write; what is in the log or the outbox"
                " goes on from there"
            ) from None
        await self._pending.wait(write, timeout)

    def check_versions(self) -> None:
        """LogUnavailable while writes wait in the outbox: they have no version yet that a token could name."""
        if self.outbox is not None and self.outbox.waiting:
            raise LogUnavailable(
                f"{self.outbox.waiting} writes wait in the outbox: a token can't name them yet"
            )

    def _logged(
        self,
        partition: int,
        event: Event,
        version: Version | None,
        previous: tuple[Version, ...] | None = None,
    ) -> Write:
        """A write of this bus is in the log: from now on no answer may lack it."""
        scopes = self._drop(event)
        if version is None:
            self._live.outboxed(event)
        else:
            self._live.answered(partition, event, version, previous)
        deadline = asyncio.get_running_loop().time() + self._settings.own_write_timeout
        everywhere = event.op == DELETE_ROOM
        write = self._pending.mark(partition, version, scopes, deadline, everywhere=everywhere)
        if version is not None:
            self._tokens.saw(partition, version)
        self._known.remember(event)
        return write

    def _kept(self, partition: int, event: Event) -> Write:
        """A write of this bus is in the outbox: the same holds."""
        return self._logged(partition, event, None)

    def _published(self, partition: int, write: Write | None, version: Version) -> None:
        """A write is out of the outbox and in the log; None for one of an earlier process, or that nobody holds."""
        self._tokens.saw(partition, version)
        if write is not None:
            write.partition = partition  # the log may have been laid out anew while it waited
            self._pending.logged(write, version)
        else:
            deadline = asyncio.get_running_loop().time() + self._settings.own_write_timeout
            self._pending.cover(partition, version, deadline)

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

    async def _find_dimensions(self, id: str, *, there: bool = False) -> Dimensions | None:
        """The dimensions of a memory that exists, or existed when this bus last heard of it; else None.

        there: only if it still exists, as far as the nearest tier that has it can tell
        """
        known = self._known.dimensions(id)
        deleted = self._known.deleted(id)
        scope = id_scope(id)
        # A pending write of our own is enough to know it. What is stored, another agent may have deleted since.
        on_its_way = self._known.wrote(id) and scope in self._pending
        if known is not None and not deleted and (on_its_way or not there):
            return known
        try:
            memory = await self._get(id)
        except StoreUnavailable:
            if known is None or deleted:
                raise
            return known
        if memory is not None:
            return memory.dimensions
        if scope in self._pending or (self.outbox is not None and self.outbox.waiting):
            return await self._find_pending(id)
        return None

    async def _find_pending(self, id: str) -> Dimensions | None:
        """The dimensions of a memory by its last event in the outbox or the log that is not applied yet; None if that
        is a deletion, or there is none and no memory either. NotCommitted if that can't be known now."""
        if self.outbox is not None and self.outbox.waiting:
            event = await self.outbox.last_of(id)
            if event is not None:
                return None if event.op == DELETE else event.dimensions
        try:
            async with asyncio.timeout(self._settings.write_timeout):
                found = await last_pending(self._link, self._pending, id)
        except (*AWAY, RedisError, SettingsError) as error:
            raise NotCommitted(
                f"whether there is a memory {id} can't be known now: earlier writes of this bus are not in the store"
                f" yet, and the log can't be searched for it ({str(error) or 'it takes too long'}); nothing was written"
            ) from None
        if found is not None:
            return None if found.op == DELETE else found.dimensions
        memory = await self._get(id)  # it may have been applied before we looked there
        return None if memory is None else memory.dimensions
