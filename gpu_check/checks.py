"""What is held against float64 on the device: lists of small calls, each list the work of one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gpu_check import reference
from gpu_check.inputs import Inputs, draw, poison
from gpu_check.routes import Kernels, Outputs, Public
from tests.shapes import Case

# Of ||x - float64|| / ||float64||: a few roundings of the operands of a product, and of the result.
LIMITS = {"float32": 5e-6, "tf32": 3e-3, "float16": 1e-3, "bfloat16": 8e-3}
GRADIENT = 3.0  # a gradient goes through twice as many products
SMALL_GRADIENT = 12.0  # that of sinks and slopes is a sum over a head, in which most cancels
ROW = 6.0  # the worst row may be off by so much more than the whole
OF_TORCH = 3.0  # and the error of torch's own operations in the same dtype may be exceeded by so much
LSE = {"float32": 2e-5, "tf32": 1e-2, "float16": 1e-4, "bfloat16": 1e-4}  # absolute, or of |lse| above 1
SEEN = 1e-4  # a probability above this is no 0 in any dtype


class WrongError(Exception):
    """A result that is not right; says how."""


@dataclass(frozen=True)
class Check:
    """One call: forward, or forward and backward."""

    case: Case
    dtype: str
    mode: str = "forward"
    layout: str = "plain"
    extras: dict[str, Any] = field(default_factory=dict)  # arguments that no Case names
    kernels: str = ""  # "": through the public function
    tf32: bool = False
    weights: bool = False
    atomic: bool = False

    @property
    def label(self) -> str:
        told = [self.case.name, self.dtype, f"d{self.case.head_dim}"]
        told += [self.mode] if self.mode != "forward" else []
        told += [self.layout] if self.layout != "plain" else []
        told += [f"{name}={value}" for name, value in self.extras.items()]
        told += [name for name in ("tf32", "weights", "atomic") if getattr(self, name)]
        return " ".join([*told, *([self.kernels] if self.kernels else [])])

    def inputs(self, device: str, seed: int) -> Inputs:
        drawn = draw(self.case, self.dtype, device, seed, self.layout)
        return replace(drawn, options=drawn.options | self.extras)

    def run(self, device: str, seed: int, backend: str | None) -> dict[str, float]:
        """Relative errors by name. Raises WrongError."""
        inputs = self.inputs(device, seed)
        route = Kernels(self.kernels, self.atomic, self.tf32) if self.kernels else Public(backend)
        check = _check_backward if self.mode == "backward" else _check_forward
        return check(self, route, inputs, device)

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 else self.dtype


def _check_forward(check: Check, route: Any, inputs: Inputs, device: str) -> dict[str, float]:
    arguments = inputs.options | inputs.differentiable
    right = reference.attend(**arguments)
    torchs = None if check.tf32 else reference.attend(**arguments, dtype=inputs.query.dtype)
    run = route.forward(inputs, lse=True, weights=check.weights)
    poison(device)
    first = run()
    poison(device)
    second = run()
    errors = {"out": compare("out", first.out, right.out, LIMITS[check.precision], torchs and torchs.out)}
    assert first.lse is not None
    errors["lse"] = compare_lse(first.lse, right.lse, LSE[check.precision])
    if check.weights:
        errors["weights"] = _compare_weights(check, first, right, torchs)
    for name, one, other in zip(first._fields, first, second, strict=True):
        if one is not None and not torch.equal(one, other):
            raise WrongError(f"{name} differs between two runs")
    return errors


def _compare_weights(
    check: Check, found: Outputs, right: reference.Result, torchs: reference.Result | None
) -> float:
    weights = found.weights
    assert weights is not None
    if bool(((weights != 0) & (right.weights == 0)).any()):
        raise WrongError("weights that are hidden or dropped are not 0")
    if bool(((weights == 0) & (right.weights > SEEN)).any()):
        raise WrongError("weights that are kept are 0")
    return compare("weights", weights, right.weights, LIMITS[check.precision], torchs and torchs.weights)


def _check_backward(check: Check, route: Any, inputs: Inputs, device: str) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(1)
    shape = inputs.query.shape[:3]
    grad_lse = torch.randn(shape, generator=generator, device=device) if "sinks" in inputs.options else None
    right = _gradients(inputs, grad_lse, torch.float64)
    torchs = {} if check.tf32 else _gradients(inputs, grad_lse, inputs.query.dtype)
    run = route.backward(inputs, grad_lse)
    poison(device)
    first = run()
    poison(device)
    second = run()
    errors, wrong = {}, []
    for name, gradient in first.items():
        small = name in ("sinks", "alibi_slopes")
        limit = LIMITS[check.precision] * (SMALL_GRADIENT if small else GRADIENT)
        try:
            if gradient.shape != right[name].shape:
                raise WrongError(f"gradient of {name} has shape {tuple(gradient.shape)}")
            errors[f"d{name}"] = compare(
                f"gradient of {name}", gradient, right[name], limit, torchs.get(name)
            )
            if not check.atomic and not torch.equal(gradient, second[name]):
                raise WrongError(f"gradient of {name} differs between two runs")
        except WrongError as reason:  # which of them are wrong says what may be
            wrong.append(str(reason))
    if wrong:
        raise WrongError("; ".join(wrong))
    return errors


def _gradients(inputs: Inputs, grad_lse: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    # Leaves in `dtype`: a gradient is rounded to the dtype of its leaf.
    given = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.differentiable.items()}
    found = reference.attend(**(inputs.options | given), dtype=dtype)
    results, incoming = [found.out], [inputs.grad_out.to(dtype)]
    if grad_lse is not None:
        results.append(found.lse)
        incoming.append(grad_lse.to(dtype))
    gradients = torch.autograd.grad(results, list(given.values()), incoming)
    return dict(zip(given, gradients, strict=True))


def error_of(found: Tensor, right: Tensor) -> tuple[float, float]:
    """||found - right|| / ||right||, and that of the worst row, over the norm of a mean row at least."""
    right = right.double()
    difference = (found.double() - right).reshape(-1, right.shape[-1] if right.ndim else 1)
    rows = right.reshape(difference.shape).norm(dim=-1)
    typical = rows.square().mean().sqrt()
    if not difference.numel():
        return 0.0, 0.0
    if not typical > 0:  # all of it is 0, and has to be
        worst = float(difference.abs().max())
        return worst, worst
    whole = difference.norm() / (typical * len(rows) ** 0.5)
    return float(whole), float((difference.norm(dim=-1) / rows.clamp_min(typical)).max())


def compare(name: str, found: Tensor, right: Tensor, limit: float, torchs: Tensor | None = None) -> float:
    """The relative error. Raises WrongError where it is too large or no number."""
    whole, row = error_of(found, right)
    if not (whole <= limit and row <= ROW * limit):
        raise WrongError(
            f"{name} is off by {whole:.1e} of its norm (limit {limit:.0e}), its worst row by {row:.1e}"
        )
    if torchs is not None and bool(right.any()):
        own, _ = error_of(torchs, right)
        if not whole <= OF_TORCH * own + limit / 4:
            raise WrongError(f"{name} is off by {whole:.1e} of its norm, torch's own operations by {own:.1e}")
    return whole


def compare_lse(found: Tensor, right: Tensor, limit: float) -> float:
    """The largest error, of |lse| where that is above 1."""
    dead = right == -reference.INF
    if not torch.equal(found == -reference.INF, dead):
        raise WrongError("lse is not -inf exactly where nothing is visible")
    difference = ((found.double() - right) / right.abs().clamp_min(1)).masked_fill(dead, 0).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    if not worst <= limit:
        raise WrongError(f"lse is off by {worst:.1e} (limit {limit:.0e})")
    return worst
