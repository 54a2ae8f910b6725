"""How far a result may lie from the float64 oracle."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastattn import reference
from fastattn.problem import AttentionProblem
from kernels import Kernel
from shapes import Case

# dtype -> bits after the point, exponent of the smallest normal number
FORMATS = {"float64": (52, -1022), "float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14)}

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-24, "float16": 2.0**-24}
# The error of a kernel's own arithmetic, in units of roundoff * size * mass. Fixed by measurement, see
# docs/accuracy.md; in float64 half of it is the oracle's own.
UNITS = {"float64": 12.0, "float32": 8.0, "bfloat16": 8.0, "float16": 8.0}

# Probabilities under 2^-126 (2^-1022 in float64) are flushed to 0, counted from within 2^8 of the largest.
FLUSHED = {"float64": 2.0**-1010, "float32": 2.0**-118, "bfloat16": 2.0**-118, "float16": 2.0**-118}


class Expected(NamedTuple):
    """The oracle's results of one call, and what errors are measured by."""

    out: np.ndarray  # (B, Hq, Lq, Dv)
    lse: np.ndarray  # (B, Hq, Lq)
    weights: np.ndarray  # (B, Hq, Lq, Lk)
    mass: np.ndarray  # (B, Hq, Lq, Dv): sum_j p_ij |v_j|
    size: np.ndarray  # (B, Hq, Lq): 2 + max_j (|scale| sum_d |q_id k_jd| + |bias_ij| + |alibi_ij|), j visible
    largest: np.ndarray  # (B, Hq, 1, 1): max |v| of the head


def expect(query: Any, key: Any, value: Any, **options: Any) -> Expected:
    """Run the oracle. `query`, `key` and `value` hold what the kernel sees, already rounded."""
    problem = AttentionProblem.from_arguments(query, key, value, **options)
    result = reference.attention(query, key, value, **options)
    mass, size = np.zeros(problem.out_shape), np.full(problem.scores_shape[:3], 2.0)
    group = problem.scores_shape[1] // problem.key.shape[1]
    largest = np.zeros((*problem.scores_shape[:2], 1, 1))
    for b, h in np.ndindex(*problem.scores_shape[:2]):
        q, k, v = (
            abs(view.read((b, head)))
            for view, head in ((problem.query, h), (problem.key, h // group), (problem.value, h // group))
        )
        visible = reference.visible_keys(problem, b, h)
        added = np.where(visible, abs(reference.added_to_scores(problem, b, h)), 0)
        scores = np.where(visible, abs(problem.scale) * (q @ k.T) + added, 0)
        size[b, h] += scores.max(axis=1, initial=0)
        mass[b, h] = result.weights[b, h] @ v
        largest[b, h] = v.max(initial=0)
    return Expected(*result, mass, size, largest)


@cache
def draw(case: Case, dtype: str, spread: float = 1.0) -> tuple[Any, Any, Any]:
    """Query, key and value of a case in NumPy, drawn once; `spread` multiplies the query."""
    return case.tensors(dtype, spread=spread)


@cache
def expect_case(case: Case, dtype: str, spread: float = 1.0) -> Expected:
    """The oracle on a case."""
    return expect(*draw(case, dtype, spread), **case.options(dtype))


def ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between neighbours of `dtype` at x."""
    digits, lowest = FORMATS[dtype]
    _, exponent = np.frexp(x)  # |x| in [2^(e-1), 2^e)
    return np.ldexp(1.0, np.maximum(exponent - 1, lowest) - digits)


def relative_error(kernel: Kernel, expected: Expected) -> np.ndarray:
    """Of a probability: a score off by roundoff * size changes it by as much, relatively. (B, Hq, Lq)."""
    return UNITS[kernel.dtype] * ROUNDOFF[kernel.dtype] * expected.size


def allowed(kernel: Kernel, expected: Expected, *, sharp: bool = False) -> np.ndarray:
    """The error allowed in each element of out; `sharp` logits reach far past what normal inputs give."""
    own = (
        relative_error(kernel, expected)[..., None] * expected.mass + FLUSHED[kernel.dtype] * expected.largest
    )
    if kernel.dtype in ("float64", "float32"):
        return own
    # The same, tighter on normal inputs than its own arithmetic would need.
    error = np.maximum(own, 2e-6 * expected.largest) if sharp else 2e-6 * expected.largest
    if kernel.rounds_probabilities:
        error = error + 2.0**-8 * expected.mass
    if kernel.splits_probabilities:
        error = error + 2.0**-22 * expected.mass
    return error + ulp(abs(expected.out) + error, kernel.dtype) / 2


def allowed_lse(kernel: Kernel, expected: Expected, *, sharp: bool = False) -> np.ndarray:
    relative = {"float64": 1e-13}.get(kernel.dtype, 1e-4 if kernel.rounds_probabilities else 1e-6)
    error = relative * np.maximum(1, abs(np.nan_to_num(expected.lse, neginf=0)))
    return np.maximum(error, relative_error(kernel, expected)) if sharp else error


def allowed_weights(kernel: Kernel, expected: Expected) -> np.ndarray:
    """As for out, were the value 1 at one key."""
    relative = relative_error(kernel, expected)[..., None]
    if kernel.rounds_probabilities:
        relative = (
            relative + 2.0**-8 + 2.0**-12
        )  # rounding, and an exponential that is no more exact than it needs
    flushed = FLUSHED[kernel.dtype]
    if kernel.splits_probabilities:
        relative, flushed = relative + 2.0**-22, 2.0**-38
    error = relative * expected.weights + flushed
    return error + ulp(expected.weights + error, kernel.dtype) / 2


def as_float64(array: Any) -> np.ndarray:
    return array.astype(np.float64) if isinstance(array, np.ndarray) else array.double().numpy()


def assert_within(error: np.ndarray, allowed: np.ndarray) -> None:
    """No NaN, and no error past what is allowed."""
    assert not np.isnan(error).any()
    worst = np.max(error / np.maximum(allowed, 1e-300), initial=0)
    assert worst <= 1, f"{worst:.3g} times the error allowed"


def assert_lse_within(lse: np.ndarray, expected: Expected, allowed: np.ndarray) -> None:
    """The same, and -inf in exactly the rows that have nothing to attend to."""
    empty = expected.lse == -np.inf
    np.testing.assert_array_equal(lse == -np.inf, empty)
    assert_within(abs(lse[~empty] - expected.lse[~empty]), allowed[~empty])
