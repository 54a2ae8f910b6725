"""What the modules share: checks of arguments, positions, buffers that need no storing, and the one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastattn.functional import attention

# Where a row stands: one number for all sequences, or a (B,) tensor with one for each.
Offset: TypeAlias = int | Tensor


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise TypeError or ValueError unless `value` is an integer from `least` up."""
    # A length that is symbolic under torch.export is no int.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_real(name: str, value: Any, least: float, most: float = math.inf, above: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number within the bounds.

    `above` excludes `least` itself.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
        bounds = f"in [{least}, {most}]"
        if most == math.inf:
            bounds = f"{'above' if above else 'at least'} {least}"
        raise ValueError(f"{name} must be a finite number {bounds}, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_floating(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a tensor of floating point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating point dtype, got {value.dtype}")


def check_integers(name: str, value: Tensor) -> None:
    """Raise TypeError unless the tensor `value` holds integers."""
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {value.dtype}")


def check_offset(name: str, offset: Any, batch: int | None, least: int | None = None) -> None:
    """Raise unless `offset` is an integer, or a tensor of one or of `batch` integers (None: any number)."""
    if not isinstance(offset, Tensor):
        if not isinstance(offset, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an integer or a tensor of them, got {type(offset).__name__}")
        check_integer(name, offset, least)
        return
    check_integers(name, offset)
    if offset.dim() > 1 or (offset.dim() == 1 and batch is not None and offset.shape[0] not in (1, batch)):
        expected = "() or (B,)" if batch is None else f"() or ({batch},)"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(offset.shape)}")


def row_positions(
    length: int, batch: int, device: torch.device, offset: Any, positions: Any, prefix: str = ""
) -> Tensor:
    """Where each row stands, as int64 of shape (length,) or (batch or 1, length).

    `positions` says so itself; otherwise rows stand at `offset`, `offset` + 1 and so on.
    """
    if positions is None:
        check_offset(f"{prefix}offset", offset, batch)
        steps = torch.arange(length, device=device)
        if isinstance(offset, Tensor):
            offset = offset.to(device=device, dtype=torch.int64)[..., None]
        rows: Tensor = steps + offset
        return rows
    name = f"{prefix}positions"
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(positions).__name__}")
    check_integers(name, positions)
    if isinstance(offset, Tensor) or offset:
        raise ValueError(f"{prefix}offset must be left out where {name} is given, got {offset}")
    shape = tuple(positions.shape)
    if shape not in ((length,), (batch, length), (1, length)):
        raise ValueError(f"{name} must have shape ({length},) or ({batch}, {length}), got {shape}")
    return positions.to(device=device, dtype=torch.int64)


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise RuntimeError unless the tensor `value` is on `device`."""
    if value.device != device:
        raise RuntimeError(f"{name} is on device '{value.device}', expected '{device}'")


def check_score_bias(bias: Any, query: Tensor, scores: tuple[int, int, int, int]) -> None:
    """Raise unless `bias` can be added to scores of that shape, of the heads `query`."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"score_bias must be a torch.Tensor, got {type(bias).__name__}")
    check_device("score_bias", bias, query.device)
    if bias.dtype not in (query.dtype, torch.float32) and not (
        bias.is_floating_point() and torch.is_autocast_enabled(query.device.type)  # which casts it
    ):
        advice = " (a bool goes to `mask`)" if bias.dtype == torch.bool else ""
        expected = f"{query.dtype} like the heads, or float32"
        raise TypeError(f"score_bias must be {expected}, got {bias.dtype}{advice}")
    axes = zip(reversed(bias.shape), reversed(scores), strict=False)
    if bias.dim() > 4 or any(size not in (1, full) for size, full in axes):
        expected = f"broadcast to (batch, num_heads, queries, keys) = {tuple(scores)}"
        raise ValueError(f"score_bias must {expected}, got shape {tuple(bias.shape)}")


def check_backend(name: Any) -> None:
    """Raise TypeError unless `name` is a string or None; `fastattn.attention` knows which there are."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend must be a name or None, got {type(name).__name__}")


def attend(query: Tensor, key: Tensor, value: Tensor, *, backend: str | None, **arguments: Any) -> Any:
    """Call `fastattn.attention` in layout "bshd", the one in which projections return their heads."""
    return attention(query, key, value, layout="bshd", backend=backend, **arguments)


class DerivedBuffers(nn.Module):
    """A module whose buffers follow from its arguments.

    They are computed again wherever the module goes. So they are in no state_dict, stay float32 after
    ``.half()`` or ``.to(torch.bfloat16)``, and hold their values after ``to_empty()``, which leaves other
    buffers undefined. After ``load_state_dict(assign=True)``, which takes parameters alone from the meta
    device, they follow at the first call.
    """

    def _derived(self) -> dict[str, Tensor]:
        """Buffers by name, on the CPU: every device then has the same bits."""
        raise NotImplementedError

    def _place_buffers(self, device: torch.device | str | None) -> None:
        device = torch.get_default_device() if device is None else device
        with torch.inference_mode(False):  # of which a buffer could not be used in training
            for name, buffer in self._derived().items():
                self.register_buffer(name, buffer.to(device), persistent=False)

    def _leave_meta(self, buffer: Tensor, device: torch.device) -> None:
        """Place buffers, of which `buffer` is one, where a call is, if they are still on the meta device."""
        if buffer.is_meta and device.type != "meta":
            self._place_buffers(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_buffers(next(self.buffers(recurse=False)).device)
        return self
