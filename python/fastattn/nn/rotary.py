"""Rotary position embedding: query and key turned by angles that grow with their positions."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.nn._common import (
    DerivedBuffers,
    Offset,
    check_bool,
    check_floating,
    check_integer,
    check_real,
    row_positions,
)
from fastattn.nn._rotary_scaling import (
    ORIGINAL,
    attention_factor_of,
    check_scaling,
    frequencies,
    periods,
)
from fastattn.tensors import turned


class RotaryEmbedding(DerivedBuffers):
    """Turns pairs of columns of query and key by ``position * frequency`` [1]_.

    Column pair ``i`` of D' = `rotary_dim` columns has frequency ``base**(-2i / D')``. Scores then depend on
    positions by their difference alone. Angles are float32, as in the models in use, whatever the dtype of
    module and inputs (float64, too); 16-bit inputs are turned in float32 and rounded once.

    Parameters
    ----------
    head_dim : int
        D.
    base : float
        Above 1; "rope_theta" in many configurations.
    interleaved : bool
        Pairs are columns ``(2i, 2i + 1)``, as in GPT-J and the original paper. Otherwise they are
        ``(i, i + D' / 2)``, as in GPT-NeoX and Llama.
    rotary_dim : int, optional
        D', even: only the first D' columns turn. Default: D.
    scaling : {"linear", "ntk", "dynamic", "yarn", "llama3", "longrope"}, optional
        How a context `factor` times as long is reached. Names and parameters are those of transformers, where
        "ntk" is a changed `rope_theta`.

        - "linear": positions divided by `factor` [2]_.
        - "ntk": `base` times ``factor**(D' / (D' - 2))``, which leaves the fastest pair as it is and divides
          the slowest by `factor` [3]_.
        - "dynamic": as "ntk", with ``factor * n / original_max_position_embeddings - (factor - 1)`` for the
          factor, where n is 1 and the largest position of the call, and at least
          `original_max_position_embeddings`. Keys cached before keep the frequencies they were turned with.
        - "yarn": pairs that turn more than `beta_fast` times within the original context are left alone,
          those that turn less than `beta_slow` times are divided by `factor`, others in between [4]_.
        - "llama3": the same with `high_freq_factor` and `low_freq_factor` for the two bounds, and another
          way between them [5]_.
        - "longrope": each frequency divided by its own number, of `long_factor` if the largest position of
          the call lies past the original context, else of `short_factor` [6]_. Of cached keys holds what is
          said of "dynamic".
    factor : float, optional
        At least 1; for every scaling. "longrope" needs it for the default of `attention_factor` alone;
        configurations of Phi-3 lack it: ``max_position_embeddings / original_max_position_embeddings``.
    original_max_position_embeddings : int, optional
        The length that the model was trained with; for all but "linear" and "ntk".
    attention_factor : float, optional
        "yarn" and "longrope": multiplies the turned columns. Default of "yarn": ``0.1 * log(factor) + 1``, or
        with `mscale` and `mscale_all_dim`, which go together, ``(0.1 * mscale * log(factor) + 1)`` divided by
        the same of `mscale_all_dim`. Of "longrope":
        ``sqrt(1 + log(factor) / log(original_max_position_embeddings))``.
    beta_fast, beta_slow : float, optional
        "yarn": default to 32 and 1.
    mscale, mscale_all_dim : float, optional
        "yarn": see `attention_factor`.
    truncate : bool, optional
        "yarn": whether the bounds between the three groups of pairs are rounded outwards. Default: True.
    low_freq_factor, high_freq_factor : float, optional
        "llama3": how many times a pair turns within the original context.
    short_factor, long_factor : sequence of float, optional
        "longrope": D' / 2 numbers above 0.
    device : torch.device, optional
        Of `inv_freq`, the frequencies, which are in no state_dict.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, shape or range, and a parameter that `scaling` lacks or ignores.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    .. [2] Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
       2023.
    .. [3] bloc97, "NTK-Aware Scaled RoPE", 2023, and emozilla, "Dynamically Scaled RoPE", 2023.
    .. [4] Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023.
    .. [5] Llama Team, "The Llama 3 Herd of Models", 2024; the formula is that of the released code.
    .. [6] Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import RotaryEmbedding
    >>> rope = RotaryEmbedding(64)
    >>> query, key = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 5, 64)
    >>> query, key = rope(query, key, offset=100)
    >>> query.shape, key.shape
    (torch.Size([1, 8, 5, 64]), torch.Size([1, 2, 5, 64]))
    """

    inv_freq: Tensor
    long_inv_freq: Tensor  # "longrope" alone

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int | None = None,
        scaling: str | None = None,
        *,
        factor: float | None = None,
        original_max_position_embeddings: int | None = None,
        attention_factor: float | None = None,
        beta_fast: float | None = None,
        beta_slow: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool | None = None,
        low_freq_factor: float | None = None,
        high_freq_factor: float | None = None,
        short_factor: Sequence[float] | None = None,
        long_factor: Sequence[float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_integer("head_dim", head_dim, least=1)
        check_real("base", base, 1, above=True)
        check_bool("interleaved", interleaved)
        self.head_dim = head_dim
        self.base = float(base)
        self.interleaved = interleaved
        self.rotary_dim = _rotary_dim(rotary_dim, head_dim)
        self.scaling = scaling
        self.scaling_parameters = check_scaling(
            scaling,
            self.rotary_dim,
            {
                "factor": factor,
                ORIGINAL: original_max_position_embeddings,
                "attention_factor": attention_factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "mscale": mscale,
                "mscale_all_dim": mscale_all_dim,
                "truncate": truncate,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "short_factor": short_factor,
                "long_factor": long_factor,
            },
        )
        self.attention_factor = attention_factor_of(scaling, self.scaling_parameters)
        self._place_buffers(device)

    def _derived(self) -> dict[str, Tensor]:
        return frequencies(self.base, self.rotary_dim, self.scaling, self.scaling_parameters)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        offset: Offset = 0,
        positions: Tensor | None = None,
        key_offset: Offset | None = None,
        key_positions: Tensor | None = None,
        layout: str = "bhsd",
    ) -> Any:
        """Turn query and key; inputs stay as they are.

        Parameters
        ----------
        query : tensor, shape (B, Hq, Lq, D)
        key : tensor, shape (B, Hkv, Lk, D), optional
            Any number of heads, any length.
        offset : int or (B,) integers
            The position of row 0: in decoding, how many tokens came before.
        positions : (Lq,) or (B, Lq) integers, optional
            The position of each row, in place of `offset`.
        key_offset, key_positions : optional
            The same for key. If neither is given, key stands where query does.
        layout : {"bhsd", "bshd"}
            "bshd": query and key have axes (B, L, H, D).

        Returns
        -------
        query, or (query, key) if key is given
            In their shapes and dtypes.
        """
        axis = _length_axis(layout)
        self._check_input("query", query)
        self._leave_meta(self.inv_freq, query.device)
        rows = row_positions(query.shape[axis], query.shape[0], query.device, offset, positions)
        if key is None:
            if key_offset is not None or key_positions is not None:
                raise ValueError("key_offset and key_positions must be left out where key is None")
            return self._turn(query, self._cos_sin(rows, self._frequencies_for(rows), axis))
        self._check_input("key", key)
        length = key.shape[axis]
        if key_offset is None and key_positions is None:
            if positions is not None and length != query.shape[axis]:
                got = f"None with {query.shape[axis]} query rows and {length} key rows"
                raise ValueError(f"key_positions must be given where lengths differ, got {got}")
            key_rows = rows
            if length != query.shape[axis]:
                key_rows = row_positions(length, key.shape[0], key.device, offset, None)
        else:
            start = 0 if key_offset is None else key_offset
            key_rows = row_positions(length, key.shape[0], key.device, start, key_positions, "key_")
        inv_freq = self._frequencies_for(rows, key_rows)
        cos_sin = self._cos_sin(rows, inv_freq, axis)
        key_cos_sin = cos_sin if key_rows is rows else self._cos_sin(key_rows, inv_freq, axis)
        return self._turn(query, cos_sin), self._turn(key, key_cos_sin)

    def _check_input(self, name: str, x: Any) -> None:
        check_floating(name, x)
        if x.dim() != 4 or x.shape[-1] != self.head_dim:
            expected = f"4 axes, the last of {self.head_dim}"
            raise ValueError(f"{name} must have {expected}, got shape {tuple(x.shape)}")

    def _frequencies_for(self, *rows: Tensor) -> Tensor:
        """Frequencies for a call whose rows stand at these positions."""
        of_length = self.scaling in ("dynamic", "longrope")
        if not of_length or not all(positions.numel() for positions in rows):
            return self.inv_freq
        original = self.scaling_parameters[ORIGINAL]
        length = torch.stack([positions.max() for positions in rows]).max() + 1
        if self.scaling == "longrope":
            return torch.where(length > original, self.long_inv_freq, self.inv_freq)
        factor = self.scaling_parameters["factor"]
        stretch = factor * length.clamp(min=original) / original - (factor - 1)
        base = self.base * stretch ** (self.rotary_dim / (self.rotary_dim - 2))
        return 1.0 / periods(base, self.rotary_dim, rows[0].device)

    def _cos_sin(self, rows: Tensor, inv_freq: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32, broadcasting to the pairs of a tensor with rows on `axis`."""
        angles = rows[..., None].float() * inv_freq
        if axis == 1 or angles.dim() == 3:
            angles = angles.unsqueeze(-2 if axis == 1 else 1)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _turn(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        columns = x[..., : self.rotary_dim].to(torch.promote_types(x.dtype, torch.float32))
        result: Tensor = turned(torch, columns, *cos_sin, self.interleaved).to(x.dtype)
        if self.rotary_dim == self.head_dim:
            return result
        return torch.cat((result, x[..., self.rotary_dim :]), dim=-1)

    def extra_repr(self) -> str:
        """The arguments; those of the scaling only where there is one."""
        parts = [f"{self.head_dim}, base={self.base:g}, interleaved={self.interleaved}"]
        if self.rotary_dim != self.head_dim:
            parts.append(f"rotary_dim={self.rotary_dim}")
        if self.scaling is not None:
            parts.append(f"scaling={self.scaling!r}")
            parts += [f"{name}={reprlib.repr(value)}" for name, value in self.scaling_parameters.items()]
        return ", ".join(parts)


def _rotary_dim(rotary_dim: Any, head_dim: int) -> int:
    name, value = ("head_dim", head_dim) if rotary_dim is None else ("rotary_dim", rotary_dim)
    check_integer(name, value, least=2)
    if value % 2:
        raise ValueError(f"{name} must be even, since columns turn in pairs, got {value}")
    if value > head_dim:
        raise ValueError(f"rotary_dim must be at most head_dim = {head_dim}, got {value}")
    return int(value)


def _length_axis(layout: Any) -> int:
    if not isinstance(layout, str):
        raise TypeError(f"layout must be 'bhsd' or 'bshd', got {type(layout).__name__}")
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', got {layout!r}")
    return 2 if layout == "bhsd" else 1
