"""Attention of few queries to many keys: the keys are divided among programs, and their results merged.

The rows of one program are all queries of all heads that share its keys and values, so that each key is read
once. Where keys are divided depends on their number alone: no result depends on what else is in the batch.

References
----------
Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.gpu import configs, tuning
from fastattn.gpu.call import Call
from fastattn.gpu.config_tables import Tiles
from fastattn.gpu.forward import attend_all, is_plain, normalised, with_sink
from fastattn.gpu.rows import head_base, matrix, places
from fastattn.gpu.tile import (
    INF,
    LN2,
    LOG2E,
    beyond,
    key_count,
    key_ranges,
    query_count,
    query_offset,
    rules_of,
)


def decode(call: Call, out: Tensor, lse: Tensor | None, tiles: Tiles | None = None) -> None:
    """Write `out` (B, Hq, Lq, Dv) and, unless it is None, `lse` (B, Hq, Lq), float32.

    `tiles`: to be launched with, whatever the tables say.
    """
    batch, heads, seqlen_q, head_dim = call.query.shape
    kv_heads, seqlen_k, value_dim = call.key.shape[1], call.seqlen_k, call.value.shape[3]
    chunk = configs.decode_chunk(seqlen_k)
    chunks = max(1, triton.cdiv(seqlen_k, chunk))
    rules, value_block = rules_of(call), configs.padded(value_dim)
    means = torch.empty(
        chunks, batch * heads * seqlen_q, value_dim, dtype=torch.float32, device=call.query.device
    )
    levels = torch.empty(2, chunks, batch * heads * seqlen_q, dtype=torch.float32, device=call.query.device)

    def launch(tiles: Tiles) -> None:
        blocks = triton.cdiv(seqlen_q * (heads // kv_heads), tiles.rows)
        chunk_kernel[(chunks * batch * kv_heads * blocks,)](
            matrix(call.query),
            matrix(call.key),
            matrix(call.value),
            means,
            *levels,
            rules,
            batch * heads * seqlen_q,
            blocks,
            kv_heads,
            seqlen_q,
            seqlen_k,
            CHUNK=chunk,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_DIM=configs.padded(head_dim),
            BLOCK_VALUE=value_block,
            PLAIN=is_plain(call),
            PRECISION=configs.precision(call),
            **tiles.options(),
        )

    launch(tiles or tuning.chosen("decode", call, configs.decode(call), launch))
    merge_kernel[(batch * heads * seqlen_q,)](
        means,
        *levels,
        matrix(out),
        lse,
        rules.sinks,
        None if rules.slopes is None else rules,
        batch * heads * seqlen_q,
        heads,
        seqlen_q,
        seqlen_k,
        chunks,
        VALUE_DIM=value_dim,
        BLOCK_VALUE=value_block,
        BLOCK_CHUNKS=triton.next_power_of_2(chunks),
        ALIBI=rules.slopes is not None,
        num_warps=4 if chunks * value_block >= 2048 else 1,
    )


@triton.jit(do_not_specialize=["all_rows", "kv_heads", "seqlen_q", "seqlen_k"])
def chunk_kernel(
    query,
    key,
    value,
    means,
    levels,
    totals,
    rules,
    all_rows,
    blocks,
    kv_heads,
    seqlen_q,
    seqlen_k,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr = False,
):
    """Attend to one chunk of the keys: `means` (chunks, rows, Dv), `levels` and `totals` (chunks, rows)."""
    chunks = tl.cdiv(tl.maximum(seqlen_k, 1), CHUNK)
    # Blocks of the same keys next to each other, so that all but one find them in the second-level cache.
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    chunk, batch_kv = place % chunks, place // chunks
    batch, kv_head = batch_kv // kv_heads, batch_kv % kv_heads
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    batch_head = batch * kv_heads * GROUP + head
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    at = places(head_base(query, batch, head[:, None]), query, rows[:, None], columns)
    queries = query_count(rules, batch, seqlen_q)
    q = tl.load(at, mask=(rows < queries)[:, None] & (columns < HEAD_DIM), other=0.0)

    count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
    start, inner_start, inner_end, end = key_ranges(
        rules, batch, first, last, offset, count, BLOCK_M, BLOCK_N
    )
    low, high = chunk * CHUNK, chunk * CHUNK + CHUNK
    level, total, acc = attend_all(
        q, key, value, rules, batch, head[:, None], batch_head[:, None], kv_head, rows,
        within(start, low, high), within(inner_start, low, high), within(inner_end, low, high),
        within(end, low, high), queries, seqlen_k, offset, count,
        HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_M, BLOCK_N, AHEAD,
    )  # fmt: skip
    mean, _ = normalised(level, total, acc)
    at_row = chunk.to(tl.int64) * all_rows + batch_head.to(tl.int64) * seqlen_q + rows
    # Not their log-sum-exp: beside a level of -3e38 no total would be left in it.
    tl.store(levels + at_row, level, mask=rows < seqlen_q)
    tl.store(totals + at_row, total, mask=rows < seqlen_q)
    columns = tl.arange(0, BLOCK_VALUE)[None, :]
    at = means + at_row[:, None] * VALUE_DIM + columns
    tl.store(at, mean, mask=(rows < seqlen_q)[:, None] & (columns < VALUE_DIM))


@triton.jit
def within(place, low, high):
    """Clamp `place` to [low, high]."""
    return tl.minimum(tl.maximum(place, low), high)


@triton.jit(do_not_specialize=["all_rows", "heads", "seqlen_q", "seqlen_k", "chunks"])
def merge_kernel(
    means,
    levels,
    totals,
    out,
    lse,
    sinks,
    rules,
    all_rows,
    heads,
    seqlen_q,
    seqlen_k,
    chunks,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Merge what one row has got from each chunk, in one order, and its sink."""
    row = tl.program_id(0)
    batch, head, own_row = row // seqlen_q // heads, row // seqlen_q % heads, row % seqlen_q
    chunk, columns = tl.arange(0, BLOCK_CHUNKS), tl.arange(0, BLOCK_VALUE)
    at = chunk.to(tl.int64) * all_rows + row
    levels = tl.load(levels + at, mask=chunk < chunks, other=-INF)
    totals = tl.load(totals + at, mask=chunk < chunks, other=0.0)
    level = tl.max(levels, 0)
    reference = tl.where(level == -INF, 0.0, level)
    share = tl.exp2((levels - reference) * LOG2E) * totals
    total = tl.sum(share, 0)
    mask = (chunk < chunks)[:, None] & (columns < VALUE_DIM)[None, :]
    mean = tl.load(means + at[:, None] * VALUE_DIM + columns[None, :], mask=mask, other=0.0)
    acc = tl.sum(mean * share[:, None], 0)
    if ALIBI:  # whose far term was left out of every chunk's level alike; only here are there rules
        count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
        level -= beyond(rules, batch, head, own_row, offset, count)
    if sinks is not None:
        level, shrink, own = with_sink(level, tl.load(sinks + head))
        total, acc = total * shrink + own, acc * shrink
    some = total != 0
    total = tl.where(some, total, 1.0)
    at = places(head_base(out, batch, head), out, own_row, columns)
    merged = acc / total
    tl.store(at, merged.to(out.pointer.dtype.element_ty), mask=columns < VALUE_DIM)
    if lse is not None:
        tl.store(lse + row, tl.where(some, level + LN2 * tl.log2(total), -INF))
