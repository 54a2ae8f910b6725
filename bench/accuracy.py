"""Whether an output is right: the float64 answer, and how far from it a dtype may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.peers import Tensors, visible
from tests.shapes import Case

# Of max|v|, for everything that is computed in float32; the tests hold each shape to tighter bounds.
_FLOAT32 = 2e-6
# Mantissa bits and smallest exponent of the half precisions, and what we round P by.
_HALVES = {"bfloat16": (7, -126, 2.0**-8), "float16": (10, -14, 0.0)}
# Peers promise nothing; twice the bound with P rounded to any half precision still finds a wrong call.
_PEER_SLACK, _PEER_ROUNDING = 2.0, 2.0**-8


@dataclass(frozen=True)
class Truth:
    """The float64 answer to a case, and the largest errors allowed to each element."""

    out: torch.Tensor
    bound: torch.Tensor  # of fastattn
    peer_bound: torch.Tensor

    def error(self, out: torch.Tensor) -> float:
        return float((out.double() - self.out).abs().max())

    def accepts(self, out: torch.Tensor, peer: str) -> bool:
        bound = self.bound if peer == "fastattn" else self.peer_bound
        return bool(((out.double() - self.out).abs() <= bound).all())  # and no NaN


def truth(case: Case, dtype: str, tensors: Tensors) -> Truth:
    """Plain attention in float64, a head at a time."""
    query, key, value = (tensor.double() for tensor in tensors)
    mask = visible(case) if case.causal else None
    group = case.query_heads // case.kv_heads
    out = torch.empty(*query.shape[:3], case.value_dim, dtype=torch.float64)
    spread = torch.empty_like(
        out
    )  # sum_j p_ij |v_j|: what rounding P costs at most, in units of its rounding
    for batch in range(case.batch):
        for head in range(case.query_heads):
            kv_head = head // group
            scores = query[batch, head] @ key[batch, kv_head].T / case.head_dim**0.5
            if mask is not None:
                scores.masked_fill_(~mask, float("-inf"))
            weights = scores.softmax(-1)
            out[batch, head] = weights @ value[batch, kv_head]
            spread[batch, head] = weights @ value[batch, kv_head].abs()
    largest = float(value.abs().max())
    if dtype == "float64":
        bound = torch.full_like(out, 1e-13 * max(1.0, largest))
        return Truth(out, bound, _PEER_SLACK * bound)
    bound = torch.full_like(out, _FLOAT32 * largest)
    peer_bound = _PEER_SLACK * bound
    if dtype in _HALVES:
        bits, smallest, rounding = _HALVES[dtype]
        exponent = torch.frexp(out).exponent.clamp(min=smallest + 1) - 1
        bound += 0.5 * torch.ldexp(torch.ones_like(out), exponent - bits) + rounding * spread
        peer_bound = _PEER_SLACK * (bound + _PEER_ROUNDING * spread)
    return Truth(out, bound, peer_bound)
