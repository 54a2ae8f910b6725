"""torch's own attention, shown to `fastattn.observers`: what is computed stays torch's."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastattn import observers
from fastattn.integrations.torch_sdpa import as_problem

_patching = threading.Lock()
_patched = 0  # blocks in which torch's multi-head attention is replaced
_multihead: Callable[..., Any] = torch.nn.functional.multi_head_attention_forward  # or who took its place
_signature = inspect.signature(_multihead)


def attend(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function`, which has the signature of ``scaled_dot_product_attention``, and tell of it."""
    with observers.silence():  # of fastattn's own attention, if it is what computes
        out = function(*args, **kwargs)
    with torch.no_grad():
        observers.tell(as_problem(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()}))
    return out


@contextmanager
def multihead() -> Iterator[None]:
    """Tell of ``multi_head_attention_forward`` where it returns weights, without calling the function above.

    Replaced, in this block alone, is torch's function for the whole process, which asks whose call it is.
    """
    global _patched, _multihead
    functions = torch.nn.functional
    with _patching:
        _patched += 1
        if _patched == 1:
            _multihead = functions.multi_head_attention_forward
            functions.multi_head_attention_forward = _observed_multihead
    try:
        yield
    finally:
        with _patching:
            _patched -= 1
            if not _patched and functions.multi_head_attention_forward is _observed_multihead:
                functions.multi_head_attention_forward = _multihead


@functools.wraps(_multihead)
def _observed_multihead(*args: Any, **kwargs: Any) -> Any:
    if not observers.watching():
        return _multihead(*args, **kwargs)
    call = _signature.bind(*args, **kwargs)
    call.apply_defaults()
    if not call.arguments["need_weights"]:
        return _multihead(*args, **kwargs)
    with observers.silence():  # a subclass of Tensor is led here once more
        results = _multihead(*args, **kwargs)
    # The same without weights and dropout goes through the function that tells.
    call.arguments.update(need_weights=False, is_causal=False, training=False)
    with torch.no_grad():
        _multihead(*call.args, **call.kwargs)
    return results


def _plain(argument: Any) -> Any:
    """Tensors that other integrations make, such as rows in pages, in one piece."""
    if isinstance(argument, Tensor) and type(argument) not in (Tensor, torch.nn.Parameter):
        return argument.detach().clone()
    return argument
