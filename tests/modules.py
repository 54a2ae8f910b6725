"""What the tests of fastattn.nn share: tensors from a seed, modules with every option, and the bound."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fastattn.nn import Attention, RelativePositionBias, RotaryEmbedding, SelfAttention

WIDTH, HEADS = 16, 4
INF = float("inf")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eight-heads": {"num_heads": 8},
    "grouped": {"num_kv_heads": 2},
    "one-kv-head": {"num_kv_heads": 1, "head_dim": 5},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "sliding": {"causal": True, "window": (3, None)},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 1.0},
    "sinks": {"sinks": True},
    "no-bias": {"bias": False, "out_bias": True},
    "norm": {"qk_norm": True},
    "rotary": {"position": "rotary", "causal": True},
    "interleaved": {"position": RotaryEmbedding(4, interleaved=True, rotary_dim=2)},
    "alibi": {"position": "alibi", "causal": True},
    "t5": {"position": RelativePositionBias(HEADS, 8, 12, dtype=torch.float64), "scale": 1.0},
    "all": {
        **{"num_kv_heads": 2, "head_dim": 6, "causal": True, "window": (4, 0), "softcap": 2.0},
        **{"sinks": True, "bias": False, "qk_norm": True, "position": "rotary"},
    },
}

ORIGINAL = "original_max_position_embeddings"
# Of heads of 32 columns: a number for each pair.
LONGROPE = {
    "short_factor": [1 + 0.05 * pair for pair in range(16)],
    "long_factor": [1 + 0.2 * pair**2 for pair in range(16)],
}
SCALINGS: list[dict[str, Any]] = [
    {},
    {"scaling": "linear", "factor": 4.0},
    {"scaling": "ntk", "factor": 4.0},
    {"scaling": "dynamic", "factor": 2.0, ORIGINAL: 64},
    {"scaling": "yarn", "factor": 4.0, ORIGINAL: 64},
    {"scaling": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"scaling": "yarn", "factor": 8.0, ORIGINAL: 256, "attention_factor": 1.5, "truncate": False},
    {"scaling": "yarn", "factor": 8.0, ORIGINAL: 256, "beta_fast": 16.0, "beta_slow": 2.0},
    {"scaling": "llama3", "factor": 8.0, ORIGINAL: 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"scaling": "llama3", "factor": 32.0, ORIGINAL: 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"scaling": "longrope", "factor": 32.0, ORIGINAL: 64, **LONGROPE},
    {"scaling": "longrope", "attention_factor": 1.25, ORIGINAL: 64, **LONGROPE},
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def shaken(module: Any) -> Any:
    """The module with parameters none of which is 0 or 1."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.2 * randn(*parameter.shape, dtype=parameter.dtype, seed=index))
    return module


def agree(got: Tensor, want: Tensor, name: str = "", largest: float | None = None) -> None:
    """Within a share of the largest element, or of `largest`: 1e-12, in float32 1e-6 sqrt(64)."""
    assert got.shape == want.shape, name
    assert got.dtype == want.dtype, name
    if want.numel():
        largest = want.abs().max().item() if largest is None else largest
        share = 1e-12 if want.dtype == torch.float64 else 1e-6 * 64**0.5
        assert (got - want).abs().max().item() <= share * largest, name


def make(kind: type[Attention] = SelfAttention, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"num_heads": HEADS, **copy.deepcopy(options)}
    return shaken(kind(WIDTH, **arguments, dtype=dtype).to(dtype))
