"""The oracle itself: against numbers worked out by hand, and against torch where the meanings agree."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastattn as fa
import shapes
from fastattn import reference

LN2, LN3 = math.log(2), math.log(3)

# Scores of one query against three keys whose weights are simple fractions.
SCORES = [0.0, LN2, LN3]


def row(scores: list[float], values: list[float], **options: Any) -> reference.Result:
    """One query of 1 and keys equal to the scores they shall give."""
    key = np.array(scores, float).reshape(1, 1, -1, 1)
    value = np.array(values, float).reshape(1, 1, -1, 1)
    result = reference.attention(np.ones((1, 1, 1, 1)), key, value, **{"scale": 1.0, **options})
    return reference.Result(*(part[0, 0] for part in result))


def square(length: int, **options: Any) -> np.ndarray:
    """Which keys each query attends to, from equal scores."""
    ones = np.ones((1, 1, length, 1))
    return reference.attention(ones, ones, ones, **options).weights[0, 0] > 0


def test_softmax_by_hand() -> None:
    result = row(SCORES, [6, 12, 18])
    np.testing.assert_allclose(result.weights, [[1 / 6, 2 / 6, 3 / 6]], rtol=1e-15)
    np.testing.assert_allclose(result.out, [[14]], rtol=1e-15)
    np.testing.assert_allclose(result.lse, [math.log(6)], rtol=1e-15)


def test_default_scale_is_one_over_root_d() -> None:
    query = np.full((1, 1, 1, 4), 1.0)
    key = np.array([[0, 0, 0, 0], [LN3 / 2, LN3 / 2, LN3 / 2, LN3 / 2]]).reshape(1, 1, 2, 4)
    weights = reference.attention(query, key, key).weights
    np.testing.assert_allclose(weights[0, 0, 0], [0.25, 0.75], rtol=1e-15)


def test_sink_takes_weight_and_enters_lse() -> None:
    result = row(SCORES, [6, 12, 18], sinks=[math.log(6)])
    np.testing.assert_allclose(result.weights, [[1 / 12, 2 / 12, 3 / 12]], rtol=1e-15)
    np.testing.assert_allclose(result.out, [[7]], rtol=1e-15)
    np.testing.assert_allclose(result.lse, [math.log(12)], rtol=1e-15)


def test_no_sink_is_minus_infinity() -> None:
    assert row(SCORES, [6, 12, 18], sinks=[-np.inf]).lse == row(SCORES, [6, 12, 18]).lse


def test_softcap_comes_before_bias_and_alibi() -> None:
    """Both scores of 50 are capped to 1; then the bias adds ln 3 and ALiBi, one key further, takes ln 2."""
    bias = np.array([LN3, LN3])
    result = row([50, 50], [1, 0], softcap=1.0, bias=bias, alibi_slopes=[LN2], query_offset=0)
    np.testing.assert_allclose(result.weights, [[2 / 3, 1 / 3]], rtol=1e-14)
    np.testing.assert_allclose(result.lse, [math.log(3 * math.e + 1.5 * math.e)], rtol=1e-14)


def test_alibi_is_the_distance_from_the_diagonal() -> None:
    ones = np.zeros((1, 1, 2, 1))
    keys = np.zeros((1, 1, 3, 1))
    weights = reference.attention(ones, keys, keys, alibi_slopes=[LN2]).weights[0, 0]
    # Offset 1: distances are 1, 0, 1 and 2, 1, 0.
    np.testing.assert_allclose(weights, [[1 / 4, 2 / 4, 1 / 4], [1 / 7, 2 / 7, 4 / 7]], rtol=1e-15)


def test_causal_alignments() -> None:
    wide, tall = np.zeros((1, 1, 2, 1)), np.zeros((1, 1, 4, 1))
    for causal, expected in (
        (True, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ("bottom_right", [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ("top_left", [[1, 0, 0, 0], [1, 1, 0, 0]]),
    ):
        weights = reference.attention(wide, tall, tall, causal=causal).weights[0, 0]
        np.testing.assert_array_equal(weights > 0, expected)
    weights = reference.attention(tall, wide, wide, causal=True).weights[0, 0]
    np.testing.assert_array_equal(weights > 0, [[0, 0], [0, 0], [1, 0], [1, 1]])


def test_query_offset_moves_the_diagonal_of_each_batch() -> None:
    query, key = np.zeros((2, 1, 2, 1)), np.zeros((2, 1, 4, 1))
    weights = reference.attention(query, key, key, causal="top_left", query_offset=[-1, 3]).weights
    np.testing.assert_array_equal(weights[0, 0] > 0, [[0, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(weights[1, 0] > 0, [[1, 1, 1, 1], [1, 1, 1, 1]])


def test_windows() -> None:
    band = np.tril(np.triu(np.ones((6, 6), bool), -2), 1)
    np.testing.assert_array_equal(square(6, window=(2, 1)), band)
    np.testing.assert_array_equal(square(6, window=(2, None)), np.triu(np.ones((6, 6), bool), -2))
    np.testing.assert_array_equal(square(6, window=(None, 1)), np.tril(np.ones((6, 6), bool), 1))
    np.testing.assert_array_equal(square(6, window=(2, 1), causal=True), np.tril(band))
    np.testing.assert_array_equal(square(6, window=(0, 0)), np.eye(6, dtype=bool))
    assert square(6, window=(None, None)).all()
    assert square(6, window=(2**70, 2**70)).all()


def test_lengths_cut_keys_and_move_no_diagonal() -> None:
    query = np.zeros((2, 1, 3, 1))
    weights = reference.attention(query, query, query, causal=True, kv_lengths=[3, 1]).weights
    np.testing.assert_array_equal(weights[0, 0] > 0, [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(weights[1, 0] > 0, [[1, 0, 0], [1, 0, 0], [1, 0, 0]])


@pytest.mark.parametrize("sink", [None, 0.5])
def test_a_row_that_may_attend_to_nothing(sink: float | None) -> None:
    masked = row(SCORES, [1, 2, 3], mask=np.zeros(3, bool), sinks=sink if sink is None else [sink])
    assert masked.out == 0 and (masked.weights == 0).all()
    assert masked.lse == (-np.inf if sink is None else sink)


def test_minus_infinity_in_the_bias_masks() -> None:
    result = row(SCORES, [6, np.nan, 18], bias=np.array([0, -np.inf, 0]))
    np.testing.assert_allclose(result.weights, [[1 / 4, 0, 3 / 4]], rtol=1e-15)
    np.testing.assert_allclose(result.out, [[15]], rtol=1e-15)


def test_the_lowest_finite_bias_is_a_value() -> None:
    """A row of finfo.min gives the mean of the values, as with any other constant."""
    lowest = np.finfo(np.float32).min
    query, value = np.zeros((1, 1, 2, 4), np.float32), np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    result = reference.attention(query, np.zeros_like(value), value, bias=np.full((2, 3), lowest))
    np.testing.assert_allclose(result.out[0, 0], [value[0, 0].mean(axis=0)] * 2)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_what_is_masked_changes_nothing(poison: float, rng: np.random.Generator) -> None:
    query, key, value = rng.standard_normal((3, 1, 2, 6, 4))
    clean = reference.attention(query, key, value, kv_lengths=[5])
    key[..., 5, :] = value[..., 5, :] = poison
    for part, expected in zip(
        reference.attention(query, key, value, kv_lengths=[5]),
        clean,
        strict=True,
    ):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_a_nan_reaches_exactly_the_rows_that_attend_to_it(poisoned: str, rng: np.random.Generator) -> None:
    query, key, value = rng.standard_normal((3, 1, 1, 6, 4))
    clean = reference.attention(query, key, value, causal=True).out
    {"key": key, "value": value}[poisoned][0, 0, 3, 0] = np.nan
    out = reference.attention(query, key, value, causal=True).out
    np.testing.assert_array_equal(out[0, 0, :3], clean[0, 0, :3])
    assert np.isnan(out[0, 0, 3:]).any(axis=1).all()


def test_a_nan_query_reaches_its_row_only(rng: np.random.Generator) -> None:
    query, key, value = rng.standard_normal((3, 1, 1, 6, 4))
    query[0, 0, 2, 1] = np.nan
    assert np.isnan(reference.attention(query, key, value).out).all(axis=3).tolist() == [
        [[i == 2 for i in range(6)]]
    ]


def test_group_of_heads_shares_a_key_head(rng: np.random.Generator) -> None:
    query, key, value = rng.standard_normal((2, 6, 3, 4)), *rng.standard_normal((2, 2, 2, 5, 4))
    grouped = reference.attention(query, key, value)
    repeated = reference.attention(query, key.repeat(3, axis=1), value.repeat(3, axis=1))
    np.testing.assert_array_equal(grouped.out, repeated.out)


TORCH_CASES = [case for case in shapes.SMALL if not case.arrays and case.window is None and not case.softcap]


@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_agrees_with_torch(case: shapes.Case) -> None:
    """torch's own definition in float64, without rows that may attend to nothing (it says NaN or 0 there)."""
    query, key, value = case.tensors("float64", "torch")
    out = reference.attention(query, key, value, causal=case.causal).out
    ones = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    diagonal = 0 if case.causal == "top_left" else case.seqlen_k - case.seqlen_q
    visible = ones.tril(diagonal) if case.causal else ones
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, enable_gqa=case.query_heads != case.kv_heads
    )
    rows = visible.any(dim=1).numpy()
    np.testing.assert_allclose(out[:, :, rows], expected.numpy()[:, :, rows], atol=1e-13)
    assert (out[:, :, ~rows] == 0).all()


def test_agrees_with_torch_on_masks_and_biases() -> None:
    for name in ("mask", "bias"):
        case = next(case for case in shapes.OPTIONS if case.arrays == (name,))
        query, key, value = case.tensors("float64", "torch")
        argument = case.options("float64", "torch")[name]
        result = reference.attention(query, key, value, **{name: argument})
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=argument, enable_gqa=True
        ).numpy()
        rows = result.lse > -np.inf
        np.testing.assert_allclose(result.out[rows], expected[rows], atol=1e-13)


@pytest.mark.parametrize("library", shapes.LIBRARIES)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_the_backend_rounds_once(dtype: str, library: str) -> None:
    """To nearest, as NumPy and ml_dtypes round the oracle's float64."""
    case = next(case for case in shapes.OPTIONS if case.name == "everything")
    tensors, options = case.tensors(dtype, library), case.options(dtype, library)
    returned = fa.attention(*tensors, **options, return_lse=True, return_weights=True, backend="reference")
    exact = reference.attention(*tensors, **options)
    lse_dtype = "float64" if dtype == "float64" else "float32"
    for got, want, own in zip(returned, exact, (dtype, lse_dtype, dtype), strict=True):
        assert str(got.dtype).removeprefix("torch.") == own
        values = got.double().numpy() if library == "torch" else got.astype(np.float64)
        np.testing.assert_array_equal(values, shapes.convert(want, own).astype(np.float64))


def test_bfloat16_special_values() -> None:
    bits = np.array([0x3F80, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x7F7F], np.uint16)
    value = bits.view(ml_dtypes.bfloat16).reshape(1, 1, 1, -1)
    one = np.ones((1, 1, 1, 1), ml_dtypes.bfloat16)
    out = fa.attention(one, one, value, backend="reference")
    assert out.view(np.uint16).tolist() == value.view(np.uint16).tolist()


def test_runs_every_small_case() -> None:
    for case in shapes.SMALL:
        result = reference.attention(*case.tensors(), **case.options())
        assert result.out.shape == (*case.scores_shape[:3], case.value_dim)
        assert not np.isnan(result.out).any()
        empty = np.isneginf(result.lse) if "sinks" not in case.arrays else np.zeros(result.lse.shape, bool)
        assert (result.out[empty] == 0).all()
        if "sinks" not in case.arrays:
            np.testing.assert_allclose(result.weights.sum(axis=3)[~empty], 1)
