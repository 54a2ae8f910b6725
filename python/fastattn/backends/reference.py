"""The NumPy oracle as a backend: slow, for comparison, and used only when named."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastattn.backends.base import elsewhere
from fastattn.cache_problem import CacheUpdate
from fastattn.outputs import InsightOutputs, Outputs
from fastattn.problem import AttentionProblem
from fastattn.reference import each_head, each_insight, update_cache


class ReferenceBackend:
    """Attention in float64, rounded once to the output's dtype."""

    name = "reference"

    def supports(self, problem: AttentionProblem) -> list[str]:
        """Anything goes that is in the memory of the CPU."""
        return elsewhere(problem)

    def run(self, problem: AttentionProblem, outputs: Outputs) -> None:
        """Compute one head at a time and store it."""
        for rows, sequence in problem.sequences():
            for (b, h), head in each_head(sequence):
                for view, result in zip(outputs, head, strict=True):
                    if view is not None:
                        view.write((b, h, rows), result)

    def run_insight(
        self, problem: AttentionProblem, outputs: InsightOutputs, edges: NDArray[np.int64] | None
    ) -> None:
        """Compute one head at a time and store it."""
        for index, head in each_insight(problem, outputs.keys.shape[3], edges):
            for view, result in zip(outputs, head, strict=True):
                if view is not None and result is not None:
                    view.write(index, result)

    def update_cache(self, problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
        """Write one row of one head after the other."""
        return update_cache(problem, update)

    def describe(self, problem: AttentionProblem) -> dict[str, str]:
        """Tell how it would be run."""
        return {"path": "NumPy in float64, one head at a time"}
