"""An agent like agent_process.py, but its cache is broken: it drops nothing, and serves its copies for ever."""

from __future__ import annotations

import asyncio

import mnemobus.parts
from agent_process import main
from mnemobus.cache.l1 import LocalCache


class StuckCache(LocalCache):
    @property
    def fresh_until(self) -> float:  # type: ignore[override]
        return float("inf")

    @fresh_until.setter
    def fresh_until(self, moment: float) -> None:
        pass

    def drop(self, scope: str) -> bool:
        return False


if __name__ == "__main__":
    mnemobus.parts.LocalCache = StuckCache  # type: ignore[misc]
    asyncio.run(main())
