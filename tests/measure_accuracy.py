"""Print the tables of docs/accuracy.md: each kernel's errors against the float64 oracle, beside torch's.

python tests/measure_accuracy.py [forward] [gradients] [saturated] [caches]      all of them by default

That of caches is in docs/quantised-caches.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import bounds
import caches
import fastattn as fa
import gradients
from bounds import Expected, as_float64
from gradients import Errors
from kernels import KERNELS, Kernel
from shapes import GRADIENTS, SATURATED, Case

FULL = Case("randn-1024", 1024, 1024, 64)
CAUSAL = Case("randn-1024-causal", 1024, 1024, 64, causal=True)


def in_units(kernel: Kernel, expected: Expected, error: np.ndarray) -> float:
    """The largest error over roundoff * size * mass; it is the dtype that limits what has 16 bits."""
    unit = bounds.ROUNDOFF[kernel.dtype] * expected.size[..., None] * expected.mass
    return float(np.max(error / unit))


def rule(case: Case) -> str:
    return "causal" if case.causal else "full"


def by_dtype() -> list[Kernel]:
    return sorted(KERNELS, key=lambda kernel: kernel.dtype, reverse=True)


def print_row(kernel: Kernel, case: Case, spread: float) -> None:
    tensors = case.tensors(kernel.dtype, "torch", spread=spread)
    expected = bounds.expect(*tensors, causal=case.causal)
    out, lse = map(as_float64, fa.attention(*tensors, causal=case.causal, return_lse=True))
    peer = scaled_dot_product_attention(*tensors, is_causal=bool(case.causal))
    error, peer_error = abs(out - expected.out), abs(as_float64(peer) - expected.out)
    units = f"{in_units(kernel, expected, error):.1f}" if "16" not in kernel.dtype else ""
    lse_error = np.max(abs(lse - expected.lse) / np.maximum(1, abs(expected.lse)))
    print(
        f"| {kernel.dtype} | {kernel.isa} | {rule(case)} | {spread:g} "
        f"| {error.max():.1e} | {error.mean():.1e} | {peer_error.max():.1e} | {peer_error.mean():.1e} "
        f"| {units} | {lse_error:.0e} |"
    )


def print_forward() -> None:
    print("| dtype | tier | mask | q x | max | mean | torch's max | torch's mean | units | lse |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for kernel in by_dtype():
        with kernel.forced():
            for spread in (1.0, 9.0):
                for case in (FULL, CAUSAL):
                    print_row(kernel, case, spread)


def print_gradients() -> None:
    """Of dQ, dK and dV: the largest error, and the root mean square over that of the gradient."""
    print("| dtype | tier | D | mask | max | relative | torch's max | torch's relative | mean over torch's |")
    print("|---|---|--:|---|---|---|---|---|---|")
    for kernel in by_dtype():
        with kernel.forced():
            for case in GRADIENTS:
                ours, peer = gradients.errors(case, kernel.dtype), gradients.torch_errors(case, kernel.dtype)
                cells = [cell for errors in (ours, peer) for cell in (largest(errors), relative(errors))]
                ratios = ", ".join(f"{o.mean / p.mean:.2f}" for o, p in zip(ours, peer, strict=True))
                print(
                    f"| {kernel.dtype} | {kernel.isa} | {case.head_dim} | {rule(case)} | "
                    + " | ".join([*cells, ratios])
                    + " |"
                )


def largest(errors: Errors) -> str:
    return ", ".join(f"{error.largest:.1e}" for error in errors)


def relative(errors: Errors) -> str:
    return ", ".join(f"{error.relative:.1e}" for error in errors)


def contestants(dtype: str, causal: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every tier, and torch's two ways."""
    for kernel in KERNELS:
        if kernel.dtype == dtype:
            with kernel.forced():
                yield kernel.isa, partial(fa.attention, causal=causal)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            name = backend.name.split("_")[0].lower()
            yield f"torch {name}", partial(scaled_dot_product_attention, is_causal=causal)


def print_saturated() -> None:
    """On numbers uniform in [-9, 9]."""
    print("| dtype | D | mask | who | max | relative |")
    print("|---|--:|---|---|---|---|")
    for dtype in ("float32", "bfloat16", "float16"):
        for case in SATURATED:
            drawn = gradients.drawn(case, dtype, uniform=True)
            for who, attention in contestants(dtype, bool(case.causal)):
                errors = gradients.compare(attention, *drawn)
                print(
                    f"| {dtype} | {case.head_dim} | {rule(case)} | {who} "
                    f"| {largest(errors)} | {relative(errors)} |"
                )


def print_caches() -> None:
    """Of out and lse, over a cache of that dtype, against the float64 oracle on what was appended."""
    print("| cache | bytes a number, D128 | keys | D64: out | D64: lse | D128: out | D128: lse |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for dtype in ("bfloat16", *caches.LARGEST):
        size = 2 if dtype == "bfloat16" else 1 + 4 / 128
        for outliers in (1, 10):
            cells = [cell for dim in (64, 128) for cell in caches.cost(dtype, dim, outliers)]
            keys = "normal" if outliers == 1 else f"one column {outliers} times as large"
            print(f"| {dtype} | {size:.2f} | {keys} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")


TABLES = {
    "forward": print_forward,
    "gradients": print_gradients,
    "saturated": print_saturated,
    "caches": print_caches,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TABLE", help=f"of: {', '.join(TABLES)}")
    names = parser.parse_args().names
    if unknown := set(names) - set(TABLES):
        parser.error(f"TABLE: expected {', '.join(TABLES)}; got {unknown.pop()!r}")
    for name in names or TABLES:
        TABLES[name]()
        print()


if __name__ == "__main__":
    main()
