"""The backward at the ends: positions far from all keys, scores too large for their type, endless sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastattn as fa
import fastattn.ops
from fastattn import _core
from kernels import Kernel, assert_same_bits
from shapes import Case
from test_backward import NAMES, assert_close, gradients, leaves, widened


@pytest.mark.parametrize("outputs", ["out", "out lse", "out weights"])
@pytest.mark.parametrize("arrays", [("alibi_slopes",), ("alibi_slopes", "sinks")], ids=str)
def test_slopes_of_positions_outside_of_the_keys(
    kernel: Kernel, arrays: tuple[str, ...], outputs: str
) -> None:
    """The distance between a position and the nearest key counts as far as dS does not add up to 0."""
    case = Case("outside", 40, 50, 24, batch=3, query_heads=4, kv_heads=2, arrays=arrays)
    call = leaves(case, kernel.dtype) | {"query_offset": [-70, 90, 20]}
    if outputs == "out weights" and kernel.dtype in ("float16", "bfloat16"):
        pytest.skip("weights rounded to 16 bits, whose mean has the error of a distance")
    assert_close(gradients(call, outputs=outputs), gradients(widened(call), outputs=outputs), kernel.dtype)


@pytest.mark.parametrize("rows", [20, 70])
def test_rows_of_the_lowest_number(kernel: Kernel, rows: int) -> None:
    """Every finite bias is a value: a row of finfo.min is a mean, although its lse is that number as well."""
    call = leaves(Case("lowest", rows, 300, 24, query_heads=4, kv_heads=2), kernel.dtype)
    dtype = torch.float64 if kernel.dtype == "float64" else torch.float32
    bias = torch.zeros(rows, 300, dtype=dtype)
    bias[7] = torch.finfo(dtype).min
    bias[11, 100:] = torch.finfo(dtype).min
    bias[13] = 1e6 if dtype == torch.float64 else 0  # which float32 scores do not outlive
    for sinks in (None, torch.zeros(4, requires_grad=True)):
        some = call | {"bias": bias.requires_grad_(), "sinks": sinks}
        assert_close(gradients(some, outputs="out"), gradients(widened(some), outputs="out"), kernel.dtype)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("target", ["query", "grad_out"])
def test_a_row_that_sees_its_sink_alone(kernel: Kernel, target: str, poison: float) -> None:
    call = leaves(Case("sink", 40, 50, 24, query_heads=4, kv_heads=2, arrays=("mask", "sinks")), kernel.dtype)
    incoming = torch.randn(1, 4, 40, 24, generator=torch.Generator().manual_seed(0)).to(call["query"].dtype)

    def run(tensors: dict[str, Any], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf_names = (*NAMES[:3], "sinks")
        return torch.autograd.grad(fa.attention(**tensors), [tensors[name] for name in leaf_names], grad)

    clean = run(call, incoming)
    assert not call["mask"][0, 0, 20].any() and all(grad.isfinite().all() for grad in clean)
    bad = (incoming if target == "grad_out" else call["query"].detach()).clone()
    bad[:, :, 20, ::2] = poison
    if target == "grad_out":
        spoiled = run(call, bad)
    else:
        spoiled = run(call | {"query": bad.requires_grad_()}, incoming)
    assert_same_bits(spoiled, clean)


@pytest.mark.parametrize("sink", [-2e30, 9.887090601047849e29])
def test_a_sink_that_lse_does_not_hold(kernel: Kernel, sink: float) -> None:
    """Rounded to its type, a row's log-sum-exp may be less than the sink that is all of it."""
    sinks = torch.tensor([sink], dtype=torch.float64, requires_grad=True)
    call = leaves(Case("sink", 3, 3, 8), kernel.dtype)
    out = fa.attention(**call, sinks=sinks, kv_lengths=[0] if sink < 0 else None)
    (grad,) = torch.autograd.grad(out.sum(), sinks)
    assert grad == 0


def test_nan_that_comes_in_for_hidden_weights(kernel: Kernel) -> None:
    call = leaves(
        Case("hidden", 40, 50, 24, query_heads=4, kv_heads=2, causal=True, arrays=("sinks",)), kernel.dtype
    )
    _, weights = fa.attention(**call, return_weights=True)
    incoming = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)).to(weights.dtype)
    poisoned = incoming.masked_fill(torch.ones(40, 50, dtype=torch.bool).triu(11), torch.nan)
    assert poisoned.isnan().any()
    names = ("query", "key", "sinks")
    clean, spoiled = (
        torch.autograd.grad(weights, [call[name] for name in names], grad, retain_graph=True)
        for grad in (incoming, poisoned)
    )
    assert_same_bits(spoiled, clean)


@pytest.mark.parametrize("level", [0.0, 200.0])
def test_a_part_of_the_keys(kernel: Kernel, level: float) -> None:
    """P of a part does not add up to 1, and is not to be mended, however large lse is."""
    call = leaves(Case("part", 40, 40, 16, query_heads=2, arrays=("sinks",)), kernel.dtype)
    query, key, value, sinks = (call[name].detach() for name in (*NAMES[:3], "sinks"))
    bias = torch.full(
        (40, 40), level, dtype=torch.float64 if kernel.dtype == "float64" else torch.float32
    ).tril()
    given = {"causal": True, "sinks": sinks + level, "bias": bias}
    out, lse = fa.ops.forward(query, key, value, **given)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    wanted = (*NAMES[:3], "sinks")
    whole = fa.ops.backward(dout, query, key, value, out, lse, wanted=wanted, **given)
    given |= {"bias": bias[:, 8:], "query_offset": -8}  # eight rows see nothing of the part
    part = fa.ops.backward(dout, query, key[:, :, 8:], value[:, :, 8:], out, lse, wanted=wanted, **given)
    close = {"float64": 1e-10, "float32": 1e-3}.get(kernel.dtype, 2e-2)
    for actual, expected in (
        (part.key, whole.key[:, :, 8:]),
        (part.value, whole.value[:, :, 8:]),
        (part.sinks, whole.sinks),
    ):
        torch.testing.assert_close(actual, expected, rtol=close, atol=close)


def backward_of(dtype: str, query: Any, key: Any) -> None:
    """Straight into the kernels: tensors of one element, repeated by strides of 0; dK is to be written."""
    code, wide = _core.DTYPE_CODES[dtype], "float64" if dtype == "float64" else "float32"
    element = np.zeros(8)

    def tensor(*shape: int, of: int = code) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        return element.ctypes.data, of, shape, (0,) * len(shape)

    lse = tensor(*query[:3], of=_core.DTYPE_CODES[wide])
    offsets = tensor(query[0], of=_core.DTYPE_CODES["int64"])
    inputs = (tensor(*query), tensor(*key), tensor(*key), tensor(*query), lse, None, None, None, offsets)
    grads = (None, tensor(*key), None, None, None, None)
    rules = (1.0, 0.0, 0.0, 0, 0, _core.UNBOUNDED, _core.UNBOUNDED, 2)
    _core.attention_backward(*inputs, None, None, tensor(*query), None, None, *grads, *rules)


@pytest.mark.parametrize("head_dim", [1, 16, 512])
@pytest.mark.parametrize("side", ["query", "key"])
def test_sizes_past_all_memory(kernel: Kernel, side: str, head_dim: int) -> None:
    """Strides of 0 repeat an element more often than packed copies could be counted in 64 bits."""
    if kernel.isa == "scalar" and side == "key":
        pytest.skip("takes no scratch by keys, and all time")
    for exponent in (50, 57, 58, 59):
        long, short = (1, 1, 2**exponent // head_dim, head_dim), (1, 1, 3, head_dim)
        with pytest.raises(MemoryError, match="scratch"):
            backward_of(kernel.dtype, *((long, short) if side == "query" else (short, long)))


def test_no_head(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="needs a head"):
        backward_of(kernel.dtype, (1, 0, 3, 16), (1, 1, 8, 16))
