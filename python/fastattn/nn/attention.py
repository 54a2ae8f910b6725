"""Multi-head attention over any sources as a module; `variants.py` has those of one source and of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn._common import (
    attend,
    check_backend,
    check_bool,
    check_floating,
    check_integer,
    check_real,
    check_score_bias,
)
from fastattn.nn._place import Alibi, check_position
from fastattn.nn._projection import draw, projection, repack
from fastattn.nn.cache import KVCache
from fastattn.nn.positions import RelativePositionBias
from fastattn.nn.rotary import RotaryEmbedding


class Attention(nn.Module):
    r"""Multi-head attention over any sources of query, key and value [1]_.

    Each source is projected to heads, `fastattn.attention` runs, heads are concatenated and projected back:
    ``out_proj(concat(attention(q_proj(query), k_proj(key), v_proj(value))))``. Without `value` the key source
    gives the values, too.

    Parameters
    ----------
    embed_dim : int
        E, of query and of the result.
    num_heads : int
        Hq.
    num_kv_heads : int, optional
        Hkv, of which Hq is a multiple: each serves ``Hq // Hkv`` query heads [2]_. Default: Hq.
    head_dim : int, optional
        D. Default: ``embed_dim // num_heads``, which must then be exact.
    kdim, vdim : int, optional
        Widths of the key and the value source. Default: E, and `kdim`.
    causal : bool
        A query attends to keys up to its own position. Queries stand at the end of the keys, so that it is
        right with a cache, too; `query_offset` of the call puts them elsewhere.
    window : (left, right), optional
        A query attends to keys from its position - left to its position + right; None is no bound.
    softcap : float
        Scores become ``softcap * tanh(scores / softcap)``; 0 is none.
    scale : float, optional
        Of the scores. Default: ``1 / sqrt(D)``.
    sinks : bool
        A learned logit for each head, `sinks`, that takes its share of the softmax and has no value [3]_.
    bias : bool
        Projections add a learned vector, as `bias` of `torch.nn.Linear`. What is added to scores is
        `score_bias` of a call.
    out_bias : bool, optional
        The same for the output projection. Default: as `bias`.
    dropout : float
        In [0, 1], of the probabilities, in training.
    qk_norm : bool
        Query and key of each head are divided by their root mean square, and multiplied by the learned
        `q_norm.weight` and `k_norm.weight` of D elements, before positions are applied [4]_.
    position : optional
        How attention is told where rows stand:

        - a `RotaryEmbedding` of D columns, or "rotary" for one with default arguments: queries and keys turn;
        - a `RelativePositionBias` of Hq heads: added to the scores, and a parameter of this module;
        - "alibi": distances are subtracted, by `alibi_slopes`.

        Encodings that are added to embeddings are added before the call.
    fused : bool
        One weight for all three projections, ``qkv_proj``, in place of ``q_proj``, ``k_proj`` and ``v_proj``:
        one product where sources are the same. Results and initial weights are those of separate ones,
        and either loads a state_dict of the other. Needs `kdim` and `vdim` to be E.
    backend : str, optional
        As of `fastattn.attention`: "math" for gradients of gradients, and for devices without kernels.
    device, dtype : optional
        Of the parameters.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or range, and sizes that do not fit each other.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.2.
    .. [2] Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
       Checkpoints", 2023.
    .. [3] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
    .. [4] Henry et al., "Query-Key Normalization for Transformers", 2020; the form is that of Qwen3.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import Attention
    >>> layer = Attention(64, num_heads=4, kdim=32, vdim=48)
    >>> layer(torch.randn(2, 5, 64), torch.randn(2, 7, 32), torch.randn(2, 7, 48)).shape
    torch.Size([2, 5, 64])
    """

    _fused_packs: tuple[str, ...] = ("qkv",)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        sinks: bool = False,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        qk_norm: bool = False,
        position: nn.Module | str | None = None,
        fused: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_bias = bias if out_bias is None else out_bias
        flags = {"causal": causal, "sinks": sinks, "bias": bias, "out_bias": out_bias, "qk_norm": qk_norm}
        for name, flag in {**flags, "fused": fused}.items():
            check_bool(name, flag)
        check_real("softcap", softcap, 0)
        check_real("dropout", dropout, 0, 1)
        check_backend(backend)
        self._set_sizes(embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim)
        self.causal = causal
        self.window = window
        self.softcap = float(softcap)
        self.scale = scale
        self.dropout = float(dropout)
        self.fused = fused
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_projections(bias, factory)
        width = self.num_heads * self.head_dim
        self.out_proj = projection(width, [self.embed_dim], out_bias, **factory)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(self.num_heads, **factory)) if sinks else None
        self.position = check_position(position, self.head_dim, self.num_heads, factory)

    def reset_parameters(self) -> None:
        """Set parameters as the constructor does; those of `position` are its own to draw."""
        for pack in self._packs:
            draw(getattr(self, f"{pack}_proj"), [self._widths[letter] for letter in pack])
        draw(self.out_proj, [self.embed_dim])
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def _set_sizes(
        self, embed_dim: Any, num_heads: Any, num_kv_heads: Any, head_dim: Any, kdim: Any, vdim: Any
    ) -> None:
        check_integer("embed_dim", embed_dim, least=1)
        check_integer("num_heads", num_heads, least=1)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_integer("num_kv_heads", num_kv_heads, least=1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            expected = f"a multiple of num_heads = {num_heads}, unless head_dim is given"
            raise ValueError(f"embed_dim must be {expected}, got {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = self.kdim if vdim is None else vdim
        for name in ("head_dim", "kdim", "vdim"):
            check_integer(name, getattr(self, name), least=1)

    def _make_projections(self, bias: bool, factory: dict[str, Any]) -> None:
        self._packs = self._fused_packs if self.fused else ("q", "k", "v")
        kv_width = self.num_kv_heads * self.head_dim
        self._widths = {"q": self.num_heads * self.head_dim, "k": kv_width, "v": kv_width}
        sources = {"q": self.embed_dim, "k": self.kdim, "v": self.vdim}
        for pack in self._packs:
            widths = {sources[letter] for letter in pack}
            if len(widths) > 1:
                got = f"embed_dim = {self.embed_dim}, kdim = {self.kdim} and vdim = {self.vdim}"
                raise ValueError(f"fused must be False where sources differ in width, got {got}")
            heads = [self._widths[letter] for letter in pack]
            self.add_module(f"{pack}_proj", projection(widths.pop(), heads, bias, **factory))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        kv_lengths: Any = None,
        query_offset: Any = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query : tensor, shape (B, Lq, E)
        key : tensor, shape (B, L, kdim), optional
            May be left out where `cache` holds all keys and values.
        value : tensor, shape (B, L, vdim), optional
            Default: `key`.
        mask : bool tensor, optional
            Broadcasts to (B, Hq, Lq, Lk); True: attend. Lk counts what `cache` holds, too.
        score_bias : tensor of the heads' dtype or float32, optional
            Broadcasts to (B, Hq, Lq, Lk); added to the scores.
        kv_lengths : (B,) integers, optional
            Keys at and past the length do not exist.
        query_offset : int or (B,) integers, optional
            The key position at which query 0 stands. Default: ``Lk - Lq``.
        cache : KVCache, optional
            The new keys and values are appended, and those before are attended to as well. An error leaves it
            as it was.
        need_weights : bool
            Also return the probabilities, after dropout.

        Returns
        -------
        out, or (out, weights)
            (B, Lq, E), and (B, Hq, Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong type or shape.
        RuntimeError
            For one on another device.
        """
        if value is None:
            value = key
        self._check_sources(query, key, value, cache)
        heads = self._project(query, key, value)
        if self.q_norm is not None and self.k_norm is not None:
            heads[0] = _normalised(self.q_norm, heads[0])
            heads[1] = None if key is None else _normalised(self.k_norm, heads[1])
        heads = self._placed(heads, query_offset, cache)
        if cache is not None:
            held = cache._held if key is None else cache._joined(heads[1], heads[2])
            heads[1:] = held.key, held.value
        out, weights = self._attend(
            heads,
            score_bias,
            mask=mask,
            kv_lengths=kv_lengths,
            query_offset=query_offset,
            return_weights=need_weights,
        )
        result = self.out_proj(out.flatten(-2))
        if cache is not None:
            cache._held = held  # after all that may fail
        return (result, weights) if need_weights else result

    def _check_sources(self, query: Any, key: Any, value: Any, cache: Any) -> None:
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
        if key is None and value is not None:
            raise ValueError("key must be given where value is, got None")
        if key is None and (cache is None or not len(cache)):
            raise ValueError("key may be None only where cache holds keys and values, got none")
        sources = [("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)]
        for name, source, width in sources:
            if source is None and name != "query":
                continue
            check_floating(name, source)
            if source.dim() != 3 or source.shape[-1] != width:
                expected = f"(batch, length, {width})"
                raise ValueError(f"{name} must have shape {expected}, got {tuple(source.shape)}")

    def _project(self, *sources: Tensor | None) -> list[Any]:
        """Query, key and value of the heads, (B, L, heads, D): views of what the projections return."""
        source = dict(zip("qkv", sources, strict=True))
        rows: list[Tensor | None] = []
        for pack in self._packs:
            project = getattr(self, f"{pack}_proj")
            if len(pack) == 1:
                rows.append(None if source[pack] is None else project(source[pack]))
            else:
                rows += project(*[source[letter] for letter in pack])
        return [None if row is None else torch.unflatten(row, -1, (-1, self.head_dim)) for row in rows]

    def _placed(self, heads: list[Any], query_offset: Any, cache: KVCache | None) -> list[Any]:
        """Turn query and new keys to where they stand, if positions are rotary."""
        if not isinstance(self.position, RotaryEmbedding):
            return heads
        query, key, value = heads
        held = 0 if cache is None else len(cache)
        total = held if key is None else held + key.shape[1]
        start = total - query.shape[1] if query_offset is None else query_offset
        if key is None:
            return [self.position(query, offset=start, layout="bshd"), None, value]
        together = query_offset is None and query.shape[1] == key.shape[1]  # share cosines and sines
        key_offset = None if together else held
        return [*self.position(query, key, offset=start, key_offset=key_offset, layout="bshd"), value]

    def _attend(
        self, heads: list[Any], bias: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = heads
        self._check_scores(query, key, bias, arguments["mask"])
        slopes = self.position(query.device) if isinstance(self.position, Alibi) else None
        if isinstance(self.position, RelativePositionBias):
            offset = arguments["query_offset"]
            relative = self.position(query.shape[1], key.shape[1], query_offset=offset)
            bias = relative if bias is None else bias + relative
        result = attend(
            query,
            key,
            value,
            backend=self.backend,
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            sinks=self.sinks,
            alibi_slopes=slopes,
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            **arguments,
        )
        return result if arguments["return_weights"] else (result, None)

    def _check_scores(self, query: Tensor, key: Tensor, bias: Any, mask: Any) -> None:
        """What `fastattn.attention` would say of a `bias`: here that is an argument of the constructor."""
        if isinstance(mask, Tensor) and mask.is_floating_point():
            advice = "pass values to add to the scores as `score_bias`"
            raise TypeError(f"mask must be bool (True: attend), got {mask.dtype}: {advice}")
        if bias is not None:
            batch, length, heads, _ = query.shape
            check_score_bias(bias, query, (batch, heads, length, key.shape[1]))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        repack(state_dict, prefix, self._packs, self._widths)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, and options that are not at their defaults."""
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        if (self.kdim, self.vdim) != (self.embed_dim, self.embed_dim):
            parts.append(f"kdim={self.kdim}, vdim={self.vdim}")
        for name, default in _SHOWN.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        if self.sinks is not None:
            parts.append("sinks=True")
        return ", ".join(parts)


_SHOWN = {
    "causal": False,
    "window": None,
    "softcap": 0.0,
    "scale": None,
    "dropout": 0.0,
    "fused": False,
    "backend": None,
}


def _normalised(norm: nn.RMSNorm, rows: Tensor) -> Tensor:
    """Normalise in the dtype of the weight: under autocast that of the rows is another."""
    normalised: Tensor = norm(rows.to(norm.weight.dtype))
    return normalised.to(rows.dtype)
