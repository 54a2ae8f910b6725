"""``fastattn explain``: what a call of `attention` would run, why nothing else would, and what it costs."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Any

import numpy as np
import typer

import fastattn
from fastattn.cli.console import fail, mendable, out, print_facts, print_json, usage

EXAMPLES = (
    "fastattn explain --shape 1,8,128,64",
    "fastattn explain --shape 1,32,8192,128 --kv-heads 8 --dtype bfloat16 --causal",
    "fastattn explain --shape 1,32,1,128 --kv-length 8192 --window 4095,0 --json",
)
_NEVER = 1 << 62  # a bound that no position reaches
_LARGEST = 1 << 60  # elements of 8 bytes: sizes in bytes have 63 bits


class Dtype(str, Enum):
    """Of query, key and value."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(str, Enum):
    """Where tensors would be."""

    cpu = "cpu"
    cuda = "cuda"


class Backend(str, Enum):
    """Of `fastattn.attention`."""

    cpu = "cpu"
    triton = "triton"
    reference = "reference"
    math = "math"


def explain(
    shape: Annotated[str, typer.Option(help="Of the query: batch,heads,length,dim.", metavar="B,H,L,D")],
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Of key and value.", show_default="the query's")
    ] = None,
    kv_length: Annotated[
        int | None, typer.Option(min=0, help="Keys.", show_default="the query's length")
    ] = None,
    value_dim: Annotated[
        int | None, typer.Option(min=1, help="Of a value.", show_default="the key's")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of query, key and value.")] = Dtype.float32,
    causal: Annotated[bool, typer.Option("--causal", help="Queries see no later keys.")] = False,
    window: Annotated[
        str | None,
        typer.Option(help="Keys on each side that a query sees; nothing: all.", metavar="LEFT,RIGHT"),
    ] = None,
    softcap: Annotated[float, typer.Option(min=0.0, help="Bound of the scores; 0: none.")] = 0.0,
    device: Annotated[Device, typer.Option(help="cuda: tensors of torch on its GPU.")] = Device.cpu,
    backend: Annotated[Backend | None, typer.Option(help="The one to ask.", show_default="all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Print what would compute a call of attention, why nothing else would, and what it costs.

    Nothing is computed and no memory is needed: sizes may be any.
    """
    batch, heads, length, dim = _sizes(shape)
    others = {"--kv-heads": kv_heads, "--kv-length": kv_length, "--value-dim": value_dim}
    given = ["--shape", *(option for option, size in others.items() if size is not None)]
    kv_heads, kv_length = kv_heads or heads, length if kv_length is None else kv_length
    shapes = (
        (batch, heads, length, dim),
        (batch, kv_heads, kv_length, dim),
        (batch, kv_heads, kv_length, value_dim or dim),
    )
    bounds = _window(window)
    arrays = [
        _empty(sizes, dtype.value, device.value, option)
        for sizes, option in zip(shapes, ("--shape", "--kv-heads, --kv-length", "--value-dim"), strict=True)
    ]
    try:
        found = fastattn.explain(
            *arrays, causal=causal, window=bounds, softcap=softcap, backend=backend and backend.value
        )
    except (TypeError, ValueError, OverflowError) as error:
        if str(error).startswith("FASTATTN_"):  # a variable that no call can use
            raise fail(str(error)) from error
        raise usage(", ".join(given), str(error)) from error  # the library's words name arguments
    except RuntimeError as error:
        raise fail(str(error)) from error
    costs = cost(shapes, causal, bounds, arrays[0].dtype.itemsize)
    if as_json:
        about = {"call": found.call, "backend": found.backend, "details": dict(found.details)}
        print_json({**about, "refusals": dict(found.refusals), "cost": costs})
        return
    rows = {"call": found.call, "backend": found.backend or "none can run it", **found.details}
    rows |= {f"not {name}": "; ".join(reasons) for name, reasons in found.refusals.items()}
    print_facts(rows | _in_words(costs), out())


def cost(
    shapes: tuple[tuple[int, ...], ...],
    causal: bool,
    window: tuple[int | None, int | None] | None,
    itemsize: int,
) -> dict[str, int]:
    """What a forward takes.

    Returns
    -------
    dict
        `pairs` of a query and a key that it sees, of all heads, and `all_pairs` with those that it does not;
        `flops`: 2 for each pair and column of key and value; `bytes` of query, key, value and output, each
        once; `score_bytes` of the float32 matrix that is never in memory.
    """
    (batch, heads, length, dim), (_, kv_heads, kv_length, _), (*_, value_dim) = shapes
    left, right = (_NEVER if bound is None else bound for bound in window or (None, None))
    right = 0 if causal else right
    first = kv_length - length  # the last query stands at the last key
    seen = _clamped_sum(first + right + 1, length, kv_length) - _clamped_sum(first - left, length, kv_length)
    pairs, all_pairs = batch * heads * seen, batch * heads * length * kv_length
    elements = batch * (heads * length + kv_heads * kv_length) * (dim + value_dim)
    return {
        "pairs": pairs,
        "all_pairs": all_pairs,
        "flops": 2 * pairs * (dim + value_dim),
        "bytes": elements * itemsize,
        "score_bytes": 4 * all_pairs,
    }


def _clamped_sum(start: int, count: int, top: int) -> int:
    """Sum of the whole numbers from `start`, `count` of them, each brought between 0 and `top`."""

    def up_to(last: int) -> int:
        slope = min(max(last, 0), top)
        return slope * (slope + 1) // 2 + max(last - top, 0) * top

    return up_to(start + count - 1) - up_to(start - 1)


def _in_words(costs: dict[str, int]) -> dict[str, str]:
    share = costs["pairs"] / costs["all_pairs"] if costs["all_pairs"] else 0.0
    pairs = f"{_large(costs['pairs'])} pairs of query and key" + (
        f", {share:.0%} of all" if share < 1 else ""
    )
    each = costs["flops"] / costs["bytes"] if costs["bytes"] else 0.0
    return {
        "work": f"{_large(costs['flops'], 'FLOP')}, for {pairs}",
        "memory": f"{_large(costs['bytes'], 'B', 1024)} read and written once, {each:.3g} FLOP a byte",
        "not kept": f"{_large(costs['score_bytes'], 'B', 1024)} of scores",
    }


def _large(number: float, unit: str = "", step: int = 1000) -> str:
    """Three digits, a prefix and the unit."""
    power = 0
    while number >= step and power < 6:
        number, power = number / step, power + 1
    prefix = " kMGTPE"[power].strip()
    prefix = f"{prefix.upper()}i" if step == 1024 and prefix else prefix
    return f"{number:.3g} {prefix}{unit}".rstrip()


def _sizes(shape: str) -> tuple[int, int, int, int]:
    try:
        batch, heads, length, dim = (int(size) for size in shape.split(","))
    except ValueError:
        batch = -1
    if batch < 0 or min(heads, length, dim) < 0:
        raise usage("--shape", f"expected four sizes, such as 1,8,512,64, got {shape!r}")
    return batch, heads, length, dim


def _window(text: str | None) -> tuple[int | None, int | None] | None:
    if text is None:
        return None
    try:
        left, right = (int(bound) if bound.strip() else None for bound in text.split(","))
    except ValueError:
        left = right = -1
    if min(left or 0, right or 0) < 0:
        raise usage(
            "--window",
            f"expected LEFT,RIGHT, such as 255,0, or 255, with no bound on the right: got {text!r}",
        )
    return left, right


def _empty(shape: tuple[int, ...], dtype: str, device: str, option: str) -> Any:
    """An array of this shape, which the option is about, in the memory of one element."""
    if math.prod(max(size, 1) for size in shape) >= _LARGEST:
        raise usage(option, f"an array of {' x '.join(map(str, shape))} elements is larger than any memory")
    if device == "cuda":
        with mendable():
            import torch
        if not torch.cuda.is_available():
            raise fail("--device cuda: torch finds no GPU here")
        return torch.empty(1, dtype=getattr(torch, dtype), device="cuda").expand(shape)
    if dtype != "bfloat16":
        return np.broadcast_to(np.zeros(1, dtype), shape)
    try:
        import ml_dtypes
    except ImportError:
        raise fail("--dtype bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from None
    return np.broadcast_to(np.zeros(1, ml_dtypes.bfloat16), shape)
