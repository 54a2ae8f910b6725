"""Compiles the Hopper kernels by the functions that launch them, and prints a line of JSON for each.

PYTHONPATH=tests:tests/gpu python tests/gpu/hopper_binaries.py CALL ...
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from aot import pretend
from binaries import describe, disassembled, loops_of_products
from jobs import TARGETS


class Shape(NamedTuple):
    """A call of 8 heads and 2 of keys, on 4096 queries."""

    launcher: str
    head_dim: int
    rule: str  # causal or full
    keys: int
    dtype: str

    @classmethod
    def parse(cls, name: str) -> Shape:
        """Read a name as in ``forward-d128-causal-1024-bfloat16``."""
        launcher, dim, rule, keys, dtype = name.split("-")
        return cls(launcher, int(dim[1:]), rule, int(keys), dtype)


def launch(shape: Shape) -> None:
    """Call what launches the kernels, with tensors that have no memory."""
    from fastattn.gpu import hopper
    from fastattn.gpu.call import Call, Gradients
    from fastattn.problem import UNBOUNDED

    def make(heads: int, rows: int) -> torch.Tensor:
        return torch.empty(2, heads, rows, shape.head_dim, dtype=getattr(torch, shape.dtype), device="cuda")

    with FakeTensorMode():
        query, key, value = make(8, 4096), make(2, shape.keys), make(2, shape.keys)
        right = 0 if shape.rule == "causal" else UNBOUNDED
        call = Call(
            query, key, value, None, None, None, None, 0, UNBOUNDED, right, None, None, 0.0, 0.1, 0.0, 0, 0
        )
        lse = torch.empty(query.shape[:3], device="cuda")
        if shape.launcher == "forward":
            hopper.forward(call, query, lse)
        else:
            hopper.backward(call, query, lse, query, None, Gradients(query, key, value))


def exponentials_under_products(code: str) -> list[int]:
    """How many exp2 there are from each wait that leaves one product to the next that leaves none."""
    counts, here = [], None
    for instruction, operands in re.findall(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", code):
        if instruction.startswith("MUFU.EX2") and here is not None:
            here += 1
        elif instruction.startswith("WARPGROUP.DEPBAR"):
            left = re.search(r"0x(\d)", operands)
            assert left is not None, operands
            if left[1] == "0" and here is not None:
                counts.append(here)
            here = 0 if left[1] == "1" else None
    return counts


def local_memory_in_loops(code: str) -> int:
    """How many loads and stores of spilled registers there are in loops over blocks."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for loop in loops_of_products(code) for line in loop)


def report(kernel: Any) -> dict[str, Any]:
    """What `describe` says, and what only these kernels have."""
    code = disassembled(kernel)
    return describe(kernel) | {
        "local memory in loops": local_memory_in_loops(code),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR", code)),
        "exp2 under products": exponentials_under_products(code),
        "setmaxnreg": sorted(
            {int(number) for number in re.findall(r"setmaxnreg\S*\s+(\d+)", kernel.asm["ptx"])}
        ),
        "fences": kernel.asm["ptx"].count("fence.proxy.async"),
    }


def main(names: list[str]) -> None:
    plain = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = plain(self, *arguments, grid=grid, warmup=True, **options)
        if "mbarrier" in kernel.asm["ptx"]:
            print(json.dumps({"kernel": self.__name__} | report(kernel)), flush=True)

    JITFunction.run = run
    pretend(TARGETS["sm90"])
    for name in names:
        launch(Shape.parse(name))


if __name__ == "__main__":
    main(sys.argv[1:])
