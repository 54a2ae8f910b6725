"""Where a row stands, told to a model: vectors that are added, slopes for ALiBi, and a learned bias.

Rotary positions are in `rotary.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastattn.nn._common import (
    DerivedBuffers,
    Offset,
    check_bool,
    check_floating,
    check_integer,
    check_offset,
    check_real,
    row_positions,
)


class _AddedPositions(nn.Module):
    """Adds to each row of x the vector of its position. Subclasses say what the vectors are."""

    def __init__(self, embed_dim: int, max_len: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        check_integer("embed_dim", embed_dim, least=1)
        check_integer("max_len", max_len, least=1)
        check_real("dropout", dropout, 0, 1)
        check_bool("batch_first", batch_first)
        self.embed_dim = embed_dim
        self.max_len = max_len
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first

    def _slice(self, start: int, length: int, x: Tensor) -> Tensor:
        """Vectors of consecutive positions, (length, E), in the dtype of x."""
        raise NotImplementedError

    def _gather(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors of any positions, (*positions.shape, E)."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, offset: Offset = 0, positions: Tensor | None = None) -> Tensor:
        """Add positions to x, then drop out.

        Parameters
        ----------
        x : tensor, shape (B, L, E), or (L, B, E) unless `batch_first`, or (L, E)
        offset : int or (B,) integers
            The position of the first row: in decoding, how many tokens came before. From 0 up.
        positions : (L,) or (B, L) integers, optional
            The position of each row, in place of `offset`: for padding on the left, or packed sequences.

        Returns
        -------
        tensor of the shape and dtype of x
        """
        batch, length = self._sizes(x)
        if positions is None and not isinstance(offset, Tensor):
            check_integer("offset", offset, least=0)
            vectors = self._slice(offset, length, x)
        else:
            rows = row_positions(length, batch, x.device, offset, positions)
            if x.dim() == 2 and rows.dim() == 2:
                rows = rows.squeeze(0)
            vectors = self._gather(rows, x.dtype)
        if x.dim() == 3 and not self.batch_first:
            vectors = vectors.unsqueeze(-2) if vectors.dim() == 2 else vectors.transpose(0, 1)
        out: Tensor = self.dropout(x + vectors)
        return out

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Batch and length."""
        check_floating("x", x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
            axes = "(B, L, E)" if self.batch_first else "(L, B, E)"
            expected = f"{axes} or (L, E) with E = {self.embed_dim}"
            raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def extra_repr(self) -> str:
        """Sizes, and which axis comes first."""
        return f"embed_dim={self.embed_dim}, max_len={self.max_len}, batch_first={self.batch_first}"


class SinusoidalPositionalEncoding(_AddedPositions, DerivedBuffers):
    """Adds sines and cosines of the position, of wavelengths from 2 pi to 20000 pi [1]_.

    Column ``2i`` of position ``p`` holds ``sin(p / 10000**(2i / E))``, column ``2i + 1`` the cosine; an odd E
    ends with a sine. Computed in float64 and rounded to the dtype of x, through float32 unless x is float64.

    Parameters
    ----------
    embed_dim : int
        E, odd or even.
    max_len : int
        Positions below it are read from a table; those past it are computed at each call, and are no error.
    dropout : float
        In [0, 1], of the sum.
    batch_first : bool
        x has shape (B, L, E) rather than (L, B, E).
    device : torch.device, optional
        Of the table, which is in no state_dict.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, shape or range.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.5.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import SinusoidalPositionalEncoding
    >>> encode = SinusoidalPositionalEncoding(4)
    >>> encode(torch.zeros(1, 2, 4))
    tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
             [0.8415, 0.5403, 0.0100, 0.9999]]])
    """

    table: Tensor

    def __init__(
        self,
        embed_dim: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = True,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embed_dim, max_len, dropout, batch_first)
        self._place_buffers(device)

    def _derived(self) -> dict[str, Tensor]:
        return {"table": self._gather(torch.arange(self.max_len, device="cpu"), torch.float32)}

    def _slice(self, start: int, length: int, x: Tensor) -> Tensor:
        self._leave_meta(self.table, x.device)
        if start + length <= self.max_len and x.dtype != torch.float64:
            return self.table[start : start + length].to(x.dtype)
        return self._gather(torch.arange(length, device=self.table.device) + start, x.dtype)

    def _gather(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        columns = torch.arange(0, self.embed_dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions.double()[..., None] * 10000.0 ** (-columns / self.embed_dim)
        pairs = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        vectors = pairs[..., : self.embed_dim]
        # Rounded twice, so that the table and what lies past it agree to the bit.
        return vectors if dtype == torch.float64 else vectors.float().to(dtype)


class LearnedPositionalEncoding(_AddedPositions):
    """Adds a learned vector for each position, as BERT and GPT-2 do [1]_.

    `weight`, (max_len, E), is laid out and named as in `torch.nn.Embedding`, so that checkpoints with such an
    embedding of positions load. It starts normal with standard deviation 0.02.

    Parameters
    ----------
    max_len : int
        How many positions there are; one past them is a ValueError.
    embed_dim : int
        E.
    dropout : float
        In [0, 1], of the sum.
    batch_first : bool
        x has shape (B, L, E) rather than (L, B, E).
    device, dtype : optional
        Of `weight`. The sum has the dtype of x.

    Raises
    ------
    TypeError
        For an argument of the wrong type.
    ValueError
        For a wrong shape or range, and for a position outside ``[0, max_len)``. Positions in a tensor are
        looked at on the CPU, outside of `torch.compile`; elsewhere the lookup itself fails.

    References
    ----------
    .. [1] Gehring et al., "Convolutional Sequence to Sequence Learning", 2017; Devlin et al., "BERT", 2018.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import LearnedPositionalEncoding
    >>> encode = LearnedPositionalEncoding(16, 8)
    >>> encode(torch.zeros(2, 5, 8), offset=11).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        max_len: int,
        embed_dim: int,
        dropout: float = 0.0,
        batch_first: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, max_len, dropout, batch_first)
        self.weight = nn.Parameter(torch.empty(max_len, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `weight` anew."""
        nn.init.normal_(self.weight, std=0.02)

    def _slice(self, start: int, length: int, x: Tensor) -> Tensor:
        if start + length > self.max_len:
            got = f"offset {start} and {length} rows"
            raise ValueError(f"offset + length must be at most max_len = {self.max_len}, got {got}")
        return self.weight[start : start + length].to(x.dtype)

    def _gather(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        if positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel():
            least, most = (int(extreme) for extreme in positions.aminmax())
            if least < 0 or most >= self.max_len:
                bounds = f"[0, max_len) with max_len = {self.max_len}"
                raise ValueError(f"positions must be in {bounds}, got {least if least < 0 else most}")
        return F.embedding(positions, self.weight).to(dtype)


def alibi_slopes(
    num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Slopes of ALiBi, for the `alibi_slopes` of `fastattn.attention` [1]_.

    For a power of two, head ``h`` counted from 1 has ``2**(-8 h / num_heads)``. Otherwise, as in the
    reference implementation, those of the power of two below come first, then every other one of the next.

    Parameters
    ----------
    num_heads : int
        From 1 up.
    device, dtype : optional
        Of the result.

    Returns
    -------
    tensor, shape (num_heads,)
        Positive: `fastattn.attention` subtracts ``slope * abs(distance)``.

    Raises
    ------
    TypeError, ValueError
        If `num_heads` is no integer, or less than 1.

    References
    ----------
    .. [1] Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases", 2021.

    Examples
    --------
    >>> from fastattn.nn import alibi_slopes
    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    check_integer("num_heads", num_heads, least=1)
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * head / power) for head in range(1, power + 1)]
    slopes += [2.0 ** (-4 * head / power) for head in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, device=device, dtype=dtype)


class RelativePositionBias(DerivedBuffers):
    """A learned bias for each head and bucket of distances, as in T5 [1]_.

    Half of the buckets of a direction hold one distance each; the others grow with its logarithm, up to
    `max_distance`, past which all distances share the last one.

    `weight`, (num_buckets, num_heads), is laid out as the ``relative_attention_bias.weight`` of transformers'
    T5, and starts normal with standard deviation 0.02. T5 does not scale scores: pass ``scale=1.0`` to
    `fastattn.attention` with its weights.

    Parameters
    ----------
    num_heads : int
    num_buckets : int
        At least 2, and if `bidirectional` an even number from 4 up.
    max_distance : int
        Larger than the number of distances that have a bucket to themselves.
    bidirectional : bool
        Keys after the query have half of the buckets, as in an encoder. Otherwise they count as distance 0,
        for a decoder, where the causal rule hides them.
    device, dtype : optional
        Of `weight`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, shape or range.

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
       2020, section 2.1.

    Examples
    --------
    >>> from fastattn.nn import RelativePositionBias
    >>> bias = RelativePositionBias(num_heads=8)
    >>> bias(3, 5).shape
    torch.Size([1, 8, 3, 5])
    """

    buckets: Tensor

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_heads", num_heads, least=1)
        check_bool("bidirectional", bidirectional)
        check_integer("num_buckets", num_buckets, least=4 if bidirectional else 2)
        if bidirectional and num_buckets % 2:
            raise ValueError(f"num_buckets must be even where bidirectional, got {num_buckets}")
        self._one_way = num_buckets // 2 if bidirectional else num_buckets
        check_integer("max_distance", max_distance, least=self._one_way // 2 + 1)
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self._place_buffers(self.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `weight` anew."""
        nn.init.normal_(self.weight, std=0.02)

    def _derived(self) -> dict[str, Tensor]:
        """The bucket of each distance up to `max_distance`, T5's float32 operations in T5's order.

        Tabulated, since logarithms that a compiler rounds otherwise would move distances to the next bucket.
        """
        exact = self._one_way // 2
        distance = torch.arange(self.max_distance + 1, device="cpu")
        ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        coarse = exact + (ratio * (self._one_way - exact)).long()
        return {"buckets": torch.where(distance < exact, distance, coarse.clamp(max=self._one_way - 1))}

    def forward(self, query_length: int, key_length: int, *, query_offset: Any = None) -> Tensor:
        """Bias of every query and key, to be passed as `bias` to `fastattn.attention`.

        Parameters
        ----------
        query_length : int
            Lq.
        key_length : int
            Lk.
        query_offset : int or (B,) integers, optional
            The key position at which query 0 stands, as in `fastattn.attention`: by default ``Lk - Lq``.

        Returns
        -------
        tensor, shape (1, H, Lq, Lk), or (B, H, Lq, Lk) if `query_offset` has B elements
            In the dtype of `weight`; its gradient is that of `weight`.
        """
        check_integer("query_length", query_length, least=0)
        check_integer("key_length", key_length, least=0)
        if query_offset is None:
            query_offset = key_length - query_length
        check_offset("query_offset", query_offset, None)
        self._leave_meta(self.buckets, self.weight.device)
        if isinstance(query_offset, Tensor):
            query_offset = query_offset.to(device=self.weight.device, dtype=torch.int64)[..., None]
        # The bias depends on key - query alone, so each such difference is looked up once.
        differences = torch.arange(-query_length, key_length + 1, device=self.weight.device) - query_offset
        distance = differences.abs() if self.bidirectional else (-differences).clamp(min=0)
        bucket = self.buckets[distance.clamp(max=self.max_distance)]
        if self.bidirectional:
            bucket = bucket + (differences > 0) * self._one_way
        values = F.embedding(bucket, self.weight).transpose(-1, -2)
        return _diagonals(values if values.dim() == 3 else values.unsqueeze(0), query_length, key_length)

    def extra_repr(self) -> str:
        """Sizes and directions."""
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, "
            f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"
        )


def _diagonals(values: Tensor, rows: int, columns: int) -> Tensor:
    """(B, H, rows + columns + 1) -> (B, H, rows, columns), whose element [i, j] is values[rows + j - i].

    Copies of `values`, one a row, read as rows that are one element shorter, move to the right by one each.
    Unlike windows (`unfold`, `as_strided`) it compiles once for all lengths.
    """
    copies = values.unsqueeze(-2).expand(-1, -1, rows, -1).flatten(-2)
    shorter = copies[..., rows:].reshape(*values.shape[:2], rows, rows + columns)
    return shorter[..., :columns]
