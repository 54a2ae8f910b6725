"""The portable kernels on a call's arguments, and how far their results may lie from the float64 oracle."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import bounds
from bounds import Expected
from fastattn.gpu.call import Call, from_problem
from fastattn.gpu.forward import forward
from fastattn.problem import AttentionProblem
from kernels import Kernel
from shapes import Case

DTYPES = ("float32", "float16", "bfloat16")
# By how much the probabilities of the second product are rounded, relatively.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# A probability below float16's normal numbers has this distance to its neighbours.
SUBNORMAL = {"float32": 0.0, "float16": 2.0**-24, "bfloat16": 0.0}


class Results(NamedTuple):
    out: Tensor  # (B, Hq, Lq, Dv)
    lse: Tensor  # (B, Hq, Lq)


def call_of(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Call:
    """The arguments of `fastattn.attention` as kernels read them."""
    return from_problem(AttentionProblem.from_arguments(query, key, value, **options))


def attend(query: Tensor, key: Tensor, value: Tensor, *, run: Any = forward, **options: Any) -> Results:
    """Run a kernel into memory that holds NaN."""
    call = call_of(query, key, value, **options)
    out = torch.full((*query.shape[:3], value.shape[3]), torch.nan, dtype=query.dtype)
    lse = torch.full(query.shape[:3], torch.nan)
    run(call, out, lse)
    return Results(out, lse)


def assert_right(actual: Results, expected: Expected, dtype: str) -> None:
    """Out and lse are those of the oracle, within what rounding explains."""
    bounds.assert_within(abs(actual.out.double().numpy() - expected.out), allowed(expected, dtype))
    kernel = Kernel("triton", dtype, "")
    bounds.assert_lse_within(
        actual.lse.double().numpy(), expected, bounds.allowed_lse(kernel, expected, sharp=True)
    )


def allowed(expected: Expected, dtype: str) -> np.ndarray:
    """The error allowed in each element of out."""
    own = bounds.relative_error(Kernel("triton", dtype, ""), expected)[..., None] * expected.mass
    keys = expected.weights.shape[-1]
    rounded = ROUNDING[dtype] * expected.mass + SUBNORMAL[dtype] / 2 * keys * expected.largest
    error = own + rounded + bounds.FLUSHED[dtype] * expected.largest
    return error if dtype == "float32" else error + bounds.ulp(abs(expected.out) + error, dtype) / 2


def allowed_weights(expected: Expected, dtype: str) -> np.ndarray:
    """The error allowed in each probability."""
    return bounds.allowed_weights(Kernel("triton", dtype, ""), expected)


def check_case(case: Case, dtype: str, *, run: Any = forward, spread: float = 1.0, **more: Any) -> None:
    """A case, and further arguments of its call; `spread` multiplies the query."""
    tensors = case.tensors(dtype, "torch", spread=spread)
    options = case.options(dtype, "torch") | more
    assert_right(attend(*tensors, run=run, **options), bounds.expect(*tensors, **options), dtype)
