"""Random calls of `fastattn.attention`, drawn: legal ones, and illegal ones made of them."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from kernels import KERNELS, Kernel
from shapes import LIBRARIES, convert

Rng = np.random.Generator
Call = dict[str, Any]  # the arguments of `attention`


def chosen_seed(usual: int) -> int:
    """FASTATTN_TEST_SEED; `usual` if it is unset, and a drawn one if it is "random"."""
    seed = os.environ.get("FASTATTN_TEST_SEED", str(usual))
    return secrets.randbits(32) if seed == "random" else int(seed)


def pick(rng: Rng, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def number(rng: Rng, *ranges: tuple[int, int]) -> int:
    """From one of the ranges, ends included."""
    low, high = pick(rng, *ranges)
    return int(rng.integers(low, high + 1))


# --- arrays in any memory -----------------------------------------------------------------------------------


def strided(rng: Rng, values: np.ndarray, *, to_write: bool = False) -> np.ndarray:
    """The same values, laid out in one of the ways in which they may come."""
    kind = pick(rng, "plain", "plain", "axes", "inside", "steps", "unaligned", "negative", "broadcast")
    axes = rng.permutation(values.ndim)
    if not values.ndim:
        return values
    if kind == "axes":
        return values.transpose(axes).copy().transpose(np.argsort(axes))
    if kind in ("inside", "steps"):
        step, before = (2 if kind == "steps" else 1), number(rng, (0, 3))
        memory = np.zeros([before + size * step + 1 for size in values.shape], values.dtype)
        view = memory[tuple(slice(before, before + size * step, step) for size in values.shape)]
    elif kind == "unaligned":
        view = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(values.shape)
    elif kind == "negative" and not to_write:
        flip = tuple(slice(None, None, -1 if rng.random() < 0.5 else 1) for _ in values.shape)
        return values[flip].copy()[flip]
    elif kind == "broadcast" and not to_write and values.size:
        return np.broadcast_to(values.take([0], axis=axes[0]), values.shape)
    else:
        return values
    view[...] = values
    return view


def array(rng: Rng, values: np.ndarray, dtype: str, library: str) -> Any:
    """`values` as an argument of `library`; torch knows neither negative strides nor odd addresses."""
    laid = strided(rng, convert(values, dtype))
    if library == "numpy":
        return laid
    if any(step < 0 or step % laid.itemsize for step in laid.strides) or not laid.flags.aligned:
        laid = laid.copy()
    if dtype == "bfloat16":
        return as_torch(laid.view(np.uint16)).view(torch.bfloat16)
    return as_torch(laid)


def as_torch(values: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a broadcast array is not writable
        return torch.from_numpy(values)


# --- legal calls --------------------------------------------------------------------------------------------


def draw_legal(rng: Rng) -> tuple[Kernel, Call]:
    """A kernel, and arguments that it must take."""
    kernel, library = pick(rng, *KERNELS), pick(rng, *LIBRARIES)
    batch, kv_heads = number(rng, (1, 1), (1, 3)), number(rng, (1, 1), (1, 3))
    heads = kv_heads * number(rng, (1, 1), (1, 4))
    seqlen_q = number(rng, (1, 5), (1, 40), (5, 70))
    seqlen_k = number(rng, (1, 10), (1, 70), (1, 70), (230, 300))
    dim, value_dim = (number(rng, (1, 70), (1, 20), (32, 32), (64, 64)) for _ in range(2))
    if rng.random() < 0.04:
        batch, seqlen_q, seqlen_k = (
            0 if rng.random() < 0.5 else size for size in (batch, seqlen_q, seqlen_k)
        )
    if rng.random() < 0.02:
        dim, value_dim = number(rng, (100, 576)), number(rng, (100, 512))
    if rng.random() < 0.02:
        seqlen_q, seqlen_k = number(rng, (100, 150)), number(rng, (500, 800))
    layout = pick(rng, "bhsd", "bshd")

    def tensor(heads: int, rows: int, columns: int, spread: float = 1) -> Any:
        shape = (batch, heads, rows, columns) if layout == "bhsd" else (batch, rows, heads, columns)
        return array(rng, rng.standard_normal(shape) * spread, kernel.dtype, library)

    call: Call = {
        "query": tensor(heads, seqlen_q, dim, pick(rng, 0.1, 1, 1, 4)),
        "key": tensor(kv_heads, seqlen_k, dim),
        "value": tensor(kv_heads, seqlen_k, value_dim),
        "layout": layout,
        "causal": pick(rng, False, False, True, "bottom_right", "top_left"),
    }
    sizes = (batch, heads, seqlen_q, seqlen_k)
    for name, draw in OPTIONAL.items():
        if rng.random() < 0.25:
            call[name] = draw(rng, sizes, kernel.dtype, library)
    if abs(np.asarray(call.get("query_offset", 0))).max(initial=0) > 2**20:
        call.pop("alibi_slopes", None)  # the oracle's scores lose all digits there; see test_extremes
    if rng.random() < 0.2:
        call |= {"dropout_p": pick(rng, 0.1, 0.5, 1.0), "dropout_seed": int(rng.integers(2**63)) * 2 + 1}
        call["dropout_offset"] = int(rng.integers(2**32))
    if rng.random() < 0.3:
        call["out"] = draw_out(rng, call, sizes, value_dim, kernel.dtype, library)
    for flag in ("return_lse", "return_weights"):
        call[flag] = bool(rng.random() < 0.4)
    return kernel, call


def draw_out(rng: Rng, call: Call, sizes: tuple[int, ...], columns: int, dtype: str, library: str) -> Any:
    batch, heads, rows, _ = sizes
    shape = (batch, heads, rows, columns) if call["layout"] == "bhsd" else (batch, rows, heads, columns)
    if library == "numpy":
        return strided(rng, convert(np.asarray(np.full(shape, np.nan)), dtype), to_write=True)
    out = torch.full(shape[::-1] if rng.random() < 0.5 else shape, torch.nan, dtype=getattr(torch, dtype))
    return out if tuple(out.shape) == shape else out.permute(3, 2, 1, 0)


def dense_shape(rng: Rng, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One that broadcasts to the scores."""
    shape = tuple(1 if rng.random() < 0.3 else size for size in sizes)
    return shape[pick(rng, 0, 0, 0, 1, 2, 3, 4) :] if rng.random() < 0.5 else shape


def draw_mask(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    mask = np.asarray(rng.random(dense_shape(rng, sizes)) < pick(rng, 0.1, 0.5, 0.9, 1))
    return array(rng, mask, "bool", library)


def draw_bias(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    shape = dense_shape(rng, sizes)
    bias = np.asarray(rng.standard_normal(shape) * pick(rng, 0.1, 1, 10))
    bias[rng.random(shape) < pick(rng, 0, 0, 0.3)] = -np.inf
    return array(rng, bias, pick(rng, dtype, "float32"), library)


def draw_window(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    bound = lambda: pick(rng, None, 0, number(rng, (0, 20)), number(rng, (0, 300)), 2**70)  # noqa: E731
    return pick(rng, tuple, list)((bound(), bound()))


def draw_lengths(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    return integers(rng, rng.integers(0, sizes[3] + 1, sizes[0]), library)


def draw_rows(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    return integers(rng, rng.integers(0, sizes[2] + 1, sizes[0]), library)


def draw_segments(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    """Documents side by side, or ids in any order."""
    ids = [rng.integers(-2, pick(rng, 0, 2, 9), (sizes[0], length)) for length in sizes[2:]]
    if rng.random() < 0.6:
        ids = [np.sort(of, 1) for of in ids]
    return pick(rng, tuple, list)(integers(rng, of, library) for of in ids)


def draw_offset(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    low, high = pick(rng, (-sizes[2] - 3, sizes[3] + 3), (-1000, 1000), (0, 0), (-(2**60), 2**60))
    if rng.random() < 0.5:
        return pick(rng, int, np.int64)(rng.integers(low, high + 1))
    return integers(rng, rng.integers(low, high + 1, sizes[0]), library)


def draw_slopes(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    shape = pick(rng, sizes[1:2], sizes[:2])
    slopes = 2.0 ** -rng.uniform(0, 8, shape) * pick(rng, 1, 1, 1, 0, -1)
    return array(rng, slopes, pick(rng, "float32", "float64", dtype), library)


def draw_sinks(rng: Rng, sizes: tuple[int, ...], dtype: str, library: str) -> Any:
    sinks = rng.standard_normal(sizes[1]) * pick(rng, 1, 5)
    sinks[rng.random(sizes[1]) < 0.2] = -np.inf
    return sinks.tolist() if rng.random() < 0.2 else array(rng, sinks, pick(rng, "float32", dtype), library)


def integers(rng: Rng, values: np.ndarray, library: str) -> Any:
    if rng.random() < 0.2:
        return values.tolist()
    small = abs(values).max(initial=0) < 2**31
    return array(rng, values, pick(rng, "int32", "int64") if small else "int64", library)


OPTIONAL: dict[str, Callable[[Rng, tuple[int, ...], str, str], Any]] = {
    "mask": draw_mask,
    "bias": draw_bias,
    "window": draw_window,
    "kv_lengths": draw_lengths,
    "kv_starts": draw_lengths,
    "query_lengths": draw_rows,
    "segment_ids": draw_segments,
    "query_offset": draw_offset,
    "alibi_slopes": draw_slopes,
    "sinks": draw_sinks,
    "softcap": lambda rng, *_: pick(rng, 0.0, 0.5, 3, 50.0),
    "scale": lambda rng, *_: pick(rng, None, 0.3, -1, 0.0, np.float32(0.1)),
}


# --- illegal calls ------------------------------------------------------------------------------------------

ARGUMENTS = [
    "query",
    "key",
    "value",
    "causal",
    "window",
    "mask",
    "bias",
    "kv_lengths",
    "kv_starts",
    "query_lengths",
    "segment_ids",
    "query_offset",
    "alibi_slopes",
    "sinks",
    "softcap",
    "scale",
    "layout",
    "return_lse",
    "return_weights",
    "out",
    "backend",
]


def read_only(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


def junk(rng: Rng, call: Call) -> Any:
    """Something that hardly any argument takes."""
    query = call["query"]
    shape = tuple(number(rng, (0, 4)) for _ in range(number(rng, (0, 5))))
    plain = np.zeros(shape, pick(rng, "f4", "f8", "i4", "?", "c8", "u1", "O", ">f4", "U1", "M8[s]", "V3"))
    makers: list[Callable[[], Any]] = [
        lambda: pick(rng, None, True, False, 0, 1, -1, 1.5, -0.5, 2**70, -(2**70), 1j),
        lambda: pick(rng, float("nan"), float("inf"), -float("inf"), np.float16("nan"), np.bool_(True)),
        lambda: pick(rng, "", "gpu", "bshd", "top_left", "\ud800", b"x", object(), Ellipsis, print, type),
        lambda: pick(rng, (), [], {}, set(), [None], (1,), (1, 2), (0, None), [1, [2]], (-1, 0), ("a", 1)),
        lambda: plain,
        lambda: torch.zeros(shape, dtype=pick(rng, torch.float32, torch.int64, torch.bool, torch.complex64)),
        lambda: torch.zeros(shape, device="meta"),
        lambda: torch.zeros(shape, requires_grad=True),
        lambda: torch.zeros(shape or (1,)).to_sparse(),
        lambda: np.ma.array(np.zeros(shape, np.float32)),
        lambda: np.zeros(shape, pick(rng, ml_dtypes.float8_e4m3fn, ml_dtypes.int4)),
        lambda: read_only(np.zeros(tuple(query.shape), np.float32)),
        lambda: query[..., :-1] if isinstance(query, torch.Tensor) else query[..., ::-1],
        lambda: query[:1],
        lambda: query,
        lambda: pick(rng, call["key"], call["value"], call.get("mask"), call.get("bias")),
        lambda: query[None] if query.ndim else query,
        lambda: np.full(tuple(query.shape)[:1], pick(rng, -1, 2**62, 1e9, np.nan, np.inf)),
        lambda: np.broadcast_to(np.zeros(1, np.float32), (1, 1, 2**20, 2**10)),
        lambda: [float(pick(rng, np.nan, np.inf, -np.inf, 1e300))] * number(rng, (0, 9)),
    ]
    return makers[rng.integers(len(makers))]()


def draw_illegal(rng: Rng) -> tuple[Kernel, Call, list[str]]:
    """A legal call, with junk for one or two arguments, and their names."""
    kernel, call = draw_legal(rng)
    while call["key"].shape[1] > 60 or call["key"].shape[2] > 60:
        kernel, call = draw_legal(rng)
    changed = [str(name) for name in rng.choice(ARGUMENTS, pick(rng, 1, 1, 1, 2), replace=False)]
    call |= {name: junk(rng, call) for name in changed}
    return kernel, call, changed
