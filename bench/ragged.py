"""Sequences of any length behind one another: `fastattn.attention_varlen`, beside a call for each of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench.gradients import INPUTS
from bench.programs import Program, Read, Run

_FLOPS = {"forward": 4, "backward": 10}  # D times as many for a visible query-key pair


@dataclass(frozen=True)
class RaggedCase(Program):
    """Causal attention within sequences of `lengths`, 4 heads on 2; `apart`: one call after another."""

    unit: ClassVar[str] = "GFLOP/s"
    peers: ClassVar[tuple[str, ...]] = ("fastattn",)
    lengths: tuple[int, ...]
    apart: bool = False
    query_heads: ClassVar[int] = 4
    kv_heads: ClassVar[int] = 2
    head_dim: ClassVar[int] = 64

    def work(self, mode: str) -> float:
        pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        return _FLOPS[mode] * pairs * self.query_heads * self.head_dim / 1e9

    def tolerance(self, dtype: str) -> float:
        return {"float32": 1e-5}.get(dtype, 2e-2)

    def prepare(self, peer: str, dtype: str, mode: str) -> tuple[Run, Read]:
        import torch

        import fastattn

        starts = torch.tensor((0, *itertools.accumulate(self.lengths)))
        rows = self.lengths if self.apart else (sum(self.lengths),)
        arrays = (array.split(rows) for array in self.arrays(dtype))
        parts = [[x[None] if self.apart else x for x in part] for part in zip(*arrays, strict=True)]
        leaves = [[x.requires_grad_(mode == "backward") for x in part[: len(INPUTS)]] for part in parts]
        grads = [part[-1] for part in parts]

        def forward() -> list[Any]:
            if self.apart:
                return [fastattn.attention(*leaf, causal=True, layout="bshd") for leaf in leaves]
            return [fastattn.attention_varlen(*leaf, starts, starts, causal=True) for leaf in leaves]

        def read(results: list[Any]) -> dict[str, np.ndarray]:
            joined = [torch.cat([x.flatten(0, -3) for x in found]) for found in zip(*results, strict=True)]
            names = ("out",) if mode == "forward" else INPUTS
            return {name: x.double().numpy() for name, x in zip(names, joined, strict=True)}

        if mode == "forward":
            return forward, lambda outs: read([(out,) for out in outs])
        outs = forward()

        def backward() -> list[Any]:
            calls = zip(outs, leaves, grads, strict=True)
            return [torch.autograd.grad(*call, retain_graph=True) for call in calls]

        return backward, read

    def truth(self, dtype: str, mode: str) -> dict[str, np.ndarray]:
        """Attention of torch in float64, a sequence after another."""
        found = _computed(dataclasses.replace(self, name="", apart=False), dtype)
        return {name: found[name] for name in (("out",) if mode == "forward" else INPUTS)}

    def arrays(self, dtype: str) -> list[Any]:
        """Query, key, value and what a backward starts from, (tokens, heads, dim)."""
        import torch

        rng = np.random.default_rng(7)
        heads = (self.query_heads, self.kv_heads, self.kv_heads, self.query_heads)
        shapes = [(sum(self.lengths), count, self.head_dim) for count in heads]
        numbers = [rng.standard_normal(shape, np.float32) for shape in shapes]
        return [torch.from_numpy(x).to(getattr(torch, dtype)) for x in numbers]


@functools.cache
def _computed(case: RaggedCase, dtype: str) -> dict[str, np.ndarray]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    group = case.query_heads // case.kv_heads
    parts = [array.double().transpose(0, 1).split(case.lengths, 1) for array in case.arrays(dtype)]
    found = []
    for *inputs, grad in zip(*parts, strict=True):
        query, key, value = (x[None].requires_grad_() for x in inputs)
        repeated = (x.repeat_interleave(group, 1) for x in (key, value))
        out = scaled_dot_product_attention(query, *repeated, is_causal=True)
        found.append((out.detach(), *torch.autograd.grad(out, (query, key, value), grad[None])))
    joined = (torch.cat([x[0] for x in rows], 1).transpose(0, 1) for rows in zip(*found, strict=True))
    return {name: x.numpy() for name, x in zip(("out", *INPUTS), joined, strict=True)}
