"""Which kernels compute a call: one place, so that what runs is what is explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn._flags import flag
from fastattn.gpu import configs, hopper
from fastattn.gpu.backward import backward
from fastattn.gpu.call import Call, Gradients
from fastattn.gpu.decode import decode
from fastattn.gpu.forward import forward

FEW_QUERIES = 64  # one tile of rows; beyond it there are programs enough without a division of the keys
SHORT = 256  # queries and keys up to which a call is over on the device before the host can launch the next


class Kernel(NamedTuple):
    """One way to compute a call."""

    name: str
    launch: Callable[..., None]  # of the forward: (call, out, lse or None)
    tiles: Callable[[Call], NamedTuple]
    refusals: Mapping[str, list[str]]  # why it is none of the kernels that come before it


def of_forward(call: Call) -> Kernel:
    """Choose the kernel that computes out and lse, by what does not depend on batch and heads."""
    refusals: dict[str, list[str]] = {}
    if not (reasons := _against_decode(call)):
        return Kernel("decode", decode, configs.decode, refusals)
    refusals["decode"] = reasons
    if not (reasons := _too_short_for_hopper(call) or hopper.supports(call)):
        return Kernel("hopper", hopper.forward, _hopper_tiles, refusals)
    refusals["hopper"] = reasons
    return Kernel("portable", forward, configs.forward, refusals)


def of_backward(call: Call, wanted: Gradients, grad_weights: Tensor | None, atomic: bool) -> Kernel:
    """Choose the kernels of the gradients `wanted`; launch: (call, out, lse, grad_out, grad_lse or None)."""

    def portable(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> None:
        backward(call, out, lse, grad_out, grad_lse, grad_weights, wanted, atomic)

    def on_hopper(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> None:
        hopper.backward(call, out, lse, grad_out, grad_lse, wanted)

    reasons = _too_short_for_hopper(call) or hopper.backward_supports(call)
    if grad_weights is not None:
        reasons.append("the weights have a gradient")
    if not reasons:
        return Kernel("hopper", on_hopper, _hopper_backward_tiles, {})
    return Kernel("portable", portable, partial(_backward_tiles, atomic), {"hopper": reasons})


def adds_atomically() -> bool:
    """Whether gradients of query are added up in any order: where the user asked for it."""
    return flag("FASTATTN_ATOMIC") and not torch.are_deterministic_algorithms_enabled()


def explained(call: Call) -> dict[str, str]:
    """What `fastattn.explain` prints: the kernels, there and back, and why it is none of the others."""
    rows = {}
    ways = {"kernel": of_forward(call), "backward": of_backward(call, Gradients(), None, adds_atomically())}
    for title, kernel in ways.items():
        tiles = ", ".join(
            f"{name} {value}" for name, value in kernel.tiles(call)._asdict().items() if value is not False
        )
        rows[title] = f"{kernel.name}: {tiles}"
        suffix = "" if title == "kernel" else f" {title}"
        rows |= {f"no {name}{suffix}": "; ".join(why) for name, why in kernel.refusals.items()}
    return rows


def _against_decode(call: Call) -> list[str]:
    seqlen_q, seqlen_k = call.query.shape[2], call.seqlen_k
    reasons = []
    if call.ragged is not None:
        reasons.append("sequences of any lengths follow one another")
    if seqlen_q > FEW_QUERIES:
        reasons.append(f"{seqlen_q} queries are more than {FEW_QUERIES}")
    if seqlen_k <= (chunk := configs.decode_chunk(seqlen_k)):
        reasons.append(f"{seqlen_k} keys are one chunk of {chunk}")
    return reasons


def _too_short_for_hopper(call: Call) -> list[str]:
    """TMA's descriptors are made anew for each call: the host takes longer for it than the portable kernels.

    Whatever the batch and the heads: no result depends on what else is in a batch.
    """
    longest = max(call.query.shape[2], call.seqlen_k)
    return (
        [f"up to {SHORT} queries and keys the host takes longer than the device"] if longest <= SHORT else []
    )


class HopperTiles(NamedTuple):
    """As `fastattn.explain` names them."""

    rows: int
    columns: int
    stages: int


def _backward_tiles(atomic: bool, call: Call) -> NamedTuple:
    return configs.backward_keys(call, False, atomic)


def _hopper_tiles(call: Call) -> HopperTiles:
    return HopperTiles(*hopper.FORWARD_TILES[call.query.shape[3]])


def _hopper_backward_tiles(call: Call) -> HopperTiles:
    return HopperTiles(*hopper.KEY_TILES[call.query.shape[3]])
