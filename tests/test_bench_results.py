"""What the benchmark makes of times: what it drops, keeps, tells, compares and draws. Nothing is timed."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest

pytest.importorskip("rich")

from rich.console import Console

from bench import compare, insight, tables
from bench import figures as figures_of_readme
from bench.accuracy import truth
from bench.ceilings import Limit
from bench.measure import ROUNDS, measure
from bench.results import Row, Run, find
from bench.samples import TRUSTED, Contestant, Reading, Sample, figures, keep
from bench.suites import SUITES, Job
from tests.shapes import Case

CASE = Case("bench-small", 64, 64, 32, query_heads=4, kv_heads=2, causal=True)
QUIET = Reading(100.0, 1.0)


def sample(
    seconds: float = 1.0, before: Reading = QUIET, after: Reading = QUIET, cores: float = 2.0
) -> Sample:
    return Sample(seconds, cores, before, after)


class FakeWorkers:
    """Peers that answer at once: torch with a wrong output, the others with what a case asks for."""

    ended = False

    def get(self, peer: str, threads: int, isa: str = "") -> FakeWorkers:
        assert (threads, isa) == (2, "")
        self.peer = peer
        return self

    def ask(self, what: str, *arguments: object) -> object:
        if what == "sample":
            return 1e-3, 2.0, 0.0
        out = truth(CASE, "float32").out
        return {
            "fastattn": ("ready", out),
            "torch": ("ready", out + 0.1),
            "flex": ("refused", "no such thing"),
        }[self.peer]

    def forget(self) -> None:
        pass


class FakeCeilings:
    """A machine that is busy at every other reading, or never."""

    def __init__(self, busy: bool) -> None:
        self.best = {"fma_f32, 2 threads": 100.0}
        self.turn, self.busy = 0, busy

    def read(self, limit: Limit) -> Reading:
        self.turn += 1
        return Reading(50.0, 1.0) if self.busy and self.turn % 2 else QUIET


@pytest.mark.parametrize(("busy", "turns"), [(False, ROUNDS), (True, 2 * ROUNDS)])
def test_only_right_outputs_are_timed(busy: bool, turns: int) -> None:
    row = measure(
        Job(CASE, "float32"),
        ["fastattn", "torch", "flex"],
        workers=FakeWorkers(),
        ceilings=FakeCeilings(busy),
        seconds=0.5,
        threads=2,
    )
    statuses = {name: (entry.status, len(entry.samples)) for name, entry in row.contestants.items()}
    assert statuses == {"fastattn": ("right", turns), "torch": ("wrong", 0), "flex": ("refused", 0)}
    assert row.contestants["flex"].why == "no such thing"
    assert row.contestants["torch"].error == pytest.approx(0.1)


def test_slow_samples_are_dropped() -> None:
    good = [sample(1.0), sample(1.1), sample(1.2)]
    bad = [
        sample(5.0, before=Reading(95.0, 1.0)),
        sample(5.0, after=Reading(95.0, 1.0)),
        sample(5.0, after=Reading(100.0, 0.98)),
        sample(5.0, cores=1.5),
    ]
    assert keep(good + bad, best=100.0) == good
    assert keep([sample(before=Reading(97.0, 0.99))], best=100.0) != []
    steady = sample(before=Reading(45.0, 1.0), after=Reading(50.0, 1.0))  # memory: by each other alone
    assert keep([steady, sample(before=Reading(80.0, 1.0))], best=100.0, kind="read") == [steady]
    assert keep(good, best=110.0) == []  # the best of the run came later
    found = figures(Contestant("right", samples=good + bad), work=150.0, best=100.0)
    assert found is not None
    assert (found.seconds, found.kept, found.dropped, found.trusted) == (1.1, 3, 4, True)
    assert found.spread == pytest.approx(0.1 / 1.1)


def test_few_good_samples_are_not_trusted() -> None:
    samples = [sample(1.0)] * (TRUSTED - 1) + [sample(2.0, before=Reading(50.0, 1.0))] * 3
    found = figures(Contestant("right", samples=samples), work=1.0, best=100.0)
    assert found is not None
    assert not found.trusted and found.seconds == 2.0 and found.kept == TRUSTED - 1
    assert figures(Contestant("wrong"), 1.0, 100.0) is None


def test_share_is_of_the_higher_reading() -> None:
    samples = [sample(1.0, before=Reading(98.0, 1.0), after=QUIET)] * 3
    found = figures(Contestant("right", samples=samples), work=50.0, best=100.0)
    assert found is not None and found.share == 0.5


def a_run(seconds: float = 1.0, peak: float = 100.0, status: str = "right", spread: float = 0.0) -> Run:
    run = Run(
        "prefill",
        "2026-01-01T00:00:00+00:00",
        {"cpu": "x", "isa": "y"},
        {},
        {"commit": "", "dirty": False},
        2,
        0.5,
    )
    job = Job(CASE, "float32", base=Job(dataclasses.replace(CASE, name="plain"), "float32"))
    row = Row.of(job, Limit("fma_f32", 2), quotes_ceiling=True)
    readings = Reading(peak, 1.0), Reading(peak, 1.0)
    times = [seconds * (1 + spread * k) for k in (-1, 0, 1)] if status == "right" else []
    samples = [Sample(time, 2.0, *readings) for time in times]
    row.contestants = {
        "fastattn": Contestant(status, "", 1e-7, 1e-7, samples),
        "torch": Contestant("right", "", 1e-7, 1e-7, [Sample(2 * seconds, 2.0, *readings)] * 3),
        "flex": Contestant("lower", "computes float32 no better than bfloat16", 1e-3, 2e-3),
        "fastattn (base)": Contestant("right", "", 1e-7, 1e-7, [Sample(0.5 * seconds, 2.0, *readings)] * 3),
    }
    run.rows, run.ceilings, run.absent = (
        [row],
        {str(row.limit): peak},
        {"jax": "not installed: `make bench-peers`"},
    )
    return run


def test_results_survive_json(tmp_path: Path) -> None:
    run = a_run(spread=0.1)
    path = run.save(tmp_path / "run.json")
    assert Run.load(path) == run
    (tmp_path / "old.json").write_text('{"suite": "prefill"}')
    (tmp_path / "broken.json").write_text("{")
    for name in ("old", "broken", "missing"):
        with pytest.raises(ValueError, match=name):
            Run.load(tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match="there are:"):
        find("no-such-result")


def test_the_table_says_who_was_not_compared() -> None:
    run = a_run()
    console = Console(width=170, file=io.StringIO())
    console.print(tables.table(run))
    tables.notes(run, console)
    text = console.file.getvalue()
    assert "flex" not in text.split("best readings")[0]  # no time, so no column
    assert "flex lower: computes float32 no better than bfloat16 (bench-small float32)" in text
    assert "jax took no part: not installed: `make bench-peers`" in text
    assert tables.best_peer(run, run.rows[0], ["torch"]) == ("torch", 2.0)
    assert run.of_base(run.rows[0], "fastattn") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (a_run(), "same"),
        (a_run(1.04), "same"),
        (a_run(1.2), "REGRESSION"),
        (a_run(0.8), "faster"),
        (a_run(1.25, peak=80.0), "same"),  # the machine is slower, the share is what it was
        (a_run(1.2, spread=0.5), "same"),  # nothing that the spread does not explain
        (a_run(status="wrong"), "WRONG"),
    ],
)
def test_compare(after: Run, verdict: str, tmp_path: Path) -> None:
    (change,) = compare.compare(a_run(), after)
    assert change.verdict == verdict
    names = [str(run.save(tmp_path / name)) for run, name in ((a_run(), "a.json"), (after, "b.json"))]
    status = compare.main(names, Console(file=io.StringIO()))
    assert status == (verdict in ("REGRESSION", "WRONG"))


def test_compare_tells_busy_gone_and_new_rows() -> None:
    before, busy, other = a_run(), a_run(1.08), a_run()
    busy.ceilings = {name: 2 * best for name, best in busy.ceilings.items()}  # no sample near the best
    assert [change.verdict for change in compare.compare(before, busy)] == ["busy"]
    other.rows[0].name = "another"
    assert [change.verdict for change in compare.compare(before, other)] == ["gone", "new"]


def test_tables_of_the_readme_are_those_of_the_results_kept() -> None:
    text = figures_of_readme.README.read_text()
    tables = [names for names in figures_of_readme.places(text) if names[0] not in SUITES]
    assert tables
    for names in tables:
        assert figures_of_readme.rewrite(text, names) == text


def test_the_table_of_insight_is_that_of_the_results_kept() -> None:
    text = insight.DOCUMENT.read_text()
    names = re.findall(r"<!-- table: (insight-.*) -->", text)
    assert len(names) == 1 and insight.rewrite(text, names[0].split()) == text
    with pytest.raises(ValueError, match="no table of 'insight'"):
        insight.rewrite("nothing", names[0].split())
    with pytest.raises(ValueError, match="a result of 'insight', whose rows are no suite's"):
        Run.load(find(names[0].split()[0]))


def test_a_table_is_rewritten(tmp_path: Path) -> None:
    run = a_run()
    run.versions["torch"] = "2.13.0+cpu"
    run.rows[0].case |= {"head_dim": 128, "value_dim": 128}
    path, text = run.save(tmp_path / "new.json"), "a\n<!-- table: prefill -->\nold\n<!-- /table -->\nb\n"
    made = figures_of_readme.rewrite(text, [str(path)])
    assert made.startswith("a\n<!-- table: new -->\n`python -m bench prefill`: ") and made.endswith(
        "-->\nb\n"
    )
    work = run.rows[0].work
    assert f"\n| float32 S64, 4/2 heads |  |  |  | {work:.0f} (2.00x) |\n" in made and "old" not in made
    with pytest.raises(ValueError, match="no table of 'prefill'"):
        figures_of_readme.rewrite("nothing", [str(path)])
    run.threads = 1
    with pytest.raises(ValueError, match="one suite, machine and number of threads"):
        figures_of_readme.rewrite(text, [str(path), str(run.save(tmp_path / "alone.json"))])


def test_a_table_of_caches() -> None:
    """A row a cache, a column a dtype; shares where reading is the limit."""
    run = a_run()
    run.suite, run.versions = "decode", {"vllm": "0.32.0", "torch": "2.13.0"}
    (row,) = run.rows
    row.limit, row.case = Limit("read", 2), {**row.case, "seqlen_q": 1, "query_heads": 28}
    row.work = 50.0
    row.contestants["vllm"] = Contestant("right", samples=[Sample(12.0, 2.0, QUIET, QUIET)] * 3)
    other = Row(**{**vars(row), "dtype": "bfloat16", "limit": Limit("fma_f32", 2)})
    other.case = {**row.case, "batch": 8, "query_heads": 32, "kv_heads": 8}
    kept = Row(**{**vars(row), "case": {"kept": "int8", "case": row.case}, "base_work": 50.0})
    hidden = Row(**{**vars(row), "case": {**row.case, "seqlen_q": 63}})
    run.rows += [other, kept, hidden]
    assert figures_of_readme.table([run]).split("\n\n")[1] == (
        "| | float32 | bfloat16 |\n|---|--:|--:|\n"
        "| 1 query, 64 keys, 28/2 heads | 1000.00 ms, 50% (2.0x, 12x) |  |\n"
        "| 8 sequences of 100 to 64 keys |  | 1000.00 ms (2.0x, 12x) |\n"
        "| 1 query, 8192 keys in int8, against bfloat16 | 1000.00 ms (0.50x) |  |\n"
    )


def test_few_queries_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import draw

    run = a_run()
    rows = [Row(**vars(run.rows[0])) for _ in range(3)]
    for row, queries in zip(rows, (1, 2, 63), strict=True):
        row.name = f"queries-{queries}-s8192" if queries > 1 else "decode-32x8-s8192"
        row.limit = Limit("read" if queries == 1 else "fma_f32", 2)
        row.case = {**row.case, "seqlen_q": queries}
    run.rows = rows
    assert "run-queries.png" in [path.name for path in draw(run, tmp_path / "run")]
    run.rows = rows[:2]
    assert "run-queries.png" not in [path.name for path in draw(run, tmp_path / "run")]


@pytest.mark.parametrize("mode", ["", " backward"])
def test_pictures_are_drawn(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import draw

    run = a_run()
    run.ceilings["read, 2 threads"] = 10.0
    short, long = run.rows[0], Row(**{**vars(a_run().rows[0])})
    for row, length in ((short, 512), (long, 2048)):
        row.name, row.case = f"prefill-d64-s{length}{mode}", {**row.case, "seqlen_q": length}
    run.rows.append(long)
    pictures = draw(run, tmp_path / "run")
    assert [path.name for path in pictures] == ["run-bars.png", "run-roofline.png", "run-lengths.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
