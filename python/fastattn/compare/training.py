"""A layer between an embedding and a linear readout, and how it learns a task."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastattn._threads import num_threads_and_source, set_num_threads
from fastattn.compare.layers import ATTENTION, make_layer
from fastattn.compare.tasks import SYMBOLS, VOCABULARY
from fastattn.nn import LearnedPositionalEncoding, RelativePositionBias, SinusoidalPositionalEncoding

# How many, and where the random numbers come from: sequences and what is to be answered.
Draw: TypeAlias = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
# What is done, of how much, and what is going on.
Progress: TypeAlias = Callable[[int, int, str], None]

Job = TypeVar("Job")

POSITIONS = ("none", "sinusoidal", "learned", "rotary", "alibi", "relative")
_MARGIN = 1.0  # what gradients are clipped to: without it an RNN's explode
_HELD_OUT = 1_000_003  # added to the seed of what is learned from, for what is asked


class Reader(nn.Module):
    """Embedding, one layer, and a readout of the last row: (B, L) tokens to (B, `SYMBOLS`) logits."""

    def __init__(
        self,
        kind: str,
        width: int,
        *,
        heads: int = 4,
        window: int = 64,
        position: str = "none",
        length: int = 0,
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.place: nn.Module = nn.Identity()
        if position == "sinusoidal":
            self.place = SinusoidalPositionalEncoding(width, length)
        elif position == "learned":
            self.place = LearnedPositionalEncoding(length, width)
        inside = {"rotary": "rotary", "alibi": "alibi", "relative": RelativePositionBias(heads)}
        self.layer = make_layer(kind, width, heads=heads, window=window, position=inside.get(position))
        self.readout = nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Answer the question at the end of each sequence."""
        logits: Tensor = self.readout(self.layer(self.place(self.embedding(tokens)))[:, -1])
        return logits


def parameters(module: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(parameter.numel() for parameter in module.parameters())


def matched_width(kind: str, width: int, heads: int = 4) -> int:
    """The width at which a `Reader` of `kind` has about as many parameters as one of attention at `width`."""

    def size(kind: str, width: int) -> int:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return parameters(Reader(kind, width, heads=heads))

    if kind in ATTENTION:
        return width
    # An RNN has half as many at the same width, so that twice the width is past it.
    budget, widths = size("full", width), range(1, 2 * width + 1)
    above = bisect_left(widths, budget, key=lambda width: size(kind, width))
    return min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(size(kind, width) - budget))


def train(
    model: nn.Module,
    draw: Draw,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    checks: int = 10,
    questions: int = 1024,
) -> list[tuple[int, float]]:
    """Let `model` learn from sequences that `draw` makes, new ones at each step.

    Adam at `rate`, cross-entropy, gradients clipped to a norm of 1.

    Returns
    -------
    list of (step, accuracy)
        At `checks` steps, the last among them: the share of `questions` sequences that are answered
        correctly. They are drawn from another seed, once.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = draw(questions, torch.Generator().manual_seed(seed + _HELD_OUT))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    when = {round(steps * check / checks) for check in range(1, checks + 1)}
    curve = []
    for step in range(1, steps + 1):
        tokens, answers = draw(batch, generator)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(tokens), answers))
        nn.utils.clip_grad_norm_(model.parameters(), _MARGIN)
        optimizer.step()
        if step in when:
            curve.append((step, accuracy(model, *held_out)))
    return curve


def accuracy(model: nn.Module, tokens: Tensor, answers: Tensor) -> float:
    """The share of sequences whose likeliest answer is the right one."""
    with torch.inference_mode():
        return float((model(tokens).argmax(dim=-1) == answers).double().mean())


def announced(jobs: Sequence[Job], told: Callable[[Job], str], progress: Progress | None) -> Iterator[Job]:
    """Jobs one by one, each told to `progress` before its turn."""
    for done, job in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), told(job))
        yield job


@contextmanager
def seeded(seed: int, threads: int) -> Iterator[None]:
    """Draw from `seed` and compute on so many threads; afterwards both are what they were."""
    before, (ours, source) = torch.get_num_threads(), num_threads_and_source()
    torch.set_num_threads(threads)
    set_num_threads(threads)  # which the environment may have set to another
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
        set_num_threads(ours if source == "set_num_threads" else None)
