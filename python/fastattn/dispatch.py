"""Which backend runs a call. Nothing falls back in silence: a backend that is passed over has its reasons."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple, cast

from fastattn.arrays import Array, type_name
from fastattn.backends import plain
from fastattn.backends.base import Backend, CachingBackend, ComposingBackend, DifferentiableBackend
from fastattn.backends.cpu import CpuBackend
from fastattn.backends.math import MathBackend
from fastattn.backends.reference import ReferenceBackend
from fastattn.backends.triton import TritonBackend
from fastattn.problem import AttentionProblem

COMPOSING: dict[str, ComposingBackend] = {"math": MathBackend()}
BACKENDS: dict[str, Backend] = {
    "cpu": CpuBackend(),
    "triton": TritonBackend(),
    "reference": ReferenceBackend(),
    **COMPOSING,
}
AUTOMATIC = ("cpu", "triton")  # in order of preference; any other runs only when named


class Choice(NamedTuple):
    """The backend that runs a call, if any can, and why each of the others does not."""

    backend: Backend | None
    refusals: dict[str, list[str]]


def candidates(name: Any) -> tuple[str, ...]:
    """Return the backends to try, in order: the named one, or the automatic ones.

    Raises
    ------
    TypeError, ValueError
        If `name`, or ``FASTATTN_BACKEND`` where `name` is None, is no backend's name.
    """
    if name is None:
        return _default_candidates()
    if not isinstance(name, str):
        raise TypeError(f"backend must be a name or None, got {type_name(name)}")
    return _named("backend", name)


# Compilers of torch call it and keep the answer, rather than look into it.
candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def composing(names: tuple[str, ...]) -> ComposingBackend | None:
    """Return the backend of `names` if it composes operations of torch; such a one is always alone."""
    return COMPOSING.get(names[0])


def run_plain(
    query: Array,
    key: Array,
    value: Array,
    causal: bool,
    scale: float | None,
    bshd: bool,
    return_lse: bool = False,
    kv_lengths: Any = None,
) -> Any:
    """Run a call with no other arguments the short way; None where it has to go the long one."""
    if _default_candidates() is not AUTOMATIC:
        return None
    return plain.attend(query, key, value, causal, scale, bshd, return_lse, kv_lengths)


def run_cached(*arguments: Any) -> Any:
    """Run a call over caches the short way, see `plain.attend_cached`; None where it has to go the long."""
    if _default_candidates() is not AUTOMATIC:
        return None
    return plain.attend_cached(*arguments)


def choose(problem: AttentionProblem, names: tuple[str, ...]) -> Backend:
    """Return the first of the backends `names` that can run `problem`.

    Raises
    ------
    NotImplementedError
        If none can, with every backend's reasons.
    """
    for name in names:
        backend = BACKENDS[name]
        if not backend.supports(problem):
            return backend
    refusals = consider(problem, names).refusals.items()
    reasons = [f"  {name}: {'; '.join(why)}" for name, why in refusals]
    raise NotImplementedError("\n".join(["no backend can run this call:", *reasons]))


def choose_differentiable(problem: AttentionProblem, names: tuple[str, ...]) -> DifferentiableBackend:
    """Return the first of the backends `names` that can run `problem`, and go back through it.

    Raises
    ------
    NotImplementedError
        If none can, with every backend's reasons.
    """
    backend = choose(problem, names)
    if not hasattr(backend, "run_backward"):
        raise NotImplementedError(
            f"backend {backend.name!r} computes no gradients: call it under torch.no_grad(), or with "
            "backend='cpu' or 'math'"
        )
    return cast("DifferentiableBackend", backend)


def choose_caching(problem: AttentionProblem, names: tuple[str, ...]) -> CachingBackend:
    """Return the first of the backends `names` that can run `problem`, and write into its caches.

    Raises
    ------
    NotImplementedError
        If none can, with every backend's reasons.
    """
    backend = choose(problem, names)
    if not hasattr(backend, "update_cache"):
        raise NotImplementedError(f"backend {backend.name!r} writes into no caches: see backend='math'")
    return cast("CachingBackend", backend)


def consider(problem: AttentionProblem, names: tuple[str, ...]) -> Choice:
    """Ask every backend, and keep the reasons."""
    chosen: Backend | None = None
    refusals: dict[str, list[str]] = {}
    for name in (*names, *(other for other in BACKENDS if other not in names)):
        if name not in names:
            refusals[name] = ["not asked for" if name in AUTOMATIC else f"runs only as backend={name!r}"]
        elif reasons := BACKENDS[name].supports(problem):
            refusals[name] = reasons
        elif chosen is None:
            chosen = BACKENDS[name]
        else:
            refusals[name] = [f"{chosen.name} comes first"]
    return Choice(chosen, refusals)


@cache
def _default_candidates() -> tuple[str, ...]:
    name = os.environ.get("FASTATTN_BACKEND")  # read once, like every variable of fastattn
    return _named("FASTATTN_BACKEND", name) if name else AUTOMATIC


def _named(source: str, name: str) -> tuple[str, ...]:
    if name not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"{source}={name!r} is unknown; expected one of {known}")
    return (name,)
