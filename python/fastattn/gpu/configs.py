"""Tiles of the portable kernels for each kind of GPU: tables ship, so that a first call tunes nothing."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.gpu.call import Call


def padded(head_dim: int) -> int:
    """The columns of a tile that holds `head_dim`: a product needs a power of two from 16 up."""
    return max(16, 1 << (head_dim - 1).bit_length())


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


def weights(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel that writes the probabilities."""
    block = 32 if call.query.dtype == torch.float32 or not call.query.is_cuda else 64
    return {"BLOCK_M": block, "BLOCK_N": block, "num_warps": 4, "num_stages": 1}


def decode(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel for one chunk of keys."""
    rows = call.query.shape[2] * (call.query.shape[1] // call.key.shape[1])
    block = min(64, max(16, 1 << (rows - 1).bit_length()))
    return {"BLOCK_M": block, "BLOCK_N": 64 if call.query.is_cuda else 32, "num_warps": 4, "num_stages": 3}


def decode_chunk(seqlen_k: int) -> int:
    """How many keys a program of `decode` takes: at most 64 chunks, which one program can merge."""
    return max(512, 1 << (max(seqlen_k, 1) - 1).bit_length() >> 6)


def row_terms(call: Call) -> dict[str, Any]:
    """Tiles of the kernel that makes ready what the backward knows of each row."""
    return {"BLOCK_M": 32 if call.value.shape[3] > 64 else 64, "num_warps": 4}


def backward_keys(call: Call, atomic: bool = False) -> dict[str, Any]:
    """Tiles and launch options of the kernel for the gradients of key and value."""
    if not call.query.is_cuda:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if max(padded(call.query.shape[3]), padded(call.value.shape[3])) <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def backward_queries(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel for the gradient of query."""
    if not call.query.is_cuda:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if max(padded(call.query.shape[3]), padded(call.value.shape[3])) <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def backward_bias(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel for the gradient of the bias."""
    if not call.query.is_cuda:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
