"""Where a store's tables are, and whether those that are found there are ours.

On PostgreSQL they are in a schema of their own, on SQLite their names begin with a prefix; both are called by
``MNEMOBUS_DATABASE_NAMESPACE``. Migrations are written with the bare names.

Schema 1 had its tables under their bare names, wherever the role's search path led. They are moved when a writer of
this version opens the store, but only if they are ours: other software has tables `memories` and `migrations`, too. A
table is taken for ours if it has all of our columns; more do no harm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SchemaError

Columns = Mapping[str, frozenset[str]]
"""By table, the columns that it has."""

OURS: Columns = {
    "memories": frozenset(
        {
            *("id", "created_us", "live", "pending", "tbl", "room", "agent", "entity", "world", "content"),
            *("metadata", "embedding", "put_version", "content_version", "metadata_version"),
            *("embedding_version", "deleted_version"),
        }
    ),
    "room_tombstones": frozenset(("tbl", "room", "version")),
    "tables": frozenset(("tbl", "embedding_length")),
    "migrations": frozenset(("number", "applied_at")),
}
"""The tables of schema 1, which every later one has."""
IDENTITY = "identity"
"""The table that schema 2 adds."""
TABLES = (*OURS, IDENTITY)
_TELLING = ("memories", "room_tombstones")
"""Those that nobody else has with these columns."""

_BARE = re.compile(rf"\b({'|'.join(TABLES)})")


@dataclass(frozen=True, slots=True)
class Found:
    """What a database has.

    number  of the last migration that was applied; 0 where there is no schema of ours
    old     where the tables of schema 1 are, if they have yet to be moved
    """

    number: int
    old: str | None = None


class Names:
    """The tables' names as statements have them."""

    def __init__(self, before: str) -> None:
        self.memories = f"{before}memories"
        self.room_tombstones = f"{before}room_tombstones"
        self.tables = f"{before}tables"
        self.migrations = f"{before}migrations"
        self.identity = f"{before}{IDENTITY}"


def prefixed(sql: str, before: str) -> str:
    """A migration with this in front of each name: of the tables, and of the indexes that are called after them."""
    return _BARE.sub(rf"{before}\1", sql)


def fit(found: Columns) -> list[str]:
    """Those of the tables of schema 1 that have all of our columns."""
    return [name for name, columns in OURS.items() if columns <= found.get(name, frozenset())]


def check_own(found: Columns, where: str) -> bool:
    """Whether our tables are in the place that is ours; SchemaError if only a part is, or another's."""
    if not found.keys() & OURS.keys():
        return False
    if len(fit(found)) == len(OURS):
        return True
    raise SchemaError(
        f"{where} has tables that are not mnemobus's, or not all of them: {_misfits(found)}."
        " Set MNEMOBUS_DATABASE_NAMESPACE to a name that nobody uses there, or restore the database from a backup"
    )


def check_old(found: Columns, where: str) -> bool:
    """Whether tables under the bare names are those of schema 1; SchemaError if one can't tell."""
    fitting = fit(found)
    if len(fitting) == len(OURS):
        return True
    if any(name in fitting for name in _TELLING):
        raise SchemaError(
            f"{where} has tables of an earlier version of mnemobus, but not as that version made them:"
            f" {_misfits(found)}. Put them right, or rename those that are of no use any more"
        )
    return False


def _misfits(found: Columns) -> str:
    words = []
    for name, columns in OURS.items():
        if name not in found:
            words.append(f"table {name} is missing")
        elif lacking := columns - found[name]:
            words.append(f"table {name} has no column {', '.join(sorted(lacking))}")
    return "; ".join(words)
