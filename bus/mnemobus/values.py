"""What the fields of a memory may hold: checks that name the field, and how each is encoded.

What a bus hands out is immutable all the way down, since the same object is also the cached copy: `freeze`.
"""

from __future__ import annotations

import math
import re
import struct
import uuid
from array import array
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from sys import intern
from typing import Any, NoReturn

import orjson

from .errors import InvalidMemory
from .keys import Dimensions

MAX_DEPTH = 64
"""How deep content and metadata may nest."""


MAX_NAME_BYTES = 512
"""How long a room, agent, entity or world may be, in UTF-8 bytes: they are indexed."""


_TABLE = re.compile(r"[A-Za-z0-9_.\-]{1,64}\Z")


_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


_MICROSECOND = timedelta(microseconds=1)


def canonical_id(id: object) -> str:
    """The one spelling of a UUID that is used in keys; InvalidMemory if it is none."""
    if isinstance(id, str):
        if _CANONICAL.match(id):
            return id
        try:
            return str(uuid.UUID(id))
        except ValueError:
            pass
    if isinstance(id, uuid.UUID):
        return str(id)
    raise InvalidMemory("id", f"{id!r} is not a UUID")


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 of a datetime that has a zone: exact, unlike its timestamp()."""
    return (moment - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The datetime, in UTC, of so many microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=micros)


class FrozenDict(dict[str, Any]):
    """A dict that refuses to change; ``dict(d)`` or ``copy.deepcopy(d)`` gives one that does."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a memory is immutable: copy its content to change it, and write it with update()")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: object) -> dict[str, Any]:
        return thaw(self)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return freeze, (thaw(self),)


class FrozenList(list[Any]):
    """A list that refuses to change."""

    __slots__ = ()

    _refuse = FrozenDict._refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __copy__(self) -> list[Any]:
        return list(self)

    def __deepcopy__(self, memo: object) -> list[Any]:
        return thaw(self)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return freeze, (thaw(self),)


def freeze(value: Any, _depth: int = 0) -> Any:
    """A copy of a JSON value in which dicts and lists refuse to change."""
    if isinstance(value, dict) and _depth <= MAX_DEPTH:
        return FrozenDict({k: freeze(v, _depth + 1) for k, v in value.items()})
    if isinstance(value, (list, tuple)) and _depth <= MAX_DEPTH:
        return FrozenList([freeze(v, _depth + 1) for v in value])
    if type(value) not in _ATOMS and isinstance(value, Mapping) and _depth <= MAX_DEPTH:
        return FrozenDict({k: freeze(v, _depth + 1) for k, v in value.items()})
    return value


_ATOMS = frozenset((str, int, float, bool, type(None)))


def thaw(value: Any) -> Any:
    """A copy of a frozen JSON value in plain dicts and lists."""
    if isinstance(value, dict):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, list):
        return [thaw(v) for v in value]
    return value


_dimensions: dict[tuple[str | None, ...], Dimensions] = {}


_DIMENSIONS = 10_000
"""How many are remembered."""


def shared_dimensions(*names: Any) -> Dimensions:
    """Dimensions of these names, the same object for the same names: few differ among many memories."""
    found = _dimensions.get(names)
    if found is None:
        if len(_dimensions) >= _DIMENSIONS:
            _dimensions.clear()
        # Rooms and agents are in many of them.
        found = Dimensions(*(intern(name) if type(name) is str else name for name in names))
        _dimensions[found] = found
    return found


def check_dimensions(dimensions: Dimensions) -> None:
    """InvalidMemory that names the dimension which can't be stored."""
    try:
        known = dimensions in _checked
    except (TypeError, ValueError):  # a name that is a list, say
        known = False
    if not known:
        _check_dimensions(dimensions)
        if len(_checked) >= _DIMENSIONS:
            _checked.clear()
        _checked.add(dimensions)


_checked: set[Dimensions] = set()
"""Dimensions that are known to be fit: most writes have some that another had."""


def _check_dimensions(dimensions: Dimensions) -> None:
    check_table(dimensions.table)
    check_name("room", dimensions.room)
    for field in ("agent", "entity", "world"):
        value = getattr(dimensions, field)
        if value is not None:
            check_name(field, value)


def check_table(table: object) -> str:
    if not isinstance(table, str) or not _TABLE.match(table):
        raise InvalidMemory("table", f"{table!r} is not 1 to 64 letters, digits, '_', '.' or '-'")
    return table


def check_name(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidMemory(field, f"text is needed, not {kind_of(value)}")
    if not value:
        raise InvalidMemory(field, "is empty")
    if "\0" in value:
        raise InvalidMemory(field, "contains a NUL character")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidMemory(field, "contains a lone surrogate, which UTF-8 can't encode") from None
    if size > MAX_NAME_BYTES:
        raise InvalidMemory(field, f"{size} bytes, which is more than {MAX_NAME_BYTES}")
    return value


def encode_object(field: str, value: object) -> bytes:
    """A JSON object as UTF-8."""
    if not isinstance(value, Mapping):
        raise InvalidMemory(field, f"a JSON object is needed, not {kind_of(value)}")
    if not _is_plain(value):
        _check_json(field, value, 1)
    try:
        return orjson.dumps(value if isinstance(value, dict) else dict(value), default=_as_json)
    except (TypeError, ValueError) as error:  # a lone surrogate, say
        raise InvalidMemory(field, f"can't be encoded as JSON: {error}") from None


def _as_json(value: object) -> object:
    """Values that JSON has and orjson does not encode: mappings that are no dict, other kinds of float (NumPy's)."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"{kind_of(value)} is not a JSON value")


def _is_plain(value: Mapping[Any, Any]) -> bool:
    """Whether an object holds only texts, small integers, booleans and nulls, as most do: nothing else needs a
    check."""
    for key, item in value.items():
        kind = type(item)
        if type(key) is not str or not (
            kind is str or (kind is int and -_LARGEST <= item < _LARGEST) or kind is bool or item is None
        ):
            return False
    return True


_LARGEST = 1 << 63


def _check_json(path: str, value: object, depth: int) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    if isinstance(value, int):
        if not -_LARGEST <= value < _LARGEST:
            raise InvalidMemory(path, "an integer beyond 64 bits")
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidMemory(path, f"{value} is not a JSON number")
        return
    if depth > MAX_DEPTH:
        raise InvalidMemory(path.partition(".")[0].partition("[")[0], f"nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidMemory(path, f"key {key!r} is not text")
            _check_json(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_json(f"{path}[{index}]", item, depth + 1)
    else:
        raise InvalidMemory(path, f"{kind_of(value)} is not a JSON value")


def encode_embedding(value: object) -> bytes | None:
    """Little-endian float32; None stays None."""
    if value is None:
        return None
    numbers = value if type(value) is tuple else _numbers(value)
    try:
        if numbers and isinstance(numbers[0], bool):
            raise TypeError
        floats = array("f", numbers)
    except _ODD:
        raise InvalidMemory("embedding", "holds something that is not a number") from None
    if not floats:
        raise InvalidMemory("embedding", "is empty; use None for no embedding")
    # A sum is finite unless a part is not, or it overflows; the slow path tells which.
    if not math.isfinite(sum(floats)):
        for index, number in enumerate(floats):
            if not math.isfinite(number):
                raise InvalidMemory(f"embedding[{index}]", f"{number} is not a finite float32")
    if _BIG_ENDIAN:
        floats.byteswap()
    return floats.tobytes()


_ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What may come of converting an object of another library."""


def _numbers(value: object) -> tuple[Any, ...]:
    """The elements of an ordered object with one dimension: sequences, iterators, arrays and series of NumPy,
    pandas, PyTorch and others. InvalidMemory for anything else: a mapping, a set, a table, text."""
    if isinstance(value, (list, tuple, Iterator)):
        return tuple(value)
    if isinstance(value, memoryview):
        if value.ndim == 1 and value.format in ("f", "d"):
            return tuple(value)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return tuple(value)
    elif getattr(value, "ndim", 1) == 1:
        listed = getattr(value, "tolist", None) or getattr(value, "to_list", None)
        if callable(listed):
            return tuple(listed())
    raise InvalidMemory("embedding", f"a sequence of numbers is needed, not {kind_of(value)}")


def snapshot(value: object) -> object:
    """A copy of an embedding, which does not change with the original; what is no embedding stays, for `encode` to
    refuse."""
    if value is None or type(value) is tuple:
        return value
    try:
        return _numbers(value)
    except InvalidMemory:
        return value


_BIG_ENDIAN = struct.pack("=H", 1) == b"\0\1"


def unpack_floats(packed: bytes) -> array[float]:
    floats = array("f")
    floats.frombytes(packed)
    if _BIG_ENDIAN:
        floats.byteswap()
    return floats


def encode_date(created: object) -> int:
    try:
        micros = moment_of(created)
    except ValueError as error:
        raise InvalidMemory("created_at", str(error)) from None
    if not _FIRST <= micros <= _LAST:
        assert isinstance(created, datetime)
        raise InvalidMemory("created_at", f"{created.isoformat()} is not in the years 1 to 9999, UTC")
    return micros


_FIRST = to_micros(datetime.min.replace(tzinfo=UTC))


_LAST = to_micros(datetime.max.replace(tzinfo=UTC))


def moment_of(value: object) -> int:
    """Microseconds since 1970 of a datetime; ValueError, with the reason, for anything else."""
    if not isinstance(value, datetime):
        raise ValueError(f"a datetime is needed, not {kind_of(value)}")
    try:
        if value.utcoffset() is not None:
            return int(to_micros(value))
        text = value.isoformat()
    except _ODD:  # "not a time" of pandas is a datetime whose methods fail
        raise ValueError(f"{kind_of(value)} is not a moment in time") from None
    raise ValueError(f"{text} has no time zone")


def kind_of(value: object) -> str:
    if value is None:
        return "nothing"
    name = type(value).__name__
    return {"FrozenDict": "dict", "FrozenList": "list"}.get(name, name)
