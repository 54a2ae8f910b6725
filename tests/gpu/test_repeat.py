"""Plain calls that look the same: Triton is asked once, and the device is given what it would be anyway."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

import places

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastattn.backends import plain_gpu
from fastattn.backends import triton as backend
from fastattn.backends.plain import PlainCall
from fastattn.gpu import configs
from fastattn.gpu.forward import forward_kernel
from fastattn.gpu.key_gradient import key_gradient_kernel
from fastattn.gpu.query_gradient import query_gradient_kernel
from fastattn.gpu.row_terms import row_terms_kernel
from interpreter import NoDevice

KERNELS = forward_kernel, row_terms_kernel, key_gradient_kernel, query_gradient_kernel
Launches = list[tuple[Any, ...]]  # the kernel, and all that its launcher is given
WANTED = (True, True, True)


class Kernel(CompiledKernel):  # type: ignore[misc]
    """Stands for a compiled one, and keeps what it is launched with."""

    def __init__(self, name: str, launches: Launches) -> None:
        self.module = self.function = 1
        self.name = self.packed_metadata = name
        self.src = self._module_pid = None
        # Between the place and the arguments stands what profilers are told.
        self._run = lambda *given: launches.append((self, *given[:6], *given[9:]))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What is launched where tensors of the CPU count as an H100's, for which nothing is compiled."""
    launches: Launches = []

    def compile_nothing(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> Any:
        return self.device_caches[device][0].setdefault(key, Kernel(self.__name__, launches))

    places.on_device(monkeypatch)
    monkeypatch.setattr(backend, "interprets", lambda: True)
    monkeypatch.setattr(configs, "kind_of_gpu", lambda tensor: "sm90")
    monkeypatch.setattr(plain_gpu, "_plans", {})
    monkeypatch.setattr(driver, "_active", NoDevice(GPUTarget("cuda", 90, 32)))
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return launches


def arrays(kind: str, bshd: bool) -> list[Tensor]:
    """Query, key, value and the gradient of out, which are new each time; `kind`: how they lie in memory."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    shapes = (2, 4, 70, 32), (2, 2, 90, 32), (2, 2, 90, 32), (2, 4, 70, 32)
    tensors = []
    for batch, heads, rows, dim in shapes:
        shape = (batch, rows, heads, dim) if bshd else (batch, heads, rows, dim)
        if kind == "beside an address":
            tensors.append(torch.zeros(batch * heads * rows * dim + 1, dtype=dtype)[1:].view(shape))
        elif kind == "parts of rows":
            tensors.append(torch.zeros(*shape[:3], dim + 8, dtype=dtype)[..., :dim])
        else:
            tensors.append(torch.zeros(shape, dtype=dtype))
    if kind == "one gradient for all":
        tensors[3] = torch.ones((), dtype=dtype).expand(tensors[0].shape)
    return tensors


def attend(tensors: list[Tensor], causal: bool, bshd: bool, wanted: Any, with_lse: bool) -> None:
    *operands, grad_out = tensors
    out, lse = plain_gpu.attend(*operands, causal, None, bshd, True)
    call = PlainCall(causal, None, bshd, with_lse)
    grad_lse = torch.zeros_like(lse) if with_lse else None
    grads = plain_gpu.backward(grad_out, grad_lse, (*operands, out, lse), wanted, call)
    assert grads is not None and [grad is not None for grad in grads] == list(wanted)


def told(launches: Launches, given: list[Tensor]) -> list[Any]:
    """What was launched since; of tensors which of those `given` it is, and what it is like."""

    def of(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(of, argument))
        if not isinstance(argument, Tensor):
            return argument
        like = argument.dtype, argument.shape, argument.stride(), argument.data_ptr() & 15
        return like, [argument.data_ptr() == x.data_ptr() for x in given]

    found = [of(launch) for launch in launches]
    launches.clear()
    return found


KINDS = ("plain", "beside an address", "parts of rows", "one gradient for all", "float32")
CALLS = [
    (kind, causal, bshd, wanted, with_lse)
    for kind in KINDS
    for causal, bshd, wanted, with_lse in (
        (False, False, WANTED, False),
        (True, True, WANTED, True),
        (True, False, WANTED, False),
        (True, False, (False, True, False), False),
        (True, False, (True, False, False), False),
    )
]


def test_the_launcher_is_given_the_same(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came before: no call is taken for another that Triton would tell from it."""
    for kind, causal, bshd, wanted, with_lse in CALLS * 2:
        tensors = arrays(kind, bshd)
        attend(tensors, causal, bshd, wanted, with_lse)
        found = told(launches, tensors)
        with monkeypatch.context() as block:
            block.setattr(plain_gpu, "_plans", {})
            attend(tensors, causal, bshd, wanted, with_lse)
        assert found == told(launches, tensors)
        assert len(found) == 2 + (wanted[1] or wanted[2]) + wanted[0]


def test_triton_is_asked_once(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        attend(arrays("plain", False), True, False, WANTED, False)
        monkeypatch.setattr(JITFunction, "run", None)
    assert len(launches) == 2 * len(KERNELS)


def test_no_tensor_is_kept(launches: Launches) -> None:
    tensors = arrays("plain", False)
    attend(tensors, False, False, WANTED, False)
    kept = [weakref.ref(x) for x in tensors]
    launches.clear()
    del tensors
    assert not any(reference() is not None for reference in kept)
