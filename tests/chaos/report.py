"""What a run comes to, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .history import Applied, History, Observed, Read, Write

if TYPE_CHECKING:
    from .campaign import Campaign


def tell(campaign: Campaign, history: History) -> int:
    """Judge a run and print it; the exit status."""
    from .checker import check

    report = check(history)
    _print(campaign, history, report)
    return 1 if report.violations or campaign.problems else 0


def _print(campaign: Campaign, history: History, report: object) -> None:
    console = Console(width=120, highlight=False)
    table = Table("fault", "times", title="faults", title_justify="left")
    for kind, times in sorted(campaign.counts.items()):
        table.add_row(kind, str(times))
    console.print(table)
    writes, reads = history.of(Write), history.of(Read)
    acked = [w for w in writes if w.outcome == "acked"]
    rows = {
        "operations": len(writes) + len(reads),
        "reads": len(reads),
        "of them from this process / Redis / the store": " / ".join(
            str(sum(r.source == s and not r.stale for r in reads)) for s in ("local", "shared", "store")
        ),
        "of them marked stale": sum(r.stale for r in reads),
        "of them without an answer": sum(bool(r.error) for r in reads),
        "invalidations applied": len(history.of(Applied)),
        "tokens observed": len(history.of(Observed)),
        "writes": len(writes),
        "writes acknowledged": len(acked),
        "of them by the outbox": sum(w.outboxed for w in acked),
        "writes whose outcome is unknown": sum(w.outcome == "unknown" for w in writes),
        "writes refused": sum(w.outcome == "refused" for w in writes),
        "seconds to converge, once faults are lifted": "never"
        if campaign.converged is None
        else f"{campaign.converged:.2f}",
    }
    table = Table("", "", show_header=False, title="the run", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    for problem in campaign.problems:
        console.print(f"problem: {problem}", markup=False)
