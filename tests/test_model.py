"""The protocol, explored exhaustively on small worlds: it keeps its promises, and each of its rules is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.kernel import Rule, World, explore
from model.worlds import WORLDS

ROOT = Path(__file__).parents[1]
SMALL = [
    pytest.param(world, sizes, id=f"{world.name}-{n}")
    for world in WORLDS.values()
    for n, sizes in enumerate(world.small)
]
RULES = [
    pytest.param(world, rule, id=f"{world.name}-{rule.name}")
    for world in WORLDS.values()
    for rule in (*world.rules, *world.limits)
]


@pytest.mark.parametrize(("world", "sizes"), SMALL)
def test_no_promise_breaks_in_any_state(world: type[World], sizes: dict[str, int]) -> None:
    # When every state is looked at that such a world can reach
    outcome = explore(world(**sizes))
    # Then all of them keep the promises
    print(f"{world.name} {sizes}: {outcome.states:,} states, {outcome.steps:,} steps, depth {outcome.depth}")
    assert outcome.breach is None, str(outcome.breach)
    assert outcome.complete


@pytest.mark.parametrize(("world", "rule"), RULES)
def test_without_a_rule_its_promise_breaks(world: type[World], rule: Rule) -> None:
    # When one rule is taken away
    outcome = explore(world([rule.name], **world.small[rule.at]), rule.breaks)
    # Then the promise that it is there for is broken, and the shortest history tells how
    assert outcome.breach is not None, (
        f"{outcome.states:,} states, and nothing breaks: is {rule.name!r} needed?"
    )
    print(f"{world.name} without {rule.name!r} ({rule.guards}):\n{outcome.breach}")
    assert outcome.breach.promise == rule.breaks


def test_every_promise_about_order_loss_and_staleness_is_guarded_by_rules() -> None:
    guarded = {rule.breaks for world in WORLDS.values() for rule in world.rules}
    assert {"G1", "G2", "G3", "G4", "G5", "G6", "G7"} <= guarded


def test_the_readme_lists_worlds_and_rules() -> None:
    text = (ROOT / "tests" / "model" / "README.md").read_text()
    for world in WORLDS.values():
        section = re.search(rf"^## {world.name}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        assert section, world.name
        listed = set(re.findall(r"^\| `([^`]+)` \|", section[1], re.M))
        assert listed == {rule.name for rule in (*world.rules, *world.limits)}


def test_by_hand_a_world_is_explored_with_its_sizes_and_without_rules() -> None:
    # When a world is explored from the command line without one of its rules
    command = [sys.executable, "-m", "tests.model", "workers", "--without", "claim"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # Then the history that breaks it is printed, and the exit status tells
    assert done.returncode == 1, done.stderr
    assert "G1: nothing goes on, and event 1 is not in the store" in done.stdout
    assert "1. event 1 is logged" in done.stdout
    # and what there is no such thing of is said clearly
    command[-1] = "clams"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the world 'workers' has no rule 'clams'" in done.stderr
