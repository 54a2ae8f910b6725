"""Attention's variants beside recurrent networks: ``python -m bench variants``.

What `fastattn.compare` measures, kept with the machine that it was measured on: time and memory over length,
recall over distance, order with positions and without. ``python -m bench figures RESULT ...`` makes of it the
tables and pictures of docs/compare.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.results import Run, find
from fastattn import compare
from fastattn.compare import pictures, tables

SUITE = "variants"
PARTS: dict[str, tuple[Any, Any, Callable[..., Any]]] = {
    "cost": (compare.Cost, compare.CostSettings, compare.measure_cost),
    "recall": (compare.Recall, compare.RecallSettings, compare.measure_recall),
    "order": (compare.Order, compare.OrderSettings, compare.measure_order),
}
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "compare.md"
_PLACE = r"<!-- table: {name}\b[^\n]* -->\n.*?<!-- /table -->\n"


@dataclass
class Record:
    """Where and when, and what was measured of each part."""

    run: Run
    parts: dict[str, Any]  # by name in PARTS

    def save(self, path: Path | None = None) -> Path:
        """Write what `load` reads, under suite and time if no path is given."""
        path = self.run.save(path)
        kept = {name: dataclasses.asdict(part) for name, part in self.parts.items()}
        path.write_text(json.dumps({**json.loads(path.read_text()), "parts": kept}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote. Raises ValueError, in words, for anything else."""
        try:
            content = json.loads(path.read_text())
            kept = content.pop("parts")
            del content["schema"]
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path}: not a result of {SUITE!r} ({error})") from error
        return cls(Run(**content), {name: PARTS[name][0].from_dict(part) for name, part in kept.items()})


def measure(names: list[str], quick: bool, console: Console) -> Record:
    """Do the parts named, each with a bar."""
    settings = {name: PARTS[name][1].quick() if quick else PARTS[name][1]() for name in names}
    threads = settings["cost"].threads[-1] if "cost" in settings else 1
    seconds = settings["cost"].seconds if "cost" in settings else 0.0
    record = Record(Run.begin(SUITE, threads, seconds), {})
    record.run.versions |= {name: metadata.version(name) for name in ("fastattn", "torch")}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    for name in names:
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task(name)

            def tick(done: int, total: int, what: str) -> None:
                bars.update(bar, completed=done, total=total, description=f"{name}: {what}")  # noqa: B023

            record.parts[name] = PARTS[name][2](settings[name], tick)
    return record


def tables_of(record: Record) -> dict[str, tables.Table]:
    """All tables that the record has figures for, by name."""
    return {
        name: table
        for part, found in record.parts.items()
        for name, table in tables.of_part(part, found).items()
    }


def draw(record: Record, stem: Path) -> list[Path]:
    """Draw what the record has figures for, as PNG files that begin with `stem`."""
    drawn = []
    for part, found in record.parts.items():
        for name, figure in pictures.of_part(part, found):
            drawn.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure.savefig(drawn[-1])
    return drawn


def rewrite(text: str, named: dict[str, Record]) -> str:
    """`text` with the tables of these results, by name, in the places that say which table they are.

    Raises ValueError for a table that has no place.
    """
    for result, record in named.items():
        for name, table in tables_of(record).items():
            place = re.compile(_PLACE.format(name=name), re.DOTALL)
            if not place.search(text):
                raise ValueError(f"no table {name!r} in {DOCUMENT.name}")
            new = f"<!-- table: {name} {result} -->\n{caption(record)}: {table.title}.\n\n{table.markdown()}"
            text = place.sub(lambda _, new=new: f"{new}<!-- /table -->\n", text)
    return text


def places(text: str) -> list[str]:
    """The results named by the tables."""
    return list(dict.fromkeys(re.findall(r"<!-- table: \w+ (\S+) -->", text)))


def caption(record: Record) -> str:
    """On what and when."""
    run = record.run
    cpu = run.machine["cpu"].replace(" Processor", "")
    return f"{cpu} ({run.machine['isa']}), PyTorch {run.versions['torch'].split('+')[0]}, {run.when[:10]}"


def document(names: list[str], console: Console) -> int:
    """Write the tables and pictures of docs/compare.md anew."""
    named = {find(name).stem: Record.load(find(name)) for name in names}
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text(), named))
    console.print(f"written to {os.path.relpath(DOCUMENT)}", style="dim")
    return show(
        [path for record in named.values() for path in draw(record, DOCUMENT.with_suffix(""))], console
    )


def show(drawn: list[Path], console: Console) -> int:
    """Say what was drawn."""
    for path in drawn:
        console.print(f"drawn: {os.path.relpath(path)}", style="dim")
    return 0


def main(arguments: list[str], console: Console) -> int:
    """Measure, print, keep, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m bench variants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="less of everything: about a minute")
    parser.add_argument("--draw", metavar="RESULT", help="pictures of a result that was kept, beside it")
    options = parser.parse_args(arguments)
    if options.draw:
        return show(draw(Record.load(find(options.draw)), find(options.draw).with_suffix("")), console)
    record = measure(options.parts, options.quick, console)
    for table in tables_of(record).values():
        console.print(f"\n{table.title}", highlight=False)
        console.print(Markdown(table.markdown()))
    path = record.save()
    console.print(f"written to {os.path.relpath(path)}", style="dim")
    return show(draw(record, path.with_suffix("")), console)
