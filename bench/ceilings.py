"""What the machine can give at most, read again and again by the project's own micro-benchmark."""

from __future__ import annotations

import time
from typing import NamedTuple

from bench.samples import Reading
from fastattn import _core

# Long beside the half millisecond in which one thread alone calibrates the run: CPU time would look missing.
_SECONDS = 0.05
# Threads that have nothing left to do spin before they sleep, those of the peer just timed as much as ours.
# libgomp's do so for 300000 pause instructions, about 15 ms where one takes 140 cycles. Nobody is
# measured meanwhile.
_SETTLE = 0.02


class Limit(NamedTuple):
    """A ceiling: a kind of `_core.measure_peak`, on so many threads of a tier ("": the machine's own)."""

    kind: str
    threads: int
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.kind}, {self.threads} thread{'s' * (self.threads > 1)}{self.isa and ', ' + self.isa}"


class Ceilings:
    """Readings, and the best of each limit so far."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}

    def read(self, limit: Limit) -> Reading:
        time.sleep(_SETTLE)
        cpu, wall = time.process_time(), time.perf_counter()
        rate = _peak(limit, _SECONDS)
        # One thread makes and fills the buffer before all read it: CPU time says nothing there.
        elapsed = limit.threads * (time.perf_counter() - wall)
        busy = 1.0 if limit.kind == "read" else (time.process_time() - cpu) / elapsed
        time.sleep(_SETTLE)
        self.best[str(limit)] = max(rate, self.best.get(str(limit), 0.0))
        return Reading(rate, busy)


def limit_of(dtype: str, reads: bool, threads: int, isa: str = "") -> Limit:
    """What bounds a call: memory, or the product that its dtype uses on this tier."""
    if reads:
        return Limit("read", threads, isa)
    tier = isa or _core.selected_isa()
    # AMX multiplies float16 as fast as bfloat16; below that, float16 is computed as float32.
    dots = dtype == "bfloat16" or (dtype == "float16" and tier == "amx_fp16")
    if dots and _peak(Limit("dot_bf16", 1, isa), 0.0) > 0:
        return Limit("dot_bf16", threads, isa)
    return Limit("fma_f64" if dtype == "float64" else "fma_f32", threads, isa)


def _peak(limit: Limit, seconds: float) -> float:
    if not limit.isa:
        return _core.measure_peak(limit.kind, limit.threads, seconds)
    try:
        _core.select_isa(limit.isa)
        return _core.measure_peak(limit.kind, limit.threads, seconds)
    finally:
        _core.select_isa(None)
