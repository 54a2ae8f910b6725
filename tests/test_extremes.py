"""Finite inputs at the ends of their range: sizes, scores, positions and caps."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn as fa
from kernels import Kernel
from shapes import convert

FAR_SCORES = [1e8, -1.5e8, 3e9, -1e10, 1e20]


def normal(*shape: int, dtype: str, seed: int = 0) -> np.ndarray:
    return convert(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("level", FAR_SCORES)
@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_equal_scores_far_from_zero_give_the_mean(kernel: Kernel, level: float, seqlen_q: int) -> None:
    """What is subtracted must meet the score exactly, rounded or not."""
    value = normal(1, 1, 40, 16, dtype=kernel.dtype)
    ones = np.ones((1, 1, 40, 1), value.dtype)
    out = fa.attention(ones[:, :, :seqlen_q], ones, value, scale=level)
    mean = value.astype(np.float64).mean(axis=2, keepdims=True)
    tolerance = 2.0**-8 if "16" in kernel.dtype else 1e-6
    np.testing.assert_allclose(out.astype(np.float64), np.broadcast_to(mean, out.shape), atol=tolerance)


@pytest.mark.parametrize("level", [1.5e8, -2e8, 1e30, -3e38])
def test_a_constant_bias_far_from_zero_gives_the_mean(kernel: Kernel, level: float) -> None:
    value = normal(1, 1, 40, 16, dtype=kernel.dtype)
    query = np.zeros((1, 1, 12, 8), value.dtype)
    key = np.zeros((1, 1, 40, 8), value.dtype)
    out = fa.attention(query, key, value, bias=np.full((1, 40), level, np.float32))
    mean = value.astype(np.float64).mean(axis=2, keepdims=True)
    tolerance = 2.0**-8 if "16" in kernel.dtype else 1e-6
    np.testing.assert_allclose(out.astype(np.float64), np.broadcast_to(mean, out.shape), atol=tolerance)


@pytest.mark.parametrize("offset", [10_000, 10_000_000, -10_000_000])
@pytest.mark.parametrize("seqlen_q", [3, 20])
def test_alibi_far_from_the_keys(kernel: Kernel, offset: int, seqlen_q: int) -> None:
    """Only distances among the keys matter to the result, however far the query stands."""
    query, key, value = (normal(1, 2, 64, 16, dtype=kernel.dtype, seed=seed) for seed in range(3))
    query = query[:, :, :seqlen_q]
    slopes = np.array([0.5, 0.03], np.float32)
    options = {"alibi_slopes": slopes, "query_offset": offset, "return_lse": True}
    out, lse = fa.attention(query, key, value, **options)
    wide = [x.astype(np.float64) for x in (query, key, value)]
    expected, expected_lse = fa.attention(*wide, **options, backend="reference")
    tolerance = 3e-2 if "16" in kernel.dtype else 3e-6
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-4 if kernel.rounds_probabilities else 1e-6)


@pytest.mark.parametrize("seqlen_q", [3, 20])
def test_a_slope_past_the_range_leaves_the_nearest_key(kernel: Kernel, seqlen_q: int) -> None:
    query, key, value = (normal(1, 1, 24, 16, dtype=kernel.dtype, seed=seed) for seed in range(3))
    out = fa.attention(query[:, :, :seqlen_q], key, value, alibi_slopes=[1e39])
    np.testing.assert_array_equal(out, value[:, :, -seqlen_q:])


@pytest.mark.parametrize("seqlen_q", [3, 20])
def test_a_softcap_past_the_range_caps_nothing(kernel: Kernel, seqlen_q: int) -> None:
    query, key, value = (normal(1, 1, 24, 16, dtype=kernel.dtype, seed=seed) for seed in range(3))
    query = query[:, :, :seqlen_q]
    capped = fa.attention(query, key, value, softcap=1e300 if kernel.dtype == "float64" else 1e39)
    plain = fa.attention(query, key, value)
    tolerance = 2e-2 if "16" in kernel.dtype else 1e-6
    np.testing.assert_allclose(capped.astype(np.float64), plain.astype(np.float64), atol=tolerance)


def test_more_keys_than_64_bits_count_bytes_of() -> None:
    one = np.ones((1, 1, 1, 1), np.float16)
    key = np.broadcast_to(one, (1, 1, 2**61, 1))
    with pytest.raises(ValueError, match="more elements than"):
        fa.attention(np.broadcast_to(one, (1, 1, 33, 1)), key, key, backend="cpu")
