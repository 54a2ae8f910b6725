"""What a call has to do: visible query-key pairs, and what they cost. Tiles that are visited do not count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.shapes import Case

# Spelled out: the environment of the other peers, where this is imported too, has no fastattn.
MODES = ("forward", "backward", "training")  # training: forward and backward
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Calls that read a cache get so many bytes of keys and values in turn; so does the streaming read.
_COLD_BYTES = 256 << 20


def useful_flops(case: Case, mode: str = "forward") -> int:
    """Multiplications and additions of all products, over visible pairs only.

    Forward: Q K^T and P V. Backward, which has no probabilities kept: Q K^T again, dO V^T, dS K, dS^T Q and
    P^T dO, 2.5 times as many where both head sizes are one.
    """
    dim, value_dim = case.head_dim, case.value_dim
    forward, backward = dim + value_dim, 3 * dim + 2 * value_dim
    multiplications = {"forward": forward, "backward": backward, "training": forward + backward}
    return 2 * useful_pairs(case) * multiplications[mode]


def kv_bytes(case: Case, dtype: str) -> int:
    """What one query of every head must read: of a cache, no more than the lengths of its sequences."""
    lengths = case.options().get("kv_lengths")
    tokens = case.batch * case.seqlen_k if lengths is None else int(lengths.sum())
    return tokens * case.kv_heads * (case.head_dim + case.value_dim) * ITEM_BYTES[dtype]


def copies_that_no_cache_holds(bytes_each: int) -> int:
    """How many copies, used in turn, come from memory each time."""
    return -(-_COLD_BYTES // bytes_each)


def all_bytes(case: Case, dtype: str, mode: str = "forward") -> int:
    """Query, key, value and output, in a backward gradients too, each moved once: what a roofline counts."""
    rows = case.batch * case.query_heads * case.seqlen_q
    forward = kv_bytes(case, dtype) + rows * (case.head_dim + case.value_dim) * ITEM_BYTES[dtype]
    return forward * {"forward": 1, "backward": 2, "training": 3}[mode]


def useful_pairs(case: Case) -> int:
    """(query, key) pairs that attend, over batch and query heads."""
    heads, seqlen_k = case.query_heads, case.seqlen_k
    options = case.options()
    dense = _dense(options)
    pairs = 0
    for b, (first, end) in enumerate(_intervals(case, options)):
        if dense is None:
            pairs += heads * int(np.maximum(end - first, 0).sum())
            continue
        rows = np.broadcast_to(dense, (*dense.shape[:2], case.seqlen_q, seqlen_k))[min(b, len(dense) - 1)]
        counts = np.zeros((len(rows), case.seqlen_q, seqlen_k + 1), np.int64)  # of attending keys before each
        np.cumsum(rows, axis=-1, out=counts[..., 1:])
        first, end = first[None, :, None], np.maximum(first, end)[None, :, None]
        inside = np.take_along_axis(counts, end, -1) - np.take_along_axis(counts, first, -1)
        pairs += int(inside.sum()) * (heads // len(rows))
    return pairs


def visible(case: Case) -> np.ndarray:
    """(B or 1, Hq or 1, Lq, Lk) bool: every rule as one mask, for peers that take nothing else."""
    options = case.options()
    key_at = np.arange(case.seqlen_k)
    rows = [(first[:, None] <= key_at) & (key_at < end[:, None]) for first, end in _intervals(case, options)]
    if not any(name in options for name in ("kv_lengths", "query_offset")):
        rows = rows[:1]  # all alike
    mask, dense = np.stack(rows)[:, None], _dense(options)
    return mask if dense is None else mask & dense


def _intervals(case: Case, options: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each batch, the keys [first, end) that causal rule, window and length leave to each query."""
    for b in range(case.batch):
        offset = 0 if case.causal == "top_left" else case.seqlen_k - case.seqlen_q
        if "query_offset" in options:
            offset = int(options["query_offset"][b])
        length = int(options["kv_lengths"][b]) if "kv_lengths" in options else case.seqlen_k
        at = np.arange(case.seqlen_q) + offset
        left, right = case.window or (None, None)
        first = np.zeros_like(at) if left is None else at - left
        end = np.full_like(at, length) if right is None else at + right + 1
        if case.causal:
            end = np.minimum(end, at + 1)
        yield first.clip(0, length), end.clip(0, length)


def _dense(options: dict[str, Any]) -> np.ndarray | None:
    """Mask and minus infinities of the bias, with four axes."""
    dense = options.get("mask")
    if "bias" in options:
        finite = options["bias"] != -np.inf
        dense = finite if dense is None else dense & finite
    return None if dense is None else dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
