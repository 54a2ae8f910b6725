"""Forks, threads that end with the interpreter, and tables that other threads push out of a cache."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastattn as fa

FORK = """
import os, signal, sys
import numpy as np
import torch
import fastattn as fa
x = torch.randn(1, 4, 300, 32)
if {first}:
    fa.attention(x, x, x)
else:
    torch.mm(torch.randn(600, 600), torch.randn(600, 600))  # the OpenMP pool starts without fastattn
child = os.fork()
if child == 0:
    signal.alarm(20)
    fa.attention(x, x, x)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

DAEMONS = """
import threading, time
import numpy as np
import fastattn as fa
x = np.ones((1, 4, 512, 64), np.float32)
def spin():
    while True:
        fa.attention(x, x, x)
for _ in range(2):
    threading.Thread(target=spin, daemon=True).start()
time.sleep(0.5)
"""


def run(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("first", [True, False], ids=["after a call", "before the first call"])
def test_a_forked_child_attends(first: bool) -> None:
    done = run(FORK.format(first=first))
    assert done.returncode == 0, done.stderr


def test_daemon_threads_end_with_the_interpreter() -> None:
    done = run(DAEMONS)
    assert done.returncode == 0, done.stderr


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
