"""Properties of attention that need no oracle, and all features at once against it, on drawn examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import bounds
import fastattn as fa
from bounds import as_float64, assert_lse_within, assert_within
from kernels import Kernel
from shapes import ARRAYS, PADDED, Case

# The examples are the same in every run, so that anybody can repeat a failure. The fixture forces a kernel
# once for all examples of a test, as is wanted.
bounded = settings(
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def cases(draw: st.DrawFn, features: bool = False) -> Case:
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    options: dict[str, Any] = {}
    if features:
        arrays = draw(st.sets(st.sampled_from((*ARRAYS, *PADDED)))) - {"padding"}
        options["arrays"] = tuple(sorted(arrays - ({"segments"} if "mixed_segments" in arrays else set())))
        options["causal"] = draw(st.sampled_from([False, True, "top_left"]))
        bound = st.none() | st.integers(0, 60)
        options["window"] = draw(st.none() | st.tuples(bound, bound))
        options["softcap"] = draw(st.sampled_from([0.0, 0.0, 0.5, 20.0]))
    return Case(
        f"drawn-{draw(st.integers(0, 10**6))}",
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70) | st.integers(230, 300)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        batch=draw(st.integers(1, 2)),
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        **options,
    )


def assert_close(kernel: Kernel, out: Any, other: Any, expected: bounds.Expected) -> None:
    """Two computations of one thing: each within its bound, so that they are within two of each other."""
    error = abs(as_float64(out) - as_float64(other))
    assert_within(error, 2 * bounds.allowed(kernel, expected, sharp=True))


@bounded
@given(case=cases(), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_convexity(kernel: Kernel, case: Case, spread: float) -> None:
    """A row of out is a mean of the rows of value: between the least and the largest of each column."""
    query, key, value = case.tensors(kernel.dtype, spread=spread)
    out, value = as_float64(fa.attention(query, key, value)), as_float64(value)
    value = value.repeat(case.query_heads // case.kv_heads, axis=1)
    low, high = value.min(axis=2, keepdims=True), value.max(axis=2, keepdims=True)
    slack = (2.0**-8 if kernel.rounds_probabilities else 1e-6) * abs(value).max(axis=2, keepdims=True)
    slack = slack + bounds.ulp(slack, kernel.dtype)
    if kernel.dtype == "float64":
        slack = slack * 1e-8
    assert (out >= low - slack).all() and (out <= high + slack).all()


@bounded
@given(case=cases(), order=st.randoms(use_true_random=False))
def test_order_of_keys(kernel: Kernel, case: Case, order: Any) -> None:
    query, key, value = case.tensors(kernel.dtype)
    permutation = list(range(case.seqlen_k))
    order.shuffle(permutation)
    out, lse = fa.attention(query, key, value, return_lse=True)
    other, other_lse = fa.attention(query, key[:, :, permutation], value[:, :, permutation], return_lse=True)
    expected = bounds.expect(query, key, value)
    assert_close(kernel, out, other, expected)
    assert_within(abs(lse - other_lse), 2 * bounds.allowed_lse(kernel, expected, sharp=True))


@bounded
@given(case=cases(), shift=st.sampled_from([-1000.0, -3.5, 0.25, 64.0]))
def test_uniform_shift(kernel: Kernel, case: Case, shift: float) -> None:
    """A constant added to all scores of a row moves its lse by as much, and nothing else."""
    query, key, value = case.tensors(kernel.dtype)
    bias = np.full((case.seqlen_q, 1), np.float32(shift))
    out, lse = map(as_float64, fa.attention(query, key, value, return_lse=True))
    moved, moved_lse = map(as_float64, fa.attention(query, key, value, bias=bias, return_lse=True))
    expected = bounds.expect(query, key, value, bias=bias)
    assert_close(kernel, out, moved, expected)
    assert_within(abs(lse + shift - moved_lse), 2 * bounds.allowed_lse(kernel, expected, sharp=True))


@bounded
@given(case=cases(features=True), cut=st.floats(0, 1))
def test_merged_states_of_any_split(kernel: Kernel, case: Case, cut: float) -> None:
    """Attention over the keys before a cut and over those from it on, merged, is attention over all."""
    query, key, value = case.tensors(kernel.dtype)
    options = case.options(kernel.dtype)
    sinks = options.pop("sinks", None)
    at = round(cut * case.seqlen_k)
    lengths = options.pop("kv_lengths", np.full(case.batch, case.seqlen_k))
    offset = options.pop("query_offset", np.full(case.batch, case.seqlen_k - case.seqlen_q))
    states = []
    for first, (begin, end) in ((True, (0, at)), (False, (at, case.seqlen_k))):
        part = {
            name: x[..., begin:end] if name in ("mask", "bias") and x.shape[-1] > 1 else x
            for name, x in options.items()
        }
        part |= {"kv_lengths": np.clip(lengths - begin, 0, end - begin), "query_offset": offset - begin}
        if "kv_starts" in part:
            part["kv_starts"] = np.clip(part["kv_starts"] - begin, 0, end - begin)
        if "segment_ids" in part:
            of_query, of_key = part["segment_ids"]
            part["segment_ids"] = of_query, of_key[:, begin:end]
        part["sinks"] = sinks if first else None  # exactly one part carries them
        states += fa.attention(query, key[:, :, begin:end], value[:, :, begin:end], return_lse=True, **part)
    out, lse = map(as_float64, fa.merge_states(*states))
    options |= {"kv_lengths": lengths, "query_offset": offset, "sinks": sinks}
    expected = bounds.expect(query, key, value, **options)
    # The parts are rounded to their dtype, and weighted by a rounded lse, before they are merged.
    rounded = bounds.ulp(expected.mass, kernel.dtype)
    rounded += (2e-4 if kernel.rounds_probabilities else 0) * expected.mass
    assert_within(abs(out - expected.out), rounded + 2 * bounds.allowed(kernel, expected, sharp=True))
    assert_lse_within(lse, expected, 2 * bounds.allowed_lse(kernel, expected, sharp=True))


@bounded
@given(case=cases(features=True), spread=st.sampled_from([1.0, 8.0]))
def test_values_of_one_give_one(kernel: Kernel, case: Case, spread: float) -> None:
    """Weights sum to 1 within an ulp, but for what a sink takes; a row that sees nothing gives 0."""
    query, key, value = case.tensors(kernel.dtype, spread=spread)
    options = case.options(kernel.dtype) | {"sinks": None}
    out, lse = fa.attention(query, key, np.ones_like(value), return_lse=True, **options)
    seen = np.isfinite(lse)
    assert not as_float64(out)[~seen].any()
    ulp = bounds.ulp(np.array(1.0), kernel.dtype) * (1 if "16" in kernel.dtype else 4)
    assert abs(as_float64(out)[seen] - 1).max(initial=0) <= ulp


@bounded
@given(case=cases(), more=st.integers(1, 40))
def test_later_keys_do_not_move_earlier_rows(kernel: Kernel, case: Case, more: int) -> None:
    assume(case.seqlen_k > more)
    query, key, value = case.tensors(kernel.dtype)
    options = {"causal": True, "query_offset": 0}
    whole = fa.attention(query, key, value, **options)
    kept = case.seqlen_k - more
    cut = fa.attention(query, key[:, :, :kept], value[:, :, :kept], **options)
    expected = bounds.expect(query, key, value, **options)
    rows = slice(0, min(kept, case.seqlen_q))
    error = abs(as_float64(whole) - as_float64(cut))
    assert_within(error[:, :, rows], 2 * bounds.allowed(kernel, expected, sharp=True)[:, :, rows])


@settings(bounded, max_examples=25)
@given(
    case=cases(features=True), spread=st.sampled_from([1.0, 6.0]), scale=st.sampled_from([None, 0.3, -1.0])
)
def test_all_features_at_once(kernel: Kernel, case: Case, spread: float, scale: float | None) -> None:
    query, key, value = case.tensors(kernel.dtype, spread=spread)
    options = case.options(kernel.dtype) | {"scale": scale}
    expected = bounds.expect(query, key, value, **options)
    result = fa.attention(query, key, value, return_lse=True, return_weights=True, **options)
    out, lse, weights = map(as_float64, result)
    assert_within(abs(out - expected.out), bounds.allowed(kernel, expected, sharp=True))
    assert_lse_within(lse, expected, bounds.allowed_lse(kernel, expected, sharp=True))
    assert_within(abs(weights - expected.weights), bounds.allowed_weights(kernel, expected))
    assert not weights[expected.weights == 0].any()
