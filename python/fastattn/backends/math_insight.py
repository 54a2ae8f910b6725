"""What each query looks at, composed of operations of torch: on any device, some queries at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastattn.backends.math import INF, normalise, positions, score, sinks, weighted_sum
from fastattn.outputs import InsightOutputs
from fastattn.problem import AttentionProblem

if TYPE_CHECKING:
    from torch import Tensor

SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32, and a handful of such matrices exist


def look(problem: AttentionProblem, outputs: InsightOutputs, edges: NDArray[np.int64] | None) -> None:
    """Write `outputs`, in memory of as many scores as `SCORES_AT_ONCE`, or those of one query."""
    batch, heads, seqlen_q, seqlen_k = problem.scores_shape
    outputs.key_mass.array.zero_()
    if outputs.distance_mass is not None:
        outputs.distance_mass.array.zero_()
    step = max(1, SCORES_AT_ONCE // max(1, batch * heads * seqlen_k))
    for first in range(0, seqlen_q if batch else 0, step):
        rows = slice(first, min(first + step, seqlen_q))
        _look_at(_some_queries(problem, rows), outputs, edges, rows)


def _some_queries(problem: AttentionProblem, rows: slice) -> AttentionProblem:
    """The call of these queries alone."""

    def of_rows(array: Any) -> Any:
        own = array is not None and array.ndim > 1 and array.shape[-2] > 1
        return array[..., rows, :] if own else array

    query = problem.query.array
    mask, bias = (None if view is None else of_rows(view.array) for view in (problem.mask, problem.bias))
    lengths, segments = problem.query_lengths, problem.segment_ids
    return problem._replace(
        query_offset=problem.query_offset + rows.start,
        query_lengths=None if lengths is None else lengths - rows.start,
        segment_ids=None if segments is None else (segments[0][:, rows], segments[1]),
    ).with_tensors(
        query[:, rows] if problem.layout == "bshd" else query[:, :, rows],
        problem.key.array,
        problem.value.array,
        mask,
        bias,
    )


def _look_at(
    problem: AttentionProblem, outputs: InsightOutputs, edges: NDArray[np.int64] | None, rows: slice
) -> None:
    """Write what is a query's, and add what is summed over queries."""
    import torch

    scores, value = score(problem)
    lse, weights = normalise(scores, sinks(problem))
    _write_top_keys(scores, weights, outputs, rows)
    rest = torch.exp(sinks(problem)[:, None] - torch.where(lse == -INF, INF, lse))  # the sink's share
    entropy = -torch.special.xlogy(weights, weights).sum(3) - torch.special.xlogy(rest, rest)
    outputs.entropy.array[:, :, rows] = entropy.clamp(min=0)
    seen = torch.where(scores != -INF, weights, 0)  # of a row that is NaN, what it sees
    outputs.key_mass.array.add_(seen.sum(2))
    if outputs.out is not None:
        out = weighted_sum(weights, scores != -INF, value)
        if problem.layout == "bshd":
            outputs.out.array[:, rows] = out.transpose(1, 2)
        else:
            outputs.out.array[:, :, rows] = out
    if outputs.distance_mass is not None:
        query_at, key_at = positions(problem)
        starts = torch.as_tensor(edges, device=scores.device)
        bucket = torch.bucketize(query_at - key_at, starts, right=True)
        for n in range(len(starts) + 1):  # not scatter_add, whose order is any on a GPU
            outputs.distance_mass.array[:, :, n] += torch.where(bucket == n, seen, 0).sum((2, 3))


def _write_top_keys(scores: Tensor, weights: Tensor, outputs: InsightOutputs, rows: slice) -> None:
    import torch

    count = min(outputs.keys.shape[3], scores.shape[3])
    ranked = torch.where(scores.isnan(), -INF, scores)
    # A stable sort and not topk, which breaks ties in any way.
    highest, keys = (x[..., :count] for x in torch.sort(ranked, dim=3, descending=True, stable=True))
    outputs.keys.array[:, :, rows] = -1
    outputs.weights.array[:, :, rows] = 0
    seen = highest != -INF
    outputs.keys.array[:, :, rows, :count] = torch.where(seen, keys, -1)
    outputs.weights.array[:, :, rows, :count] = torch.where(seen, weights.gather(3, keys), 0)
