"""`fastattn.ops`: a forward and a backward to build on, exact for parts of the keys."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastattn as fa
from fastattn import ops
from kernels import assert_same_bits

NAMES = ("query", "key", "value", "bias", "alibi_slopes", "sinks")


def call_of(
    library: str = "torch", *, rows: int = 20, keys: int = 48, dtype: str = "float64"
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 4, rows, 8), "key": (2, 2, keys, 8), "value": (2, 2, keys, 6)}
    shapes |= {"bias": (4, rows, keys), "alibi_slopes": (4,), "sinks": (4,)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return arrays if library == "numpy" else {name: torch.from_numpy(x) for name, x in arrays.items()}


def incoming(out: Any, lse: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    dout, dlse = (rng.standard_normal(tuple(x.shape)) for x in (out, lse))
    if isinstance(out, np.ndarray):
        return dout.astype(out.dtype), dlse.astype(lse.dtype)
    return torch.from_numpy(dout).to(out.dtype), torch.from_numpy(dlse).to(lse.dtype)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_are_those_of_a_graph(dtype: str, layout: str) -> None:
    call = call_of(dtype=dtype)
    if layout == "bshd":
        call |= {name: call[name].transpose(1, 2) for name in NAMES[:3]}
    rules: dict[str, Any] = {
        "causal": True,
        "softcap": 2.0,
        "layout": layout,
        "dropout_p": 0.2,
        "dropout_seed": 5,
    }
    out, lse = ops.forward(**call, **rules)
    dout, dlse = incoming(out, lse)
    grads = ops.backward(dout, out=out, lse=lse, dlse=dlse, wanted=NAMES, **call, **rules)
    leaves = {name: x.clone().requires_grad_() for name, x in call.items()}
    results = fa.attention(**leaves, **rules, return_lse=True)
    assert_same_bits((out, lse), tuple(x.detach() for x in results))
    expected = torch.autograd.grad(results, list(leaves.values()), (dout, dlse))
    for name, theirs in zip(leaves, expected, strict=True):
        ours = getattr(grads, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_numpy_gets_the_bits_of_torch(dtype: Any) -> None:
    call = {name: x.astype(dtype) for name, x in call_of("numpy").items()}
    as_torch = {
        name: torch.from_numpy(x.astype(np.float64)).to(getattr(torch, np.dtype(dtype).name))
        for name, x in call.items()
    }
    out, lse = ops.forward(**call)
    dout, _ = incoming(out, lse)
    grads = ops.backward(dout, out=out, lse=lse, wanted=NAMES, **call)
    theirs = ops.forward(**as_torch)
    dout = torch.from_numpy(dout.astype(np.float64)).to(theirs[0].dtype)
    expected = ops.backward(dout, out=theirs[0], lse=theirs[1], wanted=NAMES, **as_torch)
    for name in NAMES:
        ours = getattr(grads, name)
        assert isinstance(ours, np.ndarray) and ours.dtype == dtype and ours.shape == call[name].shape
        assert_same_bits(ours, getattr(expected, name))


def test_only_what_is_wanted() -> None:
    call = call_of()
    out, lse = ops.forward(**call)
    whole = ops.backward(out, out=out, lse=lse, wanted=NAMES, **call)
    for wanted in ((), ("key",), ["sinks", "query"], {"bias"}):
        some = ops.backward(out, out=out, lse=lse, wanted=wanted, **call)
        assert [name for name in NAMES if getattr(some, name) is not None] == [
            n for n in NAMES if n in wanted
        ]
        for name in wanted:
            assert_same_bits(getattr(some, name), getattr(whole, name))
    slopes = call.pop("alibi_slopes").tolist()
    listed = ops.backward(out, out=out, lse=lse, wanted=["alibi_slopes"], alibi_slopes=slopes, **call)
    assert_same_bits(listed.alibi_slopes, whole.alibi_slopes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_ring_attention(library: str, causal: bool) -> None:
    """Keys in chunks, as they pass from process to process, give what all of them give at once."""
    call = call_of(library)
    query, key, value = (call[name] for name in NAMES[:3])
    rows, keys, chunk = query.shape[2], key.shape[2], 16
    expected_out, expected_lse = ops.forward(query, key, value, causal=causal)
    dout, dlse = incoming(expected_out, expected_lse)
    expected = ops.backward(dout, query, key, value, expected_out, expected_lse, dlse=dlse, causal=causal)

    chunks = [slice(start, start + chunk) for start in range(0, keys, chunk)]
    places = [{"causal": causal, "query_offset": keys - rows - part.start} for part in chunks]
    states = [
        ops.forward(query, key[:, :, part], value[:, :, part], **place)
        for part, place in zip(chunks, places, strict=True)
    ]
    out, lse = states[0]
    for state in states[1:]:
        out, lse = fa.merge_states(out, lse, *state)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=1e-14)
    grads = [
        ops.backward(dout, query, key[:, :, part], value[:, :, part], out, lse, dlse=dlse, **place)
        for part, place in zip(chunks, places, strict=True)
    ]
    np.testing.assert_allclose(sum(g.query for g in grads), expected.query, rtol=0, atol=1e-13)
    for part, of_part in zip(chunks, grads, strict=True):
        np.testing.assert_allclose(of_part.key, expected.key[:, :, part], rtol=0, atol=1e-13)
        np.testing.assert_allclose(of_part.value, expected.value[:, :, part], rtol=0, atol=1e-13)


def test_a_part_gives_its_share_of_every_gradient() -> None:
    """The bias too. The gradient of sinks comes of out and lse alone, and each part has all of it."""
    call = call_of()
    tables = {name: call[name] for name in ("alibi_slopes", "sinks")}
    out, lse = ops.forward(**call)
    dout, dlse = incoming(out, lse)
    expected = ops.backward(dout, out=out, lse=lse, dlse=dlse, wanted=NAMES, **call)
    offset = call["key"].shape[2] - call["query"].shape[2]
    shares = [
        ops.backward(
            dout,
            call["query"],
            call["key"][:, :, part],
            call["value"][:, :, part],
            out,
            lse,
            dlse=dlse,
            wanted=NAMES,
            bias=call["bias"][..., part],
            query_offset=offset - part.start,
            **tables,
        )
        for part in (slice(0, 15), slice(15, 48))
    ]
    torch.testing.assert_close(shares[0].query + shares[1].query, expected.query)
    torch.testing.assert_close(torch.cat([s.bias for s in shares], -1), expected.bias)
    torch.testing.assert_close(shares[0].alibi_slopes + shares[1].alibi_slopes, expected.alibi_slopes)
    for share in shares:
        torch.testing.assert_close(share.sinks, expected.sinks)


class Scaled(torch.autograd.Function):
    """Somebody's own graph of the pair."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        out, lse = ops.forward(query, key, value, causal=True)
        ctx.save_for_backward(query, key, value, out, lse)
        return out * 2

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        grads = ops.backward(dout * 2, query, key, value, out, lse, causal=True)
        return grads.query, grads.key, grads.value


@pytest.mark.parametrize("compiled", [False, True])
def test_inside_a_function_of_autograd(compiled: bool) -> None:
    leaves = [call_of()[name].requires_grad_() for name in NAMES[:3]]
    apply: Any = Scaled.apply
    if compiled:
        torch._dynamo.reset()
        apply = torch.compile(lambda *x: Scaled.apply(*x), backend="aot_eager", fullgraph=True)
    out = apply(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    expected = fa.attention(*leaves, causal=True) * 2
    assert_same_bits(out.detach(), expected.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), leaves))


def test_autocast_casts_nothing() -> None:
    call = call_of(dtype="float32")
    out, lse = ops.forward(**call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(ops.forward(**call), (out, lse))
        assert ops.backward(out, out=out, lse=lse, **call).query.dtype == torch.float32


def zeros(*shape: int, dtype: Any = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# query (2, 4, 5, 8), key (2, 2, 7, 8), value (2, 2, 7, 6), out (2, 4, 5, 6), lse (2, 4, 5), all float32
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dout shape": (
        {"dout": zeros(2, 4, 5, 8)},
        ValueError,
        "dout must have shape (2, 4, 5, 6), got (2, 4, 5, 8)",
    ),
    "dout rank": ({"dout": zeros(4, 5, 6)}, ValueError, "dout must have shape (2, 4, 5, 6), got (4, 5, 6)"),
    "dout dtype": (
        {"dout": zeros(2, 4, 5, 6, dtype=torch.float64)},
        TypeError,
        "dout must have query's dtype float32, got float64",
    ),
    "dout device": (
        {"dout": zeros(2, 4, 5, 6, device="meta")},
        RuntimeError,
        "dout is on device 'meta', expected 'cpu'",
    ),
    "dout type": (
        {"dout": np.zeros((2, 4, 5, 6), np.float32)},
        TypeError,
        "dout must be a torch tensor like the first argument, got numpy.ndarray",
    ),
    "dout none": (
        {"dout": None},
        TypeError,
        "dout must be a torch tensor like the first argument, got NoneType",
    ),
    "out shape": (
        {"out": zeros(2, 4, 5, 8)},
        ValueError,
        "out must have shape (2, 4, 5, 6), got (2, 4, 5, 8)",
    ),
    "out dtype": (
        {"out": zeros(2, 4, 5, 6, dtype=torch.float16)},
        TypeError,
        "out must have query's dtype float32, got float16",
    ),
    "lse shape": ({"lse": zeros(2, 5, 4)}, ValueError, "lse must have shape (2, 4, 5), got (2, 5, 4)"),
    "lse dtype": (
        {"lse": zeros(2, 4, 5, dtype=torch.float64)},
        TypeError,
        "lse must be float32 for arrays of float32, got float64",
    ),
    "lse device": ({"lse": zeros(2, 4, 5, device="meta")}, RuntimeError, "lse is on device 'meta'"),
    "dlse shape": ({"dlse": zeros(2, 4)}, ValueError, "dlse must have shape (2, 4, 5), got (2, 4)"),
    "dlse dtype": (
        {"dlse": zeros(2, 4, 5, dtype=torch.bfloat16)},
        TypeError,
        "dlse must be float32 for arrays of float32, got bfloat16",
    ),
    "mixed dtypes": (
        {"key": zeros(2, 2, 7, 8, dtype=torch.float64)},
        TypeError,
        "query, key and value must have one dtype, got float32, float64 and float32",
    ),
    "key device": ({"key": zeros(2, 2, 7, 8, device="meta")}, RuntimeError, "key is on device 'meta'"),
    "dropout below": (
        {"dropout_p": -0.1, "dropout_seed": 0},
        ValueError,
        "dropout_p must be from 0 to 1, got -0.1",
    ),
    "dropout above": (
        {"dropout_p": 1.5, "dropout_seed": 0},
        ValueError,
        "dropout_p must be from 0 to 1, got 1.5",
    ),
    "dropout type": (
        {"dropout_p": "0.1", "dropout_seed": 0},
        TypeError,
        "dropout_p must be a real number, got str",
    ),
    "no seed": ({"dropout_p": 0.1}, ValueError, "dropout_seed must be given with dropout"),
    "wanted name": (
        {"wanted": ["mask"]},
        ValueError,
        "wanted must hold names out of query, key, value, bias, alibi_slopes, sinks, got 'mask'",
    ),
    "wanted none": (
        {"wanted": ["bias"]},
        ValueError,
        "wanted must hold arguments that are given, got 'bias', which is None",
    ),
    "wanted type": ({"wanted": "query"}, TypeError, "wanted must be a sequence of names, got str"),
    "unknown": ({"dropout": 0.1}, TypeError, "dropout is no argument; expected one of causal, window, mask"),
    "backend": ({"backend": "reference"}, NotImplementedError, "backend 'reference' computes no gradients"),
    "a graph": (
        {"query": zeros(2, 4, 5, 8).requires_grad_()},
        RuntimeError,
        "query requires grad, and this call computes no gradient of it",
    ),
}


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {
        "dout": zeros(2, 4, 5, 6),
        "query": zeros(2, 4, 5, 8),
        "key": zeros(2, 2, 7, 8),
        "value": zeros(2, 2, 7, 6),
        "out": zeros(2, 4, 5, 6),
        "lse": zeros(2, 4, 5),
    }
    ops.backward(**right)
    with pytest.raises(error, match=re.escape(message)):
        ops.backward(**right | changes)


def test_the_forward_asks_for_a_seed() -> None:
    query = zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"dropout_seed must be given with dropout: .* got None"):
        ops.forward(query, query, query, dropout_p=0.5)
    with pytest.raises(TypeError, match="return_lse is no argument; expected one of causal"):
        ops.forward(query, query, query, return_lse=True)
