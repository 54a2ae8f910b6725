"""What docs/accuracy.md states of gradients: against float64, and beside torch's own in the same dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import gradients
from kernels import KERNELS, Kernel
from shapes import GRADIENTS, SATURATED, Case

# Largest error over max(1, |gradient|) on normal inputs.
LARGEST = {"float64": 1e-13, "float32": 2e-6}
# Root mean square of the error over that of the gradient: one rounding of the result is half of it.
RELATIVE = {"float16": 4e-4, "bfloat16": 3e-3}
# Beside torch's errors on the same tensors, mean and largest.
MEAN_OF_TORCH, LARGEST_OF_TORCH = 1.05, 1.5
# The same, root mean square, where the output's own rounding decides.
SATURATED_OF_TORCH = 1.1

NAMES = ("query", "key", "value")


FULL_PRECISION = [kernel for kernel in KERNELS if kernel.dtype in LARGEST]
HALF_PRECISION = [kernel for kernel in KERNELS if kernel.dtype in RELATIVE]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
@pytest.mark.parametrize("kernel", FULL_PRECISION, ids=str)
def test_normal_inputs(kernel: Kernel, case: Case) -> None:
    with kernel.forced():
        found = gradients.errors(case, kernel.dtype)
    for name, error in zip(NAMES, found, strict=True):
        assert error.excess <= LARGEST[kernel.dtype], f"{name}: {error}"


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
@pytest.mark.parametrize("kernel", HALF_PRECISION, ids=str)
def test_half_precision_beside_torch(kernel: Kernel, case: Case) -> None:
    with kernel.forced():
        found = gradients.errors(case, kernel.dtype)
    for name, error, peer in zip(NAMES, found, gradients.torch_errors(case, kernel.dtype), strict=True):
        assert error.relative <= RELATIVE[kernel.dtype], f"{name}: {error}"
        assert error.mean <= MEAN_OF_TORCH * peer.mean, f"{name}: {error}, torch {peer}"
        assert error.largest <= LARGEST_OF_TORCH * peer.largest, f"{name}: {error}, torch {peer}"


@pytest.mark.parametrize("case", SATURATED, ids=str)
@pytest.mark.parametrize("kernel", HALF_PRECISION, ids=str)
def test_saturated_rows_beside_torch(kernel: Kernel, case: Case) -> None:
    """What rowsum(dO O) loses with the output's rounding is no more than in torch's fused backward."""
    with kernel.forced():
        found = gradients.errors(case, kernel.dtype, uniform=True)
    peers = gradients.torch_errors(case, kernel.dtype, uniform=True)
    for name, error, peer in zip(NAMES, found, peers, strict=True):
        assert error.relative <= SATURATED_OF_TORCH * peer.relative, f"{name}: {error}, torch {peer}"


def test_the_formulas_are_those_of_torch() -> None:
    """The oracle of this file beside automatic differentiation, in float64."""
    case = Case("formulas", 9, 13, 6, 5, batch=2, query_heads=4, kv_heads=2, causal=True)
    arrays, grad_out = case.tensors("float64"), case.grad_out("float64")
    found = gradients.differentiate(*arrays, grad_out, causal=True)
    leaves = [torch.from_numpy(array).requires_grad_() for array in arrays]
    visible = torch.ones(9, 13, dtype=torch.bool).tril(13 - 9)
    out = scaled_dot_product_attention(*leaves, attn_mask=visible, enable_gqa=True)
    expected = (out, *torch.autograd.grad(out, leaves, torch.from_numpy(grad_out)))
    for array, tensor in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, tensor.detach().numpy(), rtol=1e-12, atol=1e-13)
