"""A language model of Shakespeare's sonnets: it learns to write the next character, then writes.

    python examples/language_model.py --prompt "Shall I"

Masked multi-head self-attention is all that carries a thought from one character to another. Three things
that large models do are done here as well: positions by turning queries and keys (RoPE [1]); a window, each
layer looking back WINDOW characters and no further; and a cache of keys and values, so that a new character
costs as much however long the text has become. Writing with the cache is checked against writing without.

The text is sonnets.txt, 154 sonnets of 1609, in the public domain; README.md says where it is from.

[1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import fastattn as fa
from fastattn import viz
from fastattn.nn import RotaryEmbedding

WIDTH, HEADS, LAYERS = 128, 4, 3
LENGTH, BATCH = 256, 8  # characters of a piece of text, and pieces a step of training
WINDOW = 64  # characters that a query may look at, its own among them
LONGEST = 4096  # characters that can be written

TEXT = Path(__file__).with_name("sonnets.txt").read_text(encoding="utf-8")
CHARACTERS = sorted(set(TEXT))
CODES = {character: code for code, character in enumerate(CHARACTERS)}


@dataclass
class Cache:
    """Keys and values of one layer, of the last positions: a ring in which new rows overwrite the oldest.

    Nothing older than WINDOW is ever looked at, so a ring of 2 * WINDOW rows has room for that and for as
    many new characters in one call.
    """

    keys: Tensor  # (1, 2 * WINDOW, HEADS, WIDTH / HEADS)
    values: Tensor
    length: int = 0  # characters so far, also those that were overwritten

    @classmethod
    def empty(cls) -> Cache:
        """A cache before the first character."""
        shape = (1, 2 * WINDOW, HEADS, WIDTH // HEADS)
        return cls(torch.zeros(shape), torch.zeros(shape))


class MaskedAttention(nn.Module):
    """Each character looks at itself and those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # query, key and value in one product
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.rotary = RotaryEmbedding(WIDTH // HEADS)
        angles = torch.outer(torch.arange(LONGEST), self.rotary.inv_freq)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Return what was looked up, (B, L, WIDTH); with a cache x are the characters after those in it."""
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, -1)).unbind(2)  # (B, L, HEADS, columns)
        if cache is None:
            # Turned by angles that grow with the position, a query and a key meet at an angle that depends on
            # their distance alone: the same pattern is found anywhere.
            query, key = self.rotary(query, key, layout="bshd")
            out = fa.attention(query, key, value, causal=True, window=(WINDOW - 1, 0), layout="bshd")
        else:
            # One call turns query and key, writes key and value to the ring, and attends to what is there.
            out = fa.attention_with_kvcache(
                query,
                cache.keys,
                cache.values,
                new_key=key,
                new_value=value,
                cache_seqlens=cache.length,
                rotary_cos=self.cos,
                rotary_sin=self.sin,
                window=(WINDOW - 1, 0),
                rolling=True,
            )
            cache.length += x.shape[1]
        return self.output(out.flatten(-2))


class Block(nn.Module):
    """A layer: look back, then think."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.network_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = MaskedAttention()
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.1)  # the text is short: without it the model would learn it by heart

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Return x of the next layer, (B, L, WIDTH)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        return x + self.dropout(self.network(self.network_norm(x)))


class LanguageModel(nn.Module):
    """Scores every character as the next."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.predict = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, codes: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Scores of what follows each of `codes`, (B, L) to (B, L, characters)."""
        x = self.embed(codes)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[layer])
        return self.predict(self.norm(x))


def encode(text: str) -> Tensor:
    """The codes of a text, (L,)."""
    return torch.tensor([CODES[character] for character in text])


@torch.no_grad()
def write(
    model: LanguageModel, prompt: str, count: int, temperature: float = 0.8, cached: bool = True
) -> tuple[str, Tensor]:
    """Go on from `prompt`; return `count` characters and the scores that each was chosen by.

    At temperature 0 the character with the highest score comes next; at 1 characters come as often as the
    model thinks they do. Without a cache every step computes the whole text again.
    """
    codes = encode(prompt)[None]
    caches = [Cache.empty() for _ in model.blocks] if cached else None
    # A prompt goes in by pieces that the rings have room for.
    for piece in codes[:, :-1].split(WINDOW, dim=1) if cached else ():
        model(piece, caches)
    scores = []
    for _ in range(count):
        last = model(codes[:, -1:], caches)[:, -1] if cached else model(codes)[:, -1]
        if temperature > 0:
            following = torch.multinomial((last / temperature).softmax(-1), 1)
        else:
            following = last.argmax(-1, keepdim=True)
        codes = torch.cat([codes, following], dim=1)
        scores.append(last)
    written = "".join(CHARACTERS[code] for code in codes[0, len(prompt) :].tolist())
    return written, torch.cat(scores)


def pieces(codes: Tensor, count: int) -> Tensor:
    """Cut `count` pieces of LENGTH characters, and the one after them, at random places."""
    starts = torch.randint(len(codes) - LENGTH, (count, 1))
    return codes[starts + torch.arange(LENGTH + 1)]


def loss_of(model: LanguageModel, batch: Tensor) -> Tensor:
    """Surprise at the next character in nats, averaged: log(62) = 4.13 where nothing is known."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(model: LanguageModel, steps: int) -> tuple[list[float], dict[int, float]]:
    """Train on nine tenths of the text; return the loss of each step, and now and then that of the rest."""
    codes = encode(TEXT)
    known, unknown = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    test = unknown[: len(unknown) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    losses, tests = [], {}
    for step in range(steps):
        loss = loss_of(model, pieces(known, BATCH))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            model.eval()
            with torch.no_grad():
                tests[step] = loss_of(model, test).item()
            model.train()
            print(f"step {step:>4}: loss {losses[-1]:.3f}, of text not seen {tests[step]:.3f}")
    return losses, tests


def check_cache(model: LanguageModel, prompt: str, count: int) -> float:
    """The largest difference that the cache makes to the scores, of a text longer than the window."""
    with_cache, scores = write(model, prompt, count, temperature=0)
    without, expected = write(model, prompt, count, temperature=0, cached=False)
    if with_cache != without:
        raise AssertionError(f"with a cache the model writes {with_cache!r}, without {without!r}")
    return float((scores - expected).abs().max())


def draw_losses(losses: Sequence[float], tests: dict[int, float], folder: Path) -> Path:
    """Draw the loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(losses, color="#56B4E9", linewidth=0.8, label="text it learns from")
    axes.plot(
        list(tests), list(tests.values()), "o-", color="#D55E00", markersize=4, label="text it never saw"
    )
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="Learning to write the next character")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return viz.save(figure, folder / "language_model.png")


def draw_distances(model: LanguageModel, folder: Path) -> Path:
    """Draw how far each head of each layer looks back, over the start of the text not seen."""
    start = len(TEXT) * 9 // 10
    with viz.record(model) as recording, torch.no_grad():
        model(encode(TEXT[start : start + LENGTH])[None])
    heads = torch.cat([torch.from_numpy(layer.weights[0]) for layer in recording.layers])
    title = f"How far back each head looks ({LAYERS} layers of {HEADS}, from the first)"
    return viz.save(viz.distance(heads, title=title), folder / "language_model_distance.png")


def main(argv: Sequence[str] | None = None) -> float:
    """Train, write, check, draw; return the last loss of text that was not seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training (default: 1000)")
    parser.add_argument("--prompt", default="Shall I compare thee", help="what the model goes on from")
    parser.add_argument("--characters", type=int, default=400, help="that it writes (default: 400)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest; 1: as learned")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and writing (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("output"), help="folder for the pictures"
    )
    arguments = parser.parse_args(argv)
    prompt, count = arguments.prompt, arguments.characters
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    if not prompt or set(prompt) - set(CODES):
        parser.error(f"--prompt: expected characters of {''.join(CHARACTERS)!r}, got {prompt!r}")
    if count < 1 or len(prompt) + count > LONGEST:
        parser.error(f"--characters: expected 1 to {LONGEST - len(prompt)} after this prompt, got {count}")

    torch.manual_seed(arguments.seed)
    model = LanguageModel()
    losses, tests = train(model, arguments.steps)
    model.eval()
    written, _ = write(model, prompt, count, arguments.temperature)
    print(f"\n{prompt}{written}\n")
    difference = check_cache(model, prompt, 2 * WINDOW)
    print(
        f"{2 * WINDOW} characters with a cache and without: the same; scores at most {difference:.0e} apart"
    )
    print(f"pictures: {draw_losses(losses, tests, arguments.out)}, {draw_distances(model, arguments.out)}")
    return list(tests.values())[-1]


if __name__ == "__main__":
    main()
