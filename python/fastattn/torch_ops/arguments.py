"""The arguments of `fastattn.attention` as operators of torch take them: tensors first, then the rules."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastattn.arrays import type_name
from fastattn.problem import Layout, check_causal, check_dropout_p, check_real, check_softcap, check_word
from fastattn.vectors import check_segment_pair, is_integer

_UINT64 = 2**64


class Operands(NamedTuple):
    """Tensors besides query, key and value."""

    mask: Tensor | None
    bias: Tensor | None
    kv_lengths: Tensor | None
    query_offsets: Tensor | None  # one for each sequence
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    drawn_seed: Tensor | None  # of dropout, or given as a tensor; (), int64
    kv_starts: Tensor | None
    query_lengths: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None


class Rules(NamedTuple):
    """What is no tensor. Integers may be symbols in a trace."""

    causal: str  # "", "bottom_right" or "top_left"
    window_left: int | None
    window_right: int | None
    query_offset: int | None  # one for all sequences
    softcap: float
    scale: float | None
    dropout_p: float
    dropout_seed: int | None  # 64 bits, as a signed number
    dropout_offset: int
    layout: Layout
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    backend: str | None


OPERANDS = ", ".join(f"Tensor? {name}" for name in Operands._fields)
RULES = (
    "str causal, SymInt? window_left, SymInt? window_right, SymInt? query_offset, float softcap, "
    "float? scale, float dropout_p, SymInt? dropout_seed, SymInt dropout_offset, str layout, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, str? backend"
)


def flatten(
    query: Tensor,
    *,
    causal: Any,
    window: Any,
    mask: Any,
    bias: Any,
    kv_lengths: Any,
    query_offset: Any,
    alibi_slopes: Any,
    sinks: Any,
    softcap: Any,
    scale: Any,
    dropout_p: Any,
    dropout_seed: Any,
    dropout_offset: Any,
    layout: Any,
    backend: str | None,
    kv_starts: Any = None,
    query_lengths: Any = None,
    segment_ids: Any = None,
    cu_seqlens: Any = None,
    max_seqlens: Any = (None, None),
) -> tuple[Operands, Rules]:
    """Bring the arguments of `fastattn.attention` into a form that has a schema; traces go through this."""
    check_causal(causal)
    left, right = window_bounds(window)
    offset = _plain_integer(query_offset) if is_whole(query_offset) else None
    offsets = as_table("query_offset", query_offset) if offset is None else None
    dropout_p = check_dropout_p(dropout_p)
    drawn = None
    if isinstance(dropout_seed, Tensor):
        drawn, dropout_seed = dropout_seed, None
    elif dropout_seed is not None:
        dropout_seed = _word("dropout_seed", dropout_seed, 64)
        if dropout_seed >= _UINT64 // 2:
            dropout_seed -= _UINT64
    elif dropout_p > 0:
        drawn = torch.randint(2**63 - 1, (), device=query.device)
    check_segment_pair(segment_ids)
    of_query, of_key = (None, None) if segment_ids is None else segment_ids
    starts_q, starts_k = (None, None) if cu_seqlens is None else cu_seqlens
    operands = Operands(
        as_tensor("mask", mask),
        as_tensor("bias", bias),
        as_table("kv_lengths", kv_lengths),
        offsets,
        as_table("alibi_slopes", alibi_slopes),
        as_table("sinks", sinks),
        drawn,
        as_table("kv_starts", kv_starts),
        as_table("query_lengths", query_lengths),
        as_table("segment_ids[0]", of_query),
        as_table("segment_ids[1]", of_key),
        as_table("cu_seqlens_q", starts_q),
        as_table("cu_seqlens_k", starts_k),
    )
    rules = Rules(
        causal if isinstance(causal, str) else "bottom_right" if causal else "",
        left,
        right,
        offset,
        check_softcap(softcap),
        None if scale is None else check_real("scale", scale),
        dropout_p,
        dropout_seed,
        _word("dropout_offset", dropout_offset, 32),
        layout,
        _plain_integer(max_seqlens[0]),
        _plain_integer(max_seqlens[1]),
        backend,
    )
    return operands, rules


def options_of(operands: Operands, rules: Rules) -> dict[str, Any]:
    """The keyword arguments of `AttentionProblem.from_arguments`, back again."""
    seed: Any = None if rules.dropout_seed is None else rules.dropout_seed % _UINT64
    if operands.drawn_seed is not None:
        seed = operands.drawn_seed
    window = (rules.window_left, rules.window_right)
    return {
        "causal": rules.causal or False,
        "window": None if window == (None, None) else window,
        "mask": operands.mask,
        "bias": operands.bias,
        "kv_lengths": operands.kv_lengths,
        "query_offset": rules.query_offset if operands.query_offsets is None else operands.query_offsets,
        "alibi_slopes": operands.alibi_slopes,
        "sinks": operands.sinks,
        "softcap": rules.softcap,
        "scale": rules.scale,
        "dropout_p": rules.dropout_p,
        "dropout_seed": seed,
        "dropout_offset": rules.dropout_offset,
        "layout": rules.layout,
        "kv_starts": operands.kv_starts,
        "query_lengths": operands.query_lengths,
        "segment_ids": _pair(operands.query_segments, operands.key_segments),
        "cu_seqlens": _pair(operands.cu_seqlens_q, operands.cu_seqlens_k),
        "max_seqlens": (rules.max_seqlen_q, rules.max_seqlen_k),
    }


def _pair(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if first is None or second is None else (first, second)


def is_whole(value: Any) -> bool:
    """Whether it is an integer, or the symbol of one."""
    return is_integer(value) or isinstance(value, torch.SymInt)


def _plain_integer(value: Any) -> Any:
    return int(value) if isinstance(value, np.integer) else value


def window_bounds(window: Any) -> tuple[Any, Any]:
    """(left, right); None is no bound."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window must be a pair (left, right), got {type_name(window)}")
    if len(window) != 2:
        raise ValueError(f"window must be a pair (left, right), got {len(window)} elements")
    for bound in window:
        if bound is not None and not is_whole(bound):
            raise TypeError(f"window must hold integers or None, got {type_name(bound)}")
    left, right = map(_plain_integer, window)
    return left, right  # their range is checked when the operator runs


def _word(name: str, value: Any, bits: int) -> Any:
    return value if isinstance(value, torch.SymInt) else check_word(name, value, bits)


def as_tensor(name: str, value: Any) -> Tensor | None:
    """The argument, if it is a tensor or None; else raise TypeError."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch tensor like the first argument, got {type_name(value)}")
    return value


def as_table(name: str, value: Any) -> Tensor | None:
    """A short argument: a tensor, or numbers that become one; they are checked when they are read."""
    if isinstance(value, (tuple, list)):
        return torch.tensor(value, dtype=_wide(value), device="cpu")
    return as_tensor(name, value)


def _wide(values: Any) -> torch.dtype | None:
    """float64 for floats: rounded to float32 they would be other numbers than those that were given.

    int64 where there are no numbers.
    """
    flat = values[0] if values and isinstance(values[0], (tuple, list)) else values
    if not flat:
        return torch.int64
    return torch.float64 if any(isinstance(value, float) for value in flat) else None
