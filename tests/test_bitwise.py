"""What must not change a bit: threads, load, neighbours, grouping, layout, library, other outputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import bounds
import fastattn as fa
import shapes
from bounds import as_float64
from kernels import Kernel, assert_same_bits, bits
from shapes import Case

ARRAYS = ("mask", "bias", "kv_lengths", "query_offset", "alibi_slopes", "sinks")
MANY = Case("many", 70, 300, 40, 24, batch=3, query_heads=6, kv_heads=2, causal=True)
FEW = Case("few", 5, 300, 40, 24, batch=3, query_heads=6, kv_heads=2, causal=True)
CHUNKS = Case("chunks", 3, 2600, 40, 24, batch=2, query_heads=6, kv_heads=2, causal=True)
ONE = Case("one", 1, 600, 64, batch=2, query_heads=4, kv_heads=1)
RULES = Case("rules", 70, 300, 40, 24, batch=3, query_heads=6, kv_heads=2, softcap=3.0, arrays=ARRAYS)
PADDED = Case(
    "padded",
    70,
    300,
    40,
    24,
    batch=3,
    query_heads=6,
    kv_heads=2,
    arrays=(*shapes.PADDED[:2], "mixed_segments"),
)
CASES = pytest.mark.parametrize("case", [MANY, FEW, CHUNKS, ONE, RULES, PADDED], ids=str)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    yield
    fa.set_num_threads(None)


def run(kernel: Kernel, case: Case, **extra: Any) -> Any:
    options = {"return_lse": True, "return_weights": True, **case.options(kernel.dtype), **extra}
    return fa.attention(*bounds.draw(case, kernel.dtype), **options)


@CASES
class TestThreads:
    def test_number(self, kernel: Kernel, case: Case, restore_threads: None) -> None:
        fa.set_num_threads(1)
        alone = run(kernel, case)
        for threads in (2, 3, 4, 7):
            fa.set_num_threads(threads)
            assert_same_bits(run(kernel, case), alone)


@pytest.fixture(scope="class")
def busy() -> Iterator[None]:
    """A process that leaves this one no core of its own for long."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    process.kill()
    process.wait()


@CASES
class TestBesideABusyProcess:
    def test_run_to_run(self, kernel: Kernel, case: Case, busy: None) -> None:
        first = run(kernel, case)
        for _ in range(4):
            assert_same_bits(run(kernel, case), first)


@CASES
def test_alone_or_in_a_batch(kernel: Kernel, case: Case) -> None:
    query, key, value = bounds.draw(case, kernel.dtype)
    options = case.options(kernel.dtype)
    together = run(kernel, case)
    for b in range(case.batch):
        own = dict(options)
        for name in ("mask", "kv_lengths", "kv_starts", "query_lengths", "query_offset"):
            if name in options:
                own[name] = options[name][b : b + 1]
        if "segment_ids" in options:
            own["segment_ids"] = tuple(ids[b : b + 1] for ids in options["segment_ids"])
        own |= {"return_lse": True, "return_weights": True}
        alone = fa.attention(query[b : b + 1], key[b : b + 1], value[b : b + 1], **own)
        assert_same_bits(alone, tuple(part[b : b + 1] for part in together))


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
def test_grouped_heads_or_repeated_ones(kernel: Kernel, group: int, seqlen_q: int) -> None:
    case = Case("grouped", seqlen_q, 90, 40, 24, query_heads=2 * group, kv_heads=2, causal=True)
    query, key, value = bounds.draw(case, kernel.dtype)
    options = {"causal": True, "return_lse": True, "return_weights": True}
    grouped = fa.attention(query, key, value, **options)
    assert_same_bits(grouped, fa.attention(query, key.repeat(group, 1), value.repeat(group, 1), **options))
    for head in range(2 * group):
        own = slice(head // group, head // group + 1)
        alone = fa.attention(query[:, head : head + 1], key[:, own], value[:, own], **options)
        assert_same_bits(alone, tuple(part[:, head : head + 1] for part in grouped))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("gap", [0, 2, 14, 62])
def test_large_pages_or_rows_that_follow_one_another(
    kernel: Kernel, gap: int, quantised: bool, rng: np.random.Generator
) -> None:
    """Pages that lie so far apart that the last row of a tile may look as if all followed one another."""
    page_size, pages, heads, dim = 1100, 3, 1, 64
    query = shapes.convert(rng.standard_normal((1, 3, 1, dim)), kernel.dtype)
    shape = pages, heads, page_size + gap, dim
    caches, scales = [], []
    for _ in range(2):
        rows = np.full(shape, 120 if quantised else np.nan, "int8" if quantised else query.dtype)
        real = rng.integers(-9, 9, (pages, heads, page_size, dim))
        rows[:, :, :page_size] = real.astype(rows.dtype)
        caches.append(rows[:, :, :page_size])
        scales.append(rng.uniform(0.1, 1, shape[:3]).astype("float32")[..., :page_size])
    table = np.array([[1, 2, 0]], np.int32)
    whole = [part[table[0]].swapaxes(0, 1).reshape(1, heads, -1, *part.shape[3:]) for part in caches + scales]
    names = ("key_scale", "value_scale")
    for length in (*(page_size + more for more in (1, 2, 6, 18)), 2 * page_size + 37, 3 * page_size):
        options = {"cache_seqlens": length, "layout": "bhsd", "return_lse": True}
        paged = dict(zip(names, scales, strict=True)) if quantised else {}
        flat = dict(zip(names, whole[2:], strict=True)) if quantised else {}
        assert_same_bits(
            fa.attention_with_kvcache(query, *caches, block_table=table, **paged, **options),
            fa.attention_with_kvcache(query, *whole[:2], **flat, **options),
        )


@CASES
def test_a_window_that_reaches_everything_or_none(kernel: Kernel, case: Case) -> None:
    reach = 3 * case.seqlen_k  # past both ends from any offset
    assert_same_bits(run(kernel, case, window=(reach, reach)), run(kernel, case))


@CASES
def test_rules_that_hide_nothing(kernel: Kernel, case: Case) -> None:
    if "mask" not in case.arrays:
        mask = np.ones((case.seqlen_q, case.seqlen_k), bool)
        nothing = {"mask": mask, "kv_lengths": [case.seqlen_k] * case.batch}
        if not case.arrays:
            nothing |= {"kv_starts": [0] * case.batch, "query_lengths": [case.seqlen_q] * case.batch}
            nothing["segment_ids"] = tuple(np.ones((case.batch, rows), int) for rows in case.scores_shape[2:])
        assert_same_bits(run(kernel, case, **nothing), run(kernel, case))
    if not case.causal:
        last = case.options()["query_offset"].max() if "query_offset" in case.arrays else 0
        assert_same_bits(
            run(kernel, case, window=(None, int(abs(last)) + 3 * case.seqlen_k)), run(kernel, case)
        )


@CASES
def test_one_layout_or_the_other(kernel: Kernel, case: Case) -> None:
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in bounds.draw(case, kernel.dtype)]
    options = {"return_lse": True, "return_weights": True, **case.options(kernel.dtype)}
    out, lse, weights = fa.attention(*swapped, layout="bshd", **options)
    assert_same_bits((out.swapaxes(1, 2), lse, weights), run(kernel, case))


@CASES
def test_out_given_or_not(kernel: Kernel, case: Case) -> None:
    expected = run(kernel, case)
    shape = expected[0].shape
    for out in (np.empty(shape, expected[0].dtype), np.empty(shape[::-1], expected[0].dtype).T):
        out[...] = np.nan
        result = run(kernel, case, out=out)
        assert result[0] is out
        assert_same_bits(result, expected)


@CASES
def test_other_results_asked_for_or_not(kernel: Kernel, case: Case) -> None:
    out, lse, weights = run(kernel, case)
    assert_same_bits(run(kernel, case, return_lse=False, return_weights=False), out)
    assert_same_bits(run(kernel, case, return_weights=False), (out, lse))
    assert_same_bits(run(kernel, case, return_lse=False), (out, weights))


@CASES
def test_numpy_or_torch(kernel: Kernel, case: Case) -> None:
    """bfloat16 is ml_dtypes' there and torch's own here."""
    integer = {2: np.int16, 4: np.int32, 8: np.int64}[bounds.draw(case, kernel.dtype)[0].itemsize]
    tensors = [
        torch.from_numpy(x.view(integer)).view(getattr(torch, kernel.dtype))
        for x in bounds.draw(case, kernel.dtype)
    ]
    options = {name: x for name, x in case.options(kernel.dtype, "torch").items() if name != "bias"}
    if "bias" in case.arrays:  # torch rounds float64 to float16 by way of float32
        bias = case.options(kernel.dtype)["bias"]
        options["bias"] = torch.from_numpy(bias.view(integer)).view(tensors[0].dtype)
    result = fa.attention(*tensors, return_lse=True, return_weights=True, **options)
    assert all(isinstance(part, torch.Tensor) for part in result)
    assert_same_bits(result, run(kernel, case))


@pytest.mark.parametrize("order", ["side by side", "in runs", "in any order"])
@pytest.mark.parametrize("case", [MANY, FEW, ONE], ids=str)
def test_segments_or_a_mask(kernel: Kernel, case: Case, order: str, rng: np.random.Generator) -> None:
    ids = [rng.integers(0, 4, (case.batch, rows)) for rows in case.scores_shape[2:]]
    if order == "side by side":
        ids = [np.sort(of, 1) for of in ids]
    if order == "in runs":
        ids = [np.repeat(of, 45, 1)[:, : of.shape[1]] for of in ids]
    mask = ids[0][:, None, :, None] == ids[1][:, None, None, :]
    assert_same_bits(run(kernel, case, segment_ids=tuple(ids)), run(kernel, case, mask=mask))


def test_starts_and_lengths_of_queries_or_a_mask(kernel: Kernel) -> None:
    starts, lengths = np.array([0, 130, 300]), np.array([33, 70, 5])
    mask = (np.arange(300) >= starts[:, None])[:, None, None]
    mask = mask & (np.arange(70) < lengths[:, None])[:, None, :, None]
    padded = run(kernel, MANY, kv_starts=starts, query_lengths=lengths)
    assert_same_bits(padded, run(kernel, MANY, mask=mask))


def test_beside_another_sequence_of_any_content(kernel: Kernel) -> None:
    """A batch whose other members hold NaN, and scores that are anything but normal."""
    query, key, value = bounds.draw(RULES, kernel.dtype)
    expected = fa.attention(query, key, value, causal=True)
    for poison in (np.nan, np.inf, 1e4):
        strange = [x.copy() for x in (query, key, value)]
        for x in strange:
            x[0] = poison
            x[2] *= 100
        np.testing.assert_array_equal(bits(fa.attention(*strange, causal=True))[1], bits(expected)[1])


def test_rows_alone_are_equal_to_tolerance_only(kernel: Kernel) -> None:
    """The order of sums is a function of the number of queries too."""
    query, key, value = bounds.draw(MANY, kernel.dtype)
    expected = bounds.expect(query, key, value, causal=True)
    for row in (0, 31, 69):
        offset = row + MANY.seqlen_k - MANY.seqlen_q
        out = fa.attention(query[:, :, row : row + 1], key, value, causal=True, query_offset=offset)
        error = abs(as_float64(out) - expected.out[:, :, row : row + 1])
        assert (error <= bounds.allowed(kernel, expected)[:, :, row : row + 1]).all()


SHARED = {
    "one": (1, 1, 70, 300),
    "a batch": (3, 1, 70, 300),
    "a head": (1, 6, 70, 300),
    "nobody": (3, 6, 70, 300),
    "keys": (3, 1, 1, 300),
    "rows": (1, 1, 70, 1),
}


# Each alone, and of those together a third in the suite: every mask meets a bias, and every bias a mask.
TOGETHER = [
    pytest.param(mask, bias, marks=pytest.mark.slow if mask and bias and (i + j) % 3 else ())
    for i, mask in enumerate([None, *SHARED])
    for j, bias in enumerate([None, "one", "a batch", "a head", "keys"])
]


@pytest.mark.parametrize(("mask_shape", "bias_shape"), TOGETHER)
def test_dense_arguments_that_heads_share(
    kernel: Kernel, mask_shape: str | None, bias_shape: str | None, rng: np.random.Generator
) -> None:
    """They are transposed once for all; written out for each head, every task reads its own."""
    shared = {}
    if mask_shape:
        mask = rng.random(SHARED[mask_shape]) < 0.7
        mask[..., 8:40, 64:128] = False  # whole tiles without a key
        shared["mask"] = mask
    if bias_shape:
        bias = rng.standard_normal(SHARED[bias_shape]).astype(np.float32)
        bias[bias < -1.5] = -np.inf
        shared["bias"] = bias
    written = {name: np.broadcast_to(array, (3, 6, 70, 300)).copy() for name, array in shared.items()}
    tensors = bounds.draw(MANY, kernel.dtype)
    for causal in (False, True):
        options = {"causal": causal, "return_lse": True}
        assert_same_bits(
            fa.attention(*tensors, **options, **shared), fa.attention(*tensors, **options, **written)
        )
