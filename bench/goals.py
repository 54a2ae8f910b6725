"""The marks that the project has set itself on a CPU: what a figure must reach, and what it should.

Ratios are asked of any machine, shares of a ceiling only of two cores of a Zen 4, where they were set. The
marks on a GPU are in `gpu_check.targets`, and each record of `make gpu-check` has those of its day.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bench import tables
from bench.results import Row, Run

AIM, MUST, SHORT, BELOW = "aim", "must", "short", "below aim"  # below aim: nothing must be reached
VERDICTS = (AIM, MUST, SHORT, BELOW)


@dataclass(frozen=True)
class Goal:
    """What rows are about, whom they are held against, and how much of it they must and should reach."""

    suite: str
    cases: str  # names of rows, as `fnmatch` reads them, with spaces between
    dtypes: str
    of: str  # peers (the best), one's name, base, share of the ceiling, seconds of a call, reading, attention
    must: float | None
    aim: float | None
    isa: str = ""  # of the machine; "": any

    @property
    def title(self) -> str:
        return f"{self.cases} {'/'.join(self.dtypes.split())}".strip()

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.of in ("seconds", "reading", "attention")

    def about(self, suite: str, case: str, dtype: str, isa: str) -> bool:
        """Whether a row is judged by it."""
        return (
            suite == self.suite
            and self.isa in ("", isa)
            and dtype in self.dtypes.split()
            and any(fnmatchcase(case.replace(" ", "_"), pattern) for pattern in self.cases.split())
        )

    def verdict(self, reached: float) -> str:
        """One of `VERDICTS`, of the figure as it is printed; "" for what was not measured."""
        if math.isnan(reached):
            return ""
        reached = round(reached, 7 if self.of == "seconds" else 2)
        for mark, word in ((self.aim, AIM), (self.must, MUST)):
            if mark is not None and (reached <= mark if self.at_most else reached >= mark):
                return word
        return BELOW if self.must is None else SHORT

    def text(self, value: float | None) -> str:
        """A mark, or what was reached, in the unit of the goal."""
        if value is None or math.isnan(value):
            return "-"
        if self.of == "seconds":
            return f"{1e6 * value:.1f} µs"
        return f"{value:.0%}" if self.of == "share" else f"{value:.2f}x"


_ZEN4 = "avx512_bf16"
_ALL, _HALVES = "float32 bfloat16 float16", "bfloat16 float16"
_TOKEN = "decode-32x8-s8192 decode-32x32-s8192 decode-28x4-s8192"

GOALS = (
    Goal("prefill", "prefill-d64-s2048", "float32 float16", "share", 0.83, 0.92, _ZEN4),
    Goal("prefill", "prefill-d64-s2048-causal", "float32 float16", "share", 0.78, 0.88, _ZEN4),
    Goal("prefill", "prefill-d128-s2048", "float32 float16", "share", 0.87, 0.94, _ZEN4),
    Goal("prefill", "prefill-d128-s2048-causal", "float32 float16", "share", 0.82, 0.91, _ZEN4),
    Goal("prefill", "prefill-d64-s2048", "bfloat16", "share", 0.78, 0.88, _ZEN4),
    Goal("prefill", "prefill-d64-s2048-causal", "bfloat16", "share", 0.73, 0.84, _ZEN4),
    Goal("prefill", "prefill-d128-s2048", "bfloat16", "share", 0.83, 0.92, _ZEN4),
    Goal("prefill", "prefill-d128-s2048-causal", "bfloat16", "share", 0.78, 0.88, _ZEN4),
    Goal("prefill", "prefill-d64-s512 prefill-d128-s512", "float32 bfloat16", "share", 0.74, 0.86, _ZEN4),
    Goal("prefill", "prefill-*-s512-causal", "float32 bfloat16", "share", 0.65, 0.78, _ZEN4),
    Goal(
        "prefill", "prefill-d80-s2048 prefill-d96-s2048 prefill-d256-s2048 prefill-*-s1000",
        "float32 bfloat16", "share", 0.70, 0.82, _ZEN4,
    ),
    Goal("prefill", "prefill-d32-s2048", "float32", "share", 0.70, 0.80, _ZEN4),
    Goal("prefill", "prefill-d32-s2048", "bfloat16", "share", 0.60, 0.68, _ZEN4),
    Goal("prefill", "*", "float32", "peers", 1.0, 1.15),
    Goal("prefill", "*", "bfloat16", "peers", 1.0, 1.3),
    Goal("prefill", "*", "float16", "peers", 1.0, None),
    Goal("prefill", "prefill-d64-s2048*", "float64", "torch", 1.0, 1.3),
    Goal("masks", "window-256-s8192", "float32", "share", 0.62, 0.74, _ZEN4),
    Goal("masks", "bool-mask", "float32", "base", 0.94, 0.98),
    Goal("masks", "float-bias", "float32", "base", 0.91, 0.96),
    Goal("masks", "causal-as-mask", "float32", "base", 0.95, 1.0),
    Goal("masks", "softcap", "float32", "base", 0.90, 0.93),
    Goal("masks", "alibi", "float32", "base", 0.88, 0.95),
    Goal("masks", "sinks", "float32", "base", 0.97, 1.0),
    Goal("tiers", "prefill-*-s2048_avx2", "float32", "share", 0.78, 0.86),
    Goal("tiers", "prefill-*-s2048_avx2", _HALVES, "base", 0.95, 1.0),
    Goal("threads", "*", _ALL, "base", 1.85, 1.97),
    Goal("small", "micro-1x12x16x32", "float32", "torch", 1.8, 3.0),
    Goal("small", "micro-1x12x64x32 micro-4x12x64x32", "float32", "torch", 2.0, 2.8),
    Goal("small", "micro-1x8x128x64", "float32", "torch", 1.5, 1.8),
    Goal("small", "micro-1x32x1x128", "float32", "torch", 1.0, 1.5),
    Goal("small", "micro-1x1x1x64", "float32", "seconds", 8e-6, 5e-6),
    Goal("small", "micro-1x1x1x64_numpy", "float32", "seconds", 6e-6, 3e-6),
    Goal("backward", "prefill-d64-s2048_backward", "float32", "torch", 1.4, 1.6),
    Goal("backward", "prefill-d64-s2048-causal_backward", "float32", "torch", 1.7, 1.9),
    Goal("backward", "prefill-d128-s2048_backward", "float32", "torch", 1.2, 1.3),
    Goal("backward", "prefill-d128-s2048-causal_backward", "float32", "torch", 1.4, 1.55),
    Goal("backward", "prefill-*-s2048*_backward", "bfloat16", "torch", 1.6, 2.1),
    Goal("backward", "prefill-*-s2048*_backward", "float16", "torch", 1.5, 2.0),
    Goal("backward", "prefill-*-s2048_backward", "float32", "share", 0.80, 0.90, _ZEN4),
    Goal("backward", "prefill-*-s2048-causal_backward", "float32", "share", 0.76, 0.87, _ZEN4),
    Goal("backward", "prefill-*-s2048_backward", "bfloat16", "share", 0.76, 0.86, _ZEN4),
    Goal("backward", "prefill-*-s2048-causal_backward", "bfloat16", "share", 0.73, 0.84, _ZEN4),
    Goal("backward", "prefill-*-s512_backward", "bfloat16", "share", 0.70, 0.82, _ZEN4),
    Goal("backward", "prefill-*-s512-causal_backward", "bfloat16", "share", 0.63, 0.77, _ZEN4),
    Goal("backward", "prefill-d64-s4096*_backward", "float32", "share", 0.73, 0.84, _ZEN4),
    Goal("training", "prefill-d64-s4096*_training", "float32", "torch", 1.5, 2.0),
    Goal("training", "prefill-gqa-32x8_training", "bfloat16", "torch", 1.5, 2.5),
    Goal("decode", _TOKEN, _ALL, "share", 0.86, 0.95, _ZEN4),
    Goal("decode", _TOKEN, "float32", "vllm", 1.25, 1.4),
    Goal("decode", _TOKEN, _HALVES, "vllm", 1.4, 1.7),
    Goal("decode", "decode-32x8-s8192", "bfloat16", "torch", 15.0, 25.0),
    Goal("decode", "decode-8-sequences-*", "bfloat16", "share", 0.75, 0.90, _ZEN4),
    Goal("decode", "cache-int8-*", "bfloat16", "base", 1.6, 1.9),
    Goal("decode", "queries-8-s8192", "bfloat16", "vllm", 1.7, 2.8),
    Goal("decode", "decode-32x8-s64", "float32 bfloat16", "torch", 1.0, 2.0),
    Goal("ragged", "varlen-*", "float32 bfloat16", "base", 1 / 1.15, 1.0),
    Goal("generation", "8000", "float32 bfloat16", "reading", 1.3, 1.1),
    Goal("generation", "8000", "float32 bfloat16", "sdpa", None, 2.0),
    Goal("insight", "D*", "float32 bfloat16", "attention", 1.6, 1.25),
)  # fmt: skip


def goals_of(suite: str, case: str, dtype: str, isa: str) -> list[Goal]:
    """The goals that a row is judged by."""
    return [goal for goal in GOALS if goal.about(suite, case, dtype, isa)]


def reached(goal: Goal, run: Run, row: Row) -> float:
    """What a row reached of it; NaN where it was not measured."""
    found = run.figures(row, "fastattn")
    if found is None:
        return math.nan
    if goal.of == "share":
        return found.share if row.quotes_ceiling and found.share else math.nan
    if goal.of == "base":
        return run.of_base(row, "fastattn")
    if goal.of == "seconds":
        return found.seconds
    peers = [name for name in run.peers() if name != "fastattn"] if goal.of == "peers" else [goal.of]
    return tables.best_peer(run, row, peers)[1]
