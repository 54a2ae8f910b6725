"""``torch.ops.fastattn``: attention and its backward as operators that traces and transforms of torch see.

A call that torch merely runs goes another way (`graph`, `backends.plain`). These are for what must not look
into it: ``torch.compile``, ``torch.export``, ``torch.func``, modes that watch operators. Everything about the
arguments, values of tensors included, is checked when an operator runs; its fake checks types and shapes when
it is traced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastattn import gradients, tensors
from fastattn.arrays import ArrayLibrary, is_traced
from fastattn.dispatch import candidates, choose, choose_differentiable, run_plain
from fastattn.outputs import check_flags, prepare_outputs, returned
from fastattn.problem import AttentionProblem, bias_view, mask_view, views
from fastattn.torch_ops import vmap
from fastattn.torch_ops.arguments import OPERANDS, RULES, Operands, Rules, flatten, options_of
from fastattn.torch_ops.graph import TWICE, with_weights

_AT = 3 + len(Operands._fields)  # where the rules start, behind query, key, value

_library: Any = torch.library.Library("fastattn", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # an empty tensor stands for weights that were not asked for
    f"forward(Tensor query, Tensor key, Tensor value, {OPERANDS}, {RULES}, bool return_weights)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(  # slopes' and sinks' gradients are float64, (B, Hq)
    "backward(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_weights, Tensor out, Tensor lse, "
    f"Tensor weights, Tensor query, Tensor key, Tensor value, {OPERANDS}, {RULES}, bool[] wanted) -> Tensor[]"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool,
    return_weights: bool,
    out: Tensor | None,
    **options: Any,
) -> Any:
    """`fastattn.attention` by way of the operator."""
    check_flags(return_lse, return_weights)
    operands, rules = flatten(query, **options)
    arguments = (query, key, value, *operands, *rules, bool(return_weights))
    result, lse, weights = _call_forward(*arguments)
    if out is not None:
        result = written(out, result)
    return returned(result, lse if return_lse else None, weights if return_weights else None)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    given: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    options: dict[str, Any],
) -> list[Tensor | None]:
    """Gradients by way of the operator, in the order of `gradients.NAMES`, as their arguments were given.

    `given` holds out, lse, query, key and value.
    """
    out, lse, query, key, value = given
    operands, rules = flatten(query, **options)
    weights = query.new_empty(0)  # there are none
    arguments = (grad_out, grad_lse, None, out, lse, weights, query, key, value, *operands, *rules)
    *grads, slopes, sinks = _spread(_call_backward(*arguments, list(wanted)), wanted)
    return [
        *grads,
        gradients.as_given(slopes, options["alibi_slopes"]),
        gradients.as_given(sinks, options["sinks"]),
    ]


def _call_forward(*arguments: Any) -> Any:
    if not is_traced() and is_transformed():
        apply: Any = _Transformed.apply
        return apply(*arguments)
    return torch.ops.fastattn.forward(*arguments)


def _call_backward(*arguments: Any) -> Any:
    if not is_traced() and is_transformed():
        apply: Any = _TransformedBackward.apply
        return apply(*arguments)
    return torch.ops.fastattn.backward(*arguments)


def is_watched(*arrays: Any) -> bool:
    """Whether something of torch wants to see operators, or there is no memory behind tensors."""
    if is_transformed() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return True
    for array in arrays:  # a loop: generators take twice the time, and calls on few tokens microseconds
        if isinstance(array, FakeTensor):
            return True
    return getattr(arrays[0], "is_meta", False) and all(getattr(array, "is_meta", False) for array in arrays)


def is_transformed() -> bool:
    """Whether this runs under a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def written(out: Tensor, result: Tensor) -> Tensor:
    """Copy a result to the caller's tensor, as far as a trace can tell that this is right."""
    if result.requires_grad:
        raise RuntimeError(
            "out cannot be written where another argument requires grad: call without out, or under no_grad()"
        )
    if out.dtype != result.dtype:
        raise TypeError(f"out must have query's dtype {result.dtype}, got {out.dtype}")
    if out.shape != result.shape:
        raise ValueError(f"out must have shape {tuple(result.shape)}, got {tuple(out.shape)}")
    return out.copy_(result)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, rules, return_weights = _split(rest)
    if _is_plain(operands, rules) and not return_weights:
        results = run_plain(query, key, value, bool(rules.causal), rules.scale, rules.layout == "bshd", True)
        if results is not None:
            return *results, query.new_empty(0)
    problem = AttentionProblem.from_arguments(query, key, value, **options_of(operands, rules))
    backend = choose(problem, candidates(rules.backend))
    outputs = prepare_outputs(problem, None, True, return_weights)
    backend.run(problem, outputs)
    results = outputs.returned()
    return results if return_weights else (*results, query.new_empty(0))


def _described(tensor: Tensor) -> ArrayLibrary:
    return tensors.descriptions(torch, tensor.device)


def _is_plain(operands: Operands, rules: Rules) -> bool:
    if rules.causal == "top_left" or any(operand is not None for operand in operands):
        return False
    return rules._replace(causal="", scale=None, layout="bhsd") == _PLAIN


_PLAIN = Rules("", None, None, None, 0.0, None, 0.0, None, 0, "bhsd", None, None, None)


def _split(rest: Any) -> tuple[Operands, Rules, Any]:
    """The arguments behind query, key and value."""
    *flat, last = rest
    operands = len(Operands._fields)
    return Operands(*flat[:operands]), Rules(*flat[operands:]), last


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, rules, return_weights = _split(rest)
    described = _described(query)
    q, k, v = views(described, query, key, value, rules.layout)
    (batch, heads, rows, _), keys, columns = q.shape, k.shape[2], v.shape[3]
    scores = (batch, heads, rows, keys)
    if operands.mask is not None:
        mask_view(described, operands.mask, scores)
    if operands.bias is not None:
        bias_view(described, operands.bias, q.dtype, scores)
    shape = (batch, heads, rows, columns) if rules.layout == "bhsd" else (batch, rows, heads, columns)
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    return (
        query.new_empty(shape),
        query.new_empty(scores[:3], dtype=wide),
        query.new_empty(scores if return_weights else (0,)),
    )


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    out: Tensor,
    lse: Tensor,
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> list[Tensor]:
    operands, rules, wanted = _split(rest)
    problem = AttentionProblem.from_arguments(query, key, value, **options_of(operands, rules))
    backend = choose_differentiable(problem, candidates(rules.backend))
    grad_lse = with_weights(lse, weights, grad_lse, grad_weights)
    grads = gradients.backward(backend, problem, out, lse, grad_out, grad_lse, grad_weights, wanted)
    return [grad for grad in grads if grad is not None]


def _fake_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    out: Tensor,
    lse: Tensor,
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> list[Tensor]:
    operands, _, wanted = _split(rest)
    starts = operands.cu_seqlens_q
    table = (lse.shape[0] if starts is None else starts.shape[0] - 1, lse.shape[1])
    like = [query, key, value, operands.bias]
    grads = [x.new_empty(x.shape) for x, wants in zip(like, wanted, strict=False) if wants and x is not None]
    return grads + [query.new_empty(table, dtype=torch.float64) for wants in wanted[4:] if wants]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:_AT])
    ctx.rules, ctx.return_weights = inputs[_AT:-1], inputs[-1]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_weights: Tensor | None
) -> tuple[Any, ...]:
    out, lse, weights, query, key, value, *rest = ctx.saved_tensors
    operands = Operands(*rest)
    grad_weights = grad_weights if ctx.return_weights else None
    # Of the inputs in their order: query, key, value, mask, bias, lengths, offsets, slopes, sinks, ...
    of_query, of_key, of_value, _, of_bias, _, _, of_slopes, of_sinks, *_ = ctx.needs_input_grad
    wanted = (of_query, of_key, of_value, of_bias, of_slopes, of_sinks)
    arguments = (grad_out, grad_lse, grad_weights, out, lse, weights, query, key, value, *rest, *ctx.rules)
    of = dict(zip(gradients.NAMES, _spread(_call_backward(*arguments, list(wanted)), wanted), strict=True))
    tables = {
        name: gradients.as_given(of[name], getattr(operands, name)) for name in ("alibi_slopes", "sinks")
    }
    given = Operands(*[None] * len(rest))._replace(bias=of["bias"], **tables)
    return of["query"], of["key"], of["value"], *given, *[None] * (len(ctx.rules) + 1)


def _spread(results: list[Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Put None in the place of each gradient that was not wanted."""
    remaining = iter(results)
    return [next(remaining) if wants else None for wants in wanted]


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(TWICE)


class _Transformed(torch.autograd.Function):
    """The operator under ``torch.func``, which does not take what `register_autograd` makes."""

    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)
    vmap = staticmethod(partial(vmap.forward, _call_forward))

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastattn.forward(*args)


class _TransformedBackward(torch.autograd.Function):
    """The same of the backward; its results come as a tuple."""

    setup_context = staticmethod(_keep_nothing)
    backward = staticmethod(_refuse)
    vmap = staticmethod(partial(vmap.backward, _call_backward))

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(torch.ops.fastattn.backward(*args))


for _device in "CPU", "CUDA":
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)
torch.library.register_fake("fastattn::forward", _fake_forward, lib=_library)
torch.library.register_fake("fastattn::backward", _fake_backward, lib=_library)
torch.library.register_autograd("fastattn::forward", _differentiate, setup_context=_keep, lib=_library)
torch.library.register_autograd("fastattn::backward", _refuse, setup_context=_keep_nothing, lib=_library)
for _name, _rule in ("forward", vmap.forward), ("backward", vmap.backward):
    _operator = getattr(torch.ops.fastattn, _name)
    torch.library.register_vmap(f"fastattn::{_name}", partial(_rule, _operator), lib=_library)
