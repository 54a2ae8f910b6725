"""Caches: what is written into them, bit for bit, and what is attended to, in pages or in one piece."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import bounds
import fastattn as fa
import places
import portable
from caches import FEATURES, LARGEST, ROOM, Call, Setting, as_numpy, expected, make
from fastattn.gpu import configs
from fastattn.gpu.append import float8
from fastattn.gpu.choice import of_forward
from fastattn.gpu.rows import numbers_of

PAGES = (0, 1, 7, 16)
LONG = {"lengths": (700, 3, 0), "seqlen_q": 2, "added": 2}


def check(setting: Setting, rng: np.random.Generator) -> None:
    call, after = make(replace(setting, library="torch"), rng)
    given = {name: torch.from_numpy(x) for name, x in call.options.items() if isinstance(x, np.ndarray)}
    out, lse = call.run(fa.attention_with_kvcache, return_lse=True, backend="triton", **given)
    for name, array in after.items():
        actual, wanted = in_order(call, as_numpy(call.arrays[name])), as_numpy(array)
        np.testing.assert_array_equal(actual, wanted, err_msg=name)
    out = torch.from_numpy(in_order(call, out.double().numpy())).transpose(1, 2)
    for b, wanted in enumerate(expected(call)):
        allowed = portable.allowed(wanted, setting.dtype)
        if setting.quantised and setting.dtype == "float16":  # whose exponents have no room for any scale
            allowed = allowed + portable.ROUNDING["bfloat16"] * wanted.mass
        bounds.assert_within(abs(out[b : b + 1].numpy() - wanted.out), allowed)
        kernel = portable.Kernel("triton", setting.dtype, "")
        allowed = bounds.allowed_lse(kernel, wanted, sharp=True)
        bounds.assert_lse_within(lse[b : b + 1].double().numpy(), wanted, allowed)


def in_order(call: Call, array: np.ndarray) -> np.ndarray:
    """With axes (B, L, H, ...) whatever the layout."""
    return np.swapaxes(array, 1, 2) if call.setting.layout == "bhsd" else array


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("cache_dtype", ["", *LARGEST])
def test_every_cache(cache_dtype: str, page_size: int, rng: np.random.Generator) -> None:
    dtype = {1: "float16", 7: "bfloat16"}.get(page_size, "float32")
    check(Setting(dtype, cache_dtype, page_size, rotary="halves"), rng)


@pytest.mark.parametrize(("page_size", "cache_dtype"), [(0, "int8"), (7, ""), (16, "float8_e4m3fn")])
def test_keys_in_chunks(
    page_size: int, cache_dtype: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr("caches.ROOM", 720)
    check(Setting("bfloat16", cache_dtype, page_size, **LONG), rng)


@pytest.mark.parametrize("chunks", [pytest.param(False, marks=pytest.mark.gpu_slow), True])
def test_products_ahead_of_their_turn(
    chunks: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    for name in ("forward", "decode"):
        monkeypatch.setattr(configs, name, lambda call: configs.INTERPRETED._replace(rows=16, ahead=True))
    monkeypatch.setattr("caches.ROOM", 720)
    check(Setting("bfloat16", "int8", 7, **(LONG if chunks else LONG | {"seqlen_q": 70, "added": 3})), rng)


@pytest.mark.parametrize("feature", ["not causal", "window both ways", "all"])
def test_features(feature: str, rng: np.random.Generator) -> None:
    check(Setting("float32", "int8", 7, rotary="interleaved", options=FEATURES[feature]), rng)


@pytest.mark.parametrize("layout", ["bshd", pytest.param("bhsd", marks=pytest.mark.gpu_slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"added": 0, "lengths": (3, 5, 37)},
        {"added": 1, "seqlen_q": 4, "lengths": (4, 5, 37)},
        {"added": 20, "seqlen_q": 2, "lengths": (0, 5, 27)},
        {"rotary": "halves", "options": {"causal": False}},
    ],
    ids=str,
)
def test_appending(changes: dict[str, Any], layout: str, rng: np.random.Generator) -> None:
    check(Setting("float32", page_size=7, layout=layout, **changes), rng)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("seqlen", [1, 4])
def test_a_ring(page_size: int, seqlen: int, rng: np.random.Generator) -> None:
    lengths = (2, ROOM - 1, ROOM, 2 * ROOM - 2, 5 * ROOM + 13)
    options = {"window": (ROOM - seqlen, 0)}
    setting = Setting("float32", "", page_size, seqlen, seqlen, "", True, lengths, options=options)
    check(setting, rng)


def on_device(setting: Setting, patch: pytest.MonkeyPatch, rng: np.random.Generator) -> tuple[Call, Any]:
    places.on_device(patch)
    return make(replace(setting, library="torch"), rng)


def test_nothing_is_read_on_the_way(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    setting = Setting("float32", "int8", 7, rotary="halves")
    call, _ = on_device(setting, monkeypatch, rng)
    with places.unread(monkeypatch):
        call.run(fa.attention_with_kvcache, backend="triton")


@pytest.mark.parametrize("number", [-1, 10**9, -(2**31)])
@pytest.mark.parametrize("cache_dtype", ["", "float8_e5m2"])
def test_whatever_a_table_on_a_device_holds(
    cache_dtype: str, number: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """No page outside of memory is read; into none that is not there is anything written."""
    call, _ = on_device(Setting("float32", cache_dtype, 7), monkeypatch, rng)
    call.arrays["block_table"][1] = number
    others = call.arrays["block_table"][[0, 2]].flatten().long().clamp(0)
    before = as_numpy(call.arrays["key_cache"]).copy()
    call.run(fa.attention_with_kvcache, backend="triton")
    after = as_numpy(call.arrays["key_cache"])
    untouched = np.setdiff1d(np.arange(len(before)), others.numpy())
    np.testing.assert_array_equal(after[untouched], before[untouched])


@pytest.mark.parametrize("table", [{"block_table": -5}, {"cache_seqlens": 47}], ids=str)
def test_values_on_a_device_are_checked_if_asked_for(
    table: dict[str, int], environment: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    environment.setenv("FASTATTN_DEBUG", "1")
    call, _ = on_device(Setting("float32", page_size=16), environment, rng)
    ((name, number),) = table.items()
    call.arrays[name][1] = number
    with pytest.raises(ValueError, match=f"{name} must .* got {number} for sequence 1"):
        call.run(fa.attention_with_kvcache, backend="triton")


@pytest.mark.parametrize("length", [-(2**62), 2**62, 10**6])
def test_whatever_lengths_on_a_device_hold(
    length: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Rows stay within the sequence's own."""
    call, _ = on_device(Setting("float32", rotary="halves"), monkeypatch, rng)
    before = as_numpy(call.arrays["key_cache"]).copy()
    call.arrays["cache_seqlens"][1] = length
    call.run(fa.attention_with_kvcache, backend="triton")
    after = as_numpy(call.arrays["key_cache"])
    changed = ~((after == before) | (np.isnan(after) & np.isnan(before))).all((1, 2, 3))
    assert changed.tolist() == [True, True, True]


def test_rows_that_are_not_finite_are_nan(rng: np.random.Generator) -> None:
    call, _ = make(Setting("float32", "int8", 0, library="torch", lengths=(0, 0, 0)), rng)
    call.arrays["new_value"][0, 1, 0, 3] = torch.inf
    call.arrays["new_value"][1, 0, 1] = 0.0
    out = call.run(fa.attention_with_kvcache, backend="triton")
    assert call.arrays["value_scale"][0, 1, 0].isnan() and not call.arrays["value_cache"][0, 1, 0].any()
    assert call.arrays["value_scale"][1, 0, 1] == 0 and not call.arrays["value_cache"][1, 0, 1].any()
    assert out[0, 1:, :2].isnan().all() and not out[0, :, 2:].isnan().any() and not out[1:].isnan().any()


@triton.jit
def convert_kernel(numbers, codes, exact, E4M3: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[None, :]
    wide = tl.load(numbers + at)
    if E4M3:
        found = float8(wide, 20, 120, 0x3C800000, 16384.0)
        back = numbers_of(found, tl.float32)
    else:
        found = float8(wide, 21, 112, 0x38800000, 128.0)
        back = numbers_of(found.to(tl.float8e5, bitcast=True), tl.float32)
    tl.store(codes + at, found)
    tl.store(exact + at, back)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_conversions_are_those_of_torch(dtype: torch.dtype) -> None:
    """Of every float16 within range, halves between two codes among them."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    numbers = torch.where(numbers.abs() <= torch.finfo(dtype).max, numbers, 0.0)
    codes, exact = torch.empty(2**16, dtype=torch.uint8), torch.empty(2**16)
    convert_kernel[(1,)](numbers, codes, exact, dtype is torch.float8_e4m3fn, 2**16)
    wanted = numbers.to(dtype)
    assert torch.equal(codes, wanted.view(torch.uint8)) and torch.equal(exact, wanted.float())


def test_which_kernel() -> None:
    def chosen(keys: int, rows: int) -> str:
        cache = torch.empty(5, 2, 16, 8)
        call = portable.call_of(torch.empty(1, 2, rows, 8), cache[:1], cache[:1])
        table = torch.zeros(1, keys // 16, dtype=torch.int32)
        return of_forward(call._replace(key=cache, value=cache, block_table=table)).name

    assert chosen(4096, 1) == "decode" and chosen(128, 1) == "portable" and chosen(4096, 65) == "portable"
