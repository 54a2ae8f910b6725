"""Documents packed into one sequence: which tiles may hold queries and keys of one, and which pairs are."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.call import SPAN

SPAN_ = tl.constexpr(SPAN)
STEP_ = tl.constexpr(1024)  # spans that a program looks at together
LEAST = tl.constexpr(-(2**63))
GREATEST = tl.constexpr(2**63 - 1)


@triton.jit
def live_blocks(
    own_ids,
    first,
    last,
    bounds,
    start,
    end,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Narrow [start, end) to the positions whose spans may hold an id of the positions `first` to `last`.

    The start stays a multiple of BLOCK. `bounds` are those of the side that is narrowed.
    """
    own = first + tl.arange(0, OWN)
    mine = own <= last
    least = tl.min(tl.load(own_ids + own, mask=mine, other=GREATEST), 0)
    greatest = tl.max(tl.load(own_ids + own, mask=mine, other=LEAST), 0)
    near, far, spans = end, start, (end + SPAN_ - 1) // SPAN_
    for step in tl.range(start // SPAN_, spans, STEP_):
        span = step + tl.arange(0, STEP_)
        there = span < spans
        low = tl.load(bounds + span * 2, mask=there, other=GREATEST)
        high = tl.load(bounds + span * 2 + 1, mask=there, other=LEAST)
        live = (low <= greatest) & (high >= least)
        near = tl.minimum(near, tl.min(tl.where(live, span * SPAN_, end), 0))
        far = tl.maximum(far, tl.max(tl.where(live, span * SPAN_ + SPAN_, start), 0))
    return tl.maximum(start, near // BLOCK * BLOCK), tl.minimum(end, far)


@triton.jit
def same_segment(segments, batch, rows, keys, seqlen_q, count):
    """Which queries have the id of which keys; `rows` and `keys` broadcast together."""
    mine = segments.queries + batch.to(tl.int64) * segments.queries_batch
    theirs = segments.keys + batch.to(tl.int64) * segments.keys_batch
    return tl.load(mine + rows, mask=rows < seqlen_q, other=0) == tl.load(
        theirs + keys, mask=keys < count, other=0
    )
