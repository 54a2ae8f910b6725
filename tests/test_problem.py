"""Validation: what a right call becomes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fastattn as fa
import shapes
from fastattn.problem import UNBOUNDED, AttentionProblem
from fastattn.vectors import MAX_OFFSET

QUERY = np.zeros((2, 4, 5, 8), np.float32)
KEY = np.zeros((2, 2, 7, 8), np.float32)
VALUE = np.zeros((2, 2, 7, 6), np.float32)


def problem(**changes: Any) -> AttentionProblem:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | changes
    return AttentionProblem.from_arguments(
        arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments
    )


def test_defaults() -> None:
    plain = problem()
    assert plain.scores_shape == (2, 4, 5, 7)
    assert plain.out_shape == (2, 4, 5, 6)
    assert plain.scale == 1 / math.sqrt(8)
    assert plain.softcap == 0
    assert plain.query_offset == 2
    assert (plain.window_left, plain.window_right) == (UNBOUNDED, UNBOUNDED)
    for name in ("mask", "bias", "kv_lengths", "alibi_slopes", "sinks"):
        assert getattr(plain, name) is None


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        problem().scale = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"causal": True}, (2, UNBOUNDED, 0)),
        ({"causal": np.True_}, (2, UNBOUNDED, 0)),
        ({"causal": "bottom_right"}, (2, UNBOUNDED, 0)),
        ({"causal": "top_left"}, (0, UNBOUNDED, 0)),
        ({"causal": "top_left", "query_offset": 3}, (3, UNBOUNDED, 0)),
        ({"query_offset": np.int32(-3)}, (-3, UNBOUNDED, UNBOUNDED)),
        ({"window": (3, None)}, (2, 3, UNBOUNDED)),
        ({"window": [None, np.int64(4)]}, (2, UNBOUNDED, 4)),
        ({"window": (3, 4), "causal": True}, (2, 3, 0)),
        ({"window": (2**63, 2**100)}, (2, UNBOUNDED, UNBOUNDED)),
        ({"kv_lengths": [1, 2], "causal": True}, (2, UNBOUNDED, 0)),
    ],
)
def test_diagonal_and_window(options: dict[str, Any], expected: tuple[int, int, int]) -> None:
    made = problem(**options)
    assert (made.query_offset, made.window_left, made.window_right) == expected


def test_the_largest_positions_fit_int64() -> None:
    assert MAX_OFFSET + (2**48) + UNBOUNDED < 2**63


@pytest.mark.parametrize("library", shapes.LIBRARIES)
def test_layouts_give_one_problem(library: str) -> None:
    arrays = [shapes.convert(array, "float32", library) for array in (QUERY, KEY, VALUE)]
    bhsd = AttentionProblem.from_arguments(*arrays)
    swapped = [array.swapaxes(1, 2) for array in arrays]
    bshd = AttentionProblem.from_arguments(*swapped, layout="bshd")
    for one, other in zip(
        (bhsd.query, bhsd.key, bhsd.value), (bshd.query, bshd.key, bshd.value), strict=True
    ):
        assert one[1:] == other[1:]


@pytest.mark.parametrize("library", shapes.LIBRARIES)
@pytest.mark.parametrize(
    "shape, strides",
    [
        ((), (0, 0, 0, 0)),
        ((7,), (0, 0, 0, 1)),
        ((5, 1), (0, 0, 1, 0)),
        ((4, 1, 7), (0, 7, 0, 1)),
        ((2, 1, 1, 7), (7, 0, 0, 1)),
        ((2, 4, 5, 7), (140, 35, 7, 1)),
    ],
)
def test_mask_and_bias_broadcast_without_a_copy(
    library: str, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    tensors = [shapes.convert(array, "float32", library) for array in (QUERY, KEY, VALUE)]
    mask = shapes.convert(np.ones(shape), "bool", library)
    bias = shapes.convert(np.ones(shape), "float32", library)
    made = AttentionProblem.from_arguments(*tensors, mask=mask, bias=bias)
    for view, array in ((made.mask, mask), (made.bias, bias)):
        assert view is not None
        assert view.array is array
        assert view.shape == (2, 4, 5, 7)
        assert view.strides == strides


def test_bias_may_be_float32_beside_half_precision() -> None:
    half = [array.astype(np.float16) for array in (QUERY, KEY, VALUE)]
    for dtype in ("float16", "float32"):
        made = AttentionProblem.from_arguments(*half, bias=np.zeros((5, 7), dtype))
        assert made.bias is not None and made.bias.dtype == dtype


def test_negative_and_odd_strides_are_copied(rng: np.random.Generator) -> None:
    query, key, value = rng.standard_normal((3, 2, 2, 6, 4)).astype(np.float32)
    expected = fa.attention(query, key, value, backend="reference")
    records = np.zeros(key.shape, [("pad", "i2"), ("key", "f4")])  # 6 bytes apart: no whole number of floats
    records["key"] = key
    backwards = np.ascontiguousarray(value[:, :, ::-1])[:, :, ::-1]
    made = AttentionProblem.from_arguments(query, records["key"], backwards)
    assert made.key.strides == made.value.strides == (48, 24, 4, 1)
    np.testing.assert_array_equal(
        fa.attention(query, records["key"], backwards, backend="reference"), expected
    )


def test_expanded_views_stay_expanded() -> None:
    """2**40 elements that are one row: neither copied nor refused."""
    wide = np.broadcast_to(np.ones((1, 1, 1, 8), np.float32), (1, 1 << 20, 1 << 20, 8))
    made = AttentionProblem.from_arguments(np.ones((1, 1 << 20, 1, 8), np.float32), wide, wide)
    assert made.key.strides == (0, 0, 0, 1)
    backwards = AttentionProblem.from_arguments(
        np.ones((1, 1 << 20, 1, 8), np.float32), wide[..., ::-1], wide
    )
    assert backwards.key.strides == (0, 0, 0, 1)


@pytest.mark.parametrize("library", shapes.LIBRARIES)
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
def test_lengths_and_offsets_of_any_integer_dtype(dtype: str, library: str) -> None:
    tensors = [shapes.convert(array, "float32", library) for array in (QUERY, KEY, VALUE)]
    lengths = shapes.convert(np.array([3, 7]), dtype, library)
    made = AttentionProblem.from_arguments(*tensors, kv_lengths=lengths, query_offset=lengths)
    lengths[0] = 100  # the problem keeps what it has checked
    for values in (made.kv_lengths, made.query_offset):
        assert isinstance(values, np.ndarray)
        assert values.dtype == np.int64
        assert values.tolist() == [3, 7]


@pytest.mark.parametrize("library", shapes.LIBRARIES)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_slopes_and_sinks_of_any_float_dtype(dtype: str, library: str) -> None:
    tensors = [shapes.convert(array, "float32", library) for array in (QUERY, KEY, VALUE)]
    values = shapes.convert(np.array([0.5, 1.0, 2.0, -4.0]), dtype, library)
    made = AttentionProblem.from_arguments(*tensors, alibi_slopes=values, sinks=values)
    assert made.sinks is not None and made.alibi_slopes is not None
    assert made.sinks.tolist() == [0.5, 1.0, 2.0, -4.0]
    assert made.alibi_slopes.tolist() == [[0.5, 1.0, 2.0, -4.0]] * 2


def test_lists_will_do_for_short_arguments() -> None:
    made = problem(kv_lengths=[1, 2], query_offset=(0, 1), alibi_slopes=[[1, 2, 3, 4]] * 2, sinks=[0.0] * 4)
    assert made.kv_lengths is not None and made.alibi_slopes is not None
    assert made.kv_lengths.tolist() == [1, 2]
    assert made.alibi_slopes.shape == (2, 4)
    empty = np.zeros((0, 1, 1, 1), np.float32)
    assert AttentionProblem.from_arguments(empty, empty, empty, kv_lengths=[]).kv_lengths is not None


@pytest.mark.parametrize("scale", [2, np.float32(2), np.float64(2), np.int32(2)])
def test_scale_may_be_any_real_number(scale: Any) -> None:
    made = problem(scale=scale, softcap=scale)
    assert type(made.scale) is type(made.softcap) is float
    assert made.scale == made.softcap == 2


def test_torch_strides_and_offsets_are_kept() -> None:
    packed = torch.zeros(2, 5, 3, 4, 8)
    query, key, value = packed.unbind(2)
    made = AttentionProblem.from_arguments(query, key, value, layout="bshd")
    assert made.key.shape == (2, 4, 5, 8)
    assert made.key.strides == (480, 8, 96, 1)
    assert made.key.address == packed.data_ptr() + 4 * 4 * 8
    assert made.key.array is key


def test_the_kernels_agree_on_unbounded() -> None:
    from fastattn import _core

    assert _core.UNBOUNDED == UNBOUNDED
