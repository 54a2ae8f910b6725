"""What a compiled kernel needs and is made of, read from the binary by the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Instructions that tell how a kernel computes: products and the waits for them, copies, spilled registers.
NVIDIA = (
    "HGMMA",
    "WARPGROUP.DEPBAR",
    "HMMA",
    "UTCHMMA",
    "UTCQMMA",
    "LDL",
    "STL",
    "LDGSTS",
    "UTMALDG",
    "UTMASTG",
)
AMD = ("v_mfma", "scratch_load", "scratch_store", "buffer_load", "global_load", "ds_read")


def describe(kernel: Any) -> dict[str, Any]:
    """Registers, shared memory and spills of a kernel, and how often it has which instruction."""
    found = _amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _nvidia(kernel.asm["cubin"])
    found |= {"shared": kernel.metadata.shared}
    too_wide = _too_wide(kernel.asm["ttgir"]) if "cubin" in kernel.asm else []
    return found | {"too wide": too_wide} if too_wide else found


def _too_wide(code: str) -> list[str]:
    """Products whose operands lie so that the four threads of a row hold more columns than there are.

    A thread of `mma.sync` is given kWidth columns next to each other. Where four times as many do not exist,
    threads hold the same ones, and the product counts some twice and others never.
    """
    operand = r"tt\.dot .*: tensor<\d+x(\d+)x\w+, #ttg\.dot_op<\{opIdx = 0, parent = #\w+, kWidth = (\d+)\}>>"
    sizes = {(int(columns), int(width)) for columns, width in re.findall(operand, code)}
    return [f"{width} of {columns}" for columns, width in sorted(sizes) if 4 * width > columns]


def disassembled(kernel: Any) -> str:
    """The instructions of a kernel for an NVIDIA GPU."""
    return _told_by("nvdisasm", "-c", kernel.asm["cubin"])


def loops_of_products(code: str) -> list[list[str]]:
    """The lines of each loop over blocks: it has wide products in it, and no other loop that has.

    Around those a persistent kernel goes over tiles. Unconditional jumps backwards close none: they lead back
    from a wait that was moved to the end.
    """
    lines = code.splitlines()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    jumps = [
        (at, match[1])
        for at, line in enumerate(lines)
        if (match := re.search(r"@!?U?P\d+ BRA `\((\.L_x_\d+)", line))
    ]
    loops = [range(labels[label], at + 1) for at, label in jumps if labels[label] < at]
    loops = [loop for loop in loops if any("HGMMA" in lines[at] for at in loop)]
    inner = [a for a in loops if not any(b[0] in a and b[-1] in a and len(b) < len(a) for b in loops)]
    return [[lines[at] for at in loop] for loop in inner]


def exponentials_beside_no_product(code: str) -> list[int]:
    """How many exp2 each loop over blocks has between the wait for all products and the next of them."""
    counts = []
    for loop in loops_of_products(code):
        count, runs = 0, True  # the product of the turn before
        for line in loop:
            runs = "HGMMA" in line or (runs and "WARPGROUP.DEPBAR" not in line)
            count += "MUFU.EX2" in line and not runs
        counts.append(count)
    return counts


def _nvidia(cubin: bytes) -> dict[str, Any]:
    usage, code = _told_by("cuobjdump", "-res-usage", cubin), _told_by("nvdisasm", "-c", cubin)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    registers, stack, _, local = map(int, numbers.groups())
    return {
        "registers": registers,
        "spilled": stack + local,  # bytes
        "instructions": _count(code, NVIDIA),
    }


def _told_by(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / tool, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _amd(code: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spilled": number("private_segment_fixed_size"),  # bytes
        "spilled registers": number("vgpr_spill_count"),
        "instructions": _count(code, AMD),
    }


def _count(code: str, names: tuple[str, ...]) -> dict[str, int]:
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", code)) for name in names}
    return {name: count for name, count in counts.items() if count}
