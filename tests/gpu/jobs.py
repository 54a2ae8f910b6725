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
    atomic: bool = False  # a backward that adds dQ up as it comes

    def __str__(self) -> str:
        return f"{self.launcher}-{self.case}-{self.dtype}{'-atomic' if self.atomic else ''}"


ALL = ("mask", "bias", "kv_lengths", "query_offset", "alibi_slopes", "sinks")
DIMS = (32, 64, 96, 128, 256)
LONG = {"keys": 1 << 15, "batch": 1}


def _case(dim: int, features: str, rows: int = 256, keys: int = 1024, batch: int = 2) -> Case:
    shape = Case(f"d{dim}-{features}", rows, keys, dim, dim, batch, 8, 2, causal=features == "causal")
    if features == "all":
        return replace(shape, causal=True, window=(100, 0), softcap=3.0, arrays=ALL)
    return shape


def _jobs(
    launcher: str, dims: tuple[int, ...], kinds: dict[str, tuple[str, ...]], **shape: int
) -> tuple[Job, ...]:
    """`kinds` has features for each dtype."""
    return tuple(
        Job(launcher, _case(dim, features, **shape), dtype, 0.1 if features == "all" else 0.0)
        for dim in dims
        for dtype, wanted in kinds.items()
        for features in wanted
    )


JOBS = {
    str(job): job
    for job in (
        *_jobs("forward", DIMS, {"bfloat16": ("full", "causal", "all"), "float32": ("causal", "all")}),
        *_jobs("forward", (64, 128), {"float16": ("full", "causal")}),
        *_jobs("decode", (64, 128, 256), {"bfloat16": ("full", "all"), "float32": ("full",)}, rows=1, **LONG),
        *_jobs("decode", (128,), {"bfloat16": ("causal",)}, rows=16, **LONG),
        *_jobs("weights", (64, 128, 256), {"bfloat16": ("causal", "all"), "float32": ("all",)}),
    )
}
# What every run of the tests compiles: the calls that most programs make.
QUICK = tuple(
    f"{launcher}-d128-{kind}-bfloat16"
    for launcher, kind in (("forward", "full"), ("forward", "causal"), ("decode", "full"))
)
QUICK_TARGETS = ("sm90", "gfx942")
