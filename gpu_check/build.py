"""The package, built and installed beside the sources: nothing is fetched and no environment is changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_check import ROOT

SCRATCH = ROOT / "build" / "gpu-check"  # kept, so that a second run compiles nothing


class BuildError(Exception):
    """What the build said."""


def environment(package: Path | None) -> dict[str, str]:
    """Variables for the processes that use the package; None: the one that Python finds by itself."""
    found = dict(os.environ)
    if package is not None:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), found.get("PYTHONPATH", "")]))
    found |= {
        "TRITON_CACHE_DIR": str(SCRATCH / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(SCRATCH / "inductor"),
        "FASTATTN_CACHE_DIR": str(SCRATCH / "verdicts"),
        "OMP_NUM_THREADS": "2",  # many processes at once
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # where a process is when it dies of a signal
    }
    return found


def build(limit: float) -> tuple[Path, float]:
    """Where the package now is, and the seconds it took. Raises BuildError."""
    start, target = time.monotonic(), SCRATCH / "package"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-index",
        "--no-deps",
    ]
    command += ["--no-build-isolation", "--upgrade", "--target", str(target)]
    command += [f"-Cbuild-dir={SCRATCH / 'cmake'}", str(ROOT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the build took more than {limit:.0f} s") from error
    if done.returncode:
        raise BuildError((done.stdout + done.stderr).strip()[-3000:])
    return target, time.monotonic() - start
