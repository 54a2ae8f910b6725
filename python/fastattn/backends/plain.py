"""The short way for plain calls: from the arrays straight to the compiled kernels, and back.

A call on few tokens takes microseconds, and making an `AttentionProblem` of it several more. Here C++ reads
the arrays itself; what it does not know at sight goes the long way, which then answers or says what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastattn._threads import get_num_threads
from fastattn.arrays import Array
from fastattn.backends import triton

try:
    import fastattn._core as _core
except ImportError:  # the long way says so
    _numpy_call = None
else:
    _numpy_call = _core.attention_plain_numpy


class PlainCall(NamedTuple):
    """What a plain call has besides its arrays."""

    causal: bool
    scale: float | None
    bshd: bool
    return_lse: bool


# Wraps query, key, value and their results in a node of torch's graph; given by who can make one.
Record = Callable[[Array, Array, Array, tuple[Array, Array], PlainCall], Any]


class _TorchLane(NamedTuple):
    is_ordinary: Callable[[], bool]  # no mode, transform, trace or autocast is in force
    records: Callable[[], bool]  # gradients are on
    record: Record
    wrote: Callable[[tuple[Array | None, ...]], None]  # counts a change in place, so that graphs notice


_torch_lane: _TorchLane | None = None


def attend(
    query: Array,
    key: Array,
    value: Array,
    causal: bool,
    scale: float | None,
    bshd: bool,
    return_lse: bool = False,
    kv_lengths: Any = None,
) -> Any:
    """Attention without another argument, or None where the call has to go the long way.

    So has one with `kv_lengths` on a GPU, or with gradients.
    """
    if type(query) is np.ndarray:
        if _numpy_call is None or return_lse:
            return None
        return _numpy_call(query, key, value, kv_lengths, causal, scale, bshd, get_num_threads())
    if _torch_lane is None or not _torch_lane.is_ordinary():
        return None
    recorded = _torch_lane.records() and (
        getattr(query, "requires_grad", False)
        or getattr(key, "requires_grad", False)
        or getattr(value, "requires_grad", False)
    )
    if recorded and kv_lengths is not None:
        return None
    results = _core.attention_plain_torch(
        query, key, value, kv_lengths, causal, scale, bshd, return_lse or recorded, get_num_threads()
    )
    if results is None and kv_lengths is None and getattr(query, "is_cuda", False):
        results = _on_gpu(query, key, value, causal, scale, bshd, return_lse or recorded)
    if recorded and results is not None:
        return _torch_lane.record(query, key, value, results, PlainCall(causal, scale, bshd, return_lse))
    return results


def attend_cached(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    key_scale: Array | None,
    value_scale: Array | None,
    new_key: Array | None,
    new_value: Array | None,
    *rest: Any,
) -> Any:
    """Attention over caches, or None where the call has to go the long way; `rest` is as `_core` takes it."""
    caches, new = (key_cache, value_cache, key_scale, value_scale), (new_key, new_value)
    if type(query) is np.ndarray:
        if _numpy_call is None:
            return None
        return _core.attention_cached(query, *caches, *new, *rest, get_num_threads())
    if _torch_lane is None or not _torch_lane.is_ordinary():
        return None
    if _torch_lane.records():
        for array in (query, *caches, *new, *rest):
            if getattr(array, "requires_grad", False):
                return None
    results = _core.attention_cached(query, *caches, *new, *rest, get_num_threads())
    if results is not None and new_key is not None:
        _torch_lane.wrote(caches)
    return results


def _on_gpu(query: Array, *arguments: Any) -> Any:
    if not triton.serves(query.device):
        return None
    from fastattn.backends import plain_gpu

    return plain_gpu.attend(query, *arguments)


def backward(
    grad_out: Array,
    grad_lse: Array | None,
    tensors: tuple[Array, ...],
    wanted: tuple[bool, ...],
    call: PlainCall,
) -> Any:
    """The gradients of query, key and value that are wanted, or None for the long way.

    `tensors`: query, key, value, out and lse.
    """
    query, key, value, out, lse = tensors
    causal, scale, bshd, _ = call
    if query.is_cuda:
        from fastattn.backends import plain_gpu

        return plain_gpu.backward(grad_out, grad_lse, tensors, wanted, call)
    return _core.attention_plain_backward(
        grad_out, grad_lse, query, key, value, out, lse, wanted, causal, scale, bshd, get_num_threads()
    )


def bind_torch(record: Record) -> None:
    """Open the short way to tensors, torch being loaded; `record` makes nodes of its graph."""
    global _torch_lane
    torch = sys.modules["torch"]
    if _numpy_call is None:
        return
    names = sorted(_core.DTYPE_CODES, key=_core.DTYPE_CODES.__getitem__)[:4]
    _core.bind_torch(
        torch.Tensor,
        torch.nn.Parameter,
        torch.strided,
        tuple(getattr(torch, name) for name in names),
        torch.empty_like,
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
    )
    count = torch.autograd.graph.increment_version

    def wrote(tensors: tuple[Array | None, ...]) -> None:
        count([tensor for tensor in tensors if tensor is not None and not tensor.is_inference()])

    _torch_lane = _TorchLane(_ordinariness(torch), torch.is_grad_enabled, record, wrote)


def _ordinariness(torch: Any) -> Callable[[], bool]:
    """Make a test that no mode, transform, trace or autocast of torch is in force.

    Some of what it asks is torch's own affair and may move between versions; without it nothing is plain.
    """
    try:
        inner, forward_ad = torch._C, torch.autograd.forward_ad
        function_mode = inner._is_torch_function_mode_enabled
        dispatch_modes = inner._len_torch_dispatch_stack
        transform = inner._functorch.peek_interpreter_stack
        trace = inner._get_tracing_state
        autocast = torch.is_autocast_enabled
        forward_ad._current_level  # noqa: B018
        autocast("cpu")
    except (AttributeError, TypeError):
        return lambda: False

    def is_ordinary() -> bool:
        return not (
            function_mode()
            or dispatch_modes()
            or transform() is not None
            or trace() is not None
            or forward_ad._current_level >= 0
            or autocast("cpu")
        )

    return is_ordinary
