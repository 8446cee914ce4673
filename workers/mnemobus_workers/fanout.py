"""The fan-out of a committed batch, and its confirmation: lua/fanout.lua.

If possible, one call does both: it sends the messages of all feed partitions, and confirms in all log partitions. So a
kill leaves all of it or nothing, and a batch costs one round trip after its commit. If a batch names so many scopes
that the script would block the server, there are several calls. Then the call that confirms waits for the answers of
the others: a pipeline goes on after an error, and no entry may be confirmed before it was fanned out.

The call names the epoch whose buckets it drops, and does nothing in another epoch. A worker that wrote dead letters in
an earlier epoch must first check that they are still there, and only then confirms (apply.py).

If the epoch ends meanwhile, calls that were already made need not be repeated: agents fill the buckets of a new epoch
from the store, and the batch was committed before.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import orjson

from mnemobus.connection.link import Call, Script, ThreadedLink, script
from mnemobus.keys import APPLY_GROUP, Dimensions, Version, id_scope
from mnemobus.log.events import DELETE_ROOM, Event
from mnemobus.settings import Settings

from .standing import Witness

logger = logging.getLogger("mnemobus.fanout")

SCOPES_PER_CALL = 500
"""One call names at most this many scopes: a script blocks the server while it runs."""
FEED_BYTES = 4 << 20
"""A feed partition keeps about this many bytes of messages."""
_PLACES = 4_096
"""The scopes of this many combinations of names are remembered: events repeat them."""

Touched = defaultdict[int, tuple[dict[str, str], dict[str, None]]]
"""By feed partition: the scopes, each with the last version that touched it, if any; and the versions. Each appears
once, in order."""

Confirmed = dict[int, list[bytes]]
"""IDs of entries, by log partition."""


@dataclass(slots=True)
class Part:
    """The fan-out of one log partition's events.

    events those that are finished, applied or not
    dead     why some of them can't be applied
    cleared  memories that deletions of rooms put an end to
    emptied  dimensions of rooms whose deletion is not finished: their scopes change already
    read_in  the epoch in which the events were read from the log; empty if one was requeued, or comes from a replay
    """

    partition: int
    events: Sequence[Event]
    dead: dict[Version, str] = field(default_factory=dict)
    cleared: list[tuple[str, Dimensions]] = field(default_factory=list)
    emptied: list[Dimensions] = field(default_factory=list)
    read_in: str = ""


class _Message(NamedTuple):
    feed_partition: int
    scopes: list[str]
    payload: bytes


class FanOut:
    """Tells everyone. Safe for threads."""

    def __init__(self, settings: Settings, link: ThreadedLink) -> None:
        self._settings = settings
        self._link = link
        self._shared_places = lru_cache(_PLACES)(self._find_places)

    def tell(self, parts: Iterable[Part]) -> None:
        """Fan these out, and confirm nothing."""
        while not self._send(self._link.epoch, parts):
            pass

    def confirm(
        self, epoch: str, parts: Iterable[Part], done: Confirmed, witnesses: Iterable[Witness] = ()
    ) -> bool:
        """Fan these out and confirm the entries, in this epoch. If it is over, nothing is confirmed, and this is
        False."""
        return self._send(epoch, parts, done, witnesses)

    def _send(
        self,
        epoch: str,
        parts: Iterable[Part],
        done: Confirmed | None = None,
        witnesses: Iterable[Witness] = (),
    ) -> bool:
        messages = [message for part in parts for message in self._messages(part, epoch)]
        for calls in self._rounds(epoch, messages, done or {}, witnesses):
            for reply in self._link.pipeline(calls):
                if isinstance(reply, Exception):
                    raise reply
                current, _, *wrong = reply
                if current and current.decode() != epoch:
                    if self._link.epoch == epoch:
                        self._link.enter(current.decode())
                    return False
                for key in wrong:
                    logger.error(
                        "%s holds something else than a log: nothing is confirmed there", key.decode()
                    )
        return True

    def _rounds(
        self, epoch: str, messages: Sequence[_Message], done: Confirmed, witnesses: Iterable[Witness]
    ) -> Iterator[list[Call]]:
        """The calls, in groups. The calls of one group need not wait for each other.

        One server has all keys. On a cluster there would be one call for each slot, one question for the epoch, and at
        the end the calls that confirm.
        """
        groups: list[list[_Message]] = [[]]
        scopes = 0
        for message in messages:
            if scopes and scopes + len(message.scopes) > SCOPES_PER_CALL:
                groups.append([])
                scopes = 0
            groups[-1].append(message)
            scopes += len(message.scopes)
        if len(groups) > 1:
            yield [self._call(epoch, group) for group in groups[:-1]]
        yield [self._call(epoch, groups[-1], done, witnesses)]

    def _call(
        self,
        epoch: str,
        messages: Sequence[_Message],
        done: Confirmed | None = None,
        witnesses: Iterable[Witness] = (),
    ) -> Call:
        names, settings = self._link.keys, self._settings
        keys = [names.epoch, names.identity]
        args: list[str | bytes | int] = [epoch, settings.feed_length, FEED_BYTES, APPLY_GROUP, len(messages)]
        for feed_partition, scopes, payload in messages:
            keys.append(names.feed(feed_partition))
            keys += [names.bucket(epoch, scope) for scope in scopes]
            args += (payload, len(scopes))
        done = done or {}
        args.append(len(done))
        for partition, ids in done.items():
            keys += (names.log(partition), names.meter(partition))
            args += (len(ids), *ids)
        for witness in witnesses:
            args += witness
        return self._script(), keys, args

    def _script(self) -> Script:
        """fanout.lua. If the server knows the flag, it runs also when memory is full.

        It frees buckets and keeps the feed at its length. If the server refused it, agents would keep stale copies.
        """
        plain = script("fanout")
        server = self._link.server
        return plain if server is None or server.speaks < (7, 0) else plain.flagged("allow-oom")

    def _messages(self, part: Part, epoch: str) -> Iterator[_Message]:
        """The messages about one log partition; those about deleted rooms come last."""
        touched: Touched = defaultdict(lambda: ({}, {}))
        rooms: Touched = defaultdict(lambda: ({}, {}))
        partition_of = self._link.keys.feed_partition
        for event in part.events:
            version = str(event.version)
            if event.op == DELETE_ROOM:
                [scope] = event.scopes()
                scopes, versions = rooms[partition_of(scope)]
                scopes[scope], versions[version] = version, None
                continue
            for scope, partition in self._places(event.id, event.dimensions):
                scopes, versions = touched[partition]
                scopes[scope], versions[version] = version, None
        for id, dimensions in part.cleared:
            for scope, partition in self._places(id, dimensions):
                touched[partition][0].setdefault(scope, "")
        for dimensions in part.emptied:
            for scope, partition in self._shared_places(dimensions):
                touched[partition][0].setdefault(scope, "")
        reasons = {str(version): reason for version, reason in part.dead.items()}
        for group in (touched, rooms):
            for partition, (scopes, versions) in group.items():
                names = list(scopes)
                for start in range(0, len(names), SCOPES_PER_CALL):
                    last = start + SCOPES_PER_CALL >= len(names)
                    some = names[start : start + SCOPES_PER_CALL]
                    # A version is named with the last of its scopes: an agent that waits for it may then read all
                    # scopes.
                    body: dict[str, object] = {
                        "p": part.partition,
                        "e": epoch,
                        "v": list(versions) if last else [],
                        "s": some,
                    }
                    letters = {v: reasons[v] for v in versions if v in reasons} if last and reasons else {}
                    if letters:
                        body["d"] = letters
                    # Only the last part names the letters. Agents that hold a scope of another part live must ask
                    # again, too.
                    if part.read_in == epoch and epoch and (last or reasons.keys().isdisjoint(versions)):
                        body["m" if self._link.keys.shape.first else "l"] = 1
                        if last and len(versions) > 1:
                            places = {version: place for place, version in enumerate(versions)}
                            body["t"] = [places.get(scopes[scope], 0) for scope in some]
                    yield _Message(partition, some, orjson.dumps(body))

    def _places(self, id: str, dimensions: Dimensions) -> list[tuple[str, int]]:
        """The scopes that a write touches, and the feed partition of each."""
        scope = id_scope(id)
        return [(scope, self._link.keys.feed_partition(scope)), *self._shared_places(dimensions)]

    def _find_places(self, dimensions: Dimensions) -> list[tuple[str, int]]:
        """The scopes that all memories of these dimensions share."""
        return [(scope, self._link.keys.feed_partition(scope)) for scope in dimensions.shared_scopes()]
