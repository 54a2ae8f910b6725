"""Modules for PyTorch. Importing this package imports torch; `import fastattn` does not."""

from fastattn.nn.attention import Attention
from fastattn.nn.cache import KVCache
from fastattn.nn.conversion import convert
from fastattn.nn.multihead import MultiheadAttention
from fastattn.nn.positions import (
    LearnedPositionalEncoding,
    RelativePositionBias,
    SinusoidalPositionalEncoding,
    alibi_slopes,
)
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from fastattn.nn.variants import CrossAttention, SelfAttention

__all__ = [
    "Attention",
    "CrossAttention",
    "KVCache",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SelfAttention",
    "SinusoidalPositionalEncoding",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "alibi_slopes",
    "convert",
]
