"""The gradient of a bias: a program owns a tile of it as it was given, and sums over all that it went to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.gpu import configs
from fastattn.gpu.call import Call
from fastattn.gpu.rows import head_base, key_base, load_keys, load_rows, matrix, places
from fastattn.gpu.score_gradient import Incoming, load_terms, probabilities, score_gradients, weight_factors
from fastattn.gpu.tile import (
    key_count,
    key_ranges,
    query_count,
    query_offset,
    query_ranges,
    rules_of,
)


def bias_gradient(call: Call, incoming: Incoming, grad_bias: Tensor) -> None:
    """Write `grad_bias`, (B, Hq, Lq, Lk) with a size of 1 on each axis along which the bias is one for all.

    Where the bias has a number for each query and key, a tile of it is summed over batches and heads in its
    program. Else there are few of its tiles: each head gets sums of its own, at most one a query or key.
    """
    batch, heads, seqlen_q, _ = call.query.shape
    seqlen_k = call.key.shape[2]
    if 0 in (batch, seqlen_q, seqlen_k):
        grad_bias.zero_()
        return
    of_batch, of_head, of_row, of_key = (
        mine == all for mine, all in zip(grad_bias.shape, (batch, heads, seqlen_q, seqlen_k), strict=True)
    )
    if of_row and of_key:
        _add_tiles(call, incoming, grad_bias, of_batch, of_head)
        return
    shape = (batch, heads, seqlen_q, 1) if not of_key else (batch, heads, 1, seqlen_k)
    sums = torch.empty(shape, dtype=torch.float32, device=grad_bias.device)
    _add_tiles(call, incoming, sums, True, True)
    grad_bias.copy_(sums.sum_to_size(grad_bias.shape))


def _add_tiles(call: Call, incoming: Incoming, grad: Tensor, of_batch: bool, of_head: bool) -> None:
    batch, heads, seqlen_q, head_dim = call.query.shape
    seqlen_k, value_dim = call.key.shape[2], call.value.shape[3]
    tiles = configs.backward_bias(call)
    row_tiles = triton.cdiv(grad.shape[2], tiles.rows)
    key_tiles = triton.cdiv(grad.shape[3], tiles.columns)
    bias_gradient_kernel[(row_tiles * key_tiles * grad.shape[0] * grad.shape[1],)](
        matrix(call.query),
        matrix(call.key),
        matrix(call.value),
        incoming,
        matrix(grad),
        rules_of(call),
        heads,
        seqlen_q,
        seqlen_k,
        row_tiles,
        key_tiles,
        grad.shape[1],
        1 if of_batch else batch,
        1 if of_head else heads,
        GROUP=heads // call.key.shape[1],
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_DIM=configs.padded(head_dim),
        BLOCK_VALUE=configs.padded(value_dim),
        PRECISION=configs.precision(call),
        ALL_ROWS=grad.shape[2] != seqlen_q,
        ALL_KEYS=grad.shape[3] != seqlen_k,
        **tiles.options(),
    )


_SIZES = [
    "heads",
    "seqlen_q",
    "seqlen_k",
    "row_tiles",
    "key_tiles",
    "own_heads",
    "batch_members",
    "head_members",
]


@triton.jit(do_not_specialize=_SIZES)
def bias_gradient_kernel(
    query,
    key,
    value,
    incoming,
    grad_bias,
    rules,
    heads,
    seqlen_q,
    seqlen_k,
    row_tiles,
    key_tiles,
    own_heads,
    batch_members,
    head_members,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of the gradient. ALL_ROWS, ALL_KEYS: it has one number for all queries, or for all keys."""
    tile, slot = tl.program_id(0) % (row_tiles * key_tiles), tl.program_id(0) // (row_tiles * key_tiles)
    own_row, own_key = tile // key_tiles * BLOCK_M, tile % key_tiles * BLOCK_N
    own_batch, own_head = slot // own_heads, slot % own_heads
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in tl.range(batch_members * head_members):
        batch, head = own_batch + member // head_members, own_head + member % head_members
        count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
        queries = query_count(rules, batch, seqlen_q)
        if ALL_ROWS:
            last = tl.minimum(own_key + BLOCK_N, count) - 1
            there = tl.where(own_key < count, queries, 0)
            start, _, _, end = query_ranges(rules, batch, own_key, last, offset, there, BLOCK_M, BLOCK_N)
        else:
            last = tl.minimum(own_row + BLOCK_M, queries) - 1
            start, _, _, end = key_ranges(rules, batch, own_row, last, offset, count, BLOCK_M, BLOCK_N)
            if not ALL_KEYS:
                start = tl.maximum(start, own_key)
                end = tl.minimum(end, own_key + BLOCK_N)
        for first in tl.range(start, end, BLOCK_M if ALL_ROWS else BLOCK_N):
            first_row = first if ALL_ROWS else own_row
            first_key = own_key if ALL_ROWS else first
            sums += tile_gradient(
                query, key, value, incoming, rules, batch, head, heads, first_row, first_key, queries,
                seqlen_q, seqlen_k, offset, count, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE,
                PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip

    rows, keys = own_row + tl.arange(0, BLOCK_M), own_key + tl.arange(0, BLOCK_N)
    base = head_base(grad_bias, own_batch, own_head)
    dtype = grad_bias.pointer.dtype.element_ty
    if ALL_KEYS:
        tl.store(places(base, grad_bias, rows, rows * 0), tl.sum(sums, 1).to(dtype), mask=rows < seqlen_q)
    elif ALL_ROWS:
        tl.store(places(base, grad_bias, keys * 0, keys), tl.sum(sums, 0).to(dtype), mask=keys < seqlen_k)
    else:
        inside = (rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :]
        tl.store(places(base, grad_bias, rows[:, None], keys[None, :]), sums.to(dtype), mask=inside)


@triton.jit
def tile_gradient(
    query,
    key,
    value,
    incoming,
    rules,
    batch,
    head,
    heads,
    first_row,
    first_key,
    queries,
    seqlen_q,
    seqlen_k,
    offset,
    count,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute dS of one tile of one head."""
    rows, keys = first_row + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    batch_head, kv_head = batch * heads + head, head // GROUP
    numbers = batch_head.to(tl.int64) * seqlen_q
    level, excess, delta = load_terms(incoming.terms, numbers, first_row, queries, BLOCK_M, True)
    base = head_base(query, batch, head)
    q = load_rows(base, query, first_row, queries, BLOCK_M, HEAD_DIM, BLOCK_DIM, False, True)
    base = key_base(key, rules, batch, kv_head, seqlen_k)
    k = load_keys(base, key, rules, batch, first_key, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, True, True)
    p, _ = probabilities(
        tl.dot(q, k, input_precision=PRECISION), level[:, None], excess[:, None], rules, batch, head, rows[:,
        None], keys[None, :], queries, offset, count, False, True,
    )  # fmt: skip
    base = head_base(incoming.grad_out, batch, head)
    do = load_rows(base, incoming.grad_out, first_row, queries, BLOCK_M, VALUE_DIM, BLOCK_VALUE, False, True)
    base = key_base(value, rules, batch, kv_head, seqlen_k)
    v = load_keys(base, value, rules, batch, first_key, count, BLOCK_N, VALUE_DIM, BLOCK_VALUE, True, True)
    dp = tl.dot(do, v, input_precision=PRECISION)
    factors = weight_factors(rules, batch_head, rows, first_key, BLOCK_N, False)
    return score_gradients(
        p, dp, factors, delta[:, None], incoming, rules, batch, head, rows[:, None], keys[None, :], queries,
        count, True,
    )  # fmt: skip
