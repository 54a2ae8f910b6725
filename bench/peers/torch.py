"""PyTorch: ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

from bench.peers.base import MASKED, Call, Peer, Run, register


@register
class Torch(Peer):
    name = "torch"
    at_home = True
    differentiates = True
    dtypes = ("float64", "float32", "bfloat16", "float16")
    does = MASKED | {"grouped heads", "values of another size"}

    def load(self, threads: int) -> str:
        import torch

        torch.set_num_threads(threads)
        return torch.__version__

    def prepare(self, call: Call) -> Run:
        import torch

        attention = torch.nn.functional.scaled_dot_product_attention
        query, key, value = call.query, call.key, call.value
        grouped = call.case.query_heads != call.case.kv_heads
        if call.ruled_by_causal_alone:
            return lambda: attention(query, key, value, is_causal=True, enable_gqa=grouped)
        mask = attn_mask(call)
        if mask is None and not grouped:
            return lambda: attention(query, key, value)
        return lambda: attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def attn_mask(call: Call) -> Any:
    """Every rule as the one mask that torch takes: bool, or in query's dtype where something is added."""
    import torch

    added = call.added()
    if added is not None:
        return torch.from_numpy(added).to(call.query.dtype)
    mask = call.mask()
    return None if mask is None else torch.from_numpy(mask)
