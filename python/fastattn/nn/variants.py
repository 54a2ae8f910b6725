"""Self-attention and cross-attention: what differs is where query, key and value come from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.nn._common import check_integer
from fastattn.nn.attention import Attention


class SelfAttention(Attention):
    """Attention of a sequence to itself: query, key and value are projections of one source.

    Parameters
    ----------
    embed_dim : int
        E, of the source and of the result.
    num_heads : int
        Hq.
    **options
        As of `Attention`, but for `kdim` and `vdim`. With `causal` it is the masked self-attention of a
        decoder.

    Raises
    ------
    TypeError, ValueError
        As `Attention`.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import SelfAttention
    >>> layer = SelfAttention(64, num_kv_heads=2, causal=True, position="rotary")
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int = 8, **options: Any) -> None:
        for name in ("kdim", "vdim"):
            if name in options:
                raise TypeError(f"{name} must be left out: there is one source, of embed_dim columns")
        super().__init__(embed_dim, num_heads, **options)

    def forward(self, x: Tensor, **options: Any) -> Any:  # type: ignore[override]
        """Attend.

        Parameters
        ----------
        x : tensor, shape (B, L, E)
        **options
            `mask`, `score_bias`, `kv_lengths`, `query_offset`, `cache` and `need_weights` of `Attention`.

        Returns
        -------
        out, or (out, weights)
            (B, L, E), and (B, Hq, L, Lk).
        """
        return super().forward(x, x, x, **options)


class CrossAttention(Attention):
    """Attention of one sequence to another: query of the one, key and value of the other.

    Parameters
    ----------
    embed_dim : int
        E, of the querying source and of the result.
    num_heads : int
        Hq.
    context_dim : int, optional
        Width of the source of key and value. Default: E.
    **options
        As of `Attention`, but for `kdim` and `vdim`. `fused` means one weight for key and value, ``kv_proj``.

    Raises
    ------
    TypeError, ValueError
        As `Attention`.

    Examples
    --------
    The context of a decoder is projected once, and read from the cache after that:

    >>> import torch
    >>> from fastattn.nn import CrossAttention, KVCache
    >>> layer, cache = CrossAttention(64, context_dim=32), KVCache()
    >>> first = layer(torch.randn(2, 1, 64), torch.randn(2, 9, 32), cache=cache)
    >>> layer(torch.randn(2, 1, 64), cache=cache).shape
    torch.Size([2, 1, 64])
    """

    _fused_packs = ("q", "kv")

    def __init__(
        self, embed_dim: int, num_heads: int = 8, *, context_dim: int | None = None, **options: Any
    ) -> None:
        for name in ("kdim", "vdim"):
            if name in options:
                raise TypeError(f"{name} must be left out: pass context_dim, of key and value")
        if context_dim is not None:
            check_integer("context_dim", context_dim, least=1)
        super().__init__(embed_dim, num_heads, kdim=context_dim, vdim=context_dim, **options)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None, **options: Any
    ) -> Any:
        """Attend.

        Parameters
        ----------
        x : tensor, shape (B, Lq, E)
        context : tensor, shape (B, L, context_dim), optional
            May be left out where `cache` holds it.
        **options
            `mask`, `score_bias`, `kv_lengths`, `query_offset`, `cache` and `need_weights` of `Attention`.

        Returns
        -------
        out, or (out, weights)
            (B, Lq, E), and (B, Hq, Lq, Lk).
        """
        return super().forward(x, context, context, **options)
