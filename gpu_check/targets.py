"""The marks that the project has set itself on an H100 or H200, as ratios within one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Rows = dict[str, dict[str, Any]]  # what a row found, by its label


@dataclass(frozen=True)
class Target:
    """A row, who is held against whom in it, and how much it must and should reach."""

    title: str
    row: str
    ours: str
    against: tuple[str, ...]  # the fastest of them; empty: the copy ceiling
    must: float | None
    aim: float

    def reached(self, rows: Rows, ceilings: dict[str, float]) -> float | None:
        """Their time over ours, or our share of the ceiling; None where something was not timed."""
        row = rows.get(self.row, {})
        seconds = {
            name: entry["seconds"] for name, entry in row.get("contestants", {}).items() if "seconds" in entry
        }
        if self.ours not in seconds:
            return None
        if not self.against:
            return row["bytes"] / seconds[self.ours] / ceilings["copy"] if "copy" in ceilings else None
        others = [seconds[name] for name in self.against if name in seconds]
        return min(others) / seconds[self.ours] if others else None


def _forward(kernels: str, causal: bool, against: tuple[str, ...], must: float, aim: float) -> Target:
    told = "causal" if causal else "full"
    return Target(
        f"{kernels} forward, d128 bf16 8k {told}, against {' or '.join(against)}",
        f"d128-s8192{'-causal' if causal else ''} forward", kernels, against, must, aim,
    )  # fmt: skip


def _backward(kernels: str, must: float, aim: float) -> Target:
    title = f"{kernels} backward, d128 bf16 8k causal, against cudnn"
    return Target(title, "d128-s8192-causal backward", kernels, ("cudnn",), must, aim)


TARGETS = (
    _forward("portable", False, ("cudnn", "flash"), 0.75, 0.9),
    _forward("portable", True, ("cudnn", "flash"), 0.62, 0.9),
    _forward("hopper", False, ("cudnn",), 0.9, 1.05),
    _forward("hopper", True, ("cudnn",), 0.9, 1.05),
    _backward("portable", 0.5, 0.7),
    _backward("hopper", 0.5, 0.7),
    _backward("portable atomic", 0.6, 1.0),
    Target(
        "window 128 at 16k, against flex", "d128-s16384-window128 forward", "portable", ("flex",), 1.0, 2.0
    ),
    Target("decode, 1 query: share of the copy ceiling", "decode-1 forward graph", "decode", (), 0.8, 0.9),
    # As torch calls it. With heads folded into rows it reads at two thirds of the copy ceiling: nothing is
    # twice as fast as that. Those columns are in the table of decode rows.
    Target("decode, 8 queries, against cudnn", "decode-8 forward graph", "decode", ("cudnn",), 2.0, 4.0),
    Target(
        "launch overhead, against torch's",
        "overhead-1x8x128x64",
        "fastattn forward",
        ("torch forward",),
        None,
        1.0,
    ),
)
