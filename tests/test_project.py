"""The project's own files: the settings are documented as they are, and nothing is committed that should not be."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import AliasChoices

import mnemobus
from mnemobus import Settings, errors

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUS = ROOT / "bus" / "mnemobus"
WORKERS = ROOT / "workers" / "mnemobus_workers"
SCRIPTS = sorted((BUS / "lua").glob("*.lua"))


# Settings


def variables() -> dict[str, str]:
    """Each setting by the variable that sets it."""
    found = {}
    for name, field in Settings.model_fields.items():
        assert isinstance(field.validation_alias, AliasChoices)
        found[str(field.validation_alias.choices[1])] = name
    return found


def template() -> list[tuple[str, str, str]]:
    """What env.template says: "#" if the line is commented out, the variable, the value."""
    text = (ROOT / "env.template").read_text()
    return re.findall(r"^(#?)([A-Za-z_]+)=(.*)$", text, re.MULTILINE)


def test_env_template_names_every_setting_once_and_nothing_else() -> None:
    named = [name for _, name, _ in template()]
    assert sorted(named) == sorted(variables())


def test_env_template_sets_nothing_that_has_a_default() -> None:
    assert [name for commented, name, _ in template() if not commented] == []


@pytest.mark.parametrize(("name", "value"), [(name, value) for _, name, value in template()])
def test_env_template_has_the_default_of(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Given an environment in which nothing is set
    monkeypatch.chdir(tmp_path)
    for variable in (*variables(), "DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    defaults = Settings.load()
    # If the variable is set to what env.template says, then nothing changes
    if value:
        monkeypatch.setenv(name, value)
    assert getattr(Settings.load(), variables()[name]) == getattr(defaults, variables()[name])
    # And no value stands for "not set" alone
    assert bool(value) == (getattr(defaults, variables()[name]) is not None)


def test_env_template_explains_each_setting() -> None:
    # Given the paragraphs of env.template, then each that names settings begins with an explanation.
    for paragraph in (ROOT / "env.template").read_text().split("\n\n"):
        lines = paragraph.strip().splitlines()
        if any(re.match(r"#?[A-Z_]+=", line) for line in lines):
            assert lines[0].startswith("# "), paragraph


# What is committed


@cache
def committed() -> dict[str, str]:
    """The text of every committed file, as it is in the working tree, by its path."""
    if not (ROOT / ".git").exists():
        pytest.skip("not in a git checkout")
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    found = {}
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file():
            found[name] = path.read_bytes().decode("utf-8", "replace")
    assert "pyproject.toml" in found
    return found


def findings(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> list[str]:
    """Where a pattern is found in what is committed."""
    compiled = re.compile(pattern, flags)
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in committed().items()
        for number, line in enumerate(text.splitlines(), 1)
        if compiled.search(line)
    ]


# Put together from pieces, so that these lines don't hold what they look for.
PLACES = ["home" + "/", "root" + "/", "Users" + "/", "wor" + "k/", "far" + "m/", "tmp" + "/w"]
REGISTRIES = [
    "py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs", "deb." + "debian.org", "gh" + "cr.io",
    "qu" + "ay.io", "gc" + "r.io", "registry-1." + "docker",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_no_committed_file_holds_a_path_of_a_machine(place: str) -> None:
    assert findings(rf"(^|[^A-Za-z0-9_.\-]){re.escape('/' + place)}") == []


@pytest.mark.parametrize("host", REGISTRIES)
def test_no_committed_file_names_a_package_registry(host: str) -> None:
    assert findings(re.escape(host)) == []


KEYS = [
    r"BEGIN [A-Z ]*PRIVATE " + "KEY",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"\bgh[pousr]_[A-Za-z0-9]{30,}",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    r"\bsk-[A-Za-z0-9_-]{20,}",
    r"\beyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{20,}",
]


@pytest.mark.parametrize("key", KEYS)
def test_no_committed_file_holds_a_key(key: str) -> None:
    assert findings(key) == []


HARMLESS = re.compile(r".{1,9}|development-only|\*+|[{$<%].*")
"""Values that nobody takes for a password of theirs: short ones, examples, placeholders, what a variable holds."""


def test_no_committed_file_holds_a_password() -> None:
    named = r"(?:password|passwd|secret|api_?key|auth_?token)[\"']?\s*[:=]\s*[\"']([^\"'\s]+)[\"']"
    in_url = r"[a-z]://[^\s:/@\"'`]*:([^\s/@\"'`]+)@"
    found = [
        f"{name}: {value}"
        for name, text in committed().items()
        for value in [*re.findall(named, text, re.IGNORECASE), *re.findall(in_url, text)]
        if not HARMLESS.fullmatch(value)
    ]
    assert found == []


# Words

QUAINT = re.compile(
    r"\b(?:whoever|whomever|whosoever|whence|whereof|thereof|hence|lest|ere|nought|amiss|likewise)\b"
    r"|\b(?:by and by|in vain|of late|to be had|is none of|other worries|such a return)\b"
    r"|\b(?:is|are|was|were) (?:not )?let\b|\b(?:for|of|to|from) who\b",
    re.IGNORECASE,
)
"""What a reader whose first language is another looks up, or reads twice. "If an agent ...", "so", "also", "must not"
and "can't be reached" say the same."""


def test_no_quaint_words_in_the_code_and_the_docs() -> None:
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in committed().items()
        if name.startswith(("bus/", "workers/", "docs/"))
        or name in ("README.md", "env.template", "CHANGELOG.md")
        if not name.endswith(".svg")
        for number, line in enumerate(text.splitlines(), 1)
        if QUAINT.search(line)
    ]
    assert found == []


# Versions and dependencies


def test_the_version_is_the_same_everywhere_and_has_its_entry_in_the_changelog() -> None:
    assert PROJECT["version"] == mnemobus.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", mnemobus.__version__)


def dependencies() -> dict[str, Requirement]:
    """What pyproject.toml asks for, in any extra, but for the project itself."""
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *(text for extra in extras.values() for text in extra)]
    found = {canonicalize_name(r.name): r for r in map(Requirement, texts)}
    del found["mnemobus"]
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned: dict[str, str] = {}
    for line in lines:
        if not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert match, f"not of the form name==version: {line!r}"
            name = canonicalize_name(match[1])
            assert name not in pinned, f"{name} is there twice"
            pinned[name] = match[2]
    return pinned


@pytest.mark.parametrize("name", dependencies())
def test_constraints_fix_a_version_that_pyproject_allows_of(name: str) -> None:
    version = constraints().get(name)
    assert version is not None, f"constraints.txt does not name {name}"
    assert dependencies()[name].specifier.contains(version)


def test_contributing_says_in_one_line_why_each_dependency_was_chosen() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2].partition("\n## ")[0]
    explained = re.findall(r"^- `([\w-]+)`: \w.*\w.*\.$", section, re.MULTILINE)
    assert sorted(explained) == sorted(dependencies())


def test_contributing_says_where_everything_is() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where is what")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    there = set()
    for package in (ROOT / "bus" / "mnemobus", ROOT / "workers" / "mnemobus_workers"):
        there.add(f"{package.relative_to(ROOT)}/")
        there |= {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
        there |= {
            f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"
        }
    # The folder of the commands says for itself what is in it.
    for folder in ("log", "live", "feed", "cache", "connection", "health", "store"):
        for path in (ROOT / "bus" / "mnemobus" / folder).iterdir():
            if path.suffix == ".py" and not path.name.startswith("__"):
                there.add(f"{folder}/{path.name}")
            elif (path / "__init__.py").is_file():
                there.add(f"{folder}/{path.name}/")
    assert there <= named
    # And nothing that is not there
    tops = {"tests/", "tests/scenarios/", "bench/", "compose/", "docs/", "env.template", "constraints.txt"}
    assert named - there == tops


def test_constraints_fix_what_the_dependencies_need_in_turn() -> None:
    from importlib.metadata import distribution

    pinned = constraints()
    missing = set()
    for name in pinned:
        try:
            needs = distribution(name).requires or []
        except ImportError:  # for another version of Python
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                missing |= {canonicalize_name(need.name)} - pinned.keys()
    assert missing == set()


# Lua


@cache
def script(path: Path) -> tuple[str, str]:
    """The contract that a script begins with, and what follows."""
    lines = path.read_text().splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("--")), len(lines))
    return "\n".join(lines[:end]), "\n".join(lines[end:])


lua = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 10


@lua
def test_a_script_begins_with_its_contract(path: Path) -> None:
    contract, _ = script(path)
    # What it does, then each key and argument, then what comes back
    assert re.match(r"-- [A-Z].+", contract)
    assert re.search(r"^-- KEYS\[1\]\s+\w+: \S", contract, re.MULTILINE)
    outcome = re.search(r"^-- (Returns|Errors)\s+\S", contract, re.MULTILINE)
    assert outcome is not None
    assert contract.index("KEYS[1]") < outcome.start()


def _declared(contract: str, what: str) -> tuple[set[int], int | None]:
    """Numbers of the keys or arguments that a contract declares, and from which number on any may follow."""
    found = re.findall(rf"^-- {what}\[(\d+)(\.\.)?\]", contract, re.MULTILINE)
    rest = [int(number) for number, more in found if more]
    return {int(number) for number, more in found if not more}, min(rest, default=None)


@lua
@pytest.mark.parametrize("what", ["KEYS", "ARGV"])
def test_a_script_uses_the_keys_and_arguments_that_it_declares(path: Path, what: str) -> None:
    contract, body = script(path)
    declared, rest = _declared(contract, what)
    used = {int(number) for number in re.findall(rf"{what}\[(\d+)\]", body)}
    assert used - {n for n in used if rest is not None and n >= rest} == declared
    # A number that is computed, or what is unpacked, belongs to those that may follow.
    computed = re.search(rf"{what}\[[^\]\d]|#{what}|unpack\({what}", body) is not None
    assert computed == (rest is not None)


@lua
def test_a_script_touches_no_key_but_those_in_keys(path: Path) -> None:
    """Redis Cluster runs a script where its declared keys are; any other key may be elsewhere."""
    _, body = script(path)
    calls = re.findall(r"redis\.p?call\(([^\n]*)", body)
    assert calls or "redis.acl_check_cmd" in body  # which only asks
    for call in calls:
        words: list[Any] = [word.strip() for word in call.split(",")]
        command = words.pop(0).rstrip(")")
        assert re.fullmatch(r"'[A-Z]+'", command), f"a command that is not literal: {call}"
        if command in ("'TIME'", "'INFO'"):
            continue
        if command in ("'XINFO'", "'XGROUP'"):
            words.pop(0)
        assert re.match(r"KEYS\[(\d+|i)\]|unpack\(KEYS\b", words[0]), f"{path.name}: {call}"


# Decisions


def test_each_decision_is_listed_and_says_why_and_what_was_refused() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    files = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    assert [path.name[:4] for path in files] == [f"{n:04}" for n in range(1, len(files) + 1)]
    for path in files:
        text = path.read_text()
        title = re.match(rf"# {int(path.name[:4])}\. (.+)\n", text)
        assert title, path.name
        assert f"[{title[1]}]({path.name})" in index
        assert {"**Decided.**", "**Why.**", "**Refused.**"} <= set(re.findall(r"^\*\*[^*]+\*\*", text, re.M))
        assert len(text.splitlines()) <= 45, f"{path.name}: half a page is enough"


# Errors


def raisers() -> dict[str, set[str]]:
    """By the name of what is called, the files in which it is."""
    found: dict[str, set[str]] = {}
    for package, before in ((BUS, ""), (WORKERS, "workers/")):
        for path in package.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and path.name != "errors.py"
                ):
                    found.setdefault(node.func.id, set()).add(before + path.relative_to(package).as_posix())
    return found


def test_errors_say_in_which_files_each_of_them_is_worded() -> None:
    _, _, table = (errors.__doc__ or "").partition("Each error is worded")
    told: dict[str, set[str]] = {}
    name = ""
    for line in table.splitlines()[2:]:
        files = line.replace(",", "").split()
        if not line.startswith(" " * 5):  # else the one before goes on
            name = files.pop(0)
        told.setdefault(name, set()).update(files)
    public = [
        name for name, kind in vars(errors).items() if isinstance(kind, type) and name != "MnemobusError"
    ]
    made = raisers()
    assert told == {name: made[name] for name in public if name in made}
