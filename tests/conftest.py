"""What several test files share."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Threads that wait by spinning make thousands of small calls slow on a machine that is busy otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

from browser import Browser, chromium
from fastattn import _flags, _threads, dispatch, set_num_threads
from kernels import CACHE_KERNELS, KERNELS, Kernel


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own, a module's weights say, is the same in every run."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A patch for fastattn's variables, which are otherwise read once."""

    def forget() -> None:
        for read in (_threads._environment, _threads._default, dispatch._default_candidates, _flags.flag):
            read.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    set_num_threads(None)
    forget()


@pytest.fixture(params=KERNELS, ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Each kernel of the machine in turn, forced."""
    with request.param.forced():
        yield request.param


@pytest.fixture(params=CACHE_KERNELS, ids=str)
def cache_kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """The same of caches of 8-bit numbers."""
    with request.param.forced():
        yield request.param


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser for all pages of the run, started when the first is opened."""
    with chromium() as started:
        yield started
