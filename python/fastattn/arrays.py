"""NumPy arrays and torch tensors, seen as strided memory: the one place that knows either library.

Everything behind this module works on `Strided`. torch is recognised through ``sys.modules``, never imported.
"""

from __future__ import annotations

import ctypes
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any  # a numpy.ndarray or a torch.Tensor

FLOATS = ("float64", "float32", "bfloat16", "float16")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

# What NumPy's array protocol calls a dtype. It has no bfloat16, so those are seen as their bits.
_TYPESTR = {"float64": "<f8", "float32": "<f4", "bfloat16": "<u2", "float16": "<f2", "bool": "|b1"}
_TYPESTR |= {name: np.dtype(name).str for name in INTEGERS}
ITEMSIZE = {dtype: int(typestr[2:]) for dtype, typestr in _TYPESTR.items()}


class Strided(NamedTuple):
    """A view of memory that `array` owns: all that a kernel needs to know of it."""

    array: Array
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    address: int

    def swap_heads_and_rows(self) -> Strided:
        """(B, H, L, D) seen as (B, L, H, D), or the other way round."""
        (b, m, n, d), (step_b, step_m, step_n, step_d) = self.shape, self.strides
        return Strided(self.array, self.dtype, (b, n, m, d), (step_b, step_n, step_m, step_d), self.address)

    def broadcast_to(self, shape: tuple[int, ...]) -> Strided | None:
        """The view broadcast by NumPy's rules, by strides of 0; None where they do not allow it."""
        missing = len(shape) - len(self.shape)
        if missing < 0:
            return None
        sizes, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        if any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
            return None
        strides = tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
        return Strided(self.array, self.dtype, shape, strides, self.address)

    def numpy(self) -> NDArray[Any]:
        """The same memory as a NumPy array, whichever library owns it (bfloat16 as its uint16 bits)."""
        view: NDArray[Any] = np.asarray(_Exported(self))
        return view

    def read(self, index: Any = ...) -> NDArray[Any]:
        """Copy the values at `index`; floats come as float64."""
        values: NDArray[Any] = self.numpy()[index]
        if self.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float64 if self.dtype in FLOATS else values.dtype)

    def write(self, index: Any, values: NDArray[np.float64]) -> None:
        """Store `values` at `index`, rounded to nearest."""
        with np.errstate(over="ignore"):
            self.numpy()[index] = _bfloat16_bits(values) if self.dtype == "bfloat16" else values


class _Exported:
    """A `Strided` under NumPy's array protocol; keeps the owner of the memory alive."""

    def __init__(self, view: Strided) -> None:
        self.owner = view.array
        self.__array_interface__ = {
            "version": 3,
            "typestr": _TYPESTR[view.dtype],
            "shape": view.shape,
            "strides": tuple(stride * ITEMSIZE[view.dtype] for stride in view.strides),
            "data": (view.address, False),
        }


def _bfloat16_bits(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    bits = values.astype(np.float32).view(np.uint32)
    half_to_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, half_to_even).astype(np.uint16)


class ArrayLibrary(Protocol):
    """What differs between NumPy and torch."""

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        """See the argument `name` as memory; raise where that would misread it, or lose what is written."""

    def readable(self, name: str, array: Array) -> Strided:
        """See a short argument as memory that Python may read at once."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        """Allocate an output of `dtype`, which is `like`'s or a dtype of NumPy, where `like` lives."""

    def as_given(self, array: Array, given: Any) -> Array:
        """`array` in the dtype of `given`; as it is where that is no array."""

    def draw_seed(self, like: Array) -> int:
        """Draw a seed for dropout, from the generator of `like`'s device where there is one."""


class _NumpyArrays:
    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        if type(array) not in (np.ndarray, np.memmap):
            raise _not_a_plain("a NumPy array", np.ndarray, name, array)
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

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        own, _ = _in_elements(like.dtype, ())  # NumPy does not know bfloat16 by name
        array = np.empty(shape, like.dtype if own == dtype else dtype)
        return Strided(array, dtype, shape, _contiguous(shape), _address(array))

    def as_given(self, array: Array, given: Any) -> Array:
        return array.astype(given.dtype, copy=False) if isinstance(given, np.ndarray) else array

    def draw_seed(self, like: Array) -> int:
        return int(np.random.default_rng().integers(2**64, dtype=np.uint64))


def _not_a_plain(kind: str, base: type, name: str, array: object) -> TypeError:
    if isinstance(array, base):  # its own rules, a MaskedArray's for one, would be lost
        return TypeError(f"{name} must be {kind} of no subclass, got {type_name(array)}")
    return TypeError(f"{name} must be {kind} like the first argument, got {type_name(array)}")


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


class _TorchTensors:
    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._strided = torch.strided
        self._forward_ad = torch.autograd.forward_ad
        self._plain = (torch.Tensor, torch.nn.Parameter)

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        self._check_kind(name, array)
        self._check_device(name, array)
        if array.requires_grad or self._forward_ad._current_level >= 0:
            self._check_no_graph(name, array, to_write)
        if array.is_neg():  # lazily negated, as the imaginary part of a conjugate: memory has the other sign
            if to_write:
                raise ValueError(f"{name} must be writable, got a lazily negated view: see resolve_neg")
            array = array.resolve_neg()
        try:
            shape, strides, address = tuple(array.shape), array.stride(), array.data_ptr()
        except RuntimeError as error:  # nested tensors, and the wrappers inside torch.func transforms
            raise RuntimeError(f"{name} is no single block of memory: {error}") from error
        if not address and array.numel():
            raise RuntimeError(f"{name} is no single block of memory: it has no storage")
        if to_write and not array.is_inference():
            # As torch's own in-place operations do: a graph that saved these values then refuses to use them.
            self._torch.autograd.graph.increment_version(array)
        return Strided(array, _torch_name(array.dtype), shape, strides, address)

    def _check_kind(self, name: str, array: Array) -> None:
        if type(array) not in self._plain:
            raise _not_a_plain("a torch tensor", self._torch.Tensor, name, array)
        if array.layout is not self._strided:
            raise TypeError(f"{name} must be a dense tensor (torch.strided), got layout {array.layout}")

    def _check_device(self, name: str, array: Array) -> None:
        if not array.is_cpu:
            got = f"{name} is on device '{array.device}'"
            raise RuntimeError(f"{got}, expected 'cpu': the GPU backend is not there yet")

    def _check_no_graph(self, name: str, array: Array, to_write: bool) -> None:
        dual = (
            self._forward_ad._current_level >= 0 and self._forward_ad.unpack_dual(array).tangent is not None
        )
        if not dual and not (array.requires_grad and self._torch.is_grad_enabled()):
            return
        if to_write:
            raise RuntimeError(f"{name} requires grad, and would be overwritten: pass {name}.detach()")
        raise RuntimeError(
            f"{name} requires grad, and this call computes no gradient of it: "
            f"call it under torch.no_grad(), or pass {name}.detach()"
        )

    def readable(self, name: str, array: Array) -> Strided:
        return self.view(name, array)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        if _torch_name(like.dtype) == dtype:
            tensor = like.new_empty(shape)
        else:
            tensor = like.new_empty(shape, dtype=getattr(self._torch, dtype))
        return Strided(tensor, dtype, shape, _contiguous(shape), tensor.data_ptr())

    def as_given(self, array: Array, given: Any) -> Array:
        return array.to(given.dtype) if isinstance(given, self._torch.Tensor) else array

    def draw_seed(self, like: Array) -> int:
        return int(self._torch.randint(2**63 - 1, (), device=like.device))


class _TorchOperands(_TorchTensors):
    """Tensors that torch itself computes on: any device, any graph. No memory is read through the view."""

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        self._check_kind(name, array)
        if to_write:
            self._check_no_graph(name, array, to_write)
        try:
            shape, strides = tuple(array.shape), array.stride()
        except RuntimeError as error:  # nested tensors
            raise RuntimeError(f"{name} is no single block of memory: {error}") from error
        try:
            address = array.data_ptr()  # only overlaps are told from it
        except RuntimeError:  # the wrappers inside torch.func transforms
            address = 0
        return Strided(array, _torch_name(array.dtype), shape, strides, address)

    def readable(self, name: str, array: Array) -> Strided:
        self._check_kind(name, array)
        if self._forward_ad._current_level >= 0:
            array = self._forward_ad.unpack_dual(array).primal
        array, functorch = array.detach().cpu(), self._torch._C._functorch
        while functorch.is_gradtrackingtensor(array):  # inside torch.func.grad, jvp and their like
            array = functorch.get_unwrapped(array)
        with self._torch.no_grad():
            return super().view(name, array)


class _TorchDescriptions(_TorchTensors):
    """Tensors of which only type, dtype and shape are there, as in a trace; sizes may be symbols."""

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        if not isinstance(array, self._torch.Tensor):
            raise _not_a_plain("a torch tensor", self._torch.Tensor, name, array)
        self._check_device(name, array)
        return Strided(array, _torch_name(array.dtype), tuple(array.shape), tuple(array.stride()), 0)


@lru_cache
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a new array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@cache
def _torch_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


NUMPY: ArrayLibrary = _NumpyArrays()
_torch_tensors = cache(_TorchTensors)
_torch_operands = cache(_TorchOperands)
torch_descriptions = cache(_TorchDescriptions)


def library_of(name: str, array: object, *, composed: bool = False) -> ArrayLibrary:
    """Tell whose array the argument `name` is; TypeError where it is neither library's.

    `composed`: no kernel reads the memory of tensors, operations of torch do.
    """
    if isinstance(array, np.ndarray):
        return NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return _torch_operands(torch) if composed else _torch_tensors(torch)
    raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type_name(array)}")


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
    known = device == "cpu" or torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device):
        return query, key, value, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(array: Array, kept: tuple[Any, ...]) -> Array:
        if not isinstance(array, torch.Tensor) or not array.is_floating_point() or array.dtype in kept:
            return array
        return array.to(dtype)

    query, key, value = (cast(array, (torch.float64,)) for array in (query, key, value))
    return query, key, value, cast(bias, (torch.float64, torch.float32))


def type_name(value: object) -> str:
    """Spell a type for a message: builtins bare, others with their module."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
