"""The layers that are compared: self-attention and the recurrent networks, each (B, L, W) to (B, L, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn import SelfAttention

ATTENTION = ("full", "causal", "window")
RECURRENT = ("rnn", "gru", "lstm")
KINDS = ATTENTION + RECURRENT

# Products of (W, W) by W for each row: query, key, value and output, or both maps of every gate.
_MAPS = {**dict.fromkeys(ATTENTION, 4), "rnn": 2, "gru": 6, "lstm": 8}
_MODULES = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


# torch starts the forget gate half closed, and an LSTM then forgets before it can learn what to keep: Gers,
# Schmidhuber, Cummins, "Learning to Forget", 2000; Jozefowicz, Zaremba, Sutskever, 2015, section 2.2.
_FORGET_BIAS = 1.0


class Recurrent(nn.Module):
    """A recurrent network of torch that returns its outputs alone, as attention does.

    An LSTM's forget gate starts with a bias of 1. Everything else is as torch draws it.
    """

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.network = _MODULES[kind](width, width, batch_first=True)
        if kind == "lstm":
            with torch.no_grad():
                self.network.bias_ih_l0[width : 2 * width] = _FORGET_BIAS
                self.network.bias_hh_l0[width : 2 * width] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Pass x, (B, L, W), through; the outputs of all steps, (B, L, W)."""
        out: Tensor = self.network(x)[0]
        return out


def make_layer(
    kind: str, width: int, *, heads: int = 4, window: int = 256, position: Any = None
) -> nn.Module:
    """One layer, untrained.

    Parameters
    ----------
    kind : {"full", "causal", "window", "rnn", "gru", "lstm"}
        Self-attention over all rows, over those up to a row's own, or over the last `window` of these; or a
        recurrent network of `torch.nn`, one layer in one direction.
    width : int
        W, of the rows that go in and come out, and of what a recurrent network carries on.
    heads, window : int
        Of attention.
    position
        As of `fastattn.nn.Attention`.

    Returns
    -------
    torch.nn.Module
        From (B, L, W) to (B, L, W).

    Raises
    ------
    ValueError
        For another kind, and where a recurrent network is given a position.
    """
    check_kind(kind)
    if kind in RECURRENT:
        if position is not None:
            raise ValueError(f"position must be None for {kind!r}, which reads in order, got {position!r}")
        return Recurrent(kind, width)
    bounds = (window - 1, 0) if kind == "window" else None
    return SelfAttention(width, heads, causal=kind != "full", window=bounds, position=position)


def make_call(
    kind: str, length: int, training: bool, *, width: int, heads: int, window: int
) -> Callable[[], Any]:
    """A call of one layer on one random sequence: forward, or forward and all gradients."""
    layer = make_layer(kind, width, heads=heads, window=window)
    x = torch.randn(1, length, width)
    if not training:
        layer.eval()

        def forward() -> Any:
            with torch.inference_mode():
                return layer(x)

        return forward
    x.requires_grad_()
    incoming, wanted = torch.randn_like(x), [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, incoming)


def visible_pairs(kind: str, length: int, window: int = 256) -> int:
    """How many pairs of query and key attention looks at; 0 for a recurrent network."""
    check_kind(kind)
    if kind in RECURRENT:
        return 0
    if kind == "full":
        return length * length
    seen = length if kind == "causal" else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def count_flops(kind: str, length: int, width: int, *, window: int = 256, training: bool = False) -> int:
    """Floating point operations that a layer cannot do without, for one sequence.

    Two for each multiply-add: ``2 W**2`` a row and linear map, of which attention has 4, an RNN 2, a GRU 6
    and an LSTM 8, and ``4 W`` for each pair of query and key that attention looks at. The backward does twice
    as much, and attention's scores once more. Softmax, gates and biases are not counted: they grow with
    ``W``, not with its square.
    """
    linear = 2 * _MAPS[check_kind(kind)] * length * width * width
    attention = 4 * width * visible_pairs(kind, length, window)
    return 3 * linear + 7 * attention // 2 if training else linear + attention


def check_kind(kind: str) -> str:
    """Return `kind`; ValueError, with those there are, for another."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind
