"""Long-range dependence: how far apart symbol and question may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fastattn.compare.layers import KINDS, check_kind
from fastattn.compare.tasks import SYMBOLS, recall_batch
from fastattn.compare.training import Progress, Reader, announced, matched_width, parameters, seeded, train


@dataclass(frozen=True)
class RecallSettings:
    """What is trained; the defaults are the full comparison.

    Attributes
    ----------
    kinds : tuple of str
        Of `KINDS`.
    distances : tuple of int
        Between what is to be remembered and the question. Each has a network of its own.
    width, heads : int
        Of attention. The others get the width at which they have as many parameters.
    window : int
        How many rows the kind "window" sees.
    steps, batch, rate : int, int, float
        Of Adam.
    seed : int
        Of weights and sequences.
    threads : int
        The products are small: more threads do not help.
    """

    kinds: tuple[str, ...] = KINDS
    distances: tuple[int, ...] = (5, 10, 20, 50, 100, 200, 500)
    width: int = 48
    heads: int = 4
    window: int = 64
    steps: int = 600
    batch: int = 32
    rate: float = 1e-2
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("kinds", "distances"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for kind in self.kinds:
            check_kind(kind)

    @classmethod
    def quick(cls) -> RecallSettings:
        """Settings that take half a minute."""
        return cls(kinds=("full", "rnn", "lstm"), distances=(5, 20, 80), steps=150)


@dataclass(frozen=True)
class Recalled:
    """One network, trained: its width and parameters, and the share of right answers at the end."""

    kind: str
    distance: int
    width: int
    parameters: int
    accuracy: float


@dataclass
class Recall:
    """All networks, and the share of right answers of one that guesses."""

    settings: RecallSettings
    chance: float = 1 / SYMBOLS
    results: list[Recalled] = field(default_factory=list)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Recall:
        """Read what `dataclasses.asdict` made."""
        results = [Recalled(**result) for result in content["results"]]
        return cls(RecallSettings(**content["settings"]), content["chance"], results)

    def accuracy(self, kind: str) -> dict[int, float]:
        """Accuracy by distance."""
        return {result.distance: result.accuracy for result in self.results if result.kind == kind}


def measure_recall(settings: RecallSettings | None = None, progress: Progress | None = None) -> Recall:
    """Train a network of each kind at each distance to recall the first symbol.

    Sequences are those of `tasks.recall_batch`. Kinds differ in the layer between embedding and readout
    alone, and have about the same number of parameters, as many steps and the same sequences.

    Parameters
    ----------
    settings : RecallSettings, optional
        Default: ``RecallSettings()``, the full comparison.
    progress : callable, optional
        Called before each network with what is done, of how much, and what comes.

    Returns
    -------
    Recall
    """
    recall = Recall(settings or RecallSettings())
    settings = recall.settings
    jobs = list(product(settings.distances, settings.kinds))
    for distance, kind in announced(jobs, lambda job: f"{job[1]} over a distance of {job[0]}", progress):
        recall.results.append(train_recall(settings, kind, distance))
    return recall


def train_recall(settings: RecallSettings, kind: str, distance: int) -> Recalled:
    """Train one network at one distance."""
    heads, window = settings.heads, settings.window
    width = matched_width(kind, settings.width, heads)
    with seeded(settings.seed, settings.threads):
        model = Reader(kind, width, heads=heads, window=window)
        curve = train(
            model,
            lambda count, generator: recall_batch(count, distance, generator),
            steps=settings.steps,
            batch=settings.batch,
            rate=settings.rate,
            seed=settings.seed,
            checks=1,
        )
    return Recalled(kind, distance, width, parameters(model), curve[-1][1])
