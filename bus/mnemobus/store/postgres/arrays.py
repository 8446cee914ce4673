"""A batch as columns: arrays of PostgreSQL in its binary format, and how psycopg sends them as they are."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import psycopg
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.pq import Format
from psycopg.types.string import ByteaBinaryLoader


class Array(bytes):
    """An array of PostgreSQL in its binary format; each subclass is one type of elements."""

    oid: ClassVar[int]
    element: ClassVar[int]

    @classmethod
    def of(cls, items: Sequence[bytes | None]) -> Self:
        head = _ARRAY_HEAD.pack(1, 1, cls.element, len(items), 1)
        sizes = {_NULL if item is None else len(item) for item in items}
        if len(sizes) == 1:  # ids, versions, vectors: put together without a step for each
            (size,) = sizes
            before = _SIZE.pack(size)
            return cls(head + (before * len(items) if size == _NULL else before + before.join(items)))  # type: ignore[arg-type]
        parts = [head]
        for item in items:
            parts += (_SIZE.pack(_NULL),) if item is None else (_SIZE.pack(len(item)), item)
        return cls(b"".join(parts))


_ARRAY_HEAD = struct.Struct(">iiIii")  # dimensions, may hold NULL, type of elements, length, first index
_SIZE = struct.Struct(">i")
_NULL = -1
"""The size of a NULL."""
INT8 = struct.Struct(">q")
INT = struct.Struct(">i")
INT4, INT4S, UUID = 23, 1007, 2950
"""Types of PostgreSQL."""


class Uuids(Array):
    oid, element = 2951, 2950


class Texts(Array):
    oid, element = 1009, 25


class Jsons(Array):
    oid, element = 199, 114


class Byteas(Array):
    oid, element = 1001, 17


class Int8s(Array):
    oid, element = 1016, 20


class Int4s(Array):
    oid, element = INT4S, INT4


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def __init__(self, cls: type[Array], context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self.oid = cls.oid

    def dump(self, obj: Array) -> bytes:
        return obj


ADAPTERS = AdaptersMap(psycopg.adapters)
for _type in (Uuids, Texts, Jsons, Byteas, Int8s):
    ADAPTERS.register_dumper(_type, _ArrayDumper)
ADAPTERS.register_loader("json", ByteaBinaryLoader)  # content goes to the caller as it is


def uuids(ids: Iterable[str]) -> Uuids:
    return Uuids.of(
        list(map(bytes.fromhex, "|".join(ids).replace("-", "").split("|")))
    )  # much faster than UUID


def texts(items: Sequence[str | None]) -> Texts:
    return Texts.of([None if item is None else item.encode() for item in items])
