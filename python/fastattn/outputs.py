"""What a call writes: out, and lse and weights where asked for. Allocated here, save the caller's own out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn.arrays import ITEMSIZE, Array, Strided, type_name
from fastattn.problem import AttentionProblem
from fastattn.vectors import Shape

_INT64_MAX = 2**63 - 1
# What NumPy may try before an overlap that it cannot exclude counts as one; sliced views take a handful.
_OVERLAP_WORK: Any = 10_000  # any int, though NumPy's stubs know two


class Outputs(NamedTuple):
    """Memory for the results of one call, axes in the order (B, H, L, D)."""

    out: Strided  # (B, Hq, Lq, Dv)
    lse: Strided | None  # (B, Hq, Lq)
    weights: Strided | None  # (B, Hq, Lq, Lk)

    def returned(self) -> Any:
        """What the caller gets."""
        out, lse, weights = self
        return returned(
            out.array, None if lse is None else lse.array, None if weights is None else weights.array
        )


def returned(out: Array, lse: Array | None, weights: Array | None) -> Any:
    """What the caller gets: out, (out, lse), (out, weights) or (out, lse, weights)."""
    if lse is None and weights is None:
        return out
    return tuple(array for array in (out, lse, weights) if array is not None)


def check_flags(return_lse: bool, return_weights: bool) -> None:
    """Raise TypeError unless both are bools."""
    for name, flag in ("return_lse", return_lse), ("return_weights", return_weights):
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name} must be a bool, got {type_name(flag)}")


def check_request(problem: AttentionProblem, return_lse: bool, return_weights: bool) -> None:
    """Raise unless the flags are bools, and every size of what they ask for can be counted."""
    check_flags(return_lse, return_weights)
    shape, dtype = problem.out_shape, problem.dtype
    _check_size("out", shape, dtype)
    if return_lse:
        _check_size("lse", shape[:3], problem.lse_dtype)
    if return_weights:
        _check_size("weights", problem.scores_shape, dtype)


class Gradients(NamedTuple):
    """Memory for the gradients of one call, axes in the order (B, H, L, D); None: not wanted."""

    query: Strided | None
    key: Strided | None
    value: Strided | None
    bias: Strided | None  # (B, Hq, Lq, Lk), of lse's dtype, zeros; strides of 0 where the bias was broadcast
    alibi_slopes: Strided | None  # (B, Hq), float64
    sinks: Strided | None  # (B, Hq), float64


class InsightOutputs(NamedTuple):
    """Memory for the results of one look, axes in the order (B, H, L, D); floats but out's of lse's dtype."""

    keys: Strided  # (B, Hq, Lq, top_k), int64
    weights: Strided  # (B, Hq, Lq, top_k)
    entropy: Strided  # (B, Hq, Lq)
    key_mass: Strided  # (B, Hq, Lk)
    out: Strided | None  # (B, Hq, Lq, Dv)
    distance_mass: Strided | None  # (B, Hq, edges + 1)


def prepare_insight(
    problem: AttentionProblem, top_k: int, edge_count: int | None, with_out: bool
) -> InsightOutputs:
    """Allocate what a look returns, once every size is known to fit; `edge_count` None: no distances."""
    library, like = problem.library, problem.query.array
    batch, heads, seqlen_q, seqlen_k = problem.scores_shape

    def empty(name: str, dtype: str, *shape: int) -> Strided:
        _check_size(name, shape, dtype)
        return library.empty(shape, dtype, like)

    kind = problem.lse_dtype
    return InsightOutputs(
        empty("keys", "int64", batch, heads, seqlen_q, top_k),
        empty("weights", kind, batch, heads, seqlen_q, top_k),
        empty("entropy", kind, batch, heads, seqlen_q),
        empty("key_mass", kind, batch, heads, seqlen_k),
        _new_out(problem, problem.out_shape) if with_out else None,
        None if edge_count is None else empty("distance_mass", kind, batch, heads, edge_count + 1),
    )


def prepare_outputs(
    problem: AttentionProblem, out: Array | None, return_lse: bool, return_weights: bool
) -> Outputs:
    """Allocate what the call returns, or take the caller's `out`, once every size is known to fit."""
    check_request(problem, return_lse, return_weights)
    shape, dtype = problem.out_shape, problem.dtype
    library, like = problem.library, problem.query.array
    return Outputs(
        _new_out(problem, shape) if out is None else _check_out(problem, shape, out),
        library.empty(shape[:3], problem.lse_dtype, like) if return_lse else None,
        library.empty(problem.scores_shape, dtype, like) if return_weights else None,
    )


def _new_out(problem: AttentionProblem, shape: Shape) -> Strided:
    if problem.layout == "bhsd":
        return problem.library.empty(shape, problem.dtype, problem.query.array)
    swapped = problem.library.empty(_swapped(shape), problem.dtype, problem.query.array)
    return swapped.swap_heads_and_rows()


def _swapped(shape: Shape) -> Shape:
    batch, heads, rows, dim = shape
    return batch, rows, heads, dim


def _check_size(name: str, shape: Shape, dtype: str) -> None:
    size = math.prod(shape) * ITEMSIZE[dtype]
    if size > _INT64_MAX:
        raise ValueError(f"{name} of shape {shape} would take {size} bytes, more than 2**63 - 1")


def _check_out(problem: AttentionProblem, shape: Shape, out: Array) -> Strided:
    """See the caller's `out` as memory in the order (B, H, L, D), or say why it cannot be written."""
    view = problem.library.view("out", out, to_write=True)
    if view.dtype != problem.dtype:
        raise TypeError(f"out must have query's dtype {problem.dtype}, got {view.dtype}")
    expected = shape if problem.layout == "bhsd" else _swapped(shape)
    if view.shape != expected:
        raise ValueError(f"out must have shape {expected}, got {view.shape}")
    if overlaps_itself(view):
        raise ValueError(f"out must not overlap itself, got shape {view.shape} with strides {view.strides}")
    for name in ("query", "key", "value", "mask", "bias", "key_scale", "value_scale"):
        other: Strided | None = getattr(problem, name)
        if other is not None and overlap(view, other):
            raise ValueError(f"out must not overlap {name}: they share memory")
    return view if problem.layout == "bhsd" else view.swap_heads_and_rows()


def overlaps_itself(view: Strided) -> bool:
    """Whether some axis, taken from the finest on, does not step past all that the finer ones reach."""
    reach = 0
    for stride, size in sorted(zip(view.strides, view.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return 0 not in view.shape
            reach += stride * (size - 1)
    return False


def overlap(a: Strided, b: Strided) -> bool:
    """Whether the two have an element in common, or one cannot tell."""
    if a.address >= _end(b) or b.address >= _end(a):
        return False
    try:
        return np.shares_memory(a.numpy(), b.numpy(), max_work=_OVERLAP_WORK)
    except RuntimeError:  # numpy's TooHardError, which has moved between its modules
        return True


def _end(view: Strided) -> int:
    """One past the last byte that the view can reach."""
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    return view.address + (last + 1) * ITEMSIZE[view.dtype]
