"""Ways into the kernels: the public function, which chooses, or one set of kernels by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_check.inputs import Inputs


class SkippedError(Exception):
    """What is not there to be checked; says why."""


class Outputs(NamedTuple):
    """What a forward gave."""

    out: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None


class Public:
    """`fastattn.attention`."""

    name = "fastattn"

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def forward(self, inputs: Inputs, lse: bool = False, weights: bool = False) -> Callable[[], Outputs]:
        import fastattn as fa

        query, key, value, options = inputs.query, inputs.key, inputs.value, inputs.options
        flags: dict[str, Any] = {"return_lse": lse, "return_weights": weights, "backend": self.backend}

        def run() -> Outputs:
            with torch.no_grad():
                found = fa.attention(query, key, value, **options, **flags)
            out, *rest = found if isinstance(found, tuple) else (found,)
            return Outputs(out, rest.pop(0) if lse else None, rest.pop(0) if weights else None)

        return run

    def backward(self, inputs: Inputs, grad_lse: Tensor | None = None) -> Callable[[], dict[str, Tensor]]:
        import fastattn as fa

        recorded = inputs.with_graph()
        leaves = recorded.differentiable
        found = fa.attention(
            recorded.query, recorded.key, recorded.value, **recorded.options,
            return_lse=grad_lse is not None, backend=self.backend,
        )  # fmt: skip
        results = found if grad_lse is not None else (found,)
        incoming = (inputs.grad_out,) if grad_lse is None else (inputs.grad_out, grad_lse)

        def run() -> dict[str, Tensor]:
            gradients = torch.autograd.grad(results, list(leaves.values()), incoming, retain_graph=True)
            return dict(zip(leaves, gradients, strict=True))

        return run


class Kernels:
    """One set of kernels of `fastattn.gpu`, whichever the public function would choose."""

    def __init__(
        self, name: str = "portable", atomic: bool = False, tf32: bool = False, ahead: int = 0
    ) -> None:
        self.name, self.atomic, self.tf32 = name, atomic, tf32
        self.ahead = (
            ahead  # which of `configs.ahead` the forward takes, counted from 1; 0: what the tables say
        )

    def forward(self, inputs: Inputs, lse: bool = False, weights: bool = False) -> Callable[[], Outputs]:
        call = call_of(inputs, self.tf32)
        launch = self._launch_forward(call)
        shape = (*inputs.query.shape[:3], inputs.value.shape[3])

        def run() -> Outputs:
            out = inputs.query.new_empty(shape)
            found = torch.empty(shape[:3], dtype=torch.float32, device=out.device) if lse or weights else None
            launch(call, out, found)
            if not weights:
                return Outputs(out, found)
            from fastattn.gpu.weights import weights as launch_weights

            matrix = out.new_empty((*shape[:3], inputs.key.shape[2]))
            launch_weights(call, found, matrix)
            return Outputs(out, found if lse else None, matrix)

        return run

    def backward(self, inputs: Inputs, grad_lse: Tensor | None = None) -> Callable[[], dict[str, Tensor]]:
        from fastattn.gpu.call import Gradients

        call, launch = call_of(inputs, self.tf32), self._launch_backward(inputs.query.shape[3])
        out, lse, _ = self.forward(inputs, lse=True)()
        given = inputs.differentiable

        def run() -> dict[str, Tensor]:
            made = {name: x.new_empty(x.shape) for name, x in given.items()}
            wanted = dict(made)
            if "alibi_slopes" in made:
                wanted["alibi_slopes"] = made["alibi_slopes"].new_empty(call.query.shape[:2])
            if "bias" in made:
                wanted["bias"] = made["bias"].view((1,) * (4 - made["bias"].ndim) + made["bias"].shape)
            launch(call, out, lse, inputs.grad_out, grad_lse, Gradients(**wanted))
            if "alibi_slopes" in made and made["alibi_slopes"].ndim == 1:
                made["alibi_slopes"] = wanted["alibi_slopes"].sum(0)
            return made

        return run

    def _launch_forward(self, call: Any) -> Callable[..., None]:
        if self.name == "hopper":
            return self._hopper().forward
        from fastattn.gpu import configs, decode, forward

        launch = decode.decode if self.name == "decode" else forward.forward
        if not self.ahead:
            return launch
        kernel = "decode" if self.name == "decode" else "forward"
        tiles = configs.ahead(kernel, call)
        if len(tiles) < self.ahead:
            raise SkippedError("there are no such tiles for this device and these numbers")
        return partial(launch, tiles=tiles[self.ahead - 1])

    def _hopper(self) -> Any:
        from fastattn.gpu import hopper

        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            raise SkippedError("the device is not of compute capability 9.0")
        return hopper

    def _launch_backward(self, head_dim: int) -> Callable[..., None]:
        if self.name == "hopper":
            hopper = self._hopper()
            if head_dim not in hopper.KEY_TILES:
                raise SkippedError(f"there is no Hopper backward for heads of {head_dim}")
            return hopper.backward
        from fastattn.gpu.backward import backward

        def launch(*arguments: Any) -> None:
            *others, wanted = arguments
            backward(*others, None, wanted, atomic=self.atomic)

        return launch


def call_of(inputs: Inputs, tf32: bool = False) -> Any:
    """What the kernels take, made of the arguments alone."""
    if not inputs.query.is_cuda and "TRITON_INTERPRET" not in os.environ:
        raise SkippedError("kernels need a device, or Triton's interpreter")
    from fastattn.gpu.call import Call
    from fastattn.problem import UNBOUNDED

    query, key, options = inputs.query, inputs.key, inputs.options
    scores = (*query.shape[:3], key.shape[2])
    left, right = (UNBOUNDED if bound is None else bound for bound in options.get("window") or (None, None))
    causal, offset, slopes = options.get("causal"), options.get("query_offset"), options.get("alibi_slopes")
    mask, bias, scale = options.get("mask"), options.get("bias"), options.get("scale")
    return Call(
        query,
        key,
        inputs.value,
        None if mask is None else mask.expand(scores),
        None if bias is None else bias.expand(scores),
        options.get("kv_lengths"),
        offset,
        0 if causal == "top_left" else scores[3] - scores[2],
        left,
        0 if causal else right,
        None if slopes is None else slopes.expand(scores[:2]),
        options.get("sinks"),
        options.get("softcap", 0.0),
        query.shape[3] ** -0.5 if scale is None else scale,
        options.get("dropout_p", 0.0),
        options.get("dropout_seed", 0),
        options.get("dropout_offset", 0),
        tf32,
    )
