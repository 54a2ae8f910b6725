"""Strides and addresses of every kind, memory that ends where an array ends, and sizes past 2^31 elements."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bounds
import fastattn as fa
from kernels import KERNELS, Kernel, assert_same_bits
from shapes import Case, convert

Array = np.ndarray
SQUARE = Case("square", 45, 45, 24, batch=2, query_heads=2)
FEW = Case("few", 3, 70, 40, 24, batch=2, query_heads=4, kv_heads=2)
BLOCKS = Case("blocks", 40, 530, 24, 40, query_heads=2, kv_heads=1)
CASES = pytest.mark.parametrize("case", [SQUARE, FEW, BLOCKS], ids=str)


def within(array: Array, before: int, after: int, step: int = 1) -> Array:
    """Laid inside a larger array, every axis but the first with elements around it and between."""
    shape = [(before + after + size * step) for size in array.shape[1:]]
    memory = np.full((len(array), *shape), np.nan).astype(array.dtype)
    view = memory[(slice(None), *(slice(before, before + size * step, step) for size in array.shape[1:]))]
    view[...] = array
    return view


def transposed(array: Array) -> Array:
    """The last axis strided, the first one contiguous."""
    return array.transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0)


def unaligned(array: Array) -> Array:
    """At an odd address."""
    memory = np.empty(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert array.itemsize == 1 or view.ctypes.data % 2 == 1
    return view


def reversed_in_memory(array: Array) -> Array:
    """Negative strides along every axis."""
    return array[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]


VIEWS: dict[str, Callable[[Array], Array]] = {
    "offset": lambda array: within(array, 3, 2),
    "every second": lambda array: within(array, 1, 0, 2),
    "transposed": transposed,
    "rows and dims swapped": lambda array: array.swapaxes(2, 3).copy().swapaxes(2, 3),
    "heads inside": lambda array: array.swapaxes(1, 2).copy().swapaxes(1, 2),
    "unaligned": unaligned,
    "negative": reversed_in_memory,
}


@CASES
@pytest.mark.parametrize("view", VIEWS)
class TestStrides:
    def test_of_inputs(self, kernel: Kernel, case: Case, view: str) -> None:
        tensors = bounds.draw(case, kernel.dtype)
        expected = fa.attention(*tensors, causal=True, return_lse=True)
        strided = [VIEWS[view](x) for x in tensors]
        assert_same_bits(fa.attention(*strided, causal=True, return_lse=True), expected)
        for i in range(3):  # one alone, so that no two share a way in
            mixed = [strided[j] if i == j else tensors[j] for j in range(3)]
            assert_same_bits(fa.attention(*mixed, causal=True, return_lse=True), expected)

    def test_of_mask_and_bias(self, kernel: Kernel, case: Case, view: str, rng: np.random.Generator) -> None:
        tensors = bounds.draw(case, kernel.dtype)
        mask = rng.random(case.scores_shape) < 0.7
        bias = convert(rng.standard_normal(case.scores_shape), kernel.dtype)
        expected = fa.attention(*tensors, mask=mask, bias=bias)
        strided = {"mask": VIEWS[view](mask), "bias": VIEWS[view](bias)}
        assert_same_bits(fa.attention(*tensors, **strided), expected)


@CASES
@pytest.mark.parametrize("view", [name for name in VIEWS if name != "negative"])
def test_strides_of_out(kernel: Kernel, case: Case, view: str) -> None:
    """Written where it lies, and nothing around it. Negative strides are refused."""
    tensors = bounds.draw(case, kernel.dtype)
    expected = fa.attention(*tensors)
    out = VIEWS[view](np.zeros_like(expected))
    base = out
    while isinstance(base.base, np.ndarray):
        base = base.base
    before = base.copy()
    fa.attention(*tensors, out=out)
    assert_same_bits(np.ascontiguousarray(out), expected)
    out[...] = 0
    np.testing.assert_array_equal(base.view(np.uint8), before.view(np.uint8))


@CASES
def test_expanded_axes(kernel: Kernel, case: Case) -> None:
    """Strides of 0 on any axis of any input, against the copy that they stand for."""
    tensors = bounds.draw(case, kernel.dtype)
    for axis in range(4):
        views = [np.broadcast_to(x.take([0], axis=axis), x.shape) for x in tensors]
        copies = [view.copy() for view in views]
        expected = fa.attention(*copies, return_lse=True)
        assert_same_bits(fa.attention(*views, return_lse=True), expected)
        assert_same_bits(fa.attention(copies[0], views[1], copies[2], return_lse=True), expected)


@pytest.mark.parametrize("shape", [(1, 1, 3, 8), (0, 2, 3, 8), (1, 2, 0, 8)], ids=str)
def test_reversed_axes_of_no_length(shape: tuple[int, ...]) -> None:
    """NumPy calls an array contiguous whatever the strides of axes without a second element."""
    whole = np.ones((2, 2, 3, 8), np.float32)
    cut = tuple(slice(size) for size in shape)
    expected = fa.attention(*(whole[cut] for _ in range(3)))
    for axis in range(4):
        view = np.flip(whole, axis)[cut]
        assert view.strides[axis] < 0
        assert_same_bits(fa.attention(view, view, view), expected)


def test_torch_views(kernel: Kernel) -> None:
    """A fused projection cut in three, heads still inside rows."""
    rows, heads, dim = 50, 3, 16
    fused = torch.randn(2, rows, 3 * heads * dim, generator=torch.Generator().manual_seed(0))
    fused = fused.to(getattr(torch, kernel.dtype))
    parts = [part.view(2, rows, heads, dim) for part in fused.chunk(3, dim=-1)]
    assert not parts[0].is_contiguous()
    expected = fa.attention(*(part.contiguous() for part in parts), layout="bshd", causal=True)
    assert_same_bits(fa.attention(*parts, layout="bshd", causal=True), expected)
    swapped = fa.attention(*(part.transpose(1, 2) for part in parts), causal=True)
    assert_same_bits(swapped.transpose(1, 2), expected)


GUARDED = """
    import ctypes, mmap, sys
    import numpy as np
    import fastattn as fa
    import bounds
    from kernels import KERNELS
    from shapes import Case, convert

    libc = ctypes.CDLL(None, use_errno=True)
    keep = []

    def at_the_end(array):
        '''A copy that ends at the last byte before a page that must not be touched.'''
        array = np.ascontiguousarray(array)
        pages = -(-array.nbytes // mmap.PAGESIZE) + 2
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        keep.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (0, pages - 1):
            assert not libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0)
        flat = np.frombuffer(memory, np.uint8)[(pages - 1) * mmap.PAGESIZE - array.nbytes :][: array.nbytes]
        view = flat.view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    def at_the_start(array):
        '''A copy whose first byte follows such a page.'''
        array = np.ascontiguousarray(array)
        end = at_the_end(np.zeros(-(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, np.uint8))
        view = end[: array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    SIZES = [(1, 1, 1, 1), (1, 5, 3, 3), (3, 70, 40, 24), (45, 45, 7, 5), (33, 257, 64, 33), (70, 99, 17, 65)]
    rng = np.random.default_rng(0)
    for place in (at_the_end, at_the_start):
        for kernel in KERNELS:
            with kernel.forced():
                for rows, keys, dim, value_dim in SIZES:
                    case = Case("guarded", rows, keys, dim, value_dim, query_heads=2, kv_heads=1)
                    tensors = bounds.draw(case, kernel.dtype)
                    mask = rng.random((rows, keys)) < 0.7
                    bias = convert(rng.standard_normal((2, rows, keys)), kernel.dtype)
                    out = place(np.zeros((1, 2, rows, value_dim), tensors[0].dtype))
                    placed = [place(x) for x in tensors]
                    expected = fa.attention(*tensors, mask=mask, bias=bias)
                    fa.attention(*placed, mask=place(mask), bias=place(bias), out=out)
                    assert out.tobytes() == expected.tobytes(), (kernel, case)
                    fa.attention(*placed, causal=True, out=out)
                    assert out.tobytes() == fa.attention(*tensors, causal=True).tobytes(), (kernel, case)
    print("untouched")
"""


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")
def test_no_byte_past_the_arrays_is_touched() -> None:
    """Every kernel on arrays at the edge of mapped memory, where a stray access ends the process."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r})\n" + textwrap.dedent(GUARDED)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "untouched", done.stderr[-2000:]


def far_apart(array: Array, step: int) -> Array:
    """Heads `step` elements apart, in address space that no page stands behind until it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, (step + array.size) * array.itemsize, flags=flags)
    strides = (0, step * array.itemsize, *array.strides[2:])
    view = np.lib.stride_tricks.as_strided(np.frombuffer(memory, array.dtype), array.shape, strides)
    view[...] = array
    return view


@pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if kernel.isa != "scalar"], ids=str, indirect=True
)
class TestPast31Bits:
    """More than 2^31 elements, by strides of 0 or in memory that is never touched."""

    def test_heads_far_apart(self, kernel: Kernel) -> None:
        small = bounds.draw(Case("far", 9, 9, 8, query_heads=2), kernel.dtype)
        far = [far_apart(x, 2**31) for x in small]
        assert_same_bits(fa.attention(*far, causal=True), fa.attention(*small, causal=True))

    def test_keys(self, kernel: Kernel) -> None:
        """One key, seen 2^25 times, of which a window or a length leaves five."""
        query, key, value = bounds.draw(Case("far", 1, 1, 128), kernel.dtype)
        count = 2**25
        keys, values = (np.broadcast_to(x, (1, 1, count, 128)) for x in (key, value))
        assert keys.size > 2**31
        five = fa.attention(query, keys[:, :, :5], values[:, :, :5], return_lse=True)
        cut = fa.attention(query, keys, values, kv_lengths=[5], return_lse=True)
        assert_same_bits(cut, five)
        expected = bounds.expect(query, keys[:, :, :5], values[:, :, :5])
        for offset in (2, count // 2, count - 3):
            seen = fa.attention(query, keys, values, window=(2, 2), query_offset=offset, return_lse=True)
            out, lse = map(bounds.as_float64, seen)
            assert (abs(out - expected.out) <= bounds.allowed(kernel, expected)).all()
            assert (abs(lse - expected.lse) <= bounds.allowed_lse(kernel, expected)).all()

    def test_mask_and_bias(self, kernel: Kernel) -> None:
        """(1, 1, 2^16, 2^16) scores, all but a band of which is dead."""
        length = 2**16
        query = np.broadcast_to(bounds.draw(Case("far", 1, 1, 8), kernel.dtype)[0], (1, 1, length, 8))
        case = Case("far", 1, length, 8)
        _, key, value = bounds.draw(case, kernel.dtype)
        mask = np.broadcast_to(np.arange(length) % 2 == 0, (length, length))
        bias = convert(np.arange(length) % 3 / 4.0, "float32")
        options = {"window": (2, 0), "mask": mask, "bias": np.broadcast_to(bias, (length, length))}
        out = fa.attention(query, key, value, **options)
        tail = slice(length - 40, length)
        expected = bounds.expect(
            query[:, :, tail],
            key[:, :, tail],
            value[:, :, tail],
            window=(2, 0),
            mask=mask[tail, tail],
            bias=bias[tail],
        )
        error = abs(out[:, :, tail].astype(float) - expected.out)[:, :, 2:]
        assert (error <= bounds.allowed(kernel, expected)[:, :, 2:]).all()
