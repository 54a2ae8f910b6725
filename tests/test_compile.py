"""torch.compile and torch.export: one graph, the bits of eager execution, and no more graphs than needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn as fa
from fastattn import nn as fnn
from kernels import assert_same_bits
from processes import output_of


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: Any = "aot_eager") -> Any:
    return torch.compile(function, backend=backend, fullgraph=True)


def tensors(rows: int = 5, keys: int = 7, *, grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 6)]
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(function: Any, compiled_function: Any, *arguments: Any, seed: int = 0) -> None:
    """Results and gradients of all leaves, bit for bit."""
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    answers = []
    for call in function, compiled_function:
        torch.manual_seed(seed)
        outputs = as_tuple(call(*arguments))
        loss = sum(torch.where(x.isinf(), 0, x).square().sum() for x in outputs)
        grads = torch.autograd.grad(loss, leaves) if leaves else ()
        answers.append(tuple(x.detach() for x in (*outputs, *grads)))
    assert_same_bits(answers[1], answers[0])


ARGUMENTS: dict[str, dict[str, Any]] = {
    "top left, window": {"causal": "top_left", "window": (2, None)},
    "mask": {"mask": numbers(5, 7) > 0},
    "bias": {"bias": numbers(4, 5, 7)},
    "lengths": {"kv_lengths": torch.tensor([5, 0])},
    "a list of lengths": {"kv_lengths": [5, 0]},
    "starts, lengths of queries": {"kv_starts": torch.tensor([2, 7]), "query_lengths": torch.tensor([5, 3])},
    "segments": {
        "segment_ids": (torch.tensor([[0, 0, 1, 1, 2]] * 2), torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2))
    },
    "offset": {"causal": True, "query_offset": 3},
    "offsets": {"causal": True, "query_offset": torch.tensor([3, -6])},
    "alibi": {"alibi_slopes": numbers(2, 4)},
    "a list of slopes": {"alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
    "sinks": {"sinks": numbers(4)},
    "softcap, scale": {"softcap": 2.0, "scale": 0.3},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 2**64 - 3, "dropout_offset": 4},
    "dropout, a seed drawn": {"dropout_p": 0.4},
    "lse": {"return_lse": True},
    "weights": {"return_weights": True},
    "lse, weights": {"return_lse": True, "return_weights": True, "backend": "cpu"},
    "rows first": {"layout": "bshd"},
}


@pytest.mark.parametrize("options", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_argument(options: dict[str, Any]) -> None:
    call = tensors()
    if "layout" in options:
        call = [x.detach().transpose(1, 2).requires_grad_() for x in call]
    names = [name for name, x in options.items() if isinstance(x, torch.Tensor)]
    extra = [options[n].requires_grad_() if options[n].is_floating_point() else options[n] for n in names]

    def function(query: Any, key: Any, value: Any, *more: Any) -> Any:
        given = dict(options)
        for at, name in enumerate(names):
            given[name] = more[at]
        return fa.attention(query, key, value, **given)

    assert_same(function, compiled(function), *call, *extra)


def test_lengths_that_differ_make_two_graphs() -> None:
    """One for the first, one for any other; lengths of queries and keys apart."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(*call: torch.Tensor) -> torch.Tensor:
        return fa.attention(*call, causal=True, window=(5, 0))

    once = compiled(function, counter)
    for rows, keys in (8, 8), (9, 9), (17, 20), (100, 120), (33, 33), (4, 50):
        assert_same(function, once, *tensors(rows, keys))
    assert counter.frame_count <= 3  # lengths that are the same, those that are not


def test_decoding_makes_two_graphs() -> None:
    """The offset and the seed are numbers that differ from step to step."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(query: Any, key: Any, value: Any, at: int) -> Any:
        return fa.attention(
            query, key, value, causal=True, query_offset=at, dropout_p=0.1, dropout_seed=at, dropout_offset=at
        )

    once = compiled(step, counter)
    for keys in 8, 9, 17, 100, 33:
        assert_same(step, once, *tensors(1, keys, grad=False), keys - 1)
    assert counter.frame_count <= 2


def test_inductor() -> None:
    """Forward and backward, the length a symbol, and dropout drawn from torch's generator."""

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return fa.attention(query, key, value, causal=True)

    once = torch.compile(function, fullgraph=True, dynamic=True)
    for keys in 7, 12:
        assert_same(function, once, *tensors(5, keys))
    dropped = torch.compile(lambda *x: fa.attention(*x, dropout_p=0.5), fullgraph=True)
    answers = []
    for seed in 0, 0, 1:
        torch.manual_seed(seed)
        answers.append(dropped(*tensors(grad=False)))
    assert answers[0].equal(answers[1]) and not answers[0].equal(answers[2])


def test_out_is_written() -> None:
    call, out = tensors(grad=False), torch.zeros(2, 4, 5, 6)
    function = compiled(lambda out, *x: fa.attention(*x, out=out))
    assert function(out, *call) is out
    assert_same_bits(out, fa.attention(*call))


def test_values_are_checked_in_the_graph() -> None:
    function = compiled(lambda lengths, *x: fa.attention(*x, kv_lengths=lengths))
    call = tensors()
    function(torch.tensor([7, 0]), *call)
    with pytest.raises(ValueError, match="kv_lengths must be from 0 to key's length 7, got 8 at index 1"):
        function(torch.tensor([7, 8]), *call)
    function = compiled(lambda sinks, *x: fa.attention(*x, sinks=sinks))
    with pytest.raises(ValueError, match="sinks must be finite, or -inf for a head without one, got nan"):
        function(torch.full((4,), torch.nan), *call)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": numbers(5, 7)}, "mask must be bool"),
        ({"bias": numbers(5, 8)}, "bias must broadcast to"),
        ({"softcap": -1.0}, "softcap must be at least 0"),
        ({"dropout_p": 1.5}, "dropout_p must be from 0 to 1, got 1.5"),
        ({"backend": "gpu"}, "backend='gpu' is unknown"),
        ({"window": (1, 2, 3)}, r"window must be a pair \(left, right\), got 3 elements"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_when_it_is_traced(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        compiled(lambda *x: fa.attention(*x, **options))(*tensors(grad=False))
    assert type(caught.value).__module__.startswith(("torch._dynamo", "builtins"))


def test_transforms() -> None:
    call = [torch.stack([x, -x]) for x in tensors(grad=False)]
    assert_same(torch.func.vmap(fa.attention), compiled(torch.func.vmap(fa.attention)), *call)

    def block(*x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fa.attention(*x, causal=True).float()

    assert_same(block, compiled(block), *tensors())

    def dropped(*x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda q, k, v: fa.attention(q * 2, k, v, dropout_p=0.3), *x, use_reentrant=False
        )

    assert_same(dropped, compiled(dropped), *tensors())
    with torch.inference_mode():
        assert_same(fa.attention, compiled(fa.attention), *tensors(grad=False))


def test_composed_operations_stay_outside() -> None:
    """They look at values: the graph ends before them, and `fullgraph` says so."""
    call = tensors(grad=False)

    def function(*x: torch.Tensor) -> torch.Tensor:
        return fa.attention(*x, backend="math") + 1

    assert torch.compile(function, backend="aot_eager")(*call).equal(function(*call))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(function)(*call)


def make_modules() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "rotary": fnn.SelfAttention(16, 4, num_kv_heads=2, causal=True, position="rotary", dropout=0.2),
        "alibi": fnn.SelfAttention(16, 4, position="alibi", sinks=True, qk_norm=True, window=(3, 3)),
        "relative": fnn.SelfAttention(16, 4, position=fnn.RelativePositionBias(4), fused=True),
        "multihead": fnn.MultiheadAttention(16, 4, batch_first=True),
    }


@pytest.mark.parametrize("name", make_modules())
def test_modules(name: str) -> None:
    module, x = make_modules()[name], torch.randn(2, 9, 16, requires_grad=True)

    def function(x: torch.Tensor) -> Any:
        return module(x, x, x) if name == "multihead" else module(x)

    assert_same(function, compiled(function), x)


class Layer(torch.nn.Module):
    def forward(self, query: Any, key: Any, value: Any, lengths: Any) -> Any:
        return fa.attention(query, key, value, causal=True, kv_lengths=lengths)


@pytest.mark.parametrize(("capacity", "graphs"), [(32, 2), (0, 4)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_decoding_with_a_cache(mode: Any, capacity: int, graphs: int) -> None:
    """The second length makes the graph's a symbol; with no room in reserve, a graph grows the buffer."""
    layer = fnn.SelfAttention(16, 2, causal=True, position="rotary").eval()
    x = numbers(2, 16, 16)
    counter = CompileCounterWithBackend("aot_eager")
    step, cache = compiled(layer, counter), fnn.KVCache(capacity)
    with mode():
        want = layer(x)
        outs = [layer(x[:, :3], cache=cache), *(step(row, cache=cache) for row in x[:, 3:].split(1, 1))]
        torch.testing.assert_close(torch.cat(outs, 1), want)
        with pytest.raises(Exception, match="mask must broadcast"):
            step(x[:, :1], cache=cache, mask=torch.ones(3, 3, dtype=torch.bool))
    assert len(cache) == 16
    assert counter.frame_count == graphs


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    rows, keys = torch.export.Dim("rows", min=2), torch.export.Dim("keys", min=2)
    lengths = torch.tensor([3, 7])
    exported = torch.export.export(
        Layer(),
        (*tensors(grad=False), lengths),
        dynamic_shapes=({2: rows}, {2: keys}, {2: keys}, {}),
        strict=strict,
    )
    assert "torch.ops.fastattn.forward.default" in str(exported.graph_module.code)
    call = tensors(11, 13, grad=False)
    assert_same_bits(exported.module()(*call, lengths), Layer()(*call, lengths))
    with pytest.raises(ValueError, match="kv_lengths must be from 0 to key's length 13, got 14"):
        exported.module()(*call, lengths * 2)


IMPORTS = {
    "fastattn first": "import fastattn as fa, sys; assert 'torch' not in sys.modules; import torch",
    "torch first": "import torch, fastattn as fa; torch.ops.fastattn.forward",
    "explicitly": "import fastattn.torch, fastattn as fa, torch; torch.ops.fastattn.forward",
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_compiled_code_is_the_very_first_call(imports: str) -> None:
    code = f"""
        {imports}
        call = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
        function = lambda *x: fa.attention(*x, causal=True)
        out = torch.compile(function, backend="eager", fullgraph=True)(*call)
        grads = torch.autograd.grad(out.sum(), call)
        expected = fa.attention(*call, causal=True)
        assert out.equal(expected)
        assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), call)))
        print("same")
    """
    assert output_of(code, timeout=300) == "same"


def test_the_first_tensor_brings_the_operators() -> None:
    code = """
        import fastattn as fa
        import torch
        assert not hasattr(torch.ops.fastattn, "forward")
        query = torch.randn(1, 1, 2, 8)
        fa.attention(query, query, query)
        print(hasattr(torch.ops.fastattn, "forward"))
    """
    assert output_of(code) == "True"
