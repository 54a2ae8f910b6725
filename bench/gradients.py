"""The way back: how a backward is run and read, for every peer whose outputs carry a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bench.programs import Read, Run

if TYPE_CHECKING:
    from bench.peers import Call, Peer

INPUTS = ("query", "key", "value")


def prepare(peer: Peer, call: Call, mode: str) -> tuple[Run, Read]:
    """The backward alone, through the graph of one forward, or both; and how the results are read."""
    import torch

    forward, inputs = peer.prepare(call), [getattr(call, name) for name in INPUTS]
    if mode == "backward":
        out = forward()

        def run() -> Any:
            return torch.autograd.grad(out, inputs, call.grad_out, retain_graph=True)

    else:

        def run() -> Any:
            out = forward()
            return (*torch.autograd.grad(out, inputs, call.grad_out), out.detach())

    def read(results: Any) -> dict[str, np.ndarray]:
        named = zip((*INPUTS, "out"), results, strict=False)  # a backward alone has no output
        return {name: peer.read(result, call.case) for name, result in named}

    return run, read
