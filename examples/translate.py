"""An encoder and a decoder translate dates; cross-attention shows what each character was read from.

    python examples/translate.py --out pictures

"Saturday, the 3rd of March 1984" becomes "1984-03-03". This is what attention was invented for [1]: while the
decoder writes, it looks back at the place of the original that it translates, wherever that stands. All dates
are generated; those of the test are never seen in training, in any form.

[1] Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2014;
    in the form of Vaswani et al., "Attention Is All You Need", 2017.
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastattn import viz
from fastattn.nn import (
    CrossAttention,
    KVCache,
    SelfAttention,
    SinusoidalPositionalEncoding,
    TransformerEncoderLayer,
)

WIDTH, HEADS = 64, 4
PAD, START = 0, 1
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ,-"
CODES = {character: code for code, character in enumerate(CHARACTERS, 2)}
TARGET_LENGTH = len("1984-03-03")

FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
HELD_OUT = 2000  # of these 73,049 days
SMALL = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
)
SMALL += " fifteenth sixteenth seventeenth eighteenth nineteenth"
DAYS = [
    *SMALL.split(),
    "twentieth",
    *(f"twenty-{unit}" for unit in SMALL.split()[:9]),
    "thirtieth",
    "thirty-first",
]


def written(date: datetime.date, rng: random.Random) -> str:
    """One of the ways in which people write a date."""
    suffix = "th" if 4 <= date.day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    day = rng.choice([str(date.day), f"{date.day}{suffix}", DAYS[date.day - 1]])
    month = rng.choice([f"{date:%B}", f"{date:%b}"])
    form = rng.choice(["{day} {month} {year}", "the {day} of {month}, {year}", "{month} {day}, {year}"])
    weekday = rng.choice(["", "", f"{date:%A}, ", f"{date:%a} "])
    return (weekday + form.format(day=day, month=month, year=date.year)).lower()


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Characters as codes, padded to the longest text, (B, L); and how long each is, (B,)."""
    codes = [torch.tensor([CODES[character] for character in text]) for text in texts]
    lengths = torch.tensor([len(row) for row in codes])
    return nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=PAD), lengths


def decode(codes: Tensor) -> str:
    """The text of one row of codes."""
    return "".join(CHARACTERS[code - 2] if code > START else "?" for code in codes.tolist())


class DecoderLayer(nn.Module):
    """What is written so far looks at itself, then at the original, then thinks."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        # causal: in training the whole answer is there, and a character must not see those it is to predict.
        self.self_attention = SelfAttention(WIDTH, HEADS, causal=True)
        self.cross_attention = CrossAttention(WIDTH, HEADS)
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        lengths: Tensor,
        caches: Sequence[KVCache | None] = (None, None),
    ) -> Tensor:
        """Return x after the layer, (B, Lq, WIDTH). Without `memory` the caches hold what is attended to."""
        own, others = caches
        x = x + self.self_attention(self.norms[0](x), cache=own)
        # The encoder's rows past the end of a text are padding: kv_lengths says that they do not exist.
        x = x + self.cross_attention(self.norms[1](x), memory, kv_lengths=lengths, cache=others)
        return x + self.network(self.norms[2](x))


class Translator(nn.Module):
    """The encoder reads the original once; the decoder writes character by character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 + len(CHARACTERS), WIDTH, padding_idx=PAD)
        self.positions = SinusoidalPositionalEncoding(WIDTH)
        layer = TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.decoder = DecoderLayer()
        self.norm, self.predict = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 + len(CHARACTERS))

    def read(self, originals: Tensor) -> Tensor:
        """The encoder's view of each character of the originals, (B, L, WIDTH)."""
        return self.encoder(self.positions(self.embed(originals)), src_key_padding_mask=originals == PAD)

    def write(
        self,
        written: Tensor,
        memory: Tensor | None,
        lengths: Tensor,
        caches: Sequence[KVCache | None] = (None, None),
    ) -> Tensor:
        """Scores of what comes after each character of `written`, (B, Lq, codes)."""
        held = 0 if caches[0] is None else len(caches[0])
        x = self.positions(self.embed(written), offset=held)
        return self.predict(self.norm(self.decoder(x, memory, lengths, caches)))

    @torch.no_grad()
    def translate(self, texts: Sequence[str]) -> list[str]:
        """Translations, each character the likeliest after those before.

        The caches keep the keys and values of what was written and of the original: each step projects one
        character only.
        """
        originals, lengths = encode(texts)
        memory: Tensor | None = self.read(originals)
        caches = (KVCache(), KVCache())
        codes = torch.full((len(texts), 1), START)
        for _ in range(TARGET_LENGTH):
            scores = self.write(codes[:, -1:], memory, lengths, caches)
            memory = None  # now in the cache
            codes = torch.cat([codes, scores.argmax(-1)], dim=1)
        return [decode(row) for row in codes[:, 1:]]


def train(model: Translator, dates: Sequence[datetime.date], steps: int, rng: random.Random) -> None:
    """Teach each next character, given the original and the right characters before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        batch = rng.choices(dates, k=64)
        originals, lengths = encode([written(date, rng) for date in batch])
        answers, _ = encode([date.isoformat() for date in batch])
        # What the decoder sees is the answer moved by one: START, then all but the last character.
        seen = F.pad(answers[:, :-1], (1, 0), value=START)
        scores = model.write(seen, model.read(originals), lengths)
        loss = F.cross_entropy(scores.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:>4}: loss {loss.item():.3f}")


def split(rng: random.Random) -> tuple[list[datetime.date], list[datetime.date]]:
    """All dates of two centuries: those to train on, and those that only the test sees."""
    dates = [FIRST + datetime.timedelta(days) for days in range((LAST - FIRST).days + 1)]
    rng.shuffle(dates)
    return dates[HELD_OUT:], dates[:HELD_OUT]


def look(model: Translator, text: str) -> tuple[str, np.ndarray]:
    """The translation, and the weights of each of its characters on those of the text, (HEADS, Lq, Lk)."""
    with viz.record(model) as recording:
        (translation,) = model.translate([text])
    # One call a character, with one query each.
    calls = recording.select("decoder.cross_attention")
    return translation, np.concatenate([call.weights[0] for call in calls], axis=1)


def draw(model: Translator, text: str, folder: Path) -> Path:
    """Draw where the decoder looked for each character it wrote, averaged over the heads."""
    translation, weights = look(model, text)
    print(f"   {text:<45} {translation}")
    title = "What each character was read from"
    figure = viz.heatmap(weights, list(translation), list(text), head="mean", title=title)
    return viz.save(figure, folder / "translate.png")


def main(argv: Sequence[str] | None = None) -> float:
    """Train, test, draw; return the share of unseen dates that are translated without a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="of training, 64 dates each (default: 1500)")
    parser.add_argument("--text", default="friday, the twenty-third of march, 1984", help="what is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and batches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("output"), help="folder for the picture"
    )
    arguments = parser.parse_args(argv)

    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    text = arguments.text.lower()
    if not text or set(text) - set(CODES):
        parser.error(f"--text: expected letters, digits, spaces, commas and hyphens, got {arguments.text!r}")
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    dates, held_out = split(rng)
    model = Translator()
    train(model, dates, arguments.steps, rng)

    model.eval()
    originals = [written(date, rng) for date in held_out]
    translations = model.translate(originals)
    right = [one == date.isoformat() for one, date in zip(translations, held_out, strict=True)]
    for original, translation in list(zip(originals, translations, strict=True))[:5]:
        print(f"   {original:<45} {translation}")
    accuracy = sum(right) / len(right)
    print(f"exact match on {len(held_out)} dates that were never seen: {accuracy:.1%}")
    print(f"picture: {draw(model, text, arguments.out)}")
    return accuracy


if __name__ == "__main__":
    main()
