"""Gradients of the compiled kernels, beside operations of torch in float64 and what must not change a bit."""

from __future__ import annotations

import copy
import textwrap
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import fastattn as fa
import shapes
from bounds import as_float64
from kernels import Kernel, assert_same_bits
from processes import output_of
from shapes import Case

NAMES = ("query", "key", "value", "bias", "sinks", "alibi_slopes")
# Of the largest gradient, by the unit in which results are rounded.
TOLERANCE = {"float64": 1e-12, "float32": 4e-6, "float16": 3e-3, "bfloat16": 2e-2}


def leaves(case: Case, dtype: str) -> dict[str, Any]:
    """Tensors and options of a case; all that can have a gradient wants one."""
    call = dict(zip(NAMES, case.tensors(dtype, "torch"), strict=False)) | case.options(dtype, "torch")
    return {
        name: value.detach().requires_grad_() if name in NAMES and isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


def widened(call: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64, and operations of torch."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if name in NAMES and isinstance(value, torch.Tensor)
        else value
        for name, value in call.items()
    } | {"backend": "math"}


def gradients(call: dict[str, Any], *, outputs: str = "out lse weights", seed: int = 0) -> dict[str, Any]:
    """Gradients of a random sum of the outputs."""
    wants = outputs.split()
    results = fa.attention(**call, return_lse="lse" in wants, return_weights="weights" in wants)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for result in results:
        noise = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        finite = torch.where(result.isinf(), torch.zeros_like(result), result)  # lse of rows that see nothing
        loss = loss + (finite.double() * noise).sum()
    names = [name for name in NAMES if getattr(call.get(name), "requires_grad", False)]
    return dict(zip(names, torch.autograd.grad(loss, [call[name] for name in names]), strict=True))


@cache
def expected(case: Case, dtype: str, outputs: str = "out lse weights") -> dict[str, Any]:
    """The true gradients of a case, which all kernels of a dtype share."""
    return gradients(widened(leaves(case, dtype)), outputs=outputs)


def assert_close(actual: dict[str, Any], expected: dict[str, Any], dtype: str) -> None:
    assert list(actual) == list(expected)
    for name, grad in actual.items():
        wanted = as_float64(expected[name])
        assert not grad.isnan().any(), name
        scale = max(1, np.abs(wanted).max(initial=0))
        error = np.abs(as_float64(grad) - wanted).max(initial=0)
        # Sinks and slopes have a type of their own.
        tolerance = max(TOLERANCE[dtype], 1e-7 if grad.dtype == torch.float32 else 0)
        assert error <= tolerance * scale, f"{name}: {error / scale:.3g} of the largest"


@pytest.mark.parametrize("case", shapes.SMALL, ids=str)
def test_every_feature(kernel: Kernel, case: Case) -> None:
    assert_close(gradients(leaves(case, kernel.dtype)), expected(case, kernel.dtype), kernel.dtype)


@pytest.mark.parametrize("outputs", ["out", "out lse", "out weights"])
def test_losses(kernel: Kernel, outputs: str) -> None:
    case = Case("losses", 40, 90, 24, 40, batch=2, query_heads=6, kv_heads=2, causal=True)
    actual = gradients(leaves(case, kernel.dtype), outputs=outputs)
    assert_close(actual, expected(case, kernel.dtype, outputs), kernel.dtype)


@pytest.mark.parametrize("p", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("rows", [3, 70])
def test_dropout(kernel: Kernel, rows: int, p: float) -> None:
    """The same weights fall out as in the oracle, on the way there and back."""
    arrays = ("mask", "bias", "alibi_slopes", "sinks")
    case = Case("dropout", rows, 130, 24, 40, batch=2, query_heads=6, kv_heads=2, softcap=2.0, arrays=arrays)
    for call in (leaves(case, kernel.dtype), leaves(replace(case, softcap=0.0, arrays=()), kernel.dtype)):
        call |= {"dropout_p": p, "dropout_seed": 2**63 + 5, "dropout_offset": 7}
        assert_close(gradients(call), gradients(widened(call)), kernel.dtype)


@pytest.mark.parametrize("group", [1, 3, 5, 6, 7])
@pytest.mark.parametrize("rows", [1, 5, 33, 70])
def test_groups(kernel: Kernel, rows: int, group: int) -> None:
    case = Case("group", rows, 130, 20, query_heads=2 * group, kv_heads=2, softcap=2.0)
    assert_close(gradients(leaves(case, kernel.dtype)), expected(case, kernel.dtype), kernel.dtype)


@pytest.mark.parametrize("keys", [63, 64, 65, 1023, 1100, 2600])
def test_key_groups(kernel: Kernel, keys: int) -> None:
    """Long enough for key blocks to be dealt to several tasks."""
    case = Case("long", 70, keys, 16, query_heads=2, kv_heads=1, causal=True)
    assert_close(gradients(leaves(case, kernel.dtype)), expected(case, kernel.dtype), kernel.dtype)


BIASES = [(2, 6, 40, 50), (1, 6, 40, 50), (2, 1, 40, 50), (40, 50), (50,), (2, 1, 40, 1), (1, 6, 1, 1)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("rows", [40, 5])
def test_bias_of_every_shape(
    kernel: Kernel, shape: tuple[int, ...], rows: int, rng: np.random.Generator
) -> None:
    call = leaves(Case("bias", rows, 50, 24, batch=2, query_heads=6, kv_heads=2, softcap=1.5), kernel.dtype)
    shape = tuple(rows if size == 40 else size for size in shape)
    bias = rng.standard_normal(shape)
    bias[bias < -1.6] = -np.inf
    call["bias"] = shapes.convert(bias, kernel.dtype, "torch").requires_grad_()
    assert_close(gradients(call), gradients(widened(call)), kernel.dtype)


def test_one_bias_row_for_a_batch_of_one(kernel: Kernel) -> None:
    """float32 beside 16-bit tensors, and its gradient in float32."""
    call = leaves(Case("bias32", 20, 30, 16, query_heads=2), kernel.dtype)
    dtype = torch.float64 if kernel.dtype == "float64" else torch.float32
    call["bias"] = torch.zeros(20, 30, dtype=dtype, requires_grad=True)
    actual = gradients(call)
    assert actual["bias"].dtype == dtype
    assert_close(actual, gradients(widened(call)), kernel.dtype)


FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (4, 2)},
    "lengths": {"kv_lengths": [5, 0]},
    "starts": {"kv_starts": [2, 7]},
    "query lengths": {"query_lengths": [3, 0]},
    "segments": {
        "segment_ids": ([[0, 0, 1, 1], [3, 1, 3, 2]], [[0, 0, 0, 1, 1, 1, 2], [1, 3, 3, 1, 2, 2, 3]])
    },
    "offset": {"causal": True, "query_offset": [3, -6]},
    "softcap": {"softcap": 1.2},
    "negative scale": {"scale": -0.3},
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_gradcheck(options: dict[str, Any]) -> None:
    case = Case(
        "check", 4, 7, 3, 5, batch=2, query_heads=2, kv_heads=1, arrays=("bias", "sinks", "alibi_slopes")
    )
    call = leaves(case, "float64") | options
    tensors = {name: call.pop(name).detach().double().requires_grad_() for name in NAMES if name in call}

    def outputs(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse, weights = fa.attention(
            **dict(zip(tensors, values, strict=True)), **call, return_lse=True, return_weights=True
        )
        return out, torch.where(lse.isinf(), torch.zeros_like(lse), lse), weights

    assert gradcheck(outputs, tuple(tensors.values()), nondet_tol=0)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("view", ["permuted", "expanded", "sliced", "offset"])
def test_views(kernel: Kernel, view: str, layout: str) -> None:
    """Gradients have the shape of what they are of, whatever its strides."""
    dtype = getattr(torch, kernel.dtype)
    whole = (torch.randn(3, 4, 2, 50, 34, dtype=torch.float64) / 2).to(dtype)
    tensors = {
        "permuted": lambda i: whole[i].permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        "expanded": lambda i: whole[i][:, :, :, :1].expand(4, 2, 50, 34),
        "sliced": lambda i: whole[i][:, :, ::2, 1:33:2],
        "offset": lambda i: whole[i][:, :, 1:, 1:],
    }[view]
    call: dict[str, Any] = {name: tensors(i).requires_grad_() for i, name in enumerate(NAMES[:3])}
    call |= {"layout": layout, "causal": True}
    actual = gradients(call)
    assert all(grad.shape == call[name].shape for name, grad in actual.items())
    assert_close(actual, gradients(widened(call)), kernel.dtype)


def test_what_is_not_asked_for_is_not_computed(kernel: Kernel) -> None:
    """Any subset of the tensors may require grad, and its gradients are those of the whole."""
    case = Case("subset", 20, 40, 24, query_heads=4, kv_heads=2, arrays=("bias", "sinks", "alibi_slopes"))
    call = leaves(case, kernel.dtype)
    whole = gradients(call)
    for wanted in (("query",), ("key",), ("value", "bias"), ("sinks",), ("alibi_slopes", "key")):
        some = {
            name: value.detach().requires_grad_(name in wanted) if name in NAMES else value
            for name, value in call.items()
        }
        for name, grad in gradients(some).items():
            assert_same_bits(grad, whole[name])


@pytest.mark.parametrize(
    "case",
    [
        Case("many", 40, 1100, 40, 24, query_heads=4, kv_heads=2, causal=True),
        Case(
            "rules",
            70,
            300,
            40,
            24,
            batch=2,
            query_heads=4,
            kv_heads=2,
            softcap=3.0,
            arrays=("mask", "bias", "kv_lengths", "alibi_slopes", "sinks"),
        ),
    ],
    ids=str,
)
def test_threads_change_no_bit(kernel: Kernel, case: Case) -> None:
    call = leaves(case, kernel.dtype)
    try:
        fa.set_num_threads(1)
        alone = gradients(call)
        for threads in (2, 3, 7):
            fa.set_num_threads(threads)
            for name, grad in gradients(call).items():
                assert_same_bits(grad, alone[name])
    finally:
        fa.set_num_threads(None)


def test_neighbours_change_no_bit(kernel: Kernel) -> None:
    """One batch and one head of a call, and that head alone."""
    call = leaves(Case("many", 70, 700, 24, batch=2, query_heads=3, causal=True), kernel.dtype)
    out = fa.attention(**call)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    whole = torch.autograd.grad(out, [call[name] for name in NAMES[:3]], incoming)
    alone = {name: call[name].detach()[1:, 2:].requires_grad_() for name in NAMES[:3]}
    out = fa.attention(**alone, causal=True)
    for grad, one in zip(
        whole, torch.autograd.grad(out, list(alone.values()), incoming[1:, 2:]), strict=True
    ):
        assert_same_bits(one, grad[1:, 2:])


POISON = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "1e30": 1e30}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
@pytest.mark.parametrize("target", ["query", "key", "value", "grad_out"])
def test_hidden_poison_reaches_no_gradient(kernel: Kernel, target: str, poison: float) -> None:
    """A key that nobody sees, and a row that sees nothing: what they hold changes no bit of any gradient."""
    if poison == 1e30 and kernel.dtype == "float16":
        poison = 6e4
    rows, keys = 40, 90
    call = leaves(Case("poison", rows, keys, 24, query_heads=4, kv_heads=2), kernel.dtype)
    mask = torch.rand(1, 1, rows, keys, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 17, :] = mask[..., :, 33] = False
    call["mask"] = mask
    incoming = torch.randn(1, 4, rows, 24, generator=torch.Generator().manual_seed(1)).to(call["query"].dtype)

    def run(tensors: dict[str, Any], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(fa.attention(**tensors), [tensors[name] for name in NAMES[:3]], grad)

    clean = run(call, incoming)
    assert all(grad.isfinite().all() for grad in clean)
    assert (
        (clean[0][:, :, 17] == 0).all()
        and (clean[1][:, :, 33] == 0).all()
        and (clean[2][:, :, 33] == 0).all()
    )
    if target == "grad_out":
        incoming = incoming.clone()
        incoming[:, :, 17, ::2] = poison
    else:
        bad = call[target].detach().clone()
        bad[:, :, 17 if target == "query" else 33, ::2] = poison
        call = call | {target: bad.requires_grad_()}
    assert_same_bits(run(call, incoming), clean)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({"kv_lengths": [60, 85]}, slice(85, None)),
        ({"kv_starts": [30, 50]}, slice(0, 30)),
        ({"segment_ids": ([[1] * 40] * 2, [[0] * 35 + [1] * 55] * 2)}, slice(0, 35)),
        ({"window": (10, 0)}, slice(0, 40)),  # the first row stands at key 50
        ({"causal": True, "query_offset": 10}, slice(50, None)),
    ],
    ids=["length", "start", "segment", "window", "causal"],
)
def test_rules_hide_nan_from_every_gradient(kernel: Kernel, options: dict[str, Any], hidden: slice) -> None:
    case = Case("hidden", 40, 90, 24, batch=2, query_heads=4, kv_heads=2, softcap=2.0)
    call = leaves(case, kernel.dtype) | options
    clean = gradients(call)
    poisoned = {name: call[name].detach().clone() for name in ("key", "value")}
    for tensor in poisoned.values():
        tensor[:, :, hidden, ::2] = torch.nan
        tensor.requires_grad_()
    for name, grad in gradients(call | poisoned).items():
        assert_same_bits(grad, clean[name])


@pytest.mark.parametrize("target", ["query", "key", "value", "grad_out"])
def test_nan_reaches_whoever_sees_it(kernel: Kernel, target: str) -> None:
    """A NaN in a valid place spoils the gradients that depend on it, and no others."""
    rows = 70
    call = leaves(Case("valid", rows, rows, 24, causal=True), kernel.dtype)
    incoming = torch.ones(1, 1, rows, 24, dtype=call["query"].dtype)
    at = 40
    if target == "grad_out":
        incoming[:, :, at] = torch.nan
    else:
        bad = call[target].detach().clone()
        bad[:, :, at] = torch.nan
        call = call | {target: bad.requires_grad_()}
    spoiled = [
        grad.isnan().any(-1).flatten().tolist()
        for grad in torch.autograd.grad(fa.attention(**call), [call[name] for name in NAMES[:3]], incoming)
    ]
    row, past, rest = (
        [i == at for i in range(rows)],
        [i <= at for i in range(rows)],
        [i >= at for i in range(rows)],
    )
    everyone = [True] * rows  # through the rows from `at` on, which see every key before them
    query, key, value = {
        "query": (row, past, past),
        "grad_out": (row, past, past),
        "key": (rest, everyone, everyone),
        "value": (rest, everyone, [False] * rows),
    }[target]
    assert spoiled[0] == query and spoiled[1] == key and spoiled[2] == value


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)], ids=str)
def test_empty(kernel: Kernel, shape: tuple[int, int, int, int]) -> None:
    batch, heads, rows, keys = shape
    dtype = getattr(torch, kernel.dtype)
    query = torch.randn(batch, heads, rows, 8).to(dtype).requires_grad_()
    key, value = (torch.randn(batch, heads, keys, 8).to(dtype).requires_grad_() for _ in range(2))
    sinks = torch.zeros(heads, requires_grad=True)
    out, lse = fa.attention(query, key, value, sinks=sinks, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, sinks))
    assert all((grad == 0).all() for grad in grads[:3])
    assert (grads[3] == (batch * rows if keys == 0 else 0)).all()  # lse is the sink itself


class TestGraph:
    """What torch asks of an operation in its graphs."""

    query = torch.randn(1, 2, 9, 8, requires_grad=True)
    key = torch.randn(1, 2, 11, 8, requires_grad=True)

    def test_a_second_backward_says_that_it_is_not_there(self) -> None:
        out = fa.attention(self.query, self.key, self.key)
        (grad,) = torch.autograd.grad(out.sum(), self.query, create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated itself: .* backend='math'"):
            torch.autograd.grad(grad.sum(), self.key)

    @pytest.mark.parametrize("name", ["query", "bias", "sinks", "alibi_slopes", "grad_out", "grad_lse"])
    def test_so_does_that_of_whatever_gradients_depend_on(self, name: str) -> None:
        """A second derivative that is passed over would be a wrong one: a penalty that is not there."""
        leaves = {"query": self.query.detach(), "bias": torch.randn(9, 11), "sinks": torch.randn(2)}
        leaves |= {
            "alibi_slopes": torch.rand(2),
            "grad_out": torch.randn(1, 2, 9, 8),
            "grad_lse": torch.randn(1, 2, 9),
        }
        leaves[name].requires_grad_()
        first = name if not name.startswith("grad") else "bias"
        leaves[first].requires_grad_()
        options = {other: leaves[other] for other in ("bias", "sinks", "alibi_slopes")}
        key = self.key.detach()
        results = fa.attention(leaves["query"], key, key, **options, return_lse=True)
        weights = leaves["grad_out"], leaves["grad_lse"]
        (grad,) = torch.autograd.grad(results, leaves[first], weights, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated itself"):
            torch.autograd.grad(grad.sum(), leaves[name], allow_unused=True)

    @pytest.mark.parametrize("name", ["grad_out", "key"])
    def test_so_does_that_of_a_plain_call(self, name: str) -> None:
        query, key = (tensor.detach().requires_grad_() for tensor in (self.query, self.key))
        leaves = {"grad_out": torch.randn(1, 2, 9, 8, requires_grad=True), "key": key}
        out = fa.attention(query, key, key)
        (grad,) = torch.autograd.grad(out, query, leaves["grad_out"], create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated itself"):
            torch.autograd.grad(grad.sum(), leaves[name], allow_unused=True)

    def test_the_oracle_has_no_backward(self) -> None:
        with pytest.raises(NotImplementedError, match="backend 'reference' computes no gradients"):
            fa.attention(self.query, self.key, self.key, backend="reference")

    def test_what_was_overwritten_is_noticed(self) -> None:
        key = self.key.detach().clone()
        out = fa.attention(self.query, key, key)
        key.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_no_graph_where_none_is_wanted(self) -> None:
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert not fa.attention(self.query, self.key, self.key).requires_grad
        assert fa.attention(self.query, self.key, self.key).requires_grad

    def test_checkpoint(self) -> None:
        from torch.utils.checkpoint import checkpoint

        def block(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return fa.attention(query * 2, key, key, causal=True)

        plain = torch.autograd.grad(block(self.query, self.key).sum(), (self.query, self.key))
        again = checkpoint(block, self.query, self.key, use_reentrant=False)
        assert_same_bits(torch.autograd.grad(again.sum(), (self.query, self.key)), plain)

    def test_saved_tensors_go_through_hooks(self) -> None:
        packed = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            packed.append(tensor.shape)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = fa.attention(self.query, self.key, self.key)
        plain = torch.autograd.grad(fa.attention(self.query, self.key, self.key).sum(), self.query)
        assert_same_bits(torch.autograd.grad(out.sum(), self.query), plain)
        assert self.query.shape in packed and self.key.shape in packed

    def test_graph_lets_go_of_its_tensors(self) -> None:
        import gc
        import weakref

        query = torch.randn(1, 1, 4, 8, requires_grad=True)
        out = fa.attention(query * 1, query * 1, query * 1)
        alive = weakref.ref(out)
        gc.disable()
        try:
            del out
            assert alive() is None
        finally:
            gc.enable()

    def test_a_backward_may_run_twice(self) -> None:
        out = fa.attention(self.query, self.key, self.key).sum()
        first = torch.autograd.grad(out, (self.query, self.key), retain_graph=True)
        assert_same_bits(torch.autograd.grad(out, (self.query, self.key)), first)

    def test_parameters_of_a_module(self) -> None:
        linear = torch.nn.Linear(8, 8)
        twin = copy.deepcopy(linear)
        for layer, backend in ((linear, None), (twin, "math")):
            x = layer(self.query.detach())
            fa.attention(x, x, x, causal=True, backend=backend).square().sum().backward()
        # Sums over all rows: an entry near zero keeps the error of those that it is the difference of.
        scale = twin.weight.grad.abs().max().item()
        torch.testing.assert_close(linear.weight.grad, twin.weight.grad, rtol=0, atol=1e-5 * scale)


def test_memory_grows_with_the_length_alone() -> None:
    """32768 rows and keys: the probabilities would take 4 GiB."""
    code = """
        import torch, fastattn as fa
        def peak():
            status = dict(line.split(":", 1) for line in open("/proc/self/status"))
            return int(status["VmHWM"].split()[0]) / 1024
        query, key, value = (torch.randn(1, 1, 32768, 64, requires_grad=True) for _ in range(3))
        small = fa.attention(*(x[:, :, :64] for x in (query, key, value)))
        small.sum().backward()
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        fa.attention(query, key, value, causal=True).sum().backward()
        print(peak() - before)
    """
    assert float(output_of(textwrap.dedent(code), timeout=300)) < 200
