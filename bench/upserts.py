"""Compares ways to write a batch to PostgreSQL: `python -m bench.upserts`, takes a minute.

All of them merge the same deltas by the same statement, each batch in one transaction, with fsync; only new rows:

unnest       an array for each column, binary: what store/postgres/ does
COPY         binary, into a temporary table; the statement reads from there
executemany  the statement once for each row, in pipeline mode, prepared
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Json

from mnemobus.keys import Dimensions, Version
from mnemobus.store.layout import Names
from mnemobus.store.merge import Delta
from mnemobus.store.postgres.arrays import ADAPTERS
from mnemobus.store.postgres.statements import PostgresStatements
from mnemobus.store.postgres.transaction import PostgresTransaction
from mnemobus.values import encode_embedding, encode_object

from .floors.store import prepare
from .measure import Spread, interleave
from .world import World, message, postgres_server, vector

SIZES = (50, 500, 2_000)
ROUNDS = 9
_TYPES = ["uuid", *["text"] * 5, "bigint", "json", "json", *["bytea"] * 6]
"""The columns of the statement's source."""
_ARRAYS = b"unnest(" + b", ".join([b"%s"] * len(_TYPES)) + b")"
_NAMES = [
    *("id", "tbl", "room", "agent", "entity", "world", "created_us", "content", "metadata", "embedding"),
    *("put", "content_version", "metadata_version", "embedding_version", "own_deleted"),
]

_SQL = PostgresStatements(Names('"mnemobus".'))

Way = Callable[[psycopg.Connection[Any], Sequence[Delta]], None]


def unnest(connection: psycopg.Connection[Any], deltas: Sequence[Delta]) -> None:
    with connection.pipeline() as pipeline:
        connection.execute("BEGIN")
        PostgresTransaction(connection, pipeline, _SQL).upsert(deltas)
        connection.execute("COMMIT")


def copy(connection: psycopg.Connection[Any], deltas: Sequence[Delta]) -> None:
    with connection.transaction(), connection.cursor() as cursor:
        with cursor.copy("COPY incoming FROM STDIN (FORMAT BINARY)") as into:
            into.set_types(_TYPES)
            for delta in deltas:
                into.write_row(_row(delta))
        cursor.execute(_SQL.upsert.replace(_ARRAYS, b"incoming"))
        cursor.fetchall()


def executemany(connection: psycopg.Connection[Any], deltas: Sequence[Delta]) -> None:
    row = ", ".join(f"%b::{type}" for type in _TYPES).encode()
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(_SQL.upsert.replace(_ARRAYS, b"(VALUES (" + row + b"))"), list(map(_row, deltas)))


WAYS: dict[str, Way] = {"unnest": unnest, "COPY": copy, "executemany": executemany}


def _row(d: Delta) -> tuple[Any, ...]:
    content, metadata = Json(d.content, dumps=bytes), Json(d.metadata, dumps=bytes)  # as it is
    versions = d.put, d.content_version, d.metadata_version, d.embedding_version, d.deleted
    return (uuid.UUID(d.id), *d.dimensions, d.created_us, content, metadata, d.embedding, *versions)


def _deltas(first: int, size: int, embeddings: bool) -> list[Delta]:
    deltas = []
    for n in range(first, first + size):
        m = message(f"room-{n % 200}", n)
        deltas.append(
            Delta(
                f"01900000-0000-7000-8000-{n:012x}",
                Dimensions(m.table, m.room, m.agent, m.entity),
                put=Version(1_700_000_000_000 + n, 0).pack(),
                created_us=1_700_000_000_000_000 + n,
                content=encode_object("content", m.content),
                metadata=encode_object("metadata", m.metadata),
                embedding=encode_embedding(vector(n % 50)) if embeddings else None,
            )
        )
    return deltas


async def main() -> None:
    numbers = count()
    with postgres_server() as (url, version):
        url = World("", "", url, version, Path(), False).database()
        prepare(url)
        print(f"PostgreSQL {version}: us for each row, median (quartiles); times as long as unnest")
        with psycopg.connect(url, autocommit=True, context=ADAPTERS) as connection:
            columns = ", ".join(f"{name} {type}" for name, type in zip(_NAMES, _TYPES, strict=True))
            connection.execute(f"CREATE TEMPORARY TABLE incoming ({columns}) ON COMMIT DELETE ROWS".encode())
            for embeddings in (False, True):
                for size in SIZES:

                    async def turn(way: Way, size: int = size, embeddings: bool = embeddings) -> float:
                        deltas = _deltas(next(numbers) * max(SIZES), size, embeddings)
                        began = time.perf_counter()
                        way(connection, deltas)
                        return (time.perf_counter() - began) / size * 1e6

                    turns = {name: lambda way=way: turn(way) for name, way in WAYS.items()}
                    samples = await interleave(turns, ROUNDS)
                    _show(size, embeddings, samples)


def _show(size: int, embeddings: bool, samples: dict[str, list[float]]) -> None:
    print(f"{size:5,} rows{', embeddings' if embeddings else ''}")
    for name, figures in samples.items():
        ratio = Spread.of([a / b for a, b in zip(figures, samples["unnest"], strict=True)])
        print(f"  {name:12} {Spread.of(figures)}; {ratio}")


if __name__ == "__main__":
    asyncio.run(main())
