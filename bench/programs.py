"""Programs: more than a call of attention, run whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Run = Callable[[], Any]
Read = Callable[[Any], dict[str, np.ndarray]]  # what a run returned, in float64


@dataclass(frozen=True)
class Program:
    """Stands where a job may have a `Case`. A subclass adds sizes, and how the program is made from them."""

    unit: ClassVar[str]  # of work a second
    peers: ClassVar[tuple[str, ...]] = ("fastattn", "torch")  # who can run it
    name: str

    def work(self, mode: str) -> float:
        """What one run does, in what `unit` counts a second."""
        raise NotImplementedError

    def tolerance(self, dtype: str) -> float:
        """The error allowed: root mean square, over that of the array."""
        raise NotImplementedError

    def prepare(self, peer: str, dtype: str, mode: str) -> tuple[Run, Read]:
        """What is timed, with the attention of `peer`, and how its result is read."""
        raise NotImplementedError

    def truth(self, dtype: str, mode: str) -> dict[str, np.ndarray]:
        """The same in float64. Raises ModuleNotFoundError where something is not installed."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name
