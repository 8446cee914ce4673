"""The parts of the benchmarks: the written figures are the measured ones, and no task loses another's figures."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

from bench import __main__ as program
from bench import page
from bench.measure import OURS, Result, Spread, Target, interleave
from bench.tasks import tasks


def result() -> Result:
    made = Result("write", "one write, until it is logged", "us")
    made.samples = {OURS: [200.0, 220.0, 240.0], "a bare XADD": [100.0, 200.0, 160.0]}
    made.at_most(1.6, "a bare XADD")
    made.faster(4, "a bare XADD")
    made.absent["aiocache"] = "it is a cache"
    made.notes.append("no workers run meanwhile")
    made.curves["all"] = [(1.0, 2.0), (10.0, 3.0)]
    return made


# Figures


def test_a_ratio_is_taken_within_each_round_and_met_by_its_median() -> None:
    first, second = result().targets
    # Given the rounds 200/100, 220/200 and 240/160
    assert first.figure.median == 1.5
    assert first.met
    assert (first.figure.low, first.figure.high) == (1.3, 1.75)
    # The other way round, at least four times
    assert math.isclose(second.figure.median, 1 / 1.5)
    assert not second.met
    assert not Target("x", Spread(1.0, 1.61, 2.0), 1.6).met


def test_what_has_to_hold_each_time_is_judged_by_the_worst_round() -> None:
    made = result()
    made.targets.clear()
    # Given the rounds 2, 1.1 and 1.5: most of them keep 1.6
    made.at_most_ever(1.6, "a bare XADD")
    [target] = made.targets
    assert target.figure.median == 2
    assert not target.met


async def test_contestants_take_turns_and_each_begins_once() -> None:
    order = []

    def turn(name: str):
        async def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    samples = await interleave({"a": turn("a"), "b": turn("b")}, 2)
    # Given one turn of each that does not count, then two rounds
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert samples == {"a": [3.0, 6.0], "b": [4.0, 5.0]}
    # And only the rounds, where nothing has to be warm
    assert await interleave({"a": turn("a")}, 1, warm=False) == {"a": [7.0]}


def test_results_come_back_from_json_as_they_were() -> None:
    made = result()
    assert Result.from_json(json.loads(json.dumps(made.to_json()))) == made


async def test_a_task_that_fails_loses_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    async def one(name: str) -> list[Result]:
        if name == "bad":
            raise RuntimeError("it broke")
        return [result()]

    results, failed = await program.each(["write", "bad", "again"], one)
    assert len(results) == 2
    assert failed == {"bad": "RuntimeError: it broke"}
    assert "[2/3] bad ... failed: RuntimeError: it broke" in capsys.readouterr().out


# The page


def test_the_page_has_every_figure_and_what_became_of_each_target() -> None:
    text = page.text(
        {"machine": {"date": "d", "seconds": "9"}, "results": [result().to_json()], "failed": {"x": "y"}}
    )
    first = "One write, until it is logged"
    assert f"| {first} | mnemobus / a bare XADD: at most 1.6 | 1.50 (1.30 to 1.75) | met |" in text
    assert "|  | a bare XADD / mnemobus: at least 4 | 0.67 (0.58 to 0.79) | **not met** |" in text
    assert f"| {first} | mnemobus | 220 us | 210 to 230 |" in text
    assert "| aiocache | write | it is a cache |" in text
    assert "- No workers run meanwhile. *write*" in text
    assert "1 of 2 targets are met." in text
    assert "| x | y |" in text


def test_the_figures_to_reach_are_targets_of_the_run_and_none_is_left_out() -> None:
    # Given a run that measured turns of one agent and of four, and nothing else that is a figure to reach
    made = []
    for agents, ours in (("1 agent", 1.0), ("4 agents", 4.0)):
        turns = Result("turn", f"a turn, {agents} a process, p50", "ms")
        turns.samples = {OURS: [ours, ours], "psycopg, no cache": [10.0, 10.0]}
        turns.at_most(0.3, "psycopg, no cache")
        made.append(turns)
    text = page.text({"machine": {}, "results": [each.to_json() for each in made], "failed": {}})
    # Then each has a line, with the bound that the task has set
    table = text.partition("## Every target")[0]
    assert "| A turn, p50, against psycopg: 1 agent a process | at most 0.3 | 0.10 | met |" in table
    assert "| A turn, p50, against psycopg: 4 agents a process | at most 0.3 | 0.40 | **not met** |" in table
    # And what was not measured is not met
    others = {figure.what for figure in page.FIGURES} - {"a turn, p50, against psycopg"}
    assert table.count("| - | not measured | **not met** |") == len(others) == len(page.FIGURES) - 1


@pytest.mark.skipif(not page.SOURCE.exists(), reason="no full run has been committed")
@pytest.mark.parametrize("figure", page.FIGURES, ids=lambda figure: figure.what)
def test_the_last_full_run_has_every_figure_to_reach(figure: page.Figure) -> None:
    record = json.loads(page.SOURCE.read_text())
    if figure.task in record["failed"]:
        pytest.skip(f"{figure.task} failed in it")
    assert list(page.places(figure, page.results(record)))


def test_the_page_is_written_between_its_comments_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "PAGE", path)
    record = {"machine": {}, "results": [result().to_json()]}
    for _ in range(2):
        page.write(record)
        assert path.read_text() == f"before\n{page.BEGIN}\n\n{page.text(record)}\n{page.END}\nafter\n"
    assert page.written(path.read_text()) == page.text(record)


@pytest.mark.skipif(not page.SOURCE.exists(), reason="no full run has been committed")
def test_docs_benchmarks_has_the_figures_of_the_last_full_run() -> None:
    assert page.written(page.PAGE.read_text()) == page.text(json.loads(page.SOURCE.read_text()))


@pytest.mark.skipif(not page.SOURCE.exists(), reason="no full run has been committed")
def test_the_last_full_run_has_all_tasks() -> None:
    record = json.loads(page.SOURCE.read_text())
    assert {result["task"] for result in record["results"]} | set(record["failed"]) == set(tasks())


@pytest.mark.parametrize("name", sorted(tasks()))
def test_a_task_is_explained_on_the_page_and_in_its_module(name: str) -> None:
    assert f"`{name}`" in page.PAGE.read_text().partition("## What is not measured")[0]
    assert importlib.import_module(f"bench.tasks.{name}").__doc__


def test_a_plot_that_is_drawn_has_its_caption() -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    from bench import plots

    assert list(plots.PLOTS) == list(page.CAPTIONS)
    text = page.text({"machine": {}, "results": [result().to_json()], "plots": ["hot"]})
    assert "](benchmarks/hot.png)" in text
    assert "(benchmarks/hot.svg)" in text
    assert "drain.png" not in text


def test_the_page_shows_every_plot_there_is() -> None:
    text = page.PAGE.read_text()
    for path in page.FOLDER.glob("*.png"):
        assert f"(benchmarks/{path.name})" in text
        assert path.with_suffix(".svg").exists()


# Plots


def test_the_same_results_draw_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    from bench import plots

    hot, agents = result(), result()
    hot.task, agents.task = "hot", "agents"
    drawn = [plots.draw([hot, agents], tmp_path / folder) for folder in ("a", "b")]
    assert [path.name for path in drawn[0]] == [
        "overview.png", "overview.svg", "hot.png", "hot.svg", "agents.png", "agents.svg",
    ]  # fmt: skip
    for one, other in zip(*drawn, strict=True):
        assert one.read_bytes() == other.read_bytes()
    # Text stays text, so that it can be searched
    assert "One write, until it is logged" in (tmp_path / "a" / "overview.svg").read_text()
