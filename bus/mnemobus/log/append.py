"""One call to the log: what it carries, what it is answered, and what a refusal means.

A call carries the producer's id and a sequence number, and the script answers a repeated one with the IDs that it
gave the first time. So a caller that does not hear the answer repeats the call (publisher.py, outbox.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple
from zlib import crc32

from redis.exceptions import ResponseError

from ..connection.link import Link, ThreadedLink
from ..connection.server_errors import PASSING, Unfit, code_of, meaning
from ..errors import BacklogFull, LogClosed, LogFull, Overtaken, PartitionEnded, Unready, WriteFailed
from ..keys import SLOTS, Dimensions, Version, slot_of, slots_of
from .events import DELETE_ROOM
from .full_redis import give_way

CALL_EVENTS = 1_000


CALL_BYTES = 8 << 20
"""What one call carries at most; a script blocks the server while it runs."""


ANNOUNCED_BYTES = 64 << 10
"""Bytes up to which an event is part of its announcement; listeners fetch a larger one."""


_DELETE_ROOM = DELETE_ROOM.encode()


_ROOM = 5
"""The place of an event's room among its fields."""


_LAYOUT = 5
"""The place of the layout among the script's arguments."""


Field = str | bytes | int


class Logged(NamedTuple):
    """What the log answered to a call.

    versions  of the events, in order
    previous  for each event, the one before it in each of its slots (`slots_of`; of a deletion of a room, in the
              room's); None where the answer does not tell, as of a call that was repeated
    """

    versions: list[Version]
    previous: list[tuple[Version, ...]] | None


async def append(
    link: Link, partition: int, producer: str, sequence: int, events: Sequence[Sequence[bytes]]
) -> Logged:
    """One call: put events, as field names and values, into a log partition.

    May be repeated; the answer is the same then. Raises one of AWAY if the outcome is unknown; Unready, BacklogFull,
    LogFull, another WriteFailed, or a SettingsError if nothing was written; PartitionEnded if nothing was, and nothing
    ever will be by this call; Overtaken if the producer has gone on to another call.
    """
    if not link.laid_out:  # a bus that opened while Redis was away: to connect is to learn it
        await link.command("PING")
    epoch = link.epoch
    call = publish_call(link, partition, producer, sequence, events)
    try:
        try:
            reply = await link.run("publish", *call)
        except ResponseError as error:
            if code_of(error) != "OOM" or not await give_way(link):
                raise
            reply = await link.run("publish", *call)  # nothing was written: cached results were in the way
    except Unfit as error:
        raise Unready(f"{error}; nothing was written") from error
    except ResponseError as error:
        raise _refusal(link, partition, producer, error) from error
    return read_reply(link, epoch, events, reply)


def read_reply(
    link: Link, epoch: str, events: Iterable[Sequence[bytes]], reply: Sequence[Sequence[str | bytes]]
) -> Logged:
    """What publish.lua answers to a call that was made in an epoch."""
    if epoch and epoch != link.epoch:
        # The answer may be from before Redis lost what it tells of.
        for callback in link.on_late:
            callback()
    versions = list(map(Version.parse, reply[0]))
    if len(reply) < 2 or epoch != link.epoch:
        return Logged(versions, None)
    before, at, previous = list(map(Version.parse, reply[1])), 0, []
    for fields in events:
        till = at + max(1, len(_slots(fields)))
        previous.append(tuple(before[at:till]))
        at = till
    return Logged(versions, previous)


def _slots(fields: Sequence[bytes]) -> tuple[int, ...]:
    """The slots of an event, given by its fields; none: all."""
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    if named[b"op"] == _DELETE_ROOM:
        return ()
    get = named.get
    return _slots_named(named[b"room"], get(b"agent"), get(b"entity"), get(b"world"))


@lru_cache(10_000)
def _slots_named(room: bytes, *others: bytes | None) -> tuple[int, ...]:
    agent, entity, world = (None if name is None else name.decode() for name in others)
    return slots_of(Dimensions("", room.decode(), agent, entity, world))


def publish_call(
    link: Link | ThreadedLink, partition: int, producer: str, sequence: int, events: Iterable[Sequence[bytes]]
) -> tuple[list[str], list[Field]]:
    """KEYS and ARGV of publish.lua. The call is repeated where it was made first; new ones are taken only where their
    rooms belong by the layout that the log has."""
    keys = link.keys
    shape = keys.shape
    arguments: list[Field] = [producer, sequence, link.settings.max_backlog, "", link.epoch, shape.name]
    # The same whether the fields come from memory or from the outbox.
    digest = blake2b(digest_size=8)
    for fields in events:
        digest.update(b"\0".join(fields))
        if shape.first + crc32(fields[_ROOM]) % shape.size != partition:
            arguments[_LAYOUT] = ""  # it is known differently since the call was made first
        slots = _slots(fields)
        if slots:
            arguments.append(len(slots))
            arguments += slots
        else:
            arguments += (-SLOTS, slot_of("room", fields[_ROOM].decode()))
        sizes = list(map(len, fields))
        arguments += (",".join(map(str, sizes)) if sum(sizes) <= ANNOUNCED_BYTES else "", len(fields))
        arguments += fields
    arguments[3] = digest.hexdigest()
    return [
        keys.log(partition),
        keys.producers(partition),
        keys.meter(partition),
        keys.heads(partition),
    ], arguments


def _refusal(link: Link, partition: int, producer: str, error: ResponseError) -> WriteFailed:
    code, number = code_of(error), str(error).rpartition(" ")[2]
    if code == "OOM":
        return LogFull(
            f"Redis at {link.address} is out of memory (maxmemory); nothing was written. Raise maxmemory,"
            " or lower MNEMOBUS_RETENTION"
        )
    if code == "CLOSED":
        return LogClosed(
            "the log is being laid out anew (mnemobus repartition), and takes no writes for up to"
            f" {int(number) / 1000:g} s; nothing was written"
        )
    if code == "ENDED":
        return PartitionEnded(
            f"log partition {partition} takes no more writes: the log was laid out anew; nothing was written"
        )
    if code == "BACKLOG":
        return BacklogFull(
            f"log partition {partition} holds {number} events that no worker has applied yet"
            f" (MNEMOBUS_MAX_BACKLOG is {link.settings.max_backlog}); nothing was written. Are workers"
            " running? `mnemobus doctor` tells"
        )
    if code == "SUPERSEDED":
        return Overtaken(
            f"producer {producer} is in use by another process, or went on without this write: nothing was written"
        )
    if code == "TAKEN":
        return Overtaken(
            f"producer {producer} is in use by another process, which has made call {number} of it: nothing was written"
        )
    refused = f"Redis at {link.address} refuses the write; nothing was written: {meaning(error)}"
    return Unready(refused) if code in PASSING else WriteFailed(refused)
