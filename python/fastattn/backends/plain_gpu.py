"""The short way of plain calls on a GPU: what follows from shapes, strides and dtypes is worked out once.

A launch on few tokens takes microseconds of the host; validating the call, and Triton's look at each argument
of each kernel, several times as many. A plan holds what was found for tensors that look the same to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.plain import PlainCall
from fastattn.backends.triton import TritonBackend
from fastattn.gpu import choice
from fastattn.gpu.call import Call, Gradients, allows_tf32, from_problem
from fastattn.gpu.launch import on_device
from fastattn.problem import AttentionProblem, Layout

_LIMIT = 1024  # plans; a cache that grows makes a new one for each length
_BACKEND = TritonBackend()


class _Plan(NamedTuple):
    call: Call  # but for its tensors
    kernel: choice.Kernel
    out_shape: tuple[int, ...]  # in the caller's layout
    lse_shape: tuple[int, ...]
    backward: dict[tuple[Any, ...], dict[Any, Any]]  # `Call.launched` of gradients, by what comes in for them


_plans: dict[tuple[Any, ...], _Plan] = {}


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool, return_lse: bool
) -> Any:
    """Attention without another argument, or None where the call has to go the long way."""
    look = _look(query, key, value, causal, scale, bshd, return_lse)
    if look is None or torch.is_autocast_enabled("cuda"):
        return None
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


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, ...],
    wanted: Sequence[bool],
    plain: PlainCall,
) -> list[Tensor | None] | None:
    """The gradients of query, key and value that are wanted, as `plain.backward` has them."""
    query, key, value, out, lse = tensors
    causal, scale, bshd, _ = plain
    look = _look(query, key, value, causal, scale, bshd, True)
    plan = None if look is None else _plans.get(look)
    given = (out, lse, grad_out) if grad_lse is None else (out, lse, grad_out, grad_lse)
    if plan is None or any(type(x) is not Tensor or x.layout is not torch.strided for x in given):
        return None
    if any(x.is_neg() for x in given):
        return None
    of_query, of_key, of_value, *_ = wanted
    grads = [
        x.new_empty(x.shape) if wants else None
        for x, wants in ((query, of_query), (key, of_key), (value, of_value))
    ]
    memory = Gradients(*grads)
    if bshd:
        query, key, value, out, grad_out = (x.transpose(1, 2) for x in (query, key, value, out, grad_out))
        memory = Gradients(*(None if grad is None else grad.transpose(1, 2) for grad in grads))
    atomic = choice.adds_atomically()
    incoming = (of_query, of_key, of_value, atomic, *((x.stride(), x.data_ptr() & 15) for x in given))
    with on_device(query.device):
        launched = plan.backward.setdefault(incoming, {})
        call = plan.call._replace(query=query, key=key, value=value, launched=launched)
        choice.of_backward(call, memory, None, atomic).launch(call, out, lse, grad_out, grad_lse)
    return grads


def _look(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool, lse: bool
) -> tuple[Any, ...] | None:
    """All that kernels and Triton's compiler can tell of a call; None where there is more to it."""
    if (
        not (type(query) is type(key) is type(value) is Tensor)
        or not (query.layout is key.layout is value.layout is torch.strided)
        or (scale is not None and type(scale) is not float)
        or (query.is_neg() or key.is_neg() or value.is_neg())
    ):
        return None
    return (
        *(query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype),
        *(query.stride(), key.stride(), value.stride(), query.device, key.device, value.device),
        *(query.data_ptr() & 15, key.data_ptr() & 15, value.data_ptr() & 15),
        *(causal, scale, bshd, lse, query.dtype is torch.float32 and allows_tf32()),
    )


def _planned(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool
) -> _Plan | None:
    """What the long way makes of the call; None where it has something to say, or may say otherwise later."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None  # a kernel that has to be tried first cannot be, now
    layout: Layout = "bshd" if bshd else "bhsd"
    with torch.no_grad():  # a graph is recorded by who calls
        problem = AttentionProblem.from_arguments(
            query, key, value, causal=causal, scale=scale, layout=layout
        )
    if _BACKEND.supports(problem) or 0 in problem.out_shape:
        return None
    with on_device(query.device):
        call = from_problem(problem)
        kernel = choice.of_forward(call)
    batch, heads, rows, dim = problem.out_shape
    shape = (batch, rows, heads, dim) if bshd else problem.out_shape
    without_tensors: Any = call._replace(query=None, key=None, value=None, launched={})  # type: ignore[arg-type]
    return _Plan(without_tensors, kernel, shape, (batch, heads, rows), {})
