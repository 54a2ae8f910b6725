"""Attention in a few operations of torch, in float32 or in low precision: what flash-attention is held to.

Tensors have axes (batch, rows, heads, dim). The rule is that of its own tests: an error is at most some times
that of the same formula computed in low precision.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def visible(
    lengths_q: Tensor,
    lengths_k: Tensor,
    rows: tuple[int, int],
    causal: bool,
    window: Sequence[int],
    starts: Tensor | None = None,
) -> Tensor:
    """(B, 1, Lq, Lk): where there is a query, a key, and the key is in the query's reach."""
    distance, query, key = _distance(lengths_q, lengths_k, rows)
    seen = (query < lengths_q.view(-1, 1, 1, 1)) & (key < lengths_k.view(-1, 1, 1, 1))
    if starts is not None:
        seen = seen & (key >= starts.view(-1, 1, 1, 1))
    left, right = int(window[0]), 0 if causal else int(window[1])
    if left >= 0:
        seen = seen & (distance <= left)
    return seen & (-distance <= right) if right >= 0 else seen


def alibi(slopes: Tensor, lengths_q: Tensor, lengths_k: Tensor, rows: tuple[int, int]) -> Tensor:
    distance, _, _ = _distance(lengths_q, lengths_k, rows)
    return -slopes.expand(len(lengths_q), -1)[:, :, None, None] * distance.abs()


def _distance(lengths_q: Tensor, lengths_k: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """How far each key is behind the place of each query."""
    query = torch.arange(rows[0]).view(1, 1, -1, 1)
    key = torch.arange(rows[1]).view(1, 1, 1, -1)
    return query + (lengths_k - lengths_q).view(-1, 1, 1, 1) - key, query, key


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    low: bool,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    dtype = q.dtype if low else torch.float32
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    shrink = math.sqrt(q.shape[-1])
    # In low precision the keys are scaled, so that its error tells how much the order of operations matters.
    q, k = (q, k / shrink) if low else (q / shrink, k)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
    weights = scores.softmax(-1).masked_fill(~seen, 0).to(dtype)
    if keep is not None:
        weights, v = weights.masked_fill(~keep, 0), v / (1 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def assert_as_good(ours: Tensor, exact: Tensor, low: Tensor, times: int, slack: float = 1e-5) -> None:
    """An error of at most `times` that of low precision."""
    assert ours.isfinite().all()
    error, allowed = ((x.float() - exact.float()).abs().max().item() for x in (ours, low))
    assert error <= times * allowed + slack, f"error {error}, low precision has {allowed}"


def select(factors: Mapping[str, Sequence[Any]], quick: int, slow: int) -> pytest.MarkDecorator:
    """Parametrise by cases in which values of all factors meet at random, and each has its turn.

    The first `quick` of `slow` cases are run always.
    """
    columns = []
    for name, values in factors.items():
        drawn = list(itertools.islice(itertools.cycle(values), slow))
        parts = drawn[:quick], drawn[quick:]
        for part in parts:
            random.Random(name).shuffle(part)
        columns.append(parts[0] + parts[1])
    cases = []
    for number, drawn in enumerate(zip(*columns, strict=True)):
        name = "-".join(str(value).removeprefix("torch.") for value in drawn)
        case = SimpleNamespace(**dict(zip(factors, drawn, strict=True)))
        cases.append(pytest.param(case, id=name, marks=[pytest.mark.slow] if number >= quick else []))
    return pytest.mark.parametrize("case", cases)
