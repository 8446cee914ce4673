"""The messages of the feed: which events were committed, and what they touched.

A feed partition is a short stream and a channel that carry the same messages. On the channel a message is
``<id> <previous id> <payload>``; in the stream it is an entry with the fields `prev` and `m`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from ..keys import Version


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One message of the feed.

    versions  the events that it covers, of one log partition
    scopes    the scopes that they touched, in the feed partition of the message
    dead      the events that could not be applied, with the reason
    epoch     the epoch whose shared buckets were dropped
    first_hand
              whether all events came from this epoch's log, under the versions that it gave them: agents that
              follow the log know them. False for a replay, requeued dead letters and workers of an older version.
    last      for each scope the last of the versions that touched it; empty if the message does not say it
    """

    id: Version
    previous: Version
    log_partition: int
    versions: tuple[Version, ...]
    scopes: tuple[str, ...]
    dead: dict[Version, str]
    epoch: str
    first_hand: bool = False
    last: tuple[Version, ...] = ()


def decode_invalidation(id: bytes | str, previous: bytes | str, payload: bytes) -> Invalidation:
    """Make a message from an ID, its predecessor's ID and a JSON payload; ValueError if the payload is not valid.

    Payload: {"p": log partition, "e": epoch, "v": [versions], "s": [scopes], "d": {version: reason}, "l": 1,
    "t": [places]}. "d" and "l" are optional. "t" is present if there is more than one version: for each scope the place
    in "v" of the last version that touched it. "m" replaces "l" if the log was repartitioned: an older agent listens to
    channels on which no event comes any more, so it has to drop its live scopes.
    """
    body = orjson.loads(payload)
    if not isinstance(body, dict):
        raise ValueError("the payload is no JSON object")
    partition, versions, scopes, dead = body.get("p"), body.get("v"), body.get("s"), body.get("d", {})
    if not isinstance(partition, int) or not isinstance(versions, list) or not isinstance(dead, dict):
        raise ValueError("p, v or d is missing or of another type")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise ValueError("s is no list of scopes")
    epoch = body.get("e", "")
    if not isinstance(epoch, str):
        raise ValueError("e is no epoch")
    named = tuple(Version.parse(str(v)) for v in versions)
    return Invalidation(
        Version.parse(id),
        Version.parse(previous),
        partition,
        named,
        tuple(scopes),
        {Version.parse(str(v)): str(reason) for v, reason in dead.items()},
        epoch,
        1 in (body.get("l"), body.get("m")),
        named * len(scopes) if len(named) == 1 else _last_of(body.get("t", []), named, len(scopes)),
    )


def _last_of(places: object, versions: tuple[Version, ...], count: int) -> tuple[Version, ...]:
    """The versions at these places, one for each scope; empty if the payload has no places."""
    if not places:
        return ()
    if not isinstance(places, list) or len(places) != count:
        raise ValueError("t is no list with a place for each scope")
    if not all(type(place) is int and 0 <= place < len(versions) for place in places):
        raise ValueError("t names a version that is not in v")
    return tuple(versions[place] for place in places)


def decode_message(data: bytes) -> Invalidation:
    """A message of a feed channel: ``<id> <previous id> <payload>``; ValueError if it is not valid."""
    parts = data.split(b" ", 2)
    if len(parts) != 3:
        raise ValueError("not of the form <id> <previous id> <payload>")
    return decode_invalidation(*parts)


def decode_entry(id: bytes, fields: Sequence[bytes]) -> Invalidation:
    """A message from an entry of a feed stream; ValueError if it is not valid."""
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    if b"prev" not in named or b"m" not in named:
        raise ValueError("prev or m is missing")
    return decode_invalidation(id, named[b"prev"], named[b"m"])
