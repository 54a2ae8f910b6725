"""Attention forward, for any GPU that Triton compiles for and every argument of a call.

One program owns a block of queries of one head and walks over its keys, with a running maximum and sum for
each row. Tiles in which everything is visible go through a loop that looks at no rule; tiles that nobody may
look at are not visited.

References
----------
Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.gpu import configs, repeat, tuning
from fastattn.gpu.call import Call
from fastattn.gpu.config_tables import Tiles
from fastattn.gpu.rows import (
    key_base,
    load_keys,
    load_rows,
    load_scales,
    matrix,
    number_base,
    numbers_of,
    query_base,
    store_rows,
)
from fastattn.gpu.schedule import cached_heads, own_block, programs, schedule_of
from fastattn.gpu.tile import (
    INF,
    LN2,
    LOG2E,
    adjusted,
    beyond,
    dropout_factors,
    key_count,
    key_ranges,
    query_count,
    query_offset,
    row_count,
    rules_of,
    visible,
)


def forward(call: Call, out: Tensor, lse: Tensor | None, tiles: Tiles | None = None) -> None:
    """Write `out` (B, Hq, Lq, Dv) and, unless None, `lse` (B, Hq, Lq), float32, by `tiles` or the tables'."""
    tensors = (*map(matrix, call[:3]), matrix(out), lse)
    if repeat.launched(call, forward_kernel, tensors):
        return
    batch, (heads, seqlen_q, head_dim) = call.batch, call.query.shape[1:]
    kv_heads, seqlen_k, value_dim = call.key.shape[1], call.seqlen_k, call.value.shape[3]

    def launch(tiles: Tiles) -> None:
        schedule = schedule_of(call.ragged and call.ragged.queries, seqlen_q, tiles.rows)
        blocks = programs(schedule, triton.cdiv(seqlen_q, tiles.rows), batch)
        kv_bytes = seqlen_k * (head_dim + value_dim) * call.key.element_size()
        width = min(batch * heads, cached_heads(kv_bytes) * (heads // kv_heads))
        repeat.launch(
            call,
            forward_kernel,
            blocks * heads,
            tensors,
            rules_of(call),
            schedule,
            batch * heads,
            heads,
            width,
            seqlen_q,
            seqlen_k,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_DIM=configs.padded(head_dim),
            BLOCK_VALUE=configs.padded(value_dim),
            PLAIN=is_plain(call),
            PRECISION=configs.precision(call),
            **tiles.options(),
        )

    tiles = tiles or tuning.chosen("forward", call, configs.forward(call), launch)
    launch(tiles)


def is_plain(call: Call) -> bool:
    """Whether scores are products times a positive scale: the highest product is the highest score."""
    return not call.softcap and call.bias is None and call.alibi_slopes is None and call.scale > 0


@triton.jit(do_not_specialize=["batch_heads", "heads", "width", "seqlen_q", "seqlen_k"])
def forward_kernel(
    query,
    key,
    value,
    out,
    lse,
    rules,
    schedule,
    batch_heads,
    heads,
    width,
    seqlen_q,
    seqlen_k,
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
    """One block of queries of one head."""
    block, batch, head, batch_head = own_block(
        schedule, tl.cdiv(seqlen_q, BLOCK_M), batch_heads, heads, width
    )
    kv_head = head // GROUP
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = query_count(rules, batch, seqlen_q)
    q = load_rows(
        query_base(query, rules, batch, head, seqlen_q),
        query,
        block * BLOCK_M,
        queries,
        BLOCK_M,
        HEAD_DIM,
        BLOCK_DIM,
        False,
        True,
    )
    count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
    last = tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1
    start, inner_start, inner_end, end = key_ranges(
        rules, batch, block * BLOCK_M, last, offset, count, BLOCK_M, BLOCK_N
    )

    level, total, acc = attend_all(
        q, key, value, rules, batch, head, batch_head, kv_head, rows, start, inner_start, inner_end, end,
        queries, seqlen_k, offset, count, HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION,
        BLOCK_M, BLOCK_N, AHEAD,
    )  # fmt: skip
    if rules.slopes is not None:
        level -= beyond(rules, batch, head, rows, offset, count)
    if rules.sinks is not None:
        level, shrink, own = with_sink(level, tl.load(rules.sinks + head))
        total, acc = total * shrink + own, acc * shrink[:, None]
    acc, row_lse = normalised(level, total, acc)
    there = row_count(rules, queries, seqlen_q)
    base = query_base(out, rules, batch, head, seqlen_q)
    store_rows(base, out, rows, there, acc, VALUE_DIM, BLOCK_VALUE)
    if lse is not None:
        at = number_base(rules, batch, head, batch_head, seqlen_q) + rows
        tl.store(lse + at, row_lse, mask=rows < there)


@triton.jit
def normalised(level, total, acc):
    """Weighted means and log-sum-exps of rows; 0 and -inf for a row that attends to nothing."""
    some = total != 0  # NaN is something
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, level + LN2 * tl.log2(total), -INF)


@triton.jit
def with_sink(level, sink):
    """Let a logit without a value, in natural units as `level` is, take its share of the rows.

    Returns the new level, what sums under the old one are multiplied by, and what the sink adds to the total.
    """
    highest = tl.maximum(level, sink)
    reference = tl.where(highest == -INF, 0.0, highest)
    shrink = tl.exp2((level - reference) * LOG2E)
    return highest, shrink, tl.exp2((sink - reference) * LOG2E)


@triton.jit
def attend_all(
    q,
    key,
    value,
    rules,
    batch,
    head,
    batch_head,
    kv_head,
    rows,
    start,
    inner_start,
    inner_end,
    end,
    queries,
    seqlen_k,
    offset,
    count,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Attend to the ranges of `key_ranges`: highest score of each row (natural units), sum, weighted values.

    Scores are without what is `beyond`. The rows may be of several heads: `head` and `batch_head` are
    scalars, or (BLOCK_M, 1), one for each row.
    """
    level = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    if rules.left is not None or rules.starts is not None:
        level, total, acc = attend(
            level, total, acc, q, key, value, rules, batch, head, batch_head, kv_head, rows,
            start, inner_start, queries, seqlen_k, offset, count,
            HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_N, True, False,
        )  # fmt: skip
    level, total, acc = attend(
        level, total, acc, q, key, value, rules, batch, head, batch_head, kv_head, rows,
        inner_start, inner_end, queries, seqlen_k, offset, count,
        HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_N, False, AHEAD,
    )  # fmt: skip
    level, total, acc = attend(
        level, total, acc, q, key, value, rules, batch, head, batch_head, kv_head, rows,
        inner_end, end, queries, seqlen_k, offset, count,
        HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_N, True, False,
    )  # fmt: skip
    if PLAIN:
        level = level * rules.scale
    if rules.query_lengths is not None:  # rows that no tile was checked for
        there = rows < queries
        level = tl.where(there, level, -INF)
        total, acc = tl.where(there, total, 0.0), tl.where(there[:, None], acc, 0.0)
    return level, total, acc


@triton.jit
def attend(
    level,
    total,
    acc,
    q,
    key,
    value,
    rules,
    batch,
    head,
    batch_head,
    kv_head,
    rows,
    start,
    end,
    queries,
    seqlen_k,
    offset,
    count,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECKED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Go over the keys [start, end). `level` is the highest score so far, before its scale if PLAIN.

    AHEAD, for whole tiles alone: the products of a tile begin before the exponentials of the one before it,
    and run beside them where products are asynchronous. Those of the last tile are computed twice.
    """
    keys_at = key_base(key, rules, batch, kv_head, seqlen_k)
    values_at = key_base(value, rules, batch, kv_head, seqlen_k)
    factor = rules.scale * LOG2E if PLAIN else LOG2E
    if AHEAD:  # of a tile that need not exist
        k = load_keys(keys_at, key, rules, batch, start, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, True, True)
        following = tl.dot(q, numbers_of(k, q.dtype), input_precision=PRECISION)
    for first in tl.range(start, end, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        keys = first + tl.arange(0, BLOCK_N)
        if AHEAD:
            scores = following
            first_ahead = tl.multiple_of(tl.minimum(first + BLOCK_N, end - BLOCK_N), BLOCK_N)
            k = load_keys(
                keys_at, key, rules, batch, first_ahead, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, True, CHECKED
            )
            following = tl.dot(q, numbers_of(k, q.dtype), input_precision=PRECISION)
        else:
            k = load_keys(
                keys_at, key, rules, batch, first, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, True, CHECKED
            )
            scores = tl.dot(q, numbers_of(k, q.dtype), input_precision=PRECISION)
        if rules.key_scales is not None:
            scores *= load_scales(rules.key_scales, rules, batch, kv_head, keys, count, seqlen_k)[None, :]
        if not PLAIN:
            scores = adjusted(
                scores, rules, batch, head, rows[:, None], keys[None, :], queries, offset, count
            )
        if CHECKED:
            seen = visible(rules, batch, head, rows[:, None], keys[None, :], queries, offset, count)
            scores = tl.where(seen, scores, -INF)
        highest = tl.maximum(level, tl.max(scores, 1))
        reference = tl.where(highest == -INF, 0.0, highest)
        if PLAIN:
            p = tl.exp2(scores * factor - (reference * factor)[:, None])
        else:  # the difference first: a level of -3e38 must not overflow
            p = tl.exp2((scores - reference[:, None]) * factor)
        shrink = tl.exp2((level - reference) * factor)
        total = total * shrink + tl.sum(p, 1)
        if rules.dropout_scale is not None:
            p = p * dropout_factors(rules, batch_head, rows, first, BLOCK_N, False)
        v = load_keys(
            values_at, value, rules, batch, first, count, BLOCK_N, VALUE_DIM, BLOCK_VALUE, False, CHECKED
        )
        if rules.value_scales is not None:
            p *= load_scales(rules.value_scales, rules, batch, kv_head, keys, count, seqlen_k)[None, :]
            v = numbers_of(v, tl.float32 if q.dtype == tl.float32 else tl.bfloat16)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        level = highest
    return level, total, acc
