"""Print the table of docs/accuracy.md: each kernel's errors against the float64 oracle, beside torch's."""

from __future__ import annotations

import numpy as np
import torch

import bounds
import fastattn as fa
from bounds import Expected, as_float64
from kernels import KERNELS, Kernel
from shapes import Case

FULL = Case("randn-1024", 1024, 1024, 64)
CAUSAL = Case("randn-1024-causal", 1024, 1024, 64, causal=True)


def in_units(kernel: Kernel, expected: Expected, error: np.ndarray) -> float:
    """The largest error over roundoff * size * mass; it is the dtype that limits what has 16 bits."""
    unit = bounds.ROUNDOFF[kernel.dtype] * expected.size[..., None] * expected.mass
    return float(np.max(error / unit))


def print_row(kernel: Kernel, case: Case, spread: float) -> None:
    tensors = case.tensors(kernel.dtype, "torch", spread=spread)
    expected = bounds.expect(*tensors, causal=case.causal)
    out, lse = map(as_float64, fa.attention(*tensors, causal=case.causal, return_lse=True))
    peer = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=bool(case.causal))
    error, peer_error = abs(out - expected.out), abs(as_float64(peer) - expected.out)
    units = f"{in_units(kernel, expected, error):.1f}" if "16" not in kernel.dtype else ""
    lse_error = np.max(abs(lse - expected.lse) / np.maximum(1, abs(expected.lse)))
    print(
        f"| {kernel.dtype} | {kernel.isa} | {'causal' if case.causal else 'full'} | {spread:g} "
        f"| {error.max():.1e} | {error.mean():.1e} | {peer_error.max():.1e} | {peer_error.mean():.1e} "
        f"| {units} | {lse_error:.0e} |"
    )


def main() -> None:
    print("| dtype | tier | mask | q x | max | mean | torch's max | torch's mean | units | lse |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for kernel in sorted(KERNELS, key=lambda kernel: kernel.dtype, reverse=True):
        with kernel.forced():
            for spread in (1.0, 9.0):
                for case in (FULL, CAUSAL):
                    print_row(kernel, case, spread)


if __name__ == "__main__":
    main()
