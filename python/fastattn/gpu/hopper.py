"""Which calls the Hopper kernels take, and how they are launched.

Needs torch; Triton is imported when a call asks for it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from fastattn.gpu import hopper_check
from fastattn.gpu.call import Call
from fastattn.problem import UNBOUNDED

# Rows of a tile of queries, of a block of keys, and blocks of keys in flight, by head_dim: what fits in
# 227 KiB of shared memory with all accumulators in 240 registers (tests/gpu/test_hopper_compile.py).
FORWARD_TILES = {64: (128, 128, 2), 128: (128, 128, 2), 256: (128, 64, 2)}


def supports(call: Call) -> list[str]:
    """Say why the Hopper forward cannot take `call`; empty if it can.

    The first call of a kind on a kind of device waits for a self-test in a process of its own; `hopper_check`
    says when.
    """
    return _refusals(call, "forward", tuple(FORWARD_TILES))


def forward(call: Call, out: Tensor, lse: Tensor | None) -> None:
    """Write `out` (B, Hq, Lq, D) and, unless it is None, `lse` (B, Hq, Lq), float32. Only launches."""
    from fastattn.gpu.forward import CACHED_BYTES
    from fastattn.gpu.hopper_forward import forward_kernel

    batch, heads, seqlen_q, head_dim = call.query.shape
    kv_heads, seqlen_k = call.key.shape[1:3]
    if out.numel() == 0 or seqlen_k == 0:
        return _see_nothing(out, lse)
    target = (
        out
        if not _layout_reasons("out", out)
        else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    rows, columns, stages = FORWARD_TILES[head_dim]
    causal = call.window_right == 0
    tiles = -(-seqlen_q // rows) * batch * heads
    programs = min(_multiprocessors(out.device), tiles)
    kv_bytes = 2 * seqlen_k * head_dim * call.key.element_size()
    width = min(batch * heads, max(1, CACHED_BYTES // kv_bytes) * (heads // kv_heads))
    counter = torch.zeros(1, dtype=torch.int32, device=out.device) if causal and programs < tiles else None
    forward_kernel[(programs,)](
        descriptor(call.query, rows // 2),
        descriptor(call.key, columns),
        descriptor(call.value, columns),
        descriptor(target, rows // 2),
        lse,
        counter,
        call.scale,
        seqlen_q,
        seqlen_k,
        heads,
        batch * heads,
        width,
        min(max(call.query_offset, -seqlen_q), seqlen_k),
        GROUP=heads // kv_heads,
        BLOCK_M=rows,
        BLOCK_N=columns,
        STAGES=stages,
        CAUSAL=causal,
        RAGGED=seqlen_k % columns != 0,
        OWN_OUTPUT=head_dim < 256,
        num_warps=4,
    )
    if target is not out:
        out.copy_(target)


def _see_nothing(out: Tensor, lse: Tensor | None) -> None:
    out.zero_()
    if lse is not None:
        lse.fill_(float("-inf"))


def descriptor(tensor: Tensor, rows: int) -> Any:
    """A tensor (B, H, L, D) as TMA reads or writes it, `rows` rows of one head at a time."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    head_dim = tensor.shape[3]
    block = [1, 1, rows, head_dim]
    # The stride of an axis of size 1 may be anything, which TMA does not like.
    strides = [
        head_dim if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return TensorDescriptor(
        tensor, list(tensor.shape), [*strides[:3], 1], block, _shared_layout(rows, head_dim)
    )


@functools.lru_cache
def _shared_layout(rows: int, head_dim: int) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16

    return NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], bfloat16)  # the same for float16


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache
def _installation_reasons() -> tuple[str, ...]:
    """What this process lacks."""
    try:
        from fastattn.gpu import hopper_forward  # noqa: F401
    except Exception as error:  # whatever a release of Triton makes of it
        return (f"the Gluon kernels cannot be imported: {type(error).__name__}: {error}",)
    return ()


def _refusals(call: Call, kind: str, head_dims: tuple[int, ...]) -> list[str]:
    reasons = _device_reasons(call.query.device) + _argument_reasons(call) + _shape_reasons(call, head_dims)
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        reasons += _layout_reasons(name, tensor)
    if not reasons:
        reasons += _installation_reasons()
    if not reasons and (refusal := hopper_check.refusal(kind, call.query.shape[3], call.query.device)):
        reasons.append(refusal)
    return reasons


def _device_reasons(device: torch.device) -> list[str]:
    if os.environ.get("FASTATTN_HOPPER") == "0":
        return ["FASTATTN_HOPPER is 0"]
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"the tensors are not on an NVIDIA GPU but on {device}"]
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return ["TRITON_INTERPRET is set, and Gluon has no interpreter"]
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return ["the device's compute capability is {}.{}, not 9.0".format(*capability)]
    return []


def _argument_reasons(call: Call) -> list[str]:
    windowed = call.window_left != UNBOUNDED or call.window_right not in (0, UNBOUNDED)
    given = {
        "mask": call.mask is not None,
        "bias": call.bias is not None,
        "kv_lengths": call.kv_lengths is not None,
        "a query_offset for each sequence": call.query_offsets is not None,
        "window": windowed,
        "alibi_slopes": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        "softcap": call.softcap != 0,
        "dropout_p": call.dropout_p != 0,
    }
    reasons = [f"{name} is not supported" for name, is_given in given.items() if is_given]
    if not call.scale > 0:
        reasons.append(f"scale must be above 0, got {call.scale}")
    return reasons


def _shape_reasons(call: Call, head_dims: tuple[int, ...]) -> list[str]:
    batch, heads, seqlen_q, head_dim = call.query.shape
    seqlen_k, value_dim = call.key.shape[2], call.value.shape[3]
    reasons = []
    if call.query.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"the dtype must be bfloat16 or float16, got {call.query.dtype}".replace("torch.", ""))
    if head_dim not in head_dims or value_dim != head_dim:
        sizes = ", ".join(map(str, head_dims[:-1])) + f" or {head_dims[-1]}"
        reasons.append(f"head_dim must be {sizes}, for values too, got {head_dim} and {value_dim}")
    if seqlen_q + seqlen_k >= 1 << 31 or batch * heads * (seqlen_q // 64 + 1) >= 1 << 31:
        reasons.append(
            f"the call is too large for 32-bit positions: {batch * heads} heads, {seqlen_q} by {seqlen_k}"
        )
    return reasons


def _layout_reasons(name: str, tensor: Tensor) -> list[str]:
    """TMA reads rows of adjacent elements at multiples of 16 bytes."""
    reasons = []
    if tensor.data_ptr() % 16 != 0:
        reasons.append(f"{name} does not begin at a multiple of 16 bytes")
    if tensor.shape[3] > 1 and tensor.stride(3) != 1:
        reasons.append(f"the elements of a row of {name} are not adjacent")
    strides = [s for size, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    if any(stride * tensor.element_size() % 16 != 0 or stride <= 0 for stride in strides):
        reasons.append(
            f"the strides of {name} are not positive multiples of 16 bytes: {tuple(tensor.stride())}"
        )
    return reasons
