"""What `position` may be in an attention module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn._common import DerivedBuffers
from fastattn.nn.positions import RelativePositionBias, alibi_slopes
from fastattn.nn.rotary import RotaryEmbedding


class Alibi(DerivedBuffers):
    """Slopes as a buffer that follows the module and is not stored."""

    slopes: Tensor

    def __init__(self, num_heads: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self._place_buffers(device)

    def _derived(self) -> dict[str, Tensor]:
        return {"slopes": alibi_slopes(self.num_heads, device="cpu", dtype=torch.float32)}

    def forward(self, device: torch.device) -> Tensor:
        """Return the slopes, for a call there."""
        self._leave_meta(self.slopes, device)
        return self.slopes

    def extra_repr(self) -> str:
        """How many slopes there are."""
        return f"num_heads={self.num_heads}"


def check_position(position: Any, head_dim: int, num_heads: int, factory: dict[str, Any]) -> nn.Module | None:
    """Return the module that `position` is or names, once it fits the heads."""
    if position is None:
        return None
    if isinstance(position, str):
        if position == "alibi":
            return Alibi(num_heads, factory["device"])
        if position == "rotary":
            return RotaryEmbedding(head_dim, device=factory["device"])
        raise ValueError(f"position must be 'rotary', 'alibi' or a module, got {position!r}")
    if isinstance(position, RotaryEmbedding):
        if position.head_dim != head_dim:
            raise ValueError(f"position must turn head_dim = {head_dim} columns, got {position.head_dim}")
        return position
    if isinstance(position, RelativePositionBias):
        if position.num_heads != num_heads:
            raise ValueError(f"position must have num_heads = {num_heads} heads, got {position.num_heads}")
        return position
    expected = "a RotaryEmbedding, a RelativePositionBias, 'rotary', 'alibi' or None"
    raise TypeError(f"position must be {expected}, got {type(position).__name__}")
