"""Padding, documents in one sequence, ragged batches and caches; each function is one check."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpu_check import reference
from gpu_check.checks import GRADIENT, WrongError, compare
from gpu_check.torch_checks import LIMIT, TorchCheck, need_device, tensors

LENGTHS = ((1, 0, 200, 64, 333, 0, 7), (77, 3, 200, 500, 333, 0, 0))  # of queries and keys
PAGE = 24
ROOM = 960  # keys that a sequence's pages hold
PROMPTS = (333, 600, 1)


def gradients_of(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of the sum of squares, which no dtype draws otherwise."""
    return list(torch.autograd.grad(out.float().square().sum(), inputs))


def hold_both(found: Tensor, right: Tensor, inputs: list[Tensor], wide: list[Tensor]) -> None:
    """Compare out, and gradients of query, key and value."""
    compare("out", found.detach(), right.detach(), LIMIT)
    names = ("query", "key", "value")
    for name, one, other in zip(names, gradients_of(found, inputs), gradients_of(right, wide), strict=True):
        compare(f"gradient of {name}", one, other, GRADIENT * LIMIT)


def widened(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def padding_on_both_sides(device: str) -> None:
    import fastattn as fa

    inputs = tensors(device, grad=True)
    options: dict[str, Any] = {
        "kv_starts": torch.tensor([100, 0], device=device),
        "kv_lengths": torch.tensor([333, 70], device=device),
        "query_lengths": torch.tensor([333, 70], device=device),
        "causal": True,
    }
    wide = widened(inputs)
    hold_both(fa.attention(*inputs, **options), reference.attend(*wide, **options).out, inputs, wide)


def documents_in_one_sequence(device: str) -> None:
    import fastattn as fa

    inputs = tensors(device, grad=True)
    ids = torch.tensor([0, 5, 4, 9], device=device).repeat_interleave(
        torch.tensor([60, 4, 200, 69]).to(device)
    )
    mixed = torch.arange(333, device=device) % 3
    for segments in ids.expand(2, -1), torch.stack([ids, mixed]):
        for causal in True, False:
            options: dict[str, Any] = {"segment_ids": (segments, segments), "causal": causal}
            wide = widened(inputs)
            right = reference.attend(*wide, **options).out
            hold_both(fa.attention(*inputs, **options), right, inputs, wide)


def sequences_behind_one_another(device: str) -> None:
    import fastattn as fa

    rows, keys = map(sum, LENGTHS)
    shapes = ((rows, 8, 128), (keys, 2, 128), (keys, 2, 128))
    inputs = [torch.randn(x, device=device).bfloat16().requires_grad_() for x in shapes]
    at = [torch.tensor([0, *lengths]).cumsum(0) for lengths in LENGTHS]
    for options in ({}, {"causal": True}, {"window": (50, 9), "softcap": 3.0}):
        out = fa.attention_varlen(*inputs, *(x.to(device) for x in at), **options)
        wide, parts = widened(inputs), []
        for (q, q_end), (k, k_end) in zip(*(pairwise(x.tolist()) for x in at), strict=True):
            own = wide[0][q:q_end], wide[1][k:k_end], wide[2][k:k_end]
            each = reference.attend(*(x.transpose(0, 1)[None] for x in own), **options).out
            parts.append(each[0].transpose(0, 1))
        hold_both(out, torch.cat(parts), inputs, wide)


def caches_in_one_piece(device: str) -> None:
    hold_caches(device, torch.bfloat16, paged=False)


def caches_in_pages(device: str) -> None:
    hold_caches(device, torch.bfloat16, paged=True)


def caches_of_int8(device: str) -> None:
    hold_caches(device, torch.int8, paged=True)


def caches_of_e4m3(device: str) -> None:
    hold_caches(device, torch.float8_e4m3fn, paged=False)


def caches_of_e5m2(device: str) -> None:
    hold_caches(device, torch.float8_e5m2, paged=True)


def hold_caches(device: str, dtype: torch.dtype, paged: bool) -> None:
    """A prompt, then tokens one and four at a time, attend to what the caches hold."""
    import fastattn as fa

    batch, slots = len(PROMPTS), ROOM // PAGE
    shape = (batch * slots + 1, PAGE, 2, 128) if paged else (batch, ROOM, 2, 128)
    caches = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("key", "value")}
    scales: dict[str, Tensor] = {}
    if dtype != torch.bfloat16:
        scales = {f"{name}_scale": torch.zeros(shape[:3], device=device) for name in caches}
    table = torch.randperm(batch * slots).reshape(batch, slots).to(device).int() if paged else None
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    for rows in (max(PROMPTS), 1, 4):
        query, key, value = (torch.randn(batch, rows, n, 128, device=device).bfloat16() for n in (8, 2, 2))
        out = fa.attention_with_kvcache(
            query, caches["key"], caches["value"], new_key=key, new_value=value, cache_seqlens=lengths,
            block_table=table, **scales,
        )  # fmt: skip
        lengths = lengths + rows
        for b, length in enumerate(lengths.tolist()):
            keys, values = (stored(caches, scales, name, table, b)[:length] for name in caches)
            for name, found, new in ("key", keys, key), ("value", values, value):
                limit = {torch.bfloat16: 0.0, torch.int8: 1e-2, torch.float8_e4m3fn: 4e-2}.get(dtype, 8e-2)
                compare(f"{name} in the cache", found[length - rows :], new[b].double(), limit)
            own = (x.transpose(0, 1)[None] for x in (query[b], keys, values))
            right = reference.attend(*own, causal=True).out[0].transpose(0, 1)
            compare("out", out[b], right, LIMIT)
        if rows > 4:  # the next tokens follow prompts of several lengths
            lengths = torch.tensor(PROMPTS, dtype=torch.int32, device=device)


def stored(
    caches: dict[str, Tensor], scales: dict[str, Tensor], name: str, table: Tensor | None, b: int
) -> Tensor:
    """The rows of one sequence, (ROOM, Hkv, D) in float64."""
    rows = caches[name].double() if f"{name}_scale" not in scales else caches[name].float().double()
    if scales:
        rows = rows * scales[f"{name}_scale"].double()[..., None]
    return rows[b] if table is None else rows[table[b].long()].flatten(0, 1)


def graph_replays_a_token_over_pages(device: str) -> None:
    import fastattn as fa
    from gpu_check.torch_checks import capture

    need_device(device)
    caches = torch.randn(2, 80, PAGE, 2, 128, device=device, dtype=torch.bfloat16).unbind(0)
    table = torch.arange(80, device=device).reshape(2, 40)
    lengths = torch.tensor([900, 17], device=device)
    query, key, value = (torch.randn(2, 1, n, 128, device=device).bfloat16() for n in (8, 2, 2))

    def run() -> Tensor:
        return fa.attention_with_kvcache(
            query, *caches, new_key=key, new_value=value, cache_seqlens=lengths, block_table=table
        )

    graph, out = capture(run)
    for first in 5, 700:
        lengths.copy_(torch.tensor([first, 40]))
        for tensor in query, key, value:
            tensor.normal_()
        out.fill_(float("nan"))
        graph.replay()
        if not torch.equal(out, run()):
            raise WrongError("a replay differs from a call")


CHECKS = tuple(
    TorchCheck(action)
    for action in (
        sequences_behind_one_another,
        documents_in_one_sequence,
        padding_on_both_sides,
        caches_in_one_piece,
        caches_in_pages,
        caches_of_int8,
        caches_of_e4m3,
        caches_of_e5m2,
        graph_replays_a_token_over_pages,
    )
)
