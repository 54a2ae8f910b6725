"""A small vision transformer reads handwritten digits, and shows where it looks.

    python examples/image.py --out pictures

An image is cut into patches, each patch becomes a vector, and from there on it is a text of patches:
positions are added, self-attention mixes them [1]. One more vector, the class token, stands for no patch. It
collects what is needed to name the digit: what it attends to in the last layer is what the eye is drawn to.

Data: the 1797 digits of 8 by 8 pixels that scikit-learn brings with it, so nothing is downloaded.

[1] Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fastattn import viz
from fastattn.nn import LearnedPositionalEncoding, SelfAttention

SIDE = 8  # pixels
WIDTH, HEADS, LAYERS = 64, 4, 2


class Block(nn.Module):
    """A layer of a transformer: patches exchange what they know, then each thinks about it for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.network_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = SelfAttention(WIDTH, HEADS, fused=True, dropout=0.1)
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return x of the next layer, (B, L, WIDTH)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.network(self.network_norm(x))


class VisionTransformer(nn.Module):
    """Names the digit in an image."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        patches = (SIDE // patch) ** 2
        # A convolution whose steps are as long as its kernel sees each patch once: it cuts and projects.
        self.cut = nn.Conv2d(1, WIDTH, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(WIDTH))
        # Attention sees a set: without positions an image with its patches shuffled would be the same image.
        self.positions = LearnedPositionalEncoding(1 + patches, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.classify = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score each of the ten digits, (B, 10), for images (B, 1, SIDE, SIDE) from 0 to 1."""
        patches = self.cut(images).flatten(2).transpose(1, 2)  # (B, patches, WIDTH), row by row
        x = torch.cat([self.class_token.expand(len(images), 1, -1), patches], dim=1)
        x = self.blocks(self.positions(x))
        return self.classify(self.norm(x[:, 0]))


def digits(seed: int) -> list[Tensor]:
    """Images and digits to train on, and others to test on: every fifth, each digit in the same share."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
    )
    return [images[train], labels[train], images[test], labels[test]]


def train(model: VisionTransformer, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Train and return the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        batch = torch.randint(len(images), (64,))
        scores = model(images[batch])
        loss = F.cross_entropy(scores, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:>4}: loss {loss.item():.3f}")
    return losses


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """The share of images whose digit has the highest score."""
    scores = model(images)
    return float((scores.argmax(-1) == labels).float().mean())


@torch.no_grad()
def draw(model: VisionTransformer, images: Tensor, labels: Tensor, folder: Path) -> Path:
    """Draw what the class token attends to in one image of each digit, a row a head."""
    chosen = [int(torch.nonzero(labels == digit)[0]) for digit in range(10)]
    with viz.record(model) as recording:
        model(images[chosen])
    # Of the last layer, in all heads, what query 0, the class token, gives to each key that is a patch.
    looks = torch.from_numpy(recording.layers[-1].weights)[:, :, 0, 1:]
    looks = looks.unflatten(-1, 2 * [math.isqrt(looks.shape[-1])])  # (10, HEADS, rows, columns)
    # Side by side, with a patch of nothing between them, the ten are one wide image.
    patch = SIDE // looks.shape[-1]
    wide_image = torch.cat(
        [F.pad(image, (0, patch), value=1.0) for image in 1 - 0.7 * images[chosen, 0]], dim=-1
    )
    wide_looks = torch.cat([F.pad(look, (0, 1)) for look in looks], dim=-1)
    figure = viz.overlay(
        wide_image,
        wide_looks.flatten(1),
        grid=tuple(wide_looks.shape[1:]),
        columns=1,
        title="What the class token looks at, by head of the last layer",
    )
    figure.set_size_inches(9.5, 5.5)
    return viz.save(figure, folder / "image.png")


def main(argv: Sequence[str] | None = None) -> float:
    """Train, test, draw; return the accuracy on images that training never saw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training, 64 images each (default: 1000)")
    parser.add_argument("--patch", type=int, choices=(1, 2, 4), default=2, help="pixels a side (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and batches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("output"), help="folder for the picture"
    )
    arguments = parser.parse_args(argv)

    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    torch.manual_seed(arguments.seed)
    images, labels, test_images, test_labels = digits(arguments.seed)
    model = VisionTransformer(arguments.patch)
    train(model, images, labels, arguments.steps)
    model.eval()
    right = accuracy(model, test_images, test_labels)
    print(f"accuracy on {len(test_images)} other images: {right:.1%}")
    path = draw(model, test_images, test_labels, arguments.out)
    print(f"picture: {path}")
    return right


if __name__ == "__main__":
    main()
