"""What the benchmark chooses, counts as work, takes for right, and refuses. Nothing is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")

from bench import models, work
from bench.accuracy import PRECISION, Answers, checked_rows, gradients, truth
from bench.caches import CacheCase
from bench.ceilings import Limit, limit_of
from bench.gradients import INPUTS
from bench.modules import ModuleCase
from bench.peers import PEERS, features
from bench.ragged import RaggedCase
from bench.suites import SUITES, Job, select
from bench.worker import Worker, draw
from bench.workers import PeerError, Workers
from fastattn import reference
from tests.shapes import ARRAYS, DECODE_ROWS, FEW_QUERIES, FIXED, OPTIONS, RAGGED, Case, convert


def test_every_suite_has_rows_of_distinct_names() -> None:
    for name in SUITES:
        jobs = select(name)
        names = [(job.name, job.dtype) for job in jobs]
        assert jobs and len(set(names)) == len(names), name


def test_patterns_and_dtypes_choose() -> None:
    chosen = select("prefill", ["*d64-s512*"], ["bfloat16"])
    assert {str(job) for job in chosen} == {
        "prefill-d64-s512 bfloat16",
        "prefill-d64-s512-causal bfloat16",
    }
    assert {job.library for job in select("small", ["micro-1x1x1x64"])} == {"torch", "numpy"}
    assert [job.library for job in select("small", ["micro-1x1x1x64 numpy"])] == ["numpy"]


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (("nope",), "decode, ragged, masks, threads, tiers, backward, training, modules, models"),
        (("masks", ["nope"]), "causal-as-mask"),
        (("prefill", [], ["int8"]), "float32, bfloat16, float16, float64"),
        (("prefill", ["prefill-d64-dv128"], ["float64"]), "both a case and a dtype"),
    ],
)
def test_a_wrong_name_lists_the_right_ones(arguments: tuple, listed: str) -> None:
    with pytest.raises(ValueError, match=listed):
        select(*arguments)


def test_rows_of_the_speed_table_are_there() -> None:
    rows = {str(job) for suite in SUITES for job in select(suite)}
    for dtype in ("float32", "bfloat16"):
        for case in (
            "d64-s512",
            "d128-s512-causal",
            "d64-s2048",
            "d128-s8192-causal",
            "d96-s2048",
            "d64-s1000",
        ):
            assert f"prefill-{case} {dtype}" in rows
        for case in (
            "bool-mask",
            "float-bias",
            "causal-as-mask",
            "softcap",
            "alibi",
            "sinks",
            "window-256-s8192",
        ):
            assert f"{case} {dtype}" in rows
        assert f"decode-32x8-s8192 {dtype}" in rows
        assert {f"queries-{n}-s8192 {dtype}" for n in (2, 4, 8, 16, 32, 63, 64, 128)} <= rows
        assert f"prefill-d128-s2048-causal backward {dtype}" in rows
        assert f"prefill-d128-s2048-causal training {dtype}" in rows
        assert f"encoder-1x1024x768 training {dtype}" in rows
    assert {
        "prefill-d64-s4096 backward float32",
        "prefill-gqa-32x8 training bfloat16",
        "prefill-d64-s512 backward float64",
    } <= rows
    assert {"prefill-d64-s2048 float64", "prefill-d64-dv128 float32", "micro-1x1x1x64 numpy float32"} <= rows


def counted(case: Case) -> int:
    """Visible pairs by their definition, one by one."""
    options, total = case.options(), 0
    mask, bias = options.get("mask"), options.get("bias")
    for b, h, i, j in np.ndindex(*case.scores_shape):
        offset = 0 if case.causal == "top_left" else case.seqlen_k - case.seqlen_q
        at = i + int(options["query_offset"][b] if "query_offset" in options else offset)
        left, right = case.window or (None, None)
        hidden = (
            (case.causal and j > at)
            or (left is not None and j < at - left)
            or (right is not None and j > at + right)
            or ("kv_lengths" in options and j >= options["kv_lengths"][b])
            or (mask is not None and not np.broadcast_to(mask, case.scores_shape)[b, h, i, j])
            or (bias is not None and np.broadcast_to(bias, case.scores_shape)[b, h, i, j] == -np.inf)
        )
        total += not hidden
    return total


COUNTED = [
    Case(
        f"count-{name}",
        7,
        11,
        4,
        batch=2,
        query_heads=4,
        kv_heads=2,
        causal=causal,
        window=window,
        arrays=arrays,
    )
    for name, causal, window, arrays in (
        ("plain", False, None, ()),
        ("causal", True, None, ()),
        ("top-left", "top_left", None, ()),
        ("window", False, (3, 1), ()),
        ("causal-window", True, (2, None), ()),
        *((array, False, None, (array,)) for array in (*ARRAYS, *FIXED)),
        ("all", True, (4, 0), ("mask", "bias", "kv_lengths", "query_offset")),
    )
] + [Case("count-more-queries", 11, 5, 4, causal=True)]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_useful_pairs_are_those_that_attend(case: Case) -> None:
    pairs = counted(case)
    assert work.useful_pairs(case) == pairs
    assert work.useful_flops(case) == 4 * pairs * case.head_dim
    assert work.useful_flops(case, "backward") == 2.5 * work.useful_flops(case)
    assert work.useful_flops(case, "training") == 3.5 * work.useful_flops(case)
    shown = np.broadcast_to(work.visible(case), case.scores_shape)
    assert shown.sum() == pairs


def test_work_is_in_the_unit_of_the_ceiling() -> None:
    decode = Job(DECODE_ROWS[0], "bfloat16")
    assert (decode.unit, decode.work) == ("GB/s", 32 * 8192 * 256 * 2 / 1e9)
    lengths = RAGGED.options()["kv_lengths"]
    assert (lengths[0], lengths[-1], len(lengths)) == (100, 8000, 8)
    assert Job(RAGGED, "bfloat16").work == 8 * int(lengths.sum()) * 256 * 2 / 1e9  # useful bytes alone
    backward = Job(DECODE_ROWS[0], "bfloat16", "backward")
    assert (backward.unit, backward.work) == ("GFLOP/s", 10 * 32 * 8192 * 128 / 1e9)
    assert Job(models.CASES[0], "float32").unit == "ktoken/s"
    assert limit_of("float32", True, 2).kind == "read"
    assert limit_of("float64", False, 2) == Limit("fma_f64", 2)
    assert limit_of("bfloat16", False, 1, "scalar").kind == "fma_f32"  # it has no other product


SMALL = Case("bench-small", 64, 64, 32, query_heads=4, kv_heads=2, causal=True)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fastattn", "torch"])
def test_right_answers_are_accepted(name: str, dtype: str) -> None:
    pytest.importorskip("torch")
    status, out = Worker(PEERS[name]).prepare(0, SMALL, dtype, "forward")
    assert status == "ready"
    assert truth(SMALL, dtype).judge(out, name).status == "right"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fastattn", "torch"])
@pytest.mark.parametrize("mode", ["backward", "training"])
def test_right_gradients_are_accepted(mode: str, name: str, dtype: str) -> None:
    pytest.importorskip("torch")
    expected, worker = gradients(SMALL, dtype, mode), Worker(PEERS[name])
    status, answer = worker.prepare(0, SMALL, dtype, mode)
    assert status == "ready" and set(answer) == {*INPUTS, *(["out"] if mode == "training" else [])}
    assert expected.judge(answer, name).status == "right"
    assert worker.sample(0, 1e-4)[0] > 0  # the graph outlives a backward


@pytest.mark.parametrize("kept", ["", "int8", "float8_e4m3fn"])
def test_right_caches_are_accepted(kept: str) -> None:
    """The call is that of the oracle on what was appended, and no other; other libraries are not asked."""
    pytest.importorskip("torch")
    small = Case("bench-cache", 1, 700, 64, batch=2, query_heads=4, kv_heads=2, causal=True)
    case = CacheCase(f"cache-{kept}", small, kept)
    right = Answers(case.truth("bfloat16", "forward"), "bfloat16", case.tolerance("bfloat16"))
    status, answer = Worker(PEERS["fastattn"]).prepare(0, case, "bfloat16", "forward")
    assert (status, right.judge(answer, "fastattn").status) == ("ready", "right")
    other = dataclasses.replace(case, case=dataclasses.replace(small, window=(600, 0)))
    wrong = Answers(other.truth("bfloat16", "forward"), "bfloat16", case.tolerance("bfloat16"))
    assert wrong.judge(answer, "fastattn").status == "wrong"
    assert Worker(PEERS["torch"]).prepare(0, case, "bfloat16", "forward")[0] == "refused"


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("apart", [False, True])
def test_ragged_batches_are_held_against_each_sequence(mode: str, apart: bool) -> None:
    pytest.importorskip("torch")
    case = RaggedCase("ragged", (40, 3, 7), apart)
    status, answer = Worker(PEERS["fastattn"]).prepare(0, case, "bfloat16", mode)
    for lengths, verdict in {(40, 3, 7): "right", (40, 10): "wrong"}.items():
        expected = dataclasses.replace(case, lengths=lengths).truth("bfloat16", mode)
        judged = Answers(expected, "bfloat16", case.tolerance("bfloat16")).judge(answer, "fastattn")
        assert (status, judged.status) == ("ready", verdict)


def test_wrong_gradients_are_found() -> None:
    expected = gradients(SMALL, "float32", "backward")
    for name in INPUTS:
        right = expected.arrays[name]
        for wrong in (right + 1e-3, right[:, :, :-1], np.where(right == right.max(), np.nan, right)):
            for peer in ("fastattn", "torch"):
                verdict = expected.judge({**expected.arrays, name: wrong}, peer)
                assert verdict.status != "right" and name in verdict.why
    coarse = {name: convert(array, "bfloat16") for name, array in expected.arrays.items()}
    assert expected.judge(coarse, "torch").status == "lower"
    assert expected.judge(coarse, "fastattn").status == "wrong"  # a lower precision is no excuse for us


def test_only_peers_with_a_graph_are_asked_for_gradients() -> None:
    assert {name for name, peer in PEERS.items() if peer.differentiates} == {"fastattn", "torch"}
    assert Worker(PEERS["jax"]).prepare(0, SMALL, "float32", "backward") == ("refused", "no backward")


@pytest.mark.parametrize("layer", ["MultiheadAttention", "TransformerEncoderLayer"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_modules_agree(mode: str, layer: str) -> None:
    """Both compute torch's layer, and in training every gradient of it."""
    pytest.importorskip("torch")
    case = ModuleCase("small", layer, 2, 24, 32, 4)
    expected = Answers(case.truth("float32", mode), "float32", case.tolerance("float32"))
    for name in ("fastattn", "torch"):
        status, answer = Worker(PEERS[name]).prepare(0, case, "float32", mode)
        assert status == "ready" and set(answer) == set(expected.arrays)
        assert expected.judge(answer, name).status == "right"
    assert (
        len(expected.arrays) == {"forward": 1, "training": 6 if layer == "MultiheadAttention" else 14}[mode]
    )


@pytest.mark.parametrize(
    "name", ["only-mask", "only-bias", "only-alibi_slopes", "only-kv_lengths", "window-left"]
)
def test_rules_reach_peers_as_one_mask(name: str) -> None:
    pytest.importorskip("torch")
    case = next(case for case in OPTIONS if case.name == name)
    case = dataclasses.replace(
        case, name=f"bench-{name}", arrays=tuple("padding" if a == "mask" else a for a in case.arrays)
    )
    if "kv_lengths" in case.arrays:  # torch answers NaN where nothing is visible
        case = dataclasses.replace(case, name="bench-lengths-7")
        assert case.options()["kv_lengths"].min() > 0
    _, out = Worker(PEERS["torch"]).prepare(0, case, "float32", "forward")
    verdict = truth(case, "float32").judge(out, "torch")
    assert verdict.status == "right", verdict


@pytest.mark.parametrize(
    ("dtype", "computed"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")]
)
def test_a_lower_precision_is_marked(dtype: str, computed: str) -> None:
    torch = pytest.importorskip("torch")
    expected = truth(SMALL, dtype)
    query, key, value = (torch.from_numpy(x.astype(np.float64)) for x in SMALL.tensors(dtype))
    low = getattr(torch, computed)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.to(low), key.to(low), value.to(low), is_causal=True, enable_gqa=True
    )
    verdict = expected.judge(out.double().numpy(), "torch")
    assert verdict.status == "lower" and computed in verdict.why


def test_a_wrong_answer_is_found() -> None:
    expected = truth(SMALL, "bfloat16")
    right = expected.out
    assert expected.judge(right, "torch").status == "right"
    assert expected.judge(right[:, :, :, :-1], "torch").status == "wrong"
    for name in ("torch", "fastattn"):
        assert expected.judge(np.where(np.arange(64)[:, None] == 63, np.nan, right), name).status == "wrong"
        assert expected.judge(right + 0.1, name).status == "wrong"
        full = truth(dataclasses.replace(SMALL, causal=False), "bfloat16").out  # other numbers, another rule
        assert expected.judge(full, name).status == "wrong"
    # A lower precision is no excuse for us.
    assert expected.judge(right * (1 + 2 * PRECISION["bfloat16"]), "fastattn").status == "wrong"


def test_long_calls_are_checked_in_strips() -> None:
    rows = checked_rows(Case("long", 8192, 8192, 64, query_heads=8))
    assert rows[0] == 0 and rows[-1] == 8191 and 500 < len(rows) < 600
    assert len(checked_rows(Case("few", 63, 8192, 128, query_heads=32))) == 63
    case = Case("strips", 600, 600, 16, window=(40, 3), causal=True, arrays=("mask",))
    np.testing.assert_array_equal(truth(case, "float32").out[0, 0, 50:60], _rows(case, 50, 60))


def _rows(case: Case, start: int, stop: int) -> np.ndarray:
    return reference.attention(*case.tensors(), **case.options()).out[0, 0, start:stop]


def test_oracle_and_peers_get_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    for dtype in ("bfloat16", "float16", "float32"):
        (numbers,) = draw(SMALL, dtype, "numpy")
        (tensors,) = draw(SMALL, dtype, "torch")
        assert tensors.key.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(tensors.key.double().numpy(), numbers.key.astype(np.float64))


def test_every_file_registers_a_peer() -> None:
    folder = Path(__file__).resolve().parent.parent / "bench" / "peers"
    assert set(PEERS) == {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}


def test_refusals_say_what_is_missing() -> None:
    grouped = dataclasses.replace(SMALL, softcap=2.0, arrays=("sinks",))
    assert features(grouped) == {"causal", "softcap", "sinks", "grouped heads"}
    assert PEERS["torch"].refuses(grouped, "float32") == "no sinks, softcap"
    assert PEERS["onnxruntime"].refuses(SMALL, "bfloat16") == "no bfloat16"
    assert PEERS["onnxruntime"].refuses(SMALL, "float32") == "no grouped heads"
    assert PEERS["fastattn"].refuses(grouped, "float32") == ""
    assert PEERS["torch"].refuses(FEW_QUERIES[0], "bfloat16") == ""


def test_an_absent_peer_says_how_it_is_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.workers.PEER_PYTHON", tmp_path / "python")
    with Workers() as workers:
        for _ in range(2):
            with pytest.raises(PeerError, match="make bench-peers"):
                workers.get("vllm", 1)


def test_a_peer_that_dies_or_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers() as workers:
        worker = workers.get("fastattn", 1)
        with pytest.raises(PeerError, match="AttributeError"):
            worker.ask("prepare", 0, None, "float32", "forward")
        status, out = worker.ask("prepare", 0, SMALL, "float32", "forward", "numpy")
        assert status == "ready" and out.shape == (1, 4, 64, 32)
        seconds, cores, _ = worker.ask("sample", 0, 0.001)
        assert 0 < seconds < 1 and cores > 0
        worker._process.kill()
        with pytest.raises(PeerError, match="SIGKILL"):
            worker.ask("sample", 0, 0.001)
        workers.discard(worker)
        assert workers.get("fastattn", 1) is not worker
