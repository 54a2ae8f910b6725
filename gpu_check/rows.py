"""What is timed, most wanted first: a row says what each contestant took, having checked what it computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import work
from gpu_check.checks import LIMITS, WrongError, compare
from gpu_check.contestants import CONTESTANTS, PEERS
from gpu_check.inputs import Inputs, draw_on_device, poison
from gpu_check.reference import Heads
from gpu_check.routes import SkippedError
from gpu_check.timing import Clock, ceilings, host_seconds
from gpu_check.torch_checks import capture
from tests.shapes import Case

TOKENS = 16384  # of a call, in one sequence or several
WIDTH = 2048  # query heads times head_dim
FORWARD = ("portable", "hopper", "cudnn", "flash")
BACKWARD = ("portable", "hopper", "cudnn", "flash")


@dataclass(frozen=True)
class Row:
    """One call, in turns by everyone who can do it."""

    suite: str
    case: Case
    contestants: tuple[str, ...]
    mode: str = "forward"
    dtype: str = "bfloat16"
    graph: bool = False  # timed as a replay of a CUDA graph
    timed: bool = True  # else only compiled and run once

    @property
    def label(self) -> str:
        return " ".join([self.case.name, self.mode, *(["graph"] if self.graph else [])])

    def run(self, device: str, seed: int, backend: str | None) -> dict[str, Any]:
        inputs = draw_on_device(self.case, self.dtype, device, seed)
        truth = self._truth(inputs) if self.timed else None
        found: dict[str, dict[str, Any]] = {}
        runs: dict[str, Callable[[], Any]] = {}
        for name in self.contestants:
            poison(device)
            try:
                run = CONTESTANTS[name](self.case, inputs, self.mode)
                error = self._error(run(), truth)
                runs[name] = capture(run)[0].replay if self.graph and device != "cpu" else run
                found[name] = {"status": "right", "error": error}
            except Exception as reason:
                found[name] = _what_happened(name, reason)
        if self.timed and runs:
            for name, times in _clock(device).in_turns(runs).items():
                found[name] |= asdict(times)
        return {"contestants": found, **self.work()}

    def work(self) -> dict[str, float]:
        """Useful operations and bytes of one call."""
        return {
            "flops": float(work.useful_flops(self.case, self.mode)),
            "bytes": float(work.all_bytes(self.case, self.dtype, self.mode)),
        }

    def _truth(self, inputs: Inputs) -> tuple[Heads, tuple[Tensor, ...]]:
        heads = Heads(self.case, inputs.query, inputs.key, inputs.value)
        if self.mode == "forward":
            return heads, (heads.out(),)
        return heads, heads.gradients(inputs.grad_out)

    def _error(self, results: tuple[Tensor, ...], truth: tuple[Heads, tuple[Tensor, ...]] | None) -> float:
        if truth is None:
            return 0.0
        heads, right = truth
        limit = LIMITS[self.dtype] * (1 if self.mode == "forward" else 2)
        of_query, of_key = heads.of_query(results[0]), [heads.of_key(x) for x in results[1:]]
        names = ("out",) if self.mode == "forward" else ("dquery", "dkey", "dvalue")
        errors = [compare(*each, limit) for each in zip(names, (of_query, *of_key), right, strict=True)]
        if not all(bool(x.isfinite().all()) for x in results):
            raise WrongError("not every element is a finite number")
        return max(errors)


def _what_happened(name: str, reason: Exception) -> dict[str, Any]:
    """A contestant that has no time. What a failed launch leaves of the device is no use to the others."""
    if "CUDA error" in str(reason):
        raise RuntimeError(f"{name}: {reason}") from reason
    if isinstance(reason, WrongError):
        status = "wrong"
    elif name in PEERS or isinstance(reason, (NotImplementedError, SkippedError)):
        status = "refused"
    else:
        status = "failed"
    first = (str(reason).strip().splitlines() or [""])[0]
    return {"status": status, "why": f"{type(reason).__name__}: {first[:200]}"}


@dataclass(frozen=True)
class Ceilings:
    """What the device can give at most."""

    suite: str = "ceilings"
    label: str = "ceilings"
    timed: bool = True

    def run(self, device: str, seed: int, backend: str | None) -> dict[str, Any]:
        if not self.timed:
            return {}
        small = {"size": 256, "copied": 1 << 20} if device == "cpu" else {}
        return {"ceilings": ceilings(_clock(device), **small)}


@dataclass(frozen=True)
class Overhead:
    """What a call costs the host, where the device has next to nothing to do."""

    suite: str = "targets"
    label: str = "overhead-1x8x128x64"
    timed: bool = True

    def run(self, device: str, seed: int, backend: str | None) -> dict[str, Any]:
        import fastattn as fa

        torchs = functional.scaled_dot_product_attention
        tensors = [torch.randn(1, 8, 128, 64, device=device).bfloat16() for _ in range(3)]
        leaves = [x.clone().requires_grad_() for x in tensors]
        incoming = torch.randn_like(tensors[0])
        found: dict[str, dict[str, Any]] = {}
        runs: dict[str, Callable[[], Any]] = {}
        for name, attend in (("fastattn", lambda *x: fa.attention(*x, backend=backend)), ("torch", torchs)):
            there = f"{name} forward", lambda attend=attend: attend(*tensors)
            back = (
                f"{name} there and back",
                lambda attend=attend: torch.autograd.grad(attend(*leaves), leaves, incoming),
            )
            for told, run in (there, back):
                try:
                    run()
                    runs[told], found[told] = run, {"status": "right"}
                except Exception as reason:
                    found[told] = _what_happened(told, reason)
        if self.timed:
            for told, times in host_seconds(runs, device).items():
                found[told] |= asdict(times)
        return {"contestants": found}


@cache
def _clock(device: str) -> Clock:
    return Clock(device)


def square(length: int, dim: int, causal: bool, kv_heads: int = 0, query_heads: int = 0) -> Case:
    """As many sequences of `length` as make up the tokens."""
    heads = query_heads or WIDTH // dim
    told = f"d{dim}-s{length}{'-causal' if causal else ''}{f'-{heads}x{kv_heads}' if kv_heads else ''}"
    return Case(told, length, length, dim, 0, TOKENS // length, heads, kv_heads, causal)


def decoding(queries: int) -> Case:
    """A batch of 8, 64 query heads on 8, 32768 keys each."""
    return Case(f"decode-{queries}", queries, 32768, 128, 0, 8, 64, 8)


WINDOW = Case("d128-s16384-window128", TOKENS, TOKENS, 128, 0, 1, 16, 16, True, (127, 0))
_AHEAD = ("portable", "portable ahead 1", "portable ahead 2", "cudnn", "flash")
_DECODE_AHEAD = ("decode", "decode ahead 1", "decode ahead 2", "flash folded")
_DECODE = ("fastattn", "decode", "cudnn", "flash", "cudnn folded", "flash folded")


def targets() -> list[Any]:
    """What the project has set itself a mark for."""
    every = ("fastattn", *FORWARD, "flex")
    back = ("fastattn", "portable", "portable atomic", "hopper", "cudnn", "flash", "flex")
    return [
        Row("targets", square(8192, 128, False), every),
        Row("targets", square(8192, 128, True), every),
        Row("targets", square(8192, 128, True), back, "backward"),
        Row("targets", WINDOW, ("fastattn", "portable", "flex")),
        Row("targets", decoding(1), _DECODE, graph=True),
        Row("targets", decoding(8), _DECODE, graph=True),
        Overhead(),
    ]


def sweep() -> list[Any]:
    """Every length, head size and rule; those next to the targets first."""
    rows: list[Any] = [Row("decode", decoding(queries), _DECODE, graph=True) for queries in (4, 16)]
    for dim in (128, 64, 256):
        for length in (4096, 16384, 8192, 2048, 1024, 512):
            for mode, contestants in (("forward", FORWARD), ("backward", BACKWARD)):
                for causal in (True, False):
                    rows.append(Row(f"{mode}", square(length, dim, causal), contestants, mode))
        if dim == 128:
            grouped = [square(length, 128, True, 8, 32) for length in (4096, 16384)]
            rows += [Row("grouped", case, FORWARD, "forward") for case in grouped]
            rows += [Row("grouped", case, BACKWARD, "backward") for case in grouped]
    told = {row.label for row in targets()}
    return [*(row for row in rows if row.label not in told), *alternatives()]


def alternatives() -> list[Any]:
    """Tiles that do not ship yet, beside those that do."""
    whole = [square(8192, dim, causal) for dim in (128, 64) for causal in (False, True)]
    few = [decoding(queries) for queries in (8, 16)]
    return [
        *(Row("alternatives", _named(case), _AHEAD) for case in whole),
        *(Row("alternatives", _named(case), _DECODE_AHEAD, graph=True) for case in few),
    ]


def _named(case: Case) -> Case:
    return replace(case, name=f"ahead-{case.name}")


def timed() -> Sequence[Any]:
    """Every row in order."""
    return [Ceilings(), *targets(), *sweep()]


def warm() -> Sequence[Any]:
    """The same rows, in which every contestant is compiled and run once."""
    return [replace(row, timed=False) for row in timed()]


def rehearsal() -> Sequence[Any]:
    """The same rows on few short heads, for a machine without a GPU."""
    return [replace(row, case=_short(row.case)) if isinstance(row, Row) else row for row in timed()]


def _short(case: Case) -> Case:
    length = min(case.seqlen_k, 192)
    kv_heads = 2 if case.kv_heads == case.query_heads else 1
    queries = min(case.seqlen_q, length)
    return replace(case, seqlen_q=queries, seqlen_k=length, batch=1, query_heads=2, kv_heads=kv_heads)
