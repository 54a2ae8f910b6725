"""What a call over caches leaves alone: other memory, other sequences, the bits of threads; how it ages."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import bounds
import fastattn as fa
from caches import LARGEST, Setting, as_numpy, make
from fences import NONE, PAGE, READ, WRITE, Place, _libc, fenced
from kernels import Kernel, assert_same_bits, bits
from processes import output_of
from shapes import convert

CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")


def twice(setting: Setting, rng: np.random.Generator) -> tuple[Any, Any]:
    """The same call two times, each with arrays of its own."""
    state = rng.bit_generator.state
    first, _ = make(setting, rng)
    rng.bit_generator.state = state
    return first, make(setting, rng)[0]


@pytest.mark.parametrize("place", ["end", "start"])
@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("cache_dtype", ["", "int8", "float8_e5m2"])
@pytest.mark.parametrize("rotary", ["", "interleaved"])
def test_between_fences(
    kernel: Kernel, place: Place, page_size: int, cache_dtype: str, rotary: str, rng: np.random.Generator
) -> None:
    call, fencedcall = twice(Setting(kernel.dtype, cache_dtype, page_size, rotary=rotary), rng)
    expected = call.run(fa.attention_with_kvcache, backend="cpu")
    with fenced(place) as core:
        out = fencedcall.run(fa.attention_with_kvcache, backend="cpu")
    assert (core.calls, core.updates) == (1, 1)
    assert_same_bits(as_numpy(out), as_numpy(expected))
    for name in CACHES:
        if name in call.arrays:
            assert_same_bits(as_numpy(fencedcall.arrays[name]), as_numpy(call.arrays[name]))


def test_pages_that_are_not_used_are_not_touched(kernel: Kernel, rng: np.random.Generator) -> None:
    """A page of the cache is one of the machine's, and may be accessed only if a length reaches it."""
    itemsize = convert(np.zeros(1), kernel.dtype).itemsize
    page_size, pages, slots = PAGE // (32 * itemsize), 9, 4
    lengths = np.array([0, page_size - 1, 2 * page_size])
    table = np.array([[8, -1, 99, 3], [1, 2, 3, 2**30], [5, 0, 7, -9]])
    used = {8, 1, 5, 0, 7}
    query = convert(rng.standard_normal((3, 1, 1, 32)), kernel.dtype)
    new = convert(rng.standard_normal((2, 3, 1, 1, 32)), kernel.dtype)
    spans = [_libc.mmap(None, pages * PAGE, READ | WRITE, 0x22, -1, 0) for _ in range(2)]
    try:
        caches = [
            np.frombuffer((ctypes.c_byte * (pages * PAGE)).from_address(span), query.dtype) for span in spans
        ]
        caches = [cache.reshape(pages, page_size, 1, 32) for cache in caches]
        for span in spans:
            for page in set(range(pages)) - used:
                assert _libc.mprotect(span + page * PAGE, PAGE, NONE) == 0
        for backend in None, "cpu":  # the short way and the long one
            out = fa.attention_with_kvcache(
                *(query, *caches),
                new_key=new[0],
                new_value=new[1],
                cache_seqlens=lengths,
                block_table=table,
                backend=backend,
            )
        assert slots == table.shape[1] and np.isfinite(as_numpy(out)).all()
        assert_same_bits(np.array(caches[0][7, 0]), new[0][2, 0])
    finally:
        for span in spans:
            _libc.munmap(span, pages * PAGE)


@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("cache_dtype", ["", "int8"])
def test_a_sequence_does_not_see_its_neighbours(
    kernel: Kernel, page_size: int, cache_dtype: str, rng: np.random.Generator
) -> None:
    """Bits stay when others join, leave, or grow from 9 to 10 tokens."""
    lengths = (30, 9, 1)
    setting = Setting(kernel.dtype, cache_dtype, page_size, added=1, seqlen_q=1, lengths=lengths)
    call, other = twice(setting, rng)
    out, lse = call.run(fa.attention_with_kvcache, return_lse=True)
    longer = other.arrays | {"cache_seqlens": np.array([30, 10, 1])}
    if page_size:
        longer["block_table"] = np.where(longer["block_table"] < 0, 0, longer["block_table"])
    grown, grown_lse = fa.attention_with_kvcache(**longer, return_lse=True, **other.options)
    assert_same_bits((out[::2], lse[::2]), (grown[::2], grown_lse[::2]))
    for b in range(3):
        one = {
            name: array[b : b + 1]
            for name, array in call.arrays.items()
            if name not in CACHES or not page_size
        }
        caches = {name: call.arrays[name] for name in CACHES if page_size and name in call.arrays}
        alone = fa.attention_with_kvcache(**one, **caches, return_lse=True, **call.options)
        assert_same_bits(alone, (out[b : b + 1], lse[b : b + 1]))


@pytest.mark.parametrize("cache_dtype", ["", "float8_e5m2"])
def test_threads_change_no_bit(
    kernel: Kernel, cache_dtype: str, rng: np.random.Generator, environment: Any
) -> None:
    """An append that is shared among threads, keys turned on the way."""
    rows, dim = 700, 64
    query, key, value = (convert(rng.standard_normal((2, rows, 2, dim)), kernel.dtype) for _ in range(3))
    angles = rng.uniform(0, 6, (rows, dim // 2)).astype(np.float32)
    tables = {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}
    results = []
    for threads in 1, 3:
        fa.set_num_threads(threads)
        caches: dict[str, Any] = {}
        for name in "key", "value":
            shape = (2, rows, 2, dim)
            if cache_dtype:
                import ml_dtypes

                caches[f"{name}_cache"] = np.zeros(shape, ml_dtypes.float8_e5m2)
                caches[f"{name}_scale"] = np.zeros(shape[:3], np.float32)
            else:
                caches[f"{name}_cache"] = convert(np.zeros(shape), kernel.dtype)
        # Few queries: it is the append that threads share.
        short = query[:, -2:]
        out = fa.attention_with_kvcache(short, **caches, new_key=key, new_value=value, **tables)
        results.append((out, *(array.view(np.uint8) for array in caches.values())))
    for one, several in zip(*results, strict=True):
        np.testing.assert_array_equal(bits(one), bits(several))


@pytest.mark.parametrize("length", [40, 600])
def test_a_decoded_row_is_that_of_a_prefill(kernel: Kernel, length: int, rng: np.random.Generator) -> None:
    """Alone as among few queries to the bit; as in a prompt, computed another way, within both errors."""
    query, key, value = (convert(rng.standard_normal((1, length, 2, 32)), kernel.dtype) for _ in range(3))
    first = length - 8
    caches, several = (convert(np.zeros((2, 1, length, 2, 32)), kernel.dtype) for _ in range(2))

    def step(caches: Any, start: int, stop: int, queries: int) -> Any:
        new = {"new_key": key[:, start:stop], "new_value": value[:, start:stop]}
        return fa.attention_with_kvcache(query[:, stop - queries : stop], *caches, **new, cache_seqlens=start)

    step(caches, 0, first, 1)
    rows = np.concatenate([step(caches, i, i + 1, 1) for i in range(first, length)], 1)
    step(several, 0, first, 1)
    fours = [step(several, i, i + 4, 4) for i in range(first, length, 4)]
    assert_same_bits(np.concatenate(fours, 1), rows)
    prompt = convert(np.zeros((2, 1, length, 2, 32)), kernel.dtype)
    whole = step(prompt, 0, length, length)[:, first:]
    assert_same_bits((several, prompt), (caches, caches))
    expected = bounds.expect(query[:, first:], key, value, causal=True, layout="bshd")
    error = abs(as_numpy(rows) - as_numpy(whole)).swapaxes(1, 2)
    bounds.assert_within(error, 2 * bounds.allowed(kernel, expected))
    if "16" in kernel.dtype:  # a unit in the last place of the largest
        bounds.assert_within(error, bounds.ulp(abs(expected.out).max(keepdims=True), kernel.dtype))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["new_key", "new_value"])
@pytest.mark.parametrize("cache_dtype", LARGEST)
def test_a_row_that_is_not_finite_stays_visible(
    kernel: Kernel, cache_dtype: str, target: str, poison: float, rng: np.random.Generator
) -> None:
    """Its scale is NaN: what attends to it is NaN, what does not keeps its bits."""
    call, other = twice(Setting(kernel.dtype, cache_dtype), rng)
    clean = call.run(fa.attention_with_kvcache)
    bad = other.arrays[target].copy()
    bad[:, 1, :, 3] = poison  # the second of three new rows, in one column
    out = fa.attention_with_kvcache(**(other.arrays | {target: bad}), **other.options)
    assert_same_bits(out[:, 0], clean[:, 0])
    assert np.isnan(as_numpy(out[:, 1:])).all()
    scale = other.arrays["key_scale" if target == "new_key" else "value_scale"]
    assert np.isnan(scale[1, 6]).all() and np.isfinite(scale[1, 5]).all()


@pytest.mark.parametrize("target", ["key_scale", "value_scale"])
def test_a_scale_that_is_infinite_stays_visible(
    kernel: Kernel, target: str, rng: np.random.Generator
) -> None:
    call, _ = make(Setting(kernel.dtype, "int8", added=0, seqlen_q=1, lengths=(9, 20, 37)), rng)
    call.arrays[target][:, 7] = np.inf
    assert not np.isfinite(as_numpy(call.run(fa.attention_with_kvcache))).any()


def test_memory_is_flat_over_ten_thousand_steps() -> None:
    program = """
        import numpy as np
        import torch
        import fastattn as fa

        def resident():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

        fa.set_num_threads(1)
        query, key, value = torch.randn(3, 2, 1, 2, 16).unbind(0)
        tables = {"rotary_cos": torch.ones(20000, 8), "rotary_sin": torch.zeros(20000, 8)}
        caches = torch.zeros(2, 2, 64, 2, 16)
        table = torch.arange(16).reshape(2, 8)
        paged = torch.zeros(2, 16, 8, 2, 16)
        options = {"new_key": key, "new_value": value, "window": (32, 0), "rolling": True, **tables}

        def steps(first, last):
            for i in range(first, last):
                fa.attention_with_kvcache(query, *caches, cache_seqlens=i, **options)
                fa.attention_with_kvcache(query, *paged, cache_seqlens=i, block_table=table, **options)
                if i % 10 == 0:
                    fa.attention_with_kvcache(query, *caches, cache_seqlens=i, backend="cpu", **options)

        steps(0, 500)
        before = resident()
        steps(500, 10_000)
        print(resident() - before)
    """
    assert int(output_of(program)) < 1024  # KiB
