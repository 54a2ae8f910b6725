"""The checkers of memory and of races, where this machine has them, over a few small calls."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gpu_check.lists import items_of
from gpu_check.processes import Task

PATIENCE = 200.0  # seconds: an instrumented kernel compiles for a minute and a half
TITLES = {"memory": "memory checker", "races": "race checker"}
INSTRUMENTED = (
    "TRITON_INSTRUMENTATION_MODE"  # read by Triton, which then compiles its own checker into kernels
)


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def tasks() -> tuple[list[Task], list[str]]:
    """A task for each call, and what is said of a checker that is not there."""
    memory, races = (dict(enumerate(x.label for x in items_of(name))) for name in ("memory", "races"))
    found = [Task("races", {i: x}, PATIENCE, variables={INSTRUMENTED: "consan"}) for i, x in races.items()]
    program = sanitizer()
    if program is None:
        return found, ["memory was not checked: there is no compute-sanitizer on this machine"]
    under = (program, "--tool", "memcheck", "--error-exitcode", "9")
    # Without a cache of its own torch asks for each tensor apart: what lies beside it is nobody's.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [*found, *(Task("memory", {i: x}, PATIENCE, under, alone) for i, x in memory.items())], []


def prepare_instrumented(device: str) -> None:
    """Give instrumented kernels the memory that they keep their books in."""
    import torch
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
