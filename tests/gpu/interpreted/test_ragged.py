"""Sequences one behind the other: each is a call of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bounds
import fastattn as fa
import places
from fastattn.gpu.schedule import schedule_of
from portable import Results, assert_right
from test_backward import assert_close

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 24
# Of queries and of keys: none, one, a tile, a little more; none of one and some of the other.
LENGTHS = ([0, 1, 32, 45, 0, 7, 0], [3, 1, 40, 70, 0, 0, 0])


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def tensors(dtype: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (sum(LENGTHS[0]), HEADS, DIM),
        "key": (sum(LENGTHS[1]), KV_HEADS, DIM),
        "value": (sum(LENGTHS[1]), KV_HEADS, VALUE_DIM),
    }
    return {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()
        for name, shape in shapes.items()
    }


def options(kind: str) -> dict[str, Any]:
    slopes, sinks = torch.tensor([0.5, 0.2, 0.1, 0.0]), torch.tensor([0.3, -1.0, 2.0, -torch.inf])
    slopes_of_each = slopes * torch.arange(1, len(LENGTHS[0]) + 1)[:, None]
    return {
        "full": {},
        "causal": {"causal": True},
        "top left": {"causal": "top_left"},
        "window": {"window": (20, 5)},
        "all": {
            "causal": True,
            "window": (50, None),
            "softcap": 3.0,
            "alibi_slopes": slopes.requires_grad_(),
            "sinks": sinks.requires_grad_(),
        },
        "slopes of each": {"alibi_slopes": slopes_of_each.requires_grad_()},
    }[kind]


KINDS = ("full", "causal", "top left", "window", "all", "slopes of each")


def attend(call: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    return fa.attention_varlen(*call.values(), *map(starts, LENGTHS), return_lse=True, **more)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.gpu_slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_is_each_sequence_on_its_own(kind: str, dtype: str) -> None:
    call, rules = {name: x.detach() for name, x in tensors(dtype).items()}, options(kind)
    rules = {name: x.detach() if isinstance(x, Tensor) else x for name, x in rules.items()}
    out, lse = attend(call, backend="triton", **rules)
    q, k = (starts(lengths).tolist() for lengths in LENGTHS)
    for s in range(len(q) - 1):
        rows, keys = slice(*q[s : s + 2]), slice(*k[s : s + 2])
        alone = [
            call[name][r].transpose(0, 1)[None] for name, r in zip(call, (rows, keys, keys), strict=True)
        ]
        if kind == "slopes of each":
            rules["alibi_slopes"] = options(kind)["alibi_slopes"].detach()[s]
        expected = bounds.expect(*alone, **rules)
        assert_right(Results(out[rows].transpose(0, 1)[None], lse[:, rows][None]), expected, dtype)


@pytest.mark.parametrize(
    "kind", [*KINDS[4:], *(pytest.param(kind, marks=pytest.mark.gpu_slow) for kind in KINDS[:4])]
)
def test_gradients(kind: str) -> None:
    """Beside operations of torch in float64, sequence by sequence."""

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        call, rules = tensors("float32"), options(kind)
        given = call | {name: x for name, x in rules.items() if isinstance(x, Tensor)}
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
        call, rules = (
            {name: leaves[name] for name in call},
            rules | {n: x for n, x in leaves.items() if n in rules},
        )
        out, lse = attend(call, backend=backend, dropout_p=0.2, dropout_seed=5, **rules)
        generator = torch.Generator().manual_seed(1)
        loss = (out * torch.randn(out.shape, generator=generator)).sum()
        loss = loss + (lse.masked_fill(lse.isinf(), 0) * torch.randn(lse.shape, generator=generator)).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    assert_close(run("triton", torch.float32), run("math", torch.float64), "float32")


def test_nothing_is_read_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    places.on_device(monkeypatch)
    call = {name: x.detach() for name, x in tensors("float32").items()}
    expected = attend(call, backend="triton", causal=True)
    at = [starts(lengths) for lengths in LENGTHS]
    with places.unread(monkeypatch):
        actual = fa.attention_varlen(*call.values(), *at, causal=True, return_lse=True, backend="triton")
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_every_block_has_a_program() -> None:
    for lengths in [5], [0], [0, 64, 1, 0, 130, 32], [32] * 9:
        schedule = schedule_of(starts(lengths), sum(lengths), 32)
        assert schedule is not None
        blocks = [(s, block) for s, length in enumerate(lengths) for block in range(-(-length // 32))]
        found = [tuple(pair) for pair in schedule.tolist()]
        assert len(found) == sum(lengths) // 32 + len(lengths)
        assert sorted(set(found) & set(blocks)) == blocks
        assert all(block * 32 >= lengths[s] for s, block in set(found) - set(blocks))
        assert len(set(found)) == len(found)


def test_whatever_starts_on_a_device_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row outside of memory is read or written; rows that belong to nobody stay as they are."""
    places.on_device(monkeypatch)
    call = {name: x.detach() for name, x in tensors("float32").items()}
    at = torch.tensor([-5, 20, 10, 2**40, 30, -(2**62), 7, 2**62])
    for cu_seqlens in (at, starts(LENGTHS[1])), (starts(LENGTHS[0]), at), (at, at.flip(0)):
        fa.attention_varlen(*call.values(), *cu_seqlens, causal=True, backend="triton")
