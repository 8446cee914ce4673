"""The folders of the code: what belongs where, and that imports run one way."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUS = ROOT / "bus" / "mnemobus"
WORKERS = ROOT / "workers" / "mnemobus_workers"

FLOORS = [
    {"cli", "__main__"},
    {"embedded", "testing"},
    {"bus"},
    {"lifecycle"},
    {"parts"},
    {"writes", "reads", "tokens", "context"},
    {"known", "health"},
    {"cache", "feed", "live", "events"},
    {"identity"},
    {"store", "log"},
    {"connection"},
    {"records"},
    {"memory"},
    {"values", "keys", "stats", "settings", "addresses", "password", "private", "tasks"},
    {"errors"},
]
"""Folders and modules of the bus, from the top down. What is on one floor may import what is beside or below it."""
OWN_FLOOR = {"__init__": 2}
"""The package itself, which gives out the public names: imported as a whole it stands where `bus` stands."""


def module_of(path: Path) -> str:
    return path.relative_to(BUS).with_suffix("").as_posix().removesuffix("/__init__")


MODULES = {module_of(path): path for path in BUS.rglob("*.py") if "__pycache__" not in path.parts}


def imports(path: Path) -> set[str]:
    """The modules of the bus that one imports, at its top or within, for types only or not."""
    package = list(path.relative_to(BUS).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - (node.level - 1)]
        target = "/".join([*base, *(node.module or "").split(".")]).strip("/")
        if target in MODULES:
            found.add(target)
        found |= {name for a in node.names if (name := f"{target}/{a.name}".strip("/")) in MODULES}
    return found


def floor_of(module: str) -> int:
    room = module.partition("/")[0]
    if room in OWN_FLOOR:
        return OWN_FLOOR[room]
    [floor] = [number for number, rooms in enumerate(FLOORS) if room in rooms] or [-1]
    assert floor >= 0, f"{room} has no floor yet: say where it belongs"
    return floor


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards_in(module: str) -> None:
    for other in imports(MODULES[module]):
        assert floor_of(other) >= floor_of(module), f"{module} is below {other}, and imports it"


def test_imports_have_no_circle() -> None:
    """Not even one that is there for types only. A package that gives out the names of its modules is no circle."""
    graph = {
        module: {other for other in imports(path) if not module.startswith(f"{other}/")}
        for module, path in MODULES.items()
        if module != "__init__"
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_bus_does_not_know_the_workers() -> None:
    for module, path in MODULES.items():
        if module.startswith("cli/"):  # commands that do a worker's work
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(name.startswith("mnemobus_workers") for name in names), module


# One name, one thing


ONE_BY_ONE = {"run", "main", "show", "look", "upgrade"}
"""Functions that each command has, or each database: their module says of which."""


def names_given(statement: ast.stmt) -> list[str]:
    """What a statement at the top of a module defines."""
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def public_names() -> dict[str, list[str]]:
    """By each public name, of a class, a type, a constant or a function, the modules that define it."""
    found = defaultdict(list)
    for folder in (BUS, WORKERS):
        for path in folder.rglob("*.py"):
            for statement in ast.parse(path.read_text()).body:
                for name in names_given(statement):
                    if not name.startswith("_") and name not in {"logger", "T", *ONE_BY_ONE}:
                        found[name].append(path.relative_to(ROOT).as_posix())
    return found


def test_a_public_name_is_defined_once() -> None:
    twice = {name: paths for name, paths in public_names().items() if len(paths) > 1}
    assert twice == {}


def test_public_errors_are_all_in_one_place_and_drawn() -> None:
    errors = MODULES["errors"].read_text()
    defined = [n for n in ast.parse(errors).body if isinstance(n, ast.ClassDef)]
    drawing = ast.get_docstring(ast.parse(errors)) or ""
    assert {n.name for n in defined} <= set(re.findall(r"\w+", drawing))
    names = {n.name for n in defined}
    for folder in (BUS, WORKERS):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and path != MODULES["errors"]:
                    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                    assert node.name.startswith("_") or not bases & names, f"{path.name}: {node.name}"
