"""Every error that mnemobus raises on purpose.

::

    MnemobusError
     ├─ SettingsError            a setting is missing, malformed or contradicts what is in Redis
     │   ├─ UnsafeRedis          the Redis server could evict the log
     │   ├─ AccessDenied         Redis refuses the login, or its user lacks a permission
     │   └─ IdentityMismatch     the store is not the one that belongs to this bus
     ├─ InvalidMemory            a write was refused before anything left the process
     │   ├─ MemoryTooLarge
     │   └─ DimensionChanged     a write would change a memory's table, room, agent, entity or world
     ├─ InvalidQuery             a read names no dimension, or its bounds are invalid
     ├─ MemoryNotFound           an update names a memory that does not exist
     ├─ WriteFailed              the log did not take the write
     │   ├─ LogUnavailable       it could not be reached in time; the write may or may not be in it
     │   │   └─ Unready          the server takes no writes now; nothing was written
     │   │       ├─ LogClosed      the log is about to be repartitioned
     │   │       └─ PartitionEnded the log was repartitioned, and this partition has ended
     │   ├─ LogFull              Redis is out of memory; nothing was written
     │   ├─ BacklogFull          workers are too far behind; nothing was written
     │   ├─ OutboxFull           the log can't be reached and the outbox is full; nothing was written
     │   ├─ Overtaken            another process uses the same producer id; nothing was written
     │   └─ DurabilityUnavailable  the server can't give the durability that was asked for
     ├─ OutboxError              the outbox's file can't be used (OutboxFull is one, too)
     │   └─ OutboxInUse          another bus has it
     ├─ WriteRejected            the write was logged, but a worker could not apply it (dead letter)
     ├─ NotCommitted             the store did not have the write within the given time
     ├─ StoreError
     │   ├─ StoreUnavailable     the database can't be reached, or is not in a state to answer
     │   │   └─ StoreTooSlow     it did not finish in time, or has no memory for so much at once
     │   ├─ SchemaError          the database's schema does not fit, or its tables may not be used
     │   └─ Rejected             the database refuses this data; the data's fault, not the database's
     ├─ BadEvent                 an entry of the log that can't be decoded
     ├─ LogTrimmed               a replay asks for events that the log no longer has
     ├─ EmbeddedServerError      no server binary for the embedded Redis, or it did not start
     ├─ WrongLoop                the bus was used in another event loop, thread or process than it was opened in
     └─ BusClosed                the bus was used before it was opened or after it was closed

Each error is worded where its facts are known (``workers/`` is the package of the workers):

    SettingsError          cli/adopt.py, cli/dead.py, cli/lines.py, cli/moments.py, cli/replay.py, cli/worker.py,
                           connection/link.py, identity.py, settings.py, store/__init__.py, store/postgres/server.py,
                           store/sqlite/file.py, workers/replay.py
    UnsafeRedis            connection/link.py
    AccessDenied           connection/link.py
    IdentityMismatch       identity.py, lifecycle.py, workers/standing.py
    InvalidMemory          cli/lines.py, memory.py, records.py, values.py, writes.py
    MemoryTooLarge         records.py
    DimensionChanged       writes.py
    InvalidQuery           cache/query.py, context.py, reads.py, tokens.py, writes.py
    MemoryNotFound         writes.py
    WriteFailed            log/append.py
    LogUnavailable         cli/adopt.py, cli/dead.py, cli/repartition.py, cli/replay.py, cli/verify.py,
                           log/publisher.py, writes.py
    Unready                log/append.py, log/publisher.py
    LogClosed              log/append.py
    PartitionEnded         log/append.py
    LogFull                cli/dead.py, log/append.py
    BacklogFull            log/append.py
    OutboxError            log/outbox.py, log/outbox_file.py
    OutboxInUse            log/outbox_file.py
    OutboxFull             log/outbox_file.py
    Overtaken              log/append.py, log/outbox.py
    DurabilityUnavailable  log/syncer.py, writes.py
    WriteRejected          log/pending.py
    NotCommitted           cli/importing.py, log/pending.py, tokens.py, writes.py
    StoreUnavailable       cli/importing.py, lifecycle.py, store/postgres/connections.py, store/postgres/reader.py,
                           store/postgres/server.py, store/postgres/writer.py, store/sqlite/file.py,
                           store/sqlite/reader.py, store/sqlite/writer.py
    StoreTooSlow           store/postgres/server.py, store/postgres/writer.py, store/sqlite/writer.py
    SchemaError            store/layout.py, store/migrations.py, store/postgres/schema.py, store/postgres/server.py,
                           store/postgres/writer.py, store/sqlite/file.py
    Rejected               store/postgres/server.py, store/sqlite/writer.py
    BadEvent               log/events.py
    LogTrimmed             workers/replay.py
    EmbeddedServerError    embedded/__init__.py, embedded/binary.py, embedded/processes.py, embedded/server.py
    BusClosed              feed/heartbeat.py, lifecycle.py, log/pending.py, writes.py
    WrongLoop              lifecycle.py
"""

from __future__ import annotations


class MnemobusError(Exception):
    """Base of every error that mnemobus raises on purpose."""


class SettingsError(MnemobusError):
    """A setting is missing or malformed, or contradicts what the first agent or worker wrote into Redis."""


class UnsafeRedis(SettingsError):
    """The Redis server could evict the log; the message names the fix."""


class AccessDenied(SettingsError):
    """Redis refuses the login, or its user lacks a permission; the message says which."""


class IdentityMismatch(SettingsError):
    """The store and the bus in Redis don't belong together; the message names both."""


class InvalidMemory(MnemobusError, ValueError):
    """A memory can't be written as it is; ``field`` names the wrong field."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[type[InvalidMemory], tuple[str, str]]:
        return type(self), (self.field, self.reason)


class MemoryTooLarge(InvalidMemory):
    """A memory is larger than ``max_memory_bytes``."""


class DimensionChanged(InvalidMemory):
    """A write would change a dimension of an existing memory. It can get other dimensions after it was deleted."""


class InvalidQuery(MnemobusError, ValueError):
    """A read names no dimension, or its bounds are invalid."""


class MemoryNotFound(MnemobusError, LookupError):
    """An update names a memory that does not exist."""


class WriteFailed(MnemobusError):
    """The log did not take a write."""


class LogUnavailable(WriteFailed):
    """The log could not be reached in time; the write may or may not be in it."""


class Unready(LogUnavailable):
    """The server takes no writes now: it fails over, starts, or its disk is full, for example. Nothing was written."""


class LogClosed(Unready):
    """The log is about to be laid out anew. Nothing was written yet, but a copy of the call may still be."""


class PartitionEnded(Unready):
    """The log partition has ended, and takes no more writes. Nothing was written, and no copy of the call ever will
    be."""


class LogFull(WriteFailed):
    """Redis is out of memory and refuses writes; nothing was written."""


class BacklogFull(WriteFailed):
    """The workers are too far behind for the log to take more; nothing was written."""


class OutboxError(MnemobusError):
    """The outbox's file can't be used."""


class OutboxInUse(OutboxError):
    """The outbox's file is in use by another bus."""


class OutboxFull(WriteFailed, OutboxError):
    """The log can't be reached and the outbox takes no more; nothing was written."""


class Overtaken(WriteFailed):
    """The producer has made this call, or a later one, with other events: another process uses its id."""


class DurabilityUnavailable(WriteFailed):
    """The server can't give the durability that was asked for."""


class WriteRejected(MnemobusError):
    """A logged write could not be applied; it is a dead letter, with this reason."""


class NotCommitted(MnemobusError, TimeoutError):
    """The store did not have the write within the given time; it is in the log and will get there."""


class StoreError(MnemobusError):
    """Base of all errors of the database."""


class StoreUnavailable(StoreError):
    """The database can't be reached, or can't answer now; a later retry can help."""


class StoreTooSlow(StoreUnavailable):
    """The database did not finish in time, or had no memory for it. Less at once, or more time, can help."""


class SchemaError(StoreError):
    """The database's schema does not fit this version of mnemobus, or its tables are not those of mnemobus."""


class Rejected(StoreError):
    """The database refuses this data; a retry does not help."""


class BadEvent(MnemobusError, ValueError):
    """An entry of the log can't be decoded."""


class LogTrimmed(MnemobusError):
    """A replay asks for events that the log no longer has."""


class EmbeddedServerError(MnemobusError):
    """The embedded Redis can't be started."""


class BusClosed(MnemobusError, RuntimeError):
    """The bus was used before it was opened or after it was closed."""


class WrongLoop(MnemobusError, RuntimeError):
    """The bus was used in another event loop, thread or process than the one in which it was opened."""
