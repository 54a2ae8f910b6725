"""How many threads a call may use, and who decided it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastattn.arrays import type_name

MAX_THREADS = 1024  # as many CPUs as Linux's cpu_set_t can name

_chosen: int | None = None


def set_num_threads(n: int | None) -> None:
    """Set how many threads fastattn's CPU kernels may use in this process.

    Parameters
    ----------
    n : int or None
        From 1 to 1024. None goes back to the default, see `get_num_threads`.

    Raises
    ------
    TypeError
        If `n` is not an int.
    ValueError
        If `n` is out of range.
    """
    global _chosen
    if n is not None:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"n must be an int or None, got {type_name(n)}")
        if not 1 <= n <= MAX_THREADS:
            raise ValueError(f"n must be from 1 to {MAX_THREADS}, got {n}")
    _chosen = n


def get_num_threads() -> int:
    """Tell how many threads fastattn's CPU kernels may use.

    The first of these that is there: `set_num_threads`, ``FASTATTN_NUM_THREADS``, torch's own setting if
    torch is loaded, ``OMP_NUM_THREADS``, the CPUs that affinity and cgroup allow. Variables are read once.
    Where threads are short a call uses fewer, and in a forked child its first thread uses one.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If ``FASTATTN_NUM_THREADS`` is not an integer from 1 to 1024.
    """
    return num_threads_and_source()[0]


def num_threads_and_source() -> tuple[int, str]:
    """How many threads, and where the number came from."""
    if _chosen is not None:
        return _chosen, "set_num_threads"
    from_environment = _environment()
    if from_environment:
        return from_environment, "FASTATTN_NUM_THREADS"
    torch_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)  # None while torch is loading
    if torch_threads is not None:
        return torch_threads(), "torch.get_num_threads"
    return _default()


@cache
def _environment() -> int:
    text = os.environ.get("FASTATTN_NUM_THREADS", "")
    if not text:
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= MAX_THREADS:
        raise ValueError(f"FASTATTN_NUM_THREADS must be an integer from 1 to {MAX_THREADS}, got {text!r}")
    return int(text)


@cache
def _default() -> tuple[int, str]:
    # OpenMP takes a list, one number a nesting level, and itself complains about what is not one.
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and 1 <= int(first) <= MAX_THREADS:
        return int(first), "OMP_NUM_THREADS"
    return min(_available_cpus(), MAX_THREADS), "available CPUs"


def _available_cpus() -> int:
    try:
        import fastattn._core as _core
    except ImportError:
        cpus = os.cpu_count() or 1
    else:
        cpus = _core.available_cpus()
    return max(1, math.ceil(min([cpus, *_cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])))


def _cgroup_limits(membership: Path, mount: Path) -> Iterator[float]:
    """CPUs' worth of time that each control group around this process grants, if it has a limit.

    A container that may use 2 of 64 CPUs (``docker run --cpus 2``) sees all 64, and 64 threads would stand
    still for most of each period.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return  # no Linux, or no control groups
    for line in lines:
        _, controllers, group = line.split(":", 2)
        root, files = mount, ["cpu.max"]  # version 2: one tree, "quota period" or "max period"
        if controllers:  # version 1: a tree for each controller, a quota of -1 for no limit
            if "cpu" not in controllers.split(","):
                continue
            root, files = mount / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        # In a container the path may be the host's; the groups that are mounted here are then at the root.
        own = root / group.lstrip("/")
        for folder in (own, *own.parents[: len(own.parents) - len(root.parents)]):
            quota, period = _numbers(folder, files)
            if quota > 0 and period > 0:
                yield quota / period


def _numbers(folder: Path, files: list[str]) -> tuple[float, float]:
    """The quota and the period in `files`; zeros where there are none, and for a quota of "max"."""
    try:
        quota, period = " ".join((folder / name).read_text() for name in files).split()
        return float(quota), float(period)
    except (OSError, ValueError):
        return 0.0, 0.0
