"""Files and folders that nobody else on the machine can read: what agents remember is about people.

New files and folders get the modes 0600 and 0700, with any umask. If a file is open to everybody, as an older mnemobus
left it, opening it here changes its mode. If it is open to a group only (0640, 0660, 0750), somebody did this on
purpose, and it stays. A folder that the user made keeps its mode.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

MASK = 0o077
"""The umask of processes that are started to write such files."""


def make_folder(path: Path) -> None:
    """Make a folder if it is not there, and those above it, for us alone. OSError if that fails."""
    missing = []
    while not path.is_dir():
        if path.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def make_file(path: Path) -> None:
    """Make a file that only we can read, if it is not there; its content, if there is any, stays. OSError if that
    fails.

    The file itself is never opened: to close it would take this process's locks off it, such as those of SQLite.
    """
    if not path.exists():
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            path.hardlink_to(name)
        except FileExistsError:
            pass  # somebody else was faster
        except OSError:  # a file system without links
            path.touch(0o600)
        finally:
            Path(name).unlink()
    close_to_others(path)


def make_database(path: Path) -> None:
    """The same for a database of SQLite, which gives the files beside it the mode of the first."""
    make_file(path)
    for suffix in ("-wal", "-shm", "-journal"):
        close_to_others(path.with_name(path.name + suffix))


def open_file(path: Path, mode: str) -> IO[Any]:
    """`open` for a file that only we can read."""
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    close_to_others(path)
    return file


def close_to_others(path: Path) -> None:
    """Close a file or folder to everybody but us, if it is ours and open to others."""
    with suppress(OSError):  # gone meanwhile, or a file system without modes
        found = path.stat(follow_symlinks=False)
        if found.st_uid == os.geteuid() and found.st_mode & stat.S_IRWXO and not stat.S_ISLNK(found.st_mode):
            path.chmod(0o700 if stat.S_ISDIR(found.st_mode) else 0o600)


def close_tree_to_others(folder: Path) -> None:
    """The same for a folder and all that is in it."""
    close_to_others(folder)
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            close_to_others(Path(root, name))


def obstacle(folder: Path) -> str | None:
    """Why no file could be made in a folder, which need not exist yet; None if one could."""
    path = folder
    while not path.exists():
        if path.is_symlink():
            return f"{path} leads nowhere"
        path = path.parent
    if not path.is_dir():
        return f"{path} is not a directory"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"{path} can't be written to"
    return None
