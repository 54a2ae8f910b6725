"""Gradients of keys and values: one program owns a block of keys and goes over the queries that may see it.

Scores are held as (keys, queries), so that P and dS of a tile are operands of the products for dV and dK as
they are. All query heads that share the keys are summed in the program.

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
from fastattn.gpu.forward import is_plain
from fastattn.gpu.rows import (
    key_base,
    load_keys,
    load_rows,
    matrix,
    number_base,
    query_base,
    store_rows,
)
from fastattn.gpu.schedule import cached_heads, own_block, programs, schedule_of
from fastattn.gpu.score_gradient import (
    Incoming,
    load_terms,
    probabilities,
    product_gradients,
    score_gradients,
    weight_factors,
)
from fastattn.gpu.tile import (
    hidden_zeros,
    key_count,
    query_count,
    query_offset,
    query_ranges,
    row_count,
    rules_of,
    stored_length,
)


def key_gradient(
    call: Call,
    incoming: Incoming,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    query_sums: Tensor | None = None,
) -> None:
    """Write the gradients of key and value.

    `query_sums` (B, Hq, Lq, D), float32, contiguous: that of query is added to it, by atomic additions whose
    order is left to chance; not yet multiplied by the scale.
    """
    tensors = (*map(matrix, call[:3]), incoming, matrix(grad_key), matrix(grad_value), query_sums)
    if repeat.launched(call, key_gradient_kernel, tensors):
        return
    batch, (heads, seqlen_q, head_dim) = call.batch, call.query.shape[1:]
    kv_heads, seqlen_k, value_dim = call.key.shape[1], call.key.shape[2], call.value.shape[3]
    if seqlen_k * batch * kv_heads == 0:
        return

    def launch(tiles: Tiles) -> None:
        schedule = schedule_of(call.ragged and call.ragged.keys, seqlen_k, tiles.columns)
        blocks = programs(schedule, triton.cdiv(seqlen_k, tiles.columns), batch)
        query_bytes = seqlen_q * (head_dim + value_dim) * call.query.element_size() * (heads // kv_heads)
        repeat.launch(
            call,
            key_gradient_kernel,
            blocks * kv_heads,
            tensors,
            rules_of(call),
            schedule,
            batch * kv_heads,
            kv_heads,
            min(batch * kv_heads, cached_heads(query_bytes)),
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

    tiles = configs.backward_keys(call, incoming.grad_weights is not None, query_sums is not None)
    # What is added up must not be run again and again.
    launch(tuning.chosen("backward keys", call, tiles, launch) if query_sums is None else tiles)


@triton.jit(do_not_specialize=["batch_heads", "kv_heads", "width", "seqlen_q", "seqlen_k"])
def key_gradient_kernel(
    query,
    key,
    value,
    incoming,
    grad_key,
    grad_value,
    query_sums,
    rules,
    schedule,
    batch_heads,
    kv_heads,
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
):
    """One block of keys of one key/value head."""
    blocks = tl.cdiv(seqlen_k, BLOCK_N)
    block, batch, kv_head, batch_head = own_block(schedule, blocks, batch_heads, kv_heads, width)
    # Under the causal rule the first keys are seen most.
    first_key = (blocks - 1 - block) * BLOCK_N if schedule is None else block * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
    base = key_base(key, rules, batch, kv_head, seqlen_k)
    k = load_keys(base, key, rules, batch, first_key, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, False, True)
    base = key_base(value, rules, batch, kv_head, seqlen_k)
    v = load_keys(base, value, rules, batch, first_key, count, BLOCK_N, VALUE_DIM, BLOCK_VALUE, False, True)
    last_key = tl.minimum(first_key + BLOCK_N, count) - 1
    queries = query_count(rules, batch, seqlen_q)
    there = tl.where(first_key < count, queries, 0)
    start, inner_start, inner_end, end = query_ranges(
        rules, batch, first_key, last_key, offset, there, BLOCK_M, BLOCK_N
    )
    whole = first_key + BLOCK_N <= count
    inside = keys < count
    if rules.starts is not None:
        low = stored_length(rules.starts, batch, count)
        end = tl.where(low < first_key + BLOCK_N, end, start)
        whole &= low <= first_key
        inside &= keys >= low
    inner_start = tl.where(whole, inner_start, start)
    inner_end = tl.where(whole, inner_end, start)

    dk = hidden_zeros(rules.scale, 0, BLOCK_N, BLOCK_DIM)
    dv = hidden_zeros(rules.scale, BLOCK_N * BLOCK_DIM, BLOCK_N, BLOCK_VALUE)
    if rules.right is not None:
        dk, dv = gather(
            dk, dv, k, v, query, incoming, query_sums, rules, batch, kv_head, batch_head, first_key, start,
            inner_start, queries, seqlen_q, offset, count, grad_key is not None, grad_value is not None,
            GROUP, HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    dk, dv = gather(
        dk, dv, k, v, query, incoming, query_sums, rules, batch, kv_head, batch_head, first_key, inner_start,
        inner_end, queries, seqlen_q, offset, count, grad_key is not None, grad_value is not None, GROUP,
        HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    dk, dv = gather(
        dk, dv, k, v, query, incoming, query_sums, rules, batch, kv_head, batch_head, first_key, inner_end,
        end, queries, seqlen_q, offset, count, grad_key is not None, grad_value is not None, GROUP, HEAD_DIM,
        VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    stored = row_count(rules, count, seqlen_k)
    if grad_key is not None:
        dk = tl.where(inside[:, None], dk * rules.scale, 0.0)
        base = key_base(grad_key, rules, batch, kv_head, seqlen_k)
        store_rows(base, grad_key, keys, stored, dk, HEAD_DIM, BLOCK_DIM)
    if grad_value is not None:
        dv = tl.where(inside[:, None], dv, 0.0)
        base = key_base(grad_value, rules, batch, kv_head, seqlen_k)
        store_rows(base, grad_value, keys, stored, dv, VALUE_DIM, BLOCK_VALUE)


@triton.jit
def gather(
    dk,
    dv,
    k,
    v,
    query,
    incoming,
    query_sums,
    rules,
    batch,
    kv_head,
    batch_kv_head,
    first_key,
    start,
    end,
    queries,
    seqlen_q,
    offset,
    count,
    OF_KEY: tl.constexpr,
    OF_VALUE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Add what the queries [start, end) of each head of a group give to the keys of a block."""
    keys = (first_key + tl.arange(0, BLOCK_N))[:, None]
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    # One loop over heads and queries keeps fewer addresses in registers than a loop for each of them.
    for step in tl.range(0, tiles * GROUP):
        member = step // tiles
        first = tl.multiple_of(start + (step - member * tiles) * BLOCK_M, BLOCK_M)
        head, batch_head = kv_head * GROUP + member, batch_kv_head * GROUP + member
        rows = first + tl.arange(0, BLOCK_M)
        base = query_base(query, rules, batch, head, seqlen_q)
        q = load_rows(base, query, first, queries, BLOCK_M, HEAD_DIM, BLOCK_DIM, False, CHECKED)
        numbers = number_base(rules, batch, head, batch_head, seqlen_q)
        level, excess, delta = load_terms(incoming.terms, numbers, first, queries, BLOCK_M, CHECKED)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p, scores = probabilities(
            products, level[None, :], excess[None, :], rules, batch, head, rows[None, :], keys, queries,
            offset, count, PLAIN, CHECKED,
        )  # fmt: skip
        factors = weight_factors(rules, batch_head, rows, first_key, BLOCK_N, True)
        base = query_base(incoming.grad_out, rules, batch, head, seqlen_q)
        do = load_rows(
            base, incoming.grad_out, first, queries, BLOCK_M, VALUE_DIM, BLOCK_VALUE, False, CHECKED
        )
        if OF_KEY or query_sums is not None:  # before the other product: fewer tiles to keep meanwhile
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if OF_VALUE:
            weights = p if rules.dropout_scale is None else p * factors
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
        if OF_KEY or query_sums is not None:
            ds = score_gradients(
                p, dp, factors, delta[None, :], incoming, rules, batch, head, rows[None, :], keys, queries,
                count, CHECKED,
            )  # fmt: skip
            ds = product_gradients(ds, scores, rules).to(q.dtype)
            if OF_KEY:
                dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if query_sums is not None:
                if BLOCK_M < 64:  # rows of a product of Hopper; of the transpose there are more
                    dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
                else:
                    dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
                add_rows(query_sums, numbers, rows[:, None], queries, dq, HEAD_DIM, BLOCK_DIM, CHECKED)
    return dk, dv


@triton.jit
def add_rows(
    sums, base, rows, queries, values, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECKED: tl.constexpr
):
    """Add to rows of contiguous sums (B, Hq, Lq, D), atomically."""
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    at = sums + (base + rows) * HEAD_DIM + columns
    if CHECKED:
        tl.atomic_add(at, values, mask=(rows < queries) & (columns < HEAD_DIM), sem="relaxed")
    elif HEAD_DIM < BLOCK_DIM:
        tl.atomic_add(at, values, mask=columns < HEAD_DIM, sem="relaxed")
    else:
        tl.atomic_add(at, values, sem="relaxed")
