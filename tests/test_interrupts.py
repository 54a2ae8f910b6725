"""Ctrl-C and other signals during a call: handlers run soon, and what they raise leaves the call early."""

from __future__ import annotations

import pytest

from processes import output_of

PROGRAM = """
import os, signal, sys, threading, time
import ml_dtypes
import numpy as np
import fastattn as fa
from fastattn import _core

fa.set_num_threads({threads})
small = np.random.default_rng(0).standard_normal((1, 2, 300, 64), np.float32)
expected = fa.attention(small, small, small)

def check():
    assert np.array_equal(fa.attention(small, small, small), expected)

def signal_later(seconds, number):  # from another thread, as a terminal's comes from another process
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()

def seconds_until(error, seconds, number, call):
    start = time.perf_counter()
    signal_later(seconds, number)
    try:
        call()
    except error:
        check()
        return time.perf_counter() - start
    sys.exit("ran to its end")
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["np.float32", "ml_dtypes.bfloat16"])
def test_ctrl_c_leaves_a_long_call(dtype: str, threads: int) -> None:
    """200,000 rows take the better part of a minute, and more with one thread."""
    program = (
        PROGRAM.format(threads=threads)
        + f"""
long = np.ones((1, 1, 200_000, 64), {dtype})
out = np.zeros_like(long)
call = lambda: fa.attention(long, long, long, out=out)
elapsed = seconds_until(KeyboardInterrupt, 0.3, signal.SIGINT, call)
assert elapsed < 5, elapsed
row_means = out[0, 0].astype(np.float32).mean(axis=-1)
assert np.all((row_means == 0) | (np.abs(row_means - 1) < 0.01))  # rows are whole or untouched
assert 0 < np.count_nonzero(row_means) < len(row_means)
"""
    )
    output_of(program)


def test_ctrl_c_between_a_few_long_tasks() -> None:
    """Eight tasks of half a second or more."""
    program = (
        PROGRAM.format(threads=1)
        + """
query, keys = np.ones((1, 1, 1024, 64), np.float32), np.ones((1, 1, 1, 64), np.float32)
many = np.broadcast_to(keys, (1, 1, 3_000_000, 64))
start = time.perf_counter()
fa.attention(query[:, :, :128], many, many)
one = time.perf_counter() - start
elapsed = seconds_until(KeyboardInterrupt, 0.3, signal.SIGINT, lambda: fa.attention(query, many, many))
assert elapsed < 3 * one + 1, (elapsed, one)
"""
    )
    output_of(program)


def test_whatever_a_handler_raises_leaves_the_call() -> None:
    """As a time limit does that rests on SIGALRM."""
    program = (
        PROGRAM.format(threads=2)
        + """
def handler(number, frame):
    raise TimeoutError("enough")

signal.signal(signal.SIGALRM, handler)
_core.select_isa("scalar")  # slow on any machine
expected = fa.attention(small, small, small)
long = np.ones((1, 1, 20_000, 64), np.float32)
assert seconds_until(TimeoutError, 0.1, signal.SIGALRM, lambda: fa.attention(long, long, long)) < 5
"""
    )
    output_of(program)


def test_a_handler_that_raises_nothing_changes_nothing() -> None:
    """It runs while the call does, and may itself call; the call goes on to its end."""
    program = (
        PROGRAM.format(threads=2)
        + """
moments = []
def handler(number, frame):
    check()
    moments.append(time.perf_counter())

signal.signal(signal.SIGALRM, handler)
_core.select_isa("scalar")
expected = fa.attention(small, small, small)
some = np.random.default_rng(1).standard_normal((1, 1, 4000, 64), np.float32)
undisturbed = fa.attention(some, some, some)
signal_later(0.05, signal.SIGALRM)
result = fa.attention(some, some, some)
assert len(moments) == 1 and moments[0] < time.perf_counter() - 0.1, "it ran only after the call"
assert np.array_equal(result, undisturbed)
"""
    )
    output_of(program)


def test_ctrl_c_while_another_thread_calls() -> None:
    """The main thread gets it at once; the other's call is none of its business, and comes out right."""
    program = (
        PROGRAM.format(threads=1)
        + """
results = []
_core.select_isa("scalar")
some = np.random.default_rng(1).standard_normal((1, 1, 3000, 64), np.float32)
undisturbed = fa.attention(some, some, some)
thread = threading.Thread(target=lambda: results.append(fa.attention(some, some, some)))
expected = fa.attention(small, small, small)
start = time.perf_counter()
thread.start()
assert seconds_until(KeyboardInterrupt, 0.1, signal.SIGINT, lambda: time.sleep(30)) < 5
thread.join()
assert np.array_equal(results[0], undisturbed)
"""
    )
    output_of(program)
