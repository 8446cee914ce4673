"""Explore a world by hand, at sizes that take too long for the suite: ``python -m tests.model caches --size 1``."""

from __future__ import annotations

import argparse
import sys
import time

from .kernel import World, explore
from .worlds import WORLDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument(
        "world", nargs="?", choices=WORLDS, help="which; none lists them, with sizes and rules"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        metavar="N",
        help="0: those of the suite, one after the other; 1, 2...: larger",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=N",
        help="one of the world's sizes, instead of --size",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="RULE",
        help="switch a rule off, and see what happens (at the size and for the promise where it does)",
    )
    parser.add_argument("--promise", metavar="G", help="look at this promise only, such as G5")
    parser.add_argument("--limit", type=int, metavar="STATES", help="stop after so many")
    arguments = parser.parse_args()
    if arguments.world is None:
        show()
        return 0
    kind = WORLDS[arguments.world]
    if not 0 <= arguments.size <= len(kind.larger):
        parser.error(f"the world {kind.name} has sizes 0 to {len(kind.larger)}")
    try:
        given = {name: int(n) for name, _, n in (item.partition("=") for item in arguments.set)}
        promise, sizes = arguments.promise, list(kind.small)
        rules = [rule for rule in (*kind.rules, *kind.limits) if rule.name in arguments.without]
        if given:
            sizes = [given]
        elif arguments.size:
            sizes = [kind.larger[arguments.size - 1]]
        elif rules:
            sizes = [kind.small[rules[0].at]]
            promise = promise or rules[0].breaks
        worlds = [kind(arguments.without, **each) for each in sizes]
    except ValueError as error:
        parser.error(str(error))
    return max([run(world, promise, arguments.limit) for world in worlds])


def run(world: World, promise: str | None, limit: int | None) -> int:
    began = time.monotonic()

    def progress(states: int, waiting: int) -> None:
        rate = states / (time.monotonic() - began)
        print(
            f"\r{states:,} states, {waiting:,} to look at, {rate:,.0f} a second ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    sizes = ", ".join(f"{name} {n}" for name, n in world.size.items())
    print(
        f"{world.name}: {sizes}" + (f"; without {', '.join(world.without)}" if world.without else ""),
        flush=True,
    )
    outcome = explore(world, promise, limit, progress)
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    print(
        f"  {outcome.states:,} states, {outcome.steps:,} steps, depth {outcome.depth},"
        f" {time.monotonic() - began:.1f} s:",
        "a promise is broken"
        if outcome.breach
        else "all hold"
        if outcome.complete
        else "not all were looked at",
    )
    if outcome.breach:
        print(outcome.breach)
    return 1 if outcome.breach else 0


def show() -> None:
    for world in WORLDS.values():
        print(f"{world.name}: {world.about}")
        print("  sizes: " + ", ".join(f"{name}={n}" for name, n in world.sizes.items()))
        print("  without...")
        for rule in (*world.rules, *world.limits):
            print(f"    {rule.name:20} {rule.breaks:5} {rule.guards}")


if __name__ == "__main__":
    sys.exit(main())
