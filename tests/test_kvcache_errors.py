"""Every wrong call over caches is found out before anything is written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastattn as fa
from caches import as_torch

TABLE = np.array([[0, 2, 7], [1, 3, 4]])  # pages of 4 rows; sequences of 6 and 9 keys, and 2 new ones


def arguments(paged: bool = False, cache_dtype: str = "float32") -> dict[str, Any]:
    """A right call: query (2, 2, 4, 8), caches of 12 rows a sequence, (.., .., 2, 8) and (.., .., 2, 6)."""
    dtype = np.dtype(getattr(ml_dtypes, cache_dtype, cache_dtype))
    shape = (8, 4, 2) if paged else (2, 12, 2)
    given = {
        "query": np.ones((2, 2, 4, 8), np.float32),
        "key_cache": np.ones((*shape, 8), dtype),
        "value_cache": np.ones((*shape, 6), dtype),
        "new_key": np.full((2, 2, 2, 8), 2, np.float32),
        "new_value": np.full((2, 2, 2, 6), 2, np.float32),
        "cache_seqlens": np.array([6, 9]),
    }
    if paged:
        given["block_table"] = TABLE.copy()
    if cache_dtype != "float32":
        given |= {name: np.ones(shape, np.float32) for name in ("key_scale", "value_scale")}
    return given


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def read_only(*shape: int) -> np.ndarray:
    array = ones(*shape)
    array.flags.writeable = False
    return array


Changes = dict[str, Any]
TYPES: dict[str, tuple[Changes, str]] = {
    "list": ({"query": [1.0]}, "query must be a NumPy array or a torch tensor, got list"),
    "mixed": ({"new_key": torch.ones(2, 2, 2, 8)}, "new_key must be a NumPy array like the first argument"),
    "mixed-cache": ({"key_cache": torch.ones(2, 12, 2, 8)}, "key_cache must be a NumPy array like the first"),
    "query-int": ({"query": ones(2, 2, 4, 8, dtype=int)}, "query must be one of float64, .*, got int64"),
    "caches-differ": (
        {"key_cache": ones(2, 12, 2, 8, dtype=float)},
        "key_cache and value_cache must have one dtype, query's float32 or .*, got float64 and float32",
    ),
    "uint8": (
        {"key_cache": ones(2, 12, 2, 8, dtype=np.uint8), "value_cache": ones(2, 12, 2, 6, dtype=np.uint8)},
        "key_cache and value_cache must have one dtype, .*, got uint8 and uint8",
    ),
    "new-dtype": (
        {"new_key": ones(2, 2, 2, 8, dtype=float)},
        "new_key must have query's dtype float32, got float64",
    ),
    "seqlens-float": (
        {"cache_seqlens": np.array([1.0, 2.0])},
        "cache_seqlens must hold integers, got float64",
    ),
    "seqlens-bool": (
        {"cache_seqlens": True},
        "cache_seqlens must be an integer, or one for each sequence, got bool",
    ),
    "causal": ({"causal": "top_left"}, "causal must be a bool, got str"),
    "rolling": ({"rolling": 1}, "rolling must be a bool, got int"),
    "interleaved": ({"rotary_interleaved": None}, "rotary_interleaved must be a bool, got NoneType"),
    "lse": ({"return_lse": 1}, "return_lse must be a bool, got int"),
    "rotary-dtype": (
        {"rotary_cos": ones(20, 4, dtype=float), "rotary_sin": ones(20, 4, dtype=float)},
        "rotary_cos must be of query's dtype or float32, .*, got float64",
    ),
    "rotary-dtypes": (
        {"rotary_cos": ones(20, 4), "rotary_sin": ones(20, 4, dtype=np.float16)},
        "rotary_sin must be of query's dtype or float32, as the other is, got float16",
    ),
    "layout": ({"layout": None}, "layout must be 'bhsd' or 'bshd', got NoneType"),
    "out": ({"out": ones(2, 2, 4, 6, dtype=float)}, "out must have query's dtype float32, got float64"),
}
SHARED = ones(4, 12, 2, 8)
VALUES: dict[str, tuple[Changes, str]] = {
    "rank": (
        {"query": ones(2, 4, 8)},
        r"query must have 4 axes \(batch, length, heads, dim\), .*got \(2, 4, 8\)",
    ),
    "batch": (
        {"query": ones(3, 2, 4, 8)},
        r"query and key_cache must have one batch size, got 3 and 2 \(pages need a block_table\)",
    ),
    "lengths": (
        {"value_cache": ones(2, 11, 2, 6)},
        r"key_cache and value_cache must have the same shape .*, got \(2, 2, 12\) and \(2, 2, 11\)",
    ),
    "head-dim": (
        {"query": ones(2, 2, 4, 9)},
        "query and key_cache must have one head dimension, got 9 and 8",
    ),
    "heads": (
        {"query": ones(2, 2, 3, 8)},
        "query's heads must be a positive multiple of key_cache's heads, got 3 and 2",
    ),
    "layout": ({"layout": "bsd"}, "layout must be 'bhsd' or 'bshd', got 'bsd'"),
    "one-new": ({"new_value": None}, "new_key and new_value must be given together, got None for new_value"),
    "new-rows": (
        {"new_value": ones(2, 1, 2, 6)},
        r"new_value must have .* \(2, 2, 2, 6\), got \(2, 2, 1, 6\)",
    ),
    "new-heads": ({"new_key": ones(2, 2, 4, 8)}, r"new_key must have .* \(2, 2, 2, 8\), got \(2, 4, 2, 8\)"),
    "scale": ({"key_scale": ones(2, 12, 2)}, "key_scale must be None with caches of float32, got an array"),
    "negative": ({"cache_seqlens": [6, -1]}, "cache_seqlens must be from 0 to 10 .*, got -1 for sequence 1"),
    "full": (
        {"cache_seqlens": [11, 9]},
        "cache_seqlens must be from 0 to 10 in a cache of 12 rows, 2 of them new, got 11 for sequence 0",
    ),
    "no-room": (
        {"new_key": ones(2, 13, 2, 8), "new_value": ones(2, 13, 2, 6), "cache_seqlens": None},
        "new_key must have at most the 12 rows of a sequence's cache, got 13",
    ),
    "seqlens-shape": (
        {"cache_seqlens": np.array([6, 9, 1])},
        r"cache_seqlens must have shape \(2,\), got \(3,\)",
    ),
    "window": ({"window": (-1, 0)}, "window must hold integers from 0 up, or None"),
    "ring-window": (
        {"rolling": True},
        "window must bound how far back a query looks where rolling is True, got None",
    ),
    "ring-room": (
        {"rolling": True, "window": (11, 0)},
        "key_cache must have at least 13 rows where rolling is True: .*, got 12",
    ),
    "ring-new": (
        {"rolling": True, "window": (1, 0), "new_key": ones(2, 13, 2, 8), "new_value": ones(2, 13, 2, 6)},
        "key_cache must have at least 13 rows where rolling is True: .*, got 12",
    ),
    "one-table": (
        {"rotary_cos": ones(20, 4)},
        "rotary_cos and rotary_sin must be given together, got None for rotary_sin",
    ),
    "rotary-wide": (
        {"rotary_cos": ones(20, 5), "rotary_sin": ones(20, 5)},
        r"rotary_cos must have shape \(positions, rotary_dim / 2\), .* from 2 to 8, got \(20, 5\)",
    ),
    "rotary-short": (
        {"rotary_cos": ones(10, 4), "rotary_sin": ones(10, 4)},
        "rotary_cos has rows for the positions 0 to 9, got 9 to 10 for sequence 1",
    ),
    "rotary-before": (
        {"rotary_cos": ones(99, 4), "rotary_sin": ones(99, 4), "query": ones(2, 9, 4, 8)},
        "rotary_cos has rows for the positions 0 to 98, got -1 to 7 for sequence 0",
    ),
    "sinks": ({"sinks": [np.nan] * 4}, "sinks must be finite"),
    "slopes": ({"alibi_slopes": [1.0] * 3}, r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)"),
    "softcap": ({"softcap": -1.0}, "softcap must be at least 0"),
    "read-only": ({"key_cache": read_only(2, 12, 2, 8)}, "key_cache must be writable, got a read-only array"),
    "repeated": (
        {"value_cache": np.broadcast_to(ones(1, 12, 2, 6), (2, 12, 2, 6))},
        "value_cache must be writable|value_cache must not overlap itself",
    ),
    "shared": (
        {"key_cache": SHARED[1:3], "new_key": SHARED[1:3, :2]},
        "key_cache must not overlap new_key: they share memory",
    ),
    "out-shape": ({"out": ones(2, 2, 4, 8)}, r"out must have shape \(2, 2, 4, 6\), got \(2, 2, 4, 8\)"),
    "backend": ({"backend": "fast"}, "backend='fast' is unknown"),
}
PAGED: dict[str, tuple[Changes, str]] = {
    "negative": (
        {"block_table": np.array([[0, -1, 7], [1, 3, 4]])},
        "block_table must hold pages from 0 to 7 as far as they are used, got -1 for sequence 0, slot 1",
    ),
    "past": (
        {"block_table": np.array([[0, 2, 7], [1, 3, 8]])},
        "block_table must hold pages from 0 to 7 as far as they are used, got 8 for sequence 1, slot 2",
    ),
    "far": (
        {"block_table": np.array([[0, 2**40, 7], [1, 3, 4]])},
        "got 1099511627776 for sequence 0, slot 1",
    ),
    "one-place": (
        {"block_table": np.array([[0, 4, 7], [1, 3, 4]]), "cache_seqlens": [5, 9]},
        "block_table must give each new row a place of its own, got row 1 of page 4 for sequences 0 and 1",
    ),
    "floats": ({"block_table": TABLE.astype(float)}, "block_table must hold integers, got float64"),
    "shape": ({"block_table": TABLE[:1]}, r"block_table must have shape \(2, slots\), got \(1, 3\)"),
    "list": (
        {"block_table": TABLE.tolist()},
        "block_table must be a NumPy array like the first argument, got list",
    ),
    "full": ({"cache_seqlens": [11, 9]}, "cache_seqlens must be from 0 to 10 in a cache of 12 rows"),
    "ring": (
        {"rolling": True, "window": (12, 0)},
        "key_cache must have at least 14 rows where rolling is True",
    ),
}
QUANTISED: dict[str, tuple[Changes, str]] = {
    "none": ({"key_scale": None}, "key_scale must be given with caches of int8, got None"),
    "dtype": ({"value_scale": ones(2, 12, 2, dtype=float)}, "value_scale must be float32, got float64"),
    "shape": (
        {"value_scale": ones(2, 2, 12)},
        r"value_scale must have a number for each row .* got \(2, 12, 2\)",
    ),
    "rank": (
        {"key_scale": ones(2, 12)},
        r"key_scale must have 3 axes \(batch, length, heads\), .* got \(2, 12\)",
    ),
}


def refused(
    error: type[Exception], given: Changes, changes: Changes, message: str, library: str = "numpy"
) -> None:
    """The call raises, short way and long way alike, and writes nothing."""
    given = given | changes
    if library == "torch":
        given = {name: as_torch(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    written = [
        given[name] for name in ("key_cache", "value_cache", "key_scale", "value_scale") if name in given
    ]
    before = [np.array(x) if isinstance(x, np.ndarray) else x for x in written]
    for options in {}, {"backend": "cpu"}, {"backend": "reference"}:
        if "backend" in changes and options:
            continue
        with pytest.raises(error, match=message):
            fa.attention_with_kvcache(**(given | options))
        for array, old in zip(written, before, strict=True):
            np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_the_right_call_is_right(paged: bool, cache_dtype: str) -> None:
    given = arguments(paged, cache_dtype)
    assert fa.attention_with_kvcache(**given, backend="reference").shape == (2, 2, 4, 6)


@pytest.mark.parametrize("name", TYPES)
def test_types(name: str) -> None:
    refused(TypeError, arguments(), *TYPES[name])


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    refused(ValueError, arguments(), *VALUES[name])


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", PAGED)
def test_pages(name: str, library: str) -> None:
    changes, message = PAGED[name]
    message = message if library == "numpy" else message.replace("a NumPy array", "a torch tensor")
    error = TypeError if name in ("floats", "list") else ValueError
    refused(error, arguments(paged=True), changes, message, library)


@pytest.mark.parametrize("name", QUANTISED)
def test_scales(name: str) -> None:
    error = TypeError if name == "dtype" else ValueError
    refused(error, arguments(cache_dtype="int8"), *QUANTISED[name])


def test_out_may_share_no_memory() -> None:
    for name in ("query", "key_cache", "new_value"):
        given = arguments()
        given["value_cache"], given["new_value"] = ones(2, 12, 2, 8), ones(2, 2, 2, 8)
        both = ones(2, 14, 4, 8)
        view = both[:, : given[name].shape[1], : given[name].shape[2]]
        with pytest.raises(ValueError, match=f"out must not overlap {name.removesuffix('_cache')}"):
            fa.attention_with_kvcache(**(given | {name: view, "out": both[:, :2]}))
        assert (both == 1).all()
