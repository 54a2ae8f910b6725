"""The checkers of memory and of races, where this machine has them, over a few small calls."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gpu_check.lists import items_of
from gpu_check.processes import Task

PATIENCE = 200.0  # an instrumented kernel compiles for a minute and a half
_FOUND = "9"


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    beside = home / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def tasks() -> tuple[list[Task], list[str]]:
    """A task for each checker, and what is said of those that are not there."""
    memory = dict(enumerate(item.label for item in items_of("memory")))
    races = dict(enumerate(item.label for item in items_of("races")))
    found = [Task("races", races, PATIENCE, variables={"TRITON_INSTRUMENTATION_MODE": "consan"})]
    program = sanitizer()
    if program is None:
        return found, ["memory: compute-sanitizer is not on this machine"]
    command = (
        program,
        "--tool",
        "memcheck",
        "--error-exitcode",
        _FOUND,
        "--target-processes",
        "application-only",
    )
    # Without a cache of its own, torch asks for each tensor apart: what lies beside it is nobody's.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [*found, *(Task("memory", {i: x}, PATIENCE, command, variables) for i, x in memory.items())], []
