"""Positions in fastattn.nn: against the papers' formulas and transformers, and the habits of a module."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

import fastattn as fa
from fastattn.nn import (
    LearnedPositionalEncoding,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
    alibi_slopes,
)
from modules import ORIGINAL, SCALINGS


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


LLAMA3 = {"scaling": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"scaling": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 4, 8]}


def modules() -> list[nn.Module]:
    return [
        SinusoidalPositionalEncoding(8, max_len=16),
        LearnedPositionalEncoding(16, 8),
        RelativePositionBias(2, num_buckets=8, max_distance=20),
        *[RotaryEmbedding(8, **options) for options in SCALINGS[:5]],
        RotaryEmbedding(8, interleaved=True, rotary_dim=4),
        *[RotaryEmbedding(8, **options, **{"factor": 8.0, ORIGINAL: 8}) for options in (LLAMA3, LONGROPE)],
    ]


def apply(module: nn.Module, length: int = 6, offset: Any = 0) -> Tensor:
    return apply_to(module, randn(2, length, 8), offset)


def apply_to(module: nn.Module, x: Tensor, offset: Any) -> Tensor:
    if isinstance(module, RelativePositionBias):
        return module(x.shape[1], x.shape[1] + 2, query_offset=offset)
    if isinstance(module, RotaryEmbedding):
        return module(x[:, None], x[:, None], offset=offset)[1]
    return module(x, offset=offset)


def module_id(module: nn.Module) -> str:
    names = [type(module).__name__, getattr(module, "scaling", None), getattr(module, "interleaved", None)]
    return "-".join(name if isinstance(name, str) else "interleaved" for name in names if name)


EVERY_MODULE = pytest.mark.parametrize("module", modules(), ids=module_id)


# Sinusoidal


def sinusoidal(position: int, embed_dim: int) -> list[float]:
    """The formula of the paper, a column at a time."""
    angle = [position / 10000 ** (2 * (column // 2) / embed_dim) for column in range(embed_dim)]
    return [math.cos(a) if column % 2 else math.sin(a) for column, a in enumerate(angle)]


@pytest.mark.parametrize("embed_dim", [1, 2, 7, 16])
@pytest.mark.parametrize("offset", [0, 3, 12, 100_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sinusoidal_is_the_formula_within_and_past_the_table(
    embed_dim: int, offset: int, dtype: torch.dtype
) -> None:
    x = torch.zeros(2, 5, embed_dim, dtype=dtype)
    out = SinusoidalPositionalEncoding(embed_dim, max_len=16)(x, offset=offset)
    want = torch.tensor([sinusoidal(offset + row, embed_dim) for row in range(5)], dtype=torch.float64)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-10, torch.float32: 6e-8, torch.bfloat16: 2**-9 * 1.01}[dtype]
    assert (out.double() - want).abs().max() <= tolerance


def test_table_and_what_lies_past_it_agree_to_the_bit() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.zeros(1, 40, 6, dtype=dtype)
        assert torch.equal(SinusoidalPositionalEncoding(6, 40)(x), SinusoidalPositionalEncoding(6, 1)(x))


@pytest.mark.parametrize(
    "encode", [SinusoidalPositionalEncoding(4, 50), LearnedPositionalEncoding(50, 4)], ids=repr
)
def test_offset_positions_and_layouts_agree(encode: nn.Module) -> None:
    x = randn(2, 5, 4)
    rows = torch.tensor([[3, 4, 5, 6, 7], [40, 41, 42, 43, 44]])
    want = torch.cat([encode(x[:1], offset=3), encode(x[1:], offset=40)])
    assert torch.equal(encode(x, positions=rows), want)
    assert torch.equal(encode(x, offset=torch.tensor([3, 40])), want)
    assert torch.equal(encode(x[0], offset=3), want[0])
    assert torch.equal(encode(x[0], positions=rows[0]), want[0])
    assert torch.equal(encode(x[0], offset=torch.tensor([3])), want[0])
    last = copy.deepcopy(encode)
    last.batch_first = False
    assert torch.equal(last(x.transpose(0, 1), positions=rows).transpose(0, 1), want)
    assert torch.equal(last(x.transpose(0, 1), offset=3)[:, 0], want[0])


def test_encodings_drop_out_in_training_alone() -> None:
    for encode in (SinusoidalPositionalEncoding(64, dropout=0.5), LearnedPositionalEncoding(64, 64, 0.5)):
        x = 1e3 + randn(4, 32, 64)
        torch.manual_seed(0)
        assert 0.4 < (encode(x) == 0).float().mean() < 0.6
        assert not (encode.eval()(x) == 0).any()


# Learned


def test_learned_is_an_embedding() -> None:
    """The checkpoint of an embedding loads; forward and gradient are its own."""
    embedding = nn.Embedding(12, 6)
    encode = LearnedPositionalEncoding(12, 6)
    encode.load_state_dict(embedding.state_dict())
    x = randn(2, 5, 6)
    for options in ({"offset": 7}, {"positions": torch.arange(7, 12)}):
        embedding.zero_grad()
        encode.zero_grad()
        want = x + embedding(torch.arange(7, 12))
        out = encode(x, **options)
        assert torch.equal(out, want)
        (out * x).sum().backward()
        (want * x).sum().backward()
        torch.testing.assert_close(encode.weight.grad, embedding.weight.grad)


# ALiBi


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-power for power in range(1, 9)]
    sixteen = [2.0 ** (-power / 2) for power in range(1, 17)]
    torch.testing.assert_close(alibi_slopes(16), torch.tensor(sixteen))
    assert alibi_slopes(12, dtype=torch.float64).tolist() == [2.0**-p for p in range(1, 9)] + sixteen[0:8:2]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 8, 12, 20, 32, 40, 71, 112])
def test_alibi_slopes_agree_with_bloom(num_heads: int) -> None:
    """Bloom's key 1 holds the slope itself; its softmax and ours differ by a constant a row."""
    bloom = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), bloom, rtol=2e-6, atol=0)


def test_alibi_slopes_in_attention() -> None:
    query, key, value = (randn(1, 6, length, 8) for length in (5, 7, 7))
    slopes = alibi_slopes(6)
    distance = (torch.arange(5)[:, None] + 2 - torch.arange(7)).abs()
    want = fa.attention(query, key, value, bias=-slopes[:, None, None] * distance)
    torch.testing.assert_close(fa.attention(query, key, value, alibi_slopes=slopes), want)


# T5's bias


def t5(num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool) -> T5Attention:
    config = T5Config(
        num_heads=num_heads,
        d_model=8,
        d_kv=4,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
        is_decoder=not bidirectional,
    )
    return T5Attention(config, has_relative_attention_bias=True, layer_idx=0)


def bias_of(layer: T5Attention, query_length: int, key_length: int, past: int) -> Tensor:
    """Call T5's with the queries behind `past` keys, as transformers 5 and 4 name it."""
    if "past_seen_tokens" in inspect.signature(layer.compute_bias).parameters:
        return layer.compute_bias(query_length, key_length, past_seen_tokens=past)
    return layer.compute_bias(query_length, key_length, cache_position=torch.arange(query_length) + past)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (4, 3), (8, 20), (64, 1000)])
def test_bias_agrees_with_t5(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    """Every bucket, forward to the bit; gradients; T5's checkpoint loads."""
    theirs = t5(3, num_buckets, max_distance, bidirectional)
    bias = RelativePositionBias(3, num_buckets, max_distance, bidirectional)
    bias.load_state_dict(theirs.relative_attention_bias.state_dict())
    with torch.no_grad():
        assert torch.equal(
            bias(1, 4 * max_distance + 1, query_offset=2 * max_distance),
            bias_of(theirs, 1, 4 * max_distance + 1, 2 * max_distance),
        )
    for query_length, key_length, past in ((7, 7, 0), (5, 40, 35), (40, 5, 0), (1, 30, 29)):
        out = bias(query_length, key_length, query_offset=past)
        want = bias_of(theirs, query_length, key_length, past)
        assert torch.equal(out, want)
        weights = randn(1, 3, query_length, key_length)
        (mine,) = torch.autograd.grad((out * weights).sum(), bias.weight)
        (other,) = torch.autograd.grad((want * weights).sum(), theirs.relative_attention_bias.weight)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_bias_stands_where_attention_does() -> None:
    """Without an offset the last query meets the last key; with several, each sequence has its own."""
    bias = RelativePositionBias(2)
    assert torch.equal(bias(3, 8), bias(8, 8)[:, :, 5:])
    both = bias(3, 8, query_offset=torch.tensor([5, 0]))
    assert torch.equal(both, torch.cat([bias(3, 8), bias(3, 8, query_offset=0)]))
    for lengths in ((0, 4), (4, 0), (0, 0)):
        assert bias(*lengths).shape == (1, 2, *lengths)
    query, key = randn(2, 2, 3, 8), randn(2, 2, 8, 8)
    with torch.no_grad():
        out = fa.attention(query, key, key, bias=both, scale=1.0)
        torch.testing.assert_close(out, (query @ key.mT + both).softmax(-1) @ key)


# What holds for each


@EVERY_MODULE
def test_copies_and_pickles(module: nn.Module) -> None:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    )
    assert all(torch.equal(apply(twin), apply(module)) for twin in copies)


@EVERY_MODULE
def test_only_what_is_learned_is_stored(module: nn.Module) -> None:
    assert list(module.state_dict()) == [name for name, _ in module.named_parameters()]


@EVERY_MODULE
def test_derived_buffers_survive_moves(module: nn.Module) -> None:
    """Down to half precision and back, and to a device that holds no values and back."""
    twin = copy.deepcopy(module).half()
    for name, buffer in module.named_buffers():
        assert torch.equal(twin.get_buffer(name), buffer) and twin.get_buffer(name).dtype == buffer.dtype
    twin = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    twin.load_state_dict(module.state_dict())
    assert torch.equal(apply(twin), apply(module))


@EVERY_MODULE
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoints_are_assigned_to_a_module_without_memory(module: nn.Module, compiled: bool) -> None:
    """Whose buffers are in no checkpoint: they follow the input of the first call, in any mode."""
    twin = copy.deepcopy(module).to("meta")
    twin.load_state_dict(module.state_dict(), assign=True)
    torch._dynamo.reset()
    call = torch.compile(apply_to, backend="aot_eager", fullgraph=True) if compiled else apply_to
    with torch.inference_mode(not compiled):
        assert torch.equal(call(twin, randn(2, 6, 8), 0), apply(module))
    assert all(buffer.device.type == "cpu" and not buffer.is_inference() for buffer in twin.buffers())


@EVERY_MODULE
def test_nothing_to_place(module: nn.Module) -> None:
    for batch, length in ((0, 4), (2, 0)):
        out = apply_to(module, torch.zeros(batch, length, 8), 0)
        assert out.shape[-2] == length


@pytest.mark.parametrize("module", [*modules()[:3], modules()[6], modules()[8], modules()[10]], ids=module_id)
def test_compiles_without_a_break(module: nn.Module) -> None:
    """Static, then dynamic: from the third length or offset on nothing compiles again. Gradients as well."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(apply_to, backend=counter, fullgraph=True)
    parameters = list(module.parameters())
    for offsets in ([torch.tensor([1])] * 5, [1, 2, 3, 4, 5]):
        settled = 0
        for length, offset in zip((5, 6, 7, 9, 11), offsets, strict=True):
            x = randn(2, length, 8).requires_grad_()
            out, want = compiled(module, x, offset), apply_to(module, x, offset)
            assert torch.equal(out, want)
            leaves = parameters if isinstance(module, RelativePositionBias) else [x, *parameters]
            grads = [torch.autograd.grad((y**2).sum(), leaves) for y in (out, want)]
            torch.testing.assert_close(*grads)
            settled = settled or (counter.frame_count if length == 7 else 0)
        assert counter.frame_count == settled


@pytest.mark.parametrize("module", modules()[:5:2], ids=module_id)
def test_exports_with_a_dynamic_length(module: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = module

        def forward(self, x: Tensor) -> Tensor:
            return apply_to(self.positions, x, 1)

    shapes = {"x": {1: torch.export.Dim("length", min=2, max=15)}}
    exported = torch.export.export(Model(), (randn(2, 6, 8),), dynamic_shapes=shapes).module()
    for length in (3, 6, 13):
        assert torch.equal(exported(randn(2, length, 8)), apply(module, length, 1))


# Errors

X = torch.zeros(2, 5, 8)
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: SinusoidalPositionalEncoding(0), ValueError, "embed_dim must be at least 1, got 0"),
    (lambda: SinusoidalPositionalEncoding("8"), TypeError, "embed_dim must be an integer, got str"),
    (lambda: SinusoidalPositionalEncoding(8, 0), ValueError, "max_len must be at least 1, got 0"),
    (
        lambda: SinusoidalPositionalEncoding(8, dropout=1.5),
        ValueError,
        "dropout must be a finite number in [0, 1], got 1.5",
    ),
    (
        lambda: SinusoidalPositionalEncoding(8, dropout=True),
        TypeError,
        "dropout must be a real number, got bool",
    ),
    (
        lambda: SinusoidalPositionalEncoding(8, batch_first=1),
        TypeError,
        "batch_first must be a bool, got int",
    ),
    (lambda: SinusoidalPositionalEncoding(8)([1.0]), TypeError, "x must be a torch.Tensor, got list"),
    (
        lambda: SinusoidalPositionalEncoding(8)(X.long()),
        TypeError,
        "x must have a floating point dtype, got torch.int64",
    ),
    (
        lambda: SinusoidalPositionalEncoding(4)(X),
        ValueError,
        "x must have shape (B, L, E) or (L, E) with E = 4, got (2, 5, 8)",
    ),
    (lambda: SinusoidalPositionalEncoding(8)(X, offset=-1), ValueError, "offset must be at least 0, got -1"),
    (
        lambda: SinusoidalPositionalEncoding(8)(X, offset=1.0),
        TypeError,
        "offset must be an integer, got float",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, offset=2),
        ValueError,
        "offset + length must be at most max_len = 6, got offset 2 and 5 rows",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, offset=torch.tensor([0, 2])),
        ValueError,
        "positions must be in [0, max_len) with max_len = 6, got 6",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, positions=torch.arange(-1, 4)),
        ValueError,
        "positions must be in [0, max_len) with max_len = 6, got -1",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, positions=torch.arange(4)),
        ValueError,
        "positions must have shape (5,) or (2, 5), got (4,)",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, positions=[0]),
        TypeError,
        "positions must be a torch.Tensor, got list",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, positions=torch.zeros(5)),
        TypeError,
        "positions must hold integers, got torch.float32",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, offset=1, positions=torch.arange(5)),
        ValueError,
        "offset must be left out where positions is given, got 1",
    ),
    (
        lambda: LearnedPositionalEncoding(6, 8)(X, offset=torch.zeros(3).long()),
        ValueError,
        "offset must have shape () or (2,), got (3,)",
    ),
    (lambda: alibi_slopes(0), ValueError, "num_heads must be at least 1, got 0"),
    (lambda: alibi_slopes(2.0), TypeError, "num_heads must be an integer, got float"),
    (lambda: RelativePositionBias(0), ValueError, "num_heads must be at least 1, got 0"),
    (lambda: RelativePositionBias(2, 7), ValueError, "num_buckets must be even where bidirectional, got 7"),
    (lambda: RelativePositionBias(2, 2), ValueError, "num_buckets must be at least 4, got 2"),
    (lambda: RelativePositionBias(2, 32, 8), ValueError, "max_distance must be at least 9, got 8"),
    (lambda: RelativePositionBias(2)(-1, 4), ValueError, "query_length must be at least 0, got -1"),
    (lambda: RelativePositionBias(2)(4, 4.0), TypeError, "key_length must be an integer, got float"),
    (
        lambda: RelativePositionBias(2)(4, 4, query_offset="0"),
        TypeError,
        "query_offset must be an integer or a tensor of them, got str",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
