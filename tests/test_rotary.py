"""Rotary positions: against complex products, transformers, and the papers' properties."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from fastattn.nn import RotaryEmbedding
from modules import ORIGINAL, SCALINGS


def scaling_id(options: dict[str, Any]) -> str:
    extra = [name for name in options if name not in ("scaling", "factor", ORIGINAL)]
    return "-".join([options.get("scaling", "none"), *extra])


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def complex_rotation(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """exp(i angle) times column pairs as complex numbers, for x (B, H, L, D) and angles (L, D / 2)."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    parts = torch.view_as_real(turned)
    return (parts if interleaved else parts.transpose(-1, -2)).flatten(-2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rotary_dim", [None, 8])
def test_rotary_is_a_complex_product(interleaved: bool, layout: str, rotary_dim: int | None) -> None:
    """Forward and gradients, query and key of different lengths and heads, partial dims."""
    rope = RotaryEmbedding(16, interleaved=interleaved, rotary_dim=rotary_dim)
    dim = rotary_dim or 16
    for x, others, start in ((randn(2, 6, 5, 16), 0, 30), (randn(2, 2, 9, 16), 1, 26)):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        angles = torch.outer(
            torch.arange(start, start + x.shape[2]).float(), 1 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
        )
        want = torch.cat((complex_rotation(theirs[..., :dim], angles, interleaved), theirs[..., dim:]), -1)
        query, key = (mine, randn(2, 2, 9, 16)) if not others else (randn(2, 6, 5, 16), mine)
        if layout == "bshd":
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        out = rope(query, key, offset=30, key_offset=26, layout=layout)[others]
        out = out.transpose(1, 2) if layout == "bshd" else out
        weights = randn(*x.shape[:3], 17)[..., :16]
        (out * weights).sum().backward()
        (want * weights).sum().backward()
        torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-6)


def llama(
    head_dim: int, options: dict[str, Any], base: float = 10000.0
) -> modeling_llama.LlamaRotaryEmbedding:
    """The embedding of a Llama model whose configuration holds the same parameters."""
    parameters: dict[str, Any] = {"rope_theta": base, "rope_type": "default"} | options
    if scaling := parameters.pop("scaling", None):
        parameters["rope_type"] = scaling
    if scaling == "ntk":  # which transformers spells as another base
        factor = parameters.pop("factor") ** (head_dim / (head_dim - 2))
        parameters |= {"rope_type": "default", "rope_theta": base * factor}
    if transformers.__version__ < "5":  # which has the base beside them
        named = {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    else:
        named = {"rope_parameters": parameters}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=parameters.get(ORIGINAL, 2048),
        **named,
    )
    return modeling_llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("options", SCALINGS, ids=scaling_id)
@pytest.mark.parametrize("length", [40, 200])
def test_rotary_agrees_with_transformers(options: dict[str, Any], length: int) -> None:
    """Both sides of the original length, forward and gradients; frequencies to the bit."""
    theirs = llama(32, options)
    rope = RotaryEmbedding(32, **options)
    assert torch.equal(rope.inv_freq, theirs.inv_freq)
    assert rope.attention_factor == theirs.attention_scaling
    query, key = randn(2, 4, length, 32).requires_grad_(), randn(2, 2, length, 32).requires_grad_()
    positions = torch.arange(length).expand(2, -1)
    wants = modeling_llama.apply_rotary_pos_emb(query, key, *theirs(query, positions))
    outs = rope(query, key, positions=positions)
    for x, out, want in zip((query, key), outs, wants, strict=True):
        assert (out - want).abs().max() <= 1e-6 * want.abs().max()
        weights = randn(*x.shape[:3], 33)[..., :32]
        (mine,) = torch.autograd.grad((out * weights).sum(), x)
        (other,) = torch.autograd.grad((want * weights).sum(), x)
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize(("head_dim", "factor"), [(128, 8.0), (64, 32.0)], ids=["3.1", "3.2"])
def test_llama3_as_released(head_dim: int, factor: float) -> None:
    options = {"factor": factor, ORIGINAL: 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = RotaryEmbedding(head_dim, base=500000.0, scaling="llama3", **options)
    theirs = llama(head_dim, {"scaling": "llama3", **options}, base=500000.0)
    assert torch.equal(rope.inv_freq, theirs.inv_freq)
    ratio = rope.inv_freq / RotaryEmbedding(head_dim, base=500000.0).inv_freq
    assert ratio[0] == 1 and ratio[-1] == 1 / factor


def test_longrope_of_phi3() -> None:
    """Its configurations have no factor but the ratio of two lengths, and may turn a part of the columns."""
    factors = {"short_factor": [1 + 0.01 * i for i in range(12)], "long_factor": [1.0 + i for i in range(12)]}
    config = transformers.Phi3Config(
        hidden_size=128,
        num_attention_heads=4,
        partial_rotary_factor=0.75,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "longrope", **factors},
    )
    theirs = modeling_phi3.Phi3RotaryEmbedding(config)
    options = {"factor": 131072 / 4096, ORIGINAL: 4096, **factors}
    rope = RotaryEmbedding(32, rotary_dim=24, scaling="longrope", **options)
    assert rope.attention_factor == theirs.attention_scaling
    query, key = randn(1, 2, 3, 32), randn(1, 1, 3, 32)
    for start in (4093, 4094, 100, 5000):  # the last row at 4095 is the last that short factors turn
        positions = torch.arange(start, start + 3)[None]
        wants = modeling_phi3.apply_rotary_pos_emb(query, key, *theirs(query, positions))
        for out, want in zip(rope(query, key, positions=positions), wants, strict=True):
            assert (out - want).abs().max() <= 1e-6 * want.abs().max()
    assert "scaling='longrope'" in repr(rope) and "short_factor=[1.0, 1.01, 1.02, " in repr(rope)


def test_interleaved_agrees_with_gptj() -> None:
    x = randn(2, 7, 3, 16)
    sin, cos = modeling_gptj.create_sinusoidal_positions(7, 16).chunk(2, dim=-1)
    want = modeling_gptj.apply_rotary_pos_emb(x, sin[None], cos[None])
    out = RotaryEmbedding(16, interleaved=True)(x, layout="bshd")
    assert (out - want).abs().max() <= 1e-6 * want.abs().max()


def test_yarn_by_hand() -> None:
    """Fast pairs keep their frequency, slow ones are divided by the factor; the scores grow a little."""
    options = {"factor": 16.0, ORIGINAL: 4096}
    rope, plain = RotaryEmbedding(128, scaling="yarn", **options), RotaryEmbedding(128)
    turns = 4096 * plain.inv_freq / (2 * math.pi)
    fast, slow = turns > 40, turns < 0.8
    assert fast.sum() > 10 and slow.sum() > 10
    assert torch.equal(rope.inv_freq[fast], plain.inv_freq[fast])
    torch.testing.assert_close(rope.inv_freq[slow], plain.inv_freq[slow] / 16)
    between = rope.inv_freq / plain.inv_freq
    assert (between[1:] <= between[:-1] + 1e-6).all()
    assert rope.attention_factor == pytest.approx(0.1 * math.log(16) + 1)


def test_ntk_keeps_the_fastest_and_divides_the_slowest() -> None:
    ratio = RotaryEmbedding(64, scaling="ntk", factor=8.0).inv_freq / RotaryEmbedding(64).inv_freq
    assert ratio[0] == 1
    assert float(ratio[-1]) == pytest.approx(1 / 8, rel=1e-5)


def test_scores_depend_on_differences_alone() -> None:
    rope = RotaryEmbedding(32)
    query, key = randn(1, 4, 6, 32), randn(1, 4, 11, 32)
    near, far = (rope(query, key, offset=start + 5, key_offset=start) for start in (0, 100))
    torch.testing.assert_close(near[0] @ near[1].mT, far[0] @ far[1].mT, rtol=0, atol=2e-4)


def test_decoding_turns_rows_as_prefill_does() -> None:
    rope = RotaryEmbedding(16, interleaved=True)
    query, key = randn(2, 4, 9, 16), randn(2, 1, 9, 16)
    whole = rope(query, key)
    for row in range(9):
        step = rope(query[:, :, row : row + 1], key[:, :, row : row + 1], offset=row)
        assert all(torch.equal(a, b[:, :, row : row + 1]) for a, b in zip(step, whole, strict=True))
    ragged = rope(query[:, :, 4:6], offset=torch.tensor([4, 0]))
    assert torch.equal(ragged[0], whole[0][0, :, 4:6])
    assert torch.equal(ragged[1], rope(query[:, :, 4:6])[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_angles_stay_float32(dtype: torch.dtype) -> None:
    """After .to(dtype), on half precision inputs and under autocast: one rounding, of the result."""
    rope = RotaryEmbedding(16)
    x = randn(1, 2, 8, 16).to(dtype)
    want = rope(x.float(), offset=5000).to(dtype)
    lowered = RotaryEmbedding(16).to(dtype)
    assert lowered.inv_freq.dtype == torch.float32
    assert torch.equal(lowered(x, offset=5000), want)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(lowered(x, offset=5000), want)
        assert torch.equal(lowered(x.float(), offset=5000), rope(x.float(), offset=5000))


# Errors

X = torch.zeros(2, 5, 8)
HEADS = torch.zeros(2, 3, 5, 8)
LLAMA3 = {"scaling": "llama3", "factor": 2.0, ORIGINAL: 64}
LONG = {"scaling": "longrope", ORIGINAL: 64, "short_factor": [1, 2, 3, 4], "long_factor": [5, 6, 7, 8]}
YARN = {"scaling": "yarn", "factor": 2.0, ORIGINAL: 64}
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: RotaryEmbedding(7), ValueError, "head_dim must be even, since columns turn in pairs, got 7"),
    (
        lambda: RotaryEmbedding(8, rotary_dim=10),
        ValueError,
        "rotary_dim must be at most head_dim = 8, got 10",
    ),
    (
        lambda: RotaryEmbedding(8, rotary_dim=3),
        ValueError,
        "rotary_dim must be even, since columns turn in pairs, got 3",
    ),
    (lambda: RotaryEmbedding(8, base=1), ValueError, "base must be a finite number above 1, got 1"),
    (lambda: RotaryEmbedding(8, interleaved=0), TypeError, "interleaved must be a bool, got int"),
    (
        lambda: RotaryEmbedding(8, scaling="other"),
        ValueError,
        "scaling must be None or one of linear, ntk, dynamic, yarn, llama3, longrope, got 'other'",
    ),
    (lambda: RotaryEmbedding(8, scaling=2), TypeError, "scaling must be a string or None, got int"),
    (
        lambda: RotaryEmbedding(8, factor=2.0),
        ValueError,
        "factor must be left out where scaling is None, got 2.0",
    ),
    (
        lambda: RotaryEmbedding(8, scaling="linear"),
        ValueError,
        "factor must be given where scaling is 'linear', got None",
    ),
    (
        lambda: RotaryEmbedding(8, scaling="linear", factor=0.5),
        ValueError,
        "factor must be a finite number at least 1, got 0.5",
    ),
    (
        lambda: RotaryEmbedding(8, scaling="yarn", factor=2.0),
        ValueError,
        f"{ORIGINAL} must be given where scaling is 'yarn', got None",
    ),
    (
        lambda: RotaryEmbedding(8, scaling="ntk", factor=2.0, beta_fast=2.0),
        ValueError,
        "beta_fast must be left out where scaling is 'ntk', got 2.0",
    ),
    (
        lambda: RotaryEmbedding(2, scaling="ntk", factor=2.0),
        ValueError,
        "rotary_dim must be above 2 where scaling is 'ntk', got 2",
    ),
    (
        lambda: RotaryEmbedding(8, **YARN, mscale=1.0),
        ValueError,
        "mscale and mscale_all_dim must be given together, got one of them",
    ),
    (
        lambda: RotaryEmbedding(8, **YARN, beta_fast=0.5),
        ValueError,
        "beta_fast must be at least beta_slow = 1, got 0.5",
    ),
    (
        lambda: RotaryEmbedding(8, **LLAMA3, low_freq_factor=1.0),
        ValueError,
        "high_freq_factor must be given where scaling is 'llama3', got None",
    ),
    (
        lambda: RotaryEmbedding(8, **LLAMA3, low_freq_factor=4.0, high_freq_factor=4.0),
        ValueError,
        "high_freq_factor must be above low_freq_factor = 4.0, got 4.0",
    ),
    (
        lambda: RotaryEmbedding(8, **LONG),
        ValueError,
        "factor or attention_factor must be given where scaling is 'longrope', got neither",
    ),
    (
        lambda: RotaryEmbedding(16, **LONG, factor=2.0),
        ValueError,
        "short_factor must have rotary_dim / 2 = 8 numbers, got 4",
    ),
    (
        lambda: RotaryEmbedding(8, **{**LONG, "long_factor": [1, 1, 0, 1]}, factor=2.0),
        ValueError,
        "long_factor must be a finite number above 0, got 0",
    ),
    (
        lambda: RotaryEmbedding(8, **{**LONG, "long_factor": 2.0}, factor=2.0),
        TypeError,
        "long_factor must be a list of numbers, got float",
    ),
    (lambda: RotaryEmbedding(8, **YARN, truncate=1), TypeError, "truncate must be a bool, got int"),
    (lambda: RotaryEmbedding(8)(X), ValueError, "query must have 4 axes, the last of 8, got shape (2, 5, 8)"),
    (lambda: RotaryEmbedding(8)(HEADS, 1), TypeError, "key must be a torch.Tensor, got int"),
    (
        lambda: RotaryEmbedding(8)(HEADS, layout="hbsd"),
        ValueError,
        "layout must be 'bhsd' or 'bshd', got 'hbsd'",
    ),
    (lambda: RotaryEmbedding(8)(HEADS, layout=1), TypeError, "layout must be 'bhsd' or 'bshd', got int"),
    (
        lambda: RotaryEmbedding(8)(HEADS, key_offset=1),
        ValueError,
        "key_offset and key_positions must be left out where key is None",
    ),
    (
        lambda: RotaryEmbedding(8)(HEADS, HEADS[:, :, :4], positions=torch.arange(5)),
        ValueError,
        "key_positions must be given where lengths differ, got None with 5 query rows and 4 key rows",
    ),
    (
        lambda: RotaryEmbedding(8)(HEADS, HEADS, key_offset=1, key_positions=torch.arange(5)),
        ValueError,
        "key_offset must be left out where key_positions is given, got 1",
    ),
    (
        lambda: RotaryEmbedding(8)(HEADS, offset=0.5),
        TypeError,
        "offset must be an integer or a tensor of them, got float",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
