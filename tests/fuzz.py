"""Random calls of `fastattn.attention`: legal ones, right by the oracle; illegal ones, refused by name.

    python tests/fuzz.py legal --calls 20000 --seed 7
    python tests/fuzz.py illegal --calls 20000
    python tests/fuzz.py legal --seed 7 --only 1234         one call again, printed
    python tests/fuzz.py legal --fence end                  every buffer ends where no page is mapped

Call number n of a seed is the same whatever the others are; random_calls.py draws it.
"""

from __future__ import annotations

import argparse
import faulthandler
import re
import secrets
import sys
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

import bounds
import fastattn as fa
from bounds import as_float64
from fences import fenced
from kernels import KERNELS, Kernel
from random_calls import ARGUMENTS, Call, Rng, draw_illegal, draw_legal

RETURNS = ("out", "return_lse", "return_weights", "backend")


def attend(call: Call) -> Any:
    options = dict(call)
    return fa.attention(options.pop("query"), options.pop("key"), options.pop("value"), **options)


def assert_right(kernel: Kernel, call: Call, result: Any) -> None:
    """Types, shapes and memory of the result, and every number within its bound."""
    options = {name: x for name, x in call.items() if name not in RETURNS}
    expected = bounds.expect(options.pop("query"), options.pop("key"), options.pop("value"), **options)
    parts = list(result) if isinstance(result, tuple) else [result]
    assert len(parts) == 1 + call.get("return_lse", False) + call.get("return_weights", False)
    assert all(type(part) is type(call["query"]) for part in parts)
    out = parts.pop(0)
    assert call.get("out") is None or out is call["out"]
    assert out.dtype == call["query"].dtype
    found = as_float64(out).swapaxes(1, 2) if call.get("layout") == "bshd" else as_float64(out)
    assert found.shape == expected.out.shape
    # Sums of equal numbers: every addition rounds alike, and a block's errors add up where they else cancel.
    times, more = (4, 256 * bounds.ROUNDOFF[kernel.dtype]) if holds_equal_numbers(call) else (1, 0)
    allowed = times * bounds.allowed(kernel, expected, sharp=True) + more * expected.mass
    finite = np.isfinite(expected.out)  # junk may be a bias of NaN, or as large as to drown everything
    assert not np.isfinite(found[~finite]).any()
    bounds.assert_within(abs(found - expected.out)[finite], allowed[finite])
    if not finite.all():
        return
    if call.get("return_lse", False):
        allowed = times * bounds.allowed_lse(kernel, expected, sharp=True) + more
        bounds.assert_lse_within(as_float64(parts.pop(0)), expected, allowed)
    if call.get("return_weights", False):
        weights = as_float64(parts.pop(0))
        allowed = times * bounds.allowed_weights(kernel, expected) + more * expected.weights
        bounds.assert_within(abs(weights - expected.weights), allowed)
        assert not weights[expected.weights == 0].any()


def holds_equal_numbers(call: Call) -> bool:
    """Whether a row or a column of query, key or value is one number, repeated by a stride of 0."""
    for name in ("query", "key", "value"):
        tensor, rows = call[name], 1 if call.get("layout") == "bshd" else 2
        strides = tensor.stride() if isinstance(tensor, torch.Tensor) else tensor.strides
        if any(strides[axis] == 0 and tensor.shape[axis] > 1 for axis in (rows, 3)):
            return True
    return False


def check_legal(rng: Rng) -> tuple[Kernel, Call, str]:
    kernel, call = draw_legal(rng)
    try:
        with kernel.forced():
            assert_right(kernel, call, attend(call))
    except Exception as error:
        return kernel, call, f"{type(error).__name__}: {error}"
    return kernel, call, ""


TYPED = (TypeError, ValueError, RuntimeError, MemoryError)
# Changing one of these changes what all others must fit.
SHAPED = {"query", "key", "value", "layout"}


def check_illegal(rng: Rng) -> tuple[Kernel, Call, str]:
    """Right after all, or refused by name."""
    kernel, call, changed = draw_illegal(rng)
    nameable = ARGUMENTS if SHAPED & set(changed) else changed
    try:
        with kernel.forced(), torch.enable_grad():
            result = attend(call)
            if result is None:
                return kernel, call, "returned nothing"
            assert_right(ran_as(kernel, call), call, result)
    except TYPED as error:
        if not any(re.search(rf"\b{name}\b", str(error)) for name in nameable):
            return kernel, call, f"{type(error).__name__} that names none of {changed}: {error}"
    except Exception as error:
        return kernel, call, f"{type(error).__name__}, no type of ours: {error}"
    return kernel, call, ""


def ran_as(kernel: Kernel, call: Call) -> Kernel:
    """The kernel that ran: junk for the tensors may be of another dtype."""
    dtype = str(call["query"].dtype).removeprefix("torch.")
    if dtype == kernel.dtype:
        return kernel
    return next(other for other in reversed(KERNELS) if other.dtype == dtype)


# --- many of them -------------------------------------------------------------------------------------------

CHECKS = {"legal": check_legal, "illegal": check_illegal}


def describe(value: Any) -> str:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        strides = value.stride() if isinstance(value, torch.Tensor) and value.layout == torch.strided else ""
        strides = strides or getattr(value, "strides", "")
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)} strides {strides}"
    return ascii(value)


def fuzz(kind: str, calls: range, seed: int) -> list[str]:
    """Check calls of a kind; a description of each that went wrong."""
    failures = []
    for n in calls:
        kernel, call, fault = CHECKS[kind](np.random.default_rng([seed, n]))
        if fault:
            arguments = [f"    {name} = {describe(value)}" for name, value in call.items()]
            repeat = f"python tests/fuzz.py {kind} --seed {seed} --only {n}"
            failures.append("\n".join([f"{repeat}  ({kernel})", f"    {fault}", *arguments]))
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=CHECKS)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed if not given")
    parser.add_argument("--only", type=int, default=None, help="the number of one call")
    parser.add_argument("--fence", choices=["end", "start"], default=None)
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("error")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    calls = range(options.calls) if options.only is None else range(options.only, options.only + 1)
    print(f"{len(calls)} {options.kind} calls, seed {seed}", flush=True)
    with fenced(options.fence) if options.fence else nullcontext() as fences:
        failures = fuzz(options.kind, calls, seed)
    print("\n".join(failures[:20]))
    reached = "" if fences is None else f", {fences.calls} kernel calls fenced"
    print(f"{len(failures)} of {len(calls)} went wrong{reached}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
