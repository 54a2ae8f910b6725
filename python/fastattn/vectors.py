"""Short arguments, a number or a few for each sequence, head or row: copied, and checked by value."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn._flags import flag
from fastattn.arrays import FLOATS, INTEGERS, NUMPY, Array, ArrayLibrary, type_name

# An NDArray of checked values; of a tensor on a GPU that tensor itself, whose values nobody has looked at.
Vector: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]

MAX_OFFSET = 1 << 60  # row + offset + an unbounded window stays within int64


def counts(name: str, whose: str, library: ArrayLibrary, given: Any, batch: int, length: int) -> Vector:
    """One number from 0 to `length`, that of `whose` rows, for each sequence: (B,), int64."""
    values, kept = vector(name, library, given, INTEGERS, [(batch,)])
    wrong = np.flatnonzero((values < 0) | (values > length))
    if wrong.size:
        at = wrong[0]
        raise ValueError(f"{name} must be from 0 to {whose} length {length}, got {values[at]} at index {at}")
    return values.astype(np.int64, order="C") if kept is None else kept


def segment_ids(
    library: ArrayLibrary, given: Any, batch: int, seqlen_q: int, seqlen_k: int
) -> tuple[Vector, Vector]:
    """The segments of queries (B, Lq) and of keys (B, Lk), int64."""
    check_segment_pair(given)
    ids = []
    for at, rows in enumerate((seqlen_q, seqlen_k)):
        name = f"segment_ids[{at}]"
        values, kept = vector(name, library, given[at], INTEGERS, [(batch, rows)])
        if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{name} must be int64, got {values.max()}")
        ids.append(values.astype(np.int64, order="C") if kept is None else kept)
    return ids[0], ids[1]


def check_segment_pair(given: Any) -> None:
    """Raise TypeError or ValueError unless it is two of something, or None."""
    if given is not None and not isinstance(given, (tuple, list)):
        raise TypeError(f"segment_ids must be a pair (query_ids, key_ids), got {type_name(given)}")
    if given is not None and len(given) != 2:
        raise ValueError(f"segment_ids must be a pair (query_ids, key_ids), got {len(given)} elements")


def cu_seqlens(
    library: ArrayLibrary, given: tuple[Any, Any], total_q: int, total_k: int
) -> tuple[Vector, Vector]:
    """Where sequences start among the rows of queries and of keys, and the last ones end: (S + 1,), int64."""
    starts = []
    for name, rows, total in zip(("q", "k"), given, (total_q, total_k), strict=True):
        name = f"cu_seqlens_{name}"
        values, kept = vector(name, library, rows, INTEGERS, None)
        if values.size:
            _check_rising(name, values, total)
        starts.append(values.astype(np.int64, order="C") if kept is None else kept)
    if starts[0].shape != starts[1].shape:
        got = f"{tuple(starts[0].shape)} and {tuple(starts[1].shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have one shape (sequences + 1,), got {got}")
    return starts[0], starts[1]


def _check_rising(name: str, values: NDArray[Any], total: int) -> None:
    """Raise ValueError unless the numbers start at 0, never fall, and end at `total`."""
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]} at index 0")
    falls = np.flatnonzero(values[1:] < values[:-1])
    if falls.size:
        at = falls[0] + 1
        raise ValueError(f"{name} must never fall, got {values[at]} after {values[at - 1]} at index {at}")
    if values[-1] != total:
        at = len(values) - 1
        raise ValueError(f"{name} must end with the number of rows {total}, got {values[-1]} at index {at}")


def query_offset(library: ArrayLibrary, offset: Any, batch: int) -> int | Vector:
    """One key position for all sequences, or one for each, (B,), int64."""
    single = is_integer(offset)
    if single:
        values, kept = np.array(offset), None
    else:
        values, kept = vector("query_offset", library, offset, INTEGERS, [(batch,)])
    for extreme in (int(values.min(initial=0)), int(values.max(initial=0))):
        if abs(extreme) > MAX_OFFSET:
            raise ValueError(f"query_offset must be within 2**60 of 0, got {extreme}")
    if single:
        return int(offset)
    return values.astype(np.int64, order="C") if kept is None else kept


def alibi_slopes(library: ArrayLibrary, slopes: Any, batch: int, heads: int) -> Vector:
    """(B, Hq), float64; on a GPU as given."""
    values, kept = vector("alibi_slopes", library, slopes, FLOATS + INTEGERS, [(heads,), (batch, heads)])
    if not np.isfinite(values).all():
        raise ValueError(f"alibi_slopes must be finite, got {values[~np.isfinite(values)][0]}")
    return np.broadcast_to(values.astype(np.float64), (batch, heads)) if kept is None else kept


def sinks(library: ArrayLibrary, given: Any, heads: int) -> Vector:
    """(Hq,), float64."""
    values, kept = vector("sinks", library, given, FLOATS + INTEGERS, [(heads,)])
    wrong = np.isnan(values) | (values == np.inf)
    if wrong.any():
        raise ValueError(f"sinks must be finite, or -inf for a head without one, got {values[wrong][0]}")
    return values.astype(np.float64) if kept is None else kept


def vector(
    name: str, library: ArrayLibrary, value: Any, dtypes: tuple[str, ...], shapes: list[Shape] | None
) -> tuple[NDArray[Any], Array | None]:
    """Copy a short argument out of an array or a sequence: what is checked then is what a kernel reads.

    `shapes`: those allowed; None: any flat one with an element. A tensor that is kept on its device comes
    back as such, beside the values to check: none, but for ``FASTATTN_DEBUG=1``, since to read them is to
    wait for the device. Kernels stay in bounds with any.
    """
    if isinstance(value, (tuple, list)):
        library, value = NUMPY, _listed(name, value)
    kept = library.keeps(value)
    view = library.view(name, value) if kept else library.readable(name, value)
    if view.dtype not in dtypes:
        expected = "integers" if dtypes is INTEGERS else "real numbers"
        raise TypeError(f"{name} must hold {expected}, got {view.dtype}")
    if shapes is None and (len(view.shape) != 1 or not view.shape[0]):
        raise ValueError(f"{name} must have shape (sequences + 1,), got {view.shape}")
    if shapes is not None and view.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {view.shape}")
    if not kept:
        return view.read(), None
    return library.readable(name, value).read() if flag("FASTATTN_DEBUG") else np.empty(0), view.array


def _listed(name: str, values: Any) -> NDArray[Any]:
    try:
        array = np.array(values)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"{name} must be a flat sequence of numbers: {error}") from error
    return array if array.size else array.astype(np.int64)


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Return it as an int; raise unless it is an integer, from `least` up."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {type_name(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def is_integer(value: Any) -> bool:
    """Whether it is an integer of Python or NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
