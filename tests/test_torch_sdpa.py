"""`fastattn.scaled_dot_product_attention` beside torch's own: values, gradients, shapes and refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn.integrations import torch_sdpa

# Before anything is patched; tests of patch_sdpa may run first, in the same process.
torchs_own = torch._C._nn.scaled_dot_product_attention
ours = fastattn.scaled_dot_product_attention
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes to torch's function fails."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch's own function was called")

    monkeypatch.setattr(torch_sdpa, "_torch_sdpa", refuse)


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what goes to torch's function."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return torchs_own(*args, **kwargs)

    monkeypatch.setattr(torch_sdpa, "_torch_sdpa", count)
    return calls


def results(function: Callable[..., torch.Tensor], args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Out, and the gradients of whatever requires one."""
    leaves = [x for x in [*args, kwargs.get("attn_mask")] if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.manual_seed(0)
    out = function(*args, **kwargs)
    assert out.requires_grad == bool(leaves)
    if not leaves:
        return [out]
    factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, factors)]


def in_float64(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def exactly(args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The same call in float64, by torch."""
    return results(torchs_own, [in_float64(x) for x in args], {k: in_float64(x) for k, x in kwargs.items()})


def assert_like_torch(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Shapes and dtypes are torch's, and errors from a float64 computation within torch's own tolerances."""
    got, theirs, exact = results(ours, args, kwargs), results(torchs_own, args, kwargs), exactly(args, kwargs)
    for mine, yours, best in zip(got, theirs, exact, strict=True):
        assert mine.shape == yours.shape and mine.dtype == yours.dtype
        torch.testing.assert_close(mine, best.to(mine.dtype))


def by_flash(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """Torch's flash attention, which takes four axes alone and, like fastattn, keeps out in its own dtype."""
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in tensors))
    expanded = [x.expand(*leading, *x.shape[-2:])[(None,) * (2 - len(leading))] for x in tensors]
    out = torchs_own(*expanded, **options)
    return out.reshape(*leading, *out.shape[-2:])


@pytest.mark.parametrize("requires_grad", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_torchs_own_samples(dtype: torch.dtype, requires_grad: bool, no_fallback: None) -> None:
    # Takes seconds, and needs expecttest.
    from torch.testing._internal.common_methods_invocations import op_db

    operator = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = list(operator.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(samples) >= 25
    for sample in samples:
        args = [sample.input, *sample.args]
        got, theirs = results(ours, args, sample.kwargs), results(torchs_own, args, sample.kwargs)
        for mine, yours in zip(got, theirs, strict=True):
            assert mine.shape == yours.shape and mine.dtype == yours.dtype and mine.isfinite().all()
        if sample.kwargs["dropout_p"] > 0:  # other numbers for one seed, but always those
            assert all(map(torch.equal, got, results(ours, args, sample.kwargs)))
            continue
        # Numbers up to 9 make for scores of up to 9 * 9 * sqrt(8) = 229, whose rounding moves probabilities
        # by as many units; gradients lose more, in cancellation, in torch's flash attention as well.
        flash, exact = results(by_flash, args, sample.kwargs), exactly(args, sample.kwargs)
        # What is exact has errors of its own: rounded are the numbers that cancel, as large as any result.
        uncertain = 64 * torch.finfo(torch.float64).eps * max(best.abs().max() for best in exact)
        for mine, yours, best in zip(got, flash, exact, strict=True):
            accumulated = torch.promote_types(mine.dtype, torch.float32)
            room = 229 * torch.finfo(accumulated).eps + 4 * torch.finfo(mine.dtype).eps
            bound = 2 * (yours - best).abs().max() + room * best.abs().max() + uncertain
            assert (mine - best).abs().max() <= bound


def shaped(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def allowed(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def added(*shape: int) -> torch.Tensor:
    return shaped(shape, seed=2)[0]


Q, K, V = (2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 8)
SHAPES: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "2-D": (((4, 8), (6, 8), (6, 8)), {}),
    "2-D mask": (((4, 8), (6, 8), (6, 8)), {"attn_mask": allowed(4, 6)}),
    "2-D query": (((4, 8), (5, 6, 8), (5, 6, 8)), {"is_causal": True}),
    "2-D key": ((Q, (6, 8), (6, 8)), {}),
    "3-D value alone": (((4, 8), (6, 8), (5, 6, 8)), {"attn_mask": added(4, 6)}),
    "3-D mask": (((3, 4, 8), (3, 6, 8), (3, 6, 8)), {"attn_mask": allowed(3, 4, 6)}),
    "3-D one mask": (((3, 4, 8), (3, 6, 8), (3, 6, 8)), {"attn_mask": added(1, 1, 6)}),
    "5-D": (((2, 2, 3, 4, 8), (2, 2, 3, 6, 8), (2, 2, 3, 6, 8)), {}),
    "5-D mask of 4": (((2, 2, 3, 4, 8), (3, 6, 8), (2, 1, 3, 6, 8)), {"attn_mask": added(2, 1, 4, 6)}),
    "5-D mask": (((2, 2, 1, 4, 8), (3, 6, 8), (2, 1, 3, 6, 8)), {"attn_mask": allowed(2, 1, 3, 1, 6)}),
    "6-D": (((2, 1, 2, 3, 4, 8), (2, 1, 3, 6, 8), (3, 6, 8)), {"is_causal": True}),
    "one batch": ((Q, (1, 3, 6, 8), V), {}),
    "one head of query": (((2, 1, 4, 8), K, V), {}),
    "one head of key": ((Q, (2, 1, 6, 8), V), {}),
    "one head of both": ((Q, (2, 1, 6, 8), (1, 1, 6, 8)), {"attn_mask": added(3, 4, 6)}),
    "heads of value alone": (((1, 1, 4, 8), (1, 1, 6, 8), V), {"attn_mask": added(1, 1, 4, 6)}),
    "groups": (((2, 6, 4, 8), K, V), {"enable_gqa": True}),
    "groups 3-D": (((6, 4, 8), (3, 6, 8), (3, 6, 8)), {"enable_gqa": True, "attn_mask": allowed(6, 4, 6)}),
    "groups 5-D": (((2, 2, 6, 4, 8), (2, 1, 3, 6, 8), (3, 6, 8)), {"enable_gqa": True, "is_causal": True}),
    "groups, one batch": (((2, 6, 4, 8), (1, 3, 6, 8), (1, 3, 6, 8)), {"enable_gqa": True}),
    "groups that differ": (((2, 6, 4, 8), (2, 3, 6, 8), (2, 2, 6, 8)), {"enable_gqa": True}),
    "no groups": ((Q, K, V), {"enable_gqa": True}),
    "wide value": ((Q, K, (2, 3, 6, 11)), {"is_causal": True}),
    "tall causal": (((1, 1, 7, 8), (1, 1, 2, 8), (1, 1, 2, 8)), {"is_causal": True}),
    "square causal": ((K, K, V), {"is_causal": True}),
    "float mask": ((Q, K, V), {"attn_mask": added(4, 6)}),
    "one column": ((Q, K, V), {"attn_mask": added(2, 1, 4, 1)}),
    "scale": ((Q, K, V), {"scale": -0.3}),
    "scale 0": ((Q, K, V), {"scale": 0}),
    "wide heads": (((1, 1, 3, 600), (1, 1, 2, 600), (1, 1, 2, 8)), {}),
    "no keys": ((Q, (2, 3, 0, 8), (2, 3, 0, 8)), {}),
    "no keys, 3-D": (((3, 4, 8), (3, 0, 8), (3, 0, 8)), {"is_causal": True}),
    "no queries": (((2, 3, 0, 8), K, V), {}),
    "no batch": (((0, 3, 4, 8), (0, 3, 6, 8), (0, 3, 6, 8)), {}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, no_fallback: None) -> None:
    shapes, options = SHAPES[name]
    assert_like_torch(shaped(*shapes), options)


ODD_SHAPES = {
    "no heads": ((2, 0, 4, 8), (2, 0, 6, 8), (2, 0, 6, 8)),
    "no columns": ((2, 3, 4, 0), (2, 3, 6, 0), V),
    "no columns of value": (Q, K, (2, 3, 6, 0)),
}


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_shapes_that_mean_little_are_torchs(name: str, fallbacks: list[int]) -> None:
    assert_like_torch(shaped(*ODD_SHAPES[name]), {})
    assert fallbacks


@pytest.mark.parametrize("shape", [Q, Q[1:], Q[2:]], ids=["4-D", "3-D", "2-D"])
@pytest.mark.parametrize("mask", [allowed(4, 6), added(4, 6).detach()], ids=["bool", "float"])
def test_mask_and_causal_both_hold(shape: tuple[int, ...], mask: torch.Tensor, no_fallback: None) -> None:
    query, key, value = shaped(shape, (*shape[:-2], 6, 8), (*shape[:-2], 6, 8))
    past = torch.ones(4, 6, dtype=torch.bool).tril()
    both = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -INF)
    expected = torchs_own(query, key, value, both)
    torch.testing.assert_close(ours(query, key, value, mask, is_causal=True), expected)


@pytest.mark.parametrize("mask", [torch.zeros(4, 6, dtype=torch.bool), torch.full((4, 6), -INF)])
def test_rows_that_see_nothing_are_zero(mask: torch.Tensor, no_fallback: None) -> None:
    for result in results(ours, shaped(Q, K, V), {"attn_mask": mask}):
        assert not result.any()


def test_what_is_hidden_reaches_nothing(no_fallback: None) -> None:
    """Where torch's function hands on a NaN times 0."""
    query, key, value = (x.detach() for x in shaped(Q, K, V))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 5] = False
    expected = torchs_own(query, key, value, mask)
    value[:, :, 5] = math.nan
    torch.testing.assert_close(ours(query, key, value, mask), expected)
    assert torchs_own(query, key, value, mask).isnan().any()


@pytest.mark.parametrize("p", [0.25, 1, 1.0])
def test_dropout_keeps_or_scales(p: float, no_fallback: None) -> None:
    query, key = (x.detach() for x in shaped((2, 3, 40, 8), (2, 3, 50, 8)))
    value = torch.eye(50).expand(2, 3, 50, 50)
    weights = torchs_own(query, key, value)
    torch.manual_seed(3)
    dropped = ours(query, key, value, dropout_p=p)
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, weights / max(1 - p, 1e-9), 0))
    assert abs(kept.float().mean() - (1 - p)) < 0.02
    assert torch.equal(ours(query, key, value, dropout_p=p), dropped) == (p == 1)
    torch.manual_seed(3)
    assert torch.equal(ours(query, key, value, dropout_p=p), dropped)


def test_without_dropout_the_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    ours(*shaped(Q, K, V))
    assert torch.equal(torch.get_rng_state(), state)


def test_output_lies_in_memory_as_query_does() -> None:
    by_rows = [torch.randn(2, length, 3, 8).transpose(1, 2).requires_grad_() for length in (4, 6, 6)]
    for args in (by_rows, [x.contiguous() for x in by_rows]):
        out, expected = ours(*args), torchs_own(*args)
        assert out.stride() == expected.stride()
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mask", [None, allowed(4, 6), added(4, 6)], ids=["none", "bool", "float"])
def test_autocast(mask: torch.Tensor | None, no_fallback: None) -> None:
    query, key, value = shaped(Q, K, V)
    args = [query, key.double().half(), value, mask]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = ours(*args), torchs_own(*args)
        double = ours(*(x.double() for x in (query, key, value)))
    assert got.dtype == expected.dtype == torch.bfloat16 and double.dtype == torch.float64
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)
    got.sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


def bad_calls() -> dict[str, Callable[[Callable[..., Any]], Any]]:
    query, key, value = (x.detach() for x in shaped(Q, K, V))
    square = torch.ones(4, 6)
    return {
        "1-D": lambda f: f(query[0, 0, 0], key, value),
        "key 1-D": lambda f: f(query, key[0, 0, 0], value),
        "columns": lambda f: f(query, key[..., :7], value),
        "heads": lambda f: f(query, key[:, :2], value[:, :2]),
        "batch": lambda f: f(query, torch.cat([key, key[:1]]), torch.cat([value, value[:1]])),
        "mixed dtypes": lambda f: f(query, key.double(), value),
        "mixed dtypes of value": lambda f: f(query, key, value.half()),
        "integers": lambda f: f(query.int(), key.int(), value.int()),
        "bool": lambda f: f(query.bool(), key.bool(), value.bool()),
        "complex": lambda f: f(query.cfloat(), key.cfloat(), value.cfloat()),
        "float8": lambda f: f(*(x.to(torch.float8_e4m3fn) for x in (query, key, value))),
        "devices": lambda f: f(query, key.to("meta"), value),
        "sparse": lambda f: f(query.to_sparse(), key, value),
        "groups that do not divide": lambda f: f(query[:, :2], key, value, enable_gqa=True),
        "groups of 2-D": lambda f: f(query[0, 0], key[0, 0], value[0, 0], enable_gqa=True),
        "integer mask": lambda f: f(query, key, value, square.int()),
        "double mask": lambda f: f(query, key, value, square.double()),
        "half mask": lambda f: f(query, key, value, square.half()),
        "columns of mask": lambda f: f(query, key, value, square[:, :5]),
        "batch of mask": lambda f: f(query, key, value, square.expand(3, 1, 4, 6)),
        "5-D mask": lambda f: f(query, key, value, square.expand(5, 1, 1, 4, 6)),
        "mask larger than scores": lambda f: f(query[:1], key[:1], value[:1], square.expand(2, 3, 4, 6)),
        "1-D mask": lambda f: f(query, key, value, square[0]),
        "0-D mask": lambda f: f(query, key, value, square[0, 0]),
        "list for a mask": lambda f: f(query, key, value, [1]),
        "dropout below 0": lambda f: f(query, key, value, dropout_p=-0.1),
        "dropout above 1": lambda f: f(query, key, value, dropout_p=1.5),
        "dropout NaN": lambda f: f(query, key, value, dropout_p=math.nan),
        "dropout str": lambda f: f(query, key, value, dropout_p="a"),
        "dropout None": lambda f: f(query, key, value, dropout_p=None),
        "causal int": lambda f: f(query, key, value, is_causal=1),
        "causal None": lambda f: f(query, key, value, is_causal=None),
        "scale str": lambda f: f(query, key, value, scale="a"),
        "groups int": lambda f: f(query, key, value, enable_gqa=1),
        "list": lambda f: f([1], key, value),
        "None": lambda f: f(None, key, value),
        "NumPy": lambda f: f(query.numpy(), key.numpy(), value.numpy()),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_raises_what_torch_raises(name: str) -> None:
    call = bad_calls()[name]
    with pytest.raises(Exception) as theirs:
        call(torchs_own)
    with pytest.raises(theirs.type) as mine:
        call(ours)
    # Every argument but scale is handed on by position, of which torch tells.
    said = [re.sub(r" \(position \d\)", "", str(error.value)) for error in (mine, theirs)]
    assert mine.type is theirs.type and said[0] == said[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f(x),
        lambda f, x: f(x, x, x, None, 0.0, False, 1.0),
        lambda f, x: f(x, x, x, unknown=1),
        lambda f, x: f(input=x, key=x, value=x),
    ],
    ids=["too few", "scale by position", "unknown", "wrong name"],
)
def test_wrong_arguments_are_type_errors(call: Callable[..., Any]) -> None:
    for function in (torchs_own, ours):
        with pytest.raises(TypeError, match=r"scaled_dot_product_attention\(\)"):
            call(function, torch.ones(2, 2))


def test_lengths_that_differ_are_refused_in_every_path() -> None:
    """In four axes torch's function reads past the end of value."""
    query, key, value = shaped(Q, K, (2, 3, 5, 8))
    for args in ((query, key, value), (query[0], key[0], value[0])):
        with pytest.raises(RuntimeError, match=r"length, but got key.size\(-2\): 6 and value.size\(-2\): 5"):
            ours(*args)


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_what_only_torch_understands_is_torchs(fallbacks: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = (x.detach() for x in shaped(Q[1:], K[1:], V[1:]))
    expected = torchs_own(query, key, value)

    def same(got: torch.Tensor) -> None:
        torch.testing.assert_close(torch.Tensor(got), expected)
        assert fallbacks.pop() and not fallbacks

    same(ours(query.as_subclass(Subclass), key, value))
    same(torch.func.vmap(ours)(query, key, value))
    same(torch.func.jvp(ours, (query, key, value), (query, key, value))[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, query)
        same(torch.autograd.forward_ad.unpack_dual(ours(dual, key, value)).primal)
    with FlopCounterMode(display=False) as counter:
        same(ours(query, key, value))
    assert counter.get_total_flops() > 0
    nested = torch.nested.nested_tensor([query, key])
    assert ours(nested, nested, nested).is_nested and fallbacks.pop()


@pytest.mark.parametrize(
    "shapes, options",
    [
        ((Q, K, V), {"is_causal": True, "scale": 0.3}),
        ((Q, K, V), {"attn_mask": allowed(4, 6)}),
        ((Q[1:], K[1:], V[1:]), {"attn_mask": added(3, 4, 6)}),
        (((2, 6, 4, 8), K, V), {"enable_gqa": True}),
    ],
    ids=["causal", "mask", "bias", "groups"],
)
def test_compiled_code_is_served(shapes: Any, options: dict[str, Any], no_fallback: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    args: list[Any] = shaped(*shapes)
    assert all(map(torch.equal, results(compiled, args, options), results(ours, args, options)))


def test_compiled_code_leaves_to_torch_what_no_kernel_takes(fallbacks: list[int]) -> None:
    torch._dynamo.reset()
    query = torch.randn(1, 1, 2, 600)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, query, query), torchs_own(query, query, query))
    assert fallbacks


def test_a_default_device_changes_nothing(no_fallback: None) -> None:
    query, key, value = shaped(Q, K, V)
    with torch.device("cpu"):
        torch.testing.assert_close(ours(query, key, value), torchs_own(query, key, value))


def test_gradcheck() -> None:
    args = [x.detach().double().requires_grad_() for x in shaped((2, 2, 3, 4), (1, 5, 4), (5, 4), (2, 1, 5))]
    assert torch.autograd.gradcheck(lambda *x: ours(*x, is_causal=True), args, nondet_tol=0)
