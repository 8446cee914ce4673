"""The file in which writes wait: an SQLite database with one table of writes, in the order in which they were made.

A full disk takes no more writes. But the writes that are in the file must still be removed from it once the log is
back, and that needs some disk space. So a second file beside it reserves some space, and is removed when it is needed.

One process at a time has the file: SQLite's exclusive lock ends with the process, even if the process is killed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import sqlite3
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from .. import private
from ..errors import BadEvent, OutboxError, OutboxFull, OutboxInUse
from ..keys import ZERO, Keyspace, Shape
from ..tasks import in_background
from .append import CALL_BYTES, CALL_EVENTS, Field
from .events import Event, decode

logger = logging.getLogger("mnemobus.outbox")

_SCHEMA = 1


_OVERHEAD = 64
"""Bytes that a write takes in the file in addition to its own, roughly."""


_LENGTH = struct.Struct(">I")


_SPARE = 1 << 20
"""Bytes of disk that are reserved for the removal of writes, in addition to space for the largest write."""


_SPARE_CALL = 1 << 17
"""Most bytes of a call while the reserve is in use."""


_LAID_OUT = 100
"""Writes that are reassigned at a time after the log was repartitioned: each may hold a megabyte."""


_CHECKPOINT = 64
"""Pages of SQLite's WAL between checkpoints, so that the WAL stays smaller than the reserve."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeptCall:
    """One call of publish.lua: its identity, and the field lists of its events.

    rows: the numbers of its writes in the file
    """

    partition: int
    producer: str
    sequence: int
    rows: tuple[int, ...]
    events: tuple[list[bytes], ...]


class OutboxFile:
    """One outbox file. All its methods raise OutboxError if the file can't be used."""

    def __init__(
        self, path: Path, keys: Keyspace, max_bytes: int, *, own: bool = True, largest: int = 0
    ) -> None:
        self.path = path
        self._keys = keys
        self._spare = path.with_name(path.name + "-spare")
        self._spare_bytes = _SPARE + 3 * largest
        self._max_bytes = max_bytes
        self._own = own
        self._database: aiosqlite.Connection | None = None
        self._producer = ""
        self._laid_out: Shape | None = None
        """The layout of the log that gave the writes in no call their partitions; None if it is not known."""
        self._lock = asyncio.Lock()
        self.entries = 0
        self.bytes = 0

    async def open(self) -> None:
        """Lock the file and read its state. If it does not exist, it is made, unless it is the file of another bus.

        OutboxInUse if another process, or another bus of this process, has it.
        """
        mode = "rwc" if self._own else "rw"
        try:
            if self._own:
                private.make_folder(self.path.parent)
                private.make_database(self.path)
            address = f"{self.path.absolute().as_uri()}?mode={mode}"
            self._database = await in_background(
                aiosqlite.connect(address, uri=True, timeout=0, isolation_level=None)
            )
            await self._prepare(self._database)
        except OSError as error:
            await self._abandon()
            raise OutboxError(
                f"the outbox {self.path} can't be used: {error.strerror or error}. Set MNEMOBUS_OUTBOX, or"
                " MNEMOBUS_DATA_DIR, to a place that can be written"
            ) from error
        except sqlite3.Error as error:
            await self._abandon()
            if "locked" in str(error):
                raise OutboxInUse(f"the outbox {self.path} is in use by another bus") from None
            raise OutboxError(f"the outbox {self.path} can't be used: {error}") from error
        except BaseException:
            await self._abandon()
            raise

    async def _prepare(self, database: aiosqlite.Connection) -> None:
        await database.execute("PRAGMA locking_mode=EXCLUSIVE")
        await database.execute("PRAGMA journal_mode=WAL")
        await database.execute("PRAGMA synchronous=FULL")
        await database.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT}")
        await database.execute("BEGIN EXCLUSIVE")
        [version] = await self._one("PRAGMA user_version") or [0]
        if version not in (0, _SCHEMA):
            raise OutboxError(f"the outbox {self.path} is of version {version}: written by a newer mnemobus")
        if version == 0 and await self._one("SELECT 1 FROM sqlite_master"):
            raise OutboxError(f"the outbox {self.path} can't be used: it is a database of something else")
        if version == 0:
            await database.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            await database.execute(
                "CREATE TABLE writes (n INTEGER PRIMARY KEY AUTOINCREMENT, partition INTEGER NOT NULL, size INTEGER NOT"
                " NULL, fields BLOB NOT NULL, producer TEXT, sequence INTEGER)"
            )
            await database.execute(
                "CREATE TABLE sequences (partition INTEGER PRIMARY KEY, last INTEGER NOT NULL)"
            )
            owner = f"{self._keys.prefix}, {self._keys.log_partitions} log partitions"
            meta = [("owner", owner), ("producer", secrets.token_hex(8))]
            await database.executemany("INSERT INTO meta VALUES (?, ?)", meta)
            await database.execute(f"PRAGMA user_version={_SCHEMA}")
        await database.execute("CREATE INDEX IF NOT EXISTS calls ON writes (n) WHERE sequence IS NOT NULL")
        await database.execute("COMMIT")
        rows = await database.execute_fetchall("SELECT name, value FROM meta")
        values = {str(name): str(value) for name, value in rows}
        owner = values.get("owner", "nobody")
        if owner.rpartition(", ")[0] != self._keys.prefix or "producer" not in values:
            raise OutboxError(
                f"the outbox {self.path} has writes for {owner}, not for {self._keys.prefix}: it belongs to another bus"
            )
        self._producer = values["producer"]
        self.entries, self.bytes = await self._one("SELECT count(*), coalesce(sum(size), 0) FROM writes") or (
            0,
            0,
        )
        if not self.entries:
            self._laid_out = self._keys.shape

    async def _one(self, statement: str, parameters: Iterable[object] = ()) -> tuple[int, ...] | None:
        assert self._database is not None
        async with self._database.execute(statement, tuple(parameters)) as cursor:
            row = await cursor.fetchone()
        return None if row is None else tuple(row)

    async def _abandon(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with suppress(sqlite3.Error, ValueError):
                await database.close()

    async def close(self, *, remove: bool = False) -> None:
        """Close and unlock the file; ``remove`` it if it is empty."""
        async with self._lock:  # a transaction may still be under way, though its caller was cancelled
            remove = remove and not self.entries
            if not self.entries and self._database is not None:
                _remove(self._spare)
            if remove:
                # While the file is still locked: no other process can have put anything in it.
                _remove(self.path)
            await self._abandon()
            if remove:
                for suffix in ("-wal", "-journal"):
                    _remove(self.path.with_name(self.path.name + suffix))

    async def append(
        self,
        partition: int,
        events: Sequence[Sequence[Field]],
        call: tuple[str, int] | None = None,
    ) -> list[int]:
        """Put writes into the file, all or none; return their numbers.

        partition: where they were published first, or would be published now
        call: producer and sequence number under which they may have been published already
        OutboxFull if the file would exceed its limit, or the disk is full.
        """
        packed = [_pack(event) for event in events]
        size = sum(map(len, packed)) + _OVERHEAD * len(packed)
        if self.bytes + size > self._max_bytes:
            raise OutboxFull(
                f"the outbox {self.path} is full ({self.entries:,} writes; MNEMOBUS_OUTBOX_MAX_BYTES is"
                f" {self._max_bytes:,}), and the log can't be reached; nothing was written"
            )
        await self._keep_spare()
        producer, sequence = call or (None, None)

        async def insert() -> list[int]:
            rows = []
            for fields in packed:
                row = await self._one(
                    "INSERT INTO writes (partition, size, fields, producer, sequence) VALUES (?, ?, ?, ?, ?)"
                    " RETURNING n",
                    (partition, len(fields) + _OVERHEAD, fields, producer, sequence),
                )
                assert row is not None
                rows.append(row[0])
            return rows

        return await self._transaction(insert, len(packed), size)

    async def last_of(self, id: str) -> Event | None:
        """The last write to a memory."""

        async def find() -> Event | None:
            # Search for the id as a whole field, with its length before it. A write that only contains these bytes is
            # decoded and skipped.
            assert self._database is not None
            async with self._database.execute(
                "SELECT fields FROM writes WHERE instr(fields, ?) ORDER BY n DESC",
                (_pack([b"id", id.encode()]),),
            ) as rows:
                async for (fields,) in rows:
                    with suppress(BadEvent):
                        event = decode(ZERO, _unpack(fields, self.path))
                        if event.id == id:
                            return event
            return None

        return await self._transaction(find)

    async def next_call(self) -> KeptCall | None:
        """The call to make next; None if the file is empty. It is the same one until `answered` or `renumber`."""
        return await self._insist(self._next_call)

    async def _next_call(self) -> KeptCall | None:
        assert self._database is not None
        first = await self._one("SELECT n, partition, coalesce(sequence, 0) FROM writes ORDER BY n LIMIT 1")
        if first is None:
            return None
        number, partition, sequence = first
        if not sequence and self._laid_out != self._keys.shape:
            await self._lay_out()
            [partition] = await self._one("SELECT partition FROM writes WHERE n = ?", (number,)) or (0,)
        if not sequence:
            rows = await self._first_rows(partition)
            last = await self._one("SELECT last FROM sequences WHERE partition = ?", (partition,))
            sequence = (last[0] if last else 0) + 1
            await self._database.execute(
                "INSERT OR REPLACE INTO sequences VALUES (?, ?)", (partition, sequence)
            )
            await self._database.executemany(
                "UPDATE writes SET producer = ?, sequence = ? WHERE n = ?",
                [(self._producer, sequence, row) for row in rows],
            )
        found = list(
            await self._database.execute_fetchall(
                "SELECT n, producer, fields FROM writes WHERE partition = ? AND sequence = ?"
                " AND producer = (SELECT producer FROM writes WHERE n = ?) ORDER BY n",
                (partition, sequence, number),
            )
        )
        events = tuple(_unpack(fields, self.path) for _, _, fields in found)
        return KeptCall(partition, str(found[0][1]), sequence, tuple(n for n, _, _ in found), events)

    async def _lay_out(self) -> None:
        """The log was repartitioned: give each write that is in no call its new partition."""
        assert self._database is not None
        shape = self._keys.shape
        number = 0
        while rows := list(
            await self._database.execute_fetchall(
                "SELECT n, partition, fields FROM writes WHERE sequence IS NULL AND n > ? ORDER BY n LIMIT ?",
                (number, _LAID_OUT),
            )
        ):
            number = rows[-1][0]
            moved = [
                (now, n)
                for n, before, fields in rows
                if (now := shape.partition(_room(_unpack(fields, self.path)))) != before
            ]
            await self._database.executemany("UPDATE writes SET partition = ? WHERE n = ?", moved)
        self._laid_out = shape

    async def _first_rows(self, partition: int) -> list[int]:
        """The writes for one call: of one partition, in no call yet, and older than all writes that are in a call.

        A call from before a repartition may have writes to the same rooms: no write overtakes them.
        """
        assert self._database is not None
        rows: list[int] = []
        size = 0
        for number, length in await self._database.execute_fetchall(
            "SELECT n, size FROM writes WHERE partition = ? AND sequence IS NULL AND n < coalesce((SELECT min(n) FROM"
            " writes WHERE sequence IS NOT NULL), n + 1) ORDER BY n LIMIT ?",
            (partition, CALL_EVENTS),
        ):
            size += length
            if rows and size > (CALL_BYTES if self._has_spare else _SPARE_CALL):
                break
            rows.append(number)
        return rows

    async def answered(self, call: KeptCall) -> None:
        """The writes of a call are in the log: remove them from the file."""

        async def delete() -> None:
            assert self._database is not None
            await self._database.executemany("DELETE FROM writes WHERE n = ?", [(n,) for n in call.rows])

        size = sum(sum(len(field) + _LENGTH.size for field in event) + _OVERHEAD for event in call.events)
        await self._insist(delete, -len(call.rows), -size)

    async def ended(self, call: KeptCall) -> None:
        """The partition of a call has ended: the call wrote nothing, and never will. Its writes are in no call now."""

        async def update() -> None:
            assert self._database is not None
            await self._database.executemany(
                "UPDATE writes SET producer = NULL, sequence = NULL WHERE n = ?", [(n,) for n in call.rows]
            )
            await self._lay_out()

        await self._insist(update)

    async def renumber(self, call: KeptCall) -> None:
        """The number of a call was used by another call: give its writes a new one, of a new producer."""

        async def update() -> None:
            assert self._database is not None
            self._producer = secrets.token_hex(8)
            await self._database.execute(
                "UPDATE meta SET value = ? WHERE name = 'producer'", (self._producer,)
            )
            await self._database.execute("DELETE FROM sequences")
            await self._database.executemany(
                "UPDATE writes SET producer = NULL, sequence = NULL WHERE n = ?", [(n,) for n in call.rows]
            )

        await self._insist(update)

    @property
    def _has_spare(self) -> bool:
        try:
            return self._spare.exists()
        except OSError:  # its folder can't be looked into any more
            return False

    async def _keep_spare(self) -> None:
        """Reserve space on the disk, which the removal of writes will need. OutboxFull if there is none."""
        if self._has_spare:
            return

        def allocate() -> None:
            try:
                with private.open_file(self._spare, "wb") as file:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, self._spare_bytes)
                    else:
                        file.write(bytes(self._spare_bytes))
            except OSError as error:
                _remove(self._spare)
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OutboxFull(
                        f"the disk of the outbox {self.path} is full; nothing was written"
                    ) from None
                raise OutboxError(f"the outbox {self.path} can't be used: {error}") from error

        await asyncio.to_thread(allocate)

    async def _insist(self, work: Callable[[], Awaitable[T]], entries: int = 0, size: int = 0) -> T:
        """A transaction that must succeed on a full disk, too: the reserve is for it."""
        try:
            return await self._transaction(work, entries, size)
        except OutboxFull:
            if not self._has_spare:
                raise
            _remove(self._spare)
            return await self._transaction(work, entries, size)

    async def _transaction(self, work: Callable[[], Awaitable[T]], entries: int = 0, size: int = 0) -> T:
        """Run a transaction; it is on disk once this returns. A cancellation does not leave it half done.

        ``entries`` and ``size`` say what it adds to the file.
        """

        async def run() -> T:
            async with self._lock:
                database = self._database
                if database is None:
                    raise OutboxError(f"the outbox {self.path} is closed")
                try:
                    await database.execute("BEGIN IMMEDIATE")
                    result = await work()
                    await database.execute("COMMIT")
                except BaseException as error:
                    with suppress(sqlite3.Error):
                        await database.execute("ROLLBACK")
                    if isinstance(error, sqlite3.Error):
                        raise self._explain(error) from error
                    raise
                self.entries += entries
                self.bytes += size
                return result

        task = asyncio.ensure_future(run())
        task.add_done_callback(_retrieve)
        return await asyncio.shield(task)

    def _explain(self, error: sqlite3.Error) -> OutboxError:
        if "full" in str(error):
            return OutboxFull(f"the disk of the outbox {self.path} is full; nothing was written")
        return OutboxError(f"the outbox {self.path} can't be used: {error}")


def _remove(path: Path) -> None:
    """Remove a file, if it exists. If that fails, the next bus that opens finds it empty."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s can't be removed: %s", path, error)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Fetch the error of a future: its caller may be gone, and asyncio would report an error that nobody fetched."""
    if not task.cancelled():
        task.exception()


def _pack(event: Sequence[Field]) -> bytes:
    out = bytearray()
    for item in event:
        field = item if isinstance(item, bytes) else str(item).encode()
        out += _LENGTH.pack(len(field))
        out += field
    return bytes(out)


def _room(fields: Sequence[bytes]) -> str:
    """The room of an event, given by its fields."""
    return fields[fields.index(b"room") + 1].decode()


def _unpack(packed: bytes, path: Path) -> list[bytes]:
    fields, at = [], 0
    while at < len(packed):
        if at + _LENGTH.size > len(packed):
            raise OutboxError(f"the outbox {path} is damaged: a write in it ends too early")
        [length] = _LENGTH.unpack_from(packed, at)
        at += _LENGTH.size
        fields.append(packed[at : at + length])
        at += length
    if at != len(packed):
        raise OutboxError(f"the outbox {path} is damaged: a write in it ends too early")
    return fields
