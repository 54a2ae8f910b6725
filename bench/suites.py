"""What is measured: suites of cases, by name. The shapes are those of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.shapes import FEW_QUERIES, MICRO, PREFILL, Case


@dataclass(frozen=True)
class Job:
    """One row of a table."""

    case: Case
    dtype: str

    @property
    def reads(self) -> bool:
        """Whether reading K and V, not arithmetic, is what limits it."""
        return self.case.seqlen_q == 1 and self.case.seqlen_k >= 1024

    @property
    def kv_bytes(self) -> int:
        itemsize = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        case = self.case
        return case.batch * case.kv_heads * case.seqlen_k * (case.head_dim + case.value_dim) * itemsize

    def __str__(self) -> str:
        return f"{self.case.name} {self.dtype}"


def _jobs(cases: Sequence[Case], *dtypes: str) -> list[Job]:
    return [Job(case, dtype) for dtype in dtypes for case in cases]


_FEW = [case for case in FEW_QUERIES if case.seqlen_q in (1, 8, 63)]

SUITES: dict[str, list[Job]] = {
    "prefill": _jobs(PREFILL, "float32", "bfloat16", "float16"),
    "small": [*_jobs(MICRO, "float32"), *_jobs(_FEW, "float32", "bfloat16")],
}


def select(suite: str, patterns: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Job]:
    """Jobs of `suite` whose case matches one of `patterns` (as ``*d64*``), in one of `dtypes`; empty: all.

    Raises ValueError, with the names there are, for a name that fits nothing.
    """
    if suite not in SUITES:
        raise ValueError(f"no suite {suite!r}; there are: {', '.join(SUITES)}")
    jobs = SUITES[suite]
    for pattern in patterns:
        if not any(fnmatchcase(job.case.name, pattern) for job in jobs):
            names = dict.fromkeys(job.case.name for job in jobs)
            raise ValueError(f"no case {pattern!r} in {suite!r}; there are:\n  " + "\n  ".join(names))
    for dtype in dtypes:
        if all(dtype != job.dtype for job in jobs):
            there = ", ".join(dict.fromkeys(job.dtype for job in jobs))
            raise ValueError(f"no dtype {dtype!r} in {suite!r}; there are: {there}")
    return [
        job
        for job in jobs
        if (not patterns or any(fnmatchcase(job.case.name, pattern) for pattern in patterns))
        and (not dtypes or job.dtype in dtypes)
    ]
