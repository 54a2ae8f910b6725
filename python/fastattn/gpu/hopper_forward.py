"""Attention forward for Hopper, in Gluon: a persistent kernel of a producer warp and two consumer warpgroups.

The producer takes tiles of queries from a counter, longest first, and copies queries, keys and values to
shared memory by TMA. Each consumer has half of a tile's rows. It issues the scores of block i, then the
output of block i - 1, and computes the softmax of block i while the tensor cores are at the second: P stays
in registers. Blocks are walked from the last to the first, so that those cut by the causal rule or by the
end of the keys come first.

Nothing here needs a GPU to be checked for order: `tests/gpu/model_check.py` runs this source.

References
----------
Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
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
    LN2,
    LOG2E,
    MMA,
    Ring,
    Sizes,
    aggregate,
    allocate_barriers,
    allocate_ring,
    allocate_tiles,
    load_tile,
    store_tile,
)

QUEUE = gl.constexpr(2)  # slots of the queue of tiles


@aggregate
class Queue:
    """The tiles that the producer has taken, handed to the consumers.

    There is no barrier for a free slot: tile t + 2 is announced after the queries of tile t + 1 were asked
    for, hence after both consumers have left those of tile t.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, tiles, full):
        self.tiles = tiles
        self.full = full

    @gluon.jit
    def put(self, count, tile):
        """Announce the tile that is number `count` here; one past the last ends the consumers."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        self.tiles.index(count % QUEUE).store(gl.full([1], tile, gl.int32, layout))
        mbarrier.arrive(self.full.index(count % QUEUE), count=1)

    @gluon.jit
    def get(self, count):
        """Wait for tile number `count`."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        mbarrier.wait(self.full.index(count % QUEUE), (count // QUEUE) & 1)
        return gl.max(self.tiles.index(count % QUEUE).load(layout), 0)


@aggregate
class Shared:
    """Shared memory and its barriers."""

    queries: gl.shared_memory_descriptor  # one tile a consumer
    queries_full: gl.shared_memory_descriptor
    queries_empty: gl.shared_memory_descriptor
    outputs: gl.shared_memory_descriptor  # may be the memory of the queries
    keys: Ring
    values: Ring
    queue: Queue

    @gluon.constexpr_function
    def __init__(self, queries, queries_full, queries_empty, outputs, keys, values, queue):
        self.queries = queries
        self.queries_full = queries_full
        self.queries_empty = queries_empty
        self.outputs = outputs
        self.keys = keys
        self.values = values
        self.queue = queue


@gluon.jit
def produce(query, key, value, counter, shared, sizes):
    """Take tiles and copy their queries, keys and values."""
    BLOCK_M: gl.constexpr = 2 * query.block_type.shape[2]
    BLOCK_N: gl.constexpr = key.block_type.shape[2]
    total = gl.cdiv(sizes.queries, BLOCK_M) * sizes.batch_heads
    tile = gl.program_id(0)
    taken = 0
    filled = 0
    while tile < total:
        shared.queue.put(taken, tile)
        row, batch_head = sizes.query_place(tile, BLOCK_M)
        batch = batch_head // sizes.heads
        head = batch_head % sizes.heads
        kv_head = head // sizes.GROUP
        blocks = gl.maximum(sizes.blocks(row, BLOCK_M, BLOCK_N), 1)  # all tiles have one protocol
        for i in range(blocks):
            key_row = (blocks - 1 - i) * BLOCK_N
            shared.keys.fill(filled + i, key, [batch, kv_head, key_row, 0])
            if i == 0:
                load_queries(query, shared, taken, batch, head, row)
            shared.values.fill(filled + i, value, [batch, kv_head, key_row, 0])
        filled += blocks
        taken += 1
        if counter is not None:  # what is in the rings hides the time this takes
            tile = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        else:
            tile += gl.num_programs(0)
    shared.queue.put(taken, tile)


@gluon.jit
def load_queries(query, shared, taken, batch, head, row):
    """Copy each consumer's half of a tile once it has left the last one."""
    for who in gl.static_range(2):
        mbarrier.wait(shared.queries_empty.index(who), (taken & 1) ^ 1)
        mbarrier.expect(shared.queries_full.index(who), query.block_type.nbytes)
        copy_rows = [batch, head, row + who * query.block_type.shape[2], 0]
        load_tile(query, copy_rows, shared.queries_full.index(who), shared.queries.index(who))


@gluon.jit
def softmax(scores, level, total, scale, row, key_row, sizes, MASKED: gl.constexpr, layout: gl.constexpr):
    """Do one step of the online softmax: weights, the factor of what was summed up, the new level and sum."""
    if MASKED:
        rows = row + gl.arange(0, scores.shape[0], gl.SliceLayout(1, layout))
        columns = key_row + gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout))
        seen = (columns[None, :] < sizes.keys) & (columns[None, :] <= rows[:, None] + sizes.offset)
        scores = gl.where(seen, scores, float("-inf"))
    new_level = gl.maximum(level, gl.max(scores, 1) * scale)
    shift = new_level
    if MASKED:  # a row that has seen nothing yet
        shift = gl.where(new_level == float("-inf"), 0.0, new_level)
    weights = gl.exp2(scores * scale - shift[:, None])
    factor = gl.exp2(level - shift)
    return weights, factor, new_level, total * factor + gl.sum(weights, 1)


@gluon.jit
def attend(
    i, blocks, used, acc, weights, factor, level, total, q, shared, sizes, scale, row, MASKED: gl.constexpr,
    score_layout: gl.constexpr,
):  # fmt: skip
    """Scores of block `i`, output of block `i - 1`, and the softmax of block `i` under the second product."""
    ROWS: gl.constexpr = q.shape[0]
    BLOCK_N: gl.constexpr = shared.keys.tiles.shape[3]
    HEAD_DIM: gl.constexpr = q.shape[1]
    at = used + i
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    keys = shared.keys.tile(at, BLOCK_N, HEAD_DIM).permute((1, 0))
    scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    shared.values.wait(at - 1)
    acc = rescale(acc, factor)  # behind the wait, so that the tensor cores have the scores to do meanwhile
    acc = warpgroup_mma(weights, shared.values.tile(at - 1, BLOCK_N, HEAD_DIM), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    key_row = (blocks - 1 - i) * BLOCK_N
    new_weights, factor, level, total = softmax(
        scores, level, total, scale, row, key_row, sizes, MASKED, score_layout
    )
    new_weights = gl.convert_layout(new_weights.to(weights.dtype), weights.type.layout)
    # This wait begins a basic block, which keeps ptxas from moving the exponentials behind the next one.
    shared.keys.wait(at + 1, pred=i + 1 < blocks)
    acc, new_weights = warpgroup_mma_wait(0, deps=(acc, new_weights))
    shared.keys.release(at)
    shared.values.release(at - 1)
    return acc, new_weights, factor, level, total


@gluon.jit
def rescale(acc, factor):
    """Multiply each row of `acc`."""
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def consume(WHO: gl.constexpr, out, lse, scale, shared, sizes, OWN_OUTPUT: gl.constexpr):
    """Compute half of the rows of each tile."""
    ROWS: gl.constexpr = out.block_type.shape[2]
    BLOCK_N: gl.constexpr = shared.keys.tiles.shape[3]
    HEAD_DIM: gl.constexpr = out.block_type.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(MMA, [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    q = shared.queries.index(WHO).reshape([ROWS, HEAD_DIM])
    scale *= LOG2E
    taken = 0
    used = 0
    total_tiles = gl.cdiv(sizes.queries, 2 * ROWS) * sizes.batch_heads
    tile = shared.queue.get(taken)
    while tile < total_tiles:
        row, batch_head = sizes.query_place(tile, 2 * ROWS)
        blocks = gl.maximum(sizes.blocks(row, 2 * ROWS, BLOCK_N), 1)
        row += WHO * ROWS
        level = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, score_layout))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, score_layout))
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)

        mbarrier.wait(shared.queries_full.index(WHO), taken & 1)
        shared.keys.wait(used)
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
        keys = shared.keys.tile(used, BLOCK_N, HEAD_DIM).permute((1, 0))
        scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        shared.keys.release(used)
        weights, factor, level, total = softmax(
            scores,
            level,
            total,
            scale,
            row,
            (blocks - 1) * BLOCK_N,
            sizes,
            sizes.CAUSAL,
            score_layout,
        )
        weights = gl.convert_layout(weights.to(out.dtype), weight_layout)
        shared.keys.wait(used + 1, pred=blocks > 1)

        cut = 1
        if sizes.CAUSAL:
            cut = gl.maximum(blocks - sizes.whole_blocks(row, BLOCK_N), 1)
            for i in range(1, cut):
                acc, weights, factor, level, total = attend(
                    i,
                    blocks,
                    used,
                    acc,
                    weights,
                    factor,
                    level,
                    total,
                    q,
                    shared,
                    sizes,
                    scale,
                    row,
                    True,
                    score_layout,
                )
        for i in range(cut, blocks):
            acc, weights, factor, level, total = attend(
                i,
                blocks,
                used,
                acc,
                weights,
                factor,
                level,
                total,
                q,
                shared,
                sizes,
                scale,
                row,
                False,
                score_layout,
            )
        if OWN_OUTPUT:
            mbarrier.arrive(shared.queries_empty.index(WHO), count=1)

        used += blocks
        shared.values.wait(used - 1)
        acc = rescale(acc, factor)
        acc = warpgroup_mma(weights, shared.values.tile(used - 1, BLOCK_N, HEAD_DIM), acc, is_async=True)
        some = total != 0  # NaN is something
        inverse = 1.0 / gl.where(some, total, 1.0)
        if lse is not None:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
            row_lse = gl.where(some, (level + gl.log2(total)) * LN2, float("-inf"))
            start = sizes.queries.to(gl.int64) * batch_head
            gl.store(lse + start + rows, row_lse, mask=rows < sizes.queries)
        tma.store_wait(0)  # the last tile's output has left the staging memory
        acc, inverse = warpgroup_mma_wait(0, deps=(acc, inverse))
        shared.values.release(used - 1)
        staging = shared.outputs.index(WHO)
        staging.reshape([ROWS, HEAD_DIM]).store(rescale(acc, inverse).to(out.dtype))
        fence_async_shared()
        store_tile(out, [batch_head // sizes.heads, batch_head % sizes.heads, row, 0], staging)
        if not OWN_OUTPUT:
            tma.store_wait(0)
            mbarrier.arrive(shared.queries_empty.index(WHO), count=1)
        taken += 1
        tile = shared.queue.get(taken)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "batch_heads", "width", "offset"])
def forward_kernel(
    query, key, value, out, lse, counter, scale, queries, keys, heads, batch_heads, width, offset,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, OWN_OUTPUT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Attention of (B, Hq, M, D) on (B, Hkv, N, D).

    query and out are descriptors of half a tile of rows, key and value of a block of keys. lse is None or
    (B, Hq, M) float32, natural logarithm. counter holds a zero, and programs take their tiles from it; or
    it is None, and each has every so many. OWN_OUTPUT: there is memory for queries and outputs.
    CAUSAL: rows see the keys up to their position, and none beyond the last; else all blocks are whole.
    """
    sizes = Sizes(queries, keys, heads, batch_heads, width, offset, GROUP, CAUSAL)
    query_tiles = allocate_tiles(query, 2)
    out_tiles = query_tiles
    if OWN_OUTPUT:
        out_tiles = allocate_tiles(out, 2)
    tile_numbers = gl.allocate_shared_memory(
        gl.int32, [QUEUE, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    shared = Shared(
        query_tiles,
        allocate_barriers(2, 1),
        allocate_barriers(2, 1),
        out_tiles,
        allocate_ring(key, STAGES),
        allocate_ring(value, STAGES),
        Queue(tile_numbers, allocate_barriers(QUEUE, 1)),
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (gl.constexpr(0), out, lse, scale, shared, sizes, OWN_OUTPUT)),
            (consume, (gl.constexpr(1), out, lse, scale, shared, sizes, OWN_OUTPUT)),
            (produce, (query, key, value, counter, shared, sizes)),
        ],
        [4, 1],
        [240, 24],  # registers; what is left goes to the first consumer
    )
