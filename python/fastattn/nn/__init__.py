"""Modules for PyTorch. Importing this package imports torch; `import fastattn` does not."""

from fastattn.nn.positions import (
    LearnedPositionalEncoding,
    RelativePositionBias,
    SinusoidalPositionalEncoding,
    alibi_slopes,
)
from fastattn.nn.rotary import RotaryEmbedding

__all__ = [
    "LearnedPositionalEncoding",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "alibi_slopes",
]
