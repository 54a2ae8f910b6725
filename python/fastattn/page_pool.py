"""The memory of a paged cache, in NumPy arrays or torch tensors: written, read and moved by page numbers."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.arrays import FLOATS, Array, is_tensor, type_name
from fastattn.codes import QUANTISED, quantised
from fastattn.problem import Layout

__all__ = ["PagePool"]

_LINE, _HUGE_PAGE = 64, 1 << 21  # bytes of a cache line, and of a page where the system has huge ones


class PagePool:
    """Arrays of all layers: keys and values and, if they are quantised, their scales, without the last axis.

    Their axes are (layers, pages, rows, Hkv, dim), or with layout "bhsd" (layers, pages, Hkv, rows, dim). In
    memory pages come first, so that the pages in use, of all layers, lie together.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dims: tuple[int, int],
        dtype: Any,
        device: Any,
        layout: Layout,
    ) -> None:
        """`shape`: (layers, pages, page_size, Hkv). `dims`: of keys and of values."""
        self._library = _library_of(dtype, device)
        self.dtype = self._library.name(dtype)
        if self.dtype not in (*FLOATS, *QUANTISED):
            raise TypeError(f"dtype must be one of {', '.join((*FLOATS, *QUANTISED))}, got {self.dtype}")
        self.quantised = self.dtype in QUANTISED
        self._heads_first = layout == "bhsd"
        layers, pages, rows, heads = shape
        axes = (layers, pages, heads, rows) if self._heads_first else shape
        self.arrays: dict[str, Array] = {
            "key_cache": self._empty((*axes, dims[0]), dtype),
            "value_cache": self._empty((*axes, dims[1]), dtype),
        }
        if self.quantised:
            for name in ("key_scale", "value_scale"):
                self.arrays[name] = self._empty(axes, self._library.float32)

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(int(pool.nbytes) for pool in self.arrays.values())

    def layers(self) -> list[dict[str, Array]]:
        """Views of the arrays, of each layer."""
        count = len(self.arrays["key_cache"])
        return [{name: pool[layer] for name, pool in self.arrays.items()} for layer in range(count)]

    def _empty(self, axes: tuple[int, ...], dtype: Any) -> Array:
        layers, pages, *rest = axes
        return self._library.empty((pages, layers, *rest), dtype).swapaxes(0, 1)

    def integers(self, values: NDArray[np.int32]) -> Array:
        """`values` as an array beside the pool."""
        return self._library.integers(values)

    def copy(self, old: list[int], new: list[int]) -> None:
        """Copy pages, in every layer."""
        for pool in self.arrays.values():
            pool[:, new] = pool[:, old]

    def contents(self, pages: NDArray[np.int32]) -> dict[str, Array]:
        """Return copies of pages, in every layer."""
        numbers = self._library.integers(pages)
        return {name: self._storable(pool)[:, numbers] for name, pool in self.arrays.items()}

    def restore(self, pages: NDArray[np.int32], contents: dict[str, Array]) -> None:
        """Write what `contents` returned of these pages."""
        numbers = self._library.integers(pages)
        for name, pool in self.arrays.items():
            self._storable(pool)[:, numbers] = contents[name]

    def _storable(self, pool: Array) -> Array:
        """View 8-bit numbers as bytes: pickle knows no float8 of torch."""
        return pool.view(self._library.functions.uint8) if pool.itemsize == 1 else pool

    def reorder(self, old: NDArray[np.int32]) -> None:
        """Let page ``old[i]`` become page ``i``; one layer at a time is held twice.

        The largest comes first: where there is no memory for it, nothing has moved.
        """
        numbers = self._library.integers(old)
        for pool in sorted(self.arrays.values(), key=lambda pool: -int(pool.nbytes)):
            for layer in pool:
                layer[: len(old)] = layer[numbers]

    def grow(self, num_pages: int) -> None:
        """Move to memory for so many pages; where there is none, all arrays have as many as before."""
        before = self.arrays["key_cache"].shape[1]
        try:
            for name, pool in self.arrays.items():
                larger = self._empty((pool.shape[0], num_pages, *pool.shape[2:]), pool.dtype)
                larger[:, :before] = pool
                self.arrays[name] = larger
        except BaseException:
            self.arrays = {name: pool[:, :before] for name, pool in self.arrays.items()}
            raise

    def write(self, name: str, layer: int, pages: NDArray[Any], rows: NDArray[Any], given: Array) -> None:
        """Store `given`, in the axes of a call, as the tokens at (pages, rows), each (B, n).

        `name` is key or value.
        """
        given = given.swapaxes(1, 2) if self._heads_first else given  # (B, n, Hkv, dim)
        index = self._index(pages, rows)
        if self.quantised:
            given, scale = self._quantised(given)
            self.arrays[f"{name}_scale"][layer][index] = scale
        self.arrays[f"{name}_cache"][layer][index] = given

    def read(self, name: str, layer: int, pages: NDArray[Any], rows: NDArray[Any]) -> Array:
        """Return a copy of the tokens at (pages, rows), each (n,), as (n, Hkv, dim) or (Hkv, n, dim)."""
        index = self._index(pages, rows)
        found = self.arrays[f"{name}_cache"][layer][index]
        if self.quantised:
            scale = self.arrays[f"{name}_scale"][layer][index]
            found = self._library.cast(found, self._library.float32) * scale[..., None]
        return found.swapaxes(0, 1) if self._heads_first else found

    def check(self, name: str, given: Array, shape: tuple[int, int], like: str) -> None:
        """Raise unless `given` can be written as (batch, tokens) = `shape` of the pool called `like`."""
        self._library.check(name, given)
        heads, dim = (self.arrays[like].shape[axis] for axis in (2 if self._heads_first else 3, 4))
        batch, tokens = shape
        expected = (batch, heads, tokens, dim) if self._heads_first else (batch, tokens, heads, dim)
        if tuple(given.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(given.shape)}")
        dtype = self._library.name(given.dtype)
        if dtype not in (FLOATS if self.quantised else (self.dtype,)):
            expected_dtype = "a float dtype" if self.quantised else f"the dtype of the cache, {self.dtype}"
            raise TypeError(f"{name} must have {expected_dtype}, got {dtype}")

    def _index(self, pages: NDArray[Any], rows: NDArray[Any]) -> tuple[Any, ...]:
        """Where (pages, rows) are in the pool of a layer; the axes that are left follow."""
        at = self._library.integers(pages), self._library.integers(rows)
        return (at[0], slice(None), at[1]) if self._heads_first else at

    def _quantised(self, given: Array) -> tuple[Array, Array]:
        """(codes, scales), as `attention_with_kvcache` stores rows."""
        given = self._library.cast(given, self._library.float32)
        codes, scale = quantised(self._library.functions, given, self.dtype)
        return self._library.cast(codes, self.arrays["key_cache"].dtype), scale


class _Numpy:
    """What differs between the libraries: NumPy's side."""

    functions: Any = np
    float32: Any = np.float32

    def name(self, dtype: Any) -> str:
        return str(_numpy_dtype(dtype).name)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        known = _numpy_dtype(dtype)
        return _memory(math.prod(shape) * known.itemsize).view(known).reshape(shape)

    def integers(self, values: NDArray[Any]) -> Array:
        return values

    def cast(self, array: Array, dtype: Any) -> Array:
        return array.astype(dtype, copy=False)

    def check(self, name: str, array: Any) -> None:
        if type(array) not in (np.ndarray, np.memmap):
            raise TypeError(f"{name} must be a NumPy array, as the cache is, got {type_name(array)}")


class _Torch:
    """Torch's side. The pool is no tensor of inference mode: it may be written outside of it, too."""

    def __init__(self, device: Any) -> None:
        self.functions: Any = sys.modules["torch"]
        self.float32 = self.functions.float32
        with self.functions.inference_mode(False):
            self.device = self.functions.empty(0, device=device).device  # with its index

    def name(self, dtype: Any) -> str:
        return str(dtype).removeprefix("torch.")

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        torch = self.functions
        with torch.inference_mode(False):
            if self.device.type != "cpu":
                return torch.empty(shape, dtype=dtype, device=self.device)
            return torch.from_numpy(_memory(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)

    def integers(self, values: NDArray[Any]) -> Array:
        return self.functions.from_numpy(values).to(self.device)

    def cast(self, array: Array, dtype: Any) -> Array:
        return array.to(dtype)

    def check(self, name: str, array: Any) -> None:
        if not is_tensor(array):
            raise TypeError(f"{name} must be a torch tensor, as the cache is, got {type_name(array)}")
        if array.device != self.device:
            raise RuntimeError(f"{name} is on device '{array.device}', expected '{self.device}'")
        if array.requires_grad and self.functions.is_grad_enabled():
            raise RuntimeError(f"{name} requires grad, and a cache keeps no graph: pass {name}.detach()")


def _memory(nbytes: int) -> NDArray[np.uint8]:
    """Memory of the CPU, which begins with a line, or a huge page: NumPy asks for those, torch does not."""
    boundary = _HUGE_PAGE if nbytes >= _HUGE_PAGE else _LINE
    memory = np.empty(nbytes + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    return memory[start : start + nbytes]


def _library_of(dtype: Any, device: Any) -> Any:
    if type(dtype).__module__ == "torch":
        return _Torch(device)
    if device is not None:
        raise TypeError(f"device: a cache of tensors needs a torch.dtype, got dtype {dtype!r}")
    return _Numpy()


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    try:
        if dtype is not None:  # which NumPy takes for float64
            known: np.dtype[Any] = np.dtype(dtype)
            return known
    except TypeError:
        pass
    hint = "import ml_dtypes for NumPy to know bfloat16 and float8"
    raise TypeError(f"dtype must be a dtype, got {dtype!r} ({hint})")
