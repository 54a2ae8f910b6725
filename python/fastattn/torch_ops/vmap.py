"""``torch.func.vmap`` over the operators: the mapped axis becomes part of the batch.

Operands that are not mapped are repeated, by strides of 0 where a batch of 1 allows it. Two things say what
they mean by the place in the batch, or have no axis for it, and are computed one by one: dropout, whose
random numbers are counted by batch and head, sinks that are mapped, and sequences behind one another.

The rules are given what to call: below the axis that they merge, there may be another transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.torch_ops.arguments import Operands, Rules

_Dims = tuple[Any, ...]
# Operands whose first axis is the batch.
_EACH = "kv_lengths", "kv_starts", "query_lengths", "query_segments", "key_segments", "query_offsets"
_N_OPERANDS = len(Operands._fields)


def forward(operator: Callable[..., Any], info: Any, in_dims: _Dims, *args: Any) -> tuple[Any, Any]:
    """The rule of ``fastattn::forward``."""
    call = _Mapped(info.batch_size, args[:3], in_dims[:3], args[3:-1], in_dims[3:-1])
    if call.must_be_taken_apart():
        parts = _one_by_one(operator, info.batch_size, in_dims, args)
        return tuple(parts), (0,) * len(parts)
    results = operator(*call.tensors(), *call.operands(False, False), *call.rules, args[-1])
    out, lse, weights = results
    if not args[-1]:  # no weights, and nothing to divide
        return (call.divided(out), call.divided(lse), weights), (0, 0, None)
    return tuple(map(call.divided, results)), (0, 0, 0)


def backward(operator: Callable[..., Any], info: Any, in_dims: _Dims, *args: Any) -> tuple[Any, Any]:
    """The rule of ``fastattn::backward``."""
    call = _Mapped(info.batch_size, args[6:9], in_dims[6:9], args[9:-1], in_dims[9:-1])
    wanted = args[-1]
    if call.must_be_taken_apart():
        parts = _one_by_one(operator, info.batch_size, in_dims, args)
        return parts, [0] * len(parts)
    *outputs, weights = (call.merged(x, dim) for x, dim in zip(args[:6], in_dims[:6], strict=True))
    _, _, _, of_bias, of_slopes, _ = wanted
    results = operator(
        *outputs, weights, *call.tensors(), *call.operands(of_bias, of_slopes), *call.rules, wanted
    )
    results = [call.divided(result) for result in results]
    if of_bias:
        at = sum(wanted[:3])
        results[at] = call.summed_bias(results[at])
    return results, [0] * len(results)


class _Mapped:
    """A call whose tensors may have one more axis, of `size` elements."""

    def __init__(self, size: int, tensors: _Dims, tensor_dims: _Dims, rest: _Dims, rest_dims: _Dims) -> None:
        self.size = size
        self._tensors, self._tensor_dims = tensors, tensor_dims
        self._operands = Operands(*rest[:_N_OPERANDS])
        self._dims: Any = Operands(*rest_dims[:_N_OPERANDS])  # integers, or None
        self.rules = Rules(*rest[_N_OPERANDS:])
        query, dim = tensors[0], tensor_dims[0]
        self.batch = query.shape[0 if dim is None or dim > 0 else 1]

    def must_be_taken_apart(self) -> bool:
        if self._operands.cu_seqlens_q is not None:
            return True
        return self.rules.dropout_p > 0 or self._dims.sinks is not None

    def tensors(self) -> list[Tensor | None]:
        """Query, key and value, of batch size * batch."""
        return [self.merged(x, dim) for x, dim in zip(self._tensors, self._tensor_dims, strict=True)]

    def operands(self, each_bias: bool, each_slope: bool) -> Operands:
        """The others; `each_...`: with elements of its own for each call, for gradients of each."""
        given, dims = self._operands, self._dims
        slopes = given.alibi_slopes
        if slopes is not None and (each_slope or dims.alibi_slopes is not None or slopes.dim() == 2):
            if dims.alibi_slopes is None:
                slopes = slopes.expand(self.size, *slopes.shape)
            else:
                slopes = slopes.movedim(dims.alibi_slopes, 0)
            if slopes.dim() == 2:  # (N, Hq)
                slopes = slopes[:, None].expand(-1, self.batch, -1)
            slopes = slopes.flatten(0, 1)
        return given._replace(
            mask=self._merged_scores(given.mask, dims.mask, False),
            bias=self._merged_scores(given.bias, dims.bias, each_bias),
            alibi_slopes=slopes,
            **{name: self.merged(getattr(given, name), getattr(dims, name)) for name in _EACH},
        )

    def merged(self, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """(N, B, ...) as (N * B, ...)."""
        if tensor is None or tensor.shape == (0,):  # there are no weights
            return tensor
        tensor = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    def _merged_scores(self, tensor: Tensor | None, dim: int | None, each: bool) -> Tensor | None:
        """The same for what broadcasts to (B, Hq, Lq, Lk); one for the whole batch stays so."""
        if tensor is None:
            return None
        if dim is None:
            if not each and (tensor.dim() < 4 or tensor.shape[0] == 1):
                return tensor
            tensor = tensor.expand(self.size, *tensor.shape)
        else:
            tensor = tensor.movedim(dim, 0)
        size, *axes = tensor.shape
        tensor = tensor.reshape(size, *[1] * (4 - len(axes)), *axes)
        return tensor.expand(-1, self.batch, -1, -1, -1).flatten(0, 1)

    def divided(self, result: Tensor) -> Tensor:
        """(N * B, ...) as (N, B, ...)."""
        return result.reshape(self.size, self.batch, *result.shape[1:])

    def summed_bias(self, grad: Tensor) -> Tensor:
        """(N, B, ...) in the shape that each bias has."""
        given, dim = self._operands.bias, self._dims.bias
        assert given is not None
        shape = list(given.shape)
        if dim is not None:
            del shape[dim]
        if len(shape) < 4 or shape[0] == 1:
            grad = grad.sum(1, keepdim=True)
        return grad.reshape(self.size, *shape)


def _one_by_one(operator: Callable[..., Any], size: int, in_dims: _Dims, args: _Dims) -> list[Tensor]:
    def one(index: int) -> Any:
        return operator(
            *(
                x if not isinstance(x, Tensor) or dim is None else x.select(dim, index)
                for x, dim in zip(args, in_dims, strict=True)
            )
        )

    return [torch.stack(parts) for parts in zip(*map(one, range(size)), strict=True)]
