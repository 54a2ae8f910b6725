"""`fastattn.attention` on the Triton backend: results, gradients, operators, traces, and what is built on it.

A call is made of tensors that count as a GPU's, whose short arguments nobody reads, and, where that takes
minutes elsewhere, of tensors on the CPU, whose short arguments are checked and copied.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastattn as fa
import fastattn.torch  # the operators are there from here on
import places
from fastattn import _flags, ops
from fastattn import nn as fnn
from fastattn.gpu import configs
from fastattn.gpu.config_tables import Tiles
from fastattn.torch_ops.arguments import flatten

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of numbers around 1
DTYPES = tuple(TOLERANCE)
ROWS, KEYS = 5, 37


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Every argument that changes what is computed; tensors of floats have a gradient.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "scale": -0.3},
    "top left": {"causal": "top_left", "window": (2, None)},
    "window": {"window": (2, 11)},
    "mask": {"mask": numbers(2, 1, ROWS, KEYS) > -0.5},
    "bias": {"bias": numbers(4, ROWS, 1)},
    "bias of each": {"bias": numbers(2, 1, ROWS, KEYS)},
    "lengths": {"kv_lengths": torch.tensor([31, 0])},
    "offset": {"causal": True, "query_offset": 1},
    "offsets": {"causal": True, "query_offset": torch.tensor([30, -6])},
    "alibi": {"alibi_slopes": numbers(4)},
    "alibi of each": {"alibi_slopes": numbers(2, 4)},
    "sinks": {"sinks": numbers(4)},
    "softcap": {"softcap": 1.2},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 2**64 - 3, "dropout_offset": 7},
    "together": {
        "causal": True,
        "window": (20, 0),
        "mask": numbers(ROWS, KEYS) > -1,
        "bias": numbers(2, 1, ROWS, KEYS),
        "kv_lengths": torch.tensor([36, 20]),
        "alibi_slopes": numbers(4),
        "sinks": numbers(4),
        "softcap": 2.0,
        "dropout_p": 0.2,
        "dropout_seed": 11,
    },
}
features = pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)


@pytest.fixture(params=[pytest.param("host", marks=pytest.mark.gpu_slow), "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "device":
        places.on_device(monkeypatch)
    return str(request.param)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    places.on_device(monkeypatch)


def arrays(dtype: torch.dtype = torch.float32, *, rows: int = ROWS, keys: int = KEYS) -> list[Tensor]:
    """Query, key and value of 4 and 2 heads."""
    shapes = (2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 24)
    return [numbers(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


def call_of(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return dict(zip(("query", "key", "value"), arrays(dtype), strict=True)) | options


def leaves_of(call: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in call.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def results_and_gradients(call: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    """Of a loss on out, lse and weights."""
    leaves = leaves_of(call)
    out, lse, weights = fa.attention(**(call | leaves), return_lse=True, return_weights=True, **more)
    heads = lse.masked_fill(lse == -torch.inf, 0)
    loss = sum((x.double() * numbers(*x.shape, seed=9)).sum() for x in (out, heads, weights))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = dict(zip(leaves, grads, strict=True))
    results = {"out": out.detach(), "lse": lse.detach(), "weights": weights.detach()}
    return results | {f"d {name}": grad for name, grad in named.items()}


def oracle(call: dict[str, Any]) -> dict[str, Tensor]:
    """The same in float64, by operations of torch."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }
    return results_and_gradients(wide, backend="math")


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        scale = max(1.0, float(expected[name][expected[name].isfinite()].abs().max()))
        torch.testing.assert_close(
            value.double(),
            expected[name],
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, of=name: f"{of}: {text}",
        )


@features
def test_results_and_gradients(options: dict[str, Any], place: str) -> None:
    call = call_of(options)
    actual = results_and_gradients(call, backend="triton")
    assert_close(actual, oracle(call), TOLERANCE[torch.float32])


def test_dropout_in_the_smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where words are spread over a tile another way."""
    monkeypatch.setattr(configs, "INTERPRETED", Tiles(16, 16, 4, 1))
    call = call_of(FEATURES["together"])
    actual = results_and_gradients(call, backend="triton")
    assert_close(actual, oracle(call), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_types_of_16_bits(name: str, dtype: torch.dtype, place: str) -> None:
    call = call_of(FEATURES[name], dtype)
    actual = results_and_gradients(call, backend="triton")
    assert actual["out"].dtype == actual["weights"].dtype == actual["d query"].dtype == dtype
    assert actual["lse"].dtype == torch.float32
    assert_close(actual, oracle(call), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["causal", "mask", "together"])
def test_layout(name: str, place: str) -> None:
    call = call_of(FEATURES[name]) | {"backend": "triton", "return_lse": True}
    out, lse = fa.attention(**call)
    swapped = {name: call[name].transpose(1, 2) for name in ("query", "key", "value")}
    rows, same = fa.attention(**(call | swapped), layout="bshd")
    assert rows.is_contiguous() and torch.equal(rows.transpose(1, 2), out) and torch.equal(same, lse)


def test_out_is_written(place: str) -> None:
    query, key, value = arrays()
    out = torch.full((2, ROWS, 4, 48), torch.nan)[..., ::2].transpose(1, 2)
    assert fa.attention(query, key, value, out=out, backend="triton") is out
    assert torch.equal(out, fa.attention(query, key, value, backend="triton"))
    with pytest.raises(ValueError, match="out must not overlap query: they share memory"):
        fa.attention(query, key, torch.zeros_like(key), out=query, backend="triton")


@pytest.mark.parametrize("hides", ["bias", "mask"])
def test_an_infinite_gradient_of_weights_that_are_hidden(hides: str, place: str) -> None:
    """As that of their entropy is: what is hidden gets 0, not NaN."""
    hidden = torch.arange(96).expand(40, -1) >= 50
    bias = torch.zeros(40, 96).masked_fill(hidden, -torch.inf)
    rule = {"bias": bias} if hides == "bias" else {"mask": ~hidden}
    query, key, value = (x.requires_grad_() for x in arrays(rows=40, keys=96))
    _, weights = fa.attention(query, key, value, **rule, return_weights=True, backend="triton")
    actual = torch.autograd.grad(torch.special.entr(weights).sum(), (query, key))
    wide, seen, values = (x.detach().double() for x in (query, key[:, :, :50], value[:, :, :50]))
    leaves = wide.requires_grad_(), seen.requires_grad_()
    _, weights = fa.attention(*leaves, values, return_weights=True, backend="math")
    of_query, of_seen = torch.autograd.grad(torch.special.entr(weights).sum(), leaves)
    torch.testing.assert_close(actual[0].double(), of_query, rtol=0, atol=2e-5)
    torch.testing.assert_close(actual[1][:, :, :50].double(), of_seen, rtol=0, atol=2e-5)
    assert (actual[1][:, :, 50:] == 0).all()


@pytest.mark.parametrize("offset", [2**31 - 1, 1 - 2**31, -(2**31)])
def test_gradients_at_offsets_that_fill_32_bits(offset: int, place: str) -> None:
    call = call_of({"query_offset": offset, "window": (2**31 - 1, 2**31 - 1)})
    assert_close(results_and_gradients(call, backend="triton"), oracle(call), TOLERANCE[torch.float32])


def test_no_sequence_of_documents(place: str) -> None:
    leaves = [x[:0].requires_grad_() for x in arrays()]
    ids = torch.zeros(0, ROWS, dtype=torch.int64), torch.zeros(0, KEYS, dtype=torch.int64)
    out = fa.attention(*leaves, segment_ids=ids, backend="triton")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [x.shape for x in grads] == [x.shape for x in leaves]
    assert "triton" in str(fa.explain(*(x.detach() for x in leaves), segment_ids=ids, backend="triton"))


@pytest.mark.parametrize("rows, keys", [(0, 7), (5, 0)])
def test_nothing_to_attend_to(rows: int, keys: int, place: str) -> None:
    call = dict(zip(("query", "key", "value"), arrays(rows=rows, keys=keys), strict=True))
    call |= {"sinks": numbers(4), "bias": numbers(1, rows, keys), "alibi_slopes": numbers(4)}
    actual = results_and_gradients(call, backend="triton")
    for name, value in actual.items():
        assert (
            value == (call["sinks"][:, None].expand_as(value) if name == "lse" else 0)
        ).all() or name == "d sinks"
    assert actual["d sinks"].shape == (4,)


def test_short_arguments_may_be_anywhere(device: None) -> None:
    """Lists are checked on the CPU and copied, tensors of the device stay there: the bits are the same."""
    vectors: dict[str, list[Any]] = {
        "kv_lengths": [30, 2],
        "query_offset": [4, 11],
        "alibi_slopes": [0.5, 0.25, 0.0, 1.0],
        "sinks": [0.5, -0.5, 1.0, 0.0],
    }
    given = {name: torch.tensor(values) for name, values in vectors.items()}
    call = call_of({"causal": True, "return_lse": True, "backend": "triton"})
    listed, kept = fa.attention(**call, **vectors), fa.attention(**call, **given)
    assert all(map(torch.equal, listed, kept))
    narrow = given | {"kv_lengths": given["kv_lengths"].to(torch.uint8), "sinks": given["sinks"].bfloat16()}
    assert all(map(torch.equal, kept, fa.attention(**call, **narrow)))


@pytest.mark.parametrize("lengths", [[-3, 10**12], [37, 38]])
def test_values_out_of_range_stay_in_bounds(lengths: list[int], device: None) -> None:
    """Nobody checks them, and no kernel reads beyond the keys that there are."""
    query, key, value = arrays()
    padded = [torch.cat([x, torch.full_like(x, torch.nan)], 2)[:, :, :KEYS] for x in (key, value)]
    options: dict[str, Any] = {
        "kv_lengths": torch.tensor(lengths),
        "return_lse": True,
        "return_weights": True,
    }
    results = fa.attention(
        query, *padded, **options, query_offset=torch.tensor([2**62, -(2**62)]), backend="triton"
    )
    assert not any(result.isnan().any() for result in results)


WRONG: dict[str, tuple[Any, str]] = {
    "kv_lengths": (torch.tensor([3, 38]), "kv_lengths must be from 0 to key's length 37, got 38 at index 1"),
    "query_offset": (torch.tensor([0, 2**61]), f"query_offset must be within 2**60 of 0, got {2**61}"),
    "alibi_slopes": (torch.tensor([0, 1, torch.inf, 0]), "alibi_slopes must be finite, got inf"),
    "sinks": (
        torch.tensor([0, torch.nan, 0, 0]),
        "sinks must be finite, or -inf for a head without one, got nan",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_are_checked_in_debugging(name: str, device: None, environment: pytest.MonkeyPatch) -> None:
    """With the messages that tensors on the CPU always get."""
    values, message = WRONG[name]
    call = call_of({"backend": "triton", name: values})
    fa.attention(**call)
    environment.setenv("FASTATTN_DEBUG", "1")
    _flags.flag.cache_clear()
    with pytest.raises(ValueError, match=re.escape(message)):
        fa.attention(**call)
    environment.setenv("FASTATTN_DEBUG", "on")
    _flags.flag.cache_clear()
    with pytest.raises(ValueError, match="FASTATTN_DEBUG must be 0 or 1, got 'on'"):
        fa.attention(**call_of({"backend": "triton", "sinks": torch.zeros(4)}))


@pytest.mark.parametrize("deterministic", [False, True])
def test_atomic_sums_are_for_whoever_asks(
    deterministic: bool, device: None, environment: pytest.MonkeyPatch
) -> None:
    from fastattn.gpu import choice

    call, asked, kernels = call_of({"causal": True, "backend": "triton"}), [], choice.backward

    def listen(*arguments: Any) -> None:
        asked.append(arguments[-1])
        kernels(*arguments)

    environment.setattr(choice, "backward", listen)
    expected = {name: value.double() for name, value in results_and_gradients(call).items()}
    environment.setenv("FASTATTN_ATOMIC", "1")
    _flags.flag.cache_clear()
    environment.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert_close(results_and_gradients(call), expected, TOLERANCE[torch.float32])
    assert asked == [False, not deterministic]


def test_a_later_change_of_short_arguments(place: str) -> None:
    """What a backward needs of them is kept: an optimiser, or a cache that grows, may write to them."""
    call = call_of({"causal": True, "backend": "triton"})
    call |= {"sinks": numbers(4), "alibi_slopes": numbers(4), "kv_lengths": torch.tensor([30, 20])}
    call |= {"query_offset": torch.tensor([32, 20])}
    leaves = leaves_of(call)
    grads = []
    for change in (False, True):
        out = fa.attention(**(call | leaves))
        if change:
            with torch.no_grad():
                for name in ("sinks", "alibi_slopes"):
                    leaves[name].add_(1)
                call["kv_lengths"].sub_(7)
                call["query_offset"].sub_(3)
        grads.append(torch.autograd.grad(out.sum(), list(leaves.values())))
    assert all(map(torch.equal, *grads))


class TestDropout:
    def test_drawn_seeds_follow_torchs_generator(self, place: str) -> None:
        call = call_of({"dropout_p": 0.5, "backend": "triton"})
        torch.manual_seed(3)
        first, second = fa.attention(**call), fa.attention(**call)
        torch.manual_seed(3)
        assert torch.equal(fa.attention(**call), first) and not torch.equal(first, second)

    def test_a_seed_on_the_device(self, device: None) -> None:
        call = call_of({"dropout_p": 0.5, "backend": "triton"})
        seeds = 2**62 + 12345, torch.tensor(2**62 + 12345)
        assert torch.equal(*(fa.attention(**call, dropout_seed=seed) for seed in seeds))
        with pytest.raises(TypeError, match=r"a tensor of one int64, got int32 of shape \(1,\)"):
            fa.attention(**call, dropout_seed=torch.ones(1, dtype=torch.int32))

    def test_the_mask_is_that_of_every_backend(self, place: str) -> None:
        call = call_of({"dropout_p": 0.3, "dropout_seed": 2**63 + 5, "dropout_offset": 2})
        dropped = [
            fa.attention(**call, backend=name, return_weights=True)[1] == 0 for name in ("triton", "math")
        ]
        assert torch.equal(*dropped) and dropped[0].any()


def flattened(options: dict[str, Any]) -> list[Any]:
    """The arguments of the operator behind query, key and value."""
    defaults: dict[str, Any] = dict.fromkeys(
        (
            "window",
            "mask",
            "bias",
            "kv_lengths",
            "query_offset",
            "alibi_slopes",
            "sinks",
            "scale",
            "dropout_seed",
        )
    )
    defaults |= {"causal": False, "softcap": 0.0, "dropout_p": 0.0, "dropout_offset": 0, "layout": "bhsd"}
    operands, rules = flatten(arrays()[0], **(defaults | options), backend="triton")
    return [*operands, *rules]


class TestTraces:
    @pytest.mark.parametrize("name", ["causal", "bias", "alibi", "sinks", "together"])
    def test_opcheck(self, name: str) -> None:
        leaves = leaves_of(call_of(FEATURES[name]))
        arguments = flattened(FEATURES[name] | {k: v for k, v in leaves.items() if k in FEATURES[name]})
        tensors = [leaves[k] for k in ("query", "key", "value")]
        torch.library.opcheck(
            torch.ops.fastattn.forward,
            (*tensors, *arguments, False),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )

    @pytest.mark.parametrize(
        "name",
        ["lengths", *(pytest.param(name, marks=pytest.mark.gpu_slow) for name in ("causal", "together"))],
    )
    def test_compiled(self, name: str, place: str) -> None:
        call = call_of(FEATURES[name] | {"backend": "triton"})
        compiled = torch.compile(fa.attention, fullgraph=True, backend="aot_eager")
        for function in (fa.attention, compiled):
            leaves = leaves_of(call)
            out, lse = function(**(call | leaves), return_lse=True)
            grads = torch.autograd.grad(out.sum() + lse.sum(), list(leaves.values()))
            results = [out, lse, *grads]
            if function is not compiled:
                eager = results
        assert all(map(torch.equal, results, eager))

    def test_a_seed_drawn_in_a_graph_stays_a_tensor(self, device: None) -> None:
        call = call_of({"dropout_p": 0.5, "backend": "triton"})
        compiled = torch.compile(fa.attention, fullgraph=True, backend="aot_eager")
        torch.manual_seed(5)
        expected = fa.attention(**call)
        torch.manual_seed(5)
        assert torch.equal(compiled(**call), expected)

    def test_exported(self) -> None:
        class Model(torch.nn.Module):
            def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return fa.attention(query, key, value, causal=True, backend="triton")

        inputs = tuple(arrays())
        program = torch.export.export(Model(), inputs)
        targets = [node.target for node in program.graph.nodes]
        assert torch.ops.fastattn.forward.default in targets
        expected = fa.attention(*inputs, causal=True, backend="triton")
        assert torch.equal(program.module()(*inputs), expected)

    def test_mapped(self) -> None:
        query, key, value = arrays()

        def attend(query: Tensor, key: Tensor) -> Tensor:
            return fa.attention(query, key, value[:1], sinks=[0.0, 1, 2, 3], backend="triton")

        together = torch.vmap(attend)(query[:, None], key[:, None])
        alone = torch.stack([attend(*pair) for pair in zip(query[:, None], key[:, None], strict=True)])
        assert torch.equal(together, alone)

    def test_mapped_gradients_of_sinks(self) -> None:
        """One for each call, though all are one batch to the kernels."""
        query, key, value = arrays()

        def loss(sinks: Tensor, query: Tensor) -> Tensor:
            return fa.attention(query, key[:1], value[:1], sinks=sinks, backend="triton").sum()

        gradient, sinks, queries = torch.func.grad(loss), numbers(4), query[:, None]
        together = torch.vmap(gradient, (None, 0))(sinks, queries)
        alone = torch.stack([gradient(sinks, query) for query in queries])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    def test_gradients_of_gradients_are_refused(self, place: str) -> None:
        call = call_of({"backend": "triton"})
        leaves = leaves_of(call)
        out = fa.attention(**(call | leaves))
        (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
        with pytest.raises(RuntimeError, match="where gradients of gradients are needed"):
            grad.sum().backward()


class TestBuiltOnIt:
    def test_forward_and_backward_of_parts(self, place: str) -> None:
        """Two halves of the keys, merged, and the gradients of each half."""
        query, key, value = arrays()
        halves = [(key[:, :, at], value[:, :, at]) for at in (slice(0, 20), slice(20, KEYS))]
        states = [ops.forward(query, *half, backend="triton") for half in halves]
        out, lse = fa.merge_states(*states[0], *states[1])
        whole, whole_lse = ops.forward(query, key, value, backend="triton")
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-6)
        grad = numbers(*out.shape, seed=7)
        expected = ops.backward(grad, query, key, value, whole, whole_lse, backend="triton")
        parts = [ops.backward(grad, query, *half, out, lse, backend="triton") for half in halves]
        torch.testing.assert_close(parts[0].query + parts[1].query, expected.query, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat([p.key for p in parts], 2), expected.key, rtol=0, atol=1e-5)

    def test_backward_of_everything(self, place: str) -> None:
        options = FEATURES["together"] | {"backend": "triton"}
        tensors = arrays()
        out, lse = ops.forward(*tensors, **options)
        grad, wanted = numbers(*out.shape), ("query", "key", "value", "bias", "alibi_slopes", "sinks")
        grads = ops.backward(grad, *tensors, out, lse, wanted=wanted, **options)
        leaves = leaves_of(call_of(options))
        result = fa.attention(**(call_of(options) | leaves))
        expected = torch.autograd.grad(result, list(leaves.values()), grad)
        found = {name: getattr(grads, name) for name in leaves}
        assert all(map(torch.equal, found.values(), expected))

    def test_modules(self, place: str) -> None:
        torch.manual_seed(0)
        x = torch.randn(2, 40, 64, requires_grad=True)
        options: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "causal": True, "position": "alibi"}
        gpu, composed = (fnn.SelfAttention(64, **options, backend=name) for name in ("triton", "math"))
        composed.load_state_dict(gpu.state_dict())
        outs = [layer(x) for layer in (gpu, composed)]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-5)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in outs), rtol=0, atol=1e-4)

    def test_in_the_place_of_torchs(self, place: str, environment: pytest.MonkeyPatch) -> None:
        environment.setenv("FASTATTN_BACKEND", "triton")
        query, key, value = arrays()
        value = value[..., :16]
        mask = numbers(ROWS, KEYS) > 0
        sdpa = torch.nn.functional.scaled_dot_product_attention
        expected = sdpa(query, key, value, mask, enable_gqa=True)
        with fa.patch_sdpa():
            patched = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, mask, enable_gqa=True
            )
        torch.testing.assert_close(patched, expected, rtol=0, atol=1e-6)
        own = fa.attention(query, key, value, mask=mask)
        assert torch.equal(patched, own)

    def test_transformers(self, place: str, environment: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers")
        from fastattn.integrations.transformers import attention_forward

        environment.setenv("FASTATTN_BACKEND", "triton")
        query, key, value = arrays()
        module = torch.nn.Module().eval()
        out, weights = attention_forward(
            module, query, key, value, None, is_causal=True, sliding_window=9, output_attentions=True
        )
        expected = fa.attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            layout="bshd",
            causal=True,
            window=(8, 8),
            backend="math",
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert weights is not None and weights.shape == (2, 4, ROWS, KEYS)


class TestPlainCalls:
    """The short way: the bits of the long one, which is gone once for tensors that look the same."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "causal, scale, bshd", [(False, None, False), (True, 0.7, False), (True, None, True)]
    )
    def test_same_bits(
        self,
        dtype: torch.dtype,
        causal: bool,
        scale: float | None,
        bshd: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from fastattn.backends import plain_gpu

        monkeypatch.setattr(plain_gpu, "_plans", {})
        layout: Any = "bshd" if bshd else "bhsd"
        for factor in (1, -2):
            tensors = [factor * x for x in arrays(dtype)]
            tensors = [x.transpose(1, 2) for x in tensors] if bshd else tensors
            options: dict[str, Any] = {"causal": causal, "scale": scale, "layout": layout, "return_lse": True}
            expected = fa.attention(*tensors, **options, backend="triton")
            found = plain_gpu.attend(*tensors, causal, scale, bshd, True)
            assert all(map(torch.equal, found, expected)) and found[0].is_contiguous()
            assert torch.equal(plain_gpu.attend(*tensors, causal, scale, bshd, False), expected[0])
            monkeypatch.setattr(plain_gpu, "_planned", None)  # not called again
        assert len(plain_gpu._plans) == 2  # with lse and without

    def test_what_goes_the_long_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastattn.backends import plain_gpu

        query, key, value = arrays()
        complex_value = torch.complex(value, value).conj().imag
        for unusual in (torch.nn.Parameter(value), complex_value, value.to_sparse(), value.numpy()):
            assert plain_gpu.attend(query, key, unusual, False, None, False, False) is None
        wide = [x.double() for x in arrays()]
        assert plain_gpu.attend(*wide, False, None, False, False) is None  # which says why no kernel takes it
        with pytest.raises(ValueError, match="query and key must have one head dimension, got 8 and 16"):
            plain_gpu.attend(query[..., :8], key, value, False, None, False, False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(plain_gpu, "_plans", {})
        assert plain_gpu.attend(query, key, value, False, None, False, False) is None

    @pytest.mark.parametrize("served", [True, False])
    def test_who_gets_there(self, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tensors of a GPU that has kernels; a graph needs lse."""
        from fastattn.backends import plain, plain_gpu, triton

        class OnGpu:
            is_cuda, device, requires_grad = True, "cuda:0", False

        calls: list[Any] = []
        monkeypatch.setattr(plain_gpu, "attend", lambda *arguments: calls.append(arguments))
        monkeypatch.setattr(triton, "serves", lambda device: served)
        arguments = OnGpu(), None, None, True, 0.5, False
        plain.attend(*arguments)
        assert calls == ([(*arguments, False)] if served else [])
        monkeypatch.setattr(OnGpu, "requires_grad", True)
        plain.attend(*arguments)
        assert calls[1:] == ([(*arguments, True)] if served else [])

    @pytest.mark.parametrize("bshd, with_lse", [(False, True), (True, False)])
    def test_gradients(self, bshd: bool, with_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bits of the long way, of those that are wanted."""
        from fastattn.backends import plain_gpu
        from fastattn.backends.plain import PlainCall

        monkeypatch.setattr(plain_gpu, "_plans", {})
        layout: Any = "bshd" if bshd else "bhsd"
        for factor in (1, -2):
            tensors = [factor * (x.transpose(1, 2) if bshd else x) for x in arrays()]
            leaves = [x.clone().requires_grad_() for x in tensors[1:]]
            results = fa.attention(tensors[0], *leaves, layout=layout, return_lse=True, backend="triton")
            incoming = [numbers(*x.shape) for x in results]
            count = 2 if with_lse else 1
            expected = torch.autograd.grad(results[:count], leaves, incoming[:count])
            kept = plain_gpu.attend(*tensors, False, None, bshd, True)
            grads = plain_gpu.backward(
                *(incoming if with_lse else (incoming[0], None)),
                (*tensors, *kept),
                (False, True, True),
                PlainCall(False, None, bshd, with_lse),
            )
            assert grads is not None and grads[0] is None
            assert all(map(torch.equal, grads[1:], expected))

    def test_a_graph(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Recorded around the short way; what comes in for it may be unusual."""
        from fastattn.backends import plain, plain_gpu

        leaves = [x.requires_grad_() for x in arrays()]
        expected = fa.attention(*leaves, causal=True, backend="triton")
        incoming = torch.complex(expected, expected).detach().conj().imag
        wanted = torch.autograd.grad(expected, leaves, incoming.resolve_neg())
        monkeypatch.setattr(plain_gpu, "_plans", {})
        monkeypatch.setattr(plain, "_core", SimpleNamespace(attention_plain_torch=lambda *arguments: None))
        monkeypatch.setattr(configs, "kind_of_gpu", lambda tensor: "")
        monkeypatch.setattr(Tensor, "is_cuda", True)
        for grad_out in (incoming.resolve_neg(), incoming):
            out = fa.attention(*leaves, causal=True)
            assert torch.equal(out, expected) and type(out.grad_fn).__name__ == "_PlainBackward"
            grads = torch.autograd.grad(out, leaves, grad_out)
            torch.testing.assert_close(grads, wanted, rtol=0, atol=1e-5 if grad_out.is_neg() else 0)

    def test_plans_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastattn.backends import plain_gpu

        monkeypatch.setattr(plain_gpu, "_plans", {})
        monkeypatch.setattr(plain_gpu, "_LIMIT", 2)
        for keys in (3, 4, 5):
            query, key, value = arrays(keys=keys)
            plain_gpu.attend(query, key, value, False, None, False, False)
        assert len(plain_gpu._plans) == 1


class TestAutocast:
    def test_casts_query_key_and_value(self, place: str) -> None:
        tensors = arrays()
        with torch.autocast("cpu", torch.bfloat16):
            out = fa.attention(*tensors, backend="triton")
        expected = fa.attention(*(x.bfloat16() for x in tensors), backend="triton")
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


class TestExplained:
    def test_the_kernel_and_why_no_other(self, place: str) -> None:
        from fastattn.gpu import configs

        query, key, value = arrays(rows=300)
        found = fa.explain(query, key, value, backend="triton")
        assert found.backend == "triton"
        assert found.details["kernel"].startswith("portable: rows ")
        assert found.details["backward"].startswith("portable: rows ")
        assert (
            found.details["no decode"]
            == f"300 queries are more than 64; 37 keys are one chunk of {configs.decode_chunk(KEYS)}"
        )
        on_cpu = f"the tensors are not on an NVIDIA GPU but on {query.device}"
        assert found.details["no hopper"].startswith(on_cpu)
        assert found.details["no hopper backward"].startswith(on_cpu)

    def test_few_queries_are_decoded(self) -> None:
        query, key, value = arrays(rows=3, keys=1100)
        assert fa.explain(query, key, value, backend="triton").details["kernel"].startswith("decode: ")
        out, lse = fa.attention(query, key, value, causal=True, return_lse=True, backend="triton")
        expected = fa.attention(query, key, value, causal=True, return_lse=True, backend="reference")
        torch.testing.assert_close((out, lse), expected, rtol=0, atol=1e-5)

    def test_tensors_on_the_cpu_stay_with_its_kernels(self) -> None:
        found = fa.explain(*arrays())
        assert found.backend == "cpu" and found.refusals["triton"] == ["cpu comes first"]
        with pytest.raises(
            NotImplementedError, match="triton: NumPy arrays are not on a GPU: pass CUDA tensors"
        ):
            fa.attention(*(x.numpy() for x in arrays()), backend="triton")


def test_nothing_is_read(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the arguments to the launch, forward and backward: no value of a tensor is looked at."""
    from fastattn.gpu import choice, launch
    from fastattn.torch_ops import operators

    launched = []
    kernel = choice.Kernel("none", lambda call, out, lse: launched.append(call), lambda call: {}, {})
    monkeypatch.setattr(choice, "of_forward", lambda call: kernel)
    monkeypatch.setattr(launch, "write_weights", lambda *arguments: launched.append("weights"))
    monkeypatch.setattr(choice, "backward", lambda *arguments: launched.append("backward"))
    options = FEATURES["together"] | {"query_offset": torch.tensor([1, 2]), "dropout_seed": None}
    tensors = arrays()
    arguments = flattened(options)
    with places.unread(monkeypatch):
        out, lse, probabilities = operators._forward(*tensors, *arguments, True)
        incoming = out, lse, probabilities, out, lse, probabilities
        grads = operators._backward(*incoming, *tensors, *arguments, [True] * 6)
    assert launched[1:] == ["weights", "backward"] and len(grads) == 6
    assert isinstance(launched[0].dropout_seed, Tensor) and launched[0].query is tensors[0]


def test_numpy_is_no_different_there() -> None:
    """The interpreter in the environment changes nothing for arrays."""
    arrays_ = [x.numpy() for x in arrays()]
    assert isinstance(fa.attention(*arrays_), np.ndarray)
