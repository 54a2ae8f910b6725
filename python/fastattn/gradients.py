"""The backward of a call, for arrays of either library: memory for the gradients that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.arrays import Array, Strided, in_dtype_of
from fastattn.backends.base import DifferentiableBackend
from fastattn.outputs import Gradients, Outputs
from fastattn.problem import AttentionProblem

NAMES = ("query", "key", "value", "bias", "alibi_slopes", "sinks")  # in the order of `Gradients`


def backward(
    backend: DifferentiableBackend,
    problem: AttentionProblem,
    out: Array,
    lse: Array,
    grad_out: Array | None,
    grad_lse: Array | None,
    grad_weights: Array | None,
    wanted: Sequence[bool],
) -> list[Array | None]:
    """Compute the gradients that are `wanted`, in the order of `NAMES`; None for the others.

    Those of query, key, value and bias have their shapes and dtypes, those of slopes and sinks are float64 of
    shape (B, Hq), one for each sequence: see `as_given`.
    """
    view = problem.library.view
    incoming = Outputs(
        problem.library.zeros(problem.out_shape, problem.dtype, problem.query.array)
        if grad_out is None
        else canonical(problem, "grad_out", grad_out),
        None if grad_lse is None else view("grad_lse", grad_lse),
        None if grad_weights is None else view("grad_weights", grad_weights),
    )
    memory = _memory(problem, wanted)
    outputs = Outputs(canonical(problem, "out", out), view("lse", lse), None)
    backend.run_backward(problem, outputs, incoming, memory)
    results = [None if view is None else view.array for view in memory]
    if memory.bias is not None:
        assert problem.bias is not None
        results[NAMES.index("bias")] = in_dtype_of(problem.bias.array, memory.bias.array)
    return results


def as_given(table: Array | None, given: Any) -> Array | None:
    """The gradient of slopes or sinks in the shape of `given`; if that is an array, also in its dtype."""
    if table is None:
        return None
    each = given.ndim == 2 if hasattr(given, "ndim") else isinstance(given[0], (tuple, list))
    return in_dtype_of(given, table if each else table.sum(0))


def canonical(problem: AttentionProblem, name: str, array: Array) -> Strided:
    """See an array with the axes of query in the order (B, H, L, D)."""
    view = problem.library.view(name, array)
    return view if problem.layout == "bhsd" else view.swap_heads_and_rows()


def _memory(problem: AttentionProblem, wanted: Sequence[bool]) -> Gradients:
    query, key, value, bias, slopes, sinks = wanted
    zeros, like = problem.library.zeros, problem.query.array
    table = problem.sequence_count, problem.query.shape[1]
    return Gradients(
        _empty_like(problem, problem.query) if query else None,
        _empty_like(problem, problem.key) if key else None,
        _empty_like(problem, problem.value) if value else None,
        _bias_memory(problem) if bias else None,
        zeros(table, "float64", like) if slopes else None,
        zeros(table, "float64", like) if sinks else None,
    )


def _empty_like(problem: AttentionProblem, view: Strided) -> Strided:
    """Contiguous in the caller's layout."""
    empty, like = problem.library.empty, problem.query.array
    if problem.layout == "bhsd":
        return empty(view.shape, view.dtype, like)
    return empty(view.swap_heads_and_rows().shape, view.dtype, like).swap_heads_and_rows()


def _bias_memory(problem: AttentionProblem) -> Strided:
    assert problem.bias is not None
    shape = tuple(problem.bias.array.shape)
    summed = problem.library.zeros(shape, problem.lse_dtype, problem.query.array)
    expanded = summed.broadcast_to(problem.scores_shape)
    assert expanded is not None
    return expanded
