"""Where commands write, and how they give up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_ENDLESS = 10_000  # columns, where nobody looks: what reads a pipe reads lines


def out() -> Console:
    """Stdout, for results."""
    return _console(stderr=False)


def err() -> Console:
    """Stderr, for progress and errors."""
    return _console(stderr=True)


def print_json(facts: Any) -> None:
    """Print what a script reads."""
    typer.echo(json.dumps(facts, indent=2))


def print_facts(rows: Mapping[str, str], console: Console) -> None:
    """Print names and what there is to say of them, in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table, highlight=False)


def fail(message: str) -> typer.Exit:
    """Say what went wrong; to be raised: ``raise fail(...)``."""
    err().print(f"[bold red]error[/]: {_escaped(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


def usage(option: str, message: str) -> typer.BadParameter:
    """The error of an option that was not understood; to be raised."""
    return typer.BadParameter(message, param_hint=f"'{option}'")


@contextmanager
def mendable(*errors: type[Exception]) -> Iterator[None]:
    """End the command, without a traceback, where the user can mend what is raised.

    Packages that are missing always are; their errors say what to install.
    """
    caught: tuple[type[Exception], ...] = (ImportError, *errors)
    try:
        yield
    except typer.Exit:  # which is a RuntimeError, and somebody's last word
        raise
    except caught as error:
        raise fail(" ".join(str(error).split())) from error


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_ENDLESS)


def _escaped(text: str) -> str:
    """`text` without meaning for rich."""
    from rich.markup import escape

    return escape(text)
