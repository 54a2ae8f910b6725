"""KVCache: attention step by step is attention over the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.nn import CrossAttention, KVCache
from modules import HEADS, OPTIONS, WIDTH, agree, make, randn

BATCH, LENGTH = 2, 9

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", [0, 5])
def test_a_call_that_raises_leaves_the_cache_as_it_was(mode: str, prompt: int) -> None:
    layer, x = make(causal=True, position="rotary"), randn(BATCH, LENGTH, WIDTH)
    with MODES[mode]():
        cache, want = KVCache(), layer(x)
        if prompt:
            layer(x[:, :prompt], cache=cache)
        before = repr(cache)
        for wrong in ({"mask": torch.ones(3, 3, dtype=torch.bool)}, {"kv_lengths": [LENGTH, LENGTH + 1]}):
            with pytest.raises(ValueError):
                layer(x[:, prompt:], cache=cache, **wrong)
            assert repr(cache) == before
        refusing = layer.out_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer(x[:, prompt:], cache=cache)
        assert repr(cache) == before
        refusing.remove()
        agree(layer(x[:, prompt:], cache=cache), want[:, prompt:])


def rows(*shape: int) -> Tensor:
    return torch.zeros(shape)


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
