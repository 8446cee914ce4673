"""What the agents of a run write about: a few rooms with a few memories each, the same for all of them.

Few, so that they get into each other's way; and fixed, so that whoever looks afterwards knows what there is to look at.
"""

from __future__ import annotations

import uuid
from typing import NamedTuple

TABLES = ("messages", "facts")


class Room(NamedTuple):
    table: str
    name: str
    ids: tuple[str, ...]

    @property
    def scope(self) -> str:
        return f"room:{self.table}:{self.name}"


def rooms(count: int, memories: int) -> list[Room]:
    """This many rooms, each with this many memories."""
    return [
        Room(
            TABLES[number % len(TABLES)],
            f"r{number}",
            tuple(str(uuid.uuid5(uuid.NAMESPACE_OID, f"r{number}/{n}")) for n in range(memories)),
        )
        for number in range(count)
    ]
