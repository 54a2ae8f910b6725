"""No loop that multiplies and adds keeps anything on the stack: read off the disassembly of every kernel.

gcc spills without a word; a reload in a loop that should run at the multiply-add ceiling costs some of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from test_build import CSRC, isa_objects, tool_output

MULTIPLY = re.compile(r"vf[n]?m(?:add|sub)\w+|vdpbf16ps|vpdpwssd|tdp\w+")
# An access to memory through the stack pointer, or through the frame pointer where the function has one.
BY_STACK_POINTER = re.compile(r"\(%rsp")
BY_FRAME_POINTER = re.compile(r"\(%rsp|\(%rbp")


class Allowed(NamedTuple):
    """Loops that may refer to the stack, and why that does not matter."""

    tier: str  # regular expressions
    function: str
    most: int  # instructions that do
    why: str


EXCEPTIONS = (
    Allowed(
        ".*",
        r"^dot_tile<RowEngine<",
        2,
        "an address: rows of keys, those fetched ahead and queries need more than the 16 general registers. "
        "It comes from L1 beside keys that come from memory, which set the pace",
    ),
    Allowed(
        ".*",
        r"^dot_held<RowEngine<.*, WordDot, .*>, 3, 8, true, \w+>",
        2,
        "one sum of sixteen, beside 24 vectors of queries: once in 96 products",
    ),
    Allowed(
        "avx2",
        r"^add_rows<RowEngine<.*, 240, 1, 2, \w+>, [12], 1, true, false>",
        45,
        "AVX2 masks no load of less than 32 bits: the last columns are copied in the loop",
    ),
    Allowed(
        "avx2|avx512",
        r"^gradient_extras<",
        2,
        "a constant, and a sum kept in double: what softcap, slopes and incoming weights add, no product",
    ),
    Allowed(
        "avx2|avx512",
        r"^add_block_mass<",
        45,
        "addresses, and the sums of eight keys on their way to memory, once for 32 rows of them",
    ),
    Allowed("amx_bf16", r"^exponentiate_tile<.*, true, 2>", 3, "where dropout's factors lie: an address"),
    Allowed(
        "amx_fp16",
        r"^exponentiate_tile<",
        9,
        "constants and a sum: eight exponentials by two planes of operands, 9 in about 300 instructions",
    ),
)


@dataclass
class Loop:
    """An innermost loop with a multiply-add in it."""

    function: str  # demangled, with template arguments and without parameters
    start: int
    multiplies: int
    stack: list[str] = field(default_factory=list)


@dataclass
class Instruction:
    address: int
    text: str

    @property
    def target(self) -> int | None:
        """Where a jump goes, within its function."""
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", self.text)
        return int(jump[1], 16) if jump else None


def functions(path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and instructions of every function of an object file."""
    listing = tool_output("objdump", "-d", "-C", "--no-show-raw-insn", str(path))
    for part in re.split(r"\n(?=[0-9a-f]+ <)", listing)[1:]:
        header, _, body = part.partition("\n")
        name = re.fullmatch(r"[0-9a-f]+ <(.*)>:", header)
        assert name, header
        lines = re.findall(r"^\s+([0-9a-f]+):\s+(\S.*)$", body, re.MULTILINE)
        yield name[1], [Instruction(int(at, 16), text.split("#")[0]) for at, text in lines]


def blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks in order of address, and the blocks that each can go to."""
    starts = {code[0].address} | {at.target for at in code if at.target is not None}
    starts |= {after.address for at, after in pairwise(code) if re.match(r"j|ret|ud2", at.text)}
    found: list[list[Instruction]] = []
    for at in code:
        if at.address in starts:
            found.append([])
        found[-1].append(at)
    number = {block[0].address: i for i, block in enumerate(found)}
    following = []
    for i, block in enumerate(found):
        last = block[-1]
        leaves = re.match(r"jmp|ret|ud2", last.text)
        targets = [number[last.target]] if last.target in number else []
        following.append(targets + ([] if leaves or i + 1 == len(found) else [i + 1]))
    return found, following


def cycles(nodes: set[int], following: list[list[int]]) -> list[set[int]]:
    """Strongly connected parts of `nodes` that hold a cycle (Tarjan's algorithm, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    parts: list[set[int]] = []
    for root in sorted(nodes):
        work = [(root, iter(following[root]))] if root not in order else []
        while work:
            node, rest = work[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
            for target in rest:
                if target in nodes and target not in order:
                    work.append((target, iter(following[target])))
                    break
                if target in stack:
                    low[node] = min(low[node], order[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    part = set(stack[stack.index(node) :])
                    del stack[stack.index(node) :]
                    if len(part) > 1 or node in following[node]:
                        parts.append(part)
    return parts


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Instructions of every loop without another inside: what cycles, and nothing that leaves."""
    found, following = blocks(code)

    def descend(nodes: set[int]) -> list[set[int]]:
        innermost = []
        for loop in cycles(nodes, following):
            outside = set(range(len(found))) - loop
            entries = {target for i in outside for target in following[i] if target in loop}
            # Without the block by which the loop is entered, what still cycles is a loop within it.
            innermost += descend(loop - {min(entries or loop)}) or [loop]
        return innermost

    return [[at for i in sorted(loop) for at in found[i]] for loop in descend(set(range(len(found))))]


def short_name(name: str) -> str:
    """Without return type, namespaces and parameters: score_tile<Engine<VecF32, float, ...>, ...>."""
    name = name.replace("fastattn::", "").replace("(anonymous namespace)::", "")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"^[\w ]*?(?=\w+<|\w+$)", "", name)


def multiply_loops(path: Path) -> Iterator[Loop]:
    for name, code in functions(path):
        has_frame = any(re.match(r"(?:mov\s+%rsp,%rbp|lea\s+\S+\(%rsp\),%rbp)", at.text) for at in code)
        on_stack = BY_FRAME_POINTER if has_frame else BY_STACK_POINTER
        for loop in innermost_loops(code):
            multiplies = sum(bool(MULTIPLY.match(at.text)) for at in loop)
            if multiplies:
                stack = [at.text for at in loop if on_stack.search(at.text)]
                yield Loop(short_name(name), loop[0].address, multiplies, stack)


@cache
def loops_of(tier: str) -> list[Loop]:
    return [loop for path in isa_objects() if path.parent.name == tier for loop in multiply_loops(path)]


TIERS = sorted(path.parent.name for path in CSRC.glob("isa/*/kernels.cpp"))


@pytest.mark.parametrize("tier", TIERS)
def test_no_multiply_loop_touches_the_stack(tier: str) -> None:
    loops = loops_of(tier)
    assert any(loop.multiplies >= 4 for loop in loops), "no product was found: is the disassembly still read?"
    spilling = [
        f"{loop.function} at {loop.start:#x}, {loop.multiplies} multiply-adds: {loop.stack}"
        for loop in loops
        if loop.stack and not any(covers(exception, tier, loop) for exception in EXCEPTIONS)
    ]
    assert not spilling, "\n".join(spilling)


def covers(exception: Allowed, tier: str, loop: Loop) -> bool:
    named = re.fullmatch(exception.tier, tier) and re.search(exception.function, loop.function, re.IGNORECASE)
    return bool(named) and len(loop.stack) <= exception.most


def test_every_exception_is_needed() -> None:
    """One that no loop needs any more is to go."""
    for exception in EXCEPTIONS:
        assert any(
            loop.stack and covers(exception, tier, loop) for tier in TIERS for loop in loops_of(tier)
        ), exception


def test_a_spill_is_seen() -> None:
    """The reader on a listing of its own: a loop that reloads, around one that does not, and a way out."""
    text = """
        10 mov (%rsp),%rax
        14 vfmadd231ps %zmm0,%zmm1,%zmm2
        18 vfmadd231ps %zmm0,%zmm1,%zmm3
        1c jne 14
        20 vmovaps 0x40(%rsp),%zmm4
        24 jne 10
        28 vmovaps %zmm2,(%rsp)
        2c vfmadd231ps 0x80(%rsp),%zmm1,%zmm2
        30 jg 40
        34 jne 28
        38 mov 0x8(%rsp),%rbx
        3c ret
        40 vmovaps (%rsp),%zmm1
        44 ret
    """
    lines = [line.split(maxsplit=1) for line in text.split("\n") if line.strip()]
    loops = innermost_loops([Instruction(int(at, 16), what) for at, what in lines])
    loops.sort(key=lambda loop: loop[0].address)
    assert [[at.address for at in loop] for loop in loops] == [[0x14, 0x18, 0x1C], [0x28, 0x2C, 0x30, 0x34]]
    stack = [[at.text for at in loop if BY_STACK_POINTER.search(at.text)] for loop in loops]
    assert stack == [[], ["vmovaps %zmm2,(%rsp)", "vfmadd231ps 0x80(%rsp),%zmm1,%zmm2"]]
