"""What a section of the page holds, before it is HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

from plotly.graph_objects import Figure

from bench.goals import AIM, BELOW, MUST, SHORT

# A verdict is a colour, a sign and a word: no reader needs all three.
SIGNS = {AIM: "✓✓", MUST: "✓", SHORT: "✗", BELOW: "○"}


@dataclass(frozen=True)
class Cell:
    """Text, the verdict that colours it, and what is told on hovering."""

    text: str
    verdict: str = ""
    title: str = ""

    @property
    def sign(self) -> str:
        return SIGNS.get(self.verdict, "")


@dataclass(frozen=True)
class Table:
    """The first column holds names, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture and what it shows."""

    title: str
    figure: Figure
    note: str = ""


@dataclass
class Section:
    """A suite on a machine."""

    anchor: str
    title: str
    about: str
    facts: dict[str, str]
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> dict[str, int]:
        """How often each verdict stands in the tables."""
        found = [cell.verdict for table in self.tables for row in table.rows for cell in row if cell.verdict]
        return {verdict: found.count(verdict) for verdict in SIGNS if verdict in found}
