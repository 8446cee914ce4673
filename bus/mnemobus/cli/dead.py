"""``mnemobus dead``: list, show, requeue and drop the writes that no worker could apply.

Requeueing puts a letter's event back at the end of the log, under its old version: later writes still win (G2). The
same step removes the letter, so the event is either in the log or among the letters.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
import typer
from redis.exceptions import RedisError, ResponseError

from ..connection.link import Link
from ..connection.server_errors import AWAY, code_of, meaning
from ..errors import LogFull, LogUnavailable, MnemobusError, SettingsError
from ..keys import ZERO, Version
from ..log.pending import INDEXED
from ..settings import Settings
from .console import emit, err, out, run_until_signal
from .moments import written_at

_READ = 8
"""How many letters are read at a time: each may have a megabyte."""


LEFT_OUT = "left_out"
"""A field of letters whose content was removed to save space: how many bytes it had."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter. ``fields`` are the fields of the event, as they were in the log."""

    partition: int
    id: str
    version: str
    reason: str
    fields: dict[str, bytes]

    @classmethod
    def read(cls, partition: int, id: bytes, pairs: Sequence[bytes]) -> Letter:
        # The first two are the letter's own; an event that nobody could read may have any others.
        _, version, _, reason, *event = pairs
        fields = {_text(name): value for name, value in zip(event[::2], event[1::2], strict=True)}
        return cls(partition, id.decode(), _text(version), _text(reason), fields)

    def field(self, name: str) -> str | None:
        return _text(self.fields[name]) if name in self.fields else None

    @property
    def written(self) -> str:
        """When the event was written."""
        try:
            return written_at(Version.parse(self.version))
        except ValueError:
            return "?"

    def heading(self) -> dict[str, Any]:
        """The line of `list`."""
        return {
            "partition": self.partition,
            "version": self.version,
            "at": self.written,
            **{name: self.field(name) for name in ("op", "table", "room", "id")},
            "reason": self.reason,
        }

    def body(self) -> dict[str, Any]:
        """The whole letter, readable: JSON decoded, an embedding as its length."""
        shown: dict[str, Any] = {}
        for name, value in self.fields.items():
            if name == LEFT_OUT:
                continue
            shown[name] = _text(value)
            if name in ("content", "metadata"):
                try:
                    shown[name] = orjson.loads(value)
                except ValueError:
                    shown[name] = _text(value)
            if name == "embedding":
                del shown[name]
                shown["embedding_floats"] = len(value) // 4
        body = {**self.heading(), "letter": self.id, "fields": shown}
        if LEFT_OUT in self.fields:
            body["left_out_bytes"] = self.field(LEFT_OUT)
        return body


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


class Letters:
    """The dead letters of all log partitions, or of one."""

    def __init__(self, link: Link, partition: int | None) -> None:
        self._link = link
        self._partition = partition

    async def _partitions(self) -> Sequence[int]:
        await self._link.command("PING")  # now the log's layout is known
        there = self._link.keys.shape.all
        if self._partition is None:
            return there
        if self._partition not in there:
            raise SettingsError(
                f"--partition {self._partition}: there are log partitions {there.start} to {there.stop - 1}"
            )
        return [self._partition]

    async def all(self) -> AsyncIterator[Letter]:
        """The present letters, partition by partition, oldest first."""
        for partition in await self._partitions():
            key = self._link.keys.dead(partition)
            newest = await self._ask("XREVRANGE", key, "+", "-", "COUNT", 1)
            last = str(ZERO)
            while newest and (
                found := await self._ask("XRANGE", key, f"({last}", newest[0][0], "COUNT", _READ)
            ):
                for id, pairs in found:
                    last = id.decode()
                    if len(pairs) >= 4:
                        yield Letter.read(partition, id, pairs)

    async def _ask(self, *command: str | bytes | int) -> Any:
        return await self._link.command(*command)

    async def of(self, versions: Sequence[str], *, everywhere: bool) -> list[Letter]:
        """The letters of these versions.

        MnemobusError if a version has no letter; SettingsError, unless ``everywhere``, if a version has letters in more
        than one log partition.
        """
        wanted = [str(_version(version)) for version in versions]
        found = [
            letter
            for partition in await self._partitions()
            for letter in await self._named(partition, wanted)
        ]
        missing = [version for version in wanted if not any(letter.version == version for letter in found)]
        if missing:
            raise MnemobusError(f"there is no dead letter of version {', '.join(missing)}")
        for version in wanted:
            places = sorted({letter.partition for letter in found if letter.version == version})
            if len(places) > 1 and not everywhere:
                listed = " and ".join(map(str, places))
                raise SettingsError(
                    f"version {version} is in log partitions {listed}: say which, with --partition"
                )
        return found

    def _places(self, partition: int) -> list[str]:
        keys = self._link.keys
        return [keys.dead(partition), keys.reasons(partition), keys.meter(partition)]

    async def _named(self, partition: int, versions: Sequence[str]) -> list[Letter]:
        """The letters of these versions in a log partition: the hash of reasons tells where they are."""
        places = self._places(partition)
        while await self._link.run("index", places, [INDEXED]):
            pass  # letters that an older mnemobus wrote
        letters = []
        for note in await self._ask("HMGET", places[1], *versions) if versions else ():
            what, _, said = _text(note or b"").partition(" ")
            if what == "dead":
                id = said.partition(" ")[0]
                for found, pairs in await self._ask("XRANGE", places[0], id, id):
                    letters.append(Letter.read(partition, found, pairs))
        return letters

    async def requeue(self, letter: Letter) -> str | None:
        """Put the event back into the log. Returns the ID of its entry, or None if somebody else has removed the
        letter."""
        dead, reasons, meter = self._places(letter.partition)
        keys = self._link.keys
        places = [keys.log(letter.partition), dead, meter, reasons, keys.heads(letter.partition)]
        try:
            id = await self._link.run("requeue", places, [letter.id])
        except ResponseError as error:
            if code_of(error) == "OOM":
                raise LogFull(
                    f"Redis at {self._link.address} is out of memory (maxmemory); {letter.version} stays a dead"
                    " letter. Raise maxmemory, or lower MNEMOBUS_RETENTION"
                ) from None
            if "LEFT OUT" in str(error):
                raise MnemobusError(
                    f"the letter of {letter.version} is without its content (MNEMOBUS_DEAD_LETTER_BYTES), and the log"
                    " has been trimmed since: drop it, and write the memory again"
                ) from None
            raise
        return id.decode() if id else None

    async def drop(self, letter: Letter) -> bool:
        """Remove a letter; whether it was there."""
        return bool(await self._link.run("drop", self._places(letter.partition), [letter.id]))


def _version(text: str) -> Version:
    try:
        return Version.parse(text)
    except ValueError as error:
        raise SettingsError(str(error)) from None


@asynccontextmanager
async def _letters(settings: Settings, partition: int | None) -> AsyncIterator[Letters]:
    link = Link(settings)
    try:
        yield Letters(link, partition)
    except AWAY as error:
        raise LogUnavailable(f"Redis at {link.address} can't be reached: {error}") from error
    except RedisError as error:
        raise LogUnavailable(f"Redis at {link.address} refuses: {meaning(error)}") from error
    finally:
        await link.close()


def _run(partition: int | None, work: Callable[[Letters], Coroutine[Any, Any, int]]) -> int:
    settings = Settings.load()

    async def main() -> int:
        async with _letters(settings, partition) as letters:
            return await work(letters)

    return run_until_signal(main())


def list_all(*, partition: int | None, json: bool) -> int:
    async def work(letters: Letters) -> int:
        count = 0
        async for letter in letters.all():
            count += 1
            if json:
                emit(letter.heading())
                continue
            what = " ".join(filter(None, [letter.field("op"), letter.field("table"), letter.field("room")]))
            line = f"{letter.version}  {letter.written}  {what}  {letter.field('id') or '-'}  {letter.reason}"
            if LEFT_OUT in letter.fields:
                line += f" (without its content of {letter.field(LEFT_OUT)} bytes)"
            out().print(_one_line(line), markup=False, soft_wrap=True)
        if not json:
            err().print(f"{count:,} dead letters" if count else "no dead letters")
        return 0

    return _run(partition, work)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show(*, version: str, partition: int | None, json: bool) -> int:
    async def work(letters: Letters) -> int:
        for letter in await letters.of([version], everywhere=True):
            if json:
                emit(letter.body())
            else:
                text = orjson.dumps(letter.body(), option=orjson.OPT_INDENT_2).decode()
                out().print(text, markup=False, soft_wrap=True)
        return 0

    return _run(partition, work)


def requeue(*, versions: Sequence[str], everything: bool, partition: int | None, json: bool) -> int:
    async def work(letters: Letters) -> int:
        chosen = await _chosen(letters, versions, everything)
        done: list[dict[str, Any]] = []
        try:
            for letter in chosen:
                entry = await letters.requeue(letter)
                if entry is None:
                    continue
                done.append({"partition": letter.partition, "version": letter.version, "entry": entry})
                if not json:
                    out().print(f"{letter.version} is in log partition {letter.partition} again, as {entry}")
        finally:
            if json:
                emit({"requeued": done})
        if not json:
            out().print(f"{len(done):,} requeued; what fails again comes back (mnemobus dead list)")
        return 0

    return _run(partition, work)


def drop(*, versions: Sequence[str], everything: bool, partition: int | None, yes: bool, json: bool) -> int:
    chosen: list[Letter] = []
    done: list[Letter] = []

    async def choose(letters: Letters) -> int:
        chosen.extend(await _chosen(letters, versions, everything))
        return 0

    async def remove(letters: Letters) -> int:
        done.extend([letter for letter in chosen if await letters.drop(letter)])
        return 0

    status = _run(partition, choose)
    if status == 0 and chosen:
        # Ask between the two event loops: there Ctrl-C ends the question as usual.
        if not yes and not _agreed(len(chosen)):
            err().print("nothing was dropped")
            return 1
        status = _run(partition, remove)
    if json:
        emit({"dropped": [{"partition": each.partition, "version": each.version} for each in done]})
    else:
        out().print(f"{len(done):,} dropped")
    return status


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise SettingsError("dead drop asks first, and there is no terminal to answer on: give --yes")
    return typer.confirm(f"Drop {count:,} dead letters? What they would have written is lost", err=True)


async def _chosen(letters: Letters, versions: Sequence[str], everything: bool) -> list[Letter]:
    if everything == bool(versions):
        raise SettingsError("name versions (mnemobus dead list), or give --all; one of the two")
    if everything:
        return [letter async for letter in letters.all()]
    return await letters.of(versions, everywhere=False)
