"""What a bus reports about itself: its figures since it was opened, and its health."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one bus since it was opened.

    Reads
        hits_local        answered from this process (L1)
        hits_shared       answered from Redis (L2)
        misses            answered from the store
        shared_loads      reads that waited for another's read of the same query
        stale_reads       answers marked stale
        own_write_waits   reads that had to wait for a write of this bus
        own_write_timeouts  of these, those that waited too long, and were marked stale
    L1
        entries, bytes    results held now, and roughly what they take
        drops             buckets dropped because their scope was invalidated
        evictions           buckets dropped to make room
    L2
        fills             results shared
        refused_fills     results that came too late to be shared: their scope was invalidated meanwhile
    Writes
        writes            events logged
        publish_calls       round trips for that; fewer than the writes if several went together
        publish_retries   calls repeated because their outcome was unknown or the log was busy
        outbox            writes that wait in the outbox now
        outboxed          writes that went there because the log could not be reached
        marks             writes of this bus that the feed has not named yet
    The feed
        listening           feed partitions that this bus listens to
        invalidations     messages applied
        gaps              messages whose predecessor was missing
        replays           times that a part of the feed was read again
        resets              times that all buckets of a partition were dropped, since the feed didn't reach back
        reconnects        times that the listening connection was lost
        epochs            times that Redis had restarted, failed over or lost its data
        bad_messages        messages that could not be decoded
        failed_heartbeats heartbeats that could not verify every position
        restarted_tasks   background tasks that died and were started again
    Live scopes
        live_windows      scopes held live now
        live_channels       channels of the log that this bus listens to
        live_reads          answers computed from a window; later hits on them count as hits_local
        live_events       events taken into channels, in the order of the log
        live_gaps         messages whose predecessor was missing
        live_repairs      times that a part of the log was read again
        live_lost           times that all windows of a channel were dropped, since a gap could not be repaired
        live_opened       windows opened
    Shadow reads
        shadow_reads      hits of L1 and L2 that were compared with the store
        breaches_local    copies in this process that were older than promised; they were dropped
        breaches_shared     copies in Redis that were older than promised; they were dropped
    """

    hits_local: int
    hits_shared: int
    misses: int
    shared_loads: int
    stale_reads: int
    own_write_waits: int
    own_write_timeouts: int
    entries: int
    bytes: int
    drops: int
    evictions: int
    fills: int
    refused_fills: int
    writes: int
    publish_calls: int
    publish_retries: int
    outbox: int
    outboxed: int
    marks: int
    listening: int
    invalidations: int
    gaps: int
    replays: int
    resets: int
    reconnects: int
    epochs: int
    bad_messages: int
    failed_heartbeats: int
    restarted_tasks: int
    live_windows: int
    live_channels: int
    live_reads: int
    live_events: int
    live_gaps: int
    live_repairs: int
    live_lost: int
    live_opened: int
    shadow_reads: int
    breaches_local: int
    breaches_shared: int


@dataclass(frozen=True, slots=True)
class Health:
    """The health of a bus, in words for people.

    ok            a write now would be logged and committed, and a read answered, as far as can be known without writing
    redis, store  what answers there, or why there is no answer
    feed          whether local copies are served, and when they were last verified
    backlog       events in the log that no worker has applied yet; -1 if Redis is away
    dead_letters  events that no worker could apply; -1 if Redis is away
    problems      what is wrong and what to do about it, one sentence each
    workers       how many report that they work
    """

    ok: bool
    redis: str
    store: str
    feed: str
    backlog: int
    dead_letters: int
    problems: tuple[str, ...]
    workers: str = ""
