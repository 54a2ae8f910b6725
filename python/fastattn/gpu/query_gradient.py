"""The gradient of queries, and what each adds to that of ALiBi's slopes: keys pass by a block of queries."""

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
    distance,
    key_count,
    key_ranges,
    query_count,
    query_offset,
    row_count,
    rules_of,
)


def query_gradient(
    call: Call, incoming: Incoming, grad_query: Tensor | None, slope_terms: Tensor | None
) -> None:
    """Write the gradient of query, and that of the slopes as each row's part, (B, Hq, Lq) float32."""
    batch, (heads, seqlen_q, head_dim) = call.batch, call.query.shape[1:]
    kv_heads, seqlen_k, value_dim = call.key.shape[1], call.key.shape[2], call.value.shape[3]
    is_empty = seqlen_q * batch * heads == 0
    tensors = (*map(matrix, call[:3]), incoming, matrix(grad_query), slope_terms)
    if is_empty or repeat.launched(call, query_gradient_kernel, tensors):
        return

    def launch(tiles: Tiles) -> None:
        schedule = schedule_of(call.ragged and call.ragged.queries, seqlen_q, tiles.rows)
        blocks = programs(schedule, triton.cdiv(seqlen_q, tiles.rows), batch)
        kv_bytes = seqlen_k * (head_dim + value_dim) * call.key.element_size()
        repeat.launch(
            call,
            query_gradient_kernel,
            blocks * heads,
            tensors,
            rules_of(call),
            schedule,
            batch * heads,
            heads,
            min(batch * heads, cached_heads(kv_bytes) * (heads // kv_heads)),
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

    tiles = configs.backward_queries(call, incoming.grad_weights is not None)
    launch(tuning.chosen("backward queries", call, tiles, launch))


@triton.jit(do_not_specialize=["batch_heads", "heads", "width", "seqlen_q", "seqlen_k"])
def query_gradient_kernel(
    query,
    key,
    value,
    incoming,
    grad_query,
    slope_terms,
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
):
    """One block of queries of one head."""
    block, batch, head, batch_head = own_block(
        schedule, tl.cdiv(seqlen_q, BLOCK_M), batch_heads, heads, width
    )
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    queries = query_count(rules, batch, seqlen_q)
    base = query_base(query, rules, batch, head, seqlen_q)
    q = load_rows(base, query, first_row, queries, BLOCK_M, HEAD_DIM, BLOCK_DIM, False, True)
    base = query_base(incoming.grad_out, rules, batch, head, seqlen_q)
    do = load_rows(base, incoming.grad_out, first_row, queries, BLOCK_M, VALUE_DIM, BLOCK_VALUE, False, True)
    numbers = number_base(rules, batch, head, batch_head, seqlen_q)
    level, excess, delta = load_terms(incoming.terms, numbers, first_row, queries, BLOCK_M, True)
    count, offset = key_count(rules, batch, seqlen_k), query_offset(rules, batch)
    last = tl.minimum(first_row + BLOCK_M, queries) - 1
    start, inner_start, inner_end, end = key_ranges(
        rules, batch, first_row, last, offset, count, BLOCK_M, BLOCK_N
    )

    dq = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if rules.left is not None or rules.starts is not None:
        dq, slope = gather(
            dq, slope, q, do, level, excess, delta, key, value, incoming, rules, batch, head, heads, rows,
            start, inner_start, queries, seqlen_k, offset, count, grad_query is not None,
            slope_terms is not None, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION,
            BLOCK_N, True,
        )  # fmt: skip
    dq, slope = gather(
        dq, slope, q, do, level, excess, delta, key, value, incoming, rules, batch, head, heads, rows,
        inner_start, inner_end, queries, seqlen_k, offset, count, grad_query is not None,
        slope_terms is not None, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION,
        BLOCK_N, False,
    )  # fmt: skip
    dq, slope = gather(
        dq, slope, q, do, level, excess, delta, key, value, incoming, rules, batch, head, heads, rows,
        inner_end, end, queries, seqlen_k, offset, count, grad_query is not None, slope_terms is not None,
        GROUP, HEAD_DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, PLAIN, PRECISION, BLOCK_N, True,
    )  # fmt: skip
    there = row_count(rules, queries, seqlen_q)
    if grad_query is not None:
        dq *= rules.scale
        base = query_base(grad_query, rules, batch, head, seqlen_q)
        store_rows(base, grad_query, rows, there, dq, HEAD_DIM, BLOCK_DIM)
    if slope_terms is not None:
        tl.store(slope_terms + numbers + rows, slope, mask=rows < there)


@triton.jit
def gather(
    dq,
    slope,
    q,
    do,
    level,
    excess,
    delta,
    key,
    value,
    incoming,
    rules,
    batch,
    head,
    heads,
    rows,
    start,
    end,
    queries,
    seqlen_k,
    offset,
    count,
    OF_QUERY: tl.constexpr,
    OF_SLOPES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Add what the keys [start, end) give to the queries of a block."""
    keys_at = key_base(key, rules, batch, head // GROUP, seqlen_k)
    values_at = key_base(value, rules, batch, head // GROUP, seqlen_k)
    for first in tl.range(start, end, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        keys = first + tl.arange(0, BLOCK_N)
        k = load_keys(keys_at, key, rules, batch, first, count, BLOCK_N, HEAD_DIM, BLOCK_DIM, False, CHECKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p, scores = probabilities(
            products, level[:, None], excess[:, None], rules, batch, head, rows[:, None], keys[None, :],
            queries, offset, count, PLAIN, CHECKED,
        )  # fmt: skip
        v = load_keys(
            values_at, value, rules, batch, first, count, BLOCK_N, VALUE_DIM, BLOCK_VALUE, True, CHECKED
        )
        dp = tl.dot(do, v, input_precision=PRECISION)
        factors = weight_factors(rules, batch * heads + head, rows, first, BLOCK_N, False)
        ds = score_gradients(
            p, dp, factors, delta[:, None], incoming, rules, batch, head, rows[:, None], keys[None, :],
            queries, count, CHECKED,
        )  # fmt: skip
        if OF_SLOPES:
            slope -= tl.sum(ds * distance(rows[:, None], keys[None, :], offset), 1)
        if OF_QUERY:
            ds = product_gradients(ds, scores, rules)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, slope
