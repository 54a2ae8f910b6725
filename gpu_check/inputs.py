"""The tensors of a call on the device: drawn anew for every run, and laid out in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.shapes import Case

LAYOUTS = ("plain", "bshd", "padded", "unaligned")


@dataclass
class Inputs:
    """Query, key, value (B, H, L, D), the other arguments of a call, and where a backward starts."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    grad_out: Tensor  # (B, Hq, Lq, Dv)

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Every argument that has a gradient."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        given = {name: self.options.get(name) for name in ("bias", "alibi_slopes", "sinks")}
        return named | {name: tensor for name, tensor in given.items() if tensor is not None}

    def with_graph(self) -> Inputs:
        """The same numbers as leaves that require grad."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.differentiable.items()}
        query, key, value = (leaves.pop(name) for name in ("query", "key", "value"))
        return Inputs(query, key, value, self.options | leaves, self.grad_out)


def draw(case: Case, dtype: str, device: str, seed: int, layout: str = "plain") -> Inputs:
    """A small call, from the numbers of the tests' generator under another seed."""
    tensors = [laid_out(x.to(device), layout) for x in case.tensors(dtype, "torch", seed=seed)]
    options = case.options(dtype, "torch", seed=seed)
    for name, value in options.items():
        if isinstance(value, Tensor):
            options[name] = value.to(device)
    return Inputs(*tensors, options, case.grad_out(dtype, "torch", seed=seed).to(device))


def draw_on_device(case: Case, dtype: str, device: str, seed: int) -> Inputs:
    """A long call without array arguments; the device draws it."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))

    keys = case.batch, case.kv_heads, case.seqlen_k
    return Inputs(
        normal(*case.scores_shape[:3], case.head_dim),
        normal(*keys, case.head_dim),
        normal(*keys, case.value_dim),
        case.options(dtype, "torch"),
        normal(*case.scores_shape[:3], case.value_dim),
    )


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers (B, H, L, D) under other strides. What lies between them is NaN."""
    if layout == "plain":
        return tensor
    if layout == "bshd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    batch, heads, rows, columns = tensor.shape
    first = {"padded": 0, "unaligned": 3}[layout]  # 3 elements: no address is a multiple of 16 bytes
    storage = tensor.new_full((batch, heads, rows + 7, columns + 8 + first), float("nan"))
    view = storage[:, :, :rows, first : first + columns]
    return view.copy_(tensor)


def poison(device: str) -> None:
    """Leave NaN in the memory that the allocator hands out next, so that what is not written shows."""
    if device == "cpu":
        return
    blocks = [
        torch.full((size,), float("nan"), device=device) for size in (1 << 7, 1 << 12, 1 << 17, 1 << 23)
    ]
    blocks += [torch.full((1 << 16,), float("nan"), device=device) for _ in range(16)]
    del blocks
