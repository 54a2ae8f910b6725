"""Attention in a graph of torch: a node whose backward is the compiled one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastattn.arrays import Strided
from fastattn.dispatch import choose_differentiable
from fastattn.outputs import Gradients, Outputs, prepare_outputs, returned
from fastattn.problem import AttentionProblem

_TWICE = (
    "the backward of attention() is compiled and cannot be differentiated itself: "
    "call attention(..., backend='math') where gradients of gradients are needed"
)


class _Call(NamedTuple):
    """What a node keeps besides tensors."""

    names: tuple[str, ...]  # of backends
    return_weights: bool
    options: dict[str, Any]  # arguments without a gradient


def attention(
    names: tuple[str, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Any,
    sinks: Any,
    return_lse: bool,
    return_weights: bool,
    **options: Any,
) -> Any:
    """`fastattn.attention` where some of its tensors require grad: the same results, which carry a graph."""
    call = _Call(names, return_weights, options)
    apply: Any = _Attention.apply
    out, lse, weights = apply(call, query, key, value, mask, bias, alibi_slopes, sinks)
    return returned(out, lse if return_lse else None, weights)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        alibi_slopes: Any,
        sinks: Any,
    ) -> tuple[Tensor | None, ...]:
        problem = AttentionProblem.from_arguments(
            query, key, value, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, **call.options
        )
        ctx.backend = choose_differentiable(problem, call.names)
        problem = problem.seeded()
        outputs = prepare_outputs(problem, None, return_lse=True, return_weights=call.return_weights)
        ctx.backend.run(problem, outputs)
        out, lse, weights = (None if view is None else view.array for view in outputs)
        ctx.problem = problem.without_tensors()
        # Not with the problem: hooks see what a graph saves, and a change of it in place is noticed.
        ctx.save_for_backward(query, key, value, mask, bias, out, lse, weights)
        ctx.vectors = alibi_slopes, sinks
        ctx.set_materialize_grads(False)
        return out, lse, weights

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, mask, bias, out, lse, weights = ctx.saved_tensors
        differentiates = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            problem = ctx.problem.with_tensors(query, key, value, mask, bias)
            if grad_weights is not None:  # the softmax takes their mean away, as it does that of dP
                mean = (weights.to(lse.dtype) * grad_weights).sum(-1)
                grad_lse = -mean if grad_lse is None else grad_lse - mean
            incoming = _incoming(problem, out, grad_out, grad_lse, grad_weights)
            grads = _Results(ctx, problem, query, key, value, bias)
            ctx.backend.run_backward(problem, _outputs(problem, out, lse), incoming, grads.views)
            results = grads.returned(ctx.vectors)
        if differentiates:
            final: Any = _Final.apply
            results = final(query, key, value, *results)
        return None, *results


def _canonical(problem: AttentionProblem, name: str, tensor: Tensor) -> Strided:
    view = problem.library.view(name, tensor)
    return view if problem.layout == "bhsd" else view.swap_heads_and_rows()


def _outputs(problem: AttentionProblem, out: Tensor, lse: Tensor) -> Outputs:
    return Outputs(_canonical(problem, "out", out), problem.library.view("lse", lse), None)


def _incoming(
    problem: AttentionProblem,
    out: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
) -> Outputs:
    return Outputs(
        _canonical(problem, "grad_out", torch.zeros_like(out) if grad_out is None else grad_out),
        None if grad_lse is None else problem.library.view("grad_lse", grad_lse),
        None if grad_weights is None else problem.library.view("grad_weights", grad_weights),
    )


class _Results:
    """Memory for the gradients that were asked for."""

    def __init__(
        self,
        ctx: Any,
        problem: AttentionProblem,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
    ) -> None:
        _, *wanted = ctx.needs_input_grad
        wants_bias, wants_slopes, wants_sinks = wanted[4:]
        self.problem = problem
        self.tensors = [
            tensor.new_empty(tensor.shape) if wants else None
            for tensor, wants in zip((query, key, value), wanted[:3], strict=True)
        ]
        self.bias = self.summed_bias = None
        if wants_bias:
            assert bias is not None
            self.bias = bias
            self.summed_bias = bias.new_zeros(bias.shape, dtype=getattr(torch, problem.lse_dtype))
        batch, heads, _, _ = problem.query.shape
        self.slopes = query.new_zeros((batch, heads), dtype=torch.float64) if wants_slopes else None
        self.sinks = query.new_zeros((batch, heads), dtype=torch.float64) if wants_sinks else None
        view = problem.library.view
        grad_query, grad_key, grad_value = (
            None if tensor is None else _canonical(problem, name, tensor)
            for name, tensor in zip(("grad_query", "grad_key", "grad_value"), self.tensors, strict=True)
        )
        self.views = Gradients(
            grad_query,
            grad_key,
            grad_value,
            None
            if self.summed_bias is None
            else view("grad_bias", self.summed_bias).broadcast_to(problem.scores_shape),
            None if self.slopes is None else view("grad_slopes", self.slopes),
            None if self.sinks is None else view("grad_sinks", self.sinks),
        )

    def returned(self, vectors: tuple[Any, Any]) -> tuple[Tensor | None, ...]:
        """One for each tensor of the call, in its own shape and dtype."""
        slopes, sinks = vectors
        grad_bias = grad_slopes = grad_sinks = None
        if self.summed_bias is not None:
            assert self.bias is not None
            grad_bias = self.summed_bias.to(self.bias.dtype)
        if self.slopes is not None:
            grad_slopes = (self.slopes if slopes.dim() == 2 else self.slopes.sum(0)).to(slopes)
        if self.sinks is not None:
            grad_sinks = self.sinks.sum(0).to(sinks)
        grad_query, grad_key, grad_value = self.tensors
        return grad_query, grad_key, grad_value, None, grad_bias, grad_slopes, grad_sinks


class _Final(Function):
    """Hands gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(_TWICE)
