"""mnemobus keeps the memories of many AI agents coherent. See README.md and docs/."""

from .bus import KEEP, Bus, Receipt, connect
from .errors import (
    BacklogFull,
    BadEvent,
    BusClosed,
    DimensionChanged,
    DurabilityUnavailable,
    EmbeddedServerError,
    InvalidMemory,
    InvalidQuery,
    LogFull,
    LogUnavailable,
    MemoryNotFound,
    MemoryTooLarge,
    MnemobusError,
    NotCommitted,
    Rejected,
    SchemaError,
    SettingsError,
    StoreError,
    StoreUnavailable,
    UnsafeRedis,
    WriteFailed,
    WriteRejected,
)
from .keys import Version
from .memory import Context, Memories, Memory
from .settings import Settings
from .stats import Health, Stats

__version__ = "0.1.0"

__all__ = [
    "KEEP",
    "BacklogFull",
    "BadEvent",
    "Bus",
    "BusClosed",
    "Context",
    "DimensionChanged",
    "DurabilityUnavailable",
    "EmbeddedServerError",
    "Health",
    "InvalidMemory",
    "InvalidQuery",
    "LogFull",
    "LogUnavailable",
    "Memories",
    "Memory",
    "MemoryNotFound",
    "MemoryTooLarge",
    "MnemobusError",
    "NotCommitted",
    "Receipt",
    "Rejected",
    "SchemaError",
    "Settings",
    "SettingsError",
    "Stats",
    "StoreError",
    "StoreUnavailable",
    "UnsafeRedis",
    "Version",
    "WriteFailed",
    "WriteRejected",
    "connect",
]
