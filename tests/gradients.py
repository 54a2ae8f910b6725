"""Gradients against formulas in NumPy and float64, on the oracle's probabilities.

The formulas need nothing but NumPy and the oracle; what differentiates tensors imports torch when called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn import reference
from fastattn.problem import AttentionProblem

if TYPE_CHECKING:
    from shapes import Case


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
    group = problem.query.shape[1] // problem.key.shape[1]
    for (b, h), head in reference.each_head(problem):
        at, shared = (b, h), (b, h // group)
        grad = as_float64(grad_out[at])
        grad_weights = grad @ problem.value.read(shared).T
        grad_scores = head.weights * (grad_weights - (grad * head.out).sum(1, keepdims=True))
        grads.out[at] = head.out
        grads.query[at] = problem.scale * grad_scores @ problem.key.read(shared)
        grads.key[shared] += problem.scale * grad_scores.T @ problem.query.read(at)
        grads.value[shared] += head.weights.T @ grad
    return grads


def as_float64(array: Any) -> np.ndarray:
    return array.astype(np.float64) if isinstance(array, np.ndarray) else array.double().numpy()


class Error(NamedTuple):
    """How far a gradient lies from the truth."""

    largest: float
    excess: float  # largest of |error| / max(1, |gradient|)
    mean: float
    relative: float  # root mean square, over that of the gradient


Errors = tuple[Error, Error, Error]  # of query, key and value


def error_of(actual: np.ndarray, expected: np.ndarray) -> Error:
    difference = abs(actual - expected)
    excess = (difference / np.maximum(1, abs(expected))).max()
    relative = np.sqrt((difference**2).mean() / (expected**2).mean())
    return Error(*map(float, (difference.max(), excess, difference.mean(), relative)))


def compare(
    attention: Callable[..., Any], tensors: tuple[Any, Any, Any], grad_out: Any, expected: Gradients
) -> Errors:
    """Differentiate `attention` of query, key and value, tensors of torch, and measure the errors."""
    import torch

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grads = torch.autograd.grad(attention(*leaves), leaves, grad_out)
    query, key, value = map(error_of, map(as_float64, grads), expected[1:])
    return query, key, value


@cache
def drawn(case: Case, dtype: str, *, uniform: bool = False) -> tuple[tuple[Any, Any, Any], Any, Gradients]:
    """Query, key and value of a case, and a `grad_out`, tensors of torch, and the true gradients.

    Normal; `uniform`: query, key and value in [-9, 9], as torch's own samples of its operators are.
    """
    import torch

    tensors, grad_out = case.tensors(dtype, "torch"), case.grad_out(dtype, "torch")
    if uniform:
        generator = torch.Generator().manual_seed(0)
        for tensor in tensors:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 18 - 9)
    return tensors, grad_out, differentiate(*tensors, grad_out, causal=case.causal)


def errors(case: Case, dtype: str, *, uniform: bool = False) -> Errors:
    """Those of the kernel in force."""
    import fastattn

    return compare(partial(fastattn.attention, causal=case.causal), *drawn(case, dtype, uniform=uniform))


@cache
def torch_errors(case: Case, dtype: str, *, uniform: bool = False) -> Errors:
    """Those of torch's attention, on the same tensors."""
    from torch.nn.functional import scaled_dot_product_attention

    attention = partial(scaled_dot_product_attention, is_causal=bool(case.causal))
    return compare(attention, *drawn(case, dtype, uniform=uniform))
