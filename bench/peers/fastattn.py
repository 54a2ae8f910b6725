"""This library."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.peers.base import Call, Peer, Run, register
from tests.shapes import Case


@register
class FastAttn(Peer):
    name = "fastattn"
    at_home = True
    differentiates = True

    def load(self, threads: int) -> str:
        import fastattn

        fastattn.set_num_threads(threads)
        return fastattn.__version__

    def refuses(self, case: Case, dtype: str) -> str:
        return ""

    def prepare(self, call: Call) -> Run:
        import fastattn

        attention, query, key, value = fastattn.attention, call.query, call.key, call.value
        # As a person would type it: what is left at its default is not passed.
        options = {
            name: given for name, given in call.options.items() if given is not None and given is not False
        }
        if not call.case.softcap:
            del options["softcap"]
        return lambda: attention(query, key, value, **options)

    def read(self, result: Any, case: Case) -> np.ndarray:
        return result.astype(np.float64) if isinstance(result, np.ndarray) else result.double().numpy()
