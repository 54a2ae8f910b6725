"""Random calls, legal and illegal (fuzz.py), and the same between pages that must not be touched (fences.py).

FASTATTN_TEST_SEED chooses other calls than the usual; "random" draws a seed. A failure prints the command
that repeats its call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import fuzz
from random_calls import chosen_seed

SEED = chosen_seed(20)

kinds = pytest.mark.parametrize("kind", ["legal", "illegal"])


@kinds
def test_some_calls(kind: str) -> None:
    print(f"seed {SEED}")
    failures = fuzz(kind, range(300), SEED)
    assert not failures, "\n".join(failures)


def run(*arguments: str) -> None:
    """In a process of its own, which may end without a word to the others."""
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(script), *arguments, "--seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}{done.stderr[-8000:]}"


@pytest.mark.parametrize("place", ["end", "start"])
def test_some_fenced_calls(place: str) -> None:
    """No kernel touches a byte before or past any of its buffers, or writes to an input."""
    run("legal", "--calls", "250", "--fence", place)


@pytest.mark.slow
@kinds
def test_many_calls(kind: str) -> None:
    run(kind, "--calls", "20000")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["end", "start"])
def test_many_fenced_calls(place: str) -> None:
    run("legal", "--calls", "5000", "--fence", place)
