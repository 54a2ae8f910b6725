"""Forks, threads, and what a process shares: the OpenMP runtime, the floating-point environment."""

from __future__ import annotations

import ctypes
import json
import platform
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import fastattn as fa
from fastattn import _core
from kernels import Kernel, assert_same_bits
from processes import control_word, output_of
from shapes import Case

# A child that hangs ends itself: an alarm kills it, and its status tells.
FORK = """
{imports}
import concurrent.futures, os, signal, sys, threading, time
import numpy as np
import fastattn as fa
{late_imports}
from fastattn import _core

fa.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((1, 4, 300, 32), np.float32)
here = lambda: len(os.listdir("/proc/self/task"))

def attend():
    assert np.array_equal(fa.attention(x, x, x), expected)
    return here()

def settles(count):
    # A thread that was tried and let go may take a moment to end.
    until = time.monotonic() + 10
    while here() != count and time.monotonic() < until:
        time.sleep(0.01)
    return here() == count

def in_a_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
"""

OPENMP_POOL_OF_TORCH = "torch.mm(torch.randn(600, 600), torch.randn(600, 600))"


@pytest.mark.parametrize(
    "imports, late_imports",
    [("", ""), ("import torch", ""), ("", "import torch")],
    ids=["alone", "torch first", "torch last"],
)
def test_a_forked_child_attends(imports: str, late_imports: str) -> None:
    """Its first thread alone, its other threads in parallel, and a child of its own too."""
    program = (
        FORK.format(imports=imports, late_imports=late_imports)
        + f"""
expected = fa.attention(x, x, x)
{OPENMP_POOL_OF_TORCH if imports or late_imports else ""}

def child():
    before = here()
    attend()
    assert settles(before) and _core.runs_alone()
    assert "fork" in fa.explain(x, x, x).details["threads"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(attend).result()
        assert settles(before + 2)  # the thread, and its helper
        assert not pool.submit(_core.runs_alone).result()
    in_a_child(attend)

in_a_child(child)
attend()
assert not _core.runs_alone()
"""
    )
    output_of(program)


def test_a_child_forked_before_the_first_call_attends() -> None:
    """The pool that did not survive is torch's own."""
    program = (
        FORK.format(imports="import torch", late_imports="")
        + f"""
{OPENMP_POOL_OF_TORCH}
expected = fa.attention(x, x, x, backend="reference")
in_a_child(lambda: np.testing.assert_allclose(fa.attention(x, x, x), expected, rtol=1e-4, atol=1e-5))
"""
    )
    output_of(program)


def fork_while_others_attend(forks: int, timeout: float) -> None:
    program = (
        FORK.format(imports="", late_imports="")
        + f"""
expected = fa.attention(x, x, x)
done = threading.Event()

def spin():
    while not done.is_set():
        attend()

with concurrent.futures.ThreadPoolExecutor(4) as pool:
    spinning = [pool.submit(spin) for _ in range(3)]
    try:
        for _ in range({forks}):
            in_a_child(attend)
        pool.submit(in_a_child, attend).result()
    finally:
        done.set()
    for thread in spinning:
        thread.result()
"""
    )
    output_of(program, timeout=timeout)


def test_forks_while_other_threads_attend() -> None:
    """A child inherits neither a lock that another thread holds nor a loop that it is in."""
    fork_while_others_attend(forks=20, timeout=60)


@pytest.mark.slow
def test_many_forks_while_other_threads_attend() -> None:
    fork_while_others_attend(forks=1000, timeout=600)


def test_a_pool_of_forked_processes() -> None:
    """What `multiprocessing` does on Linux, with children that answer by pickling."""
    program = (
        FORK.format(imports="", late_imports="")
        + """
import multiprocessing
expected = fa.attention(x, x, x)

def work(rows):
    return fa.attention(x[:, :, :rows], x, x)

with multiprocessing.get_context("fork").Pool(3) as pool:
    for rows, result in zip(range(100, 110), pool.map_async(work, range(100, 110)).get(timeout=30)):
        assert np.array_equal(result, expected[:, :, :rows])
"""
    )
    output_of(program)


@pytest.mark.parametrize("modules", ["torch, fastattn", "fastattn, torch"])
def test_one_openmp_runtime(modules: str) -> None:
    """By the libraries in memory, whichever import came first, and by the threads of the pool."""
    program = f"""
        import json
        import {modules}
        import os
        import numpy, threadpoolctl
        here = lambda: len(os.listdir("/proc/self/task"))
        fastattn.set_num_threads(2)
        torch.set_num_threads(2)
        x = torch.ones(1, 8, 300, 64)
        fastattn.attention(x, x, x)
        threads = here()
        torch.exp(torch.ones(2_000_000))  # OpenMP by itself: torch.mm may have other threads
        runtimes = [r for r in threadpoolctl.threadpool_info() if r["user_api"] == "openmp"]
        mapped = {{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}}
        print(json.dumps([runtimes, sorted(mapped), here() - threads]))
    """
    runtimes, mapped, more_threads = json.loads(output_of(program))
    assert [runtime["internal_api"] for runtime in runtimes] == ["openmp"]
    assert len(mapped) == 1
    assert more_threads == 0


on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="MXCSR is a register of x86"
)


@on_x86
def test_import_leaves_the_floating_point_environment() -> None:
    """Shared libraries built with -ffast-math flush denormals to zero in the whole process."""
    program = """
        import sys
        from processes import control_word
        before = control_word()
        import fastattn
        assert "fastattn._core" in sys.modules
        assert control_word() == before == 0x1F80, hex(control_word())
    """
    output_of(program)


@on_x86
@pytest.mark.parametrize("flags", [0x0000, 0x8040, 0x6000], ids=["default", "flush to zero", "toward zero"])
def test_a_call_leaves_the_floating_point_environment(flags: int, kernel: Kernel) -> None:
    """Neither reset nor changed, whatever the caller has set."""
    libm = ctypes.CDLL("libm.so.6")
    own = ctypes.create_string_buffer(64)
    libm.fegetenv(own)
    changed = ctypes.create_string_buffer(own.raw, 64)
    struct.pack_into("<I", changed, 28, 0x1F80 | flags)
    arguments = Case("environment", 40, 70, 32, query_heads=2).tensors(kernel.dtype)
    try:
        libm.fesetenv(changed)
        fa.attention(*arguments, causal=True)
        after = control_word()
    finally:
        libm.fesetenv(own)
    assert after == 0x1F80 | flags


@pytest.mark.skipif(not _core.cpu_features()["amx_bf16"], reason="no AMX on this machine")
@pytest.mark.parametrize("isa, asked", [("avx2", False), ("amx_bf16", True)])
def test_tile_registers_are_asked_for_by_tiers_that_use_them(isa: str, asked: bool) -> None:
    """A permission of the whole process, and one that it cannot give back."""
    program = """
        import ctypes
        import numpy as np
        import fastattn as fa

        def permitted():
            mask = ctypes.c_uint64()
            ARCH_GET_XCOMP_PERM = 0x1022
            assert ctypes.CDLL(None).syscall(158, ARCH_GET_XCOMP_PERM, ctypes.byref(mask)) == 0
            return bool(mask.value >> 18 & 1)

        at_import = permitted()
        x = np.ones((1, 1, 8, 8), np.float32)
        fa.attention(x, x, x)
        print(at_import, permitted())
    """
    assert output_of(program, FASTATTN_ISA=isa) == f"False {asked}"


@pytest.mark.skipif(not _core.cpu_features()["amx_bf16"], reason="no AMX on this machine")
def test_tiers_whose_registers_are_refused_are_not_there() -> None:
    """Linux refuses them where a signal stack is too small to save them on."""
    program = """
        import ctypes
        class Stack(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
        memory = ctypes.create_string_buffer(4096)
        stack = Stack(ctypes.addressof(memory), 0, 4096)
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0

        import ml_dtypes, numpy
        import fastattn as fa
        from fastattn import _core
        assert not any("amx" in isa for isa in [_core.selected_isa(), *_core.available_isas()])
        x = numpy.ones((1, 1, 40, 64), ml_dtypes.bfloat16)
        assert (fa.attention(x, x, x) == 1).all()
    """
    output_of(program)


DAEMONS = """
import sys, threading, time
import numpy as np
import fastattn as fa
x = np.ones((1, 4, 8192, 64), np.float32)
if "torch" in sys.argv:
    import torch
    x = torch.from_numpy(x)
options = {} if "short" in sys.argv else {"return_lse": True}
fa.set_num_threads(1)
start = time.perf_counter()
fa.attention(x, x, x, **options)
once = time.perf_counter() - start
class Slow:
    sleep = time.sleep
    def __del__(self):
        self.sleep(3 * once)  # the interpreter is still ending when the calls come back
def spin():
    while True:
        fa.attention(x, x, x, **options)
for _ in range(2):
    threading.Thread(target=spin, daemon=True).start()
slow = Slow()
time.sleep(once / 2)  # within the calls: torch ends the process if it ends within one of its own
"""


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
@pytest.mark.parametrize("way", ["short", "long"])
def test_daemon_threads_end_with_the_interpreter(arrays: str, way: str) -> None:
    output_of(DAEMONS, arrays, way)


def test_eight_threads_at_once(kernel: Kernel) -> None:
    """Each call has scratch and threads of its own: the bits are those of a call alone."""
    case = Case("eight", 150, 210, 48, query_heads=4, kv_heads=2, causal=True, arrays=("mask", "bias"))
    arguments, options = case.tensors(kernel.dtype), case.options(kernel.dtype)
    expected = fa.attention(*arguments, **options, return_lse=True)
    together = threading.Barrier(8)

    def work(_: int) -> list[Any]:
        together.wait()
        return [fa.attention(*arguments, **options, return_lse=True) for _ in range(4)]

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for result in results:
                assert_same_bits(result, expected)


def test_offsets_outlive_the_cache() -> None:
    """The kernel reads its offsets while other threads ask for a hundred others."""
    x = np.random.default_rng(0).standard_normal((1, 2, 256, 32)).astype(np.float32)
    few = x[:, :, :1]
    expected = fa.attention(x, x, x, causal=True, query_offset=3)

    def push_out(turn: int) -> None:
        for offset in range(100):
            fa.attention(few, few, few, causal=True, query_offset=100 + turn * 100 + offset)

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(push_out, turn) for turn in range(20)]
        for _ in range(100):
            np.testing.assert_array_equal(fa.attention(x, x, x, causal=True, query_offset=3), expected)
        for other in others:
            other.result()
