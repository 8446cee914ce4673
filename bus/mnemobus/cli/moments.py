"""Points in time, or in the log, in the forms that people write."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from ..errors import SettingsError
from ..keys import Version

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def parse_moment(when: str, option: str) -> float | Version:
    """Seconds ago, or a version; SettingsError, which names the option, if it is neither."""
    match = _AGO.match(when.strip())
    if match:
        return float(match[1]) * _SECONDS[match[2]]
    try:
        return Version.parse(when.strip())
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(when.strip())
    except ValueError:
        raise SettingsError(
            f"{option} {when!r} is not one of 90s, 15m, 2h, 1d, a date with a zone, a stream ID"
        ) from None
    if moment.utcoffset() is None:
        raise SettingsError(f"{option} {when!r}: the date needs a zone, as in 2025-06-01T12:00:00Z")
    return Version(max(int(moment.timestamp() * 1000), 0), 0)


def written_at(version: Version) -> str:
    """When an event was written, in UTC, to the millisecond; the version itself where that is no date."""
    try:
        return (
            datetime.fromtimestamp(version.ms / 1000, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
    except (ValueError, OverflowError, OSError):
        return str(version)
