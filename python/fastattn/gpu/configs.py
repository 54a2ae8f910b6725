"""Tiles of the portable kernels for each kind of GPU: tables ship, so that a first call tunes nothing."""

from __future__ import annotations

from typing import Any

import torch
import triton

from fastattn.gpu.call import Call


def padded(head_dim: int) -> int:
    """The columns of a tile that holds `head_dim`: a product needs a power of two from 16 up."""
    return max(16, triton.next_power_of_2(head_dim))


def forward(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the forward kernel."""
    if not call.query.is_cuda:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if call.query.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    dim = max(padded(call.query.shape[3]), padded(call.value.shape[3]))
    if dim <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if dim == 128:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
