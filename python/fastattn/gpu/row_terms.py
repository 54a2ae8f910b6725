"""What the backward knows of each query row before it sees a tile: its normaliser, and the mean of its dP."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.gpu import configs, repeat
from fastattn.gpu.call import Call
from fastattn.gpu.forward import is_plain
from fastattn.gpu.rows import key_base, load_keys, load_rows, matrix, number_base, query_base, sequence_rows
from fastattn.gpu.schedule import block_in_order, programs, schedule_of
from fastattn.gpu.tile import (
    INF,
    LOG2E,
    adjusted,
    beyond,
    key_count,
    key_ranges,
    query_count,
    query_offset,
    row_count,
    rules_of,
    visible,
)

# From this lse on, its rounding to float32 may change probabilities by 2^-17 of themselves.
FAR = tl.constexpr(128.0)
# Half a place is lost in lse itself, a few in scores of its size.
LAST_PLACES = tl.constexpr(4 * 2.0**-23)


ROWS = 32  # of a program of row_terms_kernel


class RowTerms(NamedTuple):
    """Numbers of each query row, (B, Hq, Lq) float32, contiguous."""

    level: Any  # lse without `beyond`, times log2(e) if plain; inf where a row has nothing to attend to
    excess: Any  # log2 of what P under that level adds up to, if rounding keeps it from 1; None if plain
    delta: Any  # <dO, O> - dlse, which dS is P times dP's distance from


def row_terms(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, sink_terms: Tensor | None
) -> RowTerms:
    """Compute them, and what each row adds to the gradient of its head's sink, `sink_terms` (B, Hq, Lq)."""
    plain = is_plain(call)
    excess = None if plain else excess_of(call, lse)
    terms = RowTerms(torch.empty_like(lse), excess, torch.empty_like(lse))
    if lse.numel() == 0:
        return terms
    tensors = (matrix(out), matrix(grad_out), lse, grad_lse, terms, sink_terms)
    if repeat.launched(call, row_terms_kernel, tensors):
        return terms
    heads, seqlen_q = call.query.shape[1:3]
    seqlen_k, value_dim = call.value.shape[2:]
    schedule = schedule_of(call.ragged and call.ragged.queries, seqlen_q, ROWS)
    blocks = triton.cdiv(seqlen_q, ROWS)
    repeat.launch(
        call,
        row_terms_kernel,
        programs(schedule, blocks, call.batch) * heads,
        tensors,
        rules_of(call),
        schedule,
        blocks,
        heads,
        seqlen_q,
        seqlen_k,
        VALUE_DIM=value_dim,
        BLOCK_VALUE=configs.padded(value_dim),
        PLAIN=plain,
        BLOCK_M=ROWS,
    )
    return terms


def excess_of(call: Call, lse: Tensor) -> Tensor:
    """log2 of what P under `lse` (B, Hq, Lq) adds up to in each row, where its rounding keeps that from 1."""
    heads, seqlen_q, head_dim = call.query.shape[1:]
    tiles = configs.each_score(call)
    excess = torch.zeros_like(lse)
    if lse.numel() == 0:
        return excess
    schedule = schedule_of(call.ragged and call.ragged.queries, seqlen_q, tiles.rows)
    blocks = triton.cdiv(seqlen_q, tiles.rows)
    excess_kernel[(programs(schedule, blocks, call.batch) * heads,)](
        matrix(call.query),
        matrix(call.key),
        lse,
        excess,
        rules_of(call),
        schedule,
        blocks,
        heads,
        seqlen_q,
        call.seqlen_k,
        GROUP=heads // call.key.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_DIM=configs.padded(head_dim),
        PRECISION=configs.precision(call),
        **tiles.options(),
    )
    return excess


def sums_of_rows(call: Call, terms: Tensor) -> Tensor:
    """Add up numbers of rows (B, Hq, Lq), or (1, Hq, all rows), over each sequence: (B, Hq)."""
    if call.ragged is None:
        return terms.sum(2)
    heads, rows = terms.shape[1:]
    sums = terms.new_empty(call.batch, heads)
    if sums.numel():
        sums_kernel[(sums.numel(),)](terms, sums, call.ragged.queries, heads, rows, BLOCK=1024)
    return sums


@triton.jit(do_not_specialize=["heads", "rows"])
def sums_kernel(terms, sums, starts, heads, rows, BLOCK: tl.constexpr):
    """One head of one sequence."""
    first, end = sequence_rows(starts, tl.program_id(0) // heads, rows)
    base = terms + (tl.program_id(0) % heads).to(tl.int64) * rows
    total = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(first, end, BLOCK):
        row = at + tl.arange(0, BLOCK)
        total += tl.load(base + row, mask=row < end, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["blocks", "heads", "seqlen_q", "seqlen_k"])
def row_terms_kernel(
    out,
    grad_out,
    lse,
    grad_lse,
    terms,
    sink_terms,
    rules,
    schedule,
    blocks,
    heads,
    seqlen_q,
    seqlen_k,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of queries of one head."""
    block, batch, head, batch_head = block_in_order(schedule, blocks, heads)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    queries = query_count(rules, batch, seqlen_q)
    inside = rows < row_count(rules, queries, seqlen_q)
    at = number_base(rules, batch, head, batch_head, seqlen_q) + rows
    level = tl.load(lse + at, mask=inside, other=-INF)
    base = query_base(out, rules, batch, head, seqlen_q)
    o = load_rows(base, out, first_row, queries, BLOCK_M, VALUE_DIM, BLOCK_VALUE, False, True)
    base = query_base(grad_out, rules, batch, head, seqlen_q)
    grad = load_rows(base, grad_out, first_row, queries, BLOCK_M, VALUE_DIM, BLOCK_VALUE, False, True)
    # Rows that have seen nothing but a sink are 0, whatever comes in for them.
    delta = tl.sum(tl.where(o == 0, 0.0, o.to(tl.float32) * grad.to(tl.float32)), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=inside, other=0.0)
    dead = level == -INF
    delta = tl.where(dead, 0.0, delta)
    if sink_terms is not None:
        share = tl.exp2((tl.load(rules.sinks + head) - level) * LOG2E)
        tl.store(sink_terms + at, tl.where(dead, 0.0, -share * delta), mask=inside)
    if rules.slopes is not None:
        count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
        level += beyond(rules, batch, head, rows, offset, count)
    if PLAIN:
        level *= LOG2E
    tl.store(terms.level + at, tl.where(dead, INF, level), mask=inside)
    tl.store(terms.delta + at, delta, mask=inside)


@triton.jit(do_not_specialize=["blocks", "heads", "seqlen_q", "seqlen_k"])
def excess_kernel(
    query,
    key,
    lse,
    excess,
    rules,
    schedule,
    blocks,
    heads,
    seqlen_q,
    seqlen_k,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up P of the rows of a block whose lse is so large that its last place is worth something.

    A bias of finfo.min over a whole row makes every score and lse the same number; ALiBi's 1e5 leaves no room
    for what is behind the point. What the sum is off by is taken from the exponents, if rounding accounts for
    it: the keys may be a part of those that lse is of.
    """
    block, batch, head, batch_head = block_in_order(schedule, blocks, heads)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    queries = query_count(rules, batch, seqlen_q)
    at = number_base(rules, batch, head, batch_head, seqlen_q) + rows
    given = tl.load(lse + at, mask=rows < queries, other=-INF)
    far = (tl.abs(given) > FAR) & (tl.abs(given) < INF)
    count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
    last = tl.minimum(first_row + BLOCK_M, queries) - 1
    start, _, _, end = key_ranges(rules, batch, first_row, last, offset, count, BLOCK_M, BLOCK_N)
    end = tl.where(tl.max(far.to(tl.int32), 0) > 0, end, start)

    base = query_base(query, rules, batch, head, seqlen_q)
    q = load_rows(base, query, first_row, queries, BLOCK_M, HEAD_DIM, BLOCK_DIM, False, True)
    base = key_base(key, rules, batch, head // GROUP, seqlen_k)
    total = tl.zeros([BLOCK_M], tl.float32)
    if rules.sinks is not None:
        total += tl.exp2((tl.load(rules.sinks + head) - given) * LOG2E)
    level = given
    if rules.slopes is not None:
        level += beyond(rules, batch, head, rows, offset, count)
    for first in tl.range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = load_keys(base, key, rules, batch, first, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, True, True)
        scores = tl.dot(q, k, input_precision=PRECISION)
        scores = adjusted(scores, rules, batch, head, rows[:, None], keys[None, :], queries, offset, count)
        seen = visible(rules, batch, head, rows[:, None], keys[None, :], queries, offset, count)
        total += tl.sum(tl.where(seen, tl.exp2((scores - level[:, None]) * LOG2E), 0.0), 1)
    found = tl.log2(total)
    rounding = tl.abs(found) <= LAST_PLACES * LOG2E * tl.abs(given)
    tl.store(excess + at, found, mask=far & rounding & (rows < queries))
