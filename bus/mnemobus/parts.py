"""What a bus is made of: each part, and what it needs of the others."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from .cache.l1 import LocalCache
from .cache.l2 import SharedCache
from .cache.query import Question
from .cache.read_path import ReadPath
from .cache.shadow import Shadow
from .connection.link import Link
from .feed.subscription import Feed
from .health.checkup import Checkup
from .identity import Acquaintance
from .known import Known
from .live.scopes import LiveScopes
from .log.pending import PendingWrites
from .reads import Reads
from .records import Row
from .settings import Settings
from .stats import Stats
from .store import open_reader
from .tokens import Tokens
from .writes import Writes


class BusParts:
    """The parts of one bus. None of them does anything before lifecycle.py opens it.

    check  raises if the bus may not be used, here and now
    """

    def __init__(self, settings: Settings, check: Callable[[], None]) -> None:
        self.id = secrets.token_hex(8)
        """Names this bus among all that share its Redis: its producer id in the log."""
        self.link = Link(settings)
        self.reader = open_reader(settings)
        self.local = LocalCache(settings.local_max_entries, settings.local_max_bytes)
        self.shared = SharedCache(self.link, settings.lease)
        self.pending = PendingWrites(self.link)
        self.feed = Feed(self.link, self.local, self.pending, self.id)
        self.acquaintance = Acquaintance(self.link, self.reader, self.local.clear)
        self.live = LiveScopes(
            settings,
            self.link,
            self.local,
            self.shared,
            self.pending,
            self.ask,
            self.feed.join,
            self.feed.send,
            self.feed.wake,
            self.acquaintance.knows,
        )
        self.feed.live = self.live
        self.path = ReadPath(
            settings,
            self.link.keys,
            self.local,
            self.shared,
            self.feed,
            self.pending,
            self.acquaintance.knows,
            self.live,
        )
        known = Known(self.local)
        self.reads = Reads(self.reader, self.local, self.live, self.path, known, check)
        self.tokens = Tokens(self.link, self.pending, self.feed, self.local, check)
        self.writes = Writes(
            self.id,
            self.link,
            self.reader,
            self.local,
            self.live,
            self.pending,
            known,
            self.tokens,
            self.reads.get,
            check,
        )
        self.outbox = self.writes.outbox
        self.shadow = Shadow(settings, self.ask, self.local, self.shared, self.pending)
        self.checkup = Checkup(
            self.link,
            self.reader,
            self.local,
            self.feed,
            self.shared,
            self.shadow,
            self.outbox,
            self.id,
            self.acquaintance,
        )
        if self.outbox is not None:
            self.feed.heartbeat.on_good.append(self.outbox.hurry)
        self._epochs = 0
        self.link.on_epoch.append(self._count_epoch)
        self.link.on_layout.append(self.tokens.forget_ended)

    async def ask(self, question: Question) -> list[Row] | int:
        """What the store answers, past all caches."""
        return await question.ask(self.reader)

    def _count_epoch(self, epoch: str) -> None:
        self._epochs += 1

    def stats(self) -> Stats:
        """The figures of all parts."""
        local, shared, feed, path = self.local, self.shared, self.feed, self.path
        live, listener, publishers = self.live, self.live.listener, self.writes.publishers
        return Stats(
            hits_local=local.hits,
            hits_shared=shared.hits,
            misses=path.misses + live.misses,
            shared_loads=path.shared_loads + live.shared_loads,
            stale_reads=path.stale_reads,
            own_write_waits=path.own_write_waits,
            own_write_timeouts=path.own_write_timeouts,
            entries=local.entries,
            bytes=local.bytes,
            drops=local.drops,
            evictions=local.evictions,
            fills=shared.fills,
            refused_fills=shared.refused_fills,
            writes=sum(p.events for p in (publishers, *publishers)),
            publish_calls=sum(p.calls for p in (publishers, *publishers)),
            publish_retries=sum(p.retries for p in (publishers, *publishers)),
            outbox=0 if self.outbox is None else self.outbox.waiting,
            outboxed=0 if self.outbox is None else self.outbox.kept,
            marks=len(self.pending),
            listening=feed.listening,
            invalidations=feed.invalidations,
            gaps=feed.positions.gaps,
            replays=feed.heartbeat.replays,
            resets=feed.positions.resets,
            reconnects=feed.reconnects,
            epochs=self._epochs,
            bad_messages=feed.bad_messages,
            failed_heartbeats=feed.heartbeat.failures,
            restarted_tasks=feed.restarted_tasks,
            live_windows=len(live),
            live_channels=len(listener),
            live_reads=live.reads,
            live_events=listener.events,
            live_gaps=listener.gaps,
            live_repairs=listener.repairs,
            live_lost=listener.lost,
            live_opened=live.opened,
            shadow_reads=self.shadow.reads,
            breaches_local=self.shadow.breaches_local,
            breaches_shared=self.shadow.breaches_shared,
        )
