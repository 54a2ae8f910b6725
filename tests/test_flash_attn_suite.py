"""The cases of flash-attention's public tests: their lengths, head sizes, features and rule for errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.integrations import flash_attn as fl
from fastattn.integrations.flash_attn_padding import pad_input, unpad_input
from flash_reference import alibi, assert_as_good, attend, select, visible

HEAD_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
LENGTHS = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (97, 97), (200, 200)]
LONG = [(1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)]
LOW = [torch.float16, torch.bfloat16]
FLAGS = [False, True]
KV_HEADS = {"mha": 6, "gqa": 2, "mqa": 1}
BATCH, HEADS = 2, 6
FEATURES: dict[str, Any] = {
    "head_dim": HEAD_DIMS,
    "causal": FLAGS,
    "local": [False, False, True],
    "alibi": [False, True, False],
    "softcap": [0.0, 0.0, 50.0],
    "dropout_p": [0.0, 0.17],
    "heads": list(KV_HEADS),
    "packed": ["no", "kv", "qkv"],
    "dtype": LOW,
}


# Few queries or keys, of which no other feature is asked.
CAUSAL: dict[str, Any] = {
    "lengths": [(1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (239, 1), (799, 3), (512, 127)],
    **FEATURES,
    "causal": [True],
    "alibi": [False],
    "softcap": [0.0],
    "dropout_p": [0.0],
    "packed": ["no", "kv"],
}


@select({"lengths": LENGTHS, **FEATURES}, quick=12, slow=120)
def test_func(case: SimpleNamespace) -> None:
    check_func(case)


@select(CAUSAL, quick=8, slow=80)
def test_causal_func(case: SimpleNamespace) -> None:
    check_func(case)


@pytest.mark.slow
@select({"lengths": LONG, **FEATURES}, quick=12, slow=12)
def test_func_long(case: SimpleNamespace) -> None:
    check_func(case)


def check_func(case: SimpleNamespace) -> None:
    """Out and gradients; with dropout, probabilities, and the places where they fall out."""
    inputs = draw_inputs(case)
    q, k, _ = unpacked(case, inputs, 2)
    rows, options = (q.shape[1], k.shape[1]), draw_options(case)
    function = {
        "no": fl.flash_attn_func,
        "kv": fl.flash_attn_kvpacked_func,
        "qkv": fl.flash_attn_qkvpacked_func,
    }
    out, lse, signed = function[case.packed](*inputs, return_attn_probs=True, deterministic=True, **options)
    full = tuple(torch.full((BATCH,), count) for count in rows)
    seen = visible(*full, rows, case.causal, options["window_size"])
    assert torch.equal(lse.isposinf(), ~seen.any(-1).expand_as(lse))
    check(case, options, inputs, out, signed, full, seen)


@select({"lengths": [(1, 147), *LENGTHS], **FEATURES}, quick=12, slow=120)
def test_varlen_func(case: SimpleNamespace) -> None:
    check_varlen_func(case)


@select(CAUSAL, quick=8, slow=80)
def test_causal_varlen_func(case: SimpleNamespace) -> None:
    check_varlen_func(case)


def check_varlen_func(case: SimpleNamespace) -> None:
    """Sequences of random lengths, unpadded and padded again, against the padded ones."""
    inputs = draw_inputs(case)
    q, k, _ = unpacked(case, inputs, 2)
    rows, options = (q.shape[1], k.shape[1]), draw_options(case)
    lengths = [torch.randint(max(1, count - 20), count + 1, (BATCH,)) for count in rows]
    if case.packed == "qkv":
        lengths[1] = lengths[0]
    used = [torch.arange(count) < length[:, None] for count, length in zip(rows, lengths, strict=True)]
    is_key = {"no": (0, 1, 1), "kv": (0, 1), "qkv": (0,)}[case.packed]
    loose = [unpad_input(x, used[key]) for x, key in zip(inputs, is_key, strict=True)]
    places = [(cu, longest) for _, _, cu, longest, _ in (loose[0], loose[-1])]
    cu_seqlens, longest = zip(*(places[:1] if case.packed == "qkv" else places), strict=True)
    function = {
        "no": fl.flash_attn_varlen_func,
        "kv": fl.flash_attn_varlen_kvpacked_func,
        "qkv": fl.flash_attn_varlen_qkvpacked_func,
    }[case.packed]
    arguments = (*(x for x, *_ in loose), *cu_seqlens, *longest)
    out, lse, signed = function(*arguments, return_attn_probs=True, **options)
    assert lse.shape == (HEADS, len(loose[0][0]))
    seen = visible(lengths[0], lengths[1], rows, case.causal, options["window_size"])
    out = pad_input(out, loose[0][1], BATCH, rows[0])
    if signed.numel():
        signed = torch.nn.functional.pad(
            signed, (0, rows[1] - signed.shape[-1], 0, rows[0] - signed.shape[-2])
        )
    check(case, options, inputs, out, signed, (lengths[0], lengths[1]), seen)


def draw_inputs(case: SimpleNamespace) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    (lq, lk), size, kv_heads = case.lengths, case.head_dim, KV_HEADS[case.heads]
    shapes = {
        "no": [(lq, HEADS), (lk, kv_heads), (lk, kv_heads)],
        "kv": [(lq, HEADS), (lk, 2, kv_heads)],
        "qkv": [(lq, 3, HEADS)],
    }[case.packed]
    return tuple(torch.randn(BATCH, *shape, size).to(case.dtype).requires_grad_() for shape in shapes)


def unpacked(case: SimpleNamespace, inputs: tuple[Tensor, ...], axis: int) -> tuple[Tensor, ...]:
    return (
        *inputs[: -1 if case.packed != "no" else None],
        *(inputs[-1].unbind(axis) if case.packed != "no" else ()),
    )


def draw_options(case: SimpleNamespace) -> dict[str, Any]:
    return {
        "dropout_p": case.dropout_p,
        "causal": case.causal,
        "window_size": torch.randint(0, case.lengths[1], (2,)) if case.local else (-1, -1),
        "softcap": case.softcap,
        "alibi_slopes": torch.rand(BATCH, HEADS) * 0.3 if case.alibi else None,
    }


def check(
    case: SimpleNamespace,
    options: dict[str, Any],
    inputs: tuple[Tensor, ...],
    out: Tensor,
    signed: Tensor,
    lengths: tuple[Tensor, Tensor],
    seen: Tensor,
) -> None:
    q, k, v = unpacked(case, inputs, 2)
    rules: dict[str, Any] = {"softcap": case.softcap, "dropout_p": case.dropout_p}
    if case.alibi:
        rules["bias"] = alibi(options["alibi_slopes"], *lengths, (q.shape[1], k.shape[1]))
    if case.dropout_p:
        rules["keep"] = signed >= 0
        if not case.alibi and seen.sum() > 10000:  # with slopes many probabilities are 0, and have no sign
            fallen = (signed < 0).sum() / (seen & (signed != 0)).sum()
            assert abs(fallen - case.dropout_p) < 0.01
    exact, low = (attend(q, k, v, seen, low=low, **rules) for low in FLAGS)
    assert_as_good(out, exact, low, 2)
    upstream = torch.randn_like(exact)
    ours, theirs, lows = (
        torch.autograd.grad(result, inputs, upstream.to(result.dtype)) for result in (out, exact, low)
    )
    for gradient, wanted, rounded in zip(ours, theirs, lows, strict=True):
        assert_as_good(gradient, wanted, rounded, 3)
