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
from fastattn.nn._projection import PackedLinear
from modules import HEADS, INF, OPTIONS, WIDTH, agree, make, randn, shaken

BATCH, LENGTH = 2, 9


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


EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


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


@pytest.mark.parametrize("fused", [(False, True), (True, False)], ids=["to-fused", "to-separate"])
@pytest.mark.parametrize("other", [{"head_dim": 5}, {"num_kv_heads": 2}], ids=["head_dim", "kv_heads"])
def test_state_dicts_of_other_sizes(fused: tuple[bool, bool], other: dict[str, int]) -> None:
    stored, layer = make(fused=fused[0], **other).state_dict(), make(fused=fused[1])
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(stored)
    lines = str(caught.value).splitlines()[1:]
    assert lines and all(line.strip().startswith("size mismatch for") for line in lines), lines


def test_heads_are_views_of_the_projection() -> None:
    layer = make(fused=True, num_kv_heads=2)
    x = randn(BATCH, LENGTH, WIDTH)
    heads = layer._project(x, x, x)
    assert [tuple(head.shape[2:]) for head in heads] == [(4, 4), (2, 4), (2, 4)]
    assert len({head.untyped_storage().data_ptr() for head in heads}) == 1


# The habits of a module


@EVERY_OPTION
@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention, Attention])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(options: dict[str, Any], kind: type[Attention], duplicate: Any) -> None:
    layer, x = make(kind, fused=kind is not Attention, **options), randn(BATCH, LENGTH, WIDTH)
    same = duplicate(layer)
    assert torch.equal(call_with(same, x, x), call_with(layer, x, x))
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


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("position", ["alibi", "rotary", "t5"])
def test_meta_device(position: str, assign: bool) -> None:
    real = make(dtype=torch.float32, position=RelativePositionBias(HEADS) if position == "t5" else position)
    layer = copy.deepcopy(real).to("meta")
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(real.state_dict(), assign=assign)
    x = randn(BATCH, LENGTH, WIDTH, dtype=torch.float32)
    assert torch.equal(layer(x), real(x))


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_are_drawn_anew_module_by_module(fused: bool) -> None:
    """As a model is, which was made on the meta device and has no checkpoint."""
    options = {"sinks": True, "qk_norm": True, "position": RelativePositionBias(HEADS), "device": "meta"}
    layer = SelfAttention(WIDTH, HEADS, fused=fused, **options).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.0)
    for module in layer.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    assert layer.sinks.count_nonzero() == 0
    assert not any((parameter == 7).any() for parameter in layer.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_are_drawn_anew_as_the_constructor_draws_them(fused: bool) -> None:
    torch.manual_seed(3)
    fresh = SelfAttention(WIDTH, HEADS, num_kv_heads=2, sinks=True, qk_norm=True, fused=fused)
    want = copy.deepcopy(fresh.state_dict())
    layer = shaken(fresh)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(torch.equal(tensor, want[name]) for name, tensor in layer.state_dict().items())


def test_one_map_is_a_plain_linear() -> None:
    """Tools that go by the exact class find it, torch's dynamic quantisation for one."""
    layer = make(kind=CrossAttention, dtype=torch.float32, fused=True)
    kinds = [type(getattr(layer, f"{pack}_proj")) for pack in ("q", "kv", "out")]
    assert kinds == [nn.Linear, PackedLinear, nn.Linear]
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in SelfAttention(WIDTH).parameters())
    assert not any(isinstance(module, PackedLinear) for module in make().modules())


@pytest.mark.filterwarnings("ignore")  # torch deprecates it in favour of another package
def test_dynamic_quantisation_reaches_the_projections() -> None:
    layer, x = make(dtype=torch.float32, causal=True), randn(BATCH, LENGTH, WIDTH, dtype=torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    want = layer(x)
    assert 0 < (quantised(x) - want).abs().max() < 0.05 * want.abs().max()


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
    (
        attend(X, X, mask=rows(3, 3)),
        TypeError,
        "got torch.float32: pass values to add to the scores as `score_bias`",
    ),
    (attend(X, X, score_bias=[0.0]), TypeError, "score_bias must be a torch.Tensor, got list"),
    (attend(X, X, score_bias=rows(3, 3) > 0), TypeError, "got torch.bool (a bool goes to `mask`)"),
    (
        attend(X, X, score_bias=rows(3, 3).double()),
        TypeError,
        "score_bias must be torch.float32 like the heads, or float32, got torch.float64",
    ),
    (
        attend(X, X, score_bias=rows(3, 4)),
        ValueError,
        "score_bias must broadcast to (batch, num_heads, queries, keys) = (2, 2, 3, 3), got shape (3, 4)",
    ),
    (
        attend(X, X, score_bias=rows(3, 3).to("meta")),
        RuntimeError,
        "score_bias is on device 'meta', expected 'cpu'",
    ),
    (attend(X, X, cache=[]), TypeError, "cache must be a KVCache, got list"),
    (attend(X, X, kv_lengths=[4, 4]), ValueError, "kv_lengths must be from 0 to key's length 3, got 4"),
]


@pytest.mark.parametrize("wrong, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        wrong()
    assert message in str(caught.value)
