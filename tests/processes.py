"""Python programs in processes of their own: what a test could not do to the process that runs the others."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent
# Set by whoever runs the tests; each program starts without them.
NUMBERS = ("OMP_NUM_THREADS", "FASTATTN_NUM_THREADS")


def run_python(
    source: str,
    *arguments: str,
    timeout: float = 60,
    before: Callable[[], None] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the tests' helpers; `before` is called in it before Python starts.

    A hang is an error after `timeout` seconds.
    """
    environment = {name: value for name, value in os.environ.items() if name not in NUMBERS}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=before,
    )


def output_of(source: str, *arguments: str, **options: object) -> str:
    """What the program printed; it must have ended well."""
    done = run_python(source, *arguments, **options)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def memory_added(run: Callable[[], object]) -> float:
    """MiB that `run` adds at its peak to the memory of this process."""

    def peak() -> float:  # getrusage's would start from that of the process's parent
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = peak()
    run()
    return peak() - before


def control_word() -> int:
    """MXCSR without the flags that results raise: rounding, traps, flush to zero, denormals are zero."""
    environment = ctypes.create_string_buffer(64)
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    (mxcsr,) = struct.unpack_from("<I", environment.raw, 28)
    return mxcsr & ~0x3F
