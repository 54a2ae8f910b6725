"""One tile of the backward: the probabilities P again, and the gradient dS of its scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.gpu.rows import head_base, places
from fastattn.gpu.tile import INF, LOG2E, capped, dropout_factors, moved, visible


class Incoming(NamedTuple):
    """What comes in to the backward, as its kernels read it."""

    grad_out: Any  # Matrix (B, Hq, Lq, Dv)
    grad_weights: Any  # None or Matrix (B, Hq, Lq, Lk)
    terms: Any  # RowTerms


@triton.jit
def load_terms(terms, base, first, queries, BLOCK_M: tl.constexpr, CHECKED: tl.constexpr):
    """Level, excess and delta of BLOCK_M rows; of rows past the last query such that P and dS are 0."""
    at = base + first
    level = load_term(terms.level + at, first, queries, INF, BLOCK_M, CHECKED)
    delta = load_term(terms.delta + at, first, queries, 0.0, BLOCK_M, CHECKED)
    if terms.excess is None:
        excess = delta  # which nobody looks at
    else:
        excess = load_term(terms.excess + at, first, queries, 0.0, BLOCK_M, CHECKED)
    return level, excess, delta


@triton.jit
def load_term(at, first, queries, other, BLOCK_M: tl.constexpr, CHECKED: tl.constexpr):
    """Load one number for each row, by as many threads."""
    steps = tl.arange(0, BLOCK_M)[:, None]
    if CHECKED:
        term = tl.load(at + steps, mask=first + steps < queries, other=other)
    else:
        term = tl.load(at + steps)
    # The compiler would have each thread load all that it needs of a tile; no layout passes by a sum.
    return tl.sum(term, 1)


@triton.jit
def probabilities(
    products,
    level,
    excess,
    rules,
    batch,
    head,
    rows,
    keys,
    seqlen_q,
    offset,
    count,
    PLAIN: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """P before dropout, and the scores that softcap has left."""
    scores = products
    if PLAIN:
        p = tl.exp2(products * (rules.scale * LOG2E) - level)
    else:  # the difference first: a level of -3e38 must not overflow
        scores = capped(products, rules)
        all_scores = moved(scores, rules, batch, head, rows, keys, seqlen_q, offset, count)
        p = tl.exp2((all_scores - level) * LOG2E - excess)
    if CHECKED:
        p = tl.where(visible(rules, batch, head, rows, keys, seqlen_q, offset, count), p, 0.0)
    return p, scores


@triton.jit
def weight_factors(rules, batch_head, rows, first_key, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What dropout multiplies the weights of a tile by; 1 without dropout."""
    if rules.dropout_scale is None:
        factors = 1.0
    else:
        factors = dropout_factors(rules, batch_head, rows, first_key, BLOCK_N, TRANSPOSED)
    return factors


@triton.jit
def score_gradients(
    p,
    weight_grads,
    factors,
    delta,
    incoming,
    rules,
    batch,
    head,
    rows,
    keys,
    seqlen_q,
    count,
    CHECKED: tl.constexpr,
):
    """Compute dS of the scores that the softmax sees. `weight_grads` is dO V^T."""
    if incoming.grad_weights is not None:
        at = places(head_base(incoming.grad_weights, batch, head), incoming.grad_weights, rows, keys)
        inside = (rows < seqlen_q) & (keys < count)
        weight_grads += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if rules.dropout_scale is not None:
        weight_grads *= factors
    grads = p * (weight_grads - delta)
    if CHECKED or incoming.grad_weights is not None:  # a weight of 0 has none, whatever comes in for it
        grads = tl.where(p == 0, 0.0, grads)
    return grads


@triton.jit
def product_gradients(grads, scores, rules):
    """Take softcap into account: `scores` are what it has left."""
    if rules.softcap is not None:
        ratio = scores / rules.softcap
        grads *= 1 - ratio * ratio
    return grads
