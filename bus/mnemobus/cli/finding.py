"""Findings of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. ``advice`` says what to do, if there is a problem."""

    check: str
    status: str
    found: str
    advice: str = ""
