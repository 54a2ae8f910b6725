"""AMD's zentorch: its own kernels behind the interface of torch's attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.peers.base import MASKED, Call, Peer, Run, register
from bench.peers.torch import attn_mask
from tests.shapes import Case


@register
class Zentorch(Peer):
    name = "zentorch"
    does = MASKED | {"grouped heads"}

    def load(self, threads: int) -> str:
        import torch
        import zentorch

        torch.set_num_threads(threads)
        version: str = zentorch.__version__
        return version

    def prepare(self, call: Call) -> Run:
        import torch

        attention = torch.ops.zentorch.zentorch_sdpa
        query, key, value = call.query, call.key, call.value
        if call.ruled_by_causal_alone:
            return lambda: attention(query, key, value, 0.0, True)
        mask = attn_mask(call)
        if mask is not None and mask.dtype == torch.bool:  # it takes masks of query's dtype alone
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        return lambda: attention(query, key, value, 0.0, False, attn_mask=mask)

    def read(self, result: Any, case: Case) -> np.ndarray:
        return super().read(result[0], case)  # and its log-sum-exp
