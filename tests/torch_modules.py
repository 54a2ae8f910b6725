"""What tests against modules of torch.nn share: inputs, masks in torch's sense, and the comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modules import WIDTH, agree, randn, seeded

BATCH, QUERIES, KEYS = 3, 5, 7


def agree_with_gradients(ours: nn.Module, theirs: nn.Module, tensors: list[Tensor], call: Any) -> None:
    """Results of `call(module, *tensors)`, and gradients of tensors and parameters."""
    results = []
    for module in (ours, theirs):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        outputs = [out for out in call(module, *leaves) if out is not None]
        loss = sum((out * randn(*out.shape, dtype=out.dtype, seed=1)).sum() for out in outputs)
        parameters = dict(module.named_parameters())
        wanted = [*leaves, *parameters.values()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        named = dict(zip([*map(str, range(len(leaves))), *parameters], gradients, strict=True))
        results.append((outputs, named))
    (outputs, gradients), (want_outputs, want_gradients) = results
    assert len(outputs) == len(want_outputs)
    for out, want in zip(outputs, want_outputs, strict=True):
        agree(out, want)
    assert gradients.keys() == want_gradients.keys()
    # The gradient of a key's bias is 0 but for rounding: it is measured by the largest of all.
    largest = max(gradient.abs().max().item() for gradient in want_gradients.values() if gradient is not None)
    for name, want in want_gradients.items():
        assert (gradients[name] is None) == (want is None), name
        if want is not None:
            agree(gradients[name], want, name, largest)


def inputs(dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    widths = [WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH)]
    lengths = [QUERIES, KEYS, KEYS]
    shapes = [(length, BATCH, width) for length, width in zip(lengths, widths, strict=True)]
    tensors = [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    return [tensor.transpose(0, 1) for tensor in tensors] if options.get("batch_first") else tensors


def forbidden(*shape: int) -> Tensor:
    """A bool mask in torch's sense, which leaves every row key 0."""
    mask = torch.rand(*shape, generator=seeded(5)) < 0.4
    mask[..., 0] = False
    return mask


def padding() -> Tensor:
    return torch.arange(KEYS) >= torch.tensor([KEYS, 4, 1])[:, None]


def causal(rows: int = QUERIES, keys: int = KEYS) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).triu(1)
