"""The password of the embedded Redis: every user who may read the data directory may use the server.

`mnemobus up` and `mnemobus demo` listen on 127.0.0.1, where every account of the machine can connect. So if the
settings have no password, the server gets a random one. It is in a file of the data directory that only its owner can
read; the next line of the file has the server's port. Agents and commands on the same data directory find it there
whenever they connect, if neither REDIS_PASSWORD nor REDIS_URL has one.

Every start of `mnemobus up` makes a new password, and its end removes the file. So if a client later sends the password
to another program at the same address, that program can't use it.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from urllib.parse import urlsplit

from . import private
from .settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FILE = "redis.password"


def has_password(settings: Settings) -> bool:
    """Whether the settings name a password, or a user."""
    parts = urlsplit(settings.redis_url)
    named = parts.username not in (None, "", "default")
    return bool(settings.redis_password or parts.password) or named or "password=" in parts.query


def generate(settings: Settings) -> str:
    """A password for the server at ``settings.redis_url``, noted in the data directory."""
    word = secrets.token_urlsafe(32)
    path = settings.data_dir / _FILE
    path.unlink(missing_ok=True)
    with private.open_file(path, "x") as file:
        file.write(f"{word}\n{port_of(settings)}\n")
    return word


def forget(settings: Settings) -> None:
    """The server is gone: make sure that nobody sends the password any more."""
    with suppress(OSError):
        (settings.data_dir / _FILE).unlink(missing_ok=True)


def find(settings: Settings) -> str | None:
    """The password of the embedded server, if these settings lead to one on this data directory and have none."""
    parts = urlsplit(settings.redis_url)
    if parts.scheme != "redis" or (parts.hostname or "localhost") not in LOOPBACK or has_password(settings):
        return None
    try:
        word, port = (settings.data_dir / _FILE).read_text("ascii").split()
    except (OSError, ValueError):
        return None
    return word if port == str(port_of(settings)) else None


def port_of(settings: Settings) -> int:
    """The port of ``settings.redis_url``."""
    return urlsplit(settings.redis_url).port or 6379
