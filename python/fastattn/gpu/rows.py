"""Where rows of tensors lie in memory: at strides, sequence after sequence, or in pages; how they are loaded.

A kernel takes its tensors as `Matrix`. Positions are 32-bit, addresses 64-bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """A tensor (B, H, rows, columns) in memory; strides in elements."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Pages(NamedTuple):
    """Where keys lie of which a matrix (pages, H, page size, columns) has all sequences' pages."""

    table: Any  # (B, pages of a sequence), which pages a sequence has, ...
    batch: Any  # ... and its strides
    slot: Any
    size: Any  # keys of a page
    last: Any  # the number of the last page there is


def matrix(tensor: Any) -> Matrix | None:
    """`tensor` as a kernel's argument."""
    return None if tensor is None else Matrix(tensor, *tensor.stride())


@triton.jit
def head_base(matrix, batch, head):
    """Where the rows of one head begin."""
    return matrix.pointer + batch.to(tl.int64) * matrix.batch + head.to(tl.int64) * matrix.head


@triton.jit
def places(base, matrix, rows, columns):
    """Addresses of a tile: `rows` and `columns` are index tensors that broadcast together."""
    return base + rows.to(tl.int64) * matrix.row + columns.to(tl.int64) * matrix.column


@triton.jit
def load_rows(
    base,
    matrix,
    first,
    count,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Load (BLOCK, BLOCK_DIM) from row `first`, or the transpose; 0 past DIM, and past `count` if CHECKED."""
    # Places are computed anew for each tile: with the part that stays the same hoisted out of a loop, ptxas
    # (12.8) orders the products of a Hopper one after another, and the kernel loses a tenth.
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_DIM)
    r = rows[None, :] if TRANSPOSED else rows[:, None]
    c = columns[:, None] if TRANSPOSED else columns[None, :]
    at = places(base, matrix, r, c)
    if CHECKED and BLOCK_DIM != DIM:
        tile = tl.load(at, mask=(r < count) & (c < DIM), other=0.0)
    elif CHECKED:
        tile = tl.load(at, mask=r < count, other=0.0)
    elif BLOCK_DIM != DIM:
        tile = tl.load(at, mask=c < DIM, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(base, matrix, rows, count, values, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store (rows, BLOCK_DIM) rounded to the matrix's dtype, but for what lies past `count` rows or DIM."""
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    r = rows[:, None]
    at = places(base, matrix, r, columns)
    tl.store(at, values.to(matrix.pointer.dtype.element_ty), mask=(r < count) & (columns < DIM))


@triton.jit
def query_base(matrix, rules, batch, head, seqlen_q):
    """Where the rows of queries of one head of a sequence begin."""
    if rules.ragged is None:
        base = head_base(matrix, batch, head)
    else:
        first, _ = sequence_rows(rules.ragged.queries, batch, seqlen_q)
        base = head_base(matrix, batch * 0, head) + first.to(tl.int64) * matrix.row
    return base


@triton.jit
def key_base(matrix, rules, batch, head, seqlen_k):
    """Where the rows of keys of one head of a sequence begin; of a head in page 0 where there are pages."""
    if rules.pages is not None:
        base = head_base(matrix, batch * 0, head)
    elif rules.ragged is not None:
        first, _ = sequence_rows(rules.ragged.keys, batch, seqlen_k)
        base = head_base(matrix, batch * 0, head) + first.to(tl.int64) * matrix.row
    else:
        base = head_base(matrix, batch, head)
    return base


@triton.jit
def number_base(rules, batch, head, batch_head, seqlen_q):
    """Where the numbers of each row, (B, Hq, Lq) or (Hq, all rows), begin of one head of a sequence."""
    if rules.ragged is None:
        base = batch_head.to(tl.int64) * seqlen_q
    else:
        first, _ = sequence_rows(rules.ragged.queries, batch, seqlen_q)
        base = head.to(tl.int64) * seqlen_q + first
    return base


@triton.jit
def sequence_rows(starts, sequence, total):
    """The rows [first, end) of a sequence among `total`; no stored number leads past them."""
    first = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), total)
    end = tl.minimum(tl.maximum(tl.load(starts + sequence + 1), first), total)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def load_keys(
    base,
    matrix,
    rules,
    batch,
    first,
    count,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Load keys or values as `load_rows` does, from where they lie; 0 also before the first if CHECKED."""
    if rules.pages is None and (rules.starts is None or not CHECKED):
        tile = load_rows(base, matrix, first, count, BLOCK, DIM, BLOCK_DIM, TRANSPOSED, CHECKED)
    else:
        keys, columns = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_DIM)
        there = existing(rules, batch, keys, count)
        rows = row_steps(matrix, rules, batch, keys, there)
        r = rows[None, :] if TRANSPOSED else rows[:, None]
        c = columns[:, None] if TRANSPOSED else columns[None, :]
        inside = there[None, :] if TRANSPOSED else there[:, None]
        at = base + r + c.to(tl.int64) * matrix.column
        tile = tl.load(at, mask=inside & (c < DIM), other=0.0)
    return tile


@triton.jit
def existing(rules, batch, keys, count):
    """Which keys there are."""
    there = keys < count
    if rules.starts is not None:
        there &= keys >= tl.load(rules.starts + batch)
    return there


@triton.jit
def row_steps(matrix, rules, batch, keys, there):
    """How far from `key_base` the rows of keys lie, and whatever for those that are not `there`."""
    if rules.pages is None:
        steps = keys.to(tl.int64) * matrix.row
    else:
        pages = rules.pages
        slot = keys // pages.size
        page = page_of(pages, batch, slot, there)
        page = tl.minimum(tl.maximum(page, 0), pages.last).to(tl.int64)
        steps = page * matrix.batch + (keys - slot * pages.size).to(tl.int64) * matrix.row
    return steps


@triton.jit
def page_of(pages, batch, slot, there):
    """The number of the page in a slot, whatever it is."""
    at = pages.table + batch.to(tl.int64) * pages.batch + slot.to(tl.int64) * pages.slot
    return tl.load(at, mask=there, other=0)


@triton.jit
def load_scales(scales, rules, batch, head, keys, count, seqlen_k):
    """What multiplies the codes of quantised keys or values: a number for each of `keys`."""
    there = existing(rules, batch, keys, count)
    base = key_base(scales, rules, batch, head, seqlen_k)
    return tl.load(base + row_steps(scales, rules, batch, keys, there), mask=there, other=0.0)


@triton.jit
def numbers_of(codes, dtype: tl.constexpr):
    """Tell the numbers that quantised `codes` stand for before their scales; a float of 16 bits holds each.

    Codes of int8 are int8, those of float8_e4m3fn uint8, since not every GPU has a type for them, and those
    of float8_e5m2 are of that type. Anything else is left as it is.
    """
    if codes.dtype == tl.int8:
        numbers = codes.to(dtype)
    elif codes.dtype == tl.uint8:
        word = codes.to(tl.int16)
        # As a float16 with the same digits; the exponents count from 8 further down.
        small = (((word & 0x80) << 8) | ((word & 0x7F) << 7)).to(tl.float16, bitcast=True)
        numbers = tl.where((word & 0x7F) == 0x7F, float("nan"), small * 256.0).to(dtype)
    elif codes.dtype == tl.float8e5:
        word = codes.to(tl.uint8, bitcast=True).to(tl.int16) << 8
        numbers = word.to(tl.float16, bitcast=True).to(dtype)
    else:
        numbers = codes
    return numbers
