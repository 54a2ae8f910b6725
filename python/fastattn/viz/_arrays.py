"""What is drawn, as NumPy arrays whose shapes are known to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

# numpy.ndarray, torch.Tensor or nested lists; torch is not imported for an annotation.
ArrayLike: TypeAlias = Any
FloatArray: TypeAlias = NDArray[np.float64]
Head: TypeAlias = "int | Literal['mean']"


def is_insight(source: Any) -> bool:
    """Whether `source` has the strongest keys of each query, as `fastattn.insight` returns them."""
    return hasattr(source, "keys") and hasattr(source, "weights")


def numbers(name: str, array: ArrayLike) -> FloatArray:
    """`array` in float64; a ValueError unless every number is finite and at least 0."""
    if hasattr(array, "detach"):  # torch, whose bfloat16 NumPy does not know
        array = array.detach().cpu().double().numpy()
    if is_insight(array):
        raise TypeError(
            f"{name}: expected an array of numbers, got {type(array).__name__}, which has not all weights: "
            f"links and page take it, mass takes its key_mass, distance takes it with the same distances"
        )
    try:
        values = np.asarray(array).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {type(array).__name__}") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if values.size and values.min() < 0:
        raise ValueError(
            f"{name}: expected no number below 0, got {values.min():.3g}; scores need a softmax first"
        )
    return values


def with_heads(name: str, array: ArrayLike, axes: str) -> FloatArray:
    """`array` as (heads, *axes): without a head axis there is one head; a batch of one is left out.

    `axes` names what follows the heads, such as "queries, keys".
    """
    values = numbers(name, array)
    inner = axes.count(",") + 1
    if values.ndim == inner:
        values = values[None]
    elif values.ndim == inner + 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != inner + 1:
        raise ValueError(
            f"{name}: expected shape ({axes}), (heads, {axes}) or (1, heads, {axes}), got {values.shape}"
        )
    if not values.shape[0]:
        raise ValueError(f"{name}: expected at least one head, got 0")
    return values


def one_head(name: str, values: FloatArray, head: Head) -> FloatArray:
    """Of (heads, ...), the one asked for or the average."""
    if head == "mean":
        average: FloatArray = values.mean(axis=0)
        return average
    chosen: FloatArray = values[head_index(name, len(values), head)]
    return chosen


def head_index(name: str, heads: int, head: Head) -> int:
    """`head`, once it is one of `heads`."""
    if isinstance(head, bool) or not isinstance(head, int | np.integer):
        raise TypeError(f"head: expected an integer or 'mean', got {head!r}")
    if not -heads <= head < heads:
        raise ValueError(f"head: expected one of the {heads} of {name}, 0 to {heads - 1}, got {head}")
    return int(head) % heads


def check_tokens(name: str, tokens: Sequence[str] | None, length: int) -> list[str]:
    """`tokens` as a list of `length`; without any, the positions."""
    if tokens is None:
        return [str(position) for position in range(length)]
    if isinstance(tokens, str):
        raise TypeError(f"{name}: expected a sequence of strings, one a token, got one string")
    if len(tokens) != length:
        raise ValueError(f"{name}: expected {length} tokens, as many as the weights have, got {len(tokens)}")
    return [str(token) for token in tokens]


def pooled(matrix: FloatArray, most: int) -> tuple[FloatArray, int, int]:
    """`matrix` with at most about `most` rows and columns, and how many of each one cell stands for.

    A cell is the largest of those it stands for: an average would hide the few large weights that matter.
    """
    rows, columns = (max(1, -(-length // most)) for length in matrix.shape)
    for axis, step in enumerate((rows, columns)):
        if step > 1:
            matrix = np.maximum.reduceat(matrix, np.arange(0, matrix.shape[axis], step), axis=axis)
    return matrix, rows, columns
