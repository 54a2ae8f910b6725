"""Attention modules of fastattn.nn: against the formula written out, and the habits of a module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastattn.nn import (
    Attention,
    CrossAttention,
    KVCache,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention,
    SinusoidalPositionalEncoding,
    alibi_slopes,
)

BATCH, LENGTH, WIDTH, HEADS = 2, 9, 16, 4
INF = float("inf")


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def shaken(module: Any) -> Any:
    """The module with parameters none of which is 0 or 1."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.2 * randn(*parameter.shape, dtype=parameter.dtype, seed=index))
    return module


def written_out(
    layer: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The module as operations of torch, one head at a time; separate projections."""
    q, k, v = layer.q_proj(query), layer.k_proj(key), layer.v_proj(value)
    dim, group = layer.head_dim, layer.num_heads // layer.num_kv_heads
    rows, keys = query.shape[1], key.shape[1]
    at, of = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    seen = torch.ones(len(query), layer.num_heads, rows, keys, dtype=torch.bool)
    if layer.causal:
        seen = seen & (of <= at)
    if layer.window is not None:
        left, right = (keys + rows if bound is None else bound for bound in layer.window)
        seen = seen & (of >= at - left) & (of <= at + right)
    if kv_lengths is not None:
        seen = seen & (of < kv_lengths[:, None, None, None])
    if mask is not None:
        seen = seen & mask
    outs, weights = [], []
    for head in range(layer.num_heads):
        shared = head // group
        one = q[..., head * dim : (head + 1) * dim]
        other, values = (x[..., shared * dim : (shared + 1) * dim] for x in (k, v))
        if layer.q_norm is not None:
            one = one / (one.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.q_norm.weight
            other = other / (other.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.k_norm.weight
        if isinstance(layer.position, RotaryEmbedding):
            one = layer.position(one[:, None], offset=keys - rows)[:, 0]
            other = layer.position(other[:, None])[:, 0]
        scores = one @ other.mT * (dim**-0.5 if layer.scale is None else layer.scale)
        if layer.softcap:
            scores = layer.softcap * (scores / layer.softcap).tanh()
        if isinstance(layer.position, RelativePositionBias):
            scores = scores + layer.position(rows, keys)[:, head]
        elif layer.position is not None and not isinstance(layer.position, RotaryEmbedding):
            scores = scores - alibi_slopes(layer.num_heads)[head] * (at - of).abs()
        if score_bias is not None:
            scores = scores + score_bias.expand(seen.shape)[:, head]
        scores = torch.where(seen[:, head], scores, -INF)
        if layer.sinks is not None:
            sink = layer.sinks[head].expand(*scores.shape[:2], 1)
            scores = torch.cat((scores, sink), -1)
        share = scores.softmax(-1)[..., :keys]
        weights.append(share)
        outs.append(share @ values)
    return F.linear(torch.cat(outs, -1), layer.out_proj.weight, layer.out_proj.bias), torch.stack(weights, 1)


def agree(got: Tensor, want: Tensor, name: str = "", largest: float | None = None) -> None:
    """Within a share of the largest element, or of `largest`: 1e-12, in float32 1e-6 sqrt(64)."""
    assert got.shape == want.shape, name
    assert got.dtype == want.dtype, name
    largest = want.abs().max().item() if largest is None else largest
    share = 1e-12 if want.dtype == torch.float64 else 1e-6 * (4 * WIDTH) ** 0.5
    assert (got - want).abs().max().item() <= share * largest, name


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eight-heads": {"num_heads": 8},
    "grouped": {"num_kv_heads": 2},
    "one-kv-head": {"num_kv_heads": 1, "head_dim": 5},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "sliding": {"causal": True, "window": (3, None)},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 1.0},
    "sinks": {"sinks": True},
    "no-bias": {"bias": False, "out_bias": True},
    "norm": {"qk_norm": True},
    "rotary": {"position": "rotary", "causal": True},
    "interleaved": {"position": RotaryEmbedding(4, interleaved=True, rotary_dim=2)},
    "alibi": {"position": "alibi", "causal": True},
    "t5": {"position": RelativePositionBias(HEADS, 8, 12, dtype=torch.float64), "scale": 1.0},
    "all": {
        **{"num_kv_heads": 2, "head_dim": 6, "causal": True, "window": (4, 0), "softcap": 2.0},
        **{"sinks": True, "bias": False, "qk_norm": True, "position": "rotary"},
    },
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def make(kind: type[Attention] = SelfAttention, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"num_heads": HEADS, **copy.deepcopy(options)}
    return shaken(kind(WIDTH, **arguments, dtype=dtype).to(dtype))


# Against the formula


@EVERY_OPTION
@DTYPES
@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention, Attention])
def test_forward_and_gradients_are_the_formula(
    kind: type[Attention], options: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = make(kind, dtype, **options)
    x, context, other = (
        randn(BATCH, length, WIDTH, dtype=dtype, seed=length) for length in (LENGTH, LENGTH + 2, LENGTH + 2)
    )
    sources = {
        SelfAttention: (x, x, x),
        CrossAttention: (x, context, context),
        Attention: (x, context, other),
    }
    leaves = {id(source): source.requires_grad_() for source in sources[kind]}.values()
    wanted = [*leaves, *layer.parameters()]
    results = []
    for out, weights in (layer(*leaves, need_weights=True), written_out(layer, *sources[kind])):
        factors = randn(*out.shape, dtype=dtype, seed=3), randn(*weights.shape, dtype=dtype, seed=4)
        loss = (out * factors[0]).sum() + (weights * factors[1]).sum()
        results.append((out, weights, *torch.autograd.grad(loss, wanted)))
    names = ["out", "weights", *["source"] * len(leaves), *[name for name, _ in layer.named_parameters()]]
    # The gradient of a key's bias is 0 but for rounding: gradients are measured by the largest of them.
    largest = max(gradient.abs().max().item() for gradient in results[1][2:])
    for name, got, want in zip(names, *results, strict=True):
        agree(got, want, name, None if name in ("out", "weights") else largest)
    with torch.no_grad():
        agree(layer(*leaves), results[1][0], "without weights and gradients")


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_mask_bias_and_lengths(kind: type[Attention]) -> None:
    layer = make(kind, num_kv_heads=2)
    x, context = randn(BATCH, LENGTH, WIDTH), randn(BATCH, LENGTH, WIDTH, seed=1)
    sources = (x,) if kind is SelfAttention else (x, context)
    arguments: dict[str, Tensor] = {
        "mask": (torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.7) | torch.eye(LENGTH).bool(),
        "score_bias": randn(HEADS, LENGTH, LENGTH).requires_grad_(),
        "kv_lengths": torch.tensor([LENGTH, 5]),
    }
    arguments["mask"][..., 0] = True
    for names in (["mask"], ["score_bias"], ["kv_lengths"], list(arguments)):
        chosen = {name: arguments[name] for name in names}
        got = layer(*sources, **chosen)
        want, _ = written_out(layer, x, sources[-1], sources[-1], **chosen)
        agree(got, want)
        if "score_bias" in names:
            gradients = [torch.autograd.grad(out.sum(), arguments["score_bias"])[0] for out in (got, want)]
            agree(*gradients)


def test_score_bias_joins_a_relative_one() -> None:
    layer = make(**OPTIONS["t5"])
    x, bias = randn(BATCH, LENGTH, WIDTH), randn(LENGTH, LENGTH)
    agree(layer(x, score_bias=bias), written_out(layer, x, x, x, score_bias=bias)[0])


def test_value_is_key_by_default() -> None:
    layer = make(Attention, kdim=12)
    query, key = randn(BATCH, 3, WIDTH), randn(BATCH, 5, 12)
    assert torch.equal(layer(query, key), layer(query, key, key))
    agree(layer(query, key), written_out(layer, query, key, key)[0])


def test_sources_of_other_widths() -> None:
    layer = make(Attention, kdim=12, vdim=20)
    sources = randn(BATCH, 3, WIDTH), randn(BATCH, 5, 12), randn(BATCH, 5, 20)
    agree(layer(*sources), written_out(layer, *sources)[0])
    cross = make(CrossAttention, context_dim=12, fused=True)
    separate = make(CrossAttention, context_dim=12)
    cross.load_state_dict(separate.state_dict(), strict=True)
    agree(cross(*sources[:2]), separate(*sources[:2]))


def test_padding_may_hold_anything() -> None:
    layer = make(num_kv_heads=2, bias=False)
    x, lengths = randn(BATCH, LENGTH, WIDTH), torch.tensor([LENGTH, 4])
    clean = layer(x, kv_lengths=lengths)
    x[1, 4:] = torch.nan
    assert torch.equal(layer(x, kv_lengths=lengths)[1, :4], clean[1, :4])


def test_dropout() -> None:
    layer, x = make(dropout=0.5), randn(BATCH, 64, WIDTH)
    torch.manual_seed(0)
    out, weights = layer(x, need_weights=True)
    dropped = weights == 0
    assert 0.47 < dropped.double().mean() < 0.53
    agree(weights, torch.where(dropped, 0, 2 * written_out(layer, x, x, x)[1]))
    torch.manual_seed(0)
    assert torch.equal(layer(x), out)
    assert not torch.equal(layer(x), out)
    agree(layer.eval()(x), written_out(layer, x, x, x)[0])


# Fused and separate projections

FUSIBLE = pytest.mark.parametrize("kind", [Attention, SelfAttention, CrossAttention])


def call_with(layer: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    return layer(x) if isinstance(layer, SelfAttention) else layer(x, context)


@FUSIBLE
@pytest.mark.parametrize("bias", [True, False])
def test_fused_or_separate(kind: type[Attention], bias: bool) -> None:
    options = {"num_kv_heads": 2, "head_dim": 6, "bias": bias}
    separate, fused = make(kind, **options), make(kind, fused=True, **options)
    fresh = []
    for flag in (False, True):
        torch.manual_seed(1)
        fresh.append(kind(WIDTH, HEADS, fused=flag))
    x, context = randn(BATCH, LENGTH, WIDTH), randn(BATCH, 5, WIDTH, seed=1)
    agree(call_with(fresh[0].double(), x, context), call_with(fresh[1].double(), x, context), "one seed")
    assert len(list(fused.parameters())) < len(list(separate.parameters()))
    stored = separate.state_dict()
    fused.load_state_dict(stored, strict=True)
    agree(call_with(fused, x, context), call_with(separate, x, context))
    back = make(kind, **options)
    back.load_state_dict(shaken(fused).state_dict(), strict=True)
    agree(call_with(back, x, context), call_with(fused, x, context))
    assert list(stored) == list(separate.state_dict()), "a state_dict that is loaded stays as it is"


def test_fused_state_dicts_of_a_model() -> None:
    models = [
        nn.ModuleDict({"a": make(fused=flag), "b": nn.Sequential(make(CrossAttention, fused=flag))})
        for flag in (True, False)
    ]
    for one, other in (models, models[::-1]):
        shaken(one)
        other.load_state_dict(one.state_dict(), strict=True)
        x = randn(BATCH, LENGTH, WIDTH)
        agree(other["a"](x), one["a"](x))
        agree(other["b"][0](x, x), one["b"][0](x, x))


def test_state_dicts_that_lack_something() -> None:
    fused, stored = make(fused=True), make().state_dict()
    del stored["k_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv_proj.weight"):
        fused.load_state_dict(stored)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fused.load_state_dict(make(head_dim=5).state_dict())


def test_heads_are_views_of_the_projection() -> None:
    layer = make(fused=True, num_kv_heads=2)
    x = randn(BATCH, LENGTH, WIDTH)
    heads = layer._project(x, x, x)
    assert [tuple(head.shape[2:]) for head in heads] == [(4, 4), (2, 4), (2, 4)]
    assert len({head.untyped_storage().data_ptr() for head in heads}) == 1


# The cache

CACHED = {name: options for name, options in OPTIONS.items() if name not in ("interleaved", "window")}
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [[1] * LENGTH, [5, 1, 1, 2], [LENGTH]], ids=str)
def test_step_by_step_is_the_whole(options: dict[str, Any], mode: str, steps: list[int]) -> None:
    layer = make(fused=True, **{**options, "causal": True})
    x = randn(BATCH, LENGTH, WIDTH)
    with MODES[mode]():
        cache = KVCache()
        outs = [layer(rows, cache=cache) for rows in x.split(steps, 1)]
        agree(torch.cat(outs, 1), layer(x))
    assert len(cache) == LENGTH
    assert cache.key.shape == cache.value.shape == (BATCH, LENGTH, layer.num_kv_heads, layer.head_dim)


def test_gradients_pass_through_the_cache() -> None:
    layer, cache = make(causal=True, position="rotary"), KVCache()
    x = randn(BATCH, LENGTH, WIDTH).requires_grad_()
    stepped = torch.cat([layer(rows, cache=cache) for rows in x.split(2, 1)], 1)
    weight = randn(*stepped.shape, seed=1)
    gradients = [
        torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()]) for out in (stepped, layer(x))
    ]
    for got, want in zip(*gradients, strict=True):
        agree(got, want)


def test_masks_of_a_call_count_what_the_cache_holds() -> None:
    layer, cache, x = make(causal=True), KVCache(), randn(BATCH, LENGTH, WIDTH)
    real = torch.arange(LENGTH) >= torch.tensor([0, 3])[:, None]  # padding on the left
    mask = real[:, None, None]
    whole = layer(x, mask=mask)
    layer(x[:, :6], mask=mask[..., :6], cache=cache)
    out, weights = layer(x[:, 6:], mask=mask, cache=cache, need_weights=True)
    agree(out, whole[:, 6:])
    assert weights.shape == (BATCH, HEADS, 3, LENGTH)


@torch.no_grad()
def test_cached_context_is_projected_once() -> None:
    layer, cache = make(CrossAttention, position="rotary"), KVCache()
    x, context = randn(BATCH, LENGTH, WIDTH), randn(BATCH, 5, WIDTH, seed=1)
    layer(x[:, :1], context, cache=cache)
    again = layer(x, cache=cache)
    agree(again, layer(x, context))
    assert len(cache) == 5


@torch.no_grad()
def test_cache_grows_seldom() -> None:
    layer, cache, sizes = make(causal=True), KVCache(), set()
    for row in randn(BATCH, 64, WIDTH).split(1, 1):
        layer(row, cache=cache)
        sizes.add(cache.key.untyped_storage().nbytes())
    assert len(sizes) <= 7
    roomy = KVCache(capacity=64)
    for row in randn(BATCH, 64, WIDTH).split(1, 1):
        layer(row, cache=roomy)
    assert torch.equal(roomy.key, cache.key)
    assert roomy.key.untyped_storage().nbytes() == BATCH * 64 * WIDTH * 8


@torch.no_grad()
def test_crop_and_reorder() -> None:
    layer, cache, x = make(causal=True, position="alibi"), KVCache(), randn(BATCH, LENGTH, WIDTH)
    layer(x, cache=cache)
    cache.crop(4)
    agree(layer(x[:, 4:], cache=cache), layer(x)[:, 4:])
    cache.crop(4)
    cache.reorder(torch.tensor([1, 1, 0]))
    swapped = x[[1, 1, 0]]
    agree(layer(swapped[:, 4:], cache=cache), layer(swapped)[:, 4:])
    assert repr(cache) == "KVCache(length=9, shape=(3, 9, 4, 4))"
    assert repr(KVCache()) == "KVCache(length=0, shape=None)"


def test_cache_leaves_what_a_graph_saved() -> None:
    """Rows of a frozen projection are saved by the graph of the query: later calls must not write there."""
    layer, cache, x = make(causal=True), KVCache(), randn(BATCH, LENGTH, WIDTH)
    for name in ("k_proj", "v_proj"):
        getattr(layer, name).requires_grad_(False)
    out = layer(x[:, :6], cache=cache)
    want = torch.autograd.grad(layer(x[:, :6]).sum(), layer.q_proj.weight)[0]
    cache.crop(3)
    with torch.no_grad():
        layer(x[:, 3:6] + 1, cache=cache)
    agree(torch.autograd.grad(out.sum(), layer.q_proj.weight)[0], want)


def test_cache_of_inference_mode_goes_on_elsewhere() -> None:
    layer, cache, x = make(causal=True), KVCache(capacity=32), randn(BATCH, LENGTH, WIDTH)
    with torch.inference_mode():
        layer(x[:, :4], cache=cache)
    with torch.no_grad():
        agree(layer(x[:, 4:], cache=cache), layer(x)[:, 4:])


# The habits of a module


@EVERY_OPTION
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(options: dict[str, Any], duplicate: Any) -> None:
    layer, x = make(**options), randn(BATCH, LENGTH, WIDTH)
    same = duplicate(layer)
    assert torch.equal(same(x), layer(x))
    assert list(same.state_dict()) == list(layer.state_dict())


def test_state_dict_has_parameters_alone() -> None:
    layer = SelfAttention(WIDTH, position="alibi", sinks=True, qk_norm=True, out_bias=False)
    projections = [f"{letter}_proj.{kind}" for letter in "qkv" for kind in ("weight", "bias")]
    assert sorted(layer.state_dict()) == sorted(
        [*projections, "out_proj.weight", "sinks", "q_norm.weight", "k_norm.weight"]
    )
    assert layer.num_heads == 8
    assert sorted(
        name for name, _ in SelfAttention(WIDTH, position="rotary", bias=False).named_parameters()
    ) == [f"{name}_proj.weight" for name in ("k", "out", "q", "v")]


@pytest.mark.parametrize("position", ["alibi", "rotary"])
def test_meta_device(position: str) -> None:
    layer = SelfAttention(WIDTH, HEADS, position=position, device="meta")
    real = make(dtype=torch.float32, position=position)
    layer.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = randn(BATCH, LENGTH, WIDTH, dtype=torch.float32)
    assert torch.equal(layer(x), real(x))


@pytest.mark.parametrize(
    "options", [OPTIONS["all"], OPTIONS["alibi"], OPTIONS["t5"]], ids=["all", "alibi", "t5"]
)
def test_half_precision_and_autocast(options: dict[str, Any]) -> None:
    layer, x = make(dtype=torch.float32, **options), randn(BATCH, LENGTH, WIDTH, dtype=torch.float32)
    want = layer(x)
    for half in (torch.bfloat16, torch.float16):
        out = copy.deepcopy(layer).to(half)(x.to(half))
        assert out.dtype == half
        assert (out.float() - want).abs().max() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).abs().max() < 0.1
    out.float().sum().backward()


def test_gradients_are_finite_differences() -> None:
    layer = make(num_kv_heads=2, causal=True, sinks=True, softcap=3.0)
    x = randn(1, 4, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(layer, x, nondet_tol=0)
    composed = make(num_kv_heads=2, causal=True, sinks=True, softcap=3.0, backend="math")
    assert torch.autograd.gradgradcheck(composed, x)


def test_what_it_says_of_itself() -> None:
    text = SelfAttention(WIDTH, HEADS, num_kv_heads=2, causal=True, window=(3, 0), sinks=True).extra_repr()
    assert text == "16, num_heads=4, head_dim=4, num_kv_heads=2, causal=True, window=(3, 0), sinks=True"
    assert "kdim=12, vdim=12" in repr(CrossAttention(WIDTH, context_dim=12))
    assert "num_heads=8" in repr(SelfAttention(WIDTH, position="alibi").position)


# Errors


def build(kind: type[Attention], *arguments: Any, **options: Any) -> Any:
    return lambda: kind(*arguments, **options)


def attend(*sources: Any, kind: type[Attention] = Attention, **arguments: Any) -> Any:
    return lambda: kind(8, 2)(*sources, **arguments)


def rows(*shape: int) -> Tensor:
    return torch.zeros(shape)


X = rows(2, 3, 8)
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (
        build(Attention, 10, 4),
        ValueError,
        "embed_dim must be a multiple of num_heads = 4, unless head_dim is given",
    ),
    (build(Attention, 0), ValueError, "embed_dim must be at least 1, got 0"),
    (build(Attention, "8"), TypeError, "embed_dim must be an integer, got str"),
    (build(Attention, 8, 0), ValueError, "num_heads must be at least 1, got 0"),
    (
        build(Attention, 12, 4, num_kv_heads=3),
        ValueError,
        "num_heads must be a multiple of num_kv_heads = 3, got 4",
    ),
    (build(Attention, 8, 2, head_dim=0), ValueError, "head_dim must be at least 1, got 0"),
    (build(Attention, 8, 2, kdim=2.0), TypeError, "kdim must be an integer, got float"),
    (build(Attention, 8, 2, vdim=-1), ValueError, "vdim must be at least 1, got -1"),
    (build(Attention, 8, 2, causal=1), TypeError, "causal must be a bool, got int"),
    (build(Attention, 8, 2, sinks=None), TypeError, "sinks must be a bool, got NoneType"),
    (build(Attention, 8, 2, bias=rows(3)), TypeError, "bias must be a bool, got Tensor"),
    (build(Attention, 8, 2, dropout=2), ValueError, "dropout must be a finite number in [0, 1], got 2"),
    (
        build(Attention, 8, 2, softcap=-1.0),
        ValueError,
        "softcap must be a finite number at least 0, got -1.0",
    ),
    (build(Attention, 8, 2, backend=0), TypeError, "backend must be a name or None, got int"),
    (
        build(Attention, 8, 2, kdim=4, fused=True),
        ValueError,
        "fused must be False where sources differ in width",
    ),
    (
        build(Attention, 8, 2, position="t5"),
        ValueError,
        "position must be 'rotary', 'alibi' or a module, got 't5'",
    ),
    (
        build(Attention, 8, 2, position=SinusoidalPositionalEncoding(8)),
        TypeError,
        "position must be a RotaryEmbedding, a RelativePositionBias, 'rotary', 'alibi' or None, got Sinus",
    ),
    (
        build(Attention, 8, 2, position=RotaryEmbedding(8)),
        ValueError,
        "position must turn head_dim = 4 columns",
    ),
    (
        build(Attention, 8, 2, position=RelativePositionBias(8)),
        ValueError,
        "position must have num_heads = 2 heads, got 8",
    ),
    (build(SelfAttention, 8, 2, kdim=4), TypeError, "kdim must be left out"),
    (build(CrossAttention, 8, 2, vdim=4), TypeError, "vdim must be left out: pass context_dim"),
    (build(CrossAttention, 8, 2, context_dim=0), ValueError, "context_dim must be at least 1, got 0"),
    (build(KVCache, -1), ValueError, "capacity must be at least 0, got -1"),
    (attend(rows(3, 8), X), ValueError, "query must have shape (batch, length, 8), got (3, 8)"),
    (attend(X, rows(2, 3, 7)), ValueError, "key must have shape (batch, length, 8), got (2, 3, 7)"),
    (attend(X, X, rows(2, 3, 7)), ValueError, "value must have shape (batch, length, 8), got (2, 3, 7)"),
    (attend(X, rows(3, 3, 8)), ValueError, "one batch size, got 2, 3 and 3"),
    (attend(X, X, rows(2, 4, 8)), ValueError, "key and value must have the same heads and length"),
    (attend(None, X), TypeError, "query must be a torch.Tensor, got NoneType"),
    (attend(X.long(), X), TypeError, "query must have a floating point dtype, got torch.int64"),
    (attend(X, None, X), ValueError, "key must be given where value is"),
    (attend(X), ValueError, "key may be None only where cache holds keys and values"),
    (attend(X, kind=CrossAttention, cache=KVCache()), ValueError, "key may be None only where cache holds"),
    (attend(X, X, cache=[]), TypeError, "cache must be a KVCache, got list"),
    (attend(X, X, mask=rows(3, 3)), TypeError, "mask must be bool (True: attend), got float32"),
    (attend(X, X, score_bias=rows(4, 4)), ValueError, "bias must broadcast to"),
    (attend(X, X, kv_lengths=[4, 4]), ValueError, "kv_lengths must be from 0 to key's length 3, got 4"),
]


@pytest.mark.parametrize("wrong, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        wrong()
    assert message in str(caught.value)


def test_errors_of_a_cache() -> None:
    cache = KVCache()
    with pytest.raises(ValueError, match="key and value must have shapes"):
        cache.append(rows(2, 3, 4, 8), rows(2, 4, 4, 8))
    cache.append(rows(2, 3, 4, 8), rows(2, 3, 4, 5))
    for wrong in (rows(1, 1, 4, 8), rows(2, 1, 2, 8), rows(2, 1, 4, 8).double()):
        with pytest.raises(
            ValueError, match="key must have the batch, heads, dim, dtype and device of the cache"
        ):
            cache.append(wrong, wrong)
    with pytest.raises(ValueError, match="value must have the batch"):
        cache.append(rows(2, 1, 4, 8), rows(2, 1, 4, 8))
    assert len(cache) == 3
    with pytest.raises(ValueError, match="length must be at most the 3 rows there are, got 4"):
        cache.crop(4)
