"""Every example of README.md and docs/ runs as printed; commands that are shown exist, with the options shown."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.main import get_command

import mnemobus
from mnemobus import Settings
from mnemobus.cli import app
from mnemobus.stats import Health, Stats
from servers import Workers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of each fenced block of a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in PAGES for text in fence.findall(page.read_text())]


PROGRAMS = blocks("python")
COMMANDS = [
    (page, line.removeprefix("$ "))
    for page, text in blocks("console")
    for line in text.splitlines()
    if line.startswith("$ ")
]


def run(program: str, settings: Settings, folder: Path) -> str:
    """What a program prints, run as a user would in a folder of their own."""
    (folder / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=os.environ | settings.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("page, program", PROGRAMS, ids=[f"{p}-{n}" for n, (p, _) in enumerate(PROGRAMS)])
def test_a_program_runs_as_printed(
    page: str, program: str, settings: Settings, workers: Callable[..., Workers], tmp_path: Path
) -> None:
    for module in ("fastapi", "uvloop"):
        if re.search(rf"^(import|from) {module}\b", program, re.MULTILINE):
            pytest.importorskip(module)
    workers(settings, processes=1)
    run(program, settings, tmp_path)


def test_the_first_program_is_short_and_prints_what_it_says(
    settings: Settings, workers: Callable[..., Workers], tmp_path: Path
) -> None:
    page, program = PROGRAMS[0]
    assert page == "README.md"
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    workers(settings, processes=1)
    before, after = run(program, settings, tmp_path).splitlines()
    assert "The soup is salty." in before
    assert after == "The soup is fine."


async def test_the_service_of_the_docs_serves(
    pool: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("fastapi")
    for name, value in pool.environment().items():
        monkeypatch.setenv(name, value)
    [program] = [text for page, text in PROGRAMS if page == "processes.md" and "FastAPI(" in text]
    (tmp_path / "service.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    app = importlib.import_module("service").app

    async def request(method: str, path: str, query: str = "") -> Any:
        """What a server would make of a request, and its answer."""
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [],
        }
        body, statuses = bytearray(), []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status"))
            body.extend(message.get("body", b""))

        await app(scope, receive, send)
        assert statuses[0] == 200, bytes(body)
        return orjson.loads(body)

    async with app.router.lifespan_context(app):
        assert (await request("POST", "/rooms/kitchen", "text=hi")).keys() == {"id"}
        assert await request("GET", "/rooms/kitchen") == ["hi"]
        bus = app.state.bus
    with pytest.raises(mnemobus.BusClosed):
        await bus.count("messages", room="kitchen")


async def test_the_cells_of_the_docs_run_in_the_loop_of_a_notebook(
    pool: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in pool.environment().items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    answers = []
    # As IPython does it: all in the loop that runs already, the last expression of a cell being its answer
    for _, cell in blocks("ipython"):
        tree = ast.parse(cell)
        if isinstance(tree.body[-1], ast.Expr):
            tree.body[-1] = ast.copy_location(
                ast.Assign([ast.Name("_", ast.Store(), lineno=1, col_offset=0)], tree.body[-1].value),
                tree.body[-1],
            )
        code = compile(ast.fix_missing_locations(tree), "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        await eval(code, names)
        answers.append(names.pop("_", None))
    assert answers == [None, "hi", None]


@pytest.mark.parametrize("page, command", COMMANDS)
def test_a_command_that_is_shown_exists_with_its_options(page: str, command: str) -> None:
    line = command.partition(" #")[0].partition(" | ")[0].strip()
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    match words:
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["mnemobus", name, *arguments]:
            commands = get_command(app).commands  # type: ignore[attr-defined]
            assert name in commands
            found = commands[name]
            if hasattr(found, "commands"):
                found = found.commands[arguments[0]]
            known = {option for parameter in found.params for option in parameter.opts}
            used = {word.partition("=")[0] for word in arguments if word.startswith("-") and word != "-"}
            assert used <= known | {"--help"}
        case ["dramatiq", module, *_]:
            assert module == "mnemobus_workers"
        case [
            "pip"
            | "docker-compose"
            | "docker"
            | "redis-cli"
            | "git"
            | "cp"
            | "cd"
            | "apt-get"
            | "curl"
            | "sqlite3",
            *_,
        ]:
            pass
        case _:
            raise AssertionError(f"{page} shows a command that nobody knows: {command}")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_names_every_promise_and_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    for number in range(1, 9):
        assert f"| G{number} |" in readme
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"mnemobus {name}" in readme


def test_each_promise_has_its_limits_its_tests_and_its_figures() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    figures = {*Stats.__dataclass_fields__, *Health.__dataclass_fields__}
    for number in range(1, 9):
        [section] = re.findall(rf"^## G{number}: .*?$(.*?)(?=^## )", text, re.M | re.S)
        for what in ("Kept by", "Does not cover", "Shown by", "A breach shows as"):
            assert f"\n\n**{what}** " in section, f"G{number}: {what}"
        # Tests that are named exist, and at least one in them is of this promise
        tests = re.findall(r"`tests/(\w+\.py)`", section)
        sources = [(ROOT / "tests" / test).read_text() for test in tests]
        assert any(re.search(rf"def test_(g\d_)*g{number}_", source) for source in sources), f"G{number}"
        # Figures that are named exist
        shows = section.partition("**A breach shows as** ")[2]
        named = set(re.findall(r"`([a-z_]+)`", shows))
        assert named and named <= figures, f"G{number}: {named - figures}"


def test_how_it_works_names_only_files_that_exist() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    package = Path(mnemobus.__file__).parent
    for name in re.findall(r"`([\w/]+\.(?:py|lua))`", text):
        roots = [package, package / "lua", ROOT / "workers"]
        assert any((root / name).exists() for root in roots), name
