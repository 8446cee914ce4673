"""Every protection is needed: with one of them taken out of the code, a test of its promise fails.

Each case patches one place in a copy of the packages and runs the named tests on that copy. A protection whose removal
nothing noticed would be either untested or unneeded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """Take ``cut`` out of ``file`` and put ``paste`` in its place: then ``test`` has to fail."""

    name: str
    file: str
    cut: str
    paste: str
    test: str


MUTATIONS = [
    Mutation(
        "the lease: a fill is accepted only while its lease is there (G4)",
        "bus/mnemobus/lua/fill.lua",
        "if not lease or string.match(lease, '^(%S+) ') ~= ARGV[2] then",
        "if false then",
        "scenarios/test_late_fills.py::test_g4_a_load_that_an_invalidation_overtakes_enters_no_cache",
    ),
    Mutation(
        "the fan-out takes the shared bucket away, leases and all (G4)",
        "bus/mnemobus/lua/fanout.lua",
        "    redis.call('UNLINK', unpack(KEYS, i + 1, i + buckets))\n",
        "",
        "scenarios/test_late_fills.py::test_g4_a_load_that_an_invalidation_overtakes_enters_no_cache",
    ),
    Mutation(
        "bucket identity: a late fill lands in the bucket that its read began with (G4)",
        "bus/mnemobus/cache/l1.py",
        "        if not self.has(bucket):\n            return\n",
        "        bucket = self._buckets.get(bucket.name, bucket)\n        if not self.has(bucket):\n"
        "            return\n",
        "scenarios/test_late_fills.py::test_g4_a_load_that_an_invalidation_overtakes_enters_no_cache",
    ),
    Mutation(
        "the predecessor check: a message that does not follow the position is a gap (G5)",
        "bus/mnemobus/feed/positions.py",
        "        if message.previous == position:\n",
        "        if message.id > position:\n",
        "test_feed.py::test_g5_a_gap_is_seen_with_the_next_message",
    ),
    Mutation(
        "the heartbeat fetches what pub/sub did not bring (G5)",
        "bus/mnemobus/feed/heartbeat.py",
        "            await self._catch_up([(partition, head) for partition, _, head in heads])\n",
        "",
        "scenarios/test_messages.py::test_g5_exactly_one_lost_message_on_a_quiet_key_is_found_and_repaired_within_the_bound",
    ),
    Mutation(
        "the heartbeat proves that its server takes writes (G5)",
        "bus/mnemobus/feed/heartbeat.py",
        "                self._link.proof(),\n",
        '                ("TIME",),\n',
        "test_feed.py::test_g5_a_server_that_has_become_a_replica_vouches_for_nothing",
    ),
    Mutation(
        "a full server that says so before all else is asked for its role (G5)",
        "bus/mnemobus/feed/heartbeat.py",
        '        if info.get("role") != "master":\n',
        "        if False:\n",
        "test_feed.py::test_g5_a_full_replica_that_does_not_say_that_it_is_one_vouches_for_nothing",
    ),
    Mutation(
        "a connection whose server takes no writes is not used again (G7)",
        "bus/mnemobus/connection/transport.py",
        "not self._transport.is_closing()\n\n    def _refused(self, text: str) -> Exception:\n"
        "        error = _error(self._parse_error, text)\n        if code_of(error) in REPLACED:\n"
        "            self.refusal = error\n",
        "not self._transport.is_closing()\n\n    def _refused(self, text: str) -> Exception:\n"
        "        error = _error(self._parse_error, text)\n        if code_of(error) in REPLACED:\n            pass\n",
        "scenarios/test_failover.py::test_g7_without_an_outbox_a_failover_that_lasts_is_a_clear_error_and_a_short_one_is_none",
    ),
    Mutation(
        "a copy is served only while the feed is verified (G5)",
        "bus/mnemobus/cache/l1.py",
        "        if now >= self.fresh_until or now >= bucket.expires:\n",
        "        if now >= bucket.expires:\n",
        "test_feed.py::test_g5_local_copies_are_not_served_while_redis_does_not_answer",
    ),
    Mutation(
        "the epoch: an unseen run id begins a new one (G5)",
        "bus/mnemobus/lua/epoch.lua",
        "if known[1] == ARGV[1] and (ARGV[3] == '' or known[3] == ARGV[3]) then",
        "if known[1] then",
        "test_feed.py::test_g5_a_restart_of_redis_begins_a_new_epoch",
    ),
    Mutation(
        "the epoch: a server that was a replica meanwhile begins a new one (G5)",
        "bus/mnemobus/connection/link.py",
        '    return history if history.strip("0") else ""\n',
        '    return ""\n',
        "test_feed.py::test_g5_a_server_that_was_a_replica_meanwhile_begins_a_new_epoch",
    ),
    Mutation(
        "the sequence number: a call that is repeated is answered and not done again (G1)",
        "bus/mnemobus/lua/publish.lua",
        "  if last.seq == seq then\n",
        "  if false then\n",
        "test_log.py::test_g1_a_call_that_is_repeated_is_answered_and_not_done_again",
    ),
    Mutation(
        "the digest of a call: another process's answer is not taken for one's own (G1)",
        "bus/mnemobus/lua/publish.lua",
        "    if last.d and last.d ~= ARGV[4] then -- none",
        "    if false then -- none",
        "scenarios/test_one_producer.py::test_g1_two_processes_with_one_producer_id_get_an_error_and_are_not_merged",
    ),
    Mutation(
        "the version condition: an older write that comes later changes nothing (G2)",
        "bus/mnemobus/store/merge.py",
        'WHERE ({" OR ".join(newer)}) AND',
        'WHERE (TRUE OR {" OR ".join(newer)}) AND',
        "test_store.py::test_g1_a_redelivered_batch_changes_nothing",
    ),
    Mutation(
        "the version condition, field by field (G2)",
        "bus/mnemobus/store/merge.py",
        "                > {greatest}(m.put_version, m.{field}_version) THEN excluded.{field}",
        "                > x'' THEN excluded.{field}",
        "test_store.py::test_g2_the_last_version_wins_whatever_comes_first",
    ),
    Mutation(
        "the tombstone of a memory (G3)",
        "bus/mnemobus/store/merge.py",
        "                <= {greatest}(m.deleted_version, excluded.deleted_version) THEN NULL",
        "                < x'' THEN NULL",
        "test_store.py::test_a_deletion_that_overtakes_its_put",
    ),
    Mutation(
        "the tombstone of a room (G3)",
        "bus/mnemobus/store/sqlite/statements.py",
        "WHERE t.tbl = n.tbl AND t.room = n.room)",
        "WHERE t.tbl = n.tbl AND t.room = n.room AND FALSE)",
        "test_store.py::test_g3_a_deleted_room_stays_deleted",
    ),
    Mutation(
        "what a deletion put an end to is read once all steps are done, whoever did them (G5)",
        "workers/mnemobus_workers/apply.py",
        "                for some in self._writer.ended(deletion):\n",
        "                for some in ():\n",
        "test_workers.py::test_g1_a_large_room_whose_deletion_is_broken_off",
    ),
    Mutation(
        "a room under deletion is not seen by who names it (G3)",
        "bus/mnemobus/store/queries.py",
        "AND put_version > coalesce(",
        "OR put_version > coalesce(",
        "test_store.py::test_a_large_room_is_deleted_in_steps",
    ),
    Mutation(
        "the low-water mark: nothing is trimmed that pends (G1)",
        "bus/mnemobus/lua/trim.lua",
        "  if pending[1] > 0 then\n",
        "  if false then\n",
        "test_broker.py::test_trimming_stops_at_what_is_pending_or_not_delivered",
    ),
    Mutation(
        "to confirm comes last (G1)",
        "workers/mnemobus_workers/broker.py",
        "        self.fail()\n",
        "        pass\n",
        "test_broker.py::test_a_failed_batch_stays_pending_and_comes_back",
    ),
    Mutation(
        "invalidations are sent also for what lost against a newer version in the store (G5)",
        "workers/mnemobus_workers/apply.py",
        "            _share_out(applied, parts)\n        witnesses",
        "            _share_out(applied, parts)\n            for part in parts:\n"
        "                part.events = [e for e in part.events if e.id in applied.won]\n        witnesses",
        "test_workers.py::test_g1_whatever_a_worker_was_at_when_it_was_killed_is_done_by_another",
    ),
    Mutation(
        "nothing is confirmed in an epoch whose buckets were not dropped (G4)",
        "bus/mnemobus/lua/fanout.lua",
        "if current ~= '' and current ~= ARGV[1] then\n",
        "if false then\n",
        "test_broker.py::test_g4_a_batch_is_confirmed_in_the_epoch_whose_buckets_are_dropped_or_not_at_all",
    ),
    Mutation(
        "nothing is confirmed that not everyone was told (G5)",
        "workers/mnemobus_workers/fanout.py",
        "            yield [self._call(epoch, group) for group in groups[:-1]]\n"
        "        yield [self._call(epoch, groups[-1], done, witnesses)]\n",
        "            pass\n"
        "        yield [*(self._call(epoch, group) for group in groups[:-1]),"
        " self._call(epoch, groups[-1], done, witnesses)]\n",
        "test_broker.py::test_g5_nothing_is_confirmed_that_not_everyone_was_told",
    ),
    Mutation(
        "the epoch of the server: what a crash lost of relaxed commits is noticed (G1)",
        "workers/mnemobus_workers/standing.py",
        "        if there.epoch and self._writer.epoch() != there.epoch:\n",
        "        if False:\n",
        "test_relaxed.py::test_g1_what_a_crash_lost_is_applied_again_though_newer_commits_hide_it",
    ),
    Mutation(
        "the log keeps what the store may not have on its disk (G1)",
        "workers/mnemobus_workers/upkeep.py",
        "        if standing is not None and standing.reached is not None:\n",
        "        if False:\n",
        "test_relaxed.py::test_g1_what_a_crash_lost_is_applied_again_though_newer_commits_hide_it",
    ),
    Mutation(
        "the own-write mark (G6)",
        "bus/mnemobus/cache/read_path.py",
        "        stale = plan.scope in self._pending and not await self._wait_for_own_writes(plan.scope)\n",
        "        stale = False\n",
        "test_bus.py::test_g6_a_bus_reads_its_own_writes_in_every_query",
    ),
    Mutation(
        "the outbox keeps the number of the call that was under way (G7)",
        "bus/mnemobus/log/publisher.py",
        "kept = await overflow.keep(self._partition, events, call)",
        "kept = await overflow.keep(self._partition, events, None)",
        "test_outbox.py::test_g1_a_call_with_unknown_outcome_is_not_doubled_by_the_outbox",
    ),
    Mutation(
        "an answer that comes in another epoch than it was asked in is not believed (G1)",
        "bus/mnemobus/log/append.py",
        "    if epoch and epoch != link.epoch:\n",
        "    if False:\n",
        "test_log.py::test_g1_an_answer_that_was_on_its_way_while_redis_lost_the_write_is_not_believed",
    ),
    Mutation(
        "a refusal is not believed while an unanswered copy may still arrive (G1)",
        "bus/mnemobus/log/publisher.py",
        "            if not unanswered or isinstance(error, PartitionEnded):\n",
        "            if True:\n",
        "test_log.py::test_g1_a_refusal_is_not_believed_while_an_unanswered_copy_may_still_arrive",
    ),
    Mutation(
        "the identity: an agent with another database than the workers is refused (G6)",
        "bus/mnemobus/identity.py",
        "    if there.store != identity.store:\n",
        "    if False:\n",
        "test_identity.py::test_an_agent_that_came_first_with_a_wrong_database_gives_way_to_the_workers",
    ),
    Mutation(
        "the witnesses: a store that lost what was committed is noticed (G1)",
        "workers/mnemobus_workers/standing.py",
        "        lost = self._writer.lacks(dict(there.witnesses.values()))\n",
        "        lost: list[str] = []\n",
        "test_identity.py::test_a_store_that_went_back_in_time_gets_from_the_log_what_it_lost",
    ),
    Mutation(
        "the file: what is committed is in the one that is there now (G1)",
        "bus/mnemobus/store/sqlite/writer.py",
        "        if self._connection is not None and file != self._file:\n",
        "        if False:\n",
        "test_identity.py::test_g1_a_file_that_is_replaced_under_the_workers_swallows_nothing",
    ),
    Mutation(
        "what is confirmed is asked for among the reasons before it is believed (G1)",
        "bus/mnemobus/log/pending.py",
        "if known or unnoted else []",
        "if False else []",
        "test_truth.py::test_each_rejected_write_is_told_however_many_there_are",
    ),
    Mutation(
        "what came together in one mark is still waited for (G6)",
        "bus/mnemobus/log/marks.py",
        "            or bool(self._covers and self._over(scope))\n",
        "",
        "test_truth.py::test_g6_marks_beyond_their_number_come_together_and_still_hold",
    ),
    Mutation(
        "what is late of an earlier life is no contradiction (G3)",
        "bus/mnemobus/store/merge.py",
        "            if version <= row.buried or (version <= row.put and version <= row.deleted):\n",
        "            if version <= row.buried:\n",
        "test_store.py::test_g3_what_was_deleted_may_be_made_again_with_other_dimensions",
    ),
    Mutation(
        "newer writes wait behind the outbox (G7)",
        "bus/mnemobus/log/publisher.py",
        "return self._overflow is not None and self._overflow.waiting > 0",
        "return False",
        "test_outbox.py::test_g7_with_redis_away_writes_wait_and_are_published_once_and_in_order",
    ),
    Mutation(
        "live: an event that does not follow the position is a gap (G9)",
        "bus/mnemobus/live/channel.py",
        "        if message.previous != self.position or message.event is None:\n",
        "        if message.event is None:\n",
        "test_window.py::test_g9_a_channel_takes_what_follows_and_nothing_else",
    ),
    Mutation(
        "live: each event is taken in once (G9)",
        "bus/mnemobus/live/channel.py",
        "        if message.version <= self.position:\n            return Heard.KNOWN\n",
        "",
        "test_window.py::test_g9_a_channel_takes_what_follows_and_nothing_else",
    ),
    Mutation(
        "live: the heads move with each event, so that a lost message shows (G5)",
        "bus/mnemobus/lua/publish.lua",
        "redis.call('HSET', KEYS[4], unpack(moved))\n",
        "",
        "test_live.py::test_g5_a_lost_message_is_repaired_by_the_heartbeat",
    ),
    Mutation(
        "live: the heartbeat takes from the log what pub/sub did not bring (G5)",
        "bus/mnemobus/live/listener.py",
        "        await self._repair([each for each in behind if _is_behind(*each)])\n\n    async def catch_up",
        "\n    async def catch_up",
        "test_live.py::test_g5_a_lost_message_is_repaired_by_the_heartbeat",
    ),
    Mutation(
        "live: events that nobody announced are noticed (G5)",
        "bus/mnemobus/live/listener.py",
        "            if self._unannounced.setdefault(partition, unannounced) != unannounced:\n",
        "            if False:\n",
        "test_live.py::test_g5_an_event_that_nobody_announced_ends_what_is_held_live",
    ),
    Mutation(
        "live: an own write is in the window when write returns (G6)",
        "bus/mnemobus/live/channel.py",
        "            if previous == self.position:\n",
        "            if False:\n",
        "test_window.py::test_g6_an_own_write_is_taken_where_it_follows_and_else_remembered",
    ),
    Mutation(
        "live: a read waits for an own write that its window has not come to (G6)",
        "bus/mnemobus/live/scopes.py",
        "        if not behind:\n            return True\n",
        "        return True\n",
        "test_live.py::test_g6_a_window_that_is_behind_an_own_write_catches_up_before_it_answers",
    ),
    Mutation(
        "live: an opening merges the tail of the log (G9)",
        "bus/mnemobus/live/scopes.py",
        "            window.merge(event for _, events in tails for event in events)\n",
        "",
        "test_live.py::test_g9_a_window_that_is_opened_has_what_is_logged_and_not_committed",
    ),
    Mutation(
        "live: what is opened in an epoch that is over is not held (G5)",
        "bus/mnemobus/live/scopes.py",
        "        if current is None or current.decode() != self._link.epoch:\n            return None\n",
        "",
        "test_live.py::test_g5_a_window_that_is_opened_in_an_epoch_that_is_over_is_not_held",
    ),
    Mutation(
        "live: an opening leaves out what the store is known to have refused (G9)",
        "bus/mnemobus/live/scopes.py",
        "            refused = await self._refused(partition, events)\n",
        "            refused: set[Version] = set()\n",
        "test_live.py::test_g9_a_window_that_is_opened_leaves_out_what_is_known_as_refused",
    ),
    Mutation(
        "live: what the store refuses is withdrawn (G9)",
        "bus/mnemobus/live/scopes.py",
        "        if elsewhere or not message.first_hand or message.dead:\n",
        "        if elsewhere or not message.first_hand:\n",
        "test_live.py::test_g9_what_the_store_refuses_is_withdrawn",
    ),
    Mutation(
        "live: what is applied without being in the log is read anew (G5)",
        "bus/mnemobus/live/scopes.py",
        "        if elsewhere or not message.first_hand or message.dead:\n",
        "        if elsewhere or message.dead:\n",
        "test_live.py::test_g5_what_is_applied_without_being_in_the_log_is_read_anew",
    ),
    Mutation(
        "live: a window goes with its partition of the feed (G5)",
        "bus/mnemobus/live/scopes.py",
        "            opening.cancelled = opening.cancelled or opening.partition == partition\n",
        "            pass\n",
        "test_live.py::test_g5_a_feed_that_is_lost_while_a_window_is_opened_takes_it_along",
    ),
    Mutation(
        "live: what the feed has told is in the next answer (G5)",
        "bus/mnemobus/live/scopes.py",
        "                    and channel.tell(version)\n",
        "",
        "test_live.py::test_g5_what_the_feed_names_is_in_the_next_answer_though_it_was_not_heard_live",
    ),
    Mutation(
        "live: what was shown does not go back over a restart of Redis (G9)",
        "bus/mnemobus/live/scopes.py",
        "        self._applied.clear()\n        self._doubted",
        "        self._applied.clear()\n        self._shown.clear()\n        self._doubted",
        "test_live.py::test_g9_what_was_shown_does_not_go_back_over_a_restart_of_redis",
    ),
    Mutation(
        "live: a classic answer waits for what was shown live (G9)",
        "bus/mnemobus/cache/read_path.py",
        "            stale = not await self._live.committed(plan, self._feed.reachable) or stale\n",
        "",
        "test_live.py::test_g9_what_was_shown_live_is_not_missing_from_a_classic_answer_after_it",
    ),
    Mutation(
        "live: what is older than all that a window knows does not enter it (G9)",
        "bus/mnemobus/live/window.py",
        "        if at == 0 and not self.complete:\n            return",
        "        if False:\n            return",
        "test_window.py::test_g9_what_is_older_than_all_that_a_window_knows_does_not_enter_it",
    ),
    Mutation(
        "live: what waits in the outbox ends the window that lacks it (G6)",
        "bus/mnemobus/writes.py",
        "            self._live.outboxed(event)\n",
        "            pass\n",
        "test_live.py::test_g6_a_write_that_goes_to_the_outbox_while_redis_answers_is_not_missing_from_an_answer",
    ),
    Mutation(
        "repartition: a partition that has ended takes no calls (G1)",
        "bus/mnemobus/lua/publish.lua",
        "if not meter[3] or meter[3] ~= ARGV[6] then\n",
        "if meter[3] and meter[3] ~= ARGV[6] then\n",
        "test_repartition.py::test_g1_a_lost_answer_across_the_change_is_no_second_write",
    ),
    Mutation(
        "repartition: new partitions begin above the last event of any before (G2)",
        "bus/mnemobus/lua/relayout.lua",
        "  redis.call('XSETID', KEYS[i], last)\n",
        "",
        "test_repartition.py::test_g2_versions_rise_though_the_clock_of_redis_was_set_back",
    ),
    Mutation(
        "repartition: partitions end once all in them is applied (G9)",
        "bus/mnemobus/lua/relayout.lua",
        "if left > 0 then\n  return left\nend\n",
        "",
        "test_repartition.py::test_a_command_that_waits_and_is_stopped_leaves_the_log_as_it_was",
    ),
    Mutation(
        "repartition: what closes the log lapses (G1)",
        "bus/mnemobus/lua/publish.lua",
        "  if tonumber(since) <= now and now < tonumber(till) then",
        "  if true then",
        "test_repartition.py::test_g1_a_log_that_was_closed_by_who_died_takes_writes_again",
    ),
    Mutation(
        "repartition: new partitions wait until no call to an old one is under way (G2)",
        "bus/mnemobus/log/routing.py",
        "        if self._line is None or not all(publisher.is_idle for publisher in self):\n            return\n",
        "        if self._line is None:\n            return\n",
        "test_repartition.py::test_g1_g2_what_waits_behind_a_call_goes_to_the_new_partitions_in_its_order",
    ),
    Mutation(
        "repartition: the heartbeat looks at the layout (G5)",
        "bus/mnemobus/feed/heartbeat.py",
        "            if shape != self._link.keys.shape:\n                self._link.lay_out(shape)\n"
        "                continue\n",
        "",
        "test_repartition.py::test_g9_what_is_logged_after_the_change_is_shown_though_no_worker_runs",
    ),
    Mutation(
        "repartition: what the feed names of a partition that is not heard of ends windows (G4)",
        "bus/mnemobus/live/scopes.py",
        "        elsewhere = message.log_partition not in self._link.keys.shape.current\n",
        "        elsewhere = False\n",
        "test_repartition.py::test_g4_what_the_feed_names_of_a_new_partition_is_not_taken_for_heard",
    ),
    Mutation(
        "repartition: to an older agent a partition that has ended is full (G2)",
        "bus/mnemobus/lua/relayout.lua",
        "  redis.call('HINCRBY', KEYS[i], 'applied', '-' .. ARGV[6])\n",
        "",
        "test_repartition.py::test_g2_an_agent_of_an_older_version_that_was_away_writes_nothing_where_nobody_would_order_it",
    ),
    Mutation(
        "repartition: upkeep leaves it that way (G2)",
        "bus/mnemobus/lua/settle.lua",
        "local ended = (tonumber(meter[2]) or 0) < 0 and tonumber(ARGV[2]) or 0\n",
        "local ended = 0\n",
        "test_repartition.py::test_g2_an_agent_of_an_older_version_that_was_away_writes_nothing_where_nobody_would_order_it",
    ),
    Mutation(
        "repartition: what an ended partition refuses stays in the outbox (G1)",
        "bus/mnemobus/log/outbox.py",
        "            await file.ended(call)\n",
        "            await file.answered(call)\n",
        "test_repartition.py::test_g7_what_waits_in_the_outbox_goes_to_the_new_partitions",
    ),
    Mutation(
        "repartition: a partition that was flushed away takes no calls before it is served again (G1)",
        "bus/mnemobus/log/append.py",
        '    if code == "ENDED":\n        return PartitionEnded(',
        '    if code == "ENDED":\n        return WriteFailed(',
        "test_repartition.py::test_g1_a_flushed_redis_takes_no_write_to_partitions_that_nobody_serves",
    ),
    Mutation(
        "live: a window takes the place of what was cached before (G6, G9)",
        "bus/mnemobus/cache/l1.py",
        "            self._remove(before)\n        bucket.expires",
        "            self._remove(before)\n            bucket.classic = before\n        bucket.expires",
        "test_live.py::test_g6_g9_what_was_cached_before_a_scope_was_held_live_is_no_answer_any_more",
    ),
    Mutation(
        "live: what is cached beside a window goes as the window changes (G9)",
        "bus/mnemobus/cache/l1.py",
        "bucket.more, bucket.classic = MISS, None, None, None\n",
        "bucket.more = MISS, None, None\n",
        "test_live.py::test_g9_what_is_cached_beside_a_window_does_not_outlive_what_the_window_shows",
    ),
    Mutation(
        "repartition: a partition takes events by the layout that it has now (G2)",
        "bus/mnemobus/lua/publish.lua",
        "if not meter[3] or meter[3] ~= ARGV[6] then\n",
        "if not meter[3] then\n",
        "test_repartition.py::test_g2_a_layout_from_before_a_flush_is_none_though_its_partitions_are_there_again",
    ),
    Mutation(
        "repartition: a call is made for rooms that belong there by the layout that is known now (G2)",
        "bus/mnemobus/log/append.py",
        "        if shape.first + crc32(fields[_ROOM]) % shape.size != partition:\n",
        "        if False:\n",
        "test_repartition.py::test_g2_a_call_that_was_made_for_another_layout_is_refused_where_its_rooms_do_not_belong_now",
    ),
    Mutation(
        "repartition: in the outbox nothing overtakes a call of unknown outcome (G7)",
        "bus/mnemobus/log/outbox_file.py",
        " WHERE sequence IS NOT NULL), n + 1)",
        " WHERE sequence IS NOT NULL AND n < 0), n + 1)",
        "test_repartition.py::test_g2_what_waits_behind_calls_of_unknown_outcome_overtakes_none_of_them",
    ),
]


def run(mutation: Mutation, redis_url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The outcome of its test on a copy of the packages without the protection."""
    for package in ("bus/mnemobus", "workers/mnemobus_workers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / mutation.file
    source = path.read_text()
    assert source.count(mutation.cut) == 1, f"{mutation.file} has changed: this case has to follow it"
    path.write_text(source.replace(mutation.cut, mutation.paste))
    file, _, name = mutation.test.partition("::")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-ra"]
    command += [
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
        "--basetemp",
        str(folder / "pytest"),
    ]
    roots = [str(folder / "bus"), str(folder / "workers")]
    return subprocess.run(
        [*command, str(ROOT / "tests" / file), "-k", f"{name} and not postgres and not resp3"],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(roots), "TEST_REDIS_URL": redis_url, "TEST_PATIENCE": "0.2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, session_redis: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All that are asked for, at work already, two at a time: each spends most of its time on starting, or waiting."""
    asked = [mutation for item in request.session.items if (mutation := _params(item).get("mutation"))]
    with ThreadPoolExecutor(2) as pool:
        yield {
            mutation.name: pool.submit(run, mutation, session_redis, tmp_path_factory.mktemp("mutant"))
            for mutation in asked
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda m: re.sub(r"[^a-z0-9]+", "-", m.name.lower()).strip("-")
)
def test_without(mutation: Mutation, outcomes: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    # When the test of a promise runs without one of the protections that keep it
    done = outcomes[mutation.name].result()
    # Then it fails, and for no other reason than that
    assert done.returncode == 1, done.stdout[-4000:]
    assert f"{mutation.test.partition('::')[2]}" in done.stdout.partition("short test summary")[2], (
        done.stdout[-4000:]
    )
    assert "ERROR" not in done.stdout.partition("short test summary")[2], done.stdout[-4000:]
    for word in ("ImportError", "SyntaxError"):
        assert word not in done.stdout, done.stdout[-4000:]
