"""What is measured: suites of jobs, by name. Most shapes are those of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from bench import work
from bench.caches import CacheCase
from bench.models import CASES as MODELS
from bench.modules import CASES as MODULES
from bench.programs import Program
from bench.ragged import RaggedCase
from fastattn import _core
from tests import shapes
from tests.shapes import Case

HALVES = ("bfloat16", "float16")
BOTH = ("fastattn", "torch")


@dataclass(frozen=True)
class Job:
    """One row of a table, and the job of fastattn and torch that it is held against, if any."""

    case: Case | Program
    dtype: str
    mode: str = "forward"  # of work.MODES
    library: str = "torch"  # whose arrays fastattn gets
    threads: int = 0  # 0: as many as the run
    isa: str = ""  # "": as the machine chooses
    base: Job | None = None

    @property
    def name(self) -> str:
        parts = [
            self.case.name,
            *([self.mode] if self.mode != "forward" else []),
            *(["numpy"] if self.library == "numpy" else []),
            *([self.isa] if self.isa else []),
        ]
        return " ".join(parts)

    @property
    def reads(self) -> bool:
        """Whether reading K and V, not arithmetic, is what limits it."""
        case = self.case
        one_query = isinstance(case, Case) and case.seqlen_q == 1 and case.seqlen_k >= 1024
        return one_query and self.mode == "forward"

    @property
    def cold(self) -> bool:
        """Whether keys and values are to come from memory: a few queries, as in decoding, over many keys."""
        case = self.case
        few = isinstance(case, Case) and 8 * case.seqlen_q <= case.seqlen_k >= 1024
        return few and self.mode == "forward"

    @property
    def unit(self) -> str:
        if not isinstance(self.case, Case):
            return self.case.unit
        return "GB/s" if self.reads else "GFLOP/s"

    @property
    def work(self) -> float:
        """What one call does, in what `unit` counts a second."""
        if not isinstance(self.case, Case):
            return self.case.work(self.mode)
        done = work.kv_bytes(self.case, self.dtype) if self.reads else work.useful_flops(self.case, self.mode)
        return done / 1e9

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


@dataclass(frozen=True)
class Suite:
    """Jobs, made when asked for, and the peers that take part; none named: all that are installed."""

    about: str
    jobs: Callable[[], list[Job]]
    peers: tuple[str, ...] = ()
    base: str = ""  # what its jobs are held against, in words
    rate: str = "4 D FLOPs a visible query-key pair, or bytes of K and V for one query"


def _jobs(cases: Sequence[Case | Program], *dtypes: str, mode: str = "forward") -> list[Job]:
    return [Job(case, dtype, mode) for dtype in dtypes for case in cases]


def _prefill() -> list[Job]:
    main = (*shapes.PREFILL, *shapes.PREFILL_LONG)
    plain = [case for case in shapes.PREFILL if case.seqlen_q == 2048 and case.head_dim == 64]
    return [
        *_jobs((*main, *shapes.PREFILL_ODD, shapes.TWO_HEAD_SIZES), "float32"),
        *_jobs((*main, *shapes.PREFILL_ODD), "bfloat16"),
        *_jobs(main, "float16"),
        *_jobs(plain, "float64"),
    ]


def _small() -> list[Job]:
    few = [case for case in shapes.FEW_QUERIES if case.seqlen_q in (2, 8, 32)]
    return [
        *_jobs(shapes.MICRO, "float32"),
        Job(shapes.MICRO[0], "float32", library="numpy"),
        *_jobs((*shapes.DECODE_ROWS, *few), "float32", "bfloat16"),
        *_jobs(shapes.DECODE_ROWS[:2], "float16"),
    ]


def _decode() -> list[Job]:
    """Half precision last, whose sweep over queries takes longest."""
    one, ragged = shapes.DECODE_ROWS[:3], shapes.RAGGED
    kept = CacheCase("cache-32x8-s8192", one[1])
    quantised = (
        replace(kept, name=f"cache-{name}-32x8-s8192", kept=name) for name in ("int8", "float8_e4m3fn")
    )
    return [
        *_jobs(one, "float32", *HALVES),
        Job(ragged, "bfloat16"),
        *(Job(case, "bfloat16", base=Job(kept, "bfloat16")) for case in quantised),
        *_jobs([shapes.SHORT_CACHE], "float32", "bfloat16"),
        *_jobs(shapes.FEW_QUERIES, "bfloat16", "float32"),
    ]


def _ragged() -> list[Job]:
    lengths = (8192, *[64] * 63)
    together = RaggedCase("varlen-s8192-and-63-of-s64", lengths)
    apart = RaggedCase("one-by-one", lengths, apart=True)
    return [
        Job(together, dtype, mode, base=Job(apart, dtype, mode))
        for dtype in ("float32", "bfloat16")
        for mode in ("forward", "backward")
    ]


def _masks() -> list[Job]:
    return [
        job
        for dtype in ("float32", "bfloat16")
        for job in (
            *(Job(case, dtype, base=Job(plain, dtype)) for plain, case in shapes.VARIATIONS),
            Job(shapes.WINDOW, dtype),
        )
    ]


def _threads() -> list[Job]:
    cases = [case for case in shapes.PREFILL if case.seqlen_q == 2048]
    return [
        Job(case, dtype, base=Job(case, dtype, threads=1)) for dtype in ("float32", *HALVES) for case in cases
    ]


def _tiers() -> list[Job]:
    """Every tier of the machine; the 16-bit types beside float32 in the same tier."""
    full = {case.name: case for case in shapes.PREFILL if not case.causal}
    jobs = []
    for isa in _core.available_isas():
        # Plain loops take seconds for the larger.
        names = ["prefill-d64-s512"] if isa == "scalar" else ["prefill-d64-s2048", "prefill-d128-s2048"]
        for case in (full[name] for name in names):
            plain = Job(case, "float32", isa=isa)
            jobs += [plain, *(Job(case, dtype, isa=isa, base=plain) for dtype in HALVES)]
    return jobs


def _back(mode: str) -> list[Job]:
    """The backward, or forward and backward: what training asks for."""
    narrow = [case for case in shapes.PREFILL if case.head_dim == 64]
    return [
        *_jobs((*shapes.PREFILL, *shapes.ONE_HEAD), "float32", mode=mode),
        *_jobs((*shapes.PREFILL, shapes.GROUPED), "bfloat16", mode=mode),
        *_jobs(shapes.PREFILL, "float16", mode=mode),
        *_jobs(narrow, "float64", mode=mode),
    ]


def _modules() -> list[Job]:
    return [
        job
        for dtype in ("float32", "bfloat16")
        for mode in ("forward", "training")
        for job in _jobs(MODULES, dtype, mode=mode)
    ]


SUITES = {
    "prefill": Suite("as many queries as keys, from 512 to 8192, all head sizes", _prefill),
    "small": Suite("calls of microseconds, one query, and a few", _small),
    "decode": Suite(
        "one query to 128 over a cache: whole, ragged, quantised, short",
        _decode,
        ("fastattn", "torch", "vllm"),
        "the cache in bfloat16",
    ),
    "ragged": Suite(
        "one long sequence and many short ones in one call, beside a call for each",
        _ragged,
        ("fastattn",),
        "a call for each sequence",
        "4 D FLOPs a visible query-key pair, 10 in the backward",
    ),
    "masks": Suite(
        "masks, biases, softcap, ALiBi, sinks, windows, beside the plain call", _masks, base="the plain call"
    ),
    "threads": Suite("all threads beside one", _threads, BOTH, "one thread"),
    "tiers": Suite(
        "every instruction set of this machine, forced", _tiers, ("fastattn",), "float32 in the same tier"
    ),
    "backward": Suite(
        "gradients alone", lambda: _back("backward"), BOTH, rate="10 D FLOPs a visible query-key pair"
    ),
    "training": Suite(
        "forward and backward", lambda: _back("training"), BOTH, rate="14 D FLOPs a visible query-key pair"
    ),
    "modules": Suite(
        "layers beside those of torch.nn, forward and in training",
        _modules,
        BOTH,
        rate="FLOPs of linear maps and attention; in training, 3 and 3.5 times as many",
    ),
    "models": Suite(
        "real models beside sdpa", lambda: _jobs(MODELS, "float32"), BOTH, rate="thousands of tokens"
    ),
}


def select(suite: str, patterns: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Job]:
    """Jobs of `suite` whose name matches one of `patterns` (as ``*d64*``), in one of `dtypes`; empty: all.

    Raises ValueError, with the names there are, for a name that fits nothing.
    """
    if suite not in SUITES:
        raise ValueError(f"no suite {suite!r}; there are: {', '.join(SUITES)}")
    jobs = SUITES[suite].jobs()
    for pattern in patterns:
        if not any(_matches(job, pattern) for job in jobs):
            names = dict.fromkeys(job.name for job in jobs)
            raise ValueError(f"no case {pattern!r} in {suite!r}; there are:\n  " + "\n  ".join(names))
    for dtype in dtypes:
        if all(dtype != job.dtype for job in jobs):
            there = ", ".join(dict.fromkeys(job.dtype for job in jobs))
            raise ValueError(f"no dtype {dtype!r} in {suite!r}; there are: {there}")
    chosen = [
        job
        for job in jobs
        if (not patterns or any(_matches(job, pattern) for pattern in patterns))
        and (not dtypes or job.dtype in dtypes)
    ]
    if not chosen:
        raise ValueError(f"no row of {suite!r} has both a case and a dtype that were asked for")
    return chosen


def _matches(job: Job, pattern: str) -> bool:
    return fnmatchcase(job.name, pattern) or fnmatchcase(job.case.name, pattern)
