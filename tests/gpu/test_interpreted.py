"""Runs the tests of `interpreted`, each file in a process whose Triton interprets kernels: no GPU is needed.

By hand: ``TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted -k window``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
NOTHING_TO_RUN = 5  # pytest's exit code

# Looked for, not imported: this process is to stay as it is without triton.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(path: Path, marker: str) -> subprocess.CompletedProcess[str]:
    # A kernel's tiles are far too small for the threads of NumPy's products.
    variables = {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    options = ("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-m", marker)
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(path), *options],
        env=os.environ | variables,
        cwd=FOLDER.parent.parent.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_quick(path: Path) -> None:
    done = run(path, "not slow and not gpu_slow")
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


@pytest.mark.gpu_slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_thorough(path: Path) -> None:
    done = run(path, "gpu_slow")
    if done.returncode not in (0, NOTHING_TO_RUN):
        pytest.fail(done.stdout + done.stderr, pytrace=False)
