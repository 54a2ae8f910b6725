"""Which kernel computes a call: one place, so that what runs is what is explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.gpu import configs, hopper
from fastattn.gpu.call import Call
from fastattn.gpu.decode import decode
from fastattn.gpu.forward import forward

FEW_QUERIES = 64  # one tile of rows; beyond it there are programs enough without a division of the keys


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
    """Choose the kernel that computes out and lse, by what does not depend on batch and heads."""
    refusals: dict[str, list[str]] = {}
    reasons = _against_decode(call)
    if not reasons:
        return Kernel("decode", decode, configs.decode(call), refusals)
    refusals["decode"] = reasons
    reasons = hopper.supports(call)
    if not reasons:
        tiles = dict(
            zip(("BLOCK_M", "BLOCK_N", "stages"), hopper.FORWARD_TILES[call.query.shape[3]], strict=True)
        )
        return Kernel("hopper", hopper.forward, tiles, refusals)
    refusals["hopper"] = reasons
    return Kernel("portable", forward, configs.forward(call), refusals)


def _against_decode(call: Call) -> list[str]:
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    reasons = []
    if seqlen_q > FEW_QUERIES:
        reasons.append(f"{seqlen_q} queries are more than {FEW_QUERIES}")
    if seqlen_k <= (chunk := configs.decode_chunk(seqlen_k)):
        reasons.append(f"{seqlen_k} keys are one chunk of {chunk}")
    return reasons
