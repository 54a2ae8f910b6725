"""Attention as a list of pairs, from dense weights or from the strongest keys of each query."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.viz import _arrays
from fastattn.viz._arrays import ArrayLike, FloatArray, Head, is_insight


class Edges(NamedTuple):
    """Pairs of a query and a key that attend, with their weights."""

    query: NDArray[np.int64]
    key: NDArray[np.int64]
    weight: FloatArray


def strongest(source: Any) -> tuple[NDArray[np.int64], FloatArray]:
    """Keys and weights of an insight, both (heads, queries, top_k)."""
    weights = _arrays.with_heads("weights", source.weights, "queries, top_k")
    keys = source.keys
    if hasattr(keys, "detach"):
        keys = keys.detach().cpu().numpy()
    keys = np.asarray(keys, dtype=np.int64)
    if keys.size != weights.size:
        raise ValueError(
            f"keys: expected the shape of weights, {tuple(source.weights.shape)}, got {keys.shape}"
        )
    return keys.reshape(weights.shape), weights


def key_count(insight: Any, tokens: int) -> int:
    """How many keys there are: as many as have a mass, or else as there are tokens, or else as are named."""
    if (received := getattr(insight, "key_mass", None)) is not None:
        return int(received.shape[-1])
    keys, _ = strongest(insight)
    named = int(keys.max(initial=-1)) + 1
    if tokens and named > tokens:
        raise ValueError(f"tokens: expected one for every key up to {named - 1}, got {tokens}")
    return tokens or max(named, keys.shape[1])


def sizes(source: ArrayLike, tokens: int) -> tuple[int, int, int]:
    """How many heads, queries and keys there are; of an insight that does not tell, `tokens` keys."""
    if is_insight(source):
        heads, queries, _ = strongest(source)[1].shape
        return heads, queries, key_count(source, tokens)
    heads, queries, keys = _arrays.with_heads("weights", source, "queries, keys").shape
    return heads, queries, keys


def edges(source: ArrayLike, head: Head, keys: int) -> Edges:
    """All pairs of one head, or of the average of all heads, whose weight is not 0."""
    if not is_insight(source):
        matrix = _arrays.one_head("weights", _arrays.with_heads("weights", source, "queries, keys"), head)
        query, key = np.nonzero(matrix)
        return Edges(query, key, matrix[query, key])
    columns, weights = strongest(source)
    chosen = (
        np.arange(len(weights)) if head == "mean" else [_arrays.head_index("weights", len(weights), head)]
    )
    columns, weights = columns[chosen], weights[chosen] / len(chosen)
    seen = (columns >= 0) & (weights > 0)
    rows = np.broadcast_to(np.arange(columns.shape[1])[:, None], columns.shape)
    # Heads may name the same pair: their weights add up.
    pairs, where = np.unique(rows[seen] * keys + columns[seen], return_inverse=True)
    summed = np.bincount(where, weights[seen], len(pairs)).astype(np.float64)
    return Edges(pairs // keys, pairs % keys, summed)
