"""Where events were before they moved to `mnemobus.log.events`. To be gone with the version after the next."""

from __future__ import annotations

import warnings

from .log.events import DELETE, DELETE_ROOM, PUT, UPDATE, Event, decode

warnings.warn("mnemobus.events has moved to mnemobus.log.events", DeprecationWarning, stacklevel=2)

__all__ = ["DELETE", "DELETE_ROOM", "PUT", "UPDATE", "Event", "decode"]
