"""Where writes wait while the log can't be reached (G7): a bounded file that survives the process.

The file is an SQLite database with one table of writes, in the order in which they were made. What makes its content
reach the log once, whoever dies when:

- A write is in the file, synced to disk, before its writer hears of it.
- Writes are published in calls, as any others (publisher.py). Which writes go in which call, under which producer and
  sequence number, is in the file *before* the call is made, and stays as it is until the call was answered. So after a
  crash the same call is made again, and `publish.lua` answers it without doing it twice.
- A call that was on its way when the log went away, its outcome unknown, enters the file with the number it had.
- Writes leave the file when their call was answered, not before.
- Which log partition a write goes to is settled with its call: the log may be laid out anew while it waits. A call of
  unknown outcome is made again where it was made first; if that partition has ended, none of it is there, nor will be,
  and its writes go to the new ones.

A disk that is full takes no more writes. But those that are in the file must still get out once the log is back, and to
take them out takes some space, too: so a second file beside it keeps some, and is given up then.

One process at a time has the file: SQLite's exclusive lock goes with the process, however that ends.

Usually (MNEMOBUS_OUTBOX=auto) each bus has a file of its own in MNEMOBUS_DATA_DIR/outbox, made when it is first needed
and removed when it is empty. A bus that opens looks there for files that nobody holds any more: what a killed agent
left, it publishes before anything of its own.
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
from weakref import WeakValueDictionary

import aiosqlite

from .. import private
from ..connection.link import Link
from ..connection.server_errors import AWAY
from ..errors import BacklogFull, BadEvent, LogFull, MnemobusError, OutboxError, OutboxFull, OutboxInUse
from ..keys import ZERO, Keyspace, Shape, Version
from ..tasks import end, in_background
from .events import Event, decode
from .pending import Write
from .publisher import CALL_BYTES, CALL_EVENTS, Ended, Field, Overtaken, append

logger = logging.getLogger("mnemobus.outbox")

_SCHEMA = 1
_OVERHEAD = 64
"""Bytes that a write takes in the file besides its own, roughly."""
_LENGTH = struct.Struct(">I")
_SPARE = 1 << 20
"""Bytes of disk that are kept to take writes out; to them comes room for the largest one."""
_SPARE_CALL = 1 << 17
"""What a call carries at most when these are in use."""
_LAID_OUT = 100
"""Writes that are gone through at a time when the log was laid out anew: each may hold a megabyte."""
_CHECKPOINT = 64
"""Pages of SQLite's WAL after which it is gone through, so that it stays smaller than that space."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of publish.lua: what identifies it, and the field lists of its events.

    rows: the numbers of its writes in the file
    """

    partition: int
    producer: str
    sequence: int
    rows: tuple[int, ...]
    events: tuple[list[bytes], ...]


class OutboxFile:
    """One file. All its calls raise OutboxError if the file can't be used."""

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
        """The layout of the log by which writes that are in no call have their partitions; None if it is not known."""
        self._lock = asyncio.Lock()
        self.entries = 0
        self.bytes = 0

    async def open(self) -> None:
        """Lock the file and see what is in it; made if it is not there, unless it is another's.

        OutboxInUse if another process, or another bus of this one, has it.
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
        """Let go of the file; ``remove`` it if it is empty."""
        async with self._lock:  # a transaction may still be under way, though its caller was cancelled
            remove = remove and not self.entries
            if not self.entries and self._database is not None:
                _remove(self._spare)
            if remove:
                # Before the lock on it is gone: nobody else can have put anything in it.
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
        """Put writes into the file, all or none; their numbers.

        partition: where that was, or where they would be published now
        call: producer and sequence number under which they may have been published already
        OutboxFull if they would make it larger than it may be, or the disk is full.
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
            # The id as a field of its own, its length before it; what merely mentions it is looked at, and passed over.
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

    async def next_call(self) -> Call | None:
        """The call to make next; None if the file is empty. It is the same one until `answered` or `renumber`."""
        return await self._insist(self._next_call)

    async def _next_call(self) -> Call | None:
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
        return Call(partition, str(found[0][1]), sequence, tuple(n for n, _, _ in found), events)

    async def _lay_out(self) -> None:
        """The log was laid out anew: say of each write that is in no call where it goes now."""
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
        """Those that go together in one call: of one partition, none of them in a call yet."""
        assert self._database is not None
        rows: list[int] = []
        size = 0
        for number, length in await self._database.execute_fetchall(
            "SELECT n, size FROM writes WHERE partition = ? AND sequence IS NULL ORDER BY n LIMIT ?",
            (partition, CALL_EVENTS),
        ):
            size += length
            if rows and size > (CALL_BYTES if self._has_spare else _SPARE_CALL):
                break
            rows.append(number)
        return rows

    async def answered(self, call: Call) -> None:
        """Its writes are in the log: take them out."""

        async def delete() -> None:
            assert self._database is not None
            await self._database.executemany("DELETE FROM writes WHERE n = ?", [(n,) for n in call.rows])

        size = sum(sum(len(field) + _LENGTH.size for field in event) + _OVERHEAD for event in call.events)
        await self._insist(delete, -len(call.rows), -size)

    async def ended(self, call: Call) -> None:
        """Nothing of it was written, nor ever will be, as its partition has ended: its writes are in no call now."""

        async def update() -> None:
            assert self._database is not None
            await self._database.executemany(
                "UPDATE writes SET producer = NULL, sequence = NULL WHERE n = ?", [(n,) for n in call.rows]
            )
            await self._lay_out()

        await self._insist(update)

    async def renumber(self, call: Call) -> None:
        """Its number is used up: give its writes a new one, of a producer that nobody has been."""

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
        """Have some space on the disk for the way out. OutboxFull if there is none."""
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
        """A transaction that a full disk must not keep from happening: the space that was kept is for it."""
        try:
            return await self._transaction(work, entries, size)
        except OutboxFull:
            if not self._has_spare:
                raise
            _remove(self._spare)
            return await self._transaction(work, entries, size)

    async def _transaction(self, work: Callable[[], Awaitable[T]], entries: int = 0, size: int = 0) -> T:
        """Do something in a transaction, on disk once this returns; a cancellation does not cut it in two.

        ``entries`` and ``size`` are what it adds to the file.
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


def _has_begun(path: Path) -> bool:
    """Whether there is anything in a file, or was: one that is empty may be about to be locked by who made it."""
    try:
        return path.stat().st_size > 0
    except OSError:  # its owner has just removed it, or it is nobody's that we are
        return False


def _remove(path: Path) -> None:
    """Remove a file, if it is there; what can't be removed is found, empty, by the next bus that opens."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s can't be removed: %s", path, error)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Whoever waited for it may be gone; then nobody has to hear of it."""
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


class Outbox:
    """The outbox of a bus: its own file, and those that it found without an owner.

    on_kept: called with partition and event of each write that is in the file, before its writer knows; what it returns
        is the writer's answer
    on_published: called once such a write is in the log; with None for one of an earlier process, or that nobody holds
    on_empty: called when all are
    """

    def __init__(
        self,
        link: Link,
        bus_id: str,
        on_kept: Callable[[int, Event], Write],
        on_published: Callable[[int, Write | None, Version], None],
        on_empty: Callable[[], None],
    ) -> None:
        settings = link.settings
        self._link = link
        self._on_kept = on_kept
        self._on_published = on_published
        self._on_empty = on_empty
        self._max_bytes = settings.outbox_max_bytes
        self._largest = settings.max_memory_bytes
        self._auto = settings.outbox == "auto"
        folder = settings.data_dir / "outbox"
        self._folder = folder
        self._own = self._file(folder / f"{bus_id}.db" if self._auto else Path(settings.outbox))
        self._store = ""
        if settings.database_url.startswith("sqlite:///"):
            self._store = str(Path(settings.database_url.removeprefix("sqlite:///")).absolute())
        self._opened = False
        self._opening = asyncio.Lock()
        self._found: list[OutboxFile] = []
        self._writes: WeakValueDictionary[int, Write] = WeakValueDictionary()
        """By number in the own file, those of this process that anybody still holds."""
        self._task: asyncio.Task[None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self._hurried = asyncio.Event()
        self.away = False
        """Whether the log could not be reached when it was last tried."""
        self.kept = 0

    def _file(self, path: Path, *, own: bool = True) -> OutboxFile:
        return OutboxFile(path, self._link.keys, self._max_bytes, own=own, largest=self._largest)

    @property
    def waiting(self) -> int:
        """Writes that are not in the log yet; while there are any, newer ones have to wait behind them."""
        return self._own.entries + sum(file.entries for file in self._found)

    @property
    def where(self) -> str:
        return str(self._own.path)

    @property
    def trouble(self) -> str | None:
        """Why writes could not wait here now, were the log away; None if they could."""
        reason = None if self._opened else private.obstacle(self._own.path.parent)
        return reason and f"{reason}. Set MNEMOBUS_DATA_DIR, or MNEMOBUS_OUTBOX to a file, or to off"

    async def open(self) -> None:
        """Take up what an earlier process left. OutboxInUse, OutboxError if the configured file can't be had.

        With MNEMOBUS_OUTBOX=auto the file is made when it is needed; that it could not be is no error before, as
        many agents only read. It is logged, and `trouble` says it.
        """
        if self._auto:
            if self.trouble:
                logger.warning("while Redis is away, writes can't wait in the outbox: %s", self.trouble)
            if self._folder.is_dir():
                private.close_tree_to_others(self._folder)
            for path in sorted(self._folder.glob("*.db")) if self._folder.is_dir() else ():
                if _has_begun(path):
                    await self._adopt(path)
        else:
            await self._open_own()
        if self.waiting:
            logger.warning(
                "%d writes of an earlier process wait in the outbox; publishing them first", self.waiting
            )
            self._start()

    async def _adopt(self, path: Path) -> None:
        file = self._file(path, own=False)
        try:
            await file.open()
        except OutboxInUse:
            return
        except OutboxError as error:  # it stays where it is, for people to look at
            logger.error("%s", error)
            return
        if file.entries:
            self._found.append(file)
        else:
            await file.close(remove=True)

    async def _open_own(self) -> None:
        async with self._opening:
            if not self._opened:
                if str(self._own.path.absolute()) == self._store:
                    raise OutboxError(
                        f"the outbox {self._own.path} can't be used: it is the store. Set MNEMOBUS_OUTBOX to"
                        " another file"
                    )
                await self._own.open()
                self._opened = True

    async def keep(
        self, partition: int, events: Sequence[tuple[Event, Sequence[Field]]], call: tuple[str, int] | None
    ) -> list[Write]:
        """Keep writes, all or none, until the log can be reached.

        call: producer and sequence number under which they may have been published already
        """
        await self._open_own()
        self.away = self.away or call is not None
        rows = await self._own.append(partition, [fields for _, fields in events], call)
        writes = []
        for row, (event, _) in zip(rows, events, strict=True):
            write = self._on_kept(partition, event)
            self._writes[row] = write
            writes.append(write)
        self.kept += len(rows)
        self._start()
        return writes

    async def last_of(self, id: str) -> Event | None:
        """The last write to a memory that waits here, of this process or an earlier one."""
        for file in [self._own, *reversed(self._found)]:
            if file.entries:
                event = await file.last_of(id)
                if event is not None:
                    return event
        return None

    def _start(self) -> None:
        self._empty.clear()
        if self._task is None:
            self._task = asyncio.create_task(self._drain(), name="mnemobus-outbox")

    def hurry(self) -> None:
        """The log can be reached: publish now what waits."""
        self._hurried.set()

    async def _drain(self) -> None:
        """Publish until nothing waits. Whatever goes wrong is logged, and tried again."""
        least = self._link.settings.redis_create_retry_interval / 1000
        pause, said = least, ""
        try:
            while self.waiting:
                try:
                    await self._publish_next()
                    pause, said, self.away = least, "", False
                    continue
                except AWAY as error:
                    self.away, reason = True, f"the log can't be reached ({error})"
                except MnemobusError as error:
                    self.away = not isinstance(error, (BacklogFull, LogFull))
                    reason = str(error)
                except Exception as error:
                    logger.exception("publishing from the outbox failed")
                    reason = repr(error)
                if reason != said:
                    said = reason
                    logger.warning("%d writes wait in the outbox: %s", self.waiting, reason)
                self._hurried.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._hurried.wait()
                pause = min(2 * pause, 1.0)
            logger.warning("the outbox is empty again: all of it is in the log")
            self._empty.set()
            self._on_empty()
        finally:
            self._task = None

    async def _publish_next(self) -> None:
        file = self._found[0] if self._found else self._own
        call = await file.next_call()
        if call is None:
            await self._retire(file)
            return
        try:
            logged = await append(self._link, call.partition, call.producer, call.sequence, call.events)
            versions = logged.versions
            if len(versions) != len(call.events):
                raise Overtaken(f"call {call.sequence} of producer {call.producer} was another one")
        except Ended as error:
            logger.info("%s: %d writes of the outbox go to another", error, len(call.rows))
            await self._link.renew_epoch()
            await file.ended(call)
            return
        except Overtaken as error:
            # Only a copy of the file can have used the number for something else.
            logger.error("%s: was the outbox %s copied? Publishing under another number", error, file.path)
            await file.renumber(call)
            return
        for row, version in zip(call.rows, versions, strict=True):
            write = self._writes.pop(row, None) if file is self._own else None
            self._on_published(call.partition, write, version)
        await file.answered(call)
        if not file.entries:
            await self._retire(file)

    async def _retire(self, file: OutboxFile) -> None:
        if file in self._found:
            self._found.remove(file)
            await file.close(remove=True)

    async def close(self, patience: float) -> None:
        """Publish what waits if the log is there, for ``patience`` seconds at most; the rest stays in the file."""
        if self.waiting and not self.away:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._empty.wait()
        await end([self._task])
        if self.waiting:
            logger.warning(
                "%d writes stay in the outbox; the next bus that opens publishes them", self.waiting
            )
        for file in self._found:
            await file.close()
        if self._opened:
            await self._own.close(remove=self._auto)
