"""What would run a call, and why nothing else would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.arrays import Array, as_autocast, is_tensor, without_graph
from fastattn.dispatch import candidates, composing, consider
from fastattn.problem import AttentionProblem


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a call would be run; print it."""

    call: str  # dtype and sizes
    backend: str | None  # None: no backend can run it, and the call raises NotImplementedError
    details: Mapping[str, str]  # instruction set, path, threads: what the backend has to say
    refusals: Mapping[str, list[str]]  # why each of the other backends does not run it

    def __str__(self) -> str:
        rows = {"call": self.call, "backend": self.backend or "none can run it", **self.details}
        lines = [f"{title:<8} {text}" for title, text in rows.items()]
        lines += [f"{'not':<8} {name}: {'; '.join(reasons)}" for name, reasons in self.refusals.items()]
        return "\n".join(lines)


def explain(
    query: Array, key: Array, value: Array, *, backend: str | None = None, **options: Any
) -> Explanation:
    """Tell which backend, instruction set and path `attention` would use, without computing anything.

    Parameters
    ----------
    query, key, value, backend, **options
        The arguments of `attention`; an `out` is not looked at.

    Returns
    -------
    Explanation

    Raises
    ------
    TypeError, ValueError, RuntimeError
        What `attention` raises for these arguments, save that a call which no backend can run is explained.

    Examples
    --------
    >>> import numpy as np, fastattn as fa
    >>> query = np.ones((1, 1, 4, 8), np.float32)
    >>> print(fa.explain(query, query, query, backend="reference").backend)
    reference
    """
    for returned in ("return_lse", "return_weights", "out"):  # these choose no backend
        options.pop(returned, None)
    names = candidates(backend)
    composed = composing(names) is not None
    if is_tensor(query):
        query, key, value, options["bias"] = as_autocast(query, key, value, options.get("bias"))
    with without_graph():
        problem = AttentionProblem.from_arguments(query, key, value, composed=composed, **options)
    chosen, refusals = consider(problem, names)
    batch, heads, seqlen_q, head_dim = problem.query.shape
    _, kv_heads, seqlen_k, value_dim = problem.value.shape
    return Explanation(
        f"{problem.dtype} B={batch} Hq={heads} Hkv={kv_heads} Lq={seqlen_q} Lk={seqlen_k} "
        f"D={head_dim} Dv={value_dim}",
        chosen.name if chosen else None,
        chosen.describe(problem) if chosen else {},
        refusals,
    )
