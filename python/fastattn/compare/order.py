"""Order: what attention can tell with positions, and without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastattn.compare.tasks import order_batch
from fastattn.compare.training import POSITIONS, Progress, Reader, announced, parameters, seeded, train


@dataclass(frozen=True)
class OrderSettings:
    """What is trained; the defaults are the full comparison, which takes a minute.

    Attributes
    ----------
    positions : tuple of str
        Of `training.POSITIONS`.
    length : int
        Of the sequences.
    width, heads : int
        Of attention.
    steps, batch, rate : int, int, float
        Of Adam.
    checks : int
        How often the network is asked while it learns.
    seed : int
        Of weights and sequences.
    threads : int
        The products are small: more threads do not help.
    """

    positions: tuple[str, ...] = POSITIONS
    length: int = 32
    width: int = 48
    heads: int = 4
    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3
    checks: int = 20
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(self.positions))

    @classmethod
    def quick(cls) -> OrderSettings:
        """Settings that take ten seconds."""
        return cls(steps=200, checks=8)


@dataclass(frozen=True)
class Ordered:
    """One network, trained: its parameters, and the share of right answers after some numbers of steps."""

    position: str
    parameters: int
    curve: tuple[tuple[int, float], ...]

    @property
    def accuracy(self) -> float:
        """The share of right answers at the end."""
        return self.curve[-1][1]


@dataclass
class Order:
    """All networks, and the share of right answers of one that sees the two symbols but not their places."""

    settings: OrderSettings
    chance: float = 0.5
    results: list[Ordered] = field(default_factory=list)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Order:
        """Read what `dataclasses.asdict` made."""
        results = [
            Ordered(one["position"], one["parameters"], tuple((step, share) for step, share in one["curve"]))
            for one in content["results"]
        ]
        return cls(OrderSettings(**content["settings"]), content["chance"], results)


def measure_order(settings: OrderSettings | None = None, progress: Progress | None = None) -> Order:
    """Train one layer of full self-attention to tell which symbol came first, with each kind of position.

    Sequences are those of `tasks.order_batch`. Attention without positions computes the same whatever the
    order of the rows before the question, so it can find the two symbols but not which is the first.

    Parameters
    ----------
    settings : OrderSettings, optional
        Default: ``OrderSettings()``, the full comparison.
    progress : callable, optional
        Called before each network with what is done, of how much, and what comes.

    Returns
    -------
    Order
    """
    order = Order(settings or OrderSettings())
    settings = order.settings
    for position in announced(settings.positions, "positions: {}".format, progress):
        order.results.append(train_order(settings, position))
    return order


def train_order(settings: OrderSettings, position: str) -> Ordered:
    """Train one network with one kind of position."""
    with seeded(settings.seed, settings.threads):
        model = Reader(
            "full", settings.width, heads=settings.heads, position=position, length=settings.length
        )
        curve = train(
            model,
            lambda count, generator: order_batch(count, settings.length, generator),
            steps=settings.steps,
            batch=settings.batch,
            rate=settings.rate,
            seed=settings.seed,
            checks=settings.checks,
        )
    return Ordered(position, parameters(model), tuple(curve))
