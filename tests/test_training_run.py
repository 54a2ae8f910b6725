"""A language model learns from a text, step by step, what it learns on torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pydoc_data.topics import topics  # Python's reference manual, which every interpreter brings along
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn as fa
from fastattn.nn import RotaryEmbedding, TransformerEncoderLayer

STEPS, BATCH, LENGTH, WIDTH, HEADS, KV_HEADS = 50, 8, 80, 64, 4, 2


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Token ids, (BATCH, LENGTH + 1), a batch a step: the bytes of the manual."""
    text = "".join(topics[name] for name in sorted(topics)).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - LENGTH, (STEPS, BATCH), generator=generator)
    return [torch.stack([ids[start : start + LENGTH + 1] for start in row]) for row in starts]


class Block(nn.Module):
    """What a Llama has in a layer, with attention left open."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        dim = WIDTH // HEADS
        self.attend, self.heads = attend, (HEADS, KV_HEADS, KV_HEADS)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, sum(self.heads) * dim, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.rope = RotaryEmbedding(dim)
        self.network = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.SiLU(), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(self.norms[0](x)).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        query, key, value = rows.split(self.heads, dim=1)
        heads = self.attend(*self.rope(query, key), value)
        x = x + self.out(heads.transpose(1, 2).flatten(-2))
        return x + self.network(self.norms[1](x))


class Causal(nn.Module):
    """A layer of `torch.nn` as one of a decoder."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layer(x, src_mask=mask, is_causal=True)


def by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def by_fastattn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return fa.attention(query, key, value, causal=True)


def layer_of(kind: type[nn.TransformerEncoderLayer]) -> Causal:
    return Causal(kind(WIDTH, HEADS, 3 * WIDTH, dropout=0.0, norm_first=True, batch_first=True))


# A layer whose attention is torch's math, the same on fastattn, and where that needs one a block around it.
Way = tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], AbstractContextManager[Any]]]
WAYS: dict[str, Way] = {
    "attention": (partial(Block, by_torch), partial(Block, by_fastattn), nullcontext),
    "patched": (partial(Block, by_torch), partial(Block, by_torch), fa.patch_sdpa),
    "layers": (
        partial(layer_of, nn.TransformerEncoderLayer),
        partial(layer_of, TransformerEncoderLayer),
        nullcontext,
    ),
}


def losses(make: Callable[[], nn.Module], batches: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The loss of every step of plain SGD."""
    torch.manual_seed(0)
    layers = [nn.Embedding(256, WIDTH), make(), make(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)]
    model = nn.Sequential(*layers).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    curve = []
    for batch in batches:
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_curves_are_torchs(way: str, dtype: torch.dtype, tolerance: float, batches: list[Tensor]) -> None:
    theirs, ours, block = WAYS[way]
    with sdpa_kernel(SDPBackend.MATH):
        expected = losses(theirs, batches, dtype)
    with block():
        actual = losses(ours, batches, dtype)
    assert expected[-5:].mean() < 0.6 * expected[0], "nothing was learned"
    assert (actual - expected).abs().max() <= tolerance
    assert not torch.equal(actual, expected), "torch computed both"
