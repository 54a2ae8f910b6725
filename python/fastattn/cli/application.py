"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import fastattn
from fastattn.cli import compare, demo, explain, info, view

_HELP = """Exact, fast attention: what it runs on, what a call costs, what a model looks at.

`fastattn COMMAND --help` has examples. `fastattn --install-completion` lets the shell complete commands and
options.
"""


def build() -> typer.Typer:
    """Return the application."""
    cli = typer.Typer(
        name="fastattn",
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    cli.callback()(_options)
    for module, needs_arguments in (
        (info, False),
        (demo, False),
        (explain, True),
        (view, True),
        (compare, False),
    ):
        command = getattr(module, module.__name__.rpartition(".")[2])
        # In a row of their own each; code, so that a shell's quotes stay what they are.
        examples = "\n\n".join(["Examples:", *(f"`{example}`" for example in module.EXAMPLES)])
        cli.command(no_args_is_help=needs_arguments, epilog=examples)(command)
    return cli


def _version(asked: bool) -> None:
    if asked:
        typer.echo(fastattn.__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of no command in particular."""
