"""The backend that composes operations of torch: its results, and gradients of every order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bounds
import fastattn as fa
import fuzz
import shapes
from bounds import as_float64
from kernels import Kernel
from shapes import Case

NAMES = ("query", "key", "value", "bias", "sinks", "alibi_slopes")


def attention(*tensors: Any, **options: Any) -> Any:
    return fa.attention(*tensors, backend="math", **options)


def as_kernel(dtype: str) -> Kernel:
    """What `bounds` asks of: float32 arithmetic, nothing rounded on the way."""
    return Kernel("math", dtype, "math")


@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("case", (*shapes.SMALL, *shapes.DECODE), ids=str)
def test_against_the_oracle(case: Case, dtype: str) -> None:
    returns = {"return_lse": True, "return_weights": True}
    tensors, options = case.tensors(dtype, "torch"), case.options(dtype, "torch")
    results = attention(*tensors, **options, **returns)
    kernel, expected = as_kernel(dtype), bounds.expect(*tensors, **options)
    out, lse, weights = (as_float64(result) for result in results)
    assert results[0].dtype == results[2].dtype == getattr(torch, dtype)
    bounds.assert_within(abs(out - expected.out), bounds.allowed(kernel, expected))
    bounds.assert_lse_within(lse, expected, bounds.allowed_lse(kernel, expected))
    bounds.assert_within(abs(weights - expected.weights), bounds.allowed_weights(kernel, expected))


def test_random_calls() -> None:
    """The random legal calls of every kernel, half of them with dropout."""
    checked = 0
    for n in range(400):
        rng = np.random.default_rng([4, n])
        kernel, call = fuzz.draw_legal(rng)
        if not isinstance(call["query"], torch.Tensor):
            continue
        call |= {"backend": "math"}
        if rng.random() < 0.5:
            call |= {"dropout_p": float(rng.choice([0.1, 0.5])), "dropout_seed": n, "dropout_offset": n % 3}
        fuzz.assert_right(as_kernel(kernel.dtype), call, fuzz.attend(call))
        checked += 1
    assert checked > 100


def test_layout_and_memory() -> None:
    """Results are contiguous in the caller's layout, and `out` is written where there is no graph."""
    tensors = Case("layout", 5, 7, 8, 6, batch=2, query_heads=4, kv_heads=2).tensors("float32", "torch")
    expected = attention(*tensors, causal=True)
    swapped = [tensor.transpose(1, 2) for tensor in tensors]
    found = attention(*swapped, causal=True, layout="bshd")
    assert found.is_contiguous() and found.transpose(1, 2).equal(expected)
    out = torch.full((2, 4, 5, 12), 7.0)
    returned, lse = attention(*tensors, causal=True, out=out[..., ::2], return_lse=True)
    assert returned.data_ptr() == out.data_ptr() and returned.equal(expected) and lse.isfinite().all()
    assert (out[..., 1::2] == 7).all()
    shared = torch.zeros(2, 4, 12, 6)
    with pytest.raises(ValueError, match="out must not overlap value"):
        attention(*tensors[:2], shared[:, :2, 4:11], out=shared[:, :, :5])
    attention(*tensors[:2], shared[:, :2, 5:], out=shared[:, :, :5])


# --- gradients ---------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"batch": 2, "query_heads": 3, "kv_heads": 1}
FEATURES: dict[str, tuple[Case, dict[str, Any]]] = {
    "plain": (Case("g", 3, 4, 3, 2, **SMALL), {}),
    "causal": (Case("g", 3, 4, 3, 2, **SMALL, causal=True), {}),
    "causal-more-queries": (Case("g", 4, 2, 3, 2, **SMALL, causal=True), {}),
    "top-left": (Case("g", 3, 4, 3, 2, **SMALL, causal="top_left"), {}),
    "window": (Case("g", 4, 5, 3, 2, **SMALL, window=(1, 1)), {}),
    "mask": (Case("g", 3, 4, 3, 2, **SMALL, arrays=("mask",)), {}),
    "lengths": (Case("g", 3, 4, 3, 2, **SMALL, arrays=("kv_lengths",)), {}),
    "no-keys": (Case("g", 3, 4, 3, 2, **SMALL), {"kv_lengths": [0, 2]}),
    "offset": (Case("g", 3, 4, 3, 2, **SMALL, causal=True, arrays=("query_offset",)), {}),
    "bias": (Case("g", 3, 4, 3, 2, **SMALL), {"bias": (2, 3, 3, 4)}),
    "bias-rows": (Case("g", 3, 4, 3, 2, **SMALL), {"bias": (3, 1, 4)}),
    "bias-batch": (Case("g", 3, 4, 3, 2, **SMALL), {"bias": (2, 1, 3, 1)}),
    "bias-one": (Case("g", 3, 4, 3, 2, **SMALL, causal=True), {"bias": ()}),
    "alibi": (Case("g", 3, 4, 3, 2, **SMALL, causal=True), {"alibi_slopes": (3,)}),
    "alibi-batch": (Case("g", 3, 4, 3, 2, **SMALL), {"alibi_slopes": (2, 3)}),
    "sinks": (Case("g", 3, 4, 3, 2, **SMALL), {"sinks": (3,)}),
    "sinks-nothing-seen": (Case("g", 4, 2, 3, 2, **SMALL, causal=True), {"sinks": (3,)}),
    "softcap": (Case("g", 3, 4, 3, 2, **SMALL, softcap=0.7), {}),
    "scale": (Case("g", 3, 4, 3, 2, **SMALL), {"scale": -1.3}),
    "dropout": (Case("g", 3, 5, 3, 2, **SMALL), {"dropout_p": 0.4, "dropout_seed": 11}),
    "bshd": (Case("g", 3, 4, 3, 2, **SMALL, causal=True), {"layout": "bshd"}),
    "groups-of-2": (Case("g", 3, 4, 3, 2, query_heads=4, kv_heads=2), {}),
    "everything": (
        Case("g", 4, 6, 3, 2, **SMALL, causal=True, window=(3, 0), softcap=2.0, arrays=("mask",)),
        {
            "kv_lengths": [6, 4],
            "query_offset": [2, 1],
            "bias": (3, 4, 6),
            "alibi_slopes": (3,),
            "sinks": (3,),
            "dropout_p": 0.2,
            "dropout_seed": 3,
        },
    ),
}


def leaves_of(feature: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors that require grad, by argument, and the other arguments; float64."""
    case, extra = FEATURES[feature]
    rng = np.random.default_rng(5)
    leaves = dict(zip(("query", "key", "value"), case.tensors("float64", "torch"), strict=True))
    if extra.get("layout") == "bshd":
        leaves = {name: tensor.transpose(1, 2).contiguous() for name, tensor in leaves.items()}
    options = case.options("float64", "torch") | extra
    for name in [name for name in NAMES if name in extra]:
        leaves[name] = torch.from_numpy(np.asarray(rng.standard_normal(options.pop(name))))
    return {name: tensor.requires_grad_() for name, tensor in leaves.items()}, options


def function_of(names: tuple[str, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """Out, lse and weights of the tensors `names`; an lse of -inf, which has no derivative, as 0."""

    def function(*tensors: Any) -> Any:
        out, lse, weights = fa.attention(
            **dict(zip(names, tensors, strict=True)),
            **options,
            backend="math",
            return_lse=True,
            return_weights=True,
        )
        return out, torch.where(lse == -torch.inf, 0, lse), weights

    return function


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients(feature: str) -> None:
    leaves, options = leaves_of(feature)
    assert gradcheck(function_of(tuple(leaves), options), tuple(leaves.values()), nondet_tol=0)


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_of_gradients(feature: str) -> None:
    leaves, options = leaves_of(feature)
    assert gradgradcheck(function_of(tuple(leaves), options), tuple(leaves.values()), nondet_tol=0)


@pytest.mark.parametrize("alone", NAMES)
def test_any_argument_alone(alone: str) -> None:
    """Those that do not require grad get none, and the others' do not change."""
    leaves, options = leaves_of("everything")
    fa.attention(**leaves, **options, backend="math").sum().backward()
    wanted = leaves[alone].grad
    others = {name: tensor.detach() for name, tensor in leaves.items()}
    one = others[alone].clone().requires_grad_()
    fa.attention(**others | {alone: one}, **options, backend="math").sum().backward()
    assert one.grad.equal(wanted) and wanted.any()
    assert all(tensor.grad is None for name, tensor in others.items())


def test_forward_mode_and_transforms() -> None:
    leaves, options = leaves_of("everything")
    tensors = [tensor.detach() for tensor in leaves.values()]
    function = function_of(tuple(leaves), options)
    by_hand = torch.autograd.grad(function(*[t.requires_grad_() for t in tensors])[0].sum(), tensors)
    tensors = [tensor.detach() for tensor in tensors]
    by_func = torch.func.grad(lambda *args: function(*args)[0].sum(), argnums=tuple(range(6)))(*tensors)
    for one, other in zip(by_func, by_hand, strict=True):
        torch.testing.assert_close(one, other)
    directions = tuple(torch.ones_like(tensor) for tensor in tensors)
    _, pushed = torch.func.jvp(lambda *args: function(*args)[0].sum(), tuple(tensors), directions)
    torch.testing.assert_close(pushed, sum(gradient.sum() for gradient in by_hand))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_accumulate_in_float32(dtype: str) -> None:
    """They are the float64 ones of the same inputs, rounded once; that of a broadcast bias sums 130 rows."""
    case = Case("half", 130, 150, 16, query_heads=6, kv_heads=2, causal=True, softcap=5.0, arrays=("sinks",))
    tensors = case.tensors(dtype, "torch")
    options = case.options(dtype, "torch")
    bias = shapes.convert(np.random.default_rng(0).standard_normal((6, 1, 150)), dtype, "torch")
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal((*case.scores_shape[:3], 16)))

    def gradients(wide: bool) -> Any:
        leaves = [(t.double() if wide else t).detach().clone().requires_grad_() for t in (*tensors, bias)]
        out = attention(*leaves[:3], bias=leaves[3], **options)
        return torch.autograd.grad(out, leaves, direction.to(out.dtype))

    direction = direction.to(tensors[0].dtype)
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for narrow, wide in zip(gradients(False), gradients(True), strict=True):
        assert narrow.dtype == tensors[0].dtype
        error = (narrow.double() - wide).abs()
        assert (error <= 1.001 * unit * wide.abs() + 2e-6 * wide.abs().max()).all()


def test_autocast_does_not_round_the_products() -> None:
    """It casts the arguments, once."""
    tensors = Case("autocast", 9, 9, 16).tensors("float32", "torch")
    expected = attention(*(tensor.bfloat16() for tensor in tensors))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*tensors).equal(expected)


def test_shapes_without_elements() -> None:
    for case in shapes.EMPTY:
        tensors = [tensor.requires_grad_() for tensor in case.tensors("float64", "torch")]
        out = attention(*tensors, **case.options("float64", "torch"))
        assert not out.any()
        for gradient in torch.autograd.grad(out.sum(), tensors):
            assert not gradient.any()


def test_other_devices_are_not_refused() -> None:
    """The meta device computes nothing, but has a device and shapes of its own."""
    query = torch.zeros(2, 4, 5, 8, device="meta")
    assert fa.explain(query, query, query, backend="math").backend == "math"


# --- what is hidden ----------------------------------------------------------------------------------------

HIDING: dict[str, tuple[dict[str, Any], np.ndarray]] = {
    "mask": ({"mask": torch.arange(12) % 3 != 0}, np.arange(12) % 3 == 0),
    "bias": (
        {"bias": torch.where(torch.arange(12) % 3 == 0, -torch.inf, 0.5).double()},
        np.arange(12) % 3 == 0,
    ),
    "kv_lengths": ({"kv_lengths": [7, 7]}, np.arange(12) >= 7),
    "causal": ({"causal": True, "query_offset": 2}, np.arange(12) >= 7),
    "window": ({"window": (1, 0), "query_offset": 4}, (np.arange(12) < 3) | (np.arange(12) > 8)),
}
CASE = Case("poison", 5, 12, 4, 3, batch=2, query_heads=6, kv_heads=2)


def results_and_gradients(tensors: Any, options: dict[str, Any]) -> list[Any]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    results = attention(*leaves, **options, return_lse=True, return_weights=True)
    directions = [torch.linspace(-1, 2, result.numel()).double().view(result.shape) for result in results]
    seen = [
        torch.where(result.isfinite(), result, 0) * d for result, d in zip(results, directions, strict=True)
    ]
    return [*results, *torch.autograd.grad(sum(part.sum() for part in seen), leaves)]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("way", HIDING)
def test_hidden_from_every_row(way: str, softcap: float, poison: float) -> None:
    """No bit of an output or a gradient changes, and the hidden keys and values have gradients of 0."""
    options, unseen = HIDING[way]
    options = options | {"softcap": softcap, "sinks": [0.5] * 6, "alibi_slopes": [0.1] * 6}
    query, key, value = CASE.tensors("float64", "torch")
    clean = results_and_gradients((query, key, value), options)
    bad_key, bad_value = key.clone(), value.clone()
    bad_key[:, :, unseen, ::2] = poison
    bad_value[:, :, unseen, 1:] = poison
    for one, other in zip(results_and_gradients((query, bad_key, bad_value), options), clean, strict=True):
        assert one.isfinite().all() and one.equal(other)
    assert not clean[4][:, :, unseen].any() and not clean[5][:, :, unseen].any()


def test_what_comes_in_for_a_row_that_attends_to_nothing() -> None:
    leaves = [tensor.requires_grad_() for tensor in CASE.tensors("float64", "torch")]
    sinks = torch.zeros(6, requires_grad=True)
    out = attention(*leaves, sinks=sinks, query_lengths=[2, 3])
    incoming = torch.ones_like(out)
    clean = torch.autograd.grad(out, (*leaves, sinks), incoming, retain_graph=True)
    incoming[:, :, 3:] = np.nan
    for one, other in zip(torch.autograd.grad(out, (*leaves, sinks), incoming), clean, strict=True):
        assert one.isfinite().all() and one.equal(other)


def test_sinks_and_softcaps_past_the_range() -> None:
    query, key, value = CASE.tensors("float32", "torch")
    assert not attention(query, key, value, sinks=[1e39] * 6).any()
    assert attention(query, key, value, softcap=1e39).equal(attention(query, key, value))


@pytest.mark.parametrize("target", ["key", "value"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_hidden_from_some_rows(target: str, poison: float) -> None:
    """Rows that do not see it keep their output and their gradient; the others get what the oracle says."""
    tensors = dict(zip(("query", "key", "value"), CASE.tensors("float64", "torch"), strict=True))
    mask = torch.from_numpy(np.random.default_rng(2).random((2, 6, 5, 12)) < 0.5)
    spared = ~mask[..., 4]
    assert spared.any() and not spared.all()
    clean = results_and_gradients(tensors.values(), {"mask": mask})
    bad = {name: tensor.clone() for name, tensor in tensors.items()}
    bad[target][:, :, 4, 0] = poison
    found = results_and_gradients(bad.values(), {"mask": mask})
    for which in (0, 1, 2, 3):  # out, lse, weights, the query's gradient
        torch.testing.assert_close(found[which][spared], clean[which][spared], rtol=1e-12, atol=1e-12)
    expected = fa.attention(*bad.values(), mask=mask, backend="reference")
    torch.testing.assert_close(found[0], expected, equal_nan=True, rtol=1e-12, atol=1e-12)
    assert not found[0][~spared].isfinite().all()


def test_hidden_in_a_bias_and_in_a_query() -> None:
    """NaN in a bias under a mask, and in the query of a row that sees nothing."""
    query, key, value = CASE.tensors("float64", "torch")
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[:, ::2] = False
    mask[3] = False
    bias = torch.zeros(5, 12, dtype=torch.float64)
    clean = results_and_gradients((query, key, value), {"mask": mask, "bias": bias})
    bad_query = query.clone()
    bad_query[:, :, 3] = torch.nan
    leaf = torch.where(mask, bias, torch.nan).requires_grad_()
    found = results_and_gradients((bad_query, key, value), {"mask": mask, "bias": leaf.detach()})
    for one, other in zip(found, clean, strict=True):
        assert one.equal(other)
    assert not found[0][:, :, 3].any() and (found[1][:, :, 3] == -torch.inf).all()
    attention(query, key, value, mask=mask, bias=leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()
    assert not leaf.grad[~mask].any()


def test_math_does_not_bring_torch() -> None:
    code = "import sys, fastattn, fastattn.backends.math; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
