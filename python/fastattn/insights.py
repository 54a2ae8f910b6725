"""What attention looks at, without the matrix of weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastattn.arrays import Array, as_autocast, is_inlined, is_tensor, type_name, without_graph
from fastattn.backends.base import InsightBackend
from fastattn.dispatch import AUTOMATIC, candidates, choose, composing
from fastattn.outputs import InsightOutputs, prepare_insight
from fastattn.problem import AttentionProblem, Causal, Layout, Window, check_dropout_p
from fastattn.vectors import check_integer, is_integer


class Insight(NamedTuple):
    """What each query looks at; see `insight`."""

    keys: Array  # (B, Hq, Lq, top_k), int64
    weights: Array  # (B, Hq, Lq, top_k)
    entropy: Array  # (B, Hq, Lq)
    key_mass: Array  # (B, Hq, Lk)
    output: Array | None  # (B, Hq, Lq, Dv), or (B, Lq, Hq, Dv)
    distance_mass: Array | None  # (B, Hq, len(distances) + 1)


def insight(
    query: Array,
    key: Array,
    value: Array | None = None,
    *,
    causal: Causal = False,
    window: Window | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    kv_lengths: Any = None,
    kv_starts: Any = None,
    query_lengths: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    query_offset: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    layout: Layout = "bhsd",
    top_k: int = 8,
    distances: Sequence[int] | None = None,
    backend: str | None = None,
) -> Insight:
    r"""What each query looks at: its strongest keys, its entropy, and what every key receives.

    With the weights :math:`p_{ij}` of `attention`, :math:`\sum_j p_{ij} = 1`, but never all of them at once:
    memory grows with ``Lq * top_k + Lk``, and time is about that of `attention`.

    Parameters
    ----------
    query : array, shape (B, Hq, Lq, D)
    key : array, shape (B, Hkv, Lk, D)
    value : array, shape (B, Hkv, Lk, Dv), optional
        Without it there is no output, and half of the products are spared.
    causal, window, mask, bias, kv_lengths, kv_starts, query_lengths, segment_ids, query_offset, alibi_slopes
        As in `attention`, and so are sinks, softcap, scale and layout.
    dropout_p : float
        0: weights are those before dropout, which a look should not depend on. `dropout_seed` and
        `dropout_offset` are taken, and change nothing.
    top_k : int
        Keys to return of each query, at least 1; may be more than there are.
    distances : sequence of integers, optional
        Rising edges ``e_0 < e_1 < ...`` of buckets of the distance ``i + offset - j``, by which key ``j``
        lies before query ``i`` (negative: behind it).
    backend : {"cpu", "reference", "math"}, optional
        As in `attention`. Tensors on a GPU go by "math": operations of torch, some queries at a time.

    Returns
    -------
    Insight
        A named tuple. Axes are (B, Hq, ...) in every layout but for `output`; floats, but for `output`, are
        float32, or float64 for float64 inputs. Tensors carry no graph.

        - `keys`, int64, (B, Hq, Lq, top_k): the keys of largest weight, strongest first, of equal ones the
          lower first; -1 where fewer are visible.
        - `weights`, (B, Hq, Lq, top_k): theirs; 0 where there is no key.
        - `entropy`, (B, Hq, Lq): :math:`-\sum_j p_{ij} \log p_{ij}` in nats: 0 for a query that looks at one
          key, :math:`\log n` for one that looks at n alike. A sink counts as one more key, whose weight is
          what the others leave. A query that sees nothing has 0.
        - `key_mass`, (B, Hq, Lk): :math:`\sum_i p_{ij}`, what each key receives from all queries; what
          methods that evict keys from a cache go by [1]_.
        - `output`: that of `attention` without dropout, in the layout of `query`, or None.
        - `distance_mass`, (B, Hq, len(distances) + 1), or None: the weight of all pairs below ``e_0``, from
          ``e_0`` to below ``e_1``, and so on; the last has ``e_last`` and beyond.

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `attention`, and ValueError for dropout, a `top_k` below 1, or `distances` that do not rise.
    NotImplementedError
        If no backend can run the call.

    Notes
    -----
    Scores that are NaN are no key's; the weights and the entropy of such a query are NaN. The bits of a
    result do not depend on threads.

    References
    ----------
    .. [1] Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
       Models", 2023.

    Examples
    --------
    >>> import numpy as np, fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> query, key = rng.standard_normal((2, 1, 2, 5, 8)).astype(np.float32)
    >>> look = fa.insight(query, key, causal=True, top_k=2)
    >>> look.keys[0, 0, 0], look.weights[0, 0, 0].round(4)  # the first query sees itself alone
    (array([ 0, -1]), array([1., 0.], dtype=float32))
    >>> look.key_mass.sum(-1).round(4)  # of five queries
    array([[5., 5.]], dtype=float32)
    """
    if check_dropout_p(dropout_p) > 0:
        raise ValueError(f"insight tells weights before dropout: dropout_p must be 0, got {dropout_p}")
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "mask": mask,
        "bias": bias,
        "kv_lengths": kv_lengths,
        "kv_starts": kv_starts,
        "query_lengths": query_lengths,
        "segment_ids": segment_ids,
        "query_offset": query_offset,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "softcap": softcap,
        "scale": scale,
        "dropout_seed": dropout_seed,
        "dropout_offset": dropout_offset,
        "layout": layout,
    }
    arguments = (
        query,
        key,
        value,
        options,
        check_integer("top_k", top_k, least=1),
        check_distances(distances),
        backend,
    )
    if is_inlined():  # a compiler of torch, which cannot look into the kernels
        from fastattn.torch_ops import uncompiled

        return cast("Insight", uncompiled.run(_look, *arguments))
    return _look(*arguments)


def _look(
    query: Array,
    key: Array,
    value: Array | None,
    options: dict[str, Any],
    top_k: int,
    edges: NDArray[np.int64] | None,
    backend: str | None,
) -> Insight:
    names = candidates(backend)
    if names is AUTOMATIC and is_tensor(query) and not query.is_cpu:
        names = ("math",)
    with_out = value is not None
    if value is None:
        value = key[..., :1] if getattr(key, "ndim", 0) else key  # it has the axes of one, and is not read
    with without_graph():
        if is_tensor(query):
            query, key, value, options["bias"] = as_autocast(query, key, value, options["bias"])
        composed = composing(names) is not None
        problem = AttentionProblem.from_arguments(query, key, value, **options, composed=composed)
        chosen = choose(problem, names)
        if not hasattr(chosen, "run_insight"):
            raise NotImplementedError(f"backend {chosen.name!r} gives no insight: see backend='math'")
        outputs = prepare_insight(problem, top_k, None if edges is None else len(edges), with_out)
        cast("InsightBackend", chosen).run_insight(problem, outputs, edges)
    return _returned(outputs)


def _returned(outputs: InsightOutputs) -> Insight:
    return Insight(*(None if view is None else view.array for view in outputs))


def check_distances(distances: Any) -> NDArray[np.int64] | None:
    """Return them as an array, (edges,); raise unless they are integers that rise."""
    if distances is None:
        return None
    if isinstance(distances, str) or not isinstance(distances, (Sequence, np.ndarray)):
        raise TypeError(f"distances must be a sequence of integers, got {type_name(distances)}")
    for edge in distances:
        if not is_integer(edge):
            raise TypeError(f"distances must hold integers, got {type_name(edge)}")
    edges = [int(edge) for edge in distances]
    if any(after <= before for before, after in pairwise(edges)):
        raise ValueError(f"distances must rise from edge to edge, got {edges}")
    if any(abs(edge) >= 2**62 for edge in edges):
        raise ValueError(f"distances must be within 62 bits, got {edges}")
    return np.array(edges, np.int64)
