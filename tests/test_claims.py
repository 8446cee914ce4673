"""Each claim of the README names the tests that show it. One without a test fails here; so does one that changed."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def claims() -> list[str]:
    """What the README says of mnemobus: its first page, its promises, its commands and its status; a line each."""
    introduction = README.partition("\n## ")[0].partition("mnemobus ends that:")[2]
    found = re.findall(r"^- (.+?)[;.]\s*$", introduction, re.MULTILINE | re.DOTALL)
    bullets = [" ".join(item.split()) for part in found for item in re.split(r";\n- ", part)]
    prose = " ".join(introduction.rpartition("\n\n- ")[2].partition("\n\n")[2].split())
    sentences = [s for s in re.split(r"(?<=\.) (?=[A-Z])", prose) if s]
    return [*bullets, *sentences, *rows("What it promises"), *rows("The command line"), *status()]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[str]:
    """The rows of a section's table by their first column, and what they say."""
    found = re.findall(r"^\| (.+?) \| (.+?) \|", section(title), re.MULTILINE)
    return [f"{name}: {said}" for name, said in found if not name.startswith(("-", "command", "| promise"))]


def status() -> list[str]:
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(section("Status").partition("MIT licence")[0].split()))


CLAIMS: dict[str, list[str]] = {
    "a write becomes an event in a log (Redis Streams) and is acknowledged at once": [
        "test_bus.py::test_writes_of_many_tasks_go_together",
        "test_live.py::test_g6_g9_an_own_write_is_in_the_next_answer_though_no_worker_runs",
    ],
    (
        "workers (Dramatiq, as many as you like) commit events in batches to PostgreSQL, or to SQLite on "
        "one machine"
    ): [
        "test_processes.py::test_g1_nothing_is_lost_or_doubled_when_workers_and_agents_are_killed",
        "test_store.py::test_g2_processes_on_the_same_memories",
        "test_cli.py::test_worker_is_dramatiq_with_the_settings",
    ],
    (
        "the invalidation is fanned out (Redis pub/sub over a feed that can be replayed), and every agent "
        "drops its stale copies"
    ): [
        "test_processes.py::test_g5_an_agent_drops_its_copy_when_another_process_writes",
        "test_feed.py::test_g5_a_feed_that_no_longer_reaches_back_drops_the_partition",
        "scenarios/test_messages.py::test_g5_exactly_one_lost_message_on_a_quiet_key_is_found_and_repaired_within_the_bound",
        "test_live.py::test_g5_a_lost_message_is_repaired_by_the_heartbeat",
    ],
    ("every agent *knows* when it may have missed something, and then serves no copy that may be stale"): [
        "test_feed.py::test_g5_a_gap_is_seen_with_the_next_message",
        "test_feed.py::test_g5_local_copies_are_not_served_while_redis_does_not_answer",
        "test_processes.py::test_g5_an_agent_that_was_paused_does_not_serve_what_it_slept_through",
    ],
    "A read that hits takes about a microsecond.": [
        "test_benchmarks.py::test_the_figures_to_reach_are_targets_of_the_run_and_none_is_left_out",
        "test_benchmarks.py::test_docs_benchmarks_has_the_figures_of_the_last_full_run",
    ],
    (
        "A write is seen by every other agent some milliseconds later, and no later than two seconds if "
        "the network loses every message."
    ): [
        "scenarios/test_messages.py::test_g5_exactly_one_lost_message_on_a_quiet_key_is_found_and_repaired_within_the_bound",
        "scenarios/test_half_open_link.py::test_g5_g7_a_half_open_link_for_45_seconds_serves_nothing_older_than_promised_and_recovers",
        "test_benchmarks.py::test_docs_benchmarks_has_the_figures_of_the_last_full_run",
    ],
    "G1: **nothing lost**: a write that was acknowledged reaches the store exactly once in effect": [
        "test_workers.py::test_g1_whatever_a_worker_was_at_when_it_was_killed_is_done_by_another",
        "test_log.py::test_g1_a_publish_whose_answer_is_lost_is_repeated_and_logged_once",
        "test_outbox.py::test_g1_a_kill_between_publishing_and_taking_out_doubles_nothing",
    ],
    "G2: **one order**: the last write in log order wins, in every tier": [
        "test_merge.py::test_g2_g3_g8_every_order_of_batches_ends_in_the_same_state",
        "scenarios/test_two_writers.py::test_g2_g5_no_copy_differs_from_the_store_after_two_processes_wrote_at_once",
    ],
    "G3: **no resurrection**: what was deleted stays deleted under redelivery, late batches and replay": [
        "test_replay.py::test_g3_g8_what_was_deleted_stays_deleted",
        "scenarios/test_late_writes.py::test_g3_g8_what_was_deleted_stays_deleted_when_older_batches_come_late_and_a_day_is_replayed",
    ],
    "G4: **no stale fill**: a value read before an invalidation never enters a cache after it": [
        "scenarios/test_late_fills.py::test_g4_a_load_that_an_invalidation_overtakes_enters_no_cache",
        "test_local.py::test_g4_a_late_fill_lands_where_nobody_sees_it",
    ],
    (
        "G5: **bounded staleness**: a local copy is served only while everything up to `max_staleness` "
        "ago was heard"
    ): [
        "test_local.py::test_g5_nothing_is_served_once_it_is_no_longer_fresh",
        "test_feed.py::test_g5_a_server_that_has_become_a_replica_vouches_for_nothing",
        "scenarios/test_messages.py::test_g5_messages_out_of_order_are_seen_as_a_gap_and_none_is_stepped_over",
    ],
    "G6: **read your writes**, and pass that on to another agent with a token": [
        "test_bus.py::test_g6_a_bus_reads_its_own_writes_in_every_query",
        "test_processes.py::test_g6_a_token_is_handed_from_process_to_process",
    ],
    (
        "G7: **degrade, don't fail**: with Redis away reads go on from the store, then from the last "
        "known copy, marked stale; writes wait on disk, and take their place in the order when Redis is "
        "back"
    ): [
        "test_feed.py::test_g7_with_both_away_the_last_known_copy_is_served_and_marked",
        "test_outbox.py::test_g7_with_redis_away_writes_wait_and_are_published_once_and_in_order",
    ],
    "G8: **replay at will**: any part of the log can be applied again, with the same result": [
        "test_replay.py::test_g8_whatever_happened_a_replay_ends_in_the_same_rows",
        "test_replay.py::test_since_until_partition_and_dry_run",
    ],
    (
        "`mnemobus demo`: the whole system on this machine, for a few seconds, with a worker killed on "
        "the way"
    ): [
        "test_cli.py::test_g1_the_demo_proves_itself_and_leaves_nothing",
    ],
    "`mnemobus up`: Redis and workers on this machine, kept running": [
        "test_embedded.py::test_up_is_all_that_agents_need_and_keeps_what_it_has",
        "test_embedded.py::test_g1_up_starts_again_what_dies",
    ],
    "`mnemobus worker`: the worker pool: `dramatiq mnemobus_workers` with your settings": [
        "test_cli.py::test_worker_is_dramatiq_with_the_settings",
    ],
    "`mnemobus import FILE.jsonl`: memories from a file, one JSON object a line, also gzip": [
        "test_import.py::test_an_import_is_the_file_and_a_second_one_changes_nothing",
        "test_import.py::test_gzip_is_read",
    ],
    "`mnemobus stats`, `mnemobus tail`: figures; events and invalidations as they pass": [
        "test_cli.py::test_stats_are_those_of_log_workers_feed_and_store",
        "test_cli.py::test_tail_shows_events_and_invalidations_as_they_pass",
    ],
    "`mnemobus verify`: asks every agent, seconds after a write, whether it still holds an older copy": [
        "test_verify.py::test_g5_an_agent_that_holds_an_older_copy_is_found_at_every_mark",
    ],
    "`mnemobus replay`: applies part of the log again, to the store or to another one": [
        "test_replay.py::test_g8_whatever_happened_a_replay_ends_in_the_same_rows",
        "test_replay.py::test_g8_on_every_server",
    ],
    "`mnemobus dead`: writes that no worker could apply: `list`, `show`, `requeue`, `drop`": [
        "test_dead.py::test_dead_letters_are_listed_and_shown",
        "test_dead.py::test_g2_what_is_requeued_is_applied_and_undoes_nothing_that_was_written_since",
        "test_dead.py::test_dead_letters_are_dropped_if_one_agrees",
    ],
    "`mnemobus repartition`: changes the number of log partitions, while agents and workers go on": [
        "test_repartition.py::test_g1_g2_agents_and_workers_go_on_and_nothing_is_lost_doubled_or_out_of_order",
    ],
    "`mnemobus adopt`: confirms that the bus has moved to another database": [
        "test_identity.py::test_an_operator_moves_a_bus_to_another_database",
    ],
    "`mnemobus doctor`: checks everything, and says what to do": [
        "test_cli.py::test_the_doctor_finds_nothing_where_nothing_is_wrong",
        "test_cli.py::test_the_doctor_where_writes_wait_or_died",
    ],
    "Version 0.1: all of the above works and is tested, on one machine.": [
        "test_project.py::test_the_version_is_the_same_everywhere_and_has_its_entry_in_the_changelog",
        "test_claims.py::test_a_claim_of_the_readme_is_shown_by_tests_that_there_are",
    ],
    (
        "Campaigns of faults (`make chaos`) end without a broken promise; "
        "[docs/guarantees.md](docs/guarantees.md) has their figures, and the limits that are known."
    ): [
        "test_chaos.py::test_a_small_campaign_with_all_faults_finds_nothing",
        "test_chaos.py::test_a_campaign_finds_what_is_broken_and_shows_it",
    ],
    "Not there yet: Redis Cluster and Sentinel.": [
        "test_addresses.py::test_a_redis_address_that_does_not_says_why",
    ],
}


@cache
def names_in(file: str) -> set[str]:
    path = ROOT / "tests" / file
    assert path.is_file(), f"there is no tests/{file}"
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("claim", claims())
def test_a_claim_of_the_readme_is_shown_by_tests_that_there_are(claim: str) -> None:
    shown_by = CLAIMS.get(claim)
    assert shown_by, f"CLAIMS has no test for: {claim}"
    for test in shown_by:
        file, _, name = test.partition("::")
        assert name in names_in(file), f"{claim}: there is no {test}"


def test_nothing_is_listed_that_the_readme_does_not_claim() -> None:
    assert set(CLAIMS) - set(claims()) == set()
    assert len(claims()) == len(set(claims())) > 25
