"""One call of attention as the kernels for GPUs read it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastattn.arrays import Strided
from fastattn.problem import AttentionProblem


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


class Gradients(NamedTuple):
    """Memory for the gradients of a call; None: not wanted."""

    query: Tensor | None = None  # as in `Call`, any strides
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None  # (B, Hq, Lq, Lk), of size 1 on each axis along which the bias was broadcast
    alibi_slopes: Tensor | None = None  # (B, Hq), float32 or float64
    sinks: Tensor | None = None  # (B, Hq), or (Hq,) of the whole batch, float32 or float64


def from_problem(problem: AttentionProblem) -> Call:
    """See `problem` as the kernels do. Nothing is read from the device, nor waited for.

    Raises
    ------
    RuntimeError
        If a CUDA graph is being captured and a short argument is not on the device yet: the graph would
        keep on reading memory of this call.
    """
    query = tensor(problem.query)
    batch, heads, device = *query.shape[:2], query.device
    offset = problem.query_offset
    single = isinstance(offset, int)
    slopes = _on_device("alibi_slopes", problem.alibi_slopes, torch.float32, device)
    return Call(
        query,
        tensor(problem.key),
        tensor(problem.value),
        None if problem.mask is None else tensor(problem.mask),
        None if problem.bias is None else tensor(problem.bias),
        _on_device("kv_lengths", problem.kv_lengths, torch.int64, device),
        None if single else _on_device("query_offset", offset, torch.int64, device),
        offset if single else 0,
        problem.window_left,
        problem.window_right,
        None if slopes is None else slopes.expand(batch, heads),
        _on_device("sinks", problem.sinks, torch.float32, device),
        problem.softcap,
        problem.scale,
        problem.dropout_p,
        0 if problem.dropout_seed is None else problem.dropout_seed,
        problem.dropout_offset,
        query.dtype == torch.float32 and allows_tf32(),
    )


def tensor(view: Strided) -> Tensor:
    """The tensor that `view` is a view of, with the axes of the view."""
    array: Tensor = view.array
    if view.shape == array.shape and view.strides == array.stride():
        return array
    return array.as_strided(view.shape, view.strides)


def _on_device(name: str, vector: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A short argument where the kernels can read it."""
    if vector is None:
        return None
    if isinstance(vector, Tensor):
        return vector.detach().to(dtype)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} must be a tensor on '{device}' where a CUDA graph is captured: "
            "the graph would read the memory that this call copies from"
        )
    # Copied to a staging buffer before this returns, so that the host need not wait for the device.
    return torch.from_numpy(np.array(vector)).to(device, dtype, non_blocking=True)


def allows_tf32() -> bool:
    """What the caller has told torch of its own products."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # torch before 2.9
        return bool(matmul.allow_tf32)
    return bool(precision == "tf32")
