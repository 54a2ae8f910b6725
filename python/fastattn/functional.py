"""The functions a user calls."""

from __future__ import annotations

from typing import Any

from fastattn.arrays import Array
from fastattn.dispatch import candidates, choose, run_plain
from fastattn.outputs import prepare_outputs
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
    query_offset: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Any:
    r"""Exact attention: ``softmax(scale * query @ key.T + bias) @ value`` for every head.

    All arrays are NumPy's or all are torch's, and so are the results. query, key, value and out have one
    dtype: float64, float32, bfloat16 (in NumPy: ``ml_dtypes.bfloat16``) or float16. Strides may be any.

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
        Keys at and past the length do not exist. Moves no diagonal.
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
    layout : {"bhsd", "bshd"}
        "bshd": query, key, value and out have axes (B, L, H, D). mask, bias, lse and weights keep theirs.
    return_lse : bool
        Also return ``log(sum_j exp(score_ij) + exp(sink_h))``, shape (B, Hq, Lq), float32 (or float64).
    return_weights : bool
        Also return the probabilities, shape (B, Hq, Lq, Lk), in query's dtype.
    out : array, shape (B, Hq, Lq, Dv), optional
        Written and returned. Must not share memory with an input.
    backend : {"cpu", "reference"}, optional
        Defaults to ``FASTATTN_BACKEND``, else to the first that can run the call; see `explain`.

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
        For tensors on other devices than the CPU, or that require grad.
    NotImplementedError
        If no backend can run the call; the message holds the reasons of each.
    MemoryError
        If there is no room for results or scratch. Nothing has been written to `out`.

    Notes
    -----
    What is masked, or lies past a length, changes no bit of the output, not even NaN.

    References
    ----------
    .. [1] Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases", 2021.

    Examples
    --------
    >>> import numpy as np, fastattn as fa
    >>> query = key = value = np.ones((1, 2, 5, 8), np.float32)
    >>> out, lse = fa.attention(query, key, value, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((1, 2, 5, 8), (1, 2, 5))
    """
    if (
        (mask is None and bias is None and kv_lengths is None and window is None and query_offset is None)
        and (alibi_slopes is None and sinks is None and out is None and backend is None)
        and (return_lse is False and return_weights is False and type(softcap) is float and softcap == 0)
        and (causal is False or causal is True)
        and isinstance(layout, str)
        and (layout == "bhsd" or layout == "bshd")
    ):
        plain = run_plain(query, key, value, causal, scale, layout == "bshd")
        if plain is not None:
            return plain
    names = candidates(backend)
    problem = AttentionProblem.from_arguments(
        query,
        key,
        value,
        causal=causal,
        window=window,
        mask=mask,
        bias=bias,
        kv_lengths=kv_lengths,
        query_offset=query_offset,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        softcap=softcap,
        scale=scale,
        layout=layout,
    )
    chosen = choose(problem, names)
    outputs = prepare_outputs(problem, out, return_lse, return_weights)
    chosen.run(problem, outputs)
    return outputs.returned()
