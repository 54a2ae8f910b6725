"""Whether an output is right: the float64 oracle, and how far from it a dtype may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn import reference
from fastattn.problem import AttentionProblem
from tests.gradients import differentiate
from tests.shapes import Case

# Of max|v|, for everything that is computed in float32; the tests hold each shape to tighter bounds.
_FLOAT32 = 2e-6
# Mantissa bits and smallest exponent of the half precisions, and what we round P by.
_HALVES = {"bfloat16": (7, -126, 2.0**-8), "float16": (10, -14, 0.0)}
# Peers promise nothing; twice the bound with P rounded to any half precision still finds a wrong call.
_PEER_SLACK, _PEER_ROUNDING = 2.0, 2.0**-8
# Root mean square of the error over that of the output: it says in what precision a peer has computed. At
# S512 and S2048 on randn, peers that keep theirs are at 5e-7, 2e-4 to 5e-4, and 2.3e-3 (torch, ONNX Runtime,
# OpenVINO); one that takes float16 and computes in less is at 4e-3 (zentorch).
PRECISION = {"float64": 1e-12, "float32": 2e-5, "float16": 1.2e-3, "bfloat16": 1e-2}
# Of a gradient, over its largest element: as in the tests.
_LARGEST = {"float64": 1e-12, "float32": 4e-6, "float16": 3e-3, "bfloat16": 2e-2}
# Pairs that are checked in full; of larger calls, eight strips of rows.
_ALL_PAIRS, _STRIPS, _STRIP_ROWS = 1 << 26, 8, 64
_PIECE = 1 << 22  # scores held at a time


@dataclass(frozen=True)
class Verdict:
    """`status` is right, lower (precision than asked) or wrong; `why` says how."""

    status: str
    error: float  # largest
    relative: float  # root mean square, over that of the output
    why: str = ""


@dataclass(frozen=True)
class Truth:
    """The float64 answer in the rows that are checked, and the largest errors allowed to each element."""

    dtype: str
    rows: np.ndarray
    out: np.ndarray  # (B, Hq, rows, Dv)
    bound: np.ndarray  # of fastattn
    peer_bound: np.ndarray

    def judge(self, out: np.ndarray, peer: str) -> Verdict:
        """Hold a whole output, (B, Hq, Lq, Dv), against the truth."""
        checked = np.asarray(out, np.float64)
        if checked.ndim != 4 or (*checked.shape[:2], checked.shape[3]) != (
            *self.out.shape[:2],
            self.out.shape[3],
        ):
            return Verdict("wrong", float("inf"), float("inf"), f"shape {out.shape}")
        difference = abs(checked[:, :, self.rows] - self.out)
        if not np.isfinite(difference).all():
            return Verdict("wrong", float("inf"), float("inf"), "NaN or infinity")
        error, relative = float(difference.max(initial=0)), _relative(difference, self.out)
        bound = self.bound if peer == "fastattn" else self.peer_bound
        if (difference <= bound).all() and relative <= PRECISION[self.dtype]:
            return Verdict("right", error, relative)
        if peer != "fastattn" and (reached := _lower(self.dtype, relative)):
            return Verdict("lower", error, relative, reached)
        excess = float((difference / np.maximum(bound, 1e-300)).max())
        return Verdict("wrong", error, relative, f"off by {error:.1e}, {excess:.1f} times what is allowed")


@dataclass(frozen=True)
class Answers:
    """Whole float64 arrays by name, and the errors allowed to each of them."""

    arrays: dict[str, np.ndarray]
    dtype: str
    relative: float  # root mean square, over that of the array
    largest: float = float("inf")  # over the array's largest element, or 1

    def judge(self, given: dict[str, np.ndarray], peer: str) -> Verdict:
        """Hold what a peer gave against the truth; the worst array counts, and the largest error of any."""
        verdicts = [self._judge(name, given[name], peer) for name in self.arrays]
        ranks = ("right", "lower", "wrong")
        worst = max(verdicts, key=lambda verdict: (ranks.index(verdict.status), verdict.relative))
        return replace(worst, error=max(verdict.error for verdict in verdicts))

    def _judge(self, name: str, array: np.ndarray, peer: str) -> Verdict:
        expected = self.arrays[name]
        if array.shape != expected.shape or not np.isfinite(array).all():
            return Verdict(
                "wrong", float("inf"), float("inf"), f"{name}: shape {array.shape}, NaN or infinity"
            )
        difference = abs(array - expected)
        error, relative = float(difference.max(initial=0)), _relative(difference, expected)
        allowed = self.largest * max(1.0, float(abs(expected).max(initial=0)))
        slack = 1.0 if peer == "fastattn" else _PEER_SLACK
        if error <= slack * allowed and relative <= self.relative:
            return Verdict("right", error, relative)
        if peer != "fastattn" and (reached := _lower(self.dtype, relative)):
            return Verdict("lower", error, relative, f"{name}: {reached}")
        why = f"{name}: off by {error:.1e}, relatively {relative:.1e}"
        return Verdict("wrong", error, relative, why)


def _lower(dtype: str, relative: float) -> str:
    """In which lower precision such an error would be right, in words; "" where in none."""
    reached = next((name for name, limit in PRECISION.items() if relative <= limit), "")
    lower = reached and PRECISION[reached] > PRECISION[dtype]
    return f"computes {dtype} no better than {reached}" if lower else ""


def _relative(difference: np.ndarray, out: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(out**2))) if out.size else 0.0
    return float(np.sqrt(np.mean(difference**2))) / max(size, 1e-300) if size else 0.0


def gradients(case: Case, dtype: str, mode: str) -> Answers:
    """Differentiate the oracle on inputs rounded to `dtype`; of training, its output too."""
    grads = differentiate(*case.tensors(dtype), case.grad_out(dtype), **case.options(dtype))._asdict()
    if mode == "backward":
        del grads["out"]
    return Answers(grads, dtype, PRECISION[dtype], _LARGEST[dtype])


def truth(case: Case, dtype: str) -> Truth:
    """Run the oracle on what the inputs hold after rounding to `dtype`."""
    query, key, value = case.tensors(dtype)
    options = case.options(dtype)
    heads, masses, rows = [], [], checked_rows(case)
    for piece in np.array_split(rows, max(1, len(rows) * case.seqlen_k // _PIECE)):
        # Adjacent rows are one call; strips are calls of their own.
        for strip in np.split(piece, np.flatnonzero(np.diff(piece) > 1) + 1):
            out, mass = _attend(case, query, key, value, options, int(strip[0]), int(strip[-1]) + 1)
            heads.append(out)
            masses.append(mass)
    out, mass = np.concatenate(heads, axis=2), np.concatenate(masses, axis=2)
    largest = float(abs(value.astype(np.float64)).max())
    return Truth(dtype, rows, out, *_bounds(dtype, out, mass, largest))


def checked_rows(case: Case) -> np.ndarray:
    """All query rows, or strips from the first to the last where the scores are too many."""
    if np.prod(case.scores_shape) <= _ALL_PAIRS or case.seqlen_q <= _STRIPS * _STRIP_ROWS:
        return np.arange(case.seqlen_q)
    starts = np.linspace(0, case.seqlen_q - _STRIP_ROWS, _STRIPS).astype(int)
    return (starts[:, None] + np.arange(_STRIP_ROWS)).ravel()


def _attend(
    case: Case, query: Any, key: Any, value: Any, options: dict[str, Any], start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """The oracle on query rows [start, stop): out, and sum_j p_ij |v_j|, what rounding P is measured by."""
    offset = 0 if case.causal == "top_left" else case.seqlen_k - case.seqlen_q
    part = {
        **options,
        "causal": bool(case.causal),
        "query_offset": options.get("query_offset", offset) + start,
    }
    for name in ("mask", "bias"):
        if name in part and part[name].shape[-2] == case.seqlen_q:
            part[name] = part[name][..., start:stop, :]
    problem = AttentionProblem.from_arguments(query[:, :, start:stop], key, value, **part)
    out, mass = np.empty(problem.out_shape), np.empty(problem.out_shape)
    group = case.query_heads // case.kv_heads
    for (b, h), head in reference.each_head(problem):
        out[b, h] = head.out
        mass[b, h] = head.weights @ abs(value[b, h // group].astype(np.float64))
    return out, mass


def _bounds(dtype: str, out: np.ndarray, mass: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Of fastattn, which promises them, and of peers."""
    if dtype == "float64":
        bound = np.full_like(out, 1e-13 * max(1.0, largest))
        return bound, _PEER_SLACK * bound
    bound = np.full_like(out, _FLOAT32 * largest)
    if dtype not in _HALVES:
        return bound, _PEER_SLACK * bound
    bits, smallest, rounding = _HALVES[dtype]
    _, exponent = np.frexp(out)
    half_ulp = np.ldexp(0.5, np.maximum(exponent - 1, smallest) - bits)
    bound = bound + half_ulp + rounding * mass
    return bound, _PEER_SLACK * (bound + _PEER_ROUNDING * mass)
