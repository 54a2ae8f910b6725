"""The page of results: which records it is made of, what it calls reached, and that a browser shows it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")

from rich.console import Console

from bench import generation, goals, insight
from bench.ceilings import Limit
from bench.report import page
from bench.report.others import gpu_verdict
from bench.report.records import Records, read
from bench.results import FOLDER, Row, Run
from bench.samples import Contestant, Reading, Sample
from bench.suites import SUITES, select
from browser import Browser
from fastattn import _core

PEAK = Reading(100.0, 1.0)


def contestant(seconds: float) -> Contestant:
    return Contestant("right", "", 1e-7, 1e-7, [Sample(seconds, 2.0, PEAK, PEAK)] * 3)


def a_run(isa: str = "avx512_bf16", when: str = "2026-01-02", **seconds: float) -> Run:
    """The first row of the backward suite, of 50 GFLOP under a ceiling of 100 a second."""
    machine = {"cpu": "a CPU", "isa": isa, "features": ["avx2"], "platform": "x", "build": {"compiler": "y"}}
    run = Run(
        "backward", f"{when}T00:00:00+00:00", machine, {"torch": "2"}, {"commit": "", "dirty": False}, 2, 1
    )
    job = next(job for job in select("backward") if str(job) == "prefill-d64-s2048 backward float32")
    row = dataclasses.replace(Row.of(job, Limit("fma_f32", 2), quotes_ceiling=True), work=50.0)
    row.contestants = {name: contestant(value) for name, value in seconds.items()}
    run.rows, run.ceilings = [row], {str(row.limit): 100.0, "read, 2 threads": 10.0}
    return run


def cell_of(text: str, column: str) -> str:
    """The first cell below a heading, as it stands in the page, of the only suite there."""
    table = re.findall(r"<table>.*?</table>", text, re.DOTALL)[-1]
    headings = re.findall(r"<th[^>]*>(.*?)</th>", table)
    cells = re.findall(r"<td.*?</td>", table, re.DOTALL)
    return cells[headings.index(column)]


def made(tmp_path: Path, *runs: Run) -> str:
    names = [str(run.save(tmp_path / f"backward-{place}.json")) for place, run in enumerate(runs)]
    return page.html(read(names))


# Goals of that row: 1.4 and 1.6 times torch, 80% and 90% of the ceiling on a Zen 4.
@pytest.mark.parametrize(
    ("theirs", "verdict"), [(1.60, "aim"), (1.597, "aim"), (1.59, "must"), (1.40, "must"), (1.39, "short")]
)
def test_ratios_are_coloured_by_goal(theirs: float, verdict: str, tmp_path: Path) -> None:
    cell = cell_of(made(tmp_path, a_run(fastattn=1.0, torch=theirs)), "x torch")
    assert f'class="{verdict}"' in cell and f"{theirs:.2f}" in cell
    assert {"aim": "✓✓ aim", "must": "✓ must", "short": "✗ short"}[verdict] in cell  # not by colour alone


@pytest.mark.parametrize(("isa", "verdict"), [("avx512_bf16", 'class="short"'), ("amx_fp16", "<td title")])
def test_shares_are_asked_of_one_tier(isa: str, verdict: str, tmp_path: Path) -> None:
    cell = cell_of(made(tmp_path, a_run(isa, fastattn=1.0)), "of ceiling")
    assert verdict in cell and "50%" in cell


def test_less_is_better_for_times() -> None:
    goal = goals.Goal("s", "*", "float32", "seconds", 8e-6, 5e-6)
    assert [goal.verdict(x) for x in (5.04e-6, 5.1e-6, 8e-6, 8.1e-6, math.nan)] == [
        "aim", "must", "must", "short", "",
    ]  # fmt: skip
    alone = goals.Goal("s", "*", "float32", "sdpa", None, 2.0)
    assert [alone.verdict(x) for x in (2.0, 1.9)] == ["aim", "below aim"]


def test_every_goal_is_about_a_row() -> None:
    """A mistyped pattern would never be judged, and nobody would see it."""
    for goal in goals.GOALS:
        if goal.suite == "tiers" and "avx2" not in _core.available_isas():
            continue
        if goal.suite == generation.SUITE:
            assert int(goal.cases) in generation.LENGTHS
            continue
        if goal.suite == insight.SUITE:
            names = [case.name for case in insight.cases(insight.LENGTHS, insight.QUERIES)]
            assert any(goal.about(goal.suite, name, dtype, "") for name in names for dtype in insight.DTYPES)
            assert goal.at_most and goal.must > goal.aim
            continue
        jobs = SUITES[goal.suite].jobs()
        for pattern in goal.cases.split():
            for dtype in goal.dtypes.split():
                one = dataclasses.replace(goal, cases=pattern, dtypes=dtype)
                assert any(one.about(goal.suite, job.name, job.dtype, goal.isa) for job in jobs), one
        assert goal.must is not None or goal.aim is not None
        if goal.must is not None and goal.aim is not None:
            assert (goal.must > goal.aim) == goal.at_most


def test_no_row_has_two_goals_of_the_same_kind() -> None:
    for suite in SUITES:
        for job in SUITES[suite].jobs():
            kinds = [goal.of for goal in goals.goals_of(suite, job.name, job.dtype, "avx512_bf16")]
            assert len(kinds) == len(set(kinds)), (suite, str(job))


def test_of_a_row_measured_twice_more_peers_and_then_the_later_counts(tmp_path: Path) -> None:
    alone = a_run(when="2026-01-04", fastattn=1.0)
    early, late = a_run(when="2026-01-01", fastattn=1.0, torch=1.5), a_run(fastattn=1.0, torch=1.7)
    assert "1.70" in cell_of(made(tmp_path, late, early, alone), "x torch")


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    other = tmp_path / "shapes.json"
    other.write_text('{"sm90": {}}')
    kept = a_run(fastattn=1.0).save(tmp_path / "kept.json")
    assert "Not on this page: shapes." in page.html(read([str(other), str(kept)]))
    with pytest.raises(ValueError, match="no record to show"):
        page.html(Records())
    other.write_text("{")
    with pytest.raises(ValueError, match=r"shapes\.json"):
        read([str(other)])
    with pytest.raises(ValueError, match="no result 'nope'"):
        page.main(["nope"], Console(file=io.StringIO()))


def test_marks_of_a_gpu() -> None:
    marks = [{"must": 0.5, "aim": 0.7, "reached": x} for x in (0.7, 0.5, 0.4, None)]
    assert [gpu_verdict(mark) for mark in marks] == ["aim", "must", "short", ""]
    assert gpu_verdict({"must": None, "aim": 1.0, "reached": 0.1}) == "below aim"


def test_the_page_of_what_is_kept(tmp_path: Path) -> None:
    """Every suite that has a record, and the GPU's, with a picture each."""
    out = tmp_path / "report.html"
    console = Console(file=io.StringIO(), width=200)
    assert page.main(["--out", str(out)], console) == 0
    text = out.read_text()
    titles = re.findall(r'<h2 id="[^"]+">([^:<]+)', text)
    suites = {json.loads(path.read_text()).get("suite") for path in FOLDER.glob("*.json")} - {None}
    assert set(titles) == {"Goals", "gpu-check"} | suites
    assert "NVIDIA H200" in text and "goals measured" in console.file.getvalue()
    assert text.count('class="plotly-graph-div"') > len(titles)
    # The JavaScript is in the page, once, and nothing is asked of another place.
    assert len(re.findall(r"<script[^>]*\bsrc=", text)) == 0
    assert len(re.findall(r"plotly\.js v\d", text)) == 1


def test_a_browser_shows_the_page(tmp_path: Path, browser: Browser) -> None:
    """Every picture is drawn, nothing is fetched, and the console stays silent."""
    out = tmp_path / "report.html"
    page.main(["--out", str(out)], Console(file=io.StringIO()))
    browser.open(out)
    pictures = out.read_text().count('class="plotly-graph-div"')
    drawn = "return document.querySelectorAll('.js-plotly-plot:has(.trace)').length == arguments[0]"
    assert pictures > 20 and browser.wait(drawn, pictures)
    assert browser.run("return document.querySelectorAll('td.short').length") > 0
    assert browser.complaints() == [] and browser.fetched() == []


def test_attention_beside_recurrent_networks(tmp_path: Path) -> None:
    """Small and real: one layer of each sort at two lengths, recall and order, hardly trained."""
    pytest.importorskip("torch")
    from bench.variants import Record
    from fastattn import compare

    kinds = "causal", "lstm"
    lengths = {"lengths": (4, 8), "memory_lengths": (), "threads": (1,), "seconds": 1e-4, "rounds": 1}
    cost = compare.measure_cost(compare.CostSettings(kinds, width=8, heads=1, window=4, **lengths))
    recall = compare.measure_recall(compare.RecallSettings(kinds, distances=(5,), steps=2))
    order = compare.measure_order(compare.OrderSettings(positions=("none", "rotary"), length=6, steps=2))
    run = a_run()
    run.suite, run.rows, run.threads = "variants", [], 1
    path = Record(run, {"cost": cost, "recall": recall, "order": order}).save(tmp_path / "variants.json")
    text = page.html(read([str(path)]))
    assert re.findall(r'<h2 id="([^"]+)">', text) == ["variants"]
    shown = [f"{one.accuracy:.1%}" for one in order.results]
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells[-3:] == ["rotary", str(order.results[1].parameters), shown[1]]
    assert text.count('class="plotly-graph-div"') == 4
