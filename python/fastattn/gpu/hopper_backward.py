"""Attention backward for Hopper, in Gluon: one kernel for the gradients of keys and values, one for those of queries.

Both recompute P = exp(S - lse), and every sum is taken by one program in a fixed order. With Delta =
rowsum(dO * O):

    dV = P^T dO        dS = P * (dO V^T - Delta)        dK = scale * dS^T Q        dQ = scale * dS K

A producer warp copies tiles by TMA and two consumer warpgroups have half of a program's rows each. P and dS
stay in registers. Two kernels make seven products where one could do with five, but on a device that costs
less than adding up dQ over programs (docs/decisions/0014-hopper.md).

References
----------
Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn.gpu.hopper_rings import (
    CONSUMERS,
    aggregate,
    allocate_barriers,
    allocate_ring,
    allocate_tiles,
    load_tile,
    opaque_zero,
    store_tile,
)

LOG2E = gl.constexpr(1.4426950408889634)
MMA = gl.constexpr([3, 0])


@aggregate
class Call:
    """Sizes of a call, and how its tiles are dealt out."""

    queries: gl.tensor
    keys: gl.tensor
    heads: gl.tensor
    batch_heads: gl.tensor  # heads over which tiles are dealt out: of queries or of keys
    width: gl.tensor  # heads that the L2 cache holds at once
    offset: gl.tensor  # the key position of query 0
    GROUP: gl.constexpr
    CAUSAL: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, queries, keys, heads, batch_heads, width, offset, GROUP, CAUSAL):
        self.queries = queries
        self.keys = keys
        self.heads = heads
        self.batch_heads = batch_heads
        self.width = width
        self.offset = offset
        self.GROUP = gl.constexpr(GROUP)
        self.CAUSAL = gl.constexpr(CAUSAL)

    @gluon.jit
    def place(self, tiles):
        """Give this program's tile, in the order of `tiles`, and its head: `width` heads at a time."""
        index = gl.program_id(0)
        section = index // (tiles * self.width)
        rest = index - section * (tiles * self.width)
        here = gl.minimum(self.width, self.batch_heads - section * self.width)
        tile = rest // here
        return tile, section * self.width + rest - tile * here


@aggregate
class Rows:
    """A ring of rows of queries and of what belongs to them: the output's gradient, lse and Delta."""

    queries: gl.shared_memory_descriptor
    grads: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    queries_full: gl.shared_memory_descriptor
    grads_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, queries, grads, lse, delta, queries_full, grads_full, empty, STAGES):
        self.queries = queries
        self.grads = grads
        self.lse = lse
        self.delta = delta
        self.queries_full = queries_full
        self.grads_full = grads_full
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)

    @gluon.jit
    def fill(self, count, query, grad, lse, delta, batch, head, batch_head, row):
        """Copy the rows from `row` on once both consumers have left the slot; queries and lse first."""
        slot = count % self.STAGES
        mbarrier.wait(self.empty.index(slot), ((count // self.STAGES) & 1) ^ 1)
        full = self.queries_full.index(slot)
        mbarrier.expect(full, query.block_type.nbytes + lse.block_type.nbytes)
        load_tile(query, [batch, head, row, 0], full, self.queries.index(slot))
        load_tile(lse, [batch_head, row], full, self.lse.index(slot))
        full = self.grads_full.index(slot)
        mbarrier.expect(full, grad.block_type.nbytes + delta.block_type.nbytes)
        load_tile(grad, [batch, head, row, 0], full, self.grads.index(slot))
        load_tile(delta, [batch_head, row], full, self.delta.index(slot))

    @gluon.jit
    def release(self, count):
        """Leave the slot of use `count`."""
        mbarrier.arrive(self.empty.index(count % self.STAGES), count=1)


@gluon.jit
def query_rows(key_row, call, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of queries that see the tile of keys at `key_row`: start, end of those cut by the causal rule, end."""
    end = gl.cdiv(call.queries, BLOCK_M)
    start = 0
    cut = 0
    if call.CAUSAL:
        start = gl.minimum(gl.maximum(key_row - call.offset, 0) // BLOCK_M, end)
        cut = gl.minimum(gl.cdiv(gl.maximum(key_row + BLOCK_N - 1 - call.offset, 0), BLOCK_M), end)
    return start, cut, end


@gluon.jit
def produce_rows(
    query, key, value, grad, lse, delta, key_tiles, value_tiles, keys_full, rows, call, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Copy a tile of keys and values once, and the rows of all queries that see it."""
    tile, kv_head = call.place(gl.cdiv(call.keys, BLOCK_N))
    kv_heads = call.heads // call.GROUP
    batch = kv_head // kv_heads
    key_row = tile * BLOCK_N
    for who in gl.static_range(2):
        mbarrier.expect(keys_full.index(who), key.block_type.nbytes + value.block_type.nbytes)
        place = [batch, kv_head % kv_heads, key_row + who * (BLOCK_N // 2), 0]
        load_tile(key, place, keys_full.index(who), key_tiles.index(who))
        load_tile(value, place, keys_full.index(who), value_tiles.index(who))
    start, cut, end = query_rows(key_row, call, BLOCK_M, BLOCK_N)
    filled = 0
    for member in range(call.GROUP):
        batch_head = kv_head * call.GROUP + member
        head = batch_head % call.heads
        for block in range(start, end):
            rows.fill(filled, query, grad, lse, delta, batch, head, batch_head, block * BLOCK_M)
            filled += 1


@gluon.jit
def add_rows(
    count, row, dk, dv, WHO: gl.constexpr, key_tiles, value_tiles, rows, call, scale, key_row, MASKED: gl.constexpr,
    score_layout: gl.constexpr,
):  # fmt: skip
    """Add what one block of queries contributes to the gradients of keys and values; scores are transposed."""
    KEYS: gl.constexpr = key_tiles.shape[3]
    HEAD_DIM: gl.constexpr = key_tiles.shape[4]
    BLOCK_M: gl.constexpr = rows.queries.shape[3]
    column: gl.constexpr = gl.SliceLayout(0, score_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    slot = count % rows.STAGES
    phase = (count // rows.STAGES) & 1
    who = WHO + opaque_zero(count)
    q = rows.queries.index(slot).reshape([BLOCK_M, HEAD_DIM])
    grad = rows.grads.index(slot).reshape([BLOCK_M, HEAD_DIM])
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, score_layout)
    mbarrier.wait(rows.queries_full.index(slot), phase)
    key = key_tiles.index(who).reshape([KEYS, HEAD_DIM])
    scores = warpgroup_mma(key, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(rows.grads_full.index(slot), phase)
    value = value_tiles.index(who).reshape([KEYS, HEAD_DIM])
    dp = warpgroup_mma(value, grad.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = rows.lse.index(slot).reshape([BLOCK_M]).load(column)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    weights = gl.exp2(scores * scale - lse[None, :])
    if MASKED:
        first = key_row + gl.arange(0, KEYS, gl.SliceLayout(1, score_layout)) - call.offset - row
        seen = gl.arange(0, BLOCK_M, column)[None, :] >= first[:, None]
        weights = gl.where(seen, weights, 0.0)
    p = gl.convert_layout(weights.to(q.dtype), operand)
    # Over already: this begins a basic block, which keeps the exponentials before the wait.
    mbarrier.wait(rows.grads_full.index(slot), phase)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dv = warpgroup_mma(p, grad, dv, is_async=True)
    delta = rows.delta.index(slot).reshape([BLOCK_M]).load(column)
    ds = weights * (dp - delta[None, :])
    dk = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), operand), q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    rows.release(count)
    return dk, dv


@gluon.jit
def consume_rows(
    WHO: gl.constexpr, key_tiles, value_tiles, keys_full, rows, dkey, dvalue, call, scale, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of half of the rows of a tile of keys and values."""
    KEYS: gl.constexpr = BLOCK_N // 2
    HEAD_DIM: gl.constexpr = dkey.block_type.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, BLOCK_M, 16])
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, HEAD_DIM, 16])
    tile, kv_head = call.place(gl.cdiv(call.keys, BLOCK_N))
    kv_heads = call.heads // call.GROUP
    start, cut, end = query_rows(tile * BLOCK_N, call, BLOCK_M, BLOCK_N)
    key_row = tile * BLOCK_N + WHO * KEYS
    exponent = scale * LOG2E
    dk = gl.zeros([KEYS, HEAD_DIM], gl.float32, grad_layout)
    dv = gl.zeros([KEYS, HEAD_DIM], gl.float32, grad_layout)
    mbarrier.wait(keys_full.index(WHO), 0)
    used = 0
    for _member in range(call.GROUP):
        for block in range(start, cut):
            dk, dv = add_rows(
                used, block * BLOCK_M, dk, dv, WHO, key_tiles, value_tiles, rows, call, exponent, key_row, True,
                score_layout,
            )  # fmt: skip
            used += 1
        for block in range(cut, end):
            dk, dv = add_rows(
                used, block * BLOCK_M, dk, dv, WHO, key_tiles, value_tiles, rows, call, exponent, key_row, False,
                score_layout,
            )  # fmt: skip
            used += 1
    place = [kv_head // kv_heads, kv_head % kv_heads, key_row, 0]
    staging = value_tiles.index(WHO)  # nobody else reads this half
    staging.reshape([KEYS, HEAD_DIM]).store(dv.to(dvalue.dtype))
    fence_async_shared()
    store_tile(dvalue, place, staging)
    staging = key_tiles.index(WHO)
    staging.reshape([KEYS, HEAD_DIM]).store((dk * scale).to(dkey.dtype))
    fence_async_shared()
    store_tile(dkey, place, staging)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "batch_heads", "width", "offset"])
def key_value_kernel(
    query, key, value, grad, lse, delta, dkey, dvalue, scale, queries, keys, heads, batch_heads, width, offset,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Write the gradients of key and value (B, Hkv, N, D): a program for each BLOCK_N rows of a head.

    Descriptors: query and grad, of the output, of BLOCK_M rows; key, value, dkey, dvalue of BLOCK_N / 2 rows;
    lse to base 2 and Delta (B Hq, M), float32, of [1, BLOCK_M].
    """
    call = Call(queries, keys, heads, batch_heads, width, offset, GROUP, CAUSAL)
    key_tiles = allocate_tiles(key, 2)
    value_tiles = allocate_tiles(value, 2)
    keys_full = allocate_barriers(2, 1)
    rows = Rows(
        allocate_tiles(query, STAGES),
        allocate_tiles(grad, STAGES),
        allocate_tiles(lse, STAGES),
        allocate_tiles(delta, STAGES),
        allocate_barriers(STAGES, 1),
        allocate_barriers(STAGES, 1),
        allocate_barriers(STAGES, CONSUMERS),
        STAGES,
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume_rows,
                (
                    gl.constexpr(0),
                    key_tiles,
                    value_tiles,
                    keys_full,
                    rows,
                    dkey,
                    dvalue,
                    call,
                    scale,
                    BLOCK_M,
                    BLOCK_N,
                ),
            ),
            (
                consume_rows,
                (
                    gl.constexpr(1),
                    key_tiles,
                    value_tiles,
                    keys_full,
                    rows,
                    dkey,
                    dvalue,
                    call,
                    scale,
                    BLOCK_M,
                    BLOCK_N,
                ),
            ),
            (
                produce_rows,
                (
                    query,
                    key,
                    value,
                    grad,
                    lse,
                    delta,
                    key_tiles,
                    value_tiles,
                    keys_full,
                    rows,
                    call,
                    BLOCK_M,
                    BLOCK_N,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def query_tile(call, BLOCK_M: gl.constexpr):
    """Give the first row of this program's tile of queries, and its head; the longest first."""
    tiles = gl.cdiv(call.queries, BLOCK_M)
    tile, head = call.place(tiles)
    if call.CAUSAL:
        tile = tiles - 1 - tile
    return tile * BLOCK_M, head


@gluon.jit
def key_blocks(row, call, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Count the blocks of keys that some of the `BLOCK_M` rows from `row` on see, and those of which all see all."""
    end = call.keys
    whole = call.keys
    if call.CAUSAL:
        end = gl.minimum(end, gl.maximum(gl.minimum(row + BLOCK_M, call.queries) + call.offset, 0))
        whole = gl.minimum(end, gl.maximum(row + call.offset + 1, 0))
    return gl.cdiv(end, BLOCK_N), whole // BLOCK_N


@gluon.jit
def produce_keys(
    query, key, value, grad, query_tiles, grad_tiles, queries_full, keys, values, call, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Copy a tile of queries and of the output's gradient once, and all keys and values that it sees."""
    row, batch_head = query_tile(call, BLOCK_M)
    batch = batch_head // call.heads
    head = batch_head % call.heads
    for who in gl.static_range(2):
        mbarrier.expect(queries_full.index(who), query.block_type.nbytes + grad.block_type.nbytes)
        place = [batch, head, row + who * (BLOCK_M // 2), 0]
        load_tile(query, place, queries_full.index(who), query_tiles.index(who))
        load_tile(grad, place, queries_full.index(who), grad_tiles.index(who))
    blocks, whole = key_blocks(row, call, BLOCK_M, BLOCK_N)
    for i in range(blocks):
        keys.fill(i, key, [batch, head // call.GROUP, i * BLOCK_N, 0])
        values.fill(i, value, [batch, head // call.GROUP, i * BLOCK_N, 0])


@gluon.jit
def add_keys(
    i, dq, WHO: gl.constexpr, query_tiles, grad_tiles, keys, values, call, lse, delta, scale, row,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, score_layout: gl.constexpr,
):  # fmt: skip
    """Add what one block of keys contributes to the gradient of the queries."""
    ROWS: gl.constexpr = query_tiles.shape[3]
    HEAD_DIM: gl.constexpr = query_tiles.shape[4]
    who = WHO + opaque_zero(i)
    q = query_tiles.index(who).reshape([ROWS, HEAD_DIM])
    grad = grad_tiles.index(who).reshape([ROWS, HEAD_DIM])
    key = keys.tile(i, BLOCK_N, HEAD_DIM)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    keys.wait(i)
    scores = warpgroup_mma(q, key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    values.wait(i)
    value = values.tile(i, BLOCK_N, HEAD_DIM)
    dp = warpgroup_mma(grad, value.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    weights = gl.exp2(scores * scale - lse[:, None])
    if MASKED:
        last = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, score_layout)) + (call.keys - 1)
        if call.CAUSAL:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
            last = gl.minimum(last, rows + call.offset)
        columns = i * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
        weights = gl.where(columns[None, :] <= last[:, None], weights, 0.0)
    # Over already: this begins a basic block, which keeps the exponentials before the wait.
    values.wait(i)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    values.release(i)
    ds = gl.convert_layout(
        (weights * (dp - delta[:, None])).to(q.dtype), gl.DotOperandLayout(0, dq.type.layout, 2)
    )
    dq = warpgroup_mma(ds, key, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    keys.release(i)
    return dq


@gluon.jit
def consume_keys(
    WHO: gl.constexpr, query_tiles, grad_tiles, queries_full, keys, values, dquery, lse, delta, pitch, call, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Compute the gradient of half of the rows of a tile of queries."""
    ROWS: gl.constexpr = BLOCK_M // 2
    HEAD_DIM: gl.constexpr = dquery.block_type.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, BLOCK_N, 16])
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, HEAD_DIM, 16])
    first, batch_head = query_tile(call, BLOCK_M)
    blocks, _whole = key_blocks(first, call, BLOCK_M, BLOCK_N)
    row = first + WHO * ROWS
    _blocks, whole = key_blocks(row, call, ROWS, BLOCK_N)
    whole = gl.minimum(whole, blocks)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    start = pitch.to(gl.int64) * batch_head
    row_lse = gl.load(lse + start + rows, mask=rows < call.queries, other=float("inf"))
    row_delta = gl.load(delta + start + rows, mask=rows < call.queries, other=0.0)
    exponent = scale * LOG2E
    dq = gl.zeros([ROWS, HEAD_DIM], gl.float32, grad_layout)
    mbarrier.wait(queries_full.index(WHO), 0)
    for i in range(whole):
        dq = add_keys(
            i, dq, WHO, query_tiles, grad_tiles, keys, values, call, row_lse, row_delta, exponent, row, False, BLOCK_N,
            score_layout,
        )  # fmt: skip
    for i in range(whole, blocks):
        dq = add_keys(
            i, dq, WHO, query_tiles, grad_tiles, keys, values, call, row_lse, row_delta, exponent, row, True, BLOCK_N,
            score_layout,
        )  # fmt: skip
    staging = query_tiles.index(WHO)
    staging.reshape([ROWS, HEAD_DIM]).store((dq * scale).to(dquery.dtype))
    fence_async_shared()
    store_tile(dquery, [batch_head // call.heads, batch_head % call.heads, row, 0], staging)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "batch_heads", "width", "offset", "pitch"])
def query_kernel(
    query, key, value, grad, dquery, lse, delta, scale, queries, keys, heads, batch_heads, width, offset, pitch,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Write the gradient of query (B, Hq, M, D): a program for each BLOCK_M rows of a head.

    Descriptors: query, grad, of the output, and dquery of BLOCK_M / 2 rows; key and value of BLOCK_N. lse
    to base 2 and Delta (B Hq, M), float32, lie `pitch` elements a head apart.
    """
    call = Call(queries, keys, heads, batch_heads, width, offset, GROUP, CAUSAL)
    query_tiles = allocate_tiles(query, 2)
    grad_tiles = allocate_tiles(grad, 2)
    full = allocate_barriers(2, 1)
    keys_ring = allocate_ring(key, STAGES)
    values_ring = allocate_ring(value, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume_keys,
                (gl.constexpr(0), query_tiles, grad_tiles, full, keys_ring, values_ring, dquery, lse, delta, pitch, call,
                 scale, BLOCK_M, BLOCK_N),
            ),
            (
                consume_keys,
                (gl.constexpr(1), query_tiles, grad_tiles, full, keys_ring, values_ring, dquery, lse, delta, pitch, call,
                 scale, BLOCK_M, BLOCK_N),
            ),
            (
                produce_keys,
                (query, key, value, grad, query_tiles, grad_tiles, full, keys_ring, values_ring, call, BLOCK_M, BLOCK_N),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
