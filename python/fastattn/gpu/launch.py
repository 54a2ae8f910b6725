"""From a problem to the kernels: what is launched for it, where. Nothing here waits for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastattn.arrays import Strided
from fastattn.cache_problem import CacheUpdate
from fastattn.cache_problem import Rotary as CacheRotary
from fastattn.gpu import choice
from fastattn.gpu.append import Rotary, Update, append
from fastattn.gpu.call import Gradients, from_problem, moved, tensor
from fastattn.gpu.weights import weights as write_weights
from fastattn.outputs import Gradients as Memory
from fastattn.outputs import Outputs
from fastattn.problem import AttentionProblem


def forward(problem: AttentionProblem, outputs: Outputs) -> None:
    """Write every element of `outputs`."""
    out = tensor(outputs.out)
    lse = None if outputs.lse is None else tensor(outputs.lse)
    if not out.shape[0] or not out.shape[2]:
        return  # no batch or no query: every output is empty
    with on_device(out.device):
        call = from_problem(problem)
        if outputs.weights is None:
            choice.of_forward(call).launch(call, out, lse)
            return
        if lse is None:
            lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
        choice.of_forward(call).launch(call, out, lse)
        write_weights(call, lse, tensor(outputs.weights))


def update_cache(problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
    """Write the new rows; return the problem to run then, whose query is turned if it is to be."""
    if update.new_key is None and update.rotary is None:
        return problem
    query, turned = tensor(problem.query), None
    if update.rotary is not None:
        turned = problem.library.empty(problem.query.shape, problem.dtype, problem.query.array)
    with on_device(query.device):
        call = from_problem(problem)
        rows = Update(
            query,
            _optional(turned),
            _optional(update.new_key),
            _optional(update.new_value),
            call.key,
            call.value,
            call.key_scale,
            call.value_scale,
            call.block_table,
            _positions(update.start, query),
            max(update.capacity, 1),
            None if update.rotary is None else _rotary(update.rotary, query),
        )
        append(rows)
    return problem if turned is None else problem._replace(query=turned)


def backward(problem: AttentionProblem, outputs: Outputs, incoming: Outputs, memory: Memory) -> None:
    """Write `memory`; sums have one order, but for FASTATTN_ATOMIC=1 where torch allows any."""
    out, lse = tensor(outputs.out), _optional(outputs.lse)
    assert lse is not None
    grad_out, grad_lse, grad_weights = (
        tensor(incoming.out),
        _optional(incoming.lse),
        _optional(incoming.weights),
    )
    if memory.bias is not None:
        memory = memory._replace(bias=_once(memory.bias))
    with on_device(out.device):
        call, wanted = from_problem(problem), Gradients(*map(_optional, memory))
        kernel = choice.of_backward(call, wanted, grad_weights, choice.adds_atomically())
        kernel.launch(call, out, lse, grad_out, grad_lse)


def _rotary(rotary: CacheRotary, query: torch.Tensor) -> Rotary:
    starts = _positions(rotary.query_start, query)
    return Rotary(tensor(rotary.cos), tensor(rotary.sin), rotary.interleaved, starts, rotary.query_step)


def _positions(positions: Any, query: torch.Tensor) -> torch.Tensor:
    vector = moved("cache_seqlens", positions, torch.int64, query.device)
    assert vector is not None
    return vector


def described(problem: AttentionProblem) -> dict[str, str]:
    """What `fastattn.explain` prints of the kernels."""
    with on_device(problem.query.array.device):
        return choice.explained(from_problem(problem))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the one that kernels are launched on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _optional(view: Strided | None) -> torch.Tensor | None:
    return None if view is None else tensor(view)


def _once(view: Strided) -> Strided:
    """`view` with one element where it is broadcast: what is summed up, rather than what it is a sum of."""
    sizes = zip(view.shape, view.strides, strict=True)
    return view._replace(shape=tuple(size if stride else min(size, 1) for size, stride in sizes))
