"""Gradients of keys and values for Hopper, in Gluon: a program for each tile of keys.

P = exp(S - lse) is computed again. With Delta = rowsum(dO * O),

    dV = P^T dO        dS = P * (dO V^T - Delta)        dK = scale * dS^T Q

A producer warp copies a tile of keys and values, then blocks of queries, by TMA; two consumer warpgroups
have half of the tile's rows each. Scores are transposed, so that P and dS stay in registers as operands of
the products, and every sum is taken by one program in a fixed order.

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

from fastattn.gpu.hopper_tiles import (
    CONSUMERS,
    LOG2E,
    MMA,
    Sizes,
    aggregate,
    allocate_barriers,
    allocate_tiles,
    load_tile,
    opaque_zero,
    store_tile,
)


@aggregate
class Keys:
    """A program's tile of keys and values, half of it for each consumer."""

    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, keys, values, full):
        self.keys = keys
        self.values = values
        self.full = full


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
def query_blocks(key_row, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Give the blocks of queries that see a tile: start, end of those that the causal rule cuts, end."""
    end = gl.cdiv(sizes.queries, BLOCK_M)
    start = 0
    cut = 0
    if sizes.CAUSAL:
        start = gl.minimum(gl.maximum(key_row - sizes.offset, 0) // BLOCK_M, end)
        cut = gl.minimum(gl.cdiv(gl.maximum(key_row + BLOCK_N - 1 - sizes.offset, 0), BLOCK_M), end)
    return start, cut, end


@gluon.jit
def produce(query, key, value, grad, lse, delta, tile, rows, sizes):
    """Copy a tile of keys and values once, and the rows of all queries that see it."""
    BLOCK_M: gl.constexpr = query.block_type.shape[2]
    KEYS: gl.constexpr = key.block_type.shape[2]
    number, kv_head = sizes.place(gl.cdiv(sizes.keys, 2 * KEYS), gl.program_id(0))
    kv_heads = sizes.heads // sizes.GROUP
    batch = kv_head // kv_heads
    key_row = number * (2 * KEYS)
    for who in gl.static_range(2):
        full = tile.full.index(who)
        mbarrier.expect(full, key.block_type.nbytes + value.block_type.nbytes)
        load_tile(key, [batch, kv_head % kv_heads, key_row + who * KEYS, 0], full, tile.keys.index(who))
        load_tile(value, [batch, kv_head % kv_heads, key_row + who * KEYS, 0], full, tile.values.index(who))
    start, _cut, end = query_blocks(key_row, sizes, BLOCK_M, 2 * KEYS)
    filled = 0
    for member in range(sizes.GROUP):
        batch_head = kv_head * sizes.GROUP + member
        head = batch_head % sizes.heads
        for block in range(start, end):
            rows.fill(filled, query, grad, lse, delta, batch, head, batch_head, block * BLOCK_M)
            filled += 1


@gluon.jit
def add(
    count, dk, dv, tile, rows, scale, ahead, WHO: gl.constexpr, MASKED: gl.constexpr,
    score_layout: gl.constexpr,
):  # fmt: skip
    """Add what one block of queries contributes; its row `ahead` is the first that sees the first key."""
    KEYS: gl.constexpr = tile.keys.shape[3]
    HEAD_DIM: gl.constexpr = tile.keys.shape[4]
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
    key = tile.keys.index(who).reshape([KEYS, HEAD_DIM])
    scores = warpgroup_mma(key, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(rows.grads_full.index(slot), phase)
    value = tile.values.index(who).reshape([KEYS, HEAD_DIM])
    dp = warpgroup_mma(value, grad.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = rows.lse.index(slot).reshape([BLOCK_M]).load(column)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    weights = gl.exp2(scores * scale - lse[None, :])
    if MASKED:
        first = ahead + gl.arange(0, KEYS, gl.SliceLayout(1, score_layout))
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
def consume(WHO: gl.constexpr, tile, rows, dkey, dvalue, sizes, scale):
    """Compute the gradients of half of the rows of a tile."""
    BLOCK_M: gl.constexpr = rows.queries.shape[3]
    KEYS: gl.constexpr = dkey.block_type.shape[2]
    HEAD_DIM: gl.constexpr = dkey.block_type.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, BLOCK_M, 16])
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, HEAD_DIM, 16])
    number, kv_head = sizes.place(gl.cdiv(sizes.keys, 2 * KEYS), gl.program_id(0))
    start, cut, end = query_blocks(number * (2 * KEYS), sizes, BLOCK_M, 2 * KEYS)
    blocks = end - start
    cut -= start
    ahead = number * (2 * KEYS) + WHO * KEYS - sizes.offset - start * BLOCK_M
    exponent = scale * LOG2E
    dk = gl.zeros([KEYS, HEAD_DIM], gl.float32, grad_layout)
    dv = gl.zeros([KEYS, HEAD_DIM], gl.float32, grad_layout)
    mbarrier.wait(tile.full.index(WHO), 0)
    for used in range(blocks * sizes.GROUP):
        block = used % blocks
        if block < cut:
            dk, dv = add(used, dk, dv, tile, rows, exponent, ahead - block * BLOCK_M, WHO, True, score_layout)
        else:
            dk, dv = add(used, dk, dv, tile, rows, exponent, ahead, WHO, False, score_layout)
    # Found again, since registers are short above.
    number, kv_head = sizes.place(gl.cdiv(sizes.keys, 2 * KEYS), gl.program_id(0) + opaque_zero(blocks))
    kv_heads = sizes.heads // sizes.GROUP
    place = [kv_head // kv_heads, kv_head % kv_heads, number * (2 * KEYS) + WHO * KEYS, 0]
    tile.values.index(WHO).reshape([KEYS, HEAD_DIM]).store(dv.to(dvalue.dtype))
    tile.keys.index(WHO).reshape([KEYS, HEAD_DIM]).store((dk * scale).to(dkey.dtype))
    fence_async_shared()
    store_tile(dvalue, place, tile.values.index(WHO))
    mbarrier.wait(tile.full.index(WHO), 0)  # over long ago: without a basic block's end here, ptxas spills
    store_tile(dkey, place, tile.keys.index(WHO))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "batch_heads", "width", "offset"])
def key_gradient_kernel(
    query, key, value, grad, lse, delta, dkey, dvalue, scale, queries, keys, heads, batch_heads, width,
    offset, GROUP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Write the gradients of key and value (B, Hkv, N, D).

    Descriptors: query and grad, of the output, of a block of rows; key, value, dkey and dvalue of half a
    tile; lse to base 2 and Delta (B Hq, M), float32, of a block of one head.
    """
    sizes = Sizes(queries, keys, heads, batch_heads, width, offset, GROUP, CAUSAL)
    tile = Keys(allocate_tiles(key, 2), allocate_tiles(value, 2), allocate_barriers(2, 1))
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
            (consume, (gl.constexpr(0), tile, rows, dkey, dvalue, sizes, scale)),
            (consume, (gl.constexpr(1), tile, rows, dkey, dvalue, sizes, scale)),
            (produce, (query, key, value, grad, lse, delta, tile, rows, sizes)),
        ],
        [4, 1],
        [240, 24],
    )
