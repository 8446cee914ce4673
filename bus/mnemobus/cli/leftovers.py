"""Checks whether an outbox could be kept at its place, and what others have left there.

It changes nothing: it copies a file that no bus holds, and opens the copy.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ..settings import Settings
from .finding import FAIL, OK, WARN, Finding

_SHARED, _SHARED_BYTES = 0x40000002, 510
"""The bytes of a file that SQLite locks."""


def look_at_outbox(settings: Settings) -> Iterator[Finding]:
    if settings.outbox == "off":
        yield Finding("outbox", OK, "off: writes fail while Redis is away")
        return
    folder = settings.data_dir / "outbox" if settings.outbox == "auto" else Path(settings.outbox).parent
    folder = folder.absolute()
    advice = "let this user write there, or set MNEMOBUS_DATA_DIR (or MNEMOBUS_OUTBOX)"
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            yield Finding("outbox", FAIL, f"can't be kept in {folder}: {existing} is not a directory", advice)
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield Finding("outbox", FAIL, f"can't be kept in {folder}: {existing} is not writable", advice)
        else:
            yield from _leftovers(folder)
    except OSError as error:
        yield Finding("outbox", FAIL, f"can't be kept in {folder}: {error}", advice)


def _leftovers(folder: Path) -> Iterator[Finding]:
    left: dict[str, int] = {}
    for path in sorted(folder.glob("*.db")) if folder.is_dir() else ():
        try:
            if path.stat().st_size and not _held(path):
                owner, writes = _writes(path)
                left[owner] = left.get(owner, 0) + writes
        except FileNotFoundError:  # its bus has just removed it
            continue
        except (OSError, sqlite3.Error) as error:
            yield Finding(
                "outbox", WARN, f"{path} can't be read: {error}", "check this file; writes may be in it"
            )
    for owner, writes in left.items():
        if writes:
            yield Finding(
                "outbox",
                WARN,
                f"{writes:,} writes in {folder} that no agent holds, of {owner}",
                "start an agent of that bus with this data directory: it publishes them",
            )
    if not any(left.values()):
        yield Finding("outbox", OK, f"in {folder}")


def _held(path: Path) -> bool:
    """Whether a bus has the file open: a bus locks its file as long as it runs."""
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, _SHARED_BYTES, _SHARED)
        except BlockingIOError:
            return True
        fcntl.lockf(file, fcntl.LOCK_UN, _SHARED_BYTES, _SHARED)
    return False


def _writes(path: Path) -> tuple[str, int]:
    """Which bus owns the file, and how many writes are in it."""
    with tempfile.TemporaryDirectory(prefix="mnemobus-doctor-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        wal = path.with_name(path.name + "-wal")
        if wal.exists():
            shutil.copyfile(wal, copy.with_name(wal.name))
        with closing(sqlite3.connect(copy)) as database:
            [owner] = database.execute("SELECT value FROM meta WHERE name = 'owner'").fetchone() or ("?",)
            [writes] = database.execute("SELECT count(*) FROM writes").fetchone()
    return str(owner), int(writes)
