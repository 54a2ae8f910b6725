"""What is right: attention composed of plain operations of torch, in float64 on the device.

`attend` takes every argument, keeps every score, and is differentiated by torch. `Heads` takes long sequences
under plain rules, some heads of them, with a backward written out. They share nothing with the kernels, and
with `fastattn.reference` the random numbers of dropout alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.shapes import Case

INF = float("inf")
ROWS_AT_ONCE = 1 << 27  # elements of the matrix of scores: 1 GiB of float64


class Result(NamedTuple):
    """Of one call, in `dtype` throughout."""

    out: Tensor  # (B, Hq, Lq, Dv)
    lse: Tensor  # (B, Hq, Lq)
    weights: Tensor  # (B, Hq, Lq, Lk), after dropout


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    query_offset: Tensor | int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """The arguments of `fastattn.attention` on tensors (B, H, L, D), differentiable in all of floats."""
    group = query.shape[1] // key.shape[1]
    device, shape = query.device, (*query.shape[:3], key.shape[2])
    if query_offset is None:
        query_offset = 0 if causal == "top_left" else shape[3] - shape[2]
    offset = torch.as_tensor(query_offset, device=device).reshape(-1, 1, 1, 1)
    query_at = offset + torch.arange(shape[2], device=device)[:, None]
    key_at = torch.arange(shape[3], device=device)

    scores = query.to(dtype) @ key.to(dtype).repeat_interleave(group, 1).mT
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + torch.where(bias == -INF, 0, bias).to(dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype)[..., None, None]  # (Hq, 1, 1) or (B, Hq, 1, 1)
        scores = scores - slopes * (query_at - key_at).abs()

    left, right = window or (None, None)
    visible = _visible(query_at, key_at, left, 0 if causal else right)
    if kv_lengths is not None:
        visible = visible & (key_at < kv_lengths.to(device)[:, None, None, None])
    if kv_starts is not None:
        visible = visible & (key_at >= kv_starts.to(device)[:, None, None, None])
    if query_lengths is not None:
        row = torch.arange(shape[2], device=device)[:, None]
        visible = visible & (row < query_lengths.to(device)[:, None, None, None])
    if segment_ids is not None:
        of_query, of_key = segment_ids
        visible = visible & (of_query[:, None, :, None] == of_key[:, None, None, :])
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & (bias != -INF)
    weights, lse = _normalise(scores, visible, sinks, dtype)
    if dropout_p:
        kept = dropout_keeps(shape, dropout_p, dropout_seed, dropout_offset).to(device)
        weights = weights * kept.to(dtype) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return Result(weights @ value.to(dtype).repeat_interleave(group, 1), lse, weights)


def _visible(query_at: Tensor, key_at: Tensor, left: int | None, right: int | None) -> Tensor:
    """By the causal rule and the window."""
    visible = torch.ones_like(query_at - key_at, dtype=torch.bool)
    if left is not None:
        visible &= key_at >= query_at - left
    if right is not None:
        visible &= key_at <= query_at + right
    return visible


def _normalise(
    scores: Tensor, visible: Tensor, sinks: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights and lse. A row without a key has weights 0, and its sink, or -inf, for lse."""
    scores = scores.masked_fill(~visible, -INF)
    highest = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full(
        (*scores.shape[:3], 1), -INF
    )  # fmt: skip
    if sinks is not None:
        logits = sinks.to(dtype)[:, None, None]
        highest = torch.maximum(highest, logits.detach())
    highest = highest.masked_fill(highest == -INF, 0)
    unnormalised = torch.exp(scores - highest)
    total = unnormalised.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(logits - highest)
    alive = total > 0
    divisor = torch.where(alive, total, 1)
    lse = torch.where(alive, highest + divisor.log(), -INF)
    return unnormalised / divisor, lse[..., 0]


def dropout_keeps(shape: tuple[int, ...], p: float, seed: int, offset: int) -> Tensor:
    """Which weights (B, Hq, Lq, Lk) stay, by `fastattn.philox`."""
    import numpy as np

    from fastattn.philox import kept

    batch, heads, seqlen_q, seqlen_k = shape
    places = np.arange(batch * heads, dtype=np.int64).reshape(batch, heads)
    return torch.from_numpy(kept(p, seed, offset, places, seqlen_q, seqlen_k))


class Heads:
    """Some key/value heads of a long call, with the query heads they serve: out and gradients in float64."""

    def __init__(self, case: Case, query: Tensor, key: Tensor, value: Tensor, at_most: int = 4) -> None:
        assert not case.arrays and not case.softcap, case
        self.case = case
        self.group = case.query_heads // case.kv_heads
        self.inputs = query, key, value
        every = case.batch * case.kv_heads
        order = torch.randperm(every, generator=torch.Generator().manual_seed(every)).tolist()
        # The last head has the largest offsets into memory.
        chosen = dict.fromkeys([0, every - 1, *order])
        self.places = [divmod(head, case.kv_heads) for head in sorted(list(chosen)[:at_most])]

    def of_query(self, tensor: Tensor) -> Tensor:
        """The query heads that are looked at, of a tensor (B, Hq, Lq, ...)."""
        parts = [tensor[b, h * self.group : (h + 1) * self.group] for b, h in self.places]
        return torch.stack(parts)

    def of_key(self, tensor: Tensor) -> Tensor:
        """The key/value heads that are looked at, of a tensor (B, Hkv, Lk, ...)."""
        return torch.stack([tensor[b, h] for b, h in self.places])

    def out(self) -> Tensor:
        """(places, group, Lq, Dv)."""
        return torch.stack([torch.cat([p @ v for _, p, v in self._rows(*place)], 1) for place in self.places])

    def gradients(self, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of query (places, group, Lq, D), key (places, Lk, D) and value (places, Lk, Dv)."""
        found = [self._gradients(grad_out, *place) for place in self.places]
        query, key, value = (torch.stack(parts) for parts in zip(*found, strict=True))
        return query, key, value

    def _gradients(self, grad_out: Tensor, b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, scale = self._head(b, h)
        incoming = grad_out[b, h * self.group : (h + 1) * self.group].double()
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for rows, weights, _ in self._rows(b, h):
            part = incoming[:, rows]
            grad_value += (weights.mT @ part).sum(0)
            grad_weights = part @ value.mT
            grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
            grad_query[:, rows] = scale * (grad_scores @ key)
            grad_key += scale * (grad_scores.mT @ query[:, rows]).sum(0)
        return grad_query, grad_key, grad_value

    def _head(self, b: int, h: int) -> tuple[Tensor, Tensor, Tensor, float]:
        query, key, value = self.inputs
        heads = query[b, h * self.group : (h + 1) * self.group]
        return heads.double(), key[b, h].double(), value[b, h].double(), query.shape[3] ** -0.5

    def _rows(self, b: int, h: int) -> Any:
        """Some rows at a time: which, their weights (group, rows, Lk), and the values."""
        query, key, value, scale = self._head(b, h)
        case, device = self.case, query.device
        step = max(1, ROWS_AT_ONCE // (case.seqlen_k * self.group))
        key_at = torch.arange(case.seqlen_k, device=device)
        offset = 0 if case.causal == "top_left" else case.seqlen_k - case.seqlen_q
        left, right = case.window or (None, None)
        for first in range(0, case.seqlen_q, step):
            rows = slice(first, min(first + step, case.seqlen_q))
            at = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
            scores = scale * (query[:, rows] @ key.mT)
            scores.masked_fill_(~_visible(at, key_at, left, 0 if case.causal else right), -INF)
            yield rows, torch.softmax(scores, -1), value
