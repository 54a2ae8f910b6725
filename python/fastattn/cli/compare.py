"""``fastattn compare``: one layer of attention beside RNN, GRU and LSTM."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastattn.cli.console import err, mendable, out, print_json
from fastattn.demo.models import check_installed

EXAMPLES = (
    "fastattn compare",
    "fastattn compare --full --out pictures",
    "fastattn compare --part recall --part order --json > learned.json",
)


class Part(str, Enum):
    """What is compared."""

    cost = "cost"
    recall = "recall"
    order = "order"


def compare(
    full: Annotated[bool, typer.Option("--full", help="All of it: about half an hour.")] = False,
    parts: Annotated[
        list[Part] | None, typer.Option("--part", help="May be given more than once.", show_default="all")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Where pictures go.", file_okay=False, show_default="no pictures"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Compare a layer of attention with the recurrent networks that it replaced, on this machine.

    What it costs in time and memory over the length, how far back it remembers, and what it knows of order,
    with each kind of position and with none. By default less of everything: about a minute.
    """
    with mendable(OSError, ValueError, RuntimeError):
        check_installed("torch", extra="torch")
        if folder is not None:
            check_installed("matplotlib", extra="viz")
            folder.mkdir(parents=True, exist_ok=True)
        with err().status("importing torch"):
            import fastattn.compare as library
            from fastattn.compare import pictures, tables

        wanted = list(dict.fromkeys(parts or Part))
        results = {part: _measure(library, part, full) for part in wanted}
        if as_json:
            print_json({part.value: dataclasses.asdict(result) for part, result in results.items()})
        else:
            _print(tables, results, out())
        if folder is not None:
            _draw(pictures, results, folder)


def _measure(library: ModuleType, part: Part, full: bool) -> Any:
    """Measure one part, with a bar."""
    kind = getattr(library, f"{part.value.capitalize()}Settings")
    settings = kind() if full else kind.quick()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(part.value)

        def tick(done: int, total: int, what: str) -> None:
            bars.update(bar, completed=done, total=total, description=f"{part.value}: {what}")

        return getattr(library, f"measure_{part.value}")(settings, tick)


def _print(tables: ModuleType, results: dict[Part, Any], console: Console) -> None:
    for part, result in results.items():
        for found in tables.of_part(part.value, result).values():
            if not found.rows:
                continue
            console.print(found.title, style="bold", highlight=False)
            table = Table()
            for place, heading in enumerate(found.headings):
                table.add_column(heading, justify="right" if place else "left")
            for row in found.rows:
                table.add_row(*row)
            console.print(table)
            console.print()


def _draw(pictures: ModuleType, results: dict[Part, Any], folder: Path) -> None:
    for part, result in results.items():
        for name, figure in pictures.of_part(part.value, result):
            path = folder / f"{name}.png"
            figure.savefig(path)
            err().print(f"drawn: {path}", highlight=False, markup=False, soft_wrap=True)
