"""Caches by operations of torch, on any device: rows are written by index, and gathered from their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn.arrays import Strided
from fastattn.cache_problem import CacheUpdate, Rotary
from fastattn.codes import FLOAT8, quantised
from fastattn.problem import AttentionProblem
from fastattn.tensors import turned

if TYPE_CHECKING:
    from torch import Tensor


def rows(problem: AttentionProblem, view: Strided, scale: Strided | None) -> Tensor:
    """Keys or values, (B, Hkv, Lk, D), dequantised to lse's dtype where they are quantised."""
    import torch

    gathered = _gathered(problem, view.array)
    if scale is None:
        return gathered
    dtype = getattr(torch, problem.lse_dtype)
    return gathered.to(dtype) * _gathered(problem, scale.array)[..., None].to(dtype)


def _gathered(problem: AttentionProblem, cache: Tensor) -> Tensor:
    """(B, Hkv, Lk, ...) of a cache in the caller's layout, with pages or without."""
    bshd = problem.layout == "bshd"
    if problem.block_table is None:
        return cache.transpose(1, 2) if bshd else cache
    pages = _as_bits(cache)[_on(cache, problem.block_table.array)].view(cache.dtype)
    pages = pages if bshd else pages.transpose(2, 3)  # (B, slots, page_size, Hkv, ...)
    return pages.flatten(1, 2).transpose(1, 2)


def update(problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
    """Write the new rows into the caches; return the problem, its query turned if there is an embedding."""
    rotary, query = update.rotary, problem.query.array
    if update.new_key is not None and update.new_value is not None:
        positions = _positions(query, update.start, update.new_key.shape[2], 1)
        row = positions % max(update.capacity, 1)
        place = _on(query, range(len(positions)))[:, None].expand_as(row)
        if problem.block_table is not None:
            place = _on(query, problem.block_table.array).gather(1, row // problem.page_size)
            row = row % problem.page_size
        key = update.new_key.array
        if rotary is not None:
            key = _turned(key, rotary, positions, problem.layout)
        _store(problem, problem.key, problem.key_scale, key, place, row)
        _store(problem, problem.value, problem.value_scale, update.new_value.array, place, row)
    if rotary is None:
        return problem
    positions = _positions(query, rotary.query_start, problem.query.shape[2], rotary.query_step)
    query = _turned(query, rotary, positions, problem.layout).to(query.dtype)
    return problem._replace(query=problem.query._replace(array=query))


def _positions(like: Tensor, start: Any, count: int, step: int) -> Tensor:
    """Of `count` rows of each sequence, (B, count)."""
    return _on(like, start)[:, None] + step * _on(like, range(count))


def _on(like: Tensor, numbers: Any) -> Tensor:
    import torch

    return torch.as_tensor(numbers, dtype=torch.int64, device=like.device)


def _turned(tensor: Tensor, rotary: Rotary, positions: Tensor, layout: str) -> Tensor:
    """Rows turned by the angles of their positions, not yet rounded."""
    import torch

    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    heads = 2 if layout == "bshd" else 1
    cos, sin = (
        table.array[positions].to(tensor.dtype).unsqueeze(heads) for table in (rotary.cos, rotary.sin)
    )
    columns, rest = tensor[..., : 2 * cos.shape[-1]], tensor[..., 2 * cos.shape[-1] :]
    return torch.cat([turned(torch, columns, cos, sin, rotary.interleaved), rest], -1)


def _store(
    problem: AttentionProblem, view: Strided, scale: Strided | None, new: Tensor, place: Tensor, row: Tensor
) -> None:
    """Write rows at (place, row): rounded, or quantised as `fastattn.reference.store_row` does."""
    import torch

    cache = view.array
    if problem.layout == "bhsd":
        cache, new = cache.transpose(1, 2), new.transpose(1, 2)
    if scale is None:
        cache[place, row] = new.to(cache.dtype)
        return
    scales = scale.array if problem.layout == "bshd" else scale.array.transpose(1, 2)
    codes, scales[place, row] = quantised(torch, new.to(torch.float32), view.dtype)
    _as_bits(cache)[place, row] = _as_bits(codes.to(cache.dtype))


def _as_bits(tensor: Tensor) -> Tensor:
    """The bytes of an 8-bit float, of which operations of torch know little."""
    import torch

    return tensor.view(torch.uint8) if str(tensor.dtype).removeprefix("torch.") in FLOAT8 else tensor
