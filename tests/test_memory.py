"""Memory is bounded however long the sequences, and a call lets other Python threads run."""

from __future__ import annotations

import textwrap
import threading
import time

import numpy as np
import pytest

import fastattn as fa
from fastattn import _core
from kernels import KERNELS, Kernel
from processes import output_of

# What a call may take beyond its arguments and results, in MiB; the rest of the process is measured before.
LIMIT = 150


def growth(isa: str, dtype: str, call: str, length: int) -> float:
    """MiB that `call` adds to the peak memory of a process that holds its tensors already."""
    call = textwrap.indent(textwrap.dedent(call).strip(), " " * 12).strip()
    code = f"""
        import numpy as np
        import fastattn as fa
        from fastattn import _core
        from processes import memory_added
        from shapes import convert

        _core.select_isa({isa!r})
        rng = np.random.default_rng(0)
        length = {length}
        query, key, value = (convert(rng.standard_normal((1, 1, length, 64), np.float32), {dtype!r})
                             for _ in range(3))
        out = convert(np.ones(query.shape, np.float32), {dtype!r})
        small = [x[:, :, :64] for x in (query, key, value)]
        fa.attention(*small, out=out[:, :, :64])  # threads have started

        def run():
            {call}

        print(memory_added(run))
    """
    return float(output_of(code, timeout=300))


STRONGEST = {kernel.dtype: kernel for kernel in KERNELS}
per_dtype = pytest.mark.parametrize("kernel", list(STRONGEST.values()), ids=str)


@per_dtype
def test_a_long_sequence_under_a_window(kernel: Kernel) -> None:
    """131072 rows: their scores would take 64 GiB in float32."""
    call = "fa.attention(query, key, value, window=(256, 0), out=out)"
    assert growth(kernel.isa, kernel.dtype, call, 131072) < LIMIT


@per_dtype
def test_a_long_sequence_of_packed_documents(kernel: Kernel) -> None:
    """Of 256 rows each; a mask would take 16 GiB."""
    call = """
        ids = np.arange(length)[None] // 256
        fa.attention(query, key, value, segment_ids=(ids, ids), causal=True, out=out)
    """
    assert growth(kernel.isa, kernel.dtype, call, 131072) < LIMIT


@per_dtype
def test_few_rows_of_a_long_sequence(kernel: Kernel) -> None:
    """All keys, one row and forty rows."""
    call = """
        for rows in (1, 40):
            fa.attention(query[:, :, -rows:], key, value, causal=True, out=out[:, :, -rows:])
    """
    assert growth(kernel.isa, kernel.dtype, call, 131072) < LIMIT


@pytest.mark.slow
def test_a_long_sequence_causal() -> None:
    call = "fa.attention(query, key, value, causal=True, out=out)"
    assert growth(STRONGEST["float32"].isa, "float32", call, 131072) < LIMIT


@per_dtype
def test_scratch_does_not_grow_with_the_scores(kernel: Kernel) -> None:
    """Twice the length, four times the scores: what is added is no more than packed keys and values."""
    call = "fa.attention(query, key, value, causal=True, out=out)"
    short, long = (growth(kernel.isa, kernel.dtype, call, length) for length in (4096, 8192))
    packed = 2 * 4096 * 64 * 8 / 2**20  # 4 MiB at the widest
    assert long < short + packed + 4
    assert long < 4096 * 8192 * 2 / 2**20


def test_the_pool_gives_back_what_it_cannot_keep() -> None:
    x = np.zeros((1, 1, 64, 64), np.float32)
    fa.attention(x, x, x)
    info = _core.scratch_info()
    assert 0 < info["pooled_bytes"] <= info["pool_limit"] <= 64 << 20


def test_the_pool_forgets_sizes_that_nobody_asks_for() -> None:
    """Blocks of many small sizes do not keep a large one out."""
    program = """
        import numpy as np
        import fastattn as fa
        from fastattn import _core
        pooled = lambda: _core.scratch_info()["pooled_bytes"]
        fa.set_num_threads(1)
        dims = [16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 480, 512]
        for dim in dims:
            inputs = [np.ones((1, 1, 8, dim), dtype) for dtype in (np.float32, np.float64)]
            for x in inputs:
                fa.attention(x, x, x)
        small = pooled()
        scattered = np.ones((1, 1, 64, 20_000), np.float32).swapaxes(2, 3)
        query = np.ones((1, 1, 512, 64), np.float32)
        fa.attention(query, scattered, scattered)
        print(small, pooled())
    """
    small, large = map(int, output_of(program).split())
    assert small < 32 << 20
    assert large > 2 * 20_000 * 64 * 4 or _core.available_isas() == ["scalar"]


# Good calls of several kinds, and as many that fail, in Python and in C++.
CALLS = """
import ml_dtypes
import numpy as np
import torch
import fastattn as fa

rng = np.random.default_rng(0)
x = rng.standard_normal((1, 2, 24, 16), np.float32)
tensor = torch.from_numpy(x)
half = x.astype(ml_dtypes.bfloat16)
mask = np.ones((24, 24), bool)
read_only = np.empty_like(x)
read_only.flags.writeable = False

good = [
    lambda: fa.attention(x, x, x),
    lambda: fa.attention(x, x, x, causal=True, mask=mask, return_lse=True, return_weights=True),
    lambda: fa.attention(tensor, tensor, tensor, window=(3, 0)),
    lambda: fa.attention(half, half, half, kv_lengths=[7], sinks=np.zeros(2), softcap=2.0),
    lambda: fa.explain(x, x, x).details,
]
bad = [
    lambda: fa.attention(x, x, x, mask=x),
    lambda: fa.attention(x, x[:, :, :, :8], x),
    lambda: fa.attention(x, x, x, out=x),
    lambda: fa.attention(x, x, x, out=read_only),
    lambda: fa.attention(x, tensor, x),
    lambda: fa.attention(x, x, x, backend="none"),
    lambda: fa._core.attention_forward(*[None] * 17),
    lambda: fa._core.select_isa("none"),
]

def turn():
    for call in good:
        call()
    for call in bad:
        try:
            call()
        except (TypeError, ValueError, NotImplementedError):
            pass
        else:
            raise SystemExit("no error")
"""
# What they leave behind, once every kind has been called.
LEAVINGS = """
import gc, os

def state():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    memory = pages * os.sysconf("SC_PAGESIZE") / 2**20
    return memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

for _ in range(150):
    turn()
before = state()
for _ in range(770):
    turn()
print(*(after - b for after, b in zip(state(), before)))
"""


def test_ten_thousand_calls_take_no_memory() -> None:
    """Nor threads, nor files."""
    memory, files, threads = map(float, output_of(CALLS + LEAVINGS).split())
    assert memory < 1  # MiB; 100 bytes a call would be 1
    assert files == threads == 0


def test_other_threads_run_during_a_call() -> None:
    """The interpreter lock is released: a Python thread counts on while the kernel runs."""
    query = np.random.default_rng(0).standard_normal((1, 4, 2048, 64), np.float32)
    fa.attention(query, query, query)
    ticks = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        fa.set_num_threads(1)
        seen = []
        for _ in range(3):
            before, start = ticks, time.perf_counter()
            fa.attention(query, query, query)
            seen.append((ticks - before) / (time.perf_counter() - start))
    finally:
        fa.set_num_threads(None)
        stop.set()
        thread.join()
    # About 900 a second where it is released; one or two in a whole call where it is held.
    assert max(seen) > 100


@pytest.mark.parametrize("threads", [1, 2])
def test_set_num_threads_is_respected(threads: int) -> None:
    """By the number of threads that the process has come to."""
    program = f"""
        import os
        import numpy as np
        import fastattn as fa

        count = lambda: len(os.listdir("/proc/self/task"))
        before = count()
        fa.set_num_threads({threads})
        x = np.zeros((1, 8, 256, 64), np.float32)
        fa.attention(x, x, x)
        print(count() - before)
    """
    assert int(output_of(program)) == threads - 1


def test_gradients_of_packed_documents() -> None:
    """131072 tokens in documents of 2048: memory is that of the arrays, where a mask would take 16 GiB."""
    code = """
        import torch
        import fastattn as fa
        from processes import memory_added

        def there_and_back(length):
            leaves = [torch.ones(1, 1, length, 64, requires_grad=True) for _ in range(3)]
            ids = torch.arange(length)[None] // 2048
            return memory_added(
                lambda: fa.attention(*leaves, segment_ids=(ids, ids), causal=True).sum().backward()
            )

        there_and_back(2048)  # threads have started
        print(*(there_and_back(length) for length in (65536, 131072)))
    """
    half, whole = map(float, output_of(code, timeout=300).split())
    array = 131072 * 64 * 4 / 2**20  # three gradients, out and its gradient, and panels
    assert whole < 16 * array + LIMIT and half < 8 * array + LIMIT
