"""How rotary frequencies are changed for a longer context; names and parameters are those of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.nn._common import check_bool, check_integer, check_real

ORIGINAL = "original_max_position_embeddings"
# Scaling -> the parameters that it needs, and those that it may have.
SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "ntk": ({"factor"}, set()),
    "dynamic": ({"factor", ORIGINAL}, set()),
    "yarn": (
        {"factor", ORIGINAL},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", ORIGINAL, "low_freq_factor", "high_freq_factor"}, set()),
    "longrope": ({ORIGINAL, "short_factor", "long_factor"}, {"factor", "attention_factor"}),
}


def check_scaling(scaling: Any, rotary_dim: int, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that were given, once they are what `scaling` takes."""
    if scaling is not None and not isinstance(scaling, str):
        raise TypeError(f"scaling must be a string or None, got {type(scaling).__name__}")
    if scaling is not None and scaling not in SCALINGS:
        raise ValueError(f"scaling must be None or one of {', '.join(SCALINGS)}, got {scaling!r}")
    needed, optional = (set[str](), set[str]()) if scaling is None else SCALINGS[scaling]
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in parameters:
        if name in given and name not in needed | optional:
            raise ValueError(f"{name} must be left out where scaling is {scaling!r}, got {given[name]!r}")
        if name in needed and name not in given:
            raise ValueError(f"{name} must be given where scaling is {scaling!r}, got None")
    for name, value in given.items():
        if name == "truncate":
            check_bool(name, value)
        elif name == ORIGINAL:
            check_integer(name, value, least=2 if scaling == "longrope" else 1)
        elif name in ("short_factor", "long_factor"):
            given[name] = _check_factors(name, value, rotary_dim // 2)
        elif name == "factor":
            check_real(name, value, 1)
        else:
            check_real(name, value, 0, above=True)
    if ("mscale" in given) != ("mscale_all_dim" in given):
        raise ValueError("mscale and mscale_all_dim must be given together, got one of them")
    fast, slow = given.get("beta_fast", 32), given.get("beta_slow", 1)
    if fast < slow:
        raise ValueError(f"beta_fast must be at least beta_slow = {slow}, got {fast}")
    low, high = given.get("low_freq_factor", 1), given.get("high_freq_factor", 4)
    if high <= low:
        raise ValueError(f"high_freq_factor must be above low_freq_factor = {low}, got {high}")
    if scaling == "longrope" and not given.keys() & {"factor", "attention_factor"}:
        raise ValueError("factor or attention_factor must be given where scaling is 'longrope', got neither")
    if scaling in ("ntk", "dynamic") and rotary_dim == 2:
        raise ValueError(f"rotary_dim must be above 2 where scaling is {scaling!r}, got 2")
    return given


def _check_factors(name: str, given: Any, pairs: int) -> list[float]:
    """A number for each pair of columns."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a list of numbers, got {type(given).__name__}")
    if len(given) != pairs:
        raise ValueError(f"{name} must have rotary_dim / 2 = {pairs} numbers, got {len(given)}")
    for number in given:
        check_real(name, number, 0, above=True)
    return [float(number) for number in given]


def frequencies(base: float, dim: int, scaling: str | None, parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Buffers by name, (dim / 2,): float32 operations in the order of the models that are in use."""
    if scaling == "ntk":
        base *= parameters["factor"] ** (dim / (dim - 2))
    turn = periods(base, dim, torch.device("cpu"))
    inv_freq = 1.0 / turn
    if scaling == "linear":
        inv_freq = inv_freq / parameters["factor"]
    elif scaling == "yarn":
        kept = _yarn_kept(base, dim, **parameters)
        inv_freq = 1.0 / (parameters["factor"] * turn) * (1 - kept) + inv_freq * kept
    elif scaling == "llama3":
        kept = _llama3_kept(inv_freq, **parameters)
        inv_freq = (1 - kept) * inv_freq / parameters["factor"] + kept * inv_freq
    elif scaling == "longrope":
        short, long = (
            1.0 / (torch.tensor(parameters[name], dtype=torch.float32, device="cpu") * turn)
            for name in ("short_factor", "long_factor")
        )
        return {"inv_freq": short, "long_inv_freq": long}
    return {"inv_freq": inv_freq}


def attention_factor_of(scaling: str | None, parameters: dict[str, Any]) -> float:
    """What turned columns are multiplied by."""
    if scaling == "yarn":
        return _yarn_attention_factor(**parameters)
    return _longrope_attention_factor(**parameters) if scaling == "longrope" else 1.0


def periods(base: float | Tensor, dim: int, device: torch.device) -> Tensor:
    """Positions to a radian for each pair of `dim` columns, float32."""
    periods: Tensor = base ** (torch.arange(0, dim, 2, device=device).float() / dim)
    return periods


def _yarn_attention_factor(
    factor: float,
    attention_factor: float | None = None,
    mscale: float = 1.0,
    mscale_all_dim: float = 0.0,
    **_: Any,
) -> float:
    """Make up for the flatter softmax over a longer context (equation 22 of the paper)."""
    if attention_factor is not None:
        return float(attention_factor)
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)


def _yarn_kept(
    base: float,
    dim: int,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    **_: Any,
) -> Tensor:
    """How much of each frequency is kept: 1 for fast pairs, 0 for slow ones, a ramp between."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # a step, and no division by 0
    ramp = (torch.arange(dim // 2, device="cpu").float() - low) / width
    return 1 - ramp.clamp(0, 1)


def _llama3_kept(
    inv_freq: Tensor,
    original_max_position_embeddings: int,
    low_freq_factor: float,
    high_freq_factor: float,
    **_: Any,
) -> Tensor:
    """How much of each frequency is kept: the ramp is linear in how often a pair turns."""
    turns = original_max_position_embeddings / (2 * math.pi / inv_freq)
    return ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)


def _longrope_attention_factor(
    original_max_position_embeddings: int,
    factor: float = 1.0,
    attention_factor: float | None = None,
    **_: Any,
) -> float:
    """Make up for the flatter softmax over a longer context (the paper's repository has the formula)."""
    if attention_factor is not None:
        return float(attention_factor)
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))
