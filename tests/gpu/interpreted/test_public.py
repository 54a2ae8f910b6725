"""`fastattn.attention` on the interpreted kernels: random calls, and the way there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bounds
import fastattn as fa
import portable
from random_calls import chosen_seed, draw_legal

SEED = chosen_seed(0)
DTYPES = ("float32", "float16", "bfloat16")


def draw(seed: int) -> tuple[str, dict[str, Any]]:
    """A random call that these kernels take: tensors, heads of up to 256."""
    rng = np.random.default_rng([SEED, seed])
    while True:
        kernel, call = draw_legal(rng)
        small = call["query"].shape[3] <= 256 and call["value"].shape[3] <= 256
        if isinstance(call["query"], torch.Tensor) and small and kernel.dtype in DTYPES:
            return kernel.dtype, call


def check(seed: int) -> None:
    print(f"FASTATTN_TEST_SEED={SEED}, call {seed}")
    dtype, call = draw(seed)
    wants = call.pop("return_lse"), call.pop("return_weights")
    expected = bounds.expect(**{name: value for name, value in call.items() if name != "out"})
    out, lse, weights = fa.attention(**call, return_lse=True, return_weights=True, backend="triton")
    if call["layout"] == "bshd":
        out = out.transpose(1, 2)
    portable.assert_right(portable.Results(out, lse), expected, dtype)
    allowed = portable.allowed_weights(expected, dtype)
    bounds.assert_within(abs(weights.double().numpy() - expected.weights), allowed)
    given = call.pop("out", None)
    alone = fa.attention(**call, return_lse=wants[0], return_weights=wants[1], backend="triton")
    alone = alone[0] if isinstance(alone, tuple) else alone
    assert torch.equal(alone, out if call["layout"] == "bhsd" else out.transpose(1, 2)), "depends on outputs"
    assert given is None or torch.equal(given, alone)


@pytest.mark.parametrize("seed", range(25))
def test_random_calls(seed: int) -> None:
    check(seed)


@pytest.mark.gpu_slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_calls(part: int) -> None:
    for seed in range(1000 + 50 * part, 1050 + 50 * part):
        check(seed)
