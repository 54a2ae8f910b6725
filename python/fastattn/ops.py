"""Attention and its backward as a pair of functions, to build on: ring attention, graphs of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastattn import gradients
from fastattn.arrays import Array, is_tensor, is_traced, type_name
from fastattn.dispatch import candidates, choose_differentiable
from fastattn.functional import attend
from fastattn.problem import AttentionProblem

__all__ = ["Gradients", "backward", "forward"]


class Gradients(NamedTuple):
    """What `backward` returns: in the shape and dtype of each argument, None for what was not wanted."""

    query: Array | None = None
    key: Array | None = None
    value: Array | None = None
    bias: Array | None = None
    alibi_slopes: Array | None = None
    sinks: Array | None = None


def forward(
    query: Array,
    key: Array,
    value: Array,
    *,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Compute attention and its log-sum-exp, which is all that `backward` needs.

    Parameters
    ----------
    query, key, value : arrays
        (B, Hq, Lq, D), (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv). Autocast casts none of them.
    dropout_p, dropout_seed
        As of `fastattn.attention`, but with dropout the seed must be given: `backward` needs the same.
    backend, **options
        As of `fastattn.attention`: causal, window, mask, bias, kv_lengths, kv_starts, query_lengths,
        segment_ids, query_offset, alibi_slopes, sinks, softcap, scale, dropout_offset, layout.

    Returns
    -------
    out : array, shape (B, Hq, Lq, Dv)
        (B, Lq, Hq, Dv) in layout "bshd".
    lse : array, shape (B, Hq, Lq)
        float32, or float64 for float64 arrays.

    Raises
    ------
    TypeError, ValueError, RuntimeError, NotImplementedError
        As of `fastattn.attention`.

    Notes
    -----
    Tensors that require grad get a graph, as in `fastattn.attention`; inside the forward of a
    `torch.autograd.Function` there is none.

    Examples
    --------
    >>> import numpy as np, fastattn.ops
    >>> query = key = value = np.ones((1, 2, 5, 8), np.float32)
    >>> out, lse = fastattn.ops.forward(query, key, value, causal=True)
    """
    options = _complete(options, dropout_p, dropout_seed)
    results: tuple[Array, Array] = attend(query, key, value, options, True, False, None, backend)
    return results


def backward(
    dout: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    wanted: Sequence[str] = ("query", "key", "value"),
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> Gradients:
    r"""Compute gradients of attention from its output and its log-sum-exp.

    Keys and values may be a part of those that `out` and `lse` are of. The results are then exactly that
    part's: `key` and `value` the gradients of those rows, `query`, `bias` and `alibi_slopes` what they add to
    the whole, because

    .. math:: P = e^{S - lse}, \quad dV = P^T dO, \quad dS = P \circ (dO\,V^T - \delta), \quad
              \delta = \langle dO, O \rangle - dlse

    need of other keys only `out` and `lse` [1]_. The gradient of `sinks` is made of these alone: take it from
    one part.

    Parameters
    ----------
    dout : array of query's dtype, shape of `out`
        The gradient of `out`.
    query, key, value : arrays
        As of `forward`; key and value may be a part.
    out, lse : arrays
        What `forward` returned, or `fastattn.merge_states` for all parts.
    dlse : array of the shape and dtype of `lse`, optional
        The gradient of `lse`, where the loss depends on it.
    wanted : sequence of str
        Which gradients: of "query", "key", "value", "bias", "alibi_slopes", "sinks". Others are not computed.
    dropout_p, dropout_seed, backend, **options
        As of `forward`, and the same. Of a part of the keys: `query_offset` counts from its first key, and
        dropout, counted by keys, must be 0.

    Returns
    -------
    Gradients
        A named tuple of six, None where not wanted. Of slopes and sinks that are no arrays: float64.

    Raises
    ------
    TypeError
        For a wrong type or dtype.
    ValueError
        For shapes that do not fit, values out of range, and the gradient of something that was not given.
    RuntimeError
        For tensors on different devices, or that require grad: no graph is made of a backward.
    NotImplementedError
        If the backend computes no gradients; of "math", differentiate `fastattn.attention`.

    References
    ----------
    .. [1] Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.

    Examples
    --------
    >>> import numpy as np, fastattn.ops
    >>> query = key = value = np.ones((1, 2, 5, 8), np.float32)
    >>> out, lse = fastattn.ops.forward(query, key, value)
    >>> fastattn.ops.backward(out, query, key, value, out, lse, wanted=["key"]).key.shape
    (1, 2, 5, 8)
    """
    options = _complete(options, dropout_p, dropout_seed)
    flags = _flags(wanted, options)
    if is_tensor(query):
        from fastattn import torch_ops  # registers operators, the first time

        given = (out, lse, query, key, value)
        if is_traced() or torch_ops.is_watched(dout, *given):
            options["backend"] = backend
            return Gradients(*torch_ops.operator_backward(dout, dlse, given, flags, options))
    problem = AttentionProblem.from_arguments(query, key, value, **options)
    differentiable = choose_differentiable(problem, candidates(backend))
    _check_results(problem, dout, out, lse, dlse)
    grads = gradients.backward(differentiable, problem, out, lse, dout, dlse, None, flags)
    for at, name in enumerate(gradients.NAMES):
        if name in ("alibi_slopes", "sinks"):
            grads[at] = gradients.as_given(grads[at], options[name])
    return Gradients(*grads)


_DEFAULTS: dict[str, Any] = {
    "causal": False,
    "window": None,
    "mask": None,
    "bias": None,
    "kv_lengths": None,
    "kv_starts": None,
    "query_lengths": None,
    "segment_ids": None,
    "query_offset": None,
    "alibi_slopes": None,
    "sinks": None,
    "softcap": 0.0,
    "scale": None,
    "dropout_offset": 0,
    "layout": "bhsd",
}


def _complete(options: dict[str, Any], dropout_p: float, dropout_seed: int | None) -> dict[str, Any]:
    """All arguments of `fastattn.attention` that say what is computed."""
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(f"{name} is no argument; expected one of {', '.join(_DEFAULTS)}")
    if dropout_p != 0 and dropout_seed is None:
        raise ValueError("dropout_seed must be given with dropout: the backward needs the same, got None")
    return {**_DEFAULTS, **options, "dropout_p": dropout_p, "dropout_seed": dropout_seed}


def _flags(wanted: Any, options: dict[str, Any]) -> tuple[bool, ...]:
    """Which gradients are wanted, in the order of `gradients.NAMES`."""
    if isinstance(wanted, str) or not isinstance(wanted, (tuple, list, set, frozenset)):
        raise TypeError(f"wanted must be a sequence of names, got {type_name(wanted)}")
    for name in wanted:
        if name not in gradients.NAMES:
            raise ValueError(f"wanted must hold names out of {', '.join(gradients.NAMES)}, got {name!r}")
        if name in options and options[name] is None:
            raise ValueError(f"wanted must hold arguments that are given, got {name!r}, which is None")
    return tuple(name in wanted for name in gradients.NAMES)


def _check_results(
    problem: AttentionProblem, dout: Array, out: Array, lse: Array, dlse: Array | None
) -> None:
    """Raise unless these are what a forward returned, and gradients of that."""
    batch, heads, rows, dim = problem.out_shape
    shape = problem.out_shape if problem.layout == "bhsd" else (batch, rows, heads, dim)
    for name, array in ("dout", dout), ("out", out):
        view = problem.library.view(name, array)
        if view.dtype != problem.dtype:
            raise TypeError(f"{name} must have query's dtype {problem.dtype}, got {view.dtype}")
        if view.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {view.shape}")
    for name, array in ("lse", lse), ("dlse", dlse):
        if array is None and name == "dlse":
            continue
        view = problem.library.view(name, array)
        if view.dtype != problem.lse_dtype:
            expected = f"{problem.lse_dtype} for arrays of {problem.dtype}"
            raise TypeError(f"{name} must be {expected}, got {view.dtype}")
        if view.shape != (batch, heads, rows):
            raise ValueError(f"{name} must have shape {(batch, heads, rows)}, got {view.shape}")
