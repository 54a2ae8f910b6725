"""The functions of flash-attention that have gradients: its signatures and its meaning, computed here.

What is not said of an argument is as in `fastattn.attention`. ``docs/migrating-from-flash-attn.md`` has the
whole table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.functional import attention
from fastattn.integrations.flash_attn_checks import (
    as_integer,
    bounds_of,
    check_causal,
    check_flash3,
    check_starts,
    check_tensors,
)
from fastattn.kvcache import attention_with_kvcache
from fastattn.varlen import attention_varlen


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    **flash3: Any,
) -> Any:
    """Attention of tensors with axes (batch, rows, heads, dim) [1]_ [2]_.

    Parameters
    ----------
    q : tensor, shape (B, Lq, Hq, D)
        float64, float32, bfloat16 or float16, on the CPU or a GPU, with any strides; D is any number.
    k : tensor, shape (B, Lk, Hkv, D)
    v : tensor, shape (B, Lk, Hkv, Dv)
    dropout_p : float
        Draws a seed from torch's generator of the device (with `return_attn_probs`, from that of the CPU):
        repeatable after ``torch.manual_seed``, but not the probabilities that flash-attention drops.
    softmax_scale : float, optional
        Defaults to ``1 / sqrt(D)``.
    causal : bool
        The last query attends to all keys, each before it to one less.
    window_size : (left, right)
        Keys that a query sees before and behind its place on the diagonal; negative is no bound.
    softcap : float
        0 is none. Goes with dropout, too.
    alibi_slopes : tensor, shape (Hq,) or (B, Hq), optional
    deterministic : bool
        Without effect: gradients are the same in every run.
    return_attn_probs : bool
        Also return lse and the probabilities.
    learnable_sink : tensor, shape (Hq,), optional
        As `sinks` of `fastattn.attention`.
    **flash3
        FlashAttention-3's. ``num_splits``, ``pack_gqa``, ``sm_margin`` and ``scheduler_metadata`` have no
        effect; others have to be left at their defaults.

    Returns
    -------
    out, or (out, softmax_lse, S_dmask)
        out has shape (B, Lq, Hq, Dv). softmax_lse, (B, Hq, Lq) in float32 (or float64), is +inf where a row
        may attend to nothing. S_dmask has no elements without dropout, else it is (B, Hq, Lq, Lk): the
        probabilities before dropout, with a minus sign on those that fall out, and without a graph.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `fastattn.attention`.
    NotImplementedError
        For an argument of FlashAttention-3 that would change the result.

    References
    ----------
    .. [1] Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
    .. [2] Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision",
       2024.
    """
    check_tensors(q=q, k=k, v=v)
    check_flash3("flash_attn_func", flash3)
    rules = rules_of(softmax_scale, causal, window_size, softcap, alibi_slopes, learnable_sink)
    rules["layout"] = "bshd"
    if not return_attn_probs:
        return attention(q, k, v, dropout_p=dropout_p, **rules)
    seed = _seed(dropout_p)
    out, lse = attention(q, k, v, dropout_p=dropout_p, dropout_seed=seed, return_lse=True, **rules)
    return out, as_flash_lse(lse), _signed_probabilities((q, k, v), dropout_p, seed, rules)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Any:
    """`flash_attn_func` of keys and values in one tensor, (B, Lk, 2, Hkv, D); its gradient is one tensor."""
    k, v = _unpacked("kv", kv, 5, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *options, return_attn_probs, **more)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    **more: Any,
) -> Any:
    """`flash_attn_func` of queries, keys and values in one tensor; its gradient is one tensor.

    ``qkv`` has shape (B, L, 3, H, D), or, with FlashAttention-3's `num_heads_q`, (B, L, Hq + 2 Hkv, D): the
    heads of queries, then those of keys, then those of values.
    """
    if num_heads_q is None:
        q, k, v = _unpacked("qkv", qkv, 5, 3)
    else:
        check_tensors(qkv=qkv)
        kv_heads, odd = divmod(qkv.shape[2] - num_heads_q, 2) if qkv.ndim == 4 else (0, 0)
        if odd or kv_heads < 1:
            expected = f"(batch, rows, {num_heads_q} + 2 kv_heads, dim) where num_heads_q is {num_heads_q}"
            raise ValueError(f"qkv must have shape {expected}, got {tuple(qkv.shape)}")
        q, k, v = torch.split(qkv, [num_heads_q, kv_heads, kv_heads], dim=-2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *options, return_attn_probs, **more)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    learnable_sink: Tensor | None = None,
    **flash3: Any,
) -> Any:
    """Attention within each of B sequences whose rows lie one behind the other.

    Parameters
    ----------
    q : tensor, shape (total_q, Hq, D)
    k, v : tensors, shapes (total_k, Hkv, D) and (total_k, Hkv, Dv)
        With a `block_table` (pages, page_size, Hkv, D) and (pages, page_size, Hkv, Dv); any page size.
    cu_seqlens_q, cu_seqlens_k : tensors of integers, shape (B + 1,)
        Where sequences begin, and the last one ends.
    max_seqlen_q, max_seqlen_k : int
        At least the longest sequence's.
    block_table : tensor of integers, shape (B, slots), optional
        Position ``p`` of sequence ``b`` is row ``p % page_size`` of page ``block_table[b, p // page_size]``.
        Where all sequences have as many queries, and there is neither a graph nor dropout, pages are read
        where they lie; else keys and values are gathered first.

    Other arguments are those of `flash_attn_func`.

    Returns
    -------
    out, or (out, softmax_lse, S_dmask)
        out has shape (total_q, Hq, Dv), softmax_lse (Hq, total_q). S_dmask, as of `flash_attn_func`, is
        (B, Hq, max_seqlen_q, max_seqlen_k), with 0 where there is no query or no key.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `fastattn.attention_varlen`, and `fastattn.attention_with_kvcache` for pages.
    NotImplementedError
        As `flash_attn_func`.
    """
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_flash3("flash_attn_varlen_func", flash3)
    rules = rules_of(softmax_scale, causal, window_size, softcap, alibi_slopes, learnable_sink)
    longest = as_integer("max_seqlen_q", max_seqlen_q), as_integer("max_seqlen_k", max_seqlen_k)
    if block_table is not None:
        check_tensors(block_table=block_table)
        check_starts(q, (cu_seqlens_q, cu_seqlens_k), longest)
        differing = (q, k, v, alibi_slopes, learnable_sink)
        plain = not dropout_p and not (torch.is_grad_enabled() and any(map(_differs, differing)))
        if plain and _of_one_length(q, cu_seqlens_q, longest[0]):
            out, lse = _paged(q, k, v, cu_seqlens_k.diff(), block_table, longest[0], rules)
            return (out, as_flash_lse(lse), q.new_empty(0)) if return_attn_probs else out
        k, v = _gathered(q, k, v, cu_seqlens_k.diff(), block_table)
    rows = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    options: dict[str, Any] = {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1], **rules}
    if not return_attn_probs:
        return attention_varlen(*rows, dropout_p=dropout_p, **options)
    seed = _seed(dropout_p)
    out, lse = attention_varlen(*rows, dropout_p=dropout_p, dropout_seed=seed, return_lse=True, **options)
    if not dropout_p:
        return out, as_flash_lse(lse), q.new_empty(0)
    padded = (_padded(q, cu_seqlens_q, longest[0]), *(_padded(x, cu_seqlens_k, longest[1]) for x in (k, v)))
    lengths = {"query_lengths": cu_seqlens_q.diff(), "kv_lengths": cu_seqlens_k.diff()}
    offset = lengths["kv_lengths"] - lengths["query_lengths"]
    rules |= {"query_offset": offset, **lengths, "layout": "bshd"}
    return out, as_flash_lse(lse), _signed_probabilities(padded, dropout_p, seed, rules)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Any:
    """`flash_attn_varlen_func` of keys and values in one tensor, (total_k, 2, Hkv, D)."""
    k, v = _unpacked("kv", kv, 4, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    rows = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_func(*rows, *options, return_attn_probs, **more)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Any:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor, (total, 3, H, D)."""
    q, k, v = _unpacked("qkv", qkv, 4, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    rows = (q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(*rows, *options, return_attn_probs, **more)


def rules_of(
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
) -> dict[str, Any]:
    """The arguments of `fastattn.attention` and its like that say which scores count, and how much."""
    check_causal(causal)
    left, right = (None if bound < 0 else bound for bound in bounds_of(window_size))
    return {
        "causal": bool(causal),
        "window": None if left is right is None else (left, right),
        "alibi_slopes": alibi_slopes,
        "sinks": learnable_sink,
        "softcap": softcap,
        "scale": softmax_scale,
    }


def as_flash_lse(lse: Tensor) -> Tensor:
    """flash-attention says +inf of rows that may attend to nothing, fastattn -inf."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def _unpacked(name: str, packed: Tensor, axes: int, count: int) -> tuple[Tensor, ...]:
    check_tensors(**{name: packed})
    if packed.ndim != axes or packed.shape[-3] != count:
        leading = "batch, rows" if axes == 5 else "rows"
        raise ValueError(
            f"{name} must have shape ({leading}, {count}, heads, dim), got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def _seed(dropout_p: float) -> int | None:
    """What a call and its probabilities have in common."""
    return int(torch.randint(2**63 - 1, ())) if dropout_p else None


def _signed_probabilities(
    rows: tuple[Tensor, ...], dropout_p: float, seed: int | None, rules: dict[str, Any]
) -> Tensor:
    """(B, Hq, Lq, Lk): the probabilities, negative where they fall out; nothing where nothing does."""
    if not dropout_p:
        return rows[0].new_empty(0)
    with torch.no_grad():
        _, kept = attention(*rows, dropout_p=dropout_p, dropout_seed=seed, return_weights=True, **rules)
        _, weights = attention(*rows, return_weights=True, **rules)
    return torch.where((kept == 0) & (weights > 0), -weights, weights)


def _padded(rows: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """(total, H, D) as (B, longest, H, D), with zeros behind each sequence."""
    there = torch.arange(longest, device=rows.device) < cu_seqlens.to(rows.device).diff()[:, None]
    padded = rows.new_zeros(*there.shape, *rows.shape[1:])
    padded[there] = rows.detach()
    return padded


def _differs(given: Tensor | None) -> bool:
    return given is not None and given.requires_grad


def _of_one_length(q: Tensor, cu_seqlens: Tensor, length: int) -> bool:
    """Whether each sequence has `length` queries; on a GPU, whose values are not waited for, by their sum."""
    batch = len(cu_seqlens) - 1
    if len(q) != batch * length or not length:
        return False
    return not cu_seqlens.is_cpu or bool((cu_seqlens.diff() == length).all())


def _paged(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor, queries: int, rules: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Sequences of one number of queries are a batch over a cache."""
    batch = q.reshape(len(lengths), queries, *q.shape[1:])
    pages: dict[str, Any] = {"cache_seqlens": lengths, "block_table": table}
    out, lse = attention_with_kvcache(batch, k, v, **pages, return_lse=True, **rules)
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


def _gathered(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of pages as rows of one sequence behind those of another."""
    none = q.detach().new_empty(
        len(lengths), 0, *q.shape[1:]
    )  # looks at lengths and pages, and computes nothing
    attention_with_kvcache(none, k.detach(), v.detach(), cache_seqlens=lengths, block_table=table)
    positions = torch.arange(table.shape[1] * k.shape[1], device=table.device)
    sequence, position = torch.nonzero(positions < lengths[:, None].to(table.device), as_tuple=True)
    page, row = table[sequence, position // k.shape[1]], position % k.shape[1]
    return k[page, row], v[page, row]
