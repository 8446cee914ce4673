"""The generated part of docs/benchmarks.md: every figure of bench/results/full.json, between two comments.

`python -m bench.page` generates it again from that file, and draws the plots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .measure import OURS, Result, Spread, Target, short

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
FOLDER = ROOT / "docs" / "benchmarks"
SOURCE = Path(__file__).parent / "results" / "full.json"
BEGIN = "<!-- begin: written by `make bench` from bench/results/full.json -->"
END = "<!-- end -->"

CAPTIONS = {
    "overview": "Every target: how much of what is allowed is taken up. Left of the line it is met.",
    "hot": "Hot reads, microseconds a call, by powers of ten.",
    "drain": "Workers moving a full log into the store: events a second by processes, and one process by hand.",
    "propagation": "From a write's acknowledgement to another process that has it (live), or has dropped its copy.",
    "agents": "The same, and what Redis pays for a write, as agents are added.",
}
"""The caption of each plot."""


class Figure(NamedTuple):
    """One of the most important figures: it names the targets that show it.

    what    in words
    task    that measures it
    title   a pattern for the results of the task; if it has a group, its match distinguishes them
    target  the beginning of its targets
    """

    what: str
    task: str
    title: str
    target: str


FIGURES = (
    Figure(
        "a turn, p50, against psycopg", "turn", r"a turn, (\d+ agents? a process), p50", f"{OURS} / psycopg"
    ),
    Figure(
        "a turn, p50, against plain Redis lists (no store, no promises)",
        "turn",
        r"a turn, (\d+ agents? a process), p50",
        f"{OURS} / plain Redis lists",
    ),
    Figure(
        "a turn, p99, against psycopg", "turn", r"a turn, (\d+ agents? a process), p99", f"{OURS} / psycopg"
    ),
    Figure("the read after an own write, p50, us", "own", r"the context after an own message, p50", OURS),
    Figure(
        "the same in the midst of turns, us",
        "turn",
        r"the context after an own message, (\d+ agents? a process), p50",
        OURS,
    ),
    Figure(
        "logged to visible in another process (live), against a bare PUBLISH hop",
        "propagation",
        r"logged to visible elsewhere \(live\), (.*)",
        OURS,
    ),
    Figure(
        "logged to dropped (classic scopes), half load, against the chain by hand, in each repetition",
        "propagation",
        r"acknowledged to dropped elsewhere, at half load, (.*)",
        OURS,
    ),
    Figure(
        "one write until logged, against a raw-socket XADD",
        "write",
        r"one write, .*",
        f"{OURS} / a raw-socket",
    ),
    Figure(
        "100 memories without vectors, committed, against PostgresStore",
        "write_many",
        r".*, without embeddings",
        f"{OURS}, committed / LangGraph PostgresStore",
    ),
    Figure("sustained writes a second, p99 propagation below 100 ms", "sustained", r".*", OURS),
    Figure(
        "a hot get, against a dict lookup", "hot", r"hot read of one memory, .*", f"{OURS} / an awaited dict"
    ),
    Figure(
        "a hot recent, against a dict lookup", "hot", r"hot read of a room's .*", f"{OURS} / an awaited dict"
    ),
    Figure(
        "memory of a live window of 64 small memories, against the same results cached",
        "footprint",
        r"bytes that a room's newest \d+ take, .*",
        "held live / cached",
    ),
)


def results(record: Mapping[str, Any]) -> list[Result]:
    return [Result.from_json(result) for result in record["results"]]


def text(record: Mapping[str, Any]) -> str:
    """The text between the two comments."""
    found = results(record)
    targets = [target for result in found for target in result.targets]
    met = sum(target.met for target in targets)
    plots = [name for name in CAPTIONS if name in record.get("plots", ())]
    parts = [
        _machine(record["machine"]),
        f"{met} of {len(targets)} targets are met.",
        "## The figures to reach",
        _table(("what", "to reach", "measured: median (quartiles)", ""), _of_most_interest(found)),
        "## Every target",
        *(_plot(name) for name in plots[:1]),
        _table(("task", "to reach", "reached: median (quartiles)", ""), list(_reached(found))),
        *(_plot(name) for name in plots[1:]),
        "## Every figure",
        "Medians of the rounds, with their quartiles.",
        _table(("task", "who", "median", "quartiles"), list(_figures(found))),
    ]
    parts += ["## What can't do a task", _table(("who", "task", "why"), list(_absent(found)))]
    said = [f"- {_upper(note)}. *{', '.join(about)}*" for note, about in notes(found).items()]
    if said:
        parts += ["## To know about them", "\n".join(said)]
    if record.get("failed"):
        parts += [
            "## Failed",
            _table(("task", "error"), [(name, why) for name, why in record["failed"].items()]),
        ]
    return "\n\n".join(parts) + "\n"


def _plot(name: str) -> str:
    return f"![{name}](benchmarks/{name}.png)\n\n{CAPTIONS[name]} ([SVG](benchmarks/{name}.svg))"


def _machine(about: Mapping[str, str]) -> str:
    about = dict(about)
    date, seconds = about.pop("date", "?"), about.pop("seconds", "?")
    system, memory = about.pop("system", "?"), about.pop("memory", "?")
    where = f"{about.pop('processors', '?')} processors, {memory}, {system}"
    versions = ", ".join(f"{name} {version}" for name, version in about.items())
    return f"One run of {seconds} s on {date}: {where}; {versions}."


def _of_most_interest(found: list[Result]) -> list[tuple[str, ...]]:
    rows = []
    for figure in FIGURES:
        where_measured = list(places(figure, found))
        if not where_measured:
            rows.append((_upper(figure.what), "-", "not measured", "**not met**"))
        for where, target in where_measured:
            what = f"{figure.what}: {where}" if where else figure.what
            bound = f"{target.sense} {target.bound:,g}"
            met = "met" if target.met else "**not met**"
            rows.append((_upper(what), bound, spread(target.figure), met))
    return rows


def places(figure: Figure, found: list[Result]) -> Iterator[tuple[str, Target]]:
    """The targets of a figure, each with what distinguishes it from the others."""
    for result in found:
        match = re.fullmatch(figure.title, result.title) if result.task == figure.task else None
        for target in result.targets:
            if match and target.what.startswith(figure.target):
                yield " ".join(match.groups()), target


def _reached(found: list[Result]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in found:
        for index, target in enumerate(result.targets):
            rows.append(
                (
                    _upper(result.title) if index == 0 else "",
                    f"{target.what}: {target.sense} {target.bound:g}",
                    spread(target.figure),
                    "met" if target.met else "**not met**",
                )
            )
        if not result.targets:
            rows.append((_upper(result.title), "-", "", ""))
    return rows


def _figures(found: list[Result]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in found:
        for index, name in enumerate(result.samples):
            figure = result.spread(name)
            between = "" if figure.low == figure.high else f"{short(figure.low)} to {short(figure.high)}"
            rows.append(
                (
                    _upper(result.title) if index == 0 else "",
                    name,
                    f"{short(figure.median)} {result.unit}",
                    between,
                )
            )
    return rows


def _absent(found: list[Result]) -> list[tuple[str, ...]]:
    rows: dict[tuple[str, str], list[str]] = {}
    for result in found:
        for name, why in result.absent.items():
            tasks = rows.setdefault((name, why), [])
            if result.task not in tasks:
                tasks.append(result.task)
    return [(name, ", ".join(tasks), why) for (name, why), tasks in rows.items()]


def notes(found: list[Result]) -> dict[str, list[str]]:
    """The notes, each once, and the tasks that they are about."""
    said: dict[str, list[str]] = {}
    for result in found:
        for note in result.notes:
            about = said.setdefault(note, [])
            if result.task not in about:
                about.append(result.task)
    return said


def spread(figure: Spread) -> str:
    return short(figure.median) if figure.low == figure.high else str(figure)


def _upper(title: str) -> str:
    return title[:1].upper() + title[1:]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def written(page: str) -> str:
    """The generated part of a page."""
    _, begin, rest = page.partition(BEGIN + "\n")
    inside, end, _ = rest.partition(END)
    if not (begin and end):
        raise ValueError("the page has not the two comments between which the figures are written")
    return inside.strip("\n") + "\n"


def write(record: Mapping[str, Any]) -> None:
    """Put the figures into the page; the text around them stays."""
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{text(record)}\n{END}{tail}")


def main() -> None:
    from . import plots

    record = json.loads(SOURCE.read_text())
    plots.draw(results(record), FOLDER)
    write(record)


if __name__ == "__main__":
    main()
