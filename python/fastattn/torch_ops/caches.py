"""``torch.ops.fastattn.attention_with_kvcache``: an operator that writes into its arguments, the caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import tensors
from fastattn.cache_problem import from_arguments
from fastattn.cache_tensors import CacheTensors
from fastattn.dispatch import candidates, choose_caching
from fastattn.outputs import prepare_outputs, returned
from fastattn.problem import check_real, check_softcap
from fastattn.torch_ops.arguments import as_table, as_tensor, is_whole, window_bounds
from fastattn.torch_ops.operators import written

_library: Any = torch.library.Library("fastattn", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "attention_with_kvcache(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor(c!)? key_scale, Tensor(d!)? value_scale, Tensor? new_key, Tensor? new_value, "
    "Tensor? cache_seqlens, Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? alibi_slopes, Tensor? sinks, SymInt? cache_seqlen, bool rotary_interleaved, bool causal, "
    "SymInt? window_left, SymInt? window_right, bool rolling, float softcap, float? scale, str layout, "
    "str? backend) -> (Tensor, Tensor)"
)


def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    options: dict[str, Any],
    return_lse: bool,
    out: Tensor | None,
    backend: str | None,
) -> Any:
    """`fastattn.attention_with_kvcache` by way of the operator; `options` holds the arguments not named."""
    given = dict(options)
    lengths = given.pop("cache_seqlens")
    single = lengths if is_whole(lengths) else None
    left, right = window_bounds(given.pop("window"))
    scale = given.pop("scale")
    result, lse = torch.ops.fastattn.attention_with_kvcache(
        query,
        key_cache,
        value_cache,
        *(as_tensor(name, given.pop(name)) for name in ("key_scale", "value_scale", "new_key", "new_value")),
        as_table("cache_seqlens", None if single is not None else lengths),
        *(as_tensor(name, given.pop(name)) for name in ("block_table", "rotary_cos", "rotary_sin")),
        *(as_table(name, given.pop(name)) for name in ("alibi_slopes", "sinks")),
        cache_seqlen=None if single is None else int(single),
        window_left=left,
        window_right=right,
        softcap=check_softcap(given.pop("softcap")),
        scale=None if scale is None else check_real("scale", scale),
        backend=backend,
        **given,
    )
    return returned(result if out is None else written(out, result), lse if return_lse else None, None)


def refuse_graph(**named: Any) -> None:
    """Raise RuntimeError if torch would record what becomes of one of these."""
    for name, array in named.items():
        if torch.is_grad_enabled() and getattr(array, "requires_grad", False):
            raise RuntimeError(
                f"{name} requires grad, and attention over caches has no gradient: "
                f"call it under torch.no_grad(), or pass {name}.detach()"
            )


def _run(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    new_key: Tensor | None,
    new_value: Tensor | None,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cache_seqlen: int | None,
    rotary_interleaved: bool,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    rolling: bool,
    softcap: float,
    scale: float | None,
    layout: Any,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    problem, update = from_arguments(
        query,
        key_cache,
        value_cache,
        new_key=new_key,
        new_value=new_value,
        cache_seqlens=cache_seqlens if cache_seqlen is None else cache_seqlen,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        key_scale=key_scale,
        value_scale=value_scale,
        causal=causal,
        window=(window_left, window_right),
        rolling=rolling,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        softcap=softcap,
        scale=scale,
        layout=layout,
    )
    chosen = choose_caching(problem, candidates(backend))
    outputs = prepare_outputs(problem, None, True, False)
    chosen.run(chosen.update_cache(problem, update), outputs)
    out, lse = outputs.returned()
    return out, lse


def _fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    new_key: Tensor | None,
    new_value: Tensor | None,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    *rest: Any,
    layout: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    layout = layout or rest[-2]
    described = tensors.descriptions(torch, query.device)
    arrays = (query, key_cache, value_cache, key_scale, value_scale, new_key, new_value)
    seen = CacheTensors.of(described, layout, block_table is not None, *arrays)
    batch, heads, rows, _dim = seen.query.shape
    columns = seen.value_cache.shape[3]
    shape = (batch, heads, rows, columns) if layout == "bhsd" else (batch, rows, heads, columns)
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    return query.new_empty(shape), query.new_empty((batch, heads, rows), dtype=wide)


for _device in "CPU", "CUDA":
    _library.impl("attention_with_kvcache", _run, _device)
torch.library.register_fake("fastattn::attention_with_kvcache", _fake, lib=_library)
