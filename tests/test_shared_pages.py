"""Sequences that begin in the same pages: what is read once for all of them gives the bits of each alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa
from kernels import Kernel, assert_same_bits

HEADS, KV_HEADS, DIM = 6, 2, 40
LENGTHS = (
    2500,
    2513,
    2100,
    2700,
    900,
    2600,
    2500,
    2500,
    2500,
    2500,
    2500,
    2500,
)  # of many, one list is too short


def pools(page_size: int, dtype: str, rng: np.random.Generator) -> tuple[Any, ...]:
    """Caches, a table of pages for each sequence alone, and one that shares what is equal."""
    slots = -(-max(LENGTHS) // page_size)
    shape = (len(LENGTHS) * slots, page_size, KV_HEADS, DIM)
    key, value = (rng.standard_normal(shape).astype(getattr(ml_dtypes, dtype, dtype)) for _ in range(2))
    alone = np.arange(shape[0], dtype=np.int32).reshape(len(LENGTHS), slots)
    shared = alone.copy()
    for sequence in range(1, len(LENGTHS)):
        first = sequence % 2  # two families; the second parts from the first after 1100 keys
        pages = (2300 if sequence != 5 else 1100) // page_size
        if sequence == first:
            pages = 1100 // page_size
            first = 0
        for cache in (key, value):
            cache[alone[sequence, :pages]] = cache[shared[first, :pages]]
        shared[sequence, :pages] = shared[first, :pages]
    return key, value, alone, shared


@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize(
    "page_size, rules", [(7, {"window": (2450, 0)}), (16, {"alibi_slopes": np.geomspace(0.1, 1e-4, HEADS)})]
)
def test_bits_are_those_of_pages_of_their_own(
    kernel: Kernel, page_size: int, rules: dict[str, Any], queries: int, rng: np.random.Generator
) -> None:
    if kernel.isa == "scalar" and queries > 1:
        pytest.skip("plain loops share nothing, and take long")
    key, value, alone, shared = pools(page_size, kernel.dtype, rng)
    query = rng.standard_normal((len(LENGTHS), queries, HEADS, DIM)).astype(key.dtype)
    options: dict[str, Any] = {"cache_seqlens": np.array(LENGTHS), "return_lse": True, **rules}
    expected = fa.attention_with_kvcache(query, key, value, block_table=alone, **options)
    actual = fa.attention_with_kvcache(query, key, value, block_table=shared, **options)
    assert_same_bits(actual, expected)
