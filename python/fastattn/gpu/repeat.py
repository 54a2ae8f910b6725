"""Kernels launched again: once is enough to look at the arguments of calls that look the same.

`backends/plain_gpu` knows which do, and gives them one dictionary for `Call.launched`.
"""

from __future__ import annotations

from typing import Any

from fastattn.gpu.call import Call


def launch(
    call: Call, kernel: Any, programs: int, tensors: tuple[Any, ...], *rest: Any, **options: Any
) -> None:
    """Launch `kernel`; its arguments behind `tensors` are the same for calls that look the same."""
    compiled = kernel[(programs,)](*tensors, *rest, **options)
    if call.launched is None or compiled is None:  # of an interpreter there is nothing to keep
        return
    signature = kernel.signature
    named = {name: value for name, value in options.items() if name in signature.parameters}
    bound = signature.bind(*tensors, *rest, **named)
    bound.apply_defaults()
    run, same = compiled[(programs, 1, 1)], bound.args[len(tensors) :]
    call.launched[kernel.fn] = lambda *others: run(*others, *same)


def launched(call: Call, kernel: Any, tensors: tuple[Any, ...]) -> bool:
    """Launch `kernel` as for a call before that looks the same; False if there was none."""
    run = None if call.launched is None else call.launched.get(kernel.fn)
    if run is None:
        return False
    run(*tensors)
    return True
