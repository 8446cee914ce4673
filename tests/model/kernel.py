"""The explorer: every state that a world can reach, and the shortest way to one that breaks a promise.

A state is an immutable tuple. A step is an atomic action of the real system (a script in Redis, the code of a coroutine
between two awaits), or an event (a crash, a lost message). All possible steps of a state are taken, breadth first. So
all interleavings are explored, and the first history that breaks a promise is a shortest one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple


class Rule(NamedTuple):
    """A protection of the protocol that can be switched off.

    guards  what it guards against, for people
    breaks  the promise that is broken without it
    at      the index, in the world's `small`, of sizes at which that shows
    """

    name: str
    guards: str
    breaks: str
    at: int = 0


class World:
    """A small world: where it begins, which steps there are, and what must hold.

    sizes     names and defaults of what can be made larger: writes, agents, and how often each fault strikes
    small     the sizes that the suite explores, each in some seconds, beside the defaults; together they show that
              each rule is needed
    larger    what ``--size 1``, ``--size 2``... set these to
    rules     the protections that it is about
    limits    assumptions, in the form of rules: what the protocol does not protect from, and what happens then
    """

    name: ClassVar[str]
    about: ClassVar[str]
    sizes: ClassVar[dict[str, int]]
    small: ClassVar[tuple[dict[str, int], ...]] = ({},)
    larger: ClassVar[tuple[dict[str, int], ...]] = ()
    rules: ClassVar[tuple[Rule, ...]]
    limits: ClassVar[tuple[Rule, ...]] = ()

    def __init__(self, without: Iterable[str] = (), **sizes: int) -> None:
        self.without = frozenset(without)
        unknown = self.without - {rule.name for rule in (*self.rules, *self.limits)}
        if unknown:
            raise ValueError(f"the world {self.name!r} has no rule {', '.join(sorted(unknown))!r}")
        if set(sizes) - set(self.sizes):
            raise ValueError(f"the world {self.name!r} has no size {', '.join(set(sizes) - set(self.sizes))}")
        self.size = {**self.sizes, **sizes}

    def keeps(self, rule: str) -> bool:
        """Whether a rule is in force."""
        assert any(rule == known.name for known in (*self.rules, *self.limits)), rule
        return rule not in self.without

    def start(self) -> Any:
        """The state in which everything begins."""
        raise NotImplementedError

    def steps(self, state: Any) -> Iterator[tuple[str, Any]]:
        """All that can happen next: its description, for people, and the state after it."""
        raise NotImplementedError

    def broken(self, state: Any) -> Iterator[str]:
        """The promises that don't hold in this state, each beginning with its number."""
        raise NotImplementedError

    def broken_at_rest(self, state: Any) -> Iterator[str]:
        """The same, for a state in which nothing can happen any more."""
        return iter(())


@dataclass(frozen=True)
class Breach:
    """A promise that is broken, and the shortest history that leads there."""

    what: str
    history: tuple[str, ...]

    @property
    def promise(self) -> str:
        return self.what.partition(":")[0]

    def __str__(self) -> str:
        steps = "\n".join(f"  {n:2}. {label}" for n, label in enumerate(self.history, 1))
        return f"{self.what}\n{steps}"


@dataclass(frozen=True)
class Outcome:
    """What an exploration found.

    states, steps  how many different states were reached, by how many steps
    depth          the length of the longest of the shortest ways to a state
    complete       whether that is all there is
    """

    states: int
    steps: int
    depth: int
    complete: bool
    breach: Breach | None


def explore(
    world: World,
    promise: str | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Go through all states of a world until one breaks a promise, or ``limit`` states were seen.

    promise   the only one that is looked at; None for all
    progress  called every now and then with the number of states, and of those that wait to be looked at
    """
    first = world.start()
    before: dict[Hashable, tuple[Hashable, str] | None] = {first: None}
    queue: deque[tuple[Any, int]] = deque([(first, 0)])
    steps = depth = 0

    def outcome(what: str | None, state: Hashable, complete: bool = True) -> Outcome:
        breach = None if what is None else Breach(what, _history(before, state))
        return Outcome(len(before), steps, depth, complete and what is None, breach)

    def first_of(found: Iterator[str]) -> str | None:
        for what in found:
            if promise is None or what.startswith(f"{promise}:"):
                return what
        return None

    if what := first_of(world.broken(first)):
        return outcome(what, first)
    while queue:
        state, depth = queue.popleft()
        at_rest = True
        for label, after in world.steps(state):
            at_rest = False
            steps += 1
            if after in before:
                continue
            before[after] = (state, label)
            if what := first_of(world.broken(after)):
                return outcome(what, after)
            queue.append((after, depth + 1))
            if progress is not None and len(before) % 50_000 == 0:
                progress(len(before), len(queue))
        if at_rest and (what := first_of(world.broken_at_rest(state))):
            return outcome(what, state)
        if limit is not None and len(before) >= limit:
            return outcome(None, first, complete=not queue)
    return outcome(None, first)


def _history(before: dict[Hashable, tuple[Hashable, str] | None], state: Hashable) -> tuple[str, ...]:
    labels = []
    while (step := before[state]) is not None:
        state, label = step
        labels.append(label)
    return tuple(reversed(labels))
