"""``make bench``: run the tasks, print a table, write bench/results/, draw the plots of docs/benchmarks.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mnemobus
from servers import NoServer

from . import page
from .measure import Result, short
from .tasks import tasks
from .world import World, postgres_server, redis_server

RESULTS = Path(__file__).with_name("results")
PATIENCE = 400.0
"""Seconds until a task is cancelled."""
PACKAGES = (
    "redis",
    "psycopg",
    "aiosqlite",
    "cashews",
    "aiocache",
    "langgraph-checkpoint-postgres",
    "agent-coherence",
)


async def run(names: list[str], quick: bool) -> tuple[list[Result], dict[str, str], dict[str, str]]:
    """The results; the servers' versions; and the failed tasks, with their errors."""
    every = tasks()
    with tempfile.TemporaryDirectory(prefix="mnemobus-bench-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with redis_server(folder / "redis") as (url, redis), postgres_server() as (database, postgres):
            print(f"Redis {redis}, PostgreSQL {postgres}", flush=True)
            world = World(url, redis, database, postgres, folder, quick)

            async def one(name: str) -> list[Result]:
                world.flush()
                async with asyncio.timeout(PATIENCE):
                    return await every[name](world)

            results, failed = await each(names, one)
    return results, {"Redis": redis, "PostgreSQL": postgres}, failed


async def each(
    names: list[str], one: Callable[[str], Awaitable[list[Result]]]
) -> tuple[list[Result], dict[str, str]]:
    """Run tasks, one after the other: the results of those that succeed, and the errors of the others."""
    results: list[Result] = []
    failed: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        began = time.monotonic()
        print(f"[{number}/{len(names)}] {name} ...", end=" ", flush=True)
        try:
            found = await one(name)
        except Exception as error:  # noqa: BLE001 - it is reported, and the others are run
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            print(f"failed: {failed[name]}", flush=True)
            traceback.print_exception(error, limit=-3, file=sys.stderr)
            continue
        results += found
        missed = sum(not target.met for result in found for target in result.targets)
        print(f"{time.monotonic() - began:.0f} s{f', {missed} not met' if missed else ''}", flush=True)
    return results, failed


def machine(servers: dict[str, str], seconds: float) -> dict[str, str]:
    """The machine on which the figures were measured."""
    found = {"processors": str(os.cpu_count()), "memory": _memory(), "system": platform.system()}
    found |= servers | {"Python": platform.python_version(), "mnemobus": mnemobus.__version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"date": time.strftime("%Y-%m-%d"), "seconds": f"{seconds:.0f}"}


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB"


def show(results: list[Result]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("task", "who", "median", "quartiles", "to reach"):
        table.add_column(column, overflow="fold")
    for result in results:
        targets = [str(target) for target in result.targets]
        for index, name in enumerate(result.samples):
            spread = result.spread(name)
            table.add_row(
                result.title if index == 0 else "",
                name,
                f"{short(spread.median)} {result.unit}",
                f"{short(spread.low)} to {short(spread.high)}",
                targets[index] if index < len(targets) else "",
            )
        for target in targets[len(result.samples) :]:
            table.add_row("", "", "", "", target)
        for name, why in result.absent.items():
            table.add_row("", name, "-", "", why)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    for note, about in page.notes(results).items():
        console.print(f"{', '.join(about)}: {note}", style="dim")


def keep(results: list[Result], about: dict[str, str], failed: dict[str, str], quick: bool) -> None:
    """Write the results to a file; for a full run, also draw the plots and fill docs/benchmarks.md."""
    record: dict[str, Any] = {"machine": about, "results": [r.to_json() for r in results], "failed": failed}
    if not quick:
        from . import plots  # matplotlib takes a second to load

        drawn = plots.draw(results, page.FOLDER)
        record["plots"] = sorted({path.stem for path in drawn})
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("quick.json" if quick else "full.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: bench/results/{path.name}")
    if not quick:
        page.write(record)
        print("written: docs/benchmarks.md and its plots")


def main() -> int:
    every = tasks()
    parser = argparse.ArgumentParser(
        "make bench", description="mnemobus beside its alternatives, in the same run."
    )
    parser.add_argument("--quick", action="store_true", help="a minute: fewer rounds, smaller worlds")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(every)}; nothing is written then")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name] or list(every)
    unknown = set(names) - set(every)
    if unknown:
        parser.error(f"there is no task {sorted(unknown)[0]!r}; there are {', '.join(every)}")
    began = time.monotonic()
    # SIGTERM ends it as Ctrl-C does, also in the background, where a shell ignores SIGINT: all is stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        results, servers, failed = asyncio.run(run(names, options.quick))
    except NoServer as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left running", file=sys.stderr)
        return 130
    seconds = time.monotonic() - began
    show(results)
    if not options.only:
        keep(results, machine(servers, seconds), failed, options.quick)
    targets = [target for result in results for target in result.targets]
    missed = [target for target in targets if not target.met]
    print(f"{len(targets)} targets, {len(missed)} not met; {seconds:.0f} s")
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
