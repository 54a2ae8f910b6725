"""torch.nn.MultiheadAttention, computed by fastattn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastattn.nn._common import (
    attend,
    check_backend,
    check_device,
    check_floating,
    check_integer,
    check_real,
)


class MultiheadAttention(nn.MultiheadAttention):
    """A drop-in for `torch.nn.MultiheadAttention`: same constructor, call, parameters and state_dict [1]_.

    It is a subclass of torch's module, draws the same initial weights from the same seed, and takes and gives
    its checkpoints. What differs: a row that may attend to nothing gives attention 0, hence the bias of
    `out_proj`, where torch gives NaN if weights are asked for; wrong arguments are a `TypeError` or a
    `ValueError`; there is no separate fast path, and nested tensors are not taken.

    Parameters
    ----------
    embed_dim : int
        E, a multiple of `num_heads`.
    num_heads : int
        H.
    dropout : float
        In [0, 1], of the probabilities, in training.
    bias : bool
        Projections add a learned vector.
    add_bias_kv : bool
        A learned key and value are appended to each sequence.
    add_zero_attn : bool
        A key and value of zeros are appended to each sequence.
    kdim, vdim : int, optional
        Widths of key and value. Default: E.
    batch_first : bool
        Axes are (N, L, E) rather than (L, N, E).
    device, dtype : optional
        Of the parameters.
    backend : str, optional
        As of `fastattn.attention`: "math" for gradients of gradients, and for devices without kernels.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or range, and where `embed_dim` is no multiple of `num_heads`.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import MultiheadAttention
    >>> layer = MultiheadAttention(64, 8, batch_first=True)
    >>> layer.load_state_dict(torch.nn.MultiheadAttention(64, 8).state_dict())
    <All keys matched successfully>
    >>> x = torch.randn(2, 5, 64)
    >>> out, weights = layer(x, x, x)
    >>> out.shape, weights.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 5]))
    """

    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        check_integer("embed_dim", embed_dim, least=1)
        check_integer("num_heads", num_heads, least=1)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}")
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_integer(name, width, least=1)
        check_real("dropout", dropout, 0, 1)
        check_backend(backend)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device=device,
            dtype=dtype,
        )
        self.backend = backend

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, *, backend: str | None = None) -> MultiheadAttention:
        """Make a module of the parameters of torch's: both share them, so optimizers keep theirs.

        Parameters
        ----------
        module : torch.nn.MultiheadAttention
        backend : str, optional
            As of the constructor.

        Returns
        -------
        MultiheadAttention
            In the mode (training or not) of `module`; hooks are not taken over.

        Raises
        ------
        TypeError
            If `module` is none of torch's.
        ValueError
            If its parameters have other names than the constructor gives them: pruning and parametrizations
            keep a weight under another one, and compute it by hooks and properties of `module` alone.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module must be a torch.nn.MultiheadAttention, got {type(module).__name__}")
        own = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            module.in_proj_bias is not None,
            module.bias_k is not None,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            device="meta",
            backend=backend,
        )
        if module._parameters.keys() != own._parameters.keys():
            expected, got = (", ".join(x._parameters) for x in (own, module))
            raise ValueError(
                f"module must have the parameters {expected}, got {got}: if it is pruned or parametrized, "
                "make that permanent first (prune.remove, parametrize.remove_parametrizations)"
            )
        own._parameters.update(module._parameters)
        own.out_proj = module.out_proj
        return own.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Parameters
        ----------
        query : tensor, shape (L, N, E), or (N, L, E) if `batch_first`, or (L, E)
        key : tensor, shape (S, N, kdim), or (N, S, kdim), or (S, kdim)
        value : tensor, shape (S, N, vdim), or (N, S, vdim), or (S, vdim)
        key_padding_mask : bool or float tensor, shape (N, S) or (S,), optional
            bool: True ignores the key. float: added to its scores.
        need_weights : bool
            Also return the weights; without them, less is computed and stored.
        attn_mask : bool or float tensor, shape (L, S) or (N * H, L, S), optional
            bool: True forbids. float: added to the scores; gradients reach it.
        average_attn_weights : bool
            Weights are the mean over heads.
        is_causal : bool
            A hint that `attn_mask`, which must be given, is the causal mask. As in torch the hint is taken at
            its word, and the mask not looked at, unless there is a `key_padding_mask` or `need_weights`.

        Returns
        -------
        out : tensor of the shape of query
        weights : (N, L, S), or (N, H, L, S) if not averaged, without N if unbatched; None unless asked for
            After dropout. S counts what `add_bias_kv` and `add_zero_attn` append.

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong type or shape.
        RuntimeError
            If `is_causal` is given without `attn_mask`, and for a mask on another device.
        """
        batched = _check_sources(query, key, value, (self.embed_dim, self.kdim, self.vdim), self.batch_first)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "attn_mask must be given where is_causal is, which is a hint about it, got None"
            )
        heads = [self._heads(rows, batched) for rows in self._project(query, key, value)]
        scores = (heads[0].shape[0], self.num_heads, heads[0].shape[1], heads[1].shape[1])
        hint = is_causal and key_padding_mask is None and not need_weights
        masks = Masks(scores, heads[0])
        if attn_mask is not None and not hint:
            masks.add("attn_mask", attn_mask, _attn_shapes(scores))
        if key_padding_mask is not None:
            masks.add("key_padding_mask", key_padding_mask, _padding_shapes(scores, batched))
        out = attend(
            heads[0],
            *self._appended(heads[1], heads[2], masks),
            backend=self.backend,
            causal="top_left" if hint else False,
            mask=masks.mask,
            bias=masks.bias,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=need_weights,
        )
        out, weights = out if need_weights else (out, None)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return self.out_proj(self._rows(out.flatten(-2), batched)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value as rows of E columns: one product for the sources that are the same."""
        width = self.embed_dim
        bias: Any = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return tuple(map(F.linear, (query, key, value), weights, biases))
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        sizes = [width, 2 * width] if key is value else [width] * 3
        biases = (None,) * len(sizes) if bias is None else torch.split(bias, sizes)
        first, *others = map(F.linear, (query, key, value), torch.split(self.in_proj_weight, sizes), biases)
        return (first, *others) if len(others) == 2 else (first, *others[0].chunk(2, dim=-1))

    def _heads(self, rows: Tensor, batched: bool) -> Tensor:
        """View rows as (N, length, H, D), in whichever order their axes are."""
        if not batched:
            rows = rows.unsqueeze(0)
        elif not self.batch_first:
            rows = rows.transpose(0, 1)
        heads: Tensor = torch.unflatten(rows, -1, (self.num_heads, self.head_dim))
        return heads

    def _rows(self, out: Tensor, batched: bool) -> Tensor:
        """Put the axes of (N, L, E) into the order of query."""
        if not batched:
            return out.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1).contiguous()

    def _appended(self, key: Tensor, value: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Append the rows of `add_bias_kv` and `add_zero_attn`, which every query may attend to."""
        batch, _, heads, dim = key.shape
        if self.bias_k is not None and self.bias_v is not None:
            shape = (batch, 1, heads, dim)
            rows = (self.bias_k.view(1, 1, heads, dim), self.bias_v.view(1, 1, heads, dim))
            key = torch.cat((key, rows[0].to(key.dtype).expand(shape)), dim=1)
            value = torch.cat((value, rows[1].to(value.dtype).expand(shape)), dim=1)
            masks.append()
        if self.add_zero_attn:
            key, value = (F.pad(rows, (0, 0, 0, 0, 0, 1)) for rows in (key, value))
            masks.append()
        return key, value

    def extra_repr(self) -> str:
        """Sizes, and options that are not at their defaults."""
        parts = [f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}"]
        if not self._qkv_same_embed_dim:
            parts.append(f"kdim={self.kdim}, vdim={self.vdim}")
        options = {"dropout": self.dropout, "bias": self.in_proj_bias is not None, "backend": self.backend}
        options |= {"add_bias_kv": self.bias_k is not None, "add_zero_attn": self.add_zero_attn}
        defaults = {"dropout": 0.0, "bias": True, "backend": None}
        shown = {name: value for name, value in options.items() if value != defaults.get(name, False)}
        return ", ".join(parts + [f"{name}={value!r}" for name, value in shown.items()])


class Masks:
    """What torch's masks say, as `mask` (True: attend) and `bias` of `fastattn.attention`."""

    def __init__(self, scores: tuple[int, int, int, int], query: Tensor) -> None:
        self.scores = scores  # (N, H, L, S)
        self.dtype, self.device = query.dtype, query.device
        self.mask: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, name: str, given: Any, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        """Take one in. `shapes` has what it becomes, broadcast to the scores, for each shape it may have."""
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
        check_device(name, given, self.device)
        shape = tuple(given.shape)
        if shape not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {shape}")
        if given.dtype == torch.bool:
            attends = given.logical_not().reshape(shapes[shape])
            self.mask = attends if self.mask is None else self.mask & attends
        elif given.is_floating_point():
            added = given.to(self.dtype).reshape(shapes[shape])
            self.bias = added if self.bias is None else self.bias + added
        else:
            raise TypeError(f"{name} must be bool (True: ignore) or floating point, got {given.dtype}")

    def append(self) -> None:
        """Let every query attend to one more key at the end."""
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        if self.bias is not None:
            self.bias = F.pad(self.bias, (0, 1))


def _attn_shapes(scores: tuple[int, ...]) -> dict[tuple[int, ...], tuple[int, ...]]:
    batch, heads, rows, keys = scores
    return {(rows, keys): (1, 1, rows, keys), (batch * heads, rows, keys): scores}


def _padding_shapes(scores: tuple[int, ...], batched: bool) -> dict[tuple[int, ...], tuple[int, ...]]:
    batch, _, _, keys = scores
    return {(batch, keys) if batched else (keys,): (batch, 1, 1, keys)}


def _check_sources(query: Any, key: Any, value: Any, widths: tuple[int, ...], batch_first: bool) -> bool:
    """Return whether there is a batch, once shapes fit."""
    batched = True
    for name, source, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
        check_floating(name, source)
        if source.is_nested:
            raise TypeError(
                f"{name} must be a dense tensor, got a nested one: pad it and say where by a mask"
            )
        if name == "query":
            batched = source.dim() == 3
        axes = ("(N, L, {})" if batch_first else "(L, N, {})") if batched else "(L, {})"
        if source.dim() != (3 if batched else 2) or source.shape[-1] != width:
            raise ValueError(f"{name} must have shape {axes.format(width)}, got {tuple(source.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        got = f"{tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"key and value must have the same length and batch, got {got}")
    batch_axis = 0 if batch_first else 1
    if batched and query.shape[batch_axis] != key.shape[batch_axis]:
        got = f"{query.shape[batch_axis]} and {key.shape[batch_axis]}"
        raise ValueError(f"query and key must have one batch size, got {got}")
    return batched
