"""What the demo prints at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..console import err, out


@dataclass(slots=True)
class Summary:
    """All figures of a run; ``ok`` if there are no problems."""

    agents: int = 0
    rooms: int = 0
    writes: int = 0
    seconds: float = 0.0
    batches: int = 0
    events_per_batch: float = 0.0
    hits_local: int = 0
    hits_shared: int = 0
    misses: int = 0
    invalidations: int = 0
    drops: int = 0
    gaps: int = 0
    replays: int = 0
    worker_killed: bool = False
    propagation_samples: int = 0
    propagation_p50_ms: float = 0.0
    propagation_p99_ms: float = 0.0
    propagation_max_ms: float = 0.0
    dead_letters: int = 0
    compared: int = 0
    compared_local: int = 0
    writes_lost: int = 0
    agents_that_disagree: int = 0
    problems: list[str] = field(default_factory=list)
    ok: bool = False


def show(summary: Summary) -> None:
    from rich.table import Table

    table = Table(show_header=False, title="what happened", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    rate = f"{summary.writes / summary.seconds:,.0f} a second" if summary.seconds else ""
    reads = summary.hits_local + summary.hits_shared + summary.misses
    local = f"{summary.hits_local / reads:.0%} of all reads" if reads else ""
    killed = "one worker killed half way" if summary.worker_killed else ""
    zero = "[bold green]0[/]"
    rows = (
        ("agents, rooms", f"{summary.agents}, {summary.rooms}", ""),
        ("writes acknowledged", f"{summary.writes:,}", f"in {summary.seconds:.1f} s, {rate}"),
        ("batches", f"{summary.batches:,}", f"{summary.events_per_batch} writes each, on average"),
        ("read from this process (L1)", f"{summary.hits_local:,}", local),
        ("read from Redis (L2)", f"{summary.hits_shared:,}", ""),
        ("read from the store", f"{summary.misses:,}", ""),
        ("invalidations heard", f"{summary.invalidations:,}", f"{summary.drops:,} copies dropped"),
        (
            "propagation p50",
            f"{summary.propagation_p50_ms:.1f} ms",
            "write begun to old copy gone elsewhere",
        ),
        ("propagation p99", f"{summary.propagation_p99_ms:.1f} ms", killed),
        (
            "writes lost",
            f"[bold red]{summary.writes_lost}[/]" if summary.writes_lost else zero,
            "the store, against every acknowledged write",
        ),
        (
            "agents that disagree",
            f"[bold red]{summary.agents_that_disagree}[/]" if summary.agents_that_disagree else zero,
            f"{summary.compared:,} answers compared, {summary.compared_local:,} of them local copies",
        ),
    )
    for row in rows:
        table.add_row(*row)
    out().print(table)
    for problem in summary.problems:
        err().print("[bold red]failed:[/] ", end="")
        err().print(problem, markup=False, soft_wrap=True)
    if summary.ok:
        out().print("[bold green]Every agent agrees with the store, and nothing was lost.[/]")
