"""The command ``fastattn``, or ``python -m fastattn``. Needs typer and rich: ``pip install 'fastattn[cli]'``.

A command is a file here. Results go to stdout, everything else to stderr. Exit codes: 0, 1 for what failed, 2
for a command that was not understood.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        run = app()
    except ImportError as error:
        sys.exit(f"the command line of fastattn needs typer and rich ({error}): pip install 'fastattn[cli]'")
    run()


def app() -> typer.Typer:
    """Build the application; typer and rich are imported here and behind it, nowhere else."""
    from fastattn.cli.application import build

    return build()
