"""What this installation is and what it made of the machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

import numpy as np

from fastattn._threads import num_threads_and_source
from fastattn.backends import triton
from fastattn.dispatch import candidates

VARIABLES = (
    "FASTATTN_ISA",
    "FASTATTN_NUM_THREADS",
    "FASTATTN_BACKEND",
    "FASTATTN_DEBUG",
    "FASTATTN_ATOMIC",
    "FASTATTN_HOPPER",
    "FASTATTN_AUTOTUNE",
    "FASTATTN_CACHE_DIR",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "TRITON_INTERPRET",
)


def show_config(file: TextIO | None = None) -> None:
    """Print the build, the CPU, the instruction set chosen, the OpenMP runtime, the threads and the GPUs.

    Parameters
    ----------
    file : text file, optional
        Defaults to ``sys.stdout``.
    """
    for title, text in config().items():
        print(f"{title:<13}{text}", file=file)


def config() -> dict[str, str]:
    """Collect what `show_config` prints."""
    threads, source = num_threads_and_source()
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return {
        "fastattn": f"{version('fastattn')} ({os.path.dirname(__file__)})",
        "Python": f"{platform.python_version()}, NumPy {np.__version__}, {platform.platform()}",
        "torch": _version("torch"),
        "triton": _version("triton"),
        **_extension(),
        "threads": f"{threads} (from {source})",
        "backends": _backends(),
        **gpus(),
        "environment": ", ".join(variables) or "none of " + ", ".join(VARIABLES),
    }


def _backends() -> str:
    """Those that a call asks where it names none. Raises ValueError for one that there is not."""
    names, source = candidates(None), "FASTATTN_BACKEND"
    return f"{names[0]} (from {source})" if os.environ.get(source) else ", then ".join(names)


def gpus() -> dict[str, str]:
    """Each GPU that torch finds, and why no kernel can run on it, if none can."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {"GPU": "not looked for: torch is not loaded"}
    if not torch.cuda.is_available():
        return {"GPU": "none: " + triton.NO_GPU}
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        f"GPU {device.index}": "; ".join([triton.device_name(device), *triton.missing(device)])
        for device in devices
    }


def _version(package: str) -> str:
    """Look a package up without importing it."""
    try:
        return version(package) + (" (loaded)" if package in sys.modules else " (not loaded)")
    except PackageNotFoundError:
        return "not installed"


def _extension() -> dict[str, str]:
    try:
        import fastattn._core as _core
    except ImportError as error:
        return {"extension": f"cannot be loaded: {error}"}
    alone = (
        {"fork": "this thread came out of fork(), its calls run on 1 thread"} if _core.runs_alone() else {}
    )
    features = [name for name, present in _core.cpu_features().items() if present]
    return {
        "build": _listed(_core.build_info()),
        "CPU": f"{_core.cpu_name()}, {_core.available_cpus()} available",
        "CPU features": " ".join(features),
        "ISAs": f"{_core.selected_isa()} selected; available: {', '.join(_core.available_isas())}; "
        f"compiled: {', '.join(_core.compiled_isas())}",
        "OpenMP": _listed(_core.openmp_info()),
        **alone,
        "scratch": _listed({name: str(value) for name, value in _core.scratch_info().items()}),
    }


def _listed(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
