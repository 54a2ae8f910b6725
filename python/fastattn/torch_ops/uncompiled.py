"""What compilers of torch leave alone: imported in a trace only, since it brings their machinery with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` between two compiled graphs."""
    return function(*arguments)
