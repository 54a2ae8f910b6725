"""flash-attention's function for generation: it appends to caches in place, and attends to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.functional import attention
from fastattn.integrations.flash_attn_checks import (
    bounds_of,
    check_flash3,
    check_leftpad,
    check_rows,
    check_tensors,
)
from fastattn.integrations.flash_attn_functions import as_flash_lse, rules_of
from fastattn.kvcache import attention_with_kvcache
from fastattn.tensors import turned

_NEW = ("new_key", "new_value")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    page_table: Tensor | None = None,
    **flash3: Any,
) -> Any:
    """Append new keys and values to caches, and attend to what the caches then hold.

    Parameters
    ----------
    q : tensor, shape (B, Lq, Hq, D)
    k_cache, v_cache : tensors, shape (batches, S, Hkv, D), or (pages, page_size, Hkv, D) with a `block_table`
        Changed in place. Any page size, any strides.
    k, v : tensors, shape (B, Ln, Hkv, D), optional
        Written behind the keys that are there. Both or neither, and with `cache_seqlens`.
    rotary_cos, rotary_sin : tensors, shape (positions, rotary_dim / 2), optional
        Turn new keys by the angles of their positions in the cache, and query ``i`` by those of
        ``cache_seqlens + i``, or of ``cache_seqlens`` where there is neither a causal rule nor a window.
        Only with `k` and `v`. rotary_dim is any even number.
    cache_seqlens : int or tensor of integers, shape (B,), optional
        Keys of each sequence before the call, those before `cache_leftpad` included. Defaults to all.
    cache_batch_idx : tensor of integers, shape (B,), optional
        The row of the cache that sequence ``b`` has. Not with a `block_table`; with new keys, no row twice.
    cache_leftpad : tensor of integers, shape (B,), optional
        Keys before it do not exist. Not with a `block_table`; with `cache_batch_idx`, copies those rows.
    block_table : tensor of integers, shape (B, slots), optional
        Also by the name `page_table`.
    causal, window_size, alibi_slopes, softcap, softmax_scale, learnable_sink
        As of `flash_attn_func`; the last query stands at the last key, new ones counted.
    rotary_interleaved : bool
        Pairs are the columns ``(2i, 2i + 1)``, else ``(i, i + rotary_dim / 2)``.
    num_splits : int
        Without effect.
    return_softmax_lse : bool
        Also return the log-sum-exp, (B, Hq, Lq), +inf where a row may attend to nothing.

    Returns
    -------
    out, or (out, softmax_lse)
        out has shape (B, Lq, Hq, D).

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `fastattn.attention_with_kvcache`: tensors that require grad are refused where gradients are on.
    NotImplementedError
        As `flash_attn_func`.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    check_flash3("flash_attn_with_kvcache", flash3)
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must say where k and v go, got None")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos and rotary_sin go with new keys, got None for k")
    table = _table(block_table, page_table, cache_batch_idx, cache_leftpad)
    if cache_batch_idx is not None:
        if not torch.compiler.is_compiling():
            check_rows(q, k_cache, cache_batch_idx, appends=k is not None)
        table = cache_batch_idx[:, None]  # a page for each sequence
    if table is None and len(k_cache) > len(q):
        k_cache, v_cache = k_cache[: len(q)], v_cache[: len(q)]
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    # Windows as wide as the cache turn no query.
    bounds = [-1 if bound >= capacity else bound for bound in bounds_of(window_size)]
    rules = rules_of(softmax_scale, causal, bounds, softcap, alibi_slopes, learnable_sink)
    update = {"new_key": k, "new_value": v, "cache_seqlens": cache_seqlens, "block_table": table}
    rotary = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_interleaved": rotary_interleaved}
    options: dict[str, Any] = {**update, **rotary, **rules}
    turned_alike = rotary_cos is None or (k is not None and k.shape[1] == q.shape[1])
    if cache_leftpad is None and turned_alike:
        results = attention_with_kvcache(q, k_cache, v_cache, **options, return_lse=return_softmax_lse)
    else:
        results = _append_then_attend(q, k_cache, v_cache, options, rules, cache_leftpad, return_softmax_lse)
    return (results[0], as_flash_lse(results[1])) if return_softmax_lse else results


def _append_then_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    options: dict[str, Any],
    rules: dict[str, Any],
    leftpad: Tensor | None,
    return_lse: bool,
) -> Any:
    """In two calls, where queries turn by other angles than those of their places, or keys start late."""
    start, new_key, table = (options[name] for name in ("cache_seqlens", "new_key", "block_table"))
    no_rows = {name: None if (rows := options[name]) is None else rows[:, :0] for name in _NEW}
    attention_with_kvcache(q[:, :0], k_cache, v_cache, **(options | no_rows))  # checks, and does nothing
    if leftpad is not None and not torch.compiler.is_compiling():
        check_leftpad(q, k_cache, leftpad)
    start = k_cache.shape[1] if start is None else start
    if isinstance(start, int):  # filled, not copied: a CUDA graph would copy from memory of this call
        start = torch.full((), start, device=q.device)
    start = torch.as_tensor(start, device=q.device).expand(len(q))
    lengths = start + (0 if new_key is None else new_key.shape[1])
    turned = q
    if options["rotary_cos"] is not None and options["rotary_sin"] is not None:
        step = int(rules["causal"] or rules["window"] is not None)
        tables = options["rotary_cos"], options["rotary_sin"]
        turned = _turned(q, *tables, start, step, options["rotary_interleaved"])
    attention_with_kvcache(q[:, :0], k_cache, v_cache, **options)  # all but attends
    if leftpad is None:
        pages = {"cache_seqlens": lengths, "block_table": table}
        return attention_with_kvcache(turned, k_cache, v_cache, **pages, **rules, return_lse=return_lse)
    if table is not None:
        rows = table[:, 0].clamp(0, len(k_cache) - 1)  # checked above, but for what a device holds
        k_cache, v_cache = k_cache[rows], v_cache[rows]
    places: dict[str, Any] = {
        "kv_starts": leftpad,
        "kv_lengths": lengths,
        "query_offset": lengths - q.shape[1],
    }
    return attention(turned, k_cache, v_cache, **places, **rules, layout="bshd", return_lse=return_lse)


def _table(
    block_table: Tensor | None,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
) -> Tensor | None:
    """The pages of each sequence, of a cache in pages."""
    if block_table is not None and page_table is not None:
        raise ValueError("block_table and page_table are two names of one argument, got both")
    table = page_table if block_table is None else block_table
    for name, given in {"block_table": table, "cache_batch_idx": cache_batch_idx}.items():
        if given is not None:
            check_tensors(**{name: given})
    if table is not None and table.ndim != 2:
        raise ValueError(f"block_table must have shape (batch, slots), got {tuple(table.shape)}")
    for name, given in {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}.items():
        if table is not None and given is not None:
            raise ValueError(f"{name} must be None where there is a block_table")
    return table


def _turned(q: Tensor, cos: Tensor, sin: Tensor, start: Tensor, step: int, interleaved: bool) -> Tensor:
    """Query ``i`` of each sequence turned by the angles at ``start + step * i``, in float32, rounded once."""
    positions = start[:, None] + step * torch.arange(q.shape[1], device=q.device)
    if positions.is_cpu and positions.numel() and int(positions.max()) >= len(cos):
        raise ValueError(f"rotary_cos has {len(cos)} rows, and the last query is at {int(positions.max())}")
    positions = positions.clamp(0, len(cos) - 1)  # as kernels do with what a device holds
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (table[positions].to(dtype)[:, :, None] for table in (cos, sin))
    width = 2 * cos.shape[-1]
    columns, rest = q[..., :width].to(dtype), q[..., width:]
    return torch.cat([turned(torch, columns, cos, sin, interleaved).to(q.dtype), rest], -1)
