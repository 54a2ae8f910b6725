"""Layers of torch.nn and fastattn's in their place: forward, and in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench.programs import Program, Read, Run


@dataclass(frozen=True)
class ModuleCase(Program):
    """Self-attention of a batch through one layer, whose weights are those of torch's with the same seed."""

    unit: ClassVar[str] = "GFLOP/s"
    layer: str  # MultiheadAttention or TransformerEncoderLayer, in torch.nn and in fastattn.nn
    batch: int
    tokens: int
    width: int
    heads: int

    def work(self, mode: str) -> float:
        tokens, width = self.batch * self.tokens, self.width
        linear = 4 * width * width  # in and out of attention
        if self.layer == "TransformerEncoderLayer":
            linear += 2 * width * self.feedforward
        products = 2 * tokens * linear
        attention = 4 * tokens * self.tokens * width
        # A linear map has two more products in its backward; attention computes its scores again.
        return (products + attention if mode == "forward" else 3 * products + 3.5 * attention) / 1e9

    @property
    def feedforward(self) -> int:
        return 4 * self.width

    def tolerance(self, dtype: str) -> float:
        return {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # bfloat16 rounds between any two operations

    def prepare(self, peer: str, dtype: str, mode: str) -> tuple[Run, Read]:
        import torch

        import fastattn.nn

        layer = self._make({"fastattn": fastattn.nn, "torch": torch.nn}[peer], dtype)
        return self._pass(layer, *self._inputs(dtype), mode)

    def truth(self, dtype: str, mode: str) -> dict[str, np.ndarray]:
        """Torch's layer, its weights and inputs rounded to `dtype`, in float64."""
        import torch

        inputs = (tensor.double() for tensor in self._inputs(dtype))
        run, read = self._pass(self._make(torch.nn, dtype).double(), *inputs, mode)
        return read(run())

    def _make(self, package: Any, dtype: str) -> Any:
        import torch

        torch.manual_seed(0)
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
        if self.layer == "TransformerEncoderLayer":
            # Not relu: at its kink a rounding error decides whether an element has a gradient.
            options |= {"dim_feedforward": self.feedforward, "activation": "gelu"}
        return getattr(package, self.layer)(self.width, self.heads, **options).to(getattr(torch, dtype))

    def _inputs(self, dtype: str) -> tuple[Any, Any]:
        """The tokens, and what a backward starts from."""
        import torch

        generator = torch.Generator().manual_seed(0)
        shape = self.batch, self.tokens, self.width
        tokens, incoming = (torch.randn(shape, generator=generator) for _ in range(2))
        return tokens.to(getattr(torch, dtype)), incoming.to(getattr(torch, dtype))

    def _pass(self, layer: Any, tokens: Any, incoming: Any, mode: str) -> tuple[Run, Read]:
        import torch

        whole = self.layer == "TransformerEncoderLayer"

        def forward() -> Any:
            return layer(tokens) if whole else layer(tokens, tokens, tokens, need_weights=False)[0]

        if mode == "forward":
            layer.eval()
            return torch.inference_mode()(forward), lambda out: _read({"out": out})
        tokens.requires_grad_()
        named = {"tokens": tokens, **dict(layer.named_parameters())}
        wanted = list(named.values())

        def run() -> Any:
            out = forward()
            return out.detach(), *torch.autograd.grad(out, wanted, incoming)

        return run, lambda results: _read(dict(zip(["out", *named], results, strict=True)))


def _read(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


CASES = (
    ModuleCase("multihead-8x128x512", "MultiheadAttention", 8, 128, 512, 8),
    ModuleCase("multihead-1x1024x768", "MultiheadAttention", 1, 1024, 768, 12),
    ModuleCase("multihead-1x4096x512", "MultiheadAttention", 1, 4096, 512, 8),
    ModuleCase("encoder-8x128x512", "TransformerEncoderLayer", 8, 128, 512, 8),
    ModuleCase("encoder-1x1024x768", "TransformerEncoderLayer", 1, 1024, 768, 12),
)
