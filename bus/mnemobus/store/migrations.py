"""The schema's numbered migrations: ``migrations/<kind>/<number>_<name>.sql``, each applied in a transaction.

Each store has its own way to prevent that one is applied twice (an advisory lock, BEGIN IMMEDIATE):
what decides is the number in the table ``migrations``, read inside the transaction.
"""

from __future__ import annotations

import logging
from importlib.resources import files
from typing import Literal, NamedTuple

from .. import store
from ..errors import SchemaError

_log = logging.getLogger(__name__)


class Migration(NamedTuple):
    """One step of the schema, from ``number - 1`` to ``number``."""

    number: int
    name: str
    sql: str


def load(kind: Literal["sqlite", "postgres"]) -> list[Migration]:
    """All migrations of one kind of store, in order."""
    found = []
    for file in (files(__package__) / "migrations" / kind).iterdir():
        number, _, name = file.name.removesuffix(".sql").partition("_")
        if file.name.endswith(".sql"):
            found.append(Migration(int(number), name, file.read_text("utf-8")))
    return sorted(found)


def following(kind: Literal["sqlite", "postgres"], number: int) -> list[Migration]:
    """What to apply next, in one transaction, after this number; nothing if no migration is missing.

    A new schema is made in one transaction, so that no other process sees half of it and takes it for an old one.
    """
    left = [migration for migration in load(kind) if migration.number > number]
    return [migration for migration in left if migration.number <= store.SCHEMA] if number == 0 else left[:1]


def missing(where: str) -> SchemaError:
    """The error if there is no schema, and none may be made."""
    return SchemaError(f"{where} has no schema yet: start a worker (mnemobus worker), which makes it")


def check_number(number: int, where: str) -> None:
    """SchemaError if a reader of this version can't read a schema of this number."""
    if number < store.SCHEMA:
        raise SchemaError(
            f"{where} has schema {number}, and this version of mnemobus needs {store.SCHEMA}:"
            " start a worker of this version (mnemobus worker), which upgrades it"
        )
    if number > store.SCHEMA:
        _log.warning(
            "%s has schema %d, newer than %d, which this version of mnemobus knows: upgrade mnemobus here too",
            where,
            number,
            store.SCHEMA,
        )
