"""Attention over caches of keys and values, for generation."""

from __future__ import annotations

from typing import Any

from fastattn import cache_problem, observers
from fastattn.arrays import Array, Strided, is_inlined, is_tensor, is_traced
from fastattn.cache_problem import CacheUpdate
from fastattn.dispatch import candidates, choose_caching, composing, run_cached
from fastattn.outputs import check_flags, overlap, prepare_outputs
from fastattn.problem import Layout, Window


def attention_with_kvcache(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    *,
    new_key: Array | None = None,
    new_value: Array | None = None,
    cache_seqlens: Any = None,
    block_table: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = False,
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    causal: bool = True,
    window: Window | None = None,
    rolling: bool = False,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
    layout: Layout = "bshd",
    return_lse: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Any:
    r"""Append keys and values to caches, in place, and attend to what the caches then hold.

    Each sequence has its own length: with ``n`` keys in its cache before the call and Ln new ones, they go to
    the positions ``n .. n + Ln - 1``, and query ``i`` stands at the position ``n + Ln - Lq + i``. All
    arrays are NumPy's or all are torch's. A call computes no gradients.

    Parameters
    ----------
    query : array, shape (B, Lq, Hq, D)
        float64, float32, bfloat16 or float16.
    key_cache : array, shape (B, S, Hkv, D), or (pages, page_size, Hkv, D) with a `block_table`
        Of query's dtype, or int8, float8_e4m3fn or float8_e5m2 with scales. Strides may be any, so keys and
        values may lie in one array. The page size may be any.
    value_cache : array, shape (B, S, Hkv, Dv) or (pages, page_size, Hkv, Dv)
        Of key_cache's dtype.
    new_key, new_value : arrays, shapes (B, Ln, Hkv, D) and (B, Ln, Hkv, Dv), optional
        Of query's dtype; written to the caches before queries attend. Both or neither.
    cache_seqlens : int or (B,) integers, optional
        How many keys each sequence has before the call. Defaults to 0 with new keys, else to all there is
        room for. The caller's own count is not changed.
    block_table : (B, slots) integers, optional
        Position ``p`` of sequence ``b`` is row ``p % page_size`` of page
        ``block_table[b, p // page_size]`` [1]_. What stands beyond the length is never looked at.
    rotary_cos, rotary_sin : arrays, shape (positions, rotary_dim / 2), optional
        Of query's dtype or float32. The first rotary_dim columns of new keys, before they are written, and of
        queries turn by the angles at their positions [2]_, in float32 (float64 for float64 inputs), rounded
        once. Where there is neither a causal rule nor a window all queries turn as the first.
    rotary_interleaved : bool
        Pairs are the columns ``(2i, 2i + 1)``, else ``(i, i + rotary_dim / 2)``.
    key_scale, value_scale : float32 arrays, shape (B, S, Hkv) or (pages, page_size, Hkv), optional
        What multiplies each row of 8-bit numbers; goes with those caches alone. Appending writes
        ``max(abs(row)) / largest``, largest being 127, 448 (e4m3fn) or 57344 (e5m2), and ``row / scale``
        rounded to nearest even. A row that is not finite gets a scale of NaN: what attends to it is NaN.
    causal : bool
        Query ``i`` attends to keys up to its position.
    window : (left, right), optional
        Query ``i`` attends to keys from its position minus left to its position plus right; None is no bound.
    rolling : bool
        The cache is a ring: position ``p`` is at row ``p % S`` (S is slots * page_size with pages), and
        lengths may pass S. Needs a left bound of `window`, and ``S >= left + Lq``.
    alibi_slopes : (Hq,) or (B, Hq) floats, optional
        Subtracts ``slope * abs(position of query - position of key)`` from the scores.
    sinks : (Hq,) floats, optional
        One more logit for each row of a head, without a value; -inf is none.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)``; 0 is none.
    scale : float, optional
        Defaults to ``1 / sqrt(D)``.
    layout : {"bshd", "bhsd"}
        "bhsd": axes 1 and 2 of query, new rows, caches, scales and out are exchanged: (B, Hq, Lq, D),
        (B, Hkv, S, D), (pages, Hkv, page_size, D), (pages, Hkv, page_size).
    return_lse : bool
        Also return ``log(sum_j exp(score_ij) + exp(sink_h))``, shape (B, Hq, Lq), float32 (or float64).
    out : array, shape (B, Lq, Hq, Dv), optional
        Written and returned. Must not share memory with another argument.
    backend : {"cpu", "triton", "reference", "math"}, optional
        As for `attention`. "math" takes tensors of any device.

    Returns
    -------
    out, or (out, lse)

    Raises
    ------
    TypeError
        For a wrong type or dtype, and NumPy mixed with torch.
    ValueError
        For shapes that do not fit, lengths that the caches have no room for, pages that are not there (with
        sequence, slot and page), two new rows for one place, positions that the rotary tables do not have,
        and for memory that is written and shared with another argument.
    RuntimeError
        Where a tensor requires grad and gradients are on.
    NotImplementedError
        If no backend can run the call.

    Whatever is raised, the caches are as they were.

    Notes
    -----
    Lengths and pages that lie on a GPU are not waited for, and not checked unless ``FASTATTN_DEBUG=1``.

    References
    ----------
    .. [1] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
       2023.
    .. [2] Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Examples
    --------
    >>> import numpy as np, fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> keys, values = np.zeros((2, 1, 64, 2, 8), np.float32)
    >>> prompt = rng.standard_normal((3, 1, 5, 2, 8), np.float32)
    >>> query, key, value = prompt
    >>> fa.attention_with_kvcache(query, keys, values, new_key=key, new_value=value).shape
    (1, 5, 2, 8)
    >>> token = query[:, :1]
    >>> fa.attention_with_kvcache(token, keys, values, new_key=token, new_value=token, cache_seqlens=5).shape
    (1, 1, 2, 8)
    """
    if (
        (out is None and backend is None and (return_lse is False or return_lse is True))
        and (type(causal) is type(rolling) is type(rotary_interleaved) is bool)
        and isinstance(layout, str)
        and (layout == "bshd" or layout == "bhsd")
        and not is_traced()
        and not observers.blocks
    ):
        rules = (causal, window, rolling, alibi_slopes, sinks, softcap, scale, layout == "bshd", return_lse)
        rotary = (rotary_cos, rotary_sin, rotary_interleaved)
        caches = (key_cache, value_cache, key_scale, value_scale, new_key, new_value)
        plain = run_cached(query, *caches, cache_seqlens, block_table, *rotary, *rules)
        if plain is not None:
            return plain
    options: dict[str, Any] = {
        "new_key": new_key,
        "new_value": new_value,
        "cache_seqlens": cache_seqlens,
        "block_table": block_table,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "key_scale": key_scale,
        "value_scale": value_scale,
        "causal": causal,
        "window": window,
        "rolling": rolling,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "softcap": softcap,
        "scale": scale,
        "layout": layout,
    }
    return attend(query, key_cache, value_cache, options, return_lse, out, backend)


def attend(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    options: dict[str, Any],
    return_lse: bool,
    out: Array | None,
    backend: str | None,
) -> Any:
    """Any call of `attention_with_kvcache`; `options` holds the arguments not named here."""
    names = candidates(backend)
    composed = composing(names) is not None
    if composed and is_inlined():  # it looks at values, on which no graph may depend
        from fastattn.torch_ops import uncompiled

        return uncompiled.run(attend, query, key_cache, value_cache, options, return_lse, out, backend)
    if is_tensor(query):
        from fastattn import torch_ops  # registers operators, the first time

        others = {name: options[name] for name in ("new_key", "new_value", "alibi_slopes", "sinks")}
        torch_ops.refuse_graph(query=query, key_cache=key_cache, value_cache=value_cache, **others, out=out)
        if not composed and (is_traced() or torch_ops.is_watched(query, key_cache, value_cache)):
            check_flags(return_lse, False)
            return torch_ops.operator_with_kvcache(
                query, key_cache, value_cache, options, return_lse, out, backend
            )
    problem, update = cache_problem.from_arguments(
        query, key_cache, value_cache, **options, composed=composed
    )
    chosen = choose_caching(problem, names)
    outputs = prepare_outputs(problem, out, return_lse, False)
    if out is not None:
        check_out(outputs.out, update)
    problem = chosen.update_cache(problem, update)
    chosen.run(problem, outputs)
    if is_tensor(query) and observers.watching():
        observers.tell(problem)
    return outputs.returned()


def check_out(out: Strided, update: CacheUpdate) -> None:
    """Raise ValueError where `out` shares memory with what is read before it is written."""
    read = {"new_key": update.new_key, "new_value": update.new_value}
    if update.rotary is not None:
        read |= {"rotary_cos": update.rotary.cos, "rotary_sin": update.rotary.sin}
    for name, view in read.items():
        if view is not None and overlap(out, view):
            raise ValueError(f"out must not overlap {name}: they share memory")
