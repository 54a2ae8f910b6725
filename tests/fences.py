"""Every buffer of a kernel call between two pages that must not be touched: a stray access ends the process.

`fenced` puts itself between the package and the compiled extension. Whatever a call passes down is copied
into mapped memory of its own, to end at the last byte before such a page, or to start at the first byte after
one; inputs are read-only there. So any call of any test can be run fenced.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from fastattn import _core
from fastattn.arrays import ITEMSIZE
from fastattn.backends import cpu

Place = Literal["end", "start"]

PAGE = mmap.PAGESIZE
NONE, READ, WRITE = 0, 1, 2  # PROT_*
OUTPUTS = range(3, 6)  # out, lse and weights among the arguments of `_core.attention_forward`
TENSORS = range(12)
WRITTEN = (2, 3, 4, 5, 11)  # caches, their scales and turned queries among those of `_core.update_caches`
NAMES = {code: name for name, code in _core.DTYPE_CODES.items()}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Fence:
    """A copy of [address, address + size) with a forbidden page on either side."""

    def __init__(self, address: int, size: int, place: Place, *, writable: bool) -> None:
        self.source, self.size = address, size
        self.length = -(-size // PAGE) * PAGE + 2 * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.base = _libc.mmap(None, self.length, READ | WRITE, flags, -1, 0)
        assert self.base != ctypes.c_void_p(-1).value, "no memory to map"
        last = self.base + self.length - PAGE
        self.address = self.base + PAGE if place == "start" else last - size
        ctypes.memmove(self.address, address, size)
        if not writable:
            self._protect(self.base, self.length, READ)
        self._protect(self.base, PAGE, NONE)
        self._protect(last, PAGE, NONE)

    def _protect(self, address: int, size: int, access: int) -> None:
        assert _libc.mprotect(address, size, access) == 0

    def copy_back(self) -> None:
        ctypes.memmove(self.source, self.address, self.size)

    def close(self) -> None:
        _libc.munmap(self.base, self.length)


def extent(tensor: Any) -> int:
    """Bytes from the first element to the last."""
    _, code, sizes, strides = tensor
    if 0 in sizes:
        return 0
    return (1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))) * ITEMSIZE[NAMES[code]]


class _FencedCore:
    """The extension, with another `attention_forward` and `update_caches`."""

    def __init__(self, place: Place) -> None:
        self.place: Place = place
        self.calls = self.updates = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(_core, name)

    def attention_forward(self, *arguments: Any, **caches: Any) -> None:
        tensors = dict(enumerate(arguments[: TENSORS.stop])) | caches
        with self._fenced(tensors, OUTPUTS) as passed:
            places = [passed[i] for i in TENSORS]
            _core.attention_forward(
                *places, *arguments[TENSORS.stop :], **{name: passed[name] for name in caches}
            )
        self.calls += 1

    def update_caches(self, tensors: tuple[Any, ...], *rest: Any) -> None:
        with self._fenced(dict(enumerate(tensors)), WRITTEN) as passed:
            _core.update_caches(tuple(passed.values()), *rest)
        self.updates += 1

    @contextmanager
    def _fenced(self, tensors: dict[Any, Any], outputs: Container[Any]) -> Iterator[dict[Any, Any]]:
        """Copies of the tensors between fences, of which `outputs` are copied back."""
        fences: dict[Any, Fence] = {}
        passed = dict(tensors)
        try:
            for name, tensor in tensors.items():
                if tensor is not None and (size := extent(tensor)):
                    fences[name] = Fence(tensor[0], size, self.place, writable=name in outputs)
                    passed[name] = (fences[name].address, *tensor[1:])
            yield passed
            for name, fence in fences.items():
                if name in outputs:
                    fence.copy_back()
        finally:
            for fence in fences.values():
                fence.close()


@contextmanager
def fenced(place: Place) -> Iterator[_FencedCore]:
    """Fence the buffers of every call inside; yields an object that counts them."""
    core = _FencedCore(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_core", core)
        yield core
