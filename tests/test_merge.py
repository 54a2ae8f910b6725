"""merge_states: attention over a union of keys from attention over its parts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import fastattn as fa
import shapes
from fastattn import reference

CASE = shapes.Case("merge", 9, 24, 16, 8, batch=2, query_heads=3)


def parts(
    *edges: int, dtype: str = "float64", library: str = "numpy", **options: Any
) -> list[tuple[Any, Any]]:
    """(out, lse) over the keys between each two edges."""
    query, key, value = CASE.tensors(dtype, library)
    return [
        fa.attention(
            query,
            key[:, :, a:b],
            value[:, :, a:b],
            return_lse=True,
            query_offset=-a,
            backend="reference",
            **options,
        )
        for a, b in itertools.pairwise(edges)
    ]


def test_by_hand() -> None:
    """Weights 1 and 3 of two rows that are 8 and 16."""
    one = np.ones((1, 1, 1, 1))
    out, lse = fa.merge_states(8 * one, np.log(1 * one[0]), 16 * one, np.log(3 * one[0]))
    np.testing.assert_allclose(out, 14 * one, rtol=1e-15)
    np.testing.assert_allclose(lse, np.log(4 * one[0]), rtol=1e-15)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("split", [0, 1, 5, 23, 24])
def test_any_split_gives_the_whole(split: int, causal: bool) -> None:
    [(out, lse)] = parts(0, 24, causal=causal)
    first, second = parts(0, split, 24, causal=causal)
    merged_out, merged_lse = fa.merge_states(*first, *second)
    np.testing.assert_allclose(merged_out, out, atol=1e-14)
    np.testing.assert_allclose(merged_lse, lse, atol=1e-14)


def test_parts_merge_in_any_order() -> None:
    a, b, c = parts(0, 7, 9, 24)
    left = fa.merge_states(*fa.merge_states(*a, *b), *c)
    right = fa.merge_states(*c, *fa.merge_states(*b, *a))
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)


@pytest.mark.parametrize("library", shapes.LIBRARIES)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_a_side_without_keys_leaves_the_other_unchanged(dtype: str, library: str) -> None:
    """Bit for bit, and whatever the empty side's output holds."""
    [(out, lse)] = parts(0, 24, dtype=dtype, library=library)
    nothing, minus_infinity = shapes.convert(np.full(out.shape, np.nan), dtype, library), lse - float("inf")
    for merged in (
        fa.merge_states(out, lse, nothing, minus_infinity),
        fa.merge_states(nothing, minus_infinity, out, lse),
    ):
        assert type(merged[0]) is type(out)
        assert merged[0].dtype == out.dtype and merged[1].dtype == lse.dtype
        assert (merged[0] == out).all() and (merged[1] == lse).all()
    merged_out, merged_lse = fa.merge_states(nothing, minus_infinity, nothing, minus_infinity)
    assert (merged_out == 0).all() and (merged_lse == minus_infinity).all()


def test_large_logits_do_not_overflow() -> None:
    one = np.ones((1, 1, 1, 1), np.float32)
    out, lse = fa.merge_states(one, 1e30 * one[0], 3 * one, 1e30 * one[0])
    assert out == 2 and lse == np.float32(1e30)


def test_one_part_carries_the_sinks() -> None:
    query, key, value = CASE.tensors("float64")
    sinks = [0.5, -np.inf, 3.0]
    first = fa.attention(
        query, key[:, :, :10], value[:, :, :10], sinks=sinks, return_lse=True, backend="reference"
    )
    second = fa.attention(query, key[:, :, 10:], value[:, :, 10:], return_lse=True, backend="reference")
    whole = reference.attention(query, key, value, sinks=sinks)
    for merged, expected in zip(fa.merge_states(*first, *second), (whole.out, whole.lse), strict=True):
        np.testing.assert_allclose(merged, expected, atol=1e-14)


def test_layout() -> None:
    first, second = parts(0, 10, 24)
    out, lse = fa.merge_states(*first, *second)
    swapped_out, same_lse = fa.merge_states(
        first[0].swapaxes(1, 2), first[1], second[0].swapaxes(1, 2), second[1], layout="bshd"
    )
    np.testing.assert_array_equal(swapped_out, out.swapaxes(1, 2))
    np.testing.assert_array_equal(same_lse, lse)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


WRONG: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "dtype": (
        TypeError,
        {"out_b": zeros(1, 2, 3, 4, dtype=float)},
        "must both be one of .*, got float32 and float64",
    ),
    "lse-dtype": (
        TypeError,
        {"lse_a": zeros(1, 2, 3, dtype=np.float16)},
        "must both be float32 or float64, got float16",
    ),
    "shape": (
        ValueError,
        {"out_b": zeros(1, 2, 3, 5)},
        "out_a and out_b must have the same 4 axes, got shapes",
    ),
    "lse-shape": (
        ValueError,
        {"lse_b": zeros(1, 3, 2)},
        r"must have shape \(batch, heads, length\) = \(1, 2, 3\)",
    ),
    "layout": (ValueError, {"layout": "hsd"}, "layout must be 'bhsd' or 'bshd', got 'hsd'"),
    "library": (
        TypeError,
        {"out_b": torch.zeros(1, 2, 3, 4)},
        "out_b must be a NumPy array like the first argument, got torch",
    ),
}


@pytest.mark.parametrize("error, changes, message", WRONG.values(), ids=WRONG)
def test_wrong_calls(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    arguments = {
        "out_a": zeros(1, 2, 3, 4),
        "lse_a": zeros(1, 2, 3),
        "out_b": zeros(1, 2, 3, 4),
        "lse_b": zeros(1, 2, 3),
    }
    with pytest.raises(error, match=message):
        fa.merge_states(**(arguments | changes))
