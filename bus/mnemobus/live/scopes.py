"""Live scopes: how they are admitted, opened, read and given up.

A scope is opened in six steps. Their order matters: each is a rule (tests/model/live.py shows what breaks without
it).

1. The bus subscribes to its channels, waits for the confirmation, and learns their positions. It does the same with
   the feed partition, which tells what the store refuses, and what is applied without having come from the log.
2. It asks for the applied mark A of each partition: all events up to A are committed and fanned out.
3. It reads the base: from L2, or, under a lease, from the store. The base has all events up to A, and maybe later
   ones.
4. It fills L2, if the lease still holds.
5. It reads the tail: the scope's events in the log above A, up to H, without those that the store has refused. It
   merges the whole tail at once. The base may have some of the tail already; the result is the scope as the log had
   it at H.
6. If the epoch is still the same, it merges the events beyond H that the channels brought meanwhile, and serves the
   window.

A memory by its id is held live through the channel of its room, as long as it exists: after a deletion it may be made
again in another room.

A window that lost memories does not know what is older than its last one: it is opened again when a query asks for
more than it has. A classic answer after a live one must not lack what the live one showed: such a read waits until
that is committed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from redis.exceptions import RedisError

from ..cache.l1 import MISS, Bucket, LiveBucket, LocalCache, clock
from ..cache.l2 import Lease, SharedCache
from ..cache.query import GET, MANY, Plan, Question
from ..connection.link import Call, Link, script
from ..connection.server_errors import AWAY
from ..connection.transport import Command
from ..errors import BadEvent, MnemobusError, SettingsError
from ..feed.messages import Invalidation
from ..keys import ZERO, Dimensions, Version, slot_of
from ..log.events import DELETE_ROOM, Event, decode
from ..log.pending import INDEXED, PendingWrites
from ..log.progress import Progress
from ..memory import Memory
from ..records import Row, pack_memories, unpack_memories
from ..settings import Settings
from ..store import Query
from .channel import Channel
from .listener import Listener, Slot
from .window import Window

logger = logging.getLogger("mnemobus.live")

_MISSED = 10_000
"""This many scopes are remembered as read once."""
_SPARE = 16
"""Extra memories in a window beyond its size, so that it still has enough after a deletion."""
_TAIL = 1_000
"""An opening reads at most this many events above the applied mark; if there are more, the scope is not held live."""
_JOIN_PATIENCE = 0.25
"""Seconds that an opening waits for its channels. After one that waited so long without success, others don't
wait."""
_POLL = (0.001, 0.05)
"""Seconds between two questions whether a live answer is committed: the first pause, and the longest."""


class Opening:
    """A window that is being opened, and the events that its channels bring meanwhile."""

    __slots__ = ("cancelled", "channels", "later", "partition", "scope")

    def __init__(self, scope: str, partition: int, channels: Sequence[Channel]) -> None:
        self.scope = scope
        self.partition = partition
        self.channels = channels
        self.later: list[tuple[Channel, Event]] = []
        self.cancelled = False


class LiveScopes:
    """The live scopes of one bus.

    ask    answers a query from the store
    join   listens to a partition of the feed; see `Feed.join`
    send   a command on the feed's connection
    wake   starts a heartbeat now
    knows  tells whether the store is known to be the bus's; if not, nothing is shared
    """

    def __init__(
        self,
        settings: Settings,
        link: Link,
        local: LocalCache,
        shared: SharedCache,
        marks: PendingWrites,
        ask: Callable[[Question], Awaitable[list[Row] | int]],
        join: Callable[[int, float], Awaitable[bool]],
        send: Callable[..., Awaitable[None]],
        wake: Callable[[], None],
        knows: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._knows = knows
        self._wake = wake
        self._link = link
        self._local = local
        self._shared = shared
        self._marks = marks
        self._ask = ask
        self._join = join
        self.listener = Listener(link, send, wake, self._take, self._lost)
        if settings.live != "off":
            local.on_dropped = self.dropped
        self._held: dict[Channel, dict[str, LiveBucket]] = {}
        self._openings: dict[str, Opening] = {}
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        """Reads that wait for an opening which another read began."""
        self._missed: OrderedDict[str, Dimensions | None] = OrderedDict()
        """Scopes that were read and are not in L1; the dimensions too, if the scope is a memory."""
        self._shown: dict[str, dict[int, Version]] = {}
        """By scope whose window is gone, and by log partition: the last version shown live, which may not be
        committed yet."""
        self._applied: dict[int, Progress] = {}
        """By log partition: what was applied at the last question."""
        self._doubted: set[int] = set()
        """Log partitions that may have lost, with a new epoch, events that were shown."""
        self._windows = 0
        self._slow = False
        """Whether the last wait for channels ended without their confirmation."""
        self.reads = 0
        self.opened = 0
        self.misses = 0
        self.shared_loads = 0

    def __len__(self) -> int:
        return self._windows

    # Reading

    def concerns(self, plan: Plan) -> bool:
        """Whether a window may answer a query."""
        if not self._may_tell(plan) or not self._local.keeps:
            return False
        # A read of a scope that a write in the outbox touches waits for that write.
        return plan.scope not in self._marks or not self._marks.outboxed(plan.scope)

    def _may_tell(self, plan: Plan) -> bool:
        """Whether a window can answer queries of this form, and the table may be live."""
        return (
            plan.window is not None
            and plan.limit <= self._settings.live_window
            and self._settings.is_live(plan.window.table)
        )

    async def read(self, plan: Plan) -> tuple[Any, str]:
        """The answer, as L1 keeps it, and where it comes from; MISS if the query must be read the classic way.

        Raises StoreError if the store does not answer while a window is opened.
        """
        source = "local"
        for again in (True, False):
            bucket = self._local.live(plan.name)
            if bucket is None:
                if plan.scope not in self._missed and not self._local.has_read(plan.name):
                    break
                bucket, source = await self._open_once(plan)
                if bucket is None:
                    break
            if not await self._caught_up(bucket) or clock() >= self._local.fresh_until:
                break
            if not self._local.has(bucket):
                continue
            answer = self._answer(bucket, plan)
            if answer is not MISS:
                self.reads += 1
                return answer, source
            if not bucket.window.lost:
                break
            if again:
                self._local.drop_live(bucket.scope)  # there may be older ones that it does not know
            else:
                bucket.window.lost = (
                    0  # losses while it was opened don't count: the next opening would not be better
                )
        return MISS, source

    def _tell_at_once(self, bucket: LiveBucket, key: Any) -> Any:
        """The answer to a query that names the scope alone, by the query's key. MISS if the query names more, if the
        window can't tell, or if it must catch up first."""
        for channel in bucket.channels:
            if channel.due is not None and channel.due > bucket.floors[channel]:
                return MISS
        if key is GET:
            return bucket.window.rows[-1] if bucket.window.rows else MISS
        limit = key
        if type(key) is tuple:
            if (
                len(key) != 4
                or not key[0]
                or key.count(None) != 2
                or bucket.scope[:2] not in ("en", "ag", "wo")
            ):
                return MISS
            limit = key[0]
        elif type(key) is not int:
            return MISS
        if not 0 < limit <= self._settings.live_window:
            return MISS
        found = bucket.window.last(limit)
        if found is None:
            return MISS
        self.reads += 1
        return MANY.keep(found)

    def _answer(self, bucket: LiveBucket, plan: Plan) -> Any:
        kept = self._tell(bucket.window, plan)
        if kept is not MISS:
            self._local.answer(bucket, plan.key, kept, self._settings.ttl(plan.table))
        return kept

    @staticmethod
    def _tell(window: Window, plan: Plan) -> Any:
        """A window's answer, as L1 keeps it; MISS if it can't tell."""
        assert plan.window is not None
        if plan.kind.name == "count":
            count = window.count(plan.window)
            return MISS if count is None else count
        found: Sequence[Memory] | None
        found = window.rows[-1:] if plan.kind.name == GET else window.newest(plan.window, plan.limit)
        return MISS if found is None else plan.kind.keep(found)

    def last_known(self, plan: Plan) -> Any:
        """The answer of a window that may be too old to be served; MISS if there is none."""
        bucket = self._local.live(plan.name) if self._may_tell(plan) else None
        return MISS if bucket is None else self._tell(bucket.window, plan)

    def missed(self, plan: Plan, kept: Any) -> None:
        """A query was read the classic way, and its answer is not kept: from the next read on its scope is held
        live."""
        if plan.window is not None or isinstance(kept, Memory):
            self._remember(plan.scope, kept.dimensions if isinstance(kept, Memory) else None)

    def dropped(self, bucket: Bucket) -> None:
        """L1 has dropped a bucket of results: from the next read on its scope is held live."""
        if not bucket.scope.startswith("id:"):
            self._remember(bucket.scope, None)
        elif isinstance(bucket.value, Memory):
            self._remember(bucket.scope, bucket.value.dimensions)

    def _remember(self, scope: str, dimensions: Dimensions | None) -> None:
        self._missed[scope] = dimensions
        self._missed.move_to_end(scope)
        if len(self._missed) > _MISSED:
            self._missed.popitem(last=False)

    def dimensions(self, scope: str) -> Dimensions | None:
        """The dimensions of a memory that was read before, if they are known."""
        return self._missed.get(scope)

    async def _caught_up(self, bucket: LiveBucket) -> bool:
        """Whether a window has all events that its channels are known to have; repairs the channels if necessary."""
        behind = [c for c in bucket.channels if c.due is not None and c.due > bucket.floors[c]]
        if not behind:
            return True
        try:
            await self.listener.catch_up(behind)
        except (*AWAY, RedisError, MnemobusError) as error:
            logger.debug("missed events can't be read from the log: %s", error)
            return False
        return not any(c.due is not None and c.due > bucket.floors.get(c, ZERO) for c in bucket.channels)

    # Opening

    async def _open_once(self, plan: Plan) -> tuple[LiveBucket | None, str]:
        """Open the scope of a query, or wait for the read that opens it. Returns where its base came from, too."""
        scope = plan.scope
        waiting = self._waiting.get(scope)
        if waiting is not None:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append(done)
            self.shared_loads += 1
            await done
            return self._local.live(plan.name), "local"
        self._waiting[scope] = []
        try:
            return await self._open(plan)
        except (*AWAY, RedisError, SettingsError, ValueError) as error:
            logger.debug("%s can't be held live now: %s", scope, error)
            return None, ""
        finally:
            for done in self._waiting.pop(scope):
                if not done.done():
                    done.set_result(None)

    async def _open(self, plan: Plan) -> tuple[LiveBucket | None, str]:
        assert plan.window is not None
        epoch, shape = self._link.epoch, self._link.keys.shape
        places = self._places(plan)
        if not all(self.listener.is_announced(partition) for partition, _ in places):
            return None, ""
        partition = self._link.keys.feed_partition(plan.scope)
        patience = 0.0 if self._slow else _JOIN_PATIENCE
        channels = await self.listener.join(places, patience)
        # The feed tells which events the store refuses, and what is applied without being in the log.
        self._slow = channels is None or not await self._join(partition, patience)
        if channels is None or self._slow:
            return None, ""
        if not self.concerns(plan):  # meanwhile a write that touches it went into the outbox
            return None, ""
        opening = self._openings[plan.scope] = Opening(plan.scope, partition, channels)
        for channel in channels:
            self._held.setdefault(channel, {})
        try:
            partitions = [channel.partition for channel in channels]
            states = await self._marks.state(partitions)
            applied = [state.pending.before() if state.pending else state.last or ZERO for state in states]
            base, complete, source = await self._base(plan)
            tails = await self._tails(plan, partitions, applied)
            if tails is None or opening.cancelled:
                return None, ""
            if epoch != self._link.epoch or shape != self._link.keys.shape:
                return None, ""
            settings = self._settings
            size = 1 if plan.kind.name == GET else settings.live_window + _SPARE
            window = Window(base, complete, size, settings.live_window_bytes)
            floors = {channel: head for channel, (head, _) in zip(channels, tails, strict=True)}
            window.merge(event for _, events in tails for event in events)
            window.merge(event for channel, event in opening.later if event.version > floors[channel])
            if plan.kind.name == GET and not _is_in(window, plan.window):
                self._missed.pop(plan.scope, None)
                return None, ""
        finally:
            if self._openings.get(plan.scope) is opening:
                del self._openings[plan.scope]
        bucket = LiveBucket(plan.name, partition, window, channels, floors, self._tell_at_once, self._gone)
        for channel in channels:
            self._held[channel][plan.scope] = bucket
        self._windows += 1
        self.opened += 1
        self._local.hold(bucket, settings.ttl(plan.table))
        return bucket, source

    def _places(self, plan: Plan) -> list[Slot]:
        """The channels of a query's scope."""
        assert plan.window is not None
        query, keys = plan.window, self._link.keys
        if query.room is not None:
            return [(keys.log_partition(query.room), slot_of("room", query.room))]
        for kind in ("entity", "agent", "world"):
            name = getattr(query, kind)
            if name is not None:
                return [(partition, slot_of(kind, name)) for partition in keys.shape.current]
        raise AssertionError("a query names a dimension")

    async def _base(self, plan: Plan) -> tuple[list[Memory], bool, str]:
        """The scope's newest memories, newest first; whether there are no others; and where they come from."""
        question = self._question(plan)
        ttl = self._settings.ttl(plan.table)
        reply = await self._shared.lookup(plan.scope, question.field, ttl)
        source = "shared"
        if isinstance(reply, bytes):
            found = unpack_memories(reply)
        else:
            source = "store"
            self.misses += 1
            rows = await self._ask(question)
            assert not isinstance(rows, int)
            found = [row.memory() for row in rows]
            if isinstance(reply, Lease) and self._knows():
                await self._shared.fill(reply, pack_memories(found))
        if plan.kind.name == GET:
            return found, True, source
        size = self._settings.live_window + _SPARE
        return found[:size], len(found) <= size, source

    def _question(self, plan: Plan) -> Question:
        if plan.kind.name == GET:
            return Question(plan.scope, GET)
        assert plan.window is not None
        query = plan.window
        scope = Query(query.table, query.room)
        if query.room is None:
            kind = next(kind for kind in ("entity", "agent", "world") if getattr(query, kind) is not None)
            scope = Query(query.table, **{kind: getattr(query, kind)})
        return Question(plan.scope, "recent", scope, self._settings.live_window + _SPARE + 1)

    async def _tails(
        self, plan: Plan, partitions: Sequence[int], applied: Sequence[Version]
    ) -> list[tuple[Version, list[Event]]] | None:
        """For each partition: the last event of the log, and the scope's events above the applied mark without those
        that the store has refused. None if there are too many."""
        keys = self._link.keys
        replies = await self._link.pipeline(
            [
                ("XRANGE", keys.log(partition), f"({mark}", "+", "COUNT", _TAIL + 1)
                for partition, mark in zip(partitions, applied, strict=True)
            ]
            + [("HGET", keys.epoch, "epoch")]
        )
        # A flush begins an epoch that this bus may not know yet: L2's answer may come from a bucket that nobody
        # drops.
        current = replies.pop()
        if isinstance(current, Exception):
            raise current
        if current is None or current.decode() != self._link.epoch:
            return None
        tails = []
        for partition, mark, entries in zip(partitions, applied, replies, strict=True):
            if isinstance(entries, Exception):
                raise entries
            if len(entries) > _TAIL:
                return None
            head, events = mark, []
            for id, fields in entries:
                head = Version.parse(id)
                if b"as" in fields[::2]:
                    continue
                try:
                    event = decode(head, fields)
                except BadEvent:
                    continue
                if event.op == DELETE_ROOM or plan.scope in event.scopes():
                    events.append(event)
            refused = await self._refused(partition, events)
            tails.append((head, [event for event in events if event.version not in refused]))
        return tails

    async def _refused(self, partition: int, events: Sequence[Event]) -> set[Version]:
        """The events that the store has refused, as far as workers have noted it."""
        keys = self._link.keys
        places = [keys.dead(partition), keys.reasons(partition), keys.meter(partition)]
        versions = [str(event.version) for event in events]
        while versions:
            # Workers of an older version wrote the letters alone.
            commands: list[Command | Call] = [
                (script("index"), places, (INDEXED,)),
                ("HMGET", keys.reasons(partition), *versions),
            ]
            indexed, notes = await self._link.pipeline(commands)
            for reply in (indexed, notes):
                if isinstance(reply, Exception):
                    raise reply
            if indexed < INDEXED:
                return {event.version for event, note in zip(events, notes, strict=True) if note is not None}
        return set()

    # Events

    def _take(self, channel: Channel, event: Event) -> None:
        held = self._held.get(channel)
        if held:
            for bucket in self._touched(held, event):
                if event.version > bucket.floors[channel]:
                    bucket.window.take(event)
                    bucket.floors[channel] = event.version
                    self._local.changed(bucket)
                    if not bucket.window.rows and bucket.scope.startswith("id:"):
                        self._local.drop_live(bucket.scope)  # it may be made again in another room
        if self._openings:
            scopes = None if event.op == DELETE_ROOM else event.scopes()
            for opening in self._openings.values():
                if channel in opening.channels and (scopes is None or opening.scope in scopes):
                    opening.later.append((channel, event))
                    if len(opening.later) > _TAIL:
                        opening.cancelled = True

    @staticmethod
    def _touched(held: dict[str, LiveBucket], event: Event) -> Iterable[LiveBucket]:
        if event.op == DELETE_ROOM:
            return list(held.values())
        return [bucket for scope in event.scopes() if (bucket := held.get(scope)) is not None]

    def answered(
        self, partition: int, event: Event, version: Version, previous: tuple[Version, ...] | None
    ) -> None:
        """An own write is in the log."""
        event = event._replace(version=version)
        for channel in self.listener.answered(partition, event, version, previous):
            for bucket in self._touched(self._held.get(channel, {}), event):
                self._local.changed(bucket)  # earlier answers lack it

    def outboxed(self, event: Event) -> None:
        """An own write waits in the outbox: the scopes that it touches are read the classic way."""
        if event.op == DELETE_ROOM:
            for channel in list(self._held):
                self._lost(channel)
        for scope in event.scopes():
            self._give_up(scope)

    def invalidated(self, message: Invalidation) -> None:
        """The feed named committed events. A window has them from the log, or takes them before it answers again.
        Events that the store refused, or that never were in this log, drop windows. So do events of a partition that
        this bus does not listen to yet, after a repartition."""
        elsewhere = message.log_partition not in self._link.keys.shape.current
        if elsewhere:
            self._wake()
        if elsewhere or not message.first_hand or message.dead:
            for scope in message.scopes:
                self._give_up(scope)
            return
        for scope, version in zip(message.scopes, message.last, strict=False):
            bucket = self._local.live_of(scope)
            holder = self._openings.get(scope) if bucket is None else bucket
            if holder is None:
                continue
            for channel in holder.channels:
                if (
                    channel.partition == message.log_partition
                    and channel.tell(version)
                    and bucket is not None
                ):
                    self._local.changed(bucket)  # its earlier answers lack that event

    def feed_lost(self, partition: int) -> None:
        """Messages of a feed partition were lost. L1 has dropped what depends on them."""
        for opening in self._openings.values():
            opening.cancelled = opening.cancelled or opening.partition == partition

    def opens(self, partition: int) -> bool:
        """Whether a window of this feed partition is being opened."""
        return any(opening.partition == partition for opening in self._openings.values())

    def _give_up(self, scope: str) -> None:
        self._local.drop_live(scope)
        opening = self._openings.get(scope)
        if opening is not None:
            opening.cancelled = True

    def _lost(self, channel: Channel) -> None:
        for scope in list(self._held.get(channel, ())):
            self._local.drop_live(scope)
        for opening in self._openings.values():
            if channel in opening.channels:
                opening.cancelled = True

    def _gone(self, bucket: LiveBucket) -> None:
        """A window left L1, for any reason."""
        self._windows -= 1
        rows = bucket.window.rows
        if not bucket.scope.startswith("id:"):
            self._remember(bucket.scope, None)
        elif rows:
            self._remember(bucket.scope, rows[-1].dimensions)
        if len(self._shown) >= _MISSED:
            self._cover_shown()
        shown = self._shown.setdefault(bucket.scope, {})
        for channel in bucket.channels:
            held = self._held.get(channel)
            if held is not None and held.get(bucket.scope) is bucket:
                del held[bucket.scope]
            shown[channel.partition] = max(shown.get(channel.partition, ZERO), bucket.floors[channel])

    def _cover_shown(self) -> None:
        """Make every query wait that a log partition may touch, instead of remembering each scope."""
        deadline = asyncio.get_running_loop().time() + self._settings.own_write_timeout
        for versions in self._shown.values():
            for partition, version in versions.items():
                self._marks.cover(partition, version, deadline)
        self._shown.clear()

    def on_layout(self) -> None:
        """The log was repartitioned: nothing comes on the old channels any more."""
        for opening in self._openings.values():
            opening.cancelled = True
        self._applied.clear()
        self.listener.forget()

    def on_epoch(self) -> None:
        """Redis may have lost events that were shown. Those that the log still has will be committed, and must be
        waited for."""
        for opening in self._openings.values():
            opening.cancelled = True
        self._applied.clear()
        self._doubted = set(self._link.keys.shape.all)
        self.listener.forget()

    # What was shown

    async def committed(self, plan: Plan, reachable: bool) -> bool:
        """Wait until all that was shown live of a query's scope is committed and fanned out. False if that takes too
        long, or if Redis can't be asked. Returns at once for a query that is never answered live."""
        # A memory's dimensions may be forgotten. That it was shown is not.
        if plan.kind.name != GET and not self._may_tell(plan):
            return True
        deadline = clock() + self._settings.own_write_timeout
        pause = _POLL[0]
        while not self._is_applied(self._shown_of(plan)):
            if not reachable or clock() >= deadline:
                return False
            try:
                await self._ask_what_is_applied(self._shown_of(plan))
            except (*AWAY, RedisError, SettingsError) as error:
                logger.debug("can't ask which events are applied: %s", error)
                await asyncio.sleep(pause)
            else:
                if not self._is_applied(self._shown_of(plan)):
                    await asyncio.sleep(pause)
            pause = min(2 * pause, _POLL[1])
        self._shown.pop(plan.scope, None)
        return True

    def _shown_of(self, plan: Plan) -> dict[int, Version]:
        """The last version that a query's scope has shown live, by log partition."""
        bucket = self._local.live(plan.name)
        if bucket is None:
            return self._shown.get(plan.scope, {})
        return {channel.partition: bucket.floors[channel] for channel in bucket.channels}

    def _is_applied(self, shown: dict[int, Version]) -> bool:
        """Whether all events up to these versions are known to be applied."""
        for partition, version in shown.items():
            state = self._applied.get(partition)
            if version != ZERO and (state is None or not state.passed(version)):
                return False
        return True

    async def _ask_what_is_applied(self, partitions: Iterable[int]) -> None:
        asked = sorted(partitions)
        await self._look_for_shown([partition for partition in asked if partition in self._doubted])
        self._applied.update(zip(asked, await self._marks.state(asked), strict=True))

    async def _look_for_shown(self, partitions: Sequence[int]) -> None:
        """After a new epoch: events that were shown beyond the end of the log are lost, and will never be
        committed."""
        if not partitions:
            return
        epoch, keys = self._link.epoch, self._link.keys
        replies = await self._link.pipeline(
            [("XREVRANGE", keys.log(partition), "+", "-", "COUNT", 1) for partition in partitions]
        )
        for partition, reply in zip(partitions, replies, strict=True):
            if isinstance(reply, Exception):
                raise reply
            if epoch != self._link.epoch:
                return
            last = Version.parse(reply[0][0]) if reply else ZERO
            for shown in self._shown.values():
                if partition in shown:
                    shown[partition] = min(shown[partition], last)
            self._doubted.discard(partition)

    # The heartbeat

    async def verify(self) -> None:
        """This is part of the heartbeat. Raises if it can't prove that nothing is missing."""
        await self.listener.verify()
        partitions = {channel.partition for channel in self._held}
        partitions.update(partition for shown in self._shown.values() for partition in shown)
        if partitions:
            await self._ask_what_is_applied(partitions)
        for scope in [scope for scope, shown in self._shown.items() if self._is_applied(shown)]:
            del self._shown[scope]
        for channel in await self.listener.leave(self._uses):
            self._held.pop(channel, None)

    def _uses(self, channel: Channel) -> bool:
        return bool(self._held.get(channel)) or any(
            channel in opening.channels for opening in self._openings.values()
        )


def _is_in(window: Window, place: Query) -> bool:
    """Whether the window has a memory, in that room."""
    return any(row.dimensions[:2] == (place.table, place.room) for row in window.rows)
