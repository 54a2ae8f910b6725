"""``torch.nn.functional.scaled_dot_product_attention``, with torch's arguments, computed by fastattn.

What fastattn can serve, tensors of one floating dtype whose shapes fit, on the CPU or on a GPU that it has
kernels for, is rearranged into a call of `fastattn.attention`. Everything else is torch's own: other devices,
what only torch's machinery understands (subclasses, transforms), and every input that torch refuses, so that
it is refused in torch's words.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._device import DeviceContext

from fastattn.backends import triton
from fastattn.functional import attention
from fastattn.problem import AttentionProblem

_torch_sdpa = torch._C._nn.scaled_dot_product_attention
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
_TRACED = (FakeTensor, FunctionalTensor)  # what stands for them in a trace
# Head dimensions that every kernel reaches: a trace cannot try and see, and on a GPU torch has its own.
_WIDEST = {"cpu": 512, "cuda": triton.MAX_HEAD_DIM}

Size = tuple[int, ...]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Compute what ``torch.nn.functional.scaled_dot_product_attention`` computes, by fastattn's kernels.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, Lq, D)
        Two axes or more. The leading axes of query, key and value broadcast.
    key : torch.Tensor, shape (..., H, Lk, D)
    value : torch.Tensor, shape (..., H, Lk, Dv)
    attn_mask : torch.Tensor, optional
        Broadcasts to (..., Hq, Lq, Lk) and has two axes or more. bool: True attends; query's dtype or
        float32: added to the scores, and differentiable.
    dropout_p : float
        Probabilities are dropped whether or not anything is training. Seeded from torch's default generator.
    is_causal : bool
        Query ``i`` attends to keys up to ``i``, also where Lq and Lk differ (top left), and only to those of
        them that attn_mask, if there is one, allows.
    scale : float, optional
        Defaults to ``1 / sqrt(D)``.
    enable_gqa : bool
        Query head ``h`` attends to key head ``h // (Hq // H)``; Hq is a multiple of the heads of key, and of
        value. Without it, heads broadcast like any leading axis.

    Returns
    -------
    torch.Tensor, shape (..., Hq, Lq, Dv)
        A row that may attend to nothing is 0, and so are its gradients.

    Raises
    ------
    TypeError, RuntimeError, IndexError, NotImplementedError
        What torch raises: its own function is called with what is not served here.
    RuntimeError
        If key and value differ in length, which torch does not check in every path.

    Notes
    -----
    Torch's own function computes calls on tensors of a subclass, nested, sparse or of other dtypes; under
    forward-mode differentiation, ``torch.func``, ``torch.jit.trace`` and modes that watch operations; in
    compiled code with head dimensions above 512; and with heads or head dimensions of size 0, or a scale that
    is not finite. On a GPU also float64, head dimensions above 256, and everything where there are no kernels
    for it: `fastattn.explain` says why. On other devices everything.
    `fastattn.attention` with ``backend="math"`` computes what its kernels do not take.

    See Also
    --------
    fastattn.patch_sdpa : for code that calls torch's function.

    Examples
    --------
    >>> import torch, fastattn as fa
    >>> query, key, value = torch.randn(3, 2, 8, 5, 16)
    >>> fa.scaled_dot_product_attention(query, key, value, is_causal=True).shape
    torch.Size([2, 8, 5, 16])
    """
    call = None
    if (
        type(is_causal) is bool
        and type(enable_gqa) is bool
        and (type(dropout_p) is float or type(dropout_p) is int)
        and 0 <= dropout_p <= 1
        and (scale is None or (type(scale) in (float, int) and abs(scale) <= sys.float_info.max))
        and _is_ordinary(query, key, value, *(() if attn_mask is None else (attn_mask,)))
    ):
        call = _rearrange(*as_autocast_would(query, key, value, attn_mask), enable_gqa=enable_gqa)
    if call is None:
        return _torch_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    try:
        out = _attend(call, float(dropout_p), is_causal, scale)
    except NotImplementedError:  # no kernel for it
        if not query.is_cpu:
            return _torch_sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        out = _attend(call, float(dropout_p), is_causal, scale, backend="math")
    return out if out.ndim == len(call.out_shape) else out.reshape(call.out_shape)


def as_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionProblem:
    """Say what a call means, for those who do not compute its output; dropout is left out.

    Raises
    ------
    NotImplementedError
        For tensors that only torch knows how to attend to.
    """
    tensors = (query, key, value, attn_mask)
    call = None
    if not any(tensor is not None and tensor.is_nested for tensor in tensors):
        call = _rearrange(*as_autocast_would(*tensors), enable_gqa=enable_gqa)
    if call is None:
        got = ", ".join(
            f"{tuple(x.shape) if not x.is_nested else 'nested'} of {x.dtype}" for x in tensors[:3]
        )
        raise NotImplementedError(f"this call of scaled_dot_product_attention cannot be looked into: {got}")
    rules = _rules(call, is_causal, scale)
    return AttentionProblem.from_arguments(*call[:3], **rules, composed=True)


class _Call(NamedTuple):
    """A call with four axes, whose result is then given the shape that was asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    out_shape: Size


def _attend(
    call: _Call, dropout_p: float, is_causal: bool, scale: float | None, backend: str | None = None
) -> Tensor:
    query, key, value = call[:3]
    arguments = _rules(call, is_causal, scale)
    by_rows = not query.is_contiguous() and query.transpose(1, 2).is_contiguous()
    # The result lies in memory as query does, as torch's: callers rely on it, and view(B, L, H * D).
    if by_rows:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        arguments["layout"] = "bshd"
    if dropout_p:
        arguments["dropout_p"] = dropout_p
    if backend:
        arguments["backend"] = backend
    out: Tensor = attention(query, key, value, **arguments)
    return out.transpose(1, 2) if by_rows else out


def _rules(call: _Call, is_causal: bool, scale: float | None) -> dict[str, Any]:
    """What a call says besides query, key and value, as arguments of `fastattn.attention`."""
    causal: Any = "top_left" if is_causal and call.query.shape[2] != call.key.shape[2] else is_causal
    rules: dict[str, Any] = {"causal": causal, "scale": scale}
    if call.mask is not None:
        rules["mask" if call.mask.dtype is torch.bool else "bias"] = call.mask
    return rules


def _is_ordinary(*tensors: Tensor) -> bool:
    """Whether these are dense tensors where there are kernels, and nothing but a compiler looks at them."""
    compiled = torch.compiler.is_compiling()
    for tensor in tensors:
        if type(tensor) not in _PLAIN and not (compiled and type(tensor) in _TRACED):
            return False
        if tensor.device != tensors[0].device:
            return False
        if tensor.layout is not torch.strided or tensor.is_nested:
            return False
    if (compiled or not tensors[0].is_cpu) and not _is_reached(*tensors[:3]):
        return False
    return compiled or not (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or (torch._C._is_torch_function_mode_enabled() and _is_watched())
    )


def _is_reached(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel for tensors of these sizes, where they are."""
    on_gpu = not query.is_cpu
    if on_gpu and (query.dtype is torch.float64 or not triton.serves(query.device)):
        return False
    widest = _WIDEST["cuda" if on_gpu else "cpu"]
    return all(tensor.shape[-1] <= widest for tensor in (query, key, value) if tensor.ndim)


def _is_watched() -> bool:
    """Whether a mode wants to see calls of torch's functions; one that names a default device does not."""
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes)


def as_autocast_would(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as torch's function casts its arguments under ``torch.autocast``."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return tensors
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if tensor is not None
        and tensor.dtype.is_floating_point
        and tensor.dtype not in (dtype, torch.float64)
        else tensor
        for tensor in tensors
    )


def _rearrange(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, enable_gqa: bool
) -> _Call | None:
    """Give every operand four axes, (B, H, L, D), mostly as views; None where that is torch's affair."""
    q, k, v = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if not (
        (query.dtype in _DTYPES and query.dtype is key.dtype is value.dtype)
        and (mask is None or (mask.ndim > 1 and mask.dtype in (torch.bool, torch.float32, query.dtype)))
        and _fit(q, k, v, enable_gqa)
    ):
        return None
    if enable_gqa and k[-3] != v[-3]:  # torch repeats each by itself; here they are one group
        key, value = (x.repeat_interleave(q[-3] // x.shape[-3], -3) for x in (key, value))
        k, v = tuple(key.shape), tuple(value.shape)

    if k[-2] != v[-2]:
        raise RuntimeError(
            "Expected key and value to have the same length, "
            f"but got key.size(-2): {k[-2]} and value.size(-2): {v[-2]} instead."
        )
    # Heads of a group stand for those of query; any others broadcast.
    scores = _broadcast(q[:-2], k[:-3] + q[-3:-2] if enable_gqa else k[:-2])
    if scores is None or (mask is not None and not _reaches(mask, (*scores, q[-2], k[-2]))):
        return None
    leading = _broadcast(scores, v[:-3] + q[-3:-2] if enable_gqa else v[:-2])
    if leading is None or 0 in leading[-1:]:
        return None

    batch, heads = leading[:-1], leading[-1:]
    kv_heads = k[-3:-2] if enable_gqa else heads
    if heads and all(len(shape) < 3 or shape[-3] == 1 for shape in (k, v)):
        kv_heads = (1,)  # one group, which need not be repeated
    query = _four_axes(query, q, batch, heads)
    key, value = _four_axes(key, k, batch, kv_heads), _four_axes(value, v, batch, kv_heads)
    if mask is not None and (mask.ndim != 4 or len(batch) > 1):
        own = (1, *mask.shape)[-3:]
        mask = _four_axes(mask, tuple(mask.shape), batch if len(batch) > 1 else (), own[:1])
    return _Call(query, key, value, mask, (*leading, q[-2], v[-1]))


def _fit(query: Size, key: Size, value: Size, enable_gqa: bool) -> bool:
    """Whether the numbers of axes, columns and heads in a group are such that attention is defined."""
    if min(len(query), len(key), len(value)) < (3 if enable_gqa else 2):
        return False
    if enable_gqa:
        heads, key_heads, value_heads = query[-3], key[-3], value[-3]
        if not key_heads or not value_heads or heads % key_heads or heads % value_heads:
            return False
    return query[-1] == key[-1] > 0 < value[-1]


def _reaches(mask: Tensor, scores: Size) -> bool:
    """Whether a mask broadcasts to the shape of the scores."""
    return _broadcast(tuple(mask.shape), scores) == scores


def _broadcast(one: Size, other: Size) -> Size | None:
    """``torch.broadcast_shapes`` in a tenth of its time; None where they do not fit."""
    if one == other:
        return one
    length = max(len(one), len(other))
    pairs = zip((1,) * (length - len(one)) + one, (1,) * (length - len(other)) + other, strict=True)
    sizes = tuple(a if b == 1 else b if a in (1, b) else -1 for a, b in pairs)
    return None if -1 in sizes else sizes


def _four_axes(tensor: Tensor, shape: Size, batch: Size, heads: Size) -> Tensor:
    """Expand the leading axes to (*batch, *heads), then make one of those before the heads."""
    wanted = (*batch, *heads, *shape[-2:])
    if shape != wanted:
        tensor = tensor.expand(wanted)
    if len(wanted) == 4:
        return tensor
    if len(wanted) > 4:  # a view, unless an axis is broadcast beside one that is not
        return tensor.flatten(0, -4)
    return tensor[(None,) * (4 - len(wanted))]
