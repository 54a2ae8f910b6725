"""What a call of `attention_with_kvcache` means: what it writes into its caches, what it attends to then."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

from fastattn._flags import flag
from fastattn.arrays import INTEGERS, NUMPY, Array, ArrayLibrary, Strided, library_of, type_name
from fastattn.cache_tensors import CacheTensors
from fastattn.problem import (
    UNBOUNDED,
    AttentionProblem,
    Layout,
    Window,
    check_layout,
    check_real,
    check_softcap,
    check_window,
)
from fastattn.vectors import MAX_OFFSET, Vector, is_integer
from fastattn.vectors import alibi_slopes as slopes_vector
from fastattn.vectors import sinks as sinks_vector
from fastattn.vectors import vector as short_vector


class Rotary(NamedTuple):
    """Rows turned by the angles of their positions: new keys before they are written, queries in a copy."""

    cos: Strided  # (positions, rotary_dim / 2), query's dtype or float32
    sin: Strided
    interleaved: bool  # pairs are columns (2i, 2i + 1), else (i, i + rotary_dim / 2)
    query_start: Vector  # (B,), int64: the position of query 0
    query_step: int  # 1, or 0 where all queries of a sequence are turned as the first


class CacheUpdate(NamedTuple):
    """What is done before attending: rows are written behind the keys of each sequence, rows are turned."""

    new_key: Strided | None  # (B, Hkv, Ln, D)
    new_value: Strided | None  # (B, Hkv, Ln, Dv)
    start: Vector  # (B,), int64: the position of the first new row
    capacity: int  # position p is at row p % capacity of a sequence's cache
    rotary: Rotary | None


def from_arguments(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    *,
    new_key: Array | None,
    new_value: Array | None,
    cache_seqlens: Any,
    block_table: Any,
    rotary_cos: Array | None,
    rotary_sin: Array | None,
    rotary_interleaved: bool,
    key_scale: Array | None,
    value_scale: Array | None,
    causal: bool,
    window: Window | None,
    rolling: bool,
    alibi_slopes: Any,
    sinks: Any,
    softcap: float,
    scale: float | None,
    layout: Layout,
    composed: bool = False,
) -> tuple[AttentionProblem, CacheUpdate]:
    """Validate the arguments of `attention_with_kvcache`, whose docstring says what they mean.

    The problem is that of the caches as they are after the update.
    """
    _check_flags(rotary_interleaved=rotary_interleaved, causal=causal, rolling=rolling)
    library = library_of("query", query, composed=composed)
    check_layout(layout)
    paged = block_table is not None
    arrays = (query, key_cache, value_cache, key_scale, value_scale, new_key, new_value)
    tensors = CacheTensors.of(library, layout, paged, *arrays)
    tensors.check_overlaps()
    batch, heads, seqlen_q, head_dim = tensors.query.shape
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else check_window(window)
    page_size = tensors.key_cache.shape[2]
    table = _block_table(library, block_table, batch) if paged else None
    capacity = page_size if table is None else table.shape[1] * page_size
    if rolling:
        _check_ring(capacity, left, seqlen_q, tensors.added)
    start, table = _places(library, tensors, cache_seqlens, table, capacity, rolling)
    lengths = start + tensors.added
    rotary = None
    if rotary_cos is not None or rotary_sin is not None:
        rotary = Rotary(
            *_rotary_tables(library, rotary_cos, rotary_sin, tensors.query),
            bool(rotary_interleaved),
            lengths - seqlen_q,
            int(bool(causal) or (left, right) != (UNBOUNDED, UNBOUNDED)),
        )
        if not library.keeps(query):
            _check_positions(rotary, seqlen_q, start, tensors.added)
    if rolling:
        table = _twice(library, table, query)
        begins = (lengths - capacity) // capacity * capacity
        lengths = lengths - begins * (begins > 0)
    problem = AttentionProblem(
        library,
        layout,
        tensors.query,
        tensors.key_cache,
        tensors.value_cache,
        None,
        None,
        lengths,
        lengths - seqlen_q,
        left,
        0 if causal else right,
        None if alibi_slopes is None else slopes_vector(library, alibi_slopes, batch, heads),
        None if sinks is None else sinks_vector(library, sinks, heads),
        check_softcap(softcap),
        1.0 / math.sqrt(head_dim) if scale is None else check_real("scale", scale),
        alibi_slopes_given=alibi_slopes,
        sinks_given=sinks,
        block_table=table,
        page_size=0 if table is None else page_size,
        key_scale=tensors.key_scale,
        value_scale=tensors.value_scale,
    )
    return problem, CacheUpdate(tensors.new_key, tensors.new_value, start, capacity, rotary)


def _check_flags(**flags: Any) -> None:
    for name, given in flags.items():
        if not isinstance(given, (bool, np.bool_)):
            raise TypeError(f"{name} must be a bool, got {type_name(given)}")


def _block_table(library: ArrayLibrary, table: Any, batch: int) -> Strided:
    """(B, slots), integers: a copy of the values, or what lies on a device."""
    kept = library.keeps(table)
    view = library.view("block_table", table) if kept else library.readable("block_table", table)
    if view.dtype not in INTEGERS:
        raise TypeError(f"block_table must hold integers, got {view.dtype}")
    if len(view.shape) != 2 or view.shape[0] != batch:
        raise ValueError(f"block_table must have shape ({batch}, slots), got {view.shape}")
    return view if kept else NUMPY.view("block_table", view.read().astype(np.int64))


def _check_ring(capacity: int, left: int, seqlen_q: int, added: int) -> None:
    if left == UNBOUNDED:
        raise ValueError("window must bound how far back a query looks where rolling is True, got None")
    needed = max(left + seqlen_q, added)
    if capacity < needed:
        expected = f"at least {needed} rows where rolling is True: the window and the queries, and new rows"
        raise ValueError(f"key_cache must have {expected}, got {capacity}")


def _places(
    library: ArrayLibrary,
    tensors: CacheTensors,
    cache_seqlens: Any,
    table: Strided | None,
    capacity: int,
    rolling: bool,
) -> tuple[Vector, Strided | None]:
    """How many keys of each sequence there are before the call, and its pages, once known to be there."""
    query, added = tensors.query, tensors.added
    if cache_seqlens is None:
        cache_seqlens = 0 if tensors.new_key is not None else capacity
    limit = MAX_OFFSET if rolling else capacity - added
    if limit < 0:
        raise ValueError(f"new_key must have at most the {capacity} rows of a sequence's cache, got {added}")
    start = _lengths(library, cache_seqlens, query, limit, f"{capacity} rows, {added} of them new")
    if table is None:
        return start, None
    if not library.keeps(query.array):
        return start, _checked_pages(tensors, table.array, start, capacity)
    if flag("FASTATTN_DEBUG"):
        pages, lengths = (library.readable("block_table", array).read() for array in (table.array, start))
        _checked_pages(tensors, pages, lengths, capacity)
    return start, table


def _lengths(library: ArrayLibrary, lengths: Any, query: Strided, limit: int, room: str) -> Vector:
    batch, kept = query.shape[0], None
    if is_integer(lengths):
        values = np.full(batch, lengths, np.int64)
        if library.keeps(query.array):
            kept = sys.modules["torch"].full((batch,), int(lengths), device=query.array.device)
    elif not isinstance(lengths, (list, tuple)) and not hasattr(lengths, "shape"):
        got = type_name(lengths)
        raise TypeError(f"cache_seqlens must be an integer, or one for each sequence, got {got}")
    else:
        values, kept = short_vector("cache_seqlens", library, lengths, INTEGERS, [(batch,)])
    wrong = np.flatnonzero((values < 0) | (values > limit))
    if wrong.size:
        got = f"{values[wrong[0]]} for sequence {wrong[0]}"
        raise ValueError(f"cache_seqlens must be from 0 to {limit} in a cache of {room}, got {got}")
    return values.astype(np.int64, order="C") if kept is None else kept.long()


def _checked_pages(tensors: CacheTensors, table: Any, start: Any, capacity: int) -> Strided:
    """The table with 0 for every page that is not used; raise for one that is used and not there."""
    pages, _, page_size, _ = tensors.key_cache.shape
    used = np.minimum(start + tensors.added, capacity)
    slots = np.arange(table.shape[1]) < -(-used[:, None] // page_size)
    wrong = slots & ((table < 0) | (table >= pages))
    if wrong.any():
        sequence, slot = np.argwhere(wrong)[0]
        got = f"{table[sequence, slot]} for sequence {sequence}, slot {slot}"
        raise ValueError(
            f"block_table must hold pages from 0 to {pages - 1} as far as they are used, got {got}"
        )
    if not pages:  # and nothing is used
        slots = slots[:, :0]
    table = np.where(slots, table[:, : slots.shape[1]], 0)
    if tensors.added:
        _check_targets(table, (start[:, None] + np.arange(tensors.added)) % capacity, page_size)
    return NUMPY.view("block_table", table)


def _check_targets(table: Any, at: Any, page_size: int) -> None:
    """Raise ValueError where two new rows, `at` rows of their sequences, would be written to one place."""
    rows = np.take_along_axis(table, at // page_size, 1) * page_size + at % page_size
    order = np.argsort(rows, axis=None, kind="stable")
    same = np.flatnonzero(np.diff(rows.ravel()[order]) == 0)
    if same.size:
        first, second = (int(order[same[0] + i]) for i in (0, 1))
        page, row = divmod(int(rows.flat[first]), page_size)
        got = f"row {row} of page {page} for sequences {first // at.shape[1]} and {second // at.shape[1]}"
        raise ValueError(f"block_table must give each new row a place of its own, got {got}")


def _rotary_tables(library: ArrayLibrary, cos: Any, sin: Any, query: Strided) -> tuple[Strided, Strided]:
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"rotary_cos and rotary_sin must be given together, got None for {missing}")
    tables = library.view("rotary_cos", cos), library.view("rotary_sin", sin)
    for name, view in zip(("rotary_cos", "rotary_sin"), tables, strict=True):
        if view.dtype not in (query.dtype, "float32") or view.dtype != tables[0].dtype:
            raise TypeError(f"{name} must be of query's dtype or float32, as the other is, got {view.dtype}")
        if (
            len(view.shape) != 2
            or view.shape != tables[0].shape
            or not 0 < 2 * view.shape[1] <= query.shape[3]
        ):
            expected = (
                f"(positions, rotary_dim / 2), as the other has, and rotary_dim from 2 to {query.shape[3]}"
            )
            raise ValueError(f"{name} must have shape {expected}, got {view.shape}")
    return tables


def _check_positions(rotary: Rotary, seqlen_q: int, start: Any, added: int) -> None:
    """Raise ValueError unless the tables have a row for every position."""
    count = rotary.cos.shape[0]
    of_queries = 1 + (seqlen_q - 1) * rotary.query_step if seqlen_q else 0
    for first, rows in (rotary.query_start, of_queries), (start, added):
        wrong = np.flatnonzero((first < 0) | (first + rows > count)) if rows else np.empty(0, np.int64)
        if wrong.size:
            at = wrong[0]
            got = f"{first[at]} to {first[at] + rows - 1} for sequence {at}"
            raise ValueError(f"rotary_cos has rows for the positions 0 to {count - 1}, got {got}")


def _twice(library: ArrayLibrary, table: Strided | None, query: Array) -> Strided:
    """The pages of a ring twice over, so that positions run on where it begins again.

    A ring in one piece is one page for each sequence.
    """
    if not library.keeps(query):
        pages = np.arange(len(query))[:, None] if table is None else table.array
        return NUMPY.view("block_table", np.concatenate([pages, pages], 1))
    torch = sys.modules["torch"]
    pages = torch.arange(len(query), device=query.device)[:, None] if table is None else table.array
    return library.view("block_table", torch.cat([pages, pages], 1))
