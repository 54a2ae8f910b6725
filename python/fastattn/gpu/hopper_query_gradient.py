"""The gradient of queries for Hopper, in Gluon: a program for each tile of queries.

P = exp(S - lse) is computed again. With Delta = rowsum(dO * O),

    dS = P * (dO V^T - Delta)        dQ = scale * dS K

A producer warp copies a tile of queries and of the output's gradient, then blocks of keys and values, by
TMA; two consumer warpgroups have half of the tile's rows each. dS stays in registers.
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

from fastattn.gpu.hopper_tiles import (
    LOG2E,
    MMA,
    Ring,
    Sizes,
    aggregate,
    allocate_barriers,
    allocate_ring,
    allocate_tiles,
    load_tile,
    opaque_zero,
    store_tile,
)


@aggregate
class Shared:
    """A program's tile of queries, half of it for each consumer, and the keys and values that come by."""

    queries: gl.shared_memory_descriptor
    grads: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    keys: Ring
    values: Ring

    @gluon.constexpr_function
    def __init__(self, queries, grads, full, keys, values):
        self.queries = queries
        self.grads = grads
        self.full = full
        self.keys = keys
        self.values = values


@gluon.jit
def produce(query, key, value, grad, shared, sizes):
    """Copy a tile of queries and of the output's gradient once, and all keys and values that it sees."""
    ROWS: gl.constexpr = query.block_type.shape[2]
    BLOCK_N: gl.constexpr = key.block_type.shape[2]
    row, batch_head = sizes.query_place(gl.program_id(0), 2 * ROWS)
    batch = batch_head // sizes.heads
    head = batch_head % sizes.heads
    for who in gl.static_range(2):
        full = shared.full.index(who)
        mbarrier.expect(full, query.block_type.nbytes + grad.block_type.nbytes)
        load_tile(query, [batch, head, row + who * ROWS, 0], full, shared.queries.index(who))
        load_tile(grad, [batch, head, row + who * ROWS, 0], full, shared.grads.index(who))
    for i in range(sizes.blocks(row, 2 * ROWS, BLOCK_N)):
        shared.keys.fill(i, key, [batch, head // sizes.GROUP, i * BLOCK_N, 0])
        shared.values.fill(i, value, [batch, head // sizes.GROUP, i * BLOCK_N, 0])


@gluon.jit
def add(
    i, dq, shared, lse, delta, sizes, scale, row, WHO: gl.constexpr, MASKED: gl.constexpr,
    score_layout: gl.constexpr,
):  # fmt: skip
    """Add what block `i` of keys contributes."""
    ROWS: gl.constexpr = shared.queries.shape[3]
    HEAD_DIM: gl.constexpr = shared.queries.shape[4]
    BLOCK_N: gl.constexpr = shared.keys.tiles.shape[3]
    column: gl.constexpr = gl.SliceLayout(1, score_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    who = WHO + opaque_zero(i)
    q = shared.queries.index(who).reshape([ROWS, HEAD_DIM])
    grad = shared.grads.index(who).reshape([ROWS, HEAD_DIM])
    key = shared.keys.tile(i, BLOCK_N, HEAD_DIM)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    shared.keys.wait(i)
    scores = warpgroup_mma(q, key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    shared.values.wait(i)
    value = shared.values.tile(i, BLOCK_N, HEAD_DIM).permute((1, 0))
    dp = warpgroup_mma(grad, value, zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    weights = gl.exp2(scores * scale - lse[:, None])
    if MASKED:
        last = gl.full([ROWS], 0, gl.int32, column) + (sizes.keys - 1)
        if sizes.CAUSAL:
            last = gl.minimum(last, row + gl.arange(0, ROWS, column) + sizes.offset)
        columns = i * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
        weights = gl.where(columns[None, :] <= last[:, None], weights, 0.0)
    # Over already: this begins a basic block, which keeps the exponentials before the wait.
    shared.values.wait(i)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    shared.values.release(i)
    ds = gl.convert_layout((weights * (dp - delta[:, None])).to(q.dtype), operand)
    dq = warpgroup_mma(ds, key, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    shared.keys.release(i)
    return dq


@gluon.jit
def consume(WHO: gl.constexpr, shared, dquery, lse, delta, pitch, sizes, scale):
    """Compute the gradient of half of the rows of a tile."""
    ROWS: gl.constexpr = dquery.block_type.shape[2]
    HEAD_DIM: gl.constexpr = dquery.block_type.shape[3]
    BLOCK_N: gl.constexpr = shared.keys.tiles.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, BLOCK_N, 16])
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, HEAD_DIM, 16])
    row, batch_head = sizes.query_place(gl.program_id(0), 2 * ROWS)
    blocks = sizes.blocks(row, 2 * ROWS, BLOCK_N)
    row += WHO * ROWS
    whole = gl.minimum(sizes.whole_blocks(row, BLOCK_N), blocks)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    start = pitch.to(gl.int64) * batch_head
    row_lse = gl.load(lse + start + rows, mask=rows < sizes.queries, other=float("inf"))
    row_delta = gl.load(delta + start + rows, mask=rows < sizes.queries, other=0.0)
    exponent = scale * LOG2E
    dq = gl.zeros([ROWS, HEAD_DIM], gl.float32, grad_layout)
    mbarrier.wait(shared.full.index(WHO), 0)
    for i in range(whole):
        dq = add(i, dq, shared, row_lse, row_delta, sizes, exponent, row, WHO, False, score_layout)
    for i in range(whole, blocks):
        dq = add(i, dq, shared, row_lse, row_delta, sizes, exponent, row, WHO, True, score_layout)
    staging = shared.queries.index(WHO)
    staging.reshape([ROWS, HEAD_DIM]).store((dq * scale).to(dquery.dtype))
    fence_async_shared()
    store_tile(dquery, [batch_head // sizes.heads, batch_head % sizes.heads, row, 0], staging)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "batch_heads", "width", "offset", "pitch"])
def query_gradient_kernel(
    query, key, value, grad, dquery, lse, delta, scale, queries, keys, heads, batch_heads, width, offset,
    pitch, GROUP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Write the gradient of query (B, Hq, M, D).

    Descriptors: query, grad, of the output, and dquery of half a tile of rows; key and value of a block.
    lse to base 2 and Delta (B Hq, M), float32, lie `pitch` elements a head apart.
    """
    sizes = Sizes(queries, keys, heads, batch_heads, width, offset, GROUP, CAUSAL)
    shared = Shared(
        allocate_tiles(query, 2),
        allocate_tiles(grad, 2),
        allocate_barriers(2, 1),
        allocate_ring(key, STAGES),
        allocate_ring(value, STAGES),
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (gl.constexpr(0), shared, dquery, lse, delta, pitch, sizes, scale)),
            (consume, (gl.constexpr(1), shared, dquery, lse, delta, pitch, sizes, scale)),
            (produce, (query, key, value, grad, shared, sizes)),
        ],
        [4, 1],
        [240, 24],
    )
