"""Runs the tests of `interpreted`, each file in a process whose Triton interprets kernels: no GPU is needed.

By hand: ``TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted -k window``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
KINDS = [
    pytest.param("not slow and not gpu_slow", id="quick"),
    pytest.param("gpu_slow", id="thorough", marks=pytest.mark.gpu_slow),
]
AT_ONCE = 2
LIMIT = 3600  # seconds
NOTHING_TO_RUN = 5  # pytest's exit code

# Looked for, not imported: this process is to stay as it is without triton.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[tuple[Path, str], Future[Done]]]:
    """Of all tests here that were chosen, which run side by side."""
    chosen = [item.callspec.params for item in request.session.items if item.fspath == request.fspath]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        keys = [(parameters["path"], parameters["marker"]) for parameters in chosen]
        futures = {key: pool.submit(run, *key) for key in keys}
        yield futures
        for future in futures.values():
            future.cancel()


def run(path: Path, marker: str) -> Done:
    # A kernel's tiles are far too small for the threads of NumPy's products.
    variables = {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    options = ("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-m", marker)
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(path), *options],
        env=os.environ | variables,
        cwd=FOLDER.parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.mark.parametrize("marker", KINDS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file(path: Path, marker: str, outcomes: dict[tuple[Path, str], Future[Done]]) -> None:
    done = outcomes[path, marker].result()
    if done.returncode and (marker != "gpu_slow" or done.returncode != NOTHING_TO_RUN):
        pytest.fail(done.stdout + done.stderr, pytrace=False)
