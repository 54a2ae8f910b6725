"""JAX on the CPU: ``jax.nn.dot_product_attention``, jitted, in its (batch, length, heads, size) layout."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bench.peers.base import MASKED, Call, Peer, Run, register
from tests.shapes import Case


@register
class Jax(Peer):
    name = "jax"
    library = "numpy"
    does = MASKED | {"grouped heads"}

    def load(self, threads: int) -> str:
        # XLA makes as many threads as the process may use CPUs; no setting of its own is honoured everywhere.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        return jax.__version__

    def prepare(self, call: Call) -> Run:
        import jax

        tensors = [jax.numpy.asarray(x.swapaxes(1, 2)) for x in (call.query, call.key, call.value)]
        causal, mask, added = call.rules()

        def attention(query: Any, key: Any, value: Any) -> Any:
            return jax.nn.dot_product_attention(query, key, value, bias=added, mask=mask, is_causal=causal)

        compiled = jax.jit(attention)
        return lambda: compiled(*tensors).block_until_ready()

    def read(self, result: Any, case: Case) -> np.ndarray:
        return np.asarray(result).astype(np.float64).swapaxes(1, 2)
