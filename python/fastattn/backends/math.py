"""Attention composed of operations of torch, which differentiates it: on any device, as often as asked.

The whole matrix of scores exists, in float32 (float64 for float64 inputs), for every head at once. Read
`attend` from top to bottom; it shares nothing with the kernels, and with the oracle the random numbers alone.

Gradients are those of query, key, value, bias, sinks and alibi_slopes. What is hidden from a row, by mask,
bias, window, causal rule or length, reaches neither its output nor its gradient, whatever key, value and bias
hold there. Keys and values hidden from every row, and the query of a row that sees nothing, have a gradient
of 0. NaN and Inf where a row does see them reach its output and its gradient, and if the gradient that comes
in for that row is not finite either, those of all keys and values.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastattn.arrays import NUMPY, Array
from fastattn.backends import math_cache
from fastattn.cache_problem import CacheUpdate
from fastattn.outputs import InsightOutputs, Outputs
from fastattn.philox import multiplier
from fastattn.problem import AttentionProblem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INF = float("inf")


class MathBackend:
    """Operations of torch, with gradients and gradients of gradients."""

    name = "math"

    def supports(self, problem: AttentionProblem) -> list[str]:
        """Ask for tensors."""
        return ["it composes operations of torch: pass tensors"] if problem.library is NUMPY else []

    def compose(
        self, problem: AttentionProblem, return_lse: bool, return_weights: bool
    ) -> tuple[Array, Array | None, Array | None]:
        """Compute new tensors, which carry the graph."""
        dtype = problem.query.array.dtype
        with without_autocast(problem):
            out, lse, weights = _attend_each(problem)
            out = out.to(dtype)
            if problem.layout == "bshd":
                out = out.transpose(1, 2).contiguous()
            return out, lse if return_lse else None, weights.to(dtype) if return_weights else None

    def run(self, problem: AttentionProblem, outputs: Outputs) -> None:
        """Compute, and copy into `outputs`, which no graph can record."""
        results = self.compose(problem, outputs.lse is not None, outputs.weights is not None)
        if results[0].requires_grad:
            raise RuntimeError(
                "out cannot be written where another argument requires grad: "
                "call without out, or under torch.no_grad()"
            )
        for view, result in zip(outputs, results, strict=True):
            if view is not None:
                view.array.copy_(result)

    def run_insight(
        self, problem: AttentionProblem, outputs: InsightOutputs, edges: NDArray[np.int64] | None
    ) -> None:
        """Go through the queries some at a time."""
        from fastattn.backends import math_insight

        with without_autocast(problem):
            math_insight.look(problem, outputs, edges)

    def update_cache(self, problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
        """Write all rows at once."""
        with without_autocast(problem):
            return math_cache.update(problem, update)

    def describe(self, problem: AttentionProblem) -> dict[str, str]:
        """Tell the device, and that scores are kept."""
        device = problem.query.array.device
        return {"path": f"operations of torch in {problem.lse_dtype} on {device}, all scores in memory"}


def _attend_each(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `attend`, of sequences behind one another one at a time; these have no weights."""
    import torch

    if problem.cu_seqlens is None:
        return attend(problem)
    empty = problem.query.array.new_zeros
    outs, sums = (
        [empty((*problem.out_shape[:2], 0, problem.out_shape[3]))],
        [empty((*problem.out_shape[:2], 0))],
    )
    for _, sequence in problem.sequences():
        out, lse, _ = attend(sequence)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2), empty(0)


def attend(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out (B, Hq, Lq, Dv), lse (B, Hq, Lq) and weights (B, Hq, Lq, Lk), not yet rounded."""
    import torch

    scores, value = score(problem)
    lse, weights = normalise(scores, sinks(problem))
    if problem.dropout_p > 0:
        weights = weights * _dropout(problem)
    attending = scores != -INF
    out = weighted_sum(weights, attending, value)
    # What comes in for a row that attends to nothing reaches no gradient, not even NaN.
    return torch.where(attending.any(3)[..., None], out, 0), lse, weights


def score(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute what the softmax is taken of, (B, Hq, Lq, Lk), and the values that somebody sees."""
    import torch

    query, key, value = _operands(problem)
    visible = visible_keys(problem)
    # A product with 0 does not silence NaN: what nobody may look at is replaced, here and in the gradients.
    query = torch.where(visible.any(3)[..., None], query, 0)
    seen = visible.any(2)[..., None]
    key, value = torch.where(seen, key, 0), torch.where(seen, value, 0)

    scores = problem.scale * products(query, key, visible)
    scores = torch.where(visible, scores, 0)
    if 0 < problem.softcap < torch.finfo(scores.dtype).max:  # one past the dtype's range caps nothing
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    return torch.where(visible, scores + _added(problem, visible), -INF), value


def visible_keys(problem: AttentionProblem) -> Tensor:
    """Which query may attend to which key, (B, Hq, Lq, Lk)."""
    import torch

    device = problem.query.array.device
    query_at, key_at = positions(problem)
    visible = (key_at >= query_at - problem.window_left) & (key_at <= query_at + problem.window_right)
    if problem.kv_starts is not None:
        visible = visible & (key_at >= _on(device, problem.kv_starts)[:, None, None, None])
    if problem.kv_lengths is not None:
        visible = visible & (key_at < _on(device, problem.kv_lengths)[:, None, None, None])
    if problem.query_lengths is not None:
        row = torch.arange(problem.scores_shape[2], device=device)[:, None]
        visible = visible & (row < _on(device, problem.query_lengths)[:, None, None, None])
    if problem.segment_ids is not None:
        of_query, of_key = (_on(device, ids) for ids in problem.segment_ids)
        visible = visible & (of_query[:, None, :, None] == of_key[:, None, None, :])
    if problem.mask is not None:
        visible = visible & problem.mask.array
    if problem.bias is not None:
        visible = visible & (problem.bias.array != -INF)
    return visible.expand(problem.scores_shape)


def _on(device: torch.device, vector: Any) -> Tensor:
    import torch

    return torch.as_tensor(vector, device=device)


def products(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """``query @ key.mT``, in which a key that is not finite meets only the queries that may attend to it."""
    import torch

    unusual = _not_finite(key)
    if not unusual:
        return query @ key.mT
    at = torch.tensor(unusual, device=key.device)
    columns = [(query * torch.where(visible[..., j, None], key[..., j, None, :], 0)).sum(-1) for j in unusual]
    return (query @ key.index_fill(2, at, 0).mT).index_add(3, at, torch.stack(columns, -1))


def weighted_sum(weights: Tensor, attending: Tensor, value: Tensor) -> Tensor:
    """``weights @ value``, in which a value that is not finite reaches only the rows attending to it."""
    import torch

    unusual = _not_finite(value)
    if not unusual:
        return weights @ value
    out = weights @ value.index_fill(2, torch.tensor(unusual, device=value.device), 0)
    for j in unusual:
        out = out + weights[..., j, None] * torch.where(attending[..., j, None], value[..., j, None, :], 0)
    return out


def normalise(scores: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and softmax over the keys and a sink, which takes its share and has no value."""
    import torch

    logits = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    highest = logits.detach().amax(-1, keepdim=True)
    highest = torch.where(highest == -INF, 0, highest)
    shares = torch.exp(logits - highest)
    total = shares.sum(-1, keepdim=True)
    nothing = total == 0  # to attend to: the logarithm and the quotient below must have a gradient there
    total = torch.where(nothing, 1, total)
    lse = torch.where(nothing, -INF, highest + torch.log(total))
    return lse[..., 0], shares[..., :-1] / total


def _operands(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the order (B, Hq, L, D), each key head repeated for its query heads."""
    dtype = _compute_dtype(problem)
    query = problem.query.array
    if problem.layout == "bshd":
        query = query.transpose(1, 2)
    query = query.to(dtype)
    key = math_cache.rows(problem, problem.key, problem.key_scale).to(dtype)
    value = math_cache.rows(problem, problem.value, problem.value_scale).to(dtype)
    group = query.shape[1] // key.shape[1]
    if group == 1:
        return query, key, value
    return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


def _added(problem: AttentionProblem, visible: Tensor) -> Any:
    """Bias and ALiBi, (B, Hq, Lq, Lk) or broadcast to it; 0 if there is neither."""
    import torch

    added: Any = 0
    dtype, device = _compute_dtype(problem), problem.query.array.device
    if problem.bias is not None:
        added = torch.where(visible, problem.bias.array.to(dtype), 0)
    if problem.alibi_slopes is not None:
        slopes = torch.as_tensor(problem.alibi_slopes_given, dtype=dtype, device=device)
        query_at, key_at = positions(problem)
        added = added - slopes[..., None, None] * (query_at - key_at).abs()
    return added


def sinks(problem: AttentionProblem) -> Tensor:
    """One logit a head, (Hq,); -inf is none."""
    import torch

    given = problem.sinks_given if problem.sinks is not None else [-INF] * problem.query.shape[1]
    logits = torch.as_tensor(given, dtype=_compute_dtype(problem), device=problem.query.array.device)
    return logits.clamp(max=torch.finfo(logits.dtype).max)


def _dropout(problem: AttentionProblem) -> Tensor:
    """What the weights are multiplied by, (B, Hq, Lq, Lk)."""
    import torch

    assert problem.dropout_seed is not None
    batch, query_heads, seqlen_q, seqlen_k = problem.scores_shape
    heads = np.arange(batch * query_heads).reshape(batch, query_heads) + problem.first_sequence * query_heads
    factors = multiplier(
        problem.dropout_p, problem.dropout_seed, problem.dropout_offset, heads, seqlen_q, seqlen_k
    )
    return torch.as_tensor(factors, dtype=_compute_dtype(problem), device=problem.query.array.device)


def positions(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Where queries stand among the keys, (B or 1, 1, Lq, 1), and the keys, (Lk,)."""
    import torch

    device = problem.query.array.device
    _, _, seqlen_q, seqlen_k = problem.scores_shape
    offset = torch.as_tensor(problem.query_offset, device=device).reshape(-1, 1, 1, 1)
    query_at = offset + torch.arange(seqlen_q, device=device)[:, None]
    return query_at, torch.arange(seqlen_k, device=device)


def _not_finite(tensor: Tensor) -> list[int]:
    """Rows (axis 2) in which some batch, head and column holds NaN or an infinity."""
    rows: list[int] = (~tensor.isfinite()).any(3).any(1).any(0).nonzero()[:, 0].tolist()
    return rows


def _compute_dtype(problem: AttentionProblem) -> Any:
    import torch

    return getattr(torch, problem.lse_dtype)


def without_autocast(problem: AttentionProblem) -> AbstractContextManager[Any]:
    """Autocast would round the operands of the products."""
    import torch

    device = problem.query.array.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
