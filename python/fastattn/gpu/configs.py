"""Tiles of the portable kernels for each kind of GPU. They ship as tables: a first call tunes nothing.

Each entry is the fastest of those measured on a device of its kind, where there was one (bench/results), and
elsewhere the largest tile that keeps everything in registers. ``tests/gpu`` compiles every entry for its GPU
and holds it against what that has. ``FASTATTN_AUTOTUNE=1`` measures candidates on the device at hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastattn.gpu.call import Call


class Tiles(NamedTuple):
    """Rows and columns of a tile of scores, warps of a program, stages of its pipeline of loads."""

    rows: int
    columns: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """The arguments of a launch."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Uses(NamedTuple):
    """Tiles for what a call asks of its scores."""

    plain: Tiles  # products, of which a triangle may be hidden
    narrow: Tiles  # a window of NARROW keys or fewer
    rich: Tiles  # a mask, a bias, dropout ...: what is read or computed for each score takes registers


NARROW = 1024
INTERPRETED = Tiles(32, 32, 4, 1)  # any; small ones have more borders to test

# By kind of GPU, of numbers and the columns of a tile of queries, keys or values.
FORWARD: dict[str, dict[tuple[str, int], Uses]] = {
    "sm80": {
        ("half", 64): Uses(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)),
        ("half", 128): Uses(Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 2), Tiles(64, 64, 8, 2)),
        ("half", 256): Uses(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
        ("float32", 64): Uses(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 1)),
        ("float32", 128): Uses(Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 1)),
        ("float32", 256): Uses(Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1)),
        ("tf32", 64): Uses(Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)),
        ("tf32", 128): Uses(Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 1)),
        ("tf32", 256): Uses(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 8, 1)),
    },
    "sm90": {
        ("half", 64): Uses(Tiles(128, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2)),
        ("half", 128): Uses(Tiles(128, 128, 8, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2)),
        ("half", 256): Uses(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(128, 32, 8, 2)),
        ("float32", 64): Uses(Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 1)),
        ("float32", 128): Uses(Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 1)),
        ("float32", 256): Uses(Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1)),
        ("tf32", 64): Uses(Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)),
        ("tf32", 128): Uses(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 1)),
        ("tf32", 256): Uses(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 8, 1)),
    },
    "sm120": {  # and whatever else has 99 KiB of shared memory
        ("half", 64): Uses(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)),
        ("half", 128): Uses(Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 8, 2)),
        ("half", 256): Uses(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
        ("float32", 64): Uses(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 1)),
        ("float32", 128): Uses(Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 1)),
        ("float32", 256): Uses(Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1)),
        ("tf32", 64): Uses(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)),
        ("tf32", 128): Uses(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 1)),
        ("tf32", 256): Uses(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 8, 1)),
    },
    "gfx942": {
        ("half", 64): Uses(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 1)),
        ("half", 128): Uses(Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1)),
        ("half", 256): Uses(Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1)),
        ("float32", 64): Uses(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
        ("float32", 128): Uses(Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 8, 1)),
        ("float32", 256): Uses(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
}
FORWARD["sm100"] = FORWARD["sm90"]

# By the rows of a tile, which are all queries of a group of heads.
DECODE: dict[int, Tiles] = {
    16: Tiles(16, 64, 2, 2),
    32: Tiles(32, 64, 4, 3),
    64: Tiles(64, 64, 4, 3),
    128: Tiles(128, 128, 8, 3),
}


def padded(head_dim: int) -> int:
    """The columns of a tile that holds `head_dim`: a product needs a power of two from 16 up."""
    return max(16, 1 << (head_dim - 1).bit_length())


def kind_of_gpu(tensor: torch.Tensor) -> str:
    """The name in the tables here of the GPU that holds `tensor`; "" for the interpreter's memory."""
    if not tensor.is_cuda:
        return ""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if major in (9, 10):
        return f"sm{major}0"
    return "sm80" if (major, minor) in ((8, 0), (8, 7)) else "sm120"


def precision(call: Call) -> str:
    """How products of float32 are computed.

    Three products of TF32 stand for one: they are as close to float64 as IEEE's (5e-7 either way, measured)
    and three times as fast on an H200. Head dimensions above 128 leave them no registers.
    """
    if call.query.dtype != torch.float32 or kind_of_gpu(call.query) in ("", "gfx942"):
        return "ieee"
    if call.tf32:
        return "tf32"
    return "tf32x3" if _columns(call) <= 128 else "ieee"


def forward(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the forward kernel."""
    gpu = kind_of_gpu(call.query)
    if not gpu:
        return INTERPRETED.options()
    uses = FORWARD[gpu][_numbers(call), max(64, _columns(call))]
    if is_rich(call):
        return uses.rich.options()
    is_narrow = call.window_left + call.window_right < NARROW
    return (uses.narrow if is_narrow else uses.plain).options()


def is_rich(call: Call) -> bool:
    """Whether something is read or computed for each score, besides the product."""
    per_score = call.mask is not None or call.bias is not None or call.alibi_slopes is not None
    return per_score or call.dropout_p > 0 or call.softcap > 0


def weights(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel that writes the probabilities."""
    is_half = call.query.is_cuda and call.query.dtype != torch.float32
    return (Tiles(64, 64, 4, 1) if is_half else INTERPRETED).options()


def decode(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel for one chunk of keys."""
    if not call.query.is_cuda:
        return INTERPRETED._replace(rows=16).options()
    rows = padded(call.query.shape[2] * (call.query.shape[1] // call.key.shape[1]))
    if call.query.dtype == torch.float32 or is_rich(call) or _columns(call) > 128:
        return Tiles(16, 32, 4, 1).options()
    return DECODE[min(rows, 64 if kind_of_gpu(call.query) in ("sm120", "gfx942") else 128)].options()


def decode_chunk(seqlen_k: int) -> int:
    """How many keys a program of `decode` takes: 32 chunks of long caches, which one program can merge."""
    return max(256, (1 << (max(seqlen_k, 1) - 1).bit_length()) >> 5)


def row_terms(call: Call) -> dict[str, Any]:
    """Tiles of the kernel that makes ready what the backward knows of each row."""
    return {"BLOCK_M": 32 if call.value.shape[3] > 64 else 64, "num_warps": 4}


def backward_keys(call: Call, atomic: bool = False) -> dict[str, Any]:
    """Tiles and launch options of the kernel for the gradients of key and value."""
    if not call.query.is_cuda:
        return INTERPRETED.options()
    if max(padded(call.query.shape[3]), padded(call.value.shape[3])) <= 64:
        return Tiles(64, 128, 8, 2).options()
    return Tiles(64, 64, 8, 2).options()


def backward_queries(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel for the gradient of query."""
    if not call.query.is_cuda:
        return INTERPRETED.options()
    if max(padded(call.query.shape[3]), padded(call.value.shape[3])) <= 64:
        return Tiles(128, 64, 4, 2).options()
    return Tiles(128, 64, 8, 2).options()


def backward_bias(call: Call) -> dict[str, Any]:
    """Tiles and launch options of the kernel for the gradient of the bias."""
    if not call.query.is_cuda:
        return INTERPRETED.options()
    return Tiles(64, 64, 4, 1).options()


def _columns(call: Call) -> int:
    return max(padded(call.query.shape[3]), padded(call.value.shape[3]))


def _numbers(call: Call) -> str:
    if call.query.dtype != torch.float32:
        return "half"
    return "tf32" if call.tf32 and kind_of_gpu(call.query) != "gfx942" else "float32"
