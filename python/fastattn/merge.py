"""Attention over all keys from attention over parts of them: split-KV, ring attention, shared prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.arrays import FLOATS, Array, Strided, library_of
from fastattn.problem import Layout, check_layout


def merge_states(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, *, layout: Layout = "bhsd"
) -> tuple[Array, Array]:
    r"""Merge attention over two disjoint sets of keys into attention over both, exactly.

    .. math:: lse = \log(e^{lse_a} + e^{lse_b}), \qquad
              out = e^{lse_a - lse} \, out_a + e^{lse_b - lse} \, out_b

    Any number of parts may be merged, in any order. Where there are sinks, exactly one part carries them.

    Parameters
    ----------
    out_a, out_b : arrays, shape (B, H, L, D)
        Outputs of `attention` for the same queries; any float dtype, the same for both.
    lse_a, lse_b : arrays, shape (B, H, L)
        Their log-sum-exps, float32 or float64. -inf marks a row without keys, whose output is not read.
    layout : {"bhsd", "bshd"}
        "bshd": the outputs have axes (B, L, H, D); the log-sum-exps keep theirs.

    Returns
    -------
    out, lse : arrays
        In the dtypes of `out_a` and `lse_a`; computed in float64, on a GPU in the dtype of `lse_a`, and
        rounded once.

    Raises
    ------
    TypeError
        For wrong or differing dtypes, or NumPy mixed with torch.
    ValueError
        For shapes that do not fit.
    RuntimeError
        For tensors on different devices, or that require grad.

    References
    ----------
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    check_layout(layout)
    library = library_of("out_a", out_a)
    a, log_a = library.view("out_a", out_a), library.view("lse_a", lse_a)
    b, log_b = library.view("out_b", out_b), library.view("lse_b", lse_b)
    _check_dtypes(a, log_a, b, log_b)
    swapped = layout == "bshd" and len(a.shape) == len(b.shape) == 4
    if swapped:
        a, b = a.swap_heads_and_rows(), b.swap_heads_and_rows()
    _check_shapes(a, log_a, b, log_b)
    if not library.on_host:
        return _merge_tensors(a.array, log_a.array, b.array, log_b.array, swapped)
    out = library.empty(tuple(out_a.shape), a.dtype, out_a)
    lse = library.empty(log_a.shape, log_a.dtype, lse_a)
    canonical = out.swap_heads_and_rows() if swapped else out
    merged, merged_log = _merge(a.read(), log_a.read(), b.read(), log_b.read())
    canonical.write(..., merged)
    lse.write(..., merged_log)
    return out.array, lse.array


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _merge(
    a: NDArray[np.float64], log_a: NDArray[np.float64], b: NDArray[np.float64], log_b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    highest = np.maximum(log_a, log_b)
    highest[highest == -np.inf] = 0  # no keys on either side
    weight_a, weight_b = np.exp(log_a - highest), np.exp(log_b - highest)
    total = weight_a + weight_b
    parts = np.zeros_like(a)
    for part, weight in (a, weight_a), (b, weight_b):
        # Where one side holds no keys its output is not read, and the other side's comes through unchanged.
        parts += np.where(weight[..., None] == 0, 0, (weight / total)[..., None] * part)
    return parts, highest + np.log(total)


def _merge_tensors(a: Any, log_a: Any, b: Any, log_b: Any, swapped: bool) -> tuple[Any, Any]:
    """The same by operations of torch, which wait for nothing."""
    import torch

    highest = torch.maximum(log_a, log_b)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weight_a, weight_b = torch.exp(log_a - highest), torch.exp(log_b - highest)
    total = weight_a + weight_b
    out: Any = 0
    for part, weight in (a, weight_a), (b, weight_b):
        share = (weight / total).masked_fill(weight == 0, 0)[..., None]
        if swapped:
            share = share.transpose(1, 2)
        out = out + torch.where(share == 0, 0, share * part)
    return out.to(a.dtype).contiguous(), highest + torch.log(total)


def _check_dtypes(a: Strided, log_a: Strided, b: Strided, log_b: Strided) -> None:
    if a.dtype not in FLOATS or b.dtype != a.dtype:
        expected = f"one of {', '.join(FLOATS)}"
        raise TypeError(f"out_a and out_b must both be {expected}, got {a.dtype} and {b.dtype}")
    if log_a.dtype not in ("float32", "float64") or log_b.dtype != log_a.dtype:
        got = f"{log_a.dtype} and {log_b.dtype}"
        raise TypeError(f"lse_a and lse_b must both be float32 or float64, got {got}")


def _check_shapes(a: Strided, log_a: Strided, b: Strided, log_b: Strided) -> None:
    if len(a.shape) != 4 or a.shape != b.shape:
        raise ValueError(f"out_a and out_b must have the same 4 axes, got shapes {a.shape} and {b.shape}")
    if not log_a.shape == log_b.shape == a.shape[:3]:
        raise ValueError(
            f"lse_a and lse_b must have shape (batch, heads, length) = {a.shape[:3]}, "
            f"got {log_a.shape} and {log_b.shape}"
        )
