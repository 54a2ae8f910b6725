"""The self-test of the Hopper kernels: ``python -m fastattn.gpu.hopper_trial forward 128 0``.

Small ragged shapes against float32 attention composed of torch's operations, in outputs that hold NaN
before and lie between guards; every result must come out twice with the same bits. Exits with 0, or with
`hopper_check.WRONG` after printing the reason.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.gpu import hopper
from fastattn.gpu.call import Call, Gradients
from fastattn.gpu.hopper_check import WRONG
from fastattn.problem import UNBOUNDED

GUARD = 64  # rows around an output that must stay as they are
# Relative to the norm of the reference: operands and weights of 8 bits give about 3e-3, a wrong tile more
# than 0.1.
TOLERANCE = 2e-2


class Shape(NamedTuple):
    """One call of the trial."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    causal: bool
    offset: int


def shapes(multiprocessors: int) -> list[Shape]:
    """One tile, ragged tiles, rows that see nothing, and so many tiles that each program has several."""
    many = 2 * multiprocessors // 12 + 1
    return [
        # Not a single key: the gradient of its score is 0, and any rounding is more than a share of that.
        Shape(1, 2, 1, 1, 9, False, 8),
        Shape(2, 4, 2, 200, 333, False, 133),
        Shape(1, 2, 2, 333, 200, True, -133),
        Shape(2, many, many, 513, 513, True, 0),
        Shape(2, many, many, 513, 640, False, 0),
    ]


def reference(call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float32."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x.float().repeat_interleave(group, 1) for x in (call.key, call.value))
    scores = call.query.float() @ key.mT * call.scale
    if call.window_right == 0:
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(call.query_offset + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    level = lse.detach().nan_to_num(neginf=0.0)[..., None]
    weights = torch.exp(scores - level)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return weights @ value, lse


def inputs(shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device) -> Call:
    """Build a call with the memory layout of transformers: heads between rows and columns."""
    generator = torch.Generator(device).manual_seed(0)

    def make(rows: int, heads: int) -> Tensor:
        size = (shape.batch, rows, heads, head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype).transpose(1, 2)

    key, value = make(shape.keys, shape.kv_heads), make(shape.keys, shape.kv_heads)
    return Call(
        make(shape.queries, shape.heads), key, value, None, None, None, None, shape.offset,
        UNBOUNDED, 0 if shape.causal else UNBOUNDED, None, None, 0.0, head_dim**-0.5, 0.0, 0, 0,
    )  # fmt: skip


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """Make a tensor of NaN with the shape of `like`, and the larger one that it lies in."""
    batch, heads, rows, head_dim = like.shape
    outer = torch.full(
        (batch, heads, rows + 2 * GUARD, head_dim), torch.nan, dtype=like.dtype, device=like.device
    )
    return outer[:, :, GUARD:-GUARD], outer


def check_guard(name: str, outer: Tensor) -> None:
    """Raise `AssertionError` if something was written around an output."""
    outside = torch.cat([outer[:, :, :GUARD], outer[:, :, -GUARD:]])
    assert bool(outside.isnan().all()), f"something was written outside of {name}"


def compare(name: str, result: Tensor, expected: Tensor) -> None:
    """Raise `AssertionError` where `result` is not `expected`."""
    finite = expected.isfinite()
    assert bool((result.isfinite() == finite).all()), (
        f"{name} is not finite where it should be, or finite where not"
    )
    expected, result = expected[finite].float(), result[finite].float()
    error = float((result - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error < TOLERANCE, f"the relative error of {name} is {error:.1e}"


def try_forward(call: Call) -> list[Tensor]:
    """Compare one call with the reference; return what came out."""
    expected, expected_lse = reference(call)
    out, outer = guarded(call.query)
    lse = torch.full(out.shape[:3], torch.nan, dtype=torch.float32, device=out.device)
    hopper.forward(call, out, lse)
    compare("out", out, expected)
    compare("lse", lse, expected_lse)
    check_guard("out", outer)
    return [out, lse]


def try_backward(call: Call) -> list[Tensor]:
    """Compare the gradients of one call with those of the reference; return what came out."""
    tensors = [x.float().requires_grad_() for x in (call.query, call.key, call.value)]
    expected, lse = reference(call._replace(query=tensors[0], key=tensors[1], value=tensors[2]))
    grad_out = torch.randn_like(call.query)
    gradients = torch.autograd.grad(expected, tensors, grad_out.float())
    results, outers = zip(*map(guarded, (call.query, call.key, call.value)), strict=True)
    out, lse = expected.detach().to(grad_out.dtype), lse.detach()
    hopper.backward(call, out, lse, grad_out, None, Gradients(*results))
    for name, result, gradient, outer in zip(
        ("query", "key", "value"), results, gradients, outers, strict=True
    ):
        compare(f"the gradient of {name}", result, gradient)
        check_guard(f"the gradient of {name}", outer)
    return list(results)


def device_of(index: int) -> torch.device:
    """Give the device of a number."""
    return torch.device("cuda", index)


def main(kind: str, head_dim: int, index: int) -> int:
    """Try every shape; return the exit code."""
    torch.cuda.set_device(index)
    device = device_of(index)
    trial = {"forward": try_forward, "backward": try_backward}[kind]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    for shape in shapes(multiprocessors):
        call = inputs(shape, head_dim, torch.bfloat16, device)
        try:
            runs = []
            for _ in range(2):
                torch.manual_seed(0)
                runs.append(trial(call))
            same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
            assert same, "two runs gave different bits"
        except AssertionError as error:
            print(f"{kind} {shape}: {error}")
            return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
