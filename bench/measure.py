"""Figures that are reliable on a noisy machine.

All comparisons are measured in rounds: in each round every contestant has its turn, in a changing order, so that a
disturbance of the machine affects all of them. A figure is the median of its rounds. A ratio is computed within each
round, and the median of the ratios counts; its spread is from the lower to the upper quartile. No absolute time is a
target.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

OURS = "mnemobus"
"""The name of our own contestant in every task."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, middle, high)

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)} to {short(self.high)})"


@dataclass(frozen=True, slots=True)
class Target:
    """A goal of a task: a figure, and its bound."""

    what: str
    figure: Spread
    bound: float
    sense: Literal["at most", "at least"] = "at most"

    @property
    def met(self) -> bool:
        if self.sense == "at most":
            return self.figure.median <= self.bound
        return self.figure.median >= self.bound

    def __str__(self) -> str:
        return f"{self.what}: {self.figure}, {self.sense} {self.bound:g}: {'met' if self.met else 'NOT MET'}"


@dataclass(slots=True)
class Result:
    """The result of one task.

    samples  a figure of each round, by contestant
    unit     of those figures: "us" a call, "1/s", "bytes", ...
    targets  the goals
    absent   contestants that can't do the task, and why
    notes    what a reader has to know to interpret the figures
    curves   for plots: name -> x and y of each point
    """

    task: str
    title: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def spread(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratio(self, over: str, under: str) -> Spread:
        """``over`` divided by ``under``, round by round."""
        pairs = zip(self.samples[over], self.samples[under], strict=True)
        return Spread.of([a / b for a, b in pairs])

    def at_most(self, bound: float, other: str, name: str = OURS) -> None:
        """Our figure must be at most this many times the other's."""
        if other in self.samples:
            self.targets.append(Target(f"{name} / {other}", self.ratio(name, other), bound))

    def at_most_ever(self, bound: float, other: str, name: str = OURS) -> None:
        """The same, in every round, not only in most of them."""
        if other in self.samples:
            pairs = zip(self.samples[name], self.samples[other], strict=True)
            worst = Spread.of([max(a / b for a, b in pairs)])
            self.targets.append(Target(f"{name} / {other}, at its worst", worst, bound))

    def at_least(self, bound: float, other: str, name: str = OURS) -> None:
        """Our figure must be at least this many times the other's: for rates, where more is better."""
        if other in self.samples:
            self.targets.append(Target(f"{name} / {other}", self.ratio(name, other), bound, "at least"))

    def faster(self, times: float, other: str, name: str = OURS) -> None:
        """The other's time must be at least this many times ours."""
        if other in self.samples:
            self.targets.append(Target(f"{other} / {name}", self.ratio(other, name), times, "at least"))

    def within(self, bound: float, name: str = OURS) -> None:
        """Our figure itself must be at most this: for figures that do not depend on the machine."""
        self.targets.append(Target(f"{name}, {self.unit}", self.spread(name), bound))

    def to_json(self) -> dict[str, Any]:
        out = asdict(self)
        out["targets"] = [asdict(target) | {"met": target.met} for target in self.targets]
        return out

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Result:
        targets = [
            Target(t["what"], Spread(**t["figure"]), t["bound"], t["sense"]) for t in record["targets"]
        ]
        curves = {name: [(x, y) for x, y in points] for name, points in record["curves"].items()}
        return cls(**{**record, "targets": targets, "curves": curves})


Turn = Callable[[], Awaitable[float]]
"""One turn of a contestant: its figure of this round."""


async def interleave(
    turns: Mapping[str, Callable[[], Awaitable[T]]], rounds: int, *, warm: bool = True
) -> dict[str, list[T]]:
    """The figures of every contestant: each has one turn a round, and another one is first in each round.

    warm: whether each has a turn first that does not count, to warm up connections, caches and the interpreter
    """
    samples: dict[str, list[T]] = {name: [] for name in turns}
    names = list(turns)
    for name in names if warm else ():
        await turns[name]()
    # The prepared objects live for all rounds: the garbage collector need not scan them before each turn.
    gc.collect()
    gc.freeze()
    try:
        for round in range(rounds):
            first = round % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(await turns[name]())
    finally:
        gc.unfreeze()
    return samples


async def per_call(call: Callable[[Any], Awaitable[Any]], arguments: Sequence[Any]) -> float:
    """Microseconds per call, one call after the other, with each of these arguments."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for argument in arguments:
            await call(argument)
        return (time.perf_counter() - began) / len(arguments) * 1e6
    finally:
        gc.enable()


def per_sync_call(call: Callable[[Any], Any], arguments: Sequence[Any]) -> float:
    """The same, for a function that is not a coroutine function."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for argument in arguments:
            call(argument)
        return (time.perf_counter() - began) / len(arguments) * 1e6
    finally:
        gc.enable()


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def short(number: float) -> str:
    """A number with three significant digits."""
    if number == 0:
        return "0"
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    if abs(number) >= 100:
        return f"{number:.0f}"
    if abs(number) >= 10:
        return f"{number:.1f}"
    return f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.3f}"
