"""Which calls the Hopper kernels take, and how they are launched.

Needs torch; Triton is imported when a call asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn._flags import flag, interprets
from fastattn.gpu import hopper_check
from fastattn.gpu.call import Call, Gradients
from fastattn.gpu.config_tables import is_since_39
from fastattn.problem import UNBOUNDED

# Rows of a tile of queries, of a block of keys, and blocks of keys in flight, by head_dim: what fits in
# 227 KiB of shared memory with all accumulators in 240 registers (tests/gpu/test_hopper_compile.py).
FORWARD_TILES = {64: (128, 128, 2), 128: (128, 128, 2), 256: (128, 64, 2)}
# The same of the backward: blocks of queries by tiles of keys, and tiles of queries by blocks of keys.
KEY_TILES = {64: (64, 128, 2), 128: (64, 128, 2)}
QUERY_TILES = {64: (128, 128, 2), 128: (128, 64, 2)}


def supports(call: Call) -> list[str]:
    """Say why the Hopper forward cannot take `call`; empty if it can.

    The first call of a kind on a kind of device waits for a self-test in a process of its own; `hopper_check`
    says when.
    """
    return _refusals(call, "forward", tuple(FORWARD_TILES))


def forward(call: Call, out: Tensor, lse: Tensor | None) -> None:
    """Write `out` (B, Hq, Lq, D) and, unless it is None, `lse` (B, Hq, Lq), float32. Only launches."""
    from fastattn.gpu.hopper_forward import forward_kernel

    batch, heads, seqlen_q, head_dim = call.query.shape
    kv_heads, seqlen_k = call.key.shape[1:3]
    if out.numel() == 0 or seqlen_k == 0:
        return _see_nothing(out, lse)
    rows, columns, stages = FORWARD_TILES[head_dim]
    causal = call.window_right == 0
    tiles = -(-seqlen_q // rows) * batch * heads
    programs = min(_multiprocessors(out.device), tiles)
    dynamic = causal and programs < tiles  # otherwise tiles are equally long
    into = [_target(out, call.query)]
    forward_kernel[(programs,)](
        descriptor(call.query, rows // 2),
        descriptor(call.key, columns),
        descriptor(call.value, columns),
        descriptor(into[0], rows // 2),
        lse,
        torch.zeros(1, dtype=torch.int32, device=out.device) if dynamic else None,
        *_sizes(call, batch * heads, _cached_heads(call.key) * (heads // kv_heads)),
        GROUP=heads // kv_heads,
        STAGES=stages,
        CAUSAL=causal or seqlen_k % columns != 0,  # the same mask, with an offset that hides no key
        OWN_OUTPUT=head_dim < 256,
        num_warps=4,
    )
    _hand_over(into, (out,))


def backward_supports(call: Call) -> list[str]:
    """Say why the Hopper backward cannot take `call`; empty if it can. As `supports`."""
    return _refusals(call, "backward", tuple(KEY_TILES))


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: Gradients
) -> None:
    """Write the gradients of query, key and value that are `wanted`. Only launches.

    Parameters
    ----------
    out, grad_out
        (B, Hq, Lq, D) of query's dtype, any strides.
    lse, grad_lse
        (B, Hq, Lq) float32, natural logarithm; no gradient if None.
    """
    from fastattn.gpu.row_terms import row_terms

    if call.query.numel() == 0 or call.key.numel() == 0:
        for gradient in (wanted.query, wanted.key, wanted.value):
            if gradient is not None:
                gradient.zero_()
        return
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    terms = row_terms(call, out, lse.contiguous(), grad_out, grad_lse, None)
    # Rows of TMA begin at multiples of 16 bytes.
    level, delta = (pad(x.flatten(0, 1), (0, -x.shape[2] % 4)) for x in (terms.level, terms.delta))
    if _layout_reasons("grad_out", grad_out):
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)  # which may have to move, too
    if wanted.key is not None or wanted.value is not None:
        _key_value_gradients(call, grad_out, level, delta, wanted.key, wanted.value)
    if wanted.query is not None:
        _query_gradient(call, grad_out, level, delta, wanted.query)


def _key_value_gradients(
    call: Call, grad_out: Tensor, level: Tensor, delta: Tensor, dkey: Tensor | None, dvalue: Tensor | None
) -> None:
    from fastattn.gpu.hopper_key_gradient import key_gradient_kernel

    kv_heads, seqlen_k, head_dim = call.key.shape[1:]
    group = call.query.shape[1] // kv_heads
    rows, columns, stages = KEY_TILES[head_dim]
    batch_heads = call.key.shape[0] * kv_heads
    into = [_target(x, call.key) for x in (dkey, dvalue)]
    key_gradient_kernel[(-(-seqlen_k // columns) * batch_heads,)](
        descriptor(call.query, rows),
        descriptor(call.key, columns // 2),
        descriptor(call.value, columns // 2),
        descriptor(grad_out, rows),
        _vector_descriptor(level, rows),
        _vector_descriptor(delta, rows),
        *(descriptor(x, columns // 2) for x in into),
        *_sizes(call, batch_heads, max(1, _cached_heads(call.query) // group)),
        GROUP=group,
        STAGES=stages,
        CAUSAL=call.window_right == 0,
        num_warps=4,
    )
    _hand_over(into, (dkey, dvalue))


def _query_gradient(call: Call, grad_out: Tensor, level: Tensor, delta: Tensor, dquery: Tensor) -> None:
    from fastattn.gpu.hopper_query_gradient import query_gradient_kernel

    batch, heads, seqlen_q, head_dim = call.query.shape
    group = heads // call.key.shape[1]
    rows, columns, stages = QUERY_TILES[head_dim]
    into = [_target(dquery, call.query)]
    query_gradient_kernel[(-(-seqlen_q // rows) * batch * heads,)](
        descriptor(call.query, rows // 2),
        descriptor(call.key, columns),
        descriptor(call.value, columns),
        descriptor(grad_out, rows // 2),
        descriptor(into[0], rows // 2),
        level,
        delta,
        *_sizes(call, batch * heads, _cached_heads(call.key) * group),
        level.stride(0),
        GROUP=group,
        STAGES=stages,
        CAUSAL=call.window_right == 0,
        num_warps=4,
    )
    _hand_over(into, (dquery,))


def _sizes(call: Call, batch_heads: int, width: int) -> tuple[float | int, ...]:
    """Arguments that all kernels have; an offset beyond all keys is as good as one at their end."""
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    offset = min(max(call.query_offset, -seqlen_q), seqlen_k) if call.window_right == 0 else seqlen_k
    return call.scale, seqlen_q, seqlen_k, call.query.shape[1], batch_heads, min(width, batch_heads), offset


def _cached_heads(tensor: Tensor) -> int:
    """Count the heads of `tensor`, and of another like it, that the L2 cache holds at once."""
    from fastattn.gpu.schedule import cached_heads

    return cached_heads(2 * tensor.shape[2] * tensor.shape[3] * tensor.element_size())


def _target(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Give what TMA can write into in place of `tensor`."""
    if tensor is None or _layout_reasons("", tensor):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return tensor


def _hand_over(written: Sequence[Tensor], wanted: Sequence[Tensor | None]) -> None:
    for source, target in zip(written, wanted, strict=True):
        if target is not None and source is not target:
            target.copy_(source)


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


def _vector_descriptor(tensor: Tensor, rows: int) -> Any:
    """Numbers of query rows (B Hq, L), `rows` of one head at a time."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, rows], layout)


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
    reasons = [
        *_device_reasons(call.query.device),
        *_argument_reasons(call),
        *_shape_reasons(call, head_dims),
        *_compiler_reasons(call, kind),
    ]
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        reasons += _layout_reasons(name, tensor)
    if not reasons:
        reasons += _installation_reasons()
    if not reasons and (refusal := hopper_check.refusal(kind, call.query.shape[3], call.query.device)):
        reasons.append(refusal)
    return reasons


@functools.lru_cache
def _device_reasons(device: torch.device) -> tuple[str, ...]:
    if not flag("FASTATTN_HOPPER", default=True):
        return ("FASTATTN_HOPPER is 0",)
    if device.type != "cuda" or torch.version.hip is not None:
        return (f"the tensors are not on an NVIDIA GPU but on {device}",)
    if interprets():
        return ("TRITON_INTERPRET is set, and Gluon has no interpreter",)
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return ("the device's compute capability is {}.{}, not 9.0".format(*capability),)
    return ()


def _argument_reasons(call: Call) -> list[str]:
    windowed = call.window_left != UNBOUNDED or call.window_right not in (0, UNBOUNDED)
    given = {
        "mask": call.mask is not None,
        "bias": call.bias is not None,
        "kv_lengths": call.kv_lengths is not None,
        "kv_starts": call.kv_starts is not None,
        "query_lengths": call.query_lengths is not None,
        "segment_ids": call.segments is not None,
        "a block_table": call.block_table is not None,
        "a quantised cache": call.key_scale is not None,
        "cu_seqlens": call.ragged is not None,
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


def _compiler_reasons(call: Call, kind: str) -> list[str]:
    if kind != "backward" or call.query.shape[3] != 128 or call.window_right != 0:
        return []
    import triton

    spills = is_since_39(triton.__version__)
    return [f"Triton {triton.__version__} spills registers in its loop; 3.6 does not"] if spills else []


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
