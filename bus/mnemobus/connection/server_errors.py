"""The meaning of Redis's errors: this module alone decides it, for agents, workers and commands.

An error has a code, its first word. redis-py removes the code if it has a class for it, and leaves it otherwise. Before
Redis 7 an error in a script is part of the text of another error, and some refusals never had a code. `code_of` gives
the code in all of these cases.

| code | what is the matter | a write | the connection |
|---|---|---|---|
| READONLY, MASTERDOWN, UNBLOCKED | the server has become a replica | outbox | is replaced |
| LOADING | it starts, or has become a replica and fetches its data | outbox | is replaced |
| MOVED, ASK, CLUSTERDOWN, TRYAGAIN | it is of a cluster that does not serve these keys now | outbox | is replaced |
| NOREPLICAS | it has too few replicas: it may be the master that was left behind | outbox | is replaced |
| MISCONF | it can't write to its disk | outbox | stays |
| BUSY | a script runs for too long | outbox | stays |
| OOM | it is full | LogFull at once | stays |
| NOPERM | its user may not do that | WriteFailed at once | stays |
| NOAUTH, WRONGPASS | it refuses the login | AccessDenied from `open`; later on, outbox | was never there |

"Outbox" means: the write is retried for a moment, then it waits in the outbox; without an outbox it fails with
LogUnavailable after `write_timeout`. Nothing was written in any of these cases. Workers wait until the error has
passed.
"""

from __future__ import annotations

import re
from typing import Final

import redis.exceptions

AWAY: Final = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError, TimeoutError)
"""The errors of a Redis that can't be reached."""


SENSELESS: Final = (ValueError, TypeError, LookupError, AttributeError)
"""The errors that follow an answer which Redis would not give, or a key that other software has written."""


class Unfit(redis.exceptions.ConnectionError):
    """A server answers, but can't be used now: it is a replica, for example. It may change, or another server may take
    its place, so this is one of AWAY."""


_CLASSES: Final = {
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.MovedError: "MOVED",
    redis.exceptions.AskError: "ASK",
    redis.exceptions.ClusterCrossSlotError: "CROSSSLOT",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.TryAgainError: "TRYAGAIN",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.AuthorizationError: "NOPERM",
    redis.exceptions.AuthenticationError: "WRONGPASS",  # NOAUTH, too: `status_code` tells which
    redis.exceptions.MaxConnectionsError: "MAXCLIENTS",
    redis.exceptions.NoScriptError: "NOSCRIPT",
}

_IN_TEXT: Final = re.compile(r"(?:\A|@user_script: ?\d+: -?)([A-Z]{2,})(?: |\Z)")
"""A code that redis-py has left at the beginning, or that is inside the text of a script's error (before Redis 7)."""

_PHRASES: Final = (
    ("The user executing the script can't", "NOPERM"),
    ("WAIT cannot be used with replica", "READONLY"),
    ("requires the key to exist", "NOGROUP"),  # XGROUP SETID on a stream that is gone
)
"""Refusals without a code of their own."""

REPLACED: Final = frozenset(
    (
        "READONLY",
        "MASTERDOWN",
        "UNBLOCKED",
        "LOADING",
        "MOVED",
        "ASK",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "NOREPLICAS",
    )
)
"""The codes of a server that takes no writes. A new connection may lead to one that does."""

PASSING: Final = REPLACED | {"MISCONF", "BUSY"}
"""Refusals that pass: the server did nothing, and a retry helps."""

DENIED: Final = frozenset(("NOPERM", "NOAUTH", "WRONGPASS"))

_MEANINGS: Final = {
    "READONLY": "it is a replica: a failover is under way, or REDIS_URL does not name the master",
    "MASTERDOWN": "it is a replica, and has lost its master: a failover is under way",
    "UNBLOCKED": "it has just become a replica",
    "LOADING": "it is loading its data",
    "MOVED": "it is a node of a Redis Cluster that does not serve these keys, and clusters are not supported:"
    " set REDIS_URL to a server that stands alone",
    "ASK": "it is a node of a Redis Cluster that is being resharded, and clusters are not supported",
    "CROSSSLOT": "it is a node of a Redis Cluster, and clusters are not supported: set REDIS_URL to a server that"
    " stands alone",
    "CLUSTERDOWN": "its cluster is down",
    "TRYAGAIN": "its cluster is being resharded",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write asks for: start them, or lower that",
    "MISCONF": "it can't save its data, and takes no writes until it can: check its disk",
    "BUSY": "a script has been running on it for too long; redis-cli SCRIPT KILL ends that",
    "OOM": "it is full (maxmemory): raise that, or lower MNEMOBUS_RETENTION",
    "NOPERM": "its user lacks a permission: see ACL LOG there, and grant it with ACL SETUSER",
    "NOAUTH": "it asks for a password: set REDIS_PASSWORD",
    "WRONGPASS": "it refuses the login: set REDIS_PASSWORD, and the user in REDIS_URL",
}


def code_of(error: object) -> str:
    """The code of an error of Redis; empty if it has none, and for any other error."""
    if not isinstance(error, redis.exceptions.RedisError):
        return ""
    told = getattr(error, "status_code", None)
    for cls in type(error).__mro__:  # the class of MASTERDOWN is derived from that of CLUSTERDOWN
        if cls in _CLASSES:
            return _CLASSES[cls] if told in (None, "ERR") else str(told)
    text = str(error)
    for phrase, code in _PHRASES:
        if phrase in text:
            return code
    found = _IN_TEXT.search(text)
    return found[1] if found else ""


def is_away(error: object) -> bool:
    """Whether Redis can't be used for now: it can't be reached, or refuses for a reason that passes."""
    return isinstance(error, AWAY) or code_of(error) in PASSING


def meaning(error: object) -> str:
    """The meaning of an error and what to do, then Redis's own message; only the latter if the code is not one of those
    above."""
    told = _MEANINGS.get(code_of(error))
    return f"{told} ({error})" if told else str(error) or type(error).__name__
