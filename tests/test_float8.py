"""Numbers of 8 bits: what each code stands for, and which is nearest, in NumPy and in the kernel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa
from caches import LARGEST, cost
from fastattn import _core
from fastattn.codes import FLOAT8, decode, encode
from kernels import forced

CODES = np.arange(256, dtype=np.uint8)


def numbers(dtype: str) -> np.ndarray:
    """Every finite number of the dtype, every middle between two, and the float32 neighbours of both."""
    if dtype == "int8":
        exact = np.arange(-127, 128).astype(np.float32)
    else:
        exact = CODES.view(getattr(ml_dtypes, dtype)).astype(np.float32)
        exact = np.unique(exact[np.isfinite(exact)])
    middles = (exact[1:] + exact[:-1]) / 2  # exact in float32
    points = np.concatenate([exact, middles])
    near = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.clip(np.concatenate([points, *near]), -LARGEST[dtype], LARGEST[dtype])


def nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "int8":
        return np.rint(values).astype(np.int8).view(np.uint8)
    return values.astype(getattr(ml_dtypes, dtype)).view(np.uint8)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_what_codes_stand_for(dtype: str) -> None:
    expected = CODES.view(getattr(ml_dtypes, dtype)).astype(np.float32)
    np.testing.assert_array_equal(decode(CODES, dtype), expected)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_the_nearest_code(dtype: str) -> None:
    values = numbers(dtype)
    np.testing.assert_array_equal(encode(values, dtype), nearest(values, dtype))
    beyond = np.array([1e6, -1e6, np.inf, -np.inf])
    np.testing.assert_array_equal(decode(encode(beyond, dtype), dtype), np.sign(beyond) * LARGEST[dtype])
    assert np.isnan(decode(encode(np.array([np.nan]), dtype), dtype)).all()


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("power", [0, -40, 60])
def test_the_codes_that_an_append_writes(dtype: str, power: int) -> None:
    """Rows whose largest magnitude is the largest code's: the scale is 1, or a power of 2."""
    values = numbers(dtype)
    rows = np.zeros((-(-values.size // 15), 16), np.float32)
    rows[:, 0] = LARGEST[dtype]
    rows[:, 1:].flat[: values.size] = values
    kind = np.int8 if dtype == "int8" else getattr(ml_dtypes, dtype)
    caches = {f"{name}_cache": np.zeros((1, len(rows), 1, 16), kind) for name in ("key", "value")}
    scales = {f"{name}_scale": np.zeros((1, len(rows), 1), np.float32) for name in ("key", "value")}
    new = np.ldexp(rows, power).reshape(1, -1, 1, 16)
    fa.attention_with_kvcache(new[:, :1], **caches, **scales, new_key=new, new_value=new)
    for name in "key", "value":
        assert (scales[f"{name}_scale"] == 2.0**power).all()
        written = caches[f"{name}_cache"].view(np.uint8).reshape(rows.shape)
        np.testing.assert_array_equal(written, nearest(rows, dtype))


@pytest.mark.parametrize("dtype", LARGEST)
def test_rows_at_the_ends(dtype: str) -> None:
    """Zeros have a scale of 0; the smallest numbers are lost, and nothing overflows."""
    kind = np.int8 if dtype == "int8" else getattr(ml_dtypes, dtype)
    rows = np.array([0.0, 1e-45, 1e-33, 3e38], np.float32)[:, None] * np.ones(4, np.float32)
    new = rows.reshape(1, 4, 1, 4)
    caches = [np.full((1, 4, 1, 4), 7, kind) for _ in range(2)]
    scales = [np.ones((1, 4, 1), np.float32) for _ in range(2)]
    fa.attention_with_kvcache(
        *(np.zeros((1, 1, 1, 4), np.float32), *caches),
        **{"key_scale": scales[0], "value_scale": scales[1], "new_key": new, "new_value": new},
    )
    held = caches[1].astype(np.float64) * scales[1][..., None]
    assert (held[0, :2] == 0).all() and (scales[1][0, :2] == 0).all()
    np.testing.assert_allclose(held[0, 2:], new[0, 2:], rtol=2e-3)


@pytest.mark.parametrize(
    "dtype, outliers, bound",
    [
        ("int8", 1, 0.02),
        ("int8", 10, 0.08),
        ("float8_e4m3fn", 1, 0.08),
        ("float8_e4m3fn", 10, 0.08),
        ("float8_e5m2", 1, 0.15),
        ("float8_e5m2", 10, 0.15),
    ],
)
def test_what_a_quantised_cache_costs(dtype: str, outliers: int, bound: float) -> None:
    """The table of docs/quantised-caches.md, bounded; an error far below would be that of another format."""
    relative, _ = cost(dtype, 64, outliers)
    assert bound / 8 < relative < bound


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("columns", [256, 87])
@pytest.mark.parametrize("query_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("isa", _core.available_isas())
def test_the_codes_that_a_call_reads(isa: str, query_dtype: str, columns: int, dtype: str) -> None:
    """Each sequence has one key, whose score is one code, and whose values are all there are, by turns."""
    kind = np.int8 if dtype == "int8" else getattr(ml_dtypes, dtype)
    wide = getattr(ml_dtypes, query_dtype) if query_dtype == "bfloat16" else np.dtype(query_dtype)
    sequences = np.arange(256)
    keys = np.zeros((256, 1, 1, columns), np.uint8)
    query = np.zeros((256, 1, 1, columns), wide)
    keys[sequences, 0, 0, sequences % columns] = CODES
    query[sequences, 0, 0, sequences % columns] = 1
    values = np.resize(CODES, keys.shape)
    ones = np.ones((256, 1, 1), np.float32)
    options = {"key_scale": ones, "value_scale": ones, "scale": 1.0, "return_lse": True}
    with forced(isa):
        out, lse = fa.attention_with_kvcache(query, keys.view(kind), values.view(kind), **options)
    scores, seen = (codes.view(kind).astype(np.float32) for codes in (CODES, values))
    finite = np.isfinite(scores)
    # Far less than from one code to the next: a logarithm was taken.
    np.testing.assert_allclose(lse.ravel()[finite], scores[finite], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(out[finite].astype(np.float32), seen[finite], rtol=3e-7)


@pytest.mark.parametrize("query_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("seqlen", [1, 9, 40])
@pytest.mark.parametrize("scale", [0.25, 3.4e38])
def test_values_that_are_added_alone(
    isa: str, dtype: str, query_dtype: str, seqlen: int, scale: float
) -> None:
    """Rows that hold NaN, and rows whose scale is too large for a probability."""
    kind, wide = getattr(ml_dtypes, dtype), np.dtype(getattr(ml_dtypes, query_dtype, query_dtype))
    smallest = ml_dtypes.finfo(kind).smallest_subnormal
    keys = np.zeros((1, seqlen, 1, 32), kind)
    values = np.full_like(keys, 1 if scale < 1 else smallest)
    values[0, -1, 0, 5] = np.nan
    values[0, :, 0, 7] = 0
    scales = np.full((1, seqlen, 1), scale, np.float32)
    query = np.zeros((1, 1, 1, 32), wide)
    with forced(isa):
        out = fa.attention_with_kvcache(query, keys, values, key_scale=scales * 0, value_scale=scales)
    expected = values[0].astype(np.float64)[:, 0].mean(0) * np.float64(scales[0, 0, 0])
    np.testing.assert_allclose(
        out.ravel().astype(np.float64), expected, rtol=1e-5 if wide.itemsize == 4 else 4e-3
    )
