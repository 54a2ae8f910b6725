"""One call of attention as the kernels for GPUs read it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """Tensors of one device, seen with axes (B, H, L, D) whatever the layout."""

    query: Tensor  # (B, Hq, Lq, D), any strides
    key: Tensor  # (B, Hkv, Lk, D)
    value: Tensor  # (B, Hkv, Lk, Dv)
    mask: Tensor | None  # bool, (B, Hq, Lq, Lk), strides of 0 where broadcast
    bias: Tensor | None  # query's dtype or float32, likewise
    kv_lengths: Tensor | None  # (B,) int64
    query_offsets: Tensor | None  # (B,) int64; None: query_offset holds for the whole batch
    query_offset: int
    window_left: int  # problem.UNBOUNDED where there is no bound
    window_right: int  # 0 is the causal rule
    alibi_slopes: Tensor | None  # (B, Hq) float32
    sinks: Tensor | None  # (Hq,) float32
    softcap: float  # 0: none
    scale: float
    dropout_p: float  # 0: none
    dropout_seed: Tensor | int  # () int64, or a number of 64 bits
    dropout_offset: int
    tf32: bool = False  # float32 products may round their operands
