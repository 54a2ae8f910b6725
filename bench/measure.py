"""Times: peers in turn, with the machine's own limit measured between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.accuracy import truth
from bench.peers import PEERS, Call
from bench.suites import Job
from fastattn import _core

ROUNDS = 9
# A sample must be long beside the clock's resolution and the first call's cold caches.
_SAMPLE_SECONDS = 2e-3
_PEAK_SECONDS = 0.02
# On a quiet machine the peak moves by less between rounds, and its threads get all of their cores.
_NOISE, _BUSY = 0.06, 0.985


@dataclass
class Result:
    """One row, measured. Rates are GFLOP/s, or GB/s of K and V where the job reads."""

    job: Job
    unit: str
    peak_kind: str
    peak: float
    peak_spread: float  # (largest - smallest) / median, over the rounds
    busy: float  # CPU time over threads and wall time, while the peak was measured
    seconds: dict[str, float]  # median of one call; only of peers whose output was right
    errors: dict[str, float]  # largest, against float64
    wrong: list[str]  # peers outside the bound

    @property
    def noisy(self) -> bool:
        return self.peak_spread > _NOISE or self.busy < _BUSY

    def rate(self, peer: str) -> float:
        work = self.job.kv_bytes if self.job.reads else self.job.case.flops
        return work / self.seconds[peer] / 1e9

    def share(self, peer: str) -> float:
        return self.rate(peer) / self.peak if self.peak else float("nan")

    def ratio(self, peer: str) -> float:
        """How many times as fast as `peer` fastattn is."""
        return self.seconds[peer] / self.seconds["fastattn"]


def measure(job: Job, seconds: float, threads: int, tick: Callable[[], None]) -> Result:
    """Check every peer, then time those that are right for `seconds` each; `tick` is called once a round."""
    tensors = job.case.tensors(job.dtype, "torch")
    expected = truth(job.case, job.dtype, tensors)
    calls = {name: prepare(job.case, tensors) for name, prepare in PEERS.items()}
    errors, wrong = {}, []
    for name, call in calls.items():
        out = call()
        errors[name] = expected.error(out)
        if not expected.accepts(out, name):
            wrong.append(name)
    timed = {name: call for name, call in calls.items() if name not in wrong}
    repeats = {name: _repeats(call) for name, call in timed.items()}

    kind = _peak_kind(job, threads)
    peaks: list[float] = []
    samples: dict[str, list[float]] = {name: [] for name in timed}
    cpu_seconds = wall_seconds = 0.0
    for turn in range(ROUNDS):
        cpu, wall = time.process_time(), time.perf_counter()
        peaks.append(_core.measure_peak(kind, threads, _PEAK_SECONDS))
        cpu_seconds += time.process_time() - cpu
        wall_seconds += time.perf_counter() - wall
        for name in sorted(timed, reverse=bool(turn % 2)):
            samples[name] += _samples(timed[name], repeats[name], seconds / ROUNDS)
        tick()
    peak = statistics.median(peaks)
    return Result(
        job,
        "GB/s" if job.reads else "GFLOP/s",
        kind,
        peak,
        (max(peaks) - min(peaks)) / peak,
        cpu_seconds / (threads * wall_seconds),
        {name: statistics.median(values) for name, values in samples.items()},
        errors,
        wrong,
    )


def _peak_kind(job: Job, threads: int) -> str:
    """What limits the job: the product that its dtype can use on this machine, or memory."""
    if job.reads:
        return "read"
    kind = {"float64": "fma_f64", "bfloat16": "dot_bf16"}.get(job.dtype, "fma_f32")
    # 0: this machine multiplies bfloat16 as float32.
    return kind if _core.measure_peak(kind, threads, _PEAK_SECONDS) > 0 else "fma_f32"


def _repeats(call: Call) -> int:
    """How many calls make a sample that is long enough to be timed."""
    count = 1
    while (elapsed := _time(call, count)) < _SAMPLE_SECONDS:
        count = max(2 * count, int(count * _SAMPLE_SECONDS / max(elapsed, 1e-7)))
    return count


def _samples(call: Call, repeats: int, seconds: float) -> list[float]:
    """Seconds a call, once warm, as many times as `seconds` holds and at least once."""
    _time(call, max(1, repeats // 4))
    samples = [_time(call, repeats) / repeats]
    while sum(samples) * repeats < seconds:
        samples.append(_time(call, repeats) / repeats)
    return samples


def _time(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start
