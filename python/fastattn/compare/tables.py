"""What was compared, as tables of text: for a terminal, or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from fastattn.compare.cost import Cost
from fastattn.compare.layers import ATTENTION, RECURRENT
from fastattn.compare.order import Order
from fastattn.compare.recall import Recall

_MODES = ((False, "forward"), (True, "training"))


class Table(NamedTuple):
    """A heading for each column, and rows of as many cells; the first column says what the row is of."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, without its title."""
        rule = ["---", *["--:"] * (len(self.headings) - 1)]
        lines = [self.headings, rule, *self.rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def times(cost: Cost) -> Table:
    """Milliseconds on the most threads and, in brackets, the speed-up over the fewest where these differ."""
    few, many = cost.settings.threads[0], cost.settings.threads[-1]
    lengths = [length for length in cost.settings.lengths if length in _shown(cost.settings.lengths)]
    rows = []
    for training, told in _MODES:
        for kind in cost.settings.kinds:
            seconds, ratio = cost.seconds(kind, training, many), cost.speedup(kind, training)
            factors = [f" ({ratio[n]:.1f}x)" if many > few else "" for n in lengths]
            cells = [_milliseconds(seconds[n]) + factor for n, factor in zip(lengths, factors, strict=True)]
            rows.append([f"{kind}, {told}", *cells])
    title = f"milliseconds on {many} thread{'s' * (many > 1)}"
    if many > few:
        title += f", and in brackets times as fast as on {few}"
    return Table(title, ["", *[str(length) for length in lengths]], rows)


def memory(cost: Cost) -> Table:
    """MiB beside input and weights."""
    lengths = list(cost.settings.memory_lengths)
    rows = []
    for training, told in _MODES:
        for kind in cost.settings.kinds:
            found = cost.bytes(kind, training)
            rows.append([f"{kind}, {told}", *[_mebibytes(found.get(length)) for length in lengths]])
    return Table("MiB beside input and weights", ["", *map(str, lengths)], rows)


def crossings(cost: Cost) -> Table:
    """The length from which on attention takes longer, and in brackets the same by FLOPs."""
    recurrent = [kind for kind in RECURRENT if kind in cost.settings.kinds]
    rows = []
    for training, told in _MODES:
        for threads in cost.settings.threads:
            for kind in (kind for kind in ATTENTION if kind in cost.settings.kinds):
                cells = [
                    f"{_length(cost.crossing(kind, other, training, threads), cost)} "
                    f"({_length(cost.crossing_of_flops(kind, other, training))})"
                    for other in recurrent
                ]
                plural = "s" * (threads > 1)
                rows.append([f"{kind}, {told}, {threads} thread{plural}", *cells])
    title = "length from which on attention takes longer; in brackets: does more operations"
    return Table(title, ["", *[f"than {kind}" for kind in recurrent]], rows)


def recall(result: Recall) -> Table:
    """Right answers by distance."""
    settings = result.settings
    rows = []
    for kind in settings.kinds:
        shares = result.accuracy(kind)
        rows.append([kind, *[f"{shares[distance]:.0%}" for distance in settings.distances]])
    title = f"right answers by distance; guessing: {result.chance:.0%}"
    return Table(title, ["", *map(str, settings.distances)], rows)


def order(result: Order) -> Table:
    """Right answers by kind of position."""
    rows = [[one.position, f"{one.parameters}", f"{one.accuracy:.1%}"] for one in result.results]
    title = f"right answers by kind of position; guessing between the two: {result.chance:.0%}"
    return Table(title, ["positions", "parameters", "right"], rows)


_TABLES: dict[str, dict[str, Callable[[Any], Table]]] = {
    "cost": {"times": times, "crossings": crossings, "memory": memory},
    "recall": {"recall": recall},
    "order": {"order": order},
}


def of_part(part: str, result: Cost | Recall | Order) -> dict[str, Table]:
    """All tables of what was compared, "cost", "recall" or "order", by name."""
    return {name: make(result) for name, make in _TABLES[part].items()}


def _shown(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Every other length where there are many, the last among them."""
    return lengths if len(lengths) <= 6 else lengths[::-2]


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _mebibytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.0f}" if value >= 10 * 2**20 else f"{value / 2**20:.1f}"


def _length(value: float, cost: Cost | None = None) -> str:
    """A length; of a measurement, "never" within what was measured is said so."""
    if value == math.inf:
        return "never" if cost is None else f"past {cost.settings.lengths[-1]}"
    if value == 0:
        return "always"
    return f"{value:.0f}"
