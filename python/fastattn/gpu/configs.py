"""Which tiles a portable kernel is launched with, and how it multiplies; the tables: `config_tables`."""

from __future__ import annotations

import torch
import triton

from fastattn.gpu.call import Call
from fastattn.gpu.config_tables import (
    BACKWARD_SEGMENTS,
    DECODE_AHEAD,
    DECODE_QUANTISED,
    DECODE_RICH,
    DECODE_RICH_SM120,
    DECODE_SM120,
    DECODE_WIDE,
    FORWARD_AHEAD,
    FORWARD_QUANTISED,
    FORWARD_QUANTISED_GFX942,
    BackwardTiles,
    ForwardTiles,
    Tiles,
    tables,
)
from fastattn.problem import UNBOUNDED

TABLES = tables(triton.__version__)
NARROW = 1024  # keys of a window that small tiles waste less of
INTERPRETED = Tiles(32, 32, 4, 1)  # any; small ones have more borders to test


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


def forward(call: Call) -> Tiles:
    """Tiles of the forward kernel."""
    if not (gpu := kind_of_gpu(call.query)):
        return INTERPRETED
    uses = TABLES.forward[gpu][_numbers(call), _columns(call)]
    if is_rich(call):
        is_full = call.query.shape[3] == call.value.shape[3] == _columns(call)
        return uses.rich if is_full else uses.ragged
    if call.block_table is not None or call.key_scale is not None:
        return _forward_over_cache(call, uses)
    if call.window_left + call.window_right < NARROW:
        return uses.narrow
    return uses.placed if call.window_left < UNBOUNDED or call.kv_starts is not None else uses.plain


def _forward_over_cache(call: Call, uses: ForwardTiles) -> Tiles:
    """Addresses of rows, and codes, take registers."""
    is_half = _numbers(call) == "half"
    if is_half and call.key_scale is not None:
        is_amd = kind_of_gpu(call.query) == "gfx942"
        return (FORWARD_QUANTISED_GFX942 if is_amd else FORWARD_QUANTISED)[_columns(call)]
    return uses.placed if is_half and _columns(call) == 128 else uses.rich


def is_rich(call: Call) -> bool:
    """Whether something is read or computed for each score, besides the product."""
    given = (call.mask, call.bias, call.alibi_slopes, call.segments)
    return any(x is not None for x in given) or call.dropout_p > 0 or call.softcap > 0


def decode(call: Call) -> Tiles:
    """Tiles of the kernel for one chunk of keys."""
    if not (gpu := kind_of_gpu(call.query)):
        return INTERPRETED._replace(rows=16)
    is_wide, is_slow = _columns(call) > 128, call.query.dtype == torch.float32 or is_rich(call)
    if is_wide or (is_slow and gpu == "sm100"):  # where four warps are short of registers
        return DECODE_WIDE
    if is_slow:
        return DECODE_RICH_SM120 if gpu == "sm120" else DECODE_RICH
    if call.key_scale is not None:
        return DECODE_QUANTISED
    rows = padded(call.query.shape[2] * (call.query.shape[1] // call.key.shape[1]))
    if gpu == "sm120" and rows >= DECODE_SM120.rows:
        return DECODE_SM120
    return TABLES.decode[min(rows, {"gfx942": 32, "sm90": 128}.get(gpu, 64))]


def decode_chunk(seqlen_k: int) -> int:
    """How many keys a program of `decode` takes: 32 chunks of long caches, which one program can merge."""
    return max(256, (1 << (max(seqlen_k, 1) - 1).bit_length()) >> 5)


def backward_keys(call: Call, of_weights: bool, atomic: bool = False) -> Tiles:
    """Tiles of the kernel for the gradients of key and value.

    `of_weights`: those of weights come in; `atomic`: that of query is added up there.
    """
    if _has_short_segments(call):
        return BACKWARD_SEGMENTS
    gradients = _backward(call)
    if of_weights or _is_rich_backward(call):
        return gradients.rich_keys
    return gradients.atomic_keys if atomic else gradients.keys


def backward_queries(call: Call, of_weights: bool) -> Tiles:
    """Tiles of the kernel for the gradient of query; `of_weights`: those of weights come in."""
    if _has_short_segments(call):
        return BACKWARD_SEGMENTS
    gradients = _backward(call)
    return gradients.rich_queries if of_weights or _is_rich_backward(call) else gradients.queries


def backward_bias(call: Call) -> Tiles:
    """Tiles of the kernel for the gradient of a bias."""
    if not kind_of_gpu(call.query):
        return INTERPRETED
    return TABLES.bias[_numbers(call), _columns(call)]


def each_score(call: Call) -> Tiles:
    """Tiles of kernels that do little with each score: probabilities, corrections."""
    if not (gpu := kind_of_gpu(call.query)):
        return INTERPRETED
    if call.query.dtype != torch.float32 and _columns(call) <= 128:
        return Tiles(64, 32 if gpu == "sm120" else 64, 4, 1)
    return Tiles(32, 32, 4, 1) if _columns(call) <= 64 else Tiles(16, 32, 4, 1)


def candidates(kernel: str, call: Call) -> list[Tiles]:
    """What `tuning` tries: the entries that a kernel has for these numbers on any GPU."""
    numbers = _numbers(call), _columns(call)
    if kernel == "forward":
        entries = [table[numbers] for table in TABLES.forward.values() if numbers in table]
        return [*(tiles for uses in entries for tiles in uses), *ahead(kernel, call)]
    if kernel == "decode":
        return [*TABLES.decode.values(), DECODE_RICH, DECODE_WIDE, DECODE_QUANTISED, *ahead(kernel, call)]
    ways = [table[numbers] for table in TABLES.backward.values() if numbers in table]
    return [tiles for gradients in ways for tiles in gradients]


def ahead(kernel: str, call: Call) -> tuple[Tiles, ...]:
    """Tiles whose products begin a turn before their exponentials, where a GPU might gain from it."""
    numbers = _numbers(call), _columns(call)
    if kind_of_gpu(call.query) != "sm90" or numbers not in FORWARD_AHEAD:
        return ()
    return FORWARD_AHEAD[numbers] if kernel == "forward" else DECODE_AHEAD


def _is_rich_backward(call: Call) -> bool:
    """A window or a start on the left makes a third loop, whose registers come on top."""
    return is_rich(call) or call.window_left < UNBOUNDED or call.kv_starts is not None


def _has_short_segments(call: Call) -> bool:
    """Whether ids of 64 bits, which take registers, come on top of what the tables count with."""
    is_narrow = _numbers(call) == "half" and _columns(call) <= 128
    return call.segments is not None and is_narrow and bool(kind_of_gpu(call.query))


def _backward(call: Call) -> BackwardTiles:
    if not (gpu := kind_of_gpu(call.query)):
        return BackwardTiles(*[INTERPRETED] * len(BackwardTiles._fields))
    return TABLES.backward[gpu][_numbers(call), _columns(call)]


def _columns(call: Call) -> int:
    """Columns of the wider operand, of which the tables know 64, 128 and 256."""
    return max(64, padded(call.query.shape[3]), padded(call.value.shape[3]))


def _numbers(call: Call) -> str:
    if call.query.dtype != torch.float32:
        return "half"
    return "tf32" if call.tf32 and kind_of_gpu(call.query) != "gfx942" else "float32"
