"""The one place where the meaning of an attention call is validated and made canonical."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from fastattn import vectors
from fastattn.arrays import FLOATS, NUMPY, Array, ArrayLibrary, Strided, is_tensor, library_of, type_name
from fastattn.vectors import Shape, Vector, check_integer, is_integer

Causal: TypeAlias = bool | Literal["bottom_right", "top_left"]
Layout: TypeAlias = Literal["bhsd", "bshd"]
Window: TypeAlias = tuple[int | None, int | None]

UNBOUNDED = 1 << 62  # a window bound that never cuts; the same in csrc/params.h


class AttentionProblem(NamedTuple):
    """One attention call, validated: axes in the order (B, H, L, D) whatever the layout, defaults filled in.

    Query ``i`` of batch ``b`` stands at the key position ``p = i + query_offset[b]``. It attends to the keys
    ``j`` with ``p - window_left <= j <= p + window_right``, ``kv_starts[b] <= j < kv_lengths[b]``, its own
    segment, a true mask and a bias above -inf; if ``i < query_lengths[b]``, else to none. The causal rule is
    ``window_right = 0``.

    With `cu_seqlens` the batch is 1 and its rows are those of S sequences, one behind the other: `sequences`
    has the calls that they are. A sequence's numbers, query_offset and alibi_slopes, are then S.
    """

    library: ArrayLibrary
    layout: Layout
    query: Strided  # (B, Hq, Lq, D)
    key: Strided  # (B, Hkv, Lk, D)
    value: Strided  # (B, Hkv, Lk, Dv)
    mask: Strided | None  # (B, Hq, Lq, Lk), bool, strides of 0 where broadcast
    bias: Strided | None  # (B, Hq, Lq, Lk), query's dtype or float32, strides of 0 where broadcast
    kv_lengths: Vector | None  # (B,), int64
    query_offset: int | Vector  # one for the whole batch, or (B,), int64
    window_left: int
    window_right: int
    alibi_slopes: Vector | None  # (B, Hq), float64; on a GPU as given
    sinks: Vector | None  # (Hq,), float64
    softcap: float  # 0: none
    scale: float
    dropout_p: float = 0.0
    dropout_seed: Any = None  # 64 bits; on a GPU a tensor, (), int64, or a number; None: `seeded` draws it
    dropout_offset: int = 0  # of 32 bits
    alibi_slopes_given: Any = None  # as they came, for a backend that differentiates
    sinks_given: Any = None
    kv_starts: Vector | None = None  # (B,), int64
    query_lengths: Vector | None = None  # (B,), int64
    segment_ids: tuple[Vector, Vector] | None = None  # (B, Lq) and (B, Lk), int64
    cu_seqlens: tuple[Vector, Vector] | None = None  # (S + 1,) of queries and of keys, int64
    max_seqlens: tuple[int | None, int | None] = (None, None)  # bounds of their differences, where known
    first_sequence: int = 0  # dropout counts sequences from here
    block_table: Strided | None = None  # (B, slots), integers: which page holds the keys of a slot
    page_size: int = 0  # with a block table key and value are (pages, Hkv, page_size, D or Dv)
    # float32, key's shape but for D: key and value are 8-bit numbers, times this
    key_scale: Strided | None = None
    value_scale: Strided | None = None

    @classmethod
    def from_arguments(
        cls,
        query: Array,
        key: Array,
        value: Array,
        *,
        causal: Causal = False,
        window: Window | None = None,
        mask: Array | None = None,
        bias: Array | None = None,
        kv_lengths: Any = None,
        query_offset: Any = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float = 0.0,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: Any = None,
        dropout_offset: int = 0,
        layout: Layout = "bhsd",
        kv_starts: Any = None,
        query_lengths: Any = None,
        segment_ids: Any = None,
        cu_seqlens: tuple[Any, Any] | None = None,
        max_seqlens: tuple[Any, Any] = (None, None),
        composed: bool = False,
    ) -> AttentionProblem:
        """Validate the arguments of `fastattn.attention`, whose docstring says what they mean.

        `cu_seqlens`, `max_seqlens`: those of `fastattn.attention_varlen`, whose rows are then a batch of 1.
        `composed`: the backend composes operations of torch: tensors may be on any device and in any graph.
        """
        library = library_of("query", query, composed=composed)
        q, k, v = views(library, query, key, value, layout)
        batch, heads, seqlen_q, head_dim = q.shape
        seqlen_k = k.shape[2]
        scores = (batch, heads, seqlen_q, seqlen_k)
        top_left = check_causal(causal)
        left, right = (UNBOUNDED, UNBOUNDED) if window is None else check_window(window)
        sequences = batch
        if cu_seqlens is not None:
            cu_seqlens = vectors.cu_seqlens(library, cu_seqlens, seqlen_q, seqlen_k)
            max_seqlens = checked_max_seqlens(max_seqlens, cu_seqlens)
            sequences = cu_seqlens[0].shape[0] - 1
        if query_offset is not None:
            query_offset = vectors.query_offset(library, query_offset, sequences)
        elif top_left or cu_seqlens is None:
            query_offset = 0 if top_left else seqlen_k - seqlen_q
        else:
            starts_q, starts_k = cu_seqlens
            query_offset = (starts_k[1:] - starts_k[:-1]) - (starts_q[1:] - starts_q[:-1])
        return cls(
            library,
            layout,
            q,
            k,
            v,
            None if mask is None else mask_view(library, mask, scores),
            None if bias is None else bias_view(library, bias, q.dtype, scores),
            _counts("kv_lengths", "key's", library, kv_lengths, batch, seqlen_k),
            query_offset,
            left,
            0 if causal else right,  # right >= 0, so the causal rule is always the tighter one
            None if alibi_slopes is None else vectors.alibi_slopes(library, alibi_slopes, sequences, heads),
            None if sinks is None else vectors.sinks(library, sinks, heads),
            check_softcap(softcap),
            1.0 / math.sqrt(head_dim) if scale is None else check_real("scale", scale),
            check_dropout_p(dropout_p),
            None if dropout_seed is None else _seed(library, dropout_seed),
            check_word("dropout_offset", dropout_offset, 32),
            alibi_slopes,
            sinks,
            _counts("kv_starts", "key's", library, kv_starts, batch, seqlen_k),
            _counts("query_lengths", "query's", library, query_lengths, batch, seqlen_q),
            None
            if segment_ids is None
            else vectors.segment_ids(library, segment_ids, batch, seqlen_q, seqlen_k),
            cu_seqlens,
            max_seqlens,
        )

    def seeded(self) -> AttentionProblem:
        """Draw the seed of dropout where it is needed and was not given."""
        if self.dropout_p == 0 or self.dropout_seed is not None:
            return self
        return self._replace(dropout_seed=self.library.draw_seed(self.query.array))

    def with_own_vectors(self) -> AttentionProblem:
        """The same, with copies of what lies on a GPU and may be written to before a backward reads it."""
        if self.library.on_host:
            return self
        names = (
            "kv_lengths",
            "kv_starts",
            "query_lengths",
            "query_offset",
            "alibi_slopes",
            "sinks",
            "dropout_seed",
        )
        given = {name: getattr(self, name) for name in names}
        copies = {name: x.clone() for name, x in given.items() if hasattr(x, "clone")}
        for name in "segment_ids", "cu_seqlens":
            pair = getattr(self, name)
            copies[name] = pair and tuple(x.clone() if hasattr(x, "clone") else x for x in pair)
        return self._replace(**copies)

    def without_tensors(self) -> AttentionProblem:
        """The same rules with nothing that keeps a tensor alive."""
        none = Strided(None, self.dtype, (), (), 0)
        return self._replace(
            query=none, key=none, value=none, mask=None, bias=None, alibi_slopes_given=None, sinks_given=None
        )

    def with_tensors(
        self, query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None
    ) -> AttentionProblem:
        """The same rules for tensors that have been validated before, in the caller's layout."""
        view = self.library.view
        q, k, v = view("query", query), view("key", key), view("value", value)
        if self.layout == "bshd":
            q, k, v = q.swap_heads_and_rows(), k.swap_heads_and_rows(), v.swap_heads_and_rows()
        problem = self._replace(query=q, key=k, value=v)
        scores = problem.scores_shape
        return problem._replace(
            mask=None if mask is None else _broadcast("mask", view("mask", mask), scores),
            bias=None if bias is None else _broadcast("bias", view("bias", bias), scores),
        )

    def sequences(self) -> Iterator[tuple[slice, AttentionProblem]]:
        """The rows of queries of each sequence behind the other, and the call of batch 1 that it is.

        A call without `cu_seqlens` is yielded whole. Not for one whose cu_seqlens stay on a GPU.
        """
        if self.cu_seqlens is None:
            yield slice(None), self
            return
        starts_q, starts_k = (starts.tolist() for starts in self.cu_seqlens)
        offsets = np.broadcast_to(self.query_offset, len(starts_q) - 1)
        tensors = self.query.array, self.key.array, self.value.array
        slopes, given = self.alibi_slopes, self.alibi_slopes_given
        for s in range(len(starts_q) - 1):
            rows, keys = slice(*starts_q[s : s + 2]), slice(*starts_k[s : s + 2])
            part = self._replace(
                cu_seqlens=None,
                first_sequence=s,
                query_offset=int(offsets[s]),
                alibi_slopes=None if slopes is None else slopes[s : s + 1],
                alibi_slopes_given=given if np.ndim(given) < 2 else given[s : s + 1],
            )
            query, key, value = (
                x[:, r] if self.layout == "bshd" else x[:, :, r]
                for x, r in zip(tensors, (rows, keys, keys), strict=True)
            )
            yield rows, part.with_tensors(query, key, value, None, None)

    @property
    def sequence_count(self) -> int:
        """How many sequences there are, of a batch or one behind the other."""
        count: int = self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens[0].shape[0] - 1
        return count

    @property
    def dtype(self) -> str:
        """Of query, key, value, out and weights."""
        return self.query.dtype

    @property
    def lse_dtype(self) -> str:
        """Of the log-sum-exp."""
        return "float64" if self.query.dtype == "float64" else "float32"

    @property
    def seqlen_k(self) -> int:
        """Lk: with pages, as many keys as the slots of a sequence hold."""
        return self.key.shape[2] if self.block_table is None else self.block_table.shape[1] * self.page_size

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Lk)."""
        batch, heads, seqlen_q, _ = self.query.shape
        return batch, heads, seqlen_q, self.seqlen_k

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Dv)."""
        batch, heads, seqlen_q, _ = self.query.shape
        return batch, heads, seqlen_q, self.value.shape[3]


def views(
    library: ArrayLibrary, query: Array, key: Array, value: Array, layout: Layout
) -> tuple[Strided, Strided, Strided]:
    """Query, key and value in the order (B, H, L, D), with agreeing dtypes and shapes."""
    check_layout(layout)
    q, k, v = library.view("query", query), library.view("key", key), library.view("value", value)
    if q.dtype not in FLOATS:
        raise TypeError(f"query must be one of {', '.join(FLOATS)}, got {q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        axes = "(batch, heads, length, dim)" if layout == "bhsd" else "(batch, length, heads, dim)"
        got = f"{len(q.shape)}, {len(k.shape)} and {len(v.shape)}"
        raise ValueError(f"query, key and value must have 4 axes {axes}, got {got}")
    if layout == "bshd":
        q, k, v = q.swap_heads_and_rows(), k.swap_heads_and_rows(), v.swap_heads_and_rows()
    _check_shapes(q.shape, k.shape, v.shape)
    return q, k, v


def check_layout(layout: Layout) -> None:
    """Raise TypeError or ValueError unless `layout` is one of the two."""
    if not isinstance(layout, str):
        raise TypeError(f"layout must be 'bhsd' or 'bshd', got {type_name(layout)}")
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', got {layout!r}")


def _check_shapes(query: Shape, key: Shape, value: Shape) -> None:
    """Raise ValueError unless (B, Hq, Lq, D), (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv) fit together."""
    batch, heads, _, dim = query
    key_batch, kv_heads, seqlen_k, key_dim = key
    value_batch, value_heads, seqlen_v, value_dim = value
    if not batch == key_batch == value_batch:
        got = f"{batch}, {key_batch} and {value_batch}"
        raise ValueError(f"query, key and value must have one batch size, got {got}")
    if kv_heads != value_heads or seqlen_k != seqlen_v:
        got = f"{kv_heads} heads of length {seqlen_k} and {value_heads} heads of length {seqlen_v}"
        raise ValueError(f"key and value must have the same heads and length, got {got}")
    if dim != key_dim:
        raise ValueError(f"query and key must have one head dimension, got {dim} and {key_dim}")
    if not dim or not value_dim:
        got = f"{dim} for query and {value_dim} for value"
        raise ValueError(f"head dimensions must be at least 1, got {got}")
    if not heads or not kv_heads or heads % kv_heads:
        got = f"{heads} and {kv_heads}"
        raise ValueError(f"query's heads must be a positive multiple of key's heads, got {got} (see layout)")


def check_causal(causal: Any) -> bool:
    """Whether the diagonal starts at key 0 rather than ends at the last one; raise for no such rule."""
    if isinstance(causal, bool):
        return False
    if not isinstance(causal, (np.bool_, str)):
        raise TypeError(f"causal must be a bool, 'bottom_right' or 'top_left', got {type_name(causal)}")
    if isinstance(causal, str) and causal not in ("bottom_right", "top_left"):
        raise ValueError(f"causal must be a bool, 'bottom_right' or 'top_left', got {causal!r}")
    return causal == "top_left"


def check_window(window: Any) -> tuple[int, int]:
    """Return (left, right), `UNBOUNDED` for None; raise unless both are integers from 0 up, or None."""
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window must be a pair (left, right), got {type_name(window)}")
    if len(window) != 2:
        raise ValueError(f"window must be a pair (left, right), got {len(window)} elements")
    for bound in window:
        if bound is not None and not is_integer(bound):
            raise TypeError(f"window must hold integers or None, got {type_name(bound)}")
        if bound is not None and bound < 0:
            raise ValueError(f"window must hold integers from 0 up, or None, got {tuple(window)}")
    left, right = (UNBOUNDED if bound is None else min(int(bound), UNBOUNDED) for bound in window)
    return left, right


def mask_view(library: ArrayLibrary, mask: Array, shape: Shape) -> Strided:
    """The mask broadcast to (B, Hq, Lq, Lk)."""
    view = library.view("mask", mask)
    if view.dtype != "bool":
        advice = (
            "pass values to add to the scores as `bias`" if view.dtype in FLOATS else "compare with 0 first"
        )
        raise TypeError(f"mask must be bool (True: attend), got {view.dtype}: {advice}")
    return _broadcast("mask", view, shape)


def bias_view(library: ArrayLibrary, bias: Array, dtype: str, shape: Shape) -> Strided:
    """The bias broadcast to (B, Hq, Lq, Lk)."""
    view = library.view("bias", bias)
    if view.dtype not in (dtype, "float32"):
        expected = "float32" if dtype == "float32" else f"{dtype} like query, or float32"
        advice = " (a bool goes to `mask`)" if view.dtype == "bool" else ""
        raise TypeError(f"bias must be {expected}, got {view.dtype}{advice}")
    return _broadcast("bias", view, shape)


def _broadcast(name: str, view: Strided, shape: Shape) -> Strided:
    expanded = view.broadcast_to(shape)
    if expanded is None:
        raise ValueError(
            f"{name} must broadcast to (batch, query heads, queries, keys) = {shape}, got shape {view.shape}"
        )
    return expanded


def _counts(
    name: str, whose: str, library: ArrayLibrary, given: Any, batch: int, length: int
) -> Vector | None:
    return None if given is None else vectors.counts(name, whose, library, given, batch, length)


def checked_max_seqlens(
    given: tuple[Any, Any], cu_seqlens: tuple[Vector, Vector]
) -> tuple[int | None, int | None]:
    """Return them as integers; raise unless no sequence is longer, as far as its length may be looked at."""
    for name, bound, starts in zip(("max_seqlen_q", "max_seqlen_k"), given, cu_seqlens, strict=True):
        if bound is None:
            continue
        if not is_integer(bound):
            raise TypeError(f"{name} must be an integer or None, got {type_name(bound)}")
        longest = int(np.diff(starts).max(initial=0)) if isinstance(starts, np.ndarray) else 0
        if bound < longest:
            raise ValueError(f"{name} must be at least the longest sequence's {longest}, got {bound}")
    bound_q, bound_k = (None if bound is None else int(bound) for bound in given)
    return bound_q, bound_k


def _seed(library: ArrayLibrary, seed: Any) -> Any:
    if library is NUMPY or not is_tensor(seed):
        return check_word("dropout_seed", seed, 64)
    kept = library.keeps(seed)
    view = library.view("dropout_seed", seed) if kept else library.readable("dropout_seed", seed)
    if view.dtype != "int64" or view.shape != ():
        got = f"{view.dtype} of shape {view.shape}"
        raise TypeError(f"dropout_seed must be an integer, or a tensor of one int64, got {got}")
    return view.array if kept else int(view.read()) % 2**64


def check_softcap(softcap: Any) -> float:
    """Return it as a float; raise unless it is finite and at least 0."""
    value = check_real("softcap", softcap)
    if value < 0:
        raise ValueError(f"softcap must be at least 0 (0: none), got {value}")
    return value


def check_dropout_p(p: Any) -> float:
    """Return it as a float; raise unless it is from 0 to 1."""
    value = check_real("dropout_p", p)
    if not 0 <= value <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {value}")
    return value


def check_word(name: str, value: Any, bits: int) -> int:
    """Return it as an int; raise unless it is an integer of so many bits."""
    number = check_integer(name, value)
    if not 0 <= number < 2**bits:
        raise ValueError(f"{name} must be from 0 to 2**{bits} - 1, got {value}")
    return number


def check_real(name: str, value: Any) -> float:
    """Return it as a float; raise unless it is a finite number."""
    # Named first, float and int spare the slow test of an abstract class.
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a real number, got {type_name(value)}")
    number = float(value)
    if not -math.inf < number < math.inf:  # what a trace of torch can ask of a symbol, too
        raise ValueError(f"{name} must be finite, got {value}")
    return number
