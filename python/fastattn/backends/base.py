"""What a backend is."""

from __future__ import annotations

from typing import Protocol

from fastattn.arrays import Array
from fastattn.cache_problem import CacheUpdate
from fastattn.outputs import Gradients, InsightOutputs, Outputs
from fastattn.problem import AttentionProblem
from fastattn.vectors import Vector


class Backend(Protocol):
    """One way to compute attention."""

    name: str

    def supports(self, problem: AttentionProblem) -> list[str]:
        """Say why `problem` cannot be run; empty if it can."""

    def run(self, problem: AttentionProblem, outputs: Outputs) -> None:
        """Write every element of `outputs`; called only if `supports` found nothing to say."""

    def describe(self, problem: AttentionProblem) -> dict[str, str]:
        """Tell how `problem` would be run: instruction set, path, threads."""


class DifferentiableBackend(Backend, Protocol):
    """One that has a backward of its own."""

    def run_backward(
        self, problem: AttentionProblem, outputs: Outputs, incoming: Outputs, gradients: Gradients
    ) -> None:
        """Write `gradients`, given out and lse of the call and the gradients of out, lse and weights."""


class InsightBackend(Backend, Protocol):
    """One that tells what each query looks at."""

    def run_insight(self, problem: AttentionProblem, outputs: InsightOutputs, edges: Vector | None) -> None:
        """Write every element of `outputs`; `edges`: rising distances at which buckets start, int64."""


class CachingBackend(Backend, Protocol):
    """One that writes into caches."""

    def update_cache(self, problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
        """Write the new rows; return the problem to run then, whose query is turned if it is to be."""


class ComposingBackend(Backend, Protocol):
    """One made of operations of torch: tensors of any device and graph come in, and results carry theirs."""

    def compose(
        self, problem: AttentionProblem, return_lse: bool, return_weights: bool
    ) -> tuple[Array, Array | None, Array | None]:
        """Return out in the caller's layout, lse and weights; called in place of `run` if there is no out."""


def elsewhere(problem: AttentionProblem) -> list[str]:
    """The reason, if there is one, of a backend that reads memory from the CPU."""
    if problem.library.on_host:
        return []
    device = problem.query.array.device
    return [f"the tensors are on device '{device}', expected 'cpu'"]
