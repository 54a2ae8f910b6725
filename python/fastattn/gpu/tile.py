"""What every kernel does with one tile of scores: where it lies, what may be seen in it, what is added to it.

A kernel takes its tensors as `rows.Matrix` and everything else about a call as `Rules`, both named tuples. A
field that is None does not exist in the compiled kernel.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.gpu.call import Call
from fastattn.gpu.rows import Pages, head_base, matrix, places, sequence_rows
from fastattn.gpu.segments import live_blocks, same_segment
from fastattn.problem import UNBOUNDED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class Rules(NamedTuple):
    """A call's arguments besides query, key and value. None: the call has none."""

    scale: Any
    softcap: Any  # None or > 0
    left: Any  # None or the left bound of the window
    right: Any  # None or the right bound; 0 is the causal rule
    offset: Any  # the key position of query 0 ...
    offsets: Any  # ... or (B,) int64, one for each sequence
    lengths: Any  # (B,) int64
    starts: Any  # (B,) int64, the first key there is
    query_lengths: Any  # (B,) int64
    segments: Any  # Segments
    ragged: Any  # Ragged
    pages: Any  # Pages
    key_scales: Any  # Matrix of one column, float32
    value_scales: Any
    mask: Any  # Matrix, uint8
    bias: Any  # Matrix
    slopes: Any  # (B, Hq) float32, ...
    slopes_batch: Any  # ... and its strides
    slopes_head: Any
    sinks: Any  # (Hq,) float32
    seed: Any  # of dropout, 64 bits ...
    drawn_seed: Any  # ... or () int64
    dropout_offset: Any
    dropout_threshold: Any  # a weight is kept where its word is at least this, in 0 .. 2^32
    dropout_scale: Any  # what a kept weight is multiplied by


def rules_of(call: Call) -> Rules:
    """What `call` asks for besides the products."""
    slopes, mask, dropout = call.alibi_slopes, call.mask, call.dropout_p > 0
    seed = call.dropout_seed
    return Rules(
        call.scale,
        call.softcap or None,
        None if call.window_left >= UNBOUNDED else call.window_left,
        None if call.window_right >= UNBOUNDED else call.window_right,
        call.query_offset if call.query_offsets is None else None,
        call.query_offsets,
        call.kv_lengths,
        call.kv_starts,
        call.query_lengths,
        call.segments,
        call.ragged,
        _pages(call),
        None if call.key_scale is None else matrix(call.key_scale.unsqueeze(3)),
        None if call.value_scale is None else matrix(call.value_scale.unsqueeze(3)),
        None if mask is None else matrix(mask.view(torch.uint8)),
        matrix(call.bias),
        slopes,
        None if slopes is None else slopes.stride(0),
        None if slopes is None else slopes.stride(1),
        call.sinks,
        _signed(seed, 64) if dropout and isinstance(seed, int) else None,
        seed if dropout and not isinstance(seed, int) else None,
        _signed(call.dropout_offset, 32) if dropout else None,
        math.ceil(call.dropout_p * 2.0**32) if dropout else None,
        (1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0) if dropout else None,
    )


def _pages(call: Call) -> Pages | None:
    if call.block_table is None:
        return None
    table = call.block_table
    return Pages(table, table.stride(0), table.stride(1), call.key.shape[2], call.key.shape[0] - 1)


def _signed(word: int, bits: int) -> int:
    """The number whose two's complement `word` is: unsigned arguments would be typed by their size."""
    half = 1 << bits - 1
    return (word + half) % (2 * half) - half


@triton.jit
def hidden_zeros(number, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros that the compiler cannot see through nor take one for another: products of `number` by 0.

    Constants it would set once more where a loop may not run at all, and for their sake wait for each product
    of that loop.
    """
    numbers = first + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return numbers.to(tl.float32) * (number * 0.0)


@triton.jit
def key_count(rules, batch, seqlen_k):
    """Up to where the sequence has keys; no stored length leads past the end."""
    if rules.ragged is not None:
        first, end = sequence_rows(rules.ragged.keys, batch, seqlen_k)
        count = end - first
    elif rules.lengths is None:
        count = seqlen_k
    else:
        count = stored_length(rules.lengths, batch, seqlen_k)
    return count


@triton.jit
def query_count(rules, batch, seqlen_q):
    """How many queries the sequence has."""
    if rules.ragged is not None:
        first, end = sequence_rows(rules.ragged.queries, batch, seqlen_q)
        count = end - first
    elif rules.query_lengths is None:
        count = seqlen_q
    else:
        count = stored_length(rules.query_lengths, batch, seqlen_q)
    return count


@triton.jit
def row_count(rules, queries, seqlen_q):
    """How many rows the sequence has in outputs: those of queries that do not exist are written, too."""
    return seqlen_q if rules.ragged is None else queries


@triton.jit
def stored_length(lengths, batch, most):
    """A length in memory, within what there is."""
    return tl.minimum(tl.maximum(tl.load(lengths + batch), 0), most).to(tl.int32)


@triton.jit
def query_offset(rules, batch):
    """The key position at which query 0 stands."""
    if rules.offsets is None:
        offset = rules.offset
    else:
        offset = tl.load(rules.offsets + batch)
    return offset


@triton.jit
def key_ranges(rules, batch, first, last, offset, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split the keys that queries `first` to `last`, BLOCK_M at most, may attend to; see `tile_ranges`."""
    if rules.query_lengths is not None or rules.ragged is not None:
        count = tl.where(first <= last, count, 0)
    start, inner_start, inner_end, end = tile_ranges(
        first, last, offset, count, rules.left, rules.right, rules.mask is not None, BLOCK_N
    )
    if rules.starts is not None:
        low = stored_length(rules.starts, batch, count)
        start = tl.maximum(start, low // BLOCK_N * BLOCK_N)
        inner_start = tl.maximum(inner_start, (low + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        inner_end = tl.maximum(inner_end, inner_start)
    if rules.segments is not None:
        segments = rules.segments
        start, end = live_blocks(
            segments.queries + batch.to(tl.int64) * segments.queries_batch,
            first,
            last,
            segments.key_bounds + batch.to(tl.int64) * segments.key_bounds_batch,
            start,
            end,
            BLOCK_M,
            BLOCK_N,
        )
        inner_start = start
        inner_end = start
    return start, inner_start, inner_end, end


@triton.jit
def query_ranges(rules, batch, first, last, offset, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split the queries, `count` of them, that may attend to keys `first` to `last`; see `tile_ranges`."""
    start, inner_start, inner_end, end = tile_ranges(
        first, last, -offset, count, rules.right, rules.left, rules.mask is not None, BLOCK_M
    )
    if rules.segments is not None:
        segments = rules.segments
        start, end = live_blocks(
            segments.keys + batch.to(tl.int64) * segments.keys_batch,
            first,
            last,
            segments.query_bounds + batch.to(tl.int64) * segments.query_bounds_batch,
            start,
            end,
            BLOCK_N,
            BLOCK_M,
        )
        inner_start = start
        inner_end = start
    return start, inner_start, inner_end, end


@triton.jit
def tile_ranges(first, last, offset, count, left, right, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Split what positions `first` to `last` meet on the other side: start, [inner_start, inner_end), end.

    All are multiples of BLOCK, but for `end`. Tiles of the inner range meet each of these positions as far as
    lengths and the window tell; nobody meets anything outside [start, end).
    """
    end = count
    inner_end = count
    if right is not None:
        end = clamped(last, offset + 1, right, 0, count)
        inner_end = clamped(first, offset + 1, right, 0, count)
    start = end * 0
    inner_start = end * 0
    if left is not None:
        start = clamped(first, offset, -left, 0, end)
        inner_start = clamped(last, offset, -left, 0, end)
        start = tl.where(start < end, start, end + BLOCK - 1) // BLOCK * BLOCK
        inner_start = (inner_start + BLOCK - 1) // BLOCK * BLOCK
    inner_end = inner_end // BLOCK * BLOCK
    inner_start = tl.minimum(inner_start, (end + BLOCK - 1) // BLOCK * BLOCK)
    inner_end = tl.maximum(inner_end, inner_start)
    if MASKED:  # every tile has to ask it
        inner_start = start
        inner_end = start
    return start, inner_start, inner_end, end


@triton.jit
def clamped(rows, offset, bound, low, high):
    """``rows + offset + bound`` within [low, high], in 32 bits whatever the numbers are."""
    place = rows.to(tl.int64) + offset + bound
    return tl.minimum(tl.maximum(place, low), high).to(tl.int32)


@triton.jit
def visible(rules, batch, head, rows, keys, seqlen_q, offset, count):
    """Which of the tile's queries may attend to which keys; `rows` and `keys` broadcast together."""
    if rules.right is None:
        seen = keys < count
    else:
        seen = keys <= clamped(rows, offset, rules.right, -1, count - 1)
    if rules.left is not None:
        seen &= keys >= clamped(rows, offset, -rules.left, 0, count)
    if rules.starts is not None:
        seen &= keys >= tl.load(rules.starts + batch)
    if rules.segments is not None:
        seen &= same_segment(rules.segments, batch, rows, keys, seqlen_q, count)
    if rules.mask is not None:
        at = places(head_base(rules.mask, batch, head), rules.mask, rows, keys)
        seen &= tl.load(at, mask=(rows < seqlen_q) & (keys < count), other=0) != 0
    return seen


@triton.jit
def adjusted(products, rules, batch, head, rows, keys, seqlen_q, offset, count):
    """Scores in natural units, before anything is hidden: scale, softcap, bias and ALiBi."""
    return moved(capped(products, rules), rules, batch, head, rows, keys, seqlen_q, offset, count)


@triton.jit
def capped(products, rules):
    """Scale, and softcap."""
    scores = products * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * tanh(scores / rules.softcap)
    return scores


@triton.jit
def moved(scores, rules, batch, head, rows, keys, seqlen_q, offset, count):
    """Bias, and ALiBi, but for what it takes from all keys alike: see `beyond`."""
    if rules.bias is not None:
        at = places(head_base(rules.bias, batch, head), rules.bias, rows, keys)
        scores += tl.load(at, mask=(rows < seqlen_q) & (keys < count), other=0.0).to(tl.float32)
    if rules.slopes is not None:
        apart = tl.abs(nearest(rows, offset, count) - keys).to(tl.float32)
        scores -= slope_of(rules, batch, head) * apart
    return scores


@triton.jit
def nearest(rows, offset, count):
    """Where queries stand, or the key nearest to them."""
    return clamped(rows, offset, 0, 0, count - 1)


@triton.jit
def beyond(rules, batch, head, rows, offset, count):
    """What ALiBi takes from the scores of a query that stands outside of the keys for its way to the nearest.

    Among the scores themselves it would leave them few digits, or none.
    """
    way = rows.to(tl.int64) + offset - nearest(rows, offset, count)
    return slope_of(rules, batch, head) * tl.abs(way.to(tl.float32))


@triton.jit
def slope_of(rules, batch, head):
    """The slope of ALiBi of one head."""
    return tl.load(rules.slopes + batch.to(tl.int64) * rules.slopes_batch + head * rules.slopes_head)


@triton.jit
def distance(rows, keys, offset):
    """How far apart queries and keys stand."""
    return tl.abs((rows.to(tl.int64) + offset).to(tl.float32) - keys.to(tl.float32))


@triton.jit
def tanh(x):
    """Compute tanh without overflow; where 1 - 2 / (e + 1) cancels, by a polynomial, off by 1.5e-8 of it."""
    square = x * x
    near = 0.33333144 - square * (0.13325879 - square * (0.053045485 - square * 0.017241476))
    near = x - x * square * near
    e = tl.exp2(2 * LOG2E * tl.abs(x))
    large = 1 - 2 / (e + 1)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -large, large))


@triton.jit
def dropout_factors(rules, batch_head, rows, first_key, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What the weights of a tile (rows, BLOCK_N) or its transpose are multiplied by; see fastattn.philox."""
    four = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    counter = tl.zeros([rows.shape[0], BLOCK_N // 4], tl.int32)
    if rules.drawn_seed is None:
        seed = rules.seed
    else:
        seed = tl.load(rules.drawn_seed)
    w0, w1, w2, w3 = tl.philox(
        seed,
        counter + rows[:, None],
        counter + four[None, :],
        counter + batch_head,
        counter + rules.dropout_offset,
    )
    if rows.shape[0] >= 32 and BLOCK_N >= 32:
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        kept = is_kept(words, rules)
    else:
        # Beside a mask, Triton (3.6) would give each thread 8 columns of a product with words that were
        # joined, and of 16 take some twice and others never. Bits spread over columns draw words twice.
        low = is_kept(w0, rules) | is_kept(w1, rules) << 1
        bits = low | is_kept(w2, rules) << 2 | is_kept(w3, rules) << 3
        kept = (bits[:, :, None] >> tl.arange(0, 4)[None, None, :] & 1).reshape(rows.shape[0], BLOCK_N)
    factors = tl.where(kept != 0, rules.dropout_scale, 0.0)
    return tl.trans(factors) if TRANSPOSED else factors


@triton.jit
def is_kept(words, rules):
    """1 where the weight of a word stays, else 0."""
    return (words.to(tl.int64) >= rules.dropout_threshold).to(tl.int32)  # words are unsigned
