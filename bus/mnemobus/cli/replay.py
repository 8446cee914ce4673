"""``mnemobus replay``: applies part of the log again. mnemobus_workers.replay does the work; this module shows it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlsplit

from redis.exceptions import RedisError

from ..connection.server_errors import AWAY, meaning
from ..errors import LogUnavailable, SettingsError
from ..keys import Version
from ..settings import Settings, hide_password
from ..tasks import end
from .console import emit, err, out, run_until_signal
from .moments import parse_moment, written_at

if TYPE_CHECKING:
    from mnemobus_workers.replay import Outcome, Replay

_LINE_EVERY = 5.0
"""Seconds between lines of progress if there is no terminal."""


def run(
    *,
    since: str | None,
    until: str | None,
    partitions: Sequence[int],
    into: str | None,
    partial: bool,
    dry_run: bool,
    json: bool,
) -> int:
    settings = Settings.load()
    try:
        # Only the command line imports both packages; otherwise the workers import the bus, never the reverse.
        from mnemobus_workers.replay import Replay
    except ImportError:
        raise SettingsError("mnemobus_workers is not installed here: pip install mnemobus") from None
    other = None if into is None else _other(settings, into)
    try:
        replay = Replay(
            settings,
            since=None if since is None else parse_moment(since, "--since"),
            until=None if until is None else parse_moment(until, "--until"),
            partitions=partitions,
            into=other,
            partial=partial,
            dry_run=dry_run,
        )
    except SettingsError as error:
        if other is None:
            raise
        raise _about_into(error) from None
    return run_until_signal(_main(settings, replay, into, dry_run, json))


def _other(settings: Settings, into: str) -> str:
    """The URL of another store than the bus's."""
    try:
        url = Settings.load(database_url=into).database_url
    except SettingsError as error:
        raise _about_into(error) from None
    if _place(url) == _place(settings.database_url):
        raise SettingsError("--into names the store of the bus itself: leave it out")
    return url


def _about_into(error: SettingsError) -> SettingsError:
    return SettingsError(str(error).replace("MNEMOBUS_DATABASE_URL", "--into", 1))


def _place(url: str) -> tuple[str, int, str]:
    """The place of a store, the same for all spellings of its URL."""
    if url.startswith("sqlite:///"):
        return "", 0, str(Path(url.removeprefix("sqlite:///")).resolve())
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", 0
    with suppress(OSError, UnicodeError):
        host = socket.gethostbyname(host)
    with suppress(ValueError):  # the store says what is wrong with it
        port = parts.port or 5432
    return host, port, unquote(parts.path)


async def _main(settings: Settings, replay: Replay, into: str | None, dry_run: bool, json: bool) -> int:
    began = time.monotonic()
    store = hide_password(into or settings.database_url)
    work = asyncio.create_task(asyncio.to_thread(replay.run))
    showing = asyncio.create_task(_show_progress(replay.outcome, began, json))
    complete = False
    try:
        complete = await asyncio.shield(work)
    except asyncio.CancelledError:
        # It finishes and fans out the current batch, and removes its groups.
        replay.stop()
        await asyncio.gather(work, return_exceptions=True)
        raise
    except (*AWAY, RedisError) as error:
        why = "can't be reached" if isinstance(error, AWAY) else "refuses"
        raise LogUnavailable(
            f"Redis at {hide_password(settings.redis_url)} {why}: {meaning(error)}"
        ) from error
    finally:
        await end([showing])
        seconds = time.monotonic() - began
        if json:
            emit(_record(replay.outcome, store, complete, dry_run, seconds))
        elif complete or replay.outcome.events:
            _print(replay.outcome, store, complete, dry_run, seconds)
    return 1 if replay.outcome.unfit else 0


def _record(outcome: Outcome, store: str, complete: bool, dry_run: bool, seconds: float) -> dict[str, Any]:
    return {
        "complete": complete,
        "dry_run": dry_run,
        "store": store,
        "events": outcome.events,
        "applied": outcome.applied,
        "changed": outcome.changed,
        "dead_letters": outcome.dead_letters,
        "unfit": outcome.unfit,
        "unfit_events": [
            {"partition": p, "version": str(version), "reason": reason}
            for p, version, reason in outcome.named
        ],
        "missing_up_to": outcome.missing,
        "ops": dict(outcome.ops),
        "partitions": {str(partition): count for partition, count in sorted(outcome.partitions.items())},
        "first": _end(outcome.first),
        "last": _end(outcome.last),
        "seconds": round(seconds, 3),
        "events_per_second": round(outcome.events / max(seconds, 1e-3)),
    }


def _end(version: Version | None) -> dict[str, str] | None:
    return None if version is None else {"version": str(version), "at": written_at(version)}


def _print(outcome: Outcome, store: str, complete: bool, dry_run: bool, seconds: float) -> None:
    def say(line: str) -> None:
        out().print(line, markup=False, soft_wrap=True)

    verb = "would be applied" if dry_run else "applied"
    say(f"{outcome.applied:,} events {verb} to {store}: {_counts(outcome.ops)}")
    if outcome.partitions:
        partitions = {f"log partition {p}": count for p, count in sorted(outcome.partitions.items())}
        say(f"from {_counts(partitions)}")
    if outcome.first is not None and outcome.last is not None:
        say(
            f"written from {written_at(outcome.first)} ({outcome.first}) to {written_at(outcome.last)} ({outcome.last})"
        )
    if not dry_run:
        say(
            f"{outcome.changed:,} memories changed; {seconds:.1f} s,"
            f" {outcome.events / max(seconds, 1e-3):,.0f} events/s"
        )
    if outcome.dead_letters:
        say(f"{outcome.dead_letters:,} dead letters left out (mnemobus dead list)")
    if outcome.missing:
        say(f"up to {outcome.missing:,} earlier events are no longer in the log")
    for partition, version, reason in outcome.named:
        err().print(f"{version} of log partition {partition}: {reason}", markup=False, soft_wrap=True)
    if outcome.unfit:
        err().print(f"{outcome.unfit:,} events can't be applied", markup=False)
    if not complete:
        err().print("not complete; run the same command again", markup=False)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "none"


async def _show_progress(outcome: Outcome, began: float, json: bool) -> NoReturn:
    """Until cancelled: a bar on a terminal, a line every few seconds elsewhere."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
    has_bar = err().is_terminal and not json
    next_line = began + _LINE_EVERY
    with Progress("replaying", *columns, console=err(), transient=True, disable=not has_bar) as bar:
        task = bar.add_task("", total=1.0, counts="")
        while True:
            now = time.monotonic()
            rate = outcome.events / max(now - began, 1e-3)
            counts = f"{outcome.events:,} events, {rate:,.0f}/s"
            bar.update(task, completed=outcome.share, counts=counts)
            if not has_bar and now >= next_line:
                next_line = now + _LINE_EVERY
                err().print(f"{outcome.share:.0%}, {counts}")
            await asyncio.sleep(0.1)
