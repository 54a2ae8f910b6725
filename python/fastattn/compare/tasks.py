"""What the layers are trained to do: find what was marked among what was not.

A symbol is one token and, marked, another. The last token asks the question, and what the layer has made of
that row must tell the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

SYMBOLS = 10
VOCABULARY = 2 * SYMBOLS + 1  # symbols, marked symbols, the question
QUESTION = 2 * SYMBOLS


def recall_batch(count: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences whose first symbol is marked, and ask which one it was.

    Parameters
    ----------
    count : int
        How many sequences.
    distance : int
        From 1 up, between the marked symbol and the question; what lies between are other symbols.
    generator : torch.Generator

    Returns
    -------
    tokens, answers
        (count, distance + 1) and (count,) integers. Guessing is right once in `SYMBOLS`.
    """
    if distance < 1:
        raise ValueError(f"distance must be at least 1, got {distance}")
    tokens = torch.randint(SYMBOLS, (count, distance + 1), generator=generator)
    answers = tokens[:, 0].clone()
    tokens[:, 0] += SYMBOLS
    tokens[:, -1] = QUESTION
    return tokens, answers


def order_batch(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences in which two different symbols are marked, and ask which one came first.

    Parameters
    ----------
    count : int
        How many sequences.
    length : int
        Of the sequences, the question included; at least 3.
    generator : torch.Generator

    Returns
    -------
    tokens, answers
        (count, length) and (count,) integers. Who sees which two are marked but not where is right in half of
        the cases.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3, got {length}")
    tokens = torch.randint(SYMBOLS, (count, length), generator=generator)
    places = torch.rand(count, length - 1, generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    first = torch.randint(SYMBOLS, (count,), generator=generator)
    second = (first + torch.randint(1, SYMBOLS, (count,), generator=generator)) % SYMBOLS
    tokens.scatter_(1, places, torch.stack((first, second), dim=1) + SYMBOLS)
    tokens[:, -1] = QUESTION
    return tokens, first
