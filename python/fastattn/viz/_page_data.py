"""What an interactive page shows, as numbers that JSON can carry."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastattn.viz import _arrays, _edges, _style

# Of all layers together, before base64 makes 4/3 of it. 12 layers of 12 heads over 60 tokens take 1 MB.
_MOST_BYTES = 12 * 2**20
_STEPS = 65535  # of a weight from 0 to 1, in 16 bits
_NONE = 0xFFFFFFFF  # the key of an empty place, as the page reads it


class LayerData(TypedDict):
    """One layer as the page reads it."""

    name: str
    heads: int
    queryTokens: list[str]
    keyTokens: list[str]
    topK: int  # of `keys` and `weights` (heads, queries, topK); 0: `weights` are (heads, queries, keys)
    keys: str  # base64 of little-endian uint32
    weights: str  # base64 of little-endian uint16, which 65535 divides


def layers_of(source: Any, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None) -> list[LayerData]:
    """Read a recording, an array of weights, an insight, or a sequence of either, one a layer."""
    named = _named(source)
    if not named:
        raise ValueError("recording: expected at least one layer, got none")
    budget = _MOST_BYTES // len(named)
    return [_layer(name, layer, tokens, key_tokens, budget) for name, layer in named]


def _named(source: Any) -> list[tuple[str, Any]]:
    """Layers with their names: an insight, or weights (..., queries, keys)."""
    if hasattr(source, "layers"):
        found = []
        for layer in source.layers:
            given = layer.weights if layer.weights is not None else layer.insight
            if given is None:
                raise ValueError(f"recording: layer {layer.name!r} has neither weights nor an insight")
            found.append((str(layer.name), given))
        return found
    if _edges.is_insight(source):
        return [("attention", source)]
    if (
        isinstance(source, list | tuple)
        and source
        and (hasattr(source[0], "shape") or _edges.is_insight(source[0]))
    ):
        return [(f"layer {place}", layer) for place, layer in enumerate(source)]
    array = source if hasattr(source, "shape") else np.asarray(source)
    if len(array.shape) == 4 and array.shape[0] != 1:
        return [(f"layer {place}", layer) for place, layer in enumerate(array)]
    return [("attention", array)]


def _layer(
    name: str, layer: Any, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None, budget: int
) -> LayerData:
    keys: NDArray[np.int64] | None = None
    if _edges.is_insight(layer):
        keys, weights = _edges.strongest(layer)
        count = _edges.key_count(layer, len(key_tokens or tokens or ()))
    else:
        weights = _arrays.with_heads("weights", layer, "queries, keys")
        count = weights.shape[2]
    heads, queries = weights.shape[:2]
    names_q, names_k = _names(name, queries, count, tokens, key_tokens)
    if keys is None and weights.size * 2 > budget:
        keys, weights = _cut(weights, min(count, 32))
    if keys is not None:
        most = max(1, budget // (6 * heads * queries))
        keys, weights = keys[..., :most], weights[..., :most]
    return {
        "name": name,
        "heads": heads,
        "queryTokens": names_q,
        "keyTokens": names_k,
        "topK": 0 if keys is None else weights.shape[2],
        "keys": "" if keys is None else _packed(np.where(keys < 0, _NONE, keys), "<u4"),
        "weights": _packed(np.rint(np.minimum(weights, 1.0) * _STEPS), "<u2"),
    }


def _names(
    layer: str, queries: int, keys: int, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Tokens of the queries and of the keys of a layer: those given that are as many."""
    found = []
    for side, length, choice in (
        ("queries", queries, (tokens, key_tokens)),
        ("keys", keys, (key_tokens, tokens)),
    ):
        given = [list(names) for names in choice if names is not None]
        fitting = next((names for names in given if len(names) == length), None)
        if given and fitting is None:
            lengths = " and ".join(str(len(names)) for names in given)
            raise ValueError(f"tokens: {layer!r} has {length} {side}, got {lengths} tokens")
        found.append([_style.label(name) for name in _arrays.check_tokens("tokens", fitting, length)])
    return found[0], found[1]


def _cut(weights: _arrays.FloatArray, most: int) -> tuple[NDArray[np.int64], _arrays.FloatArray]:
    """The `most` largest weights of each row and where they are, largest first."""
    keys = np.argpartition(-weights, most - 1, axis=-1)[..., :most]
    values = np.take_along_axis(weights, keys, axis=-1)
    order = np.argsort(-values, axis=-1, kind="stable")
    keys, values = np.take_along_axis(keys, order, axis=-1), np.take_along_axis(values, order, axis=-1)
    return np.where(values > 0, keys, -1), values


def _packed(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode("ascii")
