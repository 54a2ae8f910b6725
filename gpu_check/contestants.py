"""Who is timed: fastattn, one set of its kernels, and the attention of torch by the kernel that runs it.

Each takes a case and its inputs, and gives a call that returns (out,), or gradients of query, key and value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_check.inputs import Inputs
from gpu_check.routes import Kernels, Public
from tests.shapes import Case

Tensors = tuple[Tensor, ...]
Prepare = Callable[[Case, Inputs, str], Callable[[], Tensors]]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def _ours(route: Any) -> Prepare:
    def prepare(case: Case, inputs: Inputs, mode: str) -> Callable[[], Tensors]:
        if mode == "forward":
            forward = route.forward(inputs)
            return lambda: (forward().out,)
        backward = route.backward(inputs)
        return lambda: tuple(backward().values())

    return prepare


def _sdpa(name: str) -> Prepare:
    def prepare(case: Case, inputs: Inputs, mode: str) -> Callable[[], Tensors]:
        if case.window or (case.causal and case.seqlen_q != case.seqlen_k):
            raise NotImplementedError("it has no such rule")
        options = {"is_causal": bool(case.causal), "enable_gqa": case.query_heads != case.kv_heads}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(BACKENDS[name]):
                return functional.scaled_dot_product_attention(query, key, value, **options)

        return _of_torch(attend, inputs, mode)

    return prepare


def _folded(name: str) -> Prepare:
    """Query heads that share keys as more rows of one head: the same function where no rule looks at rows."""

    def prepare(case: Case, inputs: Inputs, mode: str) -> Callable[[], Tensors]:
        if case.window or case.causal or mode != "forward" or case.query_heads == case.kv_heads:
            raise NotImplementedError(
                "rows of different heads go together only where no rule tells them apart"
            )
        batch, heads, rows, dim = inputs.query.shape
        query = inputs.query.view(batch, case.kv_heads, -1, dim)

        def run() -> Tensors:
            with sdpa_kernel(BACKENDS[name]):
                out = functional.scaled_dot_product_attention(query, inputs.key, inputs.value)
            return (out.view(batch, heads, rows, -1),)

        return run

    return prepare


def _flex(case: Case, inputs: Inputs, mode: str) -> Callable[[], Tensors]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # each row compiles anew, and none counts against the limit of the next
    offset, (left, _) = case.seqlen_k - case.seqlen_q, case.window or (None, None)

    def seen(b: Any, h: Any, row: Any, column: Any) -> Any:
        visible = column <= row + offset
        return visible if left is None else visible & (column >= row + offset - left)

    block_mask = None
    if case.causal:
        block_mask = create_block_mask(
            seen, None, None, case.seqlen_q, case.seqlen_k, device=inputs.query.device.type
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": block_mask, "enable_gqa": case.query_heads != case.kv_heads}
    return _of_torch(lambda *tensors: compiled(*tensors, **options), inputs, mode)


def _of_torch(attend: Callable[..., Tensor], inputs: Inputs, mode: str) -> Callable[[], Tensors]:
    if mode == "forward":

        def run() -> Tensors:
            with torch.no_grad():
                return (attend(inputs.query, inputs.key, inputs.value),)

        return run
    leaves = list(inputs.with_graph().differentiable.values())[:3]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)


CONTESTANTS: dict[str, Prepare] = {
    "fastattn": _ours(Public()),
    "portable": _ours(Kernels("portable")),
    "portable atomic": _ours(Kernels("portable", atomic=True)),
    "hopper": _ours(Kernels("hopper")),
    "decode": _ours(Kernels("decode")),
    **{
        f"{name} ahead {number}": _ours(Kernels(name, ahead=number))
        for name in ("portable", "decode")
        for number in (1, 2)
    },
    "cudnn": _sdpa("cudnn"),
    "flash": _sdpa("flash"),
    "cudnn folded": _folded("cudnn"),
    "flash folded": _folded("flash"),
    "flex": _flex,
}
PEERS = ("cudnn", "flash", "flex", "cudnn folded", "flash folded")
