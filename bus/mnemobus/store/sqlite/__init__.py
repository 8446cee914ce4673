"""SQLite: the store of one machine.

One file in WAL mode: readers see the last commit and never wait; writers, of this process or
another, take turns (BEGIN IMMEDIATE), which is also what orders a put and the deletion of its room.
"""

from .reader import SqliteReader
from .writer import SqliteWriter

__all__ = ["SqliteReader", "SqliteWriter"]
