"""What was timed, and which of it may be believed. Nothing here measures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

# A sample counts if both readings of the ceiling beside it are within 4% of the best of the run, and their
# threads had the cores to themselves, by CPU time: readings are the best of runs of 2 ms, and can miss a
# competitor. Memory is shared with other machines and gives twice as much when those are still: there the two
# readings are within 15% of each other.
_SLOWEST, _STEADY = 0.96, 0.85
_LEAST_BUSY = 0.985
# And if the call itself had as many cores as it usually has.
_CORES = 0.95
TRUSTED = 3  # samples that must be left


class Reading(NamedTuple):
    """The machine's ceiling at one moment."""

    rate: float  # GFLOP/s or GB/s
    busy: float  # CPU time over threads and wall time


class Sample(NamedTuple):
    """One turn of one contestant, between two readings."""

    seconds: float  # of a call, the median of the turn
    cores: float  # CPU time over wall time
    before: Reading
    after: Reading
    floor: float = 0.0  # seconds in which the same memory is read and no more; 0: not measured

    @property
    def ceiling(self) -> float:
        return max(self.before.rate, self.after.rate)

    def share(self, work: float) -> float | None:
        """Of the floor if there is one, else of the ceiling: they may be on pages of other sizes."""
        if self.floor:
            return self.floor / self.seconds
        return work / self.seconds / self.ceiling if self.ceiling else None


@dataclass
class Contestant:
    """A peer on one row: right, lower, wrong, refused, absent or failed; samples if right."""

    status: str
    why: str = ""
    error: float | None = None  # largest; None where there is no number
    relative: float | None = None  # root mean square, over that of the output
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """What the samples say."""

    seconds: float  # median
    spread: float  # between the quartiles, over the median
    share: float  # of the floor or the ceiling: median, each sample against its own; 0: there is none
    kept: int
    dropped: int
    trusted: bool  # False: too few samples were left, and the figures are of all of them


def slow(sample: Sample, best: float, usual_cores: float, kind: str = "") -> bool:
    """Whether the machine was not itself; `best` is the best reading of the run."""
    readings = (sample.before, sample.after)
    least = _STEADY * sample.ceiling if kind == "read" else _SLOWEST * best
    return (
        min(reading.rate for reading in readings) < least
        or min(reading.busy for reading in readings) < _LEAST_BUSY
        or sample.cores < _CORES * usual_cores
    )


def keep(samples: list[Sample], best: float, kind: str = "") -> list[Sample]:
    """The samples that count."""
    usual = statistics.median(sample.cores for sample in samples) if samples else 0.0
    return [sample for sample in samples if not slow(sample, best, usual, kind)]


def figures(contestant: Contestant, work: float, best: float, kind: str = "") -> Figures | None:
    """Sum up; `work` is in units of 1e9 of what the ceiling counts a second. None without samples."""
    kept = keep(contestant.samples, best, kind)
    dropped = len(contestant.samples) - len(kept)
    used = kept if len(kept) >= TRUSTED else contestant.samples
    if not used:
        return None
    seconds = [sample.seconds for sample in used]
    shares = [share for sample in used if (share := sample.share(work)) is not None]
    return Figures(
        statistics.median(seconds),
        _quartile_range(seconds) / statistics.median(seconds),
        statistics.median(shares) if shares else 0.0,
        len(kept),
        dropped,
        used is kept,
    )


def _quartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
