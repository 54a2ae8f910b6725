"""Attention within each of many sequences of any length that lie one behind the other."""

from __future__ import annotations

from typing import Any

from fastattn.arrays import Array, as_autocast, is_tensor, type_name
from fastattn.functional import attend
from fastattn.problem import Causal, Window


def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: Causal = False,
    window: Window | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    return_lse: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Any:
    r"""Exact attention within each of B sequences, whose tokens lie one behind the other without padding.

    Sequence ``b`` has the rows from ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of query, and those from
    ``cu_seqlens_k[b]`` to ``cu_seqlens_k[b + 1]`` of key and value; either may be none. For each, this is
    `attention` with a batch of 1, on the CPU bit for bit. Sequences of all lengths are computed side by side,
    those with most work first.

    Parameters
    ----------
    query : array, shape (total_q, Hq, D)
        NumPy's or torch's, as of `attention`; one dtype for query, key, value and out.
    key : array, shape (total_k, Hkv, D)
    value : array, shape (total_k, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : (B + 1,) integers
        Where sequences start, and the last one ends: from 0, never falling, to total_q and total_k.
    max_seqlen_q, max_seqlen_k : int, optional
        At least the length of the longest sequence. No kernel needs them.
    causal, window
        As of `attention`, with the offset of each sequence: its ``Lk - Lq``, or 0 for "top_left".
    alibi_slopes : (Hq,) or (B, Hq) floats, optional
    sinks : (Hq,) floats, optional
    softcap, scale, dropout_p, dropout_seed, dropout_offset, backend
        As of `attention`. Dropout counts heads as it does in a batch of B: with one seed, the same
        probabilities fall out of sequences that are padded to one length.
    return_lse : bool
        Also return the log-sum-exp, shape (Hq, total_q), float32 (or float64).
    out : array, shape (total_q, Hq, Dv), optional
        Written and returned. Must not share memory with an input.

    Returns
    -------
    out, or (out, lse)
        A row that may attend to nothing has out 0 and its sink, or -inf, for lse.

    Raises
    ------
    TypeError, RuntimeError, NotImplementedError, MemoryError
        As of `attention`.
    ValueError
        As of `attention`, and for cu_seqlens that do not start at 0, that fall, or that do not end with the
        number of rows. Those on a GPU are not looked at unless ``FASTATTN_DEBUG=1``; kernels stay in bounds.

    Notes
    -----
    Tensors that require grad get a graph; ``torch.autocast`` casts query, key and value.

    Examples
    --------
    >>> import numpy as np, fastattn as fa
    >>> query = key = value = np.ones((7, 2, 8), np.float32)
    >>> fa.attention_varlen(query, key, value, [0, 3, 7], [0, 3, 7], causal=True).shape
    (7, 2, 8)
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "mask": None,
        "bias": None,
        "kv_lengths": None,
        "query_offset": None,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "softcap": softcap,
        "scale": scale,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "dropout_offset": dropout_offset,
        "layout": "bshd",
        "cu_seqlens": (cu_seqlens_q, cu_seqlens_k),
        "max_seqlens": (max_seqlen_q, max_seqlen_k),
    }
    if is_tensor(query):
        query, key, value, _ = as_autocast(query, key, value, None)
    query, key, value = _as_batch("query", query), _as_batch("key", key), _as_batch("value", value)
    written = None if out is None else _as_batch("out", out)
    results = attend(query, key, value, options, return_lse, False, written, backend)
    if not return_lse:
        return results[0] if out is None else out
    return results[0][0] if out is None else out, results[1][0]


def _as_batch(name: str, rows: Array) -> Array:
    """(total, H, D) as (1, total, H, D)."""
    if not hasattr(rows, "ndim"):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type_name(rows)}")
    if rows.ndim != 3:
        raise ValueError(f"{name} must have 3 axes (rows, heads, dim), got {rows.ndim}")
    return rows[None]
