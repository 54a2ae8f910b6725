"""Switches in the environment, which are read once like every variable of fastattn."""

from __future__ import annotations

import os
from functools import cache


@cache
def flag(name: str) -> bool:
    """Whether the variable `name` is 1; unset, empty and 0 are no, anything else a ValueError."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"
