"""The short way of plain calls on a GPU: what follows from shapes, strides and dtypes is worked out once.

A launch on few tokens takes microseconds of the host, and validating the call several times as many. A plan
holds what the long way found for tensors that look the same to a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.triton import TritonBackend
from fastattn.gpu import choice
from fastattn.gpu.call import Call, allows_tf32, from_problem
from fastattn.gpu.launch import on_device
from fastattn.problem import AttentionProblem

_LIMIT = 1024  # plans; a cache that grows makes a new one for each length
_BACKEND = TritonBackend()


class _Plan(NamedTuple):
    call: Call  # but for its tensors
    kernel: choice.Kernel
    out_shape: tuple[int, ...]  # in the caller's layout
    lse_shape: tuple[int, ...]


_plans: dict[tuple[Any, ...], _Plan] = {}


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool, return_lse: bool
) -> Any:
    """Attention without another argument, or None where the call has to go the long way."""
    if (
        not (type(query) is type(key) is type(value) is Tensor)
        or not (query.layout is key.layout is value.layout is torch.strided)
        or (scale is not None and type(scale) is not float)
        or (query.is_neg() or key.is_neg() or value.is_neg())
        or torch.is_autocast_enabled("cuda")
    ):
        return None
    look = (
        *(query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype),
        *(query.stride(), key.stride(), value.stride(), query.device, key.device, value.device),
        (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15,
        *(causal, scale, bshd, query.dtype is torch.float32 and allows_tf32()),
    )
    plan = _plans.get(look)
    if plan is None:
        plan = _planned(query, key, value, causal, scale, bshd)
        if plan is None:
            return None
        if len(_plans) >= _LIMIT:
            _plans.clear()
        _plans[look] = plan
    out = query.new_empty(plan.out_shape)
    lse = query.new_empty(plan.lse_shape, dtype=torch.float32) if return_lse else None
    written = out
    if bshd:
        query, key, value, written = (x.transpose(1, 2) for x in (query, key, value, out))
    with on_device(query.device):
        plan.kernel.launch(plan.call._replace(query=query, key=key, value=value), written, lse)
    return out if lse is None else (out, lse)


def _planned(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool
) -> _Plan | None:
    """What the long way makes of the call; None where it has something to say, or may say otherwise later."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None  # a kernel that has to be tried first cannot be, now
    problem = AttentionProblem.from_arguments(
        query, key, value, causal=causal, scale=scale, layout="bshd" if bshd else "bhsd"
    )
    if _BACKEND.supports(problem) or 0 in problem.out_shape:
        return None
    with on_device(query.device):
        call = from_problem(problem)
        kernel = choice.of_forward(call)
    batch, heads, rows, dim = problem.out_shape
    shape = (batch, rows, heads, dim) if bshd else problem.out_shape
    without_tensors: Any = call._replace(query=None, key=None, value=None)  # type: ignore[arg-type]
    return _Plan(without_tensors, kernel, shape, (batch, heads, rows))
