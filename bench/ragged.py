"""Sequences of any length behind one another: `fastattn.attention_varlen`, beside a call for each of them."""

from __future__ import annotations

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
        arrays = (array.split(rows) for array in self._arrays(dtype))
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
        """Composed of operations of torch in float64, a head of a sequence after another."""
        import torch

        import fastattn

        query, key, value, grad = (array.double() for array in self._arrays(dtype))
        like = {"query": query, "key": key, "value": value, "out": query}
        found = {name: torch.zeros_like(x) for name, x in like.items()}
        for start, end in itertools.pairwise((0, *itertools.accumulate(self.lengths))):
            for head in range(self.query_heads):
                of_keys = head // (self.query_heads // self.kv_heads)
                own = {"query": head, "key": of_keys, "value": of_keys, "out": head}
                leaves = [
                    like[name][None, start:end, None, own[name]].clone().requires_grad_() for name in INPUTS
                ]
                out = fastattn.attention(*leaves, causal=True, layout="bshd", backend="math")
                grads = torch.autograd.grad(out, leaves, grad[None, start:end, None, head])
                for name, x in zip(found, (*grads, out.detach()), strict=True):
                    found[name][start:end, own[name]] += x[0, :, 0]
        names = ("out",) if mode == "forward" else INPUTS
        return {name: found[name].numpy() for name in names}

    def _arrays(self, dtype: str) -> list[Any]:
        """Query, key, value and what a backward starts from, (tokens, heads, dim)."""
        import torch

        rng = np.random.default_rng(7)
        heads = (self.query_heads, self.kv_heads, self.kv_heads, self.query_heads)
        shapes = [(sum(self.lengths), count, self.head_dim) for count in heads]
        numbers = [rng.standard_normal(shape, np.float32) for shape in shapes]
        return [torch.from_numpy(x).to(getattr(torch, dtype)) for x in numbers]
