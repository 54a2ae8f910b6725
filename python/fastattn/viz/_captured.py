"""The weights of a call that somebody else computes, from its query, key and rules alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.codes import FLOAT8
from fastattn.functional import attention
from fastattn.insights import Insight, insight
from fastattn.problem import UNBOUNDED, AttentionProblem
from fastattn.strided import Strided

Floats = NDArray[Any]  # float32, or float64 for a call of float64


class Captured(NamedTuple):
    """What is kept of a call: weights, (B, Hq, Lq, Lk), or an insight."""

    weights: NDArray[np.float32] | None
    insight: Insight | None
    causal: bool  # nobody looks at a key behind its own position


class _Call(NamedTuple):
    """A call as NumPy's arrays and the arguments of `fastattn.attention`."""

    query: Floats  # (B, Hq, Lq, D)
    key: Floats  # (B, Hkv, Lk, D)
    rules: dict[str, Any]


def captured(problem: AttentionProblem, dense_up_to: int, top_k: int) -> Captured:
    """Return what is kept of a call on tensors, of any device."""
    if not problem.query.address and 0 not in problem.query.shape:
        raise NotImplementedError("record reads numbers, and tensors in a transform of torch.func have none")
    if problem.cu_seqlens is not None:
        total = max(problem.query.shape[2], problem.key.shape[2])
        return _packed(problem, total <= dense_up_to, top_k)
    call = _read(problem)
    return _captured(call, max(call.query.shape[2], call.key.shape[2]) <= dense_up_to, top_k)


def _captured(call: _Call, dense: bool, top_k: int) -> Captured:
    offset = np.reshape(call.rules["query_offset"], (-1, 1, 1, 1))
    query_at = offset + np.arange(call.query.shape[2])[:, None]
    if dense:
        weights = _weights(call)
        ahead = np.arange(call.key.shape[2]) > query_at
        return Captured(weights, None, not np.where(ahead, weights, 0).any())
    found = _insight(call, top_k)
    assert found.distance_mass is not None
    ahead_mass = found.distance_mass[:, :, 0]
    return Captured(None, found._replace(distance_mass=None), not ahead_mass.any())


def _packed(problem: AttentionProblem, dense: bool, top_k: int) -> Captured:
    """The same of sequences behind one another: a batch of 1, in which they do not see each other."""
    assert problem.cu_seqlens is not None
    starts = tuple(_numbers(given) for given in problem.cu_seqlens)
    offset, slopes = _numbers(problem.query_offset), _numbers(problem.alibi_slopes)
    problem = problem._replace(cu_seqlens=starts, query_offset=offset, alibi_slopes=slopes)
    parts = [_captured(_read(part), dense, top_k) for _, part in problem.sequences()]
    causal = all(part.causal for part in parts)
    if dense:
        weights = np.zeros(problem.scores_shape, np.float32)
        for s, part in enumerate(parts):
            rows, columns = (slice(*of[s : s + 2]) for of in starts)
            weights[:, :, rows, columns] = part.weights
        return Captured(weights, None, causal)
    found = [part.insight for part in parts if part.insight is not None]
    keys = [np.where(x.keys < 0, -1, x.keys + start) for x, start in zip(found, starts[1], strict=False)]
    _, strongest, entropies, masses, _, _ = (list(of_each) for of_each in zip(*found, strict=True))
    joined = (np.concatenate(of_each, 2) for of_each in (keys, strongest, entropies, masses))
    return Captured(None, _without_output(*joined), causal)


def _insight(call: _Call, top_k: int) -> Insight:
    arguments: dict[str, Any] = {"top_k": top_k, "distances": [0], **call.rules}
    try:
        found = insight(call.query, call.key, **arguments, backend="cpu")
    except NotImplementedError:  # a head dimension that no kernel reaches
        found = insight(call.query, call.key, **arguments, backend="reference")
    return _without_output(*found[:4])._replace(distance_mass=found.distance_mass)


def _without_output(keys: Any, weights: Any, entropy: Any, key_mass: Any) -> Insight:
    weights, entropy, key_mass = (np.asarray(values, np.float32) for values in (weights, entropy, key_mass))
    return Insight(keys, weights, entropy, key_mass, None, None)


def _weights(call: _Call) -> NDArray[np.float32]:
    value = np.zeros((*call.key.shape[:3], 1), call.key.dtype)
    arguments = (call.query, call.key, value)
    try:
        _, weights = attention(*arguments, **call.rules, return_weights=True, backend="cpu")
    except NotImplementedError:  # a head dimension that no kernel reaches
        _, weights = attention(*arguments, **call.rules, return_weights=True, backend="reference")
    return np.asarray(weights, np.float32)


def _read(problem: AttentionProblem) -> _Call:
    query, key = _floats(_tensor(problem.query)), _keys(problem)
    lengths, offset = _numbers(problem.kv_lengths), _numbers(problem.query_offset)
    alone = problem.mask is None and problem.bias is None and problem.segment_ids is None
    if alone and lengths is not None and np.array_equal(offset, lengths - query.shape[2]):
        # A cache: queries stand at the end of what it holds, and the rest is room for more.
        key = key[:, :, : lengths.max(initial=0)]
    bounds = (problem.window_left, problem.window_right)
    segments = problem.segment_ids
    rules = {
        "window": tuple(None if bound >= UNBOUNDED else bound for bound in bounds),
        "mask": None if problem.mask is None else _once(problem.mask).cpu().numpy(),
        "bias": None
        if problem.bias is None
        else _floats(_once(problem.bias)).astype(query.dtype, copy=False),
        "kv_lengths": lengths,
        "kv_starts": _numbers(problem.kv_starts),
        "query_lengths": _numbers(problem.query_lengths),
        "segment_ids": None if segments is None else tuple(_numbers(ids) for ids in segments),
        "query_offset": offset,
        "alibi_slopes": _numbers(problem.alibi_slopes),
        "sinks": _numbers(problem.sinks),
        "softcap": problem.softcap,
        "scale": problem.scale,
    }
    return _Call(query, key, rules)


def _keys(problem: AttentionProblem) -> Floats:
    """(B, Hkv, Lk, D): gathered from their pages, and dequantised."""
    keys = _floats(_in_one_piece(problem, problem.key))
    if problem.key_scale is None:
        return keys
    with np.errstate(all="ignore"):  # rows that were never written hold anything
        return keys * _floats(_in_one_piece(problem, problem.key_scale))[..., None]


def _in_one_piece(problem: AttentionProblem, view: Strided) -> Any:
    """(B, Hkv, Lk, ...), a tensor."""
    rows = _tensor(view)
    if problem.block_table is None:
        return rows
    import torch

    lengths = _numbers(problem.kv_lengths)
    slots = -(-int(lengths.max(initial=0)) // problem.page_size)
    # What the table holds beyond the length of a sequence is nobody's page.
    table = _numbers(problem.block_table)[:, :slots].clip(0, len(rows) - 1).astype(np.int64)
    bits = rows.view(torch.uint8) if view.dtype in FLOAT8 else rows
    pages = bits[torch.from_numpy(table).to(rows.device)].view(rows.dtype)  # (B, slots, Hkv, page_size, ...)
    return pages.transpose(1, 2).flatten(2, 3)


def _tensor(view: Strided) -> Any:
    return view.array.detach().as_strided(view.shape, view.strides)


def _once(view: Strided) -> Any:
    """A tensor in which axes that are broadcast have one element."""
    return _tensor(view)[tuple(slice(0, 1) if not step else slice(None) for step in view.strides)]


def _floats(tensor: Any) -> Floats:
    """NumPy has no bfloat16, and float32 holds all of it."""
    tensor = tensor.cpu()
    values: Floats = (tensor if str(tensor.dtype) == "torch.float64" else tensor.float()).numpy()
    return values


def _numbers(vector: Any) -> Any:
    """A short argument as an array of NumPy, or the one number that it is; None stays None."""
    if isinstance(vector, Strided):
        vector = _tensor(vector) if hasattr(vector.array, "detach") else vector.numpy()
    return vector.detach().cpu().numpy() if hasattr(vector, "detach") else vector
