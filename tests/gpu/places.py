"""Where the tensors of a test are held to be, on machines that have a CPU alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import cache_problem, merge, problem, strided, tensors

# Operations by which the host learns what a tensor holds, and waits for it.
READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


def on_device(patch: pytest.MonkeyPatch) -> None:
    """Let tensors of the CPU count as a GPU's: short arguments stay where they are, and are not read."""

    def library_of(name: str, array: Any, *, composed: bool = False) -> Any:
        return tensors.operands(torch) if composed else tensors.on_device(torch, torch.device("cpu"))

    for module in (problem, merge, cache_problem):
        patch.setattr(module, "library_of", library_of)


class _Listening(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function._opname not in READS, f"the host reads: {function}"
        return function(*args, **(kwargs or {}))


@contextmanager
def unread(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where the host reads what a tensor holds."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the host reads memory")

    with patch.context() as block, _Listening():
        for name in ("numpy", "read", "write"):
            block.setattr(strided.Strided, name, refuse)
        for name in ("numpy", "tolist", "cpu", "__array__"):
            block.setattr(Tensor, name, refuse)
        yield
