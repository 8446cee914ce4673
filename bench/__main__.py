"""``make bench``: runs the tasks, prints a table, writes bench/results/, draws the plots of docs/benchmarks.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import redis as redis_py
from rich.console import Console
from rich.table import Table

import mnemobus
from servers import NoServer

from .measure import Result, short
from .tasks import tasks
from .world import World, postgres_server, redis_server

RESULTS = Path(__file__).with_name("results")


async def run(names: list[str], quick: bool) -> list[Result]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="mnemobus-bench-") as made:
        folder = Path(made)
        with redis_server(folder / "redis") as (url, version), postgres_server() as (database, postgres):
            world = World(url, version, database, postgres, folder, quick)
            print(f"Redis {version}, PostgreSQL {postgres}", flush=True)
            for name in names:
                began = time.monotonic()
                print(f"{name} ...", end=" ", flush=True)
                world.flush()
                try:
                    results += await tasks()[name](world)
                except Exception as error:
                    print(f"failed: {type(error).__name__}: {error}", flush=True)
                    raise
                print(f"{time.monotonic() - began:.0f} s", flush=True)
    return results


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    return {
        "cpus": str(os.cpu_count()),
        "python": platform.python_version(),
        "system": platform.system(),
        "redis-py": redis_py.__version__,
        "mnemobus": mnemobus.__version__,
        "at": time.strftime("%Y-%m-%d"),
    }


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
        for note in result.notes:
            table.add_row("", "", "", "", note)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> int:
    every = tasks()
    parser = argparse.ArgumentParser(
        "make bench", description="mnemobus beside its alternatives, in the same run."
    )
    parser.add_argument("--quick", action="store_true", help="a minute: fewer rounds, smaller worlds")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(every)}")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name] or list(every)
    unknown = set(names) - set(every)
    if unknown:
        parser.error(f"there is no task {sorted(unknown)[0]!r}; there are {', '.join(every)}")
    began = time.monotonic()
    try:
        results = asyncio.run(run(names, options.quick))
    except NoServer as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left running", file=sys.stderr)
        return 130
    show(results)
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / ("quick.json" if options.quick else "full.json")
        record = {"machine": machine(), "results": [result.to_json() for result in results]}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    missed = [target for result in results for target in result.targets if not target.met]
    print(
        f"{sum(len(r.targets) for r in results)} targets, {len(missed)} not met; {time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
