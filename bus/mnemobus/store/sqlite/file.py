"""The file of an SQLite store: its path, whether it is still the same file, and what errors of SQLite mean."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ... import private
from ...errors import SchemaError, SettingsError, StoreError, StoreUnavailable
from ...settings import Settings
from .. import Identity

File = tuple[int, int]
"""A file's device and inode."""


def path_of(settings: Settings) -> Path:
    path = settings.database_url.removeprefix("sqlite:///")
    if path.startswith(":memory:"):
        raise SettingsError(
            "MNEMOBUS_DATABASE_URL: a database in memory can't be shared by agents and workers; name a file,"
            " as in sqlite:///.mnemobus/memories.db"
        )
    return Path(path).absolute()


def file_at(path: Path) -> File | None:
    """Which file is at a path."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def set_aside(path: Path, log: File | None) -> None:
    """Rename the write-ahead log that a replaced database left behind: SQLite would take it for the new one's, and mix
    both. One that was put there along with the new database is left where it is."""
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(
            directory, fcntl.LOCK_EX
        )  # or two processes would be at it, and the second rename a new one
        if log is not None and path.exists() and file_at(log_of(path)) == log:
            for ending in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    path.with_name(path.name + ending).replace(f"{path}{ending}.replaced")
    finally:
        os.close(directory)


def identity_of(row: tuple[Any, ...], path: Path, file: File | None) -> Identity:
    # Of a copy the inode differs. The device does, too, where one file is mounted in several ways.
    found, bus, prefix, life, reached = row
    place = str(file[1]) if file else ""
    return Identity(found, bus, prefix, life, reached, place, "", f"SQLite {path}")


def connection_to(path: Path, timeout: float) -> sqlite3.Connection:
    private.make_folder(path.parent)
    private.make_database(path)
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + timeout
    while True:
        try:
            # This changes a file only once. That one time SQLite does not wait for other processes that do the same,
            # as it does for everything else.
            connection.execute("PRAGMA journal_mode = WAL")
            return connection
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.01)
        except BaseException:
            connection.close()
            raise


def error_of(path: Path, error: Exception) -> StoreError:
    """What an error of SQLite means, with what to do about it."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith("SQLITE_ERROR") and str(error).startswith(("no such table", "no such column")):
        return SchemaError(
            f"SQLite {path}: {error}: these are not the tables of mnemobus. Set MNEMOBUS_DATABASE_URL to the"
            " file that is meant"
        )
    for begins, advice in _ADVICE.items():
        if name.startswith(begins):
            return StoreUnavailable(f"SQLite {path}: {error}: {advice}")
    if isinstance(error, PermissionError):
        return StoreUnavailable(f"SQLite {path}: {error}: {_ADVICE['SQLITE_READONLY']}")
    return StoreUnavailable(f"SQLite {path}: {error}")


_ADVICE = {
    "SQLITE_CORRUPT": "the file is damaged. Stop all that use it, put a backup in its place (or what .recover"
    " of sqlite3 saves), then mnemobus replay",
    "SQLITE_FULL": "make room on its disk",
    "SQLITE_IOERR": "look into the machine's log: its disk may fail, be full, or be away",
    "SQLITE_NOTADB": "set MNEMOBUS_DATABASE_URL to another file, or put a backup in its place",
    "SQLITE_READONLY": "this user must be allowed to write to the file and to its folder; or the file was replaced"
    " while it was in use",
    "SQLITE_CANTOPEN": "this user must be allowed to make files in its folder",
    "SQLITE_PERM": "this user must be allowed to use the file and its folder",
}
