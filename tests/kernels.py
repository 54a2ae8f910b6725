"""The kernels of this machine: every tier, with the dtypes that it computes in a way of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn import _core
from shapes import DTYPES


@contextmanager
def forced(isa: str) -> Iterator[None]:
    """The tier in force."""
    _core.select_isa(isa)
    try:
        yield
    finally:
        _core.select_isa(None)


@dataclass(frozen=True)
class Kernel:
    isa: str
    dtype: str
    path: str

    @property
    def rounds_probabilities(self) -> bool:
        """Whether the second product takes bfloat16 probabilities."""
        return self.dtype == "bfloat16" and self.isa.endswith("_bf16")

    @property
    def splits_probabilities(self) -> bool:
        """Whether the second product takes them as sums of two float16 numbers, which hold them to 2^-22."""
        return self.dtype == "float16" and self.isa == "amx_fp16"

    @contextmanager
    def forced(self) -> Iterator[Kernel]:
        with forced(self.isa):
            yield self

    def __str__(self) -> str:
        return f"{self.isa}-{self.dtype}"


def find_kernels() -> tuple[Kernel, ...]:
    """A tier that leaves a dtype to a weaker one has the weaker one's path, and is not listed again."""
    found: dict[tuple[str, str], Kernel] = {}
    for isa in _core.available_isas():
        with forced(isa):
            for dtype in DTYPES:
                path = _core.describe_path(_core.DTYPE_CODES[dtype], 1)
                found.setdefault((dtype, path), Kernel(isa, dtype, path))
    return tuple(found.values())


KERNELS = find_kernels()
# Caches of 8-bit numbers are read by a way of its own on every tier.
CACHE_KERNELS = tuple(
    Kernel(isa, dtype, "")
    for isa in _core.available_isas()
    for dtype in DTYPES
    if dtype != "float64" or isa == "scalar"
)


def bits(array: Any) -> np.ndarray:
    """The bits of an array or tensor, so that NaN equals NaN and -0 is not 0."""
    if not isinstance(array, np.ndarray):
        import torch

        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[array.element_size()]
        array = array.contiguous().view(integer).numpy()
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Compare arrays, or tuples of them, bit by bit."""
    if isinstance(actual, tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)
        return
    np.testing.assert_array_equal(bits(actual), bits(expected))
