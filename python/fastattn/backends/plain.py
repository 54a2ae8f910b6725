"""The short way for plain calls: from the arrays straight to the compiled kernels.

A call on few tokens takes microseconds, and making an `AttentionProblem` of it several more. Here C++ reads
the arrays itself; what it does not know at sight goes the long way, which then answers or says what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fastattn._threads import resolve_num_threads
from fastattn.arrays import Array

try:
    import fastattn._core as _core
except ImportError:  # the long way says so
    _numpy_call = None
else:
    _numpy_call = _core.attention_plain_numpy

_torch_is_plain: Callable[[], bool] | None = None


def attend(
    query: Array, key: Array, value: Array, causal: bool, scale: float | None, bshd: bool
) -> Array | None:
    """Attention without another argument, or None where the call has to go the long way."""
    if type(query) is np.ndarray:
        if _numpy_call is None:
            return None
        return _numpy_call(query, key, value, causal, scale, bshd, resolve_num_threads())
    if _torch_is_plain is None and not _bind_torch():
        return None
    assert _torch_is_plain is not None
    if not _torch_is_plain():
        return None
    return _core.attention_plain_torch(query, key, value, causal, scale, bshd, resolve_num_threads())


def _bind_torch() -> bool:
    """Whether torch is loaded, and has told how to read its tensors."""
    global _torch_is_plain
    torch = sys.modules.get("torch")
    if torch is None or _numpy_call is None or not hasattr(torch, "compile"):  # None, or still loading
        return False
    names = sorted(_core.DTYPE_CODES, key=_core.DTYPE_CODES.__getitem__)[:4]
    try:
        dtypes = tuple(getattr(torch, name) for name in names)
        is_plain = _plainness(torch)
        _core.bind_torch(torch.Tensor, torch.strided, dtypes, torch.empty_like)
    except AttributeError:  # a stand-in for torch
        return False
    _torch_is_plain = is_plain
    return True


def _plainness(torch: Any) -> Callable[[], bool]:
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

    def is_plain() -> bool:
        return not (
            function_mode()
            or dispatch_modes()
            or transform() is not None
            or trace() is not None
            or forward_ad._current_level >= 0
            or autocast("cpu")
        )

    return is_plain
