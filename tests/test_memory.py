"""Memory is bounded however long the sequences, and a call lets other Python threads run."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fastattn as fa
from fastattn import _core
from kernels import KERNELS, Kernel

# What a call may take beyond its arguments and results, in MiB; the rest of the process is measured before.
LIMIT = 150


def growth(isa: str, dtype: str, call: str, length: int) -> float:
    """MiB that `call` adds to the peak memory of a process that holds its tensors already."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import numpy as np
        import fastattn as fa
        from fastattn import _core
        from shapes import convert

        def peak():
            # Of this process alone: ru_maxrss would start from its parent's.
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

        _core.select_isa({isa!r})
        rng = np.random.default_rng(0)
        length = {length}
        query, key, value = (convert(rng.standard_normal((1, 1, length, 64), np.float32), {dtype!r})
                             for _ in range(3))
        out = convert(np.ones(query.shape, np.float32), {dtype!r})
        small = [x[:, :, :64] for x in (query, key, value)]
        fa.attention(*small, out=out[:, :, :64])  # threads have started
        open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
        before = peak()
        {call}
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


STRONGEST = {kernel.dtype: kernel for kernel in KERNELS}
per_dtype = pytest.mark.parametrize("kernel", list(STRONGEST.values()), ids=str)


@per_dtype
def test_a_long_sequence_under_a_window(kernel: Kernel) -> None:
    """131072 rows: their scores would take 64 GiB in float32."""
    call = "fa.attention(query, key, value, window=(256, 0), out=out)"
    assert growth(kernel.isa, kernel.dtype, call, 131072) < LIMIT


@per_dtype
def test_few_rows_of_a_long_sequence(kernel: Kernel) -> None:
    """All keys, one row and forty rows."""
    call = """
        for rows in (1, 40):
            fa.attention(query[:, :, -rows:], key, value, causal=True, out=out[:, :, -rows:])
    """
    assert growth(kernel.isa, kernel.dtype, textwrap.dedent(call).replace("\n", "\n        "), 131072) < LIMIT


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


def test_calls_from_many_threads_at_once() -> None:
    """Each has scratch of its own."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((1, 2, 150 + i, 32), np.float32) for i in range(8)]
    expected = [fa.attention(x, x, x, causal=True) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not np.array_equal(fa.attention(inputs[i], inputs[i], inputs[i], causal=True), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2])
def test_set_num_threads_is_respected(threads: int) -> None:
    """By the number of threads that the process has come to."""
    code = f"""
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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads - 1
