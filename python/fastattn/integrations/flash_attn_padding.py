"""Padded batches to rows one behind the other and back, by the names of ``flash_attn.bert_padding``."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(rows: Tensor, indices: Tensor) -> Tensor:
    """``rows[indices]``, with gradients."""
    return rows[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """`first_axis_dim` rows, `values` at `indices` and zeros elsewhere, with gradients."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the tokens of a padded batch out of it.

    Parameters
    ----------
    hidden_states : tensor, shape (B, L, ...)
    attention_mask : tensor of bools or integers, shape (B, L)
        Nonzero where there is a token.
    unused_mask : tensor of bools or integers, shape (B, L), optional
        Nonzero where there is room that is kept as well, but does not count as used.

    Returns
    -------
    rows : tensor, shape (total, ...)
    indices : int64 tensor, shape (total,)
        Where they were in ``hidden_states.flatten(0, 1)``.
    cu_seqlens : int32 tensor, shape (B + 1,)
        Where sequences begin among the rows, and the last one ends.
    max_seqlen : int
    used : int32 tensor, shape (B,)
        Tokens of each sequence.

    Raises
    ------
    ValueError
        For a mask of another shape.
    """
    for name, mask in {"attention_mask": attention_mask, "unused_mask": unused_mask}.items():
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            expected = f"hidden_states' {tuple(hidden_states.shape[:2])}"
            raise ValueError(f"{name} must have the shape {expected}, got {tuple(mask.shape)}")
    used = attention_mask.bool()
    kept = used if unused_mask is None else used | unused_mask.bool()
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, max(lengths.tolist(), default=0), used.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: (total, ...) to (batch, seqlen, ...), with zeros where there was no token."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.reshape(batch, seqlen, *hidden_states.shape[1:])
