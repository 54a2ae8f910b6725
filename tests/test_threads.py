"""Who decides the number of threads: each source wins over those after it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import fastattn as fa
from fastattn._threads import num_threads_and_source


def in_a_new_process(**variables: str) -> str:
    """The number and its source, where torch is not loaded."""
    code = "from fastattn._threads import num_threads_and_source as f; print(*f(), sep=': ')"
    names = ("OMP_NUM_THREADS", "FASTATTN_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_order_of_the_sources(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("FASTATTN_NUM_THREADS", raising=False)
    assert num_threads_and_source() == (torch.get_num_threads(), "torch.get_num_threads")
    fa.set_num_threads(3)
    assert num_threads_and_source() == (3, "set_num_threads")
    assert fa.get_num_threads() == 3
    fa.set_num_threads(None)
    assert fa.get_num_threads() == torch.get_num_threads()


def test_environment_wins_over_torch(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FASTATTN_NUM_THREADS", "5")
    assert num_threads_and_source() == (5, "FASTATTN_NUM_THREADS")
    fa.set_num_threads(2)
    assert num_threads_and_source() == (2, "set_num_threads")


def test_torch_may_change_its_mind(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("FASTATTN_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert fa.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_without_torch() -> None:
    available = len(os.sched_getaffinity(0))
    number, source = in_a_new_process().split(": ")
    assert source == "available CPUs"
    assert 1 <= int(number) <= available
    assert in_a_new_process(OMP_NUM_THREADS="3") == "3: OMP_NUM_THREADS"
    assert in_a_new_process(OMP_NUM_THREADS="4,2") == "4: OMP_NUM_THREADS"
    assert in_a_new_process(OMP_NUM_THREADS="3", FASTATTN_NUM_THREADS="1") == "1: FASTATTN_NUM_THREADS"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "1e3"])
def test_garbage_in_the_environment(text: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FASTATTN_NUM_THREADS", text)
    message = f"FASTATTN_NUM_THREADS must be an integer from 1 to 1024, got '{text}'"
    with pytest.raises(ValueError, match=message):
        fa.get_num_threads()


@pytest.mark.parametrize(
    "n, error, message",
    [
        (0, ValueError, "n must be from 1 to 1024, got 0"),
        (1025, ValueError, "n must be from 1 to 1024, got 1025"),
        (2.0, TypeError, "n must be an int or None, got float"),
        (True, TypeError, "n must be an int or None, got bool"),
    ],
)
def test_garbage_in_set_num_threads(n: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fa.set_num_threads(n)
