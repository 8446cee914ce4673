"""``mnemobus adopt``: the operator makes this store, as it is, the store of this bus."""

from __future__ import annotations

import sys

import orjson
import typer
from redis.exceptions import RedisError

from ..connection.link import ThreadedLink
from ..connection.server_errors import AWAY
from ..errors import LogUnavailable, SettingsError
from ..identity import Registered, arguments
from ..keys import Version
from ..settings import Settings
from ..store import Identity, open_writer
from .console import emit, out


def run(*, yes: bool, json: bool) -> int:
    settings = Settings.load()
    writer, link = open_writer(settings), ThreadedLink(settings, connections=2)
    try:
        writer.open()
        identity = writer.identity()
        before = Registered.of(link.client.execute_command("HGETALL", link.keys.identity))
        if not (yes or _agreed(link, identity, before)):
            return 1
        there = Registered.of(link.run("identity", [link.keys.identity], arguments(identity, "adopt")))
        writer.serve(there.bus, link.keys.prefix, there.life, instead=True)
        # The same store: the operator accepts its losses. Another one: it must get all events of the log.
        work = None
        if before.store != identity.store:
            known = identity.reached is not None and identity.bus == there.bus
            since = str(Version(identity.reached or 0, 0)) if known else ""
            work = {"why": "another store was adopted", "since": since}
            link.client.hset(link.keys.identity, "resync", orjson.dumps(work))
        link.client.delete(link.keys.epoch)  # copies come from the store before
    except (RedisError, *AWAY) as error:
        raise LogUnavailable(f"Redis at {link.address} can't be used: {error}") from error
    finally:
        writer.close()
        link.close()
    if json:
        emit(
            {
                "bus": there.bus,
                "store": there.store,
                "before": before.store or None,
                "again": work is not None,
            }
        )
    else:
        out().print(f"{identity.where} is the store of the bus {link.keys.prefix!r}", markup=False)
        if work is not None:
            out().print(f"workers apply the log again since {work['since'] or 'its beginning'}", markup=False)
    return 0


def _agreed(link: ThreadedLink, identity: Identity, before: Registered) -> bool:
    """Tell the operator the consequences, and ask for agreement."""
    if not sys.stdin.isatty():
        raise SettingsError("there is no terminal to ask the question on: give --yes")
    if before.store and before.store != identity.store:
        print(f"The bus {link.keys.prefix!r} has the store {before.store[:8]}: {before.where}.")
    if identity.bus and identity.bus != before.bus:
        print(f"The store {identity.store[:8]} belongs to the bus {identity.prefix!r}.")
    print(
        f"The store {identity.store[:8]}, {identity.where}, becomes the one of {link.keys.prefix!r}, as it is."
    )
    return typer.confirm("Are all agents and workers of both stopped, and is that intended?")
