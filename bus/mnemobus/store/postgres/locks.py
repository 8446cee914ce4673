"""The advisory locks: by room, and for upgrades of the schema. The order in which they are taken is in __init__.py."""

from __future__ import annotations

from zlib import crc32

from ..merge import Room

LOCKS = int.from_bytes(b"mnem", "big")
"""The class of our advisory locks; others in the same database have other numbers."""
LOCK_SLOTS = 16
"""The locks of that class for rooms: few, as a batch may touch a thousand rooms and the server's table of locks is
small. A worker of the version before has the same."""
MIGRATING = LOCK_SLOTS
"""The lock of that class under which the schema is upgraded."""


def lock_slot(room: Room) -> int:
    return crc32(":".join(room).encode()) % LOCK_SLOTS
