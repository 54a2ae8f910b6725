"""Keys and values that were computed already, for generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn._common import check_integer


class KVCache:
    """Keys and values of one attention module, for all tokens so far: each call appends its own.

    A cache starts empty and belongs to one module and one batch of sequences; a model of several layers has
    one for each. Without gradients, rows are written into a buffer that doubles when it is full; where
    gradients are recorded (`torch.is_grad_enabled`), rows are concatenated, so that they pass through.

    Parameters
    ----------
    capacity : int
        Rows that the first buffer has room for.

    Raises
    ------
    TypeError, ValueError
        If `capacity` is no integer from 0 up.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import KVCache, SelfAttention
    >>> layer, cache = SelfAttention(64, causal=True).eval(), KVCache()
    >>> with torch.no_grad():
    ...     prompt = layer(torch.randn(1, 10, 64), cache=cache)
    ...     token = layer(torch.randn(1, 1, 64), cache=cache)
    >>> len(cache)
    11
    """

    def __init__(self, capacity: int = 0) -> None:
        check_integer("capacity", capacity, least=0)
        self.capacity = capacity
        self._length = 0
        self._keys: Tensor | None = None  # (B, at least length, Hkv, D)
        self._values: Tensor | None = None
        self._own = False  # no graph may have saved the buffers: they can be written

    def __len__(self) -> int:
        return self._length

    @property
    def key(self) -> Tensor | None:
        """Every key so far, (B, L, Hkv, D), positions applied; None before the first."""
        return None if self._keys is None else self._keys[:, : self._length]

    @property
    def value(self) -> Tensor | None:
        """Every value so far, (B, L, Hkv, Dv); None before the first."""
        return None if self._values is None else self._values[:, : self._length]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows, and return all so far.

        Parameters
        ----------
        key : tensor, shape (B, L, Hkv, D)
        value : tensor, shape (B, L, Hkv, Dv)

        Returns
        -------
        key, value : tensors with the length ``len(cache)``
            Views, valid until the cache is cropped or reordered.

        Raises
        ------
        ValueError
            If batch, heads, dims, dtype or device are not those of the rows before, or the lengths differ.
        """
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            got = f"{tuple(key.shape)} and {tuple(value.shape)}"
            raise ValueError(f"key and value must have shapes (B, L, heads, dim) that agree, got {got}")
        _check_rows("key", key, self._keys)
        _check_rows("value", value, self._values)
        self._keys = self._with_rows(self._keys, key)
        self._values = self._with_rows(self._values, value)
        self._own = not torch.is_grad_enabled()
        self._length += key.shape[1]
        return self._keys[:, : self._length], self._values[:, : self._length]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` rows, to take tokens back."""
        check_integer("length", length, least=0)
        if length > self._length:
            raise ValueError(f"length must be at most the {self._length} rows there are, got {length}")
        self._length = length

    def reorder(self, indices: Tensor) -> None:
        """Let sequence ``i`` of the batch go on from sequence ``indices[i]``, in beam search.

        Parameters
        ----------
        indices : (B',) integers
            B' may be another batch size.
        """
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[indices], self._values[indices]
            self._own = not torch.is_grad_enabled()

    def _with_rows(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        """Return a buffer that holds `rows` after those that are in `buffer`."""
        if torch.is_grad_enabled():
            # A graph may have saved what is in the buffer, and could not go backward if that were written.
            return rows if buffer is None else torch.cat((buffer[:, : self._length], rows), dim=1)
        batch, new, heads, dim = rows.shape
        needed = self._length + new
        if buffer is None:
            buffer = rows.new_empty(batch, max(needed, self.capacity), heads, dim)
        elif buffer.shape[1] < needed or not self._writable(buffer):
            held = buffer[:, : self._length]
            buffer = rows.new_empty(batch, max(needed, 2 * self._length, self.capacity), heads, dim)
            buffer[:, : self._length] = held
        buffer[:, self._length : needed] = rows
        return buffer

    def _writable(self, buffer: Tensor) -> bool:
        """Whether no graph has the buffer, and inference mode, if it made it, is still on."""
        return self._own and (torch.is_inference_mode_enabled() or not buffer.is_inference())

    def __repr__(self) -> str:
        return f"KVCache(length={self._length}, shape={None if self.key is None else tuple(self.key.shape)})"


def _check_rows(name: str, rows: Tensor, buffer: Tensor | None) -> None:
    if buffer is None:
        return

    def kind(tensor: Tensor) -> tuple[Any, ...]:
        batch, _, heads, dim = tensor.shape
        return batch, heads, dim, tensor.dtype, str(tensor.device)

    if kind(rows) != kind(buffer):
        expected = f"the batch, heads, dim, dtype and device of the cache, {kind(buffer)}"
        raise ValueError(f"{name} must have {expected}, got {kind(rows)}")
