"""The 8-bit numbers of quantised caches: what rows become, and float8 in NumPy, by tables of its numbers."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
# The largest magnitude that a code stands for: what a row's largest is scaled to.
LARGEST_CODE = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
QUANTISED = tuple(LARGEST_CODE)


def quantised(functions: Any, rows: Any, dtype: str) -> tuple[Any, Any]:
    """Float32 `rows` over their scales, not yet of `dtype`, and the scales; `functions` is NumPy or torch.

    A row that is not finite has a scale of NaN.
    """
    largest, magnitude = LARGEST_CODE[dtype], functions.amax(functions.abs(rows), -1)
    scale = functions.where(functions.isfinite(magnitude), magnitude / largest, math.nan)
    usable = (scale > 0)[..., None]
    codes = functions.where(usable, rows / functions.where(usable, scale[..., None], 1), 0)
    if dtype == "int8":
        codes = functions.round(codes)
    return functions.clip(codes, -largest, largest), scale


def decode(codes: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The numbers that `codes` stand for."""
    numbers: NDArray[np.float32] = _numbers(dtype)[codes]
    return numbers


def encode(values: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """The codes nearest to `values`, ties to the even code; past the largest number it is the largest."""
    positive = _numbers(dtype)[:128].astype(np.float64)
    positive = positive[np.isfinite(positive)]
    magnitudes = np.minimum(np.abs(values).astype(np.float64), positive[-1])
    above = np.searchsorted(positive, magnitudes).clip(1, positive.size - 1)
    middles = (positive[above - 1] + positive[above]) / 2
    up = (magnitudes > middles) | ((magnitudes == middles) & (above % 2 == 0))
    codes = np.where(np.isnan(values), 0x7F, np.where(up, above, above - 1))
    return np.asarray(codes + 128 * np.signbit(values), np.uint8)


@cache
def _numbers(dtype: str) -> NDArray[np.float32]:
    """What each code stands for, in the order of the codes."""
    mantissa_bits, bias = (3, 7) if dtype == "float8_e4m3fn" else (2, 15)
    magnitude = np.arange(128)
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
    fraction = mantissa / 2.0**mantissa_bits + (exponent > 0)
    numbers = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    if dtype == "float8_e4m3fn":
        numbers[127] = np.nan  # no infinities
    else:
        numbers[124:] = np.inf, np.nan, np.nan, np.nan
    return np.concatenate([numbers, -numbers]).astype(np.float32)
