"""Which block of which head and sequence a program owns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Heads whose keys and values stay in the second-level cache together: half of the 50 MB of an H100.
CACHED_BYTES = 24 << 20


def cached_heads(head_bytes: int) -> int:
    """How many heads of so many bytes the cache holds."""
    return max(1, CACHED_BYTES // max(head_bytes, 1))


def schedule_of(starts: Tensor | None, rows: int, block: int) -> Tensor | None:
    """The sequence and block of each program of a head, (slots, 2) int32; None where there are no `starts`.

    Those, (B + 1,), say where sequences begin among so many rows. They stay where they are: slots are as many
    as there may be blocks, and those to spare are of blocks past the last sequence's end.
    """
    if starts is None:
        return None
    batch = starts.shape[0] - 1
    blocks = (starts.long().diff().clamp(0, rows) + block - 1) // block
    ends = blocks.cumsum(0)
    slots = torch.arange(rows // block + batch if batch else 0, device=starts.device)
    sequence = torch.searchsorted(ends, slots, right=True).clamp(max=batch - 1)
    rank = slots - (ends - blocks).gather(0, sequence)
    # Within a sequence the last block, which under the causal rule sees most keys, comes first.
    backwards = blocks.gather(0, sequence) - 1 - rank
    return torch.stack([sequence, torch.where(backwards < 0, rank, backwards)], 1).int()


def programs(schedule: Tensor | None, blocks: int, batch: int) -> int:
    """How many programs a head takes; `blocks`: of a sequence where there is no schedule."""
    return blocks * batch if schedule is None else len(schedule)


@triton.jit
def block_and_head(blocks, batch_heads, width):
    """Longest blocks of queries first, among as many heads as the cache holds keys and values of."""
    pid = tl.program_id(0)
    section = pid // (blocks * width)
    rest = pid - section * (blocks * width)
    here = tl.minimum(width, batch_heads - section * width)
    rank = rest // here
    return blocks - 1 - rank, section * width + rest - rank * here


@triton.jit
def own_block(schedule, blocks, batch_heads, heads, width):
    """Block, sequence, head, and number of the head of this program; from `schedule_of` if there is one."""
    if schedule is None:
        block, batch_head = block_and_head(blocks, batch_heads, width)
        batch, head = batch_head // heads, batch_head % heads
    else:
        slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        batch, block = tl.load(schedule + slot * 2), tl.load(schedule + slot * 2 + 1)
        batch_head = batch * heads + head
    return block, batch, head, batch_head


@triton.jit
def block_in_order(schedule, blocks, heads):
    """The same for kernels that read each row once: whatever block."""
    if schedule is None:
        block, batch_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
        batch, head = batch_head // heads, batch_head % heads
    else:
        block, batch, head, batch_head = own_block(schedule, 0, 0, heads, 0)
    return block, batch, head, batch_head
