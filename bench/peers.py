"""Who is measured: each peer turns a case and its tensors into a call without arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastattn
from tests.shapes import Case

Call = Callable[[], torch.Tensor]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _fastattn(case: Case, tensors: Tensors) -> Call:
    query, key, value = tensors
    return lambda: fastattn.attention(query, key, value, causal=case.causal)


def _torch(case: Case, tensors: Tensors) -> Call:
    query, key, value = tensors
    # torch aligns is_causal at the top left: with fewer queries than keys it takes a mask to say the other.
    mask = None
    causal = bool(case.causal) and case.seqlen_q > 1
    if causal and case.seqlen_q != case.seqlen_k:
        causal, mask = False, visible(case)
    grouped = case.query_heads != case.kv_heads
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def visible(case: Case) -> torch.Tensor:
    """(Lq, Lk) bool: which keys the causal rule, aligned at the bottom right, leaves to each query."""
    ones = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    return ones.tril(case.seqlen_k - case.seqlen_q)


PEERS: dict[str, Callable[[Case, Tensors], Call]] = {"fastattn": _fastattn, "torch": _torch}
