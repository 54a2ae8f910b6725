"""What the Hopper kernels share: how tiles are dealt out, rings of them, and names that changed in Triton.

Barriers count phases: `full` of a slot completes when its bytes have landed, `empty` when both consumers
have read them. The n-th use of a slot is phase n of both, and a wait names the parity of the phase it waits
for.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.6 and 3.7 have the first name of each pair, later releases the second.
aggregate = triton.aggregate if hasattr(triton, "aggregate") else triton.language.core._aggregate
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

CONSUMERS = gl.constexpr(2)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
MMA = gl.constexpr([3, 0])  # products of warpgroups


@aggregate
class Sizes:
    """Sizes of a call, how its tiles are dealt out, and which keys their rows see."""

    queries: gl.tensor
    keys: gl.tensor
    heads: gl.tensor
    batch_heads: gl.tensor  # heads over which tiles are dealt out: of queries or of keys
    width: gl.tensor  # heads whose operands the L2 cache holds at once
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
    def place(self, tiles, index):
        """Give tile and head of number `index`: the first tiles of `width` heads, then their second ..."""
        section = index // (tiles * self.width)
        rest = index - section * (tiles * self.width)
        here = gl.minimum(self.width, self.batch_heads - section * self.width)
        tile = rest // here
        return tile, section * self.width + rest - tile * here

    @gluon.jit
    def query_place(self, index, BLOCK_M: gl.constexpr):
        """Give first row and head of a tile of queries, those that see the most keys first."""
        tiles = gl.cdiv(self.queries, BLOCK_M)
        tile, head = self.place(tiles, index)
        if self.CAUSAL:
            tile = tiles - 1 - tile
        return tile * BLOCK_M, head

    @gluon.jit
    def blocks(self, row, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
        """Count the blocks of keys that some of the `BLOCK_M` rows from `row` on see."""
        end = self.keys
        if self.CAUSAL:
            end = gl.minimum(end, gl.minimum(row + BLOCK_M, self.queries) + self.offset)
        return gl.cdiv(gl.maximum(end, 0), BLOCK_N)

    @gluon.jit
    def whole_blocks(self, row, BLOCK_N: gl.constexpr):
        """Count the blocks of keys of which all rows from `row` on see all."""
        end = self.keys
        if self.CAUSAL:
            end = gl.minimum(gl.maximum(row + self.offset + 1, 0), end)
        return end // BLOCK_N


@aggregate
class Ring:
    """Slots of shared memory that a producer fills and two consumers empty; `count` numbers the uses."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, full, empty, STAGES):
        self.tiles = tiles
        self.full = full
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)

    @gluon.jit
    def fill(self, count, source, coordinates):
        """Copy a tile of `source` into the slot of use `count` once both consumers have left it."""
        slot = count % self.STAGES
        mbarrier.wait(self.empty.index(slot), ((count // self.STAGES) & 1) ^ 1)
        mbarrier.expect(self.full.index(slot), source.block_type.nbytes)
        load_tile(source, coordinates, self.full.index(slot), self.tiles.index(slot))

    @gluon.jit
    def wait(self, count, pred=True):
        """Wait until use `count` has landed."""
        mbarrier.wait(self.full.index(count % self.STAGES), (count // self.STAGES) & 1, pred=pred)

    @gluon.jit
    def tile(self, count, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
        """Give the tile of use `count` as a matrix."""
        return self.tiles.index(count % self.STAGES).reshape([ROWS, COLUMNS])

    @gluon.jit
    def release(self, count):
        """Leave the slot of use `count`."""
        mbarrier.arrive(self.empty.index(count % self.STAGES), count=1)


@gluon.jit
def allocate_barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Make `NUMBER` barriers, each of whose phases completes after `ARRIVALS` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def allocate_tiles(source, NUMBER: gl.constexpr):
    """Make room for `NUMBER` tiles of `source`."""
    return gl.allocate_shared_memory(source.dtype, [NUMBER] + source.block_type.shape, source.layout)  # noqa: RUF005


@gluon.jit
def allocate_ring(source, STAGES: gl.constexpr):
    """Make a ring for the tiles of `source`."""
    tiles = allocate_tiles(source, STAGES)
    return Ring(tiles, allocate_barriers(STAGES, 1), allocate_barriers(STAGES, CONSUMERS), STAGES)


@gluon.jit
def opaque_zero(value):
    """Give a zero that no compiler sees through.

    Added to an index of shared memory, it keeps the descriptors that products read from out of registers: as
    loop invariants they spill.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)
