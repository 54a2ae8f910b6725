"""`make gpu-check` without a GPU: its reference, its lists, what it counts, survives and writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
import torch

import fastattn as fa
from fastattn import reference as oracle
from fastattn.problem import AttentionProblem
from gpu_check import ROOT, checks, contestants, reference, rows, timing
from gpu_check.checks import Check, WrongError, compare, compare_lse
from gpu_check.groups import GROUPS
from gpu_check.inputs import LAYOUTS, draw, draw_on_device, laid_out
from gpu_check.lists import items_of
from gpu_check.looks import Look
from gpu_check.processes import ENDING, Outcome, Runner, Task
from gpu_check.report import Report, markdown, summary
from gpu_check.routes import Public
from gpu_check.session import sliced
from gpu_check.targets import TARGETS
from gpu_check.torch_checks import TorchCheck
from gpu_check.worker import DEVICE_LOST, MARK
from tests import shapes
from tests.shapes import Case

PLAIN = [
    Case("heads-full", 70, 70, 16, batch=2, query_heads=6, kv_heads=3),
    Case("heads-causal", 40, 70, 16, 8, query_heads=4, kv_heads=2, causal=True),
    Case("heads-top-left", 70, 40, 16, query_heads=2, causal="top_left"),
    Case("heads-window", 90, 90, 16, query_heads=2, causal=True, window=(7, 0)),
]


@pytest.mark.parametrize(
    "case", [*shapes.OPTIONS, *shapes.LENGTHS, *shapes.EMPTY, *shapes.VALUE_DIMS[:2]], ids=str
)
def test_reference_is_the_oracle(case: Case) -> None:
    inputs = draw(case, "float32", "cpu", seed=3)
    found = reference.attend(**(inputs.options | inputs.differentiable))
    right = oracle.attention(*case.tensors(seed=3), **case.options(seed=3))
    for name in ("out", "lse", "weights"):
        np.testing.assert_allclose(getattr(found, name).numpy(), getattr(right, name), rtol=1e-11, atol=1e-13)


def test_reference_drops_what_the_oracle_drops() -> None:
    case = Case("drops", 9, 21, 8, batch=2, query_heads=2)
    dropout = {"dropout_p": 0.4, "dropout_seed": (1 << 63) + 5, "dropout_offset": 3}
    inputs = draw(case, "float32", "cpu", seed=0)
    found = reference.attend(**(inputs.options | inputs.differentiable | dropout))
    right = oracle.attention(*case.tensors(), **case.options(), **dropout)
    np.testing.assert_allclose(found.weights.numpy(), right.weights, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_long_calls_have_the_same_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROWS_AT_ONCE", 13 * case.seqlen_k)  # some rows at a time
    inputs = draw_on_device(case, "float32", "cpu", seed=1)
    every = case.batch * case.kv_heads
    heads = reference.Heads(case, inputs.query, inputs.key, inputs.value, at_most=every)
    assert len(heads.places) == every
    leaves = inputs.with_graph()
    out = reference.attend(**(leaves.options | leaves.differentiable)).out
    torch.testing.assert_close(heads.out(), heads.of_query(out.detach()), rtol=1e-12, atol=1e-12)
    given = {name: x.double().detach().requires_grad_() for name, x in inputs.differentiable.items()}
    out = reference.attend(**(inputs.options | given)).out
    right = torch.autograd.grad(out, list(given.values()), inputs.grad_out.double())
    found = heads.gradients(inputs.grad_out)
    for mine, gradient, take in zip(found, right, (heads.of_query, heads.of_key, heads.of_key), strict=True):
        torch.testing.assert_close(mine, take(gradient), rtol=1e-10, atol=1e-10)


def test_few_of_many_heads_are_looked_at() -> None:
    case = Case("heads-many", 8, 8, 4, batch=4, query_heads=16, kv_heads=8)
    inputs = draw_on_device(case, "float32", "cpu", seed=0)
    heads = reference.Heads(case, inputs.query, inputs.key, inputs.value)
    assert len(heads.places) <= 4 and {(0, 0), (3, 7)} <= set(heads.places)


def test_comparison_notices() -> None:
    right = torch.randn(4, 50, 8, dtype=torch.float64)
    assert compare("out", right * (1 + 1e-4), right, 1e-3) == pytest.approx(1e-4)
    one_row, hole, off = right.clone(), right.clone(), right * 1.01
    one_row[2, 7] += 0.05
    hole[0, 0, 0] = float("nan")
    for wrong in (one_row, hole, off):
        with pytest.raises(WrongError):
            compare("out", wrong, right, 1e-3)
    with pytest.raises(WrongError, match="torch's own operations"):
        compare("out", right * (1 + 9e-4), right, 1e-3, torchs=right * (1 + 1e-4))
    nothing = torch.zeros(3, 4)
    compare("out", nothing, nothing, 1e-3)
    with pytest.raises(WrongError):
        compare("out", nothing + 0.1, nothing, 1e-3)


def test_comparison_of_lse_knows_dead_rows() -> None:
    right = torch.tensor([1.0, -reference.INF, 200.0], dtype=torch.float64)
    assert compare_lse(right.float(), right, 1e-6) == 0
    for at, value in ((0, 1.1), (1, 0.0), (2, -reference.INF), (0, float("nan"))):
        wrong = right.clone()
        wrong[at] = value
        with pytest.raises(WrongError):
            compare_lse(wrong, right, 1e-3)


class Faulty:
    """The CPU's results with one number off, as a wrong kernel gives them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, backend: str | None) -> Faulty:
        return self

    def forward(self, inputs: Any, lse: bool = False, weights: bool = False) -> Callable[[], Any]:
        run = Public().forward(inputs, lse, weights)

        def wrong() -> Any:
            outputs = run()
            getattr(outputs, self.name)[0, 1, 5] += 0.05
            return outputs

        return wrong

    def backward(self, inputs: Any, grad_lse: Any = None) -> Callable[[], Any]:
        run = Public().backward(inputs, grad_lse)

        def wrong() -> Any:
            gradients = run()
            gradients[self.name].view(-1)[5] += 5
            return gradients

        return wrong


@pytest.mark.parametrize("name", ["keys", "weights", "entropy", "key_mass", "output", "distance_mass"])
def test_a_wrong_look_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(Case("look", 20, 50, 16, query_heads=2, arrays=("sinks",)), "float32")
    look.run("cpu", 0, None)
    plain = fa.insight

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = plain(*arguments, **options)
        getattr(found, name)[0, 1, 3] += 1
        return found

    monkeypatch.setattr(fa, "insight", wrong)
    with pytest.raises(WrongError):
        look.run("cpu", 0, None)


@pytest.mark.parametrize("name", ["out", "lse", "weights", "query", "key", "value", "bias"])
def test_a_wrong_kernel_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("faulty", 33, 65, 16, query_heads=2, arrays=("bias",))
    backward = name not in ("out", "lse", "weights")
    check = Check(case, "float32", "backward" if backward else "forward", weights=not backward)
    assert check.run("cpu", 0, "cpu")
    monkeypatch.setattr(checks, "Public", Faulty(name))
    with pytest.raises(WrongError, match=name):
        check.run("cpu", 0, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    tensor = torch.randn(2, 3, 5, 7)
    laid = laid_out(tensor, layout)
    assert torch.equal(laid, tensor)
    assert (laid.stride() == tensor.stride()) == (layout == "plain")


@pytest.mark.parametrize("group", GROUPS)
def test_every_check_is_a_legal_call(group: str) -> None:
    items = GROUPS[group]()
    assert len({item.label for item in items}) == len(items) > 0
    covered = sorted(index for task in sliced(group) for index in task.items)
    assert covered == list(range(len(items)))
    for check in {item.case: item for item in items if isinstance(item, Check)}.values():
        inputs = check.inputs("cpu", seed=0)
        AttentionProblem.from_arguments(inputs.query, inputs.key, inputs.value, **inputs.options)
        assert max(check.case.head_dim, check.case.value_dim) <= 256
    for check in items:
        assert isinstance(check, (Check, Look, TorchCheck))


def test_every_argument_is_checked_both_ways_in_every_dtype() -> None:
    for group in (f"{mode}-{dtype}" for mode in ("forward", "backward") for dtype in shapes.DTYPES[1:]):
        checks_of = GROUPS[group]()
        seen = {name for check in checks_of for name in check.case.arrays}
        assert seen >= set(shapes.ARRAYS) - {"padding"}, group
        for rule in ("window", "softcap", "causal"):
            assert any(getattr(check.case, rule) for check in checks_of)


def test_rows_are_legal_and_targets_are_among_them() -> None:
    found = {row.label: row for row in items_of("bench")}
    assert len(found) == len(items_of("bench")) == len(items_of("warm")) == len(items_of("rehearsal"))
    for target in TARGETS:
        contestants_of = getattr(found[target.row], "contestants", (target.ours, *target.against))
        assert {target.ours, *target.against} <= set(contestants_of)
    for row in found.values():
        if isinstance(row, rows.Row):
            assert set(row.contestants) <= set(contestants.CONTESTANTS)
            assert row.case.query_heads % row.case.kv_heads == 0
            assert row.graph or row.case.batch * row.case.seqlen_q == rows.TOKENS


def test_flops_and_bytes() -> None:
    full = rows.Row("", rows.square(8192, 128, False), ()).work()
    assert full == {"flops": 4.0 * 2 * 16 * 8192**2 * 128, "bytes": 2.0 * 4 * 16384 * 2048}
    causal = rows.Row("", rows.square(8192, 128, True), (), "backward").work()
    assert causal["flops"] == 2.5 * 4 * 2 * 16 * 8192 * 8193 // 2 * 128
    window = rows.Row("", rows.WINDOW, ()).work()
    assert window["flops"] == 4 * 16 * 128 * (128 * 16384 - 127 * 128 // 2)
    keys = 2 * 2 * 8 * 8 * 32768 * 128
    assert rows.Row("", rows.decoding(4), ()).work()["bytes"] == keys + 2 * 2 * 8 * 64 * 4 * 128


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("row", 64, 64, 16, query_heads=2, causal=True)
    right = contestants.CONTESTANTS["fastattn"]

    def wrong(*arguments: Any) -> Any:
        run = right(*arguments)
        return lambda: tuple(x * 1.1 for x in run())

    def lost(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(contestants.CONTESTANTS, "portable", wrong)
    monkeypatch.setitem(contestants.CONTESTANTS, "hopper", lost)
    for mode in ("forward", "backward"):
        found = rows.Row("", case, ("fastattn", "portable", "flash"), mode).run("cpu", 0, None)["contestants"]
        assert found["fastattn"]["seconds"] > 0 and found["flash"]["seconds"] > 0
        assert found["portable"]["status"] == "wrong" and "seconds" not in found["portable"]
    with pytest.raises(RuntimeError, match="hopper: CUDA error"):
        rows.Row("", case, ("fastattn", "hopper")).run("cpu", 0, None)


def test_times_are_medians_in_turns() -> None:
    order: list[str] = []
    times = timing.Clock("cpu").in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1e-4
    )
    assert times["a"].calls == timing.ROUNDS * timing.FEWEST
    turns = "".join(order).lstrip("a").lstrip("b")  # after a first look at each
    assert turns == ("a" * timing.FEWEST + "b" * timing.FEWEST) * timing.ROUNDS
    assert timing.summary([3.0, 1.0, 2.0, 2.0, 2.0]).seconds == 2.0


WORKER = """#!{python}
import os, sys, time
items = sys.argv[sys.argv.index("--items") + 1]
for item in map(int, items.split(",")):
    print('{mark}{{"start": %d, "label": ""}}' % item, flush=True)
    print("working on", item, flush=True)
    if item == 1:
        time.sleep(60)
    if item == 2:
        sys.exit(9)
    if item == 4:
        print('{mark}{{"done": 4, "status": "failed", "why": "lost"}}', flush=True)
        sys.exit({lost})
    print('{mark}{{"done": %d, "status": "right", "out": 0.5}}' % item, flush=True)
print('{mark}{{"end": true}}', flush=True)
if item == 7:
    print("terminate called", flush=True)
    os.abort()
"""


def test_a_hang_costs_one_item_and_a_crash_another(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(WORKER.format(python=sys.executable, mark=MARK, lost=DEVICE_LOST))
    program.chmod(0o755)
    task = Task("any", {i: f"item {i}" for i in range(6)}, patience=1.0)
    reported: list[Outcome] = []
    start = time.monotonic()
    Runner({}, "cpu", 0, python=str(program)).run([task], 1, start + 50, reported.append)
    assert time.monotonic() - start < 40
    assert [task.outcomes[i].status for i in range(6)] == [
        "right", "hung", "crashed", "right", "failed", "right",
    ]  # fmt: skip
    assert task.outcomes[1].label == "item 1" and "working on 2" in task.outcomes[2].log
    assert task.outcomes[0].found == {"out": 0.5}
    assert len(reported) == 6


def test_a_crash_behind_the_last_item_is_not_its_own(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(WORKER.format(python=sys.executable, mark=MARK, lost=DEVICE_LOST))
    program.chmod(0o755)
    task = Task("any", {6: "item 6", 7: "item 7"})
    Runner({}, "cpu", 0, python=str(program)).run([task], 1, time.monotonic() + 50)
    assert [task.outcomes[i].status for i in (6, 7)] == ["right", "right"]
    ending = task.outcomes[ENDING]
    assert (ending.status, ending.why) == ("crashed", "the process ended with -6")
    assert ending.label == "end of the process behind item 7" and "terminate called" in ending.log


def test_what_is_left_at_the_deadline_is_said(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(WORKER.format(python=sys.executable, mark=MARK, lost=DEVICE_LOST))
    program.chmod(0o755)
    task = Task("any", {0: "first", 1: "slow", 3: "last"}, patience=30.0)
    Runner({}, "cpu", 0, python=str(program)).run([task], 1, time.monotonic() + 2)
    assert [task.outcomes[i].status for i in (0, 1, 3)] == ["right", "left out", "left out"]


def a_report(seconds: float = 1e-3, status: str = "right") -> Report:
    report = Report(
        "2026-01-01", {"chip": "a GPU", "driver": "1", "torch": "2", "triton": "3"}, "abc", 7, 8.0
    )
    report.checks["decode"] = [Outcome("one", status, why="off by 1" if status == "wrong" else "")]
    report.add_row(Outcome("ceilings", "right", found={"ceilings": {"matmul": 8e14, "copy": 3e12}}))
    for row in items_of("bench")[1:]:
        names = getattr(row, "contestants", ("fastattn forward", "torch forward"))
        entry = {"status": "right", "error": 2e-3, "seconds": seconds, "spread": 0.01, "calls": 9}
        work = row.work() if isinstance(row, rows.Row) else {}
        found = {"contestants": {name: dict(entry) for name in names}, **work}
        report.add_row(Outcome(row.label, "right", found=found))
    return report


def test_report_is_kept_and_fits_a_screen(tmp_path: Path) -> None:
    report = a_report()
    report.rows.append(Outcome("late", "left out"))
    report.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "gpu-check.json", "gpu-check.log", "gpu-check.md",
    ]  # fmt: skip
    kept = json.loads((tmp_path / "new" / "folder" / "gpu-check.json").read_text())
    assert kept["machine"]["chip"] == "a GPU" and kept["ceilings"]["copy"] == 3e12
    table = markdown(report)
    flops = rows.Row("", rows.square(8192, 128, False), ()).work()["flops"]
    assert f"| d128-s8192 forward | {flops / 1e9:.0f} ({flops / 8e11:.0%}) |" in table
    assert "1 rows were left out for want of time: late" in table
    assert len(summary(report)) < 12000
    assert report.passed()


def test_targets_are_ratios_of_one_run() -> None:
    report = a_report()
    for row in report.rows:
        entries = row.found.get("contestants", {})
        for name in ("cudnn", "flash", "flex", "torch forward"):
            if name in entries:
                entries[name]["seconds"] = 4e-3 if name == "flash" else 2e-3
    reached = {target["title"]: target["reached"] for target in report.targets()}
    share = rows.Row("", rows.decoding(1), ()).work()["bytes"] / 1e-3 / 3e12
    for title, value in reached.items():
        expected = share if "ceiling" in title else 2.0
        assert value == pytest.approx(expected), title
    report.rows = [row for row in report.rows if "decode" not in row.label]
    assert sum(target["reached"] is None for target in report.targets()) == 2


@pytest.mark.parametrize("status", ["wrong", "hung", "crashed", "failed"])
def test_what_went_wrong_is_told(status: str, tmp_path: Path) -> None:
    report = a_report(status=status)
    assert not report.passed()
    assert f"decode, one: {status}" in summary(report) and f"decode, one: {status}" in markdown(report)
    report.save(tmp_path)
    assert f"== one: {status}" in (tmp_path / "gpu-check.log").read_text()


def test_only_contestants_of_the_project_fail_it() -> None:
    report = a_report()
    entries = report.rows[1].found["contestants"]
    entries["cudnn"] = {"status": "wrong", "why": "off"}
    assert report.passed() and "cudnn wrong in 1 rows" in summary(report)
    entries["portable"] = {"status": "failed", "why": "no"}
    assert not report.passed()


def command(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpu_check", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = command()
    assert done.returncode == 2
    assert done.stdout == f"gpu-check: there is no CUDA GPU here that torch {torch.__version__} can use.\n"


@pytest.mark.slow
def test_a_rehearsal_goes_all_the_way(tmp_path: Path) -> None:
    only = ("tf32", "torch", "weights", "overhead*", "decode-4*", "d256-s512-causal*")
    done = command(
        "--rehearse", "--no-build", "--minutes", "4", "--out", str(tmp_path), "--only", *only, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "gpu-check.json").read_text())
    assert kept["machine"]["chip"] == "none, a rehearsal on the CPU"
    assert {outcome["status"] for outcome in kept["checks"]["weights"]} == {"right"}
    assert [row["label"] for row in kept["rows"]] == [
        "ceilings", "overhead-1x8x128x64", "decode-4 forward graph", "d256-s512-causal forward",
        "d256-s512-causal backward",
    ]  # fmt: skip
