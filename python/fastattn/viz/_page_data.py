"""What an interactive page shows, as numbers that JSON can carry."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastattn.viz import _arrays, _edges, _style

# Of all layers together, before base64 makes 4/3 of it. 12 layers of 12 heads over 60 tokens take 1 MB.
_MOST_BYTES = 12 * 2**20
_MOST_KEYS = 32  # of a query, where not all are kept
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


class _Source(NamedTuple):
    """One layer as it was given."""

    name: str
    attention: Any  # an insight, or weights (..., queries, keys)
    causal: bool


def layers_of(
    recording: Any, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> list[LayerData]:
    """Read a recording, an array of weights, an insight, or a sequence of either, one a layer."""
    sources = _recorded(recording) if hasattr(recording, "layers") else _given(recording)
    if not sources:
        raise ValueError("recording: expected at least one layer, got none")
    budget = _MOST_BYTES // len(sources)
    if tokens is None:
        tokens = getattr(recording, "tokens", None)
    return [_layer(source, tokens, key_tokens, budget) for source in sources]


def _recorded(recording: Any) -> list[_Source]:
    calls = Counter(layer.name for layer in recording.layers)
    found = []
    for layer in recording.layers:
        attention = layer.weights if layer.weights is not None else layer.insight
        if attention is None:
            raise ValueError(f"recording: layer {layer.name!r} has neither weights nor an insight")
        call = f", call {layer.call}" if calls[layer.name] > 1 else ""
        found.append(_Source(f"{layer.name}{call}", attention, layer.causal))
    return found


def _given(source: Any) -> list[_Source]:
    if _arrays.is_insight(source):
        return [_Source("attention", source, False)]
    if isinstance(source, list | tuple) and source:
        first = source[0]
        if hasattr(first, "shape") or _arrays.is_insight(first):
            return [_Source(f"layer {place}", layer, False) for place, layer in enumerate(source)]
    array = source if hasattr(source, "shape") else np.asarray(source)
    if len(array.shape) == 4 and array.shape[0] != 1:
        return [_Source(f"layer {place}", layer, False) for place, layer in enumerate(array)]
    return [_Source("attention", array, False)]


def _layer(
    source: _Source, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None, budget: int
) -> LayerData:
    keys: NDArray[np.int64] | None = None
    if _arrays.is_insight(source.attention):
        keys, weights = _edges.strongest(source.attention)
        count = _edges.key_count(source.attention, len(key_tokens or tokens or ()))
    else:
        weights = _arrays.with_heads("weights", source.attention, "queries, keys")
        count = weights.shape[2]
    heads, queries = weights.shape[:2]
    names_q, names_k = _names(source, queries, count, tokens, key_tokens)
    if keys is None and weights.size * 2 > budget:
        keys, weights = _cut(weights, min(count, _MOST_KEYS))
    if keys is not None:
        most = max(1, budget // (6 * heads * queries))
        keys, weights = keys[..., :most], weights[..., :most]
    return {
        "name": source.name,
        "heads": heads,
        "queryTokens": [_style.label(name) for name in names_q],
        "keyTokens": [_style.label(name) for name in names_k],
        "topK": 0 if keys is None else weights.shape[2],
        "keys": "" if keys is None else _packed(np.where(keys < 0, _NONE, keys), "<u4"),
        "weights": _packed(np.rint(np.minimum(weights, 1.0) * _STEPS), "<u2"),
    }


def _names(
    source: _Source, queries: int, keys: int, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Tokens of the queries and of the keys of a layer: those given that are as many."""
    if source.causal and key_tokens is None and tokens is not None and queries <= keys <= len(tokens):
        return list(tokens[keys - queries : keys]), list(tokens[:keys])  # a step of generation
    found = []
    for side, length, choice in (
        ("queries", queries, (tokens, key_tokens)),
        ("keys", keys, (key_tokens, tokens)),
    ):
        given = [names for names in choice if names is not None]
        fitting = next((names for names in given if len(names) == length), None)
        if given and fitting is None:
            lengths = " and ".join(str(len(names)) for names in given)
            raise ValueError(f"tokens: {source.name!r} has {length} {side}, got {lengths} tokens")
        found.append(_arrays.check_tokens("tokens", fitting, length))
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
