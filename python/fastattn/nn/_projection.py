"""Projections to query, key and value: one weight each, or several in one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

PACKS = ("qkv", "kv", "q", "k", "v")  # letters say whose weights lie one below the other


def projection(in_features: int, sizes: list[int], bias: bool, **factory: Any) -> nn.Linear:
    """Return the module that maps rows to results of these widths, its parameters drawn.

    One map is a plain `torch.nn.Linear`: what quantises or replaces layers may go by their exact class.
    """
    if len(sizes) > 1:
        return PackedLinear(in_features, sizes, bias, **factory)
    device = factory["device"] or torch.get_default_device()
    # The constructor would draw, too: fused and separate weights are to take the same random numbers.
    linear = nn.Linear(in_features, sizes[0], bias, **{**factory, "device": "meta"}).to_empty(device=device)
    draw(linear, sizes)
    return linear


def draw(linear: nn.Linear, sizes: list[int]) -> None:
    """Draw each weight as if it were alone, uniformly (Glorot and Bengio, 2010); vectors are 0."""
    with torch.no_grad():
        for weight in torch.split(linear.weight, sizes):
            nn.init.xavier_uniform_(weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


class PackedLinear(nn.Linear):
    """Linear maps from rows of one width, their weights one below the other in `weight`.

    Parameters
    ----------
    in_features : int
    sizes : sequence of int
        How wide the result of each map is.
    bias : bool
    device, dtype : optional
    """

    def __init__(self, in_features: int, sizes: list[int], bias: bool, **factory: Any) -> None:
        self.sizes = list(sizes)
        super().__init__(in_features, sum(sizes), bias=bias, **factory)

    def reset_parameters(self) -> None:
        """Draw the parameters as those of separate maps."""
        draw(self, self.sizes)

    def forward(self, *sources: Tensor | None) -> Any:
        """Map each source by its weight; None stays None.

        The results are views of one product if sources are the same.
        """
        first = sources[0]
        if first is not None and all(source is first for source in sources):
            return torch.split(super().forward(first), self.sizes, dim=-1)
        weights = torch.split(self.weight, self.sizes)
        biases: Any = [None] * len(weights) if self.bias is None else torch.split(self.bias, self.sizes)
        return tuple(
            None if source is None else F.linear(source, weight, bias)
            for source, weight, bias in zip(sources, weights, biases, strict=True)
        )


def repack(state_dict: dict[str, Any], prefix: str, packs: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Make a state_dict of other packs one of `packs`, in place; incomplete ones are left as they are."""
    for name in ("weight", "bias"):
        keys = {pack: f"{prefix}{pack}_proj.{name}" for pack in PACKS}
        foreign = [pack for pack in PACKS if pack not in packs and keys[pack] in state_dict]
        pieces: dict[str, Tensor] = {}
        for pack in foreign:
            tensor, heights = state_dict[keys[pack]], [sizes[letter] for letter in pack]
            # What is of other sizes is cut and joined all the same, for load_state_dict to say that it is.
            fits = len(tensor) == sum(heights)
            parts = tensor.split(heights) if fits else tensor.tensor_split(len(pack))
            pieces.update(zip(pack, parts, strict=True))
        missing = [pack for pack in packs if keys[pack] not in state_dict]
        if not pieces or set("".join(missing)) != set(pieces):
            continue
        for pack in foreign:
            del state_dict[keys[pack]]
        for pack in missing:
            state_dict[keys[pack]] = torch.cat([pieces[letter] for letter in pack])
