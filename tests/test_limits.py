"""Where threads, memory or stack are short: fewer threads or a MemoryError, never a process that ends."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastattn import _core
from processes import output_of

PROGRAM = """
import os, resource, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import fastattn as fa
from fastattn import _core

x = np.random.default_rng(0).standard_normal((1, 8, 256, 64), np.float32)
fa.set_num_threads(1)
expected = fa.attention(x, x, x)

def here():
    return len(os.listdir("/proc/self/task"))

def attend(threads):
    fa.set_num_threads(threads)
    assert np.array_equal(fa.attention(x, x, x), expected)
    return here()

def allow(resource_name, limit):
    resource.setrlimit(resource_name, (limit, resource.getrlimit(resource_name)[1]))

def address_space(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    allow(resource.RLIMIT_AS, used + more)

before = here()
"""


def test_no_thread_at_all() -> None:
    """Stacks that no address space holds: libgomp would end the process."""
    program = PROGRAM + "assert attend(4) == attend(8) == before"
    output_of(program, OMP_STACKSIZE="100000G")


def test_a_limit_on_processes() -> None:
    """Half of what could still be started is left to others; once it is lifted, all is used again."""
    program = (
        PROGRAM
        + """
if os.getuid() == 0:  # no such limit holds root
    os.setgroups([])
    own = 60000 + os.getpid() % 5000  # threads of all processes of a user count
    os.setresuid(own, own, 0)
allow(resource.RLIMIT_NPROC, before + 4)
short = attend(16)
assert before <= short <= before + 4, short
other = threading.Thread(target=lambda: None)
other.start()
other.join()
if os.getresuid()[2] == 0:
    os.setresuid(0, 0, 0)
allow(resource.RLIMIT_NPROC, resource.getrlimit(resource.RLIMIT_NPROC)[1])
assert attend(16) == short  # not tried again at once
time.sleep(1.1)
assert attend(16) == before + 15
"""
    )
    output_of(program)


def attend_within(mebibytes: int, suffices: bool) -> None:
    """The first parallel call of a process with so much address space left: seven stacks are wanted."""
    program = (
        PROGRAM
        + f"""
try:
    address_space(int({mebibytes} * 2**20))
    attend(8)
except MemoryError:
    assert not {suffices}
allow(resource.RLIMIT_AS, resource.RLIM_INFINITY)
time.sleep(1.1)
assert attend(8) == before + 7
"""
    )
    output_of(program)


@pytest.mark.parametrize("mebibytes", [0, 1, 9, 30])
def test_little_address_space_at_the_first_parallel_call(mebibytes: int) -> None:
    attend_within(mebibytes, suffices=mebibytes >= 9)


@pytest.mark.slow
def test_any_address_space_at_the_first_parallel_call() -> None:
    """Stacks may leave so little that NumPy has no room to compare results, but the process goes on."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda mebibytes: attend_within(mebibytes, suffices=False), range(75)))


needs_scratch = pytest.mark.skipif(
    _core.available_isas() == ["scalar"], reason="the scalar tier, the only one here, takes no scratch"
)
# Elements that are not adjacent are packed, by every other tier: 20 MiB of keys and values.
SCATTERED = """
key = np.ones((1, 1, 64, 40_000), np.float32).swapaxes(2, 3)
query = np.ones((1, 1, 512, 64), np.float32)
out = np.zeros_like(query)
"""


@needs_scratch
def test_out_of_memory_is_an_error_and_the_next_call_works() -> None:
    """Once in NumPy, for the result, and once in here, for packed keys and values."""
    program = (
        PROGRAM
        + SCATTERED
        + """
many = np.broadcast_to(query[:, :, :1], (1, 1, 100_000, 64))
threads = attend(2)
address_space(4 << 20)

for message, call in {
    "Unable to allocate": lambda: fa.attention(many, query, query),
    "bytes of scratch": lambda: fa.attention(query, key, key, out=out),
}.items():
    for _ in range(3):
        try:
            call()
        except MemoryError as error:
            assert message in str(error), error
        else:
            sys.exit(f"no MemoryError: {message}")
        assert attend(2) == threads
assert not out.any()  # nothing is written before there is room for everything

allow(resource.RLIMIT_AS, resource.RLIM_INFINITY)
np.testing.assert_allclose(fa.attention(query, key, key, out=out), 1, rtol=1e-5)
"""
    )
    output_of(program)


@needs_scratch
def test_the_pool_is_used_up_before_memory_runs_out() -> None:
    """Blocks kept for calls of another size are given back to the system."""
    program = (
        PROGRAM
        + SCATTERED
        + """
fa.attention(query, key, key, out=out)
kept = _core.scratch_info()["pooled_bytes"]
assert kept > 19 << 20, kept
address_space(1 << 20)
few = key[:, :, :8_000]
fa.attention(query, few, few, out=out)
assert _core.scratch_info()["pooled_bytes"] < kept
"""
    )
    output_of(program)


STACKS = """
import sys, threading
import ml_dtypes
import fastattn as fa
from fastattn import _core
from kernels import KERNELS
from shapes import CASES

NAMES = {"dim-576-512", "dim-256", "everything", "decode-group-7", "queries-5", "long-1024-causal"}
fa.set_num_threads(2)

def work():
    for kernel in KERNELS:
        with kernel.forced():
            for case in CASES:
                if case.name in NAMES and not (kernel.isa == "scalar" and case.name.startswith("long")):
                    query, key, value = case.tensors(kernel.dtype)
                    options = case.options(kernel.dtype)
                    fa.attention(query, key, value, **options, return_lse=True, return_weights=True)
                    scattered = value.swapaxes(2, 3).copy().swapaxes(2, 3)
                    fa.attention(query, key, scattered, **options)
    print("done")
"""


def test_threads_with_small_stacks() -> None:
    """128 KiB, for Python's thread and for its helpers: every kernel, at the largest head dimensions."""
    program = (
        STACKS
        + """
threading.stack_size(128 << 10)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    )
    assert output_of(program, OMP_STACKSIZE="128K") == "done"


def test_a_process_with_a_small_stack() -> None:
    """`ulimit -s 128`: the main thread's, and by default that of every thread to come."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (128 << 10, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    assert output_of(STACKS + "\nwork()", before=limit) == "done"


def test_a_thousand_threads_from_a_small_stack() -> None:
    """libgomp keeps a record of each thread that it starts on its caller's stack."""
    program = (
        PROGRAM
        + """
x = np.ones((16, 64, 96, 32), np.float32)  # 4 microseconds of work for each thread
expected = fa.attention(x, x, x)
threading.stack_size(128 << 10)
with ThreadPoolExecutor(1) as pool:
    print(pool.submit(attend, 1024).result() - before)
"""
    )
    assert output_of(program, OMP_STACKSIZE="64K") == "1024"
