"""What a peer is: a name, what it can compute, and how one call of it is prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench import work
from tests.shapes import Case

Run = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """One call to prepare: a case and its arguments, already arrays of the library that the peer takes."""

    case: Case
    dtype: str
    query: Any
    key: Any
    value: Any
    options: dict[str, Any]  # of fastattn.attention
    grad_out: Any = None  # where gradients are asked for; query, key and value require grad then

    @property
    def causal(self) -> bool:
        """Whether the causal rule hides anything: the last query alone sees every key."""
        return bool(self.case.causal) and self.case.seqlen_q > 1

    @property
    def ruled_by_causal_alone(self) -> bool:
        """Whether `is_causal` says it all; peers align it at the top left, we at the bottom right."""
        shape = {"grouped heads", "values of another size"}
        return self.causal and features(self.case) - shape == {"causal"}

    def mask(self) -> np.ndarray | None:
        """Causal rule, window, lengths and mask as one bool mask, four axes; None where all is visible."""
        mask = work.visible(self.case)
        return None if mask.all() else mask

    def rules(self) -> tuple[bool, np.ndarray | None, np.ndarray | None]:
        """(causal, mask, added), of which a peer needs one at most: the shortest way to say the same."""
        if self.ruled_by_causal_alone:
            return True, None, None
        added = self.added()
        return False, self.mask() if added is None else None, added

    def added(self) -> np.ndarray | None:
        """Bias and ALiBi as one float32 array, four axes, -inf where hidden; None without either."""
        options, case = self.case.options(), self.case
        if not {"bias", "alibi_slopes"} & set(options):
            return None
        added = np.zeros((1, 1, case.seqlen_q, case.seqlen_k), np.float32)
        if "bias" in options:
            added = added + options["bias"]
        if "alibi_slopes" in options:
            query_at = np.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q
            distance = abs(query_at - np.arange(case.seqlen_k))
            added = added - options["alibi_slopes"].reshape(-1, 1, 1) * distance
        return np.where(work.visible(case), added, -np.inf).astype(np.float32)


class Peer:
    """One implementation of attention. A subclass says what it can do and prepares calls; see `register`."""

    name: ClassVar[str]
    # Whether it runs in the project's environment, or in the one that `make bench-peers` builds.
    at_home: ClassVar[bool] = False
    library: ClassVar[str] = "torch"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    does: ClassVar[frozenset[str]] = frozenset()  # of what `features` returns
    differentiates: ClassVar[bool] = False  # whether its outputs carry a graph

    def load(self, threads: int) -> str:
        """Import what is needed, settle the number of threads, and return the version."""
        raise NotImplementedError

    def refuses(self, case: Case, dtype: str) -> str:
        """Why this call is beyond the peer; "" where it is not."""
        if dtype not in self.dtypes:
            return f"no {dtype}"
        missing = sorted(features(case) - self.does)
        return f"no {', '.join(missing)}" if missing else ""

    def prepare(self, call: Call) -> Run:
        """Everything that a user does once; what is returned is timed."""
        raise NotImplementedError

    def read(self, result: Any, case: Case) -> np.ndarray:
        """What a run returned, an output or a gradient, in float64."""
        return np.asarray(result.double())


def features(case: Case) -> set[str]:
    """What a call asks for beyond plain attention of equal heads, in words."""
    names = {
        "padding": "masks", "mask": "masks", "holes": "masks", "triangle": "masks", "kv_lengths": "lengths",
        "ragged": "lengths", "bias": "biases", "shared_bias": "biases", "query_offset": "offsets",
        "alibi_slopes": "ALiBi", "sinks": "sinks",
    }  # fmt: skip
    found = {names[name] for name in case.arrays}
    if case.causal and case.seqlen_q > 1:
        found.add("causal" if case.seqlen_q == case.seqlen_k else "causal rule with fewer queries than keys")
    if case.window is not None:
        found.add("windows")
    if case.softcap:
        found.add("softcap")
    if case.query_heads != case.kv_heads:
        found.add("grouped heads")
    if case.head_dim != case.value_dim:
        found.add("values of another size")
    return found


OFFSET_CAUSAL = "causal rule with fewer queries than keys"
# What a peer does that takes a mask to add, or one of bools.
MASKED = frozenset({"causal", OFFSET_CAUSAL, "masks", "biases", "lengths", "offsets", "ALiBi", "windows"})
PEERS: dict[str, Peer] = {}


def register(peer: type[Peer]) -> type[Peer]:
    """Add a peer to the list; a file in this folder that does so is all it takes."""
    PEERS[peer.name] = peer()
    return peer
