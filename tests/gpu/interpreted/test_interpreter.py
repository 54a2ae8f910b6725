"""The interpreter itself, once mended: what kernels do with numbers is what a GPU does with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Halfway between neighbours of bfloat16 and float16, next to that, the ends of the range, and no numbers.
HARD = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-9]
HARD += [0.0, -0.0, 65504.0, 65519.0, 65520.0, 3.3961e38, -3.4e38, 2.0**-24, 2.0**-25, 1e-40, 2.0**-133]
HARD += [np.inf, -np.inf, np.nan]


@triton.jit
def convert(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    left, right = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    tl.store(c + m * N + n, tl.dot(left, right, input_precision="ieee"))


@triton.jit
def arithmetic(a, b, results, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(results + at, x + y)
    tl.store(results + BLOCK + at, x - y)
    tl.store(results + 2 * BLOCK + at, x * y)
    tl.store(results + 3 * BLOCK + at, tl.where(x > y, x, -y))


@triton.jit
def extremes(a, b, results, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(results + at, tl.maximum(x, y))
    tl.store(results + BLOCK + at, tl.minimum(x, y))


@triton.jit
def reduce(source, results, BLOCK: tl.constexpr):
    x = tl.load(source + tl.arange(0, BLOCK))
    tl.store(results, tl.max(x, 0))
    tl.store(results + 1, tl.sum(x.to(tl.float32), 0))


@triton.jit
def count(bounds, result):
    total = 0
    for i in range(tl.load(bounds), tl.load(bounds + 1), 3):
        total += i
    tl.store(result, total)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit, but that any NaN is NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_conversions_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    numbers = torch.cat([torch.tensor(HARD), normal(1024 - len(HARD), dtype=torch.float32)]).to(source)
    converted = torch.empty(1024, dtype=target)
    convert[(1,)](numbers, converted, 1024)
    assert_same(converted, numbers.to(target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_summed_in_float32(dtype: torch.dtype) -> None:
    a, b = normal(16, 64, dtype=dtype), normal(64, 32, dtype=dtype, seed=1)
    c = torch.empty(16, 32)
    product[(1,)](a, b, c, 16, 32, 64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arithmetic_is_rounded_once(dtype: torch.dtype) -> None:
    a, b = normal(256, dtype=dtype), normal(256, dtype=dtype, seed=1)
    results = torch.empty(4, 256, dtype=dtype)
    arithmetic[(1,)](a, b, results, 256)
    for result, expected in zip(results, (a + b, a - b, a * b, torch.where(a > b, a, -b)), strict=True):
        assert_same(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_leave_nan_out(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, torch.nan, -torch.inf, torch.nan], dtype=dtype)
    b = torch.tensor([2.0, 3.0, torch.nan, torch.nan], dtype=dtype)
    results = torch.empty(2, 4, dtype=dtype)
    extremes[(1,)](a, b, results, 4)
    assert_same(results, torch.stack([torch.fmax(a, b), torch.fmin(a, b)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(dtype: torch.dtype) -> None:
    x = normal(128, dtype=dtype)
    results = torch.empty(2)
    reduce[(1,)](x, results, 128)
    assert results[0] == x.float().max()
    torch.testing.assert_close(results[1], x.float().sum(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bounds", [(0, 10), (4, 4), (7, 3), (-5, 20)], ids=str)
def test_bounds_of_loops_may_be_loaded(bounds: tuple[int, int]) -> None:
    result: Any = torch.empty((), dtype=torch.int64)
    count[(1,)](torch.tensor(bounds), result)
    assert result == sum(range(*bounds, 3))
