"""NumPy arrays and torch tensors: whose an argument is, and what torch is about to do with it.

Everything behind this module works on `Strided`. torch is recognised through ``sys.modules``, never imported.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn import tensors
from fastattn.strided import (
    FLOATS,
    INTEGERS,
    ITEMSIZE,
    Array,
    ArrayLibrary,
    Strided,
    contiguous,
    not_a_plain,
    type_name,
)

__all__ = [
    "FLOATS",
    "INTEGERS",
    "ITEMSIZE",
    "NUMPY",
    "Array",
    "ArrayLibrary",
    "Strided",
    "as_autocast",
    "in_dtype_of",
    "is_inlined",
    "is_tensor",
    "is_traced",
    "library_of",
    "type_name",
    "without_graph",
]


class _NumpyArrays:
    on_host = True

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        if type(array) not in (np.ndarray, np.memmap):
            raise not_a_plain("a NumPy array", np.ndarray, name, array)
        dtype, strides = _in_elements(array.dtype, array.strides)
        if not dtype:
            raise TypeError(f"{name} must be in the machine's byte order, got dtype {array.dtype.str!r}")
        if to_write and not array.flags.writeable:
            raise ValueError(f"{name} must be writable, got a read-only array")
        if strides is None and to_write:
            got = f"{array.strides} bytes for items of {array.itemsize}"
            raise ValueError(f"{name} must have non-negative strides of whole items, got {got}")
        if strides is None:
            return self.view(name, _with_plain_strides(array))
        return Strided(array, dtype, array.shape, strides, _address(array))

    readable = view

    def keeps(self, array: Array) -> bool:
        return False

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        own, _ = _in_elements(like.dtype, ())  # NumPy does not know bfloat16 by name
        array = np.empty(shape, like.dtype if own == dtype else dtype)
        return Strided(array, dtype, shape, contiguous(shape), _address(array))

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        view = self.empty(shape, dtype, like)
        view.array.fill(0)
        return view

    def draw_seed(self, like: Array) -> int:
        return int(np.random.default_rng().integers(2**64, dtype=np.uint64))


@lru_cache  # NumPy takes microseconds to spell the name of a dtype
def _in_elements(dtype: np.dtype[Any], strides: tuple[int, ...]) -> tuple[str, tuple[int, ...] | None]:
    """Name a dtype ("" in a foreign byte order), and count strides in elements (None if they cannot)."""
    name, itemsize = dtype.name if dtype.isnative else "", dtype.itemsize or 1
    if any(stride < 0 or stride % itemsize for stride in strides):
        return name, None
    return name, tuple(stride // itemsize for stride in strides)


class _ArrayStruct(ctypes.Structure):
    """PyArrayInterface: what ``__array_struct__`` points to."""

    _fields_ = (
        ("two", ctypes.c_int),
        ("nd", ctypes.c_int),
        ("typekind", ctypes.c_char),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("descr", ctypes.c_void_p),
    )


_get_struct = ctypes.PYFUNCTYPE(ctypes.POINTER(_ArrayStruct), ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _address(array: NDArray[Any]) -> int:
    """``array.ctypes.data`` in a third of the time; calls on few tokens take microseconds."""
    return _get_struct(array.__array_struct__, None).contents.data or 0


def _with_plain_strides(array: NDArray[Any]) -> NDArray[Any]:
    """Copy an array; its broadcast axes stay broadcast, so the copy is never larger than what it shows."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)
    # Not ascontiguousarray: it keeps the strides of an axis that has no second element.
    return np.broadcast_to(array[once].copy(), array.shape)


NUMPY: ArrayLibrary = _NumpyArrays()


def library_of(name: str, array: Any, *, composed: bool = False) -> ArrayLibrary:
    """Tell whose array the argument `name` is; TypeError where it is neither library's.

    `composed`: no kernel reads the memory of tensors, operations of torch do.
    """
    if isinstance(array, np.ndarray):
        return NUMPY
    if not is_tensor(array):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type_name(array)}")
    torch = sys.modules["torch"]
    if composed:
        return tensors.operands(torch)
    if array.is_cpu:
        return tensors.on_host(torch)
    if array.is_cuda:
        return tensors.on_device(torch, array.device)
    raise RuntimeError(
        f"{name} is on device '{array.device}', expected 'cpu' or 'cuda': "
        "backend='math' takes tensors of any device"
    )


def in_dtype_of(given: Any, array: Array) -> Array:
    """`array` in the dtype of `given`, and on its device; as it is where that is no array."""
    if is_tensor(given):
        return array.to(given.device, given.dtype)
    return array.astype(given.dtype, copy=False) if isinstance(given, np.ndarray) else array


def is_tensor(array: object) -> bool:
    """Whether `array` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def is_traced() -> bool:
    """Whether torch is compiling or exporting the caller: cheap, and what any trace is asked first."""
    torch = sys.modules.get("torch")
    compiler = getattr(torch, "compiler", None)  # None: absent, or still loading
    return compiler is not None and bool(compiler.is_compiling())


def is_inlined() -> bool:
    """Whether a compiler reads the caller's code rather than runs it."""
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    return compiler is not None and bool(compiler.is_dynamo_compiling())


def without_graph() -> AbstractContextManager[Any]:
    """``torch.no_grad()``, if torch is loaded: tensors that require grad may be looked at in it."""
    no_grad = getattr(sys.modules.get("torch"), "no_grad", nullcontext)
    context: AbstractContextManager[Any] = no_grad()
    return context


def as_autocast(query: Array, key: Array, value: Array, bias: Array | None) -> tuple[Any, ...]:
    """Cast tensors as ``torch.autocast`` casts those of torch's attention; a float32 bias stays one."""
    torch = sys.modules["torch"]
    device = query.device.type
    # The two that kernels run on: to ask torch whether a device has autocast ends a trace of torch 2.11.
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return query, key, value, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(array: Array, kept: tuple[Any, ...]) -> Array:
        if not isinstance(array, torch.Tensor) or not array.is_floating_point() or array.dtype in kept:
            return array
        return array.to(dtype)

    query, key, value = (cast(array, (torch.float64,)) for array in (query, key, value))
    return query, key, value, cast(bias, (torch.float64, torch.float32))
