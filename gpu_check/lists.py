"""Every list that a process can be given, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_check.groups import GROUPS

ROWS = ("bench", "warm", "rehearsal")  # timed; run once, so that compilers have done their work; small


def items_of(name: str) -> Sequence[Any]:
    """The checks of a group, or the rows of the benchmark."""
    if name not in ROWS:
        return GROUPS[name]()
    from gpu_check import rows

    return {"bench": rows.timed, "warm": rows.warm, "rehearsal": rows.rehearsal}[name]()
