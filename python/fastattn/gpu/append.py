"""New keys and values are written into caches, in place: turned by their positions, quantised, into pages.

A row of a quantised cache has a scale that makes its largest magnitude the largest code. One that is not
finite has a scale of NaN and codes of 0, as in `fastattn.reference.store_row`.

References
----------
Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn.gpu.configs import padded
from fastattn.gpu.rows import Pages, head_base, load_rows, matrix, page_of, places, store_rows

ROWS = 16  # of a program
FINITE = tl.constexpr(0x7F800000)  # magnitudes below it, as integers


class Rotary(NamedTuple):
    """Angles of positions, and which columns they turn."""

    cos: Tensor  # (positions, pairs), any strides
    sin: Tensor
    interleaved: bool  # pairs are columns (2i, 2i + 1), else (i, i + pairs)
    query_starts: Tensor  # (B,) int64: the position of query 0
    query_step: int  # 1, or 0 where all queries of a sequence are turned as the first


class Update(NamedTuple):
    """What is written, tensors with axes (B, H, L, D) as in `Call`."""

    query: Tensor
    turned: Tensor | None  # memory for the query turned, where there are angles
    new_key: Tensor | None  # (B, Hkv, Ln, D)
    new_value: Tensor | None
    key: Tensor  # the caches and their scales, ...
    value: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    block_table: Tensor | None  # ... and pages
    starts: Tensor  # (B,) int64: the position of the first new row
    capacity: int  # position p is at row p % capacity of a sequence's cache
    rotary: Rotary | None


class Table(NamedTuple):
    """`Rotary` as the kernel reads it."""

    cos: Any
    cos_position: Any  # strides
    cos_pair: Any
    sin: Any
    sin_position: Any
    sin_pair: Any
    last: Any  # the last position there is
    pairs: Any
    query_starts: Any
    query_step: Any


def append(update: Update) -> None:
    """Write the new rows, and the query turned."""
    batch, heads, seqlen_q, _ = update.query.shape
    kv_heads, head_dim, value_dim = update.key.shape[1], update.key.shape[3], update.value.shape[3]
    added = 0 if update.new_key is None else update.new_key.shape[2]
    blocks = triton.cdiv(added, ROWS)
    query_blocks = 0 if update.turned is None else triton.cdiv(seqlen_q, ROWS)
    programs = blocks * batch * kv_heads
    if programs + query_blocks * batch * heads == 0:
        return
    append_kernel[(programs + query_blocks * batch * heads,)](
        matrix(update.new_key),
        matrix(update.new_value),
        matrix(update.key),
        matrix(update.value),
        _scales(update.key_scale),
        _scales(update.value_scale),
        _pages(update),
        update.starts,
        update.capacity,
        None if update.rotary is None else _table(update.rotary),
        matrix(update.query),
        matrix(update.turned),
        programs,
        blocks,
        query_blocks,
        heads,
        kv_heads,
        added,
        seqlen_q,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_DIM=padded(head_dim),
        BLOCK_VALUE=padded(value_dim),
        INTERLEAVED=update.rotary is not None and update.rotary.interleaved,
        BLOCK=ROWS,
        num_warps=4,
    )


def _scales(scale: Tensor | None) -> Any:
    return None if scale is None else matrix(scale.unsqueeze(3))


def _pages(update: Update) -> Pages | None:
    table = update.block_table
    if table is None:
        return None
    return Pages(table, table.stride(0), table.stride(1), update.key.shape[2], update.key.shape[0] - 1)


def _table(rotary: Rotary) -> Table:
    cos, sin = rotary.cos, rotary.sin
    return Table(
        cos,
        cos.stride(0),
        cos.stride(1),
        sin,
        sin.stride(0),
        sin.stride(1),
        cos.shape[0] - 1,
        cos.shape[1],
        rotary.query_starts,
        rotary.query_step,
    )


@triton.jit(
    do_not_specialize=["programs", "blocks", "query_blocks", "heads", "kv_heads", "added", "seqlen_q"]
)
def append_kernel(
    new_key,
    new_value,
    key,
    value,
    key_scales,
    value_scales,
    pages,
    starts,
    capacity,
    table,
    query,
    turned,
    programs,
    blocks,
    query_blocks,
    heads,
    kv_heads,
    added,
    seqlen_q,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some new rows of one head, of keys and of values; or, behind `programs`, some rows of queries."""
    pid = tl.program_id(0)
    if new_key is not None:
        of_keys = pid < programs
        if of_keys:
            first, batch_head = pid % blocks * BLOCK, pid // blocks
            batch, head = batch_head // kv_heads, batch_head % kv_heads
            rows = first + tl.arange(0, BLOCK)
            positions = tl.maximum(tl.load(starts + batch), 0) + rows
            base = head_base(new_key, batch, head)
            if table is None:
                keys = load_rows(base, new_key, first, added, BLOCK, HEAD_DIM, BLOCK_DIM, False, True)
            else:
                keys = turned_rows(
                    base, new_key, table, rows, positions, added, HEAD_DIM, BLOCK_DIM, INTERLEAVED
                )
            write(keys, key, key_scales, pages, batch, head, rows, positions, added, capacity, HEAD_DIM)
            base = head_base(new_value, batch, head)
            values = load_rows(base, new_value, first, added, BLOCK, VALUE_DIM, BLOCK_VALUE, False, True)
            write(
                values, value, value_scales, pages, batch, head, rows, positions, added, capacity, VALUE_DIM
            )
    if table is not None:
        of_queries = pid >= programs
        if of_queries:
            first, batch_head = (pid - programs) % query_blocks * BLOCK, (pid - programs) // query_blocks
            batch, head = batch_head // heads, batch_head % heads
            rows = first + tl.arange(0, BLOCK)
            positions = tl.load(table.query_starts + batch) + rows * table.query_step
            result = turned_rows(
                head_base(query, batch, head),
                query,
                table,
                rows,
                positions,
                seqlen_q,
                HEAD_DIM,
                BLOCK_DIM,
                INTERLEAVED,
            )
            store_rows(head_base(turned, batch, head), turned, rows, seqlen_q, result, HEAD_DIM, BLOCK_DIM)


@triton.jit
def turned_rows(
    base,
    matrix,
    table,
    rows,
    positions,
    count,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Load rows with their pairs of columns turned by the angles of their positions, in float32."""
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (rows < count)[:, None] & (columns < DIM)
    own = tl.load(places(base, matrix, rows[:, None], columns), mask=inside, other=0.0).to(tl.float32)
    if INTERLEAVED:
        pair, is_first = columns // 2, columns % 2 == 0
        partner = tl.where(is_first, columns + 1, columns - 1)
    else:
        is_first = columns < table.pairs
        pair = tl.where(is_first, columns, columns - table.pairs)
        partner = tl.where(is_first, columns + table.pairs, columns - table.pairs)
    turns = inside & (columns < 2 * table.pairs)
    other = tl.load(places(base, matrix, rows[:, None], partner), mask=turns, other=0.0).to(tl.float32)
    position = tl.minimum(tl.maximum(positions, 0), table.last)[:, None]
    at = table.cos + position * table.cos_position + pair * table.cos_pair
    cos = tl.load(at, mask=turns, other=1.0).to(tl.float32)
    at = table.sin + position * table.sin_position + pair * table.sin_pair
    sin = tl.load(at, mask=turns, other=0.0).to(tl.float32)
    return tl.where(turns, own * cos + tl.where(is_first, -other, other) * sin, own)


@triton.jit
def write(tile, cache, scales, pages, batch, head, rows, positions, added, capacity, DIM: tl.constexpr):
    """Write a tile of rows where their positions are; into no page that is not there."""
    place, there = positions % capacity, rows < added
    if pages is None:
        outer = batch.to(tl.int64) + place * 0
    else:
        outer = page_of(pages, batch, place // pages.size, there).to(tl.int64)
        there &= (outer >= 0) & (outer <= pages.last)
        place = place % pages.size
    if scales is not None:
        tile, step = quantised(tile.to(tl.float32), cache.pointer.dtype.element_ty)
        at = scales.pointer + outer * scales.batch + head.to(tl.int64) * scales.head + place * scales.row
        tl.store(at, step, mask=there)
    columns = tl.arange(0, tile.shape[1])[None, :]
    at = cache.pointer + head.to(tl.int64) * cache.head + (outer * cache.batch + place * cache.row)[:, None]
    inside = there[:, None] & (columns < DIM)
    tl.store(at + columns.to(tl.int64) * cache.column, tile.to(cache.pointer.dtype.element_ty), mask=inside)


@triton.jit
def quantised(tile, dtype: tl.constexpr):
    """Codes of rows, and what makes numbers of them; `dtype` as in `rows.numbers_of`."""
    # Compared as integers, in whose order a NaN is above every number.
    largest = tl.max(tl.abs(tile).to(tl.int32, bitcast=True), 1)
    most = 127.0 if dtype == tl.int8 else (448.0 if dtype == tl.uint8 else 57344.0)
    step = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, most, tl.float32))
    usable = (largest < FINITE) & (step > 0)
    numbers = tl.div_rn(tile, tl.where(usable, step, 1.0)[:, None] + tile * 0.0)
    numbers = tl.where(usable[:, None], tl.minimum(tl.maximum(numbers, -most), most), 0.0)
    if dtype == tl.int8:
        # Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
        codes = (numbers + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif dtype == tl.uint8:
        codes = float8(numbers, 20, 120, 0x3C800000, 16384.0)
    else:
        codes = float8(numbers, 21, 112, 0x38800000, 128.0).to(tl.float8e5, bitcast=True)
    return codes, tl.where(largest < FINITE, step, float("nan"))


@triton.jit
def float8(
    numbers,
    DROPPED: tl.constexpr,
    EXPONENTS: tl.constexpr,
    NORMAL: tl.constexpr,
    ALIGNS: tl.constexpr,
):
    """The nearest floats of 8 bits, ties to even, as uint8.

    They have DROPPED digits and EXPONENTS exponents less than float32. Those below the one with the bits
    NORMAL are multiples of one step: adding ALIGNS leaves in the low bits how many.
    """
    bits = numbers.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - (EXPONENTS << (23 - DROPPED))
    aligned = (tl.abs(numbers) + ALIGNS).to(tl.int32, bitcast=True)
    zero = tl.full([1, 1], ALIGNS, tl.float32).to(tl.int32, bitcast=True)
    code = tl.where(magnitude < NORMAL, aligned - zero, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
