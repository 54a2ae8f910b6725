"""Tiles measured on the device at hand, where ``FASTATTN_AUTOTUNE=1`` asks for it.

The first call of each kind runs its kernel with every candidate of the tables in `configs` that could do, and
keeps the fastest for as long as the process lives. Nothing is measured while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from fastattn._flags import flag
from fastattn.gpu import configs
from fastattn.gpu.call import Call
from fastattn.gpu.config_tables import Tiles

_fastest: dict[tuple[Any, ...], Tiles] = {}


def chosen(kernel: str, call: Call, tiles: Tiles, launch: Callable[[Tiles], None]) -> Tiles:
    """Tell the tiles to launch `kernel` with: `tiles`, the tables' choice, unless tuning is asked for.

    `launch` runs the kernel of `call` with given tiles; it may run any number of times.
    """
    if not flag("FASTATTN_AUTOTUNE") or not call.query.is_cuda:
        return tiles
    key = _key(kernel, call)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return tiles
        _fastest[key] = _measured([tiles, *configs.candidates(kernel, call)], launch)
    return _fastest[key]


def _measured(candidates: list[Tiles], launch: Callable[[Tiles], None]) -> Tiles:
    times = {}
    for candidate in dict.fromkeys(candidates):
        try:
            times[candidate] = triton.testing.do_bench(
                lambda tried=candidate: launch(tried), warmup=5, rep=20
            )
        except triton.runtime.errors.OutOfResources:  # shared memory or registers that this device lacks
            continue
    return min(times, key=lambda candidate: times[candidate], default=candidates[0])


def _key(kernel: str, call: Call) -> tuple[Any, ...]:
    """What calls have in common that share a measurement: lengths within a factor of two, arguments."""
    lengths = (call.query.shape[2].bit_length(), call.seqlen_k.bit_length())
    heads = (call.batch * call.query.shape[1], call.query.shape[1] // call.key.shape[1])
    given = tuple(value is not None for value in call._replace(launched=None))
    rules = (call.window_left, call.window_right, call.softcap > 0, call.dropout_p > 0, call.tf32)
    dims = (call.query.shape[3], call.value.shape[3], call.query.dtype, call.key.dtype, call.query.device)
    return kernel, lengths, heads, given, rules, dims
