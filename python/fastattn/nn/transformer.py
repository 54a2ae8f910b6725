"""Layers of torch.nn's Transformer, their attention computed by fastattn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastattn.nn._common import check_integer, check_real
from fastattn.nn.multihead import MultiheadAttention


class _Layer(nn.Module):
    """The constructor that both layers have; next in line is that of torch's layer, their other base."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Any = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        _check_sizes(d_model, nhead, dim_feedforward, dropout, layer_norm_eps)
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device=device,
            dtype=dtype,
        )
        for name, child in self.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(self, name, MultiheadAttention.from_torch(child, backend=backend))


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """A drop-in for `torch.nn.TransformerEncoderLayer`: same constructor, call, parameters, state_dict [1]_.

    Self-attention and a feedforward network, each with a residual and a layer norm. The layer goes into
    `torch.nn.TransformerEncoder`, whose nested tensors it takes and returns. It has no separate fast path:
    hooks run, and results are the same with gradients and without.

    Parameters
    ----------
    d_model : int
        E, a multiple of `nhead`.
    nhead : int
    dim_feedforward : int
    dropout : float
        In [0, 1], in training: of attention's probabilities, the network and both results.
    activation : {"relu", "gelu"} or callable
    layer_norm_eps : float
    batch_first : bool
        Axes are (N, L, E) rather than (L, N, E).
    norm_first : bool
        Layer norms come before attention and network, not after the residual sum [2]_.
    bias : bool
        Of linear maps and layer norms.
    device, dtype : optional
        Of the parameters.
    backend : str, optional
        As of `fastattn.attention`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or range, and where `d_model` is no multiple of `nhead`.
    RuntimeError
        For the name of another activation, as in torch.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.1.
    .. [2] Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import TransformerEncoderLayer
    >>> layer = TransformerEncoderLayer(64, 8, batch_first=True)
    >>> encoder = torch.nn.TransformerEncoder(layer, num_layers=2)
    >>> encoder(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass a sequence through the layer.

        Parameters
        ----------
        src : tensor, shape (L, N, E), or (N, L, E) if `batch_first`, or (L, E)
        src_mask, src_key_padding_mask, is_causal
            `attn_mask`, `key_padding_mask` and `is_causal` of `MultiheadAttention`.

        Returns
        -------
        tensor of the shape of src
        """
        if src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
            x = self.norm2(x + self._ff_block(x))
        return x

    def _forward_nested(
        self, src: Tensor, src_mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Pad sequences of several lengths, (N, L, E), and take the padding off again."""
        if padding is not None:
            raise ValueError("src_key_padding_mask must be left out where src is nested: it has no padding")
        lengths = [len(sequence) for sequence in src.unbind()]
        dense = src.to_padded_tensor(0.0)
        at = torch.arange(dense.shape[1], device=dense.device)
        past = at >= torch.tensor(lengths, device=dense.device)[:, None]
        out = self.forward(dense, src_mask, past, is_causal)
        return torch.nested.as_nested_tensor(
            [rows[:length] for rows, length in zip(out, lengths, strict=True)]
        )


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """A drop-in for `torch.nn.TransformerDecoderLayer`: same constructor, call, parameters, state_dict [1]_.

    Self-attention, attention to the memory of an encoder, and a feedforward network, each with a residual and
    a layer norm. The layer goes into `torch.nn.TransformerDecoder`.

    Parameters, defaults and errors are those of `TransformerEncoderLayer`.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.1.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import TransformerDecoderLayer
    >>> layer = TransformerDecoderLayer(64, 8, batch_first=True)
    >>> layer(torch.randn(2, 5, 64), torch.randn(2, 9, 64)).shape
    torch.Size([2, 5, 64])
    """


def _check_sizes(d_model: Any, nhead: Any, dim_feedforward: Any, dropout: Any, layer_norm_eps: Any) -> None:
    check_integer("d_model", d_model, least=1)
    check_integer("nhead", nhead, least=1)
    if d_model % nhead:
        raise ValueError(f"d_model must be a multiple of nhead = {nhead}, got {d_model}")
    check_integer("dim_feedforward", dim_feedforward, least=1)
    check_real("dropout", dropout, 0, 1)
    check_real("layer_norm_eps", layer_norm_eps, 0)
