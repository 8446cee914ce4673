"""The plots of docs/benchmarks.md: PNG for the page, SVG beside it; the same results give the same bytes.

No information is in a colour alone: our own figures, floors and missed targets have markers and words, too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .measure import OURS, Result, Target, short

# Okabe and Ito's palette: colour-blind readers can distinguish these, too.
BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8A8A", "#333333"
MARKERS = "osD^v<>"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY, INK)
SIZE = 9
"""Points of all text."""

STYLE = {
    "font.size": SIZE,
    "axes.titlesize": SIZE,
    "axes.labelsize": SIZE,
    "legend.fontsize": SIZE,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GREY,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "ytick.minor.left": False,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mnemobus",
}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw all plots for which these results have figures; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        with plt.rc_context(STYLE):
            figure = plot(results)
            if figure is None:
                continue
            png, svg = folder / f"{name}.png", folder / f"{name}.svg"
            figure.savefig(png, metadata={"Software": None}, pil_kwargs={"optimize": True})
            figure.savefig(svg, metadata={"Date": None, "Creator": None})
            written += [png, svg]
            plt.close(figure)
    return written


def _of(results: Iterable[Result], task: str) -> list[Result]:
    return [result for result in results if result.task == task]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(axis: Any) -> None:
    """Plain numbers, not powers of ten, as labels of a logarithmic axis."""
    axis.set_major_locator(LogLocator(10, subs=(1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _steps(axes: Axes) -> None:
    """Ticks of a horizontal logarithmic axis: at 1, 2 and 5 if there is space, else at powers of ten."""
    low, high = axes.get_xlim()
    decades = range(_floor(low), _floor(high) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


# Every target


def overview(results: Sequence[Result]) -> Figure | None:
    """The share of its bound that each target uses: left of the line it is met."""
    rows = [(result, target) for result in results for target in result.targets if _taken(target)]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(6.2, 0.6 + 0.235 * len(rows)))
    labels = []
    shown: Result | None = None
    for y, (result, target) in enumerate(rows):
        low, middle, high = sorted(_taken(target))
        colour, marker = (BLUE, "o") if target.met else (ORANGE, "D")
        axes.plot([low, high], [y, y], color=colour, linewidth=1.4, alpha=0.5, solid_capstyle="butt")
        axes.plot(middle, y, marker, color=colour, markersize=5)
        if result is not shown:
            if shown is not None and result.task != shown.task:
                axes.axhline(y - 0.5, color="#E4E4E4", linewidth=0.8)
            shown = result
        labels.append(f"{_upper(result.title)}: {_against(target)}")
    axes.set_xscale("log")
    _steps(axes)
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("share of what is allowed: at most 1 is met (median, with quartiles)")
    handles = [
        Line2D([], [], color=BLUE, marker="o", linestyle="", markersize=5, label="met"),
        Line2D([], [], color=ORANGE, marker="D", linestyle="", markersize=5, label="not met"),
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
    return figure


def _taken(target: Target) -> tuple[float, float, float] | None:
    figure = target.figure
    values = figure.low, figure.median, figure.high
    if min(values) <= 0 or target.bound <= 0:
        return None
    if target.sense == "at most":
        return tuple(value / target.bound for value in values)  # type: ignore[return-value]
    return tuple(target.bound / value for value in values)  # type: ignore[return-value]


def _against(target: Target) -> str:
    """A short description of the bound."""
    over, slash, under = target.what.partition(" / ")
    bound = f"{target.sense} {target.bound:g}"
    if not slash:
        return bound
    if target.sense == "at least" and under == OURS:
        return f"{over}, {bound} times ours"
    prefix = "" if over == OURS else f"{over.removeprefix(OURS).lstrip(', ')} "
    return f"{prefix}beside {under.removeprefix(OURS + ', ')}, {bound}"


# One task each


def hot(results: Sequence[Result]) -> Figure | None:
    """Bars of the hot reads."""
    found = [result for result in _of(results, "hot") if result.samples]
    if not found:
        return None
    names = sorted(
        {name for result in found for name in result.samples},
        key=lambda name: max(r.spread(name).median for r in found if name in r.samples),
    )
    figure, rows = plt.subplots(
        1, len(found), figsize=(7.6, 0.7 + 0.28 * len(names)), sharey=True, sharex=True, squeeze=False
    )
    for axes, result in zip(rows[0], found, strict=True):
        for y, name in enumerate(names):
            if name not in result.samples:
                why = "can't" if name in result.absent else "no counterpart"
                axes.text(0.02, y, why, va="center", color=GREY, transform=axes.get_yaxis_transform())
                continue
            spread = result.spread(name)
            axes.barh(y, spread.median, height=0.62, color=BLUE if name == OURS else "#B9B9B9")
            axes.text(spread.median * 1.15, y, short(spread.median), va="center")
        axes.set_xscale("log")
        _plain(axes.xaxis)
        axes.set_title(textwrap.fill(_upper(result.title), 40))
        axes.set_xlabel("µs a call")
        axes.set_yticks(range(len(names)), names)
    low = min(result.spread(n).median for result in found for n in result.samples)
    high = max(result.spread(n).median for result in found for n in result.samples)
    rows[0][0].set_xlim(low / 2, high * 8)
    rows[0][0].set_ylim(len(names) - 0.5, -0.6)
    figure.subplots_adjust(wspace=0.08)
    return figure


def propagation(results: Sequence[Result]) -> Figure | None:
    return _dots(_of(results, "propagation"), "ms (median, with quartiles)")


def drain(results: Sequence[Result]) -> Figure | None:
    """Events a second by number of processes, for each store; and the alternatives."""
    found = _of(results, "drain")
    curves = [result for result in found if result.curves]
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(5.2, 3.0))
    for number, result in enumerate(curves):
        store = next((name for name in ("PostgreSQL", "SQLite") if name in result.title), result.title)
        colour, marker = COLOURS[number], MARKERS[number]
        for points in result.curves.values():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker + "-", color=colour, markersize=5, label=store)
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
        beside = next((r for r in found if store in r.title and len(r.targets) and not r.curves), None)
        if beside is not None:
            hand = next(name for name in beside.samples if not name.startswith(OURS))
            level = beside.spread(hand).median
            axes.plot(
                1,
                level,
                marker,
                color=colour,
                markersize=6,
                fillstyle="none",
                label=f"{store}, {hand}",
                clip_on=False,
            )
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("worker processes")
    axes.set_ylabel("events a second")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), borderpad=0)
    return figure


def agents(results: Sequence[Result]) -> Figure | None:
    """What grows with the agents, and what does not."""
    found = [result for result in _of(results, "agents") if result.curves]
    if not found:
        return None
    figure, row = plt.subplots(1, len(found), figsize=(3.9 * len(found), 2.9), squeeze=False)
    for axes, result in zip(row[0], found, strict=True):
        for number, (name, points) in enumerate(result.curves.items()):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, MARKERS[number] + "-", color=COLOURS[number], markersize=5, label=_upper(name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain(axes.xaxis)
        _plain(axes.yaxis)
        ticks = sorted({x for points in result.curves.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ys = [y for points in result.curves.values() for _, y in points if y > 0]
        axes.set_ylim(10 ** _floor(min(ys)), 10 ** (_floor(max(ys)) + 1))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_title(textwrap.fill(_upper(result.title), 40))
        axes.set_xlabel("agents")
        axes.set_ylabel("µs" if result.unit == "us" else result.unit)
    handles, labels = row[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(labels)))
    figure.tight_layout()
    return figure


def _floor(value: float) -> int:
    return math.floor(math.log10(value))


def _dots(found: Sequence[Result], label: str) -> Figure | None:
    """A row for each result, a marker for each contestant."""
    found = [result for result in found if result.samples]
    if not found:
        return None
    names = list(dict.fromkeys(name for result in found for name in result.samples))
    figure, axes = plt.subplots(figsize=(5.4, 0.9 + 0.36 * len(found)))
    for y, result in enumerate(found):
        for number, name in enumerate(names):
            if name not in result.samples:
                continue
            spread = result.spread(name)
            if spread.low <= 0:
                continue  # a logarithmic axis can't show it; the table has it
            at = y + 0.24 * ((number + 0.5) / len(names) - 0.5)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot([spread.low, spread.high], [at, at], color=colour, linewidth=1.4, alpha=0.5)
            axes.plot(spread.median, at, MARKERS[number % len(MARKERS)], color=colour, markersize=5)
    axes.set_xscale("log")
    _steps(axes)
    axes.set_yticks(range(len(found)), [_upper(result.title) for result in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel(label)
    handles = [
        Line2D([], [], color=COLOURS[n % 6], marker=MARKERS[n % 7], linestyle="", markersize=5, label=name)
        for n, name in enumerate(names)
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0)
    return figure


PLOTS: dict[str, Callable[[Sequence[Result]], Figure | None]] = {
    "overview": overview,
    "hot": hot,
    "drain": drain,
    "propagation": propagation,
    "agents": agents,
}
