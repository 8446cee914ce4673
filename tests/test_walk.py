"""docs/walk.md: all names in it exist, and each file is opened once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALK = (ROOT / "docs" / "walk.md").read_text()
STOPS = re.findall(r"^### `([^`]+)`\n(.+?)(?=\n\n|\Z)", WALK, re.MULTILINE | re.DOTALL)


def test_the_walk_has_three_parts_and_opens_each_file_once() -> None:
    assert re.findall(r"^## (.+)$", WALK, re.MULTILINE) == ["One write", "One read", "One failure"]
    files = [file for file, _ in STOPS]
    assert len(files) == len(set(files)) > 30
    assert len(files) == WALK.count("\n### ")


@pytest.mark.parametrize("file, paragraph", STOPS, ids=[file for file, _ in STOPS])
def test_a_file_of_the_walk_has_what_is_said_of_it(file: str, paragraph: str) -> None:
    path = ROOT / file
    assert path.is_file()
    text = path.read_text()
    names = re.findall(r"`([A-Za-z_][\w.]*)`", paragraph)
    for name in names:
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", text), f"{file} has no {name}"
    assert names or path.suffix == ".lua"


def test_each_room_is_entered() -> None:
    """Every folder that a write, a read or a failure passes is on the way."""
    bus = ROOT / "bus" / "mnemobus"
    rooms = {path.name for path in bus.iterdir() if (path / "__init__.py").is_file()}
    seen = {Path(file).parent.name for file, _ in STOPS}
    assert rooms - seen == {"cli", "embedded", "health"}
