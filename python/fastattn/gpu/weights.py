"""The probabilities themselves, which attention is usually computed without."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.gpu import configs
from fastattn.gpu.call import Call
from fastattn.gpu.forward import is_plain
from fastattn.gpu.row_terms import excess_of
from fastattn.gpu.rows import head_base, key_base, load_keys, load_rows, matrix, places
from fastattn.gpu.tile import (
    INF,
    LOG2E,
    adjusted,
    beyond,
    dropout_factors,
    key_count,
    query_count,
    query_offset,
    rules_of,
    visible,
)


def weights(call: Call, lse: Tensor, weights: Tensor) -> None:
    """Write the probabilities after dropout into `weights` (B, Hq, Lq, Lk), given `lse` (B, Hq, Lq)."""
    batch, heads, seqlen_q, head_dim = call.query.shape
    kv_heads, seqlen_k = call.key.shape[1:3]
    tiles = configs.each_score(call)
    blocks_m, blocks_n = (triton.cdiv(*pair) for pair in ((seqlen_q, tiles.rows), (seqlen_k, tiles.columns)))
    if not weights.numel():
        return
    weights_kernel[(blocks_m * blocks_n * batch * heads,)](
        matrix(call.query),
        matrix(call.key),
        lse,
        None if is_plain(call) else excess_of(call, lse),
        matrix(weights),
        rules_of(call),
        blocks_m,
        blocks_n,
        heads,
        seqlen_q,
        seqlen_k,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=configs.padded(head_dim),
        PRECISION=configs.precision(call),
        **tiles.options(),
    )


@triton.jit(do_not_specialize=["blocks_m", "blocks_n", "heads", "seqlen_q", "seqlen_k"])
def weights_kernel(
    query,
    key,
    lse,
    excess,
    weights,
    rules,
    blocks_m,
    blocks_n,
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
    """One tile of one head."""
    pid = tl.program_id(0)
    batch_head = pid // (blocks_m * blocks_n)
    row = pid // blocks_n % blocks_m * BLOCK_M
    column = pid % blocks_n * BLOCK_N
    batch, head = batch_head // heads, batch_head % heads
    rows, keys = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
    queries = query_count(rules, batch, seqlen_q)
    q = load_rows(
        head_base(query, batch, head), query, row, queries, BLOCK_M, HEAD_DIM, BLOCK_DIM, False, True
    )
    base = key_base(key, rules, batch, head // GROUP, seqlen_k)
    k = load_keys(base, key, rules, batch, column, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, True, True)
    r, c = rows[:, None], keys[None, :]
    scores = adjusted(
        tl.dot(q, k, input_precision=PRECISION), rules, batch, head, r, c, queries, offset, count
    )
    seen = visible(rules, batch, head, r, c, queries, offset, count) & (scores != -INF)
    if rules.query_lengths is not None:
        seen &= r < queries
    at = batch_head.to(tl.int64) * seqlen_q + rows
    level = tl.load(lse + at, mask=rows < seqlen_q, other=0.0)
    if rules.slopes is not None:
        level += beyond(rules, batch, head, rows, offset, count)
    power = (scores - level[:, None]) * LOG2E
    if excess is not None:
        power -= tl.load(excess + at, mask=rows < seqlen_q, other=0.0)[:, None]
    p = tl.where(seen, tl.exp2(power), 0.0)
    if rules.dropout_scale is not None:
        p = p * dropout_factors(rules, batch_head, rows, column, BLOCK_N, False)
    at = places(head_base(weights, batch, head), weights, r, c)
    tl.store(at, p.to(weights.pointer.dtype.element_ty), mask=(r < seqlen_q) & (c < seqlen_k))
