"""`fastattn.insight` in plain NumPy: rows of weights a block at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastattn.functional import attention

_BLOCK = 128  # queries


class Insight(NamedTuple):
    """What each query looks at most, how widely it looks, and how much each key is looked at."""

    keys: Any  # int64 (B, Hq, Lq, top_k), strongest first; -1 where fewer are visible
    weights: Any  # float32, the same
    entropy: Any  # float32 (B, Hq, Lq), nats
    key_mass: Any  # float32 (B, Hq, Lk)
    output: Any = None
    distance_mass: Any = None


def insight(query: Any, key: Any, *, top_k: int, query_offset: Any, **rules: Any) -> Insight:
    """Return the insight of a call of `fastattn.attention`."""
    value = np.zeros((*key.shape[:3], 1), key.dtype)
    batch, heads, length, _ = query.shape
    mass = np.zeros((batch, heads, key.shape[2]), np.float64)
    parts = []
    for start in range(0, max(1, length), _BLOCK):
        rows = slice(start, start + _BLOCK)
        own = {name: _rows(name, given, rows) for name, given in rules.items()}
        offset = np.broadcast_to(query_offset, batch) + start
        _, weights = attention(query[:, :, rows], key, value, query_offset=offset, **own, return_weights=True)
        mass += weights.sum(2, dtype=np.float64)
        order = np.argsort(-weights, axis=-1, kind="stable")[..., :top_k]
        strongest = np.take_along_axis(weights, order, -1)
        missing = [(0, 0)] * 3 + [(0, top_k - order.shape[-1])]
        logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
        keys = np.where(strongest > 0, order, -1)
        parts.append(
            (np.pad(keys, missing, constant_values=-1), np.pad(strongest, missing), -(weights * logs).sum(-1))
        )
    keys, strongest, entropy = (np.concatenate(part, 2) for part in zip(*parts, strict=True))
    return Insight(keys, strongest.astype(np.float32), entropy.astype(np.float32), mass.astype(np.float32))


def _rows(name: str, given: Any, rows: slice) -> Any:
    """What an argument says of these queries alone."""
    if given is None:
        return None
    if name in ("mask", "bias"):
        return given[:, :, rows] if given.shape[2] > 1 else given
    if name == "segment_ids":
        return given[0][:, rows], given[1]
    if name == "query_lengths":
        return np.clip(given - rows.start, 0, _BLOCK)
    return given
