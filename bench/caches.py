"""One token over caches of less than 16 bits a number, by `fastattn.attention_with_kvcache`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench import work
from bench.programs import Program, Read, Run
from tests.shapes import Case

# Root mean square error over that of the output, for normally distributed keys and values: a third more than
# what docs/quantised-caches.md measures.
_QUANTISED = {"int8": 1.3e-2, "float8_e4m3fn": 5e-2}


@dataclass(frozen=True)
class CacheCase(Program):
    """A token of `case`, whose keys and values are in a cache of `kept`; "": of the query's dtype."""

    unit: ClassVar[str] = "ktoken/s"
    peers: ClassVar[tuple[str, ...]] = ("fastattn",)
    case: Case
    kept: str = ""

    def work(self, mode: str) -> float:
        return self.case.batch / 1e3

    def tolerance(self, dtype: str) -> float:
        return _QUANTISED.get(self.kept, 1e-2)

    def prepare(self, peer: str, dtype: str, mode: str) -> tuple[Run, Read]:
        import torch

        import fastattn

        case = self.case
        query, key, value = (array.transpose(1, 2) for array in case.tensors(dtype, "torch"))
        kept = getattr(torch, self.kept or dtype)
        shape = case.batch, case.seqlen_k, case.kv_heads, case.head_dim
        bytes_each = work.kv_bytes(case, dtype) * kept.itemsize // work.ITEM_BYTES[dtype]
        calls = []
        for _ in range(work.copies_that_no_cache_holds(bytes_each)):
            caches = torch.zeros(2, *shape, dtype=kept)
            scales: dict[str, Any] = {}
            if self.kept:
                scales = dict(zip(("key_scale", "value_scale"), torch.zeros(2, *shape[:3]), strict=True))
            fastattn.attention_with_kvcache(
                query, *caches, new_key=key, new_value=value, cache_seqlens=0, **scales
            )
            calls.append((caches[0], caches[1], scales))
        following = itertools.cycle(calls).__next__

        def run() -> Any:
            keys, values, scales = following()
            return fastattn.attention_with_kvcache(query, keys, values, cache_seqlens=case.seqlen_k, **scales)

        return run, lambda out: {"out": out.transpose(1, 2).double().numpy()}

    def truth(self, dtype: str, mode: str) -> dict[str, np.ndarray]:
        """Attention over keys and values that nothing has quantised."""
        from fastattn import reference

        return {"out": reference.attention(*self.case.tensors(dtype), **self.case.options(dtype)).out}
