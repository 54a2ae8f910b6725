"""The lists of checks by name, most telling ones first: a list that runs out of time loses its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from gpu_check.checks import Check
from tests import shapes
from tests.shapes import Case


class Item(Protocol):
    """One thing to check."""

    @property
    def label(self) -> str: ...

    def run(self, device: str, seed: int, backend: str | None) -> dict[str, float]:
        """Errors by name. Raises where something is wrong."""


HALVES = ("bfloat16", "float16")
_RULES = (*shapes.OPTIONS, *shapes.LENGTHS)


def enlarged(case: Case, head_dim: int = 0) -> Case:
    """The same rules over several tiles, ragged at the end."""
    dims = {"head_dim": head_dim, "value_dim": head_dim} if head_dim else {}
    longer = {"seqlen_q": 5 * case.seqlen_q + 13, "seqlen_k": 5 * case.seqlen_k + 13}
    return replace(case, name=f"{case.name}-large", **longer, **dims)


def rules(dtype: str, mode: str = "forward") -> list[Check]:
    """Every argument in one dtype, head_dim 128 in bfloat16, 64 in float16, as the case says in float32."""
    dim = {"bfloat16": 128, "float16": 64}.get(dtype, 0)
    plain = [
        Case("plain", 300, 300, 64, query_heads=2),
        Case("causal", 333, 333, 64, query_heads=2, causal=True),
    ]
    first = [Check(enlarged(case, dim), dtype, mode, kernels="portable") for case in plain]
    rest = [Check(enlarged(case, dim), dtype, mode) for case in reversed(_RULES)]
    return [*first, *rest]


def tf32() -> list[Check]:
    """float32 with rounded operands."""
    cases = [Case("plain", 300, 300, 64, query_heads=2), Case("causal", 333, 333, 128, causal=True)]
    return [
        Check(case, "float32", mode, kernels="portable", tf32=True)
        for mode in ("forward", "backward")
        for case in cases
    ]


def atomic() -> list[Check]:
    """The gradient of query added up while those of key and value are made."""
    names = ("causal-mask", "window", "everything", "only-kv_lengths")
    chosen = [enlarged(case, 64) for case in shapes.OPTIONS if case.name in names]
    grouped = Case("atomic", 333, 500, 128, query_heads=8, kv_heads=2, batch=2, causal=True)
    return [
        Check(case, dtype, "backward", kernels="portable", atomic=True)
        for case in (grouped, *chosen)
        for dtype in ("bfloat16", "float32")
    ]


def sizes(mode: str) -> list[Check]:
    """Head dimensions up to 256, groups, tails, nothing at all; and every layout."""
    plain = Case("layouts", 200, 333, 64, query_heads=4, kv_heads=2, batch=2, causal=True)
    layouts = [Check(plain, "bfloat16", mode, layout) for layout in ("bshd", "padded", "unaligned")]
    layouts += [Check(replace(plain, head_dim=128, value_dim=128), "float16", mode, "unaligned")]
    dims = [
        case for case in (*shapes.HEAD_DIMS, *shapes.VALUE_DIMS) if max(case.head_dim, case.value_dim) <= 256
    ]
    small = [*shapes.GROUPS[2::3], *shapes.EMPTY, *shapes.TINY]
    tails = [case for case in shapes.TAILS if case.seqlen_q in (1, 17, 65, 257)]
    dims.sort(key=lambda case: -max(case.head_dim, case.value_dim))
    if mode == "backward":  # five kernels to compile for each size
        dims, tails = dims[::2], tails[::3]
    return [
        *layouts,
        *(Check(case, "bfloat16", mode) for case in (*dims, *small)),
        *(Check(case, "float16", mode) for case in tails),
    ]


def dropout(mode: str) -> list[Check]:
    """The weights that fastattn.philox keeps, and no other."""
    seeds = {"dropout_seed": (1 << 63) + 12345, "dropout_offset": 7}
    case = Case("dropout", 130, 333, 64, batch=2, query_heads=4, kv_heads=2)
    every = next(case for case in shapes.OPTIONS if case.name == "everything")
    weights = mode == "forward"
    return [
        Check(case, dtype, mode, extras={"dropout_p": p, **seeds}, weights=weights)
        for case, dtype, p in (
            (case, "bfloat16", 0.2),
            (replace(case, causal=True), "float16", 0.5),
            (replace(case, seqlen_q=1), "bfloat16", 0.3),
            (enlarged(every), "float32", 0.1),
            (case, "float32", 1.0),
        )
    ]


def weights() -> list[Check]:
    """Probabilities as a result."""
    cases = [enlarged(case, 64) for case in (*shapes.LENGTHS[:2], *shapes.OPTIONS[-4:])]
    cases.append(Case("weights-decode", 1, 777, 128, batch=2, query_heads=8, kv_heads=2))
    return [Check(case, dtype, weights=True) for case in cases for dtype in ("bfloat16", "float32")]


def decode() -> list[Check]:
    """Few queries on many keys."""
    long = [
        Case("decode-splits", 1, 9000, 128, batch=2, query_heads=16, kv_heads=2, causal=True),
        Case(
            "decode-splits-lengths", 1, 9000, 128, batch=5, query_heads=8, kv_heads=1, arrays=("kv_lengths",)
        ),
        Case("decode-splits-8", 8, 5000, 128, batch=2, query_heads=16, kv_heads=2, causal=True),
        Case(
            "decode-splits-16-window", 16, 5000, 64, query_heads=8, kv_heads=2, causal=True, window=(1000, 0)
        ),
        Case("decode-blocks", 40, 3000, 128, query_heads=8, kv_heads=1, causal=True),
        Case("decode-sinks", 4, 3001, 64, batch=2, query_heads=8, kv_heads=2, causal=True, arrays=("sinks",)),
        Case("decode-alibi", 1, 3001, 80, query_heads=8, kv_heads=2, causal=True, arrays=("alibi_slopes",)),
        Case("decode-bias", 3, 2000, 128, query_heads=4, kv_heads=4, arrays=("bias",)),
        Case("decode-mask", 2, 2000, 256, batch=2, query_heads=4, kv_heads=2, arrays=("mask",)),
        Case("decode-softcap", 1, 2000, 128, query_heads=4, kv_heads=1, softcap=5.0),
    ]
    checks = [Check(case, "bfloat16", kernels="decode") for case in long]
    checks += [Check(case, "bfloat16") for case in (*long, *shapes.DECODE)]
    checks += [Check(case, "float16") for case in long[:4]] + [Check(case, "float32") for case in long[:3]]
    return [*checks, Check(long[0], "bfloat16", layout="bshd"), Check(long[0], "bfloat16", layout="padded")]


def hopper(mode: str) -> list[Check]:
    """What the kernels for sm90 take: 16 bit, head_dim 64 and 128, full and causal."""
    sizes = [
        (2, 4, 4, 512, 512),
        (1, 4, 2, 200, 200),
        (2, 4, 1, 333, 777),
        (1, 3, 3, 64, 333),
        (1, 2, 2, 1, 1000),
        (1, 8, 2, 1025, 1025),
        (1, 2, 2, 513, 129),
    ]
    cases = [
        Case(f"hopper-{b}x{hq}x{hkv}x{q}x{k}{causal * '-causal'}", q, k, dim, 0, b, hq, hkv, causal)
        for b, hq, hkv, q, k in sizes
        for dim in (128, 64)
        for causal in (True, False)
    ]
    checks = [Check(case, "bfloat16", mode, kernels="hopper") for case in cases]
    checks += [Check(case, "float16", mode, kernels="hopper") for case in cases[::5]]
    checks += [Check(case, "bfloat16", mode, "bshd", kernels="hopper") for case in cases[:4]]
    return checks


def memory() -> list[Check]:
    """For the checker of memory: ragged sizes, every kernel, few launches."""
    ragged = Case(
        "memory", 77, 133, 72, 40, query_heads=4, kv_heads=2, batch=2, causal=True, arrays=("kv_lengths",)
    )
    few = replace(ragged, name="memory-decode", seqlen_q=1, seqlen_k=1000, arrays=())
    extra = replace(ragged, name="memory-arrays", arrays=("mask", "bias", "sinks", "alibi_slopes"))
    return [
        Check(ragged, "bfloat16", "backward", "padded", kernels="portable"),
        Check(few, "float16", kernels="decode"),
        Check(extra, "float32", "backward", kernels="portable"),
        Check(Case("memory-hopper", 333, 200, 64, query_heads=2, causal=True), "bfloat16", kernels="hopper"),
    ]


def races() -> list[Check]:
    """For the checker of races: kernels that synchronise by hand, at the smallest size."""
    case = Case("races", 256, 256, 64, query_heads=2, causal=True)
    return [Check(case, "bfloat16", mode, kernels="hopper") for mode in ("forward", "backward")]


def torch_checks() -> list[Item]:
    from gpu_check.torch_checks import CHECKS

    return list(CHECKS)


def serving() -> list[Item]:
    from gpu_check import flash
    from gpu_check.serving import CHECKS

    return [*CHECKS, *flash.CHECKS]


def insight() -> list[Item]:
    from gpu_check.looks import CHECKS

    return list(CHECKS)


GROUPS: dict[str, Callable[[], Sequence[Item]]] = {
    "hopper-forward": lambda: hopper("forward"),
    "forward-bfloat16": lambda: rules("bfloat16"),
    "backward-bfloat16": lambda: rules("bfloat16", "backward"),
    "decode": decode,
    "torch": torch_checks,
    "serving": serving,
    "insight": insight,
    "hopper-backward": lambda: hopper("backward"),
    "forward-float32": lambda: rules("float32"),
    "backward-float32": lambda: rules("float32", "backward"),
    "sizes": lambda: sizes("forward"),
    "backward-sizes": lambda: sizes("backward"),
    "dropout": lambda: [*dropout("forward"), *dropout("backward")],
    "weights": weights,
    "tf32": tf32,
    "backward-atomic": atomic,
    "forward-float16": lambda: rules("float16"),
    "backward-float16": lambda: rules("float16", "backward")[1::2],
    "memory": memory,
    "races": races,
}
CHECKERS = ("memory", "races")  # run under one
