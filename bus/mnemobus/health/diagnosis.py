"""The cause of an error of Redis or of the database, and what to do about it. `bus.health()` and `mnemobus doctor` both
use this, so that they say the same about the same error.

An error is recognised by its class or its code, and by its text only if it has neither, as when no connection could be
made. An unknown error keeps its own text, with general advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import redis.exceptions as redis

from ..connection.server_errors import code_of
from ..errors import SchemaError, SettingsError

SLOW = "is it the right address? Is the server overloaded, or paused?"
PLAIN = "does it speak TLS? If not, write redis:// in REDIS_URL, not rediss://"
START_REDIS = "start it (`mnemobus up` runs one here), or set REDIS_URL"


class Trouble(NamedTuple):
    """Something that is wrong, and what to do about it."""

    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}: {self.advice}" if self.advice else self.what


# Redis

_ADVICE = {
    "READONLY": "point REDIS_URL at the server that takes writes; if this is a failover, it ends by itself",
    "MASTERDOWN": "a replica that has lost its primary: point REDIS_URL at the server that takes writes",
    "LOADING": "wait until it has read its data; mnemobus then goes on by itself",
    "OOM": "raise maxmemory, or lower MNEMOBUS_RETENTION and restart the workers, which trim the log",
    "MISCONF": "check its disk: it may be full, or not writable; the server's log tells",
    "NOREPLICAS": "bring its replicas back, or lower min-replicas-to-write",
    "NOPERM": "give the Redis user this permission (ACL SETUSER)",
    "NOAUTH": "set REDIS_PASSWORD, or REDIS_URL with a password",
    "WRONGPASS": "correct REDIS_PASSWORD, or the user and password in REDIS_URL",
    "MOVED": "it is a Redis Cluster, which is not supported: use a server that stands alone",
    "ASK": "it is a Redis Cluster, which is not supported: use a server that stands alone",
    "CLUSTERDOWN": "it is a Redis Cluster, which is not supported: use a server that stands alone",
    "BUSY": "a script of somebody's blocks the server: redis-cli SCRIPT KILL",
    "MAXCLIENTS": "raise maxclients there, or have fewer connections (REDIS_POOL_MAX)",
}

_MATTERS = {
    "READONLY": "is a replica, and takes no writes",
    "MASTERDOWN": "is a replica, and takes no writes",
    "LOADING": "is loading its data",
    "OOM": "takes no writes: it is full",
    "MISCONF": "takes no writes",
    "NOREPLICAS": "takes no writes",
    "NOPERM": "does not let this user do what it asks",
}

_WORDS = (
    (
        "without any password configured",
        "it has no password: unset REDIS_PASSWORD, and take it out of REDIS_URL",
    ),
    ("no password is set", "it has no password: unset REDIS_PASSWORD, and take it out of REDIS_URL"),
    ("invalid username-password", _ADVICE["WRONGPASS"]),
    ("invalid password", _ADVICE["WRONGPASS"]),
    ("must be called with the client already authenticated", _ADVICE["NOAUTH"]),
    ("refuses the login", _ADVICE["NOAUTH"]),
    ("is a replica", _ADVICE["READONLY"]),
    ("is loading its data", _ADVICE["LOADING"]),
    ("has lost its master", _ADVICE["MASTERDOWN"]),
    ("its cluster is down", _ADVICE["CLUSTERDOWN"]),
    ("is a node of a Redis Cluster", _ADVICE["MOVED"]),
    ("lacks a permission", _ADVICE["NOPERM"]),
    (
        "DB index is out of range",
        "it has fewer databases: use a lower number (REDIS_DB, or the end of REDIS_URL)",
    ),
    ("SELECT is not allowed in cluster mode", _ADVICE["MOVED"]),
    ("max number of clients", _ADVICE["MAXCLIENTS"]),
    (
        "protected mode",
        "set a password there (requirepass), or let it listen on this machine's address alone",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "name its authority in REDIS_URL: rediss://...?ssl_ca_certs=/path/to/ca.pem",
    ),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: write redis:// in REDIS_URL, not rediss://"),
    ("record layer failure", "it does not speak TLS: write redis:// in REDIS_URL, not rediss://"),
    (
        "Connection closed by server",
        "if it asks for TLS, write rediss:// in REDIS_URL; else its log tells why",
    ),
    ("Connection reset", "if it asks for TLS, write rediss:// in REDIS_URL; else its log tells why"),
    ("unknown command", "6.2 is needed, or Valkey; managed servers may have renamed it"),
    ("answers what makes no sense", "correct REDIS_URL, or take another REDIS_KEY_PREFIX"),
    ("is not Redis", "something else listens there: correct REDIS_URL"),
    ("Protocol error", "something else listens there: correct REDIS_URL"),
    ("Connection refused", "nothing listens there: " + START_REDIS),
    ("No such file or directory", "nothing listens there: " + START_REDIS),
    ("Name or service not known", "there is no such host: correct REDIS_URL"),
    ("name resolution", "the host's name can't be looked up: correct REDIS_URL, or check the DNS"),
    ("not known", "there is no such host: correct REDIS_URL"),
)


def of_redis(error: BaseException, address: str) -> Trouble:
    """The cause of an error that Redis answered, or of one in reaching it."""
    text = " ".join(str(error).split()) or "no answer in time"
    words = _advice(text)
    if isinstance(error, SettingsError) or text.startswith("Redis at "):
        return Trouble(text, words)
    code = code_of(error)
    if code in _ADVICE:
        shown = text if text.startswith(code) else f"{code} {text}"
        what = _MATTERS.get(code, "answers an error")
        return Trouble(f"Redis at {address} {what}: {shown}", words or _ADVICE[code])
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError | TimeoutError):
        late = (
            isinstance(error, redis.TimeoutError | TimeoutError) or "Timeout" in text or "timed out" in text
        )
        # To a server without TLS, the beginning of a TLS connection is a command that does not end.
        slow = PLAIN if address.startswith("rediss:") else SLOW
        what = f"Redis at {address} does not answer: {text}"
        return Trouble(what, words or (slow if late else START_REDIS))
    return Trouble(f"Redis at {address} answers {text}", words or "look into the server's log")


def _advice(text: str) -> str:
    return next((advice for words, advice in _WORDS if words in text), "")


def of_server(info: Mapping[str, str], refusal: BaseException | None, address: str) -> Iterator[Trouble]:
    """The reasons why a server takes no writes.

    info     the fields of INFO; empty if the user may not ask for it
    refusal  its error in answer to a write that would have changed nothing; None if it accepted that
    """
    code = "" if refusal is None else code_of(refusal)
    if info.get("loading", "0") == "1":
        done = info.get("loading_loaded_perc", "?")
        yield Trouble(f"Redis at {address} is loading its data ({done} %)", _ADVICE["LOADING"])
    elif info.get("role", "master") != "master":
        primary = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        yield Trouble(
            f"Redis at {address} takes no writes: it is a replica of {primary}", _ADVICE["READONLY"]
        )
    elif code == "OOM" and info:
        used, limit = info.get("used_memory_human", "?"), info.get("maxmemory_human", "?")
        yield Trouble(
            f"Redis at {address} takes no writes: it is full, {used} of {limit} used", _ADVICE["OOM"]
        )
    elif code == "NOREPLICAS":
        good = info.get("min_slaves_good_slaves", info.get("connected_slaves", "?"))
        yield Trouble(
            f"Redis at {address} takes no writes: only {good} replicas are in step with it (min-replicas-to-write)",
            _ADVICE["NOREPLICAS"],
        )
    elif code == "MISCONF":
        which = "append-only file" if info.get("aof_last_write_status", "ok") != "ok" else "snapshot"
        yield Trouble(
            f"Redis at {address} takes no writes: it could not write its {which} (MISCONF)",
            _ADVICE["MISCONF"],
        )
    elif refusal is not None:
        yield of_redis(refusal, address)


# The database

_STATES = {
    "3D000": "create the database, or correct its name in MNEMOBUS_DATABASE_URL",
    "28P01": "correct the password in MNEMOBUS_DATABASE_URL",
    "28000": "correct the user in MNEMOBUS_DATABASE_URL, or let it in (pg_hba.conf)",
    "25006": "it is read-only: a standby, or default_transaction_read_only; point MNEMOBUS_DATABASE_URL at the primary",
    "42501": "grant the database user this permission",
    "53100": "make room on its disk",
    "53300": "raise max_connections there (or the user's or the database's own limit), or lower"
    " MNEMOBUS_DATABASE_POOL_MAX",
    "57P03": "wait until it has started; mnemobus then goes on by itself",
    "57014": "look at the database: is it slow, or locked? See MNEMOBUS_DATABASE_TIMEOUT",
}
_FOREIGN = "other software's tables are in the way: give mnemobus a database of its own"

_STORE_WORDS = (
    ("password authentication failed", _STATES["28P01"]),
    ("no password supplied", "put the password into MNEMOBUS_DATABASE_URL"),
    ("pg_hba.conf", _STATES["28000"]),
    ("too many connections", _STATES["53300"]),  # of this role, or to this database
    ("remaining connection slots", _STATES["53300"]),
    ("role ", _STATES["28000"]),
    ("read-only", _STATES["25006"]),
    ("too many clients", _STATES["53300"]),
    ("starting up", _STATES["57P03"]),
    ("permission denied", _STATES["42501"]),
    ("does not support SSL", "take sslmode=require out of MNEMOBUS_DATABASE_URL, or turn on TLS there"),
    ("No space left", _STATES["53100"]),
    ("Connection refused", "nothing listens there: start the database, or correct MNEMOBUS_DATABASE_URL"),
    ("could not translate host name", "there is no such host: correct MNEMOBUS_DATABASE_URL"),
    ("not known", "there is no such host: correct MNEMOBUS_DATABASE_URL"),
    ("timeout expired", "the host does not answer: is it the right address? Is there a firewall?"),
    (
        "connections (MNEMOBUS_DATABASE_POOL_MAX) were busy",
        "raise MNEMOBUS_DATABASE_POOL_MAX, or ask less at once",
    ),
    # SQLite
    (
        "is not a database",
        "it is not an SQLite file: correct MNEMOBUS_DATABASE_URL, or restore it from a backup",
    ),
    ("malformed", "the file is damaged: restore it from a backup, then `mnemobus replay`"),
    ("unable to open database file", "does its directory exist, and may this user open the file?"),
    ("readonly database", "this user may not write the file or its directory: check their permissions"),
    ("database or disk is full", _STATES["53100"]),
    ("disk I/O error", "check its disk, and the directory's permissions"),
    ("database is locked", "another program holds the file: end it, or use PostgreSQL"),
    ("no such table", _FOREIGN),
    ("no such column", _FOREIGN),
    ("has no column", _FOREIGN),
    ("already exists", _FOREIGN),
)


def of_store(error: BaseException | str) -> Trouble:
    """The cause of an error of the store, or of one that a worker has reported as text."""
    text = " ".join(str(error).split()) or "no answer in time"
    state = "" if isinstance(error, str) else _state(error)
    if state[:2] == "42" and state != "42501":
        return Trouble(text, _FOREIGN)
    if state in _STATES:
        return Trouble(text, _STATES[state])
    if "database" in text and "does not exist" in text:
        return Trouble(text, _STATES["3D000"])
    for words, advice in _STORE_WORDS:
        if words in text:
            return Trouble(text, advice)
    if "relation" in text or "column" in text:
        return Trouble(text, _FOREIGN)
    if isinstance(error, SchemaError):
        return Trouble(text, "or is MNEMOBUS_DATABASE_URL another than the workers'?")
    return Trouble(text, "check MNEMOBUS_DATABASE_URL and the database")


def _state(error: BaseException | None) -> str:
    """The SQLSTATE of the database error behind a store's error; empty if there is none."""
    while error is not None:
        state: Any = getattr(error, "sqlstate", None)
        if state:
            return str(state)
        error = error.__cause__
    return ""
