"""Which calls of kernels are compiled ahead of time, and for which GPUs. Needs neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shapes import Case


@dataclass(frozen=True)
class Target:
    """A kind of GPU."""

    name: str
    backend: str
    arch: int | str
    shared_kib: int  # that one program may have; the compiler does not check it

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(int(self.arch), 10) if self.backend == "cuda" else (9, 4)


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", "cuda", 80, 163),
        Target("sm90", "cuda", 90, 227),
        Target("sm100", "cuda", 100, 227),
        Target("sm120", "cuda", 120, 99),
        Target("gfx942", "hip", "gfx942", 64),
    )
}


@dataclass(frozen=True)
class Job:
    """One call of one of the functions that launch kernels."""

    launcher: str
    case: Case
    dtype: str
    dropout_p: float = 0.0
    tf32: bool = False  # products of float32 rounded
    atomic: bool = False  # a backward that adds dQ up as it comes
    serving: str = ""  # padded, segments, ragged, paged, int8, e4m3, e5m2: what else the call has
    ahead: int = 0  # which of `configs.ahead` it is launched with, counted from 1

    def __str__(self) -> str:
        flags = "-atomic" * self.atomic + "".join(f"-{word}" for word in self.serving.split())
        flags += f"-ahead-{self.ahead}" * bool(self.ahead)
        return f"{self.launcher}-{self.case}-{'tf32' if self.tf32 else self.dtype}{flags}"


ALL = ("mask", "bias", "kv_lengths", "query_offset", "alibi_slopes", "sinks")
DIMS = (64, 128, 256)
WINDOWS = {"window": 100, "wide": 4000}
LONG = {"keys": 1 << 15, "batch": 1}


def _case(dim: int, features: str, rows: int = 256, keys: int = 1024, batch: int = 2) -> Case:
    name = f"d{dim}-{features}" + (f"-{rows}" if rows < 64 else "")
    shape = Case(name, rows, keys, dim, dim, batch, 8, 2, causal=features == "causal")
    if features in WINDOWS:
        return replace(shape, window=(WINDOWS[features], 0))
    if features == "all":
        return replace(shape, causal=True, window=(100, 0), softcap=3.0, arrays=ALL)
    return shape


def _jobs(
    launcher: str,
    dims: tuple[int, ...],
    kinds: dict[str, str],
    *,
    atomic: bool = False,
    serving: str = "",
    **shape: int,
) -> tuple[Job, ...]:
    """`kinds` has features for each dtype."""
    return tuple(
        Job(
            launcher,
            _case(dim, features, **shape),
            "float32" if dtype == "tf32" else dtype,
            0.1 if features == "all" else 0.0,
            dtype == "tf32",
            atomic,
            serving,
        )
        for dim in dims
        for dtype, wanted in kinds.items()
        for features in wanted.split()
    )


FORWARD = {"bfloat16": "full causal window all", "float32": "causal window all", "tf32": "causal window all"}
BACKWARD = {"bfloat16": "causal window all", "float32": "causal all"}
CAUSAL = {"bfloat16": "causal"}
FULL = {"bfloat16": "full"}
JOBS = {
    str(job): job
    for job in (
        *_jobs("forward", DIMS, FORWARD),
        *_jobs("forward", (128,), {"bfloat16": "wide"}, keys=8192),
        *_jobs("forward", (32, 96), {"bfloat16": "all", "float16": "causal"}),
        *_jobs("decode", DIMS, {"bfloat16": "full all", "float32": "full"}, rows=1, **LONG),
        *_jobs("decode", (128,), {"bfloat16": "full"}, rows=8, **LONG),
        *_jobs("decode", (128,), {"bfloat16": "full"}, rows=16, **LONG),
        *_jobs("decode", (128,), {"bfloat16": "full"}, rows=32, **LONG),
        *_jobs("weights", DIMS, {"bfloat16": "all", "float32": "all"}),
        *_jobs("backward", DIMS, BACKWARD),
        *_jobs("backward", (32, 96), {"bfloat16": "all"}),
        *_jobs("backward", (64, 128), CAUSAL, atomic=True),
        *_jobs("forward", DIMS, CAUSAL, serving="ragged"),
        *_jobs("forward", (128,), CAUSAL, serving="padded"),
        *_jobs("forward", (128,), CAUSAL, serving="segments"),
        *_jobs("forward", DIMS, CAUSAL, serving="paged"),
        *_jobs("forward", DIMS, CAUSAL, serving="paged int8"),
        *_jobs("decode", DIMS, FULL, serving="paged", rows=1, **LONG),
        *_jobs("decode", DIMS, FULL, serving="paged int8", rows=1, **LONG),
        *_jobs("decode", (128,), FULL, serving="padded e4m3", rows=1, **LONG),
        *_jobs("decode", (128,), FULL, serving="segments e5m2", rows=1, **LONG),
        *_jobs("backward", (128,), CAUSAL, serving="ragged"),
        *_jobs("backward", (128,), CAUSAL, serving="padded segments"),
        *_jobs("append", (128,), FULL, serving="paged", rows=1, **LONG),
        *_jobs("append", DIMS, FULL, serving="int8", rows=1, **LONG),
        *_jobs("append", (128,), FULL, serving="e4m3", rows=1, **LONG),
        *_jobs("append", (128,), FULL, serving="e5m2", rows=1, **LONG),
    )
}
# What does not ship, and has to be worth a try on a device: on Hopper alone.
AHEAD = {
    str(job): job
    for name in (
        "forward-d64-causal-bfloat16",
        "forward-d128-causal-bfloat16",
        "decode-d128-full-32-bfloat16",
    )
    for number in (1, 2)
    for job in [replace(JOBS[name], ahead=number)]
}
# What the newest Triton is tried with.
NEWEST = tuple(name for name in JOBS if "d128" in name)
# What every run of the tests compiles: the calls that most programs make.
QUICK = (
    "forward-d128-full-bfloat16",
    "forward-d128-causal-bfloat16",
    "decode-d128-full-1-bfloat16",
    "backward-d128-causal-bfloat16",
)
QUICK_TARGETS = ("sm90", "gfx942")
# And a mask beside dropout in the smallest tiles, of which a product once took some columns twice.
QUICK_ONCE = (("sm90", "backward-d64-all-float32"),)
