"""flash-attention's functions on a device, against the same calls in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_check.checks import GRADIENT, WrongError, compare
from gpu_check.serving import gradients_of
from gpu_check.torch_checks import LIMIT, TorchCheck

Call = Callable[..., tuple[Tensor, Tensor]]


def hold_call(device: str, call: Call, inputs: list[Tensor], places: dict[str, Tensor], grad: bool) -> None:
    """Compare out, the places where lse is infinite, and gradients of `inputs`, bfloat16 on the CPU."""
    ours = [x.to(device, copy=True).requires_grad_(grad) for x in inputs]
    wide = [x.double().requires_grad_(grad) for x in inputs]
    out, lse = call(*ours, **{name: x.to(device) for name, x in places.items()})
    right, right_lse = call(*wide, **places)
    compare("out", out.detach(), right.detach().to(device), LIMIT)
    if not torch.equal(lse.isposinf().cpu(), right_lse.isposinf()):
        raise WrongError("lse is infinite in other rows")
    for one, other in zip(gradients_of(out, ours), gradients_of(right, wide), strict=True) if grad else ():
        compare("a gradient", one, other.to(device), GRADIENT * LIMIT)


def lengths_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def flash_attn_of_packed_sequences(device: str) -> None:
    from fastattn.integrations import flash_attn as fl

    def call(q: Tensor, kv: Tensor, **places: Tensor) -> Any:
        return fl.flash_attn_varlen_kvpacked_func(
            q, kv, **places, max_seqlen_q=333, max_seqlen_k=500, causal=True, return_attn_probs=True
        )[:2]

    inputs = [torch.randn(rows).bfloat16() for rows in ((497, 8, 64), (913, 2, 2, 64))]
    places = {"cu_seqlens_q": lengths_of(100, 0, 333, 64), "cu_seqlens_k": lengths_of(77, 3, 333, 500)}
    hold_call(device, call, inputs, places, grad=True)


def flash_attn_of_pages(device: str) -> None:
    """Gathered, and read where they lie."""
    from fastattn.integrations import flash_attn as fl

    table = torch.randperm(60)[:40].view(2, 20).int()
    for lengths, grad in ((40, 7), True), ((4, 4), False):

        def call(q: Tensor, k: Tensor, v: Tensor, longest: int = lengths[0], **places: Tensor) -> Any:
            return fl.flash_attn_varlen_func(
                q, k, v, **places, max_seqlen_q=longest, max_seqlen_k=480, causal=True, return_attn_probs=True
            )[:2]

        inputs = [torch.randn(sum(lengths), 8, 128).bfloat16(), *torch.randn(2, 60, 24, 2, 128).bfloat16()]
        places = {"cu_seqlens_q": lengths_of(*lengths), "cu_seqlens_k": lengths_of(480, 3)}
        hold_call(device, call, inputs, {**places, "block_table": table}, grad)


def flash_attn_of_caches(device: str) -> None:
    """Picked rows, with padding on the left and without; fewer new keys than queries."""
    from fastattn.integrations import flash_attn as fl

    angles = torch.rand(600, 16) * 6.3
    places = {
        "cache_seqlens": torch.tensor([500, 30], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32),
    }
    inputs = [
        *(torch.randn(2, rows, heads, 64).bfloat16() for rows, heads in ((3, 8), (2, 2), (2, 2))),
        *torch.randn(2, 3, 600, 2, 64).bfloat16(),
        *(table.bfloat16() for table in (angles.cos(), angles.sin())),
    ]

    def call(*tensors: Tensor, **places: Tensor) -> Any:
        q, k, v, k_cache, v_cache, cos, sin = tensors
        return fl.flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v, cos, sin), **places, causal=True, return_softmax_lse=True
        )

    for padding in {}, {"cache_leftpad": torch.tensor([450, 31], dtype=torch.int32)}:
        hold_call(device, call, inputs, {**places, **padding}, grad=False)


CHECKS = tuple(
    TorchCheck(action)
    for action in (flash_attn_of_packed_sequences, flash_attn_of_pages, flash_attn_of_caches)
)
