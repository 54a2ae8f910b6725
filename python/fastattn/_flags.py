"""Switches in the environment, which are read once like every variable of fastattn."""

from __future__ import annotations

import os
from functools import cache


@cache
def flag(name: str, default: bool = False) -> bool:
    """Whether the variable `name` is 1; `default` if it is unset or empty, a ValueError if it is not 0."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1" if value else default


@cache
def interprets() -> bool:
    """Whether Triton's functions run in Python, which Triton decides by this variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
