"""Triton's interpreter, mended: what it gets wrong in 3.6.0 and 3.9.0 with bfloat16, NaN and new NumPys.

Left alone, the interpreter keeps bfloat16 numbers as uint16: a product of two such tiles multiplies bit
patterns, a sum adds them, and a conversion from float32 cuts digits off instead of rounding. Here a tile of
bfloat16 is an array of `ml_dtypes.bfloat16`, and NumPy does the rest.

`mend()` has to come before a kernel runs, and TRITON_INTERPRET=1 must be in the environment before triton is
imported.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class NoDevice(DriverBase):
    """Stands where Triton looks for a GPU: says what to compile for, and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise RuntimeError("there is no device to time a kernel on")


def use_target(target: GPUTarget) -> None:
    triton.runtime.driver.set_active(NoDevice(target))


def mend() -> None:
    """Replace what is wrong, in this process."""
    np.seterr(all="ignore")  # as silent about infinities as a GPU
    _mend_types()
    _mend_memory()
    _mend_products()
    _mend_nan()
    _mend_loops()
    _patch_once()
    # What a device looks for in debugging alone.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _mend_types() -> None:
    plain_type, plain_conversion = interpreter._get_np_dtype, InterpreterBuilder.create_fp_to_fp

    def numpy_type(dtype: Any) -> np.dtype:
        return BFLOAT16 if dtype.scalar == tl.bfloat16 else plain_type(dtype)

    def convert(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
        return TensorHandle(source.data.astype(numpy_type(dtype)), dtype.scalar)

    def convert_float(self: Any, source: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
        if tl.bfloat16 in (source.dtype.scalar, dtype.scalar):
            return convert(self, source, dtype)
        return plain_conversion(self, source, dtype, rounding)

    interpreter._get_np_dtype = numpy_type
    InterpreterBuilder.cast_impl = convert
    InterpreterBuilder.create_fp_to_fp = convert_float
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(np.array([value], BFLOAT16), tl.bfloat16)


def _mend_memory() -> None:
    """What reads and writes memory knows NumPy's own types alone."""
    plain_load, plain_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def load(self: Any, places: TensorHandle, mask: TensorHandle, other: Any, *how: Any, **more: Any) -> Any:
        if places.get_element_ty() != tl.bfloat16:
            return plain_load(self, places, mask, other, *how, **more)
        words = TensorHandle(places.data, tl.pointer_type(tl.uint16))
        if other is not None:
            other = TensorHandle(other.data.view(np.uint16), tl.uint16)
        loaded = plain_load(self, words, mask, other, *how, **more)
        return TensorHandle(loaded.data.view(BFLOAT16), tl.bfloat16)

    def store(self: Any, places: TensorHandle, value: TensorHandle, *how: Any, **more: Any) -> Any:
        if value.data.dtype == BFLOAT16:
            value = TensorHandle(value.data.view(np.uint16), tl.uint16)
        return plain_store(self, places, value, *how, **more)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def _mend_products() -> None:
    """Products of 16-bit tiles are exact in float32, and summed there."""
    plain = InterpreterBuilder.create_dot

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: Any, imprecise: Any
    ) -> TensorHandle:
        if a.data.itemsize == b.data.itemsize == 2:
            a, b = (TensorHandle(tile.data.astype(np.float32), tl.float32) for tile in (a, b))
        return plain(self, a, b, c, precision, imprecise)

    InterpreterBuilder.create_dot = create_dot


def _mend_nan() -> None:
    """Of a number and NaN, `tl.maximum` and `tl.minimum` take the number unless asked otherwise."""
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _mend_loops() -> None:
    """A scalar is an array of one element, which NumPy 2.4 does not convert to the bound of a loop."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _patch_once() -> None:
    """Keep the kernel's patch of the language for the functions that it calls.

    Left alone, each of them patches it anew, which takes a third of the time.
    """
    plain = interpreter._patch_lang
    patched: set[Any] = set()

    class Scope(interpreter._LangPatchScope):
        def __init__(self, inner: Any, languages: set[Any]) -> None:
            self.inner, self.languages = inner, languages

        def restore(self) -> None:
            self.inner.restore()
            patched.difference_update(self.languages)

    def patch(function: Any) -> Any:
        modules = {value for value in function.__globals__.values() if inspect.ismodule(value)}
        languages = (modules & {tl, tl.core}) - patched
        if not languages:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return Scope(plain(function), languages)

    interpreter._patch_lang = patch
