"""Masks of ``transformers`` models: a rule where a rule says it all, a matrix elsewhere.

A mask in transformers is a function of (batch, head, query, key). Where that function is nothing but the
causal rule, a sliding window and padding, the mask stays a rule (`RuleMask`) and no matrix is made; anything
else (packed sequences, chunks, image blocks) becomes a dense bool mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

__all__ = ["Rule", "RuleMask", "make_mask"]

# (left, right): how many keys before and after its own position a query sees; None = all.
Window = tuple[int | None, int | None]
# Models with layers that do more with a mask than hand it on, and take it for eager attention's floats.
_READ_AS_FLOATS = frozenset({"deepseek_v4", "nllb-moe"})


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, said without a matrix.

    Query i stands at key position ``i + query_offset``, or the last query at the last key if that is None.
    Keys count where `key_mask` (B, Lk) is True; where all the padding is outside of them, `kv_starts` and
    `kv_lengths` (B,), where they start and end, say the same.
    """

    causal: bool
    window: Window
    query_offset: int | None
    key_mask: torch.Tensor | None = None
    kv_starts: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    # Where each sequence begins, if what queries may see of padding is on the left: for a cache without it.
    begins: tuple[int, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the rule as arguments of `fastattn.attention`."""
        arguments: dict[str, Any] = {"causal": self.causal}
        if self.query_offset is not None:
            arguments["query_offset"] = self.query_offset
        if self.window != (None, None):
            arguments["window"] = self.window
        if self.kv_lengths is not None:
            arguments["kv_starts"], arguments["kv_lengths"] = self.kv_starts, self.kv_lengths
        elif self.key_mask is not None:
            arguments["mask"] = self.key_mask[:, None, None, :]
        return arguments

    def dense(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Return the rule as a bool mask of `shape` (B, 1, Lq, Lk)."""
        left, right = self.window
        offset = shape[3] - shape[2] if self.query_offset is None else self.query_offset
        position = torch.arange(shape[2], device=device)[:, None] + offset
        key = torch.arange(shape[3], device=device)
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        if self.causal:
            mask &= key <= position
        if left is not None:
            mask &= key >= position - left
        if right is not None:
            mask &= key <= position + right
        if self.key_mask is not None:
            mask &= self.key_mask[:, None, None, :]
        return mask


class RuleMask(torch.Tensor):
    """A bool mask (B, 1, Lq, Lk) that holds its rule, and its elements only once somebody looks at them.

    Models slice, move, combine and even write to the masks that they are given. Every torch operation
    therefore works on the dense mask, which is made at the first one and is the truth from then on.
    """

    rule: Rule | None
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(cls, rule: Rule, shape: tuple[int, int, int, int], device: torch.device) -> RuleMask:
        """Return a mask without storage."""
        mask: RuleMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.rule = rule
        mask._dense = None
        return mask

    def __init__(self, *_: Any) -> None:
        pass

    def dense(self) -> torch.Tensor:
        """Return the elements; the rule is given up, since they may be written to."""
        if self._dense is None:
            assert self.rule is not None
            self._dense = self.rule.dense(self.shape, self.device)
            self.rule = None
        return self._dense

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out the class and the function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do `func` on the dense masks."""
        args, kwargs = tree_map_only(RuleMask, RuleMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RuleMask(shape={tuple(self.shape)}, rule={self.rule})"


def make_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    cache_position: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Mask with the signature that transformers calls.

    4.57 says where the queries stand by `cache_position`, 5 by `q_length` and `q_offset`. There is always a
    mask: what None means, causal or nothing hidden, is left to layers, and not all of them know.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        B, Lq, Lk.
    q_offset, kv_offset : int
        Positions of the first query and of the first key.
    mask_function : callable
        (batch, head, query position, key position) -> bool.
    attention_mask : torch.Tensor, optional
        (B, at most kv_offset + Lk) bool padding, True = a real token; what it does not cover is padding.
    cache_position : torch.Tensor, optional
        (Lq,) positions of the queries.
    allow_is_causal_skip, allow_is_bidirectional_skip : bool
        Whether anything but a dense mask may be returned.
    device : torch.device or str
        Where the mask is to live.
    config : transformers.PretrainedConfig, optional
        Of the model.
    **kwargs : Any
        Further arguments of ``transformers.masking_utils.sdpa_mask``.

    Returns
    -------
    torch.Tensor
        (B, 1, Lq, Lk) bool, True = attend, a `RuleMask` where that says it all. For models whose layers need
        one, floats to be added to the scores.
    """
    may_be_a_rule = allow_is_causal_skip or allow_is_bidirectional_skip
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    floats = getattr(config, "model_type", None) in _READ_AS_FLOATS
    band = _band(mask_function) if may_be_a_rule and not tracing and not floats else None
    if cache_position is not None:
        device, q_length = cache_position.device, cache_position.shape[0]
        if band is not None and not torch.all(cache_position.diff() == 1):
            band = None
        kwargs["cache_position"] = cache_position
        q_offset = cache_position[0]
    else:
        kwargs |= {"q_length": q_length, "q_offset": q_offset, "device": device}
    if band is None or not q_length:
        make_dense: Callable[..., Any] = masking_utils.eager_mask if floats else masking_utils.sdpa_mask
        dense: torch.Tensor = make_dense(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **kwargs,
        )
        return dense

    causal, window = band
    offset = int(q_offset) - kv_offset
    seen = offset + q_length if causal else kv_length
    padding = _padding(attention_mask, kv_length, kv_offset, seen=seen)
    window = _cutting(window, causal, offset, q_length, kv_length)
    rule = Rule(causal, window, None if offset + q_length == kv_length else offset, *padding)
    if padding[0] is not None:
        rule = replace(rule, begins=_begins(padding[0][:, :seen]))
    return RuleMask(rule, (batch_size, 1, q_length, kv_length), torch.device(device))


def _band(function: Callable[..., Any]) -> tuple[bool, Window] | None:
    """(causal, window) of a mask function of transformers, or None where it is anything else.

    The functions are closures, told apart by their names: one that is not recognised costs a dense mask,
    never a wrong one.
    """
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    name = function.__qualname__.split(".")[0]
    closure = dict(_closure(function))
    if name == "causal_mask_function":
        return True, (None, None)
    if name == "bidirectional_mask_function":
        return False, (None, None)
    if name == "sliding_window_overlay":
        return False, (closure["sliding_window"] - 1, None)
    if name == "sliding_window_bidirectional_overlay":
        return False, (closure["sliding_window"], closure["sliding_window"])
    if name != "and_masks":
        return None
    bands = [_band(member) for member in closure["mask_functions"]]
    if None in bands:
        return None
    causal = any(band[0] for band in bands if band)
    sides = zip(*(band[1] for band in bands if band), strict=True)
    left, right = (min((bound for bound in side if bound is not None), default=None) for side in sides)
    return causal, (left, right)


def _closure(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Names and values that `function` closes over."""
    names = function.__code__.co_freevars
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        yield name, cell.cell_contents


def _begins(mask: torch.Tensor) -> tuple[int, ...] | None:
    """Where the tokens of each sequence begin in a padding mask; None where padding comes after them."""
    begins = mask.shape[1] - mask.sum(1)
    on_the_left = mask == (torch.arange(mask.shape[1], device=mask.device) >= begins[:, None])
    return tuple(begins.tolist()) if on_the_left.all() else None


def _cutting(window: Window, causal: bool, offset: int, q_length: int, kv_length: int) -> Window:
    """`window` without the bounds that no pair of these positions crosses."""
    left, right = window
    if left is not None and left >= offset + q_length - 1:
        left = None
    if right is not None and (causal or right >= kv_length - 1 - offset):
        right = None
    return left, right


def _padding(
    mask: torch.Tensor | None, kv_length: int, kv_offset: int, seen: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(key_mask, kv_starts, kv_lengths) of a padding mask; all None if none of the keys `seen` is padding."""
    if mask is None:
        return None, None, None
    mask = mask[:, kv_offset : kv_offset + kv_length]
    if mask[:, :seen].all() and mask.shape[1] >= min(seen, kv_length):
        return None, None, None
    mask = torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))
    starts = mask.to(torch.int8).argmax(1)
    ends = starts + mask.sum(1)
    key = torch.arange(kv_length, device=mask.device)
    in_one_piece = bool((mask == ((key >= starts[:, None]) & (key < ends[:, None]))).all())
    return (mask, starts, ends) if in_one_piece else (mask, None, None)
