"""Attention in NumPy and float64, one head at a time: the oracle. Read this first.

Every rule is spelled out as a boolean matrix over (query, key). Nothing is fast, or shared with the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.arrays import Array, Strided
from fastattn.cache_problem import CacheUpdate, Rotary
from fastattn.codes import LARGEST_CODE
from fastattn.philox import multiplier
from fastattn.problem import AttentionProblem

Floats = NDArray[np.float64]


class Result(NamedTuple):
    """The unrounded results; of one head, or of a whole call with leading axes (B, Hq)."""

    out: Floats  # (Lq, Dv)
    lse: Floats  # (Lq,)
    weights: Floats  # (Lq, Lk)


def attention(query: Array, key: Array, value: Array, **options: Any) -> Result:
    """Compute attention on what the inputs hold, in float64 throughout.

    Takes the arguments of `fastattn.attention` that say what to compute. Returns out, lse and weights with
    axes (B, Hq, ...) whatever the layout.
    """
    problem = AttentionProblem.from_arguments(query, key, value, **options).seeded()
    shape = problem.scores_shape
    result = Result(np.empty(problem.out_shape), np.empty(shape[:3]), np.empty(shape))
    for index, head in each_head(problem):
        for whole, part in zip(result, head, strict=True):
            whole[index] = part
    return result


def each_head(problem: AttentionProblem) -> Iterator[tuple[tuple[int, int], Result]]:
    """Yield ((b, h), result) for every query head, so that only one (Lq, Lk) matrix exists at a time.

    Of sequences behind one another, hand in one at a time: see `AttentionProblem.sequences`.
    """
    batch, heads, _, _ = problem.scores_shape
    group = heads // problem.key.shape[1]
    for b, h in np.ndindex(batch, heads):
        result = attend(
            problem.query.read((b, h)),
            cached_rows(problem, problem.key, problem.key_scale, b, h // group),
            cached_rows(problem, problem.value, problem.value_scale, b, h // group),
            visible=visible_keys(problem, b, h),
            bias=added_to_scores(problem, b, h),
            sink=-np.inf if problem.sinks is None else problem.sinks[h],
            softcap=problem.softcap,
            scale=problem.scale,
            dropout=dropout_multiplier(problem, b, h),
        )
        yield (b, h), result


def positions(problem: AttentionProblem, b: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each query stands among the keys, a column (Lq, 1), and each key, a row (1, Lk)."""
    batch, _, seqlen_q, seqlen_k = problem.scores_shape
    offset = np.broadcast_to(problem.query_offset, batch)[b]
    return offset + np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]


def cached_rows(problem: AttentionProblem, rows: Strided, scale: Strided | None, b: int, h: int) -> Floats:
    """Keys or values of one head, (Lk, D): gathered from their pages up to the length, and dequantised."""

    def read(index: tuple[int, int]) -> Floats:
        return rows.read(index) if scale is None else rows.read(index) * scale.read(index)[:, None]

    if problem.block_table is None:
        return read((b, h))
    assert problem.kv_lengths is not None
    gathered = np.zeros((problem.seqlen_k, rows.shape[3]))
    for slot in range(-(-int(problem.kv_lengths[b]) // problem.page_size)):
        start = slot * problem.page_size
        gathered[start : start + problem.page_size] = read((int(problem.block_table.read((b, slot))), h))
    return gathered


def visible_keys(problem: AttentionProblem, b: int, h: int) -> NDArray[np.bool_]:
    """Which query may attend to which key, (Lq, Lk)."""
    query_at, key_at = positions(problem, b)
    visible = (key_at >= query_at - problem.window_left) & (key_at <= query_at + problem.window_right)
    if problem.kv_starts is not None:
        visible &= key_at >= problem.kv_starts[b]
    if problem.kv_lengths is not None:
        visible &= key_at < problem.kv_lengths[b]
    if problem.query_lengths is not None:
        visible &= np.arange(problem.scores_shape[2])[:, None] < problem.query_lengths[b]
    if problem.segment_ids is not None:
        of_query, of_key = problem.segment_ids
        visible &= of_query[b][:, None] == of_key[b][None, :]
    if problem.mask is not None:
        visible &= problem.mask.read((b, h))
    if problem.bias is not None:
        visible &= problem.bias.read((b, h)) != -np.inf
    return visible


def added_to_scores(problem: AttentionProblem, b: int, h: int) -> Floats:
    """Bias and ALiBi, (Lq, Lk)."""
    query_at, key_at = positions(problem, b)
    added = np.zeros(problem.scores_shape[2:])
    if problem.bias is not None:
        added += problem.bias.read((b, h))
    if problem.alibi_slopes is not None:
        added -= problem.alibi_slopes[b, h] * np.abs(query_at - key_at)
    return added


def dropout_multiplier(problem: AttentionProblem, b: int, h: int) -> Floats | float:
    """What the weights are multiplied by, (Lq, Lk), or 1 where there is no dropout."""
    if problem.dropout_p == 0:
        return 1.0
    assert problem.dropout_seed is not None
    _, heads, seqlen_q, seqlen_k = problem.scores_shape
    head = np.array((problem.first_sequence + b) * heads + h)
    return multiplier(
        problem.dropout_p, problem.dropout_seed, problem.dropout_offset, head, seqlen_q, seqlen_k
    )


@np.errstate(invalid="ignore", over="ignore")
def final_scores(
    query: Floats, key: Floats, *, visible: NDArray[np.bool_], bias: Floats, softcap: float, scale: float
) -> Floats:
    """What the softmax is taken of, (Lq, Lk): -inf where a query may not attend to a key."""
    scores = scale * (query @ key.T)
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    return np.where(visible, scores + bias, -np.inf)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def attend(
    query: Floats,
    key: Floats,
    value: Floats,
    *,
    visible: NDArray[np.bool_],
    bias: Floats,
    sink: float,
    softcap: float,
    scale: float,
    dropout: Floats | float,
) -> Result:
    """One head: (Lq, D), (Lk, D) and (Lk, Dv) to (Lq, Dv)."""
    scores = final_scores(query, key, visible=visible, bias=bias, softcap=softcap, scale=scale)
    visible = scores != -np.inf

    # The sink is one more logit of every row: it takes its share of the weight and has no value.
    highest = np.max(scores, axis=1, initial=sink)
    highest[highest == -np.inf] = 0  # a row without any key
    unnormalised = np.where(visible, np.exp(scores - highest[:, None]), 0)
    total = unnormalised.sum(axis=1) + np.exp(sink - highest)
    weights = np.divide(unnormalised, total[:, None], out=np.zeros_like(scores), where=total[:, None] != 0)
    lse = highest + np.log(total)  # dropout comes after the normaliser
    weights *= dropout
    return Result(weighted_sum(weights, visible, value), lse, weights)


def weighted_sum(weights: Floats, visible: NDArray[np.bool_], value: Floats) -> Floats:
    """``weights @ value``, in which a key that a row may not attend to adds nothing, not even 0 * NaN."""
    finite = np.isfinite(value).all(axis=1)
    out = weights[:, finite] @ value[finite]
    for j in np.flatnonzero(~finite):
        attending = visible[:, j]
        out[attending] += weights[attending, j, None] * value[j]
    return out


class HeadInsight(NamedTuple):
    """What the queries of one head look at."""

    keys: NDArray[np.int64]  # (Lq, top_k)
    weights: Floats  # (Lq, top_k)
    entropy: Floats  # (Lq,)
    key_mass: Floats  # (Lk,)
    out: Floats  # (Lq, Dv)
    distance_mass: Floats | None  # (edges + 1,)


def each_insight(
    problem: AttentionProblem, top_k: int, edges: NDArray[np.int64] | None
) -> Iterator[tuple[tuple[int, int], HeadInsight]]:
    """Yield ((b, h), insight) for every query head."""
    group = problem.query.shape[1] // problem.key.shape[1]
    for (b, h), (out, _, weights) in each_head(problem):
        scores = final_scores(
            problem.query.read((b, h)),
            problem.key.read((b, h // group)),
            visible=visible_keys(problem, b, h),
            bias=added_to_scores(problem, b, h),
            softcap=problem.softcap,
            scale=problem.scale,
        )
        keys = strongest_keys(scores, top_k)
        taken = np.take_along_axis(np.pad(weights, [(0, 0), (0, 1)]), keys, 1)  # key -1: the padding
        seen = np.where(scores == -np.inf, 0, weights)  # of a row that is NaN, what it sees
        distance_mass: Floats | None = None
        if edges is not None:
            query_at, key_at = positions(problem, b)
            bucket = np.searchsorted(edges, query_at - key_at, "right")
            distance_mass = np.bincount(bucket.ravel(), seen.ravel(), len(edges) + 1).astype(np.float64)
        entropy = entropies(weights, -np.inf if problem.sinks is None else problem.sinks[h], scores)
        yield (b, h), HeadInsight(keys, taken, entropy, seen.sum(0), out, distance_mass)


def strongest_keys(scores: Floats, top_k: int) -> NDArray[np.int64]:
    """The keys of largest score, (Lq, top_k): of equal ones the lower; -1 where a query sees no more."""
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-ranked, 1, kind="stable")[:, :top_k]
    keys = np.where(np.take_along_axis(ranked, order, 1) == -np.inf, -1, order)
    return np.pad(keys, [(0, 0), (0, top_k - keys.shape[1])], constant_values=-1)


@np.errstate(divide="ignore", invalid="ignore")
def entropies(weights: Floats, sink: float, scores: Floats) -> Floats:
    """``-sum(p * log(p))`` over the keys and the sink, which has what they leave; nats, (Lq,)."""
    highest = np.max(scores, axis=1, initial=sink)
    sinks = np.exp(sink - np.where(highest == -np.inf, 0, highest))
    total = sinks + np.where(scores == -np.inf, 0, np.exp(scores - highest[:, None])).sum(1)
    shares = np.column_stack([weights, np.where(total == 0, 0, sinks / total)])
    entropy: Floats = -np.where(shares == 0, 0, shares * np.log(shares)).sum(1)
    return entropy


def update_cache(problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
    """Write the new rows into the caches; return the problem, its query turned if there is an embedding."""
    for b in range(len(update.start)):
        for i in range(0 if update.new_key is None else update.new_key.shape[2]):
            _write_row(problem, update, b, i)
    rotary = update.rotary
    if rotary is None:
        return problem
    query = problem.library.empty(problem.query.shape, problem.dtype, problem.query.array)
    for b, h, i in np.ndindex(*query.shape[:3]):
        at = int(rotary.query_start[b]) + i * rotary.query_step
        query.write((b, h, i), turned(problem.query.read((b, h, i)), rotary, at))
    return problem._replace(query=query)


def _write_row(problem: AttentionProblem, update: CacheUpdate, b: int, i: int) -> None:
    """Write row `i` of the new keys and values of a sequence, of every head."""
    assert update.new_key is not None and update.new_value is not None
    position = int(update.start[b]) + i
    place, row = b, position % update.capacity
    if problem.block_table is not None:
        slot, row = divmod(row, problem.page_size)
        place = int(problem.block_table.read((b, slot)))
    for h in range(problem.key.shape[1]):
        key = update.new_key.read((b, h, i))
        if update.rotary is not None:
            key = turned(key, update.rotary, position)
        store_row(problem.key, problem.key_scale, (place, h, row), key)
        store_row(problem.value, problem.value_scale, (place, h, row), update.new_value.read((b, h, i)))


def turned(row: Floats, rotary: Rotary, position: int) -> Floats:
    """Turn the pairs of columns of one row, (D,), by the angles of its position."""
    cos, sin = rotary.cos.read(position), rotary.sin.read(position)
    pairs, columns = cos.size, np.arange(2 * cos.size)
    first = columns[0::2] if rotary.interleaved else columns[:pairs]
    second = columns[1::2] if rotary.interleaved else columns[pairs:]
    result: Floats = row.copy()
    result[first] = row[first] * cos - row[second] * sin
    result[second] = row[second] * cos + row[first] * sin
    return result


@np.errstate(over="ignore", invalid="ignore")
def store_row(cache: Strided, scale: Strided | None, index: tuple[int, int, int], row: Floats) -> None:
    """Write one row, (D,): rounded, or quantised, by a scale that its largest magnitude fixes.

    A row that is not finite has a scale of NaN, and codes of 0: what attends to it is NaN.
    """
    if scale is None:
        cache.write(index, row)
        return
    largest = np.abs(row.astype(np.float32)).max()
    step = np.float32(largest) / np.float32(LARGEST_CODE[cache.dtype]) if np.isfinite(largest) else np.nan
    scale.write(index, np.float64(step))
    codes = row / np.float64(step) if step > 0 else np.zeros_like(row)
    cache.write(index, np.rint(codes) if cache.dtype == "int8" else codes)
