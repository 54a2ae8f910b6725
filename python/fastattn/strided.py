"""Memory with strides, which is all that is left of an array or a tensor behind `fastattn.arrays`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn.codes import FLOAT8, decode, encode

Array: TypeAlias = Any  # a numpy.ndarray or a torch.Tensor

FLOATS = ("float64", "float32", "bfloat16", "float16")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

# What NumPy's array protocol calls a dtype. It has no bfloat16 and no float8: those are seen as their bits.
_TYPESTR = {"float64": "<f8", "float32": "<f4", "bfloat16": "<u2", "float16": "<f2", "bool": "|b1"}
_TYPESTR |= dict.fromkeys(FLOAT8, "|u1")
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
        """The same memory as a NumPy array, whichever library owns it (bfloat16 and float8 as their bits)."""
        view: NDArray[Any] = np.asarray(_Exported(self))
        return view

    def read(self, index: Any = ...) -> NDArray[Any]:
        """Copy the values at `index`; floats come as float64."""
        values: NDArray[Any] = self.numpy()[index]
        if self.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if self.dtype in FLOAT8:
            return decode(values, self.dtype).astype(np.float64)
        return values.astype(np.float64 if self.dtype in FLOATS else values.dtype)

    def write(self, index: Any, values: NDArray[Any]) -> None:
        """Store `values` at `index`, floats rounded to nearest."""
        with np.errstate(over="ignore"):
            if self.dtype in FLOAT8:
                self.numpy()[index] = encode(values, self.dtype)
                return
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

    on_host: bool  # whether the memory of a view is the CPU's

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        """See the argument `name` as memory; raise where that would misread it, or lose what is written."""

    def readable(self, name: str, array: Array) -> Strided:
        """See a short argument as memory that Python may read at once."""

    def keeps(self, array: Array) -> bool:
        """Whether a short argument stays where it is: reading it would wait for a device."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        """Allocate an output of `dtype`, which is `like`'s or a dtype of NumPy, where `like` lives."""

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        """The same, filled with zeros."""

    def draw_seed(self, like: Array) -> Any:
        """Draw a seed for dropout, from the generator of `like`'s device where there is one."""


@lru_cache
def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a new array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def not_on(device: object, name: str, array: Array) -> RuntimeError:
    """The error of a tensor that is somewhere else."""
    return RuntimeError(
        f"{name} is on device '{array.device}', expected '{device}': the tensors of a call are on one device"
    )


def not_a_plain(kind: str, base: type, name: str, array: object) -> TypeError:
    """The error of an argument that is not of the library of the first, or is of a subclass."""
    if isinstance(array, base):  # its own rules, a MaskedArray's for one, would be lost
        return TypeError(f"{name} must be {kind} of no subclass, got {type_name(array)}")
    return TypeError(f"{name} must be {kind} like the first argument, got {type_name(array)}")


def type_name(value: object) -> str:
    """Spell a type for a message: builtins bare, others with their module."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
