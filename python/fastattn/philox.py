"""Which weights dropout keeps: Philox 4x32-10, whose random numbers depend on their place and a key alone.

The weight of query ``i`` and key ``j`` in head ``n = b * Hq + h`` has word ``j % 4`` of the block that the
generator makes of the counter ``(i, j // 4, n, offset)``, low words of the seed first in its key. It is kept
where the word is at least ``p * 2**32``. Every backend, in whatever order it goes, finds the same ones.

References
----------
Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = tuple[Any, Any, Any, Any]  # uint64 arrays that broadcast together and hold 32-bit numbers

ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key between rounds
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four random 32-bit words for each counter of four words, under a key of two."""
    c0, c1, c2, c3 = counter
    for n in range(ROUNDS):
        k0, k1 = (np.uint64(word + n * step & 0xFFFFFFFF) for word, step in zip(key, _WEYL, strict=True))
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 64 bits hold the products
        c0, c1, c2, c3 = second >> _32 ^ c1 ^ k0, second & _LOW, first >> _32 ^ c3 ^ k1, first & _LOW
    return c0, c1, c2, c3


def kept(
    p: float, seed: int, offset: int, heads: NDArray[np.int64], seqlen_q: int, seqlen_k: int
) -> NDArray[np.bool_]:
    """Tell which weights stay, shape (heads..., seqlen_q, seqlen_k); `heads` holds ``b * Hq + h``."""
    row = np.arange(seqlen_q, dtype=np.uint64)[:, None]
    four = np.arange(-(-seqlen_k // 4), dtype=np.uint64)
    head = heads.astype(np.uint64)[..., None, None]
    words = philox4x32((row, four, head, np.uint64(offset)), (seed & 0xFFFFFFFF, seed >> 32))
    shape = (*heads.shape, seqlen_q, four.size)
    numbers = np.stack([np.broadcast_to(word, shape) for word in words], axis=-1)
    places: NDArray[np.bool_] = numbers.reshape(*shape[:-1], 4 * four.size)[..., :seqlen_k] >= p * 2.0**32
    return places


def multiplier(
    p: float, seed: int, offset: int, heads: NDArray[np.int64], seqlen_q: int, seqlen_k: int
) -> NDArray[np.float64]:
    """What dropout multiplies weights by: 0, or ``1 / (1 - p)`` where they are kept."""
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    return np.where(kept(p, seed, offset, heads, seqlen_q, seqlen_k), scale, 0.0)
