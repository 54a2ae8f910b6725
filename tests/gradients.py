"""The gradients of attention in NumPy and float64: the formulas, on the oracle's probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastattn import reference
from fastattn.problem import AttentionProblem


class Gradients(NamedTuple):
    """Of the sum of out times `grad_out`, with the out that they go with."""

    out: np.ndarray  # (B, Hq, Lq, Dv)
    query: np.ndarray  # (B, Hq, Lq, D)
    key: np.ndarray  # (B, Hkv, Lk, D)
    value: np.ndarray  # (B, Hkv, Lk, Dv)


def differentiate(query: Any, key: Any, value: Any, grad_out: Any, **options: Any) -> Gradients:
    """Gradients on what the inputs hold, a query head at a time; without softcap and dropout.

    With P the weights, O = P V and S = scale Q K^T:

        dV = P^T dO,   dS = P (dO V^T - rowsum(dO O)),   dQ = scale dS K,   dK = scale dS^T Q
    """
    problem = AttentionProblem.from_arguments(query, key, value, **options)
    assert problem.softcap == 0 and problem.dropout_p == 0
    views = problem.query, problem.key, problem.value
    grads = Gradients(np.empty(problem.out_shape), *(np.zeros(view.shape) for view in views))
    incoming = grad_out if isinstance(grad_out, np.ndarray) else grad_out.double().numpy()
    group = problem.query.shape[1] // problem.key.shape[1]
    for (b, h), head in reference.each_head(problem):
        at, shared = (b, h), (b, h // group)
        grad = incoming[at].astype(np.float64)
        grad_weights = grad @ problem.value.read(shared).T
        grad_scores = head.weights * (grad_weights - (grad * head.out).sum(1, keepdims=True))
        grads.out[at] = head.out
        grads.query[at] = problem.scale * grad_scores @ problem.key.read(shared)
        grads.key[shared] += problem.scale * grad_scores.T @ problem.query.read(at)
        grads.value[shared] += head.weights.T @ grad
    return grads
