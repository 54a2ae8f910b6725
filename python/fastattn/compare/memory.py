"""How much memory a call takes: a process of its own, and how large that has been at most.

What torch's allocator counts would leave out the scratch of kernels that do not use it, so what is resident
is read.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from fastattn._threads import set_num_threads
from fastattn.compare.layers import make_call

_FORGET = Path("/proc/self/clear_refs")  # of Linux: 5 makes a process as large at most as it is now
_STATUS = Path("/proc/self/status")
_CHILD = "from fastattn.compare.memory import tell; tell()"
_SHORT = 16  # rows of a call after which libraries are loaded and threads started


def peak_bytes(kind: str, length: int, training: bool, *, threads: int, **sizes: int) -> int | None:
    """What one call of `make_call` holds at most, beside its input and the weights; None off Linux.

    Raises
    ------
    RuntimeError
        Where the process that measures fails, with what it said last.
    """
    if not _FORGET.exists():
        return None
    asked = json.dumps([kind, length, training, threads, sizes])
    done = subprocess.run([sys.executable, "-c", _CHILD], input=asked, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"measuring the memory of {kind!r} at {length} rows failed: {said}")
    return int(done.stdout)


def tell() -> None:
    """Measure what standard input asks for, in a process that has done nothing else, and print the bytes."""
    kind, length, training, threads, sizes = json.loads(sys.stdin.read())
    torch.set_num_threads(threads)
    set_num_threads(threads)
    make_call(kind, _SHORT, training, **sizes)()
    call = make_call(kind, length, training, **sizes)
    gc.collect()
    # What the allocator keeps of what was freed would be used first, and not be seen to grow.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    _FORGET.write_text("5")
    before = _resident("VmRSS")
    call()
    print(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    return 1024 * int(_STATUS.read_text().split(f"{name}:")[1].split()[0])
