"""Seconds of device time, from events around each call, and the ceilings that rates are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]

ROUNDS = 4  # contestants take turns, so that a slow minute of the machine is everybody's
FEWEST, MOST = 3, 40  # calls in a turn
FLUSH_BYTES = 256 << 20  # written before each call: five times the second-level cache of an H100
SHORT = 1e-3  # seconds; before a call that may be shorter the device idles, so that the host is ahead of it
IDLE_CYCLES = 1_000_000  # about half a millisecond


@dataclass(frozen=True)
class Times:
    """Of one contestant."""

    seconds: float  # the median
    spread: float  # between quartiles, of the median
    calls: int


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_cpu = torch.device(device).type == "cpu"
        if not self.on_cpu:
            self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def in_turns(self, runs: Mapping[str, Run], seconds: float = 0.12) -> dict[str, Times]:
        """Time each of `runs` for about `seconds`, all of them in every round."""
        calls, samples = {}, {name: list[float]() for name in runs}
        for name, run in runs.items():
            once = statistics.median(self._turn(run, 2, short=True))
            short = once < SHORT
            calls[name] = (min(MOST, max(FEWEST, int(seconds / ROUNDS / max(once, 1e-6)))), short)
        for _ in range(ROUNDS):
            for name, run in runs.items():
                samples[name] += self._turn(run, *calls[name])
        return {name: summary(found) for name, found in samples.items()}

    def _turn(self, run: Run, calls: int, short: bool) -> list[float]:
        if self.on_cpu:
            return [_seconds(run) for _ in range(min(calls, FEWEST))]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for before, after in events:
            self.flush.zero_()
            if short:
                torch.cuda._sleep(IDLE_CYCLES)
            before.record()
            run()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) * 1e-3 for before, after in events]


def summary(samples: list[float]) -> Times:
    """The median, and how far the quartiles are apart."""
    lower, middle, upper = statistics.quantiles(samples, n=4)
    return Times(middle, (upper - lower) / middle, len(samples))


def host_seconds(
    runs: Mapping[str, Run], device: str, calls: int = 200, rounds: int = 15
) -> dict[str, Times]:
    """Wall time of a call that returns before the device has done its work, contestants in turns."""
    samples = {name: list[float]() for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            samples[name].append((time.perf_counter() - start) / calls)
    _wait(device)
    return {name: summary(found) for name, found in samples.items()}


def ceilings(clock: Clock, size: int = 8192, copied: int = 4 << 30) -> dict[str, float]:
    """FLOP/s of a bfloat16 product of square matrices, and bytes/s, read and written, of a copy."""
    left, right = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(copied // 4, device=clock.device)
    target = torch.empty_like(source)
    times = clock.in_turns(
        {
            "matmul": lambda: torch.matmul(left, right, out=product),
            "copy": lambda: target.copy_(source),
        },
        seconds=0.3,
    )
    return {"matmul": 2 * size**3 / times["matmul"].seconds, "copy": 2 * copied / times["copy"].seconds}


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize()
