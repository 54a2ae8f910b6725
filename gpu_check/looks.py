"""`fastattn.insight`, which a GPU computes by operations of torch: held against all of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gpu_check import reference
from gpu_check.checks import LIMITS, WrongError, compare
from gpu_check.inputs import draw, poison
from tests.shapes import Case

EDGES = (0, 1, 7, 64)
TOP = 5


@dataclass(frozen=True)
class Look:
    """One call."""

    case: Case
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.case.name} {self.dtype} d{self.case.head_dim}"

    def run(self, device: str, seed: int, backend: str | None) -> dict[str, float]:
        """Relative errors by name. Raises WrongError."""
        import fastattn as fa

        inputs = draw(self.case, self.dtype, device, seed)
        right = reference.attend(inputs.query, inputs.key, inputs.value, **inputs.options)
        poison(device)
        look = fa.insight(
            inputs.query, inputs.key, inputs.value, **inputs.options, top_k=TOP, distances=EDGES
        )
        at, count = look.keys, right.weights.shape[3]
        if bool(((at < 0) & (look.weights != 0)).any()) or bool((at >= count).any()):
            raise WrongError("there are weights of no key")
        own = right.weights.gather(3, at.clamp(min=0)) * (at >= 0)
        offset = 0 if self.case.causal == "top_left" else count - self.case.seqlen_q
        pairs = (
            ("output", look.output, right.out),
            ("weights", look.weights, own),  # of the keys that it names, ...
            ("strongest", look.weights, right.weights.topk(TOP, 3).values),  # ... which are the right ones
            ("entropy", look.entropy, _entropy(right, inputs.options.get("sinks"))),
            ("key_mass", look.key_mass, right.weights.sum(2)),
            ("distance_mass", look.distance_mass, _by_distance(right.weights, offset)),
        )
        return {name: compare(name, found, wanted, LIMITS[self.dtype]) for name, found, wanted in pairs}


def _entropy(right: reference.Result, sinks: Tensor | None) -> Tensor:
    shares = right.weights
    if sinks is not None:
        seen = right.lse.isfinite()
        own = torch.exp(sinks.double()[:, None] - torch.where(seen, right.lse, reference.INF))
        shares = torch.cat([shares, own[..., None]], 3)
    return -torch.special.xlogy(shares, shares).sum(3)


def _by_distance(weights: Tensor, offset: int) -> Tensor:
    rows, keys = (torch.arange(size, device=weights.device) for size in weights.shape[2:])
    distance = rows[:, None] + offset - keys
    bounds = (-reference.INF, *EDGES, reference.INF)
    buckets = [(distance >= low) & (distance < high) for low, high in pairwise(bounds)]
    return torch.stack([(weights * bucket).sum((2, 3)) for bucket in buckets], -1)


GROUPED = Case("look-causal", 200, 333, 64, batch=2, query_heads=4, kv_heads=2, causal=True)
CHECKS = [
    *(Look(GROUPED, dtype) for dtype in ("bfloat16", "float16", "float32")),
    Look(Case("look-decode", 1, 5000, 128, batch=2, query_heads=8, kv_heads=2), "bfloat16"),
    Look(Case("look-window", 150, 150, 32, query_heads=2, causal=True, window=(20, 0)), "float32"),
    Look(
        Case("look-arrays", 77, 130, 48, 2, batch=2, query_heads=2, arrays=("kv_lengths", "mask", "sinks")),
        "float32",
    ),
]
