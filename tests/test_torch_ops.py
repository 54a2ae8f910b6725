"""The operators of torch: what torch's own checks say of them, and the transforms that meet them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn as fa
import fastattn.torch  # the operators are there from here on
from fastattn import nn as fnn
from fastattn.torch_ops.arguments import flatten
from kernels import assert_same_bits

DEFAULTS: dict[str, Any] = {
    "causal": False,
    "window": None,
    "mask": None,
    "bias": None,
    "kv_lengths": None,
    "query_offset": None,
    "alibi_slopes": None,
    "sinks": None,
    "softcap": 0.0,
    "scale": None,
    "dropout_p": 0.0,
    "dropout_seed": None,
    "dropout_offset": 0,
    "layout": "bhsd",
    "backend": None,
}


def tensors(
    *, batch: int = 2, rows: int = 5, keys: int = 7, value_dim: int = 6, dtype: Any = torch.float64
) -> list[Any]:
    """Query, key and value of 4 and 2 heads."""
    generator = torch.Generator().manual_seed(rows + keys)
    shapes = [(batch, 4, rows, 8), (batch, 2, keys, 8), (batch, 2, keys, value_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Every argument that changes what is computed; tensors of floats have a gradient.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "scale": -0.3},
    "top left": {"causal": "top_left", "window": (2, None)},
    "window": {"window": (2, 1)},
    "mask": {"mask": numbers(2, 1, 5, 7) > -0.5},
    "bias": {"bias": numbers(4, 5, 7)},
    "lengths": {"kv_lengths": torch.tensor([5, 0])},
    "starts": {"kv_starts": torch.tensor([2, 7]), "query_lengths": torch.tensor([5, 3])},
    "segments": {"segment_ids": ((numbers(2, 5) > 0).long(), (numbers(2, 7) > 0).long())},
    "offset": {"causal": True, "query_offset": 1},
    "offsets": {"causal": True, "query_offset": torch.tensor([3, -6])},
    "alibi": {"alibi_slopes": numbers(4)},
    "alibi of each": {"alibi_slopes": numbers(2, 4)},
    "sinks": {"sinks": numbers(4)},
    "softcap": {"softcap": 1.2},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 2**64 - 3, "dropout_offset": 7},
    "together": {
        "causal": True,
        "window": (4, 0),
        "mask": numbers(5, 7) > -1,
        "bias": numbers(2, 1, 5, 7),
        "alibi_slopes": numbers(4),
        "sinks": numbers(4),
        "softcap": 2.0,
    },
}
features = pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)


def leaves_of(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in call.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def call_of(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return dict(zip(("query", "key", "value"), tensors(**changes), strict=True)) | options


class Watching(TorchDispatchMode):
    """Sends calls to the operators, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastattn":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))


def all_outputs(call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    out, lse, weights = fa.attention(**call, return_lse=True, return_weights=True)
    return out, torch.where(lse.isinf(), torch.zeros_like(lse), lse), weights


@features
@pytest.mark.parametrize("watched", [False, True], ids=["graph", "operator"])
def test_gradcheck(options: dict[str, Any], watched: bool) -> None:
    """Of out, lse and weights, in every argument that has a gradient, with no tolerance for other bits."""
    call = call_of(options)
    leaves = leaves_of(call)

    def function(*values: torch.Tensor) -> Any:
        return all_outputs(call | dict(zip(leaves, values, strict=True)))

    if not watched:
        assert gradcheck(function, tuple(leaves.values()), nondet_tol=0, fast_mode=True)
        return
    with Watching() as mode:
        assert gradcheck(function, tuple(leaves.values()), nondet_tol=0, fast_mode=True)
    assert {"forward", "backward"} == set(mode.seen)


@features
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_the_operator_has_the_bits_of_a_call_in_the_graph(options: dict[str, Any], layout: str) -> None:
    call = call_of(options, dtype=torch.float32) | {"layout": layout}
    call |= {name: value.float() for name, value in leaves_of(call).items()}
    if layout == "bshd":
        call |= {name: call[name].transpose(1, 2) for name in ("query", "key", "value")}
    leaves = leaves_of(call)
    results = []
    for mode in Watching(), torch.enable_grad():
        with mode:
            outputs = all_outputs(call | leaves)
            grads = torch.autograd.grad(sum(out.square().sum() for out in outputs), list(leaves.values()))
        results.append([tensor.detach() for tensor in (*outputs, *grads)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.is_contiguous() and ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert_same_bits(ours, theirs)


SAMPLES: dict[str, Any] = {
    "contiguous": lambda: tensors(),
    "permuted": lambda: [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in tensors()],
    "expanded": lambda: [x[:1].expand(2, -1, -1, -1) for x in tensors()],
    "sliced": lambda: [tensors()[0][:, :, ::2, :6], *(x[..., 1:7] for x in tensors(value_dim=8)[1:])],
    "no batch": lambda: tensors(batch=0),
    "no rows": lambda: tensors(rows=0),
    "no keys": lambda: tensors(keys=0),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_opcheck_of_strides(sample: Any) -> None:
    call = [tensor.requires_grad_() for tensor in sample()]
    operands, rules = flatten(call[0], **DEFAULTS | {"causal": True})
    torch.library.opcheck(torch.ops.fastattn.forward.default, (*call, *operands, *rules, True))


OPCHECKED = ("mask", "bias", "lengths", "starts", "segments", "offset", "alibi", "sinks", "dropout")


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_of_arguments(name: str) -> None:
    call = call_of(FEATURES[name] | {"layout": "bshd"})
    call |= {name: call[name].transpose(1, 2) for name in ("query", "key", "value")}
    call |= leaves_of(call)
    query, key, value = (call.pop(name) for name in ("query", "key", "value"))
    operands, rules = flatten(query, **DEFAULTS | call)
    torch.library.opcheck(
        torch.ops.fastattn.forward.default,
        (query, key, value, *operands, *rules, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_opcheck_of_the_backward() -> None:
    query, key, value = tensors()
    operands, rules = flatten(query, **DEFAULTS | {"bias": numbers(5, 7), "sinks": numbers(4)})
    out, lse, weights = torch.ops.fastattn.forward(query, key, value, *operands, *rules, True)
    for wanted in [True] * 4 + [False, True], [False, False, True, False, False, False]:
        arguments = (out, lse, weights, out, lse, weights, query, key.mT.contiguous().mT, value)
        torch.library.opcheck(
            torch.ops.fastattn.backward.default,
            (*arguments, *operands, *rules, wanted),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


class TestVmap:
    @staticmethod
    def check(function: Any, in_dims: Any, *mapped: Any, calls: int | None = 1) -> None:
        """Beside a loop; `calls`: how often the operator may run."""
        size = next(x.shape[d] for x, d in zip(mapped, in_dims, strict=True) if d is not None)
        with Watching() as mode:
            got = torch.func.vmap(function, in_dims)(*mapped)
        one_by_one = [
            function(*(x if d is None else x.select(d, i) for x, d in zip(mapped, in_dims, strict=True)))
            for i in range(size)
        ]
        got = got if isinstance(got, tuple) else (got,)
        one_by_one = [x if isinstance(x, tuple) else (x,) for x in one_by_one]
        for ours, *theirs in zip(got, *one_by_one, strict=True):
            torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=1e-12)
        assert len(mode.seen) == calls * (2 if "backward" in mode.seen else 1)

    @pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 1), (3, 4, None)], ids=str)
    @pytest.mark.parametrize("layout", ["bhsd", "bshd"])
    def test_tensors(self, in_dims: Any, layout: Any) -> None:
        batch = tensors(batch=6)
        mapped = [
            x[:2] if dim is None else x.unflatten(0, (3, 2)).movedim(0, dim)
            for x, dim in zip(batch, in_dims, strict=True)
        ]
        if layout == "bshd":  # so are lengths and heads, whichever they were
            mapped = [
                x.transpose(-3, -2) if d != 3 and d != 4 else x for x, d in zip(mapped, in_dims, strict=True)
            ]
            if 3 in in_dims:
                return
        self.check(lambda *x: fa.attention(*x, causal=True, layout=layout, return_lse=True), in_dims, *mapped)

    @pytest.mark.parametrize(
        "name, of_each",
        [
            ("mask", numbers(3, 5, 7) > 0),
            ("mask", numbers(3, 2, 1, 5, 7) > 0),
            ("bias", numbers(3, 1, 4, 1, 7)),
            ("bias", numbers(3, 7)),
            ("kv_lengths", torch.tensor([[1, 7], [0, 3], [5, 5]])),
            ("query_offset", torch.tensor([[1, 7], [0, 3], [-5, 5]])),
            ("alibi_slopes", numbers(3, 4)),
            ("alibi_slopes", numbers(3, 2, 4)),
        ],
    )
    def test_operands(self, name: str, of_each: Any) -> None:
        query, key, value = tensors()
        self.check(
            lambda x, q: fa.attention(q, key, value, causal=True, return_weights=True, **{name: x}),
            (0, None),
            of_each,
            query,
        )
        self.check(
            lambda q: fa.attention(q, key, value, causal=True, **{name: of_each[0]}),
            (0,),
            torch.stack([query, 2 * query, -query]),
        )

    @features
    def test_gradients_of_each(self, options: dict[str, Any]) -> None:
        """``vmap(grad(f))``: for each of the batch a gradient of its own, also of what it shares."""
        call = call_of(options)
        names = list(leaves_of(call))
        query = torch.stack([call["query"], -call["query"]])

        def loss(*values: torch.Tensor) -> torch.Tensor:
            outputs = fa.attention(**call | dict(zip(names, values, strict=True)), return_lse=True)
            return sum(torch.where(x.isinf(), 0, x).square().sum() for x in outputs)

        gradients = torch.func.grad(loss, argnums=tuple(range(len(names))))
        shared = [call[name] for name in names[1:]]
        got = torch.func.vmap(gradients, (0, *[None] * len(shared)))(query, *shared)
        for at in range(2):
            leaves = [x.detach().clone().requires_grad_() for x in (query[at], *shared)]
            expected = torch.autograd.grad(loss(*leaves), leaves)
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours[at], theirs, rtol=1e-10, atol=1e-12)

    def test_what_counts_its_place_in_the_batch_is_taken_one_by_one(self) -> None:
        query, key, value = tensors()
        queries = torch.stack([query, query])
        dropped = {"dropout_p": 0.5, "dropout_seed": 3}
        self.check(lambda q: fa.attention(q, key, value, **dropped), (0,), queries, calls=2)
        sinks = numbers(2, 4)
        self.check(lambda s: fa.attention(query, key, value, sinks=s), (0,), sinks, calls=2)

    @pytest.mark.parametrize("randomness", ["same", "different", "error"])
    def test_a_seed_that_is_drawn(self, randomness: str) -> None:
        query, key, value = tensors()

        def mapped() -> torch.Tensor:
            function = torch.func.vmap(
                lambda q: fa.attention(q, key, value, dropout_p=0.5), randomness=randomness
            )
            return function(torch.stack([query, query]))

        if randomness == "error":
            with pytest.raises(RuntimeError, match="random"):
                mapped()
            return
        first, second = mapped()
        assert first.equal(second) == (randomness == "same")


def test_torch_func_of_gradients() -> None:
    query, key, value = tensors()
    jacobian = torch.func.jacrev(lambda q: fa.attention(q, key, value))(query)
    expected = torch.autograd.functional.jacobian(
        lambda q: fa.attention(q, key, value, backend="math"), query
    )
    torch.testing.assert_close(jacobian, expected)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated itself: .* backend='math'"):
        torch.func.jacrev(torch.func.jacrev(lambda q: fa.attention(q, key, value).sum()))(query)


def test_a_second_backward_of_the_operator_says_that_it_is_not_there() -> None:
    query, key, value = (x.requires_grad_() for x in tensors())
    with Watching(), pytest.raises(RuntimeError, match=r"cannot be differentiated itself: .* backend='math'"):
        (grad,) = torch.autograd.grad(fa.attention(query, key, value).sum(), query, create_graph=True)
        torch.autograd.grad(grad.sum(), key)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (4,), (5, 0)], ids=str)
def test_the_operator_computes_what_is_asked_for(wanted: tuple[int, ...]) -> None:
    call = call_of({"bias": numbers(5, 7), "sinks": numbers(4), "alibi_slopes": numbers(4)})
    names = list(call)
    asked = {names[at]: call[names[at]].requires_grad_() for at in wanted}

    class Counting(Watching):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = super().__torch_dispatch__(function, types, args, kwargs)
            if function is torch.ops.fastattn.backward.default:
                assert len(results) == len(wanted)
            return results

    with Counting() as mode:
        grads = torch.autograd.grad(fa.attention(**call).sum(), list(asked.values()))
    assert mode.seen == ["forward", "backward"]
    assert_same_bits(grads, torch.autograd.grad(fa.attention(**call).sum(), list(asked.values())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"bias": numbers(5, 7).float()}], ids=["plain", "bias"])
def test_autocast(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Query, key and value are cast as for torch's attention; gradients come in the dtype of the leaves."""
    leaves = [x.requires_grad_() for x in tensors(dtype=torch.float32)]
    with torch.autocast("cpu", dtype=dtype):
        out = fa.attention(*leaves, causal=True, **options)
        theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True)
        assert fa.explain(*leaves).call.startswith(str(dtype)[6:])
    assert out.dtype == theirs.dtype == dtype
    assert_same_bits(
        out.detach(), fa.attention(*(x.detach().to(dtype) for x in leaves), causal=True, **options)
    )
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), leaves))
    with torch.autocast("cpu", dtype=dtype):
        assert fa.attention(*tensors()).dtype == torch.float64
        assert fa.attention(*tensors(dtype=torch.float32), backend="math").dtype == dtype


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_drops_the_same_again(use_reentrant: bool) -> None:
    leaves = [x.requires_grad_() for x in tensors()]

    def block(query: Any, key: Any, value: Any) -> Any:
        return fa.attention(query * 2, key, value, dropout_p=0.3)

    torch.manual_seed(0)
    expected = torch.autograd.grad(block(*leaves).sum(), leaves)
    torch.manual_seed(0)
    checkpoint(block, *leaves, use_reentrant=use_reentrant).sum().backward()
    assert_same_bits(tuple(x.grad for x in leaves), expected)


def test_inference_mode() -> None:
    leaves = [x.requires_grad_() for x in tensors()]
    expected = fa.attention(*leaves).detach()
    with torch.inference_mode():
        for options in {}, {"softcap": 0}, {"return_lse": True}:
            results = fa.attention(*leaves, **options)
            out = results[0] if isinstance(results, tuple) else results
            assert out.is_inference() and not out.requires_grad
            assert_same_bits(out.clone(), expected)
        with Watching():
            assert_same_bits(fa.attention(*leaves).clone(), expected)


@pytest.mark.parametrize(
    "module",
    [
        fnn.SelfAttention(16, 2, position="rotary", sinks=True),
        fnn.SelfAttention(16, 2, position="alibi", fused=True),
        fnn.MultiheadAttention(16, 2, batch_first=True),
        fnn.TransformerEncoderLayer(16, 2, batch_first=True, dropout=0.0),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_are_copied_and_pickled(module: torch.nn.Module) -> None:
    x = torch.randn(2, 5, 16)
    arguments = (x, x, x) if isinstance(module, fnn.MultiheadAttention) else (x,)

    def gradients(of: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        out = of(*arguments)
        out = out[0] if isinstance(out, tuple) else out
        return out.detach(), *torch.autograd.grad(out.square().sum(), list(of.parameters()))

    expected = gradients(module)
    for twin in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        assert_same_bits(gradients(twin), expected)


def test_what_a_graph_has_can_be_copied() -> None:
    """A result without a graph of its own; one in a graph is refused as torch refuses it."""
    query, key, value = tensors()
    out = fa.attention(query, key, value)
    assert copy.deepcopy(out).equal(pickle.loads(pickle.dumps(out)))


def test_fakes_agree_with_results() -> None:
    from torch._subclasses import FakeTensorMode

    options: dict[str, Any] = {"layout": "bshd", "return_lse": True, "return_weights": True}
    for dtype in torch.float64, torch.bfloat16:
        call = [x.transpose(1, 2) for x in tensors(dtype=dtype)]
        real = fa.attention(*call, **options)
        with FakeTensorMode() as mode:
            fakes = fa.attention(*(mode.from_tensor(x) for x in call), **options)
        for ours, fake in zip(real, fakes, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_a_trace_records_the_operator() -> None:
    traced = torch.jit.trace(lambda q: fa.attention(q, q, q, causal=True), torch.randn(1, 2, 5, 8))
    assert "fastattn::forward" in str(traced.graph)
    query = torch.randn(1, 2, 9, 8)
    assert traced(query).equal(fa.attention(query, query, query, causal=True))
