"""The functions a user calls."""

from __future__ import annotations

from typing import Any

from fastattn import observers
from fastattn.arrays import Array, as_autocast, is_inlined, is_tensor, is_traced
from fastattn.dispatch import candidates, choose, composing, run_plain
from fastattn.outputs import check_flags, check_request, prepare_outputs, returned
from fastattn.problem import AttentionProblem, Causal, Layout, Window


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: Causal = False,
    window: Window | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    kv_lengths: Any = None,
    kv_starts: Any = None,
    query_lengths: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    query_offset: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Any:
    r"""Exact attention: ``softmax(scale * query @ key.T + bias) @ value`` for every head.

    All arrays are NumPy's or all are torch's, on the CPU or on one GPU, and so are the results. query, key,
    value and out have one dtype: float64 (on the CPU), float32, bfloat16 (in NumPy: ``ml_dtypes.bfloat16``)
    or float16. Strides may be any.

    Parameters
    ----------
    query : array, shape (B, Hq, Lq, D)
        B, Lq and Lk may be 0.
    key : array, shape (B, Hkv, Lk, D)
        Hq is a multiple of Hkv: query head ``h`` attends to key and value head ``h // (Hq // Hkv)``.
    value : array, shape (B, Hkv, Lk, Dv)
    causal : bool or {"bottom_right", "top_left"}
        Query ``i`` attends to keys up to ``i + offset``. The offset is `query_offset` if given, 0 for
        "top_left", else ``Lk - Lq``; True means "bottom_right".
    window : (left, right), optional
        Query ``i`` attends to keys from ``i + offset - left`` to ``i + offset + right``; None is no bound.
    mask : bool array, optional
        Broadcasts to (B, Hq, Lq, Lk); True: attend.
    bias : array of query's dtype or float32, optional
        Broadcasts to (B, Hq, Lq, Lk); added to the scores. -inf masks; every finite value is a value.
    kv_lengths : (B,) integers, optional
        Keys at and past the length do not exist. Moves no diagonal, and neither do the next three.
    kv_starts : (B,) integers, optional
        Keys before the start do not exist.
    query_lengths : (B,) integers, optional
        Queries at and past the length do not exist: their rows may attend to nothing.
    segment_ids : ((B, Lq) integers, (B, Lk) integers), optional
        A query attends to the keys of its own id alone. Ids may come in any order; where those of a document
        stand side by side, nothing is done for other documents' keys.
    query_offset : int or (B,) integers, optional
        The key position at which query 0 stands.
    alibi_slopes : (Hq,) or (B, Hq) floats, optional
        Subtracts ``slope * abs(i + offset - j)`` from the scores [1]_.
    sinks : (Hq,) floats, optional
        One more logit for each row of a head, without a value; -inf is none.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)`` before bias and ALiBi; 0 is none.
    scale : float, optional
        Defaults to ``1 / sqrt(D)``.
    dropout_p : float
        Probabilities are set to 0 with this probability, and multiplied by ``1 / (1 - dropout_p)`` otherwise.
    dropout_seed : int or int64 tensor of shape (), optional
        From 0 to 2**64 - 1. One seed and offset drop the same probabilities on every backend. By default it
        is drawn: for tensors from torch's default generator of their device, for NumPy anew each time.
    dropout_offset : int
        From 0 to 2**32 - 1: tells calls of one seed apart, those of the layers of a model for one.
    layout : {"bhsd", "bshd"}
        "bshd": query, key, value and out have axes (B, L, H, D). mask, bias, lse and weights keep theirs.
    return_lse : bool
        Also return ``log(sum_j exp(score_ij) + exp(sink_h))``, shape (B, Hq, Lq), float32 (or float64).
    return_weights : bool
        Also return the probabilities, after dropout, shape (B, Hq, Lq, Lk), in query's dtype.
    out : array, shape (B, Hq, Lq, Dv), optional
        Written and returned. Must not share memory with an input.
    backend : {"cpu", "triton", "reference", "math"}, optional
        Defaults to ``FASTATTN_BACKEND``, else to the first that can run the call; see `explain`. "math" is
        composed of operations of torch: for tensors of any device, with every score in memory, differentiable
        any number of times in query, key, value, bias, sinks and alibi_slopes.

    Returns
    -------
    out, or (out, lse), (out, weights), (out, lse, weights)
        A row that may attend to nothing has out 0, weights 0, and its sink, or -inf, for lse.

    Raises
    ------
    TypeError
        For a wrong type or dtype, NumPy mixed with torch, or tensor subclasses.
    ValueError
        For shapes that do not fit and values out of range, and for an `out` that overlaps an input or itself.
    RuntimeError
        For tensors on different devices, or on one that is neither the CPU nor a GPU of CUDA or ROCm; for an
        `out` where anything requires grad; for gradients of gradients. The backend "math" has both, on any
        device.
    NotImplementedError
        If no backend can run the call; the message holds the reasons of each.
    MemoryError
        If there is no room for results or scratch. Nothing has been written to `out`.

    Notes
    -----
    Tensors that require grad get a graph. ``torch.autocast`` casts query, key and value.

    On a GPU, kv_lengths, kv_starts, query_lengths, segment_ids, query_offset, alibi_slopes and sinks may be
    lists or tensors of the CPU, checked as everywhere, or tensors of the GPU: those are never waited for, and
    their values are not checked unless ``FASTATTN_DEBUG=1``. Kernels then stay within the keys that there
    are. A call only launches kernels, on the current stream, and can be captured in a CUDA graph.

    On the CPU, what is masked, or lies past a length, changes no bit of the output, not even NaN; on a GPU
    that holds past a length, and where no row of a tile may look. Dropout keeps a probability where a word of
    Philox 4x32-10 [2]_ says so; `fastattn.philox` is its definition.

    References
    ----------
    .. [1] Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases", 2021.
    .. [2] Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.

    Examples
    --------
    >>> import numpy as np, fastattn as fa
    >>> query = key = value = np.ones((1, 2, 5, 8), np.float32)
    >>> out, lse = fa.attention(query, key, value, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((1, 2, 5, 8), (1, 2, 5))
    """
    if (
        (mask is None and bias is None and window is None and query_offset is None)
        and (alibi_slopes is None and sinks is None and out is None and backend is None)
        and (kv_starts is None and query_lengths is None and segment_ids is None)
        and (return_lse is False or return_lse is True)
        and (return_weights is False and type(softcap) is float and softcap == 0)
        and (causal is False or causal is True)
        and (dropout_seed is None and type(dropout_p) is float and dropout_p == 0)
        and (type(dropout_offset) is int and dropout_offset == 0)
        and isinstance(layout, str)
        and (layout == "bhsd" or layout == "bshd")
        and not is_traced()
        and not observers.blocks
    ):
        plain = run_plain(query, key, value, causal, scale, layout == "bshd", return_lse, kv_lengths)
        if plain is not None:
            return plain
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "mask": mask,
        "bias": bias,
        "kv_lengths": kv_lengths,
        "kv_starts": kv_starts,
        "query_lengths": query_lengths,
        "segment_ids": segment_ids,
        "query_offset": query_offset,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "softcap": softcap,
        "scale": scale,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "dropout_offset": dropout_offset,
        "layout": layout,
    }
    if is_tensor(query):
        query, key, value, options["bias"] = as_autocast(query, key, value, bias)
    return attend(query, key, value, options, return_lse, return_weights, out, backend)


def attend(
    query: Array,
    key: Array,
    value: Array,
    options: dict[str, Any],
    return_lse: bool,
    return_weights: bool,
    out: Array | None,
    backend: str | None,
) -> Any:
    """Any call of `attention`, in the dtype of its arrays; `options` holds the arguments not named here."""
    names = candidates(backend)
    composer = composing(names)
    if is_tensor(query) and not is_traced() and observers.watching():
        observers.tell(AttentionProblem.from_arguments(query, key, value, **options, composed=True))
    if composer is not None and is_inlined():  # it looks at values, on which no graph may depend
        from fastattn.torch_ops import uncompiled

        return uncompiled.run(attend, query, key, value, options, return_lse, return_weights, out, backend)
    if composer is None and is_tensor(query):
        from fastattn import torch_ops  # registers operators, the first time

        flags: dict[str, Any] = {"return_lse": return_lse, "return_weights": return_weights}
        if is_traced() or torch_ops.is_watched(query, key, value):
            return torch_ops.operator_attention(
                query, key, value, **options, **flags, out=out, backend=backend
            )
        may_differ = (query, key, value, options["bias"], options["alibi_slopes"], options["sinks"])
        if out is None and torch_ops.wants_graph(*may_differ):
            check_flags(return_lse, return_weights)
            return torch_ops.recorded_attention(names, query, key, value, **options, **flags)
    problem = AttentionProblem.from_arguments(query, key, value, **options, composed=composer is not None)
    chosen = choose(problem, names)
    problem = problem.seeded()
    if composer is not None and out is None:
        check_request(problem, return_lse, return_weights)
        return returned(*composer.compose(problem, return_lse, return_weights))
    outputs = prepare_outputs(problem, out, return_lse, return_weights)
    chosen.run(problem, outputs)
    return outputs.returned()
