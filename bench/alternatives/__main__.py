"""`PYTHONPATH=.:tests python -m bench.alternatives`: try each alternative on real servers, and show what it can't do.

The servers are found in the same way as in the tests (CONTRIBUTING.md).
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from servers import NoServer, find_postgres, find_redis

from . import NAMES, Place, Unfit, load
from .survey import PATIENCE, database, survey


def main() -> int:
    console = Console()
    table = Table(
        "alternative", "version", "correct", "hit stays local", "seen by another", "listing", "cannot"
    )
    failed = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {}
        for kind, server in (("redis_url", find_redis(folder)), ("database_url", find_postgres())):
            try:
                urls[kind] = stack.enter_context(server)
            except NoServer as error:
                console.print(str(error))
        if "database_url" in urls:
            urls["database_url"] = stack.enter_context(database(urls["database_url"]))
        place = Place(vectors=8, ttl=60.0, **urls)
        for name in NAMES:
            cls = load(name)
            words = "\n".join(f"{task}: {why}" for task, why in cls.cannot.items())
            try:
                found = asyncio.run(survey(name, place))
            except Unfit as error:
                table.add_row(cls.name, f"{cls.package} {version(cls.package)}", "", "", "", "", str(error))
                continue
            except Exception as error:  # noqa: BLE001 - it is reported, and the others are tried
                console.print(f"{cls.name}: {type(error).__name__}: {error}")
                failed += 1
                continue
            failed += not (found.reads and found.many)
            table.add_row(
                cls.name,
                f"{cls.package} {version(cls.package)}",
                "yes" if found.reads and found.many else "NO",
                "yes" if found.hits else "no",
                _seconds(found.across),
                "-" if "recent" in cls.cannot else _seconds(found.listing),
                words,
            )
    console.print(table)
    return 1 if failed else 0


def _seconds(seconds: float | None) -> str:
    return f"not in {PATIENCE:g} s" if seconds is None else f"{seconds * 1000:.1f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
