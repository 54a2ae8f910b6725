"""What flash-attention's functions check of arguments that fastattn calls otherwise, or has not."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

import numpy as np
from torch import Tensor

from fastattn import vectors
from fastattn.arrays import INTEGERS, library_of, type_name
from fastattn.problem import checked_max_seqlens

# FlashAttention-3's arguments that say how to compute, and so change no result here.
_HINTS = frozenset({"num_splits", "pack_gqa", "sm_margin", "scheduler_metadata"})
_REFUSED = {
    "qv": "scores have one product of query and key",
    "q_descale": "queries are float64, float32, bfloat16 or float16",
    "k_descale": "8-bit keys have a scale for each row: fastattn.attention_with_kvcache takes key_scale",
    "v_descale": "8-bit values have a scale for each row: fastattn.attention_with_kvcache takes value_scale",
    "attention_chunk": "fastattn.attention takes segment_ids, which attend within chunks",
    "seqused_q": "give the lengths by cu_seqlens_q",
    "seqused_k": "give the lengths by cu_seqlens_k",
    "cu_seqlens_q": "flash_attn_varlen_func with a block_table takes queries of any lengths",
    "cu_seqlens_k_new": "new keys have one length",
    "max_seqlen_q": "it goes with cu_seqlens_q",
    "rotary_seqlens": "angles are those of the positions in the cache",
}


def check_tensors(**arguments: Any) -> None:
    """Raise TypeError for what is no tensor of torch."""
    for name, given in arguments.items():
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(given).__qualname__}")


def check_flash3(function: str, given: Mapping[str, Any]) -> None:
    """Raise unless what FlashAttention-3 has beyond flash-attention 2 is without effect."""
    for name, argument in given.items():
        if name not in _HINTS and name not in _REFUSED:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        default = argument is None or (name == "attention_chunk" and argument == 0)
        if name in _REFUSED and not default:
            raise NotImplementedError(f"{name} is not supported here: {_REFUSED[name]}")


def check_causal(causal: Any) -> None:
    """Raise TypeError for what is neither a bool nor an integer."""
    if not isinstance(causal, (bool, int, np.bool_)):
        raise TypeError(f"causal must be a bool, got {type_name(causal)}")


def bounds_of(window_size: Any) -> list[int]:
    """Return the two, of a pair or of a tensor of two integers, or raise."""
    expected = "window_size must be two integers (left, right), -1 for no bound"
    try:
        bounds = [index(bound) for bound in window_size]
    except TypeError:
        raise TypeError(f"{expected}, got {window_size!r}") from None
    if len(bounds) != 2:
        raise ValueError(f"{expected}, got {window_size!r}")
    return bounds


def as_integer(name: str, given: Any) -> int:
    """Return what may also be a tensor of one; raise TypeError if it is none."""
    try:
        return index(given)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {given!r}") from None


def check_starts(q: Tensor, cu_seqlens: tuple[Tensor, Tensor], longest: tuple[int, int]) -> None:
    """Raise unless they are what `attention_varlen` takes, of keys in pages; those on a GPU pass."""
    of_keys = cu_seqlens[1]
    total_k = int(of_keys[-1]) if of_keys.is_cpu and of_keys.ndim and len(of_keys) else 0
    checked_max_seqlens(longest, vectors.cu_seqlens(library_of("q", q), cu_seqlens, len(q), total_k))


def check_rows(q: Tensor, k_cache: Tensor, cache_batch_idx: Tensor, *, appends: bool) -> None:
    """Raise unless each sequence has a row of the cache; one of its own, if new keys are written there."""
    library = library_of("q", q)
    rows, _ = vectors.vector("cache_batch_idx", library, cache_batch_idx, INTEGERS, [(len(q),)])
    wrong = np.flatnonzero((rows < 0) | (rows >= len(k_cache)))
    if wrong.size:
        expected, at = f"rows of k_cache, from 0 to {len(k_cache) - 1}", wrong[0]
        raise ValueError(f"cache_batch_idx must hold {expected}, got {rows[at]} for sequence {at}")
    if appends and len(set(rows.tolist())) < rows.size:
        raise ValueError(f"cache_batch_idx must differ where new keys are written, got {rows.tolist()}")


def check_leftpad(q: Tensor, k_cache: Tensor, cache_leftpad: Tensor) -> None:
    """Raise unless each sequence has a number of rows to leave out that the cache has."""
    vectors.counts("cache_leftpad", "k_cache's", library_of("q", q), cache_leftpad, len(q), k_cache.shape[1])
