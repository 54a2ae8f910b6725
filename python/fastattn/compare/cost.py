"""Time and memory of one layer over the length, and where attention stops being the quicker."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from fastattn import _core
from fastattn.compare.layers import KINDS, check_kind, count_flops, make_call
from fastattn.compare.memory import peak_bytes
from fastattn.compare.training import Progress, seeded

_LONGEST = 1 << 40  # a crossing past it is none
# So many calls at least, unless they take so many times as long as a measurement is to take.
_FEWEST_CALLS, _PATIENCE = 3, 10


@dataclass(frozen=True)
class CostSettings:
    """What is measured; the defaults are the full comparison, which takes about ten minutes.

    Attributes
    ----------
    kinds : tuple of str
        Of `KINDS`.
    lengths : tuple of int
        Rows of the sequence, increasing.
    memory_lengths : tuple of int
        The same for memory, each of which takes a process of its own.
    threads : tuple of int
        Numbers of threads, increasing. Memory is that of the most.
    width, heads, window : int
        Of `make_layer`. Batch is 1 and the dtype float32.
    seconds : float
        For which a call is repeated, but three times at least, and once if it takes ten times as long. The
        quickest call counts.
    rounds : int
        How often all of it is timed, so that what else the machine does at one moment does not count.
    """

    kinds: tuple[str, ...] = KINDS
    lengths: tuple[int, ...] = tuple(2**power for power in range(4, 15))
    memory_lengths: tuple[int, ...] = tuple(4**power for power in range(2, 8))
    threads: tuple[int, ...] = (1, 2)
    width: int = 256
    heads: int = 4
    window: int = 256
    seconds: float = 0.3
    rounds: int = 2

    def __post_init__(self) -> None:
        for name in ("kinds", "lengths", "memory_lengths", "threads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for kind in self.kinds:
            check_kind(kind)

    @property
    def sizes(self) -> dict[str, int]:
        """Width, heads and window, by name."""
        return {"width": self.width, "heads": self.heads, "window": self.window}

    @classmethod
    def quick(cls) -> CostSettings:
        """Settings that take half a minute."""
        lengths = (16, 64, 256, 1024, 4096)
        return cls(lengths=lengths, memory_lengths=(4096,), threads=(1,), seconds=0.05, rounds=1)


@dataclass(frozen=True)
class Timing:
    """The quickest of `calls` calls, and the `flops` that each cannot do without."""

    kind: str
    length: int
    training: bool
    threads: int
    seconds: float
    calls: int
    flops: int


@dataclass(frozen=True)
class Memory:
    """The most that a call held beside its input and weights, in bytes; result and gradients count."""

    kind: str
    length: int
    training: bool
    bytes: int


@dataclass
class Cost:
    """What was measured, and the multiply-add peak at each of ``settings.threads``, in GFLOP/s."""

    settings: CostSettings
    peaks: list[float] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Cost:
        """Read what `dataclasses.asdict` made."""
        timings = [Timing(**timing) for timing in content["timings"]]
        memory = [Memory(**point) for point in content["memory"]]
        return cls(CostSettings(**content["settings"]), content["peaks"], timings, memory)

    def seconds(self, kind: str, training: bool, threads: int) -> dict[int, float]:
        """Times by length."""
        wanted = (kind, training, threads)
        return {t.length: t.seconds for t in self.timings if (t.kind, t.training, t.threads) == wanted}

    def speedup(self, kind: str, training: bool) -> dict[int, float]:
        """Time on the fewest threads over that on the most, by length."""
        few = self.seconds(kind, training, self.settings.threads[0])
        many = self.seconds(kind, training, self.settings.threads[-1])
        return {length: few[length] / many[length] for length in few}

    def bytes(self, kind: str, training: bool) -> dict[int, int]:
        """Memory by length."""
        return {p.length: p.bytes for p in self.memory if (p.kind, p.training) == (kind, training)}

    def crossing(self, attention: str, recurrent: str, training: bool, threads: int) -> float:
        """The length from which on `attention` takes longer than `recurrent`, as measured.

        Between two lengths, times are taken for powers of the length. 0 where attention takes longer from the
        first length on, infinity where it does not at the last.
        """
        ours, theirs = (self.seconds(kind, training, threads) for kind in (attention, recurrent))
        ratios = [(length, math.log(ours[length] / theirs[length])) for length in sorted(ours)]
        if not ratios or ratios[-1][1] <= 0:
            return math.inf
        low, below = next(((length, ratio) for length, ratio in reversed(ratios) if ratio <= 0), (0, 0.0))
        if not low:
            return 0.0
        high, above = min((length, ratio) for length, ratio in ratios if length > low)
        return float(low * (high / low) ** (-below / (above - below)))

    def crossing_of_flops(self, attention: str, recurrent: str, training: bool) -> float:
        """The same, were time proportional to `count_flops`."""
        width, window = self.settings.width, self.settings.window

        def longer(length: int) -> bool:
            ours, theirs = (
                count_flops(kind, length, width, window=window, training=training)
                for kind in (attention, recurrent)
            )
            return ours > theirs

        low, high = 0, 1
        while not longer(high):
            low, high = high, 2 * high
            if high > _LONGEST:
                return math.inf
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if longer(middle) else (middle, high)
        return float(low)


def measure_cost(settings: CostSettings | None = None, progress: Progress | None = None) -> Cost:
    """Measure time, then memory.

    Parameters
    ----------
    settings : CostSettings, optional
        Default: ``CostSettings()``, the full comparison.
    progress : callable, optional
        Called before each measurement with what is done, of how much, and what comes.

    Returns
    -------
    Cost
        Without memory where the operating system does not tell a process how large it has been.
    """
    cost = Cost(settings or CostSettings())
    settings = cost.settings
    cost.peaks = [_core.measure_peak("fma_f32", threads, 0.1) for threads in settings.threads]
    timed = list(product(settings.lengths, settings.kinds, (False, True), settings.threads))
    weighed = list(product(settings.memory_lengths, settings.kinds, (False, True)))
    total = settings.rounds * len(timed) + len(weighed)
    best: dict[tuple[Any, ...], Timing] = {}
    for done, point in enumerate(timed * settings.rounds):
        length, kind, training, threads = point
        if progress is not None:
            told = "training" if training else "forward"
            progress(done, total, f"{kind}, {length} rows, {told}, threads: {threads}")
        timing = time_layer(settings, kind, length, training, threads)
        best[point] = timing if point not in best else _quicker(best[point], timing)
    cost.timings = list(best.values())
    for done, (length, kind, training) in enumerate(weighed, settings.rounds * len(timed)):
        if progress is not None:
            progress(done, total, f"memory of {kind}, {length} rows, {'training' if training else 'forward'}")
        peak = peak_bytes(kind, length, training, threads=settings.threads[-1], **settings.sizes)
        if peak is None:
            break
        cost.memory.append(Memory(kind, length, training, peak))
    return cost


def time_layer(settings: CostSettings, kind: str, length: int, training: bool, threads: int) -> Timing:
    """Time one layer at one length."""
    with seeded(0, threads):
        make_call(kind, settings.lengths[0], training, **settings.sizes)()  # what libraries set up once
        call = make_call(kind, length, training, **settings.sizes)
        times = [_time(call)]
        while sum(times) < settings.seconds * (1 if len(times) >= _FEWEST_CALLS else _PATIENCE):
            times.append(_time(call))
    flops = count_flops(kind, length, settings.width, window=settings.window, training=training)
    return Timing(kind, length, training, threads, min(times), len(times), flops)


def _quicker(one: Timing, other: Timing) -> Timing:
    """Of two measurements of the same: the quickest call of either."""
    return replace(one, seconds=min(one.seconds, other.seconds), calls=one.calls + other.calls)


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
