"""Which kernel computes a call: one place, so that what runs is what is explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.gpu import configs, forward
from fastattn.gpu.call import Call


class Kernel(NamedTuple):
    """A forward kernel for one call."""

    name: str
    launch: Callable[[Call, Tensor, Tensor | None], None]  # writes out and, unless it is None, lse
    tiles: Mapping[str, Any]
    refusals: Mapping[str, list[str]]  # why it is none of the kernels that come before it

    def described(self) -> dict[str, str]:
        """What `fastattn.explain` prints."""
        tiles = ", ".join(f"{name} {value}" for name, value in self.tiles.items())
        passed_over = {f"no {name}": "; ".join(why) for name, why in self.refusals.items()}
        return {"kernel": self.name, "tiles": tiles, **passed_over}


def of_forward(call: Call) -> Kernel:
    """Choose the kernel that computes out and lse."""
    return Kernel("portable", forward.forward, configs.forward(call), {})
