"""Keys and values that were computed already, for generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.nn._common import check_integer


class Held(NamedTuple):
    """What a cache holds at some time: the first rows of two buffers."""

    keys: Tensor | None = None  # (B, at least length, Hkv, D)
    values: Tensor | None = None
    length: int = 0
    own: bool = False  # no graph may have saved the buffers: they can be written

    @property
    def key(self) -> Tensor | None:
        """(B, length, Hkv, D)."""
        return None if self.keys is None else self.keys[:, : self.length]

    @property
    def value(self) -> Tensor | None:
        """(B, length, Hkv, Dv)."""
        return None if self.values is None else self.values[:, : self.length]


class KVCache:
    """Keys and values of one attention module, for all tokens so far: each call appends its own.

    A cache starts empty and belongs to one module and one batch of sequences; a model of several layers has
    one for each. A call that raises leaves the cache as it was. Without gradients, rows are written into a
    buffer that doubles when it is full; where gradients are recorded (`torch.is_grad_enabled`), rows are
    concatenated, so that they pass through.

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
        self._held = Held()

    def __len__(self) -> int:
        return self._held.length

    @property
    def key(self) -> Tensor | None:
        """Every key so far, (B, L, Hkv, D), positions applied; None before the first."""
        return self._held.key

    @property
    def value(self) -> Tensor | None:
        """Every value so far, (B, L, Hkv, Dv); None before the first."""
        return self._held.value

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
        self._held = self._joined(key, value)
        return self._held.key, self._held.value  # type: ignore[return-value]  # they are there now

    def crop(self, length: int) -> None:
        """Forget all but the first `length` rows, to take tokens back."""
        check_integer("length", length, least=0)
        if length > len(self):
            raise ValueError(f"length must be at most the {len(self)} rows there are, got {length}")
        self._held = self._held._replace(length=length)

    def reorder(self, indices: Tensor) -> None:
        """Let sequence ``i`` of the batch go on from sequence ``indices[i]``, in beam search.

        Parameters
        ----------
        indices : (B',) integers
            B' may be another batch size.
        """
        keys, values, length, _ = self._held
        if keys is not None and values is not None:
            self._held = Held(keys[indices], values[indices], length, not torch.is_grad_enabled())

    def _joined(self, key: Tensor, value: Tensor) -> Held:
        """Return what is held once `append` has these rows; until it is assigned, the cache is as it was."""
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            got = f"{tuple(key.shape)} and {tuple(value.shape)}"
            raise ValueError(f"key and value must have shapes (B, L, heads, dim) that agree, got {got}")
        keys, values, length, _ = self._held
        _check_rows("key", key, keys)
        _check_rows("value", value, values)
        keys, values = self._with_rows(keys, key), self._with_rows(values, value)
        return Held(keys, values, length + key.shape[1], not torch.is_grad_enabled())

    def _with_rows(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        """Return a buffer that holds `rows` after those that are in `buffer`."""
        length = len(self)
        if torch.is_grad_enabled():
            # A graph may have saved what is in the buffer, and could not go backward if that were written.
            return rows if buffer is None else torch.cat((buffer[:, :length], rows), dim=1)
        batch, new, heads, dim = rows.shape
        needed = length + new
        if buffer is None:
            buffer = rows.new_empty(batch, max(needed, self.capacity), heads, dim)
        elif buffer.shape[1] < needed or not self._writable(buffer):
            held = buffer[:, :length]
            buffer = rows.new_empty(batch, max(needed, 2 * length, self.capacity), heads, dim)
            buffer[:, :length] = held
        buffer[:, length:needed] = rows
        return buffer

    def _writable(self, buffer: Tensor) -> bool:
        """Whether no graph has the buffer, and inference mode, if it made it, is still on."""
        if not self._held.own or torch.compiler.is_compiling():  # no trace can ask for that mode
            return self._held.own
        return torch.is_inference_mode_enabled() or not buffer.is_inference()

    def __repr__(self) -> str:
        return f"KVCache(length={len(self)}, shape={None if self.key is None else tuple(self.key.shape)})"


def _check_rows(name: str, rows: Tensor, buffer: Tensor | None) -> None:
    if buffer is None:
        return

    def kind(tensor: Tensor) -> tuple[Any, ...]:
        batch, _, heads, dim = tensor.shape
        return batch, heads, dim, tensor.dtype, str(tensor.device)

    if kind(rows) != kind(buffer):
        expected = f"the batch, heads, dim, dtype and device of the cache, {kind(buffer)}"
        raise ValueError(f"{name} must have {expected}, got {kind(rows)}")
