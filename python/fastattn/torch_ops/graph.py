"""Attention in a graph that torch records as it goes: a node whose backward is the compiled one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastattn import gradients
from fastattn.backends import plain
from fastattn.dispatch import AUTOMATIC, choose_differentiable
from fastattn.outputs import prepare_outputs, returned
from fastattn.problem import AttentionProblem

TWICE = (
    "the backward of attention() is compiled and cannot be differentiated itself: "
    "call attention(..., backend='math') where gradients of gradients are needed"
)


class _Plain(Function):
    """A call without other arguments. It has been computed already: the node only keeps what it needs."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        results: tuple[Tensor, Tensor],
        call: plain.PlainCall,
    ) -> Any:
        out, lse = results
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = call
        if not call.return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> Any:
        tensors, call = ctx.saved_tensors, ctx.call
        grads: Any = None
        if grad_out is not None:
            grads = plain.backward(grad_out, grad_lse, tensors, ctx.needs_input_grad, call)
        if grads is None:  # something unusual: the long way answers, or says what is wrong
            grads = _plain_backward(tensors, grad_out, grad_lse, ctx.needs_input_grad, call)
        if torch.is_grad_enabled():  # create_graph=True
            grads = final((*tensors[:3], grad_out, grad_lse), grads)
        return *grads, None, None


def _plain_backward(
    tensors: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    wanted: tuple[bool, ...],
    call: plain.PlainCall,
) -> list[Tensor | None]:
    query, key, value, out, lse = tensors
    with torch.no_grad():
        problem = AttentionProblem.from_arguments(
            query, key, value, causal=call.causal, scale=call.scale, layout="bshd" if call.bshd else "bhsd"
        )
        backend = choose_differentiable(problem, AUTOMATIC)
        flags = (*wanted[:3], False, False, False)
        return gradients.backward(backend, problem, out, lse, grad_out, grad_lse, None, flags)[:3]


# Function.apply asks for transforms of torch.func first. They make a call an operator, and none gets here.
_apply_plain: Any = super(Function, _Plain).apply


def record(
    query: Tensor, key: Tensor, value: Tensor, results: tuple[Tensor, Tensor], call: plain.PlainCall
) -> Any:
    """Give the results of a plain call, out and lse, a graph; lse is kept back unless it was asked for."""
    return _apply_plain(query, key, value, results, call)


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
    out, lse, weights = _apply(call, query, key, value, mask, bias, alibi_slopes, sinks)
    return returned(out, lse if return_lse else None, weights)


def wants_graph(*arrays: object) -> bool:
    """Whether torch is to record what becomes of these."""
    return torch.is_grad_enabled() and any(getattr(array, "requires_grad", False) is True for array in arrays)


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
        ctx.problem = problem.with_own_vectors().without_tensors()
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
        _, of_query, of_key, of_value, _, of_bias, of_slopes, of_sinks = ctx.needs_input_grad
        with torch.no_grad():
            problem = ctx.problem.with_tensors(query, key, value, mask, bias)
            grads = gradients.backward(
                ctx.backend,
                problem,
                out,
                lse,
                grad_out,
                with_weights(lse, weights, grad_lse, grad_weights),
                grad_weights,
                (of_query, of_key, of_value, of_bias, of_slopes, of_sinks),
            )
            *grads, slopes, sinks = grads
            tables = [
                gradients.as_given(table, given)
                for table, given in zip((slopes, sinks), ctx.vectors, strict=True)
            ]
        grads += tables
        if torch.is_grad_enabled():  # create_graph=True
            given = (query, key, value, bias, *ctx.vectors, grad_out, grad_lse, grad_weights)
            grads = final(given, grads)
        return None, *grads[:3], None, *grads[3:]


_apply: Any = super(Function, _Attention).apply


def with_weights(
    lse: Tensor, weights: Tensor | None, grad_lse: Tensor | None, grad_weights: Tensor | None
) -> Tensor | None:
    """The gradient of lse, and what that of the weights comes to: softmax takes their mean away from dP."""
    if grad_weights is None:
        return grad_lse
    assert weights is not None
    # A hidden weight is 0, and silences no NaN that comes in for it.
    mean = (weights.to(lse.dtype) * grad_weights).masked_fill(weights == 0, 0).sum(-1)
    return -mean if grad_lse is None else grad_lse - mean


def final(given: tuple[Any, ...], grads: Any) -> Any:
    """Let gradients depend on all that they were computed of, in a node that refuses to be differentiated."""
    apply: Any = _Final.apply
    return apply(len(given), *given, *grads)


class _Final(Function):
    """Hands gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *given_and_grads: Any) -> tuple[Tensor | None, ...]:
        grads = given_and_grads[count:]
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(TWICE)
