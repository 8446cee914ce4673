"""What Redis says about events on their way to the store: the workers' progress, and what could not be applied."""

from __future__ import annotations

from typing import NamedTuple

from ..keys import Version


class Progress(NamedTuple):
    """What the consumer group of a log partition has applied.

    last      the last version that was delivered to it
    pending   the lowest that it has not confirmed; None if nothing is pending
    """

    last: Version | None
    pending: Version | None

    def passed(self, version: Version) -> bool:
        """Whether everything up to this version is applied: the low-water mark is beyond it."""
        if self.last is None or version > self.last:
            return False
        return self.pending is None or version < self.pending


class Fate(NamedTuple):
    """What Redis has noted of an event that could not be applied; see dead.lua.

    noted     whether there is anything
    rejected  why it is a dead letter
    requeued  where the log has it again
    """

    noted: bool
    rejected: str | None = None
    requeued: Version | None = None

    @classmethod
    def read(cls, note: bytes | None) -> Fate:
        what, _, said = (note or b"").decode("utf-8", "replace").partition(" ")
        if what == "dead":
            return cls(True, said.partition(" ")[2])
        if what == "dropped":
            return cls(True, f"{said} (the letter was dropped since)")
        if what == "requeued":
            return cls(True, None, Version.parse(said))
        return cls(False)
