"""Prints the result of a run, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .checker import Report, check
from .history import History, Observed

if TYPE_CHECKING:
    from .campaign import Campaign

SHOWN = 5
"""Most violations to print; the history has all of them."""


def tell(campaign: Campaign, history: History) -> int:
    """Judge a run and print the result; return the exit status."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    report = check(history)
    console.print(_faults(campaign))
    console.print(_figures(campaign, history, report))
    for warning in campaign.warnings:
        console.print(f"warning: {warning}", markup=False)
    if report.ok and not campaign.problems:
        console.print("every promise that was watched was kept")
        return 0
    for problem in campaign.problems:
        console.print(f"problem: {problem}", markup=False)
    for violation in report.violations[:SHOWN]:
        console.print(f"\n{violation}", markup=False)
    if len(report.violations) > SHOWN:
        console.print(f"\nand {len(report.violations) - SHOWN} more", markup=False)
    console.print(
        f"\nseed {campaign.options.seed}; all of it: python tests/chaos/checker.py {campaign.history_folder}",
        markup=False,
    )
    return 1


def _faults(campaign: Campaign) -> Table:
    table = Table("fault", "times")
    table.columns[1].justify = "right"
    for kind in sorted({*campaign.tried, *campaign.counts}):
        table.add_row(kind, str(campaign.counts[kind]))
    table.add_row("all", str(sum(campaign.counts.values())), style="bold")
    return table


def _figures(campaign: Campaign, history: History, report: Report) -> Table:
    sources = " / ".join(
        f"{report.reads_by_source.get(source, 0):,}" for source in ("local", "shared", "store")
    )
    converged = "never" if campaign.converged is None else f"{campaign.converged:.2f} s"
    rows = {
        "operations": report.reads + report.writes,
        "reads": report.reads,
        "  answered from the process / Redis / the store": sources,
        "  marked stale": report.stale_reads,
        "  without an answer": report.failed_reads,
        "writes": report.writes,
        "  acknowledged": report.acknowledged,
        "    by the outbox": report.outboxed,
        "  of unknown outcome": report.unknown,
        "  refused, or of no such memory": report.refused,
        "invalidations applied": report.invalidations,
        "tokens observed": len(history.of(Observed)),
        "acknowledged writes lost": report.acknowledged_lost,
        "  with an emptied Redis, as announced": report.lost_with_log,
        "  of them with the last second under everysec": campaign.lost_by_everysec,
        "stale reads beyond the bound": report.beyond_bound,
        "longest staleness": f"{report.longest_staleness:.2f} s",
        "agents that disagree with the store": report.disagreements,
        "time to converge": converged,
        "violations": len(report.violations) + len(campaign.problems),
    }
    table = Table("", "", show_header=False)
    table.columns[1].justify = "right"
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    return table
