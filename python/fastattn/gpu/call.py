"""One call of attention as the kernels for GPUs read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastattn.arrays import Strided
from fastattn.problem import AttentionProblem

LEAST, MOST = 2.0**-126, 2.0**127 * (2 - 2.0**-23)  # normal numbers of float32
SPAN = 64  # positions whose segments are summed up by the least and the greatest id


class Segments(NamedTuple):
    """The id of each position, of which a query attends to its own; each with its stride between batches."""

    queries: Any  # (B, Lq) int64
    queries_batch: Any
    keys: Any  # (B, Lk) int64
    keys_batch: Any
    query_bounds: Any  # (B, spans, 2) int64: the least and the greatest id of each SPAN positions
    query_bounds_batch: Any
    key_bounds: Any
    key_bounds_batch: Any


class Ragged(NamedTuple):
    """Where sequences begin that follow one another as the rows of one: (B + 1,) integers, 0 the first."""

    queries: Any
    keys: Any


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
    kv_starts: Tensor | None = None  # (B,) int64
    query_lengths: Tensor | None = None  # (B,) int64
    segments: Segments | None = None
    # (B, slots) integers: key and value are pages, (pages, Hkv, page size, D or Dv), and these are whose.
    block_table: Tensor | None = None
    key_scale: Tensor | None = None  # (B or pages, Hkv, Lk or page size) float32: key is of 8 bits a number
    value_scale: Tensor | None = None
    # Sequences that follow one another: query (1, Hq, all rows, D), and key and value likewise.
    ragged: Ragged | None = None
    launched: dict[Any, Callable[..., None]] | None = None  # what `repeat` knows of calls that look the same

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.query.shape[0] if self.ragged is None else self.ragged.queries.shape[0] - 1

    @property
    def seqlen_k(self) -> int:
        """How many keys a sequence has room for; of all sequences where they follow one another."""
        length = self.key.shape[2]
        return length if self.block_table is None else length * self.block_table.shape[1]


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
    heads, device = query.shape[1], query.device
    offset = problem.query_offset
    single = isinstance(offset, int)
    if single and abs(offset) >= 2**31 - 1:  # as a number a kernel might get 32 bits, and it adds to them
        single, offset = False, torch.full((problem.sequence_count,), offset, device=device)
    slopes = moved("alibi_slopes", problem.alibi_slopes, torch.float32, device)
    return Call(
        query,
        codes(problem.key),
        codes(problem.value),
        None if problem.mask is None else tensor(problem.mask),
        None if problem.bias is None else tensor(problem.bias),
        moved("kv_lengths", problem.kv_lengths, torch.int64, device),
        None if single else moved("query_offset", offset, torch.int64, device),
        offset if single else 0,
        problem.window_left,
        problem.window_right,
        None if slopes is None else slopes.expand(problem.sequence_count, heads),
        moved("sinks", problem.sinks, torch.float32, device),
        _softcap(problem.softcap),
        _scale(problem.scale),
        problem.dropout_p,
        0 if problem.dropout_seed is None else problem.dropout_seed,
        problem.dropout_offset,
        query.dtype == torch.float32 and allows_tf32(),
        moved("kv_starts", problem.kv_starts, torch.int64, device),
        moved("query_lengths", problem.query_lengths, torch.int64, device),
        _segments(problem, device),
        _table(problem, device),
        None if problem.key_scale is None else tensor(problem.key_scale),
        None if problem.value_scale is None else tensor(problem.value_scale),
        ragged=_ragged(problem, device),
    )


def _scale(scale: float) -> float:
    """The nearest that float32 has, which is what kernels get: never infinite, and 0 where that is its."""
    if LEAST <= abs(scale) <= MOST:
        return scale
    return 0.0 if abs(scale) < LEAST else math.copysign(MOST, scale)


def _softcap(softcap: float) -> float:
    """Likewise; what is beyond float32 caps nothing that it holds, and what is below caps at next to 0."""
    if not softcap or LEAST <= softcap <= MOST:
        return softcap
    return LEAST if softcap < LEAST else 0.0


def _table(problem: AttentionProblem, device: torch.device) -> Tensor | None:
    if problem.block_table is None:
        return None
    table = problem.block_table.array
    return table if isinstance(table, Tensor) else moved("block_table", table, torch.int64, device)


def _segments(problem: AttentionProblem, device: torch.device) -> Segments | None:
    if problem.segment_ids is None:
        return None
    queries, keys = (moved("segment_ids", ids, torch.int64, device) for ids in problem.segment_ids)
    assert queries is not None and keys is not None
    return segments_of(queries, keys)


def segments_of(queries: Tensor, keys: Tensor) -> Segments:
    """Sum up the ids of queries (B, Lq) and keys (B, Lk), int64, where they lie."""
    tensors = queries.contiguous(), keys.contiguous(), _bounds(queries), _bounds(keys)
    return Segments(*(part for tensor in tensors for part in (tensor, tensor.stride(0))))


def _bounds(ids: Tensor) -> Tensor:
    batch, length = ids.shape
    missing = -length % SPAN
    if missing:
        ids = torch.cat([ids, ids[:, -1:].expand(batch, missing)], 1)
    spans = ids.reshape(batch, ids.shape[1] // SPAN, SPAN)
    return torch.stack([spans.amin(2), spans.amax(2)], 2)


def _ragged(problem: AttentionProblem, device: torch.device) -> Ragged | None:
    if problem.cu_seqlens is None:
        return None
    names = "cu_seqlens_q", "cu_seqlens_k"
    pairs = zip(names, problem.cu_seqlens, strict=True)
    return Ragged(*(moved(name, starts, torch.int64, device) for name, starts in pairs))


def tensor(view: Strided) -> Tensor:
    """The tensor that `view` is a view of, with the axes of the view."""
    array: Tensor = view.array
    if view.shape == array.shape and view.strides == array.stride():
        return array
    return array.as_strided(view.shape, view.strides)


def codes(view: Strided) -> Tensor:
    """The same of a cache: numbers of float8_e4m3fn as bytes, since not every GPU has a type for them."""
    array = tensor(view)
    return array.view(torch.uint8) if array.dtype == torch.float8_e4m3fn else array


def moved(name: str, vector: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A short argument where the kernels can read it."""
    if vector is None:
        return None
    if isinstance(vector, Tensor):
        return vector.detach().to(dtype).contiguous()
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
